"""Simulations submitted without a campaign: workflow file in, stored results out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fireworks import FWorker, Workflow
from fireworks.core.rocket_launcher import launch_rocket
from pymatgen.core import Lattice, Structure

from nanoos_fw import firetasks
from nanoos_fw.cli import main as nanoos
from nanoos_fw.errors import InputError
from nanoos_fw.firetasks import AnalyzeTrajectoryTask, RunMDTask
from nanoos_fw.firetasks.md import MDMethod
from nanoos_fw.firetasks.relaxation import PotentialChoice
from nanoos_fw.md.inputs import MDConfig
from nanoos_fw.md.output import simulation_thermo
from nanoos_fw.stores.database import get_artifact, load_launchpad, open_database
from nanoos_fw.stores.structures import NewStructure, StructureStore
from nanoos_fw.workflows import simulation_workflow

DYNAMICS = """\
schema_version: 1
structure: cell.cif
potential: zhou2004
work_dir: unused
simulation:
  workflow_type: MD_NVT_LAMMPS
  temperature_k: 300.0
  equilibration_steps: 100
  num_steps: 200
  thermo_every: 10
  dump_every: 5
  restart_every: 100
  supercell_min_atoms: 32
"""
LJ = """\
schema_version: 1
structure: unused.cif
potential:
  pair_style: lj/cut 8.5
  pair_coeff: ["1 1 0.0104 3.4"]
  elements: [Ar]
  units: metal
  citation: none
work_dir: unused
simulation: {workflow_type: ELASTIC_LAMMPS}
"""


def fcc(symbol: str, a: float) -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), [symbol], [[0] * 3])


def test_the_workflow_survives_the_database_and_knows_its_question() -> None:
    choice = PotentialChoice(name="zhou2004", elements=("Cu",))

    def made(identity: str = "i", **config: Any) -> Workflow:
        md = MDMethod(config=MDConfig(**config))
        return simulation_workflow("k", choice, identity, md, "/w", label="copper")

    (firework,) = Workflow.from_format(made().to_format("json"), "json").fws
    assert [type(t) for t in firework.tasks] == [RunMDTask, AnalyzeTrajectoryTask]
    assert firework.tasks[0].parameters.structure == "k"
    assert firework.spec["_category"] == "md"
    assert made().metadata == made().metadata
    others = [made("j"), made(seed=2), made(dump_every=0)]
    assert len({w.metadata["key"] for w in (made(), *others)}) == 4
    for config in ({"dump_every": 0}, {"workflow_type": "STATIC_LAMMPS"}):
        (firework,) = made(**config).fws  # there is nothing to analyse
        assert [type(task) for task in firework.tasks] == [RunMDTask]


@pytest.mark.parametrize(
    "which",
    [
        {},
        {"structure": "s"},
        {"campaign": "c", "rank": 1},
        {"structure": "s", "potential": {"name": "sw", "elements": ["Si"]}, "rank": 1},
    ],
)
def test_a_task_wants_a_rank_or_a_structure(which: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="either campaign, rank and relaxation"):
        RunMDTask(md={"config": {}}, **which)


@pytest.mark.mongodb
@pytest.mark.lammps
def test_submitted_simulations_end_in_the_store(
    launchpad_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(firetasks.md, "_MAX_SITES", 40)
    launchpad = load_launchpad(launchpad_file)
    database = open_database(launchpad)
    workflow = tmp_path / "md.yaml"

    def submit(text: str, *words: str, code: int = 0) -> Any:
        workflow.write_text(text)
        assert nanoos(["md", "submit", str(workflow), "--json", *words]) == code
        out, err = capsys.readouterr()
        return json.loads(out) if code == 0 else err

    def launched(state: str = "COMPLETED") -> dict[str, Any]:
        assert launch_rocket(launchpad, FWorker())
        firework = launchpad.get_fw_by_id(max(launchpad.get_fw_ids()))
        assert firework.state == state
        capsys.readouterr()
        which = {"structure": firework.launches[-1].action.stored_data["structure"]}
        return dict(database["simulations"].find_one(which))

    # Nothing is written before all of it is checked.
    assert "cell.cif" in submit(DYNAMICS, code=1)
    fcc("Fe", 3.6).to(filename=str(tmp_path / "cell.cif"))
    refused = submit(DYNAMICS.replace("zhou2004", "Si.sw"), code=1)
    assert "has no parameters for Fe" in refused
    assert "analyses" in submit(DYNAMICS, "--analyses", "rfd", code=1)
    assert "0 structures" in submit(DYNAMICS, "--structure", "nobody", code=1)
    few = DYNAMICS.replace("dump_every: 5", "dump_every: 500")
    assert "no frames to analyse" in submit(few, code=1)
    assert not database["structures"].count_documents({})
    assert not database["workflows"].count_documents({})

    # Dynamics of a file's structure.
    added = submit(DYNAMICS, "--analyses", "rdf,msd,vdos")
    assert added["added"]
    assert added["n_atoms"] == 32
    assert not submit(DYNAMICS, "--analyses", "rdf,msd,vdos")["added"]
    found = launched()
    assert found["status"] == "done"
    assert found["structure"] == added["structure"]
    result = found["result"]
    assert result["steps"] == 300
    analyses = list(result["analyses"].values())
    assert {a["analysis"] for a in analyses} == {"rdf", "msd", "vdos"}
    assert not [a for a in analyses if "error" in a]
    assert len(result["final_structure"]["sites"]) == 32
    # The same numbers as `nanoos md run` gives without a database.
    words = ["workflow_type", "supercell_min_atoms", "equilibration_steps", "num_steps"]
    words += ["thermo_every", "dump_every", "restart_every", "temperature_k"]
    lines = [line.strip() for line in DYNAMICS.splitlines()]
    values = dict(line.split(": ") for line in lines if line.split(":")[0] in words)
    kind = values.pop("workflow_type")
    settings = [f"{name}={value}" for name, value in values.items()]
    command = ["md", "run", "cell.cif", "--workflow", kind, "--potential", "zhou2004"]
    assert nanoos([*command, "--set", *settings, "-o", "here"]) == 0
    capsys.readouterr()
    table = simulation_thermo(tmp_path / "here" / "output")
    del table.columns["wall_time_s"], result["thermo"]["wall_time_s"]
    assert result["thermo"] == {n: list(v) for n, v in table.columns.items()}

    # Commands instead of a name, for a structure that the store has.
    entry = NewStructure(fcc("Ar", 5.25), label="argon")
    key = StructureStore(database).add([entry], in_set="x").keys[0]
    assert submit(LJ, "--structure", "argon")["structure"] == key
    found = launched()
    assert found["result"]["elastic"]["stable"]
    assert "analyses" not in found["result"]

    # A large cell's last structure is beside the document.
    large = DYNAMICS.replace("32", "50").replace("dump_every: 5", "dump_every: 0")
    key = submit(large, "--structure", added["structure"])["structure"]
    launched()
    newest = list(database["simulations"].find({"structure": key}))[-1]["result"]
    digest = newest["final_structure"]["artifact"]
    held = Structure.from_dict(json.loads(get_artifact(database, digest)))
    assert len(held) == newest["n_atoms"] > 40
