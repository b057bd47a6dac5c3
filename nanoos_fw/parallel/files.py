"""The files of a work directory that parent and ranks share."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nanoos_fw.errors import InputError, LaunchError

RESULT, ERROR, STOPPED = "result.json", "error.json", "stopped.json"
PROGRESS, LOG, STOP = "progress.json", "ranks.log", "stop"
LOCK, RANKS_LOCK = ".lock", ".ranks.lock"
RESUMABLE_EXIT = 75  # EX_TEMPFAIL of sysexits.h: try again later
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LOG_TAIL_CHARS = 2000
POLL_S = 0.1


@contextlib.contextmanager
def locked(work_dir: Path) -> Iterator[None]:
    """Hold a work directory: two launches of one key must not mix their files.

    Whoever holds it is named in the lock's file: a job may outlive a node that SLURM
    has given up, and only people can end it.

    Raises
    ------
    LaunchError
        If another process holds it; says which.
    InputError
        If it cannot be written.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        lock = (work_dir / LOCK).open("a+")
    except OSError as error:
        raise InputError(
            f"cannot write in {work_dir}: {error.strerror}",
            advice="choose a folder you may write",
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(file)
            raise LaunchError(
                f"another launch is working in {work_dir}"
                + (f": {holder}" if holder else ""),
                evidence={"holder": holder} if holder else {},
                advice="wait for it; if nobody needs it any more, because its node was "
                "given up or its firework runs again, end it there, and then "
                "'nanoos rerun --failed --class launch'",
            ) from error
        with contextlib.suppress(OSError):  # on a full disk it stays nameless
            job = os.environ.get("SLURM_JOB_ID")
            name = f"process {os.getpid()} on {socket.gethostname()}"
            os.ftruncate(file.fileno(), 0)
            os.write(
                file.fileno(), (f"{name}, SLURM job {job}" if job else name).encode()
            )
        yield


def _holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        return file.read(200).strip()
    except OSError:
        return ""


def hold_as_rank(work_dir: Path) -> IO[str]:
    """Show that a rank lives here, for as long as the returned file is open.

    The kernel lets go of the lock when the process ends, however it ends: this is
    what tells a new launch that nobody writes here any more. A file system without
    locks gives no such protection.
    """
    file = (work_dir / RANKS_LOCK).open("w")
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


def wait_for_no_rank(work_dir: Path, timeout_s: float) -> bool:
    """Wait until no rank lives in a work directory; False if one still does."""
    end = time.monotonic() + timeout_s
    with (work_dir / RANKS_LOCK).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    return False
                time.sleep(POLL_S)
            except OSError:  # no locks on this file system
                return True
            else:
                return True


def report_progress(work_dir: Path, done: int, total: int, text: str) -> None:
    """Tell the parent how far the work is; called by one rank, as often as it likes."""
    temporary = work_dir / f".{PROGRESS}"
    temporary.write_text(json.dumps({"done": done, "total": total, "text": text}))
    temporary.replace(work_dir / PROGRESS)
