"""What goes wrong inside LAMMPS: failures, crashes, and what is tried then."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from lammps_stops import asked_to_stop_when
from md_task import simulate_by_task
from pymatgen.core import Lattice, Structure

from nanoos_fw.cli import main
from nanoos_fw.errors import LaunchError, OutOfTimeError, SimulationError
from nanoos_fw.md import relaxation
from nanoos_fw.md.engine import LAMMPSEngine
from nanoos_fw.md.fork_server import ForkServer, shared_server
from nanoos_fw.md.output import newest_try
from nanoos_fw.md.potentials import lennard_jones_potential
from nanoos_fw.md.recipes import file_potential
from nanoos_fw.md.relaxation import RelaxationSettings, relax_structures
from nanoos_fw.md.restarts import PORTABLE
from nanoos_fw.operations.rules import failure_class
from nanoos_fw.parallel import Resources
from nanoos_fw.provenance import read_json

pytestmark = pytest.mark.lammps


def silicon(repeat=1):
    cell = Structure.from_spacegroup("Fd-3m", Lattice.cubic(5.431), ["Si"], [[0] * 3])
    return cell * ([repeat] * 3)


def argon(a, repeat):
    cell = Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), ["Ar"], [[0] * 3])
    return cell * ([repeat] * 3)


ARGON = lennard_jones_potential({"Ar": (0.0104, 3.4)}, cutoff_a=8.5)
SHORT = {
    "num_steps": 40,
    "equilibration_steps": 0,
    "thermo_every": 1,
    "dump_every": 0,
    "restart_every": 20,
}
HOT = {
    **SHORT,
    "potential": file_potential("sw", "Si.sw"),
    "temperature": 2.5e4,
    "timestep": 12.0,
    "supercell_min_atoms": 60,
}


# ------------------------------------------------------------- classes and corrections


@pytest.mark.parametrize(
    ("structure", "parameters", "kinds", "first"),
    [
        (silicon(), HOT, {"lost_atoms", "not_a_number"}, "pre_minimize_steps"),
        # A dense gas whose cutoff takes in more neighbours than were expected.
        (
            argon(3.0, 5),
            {**SHORT, "potential": ARGON, "neighbor_one": 100, "temperature": 1.0},
            {"neighbour_overflow"},
            "neighbor_one",
        ),
        # A barostat that overshoots until the pressure is no number.
        (
            argon(5.3, 4),
            {
                **SHORT,
                "workflow_type": "MD_NPT_LAMMPS",
                "potential": ARGON,
                "temperature": 1e5,
                "barostat_fs": 20.0,
                "timestep": 20.0,
                "num_steps": 400,
            },
            {"not_a_number", "lost_atoms", "out_of_range", "box"},
            None,
        ),
    ],
)
def test_failures_of_lammps_have_a_class_and_a_bounded_number_of_tries(
    tmp_path, structure, parameters, kinds, first
):
    engine = LAMMPSEngine(server=shared_server())
    with pytest.raises(SimulationError) as caught:
        engine.run(structure, parameters, tmp_path / "off", max_corrections=0)
    error = caught.value
    assert error.evidence["class"] in kinds
    assert "ERROR" in error.evidence["lammps_message"]
    assert error.evidence["corrections"] == []
    assert error.advice
    try:
        outcome = engine.run(structure, parameters, tmp_path / "on", max_corrections=1)
        tried = outcome["corrections"]
    except SimulationError as failed:
        tried = failed.evidence["corrections"]
    assert len(tried) <= 1
    record = tmp_path / "on" / "corrections.json"
    assert (read_json(record) if record.exists() else []) == tried
    if first is not None:
        assert first in tried[0]["changes"]
        assert newest_try(tmp_path / "on").name == "try-1"


def test_firetask_corrects_records_and_does_not_repeat(tmp_path):
    names = {"temperature": "temperature_k", "timestep": "timestep_fs"}
    config = {names.get(k, k): v for k, v in HOT.items() if k != "potential"}
    potential = HOT["potential"]
    with pytest.raises(SimulationError) as caught:
        simulate_by_task(
            tmp_path / "no", silicon(), potential, config, max_corrections=0
        )
    assert caught.value.evidence["corrections"] == []
    stored = simulate_by_task(
        tmp_path / "yes", silicon(), potential, config, max_corrections=4
    )
    assert stored.status == "done"
    tried = stored.result["corrections"]
    assert 1 <= len(tried) <= 4
    # The timestep that was used, at the simulated time that was asked for.
    shorter = [
        c["changes"]["timestep_fs"][1] for c in tried if c["changes"].get("timestep_fs")
    ]
    assert stored.result["timestep_fs"] == (shorter or [12.0])[-1]
    assert stored.result["timestep_fs"] * stored.result["steps"] == pytest.approx(480.0)
    assert f"try-{len(tried)}" in stored.files["output_dir"]
    again = simulate_by_task(
        tmp_path / "yes", silicon(), potential, config, max_corrections=4
    )
    assert again.result == stored.result
    # Who allows none gets the failure, not the corrected result: neither the stored
    # one nor that of the work folder.
    with pytest.raises(SimulationError, match="was corrected") as caught:
        simulate_by_task(
            tmp_path / "yes", silicon(), potential, config, max_corrections=0
        )
    assert caught.value.evidence["changes"] == tried[0]["changes"]


def test_a_corrected_folder_is_not_taken_for_an_uncorrected_run(tmp_path):
    engine = LAMMPSEngine()
    engine.run(silicon(), HOT, tmp_path, max_corrections=4)
    with pytest.raises(SimulationError, match="was corrected"):
        engine.run(silicon(), HOT, tmp_path, max_corrections=0)


def test_command_line_corrects_and_leaves_the_input_of_another_run(tmp_path, capsys):
    path, folder = tmp_path / "si.cif", tmp_path / "run"
    silicon().to(filename=str(path))
    words = ["md", "run", str(path), "-o", str(folder), "--potential", "Si.sw"]
    words += ["--set", *(f"{k}={v}" for k, v in HOT.items() if k != "potential")]
    assert main([*words, "--corrections", "0"]) != 0
    assert "LAMMPS failed" in capsys.readouterr().err
    inputs = {p: p.read_bytes() for p in (folder / "input").iterdir()}
    assert main([*words, "seed=77"]) != 0
    assert "another simulation" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (folder / "input").iterdir()} == inputs
    assert main([*words, "--corrections", "4"]) == 0
    told = capsys.readouterr()
    assert "correction 1: LAMMPS failed" in told.err
    assert str(newest_try(folder) / "output") in told.out
    assert main(["md", "status", str(folder)]) == 0
    assert "finished" in capsys.readouterr().out
    # Nor after a correction: what was asked for is what counts.
    assert main([*words, "--set", "seed=77"]) != 0
    assert "another simulation" in capsys.readouterr().err


# ------------------------------------------------------------------------- crashes


CRASH = """
import ctypes, os, sys, threading, time

def crash():
    while not os.path.exists("progress.json"):
        time.sleep(0.005)
    if os.environ.get("PMI_RANK", "0") == os.environ["TEST_CRASH_RANK"]:
        ctypes.string_at(0)

def begin():
    threading.Thread(target=crash, daemon=True).start()

words = " ".join(sys.orig_argv)
if "nanoos_fw.md.simulation" in words:
    begin()
elif "nanoos_fw.md.fork_server" in words:
    os.register_at_fork(after_in_child=begin)
"""


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "rank", "served"), [(1, 0, False), (2, 1, False), (1, 0, True)]
)
def test_segmentation_fault_ends_the_ranks_and_not_the_parent(
    tmp_path, monkeypatch, ranks, rank, served
):
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TEST_CRASH_RANK", str(rank))
    parameters = {
        "workflow_type": "MD_NVE_LAMMPS",
        "potential": file_potential("sw", "Si.sw"),
        "num_steps": 1_000_000,
        "restart_every": 1_000_000,
    }
    output = tmp_path / "output"
    with ForkServer() as server:
        engine = LAMMPSEngine(server=server if served else None)
        inputs = engine.prepare_input(silicon(2), parameters, tmp_path)
        with pytest.raises(LaunchError, match="SIGSEGV") as caught:
            engine.execute(inputs, output, resources=Resources(ranks))
    assert caught.value.evidence["exit_code"] in (-11, 139)
    assert "ranks.log" in caught.value.advice
    assert not engine.parse_output(output)["complete"]
    # The next launch is a new process, and the output can still be read and continued.
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(OutOfTimeError):
        LAMMPSEngine().execute(inputs, output, timeout=1.0)


DEATH = """
import os, sys, threading, time
from pathlib import Path

def die():
    started = Path("started." + os.environ.get("PMI_RANK", "0"))
    while True:
        try:
            if started.read_text() == os.environ["TEST_DEATH_AT"]:
                os.kill(os.getpid(), int(os.environ["TEST_DEATH_SIGNAL"]))
        except OSError:
            pass
        time.sleep(0.001)

if "nanoos_fw.md.relaxation" in " ".join(sys.orig_argv):
    threading.Thread(target=die, daemon=True).start()
"""


@pytest.fixture
def dying(tmp_path, monkeypatch):
    """Structures, and a function: a signal ends the rank that begins the slow one."""
    rough = silicon(2)
    rough.perturb(0.1, seed=1)
    structures = {"slow": rough}
    structures |= {f"s{i}": silicon().scale_lattice(150.0 + i) for i in range(6)}
    potential = file_potential("sw", "Si.sw")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DEATH)
    key = relaxation._task(rough, potential, RelaxationSettings())["key"]

    def let(number):
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
        monkeypatch.setenv("TEST_DEATH_AT", key)
        monkeypatch.setenv("TEST_DEATH_SIGNAL", str(int(number)))

    return structures, potential, let


@pytest.mark.mpi
def test_a_rank_killed_from_outside_leaves_no_result(tmp_path, monkeypatch, dying):
    structures, potential, let = dying
    let(signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(LaunchError, match="SIGKILL") as died:
            relax_structures(
                structures, potential, tmp_path / "w", resources=Resources(2)
            )
        assert failure_class(died.value) == "killed"
    monkeypatch.delenv("PYTHONPATH")
    found = relax_structures(
        structures, potential, tmp_path / "w", resources=Resources(2)
    )
    assert [result.error for result in found.values()] == [None] * len(structures)


@pytest.mark.mpi
def test_a_structure_that_crashes_its_rank_is_given_up_alone(tmp_path, dying):
    structures, potential, let = dying
    let(signal.SIGSEGV)
    found = relax_structures(
        structures, potential, tmp_path / "w", resources=Resources(2)
    )
    slow = found.pop("slow")
    assert (slow.converged, slow.error_class) == (False, "crash")
    assert "SIGSEGV" in slow.error
    assert [result.error for result in found.values()] == [None] * len(found)


def test_a_server_that_is_killed_is_no_crash_of_its_child(tmp_path):
    with ForkServer() as server:
        engine = LAMMPSEngine(server=server)
        parameters = {**SHORT, "potential": file_potential("sw", "Si.sw")}
        parameters["num_steps"] = 1_000_000
        inputs = engine.prepare_input(silicon(2), parameters, tmp_path)
        output = tmp_path / "output"

        def kill():
            while not (output / "progress.json").exists():
                time.sleep(0.01)
            os.kill(server.pid, signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        with pytest.raises(LaunchError, match="SIGKILL") as died:
            engine.execute(inputs, output)
    assert failure_class(died.value) == "killed"


# ------------------------------------------------------------------- minimizations


@pytest.mark.mpi
def test_minimization_on_several_ranks_stops_and_goes_on(tmp_path):
    rough = silicon(6)
    random = np.random.default_rng(2)
    moves = random.normal(scale=0.15, size=(len(rough), 3))
    rough = Structure(
        rough.lattice,
        rough.species,
        rough.cart_coords + moves,
        coords_are_cartesian=True,
    )
    engine = LAMMPSEngine()
    parameters = {
        "workflow_type": "MINIMIZE_LAMMPS",
        "potential": file_potential("tersoff", "Si.tersoff"),
        "max_force_ev_a": 1e-4,
        "thermo_every": 1,
    }
    inputs = engine.prepare_input(rough, parameters, tmp_path)
    output = tmp_path / "output"
    log = output / "log.000000000000.lammps"

    def has_begun():
        return log.exists() and "\n        10 " in log.read_text()

    with (
        asked_to_stop_when(output, has_begun),
        pytest.raises(OutOfTimeError) as caught,
    ):
        engine.execute(inputs, output, resources=Resources(2))
    assert "killed" not in caught.value.message  # it stopped by itself
    step = caught.value.evidence["step"]
    assert step >= 10
    assert (output / PORTABLE).exists()
    outcome = engine.execute(inputs, output, resources=Resources(2))
    assert outcome["converged"]
    energy = engine.parse_output(output)["final_potential_energy"] / len(rough)
    assert energy == pytest.approx(-4.6296, abs=2e-3)
    # The executable's forces too are those of the atoms, wherever they went.
    lmp = shutil.which("lmp", path=str(Path(sys.executable).parent))
    with_lmp = LAMMPSEngine(command=lmp)
    outcome = with_lmp.execute(inputs, tmp_path / "lmp", resources=Resources(2))
    assert outcome["converged"]
    forces = engine.parse_output(tmp_path / "lmp")["final_forces_ev_a"]
    assert np.abs(forces).max() < 1e-4
