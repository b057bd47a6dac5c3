"""Lost runs and their reruns, on a LaunchPad over an in-memory database."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fireworks import Firework, FWAction, Workflow
from fireworks.core.fworker import FWorker
from fireworks.core.launchpad import WFLock

from nanoos_fw.errors import (
    DiskFullError,
    InputError,
    LaunchError,
    LostRunError,
    NanoOSError,
    OutOfMemoryError,
    OutOfTimeError,
    SimulationError,
    StoreError,
)
from nanoos_fw.firetasks import WriteReportTask
from nanoos_fw.operations import locks
from nanoos_fw.operations import reconcile as module
from nanoos_fw.operations import rerun as reruns
from nanoos_fw.operations.reconcile import (
    ALIVE,
    LOST,
    UNKNOWN,
    OpenLaunch,
    judge,
    reconcile,
)
from nanoos_fw.operations.rerun import (
    plan_reruns,
    rerun_failed_fireworks,
    undo_reruns,
)
from nanoos_fw.operations.rules import failure_class
from nanoos_fw.slurm import EndedJob, QueuedJob, parse_cluster
from nanoos_fw.stores.launches import SPEC_KEY, failed_fireworks
from nanoos_fw.stores.places import noted_place, read_cores, read_places

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
CLUSTER = parse_cluster(
    partitions="PartitionName=cpu Default=YES MaxNodes=2 MaxTime=12:00:00 State=UP\n"
    "PartitionName=big MaxNodes=2 MaxTime=72:00:00 State=UP\n",
    nodes="".join(f"cpu|n{n}|16|64000|(null)|idle\n" for n in (1, 2, 3))
    + "big|b1|16|512000|(null)|idle\n",
    config="ClusterName = mat\n",
)


def queued(job: str, state: str = "RUNNING", start: float | None = None) -> QueuedJob:
    return QueuedJob(job, job, state, "cpu", "x", "None", start)


def ended(job: str, state: str, **changes: Any) -> EndedJob:
    found = EndedJob(
        job_id=job,
        state=state,
        exit_code=0,
        signal=0,
        nodes="n1",
        start=0.0,
        end=100.0,
        limit_s=3600.0,
        out_of_memory=state == "OUT_OF_MEMORY",
        memory_mib=4000.0,
    )
    return replace(found, **changes)


RUNNING = OpenLaunch(
    launch_id=1,
    fw_id=1,
    name="x",
    state="RUNNING",
    job_id="7",
    host="n1",
    pid=1234,
    since=NOW - timedelta(hours=5),
    seen=NOW - timedelta(hours=5),
)
RESERVED = replace(RUNNING, state="RESERVED", pid=None)


# ------------------------------------------------------------------------------ judge


def test_a_run_whose_job_lives_is_alive_without_any_heartbeat() -> None:
    began = (RUNNING.since - timedelta(minutes=1)).timestamp()
    verdict = judge(RUNNING, {"7": queued("7", start=began)}, {}, NOW)
    assert verdict.fate == ALIVE


def test_a_run_whose_job_began_anew_is_lost() -> None:
    began = (RUNNING.since + timedelta(hours=1)).timestamp()
    verdict = judge(RUNNING, {"7": queued("7", start=began)}, {}, NOW)
    assert (verdict.fate, verdict.cause) == (LOST, "node")


def test_a_run_whose_job_waits_again_is_lost_if_it_was_in_that_job() -> None:
    waiting = {"7": queued("7", "PENDING")}
    verdict = judge(RUNNING, waiting, {}, NOW)
    assert (verdict.fate, verdict.cause) == (LOST, "node")
    assert judge(replace(RUNNING, pid=None), waiting, {}, NOW).fate == ALIVE
    assert judge(RESERVED, waiting, {}, NOW).fate == ALIVE
    for living in ("SUSPENDED", "COMPLETING", "STOPPED", "SIGNALING", "REQUEUED"):
        assert judge(RUNNING, {"7": queued("7", living)}, {}, NOW).fate == ALIVE


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("TIMEOUT", "timeout"),
        ("OUT_OF_MEMORY", "oom"),
        ("NODE_FAIL", "node"),
        ("CANCELLED", "cancelled"),
        ("PREEMPTED", "preempted"),
        ("COMPLETED", "completed"),
    ],
)
def test_a_run_whose_job_has_ended_is_lost_with_a_fresh_heartbeat_too(
    state: str, cause: str
) -> None:
    fresh = replace(RUNNING, seen=NOW)
    verdict = judge(fresh, {}, {"7": ended("7", state)}, NOW)
    assert (verdict.fate, verdict.cause) == (LOST, cause)


def test_a_job_that_slurm_does_not_know_is_left_alone() -> None:
    assert judge(RUNNING, {}, {}, NOW).fate == UNKNOWN
    assert judge(RESERVED, {}, {}, NOW).fate == UNKNOWN


def test_a_reservation_without_a_job_is_given_some_minutes() -> None:
    young = replace(RESERVED, job_id=None, since=NOW - timedelta(minutes=5))
    assert judge(young, {}, {}, NOW).fate == ALIVE
    old = replace(young, since=NOW - timedelta(hours=1))
    assert judge(old, {}, {}, NOW).fate == LOST


def test_without_a_job_the_process_counts_here_and_the_heartbeat_elsewhere() -> None:
    here = replace(RUNNING, job_id=None, host="here", pid=os.getpid())
    assert judge(here, {}, {}, NOW, this_host="here").fate == ALIVE
    gone = replace(here, pid=2**22 + 1, seen=NOW)  # above the largest process number
    assert judge(gone, {}, {}, NOW, this_host="here").fate == LOST
    assert judge(gone, {}, {}, NOW, this_host="there").fate == ALIVE
    silent = replace(gone, seen=NOW - timedelta(hours=1))
    assert judge(silent, {}, {}, NOW, this_host="there").fate == LOST


# -------------------------------------------------------------------------- reconcile


class Slurm:
    """What SLURM says, and how often it is asked."""

    def __init__(self) -> None:
        self.queued: dict[str, QueuedJob] = {}
        self.ended: dict[str, EndedJob] = {}
        self.calls: list[str] = []

    def queued_jobs(self) -> dict[str, QueuedJob]:
        self.calls.append("squeue")
        return self.queued

    def ended_jobs(self, jobs: set[str], **_options: Any) -> dict[str, EndedJob]:
        self.calls.append("sacct")
        return {job: self.ended[job] for job in jobs if job in self.ended}


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    found = Slurm()
    monkeypatch.setattr(module, "queued_jobs", found.queued_jobs)
    monkeypatch.setattr(module, "ended_jobs", found.ended_jobs)
    return found


def firework(**spec: Any) -> Firework:
    nanoos = {"campaign": "c", "stage": "md", "order": 8}
    return Firework(
        [WriteReportTask(campaign="c", path="r.html")],
        spec={SPEC_KEY: nanoos, **spec},
        name="c md",
    )


def reserved(launchpad: Any, job: str, folder: Path, **spec: Any) -> Any:
    """Return a firework that qlaunch has submitted as a job."""
    added = firework(**spec)
    launchpad.add_wf(added)
    fw, launch_id = launchpad.reserve_fw(FWorker("w"), str(folder), fw_id=added.fw_id)
    launchpad.set_reservation_id(launch_id, job)
    return fw


def running(launchpad: Any, job: str, folder: Path, **spec: Any) -> Any:
    """Return a firework that its job has begun."""
    fw = reserved(launchpad, job, folder, **spec)
    return launchpad.checkout_fw(FWorker("w"), str(folder), fw_id=fw.fw_id)[0]


def state(launchpad: Any, fw: Any) -> str:
    return str(launchpad.fireworks.find_one({"fw_id": fw.fw_id})["state"])


def test_slurm_is_asked_once_for_all_runs(
    launchpad: Any, slurm: Slurm, tmp_path: Path
) -> None:
    lost = [running(launchpad, str(job), tmp_path) for job in range(1, 6)]
    alive = running(launchpad, "9", tmp_path)
    slurm.ended = {str(job): ended(str(job), "NODE_FAIL") for job in range(1, 6)}
    slurm.queued = {"9": queued("9")}

    dry = reconcile(launchpad, dry_run=True)
    assert len(dry.lost) == 5
    assert {state(launchpad, fw) for fw in lost} == {"RUNNING"}
    slurm.calls.clear()
    report = reconcile(launchpad)

    assert slurm.calls == ["squeue", "sacct"]
    assert report.alive == 1
    assert {state(launchpad, fw) for fw in lost} == {"FIZZLED"}
    assert state(launchpad, alive) == "RUNNING"
    failed = failed_fireworks(launchpad.db, "c")
    assert {type(f.error) for f in failed} == {LostRunError}
    assert failed[0].error.evidence["nodes"] == "n1"
    assert reconcile(launchpad).clean


def test_the_cause_decides_the_error(
    launchpad: Any, slurm: Slurm, tmp_path: Path
) -> None:
    causes = {"1": "TIMEOUT", "2": "OUT_OF_MEMORY", "3": "NODE_FAIL"}
    for job in causes:
        running(launchpad, job, tmp_path)
    slurm.ended = {job: ended(job, cause) for job, cause in causes.items()}
    reconcile(launchpad)
    errors = [f.error for f in failed_fireworks(launchpad.db, "c")]
    assert [type(e) for e in errors] == [OutOfTimeError, OutOfMemoryError, LostRunError]
    assert [failure_class(e) for e in errors] == ["timeout", "oom", "node"]


def test_a_dead_reservation_becomes_ready_and_a_poison_job_is_paused(
    launchpad: Any, slurm: Slurm, tmp_path: Path
) -> None:
    fw = reserved(launchpad, "1", tmp_path)
    slurm.ended = {"1": ended("1", "NODE_FAIL")}
    assert len(reconcile(launchpad).unreserved) == 1
    assert state(launchpad, fw) == "READY"

    for attempt, expected in enumerate(["READY", "READY", "PAUSED"], start=2):
        _, launch_id = launchpad.reserve_fw(FWorker("w"), str(tmp_path))
        launchpad.set_reservation_id(launch_id, str(attempt))
        slurm.ended = {str(attempt): ended(str(attempt), "FAILED", exit_code=1)}
        reconcile(launchpad)
        assert state(launchpad, fw) == expected


@pytest.mark.parametrize("begin", [reserved, running])
def test_work_whose_job_somebody_cancelled_is_not_brought_back(
    launchpad: Any, slurm: Slurm, tmp_path: Path, begin: Callable[..., Any]
) -> None:
    fw = begin(launchpad, "1", tmp_path)
    slurm.ended = {"1": ended("1", "CANCELLED")}
    report = reconcile(launchpad)
    assert [verdict.cause for verdict in report.lost] == ["cancelled"]
    (failed,) = failed_fireworks(launchpad.db, "c")
    assert failure_class(failed.error) == "cancelled"
    assert "--class cancelled" in str(failed.error.advice)
    for _ in range(2):
        assert reconcile(launchpad).clean
        assert rerun_failed_fireworks(launchpad).rerun == []
        assert state(launchpad, fw) == "FIZZLED"
    assert len(rerun_failed_fireworks(launchpad, classes=["cancelled"]).rerun) == 1
    assert state(launchpad, fw) == "READY"


def test_a_job_too_small_to_begin_its_firework_gets_more_memory(
    launchpad: Any, slurm: Slurm, tmp_path: Path
) -> None:
    fw = reserved(launchpad, "1", tmp_path, _queueadapter={"mem": "100M"})
    slurm.ended = {"1": ended("1", "OUT_OF_MEMORY")}
    assert len(reconcile(launchpad).lost) == 1
    assert state(launchpad, fw) == "FIZZLED"

    assert rerun_failed_fireworks(launchpad).counts() == {"oom": 1}

    after = launchpad.fireworks.find_one({"fw_id": fw.fw_id})
    assert after["state"] == "READY"
    assert after["spec"]["_queueadapter"] == {"mem": "175M"}
    _, launch_id = launchpad.reserve_fw(FWorker("w"), str(tmp_path))
    assert launch_id > 1  # a new launch, not the one that ended


def test_a_run_that_ended_meanwhile_is_not_overwritten(
    launchpad: Any, slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fw = running(launchpad, "1", tmp_path)
    launch = launchpad.launches.find_one({"fw_id": fw.fw_id})["launch_id"]

    def ended_jobs(_jobs: set[str], **_options: Any) -> dict[str, EndedJob]:
        launchpad.complete_launch(launch, FWAction(), "COMPLETED")
        return {"1": ended("1", "COMPLETED")}

    monkeypatch.setattr(module, "ended_jobs", ended_jobs)
    reconcile(launchpad)
    assert state(launchpad, fw) == "COMPLETED"


def test_a_firework_that_lags_behind_its_launch_is_refreshed(
    launchpad: Any, slurm: Slurm, tmp_path: Path
) -> None:
    fw = running(launchpad, "1", tmp_path)
    done = {"state": "COMPLETED", "action": FWAction().to_dict()}
    launchpad.launches.update_one({"fw_id": fw.fw_id}, {"$set": done})
    assert reconcile(launchpad).refreshed == [fw.fw_id]
    assert state(launchpad, fw) == "COMPLETED"
    assert slurm.calls == []  # no job, no question


@pytest.mark.parametrize("launches", [[], [99]])
def test_a_firework_that_is_just_being_taken_is_left_alone(
    launchpad: Any, slurm: Slurm, launches: list[int]
) -> None:
    added = firework()
    launchpad.add_wf(added)
    taken = datetime.now(UTC)
    # What FireWorks writes first: there is no launch yet.
    change = {"state": "RESERVED", "updated_on": taken, "launches": launches}
    launchpad.fireworks.update_one({"fw_id": added.fw_id}, {"$set": change})
    for minutes in (0, 14):
        assert reconcile(launchpad, now=taken + timedelta(minutes=minutes)).clean
        assert state(launchpad, added) == "RESERVED"
    report = reconcile(launchpad, now=taken + timedelta(minutes=16))
    assert report.refreshed == [added.fw_id]
    if not launches:
        assert state(launchpad, added) == "READY"


def test_a_lock_is_removed_when_it_has_been_seen_long_enough(
    launchpad: Any, slurm: Slurm
) -> None:
    added = firework()
    launchpad.add_wf(added)
    launchpad.workflows.update_one({}, {"$set": {"locked": True}})
    assert reconcile(launchpad, now=NOW).unlocked == []
    assert reconcile(launchpad, now=NOW + timedelta(minutes=5)).unlocked == []
    assert reconcile(launchpad, now=NOW + timedelta(minutes=11)).unlocked == [
        added.fw_id
    ]
    assert "locked" not in launchpad.workflows.find_one({})
    # A lock that was free in between is a new one.
    launchpad.workflows.update_one({}, {"$set": {"locked": True}})
    assert reconcile(launchpad, now=NOW + timedelta(minutes=12)).unlocked == []
    launchpad.workflows.update_one({}, {"$unset": {"locked": ""}})
    reconcile(launchpad, now=NOW + timedelta(minutes=13))
    launchpad.workflows.update_one({}, {"$set": {"locked": True}})
    assert reconcile(launchpad, now=NOW + timedelta(minutes=23)).unlocked == []


def test_the_lock_of_a_workflow_that_goes_on_is_not_removed(
    launchpad: Any, slurm: Slurm
) -> None:
    added = firework()
    launchpad.add_wf(added)
    for minutes in (0, 20, 40):  # somebody happens to hold it each time
        launchpad.workflows.update_one({}, {"$set": {"locked": True}})
        later = NOW + timedelta(minutes=minutes)
        assert reconcile(launchpad, now=later).unlocked == []
        launchpad.workflows.update_one({}, {"$unset": {"locked": ""}})
        launchpad._refresh_wf(added.fw_id)


@pytest.mark.parametrize("noted", [False, True])
def test_nobody_waits_for_the_lock_of_a_process_that_is_gone(
    launchpad: Any, slurm: Slurm, tmp_path: Path, noted: bool
) -> None:
    fw = running(launchpad, "1", tmp_path)
    slurm.ended["1"] = ended("1", "OUT_OF_MEMORY")
    if noted:  # its launch was, before the process that held the lock was killed
        done = {"state": "FIZZLED", "action": FWAction().to_dict()}
        launchpad.launches.update_one({"fw_id": fw.fw_id}, {"$set": done})
    launchpad.workflows.update_one({}, {"$set": {"locked": True}})
    now = datetime.now(UTC)
    report = reconcile(launchpad, now=now)  # FireWorks alone would take five minutes
    assert (report.locked, report.lost, report.refreshed) == ([fw.fw_id], [], [])
    assert not report.clean
    assert state(launchpad, fw) == "RUNNING"
    report = reconcile(launchpad, now=now + timedelta(minutes=11))
    assert report.unlocked == [fw.fw_id]
    assert report.locked == []
    assert state(launchpad, fw) == "FIZZLED"


def test_a_task_notes_the_job_it_runs_in(launchpad: Any, tmp_path: Path) -> None:
    added = firework()
    launchpad.add_wf(added)
    _, launch_id = launchpad.checkout_fw(FWorker("w"), str(tmp_path))
    with noted_place(launchpad.db, added.fw_id, {"SLURM_JOB_ID": "77"}):
        pass
    place = read_places(launchpad.db, [launch_id])[launch_id]
    assert (place.job_id, place.host, place.pid) == (
        "77",
        socket.gethostname(),
        os.getpid(),
    )


@pytest.mark.parametrize(
    ("environ", "cores"),
    [
        ({}, 2),
        ({"SLURM_JOB_CPUS_PER_NODE": "8"}, 8),
        ({"SLURM_JOB_CPUS_PER_NODE": "4(x2),2"}, 10),
        ({"SLURM_JOB_CPUS_PER_NODE": "4(x2)", "NANO_OS_SLOT": "1"}, 2),
    ],
)
def test_a_launch_notes_the_cores_that_it_keeps_from_others(
    environ: dict[str, str], cores: int, launchpad: Any, tmp_path: Path
) -> None:
    added = firework()
    launchpad.add_wf(added)
    _, launch_id = launchpad.checkout_fw(FWorker("w"), str(tmp_path))
    with noted_place(launchpad.db, added.fw_id, environ, cores=2):
        pass
    assert read_cores(launchpad.db, [launch_id, 99]) == {launch_id: cores}


# ------------------------------------------------------------------------------ rerun


def fizzled(
    launchpad: Any, error: NanoOSError | None, folder: Path, **spec: Any
) -> Any:
    """Return a firework that failed with an error, None for a programming error."""
    added = firework(**spec)
    launchpad.add_wf(added)
    return fail(launchpad, added, error, folder)


def fail(launchpad: Any, fw: Any, error: NanoOSError | None, folder: Path) -> Any:
    _, launch_id = launchpad.checkout_fw(FWorker("w"), str(folder), fw_id=fw.fw_id)
    details = None if error is None else error.to_dict()
    action = FWAction(
        stored_data={"_exception": {"_stacktrace": "KeyError: 1", "_details": details}}
    )
    launchpad.complete_launch(launch_id, action, "FIZZLED")
    return fw


def lost(cause: str, **evidence: Any) -> LostRunError:
    return LostRunError("gone", evidence={"cause": cause, **evidence})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OutOfTimeError("x"), "timeout"),
        (OutOfMemoryError("x"), "oom"),
        (lost("node"), "node"),
        (lost("preempted"), "preempted"),
        (lost("cancelled"), "cancelled"),
        (lost("completed"), "killed"),
        (lost("code"), "killed"),
        (StoreError("x"), "store"),
        (LaunchError("x", evidence={"exit_code": 1}), "launch"),
        (LaunchError("x", evidence={"exit_code": -9}), "killed"),
        (
            LaunchError("x", evidence={"log_tail": "task 0: Out Of Memory"}),
            "oom",
        ),
        (LaunchError("x", evidence={"exit_code": 143}), "killed"),
        (LaunchError("x", evidence={"exit_code": -11}), "launch"),
        (DiskFullError("x"), "disk"),
        (SimulationError("x", evidence={"class": "disk_full"}), "disk"),
        (SimulationError("x", evidence={"class": "out_of_memory"}), "oom"),
        (SimulationError("x"), "lammps"),
        (InputError("x"), "input"),
        (NanoOSError("x"), "code"),
    ],
)
def test_a_failure_has_a_class(error: NanoOSError, expected: str) -> None:
    assert failure_class(error) == expected


@pytest.mark.parametrize(
    ("error", "before", "after"),
    [
        (OutOfTimeError("x"), {"walltime": "2:00:00"}, {"walltime": "3:00:00"}),
        (OutOfTimeError("x", evidence={"limit_s": 3600}), {}, {"walltime": "1:30:00"}),
        (OutOfTimeError("x"), {"walltime": "10:00:00"}, {"walltime": "12:00:00"}),
        (OutOfTimeError("x"), {"walltime": "12:00:00"}, {"walltime": "12:00:00"}),
        (OutOfMemoryError("x"), {"mem": "4000M"}, {"mem": "7000M"}),
        (OutOfMemoryError("x", evidence={"memory_mib": 1000}), {}, {"mem": "1750M"}),
        (
            OutOfMemoryError("x"),
            {"mem_per_cpu": "2G", "ntasks_per_node": 4, "nodes": 2},
            {"mem": "14336M", "ntasks_per_node": 4, "nodes": 2},
        ),
        (OutOfMemoryError("x"), {"mem": "60000M"}, {"mem": "64000M"}),
        (lost("node", nodes="n1"), {"nodes": 1}, {"nodes": 1, "exclude_nodes": "n1"}),
        (
            lost("node", nodes="n2"),
            {"exclude_nodes": "n1"},
            {"exclude_nodes": "n1,n2"},
        ),
        (lost("node", nodes="n1"), {"exclude_nodes": "n1"}, {"exclude_nodes": "n1"}),
        # Without all that failed ever there would be too few: SLURM would refuse it.
        (
            lost("node", nodes="n3"),
            {"exclude_nodes": "n1,n2"},
            {"exclude_nodes": "n3"},
        ),
        (
            lost("node", nodes="b1", partition="big"),
            {"nodes": 1},
            {"nodes": 1},
        ),
        (lost("node", nodes="n[1-2]"), {}, {}),
        # Where its job was, not what is the default, sets the limits.
        (
            OutOfMemoryError("x", evidence={"partition": "big", "memory_mib": 64000}),
            {},
            {"mem": "112000M"},
        ),
        (
            OutOfTimeError("x", evidence={"partition": "big", "limit_s": 43200}),
            {},
            {"walltime": "18:00:00"},
        ),
        (
            OutOfTimeError("x", evidence={"partition": "gone", "limit_s": 3600}),
            {},
            {"walltime": "1:30:00"},
        ),
        (
            OutOfMemoryError("x"),
            {"mem_per_cpu": "2G", "ntasks": 4, "nodes": 2},
            {"mem": "7168M", "ntasks": 4, "nodes": 2},
        ),
        (StoreError("x"), {"nodes": 2}, {"nodes": 2}),
    ],
)
def test_the_next_attempt_gets_what_the_failure_asks_for(
    launchpad: Any,
    tmp_path: Path,
    error: NanoOSError,
    before: dict[str, Any],
    after: dict[str, Any],
) -> None:
    spec = {"_queueadapter": before} if before else {}
    fw = fizzled(launchpad, error, tmp_path, **spec)
    report = rerun_failed_fireworks(launchpad, campaign="c", cluster=CLUSTER)
    assert [a.fw_id for a in report.rerun] == [fw.fw_id]
    document = launchpad.fireworks.find_one({"fw_id": fw.fw_id})
    assert document["state"] == "READY"
    assert document["spec"].get("_queueadapter", {}) == after


@pytest.mark.parametrize(
    "error",
    [
        None,
        InputError("x"),
        SimulationError("x"),
        lost("cancelled"),
        DiskFullError("no space left for /scratch"),
    ],
)
def test_what_would_fail_again_is_left_unless_it_is_named(
    launchpad: Any, tmp_path: Path, error: NanoOSError | None
) -> None:
    fw = fizzled(launchpad, error, tmp_path)
    report = rerun_failed_fireworks(launchpad, cluster=CLUSTER)
    assert report.rerun == []
    (left,) = report.refused
    assert left.refused
    assert state(launchpad, fw) == "FIZZLED"
    rerun_failed_fireworks(launchpad, classes=[left.failure], cluster=CLUSTER)
    assert state(launchpad, fw) == "READY"


def test_all_the_memory_of_a_node_is_the_end(launchpad: Any, tmp_path: Path) -> None:
    fizzled(launchpad, OutOfMemoryError("x"), tmp_path, _queueadapter={"mem": "64000M"})
    fizzled(launchpad, OutOfMemoryError("x"), tmp_path)
    (full, unknown) = rerun_failed_fireworks(launchpad, cluster=CLUSTER).refused
    assert "all the memory" in full.refused
    assert "not known" in unknown.refused


def test_attempts_are_counted_by_class_and_come_to_an_end(
    launchpad: Any, tmp_path: Path
) -> None:
    fw = fizzled(launchpad, LaunchError("died", evidence={"exit_code": 1}), tmp_path)
    assert len(rerun_failed_fireworks(launchpad).rerun) == 1
    fail(launchpad, fw, lost("preempted"), tmp_path)  # uses up nothing
    assert len(rerun_failed_fireworks(launchpad).rerun) == 1
    fail(launchpad, fw, LaunchError("died", evidence={"exit_code": 1}), tmp_path)
    (left,) = rerun_failed_fireworks(launchpad).refused
    assert "1 reruns after launch did not help" in left.refused


def test_only_what_is_asked_for_is_rerun(launchpad: Any, tmp_path: Path) -> None:
    node = fizzled(launchpad, lost("node"), tmp_path)
    store = fizzled(launchpad, StoreError("x"), tmp_path)
    other = fizzled(
        launchpad, StoreError("x"), tmp_path, **{SPEC_KEY: {"campaign": "d"}}
    )
    dry = rerun_failed_fireworks(launchpad, campaign="c", dry_run=True)
    assert len(dry.rerun) == 2
    rerun_failed_fireworks(launchpad, campaign="c", classes=["store"])
    assert [state(launchpad, fw) for fw in (node, store, other)] == [
        "FIZZLED",
        "READY",
        "FIZZLED",
    ]
    with pytest.raises(InputError, match="no failure class heat"):
        plan_reruns(launchpad.db, classes=["heat"])


def test_descendants_are_kept_and_counted(launchpad: Any, tmp_path: Path) -> None:
    parent, child, grandchild = firework(), firework(), firework()
    launchpad.add_wf(
        Workflow([parent, child, grandchild], {parent: [child], child: [grandchild]})
    )
    fail(launchpad, parent, StoreError("x"), tmp_path)
    (attempt,) = rerun_failed_fireworks(launchpad).rerun
    assert attempt.descendants == 2
    assert launchpad.fireworks.count_documents({}) == 3
    assert [state(launchpad, fw) for fw in (parent, child, grandchild)] == [
        "READY",
        "WAITING",
        "WAITING",
    ]


def test_a_rerun_that_has_not_begun_is_taken_back(
    launchpad: Any, tmp_path: Path
) -> None:
    waiting = fizzled(
        launchpad, OutOfTimeError("x"), tmp_path, _queueadapter={"walltime": "1:00:00"}
    )
    begun = fizzled(launchpad, StoreError("x"), tmp_path)
    report = rerun_failed_fireworks(launchpad)
    launchpad.checkout_fw(FWorker("w"), str(tmp_path), fw_id=begun.fw_id)

    assert undo_reruns(launchpad) == (1, 1, [])

    document = launchpad.fireworks.find_one({"fw_id": waiting.fw_id})
    assert document["state"] == "FIZZLED"
    assert document["spec"]["_queueadapter"] == {"walltime": "1:00:00"}
    assert [f.fw_id for f in failed_fireworks(launchpad.db, "c")] == [waiting.fw_id]
    # It counts as no attempt, and can be rerun again.
    assert rerun_failed_fireworks(launchpad).rerun[0].previous == 0
    with pytest.raises(InputError, match="no rerun 'last week'"):
        undo_reruns(launchpad, "last week")
    assert report.batch


def test_the_controller_is_asked_while_accounting_is_down(
    launchpad: Any,
    slurm: Slurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known, unknown = (running(launchpad, job, tmp_path) for job in ("1", "2"))
    slurm.ended["1"] = ended("1", "NODE_FAIL")

    def without_accounting(jobs: set[str], *, accounting: bool) -> dict[str, EndedJob]:
        if accounting:
            raise LaunchError("sacct failed with exit code 1: Connection refused")
        return slurm.ended_jobs(jobs)

    monkeypatch.setattr(module, "ended_jobs", without_accounting)
    report = reconcile(launchpad)
    assert [verdict.launch.fw_id for verdict in report.lost] == [known.fw_id]
    assert [verdict.launch.fw_id for verdict in report.unknown] == [unknown.fw_id]
    assert state(launchpad, unknown) == "RUNNING"


def test_a_reserved_firework_that_was_begun_by_hand_is_not_lost_with_its_job(
    launchpad: Any, slurm: Slurm, tmp_path: Path
) -> None:
    fw = running(launchpad, "7", tmp_path)
    slurm.ended["7"] = ended("7", "COMPLETED")  # it found nothing left to do
    with noted_place(launchpad.db, fw.fw_id, {}):
        report = reconcile(launchpad)
    assert (report.alive, report.lost) == (1, [])
    assert state(launchpad, fw) == "RUNNING"


@pytest.mark.parametrize("rest", ["pause_fw", "defuse_fw"])
@pytest.mark.parametrize("begun", [False, True])
def test_what_somebody_has_put_to_rest_below_a_lost_run_stays_so(
    launchpad: Any, slurm: Slurm, tmp_path: Path, begun: bool, rest: str
) -> None:
    parent, child, grandchild = firework(), firework(), firework()
    links = {parent: [child], child: [grandchild]}
    launchpad.add_wf(Workflow([parent, child, grandchild], links))
    getattr(launchpad, rest)(child.fw_id)
    resting = state(launchpad, child)
    worker = FWorker("w")
    _, launch = launchpad.reserve_fw(worker, str(tmp_path), fw_id=parent.fw_id)
    launchpad.set_reservation_id(launch, "7")
    slurm.ended["7"] = ended("7", "NODE_FAIL")
    if begun:
        launchpad.checkout_fw(worker, str(tmp_path), fw_id=parent.fw_id)

    reconcile(launchpad)
    if begun:
        assert len(rerun_failed_fireworks(launchpad).rerun) == 1

    found = [state(launchpad, fw) for fw in (parent, child, grandchild)]
    assert found == ["READY", resting, "WAITING"]
    states = launchpad.workflows.find_one({})["fw_states"]
    assert states == {
        str(fw.fw_id): state(launchpad, fw) for fw in (parent, child, grandchild)
    }


def test_a_rerun_that_was_rerun_in_its_turn_has_begun(
    launchpad: Any, tmp_path: Path
) -> None:
    fw = fizzled(launchpad, StoreError("first"), tmp_path)
    first = rerun_failed_fireworks(launchpad).batch
    fail(launchpad, fw, StoreError("second"), tmp_path)
    rerun_failed_fireworks(launchpad)
    assert undo_reruns(launchpad, first) == (0, 1, [])
    assert undo_reruns(launchpad) == (1, 0, [])
    (left,) = failed_fireworks(launchpad.db, "c")
    assert left.error.message == "second"


def test_a_failure_that_another_process_has_rerun_is_left_to_it(
    launchpad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fw = fizzled(launchpad, StoreError("x"), tmp_path)

    def rerun_by_another(*_args: Any, **_options: Any) -> list[Any]:
        found = plan_reruns(launchpad.db)
        monkeypatch.undo()
        assert len(rerun_failed_fireworks(launchpad).rerun) == 1
        launchpad.checkout_fw(FWorker("w"), str(tmp_path), fw_id=fw.fw_id)
        return found

    monkeypatch.setattr(reruns, "plan_reruns", rerun_by_another)
    assert rerun_failed_fireworks(launchpad).rerun == []
    assert state(launchpad, fw) == "RUNNING"
    assert launchpad.db["reruns"].count_documents({}) == 1


def test_two_reruns_at_the_same_moment_rerun_each_failure_once(
    launchpad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fw = fizzled(launchpad, StoreError("x"), tmp_path)
    enter = WFLock.__enter__

    def late(lock: Any) -> None:  # another one gets the lock first, a worker the run
        monkeypatch.undo()
        assert len(rerun_failed_fireworks(launchpad).rerun) == 1
        launchpad.checkout_fw(FWorker("w"), str(tmp_path), fw_id=fw.fw_id)
        enter(lock)

    monkeypatch.setattr(WFLock, "__enter__", late)
    assert rerun_failed_fireworks(launchpad).rerun == []
    document = launchpad.fireworks.find_one({"fw_id": fw.fw_id})
    assert document["state"] == "RUNNING"
    assert launchpad.launches.count_documents({"state": "RUNNING"}) == 1
    assert launchpad.db["reruns"].count_documents({}) == 1


def test_neither_rerun_nor_undo_waits_for_a_process_that_is_gone(
    launchpad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOCK_WAIT_S", 0.2)
    held = fizzled(launchpad, StoreError("x"), tmp_path)
    free = fizzled(launchpad, StoreError("x"), tmp_path)
    lock = {"$set": {"locked": True}}
    launchpad.workflows.update_one({"nodes": held.fw_id}, lock)

    report = rerun_failed_fireworks(launchpad)

    assert [attempt.fw_id for attempt in report.rerun] == [free.fw_id]
    assert report.locked == [held.fw_id]
    assert state(launchpad, held) == "FIZZLED"
    launchpad.workflows.update_one({"nodes": free.fw_id}, lock)
    assert undo_reruns(launchpad) == (0, 0, [free.fw_id])
    assert state(launchpad, free) == "READY"


def test_accounting_tells_of_memory_what_the_error_does_not(
    launchpad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fw = running(launchpad, "5", tmp_path)
    launch = launchpad.launches.find_one({"fw_id": fw.fw_id})["launch_id"]
    error = LaunchError("died with signal 9", evidence={"exit_code": -9})
    details = {"_exception": {"_stacktrace": "", "_details": error.to_dict()}}
    launchpad.complete_launch(launch, FWAction(stored_data=details), "FIZZLED")
    asked: list[set[str]] = []

    def ended_jobs(jobs: Any, *, accounting: bool) -> dict[str, EndedJob]:
        asked.append(set(jobs))
        return {"5": ended("5", "FAILED", out_of_memory=True, memory_mib=1000.0)}

    monkeypatch.setattr("nanoos_fw.operations.rerun.ended_jobs", ended_jobs)
    (attempt,) = rerun_failed_fireworks(launchpad, cluster=CLUSTER).rerun
    assert asked == [{"5"}]
    assert attempt.failure == "oom"
    assert attempt.resources == {"mem": "1750M"}


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({"state": "CANCELLED"}, "cancelled"),
        ({"state": "NODE_FAIL"}, "node"),
        ({"state": "PREEMPTED"}, "preempted"),
        ({"state": "COMPLETED"}, "killed"),
        # A packed worker that somebody cancelled long after.
        ({"state": "CANCELLED", "end": 4e9}, "killed"),
    ],
)
def test_ranks_that_were_killed_with_their_job_were_killed_for_the_same_reason(
    launchpad: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    job: dict[str, Any],
    expected: str,
) -> None:
    fw = running(launchpad, "5", tmp_path)
    launch = launchpad.launches.find_one({"fw_id": fw.fw_id})["launch_id"]
    error = LaunchError("died", evidence={"exit_code": 143})
    details = {"_exception": {"_stacktrace": "", "_details": error.to_dict()}}
    launchpad.complete_launch(launch, FWAction(stored_data=details), "FIZZLED")
    monkeypatch.setattr(
        "nanoos_fw.operations.rerun.ended_jobs",
        lambda _jobs, **_options: {"5": ended("5", **job)},
    )
    (attempt,) = plan_reruns(launchpad.db, cluster=CLUSTER)
    assert attempt.failure == expected
