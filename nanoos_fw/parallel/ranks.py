"""The ranks' side: talk to each other, stop in time, report how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import (
    LaunchError,
    MissingDependencyError,
    NanoOSError,
    OutOfTimeError,
)
from nanoos_fw.parallel.files import (
    ERROR,
    LOG_TAIL_CHARS,
    RESULT,
    RESUMABLE_EXIT,
    STOP,
    STOP_SIGNALS,
    STOPPED,
    hold_as_rank,
)
from nanoos_fw.provenance import read_json, write_json


class Communicator:
    """The few collective operations the rank programs need.

    One rank without MPI behaves like one rank with it, so the programs have a single
    code path.
    """

    def __init__(self, comm: Any = None) -> None:
        self._comm = comm
        self.rank: int = 0 if comm is None else comm.Get_rank()
        self.size: int = 1 if comm is None else comm.Get_size()
        # Called before this process ends itself, to end programs that it started.
        self.before_abort: Callable[[], None] | None = None

    @property
    def mpi(self) -> Any:
        """The mpi4py communicator, or None without MPI."""
        return self._comm

    def sum_in_place(self, array: NDArray[Any]) -> None:
        """Sum a contiguous array over all ranks, in place (``MPI_Allreduce``)."""
        if self.size > 1:
            from mpi4py import MPI

            self._comm.Allreduce(MPI.IN_PLACE, array, op=MPI.SUM)

    def start_sum_in_place(self, array: NDArray[Any]) -> Callable[[], object]:
        """Begin to sum a contiguous array (``MPI_Iallreduce``); the answer waits.

        Nobody may touch the array until then. All ranks begin their sums in the same
        order.
        """
        if self.size == 1:
            return lambda: None
        from mpi4py import MPI

        wait: Callable[[], object] = self._comm.Iallreduce(
            MPI.IN_PLACE, array, op=MPI.SUM
        ).Wait
        return wait

    def any(self, flag: bool) -> bool:
        """Return True on all ranks if the flag is True on at least one."""
        buffer = np.array([int(flag)], dtype=np.int64)
        self.sum_in_place(buffer)
        return bool(buffer[0])

    def gather(self, value: Any) -> list[Any] | None:
        """Collect one object per rank on rank 0; None on the others."""
        if self.size == 1:
            return [value]
        gathered: list[Any] | None = self._comm.gather(value, root=0)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's object on all ranks."""
        return value if self.size == 1 else self._comm.bcast(value, root=0)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self._comm.Barrier()

    def abort(self, code: int) -> None:
        """End all ranks now."""
        if self.before_abort is not None:
            self.before_abort()
        if self.size > 1:
            self._comm.Abort(code)
        os._exit(code)


class StopRequest:
    """The request to stop, made by the clock, the parent or a signal.

    Parent and signals only set the same flag sooner: what counts is the clock. Ask at
    a step boundary, together with the other ranks: ``comm.any(stop.requested)``.

    Parameters
    ----------
    deadline
        Unix time at which to stop, or None.
    file
        File by which the parent asks for the stop, or None.
    """

    def __init__(self, deadline: float | None = None, file: Path | None = None) -> None:
        self.deadline = deadline
        self.file = file
        self._signal: str | None = None

    def listen(self) -> None:
        """Handle TERM, USR1 and USR2 from now on (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """True once the parent or a signal asked, or the deadline has passed."""
        if self._signal is None and self.file is not None and self.file.exists():
            self._signal = self.file.read_text().strip() or "of the parent"
        return self._signal is not None or (
            self.deadline is not None and time.time() >= self.deadline
        )

    @property
    def by_clock(self) -> bool:
        """Whether it is the deadline alone that asks."""
        return self.requested and self._signal is None

    @property
    def reason(self) -> str:
        """Why the program stops, for the log and the launch document."""
        # Another rank may have seen the parent's file first.
        _ = self.requested
        return f"signal {self._signal}" if self._signal else "end of the allocation"


RankProgram = Callable[
    [dict[str, Any], Path, Communicator, StopRequest], dict[str, Any]
]


def run_rank_program(program: RankProgram, argv: Sequence[str] | None = None) -> None:
    """Run the body of a rank program and write what became of it.

    Parameters
    ----------
    program
        ``program(config, work_dir, comm, stop) -> result``. It reads ``deadline``
        (Unix time or None) through ``stop``, raises ``OutOfTimeError`` on all ranks
        after writing its checkpoint, and returns the result on rank 0.
    argv
        One word: the JSON file with the config.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) != 1:
        sys.exit("usage: python -m MODULE CONFIG.json (started by nanoos_fw)")
    path = Path(words[0])
    with hold_as_rank(path.parent):
        _run(program, path)


def communicator() -> Communicator:
    """Return the world communicator, or a serial one when started without MPI."""
    if not any(name.startswith(("PMI_", "PMIX_", "OMPI_")) for name in os.environ):
        return Communicator()
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise MissingDependencyError(
            f"mpi4py cannot be imported: {error}",
            advice="load the MPI that mpi4py was built with, or pip install mpich",
        ) from error
    return Communicator(MPI.COMM_WORLD)


def _run(program: RankProgram, path: Path) -> None:
    work_dir = path.parent
    comm = Communicator()
    try:
        config = read_json(path)
        comm = communicator()
        _watch_parent(comm)
        stop = StopRequest(config.get("deadline"), work_dir / STOP)
        stop.listen()
        result = program(config, work_dir, comm, stop)
    except OutOfTimeError as error:
        if comm.rank == 0:
            write_json(work_dir / STOPPED, error.to_dict(), durable=False)
        comm.barrier()
        sys.exit(RESUMABLE_EXIT)
    except BaseException as error:
        # On a full disk none of this can be written; the other ranks must end anyway.
        with contextlib.suppress(OSError):
            traceback.print_exc()
        with contextlib.suppress(OSError):
            _report(work_dir, error)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        comm.abort(1)
        return
    if comm.rank == 0:
        write_json(work_dir / RESULT, result, durable=False)
    comm.barrier()


def _watch_parent(comm: Communicator) -> None:
    """End this rank when the firetask is gone, killed by SIGKILL for example.

    Orphaned ranks would write into a work directory which the next launch takes
    over. A thread does it, since the kernel's own means (``prctl``) would need code
    between fork and exec, which is unsafe beside FireWorks' heartbeat thread.
    """
    host, _, pid = os.environ.get("NANO_OS_PARENT", "").partition(":")
    if not pid or host != socket.gethostname():
        return
    born = _start_time(pid)

    def watch() -> None:
        while born is not None and _start_time(pid) == born:
            time.sleep(0.5)
        comm.abort(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _start_time(pid: str) -> str | None:
    """Return when a process was started; None if it is gone or a zombie.

    Process numbers are used again, so the number alone does not prove a life.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # proc(5): state is field 3 and starttime field 22; two precede the ")".
    return None if fields[0] in "ZX" else fields[19]


def _report(work_dir: Path, error: BaseException) -> None:
    if isinstance(error, NanoOSError):
        body = error.to_dict()
    elif isinstance(error, MemoryError):
        body = {
            "kind": "out_of_memory",
            "message": f"a rank ran out of memory: {error}",
            "advice": "ask for more memory or use a smaller batch",
        }
    else:
        body = LaunchError(
            f"a rank failed: {type(error).__name__}: {error}",
            evidence={"traceback": traceback.format_exc()[-LOG_TAIL_CHARS:]},
        ).to_dict()
    if not (work_dir / ERROR).exists():  # the first failure is the cause
        write_json(work_dir / ERROR, body, durable=False)
