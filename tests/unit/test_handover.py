"""Work whose allocation ends continues in another job without anybody's help."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fireworks import Firework, Workflow
from fireworks.core.fworker import FWorker
from fireworks.core.rocket_launcher import launch_rocket, rapidfire

from nanoos_fw.errors import InputError, LaunchError, OutOfTimeError
from nanoos_fw.firetasks import WriteReportTask, handover
from nanoos_fw.firetasks.base import TaskContext
from nanoos_fw.firetasks.handover import MAX_STALLED
from nanoos_fw.operations.rerun import plan_reruns, rerun_failed_fireworks
from nanoos_fw.operations.status import campaign_status
from nanoos_fw.stores.launches import CONTINUATION, SPEC_KEY

Run = Callable[[WriteReportTask, TaskContext], dict[str, Any]]


@pytest.fixture(autouse=True)
def signals_of_pytest() -> Iterator[None]:
    """Set back the handlers that a job leaves behind when it ends."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Let the task do something else."""
    return lambda run: monkeypatch.setattr(WriteReportTask, "run", run)


def firework(stage: str = "md", **spec: Any) -> Firework:
    nanoos = {"campaign": "late", "stage": stage, "order": 8, "key": "k"}
    return Firework(
        [WriteReportTask(campaign="late", path="report.html")],
        spec={"_add_launchpad_and_fw_id": True, SPEC_KEY: nanoos, **spec},
        name=f"late {stage}",
    )


def launch(launchpad: Any, folder: Path) -> None:
    """Run one firework, as ``rlaunch singleshot`` does in a job."""
    folder.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        launch_rocket(launchpad, FWorker("worker"), strm_lvl="CRITICAL")
    finally:
        os.chdir(before)


def states(launchpad: Any) -> dict[int, str]:
    return {d["fw_id"]: d["state"] for d in launchpad.fireworks.find()}


def test_the_work_continues_in_another_job_before_its_children(
    new_launchpad: Callable[[], Any], work: Callable[[Run], None], tmp_path: Path
) -> None:
    launchpad = new_launchpad()
    parent = firework(_queueadapter={"nodes": 2}, _category="md")
    child = firework("report")
    child.parents = [parent]
    launchpad.add_wf(Workflow([parent, child], {parent: [child]}))
    steps = iter([{"step": 7}, {"step": 19}, None])

    def run(_task: WriteReportTask, _place: TaskContext) -> dict[str, Any]:
        evidence = next(steps, None)
        if evidence is None:
            return {"done": True}
        raise OutOfTimeError("stopped at the end", evidence=evidence)

    work(run)
    for expected in ("READY", "READY", "COMPLETED"):
        launch(new_launchpad(), tmp_path)
        found = states(launchpad)
        assert found.pop(child.fw_id) == ("WAITING" if expected == "READY" else "READY")
        assert found[max(found)] == expected
    launch(new_launchpad(), tmp_path)

    assert set(states(launchpad).values()) == {"COMPLETED"}
    last = launchpad.get_fw_by_id(max(states(launchpad)))
    assert last.spec["_queueadapter"] == {"nodes": 2}
    assert last.spec["_category"] == "md"
    assert last.spec[SPEC_KEY][CONTINUATION]["number"] == 2
    assert last.spec[SPEC_KEY][CONTINUATION]["first"] == parent.fw_id
    assert last.spec[SPEC_KEY][CONTINUATION]["progress"] == {"step": 19}
    assert last.spec[SPEC_KEY]["key"] == "k"
    # For whoever counts, it is one piece of work.
    assert campaign_status(launchpad.db, "late").stages == {
        "md": {"COMPLETED": 1},
        "report": {"COMPLETED": 1},
    }


def test_work_that_is_to_be_continued_does_not_count_as_completed(
    new_launchpad: Callable[[], Any], work: Callable[[Run], None], tmp_path: Path
) -> None:
    launchpad = new_launchpad()
    launchpad.add_wf(firework())

    def run(_task: WriteReportTask, _place: TaskContext) -> dict[str, Any]:
        raise OutOfTimeError("stopped", evidence={"step": 1})

    work(run)
    launch(new_launchpad(), tmp_path)
    assert campaign_status(launchpad.db, "late").stages == {"md": {"READY": 1}}


def test_a_rapidfire_loop_leaves_the_continuation_to_another_allocation(
    new_launchpad: Callable[[], Any], work: Callable[[Run], None], tmp_path: Path
) -> None:
    launchpad = new_launchpad()
    launchpad.add_wf(firework())
    launchpad.add_wf(firework())
    calls = []

    def run(_task: WriteReportTask, _place: TaskContext) -> dict[str, Any]:
        calls.append(1)
        raise OutOfTimeError("stopped", evidence={"step": len(calls)})

    work(run)
    before = Path.cwd()
    try:
        rapidfire(
            new_launchpad(), FWorker("w"), m_dir=str(tmp_path), strm_lvl="CRITICAL"
        )
    finally:
        os.chdir(before)
    assert len(calls) == 1
    assert sorted(states(launchpad).values()) == ["COMPLETED", "READY", "READY"]


def test_allocations_without_progress_come_to_an_end(
    new_launchpad: Callable[[], Any], work: Callable[[Run], None], tmp_path: Path
) -> None:
    launchpad = new_launchpad()
    launchpad.add_wf(firework())
    steps = iter([{"step": 1}, {"step": 1}, *[{"step": 2}] * 50])

    def run(_task: WriteReportTask, _place: TaskContext) -> dict[str, Any]:
        raise OutOfTimeError("stopped", evidence=next(steps))

    work(run)
    for _ in range(2 + 1 + MAX_STALLED):
        launch(new_launchpad(), tmp_path)
    found = states(launchpad)
    assert found.pop(max(found)) == "FIZZLED"
    assert set(found.values()) == {"COMPLETED"}
    details = launchpad.launches.find_one({"state": "FIZZLED"})["action"]["stored_data"]
    assert details["_exception"]["_details"]["kind"] == "out_of_time"
    assert "longer walltime" in details["_exception"]["_details"]["advice"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_hands_over_too_and_only_once(
    new_launchpad: Callable[[], Any],
    work: Callable[[Run], None],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    launchpad = new_launchpad()
    launchpad.add_wf(firework())

    def run(_task: WriteReportTask, _place: TaskContext) -> dict[str, Any]:
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # SLURM's own, a little later
        raise AssertionError("the signal was ignored")

    work(run)
    launch(new_launchpad(), tmp_path)
    os.kill(os.getpid(), signal.SIGTERM)  # and one while FireWorks writes
    assert sorted(states(launchpad).values()) == ["COMPLETED", "READY"]


def test_work_whose_job_was_cancelled_does_not_go_on_by_itself(
    new_launchpad: Callable[[], Any],
    work: Callable[[Run], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launchpad = new_launchpad()
    launchpad.add_wf(firework())
    monkeypatch.setattr(handover, "was_cancelled", lambda: True)

    def run(_task: WriteReportTask, _place: TaskContext) -> dict[str, Any]:
        raise OutOfTimeError("stopped by signal TERM", evidence={"step": 7})

    work(run)
    launch(new_launchpad(), tmp_path)
    assert list(states(launchpad).values()) == ["FIZZLED"]
    assert campaign_status(launchpad.db, "late").causes == {"md": {"cancelled": 1}}
    assert rerun_failed_fireworks(launchpad).rerun == []

    monkeypatch.setattr(handover, "was_cancelled", lambda: False)
    work(lambda _task, _place: {"done": True})
    assert len(rerun_failed_fireworks(launchpad, classes=["cancelled"]).rerun) == 1
    launch(new_launchpad(), tmp_path)
    assert list(states(launchpad).values()) == ["COMPLETED"]


@pytest.mark.parametrize(
    ("error", "cancelled", "failure"),
    [
        (LaunchError("died", evidence={"exit_code": 143}), False, "killed"),
        (LaunchError("died", evidence={"exit_code": 143}), True, "cancelled"),
        (InputError("a bad structure"), True, "input"),
        (MemoryError("12 GiB"), False, "oom"),
        (OSError(28, "No space left on device", "/scratch/x"), False, "disk"),
        (ZeroDivisionError(), True, "code"),
    ],
    ids=repr,
)
def test_errors_of_the_system_get_the_class_that_a_rerun_goes_by(
    new_launchpad: Callable[[], Any],
    work: Callable[[Run], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    cancelled: bool,
    failure: str,
) -> None:
    launchpad = new_launchpad()
    launchpad.add_wf(firework())
    monkeypatch.setattr(handover, "was_cancelled", lambda: cancelled)

    def run(_task: WriteReportTask, _place: TaskContext) -> dict[str, Any]:
        raise error

    work(run)
    launch(new_launchpad(), tmp_path)
    assert campaign_status(launchpad.db, "late").causes == {"md": {failure: 1}}
    (attempt,) = plan_reruns(launchpad.db)
    assert attempt.failure == failure


def test_a_task_that_ends_well_leaves_the_signals_as_they_were(
    new_launchpad: Callable[[], Any], work: Callable[[Run], None], tmp_path: Path
) -> None:
    new_launchpad().add_wf(firework())
    before = signal.getsignal(signal.SIGTERM)
    work(lambda _task, _place: {"done": True})
    launch(new_launchpad(), tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


def test_nothing_is_begun_in_an_allocation_that_ends(
    new_launchpad: Callable[[], Any],
    work: Callable[[Run], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launchpad = new_launchpad()
    launchpad.add_wf(firework())

    def run(_task: WriteReportTask, _place: TaskContext) -> dict[str, Any]:
        raise AssertionError("begun")

    work(run)
    now = int(time.time())
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(now - 3600))
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(now + 100))
    launch(new_launchpad(), tmp_path)
    assert sorted(states(launchpad).values()) == ["COMPLETED", "READY"]


def test_errors_are_still_failures(
    new_launchpad: Callable[[], Any], work: Callable[[Run], None], tmp_path: Path
) -> None:
    launchpad = new_launchpad()
    launchpad.add_wf(firework())

    def run(_task: WriteReportTask, _place: TaskContext) -> dict[str, Any]:
        raise ZeroDivisionError

    work(run)
    launch(new_launchpad(), tmp_path)
    assert list(states(launchpad).values()) == ["FIZZLED"]
