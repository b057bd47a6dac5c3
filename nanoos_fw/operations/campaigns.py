"""Campaigns as a whole: bulk submission, status, pause, resume, cancel, archive.

Everything that changes a firework goes through FireWorks' own functions, so that
``lpad`` by hand and these commands can be mixed.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.errors import InputError, LaunchError, error_from_dict
from nanoos_fw.operations.campaign import check_resources
from nanoos_fw.operations.rerun import _OUT_OF_MEMORY, failure_class
from nanoos_fw.provenance import sha256_bytes, utc_now, write_atomic
from nanoos_fw.slurm import queued_jobs, run_slurm
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import store_errors
from nanoos_fw.stores.launches import CONTINUATION, SPEC_KEY

if TYPE_CHECKING:
    from fireworks import Workflow

logger = logging.getLogger(__name__)

_BATCH = 500
_CAMPAIGN = f"spec.{SPEC_KEY}.campaign"
_STAGE = f"$spec.{SPEC_KEY}.stage"
# Key below SPEC_KEY: why a firework was set aside by qlaunch, see ``queue_adapter``.
PARKED = "parked"
_ACTIVE = ("RUNNING", "RESERVED")
_OPEN = ("READY", "WAITING", "PAUSED", *_ACTIVE)
_THROUGHPUT_WINDOW = timedelta(hours=1)
_JOBS_GONE_S = 90.0
_JOBS_POLL_S = 1.0


# ------------------------------------------------------------------------------ insert


def submit_many(
    launchpad: Any,
    workflows: Iterable[Workflow],
    *,
    on_batch: Callable[[int, int], None] = lambda _added, _total: None,
) -> tuple[int, int]:
    """Add workflows that are not there; return the number added, and of those mended.

    A workflow is known by the ``key`` in its metadata. Of each batch the keys are asked
    for at once, the numbers of its fireworks are reserved at once, and fireworks that
    can be run are inserted last. A submission that was killed goes on where it was: a
    workflow that lacks fireworks gets those, and keeps what has run meanwhile.

    Parameters
    ----------
    workflows
        May be a generator: only a batch is held in memory.
    on_batch
        Called with the numbers added and looked at so far.

    Raises
    ------
    InputError
        If a firework asks for resources that SLURM cannot give.
    """
    added = mended = total = 0
    remaining = iter(workflows)
    while batch := list(islice(remaining, _BATCH)):
        keyed = {workflow.metadata["key"]: workflow for workflow in batch}
        with store_errors("submit workflows"):
            there = {
                document["metadata"]["key"]: sorted(document["nodes"])
                for document in launchpad.workflows.find(
                    {"metadata.key": {"$in": list(keyed)}},
                    {"metadata.key": 1, "nodes": 1},
                )
            }
            nodes = [node for ids in there.values() for node in ids]
            known = {
                document["fw_id"]
                for document in launchpad.fireworks.find(
                    {"fw_id": {"$in": nodes}}, {"fw_id": 1}
                )
            }
        fresh = [w for key, w in keyed.items() if key not in there]
        for workflow in fresh:
            check_resources(workflow)
        with store_errors("submit workflows"):
            _insert(launchpad, fresh)
            for key, ids in there.items():
                missing = set(ids) - known
                if missing:
                    mended += _mend(launchpad, keyed[key], ids, missing)
        added += len(fresh)
        total += len(batch)
        on_batch(added, total)
    return added, mended


def _insert(launchpad: Any, workflows: Sequence[Workflow]) -> None:
    if not workflows:
        return
    first = launchpad.get_new_fw_id(sum(len(w.fws) for w in workflows))
    fireworks = []
    for workflow in workflows:
        _number(workflow, range(first, first + len(workflow.fws)))
        first += len(workflow.fws)
        fireworks += workflow.fws
    launchpad.workflows.insert_many([w.to_db_dict() for w in workflows])
    _insert_fireworks(launchpad, fireworks)


def _number(workflow: Workflow, numbers: Sequence[int]) -> None:
    """Give a workflow its numbers, always the same firework the same of them."""
    # Numbers of new fireworks count down from -1 in the order of their making.
    old = sorted(workflow.id_fw, reverse=True)
    old_new = dict(zip(old, numbers, strict=True))
    for firework in workflow.fws:
        firework.fw_id = old_new[firework.fw_id]
    workflow._reassign_ids(old_new)
    for fw_id in workflow.root_fw_ids:
        workflow.id_fw[fw_id].state = "READY"
        workflow.fw_states[fw_id] = "READY"


def _insert_fireworks(launchpad: Any, fireworks: Iterable[Any]) -> None:
    """Insert those last that can be run: a workflow that has begun is complete."""
    ordered = sorted(fireworks, key=lambda firework: firework.state == "READY")
    if ordered:
        launchpad.fireworks.insert_many([fw.to_db_dict() for fw in ordered])


def _mend(
    launchpad: Any, workflow: Workflow, ids: list[int], missing: set[int]
) -> bool:
    """Insert what a killed submission left out of a workflow; keep the rest."""
    if len(ids) != len(workflow.fws):
        # It has grown by continuations since; nothing of it can be missing but by hand.
        logger.warning("workflow %s lacks fireworks %s", workflow.name, sorted(missing))
        return False
    _number(workflow, ids)
    logger.warning("completing a half-inserted workflow: %s", workflow.name)
    _insert_fireworks(launchpad, [fw for fw in workflow.fws if fw.fw_id in missing])
    return True


# ------------------------------------------------------------------------------ status


@dataclass
class CampaignStatus:
    """Where a campaign stands.

    Parameters
    ----------
    stages
        Number of fireworks by stage and state; one that was continued counts once.
    causes
        Number of failed fireworks by stage and failure class.
    per_hour
        Fireworks completed within the last hour, or since the first one if that is
        less long ago.
    eta_s
        Time for what remains at that rate; None if nothing was completed lately.
    """

    name: str
    stages: dict[str, dict[str, int]] = field(default_factory=dict)
    causes: dict[str, dict[str, int]] = field(default_factory=dict)
    parked: int = 0
    per_hour: float = 0.0
    eta_s: float | None = None

    @property
    def states(self) -> dict[str, int]:
        """Number of fireworks by state."""
        found: dict[str, int] = {}
        for counts in self.stages.values():
            for state, count in counts.items():
                found[state] = found.get(state, 0) + count
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return {
            "campaign": self.name,
            "states": self.states,
            "stages": self.stages,
            "causes": self.causes,
            "parked": self.parked,
            "per_hour": round(self.per_hour, 2),
            "eta_s": None if self.eta_s is None else round(self.eta_s),
        }


def campaign_status(
    database: Any, campaign: str, now: datetime | None = None
) -> CampaignStatus:
    """Return where a campaign stands, from one aggregation."""
    now = now or datetime.now(UTC)
    # FireWorks stores times of ended fireworks as ISO text, in UTC.
    since = (now - _THROUGHPUT_WINDOW).isoformat()
    details = "$launch.action.stored_data._exception._details"
    continued = {"$gt": [f"$spec.{SPEC_KEY}.{CONTINUATION}.number", 0]}
    memory = "|".join(map(re.escape, _OUT_OF_MEMORY))
    pipeline: list[dict[str, Any]] = [
        {"$match": {_CAMPAIGN: campaign}},
        {
            "$facet": {
                "counts": [
                    {
                        "$group": {
                            "_id": {"stage": _STAGE, "state": "$state"},
                            "count": {"$sum": 1},
                            "continued": {"$sum": {"$cond": [continued, 1, 0]}},
                            "order": {"$min": f"$spec.{SPEC_KEY}.order"},
                            "parked": {
                                "$sum": {
                                    "$cond": [
                                        {"$gt": [f"$spec.{SPEC_KEY}.{PARKED}", None]},
                                        1,
                                        0,
                                    ]
                                }
                            },
                        }
                    }
                ],
                "causes": [
                    {"$match": {"state": "FIZZLED"}},
                    {
                        "$project": {
                            "stage": _STAGE,
                            "last": {"$arrayElemAt": ["$launches", -1]},
                        }
                    },
                    {
                        "$lookup": {
                            "from": "launches",
                            "localField": "last",
                            "foreignField": "launch_id",
                            "as": "launch",
                        }
                    },
                    {"$unwind": "$launch"},
                    {
                        "$group": {
                            "_id": {
                                "stage": "$stage",
                                "kind": f"{details}.kind",
                                "cause": f"{details}.evidence.cause",
                                "exit_code": f"{details}.evidence.exit_code",
                                "oom": {
                                    "$regexMatch": {
                                        "input": {
                                            "$ifNull": [
                                                f"{details}.evidence.log_tail",
                                                "",
                                            ]
                                        },
                                        "regex": memory,
                                    }
                                },
                            },
                            "count": {"$sum": 1},
                        }
                    },
                ],
                "pace": [
                    {"$match": {"state": "COMPLETED"}},
                    {
                        "$group": {
                            "_id": None,
                            "first": {"$min": "$updated_on"},
                            "recent": {
                                "$sum": {
                                    "$cond": [{"$gte": ["$updated_on", since]}, 1, 0]
                                }
                            },
                        }
                    },
                ],
            }
        },
    ]
    with store_errors("count fireworks"):
        (answer,) = database["fireworks"].aggregate(pipeline)
    status = CampaignStatus(campaign)
    if not answer["counts"]:
        return status
    for row in sorted(
        answer["counts"], key=lambda r: (r["order"] or 0, str(r["_id"]["stage"]))
    ):
        stage = status.stages.setdefault(str(row["_id"]["stage"]), {})
        stage[row["_id"]["state"]] = row["count"]
        status.parked += row["parked"]
    for row in answer["counts"]:  # one that was continued has only handed over
        stage = status.stages[str(row["_id"]["stage"])]
        if row["continued"]:
            stage["COMPLETED"] = stage.get("COMPLETED", 0) - row["continued"]
            if stage["COMPLETED"] <= 0:
                del stage["COMPLETED"]
    for row in answer["causes"]:
        key = row["_id"]
        causes = status.causes.setdefault(str(key["stage"]), {})
        name = _cause(key)
        causes[name] = causes.get(name, 0) + row["count"]
    _set_pace(status, answer["pace"], now)
    return status


def _cause(key: Mapping[str, Any]) -> str:
    """Return the failure class that ``rerun`` would find."""
    evidence = {
        name: key[name] for name in ("cause", "exit_code") if key.get(name) is not None
    }
    if key.get("oom"):
        evidence["log_tail"] = _OUT_OF_MEMORY[0]
    if not key.get("kind"):
        return "code"
    stored = {"kind": key["kind"], "message": "", "evidence": evidence}
    return failure_class(error_from_dict(stored))


def _set_pace(
    status: CampaignStatus, pace: Sequence[Mapping[str, Any]], now: datetime
) -> None:
    remaining = sum(
        count for state, count in status.states.items() if state in {*_OPEN}
    )
    if not remaining:
        status.eta_s = 0.0
    if not pace or not pace[0]["recent"]:
        return
    first = pace[0]["first"]
    began = first if isinstance(first, datetime) else datetime.fromisoformat(first)
    if began.tzinfo is None:
        began = began.replace(tzinfo=UTC)
    span = min(_THROUGHPUT_WINDOW.total_seconds(), (now - began).total_seconds())
    # The first one took time too, which nobody has measured: at least a minute.
    status.per_hour = pace[0]["recent"] / max(span, 60.0) * 3600.0
    if remaining:
        status.eta_s = remaining / status.per_hour * 3600.0


# ----------------------------------------------------------------- pause and resume


@dataclass
class Changed:
    """What a command did to the fireworks of a campaign."""

    changed: int = 0
    cancelled_jobs: list[str] = field(default_factory=list)
    left_running: list[int] = field(default_factory=list)


def pause(launchpad: Any, campaign: str, *, slurm: bool) -> Changed:
    """Let nothing of a campaign begin; what runs goes on to its end.

    Jobs that wait in the queue are cancelled, or they would begin.
    """
    CampaignStore(launchpad.db).get(campaign)
    report = Changed()
    if slurm:
        _release_reserved(launchpad, campaign, report, pending_only=True)
    for fw_id in _ids(launchpad, campaign, ("READY", "WAITING")):
        report.changed += launchpad.pause_fw(fw_id) is not None
    report.left_running = _ids(launchpad, campaign, _ACTIVE)
    _note(launchpad, campaign, "paused")
    return report


def resume(launchpad: Any, campaign: str, *, parked: bool = False) -> Changed:
    """Let a paused campaign go on.

    Fireworks that qlaunch has parked would be refused again: they stay, unless asked
    for.
    """
    CampaignStore(launchpad.db).get(campaign)
    report = Changed()
    flag = f"spec.{SPEC_KEY}.{PARKED}"
    chosen: dict[str, Any] = {} if parked else {flag: {"$exists": False}}
    if parked:
        with store_errors("take parked fireworks up"):
            launchpad.fireworks.update_many(
                {_CAMPAIGN: campaign, flag: {"$exists": True}},
                {"$unset": {flag: ""}},
            )
    for fw_id in _ids(launchpad, campaign, ("PAUSED",), chosen):
        report.changed += launchpad.resume_fw(fw_id) is not None
    _note(launchpad, campaign, "resumed")
    return report


def cancel(
    launchpad: Any, campaign: str, *, slurm: bool, wait_s: float = _JOBS_GONE_S
) -> Changed:
    """End a campaign: its jobs in the queue, and its fireworks in the launchpad.

    Jobs that belong to one firework are cancelled, waiting ones and running ones. A
    firework in a packed worker runs to its end: the job is not the campaign's alone.
    What was completed is kept; the rest is DEFUSED, as after ``lpad defuse_fws``, and
    can be reignited.
    """
    CampaignStore(launchpad.db).get(campaign)
    report = Changed()
    _note(launchpad, campaign, "cancelled")
    _defuse(launchpad, campaign, report)  # first, so that nothing takes their place
    if slurm:
        _release_reserved(launchpad, campaign, report, pending_only=False)
        running = _jobs(launchpad, campaign, ("RUNNING",))
        _scancel(list(running.values()), report)
        until = time.monotonic() + wait_s
        while _still(report.cancelled_jobs) and time.monotonic() < until:
            time.sleep(_JOBS_POLL_S)
        _end_cancelled(launchpad, running, report.cancelled_jobs)
        # A warned firework may have handed over to a continuation.
        _defuse(launchpad, campaign, report)
    report.left_running = _ids(launchpad, campaign, _ACTIVE)
    return report


def _defuse(launchpad: Any, campaign: str, report: Changed) -> None:
    for fw_id in _ids(launchpad, campaign, ("READY", "WAITING", "PAUSED", "FIZZLED")):
        report.changed += launchpad.defuse_fw(fw_id) is not None


def _end_cancelled(
    launchpad: Any, running: Mapping[int, str], cancelled: Sequence[str]
) -> None:
    """Set what died with its job FIZZLED, with that cause."""
    from nanoos_fw.operations.reconcile import LOST, Verdict, _fizzle, open_launches

    living = _still(cancelled)
    launches, lagging = open_launches(launchpad.db)
    for launch in launches:
        job = running.get(launch.fw_id)
        if launch.state == "RUNNING" and job in cancelled and job not in living:
            reason = f"job {job} was cancelled with its campaign"
            _fizzle(launchpad, Verdict(launch, LOST, "cancelled", reason))
    for fw_id in set(lagging) & running.keys():
        launchpad._refresh_wf(fw_id)


def _release_reserved(
    launchpad: Any, campaign: str, report: Changed, *, pending_only: bool
) -> None:
    reserved = _jobs(launchpad, campaign, ("RESERVED",))
    if pending_only and reserved:
        queue = queued_jobs()
        reserved = {
            fw_id: job
            for fw_id, job in reserved.items()
            if job in queue and queue[job].state == "PENDING"
        }
    _scancel(list(reserved.values()), report)
    for fw_id in reserved:
        firework = launchpad.fireworks.find_one(
            {"fw_id": fw_id, "state": "RESERVED"}, {"launches": 1}
        )
        if firework is not None:
            launchpad.cancel_reservation(firework["launches"][-1])
            if not pending_only:
                report.changed += launchpad.defuse_fw(fw_id) is not None


def _jobs(launchpad: Any, campaign: str, states: Sequence[str]) -> dict[int, str]:
    """Return the jobs that were submitted for one firework each, by firework."""
    with store_errors("read jobs"):
        last = {
            document["launches"][-1]: document["fw_id"]
            for document in launchpad.fireworks.find(
                {_CAMPAIGN: campaign, "state": {"$in": list(states)}},
                {"fw_id": 1, "launches": 1},
            )
            if document["launches"]
        }
        launches = list(
            launchpad.launches.find(
                {"launch_id": {"$in": list(last)}},
                {"launch_id": 1, "state_history.reservation_id": 1},
            )
        )
    found = {}
    for launch in launches:
        for entry in launch["state_history"]:
            if entry.get("reservation_id") is not None:
                found[last[launch["launch_id"]]] = str(entry["reservation_id"])
    return found


def _scancel(jobs: Sequence[str], report: Changed) -> None:
    for first in range(0, len(jobs), 200):
        part = list(jobs[first : first + 200])
        try:
            run_slurm(["scancel", *part])
        except LaunchError as error:
            # Of jobs that had ended meanwhile; those that live on are found below.
            logger.warning("%s", error)
        report.cancelled_jobs += part


def _still(jobs: Sequence[str]) -> set[str]:
    return set(jobs) & queued_jobs().keys() if jobs else set()


def _ids(
    launchpad: Any,
    campaign: str,
    states: Sequence[str],
    also: Mapping[str, Any] | None = None,
) -> list[int]:
    query = {_CAMPAIGN: campaign, "state": {"$in": list(states)}, **(also or {})}
    with store_errors("read fireworks"):
        return sorted(d["fw_id"] for d in launchpad.fireworks.find(query, {"fw_id": 1}))


def _note(launchpad: Any, campaign: str, what: str, **more: Any) -> None:
    with store_errors("note what was done to a campaign"):
        launchpad.db["campaigns"].update_one(
            {"_id": campaign},
            {"$push": {"history": {"what": what, "time": utc_now(), **more}}},
        )


# ----------------------------------------------------------------------------- archive


def archive(launchpad: Any, campaign: str, file: Path) -> dict[str, Any]:
    """Move a campaign's workflows out of the launchpad into a file; keep the results.

    The file is gzipped JSON lines: workflows, fireworks and launches as they were. It
    is written and read back before anything is deleted; structures, simulations,
    models and predictions stay in their stores.

    Raises
    ------
    InputError
        If something of the campaign still runs or waits, or if the file exists.
    """
    from bson import json_util

    CampaignStore(launchpad.db).get(campaign)
    open_ones = _ids(launchpad, campaign, ("READY", "WAITING", *_ACTIVE))
    if open_ones:
        raise InputError(
            f"campaign {campaign!r} is not at its end: {len(open_ones)} fireworks are "
            "ready, waiting or running",
            evidence={"fireworks": open_ones[:20]},
            advice=f"wait for them, or run 'nanoos campaign cancel {campaign}'",
        )
    if file.exists():
        raise InputError(f"{file} exists", advice="name another file with -o")
    status = campaign_status(launchpad.db, campaign).to_dict()
    with store_errors("read a campaign's workflows"):
        fireworks = list(launchpad.fireworks.find({_CAMPAIGN: campaign}))
        ids = [document["fw_id"] for document in fireworks]
        workflows = list(launchpad.workflows.find({"nodes": {"$in": ids}}))
        foreign = {n for w in workflows for n in w["nodes"]} - set(ids)
        launches = list(launchpad.launches.find({"fw_id": {"$in": ids}}))
    if foreign:
        raise InputError(
            f"workflows of campaign {campaign!r} hold fireworks of others",
            evidence={"fireworks": sorted(foreign)[:20]},
        )
    parts = {"workflows": workflows, "fireworks": fireworks, "launches": launches}
    lines = [
        json.dumps({"collection": name, "document": json.loads(json_util.dumps(row))})
        for name, rows in parts.items()
        for row in rows
    ]
    data = gzip.compress(("\n".join(lines) + "\n").encode())
    write_atomic(file, data)
    if sha256_bytes(file.read_bytes()) != sha256_bytes(data):
        raise InputError(f"{file} does not hold what was written", advice="try again")
    record = {
        "file": str(file.resolve()),
        "sha256": sha256_bytes(data),
        "time": utc_now(),
        **{name: len(rows) for name, rows in parts.items()},
    }
    with store_errors("archive a campaign"):
        launchpad.db["campaigns"].update_one(
            {"_id": campaign}, {"$set": {"archive": {**record, "status": status}}}
        )
        launchpad.workflows.delete_many({"nodes": {"$in": ids}})
        launchpad.fireworks.delete_many({"fw_id": {"$in": ids}})
        launchpad.launches.delete_many({"fw_id": {"$in": ids}})
        launchpad.db["launch_places"].delete_many({"fw_id": {"$in": ids}})
    _note(launchpad, campaign, "archived")
    return record
