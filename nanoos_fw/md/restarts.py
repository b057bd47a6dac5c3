"""Where a simulation can go on from: restart files, and the segments before them.

Two restart files take turns, each written beside and renamed, after the frames and
rows that came before it are on disk. So whatever moment a run is killed at, one of
them is whole, and nothing before its step is missing.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import re
import struct
from dataclasses import asdict
from pathlib import Path

from nanoos_fw.errors import NanoOSError, SimulationError
from nanoos_fw.md.inputs import MDConfig, Origin
from nanoos_fw.md.trajectory import first_step_of, segment_files
from nanoos_fw.provenance import read_json, write_json

logger = logging.getLogger(__name__)

STOP_RESTART, PORTABLE = "restart.stop", "portable.data"
RESTARTS = ("restart.0", "restart.1", STOP_RESTART)
SEGMENTS = ("log.*.lammps", "trajectory.*.bin")
UNREADABLE = ".unreadable"
SEGMENT_RECORD = "segments.json"

_MAGIC = b"LammpS RestartT\0"
# LAMMPS' lmprestart.h: version, unit style and timestep; those between are integers.
_VERSION, _UNITS, _NTIMESTEP = 0, 4, 5
_MAX_FIELDS = 16
_PORTABLE_HEAD = re.compile(r"timestep = (\d+)")


def restart_step(path: Path) -> int | None:
    """Return the timestep of a restart file; None if it is cut or none at all.

    LAMMPS ends a restart file with the words it begins with, so a cut one is known
    without LAMMPS, which would raise on one rank and let the others wait for ever.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            file.seek(-len(_MAGIC), os.SEEK_END)
            tail = file.read()
    except OSError:
        return None
    if not head.startswith(_MAGIC) or tail != _MAGIC or len(head) <= len(_MAGIC):
        return None
    at = len(_MAGIC)
    try:
        endian, _revision = struct.unpack_from("<ii", head, at)
        at += 8
        for _ in range(_MAX_FIELDS if endian == 1 else 0):
            flag, value = struct.unpack_from("<ii", head, at)
            if flag == _NTIMESTEP:
                return int(struct.unpack_from("<q", head, at + 4)[0])
            at += 8 + (value if flag in (_VERSION, _UNITS) else 0)
    except struct.error:
        return None
    return None


def portable_step(path: Path) -> int | None:
    """Return the timestep of a data file that LAMMPS wrote; None if it is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            match = _PORTABLE_HEAD.search(file.readline())
    except OSError:
        return None
    return int(match.group(1)) if match else None


def newest_origin(work_dir: Path, config: MDConfig) -> Origin:
    """Return what a simulation goes on from: its newest whole restart file.

    The portable data file counts only if there is no restart file: it does not hold
    the thermostat. Files of the last step of dynamics do not count: they hold no
    forces, and a run of no steps computes none. What is lost by that are the steps of
    a run that was killed between its last restart file and its end.
    """
    last = config.total_steps if config.is_dynamics else math.inf
    found = []
    for name in RESTARTS:
        path = work_dir / name
        if not path.exists():
            continue
        step = restart_step(path)
        if step is None:
            logger.warning("%s cannot be read: it is cut short", path)
        elif step < last:
            found.append((step, name))
    if found:
        step, name = max(found)
        return Origin(step, name)
    step = portable_step(work_dir / PORTABLE) or 0
    return Origin(step, PORTABLE) if 0 < step < last else Origin()


def drop_segments_after(work_dir: Path, step: int) -> None:
    """Put away segments that begin later: they belong to a past that is left.

    That happens when the newest restart file was cut and an older one is used.
    """
    for pattern in SEGMENTS:
        for path in segment_files(work_dir, pattern):
            if first_step_of(path) > step:
                logger.warning("%s is computed again", path)
                path.replace(path.with_name(f"{path.name}.dropped"))


def publish(work_dir: Path, name: str, step: int) -> None:
    """Give a new file ``NAME.new`` its name, after all that it goes on from.

    Raises
    ------
    SimulationError
        If the file is not whole, as on a full disk.
    """
    new = work_dir / f"{name}.new"
    found = portable_step(new) if name == PORTABLE else restart_step(new)
    if found != step:
        raise SimulationError(
            f"{new} was not written as a whole: timestep {found}, not {step}",
            evidence={"class": "disk_full"},
            advice="free space, or write fewer frames",
        )
    # LAMMPS does not flush binary dumps: frames may still be in its own memory.
    ctypes.CDLL(None).fflush(None)
    for pattern in SEGMENTS:
        for path in segment_files(work_dir, pattern)[-1:]:
            _sync(path)
    _sync(new)
    new.replace(work_dir / name)
    _sync(work_dir)


def put_away(output_dir: Path, name: str, error: NanoOSError) -> None:
    """Give a restart file that LAMMPS does not read another name."""
    logger.warning("%s is put away: %s", name, error.message)
    (output_dir / name).replace(output_dir / f"{name}{UNREADABLE}")


def record_segment(output_dir: Path, origin: Origin, ranks: int, threads: int) -> None:
    """Write down where a launch begins, and with how many ranks and threads."""
    path = output_dir / SEGMENT_RECORD
    segments = read_json(path) if path.exists() else []
    segments = [s for s in segments if s["step"] < origin.step]
    this = {**asdict(origin), "ranks": ranks, "threads": threads}
    write_json(path, [*segments, this])


def is_exact(output_dir: Path) -> bool:
    """Tell whether the run is to the last bit what it would be without interruption."""
    segments = read_json(output_dir / SEGMENT_RECORD)
    kinds = {(s["ranks"], s.get("threads", 1)) for s in segments}
    files = {s["file"] for s in segments}
    return len(kinds) == 1 and files.isdisjoint((STOP_RESTART, PORTABLE))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
