"""The MPI boundary: start ranks as a child, talk between ranks, stop in time.

A firetask is one process and owns the database. Work on several cores happens in a
*rank program*: a module started by ``srun`` or ``mpiexec`` with one JSON file as its
argument. Files of the work directory are all that parent and ranks share:

``result.json``
    written last, by rank 0: the only evidence of success.
``error.json``
    written by the first rank that fails: ``NanoOSError.to_dict()``.
``stopped.json``
    written when the ranks stopped in time with a checkpoint on disk.
``progress.json``
    how far the work is.
``stop``
    made by the parent to ask the ranks to stop. Launchers treat signals differently
    (Hydra kills the ranks when it gets TERM), a file means the same to all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import (
    InputError,
    LaunchError,
    MissingDependencyError,
    NanoOSError,
    OutOfTimeError,
    error_from_dict,
)
from nanoos_fw.provenance import read_json, write_atomic, write_json

logger = logging.getLogger(__name__)

RESULT, ERROR, STOPPED = "result.json", "error.json", "stopped.json"
PROGRESS, LOG, LOCK, STOP = "progress.json", "ranks.log", ".lock", "stop"
RESUMABLE_EXIT = 75  # EX_TEMPFAIL of sysexits.h: try again later
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S = 0.1
_LOG_TAIL_CHARS = 2000
# Rank numbers of an outer launch must not reach an inner one, and the ranks have no
# business with the database.
_SCRUBBED = ("PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "MONGO", "NANO_OS_MONGODB")


@dataclass(frozen=True)
class Resources:
    """What a child may use.

    Parameters
    ----------
    ranks
        MPI ranks; one rank runs without a launcher.
    threads
        OpenMP, BLAS and torch threads of each rank.
    launcher
        ``srun``, ``mpiexec``, or a command line that takes ``-n RANKS``. None chooses
        ``srun`` inside a SLURM allocation and ``mpiexec`` elsewhere.
    """

    ranks: int = 1
    threads: int = 1
    launcher: str | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.threads < 1:
            raise InputError(
                f"ranks ({self.ranks}) and threads ({self.threads}) must be at least 1"
            )


def launch_command(resources: Resources) -> list[str]:
    """Return the words that go before ``python`` to start the ranks.

    Raises
    ------
    MissingDependencyError
        If the launcher is not installed.
    InputError
        If the launcher's command line has no words or an open quote.
    """
    if resources.launcher is None and resources.ranks == 1:
        return []
    if resources.launcher is None:
        in_slurm = "SLURM_JOB_ID" in os.environ and shutil.which("srun")
        words = ["srun"] if in_slurm else ["mpiexec"]
    else:
        words = _words(resources.launcher)
    # The mpich wheel puts mpiexec beside python, where an environment that was not
    # activated has no PATH entry.
    beside_python = str(Path(sys.executable).parent)
    program = shutil.which(words[0], path=beside_python) or shutil.which(words[0])
    if program is None:
        raise MissingDependencyError(
            f"{resources.ranks} MPI rank(s) need {words[0]!r}, which is not on PATH",
            evidence={"PATH": os.environ.get("PATH", ""), "searched": beside_python},
            advice=(
                "load your cluster's MPI module, or on a laptop run "
                "'pip install nanoos_fw[mpich]', or set NANO_OS_MPI_LAUNCHER"
            ),
        )
    extra = ["--mpi=pmi2", "--exact"] if Path(program).name == "srun" else []
    if extra and len(words) > 1:
        extra = []  # a user who writes options knows the site's
    return [program, *words[1:], *extra, "-n", str(resources.ranks)]


def launch_ranks(
    module: str,
    config: Path,
    *,
    resources: Resources,
    deadline: float | None = None,
    grace_s: float = 60.0,
) -> dict[str, Any]:
    """Run a rank program to its end and return its ``result.json``.

    Parameters
    ----------
    module
        Rank program, such as ``"nanoos_fw.ml.training"``.
    config
        JSON file in the work directory; the ranks work in its directory.
    resources
        Ranks, threads and launcher.
    deadline
        Unix time by which the ranks are to have stopped; they know it too (field
        ``deadline`` is theirs to read), so this is the second line of defence.
    grace_s
        Seconds between the request to stop and the kill.

    Raises
    ------
    OutOfTimeError
        If the ranks stopped in time and left a checkpoint.
    LaunchError
        If they died without a word, or had to be killed because they did not stop;
        carries the tail of their log.
    NanoOSError
        Whatever error a rank reported.
    """
    work_dir = config.parent
    for name in (RESULT, ERROR, STOPPED, PROGRESS, STOP):
        (work_dir / name).unlink(missing_ok=True)
    python = [sys.executable, "-m"]
    if resources.ranks > 1:
        python += ["mpi4py", "-m"]  # an exception on one rank aborts all of them
    command = [*launch_command(resources), *python, module, str(config)]
    log = work_dir / LOG
    with log.open("ab") as stream:
        stream.write(f"$ {shlex.join(command)}\n".encode())
        stream.flush()
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=work_dir,
                env=child_environment(resources.threads),
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(
                f"cannot start {command[0]}: {error.strerror}",
                evidence={"command": command},
            ) from error
    with _hand_on_signals(work_dir) as signalled:
        code, killed = _wait(child, work_dir, deadline, grace_s, signalled)
    return _outcome(work_dir, module, code, killed)


def child_environment(threads: int) -> dict[str, str]:
    """Return the environment for a child: threads set, outer MPI ranks removed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(_SCRUBBED)}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        env[name] = str(threads)
    env["SRUN_CPUS_PER_TASK"] = str(threads)
    env["PYTHONUNBUFFERED"] = "1"
    env["NANO_OS_PARENT"] = f"{socket.gethostname()}:{os.getpid()}"
    return env


@contextlib.contextmanager
def locked(work_dir: Path) -> Iterator[None]:
    """Hold a work directory: two launches of one key must not mix their files.

    Raises
    ------
    LaunchError
        If another process holds it.
    InputError
        If it cannot be written.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        lock = (work_dir / LOCK).open("w")
    except OSError as error:
        raise InputError(
            f"cannot write in {work_dir}: {error.strerror}",
            advice="choose a folder you may write",
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LaunchError(
                f"another launch is working in {work_dir}",
                advice="wait for it; if it is dead, rerun this firework",
            ) from error
        yield


# --------------------------------------------------------------------------- ranks


class Communicator:
    """The few collective operations the rank programs need.

    One rank without MPI behaves like one rank with it, so the programs have a single
    code path.
    """

    def __init__(self, comm: Any = None) -> None:
        self._comm = comm
        self.rank: int = 0 if comm is None else comm.Get_rank()
        self.size: int = 1 if comm is None else comm.Get_size()

    @property
    def mpi(self) -> Any:
        """The mpi4py communicator, or None without MPI."""
        return self._comm

    def sum_in_place(self, array: NDArray[Any]) -> None:
        """Sum a contiguous array over all ranks, in place (``MPI_Allreduce``)."""
        if self.size > 1:
            from mpi4py import MPI

            self._comm.Allreduce(MPI.IN_PLACE, array, op=MPI.SUM)

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
        for number in _STOP_SIGNALS:
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
    def reason(self) -> str:
        """Why the program stops, for the log and the launch document."""
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
            write_json(work_dir / STOPPED, error.to_dict())
        comm.barrier()
        sys.exit(RESUMABLE_EXIT)
    except BaseException as error:
        traceback.print_exc()
        _report(work_dir, error)
        sys.stdout.flush()
        comm.abort(1)
        return
    if comm.rank == 0:
        write_json(work_dir / RESULT, result)
    comm.barrier()


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


def report_progress(work_dir: Path, done: int, total: int, text: str) -> None:
    """Tell the parent how far the work is; called by one rank, as often as it likes."""
    temporary = work_dir / f".{PROGRESS}"
    temporary.write_text(json.dumps({"done": done, "total": total, "text": text}))
    temporary.replace(work_dir / PROGRESS)


# ------------------------------------------------------------------------- private


def _words(launcher: str) -> list[str]:
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise InputError(
            f"the MPI launcher {launcher!r} is no command line: {error}"
        ) from error
    if not words:
        raise InputError(
            "the MPI launcher is an empty command line",
            advice="unset NANO_OS_MPI_LAUNCHER, or set it to srun or mpiexec",
        )
    return words


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
            evidence={"traceback": traceback.format_exc()[-_LOG_TAIL_CHARS:]},
        ).to_dict()
    if not (work_dir / ERROR).exists():  # the first failure is the cause
        write_json(work_dir / ERROR, body)


@contextlib.contextmanager
def _hand_on_signals(work_dir: Path) -> Iterator[list[int]]:
    """Turn TERM, USR1 and USR2 into a request to the ranks while they run."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, handle) for number in _STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            # None: a handler that C code had installed, which Python cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _wait(
    child: subprocess.Popen[bytes],
    work_dir: Path,
    deadline: float | None,
    grace_s: float,
    signalled: list[int],
) -> tuple[int, bool]:
    """Return the exit code, and whether the ranks had to be killed."""
    kill_at = None if deadline is None else deadline + grace_s
    seen = None
    asked = False
    try:
        while True:
            code = child.poll()
            seen = _log_progress(work_dir, seen)
            if code is not None:
                return code, False
            if signalled and not asked:
                asked = True
                write_atomic(work_dir / STOP, signal.Signals(signalled[0]).name)
                kill_at = min(time.time() + grace_s, kill_at or float("inf"))
            if kill_at is not None and time.time() > kill_at:
                logger.warning("ranks in %s did not stop in time: killed", work_dir)
                _end_group(child)
                return child.wait(), True
            time.sleep(_POLL_S)
    finally:
        if child.poll() is None:
            _end_group(child)


def _log_progress(work_dir: Path, seen: str | None) -> str | None:
    try:
        text = (work_dir / PROGRESS).read_text()
    except OSError:
        return seen
    if text != seen:
        with contextlib.suppress(ValueError):
            progress = json.loads(text)
            logger.info(
                "%s: %s of %s",
                progress["text"],
                progress["done"],
                progress["total"],
                extra={"progress": progress},
            )
    return text


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """Terminate, wait, kill: no rank outlives its firetask."""
    _signal_group(child, signal.SIGTERM)
    try:
        child.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        _signal_group(child, signal.SIGKILL)
        child.wait()


def _outcome(work_dir: Path, module: str, code: int, killed: bool) -> dict[str, Any]:
    if (work_dir / ERROR).exists():
        raise error_from_dict(read_json(work_dir / ERROR))
    if (work_dir / STOPPED).exists():
        stopped = read_json(work_dir / STOPPED)
        raise OutOfTimeError(
            stopped["message"], evidence=stopped["evidence"], advice=stopped["advice"]
        )
    if code == 0 and (work_dir / RESULT).exists():
        result: dict[str, Any] = read_json(work_dir / RESULT)
        return result
    tail = (work_dir / LOG).read_bytes()[-_LOG_TAIL_CHARS:].decode(errors="replace")
    evidence = {"exit_code": code, "log_tail": tail, "work_dir": str(work_dir)}
    if killed:
        raise LaunchError(
            f"{module} did not stop when it was asked to, and was killed",
            evidence=evidence,
            advice=f"read {work_dir / LOG}; its last checkpoint, if any, is used next",
        )
    # A shell reports death by signal n as 128 + n, Popen as -n.
    number = -code if code < 0 else code - 128
    cause = f"signal {number}" if 0 < number < signal.NSIG else f"exit code {code}"
    raise LaunchError(
        f"{module} died with {cause} and left no result",
        evidence=evidence,
        advice=f"read {work_dir / LOG}",
    )
