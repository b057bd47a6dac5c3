"""Whose fault a failure is: only what a structure did itself is held against it."""

from __future__ import annotations

import errno
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import (
    DiskFullError,
    InputError,
    LaunchError,
    MissingDependencyError,
    NanoOSError,
    OutOfMemoryError,
    OutOfTimeError,
    SimulationError,
    StoreError,
)
from nanoos_fw.faults import (
    crashed,
    disk_full,
    disk_full_in_text,
    how_it_ended,
    is_environment,
    killed,
)
from nanoos_fw.firetasks.base import TaskContext
from nanoos_fw.firetasks.labelling import LabelTask
from nanoos_fw.settings import Settings
from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.structures import NewStructure


@pytest.mark.parametrize(
    ("code", "own", "outside", "how"),
    [
        (-signal.SIGSEGV, True, False, "was killed by SIGSEGV (signal 11)"),
        (128 + signal.SIGABRT, True, False, "was killed by SIGABRT (signal 6)"),
        (-signal.SIGKILL, False, True, "was killed by SIGKILL (signal 9)"),
        (128 + signal.SIGTERM, False, True, "was killed by SIGTERM (signal 15)"),
        (-signal.SIGBUS, False, True, "was killed by SIGBUS (signal 7)"),
        (0, False, False, "died with exit code 0"),
        (1, False, False, "died with exit code 1"),
        (128, False, False, "died with exit code 128"),
    ],
)
def test_a_crash_is_its_own_and_a_kill_is_not(
    code: int, own: bool, outside: bool, how: str
) -> None:
    assert (crashed(code), killed(code), how_it_ended(code)) == (own, outside, how)
    assert not crashed(None)
    assert not killed("9")


def launch(**evidence: Any) -> LaunchError:
    return LaunchError("the ranks died", evidence=evidence)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


NO_SPACE = OSError(errno.ENOSPC, "No space left on device", "/scratch/x.json")


@pytest.mark.parametrize(
    ("error", "environment"),
    [
        (launch(exit_code=-9), True),
        (launch(exit_code=137), True),
        (launch(exit_code=1), True),
        (launch(), True),
        (launch(exit_code=-11), False),
        (launch(exit_code=134), False),
        (launch(exit_code=134, log_tail="terminate ... std::bad_alloc"), True),
        (launch(exit_code=139, log_tail="x: No space left on device"), True),
        (launch(traceback="ZeroDivisionError"), False),
        (launch(**{"class": "hang"}), False),
        (SimulationError("lost atoms", evidence={"class": "lost_atoms"}), False),
        (SimulationError("x", evidence={"class": "disk_full"}), True),
        (SimulationError("x", evidence={"class": "out_of_memory"}), True),
        (OutOfMemoryError("x"), True),
        (OutOfTimeError("x"), False),
        (StoreError("x"), True),
        (MissingDependencyError("x"), True),
        (DiskFullError("x"), True),
        (InputError("x"), False),
        (caused(InputError("cannot write"), NO_SPACE), True),
        (caused(ValueError("x"), MemoryError()), True),
        (NO_SPACE, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (MemoryError(), True),
        (ImportError("vasp"), True),
        (subprocess.CalledProcessError(-9, "vasp"), True),
        (subprocess.CalledProcessError(1, "vasp"), False),
        (ValueError("x"), False),
    ],
    ids=repr,
)
def test_errors_of_the_machine_are_told_from_those_of_the_work(
    error: Exception, environment: bool
) -> None:
    assert is_environment(error) is environment


@pytest.mark.parametrize(
    ("error", "path"),
    [
        (NO_SPACE, "/scratch/x.json"),
        (caused(InputError("cannot write in /w"), NO_SPACE), "/scratch/x.json"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "/work"),
        (launch(log_tail="a\nOSError: [Errno 28] No space left on device\n"), "/work"),
        (
            launch(traceback="OSError: [Errno 28] No space left on device: '/w/a.bin'"),
            "/w/a.bin",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "/work"),
        (
            SimulationError(
                "x", evidence={"class": "disk_full", "work_dir": "/scratch/md"}
            ),
            "/scratch/md",
        ),
        (
            StoreError(
                "cannot write", evidence={"error": "code 14031, OutOfDiskSpace"}
            ),
            "the database server",
        ),
    ],
    ids=repr,
)
def test_a_full_disk_is_recognised_and_named(error: Exception, path: str) -> None:
    found = disk_full(error, "/work")
    assert found is not None
    assert found.evidence["path"] == path
    assert path in found.message
    assert "--class disk" in str(found.advice)


def test_other_errors_are_no_full_disk() -> None:
    for error in (ValueError("disk"), OSError(errno.EACCES, "denied"), InputError("x")):
        assert disk_full(error) is None
    assert disk_full_in_text("KeyError: 1") is None


# ---------------------------------------------------------------------- labelling


class Launchpad:
    def __init__(self, db: Any) -> None:
        self.db = db


@pytest.fixture
def place(embedded_database: Any, tmp_path: Path) -> TaskContext:
    database = open_database(Launchpad(embedded_database))
    return TaskContext.on(
        database,
        settings=Settings(ranks=1),
        work_root=tmp_path / "work",
    )


class Label(LabelTask):
    """Labels with the length of the cell, unless something is in the way."""

    _fw_name = "{{test_faults.Label}}"
    trouble: Exception | None = None

    def label(self, key: str, stored: Any, place: Any) -> float:
        del key, place
        if self.trouble is not None and stored.label == "b":
            raise self.trouble
        return float(stored.structure.lattice.a)


@pytest.mark.parametrize(
    ("trouble", "kept"),
    [
        (ValueError("a cell that it cannot label"), True),
        (SimulationError("lost atoms"), True),
        (launch(exit_code=-signal.SIGSEGV), True),
        (launch(exit_code=-signal.SIGKILL), False),
        (subprocess.CalledProcessError(137, "vasp"), False),
        (NO_SPACE, False),
        (MemoryError(), False),
        (MissingDependencyError("no potential"), False),
        (StoreError("the database went away"), False),
    ],
    ids=repr,
)
def test_what_the_machine_did_is_no_label_of_a_structure(
    place: TaskContext, trouble: Exception, kept: bool
) -> None:
    cells = {
        name: Structure(Lattice.cubic(a), ["Cu"], [[0, 0, 0]])
        for name, a in (("a", 3.0), ("b", 4.0))
    }
    keys = place.structures.add(
        [NewStructure(structure=cell, label=name) for name, cell in cells.items()],
        in_set="all",
    ).keys
    source = {"target": "length", "unit": "Å", "method": "m"}
    task = Label(structures=list(keys), source=source)
    task.trouble = trouble

    def stored() -> dict[str, str]:
        found = place.simulations.find(list(keys), "m")
        return {key: simulation.status for key, simulation in found.items()}

    if kept:
        assert task.run(place)["failed"] == 1
        assert stored() == {keys[0]: "done", keys[1]: "failed"}
        return
    with pytest.raises(type(trouble)):
        task.run(place)
    assert "failed" not in stored().values()
    task.trouble = None
    assert task.run(place)["failed"] == 0
    assert stored() == dict.fromkeys(keys, "done")


def test_the_base_of_all_errors_is_of_the_work() -> None:
    assert not is_environment(NanoOSError("x"))
