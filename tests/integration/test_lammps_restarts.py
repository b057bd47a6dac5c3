"""Simulations by hand, continued, killed: always the same rows, frames and atoms."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import OutOfTimeError
from nanoos_fw.md.engine import LAMMPSEngine
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
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "kind",
    [
        {"workflow_type": "MD_NPT_LAMMPS"},
        {"workflow_type": "MD_NVE_LAMMPS"},
        {"workflow_type": "MD_ANNEAL_LAMMPS", "anneal_temperature_k": 900.0},
    ],
    ids=lambda kind: kind["workflow_type"],
)
def test_plain_lmp_prints_what_the_engine_prints(tmp_path, ranks, kind):
    engine = LAMMPSEngine()
    inputs = engine.prepare_input(alloy(), {**RUN, **kind}, tmp_path)
    engine.execute(inputs, tmp_path / "output", resources=Resources(ranks))
    ours = printed_rows(segment_files(tmp_path / "output", "log.*.lammps"))
    theirs = printed_rows([run_lmp(inputs, ranks)])
    assert list(theirs) == sorted(theirs)
    for step in range(0, 701, 10):
        assert ours[step] == theirs[step], step
    # The frames are the same bytes.
    for path in inputs.glob("trajectory.*.bin"):
        assert path.read_bytes() == (tmp_path / "output" / path.name).read_bytes()


def final_state(output):
    final = read_json(output / "final.json")
    return [np.array(final[k]) for k in ("positions", "velocities", "matrix")]


def stop_at(engine, inputs, output, step, **options):
    """Execute, and ask for a stop when a step is reached."""

    def ask():
        while not done.wait(0.005):
            try:
                progress = json.loads((output / "progress.json").read_text())
            except (OSError, ValueError):
                continue
            if progress["done"] >= step:
                (output / "stop").write_text("of the test")
                return

    done = threading.Event()
    (output / "progress.json").unlink(missing_ok=True)
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        with pytest.raises(OutOfTimeError) as caught:
            engine.execute(inputs, output, **options)
    finally:
        done.set()
        thread.join()
    return caught.value.evidence["step"]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("MD_NVE_LAMMPS", 1),
        ("MD_NVE_LAMMPS", 2),
        ("MD_NVT_LAMMPS", 1),
        ("MD_NPT_LAMMPS", 1),
    ],
)
def test_a_continued_run_is_the_uninterrupted_one_to_the_last_bit(
    tmp_path, kind, ranks
):
    engine, resources = LAMMPSEngine(), Resources(ranks)
    parameters = {
        **RUN,
        "workflow_type": kind,
        "num_steps": 6000,
        "thermo_every": 50,
        "dump_every": 100,
    }
    inputs = engine.prepare_input(alloy(), parameters, tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert engine.execute(inputs, whole, resources=resources)["exact"]
    stops = [stop_at(engine, inputs, parts, n, resources=resources) for n in (1, 2000)]
    outcome = engine.execute(inputs, parts, resources=resources)
    assert 0 < stops[0] < stops[1] < 6100
    assert [stop % 150 for stop in stops] == [0, 0]
    assert outcome["exact"]
    assert outcome["segments"] == 3
    for one, other in zip(final_state(whole), final_state(parts), strict=True):
        np.testing.assert_array_equal(one, other)
    rows = [printed_rows(segment_files(d, "log.*.lammps")) for d in (whole, parts)]
    for step in range(0, 6101, 50):
        assert rows[0][step] == rows[1][step]
    frames = [
        list(read_frames(segment_files(d, "trajectory.*.bin"))) for d in (whole, parts)
    ]
    assert [f.step for f in frames[1]] == list(range(0, 6101, 100))
    for one, other in zip(*frames, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.velocities, other.velocities)
