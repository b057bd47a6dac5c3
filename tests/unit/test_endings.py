"""Launches ended together leave the documents that FireWorks leaves one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fireworks import Firework, FWAction, FWorker, LaunchPad, PyTask, Workflow

from nanoos_fw.errors import LostRunError
from nanoos_fw.operations import endings, prepare_launchpad
from nanoos_fw.operations.endings import Lost, Reservation, fizzle, give_back

COUNT = "spec.nanoos.unstarted"
# What differs between two databases that were filled one after the other.
TIMES = frozenset(
    {
        "created_on", "updated_on", "time_start", "time_end", "runtime_secs",
        "reservedtime_secs", "_id", "host", "ip",
    }
)  # fmt: skip


@pytest.fixture
def launchpads(new_launchpad: Callable[[], Any]) -> tuple[Any, Any]:
    """Two databases: FireWorks' own functions work on the first."""
    new_launchpad()  # which puts the database into memory
    found = [LaunchPad(name=name, strm_lvl="CRITICAL") for name in ("first", "second")]
    for launchpad in found:
        prepare_launchpad(launchpad)
    return found[0], found[1]


def firework(name: str, parents: Sequence[Firework] = (), **spec: Any) -> Firework:
    task = PyTask(func="os.getcwd")
    return Firework([task], spec=spec, name=name, parents=list(parents))


def fan(width: int = 3, **last: Any) -> Workflow:
    """One after the other: a first, several, a last."""
    first = firework("first")
    middle = [firework(f"middle {n}", [first]) for n in range(width)]
    return Workflow([first, *middle, firework("last", middle, **last)], name="fan")


def reserve(launchpad: Any, number: int, job: int = 7) -> list[tuple[int, int]]:
    """Return fireworks and launches of the next ready ones, as jobs."""
    found = []
    for index in range(number):
        fw, launch_id = launchpad.reserve_fw(FWorker("w"), "/")
        launchpad.set_reservation_id(launch_id, job + index)
        found.append((fw.fw_id, launch_id))
    return found


def run(launchpad: Any, number: int) -> list[tuple[int, int]]:
    """Return fireworks and launches of the next ready ones, which run."""
    found = []
    for fw_id, _ in reserve(launchpad, number):
        _, launch_id = launchpad.checkout_fw(FWorker("w"), "/", fw_id=fw_id)
        found.append((fw_id, launch_id))
    return found


def complete(launchpad: Any, number: int) -> None:
    for _ in range(number):
        ((_, launch_id),) = run(launchpad, 1)
        launchpad.complete_launch(launch_id, FWAction(), "COMPLETED")


def content(launchpad: Any) -> dict[str, list[Any]]:
    """Return all documents without their times, those of locks included."""
    return {
        name: [_timeless(row) for row in launchpad.db[name].find(sort=[(key, 1)])]
        for name, key in (
            ("fireworks", "fw_id"),
            ("launches", "launch_id"),
            ("workflows", "nodes"),
        )
    }


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [_timeless(entry) for entry in value]
    return value


def with_last(**spec: Any) -> Callable[[Any], list[tuple[int, int]]]:
    """Let all of the middle run; the last one has a spec."""

    def prepare(launchpad: Any) -> list[tuple[int, int]]:
        launchpad.add_wf(fan(**spec))
        complete(launchpad, 1)
        return run(launchpad, 3)

    return prepare


def roots(launchpad: Any) -> list[tuple[int, int]]:
    for _ in range(3):
        launchpad.add_wf(fan())
    return run(launchpad, 3)


def after_a_failure(launchpad: Any) -> list[tuple[int, int]]:
    launchpad.add_wf(fan(4))
    complete(launchpad, 1)
    ((_, launch_id),) = run(launchpad, 1)
    launchpad.complete_launch(launch_id, FWAction(), "FIZZLED")
    return run(launchpad, 2)


def leaf(launchpad: Any) -> list[tuple[int, int]]:
    launchpad.add_wf(fan(1))
    complete(launchpad, 2)
    return run(launchpad, 1)


def rerun_before(launchpad: Any) -> list[tuple[int, int]]:
    found = leaf(launchpad)
    launchpad.complete_launch(found[0][1], FWAction(), "FIZZLED")
    launchpad.rerun_fw(found[0][0])
    return run(launchpad, 1)


@pytest.mark.parametrize(
    "prepare",
    [
        roots, leaf, after_a_failure, rerun_before, with_last(),
        with_last(_allow_fizzled_parents=True),
    ],
)  # fmt: skip
def test_lost_runs_are_fizzled_as_by_fireworks(
    launchpads: tuple[Any, Any], prepare: Callable[[Any], list[tuple[int, int]]]
) -> None:
    one_by_one, together = launchpads
    error = LostRunError("gone", evidence={"cause": "node"})
    lost = [prepare(launchpad) for launchpad in launchpads]
    assert lost[0] == lost[1]
    for _, launch_id in lost[0]:
        one_by_one.complete_launch(launch_id, endings._action(error), "FIZZLED")
    fizzle(together, [Lost(f, launch, "RUNNING", error) for f, launch in lost[1]])

    assert content(together) == content(one_by_one)
    assert together.workflows.count_documents({"locked": {"$exists": True}}) == 0


@pytest.mark.parametrize("pause", [False, True])
@pytest.mark.parametrize(("before", "number"), [(0, 2), (2, 2), (5, 2), (7, 1)])
def test_reservations_are_given_back_as_by_fireworks(
    launchpads: tuple[Any, Any], before: int, number: int, pause: bool
) -> None:
    one_by_one, together = launchpads
    found = []
    for launchpad in launchpads:
        for _ in range(2):
            launchpad.add_wf(fan(2))
        complete(launchpad, before)
        found.append(reserve(launchpad, number))
    assert found[0] == found[1]
    for fw_id, launch_id in found[0]:
        one_by_one.cancel_reservation(launch_id)
        one_by_one.fireworks.update_one({"fw_id": fw_id}, {"$inc": {COUNT: 1}})
        if pause:
            one_by_one.pause_fw(fw_id)
    give_back(together, [Reservation(*pair, pause, COUNT) for pair in found[1]])

    assert content(together) == content(one_by_one)


def test_the_number_of_queries_does_not_follow_the_number_of_launches(
    launchpads: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launchpad = launchpads[0]
    for _ in range(12):
        launchpad.add_wf(fan(1))
    reserved, running = reserve(launchpad, 6), run(launchpad, 6)

    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("one by one")

    for name in ("cancel_reservation", "complete_launch", "_refresh_wf", "rerun_fw"):
        monkeypatch.setattr(launchpad, name, refuse)
    give_back(launchpad, [Reservation(*pair) for pair in reserved])
    error = LostRunError("gone")
    fizzle(launchpad, [Lost(*pair, "RUNNING", error) for pair in running])

    states = [f["state"] for f in launchpad.fireworks.find({"name": "first"})]
    assert sorted(states) == ["FIZZLED"] * 6 + ["READY"] * 6


def test_a_job_that_begins_meanwhile_is_not_disturbed(
    launchpads: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After all was read, and before it is written."""
    launchpad = launchpads[0]
    launchpad.add_wf(fan(2))
    complete(launchpad, 1)
    first, second = reserve(launchpad, 2)
    update_many = endings.update_many

    def begins(collection: Any, updates: Any) -> None:
        monkeypatch.setattr(endings, "update_many", update_many)
        launchpad.fireworks.update_one(
            {"fw_id": first[0], "state": "RESERVED"}, {"$set": {"state": "RUNNING"}}
        )
        update_many(collection, updates)

    monkeypatch.setattr(endings, "update_many", begins)
    give_back(launchpad, [Reservation(*first), Reservation(*second)])

    states = {f["fw_id"]: f for f in launchpad.fireworks.find()}
    assert states[first[0]]["state"] == "RUNNING"
    assert states[first[0]]["launches"] == [first[1]]
    assert launchpad.get_launch_by_id(first[1]).state == "RESERVED"
    assert states[second[0]]["state"] == "READY"
    (document,) = launchpad.workflows.find()
    assert document["fw_states"][str(first[0])] == "RESERVED"  # until its own refresh
    assert document["fw_states"][str(second[0])] == "READY"
    assert "locked" not in document


def test_a_run_that_ends_meanwhile_keeps_its_end(
    launchpads: tuple[Any, Any],
) -> None:
    launchpad = launchpads[0]
    launchpad.add_wf(fan(2))
    ((fw_id, launch_id),) = run(launchpad, 1)
    launchpad.complete_launch(launch_id, FWAction(), "COMPLETED")
    before = content(launchpad)

    fizzle(launchpad, [Lost(fw_id, launch_id, "RUNNING", LostRunError("gone"))])

    assert content(launchpad) == before


def test_a_workflow_that_is_locked_is_waited_for(
    launchpads: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    launchpad = launchpads[0]
    for _ in range(2):
        launchpad.add_wf(fan(1))
    pairs = reserve(launchpad, 2)
    held = launchpad.workflows.find_one({"nodes": pairs[0][0]})["_id"]
    launchpad.workflows.update_one({"_id": held}, {"$set": {"locked": True}})
    left = []
    monkeypatch.setattr(
        endings, "cancel_reservation", lambda _launchpad, launch: left.append(launch)
    )

    give_back(launchpad, [Reservation(*pair) for pair in pairs])

    assert left == [pairs[0][1]]  # which waits for the lock
    assert launchpad.workflows.find_one({"_id": held})["locked"] is True
    assert launchpad.fireworks.find_one({"fw_id": pairs[1][0]})["state"] == "READY"
