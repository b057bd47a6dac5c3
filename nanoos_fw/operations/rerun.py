"""Rerun failed fireworks, each according to why it failed.

The class of a failure follows from its stored error: one that a firetask raised, or one
that ``reconcile`` stored for a run that was gone. A rule per class says what the next
attempt gets, and how many attempts there are. Programming errors and bad input are not
rerun: they would fail again.
"""

from __future__ import annotations

import getpass
import logging
import secrets
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanoos_fw.errors import InputError, NanoOSError
from nanoos_fw.operations.locks import unlocked
from nanoos_fw.operations.rules import CLASSES, RULES, failure_class, next_resources
from nanoos_fw.provenance import utc_now
from nanoos_fw.slurm import Cluster, EndedJob, ended_jobs
from nanoos_fw.stores.database import store_errors
from nanoos_fw.stores.launches import SPEC_KEY, launch_error
from nanoos_fw.stores.places import read_places, utc
from nanoos_fw.stores.reservations import rerun_in

logger = logging.getLogger(__name__)

COLLECTION = "reruns"


# What ends a job ends its ranks too. Clocks of nodes, and SLURM's full seconds.
_ENDS_OF_JOBS = frozenset({"cancelled", "node", "preempted", "timeout"})
_CLOCK_DIFFERENCE_S = 60.0


@dataclass(frozen=True)
class Attempt:
    """A failed firework, and what is to be done about it.

    Parameters
    ----------
    previous
        Reruns so far after failures of this class.
    resources
        ``_queueadapter`` of the next attempt.
    changes
        What is new in it, in words.
    refused
        Why there is no next attempt; empty if there is.
    launches
        That the firework had when it was looked at.
    """

    fw_id: int
    name: str
    stage: str
    failure: str
    error: NanoOSError
    previous: int
    resources: dict[str, Any]
    changes: tuple[str, ...]
    refused: str
    descendants: int
    launches: tuple[int, ...] = ()


@dataclass
class RerunReport:
    """What was rerun, what was not, and the name to undo it by.

    ``locked`` are those whose workflow a process has locked that may be gone.
    """

    batch: str = ""
    rerun: list[Attempt] = field(default_factory=list)
    refused: list[Attempt] = field(default_factory=list)
    locked: list[int] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Return the number of reruns by class."""
        return dict(Counter(attempt.failure for attempt in self.rerun))


def plan_reruns(
    database: Any,
    *,
    campaign: str | None = None,
    classes: Collection[str] = (),
    cluster: Cluster | None = None,
) -> list[Attempt]:
    """Return what a rerun would do with each failed firework.

    Five queries, and one question to SLURM's accounting if there is a cluster.

    Parameters
    ----------
    database
        Of the launchpad.
    campaign
        Only its fireworks; None for all.
    classes
        Only failures of these classes; empty for all.
    cluster
        Whose limits the resources keep; None for no limits.
    """
    unknown = set(classes) - set(RULES)
    if unknown:
        raise InputError(
            f"no failure class {', '.join(sorted(unknown))}",
            advice=f"classes: {', '.join(CLASSES)}",
        )
    query: dict[str, Any] = {"state": "FIZZLED"}
    if campaign is not None:
        query[f"spec.{SPEC_KEY}.campaign"] = campaign
    with store_errors("read failed fireworks"):
        fields = {"fw_id": 1, "name": 1, "launches": 1, f"spec.{SPEC_KEY}": 1}
        fireworks = list(
            database["fireworks"]
            .find(query, {**fields, "spec._queueadapter": 1})
            .sort("fw_id", 1)
        )
        ids = [fw["fw_id"] for fw in fireworks]
        launches = {
            launch["launch_id"]: launch
            for launch in database["launches"].find(
                {"launch_id": {"$in": [n for fw in fireworks for n in fw["launches"]]}},
                {"launch_id": 1, "action": 1, "launch_dir": 1, "state_history": 1},
            )
        }
        history = Counter(
            (row["fw_id"], row["failure"])
            for row in database[COLLECTION].find(
                {"fw_id": {"$in": ids}, "undone": {"$exists": False}},
                {"fw_id": 1, "failure": 1},
            )
        )
        links = {
            int(parent): children
            for document in database["workflows"].find(
                {"nodes": {"$in": ids}}, {"links": 1}
            )
            for parent, children in document["links"].items()
        }
    jobs = _ended_jobs_of(database, launches, cluster) if cluster else {}
    attempts = []
    for firework in fireworks:
        last = launches.get(firework["launches"][-1]) if firework["launches"] else None
        error = launch_error(last)
        failure = failure_class(error)
        if last is not None and last["launch_id"] in jobs:
            failure = _with_job(error, failure, jobs[last["launch_id"]], last)
        if not classes or failure in classes:
            previous = history[firework["fw_id"], failure]
            # Asked for by name, what has no rule of its own runs again as it is.
            descendants = _descendants(links, firework["fw_id"])
            asked_for = failure in classes
            attempts.append(
                _attempt(
                    firework, error, failure, previous, asked_for, cluster, descendants
                )
            )
    return attempts


def _ended_jobs_of(
    database: Any, launches: Mapping[int, Mapping[str, Any]], cluster: Cluster
) -> dict[int, EndedJob]:
    """Return how the jobs of launches ended, by launch."""
    places = read_places(database, list(launches))
    numbers: dict[int, str] = {}
    for launch_id, launch in launches.items():
        reserved = [
            entry["reservation_id"]
            for entry in launch["state_history"]
            if "reservation_id" in entry
        ]
        place = places.get(launch_id)
        number = place.job_id if place else (reserved or [None])[-1]
        if number is not None:
            numbers[launch_id] = number
    ended = ended_jobs(numbers.values(), accounting=cluster.accounting)
    return {
        launch_id: ended[number]
        for launch_id, number in numbers.items()
        if number in ended
    }


def _with_job(
    error: NanoOSError, failure: str, job: EndedJob, launch: Mapping[str, Any]
) -> str:
    """Add to an error what SLURM knows of its job, and return the class of both.

    A process that the kernel killed for memory leaves no other trace. Ranks that were
    killed when their job ended were killed for the same reason.
    """
    for name, value in (
        ("limit_s", job.limit_s),
        ("memory_mib", job.memory_mib),
        ("nodes", job.nodes),
        ("partition", job.partition),
    ):
        if error.evidence.get(name) is None and value is not None:
            error.evidence[name] = value
    if failure not in {"killed", "launch"}:
        return failure
    if job.out_of_memory:
        return "oom"
    ended = utc(launch["state_history"][-1]["created_on"]).timestamp()
    with_job = job.end is not None and ended > job.end - _CLOCK_DIFFERENCE_S
    return job.cause if with_job and job.cause in _ENDS_OF_JOBS else failure


def _descendants(links: Mapping[int, list[int]], fw_id: int) -> int:
    found: set[int] = set()
    todo = list(links.get(fw_id, ()))
    while todo:
        child = todo.pop()
        if child not in found:
            found.add(child)
            todo += links.get(child, ())
    return len(found)


def _attempt(
    firework: Mapping[str, Any],
    error: NanoOSError,
    failure: str,
    previous: int,
    asked_for: bool,
    cluster: Cluster | None,
    descendants: int,
) -> Attempt:
    rule = RULES[failure]
    refused = ""
    if rule.attempts == 0 and not asked_for:
        refused = rule.why
    elif rule.attempts and previous >= rule.attempts:
        refused = f"{previous} reruns after {failure} did not help"
    before = firework["spec"].get("_queueadapter") or {}
    resources, changes, limit = next_resources(before, rule, error, cluster)
    if not refused and limit:
        refused = limit
    return Attempt(
        fw_id=firework["fw_id"],
        name=firework["name"],
        stage=(firework["spec"].get(SPEC_KEY) or {}).get("stage", ""),
        failure=failure,
        error=error,
        previous=previous,
        resources=resources,
        changes=tuple(changes),
        refused=refused,
        descendants=descendants,
        launches=tuple(firework["launches"]),
    )


def rerun_failed_fireworks(
    launchpad: Any,
    *,
    campaign: str | None = None,
    classes: Collection[str] = (),
    cluster: Cluster | None = None,
    dry_run: bool = False,
) -> RerunReport:
    """Rerun failed fireworks by the rules, and write the journal.

    Everything a firework had finished is found again by its content, so that neither
    the firework nor its descendants write anything twice. A firework that another
    process reruns at the same time is left to it.
    """
    report = RerunReport()
    attempts = plan_reruns(
        launchpad.db, campaign=campaign, classes=classes, cluster=cluster
    )
    report.refused = [attempt for attempt in attempts if attempt.refused]
    wanted = [attempt for attempt in attempts if not attempt.refused]
    if dry_run:
        report.rerun = wanted
        return report
    now = utc_now()
    # Two of one second are not one.
    report.batch = f"{now}-{getpass.getuser()}-{secrets.token_hex(2)}"
    by_id = {attempt.fw_id: attempt for attempt in wanted}
    for fw_id in unlocked(launchpad, by_id, report.locked):
        if _rerun(launchpad, by_id[fw_id], report.batch, now):
            report.rerun.append(by_id[fw_id])
    return report


def _rerun(launchpad: Any, attempt: Attempt, batch: str, now: str) -> bool:
    """Rerun a firework that is still as it was looked at, as FireWorks does.

    All of it under one lock: FireWorks' own function would also rerun, a second time,
    what another process has rerun since, and what then may run already.
    """
    from fireworks.core.launchpad import WFLock

    fw_id = attempt.fw_id
    change: dict[str, Any] = {"$unset": {"spec._recovery": ""}}
    if attempt.resources:
        change["$set"] = {"spec._queueadapter": attempt.resources}
    else:
        change["$unset"]["spec._queueadapter"] = ""
    with store_errors(f"rerun firework {fw_id}"), WFLock(launchpad, fw_id):
        before = launchpad.fireworks.find_one_and_update(
            {"fw_id": fw_id, "state": "FIZZLED", "launches": list(attempt.launches)},
            change,
        )
        if before is None:
            return False
        launchpad.db[COLLECTION].insert_one(
            {
                "batch": batch,
                "fw_id": fw_id,
                "time": now,
                "user": getpass.getuser(),
                "failure": attempt.failure,
                "error": attempt.error.to_dict(),
                "attempt": attempt.previous + 1,
                "before": before["spec"].get("_queueadapter"),
                "after": attempt.resources,
                "launches": before["launches"],
            }
        )
        workflow = launchpad.get_wf_by_fw_id_lzyfw(fw_id)
        launchpad._update_wf(workflow, rerun_in(workflow, fw_id))
    return True


def undo_reruns(launchpad: Any, batch: str | None = None) -> tuple[int, int, list[int]]:
    """Take back reruns that have not begun.

    Parameters
    ----------
    launchpad
        Of FireWorks.
    batch
        Name that the rerun printed; None for the last one.

    Returns
    -------
    tuple
        How many were taken back, how many had begun, and the fireworks whose workflow
        a process has locked that may be gone.
    """
    journal = launchpad.db[COLLECTION]
    with store_errors("undo reruns"):
        if batch is None:
            last = journal.find_one({"undone": {"$exists": False}}, sort=[("_id", -1)])
            if last is None:
                raise InputError("no rerun is in the journal")
            batch = last["batch"]
        rows = {
            row["fw_id"]: row
            for row in journal.find({"batch": batch, "undone": {"$exists": False}})
        }
    if not rows:
        raise InputError(f"the journal has no rerun {batch!r} to undo")
    locked: list[int] = []
    undone = begun = 0
    for fw_id in unlocked(launchpad, rows, locked):
        with store_errors("undo reruns"):
            if _undo(launchpad, rows[fw_id]):
                undone += 1
            else:
                begun += 1
    return undone, begun, locked


def _undo(launchpad: Any, row: Mapping[str, Any]) -> bool:
    from fireworks.core.launchpad import WFLock

    fw_id = row["fw_id"]
    change: dict[str, Any] = {
        "$set": {"state": "FIZZLED", "launches": row["launches"]},
        "$pull": {"archived_launches": {"$in": row["launches"]}},
    }
    if row["before"] is None:
        change["$unset"] = {"spec._queueadapter": ""}
    else:
        change["$set"]["spec._queueadapter"] = row["before"]
    # A launch that came after those has been rerun in its turn: this one has begun.
    later = {"$gt": max(row["launches"], default=0)}
    with WFLock(launchpad, fw_id):
        found = launchpad.fireworks.find_one_and_update(
            {
                "fw_id": fw_id,
                "state": {"$in": ["READY", "WAITING"]},
                "launches": [],
                "archived_launches": {"$not": later},
            },
            change,
        )
    if found is None:
        return False
    launchpad._refresh_wf(fw_id)
    launchpad.db[COLLECTION].update_one(
        {"_id": row["_id"]}, {"$set": {"undone": utc_now()}}
    )
    return True
