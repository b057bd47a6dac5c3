"""What can happen to a job on the cluster of ``scripts/local-slurm``, done for real."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nanoos_fw.parallel import RANKS_LOCK

ROOT = Path(__file__).parents[2]
# Upper bound after which something counts as hanging; it takes seconds.
HANGING_S = 150.0
# Eats the memory of its job as files of a memory file system, which count for the job
# and for no process: the kernel takes the largest of the others.
_HOG = """
import os, sys, tempfile, time
victim = sys.argv[1]
with tempfile.TemporaryFile(dir="/dev/shm") as file:
    while os.path.exists(f"/proc/{victim}"):
        file.write(bytes(16_000_000))
        file.flush()
        time.sleep(0.005)
"""


def run(*command: object, timeout: float = HANGING_S, **options: object) -> str:
    """Run a command and return what it says; fail with all of it."""
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return str(done.stdout)


def wait_for(
    condition: Callable[[], object], what: str, seconds: float = HANGING_S
) -> None:
    """Wait until a condition holds; fail with the name of what did not come."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.03)


# ------------------------------------------------------------------------- processes


def jobs() -> list[str]:
    """Return the numbers of all jobs that SLURM has not ended."""
    return run("squeue", "--noheader", "--format=%A").split()


def node_of(job: str) -> str:
    """Return the node that runs a job of one node."""
    return run("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()


def processes(job: str, *words: str) -> list[int]:
    """Return processes of a job whose command line has all of these words."""
    mark = f"SLURM_JOB_ID={job}".encode()
    conf = f"SLURM_CONF={os.environ['SLURM_CONF']}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environ = (entry / "environ").read_bytes().split(b"\0")
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if mark in environ and conf in environ and all(w in line for w in words):
                found.append(int(entry.name))
    return sorted(found)


def ranks_below(folder: Path) -> list[int]:
    """Return the rank programs that work below a folder: each holds a file open."""
    found = set()
    for entry in filter(lambda e: e.name.isdigit(), Path("/proc").iterdir()):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for link in (entry / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = link.readlink()
                    if target.name == RANKS_LOCK and folder in target.parents:
                        found.add(int(entry.name))
    # The parent of the ranks has it open, too, when it waits for the last of them.
    return sorted(
        pid
        for pid in found
        if not _has_word(pid, "nanoos_fw.rlaunch", "operations.slots")
    )


def _has_word(pid: int, *words: str) -> bool:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return True
    return any(word in line for word in words)


def kill(*pids: int) -> None:
    """Send SIGKILL and wait until they are gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(map(_lives, pids)), f"end of {pids}", 20)


def hold(pids: Sequence[int]) -> int | None:
    """Stop one of these processes, so that it cannot end meanwhile, and return it."""
    for pid in reversed(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            wait_for(lambda pid=pid: _state(pid) in "TZX", f"stop of {pid}", 20)
            if _state(pid) == "T":
                return pid
    return None


def _lives(pid: int) -> bool:
    return _state(pid) not in "ZX"


def _state(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "X"
    return stat.rpartition(")")[2].split()[0]


# ---------------------------------------------------------------------------- faults


def fail_node(job: str, *, with_processes: bool) -> str:
    """Let the node of a job fail, and return its name.

    Parameters
    ----------
    job
        Of one node.
    with_processes
        False: only SLURM's daemons die, and what the job had started lives on.
    """
    node = node_of(job)
    folder = Path(os.environ["SLURM_CONF"]).parent
    daemon = int((folder / "run" / f"slurmd-{node}.pid").read_text())
    steps = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes()
            if line.startswith(f"slurmstepd: [{job}.".encode()):
                steps.append(int(entry.name))
    kill(daemon, *steps)
    if with_processes:
        kill(*processes(job))
    # What the controller does by itself after SlurmdTimeout, 20 s here.
    run("scontrol", "update", f"nodename={node}", "state=down", "reason=failed")
    return node


def repair_nodes() -> None:
    """Start what has died again."""
    folder = Path(os.environ["SLURM_CONF"]).parent
    with (folder / "log" / "repair.log").open("wb") as log:  # daemons keep no pipe open
        subprocess.run(
            [str(ROOT / "scripts" / "local-slurm"), "start", str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
            timeout=HANGING_S,
        )
    for node in ("n1", "n2"):
        wait_for(
            lambda node=node: (
                run(  # type: ignore[misc]
                    "sinfo", "--noheader", f"--nodes={node}", "--format=%T"
                ).split()[0]
                in {"idle", "mixed", "allocated", "completing"}
            ),
            f"node {node}",
            60,
        )


def hog_line(folder: Path) -> str:
    """Return a line of shell for jobs: eat all memory when ``exhaust`` says so.

    It ends with its job, which nothing but cgroups would see to.
    """
    script = folder / "hog.py"
    script.write_text(_HOG)
    ask = folder / "hog"
    return (
        f"( while sleep 0.1 && kill -0 $$; do [ -e {ask} ] && exec "
        f"{sys.executable} {script} $(cat {ask}); done ) 2>/dev/null &"
    )


def exhaust(folder: Path, job: str) -> None:
    """Let the kernel kill the largest process of a job for the job's memory."""
    (victim,) = _firework_process(job)
    victims = [*ranks_below(folder), victim]
    victim = max(victims, key=_resident)
    (folder / "hog.new").write_text(str(victim))
    (folder / "hog.new").rename(folder / "hog")
    wait_for(lambda: not _lives(victim), "the out-of-memory killer", 60)
    (folder / "hog").unlink()


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0


def _firework_process(job: str) -> list[int]:
    return processes(job, "nanoos_fw.rlaunch")[:1] or processes(
        job, "nanoos_fw.operations.slots"
    )


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[None]:
    """Make a folder a file system of its own; its content goes with it. Needs root."""
    run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder)
    try:
        yield
    finally:
        run("umount", "--lazy", folder)


def fill(folder: Path) -> Path:
    """Fill the file system of a folder to the last byte; return the file to remove."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast
