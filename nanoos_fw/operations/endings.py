"""Many launches ended at once: what FireWorks does for one, in a few queries for all.

FireWorks takes a dozen queries and more to give back a reservation or to set a run
FIZZLED; after an outage of a cluster there are thousands of them. The documents become
the same, and workflows are locked as FireWorks locks them. What is not plain is left to
FireWorks' own functions: a workflow that somebody else has locked, a launch of several
fireworks, children that have begun, or that begin when a parent fizzles.

A change is made only where the launch is still as it was read: a job that begins, or
ends by itself, meanwhile is not disturbed.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from nanoos_fw.stores.database import store_errors, update_many
from nanoos_fw.stores.reservations import cancel_reservation

if TYPE_CHECKING:
    from nanoos_fw.errors import NanoOSError

_BATCH = 500
_FINISHED = frozenset({"COMPLETED", "FIZZLED"})
_ALLOWS = "_allow_fizzled_parents"  # FireWorks' key in the spec of a child


@dataclass(frozen=True)
class Reservation:
    """A reservation to give back.

    Parameters
    ----------
    pause
        Whether the firework becomes PAUSED instead of READY.
    count
        Field of the firework's document that is raised by one; None for none.
    """

    fw_id: int
    launch_id: int
    pause: bool = False
    count: str | None = None


@dataclass(frozen=True)
class Lost:
    """A launch to set FIZZLED: the state it was seen in, and why."""

    fw_id: int
    launch_id: int
    state: str
    error: NanoOSError


_Entry = TypeVar("_Entry", Reservation, Lost)


def give_back(launchpad: Any, reservations: Sequence[Reservation]) -> None:
    """Archive the launches of reservations; their fireworks become READY or PAUSED."""
    with store_errors("give reservations back"):
        _in_batches(launchpad, reservations, _give_back_plain, _give_back_one)


def fizzle(launchpad: Any, lost: Sequence[Lost]) -> None:
    """Set launches and their fireworks FIZZLED, with their errors."""
    with store_errors("end lost runs"):
        _in_batches(launchpad, lost, _fizzle_plain, _fizzle_one)


def _in_batches(
    launchpad: Any,
    entries: Sequence[_Entry],
    together: Callable[[Any, Sequence[_Entry]], set[int]],
    alone: Callable[[Any, _Entry], None],
) -> None:
    """Do with many at once what can be, and with the others one by one."""
    for first in range(0, len(entries), _BATCH):
        part = entries[first : first + _BATCH]
        done = together(launchpad, part)
        for entry in part:
            if entry.fw_id not in done:
                alone(launchpad, entry)


# ------------------------------------------------------------------------- one by one


def _give_back_one(launchpad: Any, entry: Reservation) -> None:
    if not _is_still(launchpad, entry.launch_id, "RESERVED"):
        return
    cancel_reservation(launchpad, entry.launch_id)
    if entry.count is not None:
        raised = {"$inc": {entry.count: 1}}
        launchpad.fireworks.update_one({"fw_id": entry.fw_id}, raised)
    if entry.pause:
        launchpad.pause_fw(entry.fw_id)


def _fizzle_one(launchpad: Any, entry: Lost) -> None:
    if _is_still(launchpad, entry.launch_id, entry.state):
        launchpad.complete_launch(entry.launch_id, _action(entry.error), "FIZZLED")


def _is_still(launchpad: Any, launch_id: int, state: str) -> bool:
    query = {"launch_id": launch_id, "state": state}
    return launchpad.launches.find_one(query, {"_id": 1}) is not None


def _action(error: NanoOSError) -> Any:
    from fireworks.core.firework import FWAction

    return FWAction(
        stored_data={
            "_message": "lost run",
            "_exception": {"_stacktrace": str(error), "_details": error.to_dict()},
        },
        exit=True,
    )


# ------------------------------------------------------------------------ all together


class _Flow:
    """A workflow that is locked, and the states of its fireworks."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self.states = {int(n): state for n, state in document["fw_states"].items()}
        self.children = _numbered(document["links"])
        self.parents = _numbered(document["parent_links"])

    def may_end(self, fw_id: int) -> bool:
        """Return whether what happens to a firework concerns no other one."""
        return all(
            self.states[parent] == "COMPLETED" for parent in self.parents.get(fw_id, ())
        ) and all(self.states[child] == "WAITING" for child in self.children[fw_id])

    def children_of_fizzled(self) -> set[int]:
        return {
            child
            for fw_id, state in self.states.items()
            if state == "FIZZLED"
            for child in self.children[fw_id]
        }

    def state(self, allowing: Collection[int]) -> str:
        """Return the state by FireWorks' rules."""
        from fireworks.core.firework import Firework, Workflow

        fireworks = [
            Firework([], {_ALLOWS: True} if fw_id in allowing else {}, fw_id=fw_id)
            for fw_id in self.document["nodes"]
        ]
        return str(Workflow(fireworks, self.children, fw_states=self.states).state)


def _numbered(links: Mapping[str, Iterable[int]]) -> dict[int, list[int]]:
    return {int(number): list(others) for number, others in links.items()}


@contextmanager
def _locked(launchpad: Any, fw_ids: Sequence[int]) -> Iterator[dict[int, _Flow]]:
    """Lock the workflows of fireworks that are free; yield them by firework."""
    token = f"nanoos-{secrets.token_hex(8)}"  # FireWorks asks only whether there is one
    nodes = {"nodes": {"$in": list(fw_ids)}}
    mine = {**nodes, "locked": token}
    try:
        launchpad.workflows.update_many(
            {**nodes, "locked": {"$exists": False}}, {"$set": {"locked": token}}
        )
        flows = [
            _Flow(document)
            for document in launchpad.workflows.find(mine)
            if "fw_states" in document  # not of an old FireWorks
        ]
        yield {fw_id: flow for flow in flows for fw_id in flow.document["nodes"]}
    finally:
        launchpad.workflows.update_many(mine, {"$unset": {"locked": ""}})


def _plain(
    launchpad: Any, entries: Iterable[Any], flows: Mapping[int, _Flow]
) -> dict[int, Any]:
    """Return entries whose launch is the only one of its only firework, by firework."""
    by_launch = {entry.launch_id: entry for entry in entries}
    query = {"launches": {"$in": list(by_launch)}}
    fireworks = list(launchpad.fireworks.find(query, {"fw_id": 1, "launches": 1}))
    users = Counter(launch for fw in fireworks for launch in fw["launches"])
    return {
        firework["fw_id"]: by_launch[firework["launches"][0]]
        for firework in fireworks
        if [users[launch] for launch in firework["launches"]] == [1]
        and firework["fw_id"] in flows
        and flows[firework["fw_id"]].may_end(firework["fw_id"])
    }


def _give_back_plain(launchpad: Any, entries: Sequence[Reservation]) -> set[int]:
    with _locked(launchpad, [entry.fw_id for entry in entries]) as flows:
        plain = _plain(launchpad, entries, flows)
        updates = []
        for fw_id, entry in plain.items():
            update: dict[str, Any] = {
                "$set": {"state": _given(entry), "launches": [], "updated_on": _now()},
                "$push": {"archived_launches": entry.launch_id},
                "$unset": {"spec._recovery": ""},
            }
            if entry.count is not None:
                update["$inc"] = {entry.count: 1}
            # A job that begins meanwhile has changed the state, and keeps its launch.
            query = {"fw_id": fw_id, "state": "RESERVED", "launches": [entry.launch_id]}
            updates.append((query, update))
        update_many(launchpad.fireworks, updates)
        archived = {
            "fw_id": {"$in": list(plain)},
            "archived_launches": {"$in": [e.launch_id for e in plain.values()]},
        }
        given = [d["fw_id"] for d in launchpad.fireworks.find(archived, {"fw_id": 1})]
        _end_launches(
            launchpad,
            {plain[fw_id].launch_id: ("RESERVED", "READY", None) for fw_id in given},
        )
        _write_states(launchpad, flows, {f: _given(plain[f]) for f in given})
    return set(plain)


def _given(entry: Reservation) -> str:
    return "PAUSED" if entry.pause else "READY"


def _fizzle_plain(launchpad: Any, entries: Sequence[Lost]) -> set[int]:
    with _locked(launchpad, [entry.fw_id for entry in entries]) as flows:
        plain = _plain(launchpad, entries, flows)
        _leave_those_that_let_children_begin(launchpad, flows, plain)
        launches = {
            entry.launch_id: (entry.state, "FIZZLED", _action(entry.error))
            for entry in plain.values()
        }
        _end_launches(launchpad, launches)
        # Whether by us or by itself: its firework is to hear of it.
        query = {"launch_id": {"$in": list(launches)}, "state": "FIZZLED"}
        ended = [d["fw_id"] for d in launchpad.launches.find(query, {"fw_id": 1})]
        launchpad.fireworks.update_many(
            {"fw_id": {"$in": ended}, "state": {"$in": ["RUNNING", "RESERVED"]}},
            {"$set": {"state": "FIZZLED", "updated_on": _now()}},
        )
        fizzled = {"fw_id": {"$in": ended}, "state": "FIZZLED"}
        found = launchpad.fireworks.find(fizzled, {"fw_id": 1})
        _write_states(launchpad, flows, {d["fw_id"]: "FIZZLED" for d in found})
    return set(plain)


def _leave_those_that_let_children_begin(
    launchpad: Any, flows: Mapping[int, _Flow], plain: dict[int, Any]
) -> None:
    """Of the parents that a child waits for leave one to FireWorks, which begins it."""
    children = {child for fw_id in plain for child in flows[fw_id].children[fw_id]}
    for child in _allowing(launchpad, children):
        flow = flows[child]
        parents = flow.parents[child]
        if all(flow.states[p] in _FINISHED or p in plain for p in parents):
            plain.pop(next(p for p in parents if p in plain), None)


def _allowing(launchpad: Any, fw_ids: Collection[int]) -> set[int]:
    """Return those fireworks that begin even if parents have fizzled."""
    if not fw_ids:
        return set()
    query = {"fw_id": {"$in": list(fw_ids)}, f"spec.{_ALLOWS}": {"$exists": True}}
    found = launchpad.fireworks.find(query, {"fw_id": 1, f"spec.{_ALLOWS}": 1})
    return {d["fw_id"] for d in found if d["spec"][_ALLOWS]}


def _end_launches(
    launchpad: Any, changes: Mapping[int, tuple[str, str, Any | None]]
) -> None:
    """Bring launches from a state to another, with an action if there is one."""
    from fireworks.core.firework import Launch

    updates = []
    query = {"launch_id": {"$in": list(changes)}}
    for document in launchpad.launches.find(query) if changes else ():
        before, after, action = changes[document["launch_id"]]
        if document["state"] != before:
            continue
        launch = Launch.from_dict(document)
        launch.state = after
        if action is not None:
            launch.action = action
        still = {"launch_id": launch.launch_id, "state": before}
        updates.append((still, {"$set": launch.to_db_dict()}))
    update_many(launchpad.launches, updates)


def _write_states(
    launchpad: Any, flows: Mapping[int, _Flow], states: Mapping[int, str]
) -> None:
    """Write what fireworks have become into their workflows."""
    changed: dict[int, tuple[_Flow, dict[str, str]]] = {}
    for fw_id, state in states.items():
        flow = flows[fw_id]
        flow.states[fw_id] = state
        _, of_flow = changed.setdefault(id(flow), (flow, {}))
        of_flow[f"fw_states.{fw_id}"] = state
    children = {c for flow, _ in changed.values() for c in flow.children_of_fizzled()}
    allowing = _allowing(launchpad, children)
    now = datetime.now(UTC)
    update_many(
        launchpad.workflows,
        [
            (
                {"_id": flow.document["_id"]},
                {"$set": {**of_flow, "state": flow.state(allowing), "updated_on": now}},
            )
            for flow, of_flow in changed.values()
        ],
    )


def _now() -> str:
    """Return the time as FireWorks writes it into fireworks."""
    return datetime.now(UTC).isoformat()
