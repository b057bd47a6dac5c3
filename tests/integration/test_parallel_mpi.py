from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import HANGING_S, wait_for, wait_until_gone

from nanoos_fw.errors import InputError, LaunchError, OutOfTimeError
from nanoos_fw.parallel import LOG, Resources, launch_ranks

pytestmark = pytest.mark.mpi

PROGRAM = """
import json
import os
import signal
import time

import numpy as np

from nanoos_fw.errors import InputError, OutOfTimeError
from nanoos_fw.parallel import report_progress, run_rank_program


def program(config, work_dir, comm, stop):
    (work_dir / f"rank-{{comm.rank}}.pid").write_text(str(os.getpid()))
    comm.barrier()  # what goes wrong below goes wrong on ranks that have begun
    {body}


run_rank_program(program)
"""

RUN_UNTIL_STOPPED = """
while not comm.any(stop.requested):
    time.sleep(0.05)
if comm.rank == 0:
    (work_dir / "checkpoint").write_text("step 7")
raise OutOfTimeError(f"stopped at step 7: {stop.reason}", evidence={"step": 7})
"""

RUN_FOR_EVER = """
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def write_program(tmp_path: Path) -> Callable[..., Path]:
    """Write a rank program whose body is the given text; return its config."""

    def write(body: str, **config: Any) -> Path:
        # With a space, as in the home directories of some people.
        work_dir = tmp_path / "work dir"
        work_dir.mkdir(exist_ok=True)
        text = PROGRAM.format(body=textwrap.indent(body, "    ").strip())
        (work_dir / "ranks_under_test.py").write_text(text)
        path = work_dir / "config.json"
        path.write_text(json.dumps(config))
        return path

    return write


def launch(config: Path, ranks: int = 2, **options: Any) -> dict[str, Any]:
    return launch_ranks(
        "ranks_under_test",
        config,
        resources=Resources(
            ranks=ranks, launcher=os.environ.get("NANO_OS_MPI_LAUNCHER")
        ),
        **options,
    )


def rank_pids(work_dir: Path, ranks: int = 2) -> list[int]:
    """Wait until all ranks have told their process number."""
    files = [work_dir / f"rank-{n}.pid" for n in range(ranks)]
    wait_for(lambda: all(f.exists() and f.read_text() for f in files), "ranks to start")
    return [int(f.read_text()) for f in files]


def start_parent(config: Path, tmp_path: Path, **options: Any) -> subprocess.Popen[str]:
    """Launch the ranks from a process of its own, to be signalled or killed."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json, sys
            from pathlib import Path
            from nanoos_fw.errors import NanoOSError
            from nanoos_fw.parallel import Resources, launch_ranks

            launcher = {os.environ.get("NANO_OS_MPI_LAUNCHER")!r}
            try:
                launch_ranks(
                    "ranks_under_test",
                    Path({str(config)!r}),
                    resources=Resources(ranks=2, launcher=launcher),
                    **{options!r},
                )
            except NanoOSError as error:
                print(json.dumps(error.to_dict()))
            """
        )
    )
    return subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True
    )


def test_two_ranks_sum_gather_and_broadcast(
    write_program: Callable[..., Path],
) -> None:
    config = write_program(
        """
array = np.arange(3, dtype=np.float64) + 10.0 * comm.rank
comm.sum_in_place(array)
ranks = comm.gather(comm.rank)
word = comm.broadcast("from 0" if comm.rank == 0 else None)
flags = [comm.any(comm.rank == 1), comm.any(False)]
words = comm.gather(word)
if comm.rank == 0:
    report_progress(work_dir, 1, 1, "sum")
return {
    "sum": array.tolist(), "ranks": ranks, "words": words, "flags": flags,
    "value": config["value"], "threads": os.environ["OMP_NUM_THREADS"],
}
""",
        value=42,
    )
    assert launch(config) == {
        "sum": [10.0, 12.0, 14.0],
        "ranks": [0, 1],
        "words": ["from 0", "from 0"],
        "flags": [True, False],
        "value": 42,
        "threads": "1",
    }


def test_one_and_two_ranks_share_the_code_path(
    write_program: Callable[..., Path],
) -> None:
    config = write_program(
        """
total = np.ones(4)
comm.sum_in_place(total)
comm.barrier()
return {"total": total.tolist(), "size": comm.size}
"""
    )
    assert launch(config, ranks=1) == {"total": [1.0] * 4, "size": 1}
    assert launch(config, ranks=2) == {"total": [2.0] * 4, "size": 2}


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_rank_ends_all_with_its_cause(
    write_program: Callable[..., Path], failing: int
) -> None:
    config = write_program(
        f"""
if comm.rank == {failing}:
    raise InputError("sample 17 has no atoms", evidence={{"sample": 17}})
comm.barrier()  # the other rank waits for ever
"""
    )
    with pytest.raises(InputError, match="sample 17 has no atoms") as caught:
        launch(config, deadline=time.time() + HANGING_S)
    assert caught.value.evidence == {"sample": 17}
    wait_until_gone(rank_pids(config.parent))


def test_an_unexpected_exception_becomes_a_launch_error_with_traceback(
    write_program: Callable[..., Path],
) -> None:
    config = write_program(
        """
if comm.rank == 1:
    {}["graph"]
comm.barrier()
"""
    )
    with pytest.raises(LaunchError, match="KeyError: 'graph'") as caught:
        launch(config, deadline=time.time() + HANGING_S)
    assert "Traceback" in caught.value.evidence["traceback"]


def test_a_killed_rank_is_a_launch_error_with_the_log(
    write_program: Callable[..., Path],
) -> None:
    config = write_program(
        """
print(f"last words of rank {comm.rank}")
comm.barrier()
if comm.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
comm.barrier()
"""
    )
    with pytest.raises(LaunchError, match="left no result") as caught:
        launch(config, deadline=time.time() + HANGING_S)
    assert "last words of rank 1" in caught.value.evidence["log_tail"]
    wait_until_gone(rank_pids(config.parent))


def test_a_finished_run_is_not_taken_for_the_result_of_the_next(
    write_program: Callable[..., Path],
) -> None:
    launch(write_program('return {"run": 1}'))
    config = write_program("os._exit(3)")
    with pytest.raises(LaunchError, match="left no result"):
        launch(config, deadline=time.time() + HANGING_S)


def test_the_deadline_stops_all_ranks_with_a_checkpoint(
    write_program: Callable[..., Path],
) -> None:
    deadline = time.time() + 3.0
    config = write_program(RUN_UNTIL_STOPPED, deadline=deadline)
    with pytest.raises(OutOfTimeError, match="end of the allocation") as caught:
        launch(config, deadline=deadline)
    assert caught.value.resumable
    assert caught.value.evidence == {"step": 7}
    assert (config.parent / "checkpoint").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_the_parent_stops_the_ranks_with_a_checkpoint(
    write_program: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    config = write_program(RUN_UNTIL_STOPPED)
    parent = start_parent(config, tmp_path)
    pids = rank_pids(config.parent)
    parent.send_signal(number)
    out, _ = parent.communicate(timeout=HANGING_S)
    error = json.loads(out)
    assert error["kind"] == "out_of_time"
    assert error["resumable"] is True
    assert number.name in error["message"]
    assert (config.parent / "checkpoint").exists()
    wait_until_gone(pids)


def test_ranks_that_do_not_stop_are_killed_after_the_grace(
    write_program: Callable[..., Path],
) -> None:
    config = write_program(RUN_FOR_EVER)
    with pytest.raises(LaunchError, match="did not stop when it was asked"):
        launch(config, deadline=time.time() + 3.0, grace_s=0.5)
    # On a machine so busy that they had not yet begun, there are none.
    told = [path.read_text() for path in config.parent.glob("rank-*.pid")]
    wait_until_gone([int(text) for text in told if text])


def test_a_killed_parent_takes_its_ranks_along(
    write_program: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_program(RUN_FOR_EVER)
    parent = start_parent(config, tmp_path)
    pids = rank_pids(config.parent)
    # Not waited for: a zombie must not count as a living parent.
    os.kill(parent.pid, signal.SIGKILL)
    wait_until_gone(pids)
    parent.communicate()


def test_ranks_of_a_killed_parent_are_gone_before_the_next_launch_starts(
    write_program: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_program(RUN_FOR_EVER)
    parent = start_parent(config, tmp_path)
    pids = rank_pids(config.parent)
    config = write_program(
        """
def state(pid):
    stat = f"/proc/{pid}/stat"
    if not os.path.exists(stat):
        return "gone"
    return open(stat).read().rpartition(")")[2].split()[0]
return {"states": [state(pid) for pid in config["old"]]}
""",
        old=pids,
    )
    os.kill(parent.pid, signal.SIGKILL)
    result = launch(config)
    assert set(result["states"]) <= {"gone", "Z", "X"}
    parent.communicate()


def test_two_launches_append_to_one_log(write_program: Callable[..., Path]) -> None:
    config = write_program('print("hello"); return {"ok": True}')
    launch(config)
    launch(config)
    log = (config.parent / LOG).read_text()
    assert log.count("hello") == 4
    assert log.count("$ ") == 2
