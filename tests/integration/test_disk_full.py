"""A file system without room, which is real: a small one in memory (needs root)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fireworks import Firework, PyTask
from fireworks.core.fworker import FWorker
from fireworks.core.rocket_launcher import launch_rocket
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import DiskFullError
from nanoos_fw.firetasks import WriteReportTask
from nanoos_fw.md.recipes import file_potential
from nanoos_fw.md.relaxation import relax_structures
from nanoos_fw.operations import prepare_launchpad
from nanoos_fw.operations.rerun import plan_reruns, rerun_failed_fireworks
from nanoos_fw.operations.status import campaign_status
from nanoos_fw.parallel import Resources
from nanoos_fw.provenance import write_atomic
from nanoos_fw.stores.database import load_launchpad

# Upper bound after which ranks count as hanging; they end within seconds.
HANGING_S = 90.0


class SmallDisk:
    """A file system of one megabyte that can be filled and freed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self) -> None:
        """Leave no room."""
        with (self.folder / "filler").open("wb", buffering=0) as file:
            for size in (4096, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def free(self) -> None:
        """Give the room back."""
        (self.folder / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        os.chdir(tmp_path)
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("full", ["launch directory", "report"])
def test_a_firework_on_a_full_disk_is_rerun_when_asked_to(
    full: str,
    new_launchpad: Callable[[], Any],
    disk: SmallDisk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where FireWorks writes its own files, and where the task does."""
    launchpad = new_launchpad()
    report = disk.folder / "report.html"

    def run(_task: WriteReportTask, _place: Any) -> dict[str, Any]:
        write_atomic(report, bytes(100_000))
        return {"done": True}

    monkeypatch.setattr(WriteReportTask, "run", run)
    nanoos = {"campaign": "c", "stage": "report", "order": 0}
    launchpad.add_wf(
        Firework(
            [WriteReportTask(campaign="c", path=str(report))],
            spec={"_add_launchpad_and_fw_id": True, "nanoos": nanoos},
        )
    )

    def launch() -> str:
        here = disk.folder if full == "launch directory" else tmp_path
        monkeypatch.chdir(here)
        launch_rocket(new_launchpad(), FWorker("w"), strm_lvl="CRITICAL")
        return str(launchpad.fireworks.find_one()["state"])

    disk.fill()
    assert launch() == "FIZZLED"
    assert campaign_status(launchpad.db, "c").causes == {"report": {"disk": 1}}
    (attempt,) = plan_reruns(launchpad.db)
    assert attempt.failure == "disk"
    assert attempt.error.evidence["path"].startswith(str(disk.folder))
    assert rerun_failed_fireworks(launchpad).rerun == []

    disk.free()
    assert len(rerun_failed_fireworks(launchpad, classes=["disk"]).rerun) == 1
    assert launch() == "COMPLETED"


@pytest.mark.lammps
@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_while_ranks_work_ends_them(
    disk: SmallDisk, ranks: int
) -> None:
    """Neither their results nor their errors can be written."""
    cell = Structure.from_spacegroup("Fd-3m", Lattice.cubic(5.5), ["Si"], [[0] * 3])
    structures = {}
    for number in range(150):
        structures[f"s{number}"] = cell.copy()
        structures[f"s{number}"].perturb(0.1, seed=number)
    potential, work_dir = file_potential("sw", "Si.sw"), disk.folder / "work"
    ended = threading.Event()

    def fill() -> None:
        while not list(work_dir.glob("results.*")) and not ended.is_set():
            time.sleep(0.001)
        disk.fill()

    thread = threading.Thread(target=fill)
    thread.start()
    began = time.monotonic()
    try:
        with pytest.raises(DiskFullError, match=str(disk.folder)):
            relax_structures(
                structures, potential, work_dir, resources=Resources(ranks)
            )
    finally:
        ended.set()
        thread.join()
    assert time.monotonic() - began < HANGING_S
    disk.free()
    found = relax_structures(
        structures, potential, work_dir, resources=Resources(ranks)
    )
    assert all(result.converged for result in found.values())


@pytest.mark.lammps
def test_relaxations_on_a_full_disk_are_no_results(disk: SmallDisk) -> None:
    cell = Structure.from_spacegroup("Fd-3m", Lattice.cubic(5.5), ["Si"], [[0] * 3])
    potential, work_dir = file_potential("sw", "Si.sw"), disk.folder / "work"
    work_dir.mkdir()
    disk.fill()
    with pytest.raises((DiskFullError, OSError)) as full:
        relax_structures({"a": cell}, potential, work_dir)
    assert "No space left" in str(full.value) or "no space left" in str(full.value)
    disk.free()
    assert relax_structures({"a": cell}, potential, work_dir)["a"].converged


@pytest.mark.mongodb
def test_a_job_whose_log_cannot_be_written_ends_its_launch(
    launchpad_file: Path, tmp_path: Path
) -> None:
    """FireWorks prints the traceback of a task before it ends the launch."""
    launchpad = load_launchpad(launchpad_file)
    prepare_launchpad(launchpad)
    launchpad.add_wf(Firework([PyTask(func="os.no_such_thing")]))
    words = ["-l", str(launchpad_file), "singleshot"]
    with Path("/dev/full").open("w") as full:
        subprocess.run(
            [sys.executable, "-m", "nanoos_fw.rlaunch", *words],
            cwd=tmp_path,
            stdout=full,
            stderr=full,
            check=True,
            timeout=HANGING_S,
        )
    assert launchpad.fireworks.find_one()["state"] == "FIZZLED"
    assert launchpad.launches.find_one()["state"] == "FIZZLED"
