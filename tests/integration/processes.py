"""What tests share that start programs: campaigns in processes, ranks, and waiting.

Only the standard library is imported here, since the campaigns' own programs
(``small_campaign.py``, ``small_active.py``) import this module, too.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RLAUNCH = [sys.executable, "-m", "fireworks.scripts.rlaunch_run"]
# Upper bound after which something counts as hanging. Passing tests wait for seconds,
# and as a test waits for a condition, a generous bound costs nothing: the machine may
# be busy, or slow.
HANGING_S = 600.0


# ------------------------------------------------------------------------- waiting


def wait_for(
    condition: Callable[[], object],
    evidence: Callable[[], object] | str,
    *,
    every_s: float = 0.05,
) -> None:
    """Wait until something is true; ``evidence`` tells, or names, what was not."""
    end = time.monotonic() + HANGING_S
    while not condition():
        if time.monotonic() > end:
            told = evidence if isinstance(evidence, str) else evidence()
            raise AssertionError(f"waited {HANGING_S:g} s in vain: {told}")
        time.sleep(every_s)


def alive(pid: int) -> bool:
    """Whether a process is more than a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until_gone(pids: Sequence[int]) -> None:
    wait_for(lambda: not any(map(alive, pids)), f"some of the processes {pids} to end")


def ranks_of(parent: int) -> list[int]:
    """Return the rank programs that a process has started by ``launch_ranks``."""
    mark = f":{parent}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            entries = (process / "environ").read_bytes().split(b"\0")
            if any(
                e.startswith(b"NANO_OS_PARENT=") and e.endswith(mark) for e in entries
            ):
                found.append(int(process.name))
    return found


# ----------------------------------------------------- campaigns in their own process


class CampaignProgram:
    """Runs of ``small_campaign.py`` or ``small_active.py``, each in a folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self, folder: Path, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(HERE / f"{self.name}.py"), str(folder), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, folder: Path, *options: str) -> list[str]:
        """Run to the end and return the lines that were printed."""
        child = self.start(folder, *options)
        output, _ = child.communicate(timeout=HANGING_S)
        assert child.returncode == 0, output
        return output.splitlines()

    def kill_after(self, folder: Path, stages: Sequence[str], *, at_work: bool) -> None:
        """SIGKILL a run when these stages have ended, one after the other.

        ``at_work``: once ranks of the next stage have made some progress.
        """
        child = self.start(folder)
        assert child.stdout is not None
        for stage in stages:
            assert any(line.split()[:1] == [stage] for line in child.stdout), stage
        ranks: list[int] = []
        if at_work:
            began = time.time()

            def working() -> bool:
                assert child.poll() is None, "it ended before it could be killed"
                return _newest_sign(folder / "work") > began

            wait_for(working, "no ranks came to work", every_s=0.01)
            ranks = ranks_of(child.pid)
        child.send_signal(signal.SIGKILL)
        assert child.wait(timeout=HANGING_S) == -signal.SIGKILL
        child.stdout.close()
        wait_until_gone(ranks)

    def rows(self, folder: Path) -> dict[str, Any]:
        """Read the rows in a process of its own: the mode belongs to a process."""
        code = (
            "import pickle, sys; from pathlib import Path; "
            "sys.path.insert(0, sys.argv[1]); "
            "from nanoos_fw.stores.embedded import open_embedded; "
            f"from {self.name} import rows; "
            "found = rows(open_embedded(Path(sys.argv[2])).db); "
            "sys.stdout.buffer.write(pickle.dumps(found))"
        )
        words = [sys.executable, "-c", code, str(HERE), str(folder / "db")]
        done = subprocess.run(words, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return dict(pickle.loads(done.stdout))


def _newest_sign(work: Path) -> float:
    """Return when ranks wrote last how far they are."""
    newest = 0.0
    for pattern in ("progress.json", "started.*"):
        for path in work.rglob(pattern):
            with contextlib.suppress(OSError):  # removed meanwhile
                newest = max(newest, path.stat().st_mtime)
    return newest


def campaign_main(
    plan_in: Callable[[Path], Any],
    submit: Callable[[Any, Any], None],
    run: Callable[[Any, Any, Path], list[Any]],
) -> None:
    """Be the program of a campaign.

    ``PROGRAM FOLDER`` submits it to the embedded database in the folder, runs it and
    prints a line per firework; ``--submit LAUNCHPAD`` only submits it to a server.

    ``run`` takes launchpad, plan and launch directory and returns what has failed.
    Arguments import what they need when they are called: which database a process
    works with is settled before.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--submit", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    from nanoos_fw.stores.database import load_launchpad
    from nanoos_fw.stores.embedded import open_embedded

    if arguments.submit is not None:
        submit(load_launchpad(arguments.submit), plan_in(folder))
        return
    launchpad = open_embedded(folder / "db", create=True)
    plan = plan_in(folder)
    submit(launchpad, plan)
    failed = run(launchpad, plan, folder / "db")
    for entry in failed:
        say("failed", entry.stage, entry.error, entry.error.evidence)
    raise SystemExit(1 if failed else 0)


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


# ----------------------------------------------------------------------- their rows


def unique(pairs: Sequence[tuple[Any, Any]], what: str) -> dict[Any, Any]:
    """Return rows by what identifies them, and fail on a double one."""
    found = dict(pairs)
    assert len(found) == len(pairs), f"{len(pairs) - len(found)} double {what}"
    return found


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Compare nested rows; numbers to 1e-6, since ranks add in any order."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6), (
            f"{where}: {found} is not {expected}"
        )
    else:
        assert found == expected, where
