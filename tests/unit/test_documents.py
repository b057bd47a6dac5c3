from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import DocumentError, blocks, missing_line, run_page
from test_documents_run import EXECUTED

from nanoos_fw.cli import _parser
from nanoos_fw.cli.python_calls import PYTHON_CALLS, commands
from nanoos_fw.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))
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


@pytest.mark.parametrize("name", [*DOCUMENTS, *PAGES])
def test_the_links_of_a_document_lead_to_files(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), target


# ------------------------------------------------------------------ the folder docs


def test_every_page_with_commands_is_executed() -> None:
    """By name: a new page must be given the test that runs it."""
    with_commands = {
        page
        for page in PAGES
        if any(b.language in ("bash", "python") for b in page_blocks(page))
    }
    assert with_commands == set(EXECUTED)


def test_few_blocks_are_excused_from_running() -> None:
    """A site's modules, and tools of another package: no test machine has them."""
    excused = [b.text for page in PAGES for b in page_blocks(page) if b.elsewhere]
    assert len(excused) == 2
    assert excused[0].startswith("module load")
    assert excused[1].startswith("mongodump")


@pytest.mark.parametrize("page", PAGES)
def test_nanoos_commands_in_the_text_of_a_page_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    known = set(commands())
    for words in re.findall(r"`nanoos\s+([a-z][^`]*)`", text):
        said = words.split()
        assert (
            said[0] in known
            or " ".join(said[:2]) in known
            or any(name.startswith(f"{said[0]} ") for name in known)
        ), words


def page_blocks(page: str) -> list[Any]:
    return blocks((ROOT / page).read_text(encoding="utf-8"))


# ------------------------------------------------------- commands and Python calls


def test_every_command_has_a_python_call() -> None:
    assert set(PYTHON_CALLS) == set(commands())


@pytest.mark.parametrize("command", PYTHON_CALLS)
def test_the_python_call_of_a_command_is_documented_and_is_what_it_calls(
    command: str,
) -> None:
    module, _, name = PYTHON_CALLS[command].partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)
    documentation = inspect.getdoc(found)
    assert documentation
    reference = "".join(
        p.read_text() for p in (ROOT / "docs" / "reference").glob("python-*.rst")
    )
    home = getattr(found, "__module__", module)
    assert f":: {module}\n" in reference or f":: {home}\n" in reference
    handler = commands()[command].get_default("command")
    source = inspect.getsource(inspect.getmodule(handler))  # type: ignore[arg-type]
    called = name.rpartition(".")[2]
    assert re.search(rf"\b{called}(?:\(| as )", source), (
        f"nanoos {command} does not call {PYTHON_CALLS[command]}"
    )


# --------------------------------------------------------- what runs the documents

PAGE = """
Text with `code`.

```{code-block} text
:caption: data.txt

one
```

```bash
cat data.txt
export GREETING=hello
mkdir -p below && cd below
```

```text
one
```

```python
import os
print(os.environ["GREETING"], 1.04, os.path.basename(os.getcwd()))
```

```text
hello 1.0… below
```

```{code-block} bash
:class: elsewhere

no-such-program
```
"""


def written(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_blocks_run_in_order_with_what_was_before(tmp_path: Path) -> None:
    assert run_page(written(tmp_path, PAGE), tmp_path / "there") == 2
    assert (tmp_path / "there" / "data.txt").read_text() == "one\n"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("cat data.txt", "cat absent.txt", r"page.md:11: exit code 1"),
        ("hello 1.0…", "hello 2.0…", r"not printed: 'hello 2.0… below'"),
        ("no-such-program", "if true", r"page.md:32: exit code 2"),
    ],
)
def test_a_page_that_does_not_say_the_truth_fails(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    with pytest.raises(DocumentError, match=said):
        run_page(written(tmp_path, PAGE.replace(old, new)), tmp_path / "there")


def test_a_page_that_goes_on_after_a_failing_command_fails(tmp_path: Path) -> None:
    page = written(tmp_path, "```bash\nfalse\ntrue\n```\n")
    with pytest.raises(DocumentError, match="exit code 1"):
        run_page(page, tmp_path / "there")


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("a 1.00 b", "a 1.05 b", True),
        ("a 1.00 b", "a 1.25 b", False),
        ("a 100 b", "a 101 b", False),
        ("-0.967 ± 0.178", "-0.95 ± 0.18", True),
        ("-0.967", "0.967", False),
        ("x … z", "x y z", True),
        ("first\nsecond", "second\nfirst", False),
    ],
)
def test_outputs_are_compared_line_by_line_in_order(
    expected: str, printed: str, *, same: bool
) -> None:
    assert (missing_line(expected, printed) is None) is same


@pytest.mark.skipif(
    importlib.util.find_spec("sphinx") is None
    or importlib.util.find_spec("furo") is None,
    reason="Sphinx is not installed (extra docs)",
)
def test_the_documentation_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    """A page without the reference, so that it takes seconds: no font, no script."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "index.md").write_text("# Title\n\nText.\n")
    text = (
        (ROOT / "docs" / "conf.py")
        .read_text()
        .replace(
            "HERE = Path(__file__).resolve().parent",
            f"HERE = Path({str(ROOT)!r}) / 'docs'",
        )
    )
    static = ROOT / "docs" / "static"
    text = text.replace('["static"]', f"[{str(static)!r}]")
    (source / "conf.py").write_text(text)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-W",
            "-q",
            str(source),
            str(tmp_path / "out"),
        ],
        check=True,
        timeout=600,
    )
    html = (tmp_path / "out" / "index.html").read_text()
    loaded = re.findall(r"(?:src|href)=\"(https?:[^\"]+)", html)
    assert [url for url in loaded if "furo" not in url and "sphinx" not in url] == []
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+https?:", html)
