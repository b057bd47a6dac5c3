"""The parent's side: start ranks as a child, hand on the stop, read what became."""

from __future__ import annotations

import contextlib
import importlib.metadata
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from nanoos_fw.errors import (
    InputError,
    LaunchError,
    MissingDependencyError,
    OutOfTimeError,
    error_from_dict,
)
from nanoos_fw.faults import disk_full, how_it_ended
from nanoos_fw.parallel.files import (
    ERROR,
    LOG,
    LOG_TAIL_CHARS,
    POLL_S,
    PROGRESS,
    RESULT,
    STOP,
    STOP_SIGNALS,
    STOPPED,
    wait_for_no_rank,
)
from nanoos_fw.provenance import read_json, write_atomic

logger = logging.getLogger(__name__)

# Rank numbers of an outer launch must not reach an inner one, and the ranks have no
# business with the database.
_SCRUBBED = ("PMI_", "PMIX_", "OMPI_", "MPI_LOCAL", "MONGO", "NANO_OS_MONGODB")
_NETMOD = "MPIR_CVAR_CH4_NETMOD"  # of MPICH: by what means ranks on other nodes talk
_ROOM_BYTES = 64 * 1024  # error, log and a first block of results
_LAST_RANKS_S = 10.0  # ranks of a dead launcher or parent end within a second or two


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
    # Without -K the ranks that are left wait for one that was killed until the end of
    # the allocation; mpiexec ends them by itself.
    srun = ["--mpi=pmi2", "--exact", "--kill-on-bad-exit=1", *_short_addresses()]
    extra = srun if Path(program).name == "srun" else []
    if len(words) > 1:
        extra = []  # a user who writes options knows the site's
    return [program, *words[1:], *extra, "-n", str(resources.ranks)]


def _short_addresses() -> list[str]:
    """Return the option of ``srun`` that lets ranks of the mpich package find another.

    Over UCX, ranks on different nodes tell their addresses in 4 kB of which most is
    whatever lies behind them in memory, in lines that may exceed the 1,024 bytes which
    SLURM's plugin pmi2 reads at once. What follows is then sometimes lost, and all
    ranks wait to the end of the allocation. Addresses of libfabric take 70 bytes.
    """
    if _NETMOD in os.environ:
        return []
    try:
        importlib.metadata.version("mpich")
    except importlib.metadata.PackageNotFoundError:
        return []  # the site's, whose netmods are not known
    return [f"--export=ALL,{_NETMOD}=ofi"]


def launch_ranks(
    module: str,
    config: Path,
    *,
    resources: Resources,
    deadline: float | None = None,
    grace_s: float = 60.0,
    stall_s: float | None = None,
    signs: Sequence[str] = (),
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
    stall_s
        Seconds without a sign of life after which the ranks are killed: one that
        hangs would hold the others until the end of the allocation. None waits.
    signs
        Patterns of files in the work directory whose growth is a sign of life, as is
        every report of progress.

    Raises
    ------
    OutOfTimeError
        If the ranks stopped in time and left a checkpoint.
    LaunchError
        If ranks of an earlier launch still live in the work directory, or if these
        died without a word, or had to be killed because they hung or did not stop;
        carries the tail of their log.
    DiskFullError
        If they died and their work directory cannot be written to.
    NanoOSError
        Whatever error a rank reported.
    """
    config = config.resolve()  # the ranks start in another directory
    work_dir = config.parent
    clear_messages(work_dir)
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
    return supervise(
        child,
        module,
        work_dir,
        deadline=deadline,
        grace_s=grace_s,
        stall_s=stall_s,
        signs=signs,
    )


class Child(Protocol):
    """A program that leads a process group: what is needed of `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """Its number, and that of its group."""

    def poll(self) -> int | None:
        """Return the exit code, or None while it lives."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code; raises ``subprocess.TimeoutExpired``."""


def clear_messages(work_dir: Path) -> None:
    """Remove what earlier ranks said, so that only the new ones are heard.

    Raises
    ------
    LaunchError
        If ranks of an earlier launch still live in the work directory.
    """
    if not wait_for_no_rank(work_dir, _LAST_RANKS_S):
        raise LaunchError(
            f"ranks of an earlier launch still work in {work_dir}",
            advice="end them, then rerun this firework",
        )
    for name in (RESULT, ERROR, STOPPED, PROGRESS, STOP):
        (work_dir / name).unlink(missing_ok=True)


def supervise(
    child: Child,
    module: str,
    work_dir: Path,
    *,
    deadline: float | None = None,
    grace_s: float = 60.0,
    stall_s: float | None = None,
    signs: Sequence[str] = (),
) -> dict[str, Any]:
    """Wait for a started rank program, hand on the stop, return its result.

    Parameters and errors are those of `launch_ranks`.
    """
    with _hand_on_signals(work_dir) as signalled:
        pulse = _Pulse(work_dir, stall_s, tuple(signs))
        code, killed = _wait(child, work_dir, deadline, grace_s, signalled, pulse)
    if not wait_for_no_rank(work_dir, _LAST_RANKS_S):
        logger.warning("the launcher has ended but ranks still work in %s", work_dir)
    if pulse.lost:
        raise LaunchError(
            f"{module} gave no sign of life for {stall_s:g} s, and was killed",
            evidence={"class": "hang", "work_dir": str(work_dir)},
            advice=f"run again: it continues; if it hangs again, read {work_dir / LOG}",
        )
    return _outcome(work_dir, module, code, killed)


@dataclass
class _Pulse:
    """Whether a rank program still does something: progress, or files that grow."""

    work_dir: Path
    stall_s: float | None
    patterns: tuple[str, ...]
    lost: bool = False
    _last: object = None
    _since: float = 0.0
    _looked: float = 0.0

    def is_lost(self) -> bool:
        """Look, at most once a second, and tell whether it is time to give up."""
        now = time.monotonic()
        if self.stall_s is None or now - self._looked < min(1.0, self.stall_s / 4):
            return False
        self._looked = now
        seen: list[object] = []
        for pattern in (PROGRESS, *self.patterns):
            for path in sorted(self.work_dir.glob(pattern)):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    seen.append((path.name, status.st_size, status.st_mtime_ns))
        if seen != self._last:
            self._last, self._since = seen, now
        self.lost = now - self._since > self.stall_s
        return self.lost


def child_environment(threads: int) -> dict[str, str]:
    """Return the environment for a child: threads set, outer MPI ranks removed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(_SCRUBBED)}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        env[name] = str(threads)
    env["SRUN_CPUS_PER_TASK"] = str(threads)
    env["PYTHONUNBUFFERED"] = "1"
    env["NANO_OS_PARENT"] = f"{socket.gethostname()}:{os.getpid()}"
    return env


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


@contextlib.contextmanager
def _hand_on_signals(work_dir: Path) -> Iterator[list[int]]:
    """Turn TERM, USR1 and USR2 into a request to the ranks while they run."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            # None: a handler that C code had installed, which Python cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _wait(
    child: Child,
    work_dir: Path,
    deadline: float | None,
    grace_s: float,
    signalled: list[int],
    pulse: _Pulse,
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
            if pulse.is_lost():
                logger.warning("ranks in %s show no sign of life: killed", work_dir)
                _end_group(child)
                return child.wait(), True
            if kill_at is not None and time.time() > kill_at:
                logger.warning("ranks in %s did not stop in time: killed", work_dir)
                _end_group(child)
                return child.wait(), True
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=POLL_S)
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


def _signal_group(child: Child, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _end_group(child: Child) -> None:
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
    tail = (work_dir / LOG).read_bytes()[-LOG_TAIL_CHARS:].decode(errors="replace")
    code = _shell_code(code, tail)
    evidence = {"exit_code": code, "log_tail": tail, "work_dir": str(work_dir)}
    _check_room(work_dir)
    if killed:
        raise LaunchError(
            f"{module} did not stop when it was asked to, and was killed",
            evidence=evidence,
            advice=f"read {work_dir / LOG}; its last checkpoint, if any, is used next",
        )
    raise LaunchError(
        f"{module} {how_it_ended(code)} and left no result",
        evidence=evidence,
        advice=f"read {work_dir / LOG}",
    )


def _check_room(work_dir: Path) -> None:
    """Raise if nothing can be written: ranks on a full disk could not even say so.

    Raises
    ------
    DiskFullError
        If the file system or the quota is full.
    """
    probe = work_dir / f".room.{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_ROOM_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        full = disk_full(error, work_dir)
        if full is not None:
            raise full from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _shell_code(code: int, log_tail: str) -> int:
    """Return an exit code in which death by signal n is 128 + n or -n.

    MPICH's mpiexec gives n itself, as of a program that chose to exit with n; what it
    says in the log of this launch tells the two apart.
    """
    launch = log_tail.rpartition("\n$ ")[2]
    return 128 + code if code > 0 and f"(signal {code})" in launch else code
