from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from nanoos_fw.cli import _parser
from nanoos_fw.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
NOT_SETTINGS = {"CONFIG"}


def code_blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def shell_commands(name: str) -> list[list[str]]:
    text = "\n".join(code_blocks(name, "bash")).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [command for command in words if command]


def test_the_first_screen_of_the_readme_has_the_two_commands() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:16])
    assert re.search(r"^scripts/demo\b", first_screen, flags=re.M)
    assert re.search(r"^scripts/test\b", first_screen, flags=re.M)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_scripts_of_a_document_can_be_run(name: str) -> None:
    scripts = {
        command[0]
        for command in shell_commands(name)
        if command[0].startswith(("scripts/", ".ci/"))
    }
    assert scripts
    for script in scripts:
        assert os.access(ROOT / script, os.X_OK), script


def test_the_nanoos_commands_of_the_readme_are_understood() -> None:
    commands = [c[1:] for c in shell_commands("README.md") if c[0] == "nanoos"]
    assert {command[0] for command in commands} >= {"demo", "import", "status"}
    for command in commands:
        _parser().parse_args(command)  # exits on what it does not know


def test_the_settings_of_the_readme_are_those_of_the_program() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {n.lower() for n in set(re.findall(r"NANO_OS_([A-Z_]+)", text))}
    known = set(Settings.model_fields)
    assert known <= named
    assert named - known == {name.lower() for name in NOT_SETTINGS}


def test_the_python_of_the_readme_runs() -> None:
    blocks = code_blocks("README.md", "python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_links_of_a_document_lead_to_files(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), target
