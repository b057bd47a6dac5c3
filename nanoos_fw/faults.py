"""Whose fault a failure is: that of the work, or that of what it ran on.

A structure may be set aside as failed only if it failed by itself: an error of the
science, a crash of its own, a limit of ours. What the machine did to it (a full disk,
no memory, a kill from outside, a database that was away) says nothing about it. That
must fail the firework, which is then run again, and leave no row behind.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from nanoos_fw.errors import (
    CorruptArtifactError,
    DiskFullError,
    LaunchError,
    LostRunError,
    MissingDependencyError,
    NanoOSError,
    OutOfMemoryError,
    StoreError,
)

# By these the kernel ends a process for what it did itself; SIGABRT is abort(3). Not
# SIGBUS: it also comes of a full or lost file system under a mapped file.
_OWN_SIGNALS = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL})
# What srun, slurmstepd, the C++ library and LAMMPS leave in the log of the ranks.
OUT_OF_MEMORY = (
    "oom-kill",
    "oom_kill",
    "Out Of Memory",
    "Failed to allocate",
    "std::bad_alloc",
)
# As the C library, Rust (safetensors), LAMMPS and a MongoDB server put it.
DISK_FULL = (
    "No space left on device",
    "Disk quota exceeded",
    "OutOfDiskSpace",
    "available disk space",
)
_DISK_FULL = re.compile("|".join(map(re.escape, DISK_FULL)), re.IGNORECASE)
_NAMED_FILE = re.compile(
    r"(?:No space left on device|Disk quota exceeded)[^'\n]*'([^'\n]+)'"
)
_NO_ROOM_BYTES = 1 << 20
_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_MACHINE_ERRNOS = _DISK_ERRNOS | {
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.EAGAIN,
}
_MACHINE_ERRORS = (
    CorruptArtifactError,
    DiskFullError,
    LostRunError,
    MissingDependencyError,
    OutOfMemoryError,
    StoreError,
)
# Classes of failures of LAMMPS (``md.failures``) that are none of the structure.
DISK_CLASS, MEMORY_CLASS = "disk_full", "out_of_memory"
# Texts in the evidence of an error that may hold the words of the system.
_TEXTS = ("error", "traceback", "log_tail", "screen", "output", "stderr")


# -------------------------------------------------------------------- ended processes


def death_signal(exit_code: object) -> int | None:
    """Return the signal that a process died of, None if it ended by itself.

    Parameters
    ----------
    exit_code
        Minus the number as Python gives it, or 128 + the number as shells do.
    """
    if isinstance(exit_code, bool) or not isinstance(exit_code, int):
        return None
    number = -exit_code if exit_code < 0 else exit_code - 128
    return number if number in signal.valid_signals() else None


def crashed(exit_code: object) -> bool:
    """Tell whether a process died of what it did itself."""
    return death_signal(exit_code) in _OWN_SIGNALS


def killed(exit_code: object) -> bool:
    """Tell whether a process was ended from outside: the OOM killer, SLURM, a user."""
    number = death_signal(exit_code)
    return number is not None and number not in _OWN_SIGNALS


def how_it_ended(exit_code: int) -> str:
    """Return the end of a process in words, to follow its name."""
    number = death_signal(exit_code)
    if number is None:
        return f"died with exit code {exit_code}"
    try:
        name = signal.Signals(number).name
    except ValueError:  # a real-time signal
        name = "a signal"
    return f"was killed by {name} (signal {number})"


class _Forgiving:
    """An output stream for which a full disk is no error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def let_output_be_lost() -> None:
    """Let this process go on when its log is on a full disk.

    FireWorks prints the traceback of a task before it ends the launch: an error there
    leaves the launch running, and its heartbeat keeps the process for an hour.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Forgiving):
            setattr(sys, name, _Forgiving(stream))


# ------------------------------------------------------------------------------ errors


def is_environment(error: BaseException) -> bool:
    """Tell whether an error is that of the machine, and says nothing of the work."""
    if isinstance(error, NanoOSError):
        return _is_environment_error(error) or _is_system_error(error)
    return (
        isinstance(error, ImportError)
        or disk_full(error) is not None
        or _is_system_error(error)
    )


def _is_environment_error(error: NanoOSError) -> bool:
    if isinstance(error, _MACHINE_ERRORS):
        return True
    if error.evidence.get("class") in {DISK_CLASS, MEMORY_CLASS}:
        return True
    if disk_full(error) is not None:
        return True
    return isinstance(error, LaunchError) and not _died_by_itself(error)


def _died_by_itself(error: LaunchError) -> bool:
    """Tell whether a child failed by what it did: a crash, an exception, a hang."""
    evidence = error.evidence
    if any(sign in str(evidence.get("log_tail", "")) for sign in OUT_OF_MEMORY):
        return False
    return (
        crashed(evidence.get("exit_code"))
        or "traceback" in evidence
        or evidence.get("class") == "hang"
    )


def _is_system_error(error: BaseException) -> bool:
    """Tell whether an error, or what it comes of, is the system's."""
    for cause in _chain(error):
        if isinstance(cause, MemoryError):
            return True
        if isinstance(cause, OSError) and cause.errno in _MACHINE_ERRNOS:
            return True
        if isinstance(cause, subprocess.CalledProcessError) and killed(
            cause.returncode
        ):
            return True
    return False


def disk_full(error: BaseException, where: object = None) -> DiskFullError | None:
    """Return the error of a full disk that an error comes of, or None.

    Parameters
    ----------
    error
        Any error; those that led to it are looked at too.
    where
        What to name if the error names no file: a folder, or several; of these the
        first that is full.
    """
    if isinstance(where, Sequence) and not isinstance(where, str):
        where = _full_one(where)
    for cause in _chain(error):
        if isinstance(cause, DiskFullError):
            return cause
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRNOS:
            return _disk_full(cause.filename or where, str(cause))
        evidence = cause.evidence if isinstance(cause, NanoOSError) else {}
        if evidence.get("class") == DISK_CLASS:
            return _disk_full(evidence.get("work_dir") or where, str(cause))
        for text in (str(cause), *(str(evidence.get(name, "")) for name in _TEXTS)):
            if _DISK_FULL.search(text):
                named = evidence.get("work_dir") or where
                return disk_full_in_text(text, named)
    return None


def disk_full_in_text(text: str, where: object = None) -> DiskFullError | None:
    """Return the error of a full disk that a log or traceback tells of, or None."""
    found = _DISK_FULL.search(text)
    if found is None:
        return None
    start = text.rfind("\n", 0, found.start()) + 1
    line = text[start:].partition("\n")[0].strip()
    if found[0].lower() in {"outofdiskspace", "available disk space"}:
        where = "the database server"
    named = _NAMED_FILE.search(line)
    return _disk_full(named[1] if named else where, line)


def _full_one(folders: Sequence[object]) -> str:
    """Return the folder without room; all of them if none is known to be full."""
    for folder in folders:
        with contextlib.suppress(OSError):
            if shutil.disk_usage(str(folder)).free < _NO_ROOM_BYTES:
                return str(folder)
    return "a file in one of " + ", ".join(map(str, folders))


def _disk_full(where: object, said: str) -> DiskFullError:
    place = str(where or "a file that the error does not name")
    return DiskFullError(
        f"no space left, or quota exceeded, for {place}",
        evidence={"class": DISK_CLASS, "path": place, "error": said[-500:]},
        advice=(
            "free space there ('nanoos gc' names what nothing needs), then run 'nanoos "
            "rerun --failed --class disk'"
        ),
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    seen: set[int] = set()
    next_one: BaseException | None = error
    while next_one is not None and id(next_one) not in seen:
        seen.add(id(next_one))
        yield next_one
        next_one = next_one.__cause__ or (
            None if next_one.__suppress_context__ else next_one.__context__
        )
