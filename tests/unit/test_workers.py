"""Packed workers: what a slot may run, how an allocation is divided, deaths."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fireworks import Firework, PyTask

from nanoos_fw.errors import InputError
from nanoos_fw.operations import slots
from nanoos_fw.operations.shares import Share, shares, slot_environment
from nanoos_fw.operations.slots import Slot, SlotConfig, fitting_query
from nanoos_fw.operations.workers import worker_name


def task(function: str = "os.getcwd", *args: Any) -> PyTask:
    return PyTask(func=function, args=list(args))


SPECS: dict[str, dict[str, Any]] = {
    "unknown": {},
    "short": {"nanoos": {"needs": {"minimum_s": 50}}},
    "long": {"nanoos": {"needs": {"minimum_s": 5000}}},
    # Its needs are known: it can be continued, whatever walltime it asks for.
    "resumable": {
        "nanoos": {"needs": {"minimum_s": 60}},
        "_queueadapter": {"walltime": "9:00:00"},
    },
    "walltime": {"_queueadapter": {"walltime": "9:00:00"}},
    "minutes": {"_queueadapter": {"walltime": 1}},
    "wide": {"_queueadapter": {"ntasks": 3}},
    "narrow": {"_queueadapter": {"ntasks": 2, "nodes": 1}},
    "nodes": {"_queueadapter": {"nodes": 2}},
    "gpu": {"_queueadapter": {"gpus_per_node": 1}},
    "little": {"_queueadapter": {"mem": "900M"}},
    "much": {"_queueadapter": {"mem": "3G"}},
}


@pytest.mark.parametrize(
    ("left", "gpus", "refused"),
    [
        (100.0, 0, {"long", "walltime", "wide", "nodes", "gpu"}),
        (55.0, 1, {"long", "walltime", "resumable", "minutes", "wide", "nodes"}),
        (None, 1, {"wide", "nodes"}),
    ],
)
def test_a_slot_leaves_what_it_cannot_finish(
    launchpad: Any, left: float | None, gpus: int, refused: set[str]
) -> None:
    launchpad.fireworks.insert_many(
        {"fw_id": number, "name": name, "spec": spec}
        for number, (name, spec) in enumerate(SPECS.items())
    )
    query = fitting_query(left, 2, gpus, ["9:00:00", 1], ["3G"])
    found = {d["name"] for d in launchpad.fireworks.find(query)}
    assert found == set(SPECS) - refused - {"much"}


def slot(launchpad: Any, folder: Path, **changes: Any) -> SlotConfig:
    return SlotConfig(
        launchpad=None,
        categories=changes.get("categories", ()),
        worker="w",
        number=1,
        cpus=None,
        ranks=1,
        gpus=0,
        memory_mib=changes.get("memory_mib"),
        idle_s=60.0,
        folder=folder,
        drain_files=(folder / "drain",),
        parent=os.getppid(),
    )


class Clock:
    """Sleeping is all that takes time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def run_slot(launchpad: Any, folder: Path, left_s: float | None, **changes: Any) -> Any:
    clock = Clock()
    events: list[Any] = []
    config = slot(launchpad, folder, **changes)
    deadline = None if left_s is None else clock.now + left_s
    before = Path.cwd()
    try:
        reason = Slot(
            config, launchpad, events.append, deadline, clock=clock, sleep=clock.sleep
        ).run()
    finally:
        os.chdir(before)
    return reason, events, clock.now - 1000.0


def test_a_slot_leaves_what_asks_for_more_memory_than_it_has(
    launchpad: Any, tmp_path: Path
) -> None:
    asked = {"enough": "1G", "number": 1024, "more": "1025M", "node": 0, "none": None}
    for name, memory in asked.items():
        spec = {} if memory is None else {"_queueadapter": {"mem": memory}}
        launchpad.add_wf(Firework([task()], spec=spec, name=name))
    run_slot(launchpad, tmp_path, None, memory_mib=1024.0)
    left = launchpad.fireworks.find({"state": "READY"}, {"name": 1})
    assert {document["name"] for document in left} == {"more", "node"}


def test_a_slot_runs_what_fits_then_idles_and_leaves_the_rest(
    launchpad: Any, tmp_path: Path
) -> None:
    for name in ("unknown", "short", "long", "wide"):
        spec = {**SPECS[name], "_category": "md"}
        launchpad.add_wf(Firework([task()], spec=spec, name=name))
    launchpad.add_wf(Firework([task()], spec={"_category": "train"}, name="other"))
    launchpad.add_wf(
        Firework([task("os.no_such_thing")], spec={"_category": "md"}, name="bad")
    )

    reason, events, slept = run_slot(launchpad, tmp_path, 200.0, categories=("md",))

    assert reason == "idle"
    assert 60.0 <= slept < 75.0
    ended = {e["name"]: e["state"] for e in events if e["event"] == "ended"}
    assert ended == {"unknown": "COMPLETED", "short": "COMPLETED", "bad": "FIZZLED"}
    assert events[-1] == {"event": "left", "reason": "idle", "ready": 2}
    states = {d["name"]: d["state"] for d in launchpad.fireworks.find()}
    assert {states["long"], states["wide"], states["other"]} == {"READY"}
    # Nothing but FireWorks' copy of the spec was in the launch directories.
    assert list(tmp_path.glob("launcher_*")) == []


def test_a_slot_sorts_once_for_many_and_keeps_to_the_priorities(
    launchpad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two at a time; another worker takes one of them in between."""
    for number in range(5):
        spec = {"_priority": number}
        launchpad.add_wf(Firework([task()], spec=spec, name=f"p{number}"))
    monkeypatch.setattr(slots, "_CANDIDATES", 2)
    asked: list[list[int]] = []
    ask = Slot._candidates

    def candidates(self: Slot, query: Any) -> list[int]:
        before = self._known[1]
        found = ask(self, query)
        if found is not before:
            asked.append(list(found))
            if len(asked) == 2:  # just then another takes the first of them
                launchpad.fireworks.update_one(
                    {"fw_id": found[0]}, {"$set": {"state": "RUNNING"}}
                )
        return found

    monkeypatch.setattr(Slot, "_candidates", candidates)
    reason, events, _ = run_slot(launchpad, tmp_path, None)

    ended = [e["name"] for e in events if e["event"] == "ended"]
    assert ended == ["p4", "p3", "p1", "p0"]
    assert reason == "idle"
    ids = {d["fw_id"]: d["name"] for d in launchpad.fireworks.find()}
    names = [[ids[n] for n in part] for part in asked if part]
    assert names == [["p4", "p3"], ["p2", "p1"], ["p0"]]


@pytest.mark.parametrize("why", ["time", "drain", "signal"])
def test_a_slot_that_has_to_stop_takes_nothing(
    launchpad: Any, tmp_path: Path, why: str
) -> None:
    launchpad.add_wf(Firework([task()], name="one"))
    if why == "drain":
        (tmp_path / "drain").touch()
    config = slot(launchpad, tmp_path)
    deadline = time.time() + (5.0 if why == "time" else 500.0)
    found = Slot(config, launchpad, lambda _: None, deadline)
    if why == "signal":
        found.stop(signal.SIGUSR1)
    expected = {"time": "out of time", "drain": "drained", "signal": "signal SIGUSR1"}
    assert found.run() == expected[why]
    assert launchpad.fireworks.find_one()["state"] == "READY"


def test_a_slot_that_handed_over_leaves(launchpad: Any, tmp_path: Path) -> None:
    """Else it would take the continuation at once, in an allocation without time."""
    for name in ("one", "two"):
        launchpad.add_wf(Firework([task()], name=name))
    launchpad.checkout_fw = stopping(launchpad)
    reason, events, _ = run_slot(launchpad, tmp_path, 500.0)
    assert reason == "handed over"
    assert sum(e["event"] == "ended" for e in events) == 1


def stopping(launchpad: Any) -> Any:
    """As a firetask does whose time is up."""
    from nanoos_fw.firetasks.handover import launch_no_more

    checkout = launchpad.checkout_fw

    def check_out(*args: Any, **options: Any) -> Any:
        launch_no_more(launchpad)
        return checkout(*args, **options)

    return check_out


def test_an_allocation_is_divided_without_overlap() -> None:
    in_job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "8"}
    env = {**in_job, "CUDA_VISIBLE_DEVICES": "0,1,2"}
    found = shares(3, env, range(8))
    assert [s.cpus for s in found] == [(0, 1), (2, 3, 4), (5, 6, 7)]
    assert [s.gpus for s in found] == [("0",), ("1",), ("2",)]
    assert all(s.bound for s in found)
    few = shares(4, {"CUDA_VISIBLE_DEVICES": "4,5"}, range(4))
    assert [s.gpus for s in few] == [("4",), ("4",), ("5",), ("5",)]
    # SLURM has not bound the job: which of the node's processors are its own?
    unbound = shares(2, in_job, range(64))
    assert [len(s.cpus) for s in unbound] == [4, 4]
    assert not any(s.bound for s in unbound)
    assert all(s.memory_mib is None for s in [*found, *few, *unbound])
    for memory in (
        {"SLURM_MEM_PER_NODE": "16000"},
        {"SLURM_MEM_PER_CPU": "2000", "SLURM_MEM_PER_NODE": "0"},
    ):
        rich = shares(3, {**in_job, **memory}, range(8))
        assert [s.memory_mib for s in rich] == [4000.0, 6000.0, 6000.0]
    for number in (0, 9):
        with pytest.raises(InputError, match="processors"):
            shares(number, in_job, range(8))


def test_the_environment_of_a_slot() -> None:
    env = slot_environment(
        Share((4, 5, 6, 7), ("1",), bound=True),
        2,
        threads=2,
        times=(100.0, 900.0),
        environ={
            "SLURM_MEM_PER_NODE": "16000",
            "SLURM_CPUS_ON_NODE": "8",
            "NANO_OS_RANKS": "8",
        },
    )
    assert env["NANO_OS_RANKS"] == env["NANO_OS_THREADS"] == "2"
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "2"
    assert env["CUDA_VISIBLE_DEVICES"] == "1"
    assert (env["SLURM_JOB_START_TIME"], env["SLURM_JOB_END_TIME"]) == ("100", "900")
    assert env["SLURM_MEM_PER_CPU"] == "2000"
    assert "SLURM_MEM_PER_NODE" not in env


def test_names_tell_jobs_tasks_nodes_and_restarts_apart() -> None:
    job = {"SLURM_JOB_ID": "12", "SLURMD_NODENAME": "n3"}
    array = {**job, "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"}
    assert worker_name(job) == "worker-12-n3"
    assert worker_name(array) == "worker-10-2-n3"
    assert worker_name({**job, "SLURM_RESTART_COUNT": "1"}) == "worker-12-n3-again1"
