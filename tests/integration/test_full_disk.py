"""Simulations, exports and analyses on a file system that is really full (ENOSPC)."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from lammps_stops import step_of
from pymatgen.core import Lattice, Structure

from nanoos_fw.cli import main
from nanoos_fw.errors import NanoOSError
from nanoos_fw.faults import disk_full
from nanoos_fw.md.engine import LAMMPSEngine, simulation_thermo
from nanoos_fw.md.exports import export_simulation
from nanoos_fw.md.output import simulation_trajectory
from nanoos_fw.provenance import read_json

pytestmark = pytest.mark.lammps

COPPER = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.61), ["Cu"], [[0, 0, 0]])
RUN = {
    "workflow_type": "MD_NVE_LAMMPS",
    "temperature": 300.0,
    "supercell_min_atoms": 32,
    "equilibration_steps": 0,
    "num_steps": 2000,
    "thermo_every": 5,
    "dump_every": 1,
    "restart_every": 200,
}


def mount(folder: Path, options: str) -> str:
    """Mount a file system of its own size; return why it cannot be, or nothing."""
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True, text=True, check=False).stderr


@pytest.fixture
def disk(tmp_path):
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("a file system can be mounted by root only")
    folder = tmp_path / "disk"
    folder.mkdir()
    if why := mount(folder, "size=2m"):
        pytest.skip(f"no file system can be mounted here: {why.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The same simulation with room: its folder."""
    folder = tmp_path_factory.mktemp("finished")
    LAMMPSEngine().run(COPPER, RUN, folder)
    return folder


def assert_same(output, finished):
    whole = finished / "output"
    assert simulation_thermo(output).step.tolist() == list(range(0, 2001, 5))
    frames, expected = simulation_trajectory(output), simulation_trajectory(whole)
    assert frames.step.tolist() == list(range(2001))
    for one, other in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
    ends = [read_json(folder / "final.json") for folder in (output, whole)]
    assert ends[0] == ends[1]


def fill(folder: Path) -> Path:
    """Take all room that is left, to the last byte."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return path


def failure(engine, inputs, output) -> NanoOSError | None:
    try:
        engine.execute(inputs, output)
    except NanoOSError as error:
        return error
    return None


def test_frames_fill_the_disk_and_go_on_with_room(disk, tmp_path, finished):
    engine = LAMMPSEngine()
    inputs = engine.prepare_input(COPPER, RUN, tmp_path)
    with pytest.raises(NanoOSError) as caught:
        engine.execute(inputs, disk / "output")
    assert disk_full(caught.value) is not None, caught.value
    partial = engine.parse_output(disk / "output")
    assert not partial["complete"]
    assert 200 <= partial["steps"] < 2000
    assert not mount(disk, "remount,size=64m")
    engine.execute(inputs, disk / "output")
    assert_same(disk / "output", finished)


def test_a_disk_that_is_full_for_a_moment_loses_nothing(disk, tmp_path, finished):
    assert not mount(disk, "remount,size=24m")
    engine, output = LAMMPSEngine(), disk / "output"
    inputs = engine.prepare_input(COPPER, RUN, tmp_path)
    done = threading.Event()

    def full_for_a_moment() -> None:
        while not done.wait(0.001):
            if step_of(output) >= 210:
                filler, end = fill(disk), step_of(output) + 10
                while not done.wait(0.001) and step_of(output) < end:
                    pass
                filler.unlink()
                return

    thread = threading.Thread(target=full_for_a_moment)
    thread.start()
    try:
        error = failure(engine, inputs, output)
    finally:
        done.set()
        thread.join()
    if error is not None:  # else no write fell into the moment
        assert disk_full(error) is not None, error
        engine.execute(inputs, output)
    assert_same(output, finished)


def test_exports_keep_the_old_file_where_a_new_one_has_no_room(disk, finished, capsys):
    path = disk / "frames.extxyz"
    path.write_text("of before")
    with pytest.raises(NanoOSError, match=r"frames\.extxyz") as caught:
        export_simulation(finished / "output", path, "extxyz")
    assert disk_full(caught.value) is not None
    assert path.read_text() == "of before"
    assert [p.name for p in disk.iterdir()] == ["frames.extxyz"]
    assert main(["md", "export", str(finished), "-o", str(path)]) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_analyses_and_plots_say_that_the_disk_is_full(disk, finished, capsys):
    out = disk / "out"
    out.mkdir()
    filler = fill(disk)
    words = [str(finished), "--analyses", "rdf", "--rdf-max", "3", "-o", str(out)]
    for action in ("analyze", "plot"):
        assert main(["md", action, *words]) == 1
        err = capsys.readouterr().err
        assert f"no space left, or quota exceeded, for {out}" in err
        assert list(out.iterdir()) == []
    filler.unlink()
    assert main(["md", "analyze", *words]) == 0
    assert [path.name for path in out.iterdir()] == ["rdf.csv"]
