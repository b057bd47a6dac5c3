"""Simulations by hand, continued, killed: always the same rows, frames and atoms."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from lammps_stops import stop_at, wait_for_step
from processes import HANGING_S, wait_for
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import LaunchError, MissingDependencyError
from nanoos_fw.md.engine import LAMMPSEngine, simulation_thermo
from nanoos_fw.md.protocols import MDConfig
from nanoos_fw.md.restarts import newest_origin, restart_step
from nanoos_fw.md.trajectory import read_frames, segment_files
from nanoos_fw.parallel import Resources, launch_command
from nanoos_fw.provenance import read_json

pytestmark = pytest.mark.lammps


def alloy(repeat=2):
    """L1_2 Cu3Au."""
    cell = Structure(
        Lattice.cubic(3.75),
        ["Au", "Cu", "Cu", "Cu"],
        [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
    )
    return cell * ([repeat] * 3)


RUN = {
    "temperature": 500.0,
    "num_steps": 600,
    "equilibration_steps": 100,
    "thermo_every": 10,
    "dump_every": 20,
    "restart_every": 150,
}


def printed_rows(paths):
    """Thermo rows of logs as they were printed, by timestep; the last one counts."""
    rows = {}
    for path in paths:
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) == 20 and words[0].isdigit():
                rows[int(words[0])] = words[1:]
    return rows


def run_lmp(folder, ranks):
    """Run the script with the plain executable, as a LAMMPS user does."""
    lmp = shutil.which("lmp", path=str(Path(sys.executable).parent))
    launcher = launch_command(Resources(ranks)) if ranks > 1 else []
    subprocess.run(
        [*launcher, lmp, "-in", "in.lammps"],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return folder / "log.lammps"


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("workflow", "ranks"),
    [("MD_NPT_LAMMPS", 2), ("MD_NVE_LAMMPS", 1), ("MD_ANNEAL_LAMMPS", 1)],
)
def test_plain_lmp_prints_what_the_engine_prints(tmp_path, workflow, ranks):
    kind = {"workflow_type": workflow}
    if workflow == "MD_ANNEAL_LAMMPS":
        kind["anneal_temperature_k"] = 900.0
    engine = LAMMPSEngine()
    inputs = engine.prepare_input(alloy(), {**RUN, **kind}, tmp_path)
    engine.execute(inputs, tmp_path / "output", resources=Resources(ranks))
    ours = printed_rows(segment_files(tmp_path / "output", "log.*.lammps"))
    theirs = printed_rows([run_lmp(inputs, ranks)])
    assert list(theirs) == sorted(theirs)
    for step in range(0, 701, 10):
        assert ours[step] == theirs[step], step
    # The frames are the same bytes.
    written = list(inputs.glob("trajectory.*.bin"))
    assert written
    for path in written:
        assert path.read_bytes() == (tmp_path / "output" / path.name).read_bytes()


def final_state(output):
    final = read_json(output / "final.json")
    names = ("positions", "velocities", "forces", "stress_bar", "matrix")
    return [np.array(final[name]) for name in names]


@pytest.mark.parametrize("executable", [False, True])
def test_a_run_killed_after_its_last_restart_file_ends_as_if_it_had_not_been(
    tmp_path, executable
):
    lmp = shutil.which("lmp", path=str(Path(sys.executable).parent))
    engine = LAMMPSEngine(command=lmp if executable else None)
    steps = {"equilibration_steps": 100, "num_steps": 200, "restart_every": 100}
    inputs = engine.prepare_input(alloy(), {**RUN, **steps}, tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    engine.execute(inputs, whole)
    shutil.copytree(whole, killed)
    for name in ("finished.json", "final.json", "final.data"):
        (killed / name).unlink()
    assert restart_step(killed / "restart.1") == 300
    assert engine.execute(inputs, killed)["exact"]
    for a, b in zip(final_state(whole), final_state(killed), strict=True):
        np.testing.assert_array_equal(a, b)
    one, other = (
        printed_rows(segment_files(folder, "log.*.lammps"))
        for folder in (whole, killed)
    )
    assert one == other


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("kind", "ranks"),
    [("MD_NVE_LAMMPS", 2), ("MD_NVT_LAMMPS", 1), ("MD_NPT_LAMMPS", 1)],
)
def test_a_continued_run_is_the_uninterrupted_one_to_the_last_bit(
    tmp_path, kind, ranks
):
    engine, resources = LAMMPSEngine(), Resources(ranks)
    parameters = {
        **RUN,
        "workflow_type": kind,
        "num_steps": 4000,
        "thermo_every": 50,
        "dump_every": 100,
    }
    inputs = engine.prepare_input(alloy(), parameters, tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert engine.execute(inputs, whole, resources=resources)["exact"]
    stops = [stop_at(engine, inputs, parts, n, resources=resources) for n in (1, 1500)]
    outcome = engine.execute(inputs, parts, resources=resources)
    assert 0 < stops[0] < stops[1] < 4100
    assert [stop % 150 for stop in stops] == [0, 0]
    assert outcome["exact"]
    assert outcome["segments"] == 3
    for one, other in zip(final_state(whole), final_state(parts), strict=True):
        np.testing.assert_array_equal(one, other)
    rows = [printed_rows(segment_files(d, "log.*.lammps")) for d in (whole, parts)]
    for step in range(0, 4101, 50):
        assert rows[0][step] == rows[1][step]
    frames = [
        list(read_frames(segment_files(d, "trajectory.*.bin"))) for d in (whole, parts)
    ]
    assert [f.step for f in frames[1]] == list(range(0, 4101, 100))
    for one, other in zip(*frames, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.velocities, other.velocities)


# ------------------------------------------------------------------------- killed


LONG = {
    **RUN,
    "workflow_type": "MD_NVE_LAMMPS",
    "num_steps": 5000,
    "thermo_every": 50,
    "dump_every": 100,
    "restart_every": 400,
}
PARENT = """
import pathlib, sys
from nanoos_fw.errors import NanoOSError
from nanoos_fw.md.engine import LAMMPSEngine
from nanoos_fw.parallel import Resources
inputs, output, ranks, timeout = sys.argv[1:]
try:
    LAMMPSEngine().execute(
        pathlib.Path(inputs),
        pathlib.Path(output),
        resources=Resources(int(ranks)),
        timeout=float(timeout),
    )
except NanoOSError as error:
    print(error.kind, error.evidence.get("class"), flush=True)
else:
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Inputs, and the output of a run on one and on two ranks."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    engine = LAMMPSEngine()
    inputs = engine.prepare_input(alloy(), LONG, folder)
    for ranks in (1, 2):
        engine.execute(inputs, folder / str(ranks), resources=Resources(ranks))
    return inputs, {ranks: folder / str(ranks) for ranks in (1, 2)}


def start(inputs, output, ranks=1, timeout=HANGING_S):
    words = [str(x) for x in (inputs, output, ranks, timeout)]
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, *words], stdout=subprocess.PIPE, text=True
    )


def rank_pids(output):
    """Processes whose folder is that of the output and which are ranks."""
    found = []
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            here = (path / "cwd").resolve() == output.resolve()
        except OSError:
            continue
        if here and b"nanoos_fw.md.simulation" in words and b"python" in words[0]:
            found.append(int(path.name))
    return found


def assert_same(one, other):
    """Two outputs are the same simulation to the last bit, each step once."""
    for a, b in zip(final_state(one), final_state(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert simulation_thermo(other).step.tolist() == list(range(0, 5101, 50))
    rows = [printed_rows(segment_files(d, "log.*.lammps")) for d in (one, other)]
    for step in range(0, 5101, 50):
        assert rows[0][step] == rows[1][step]
    frames = [
        list(read_frames(segment_files(d, "trajectory.*.bin"))) for d in (one, other)
    ]
    assert [f.step for f in frames[1]] == list(range(0, 5101, 100))
    for a, b in zip(*frames, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("who", "ranks"), [("parent", 1), ("rank", 1), ("rank", 2), ("term", 2)]
)
def test_killed_runs_end_as_if_nothing_had_happened(
    tmp_path, uninterrupted, who, ranks
):
    inputs, whole = uninterrupted
    output = tmp_path / "output"
    output.mkdir()
    for step in (700, 2000):  # twice: a continued run is killed as well
        child = start(inputs, output, ranks)
        wait_for_step(output, step, child)
        if who == "parent":
            child.kill()
        elif who == "term":
            child.terminate()
        else:
            os.kill(rank_pids(output)[-1], signal.SIGKILL)
        told, _ = child.communicate(timeout=HANGING_S)
        expected = {"parent": "", "rank": "launch None\n", "term": "out_of_time None\n"}
        assert told == expected[who]
        assert not (output / "finished.json").exists()
    # The next launch waits for ranks that have not yet noticed.
    outcome = LAMMPSEngine().execute(inputs, output, resources=Resources(ranks))
    assert outcome["exact"]
    assert outcome["segments"] >= 2
    assert_same(whole[ranks], output)


def test_timeouts_in_a_row_come_to_the_same_end(tmp_path, uninterrupted):
    inputs, whole = uninterrupted
    output, told = tmp_path / "output", []
    while "done\n" not in told:
        child = start(inputs, output, timeout=1.0 + 0.5 * len(told))
        told.append(child.communicate(timeout=HANGING_S)[0])
        assert told[-1] in ("done\n", "out_of_time None\n")
        assert len(told) < 30
    assert_same(whole[1], output)


def fill_disk(output, child, pattern):
    """Let no file of the rank grow beyond what one of them has."""
    wait_for_step(output, 1000, child)
    (pid,) = rank_pids(output)
    (path,) = output.glob(pattern)
    size = path.stat().st_size + 5000
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))


def test_full_disk_is_told_and_the_run_goes_on_with_space(tmp_path, uninterrupted):
    _, whole = uninterrupted
    engine = LAMMPSEngine()
    inputs = engine.prepare_input(alloy(), {**LONG, "dump_every": 5}, tmp_path)
    output = tmp_path / "output"
    child = start(inputs, output)
    fill_disk(output, child, "trajectory.*.bin")
    told, _ = child.communicate(timeout=HANGING_S)
    assert told == "simulation disk_full\n"
    partial = engine.parse_output(output)
    assert not partial["complete"]
    assert partial["steps"] >= 1000
    engine.execute(inputs, output)
    steps = [f.step for f in read_frames(segment_files(output, "trajectory.*.bin"))]
    assert steps == list(range(0, 5101, 5))
    for one, other in zip(final_state(whole[1]), final_state(output), strict=True):
        np.testing.assert_array_equal(one, other)


def test_log_that_cannot_grow_is_noticed(tmp_path, uninterrupted):
    _, whole = uninterrupted
    output = tmp_path / "output"
    # Without frames the log is the file that grows; LAMMPS itself does not notice.
    engine = LAMMPSEngine()
    inputs = engine.prepare_input(
        alloy(), {**LONG, "dump_every": 0, "thermo_every": 1}, tmp_path
    )
    child = start(inputs, output)
    fill_disk(output, child, "log.*.lammps")
    told, _ = child.communicate(timeout=HANGING_S)
    assert told == "simulation disk_full\n"
    engine.execute(inputs, output)
    assert simulation_thermo(output).step.tolist() == list(range(5101))
    for one, other in zip(final_state(whole[1]), final_state(output), strict=True):
        np.testing.assert_array_equal(one, other)


def test_potential_file_that_goes_away_does_not_end_or_change_a_run(
    tmp_path, uninterrupted
):
    inputs, whole = uninterrupted
    mine = tmp_path / "input"
    shutil.copytree(inputs, mine)
    (mine / "final.data").unlink(missing_ok=True)
    output = tmp_path / "output"
    child = start(mine, output)
    wait_for_step(output, 700, child)
    (file,) = output.glob("*.eam.alloy")
    file.unlink()
    child.kill()
    child.communicate()
    # The next launch takes it from the input again.
    LAMMPSEngine().execute(mine, output)
    assert_same(whole[1], output)
    # And without it there, says which file is missing, and runs nothing.
    (mine / file.name).unlink()
    with pytest.raises(MissingDependencyError, match=file.name):
        LAMMPSEngine().execute(mine, tmp_path / "other")


def test_rank_that_hangs_is_ended(tmp_path, uninterrupted):
    inputs, whole = uninterrupted
    output, caught = tmp_path / "output", []

    def execute():
        try:
            # Longer than a busy machine takes to begin.
            LAMMPSEngine().execute(inputs, output, stall_s=8.0)
        except LaunchError as error:
            caught.append(error)

    thread = threading.Thread(target=execute)
    thread.start()
    wait_for(
        lambda: newest_origin(output, MDConfig()).step,
        "no restart file",
        every_s=0.005,
    )
    (pid,) = rank_pids(output)
    os.kill(pid, signal.SIGSTOP)
    thread.join(timeout=HANGING_S)
    assert caught[0].evidence["class"] == "hang"
    assert not rank_pids(output)
    LAMMPSEngine().execute(inputs, output)
    assert_same(whole[1], output)


def test_damaged_restart_files_are_passed_over_for_an_older_one(
    tmp_path, uninterrupted
):
    inputs, whole = uninterrupted
    output = tmp_path / "output"
    stop_at(LAMMPSEngine(), inputs, output, 2000)
    newest = output / newest_origin(output, MDConfig()).file
    # Whole to the eye, but not to LAMMPS.
    data = bytearray(newest.read_bytes())
    data[400:-100] = bytes(len(data) - 500)
    newest.write_bytes(data)
    assert restart_step(newest) is not None
    LAMMPSEngine().execute(inputs, output)
    assert newest.with_name(newest.name + ".unreadable").exists()
    assert_same(whole[1], output)


def test_run_goes_on_from_the_portable_file_if_no_restart_file_is_left(
    tmp_path, uninterrupted
):
    inputs, _ = uninterrupted
    output = tmp_path / "output"
    stop = stop_at(LAMMPSEngine(), inputs, output, 2000)
    for path in output.glob("restart.*"):
        path.unlink()
    outcome = LAMMPSEngine().execute(inputs, output)
    assert outcome["steps"] == 5100
    assert not outcome["exact"]
    table = simulation_thermo(output)
    assert table.step.tolist() == list(range(0, 5101, 50))
    np.testing.assert_allclose(table["time_ps"], 0.002 * table.step, rtol=1e-9)
    # Constant energy goes on at the same energy, to the digits of the text.
    energy = table["total_energy_ev"][table.step > 100]
    assert np.ptp(energy) < 5e-3
    steps = [f.step for f in read_frames(segment_files(output, "trajectory.*.bin"))]
    assert steps == list(range(0, 5101, 100))
    assert stop % 400 == 0
