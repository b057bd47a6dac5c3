"""The truth about runs that the launchpad believes in: reserved, running, locked.

Who is asked, in this order: SLURM's queue, SLURM's accounting, the heartbeat. The queue
and accounting are asked once for all runs. A run counts as lost only on positive
evidence: its job has ended, or, where no job is known, neither its process nor its
heartbeat lives. A job that neither knows is unknown, and left alone.

A lost run becomes FIZZLED with the cause as its error, so that ``rerun`` can decide.
What it had finished is in the stores or in its work directory, named by content, and is
taken from there by the next run, not computed again.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from nanoos_fw.errors import (
    LaunchError,
    LostRunError,
    MissingDependencyError,
    NanoOSError,
    OutOfMemoryError,
    OutOfTimeError,
)
from nanoos_fw.operations.endings import Lost, Reservation, fizzle, give_back
from nanoos_fw.operations.locks import locks
from nanoos_fw.slurm import EndedJob, QueuedJob, ended_jobs, queued_jobs
from nanoos_fw.stores.database import store_errors
from nanoos_fw.stores.launches import SPEC_KEY
from nanoos_fw.stores.places import LaunchPlace, read_places, utc

logger = logging.getLogger(__name__)

# Without a heartbeat for so long a run outside of SLURM is lost.
HEARTBEAT_EXPIRES = timedelta(minutes=30)
# qlaunch writes the number of the job right after sbatch has answered; FireWorks writes
# the launch right after it has marked the firework.
UNNUMBERED_EXPIRES = timedelta(minutes=15)
# FireWorks holds a lock for seconds, and gives up waiting for one after five minutes.
LOCK_EXPIRES = timedelta(minutes=10)
# Jobs of one firework that ended before it began, after which it is paused.
MAX_UNSTARTED = 3
_UNSTARTED = f"spec.{SPEC_KEY}.unstarted"
# Ends of a job before its firework began that do not make it ready again. Killed for
# memory it would be killed again: it gets more by the rule for that. Cancelled by
# somebody it stays so until it is asked for.
_LEFT_TO_RERUN = frozenset({"oom", "cancelled"})
_OWN_FAULTS = frozenset({"code", "oom", "timeout", "completed"})
# Clocks of nodes, and SLURM's full seconds.
_CLOCK_DIFFERENCE_S = 60.0

ALIVE, LOST, UNKNOWN = "alive", "lost", "unknown"


@dataclass(frozen=True)
class OpenLaunch:
    """A launch that has not ended, as the launchpad sees it.

    Parameters
    ----------
    state
        RESERVED or RUNNING.
    job_id
        SLURM job: what the launch noted itself, else what qlaunch reserved.
    since
        Beginning of the state.
    seen
        Last sign of life: heartbeat of the task or of FireWorks.
    death
        How its process ended, if the worker that had started it saw that.
    unstarted
        How many jobs of its firework have ended before it began.
    """

    launch_id: int
    fw_id: int
    name: str
    state: str
    job_id: str | None
    host: str
    pid: int | None
    since: datetime
    seen: datetime
    death: str | None = None
    unstarted: int = 0


@dataclass(frozen=True)
class Verdict:
    """What is true of a launch, and how that is known."""

    launch: OpenLaunch
    fate: str
    cause: str
    reason: str
    job: EndedJob | None = None


@dataclass
class Reconciliation:
    """What reconcile found, and did unless it was a dry run."""

    alive: int = 0
    lost: list[Verdict] = field(default_factory=list)
    unknown: list[Verdict] = field(default_factory=list)
    unreserved: list[Verdict] = field(default_factory=list)
    paused: list[Verdict] = field(default_factory=list)
    refreshed: list[int] = field(default_factory=list)
    unlocked: list[int] = field(default_factory=list)
    locked: list[int] = field(default_factory=list)  # left until their lock is gone
    slurm: bool = True

    @property
    def clean(self) -> bool:
        """True if there was nothing to mend."""
        return not (
            self.lost or self.unreserved or self.paused or self.refreshed
            or self.unlocked or self.locked
        )  # fmt: skip


# ------------------------------------------------------------------------------ judge


def judge(
    launch: OpenLaunch,
    queued: Mapping[str, QueuedJob],
    ended: Mapping[str, EndedJob],
    now: datetime,
    *,
    this_host: str | None = None,
    heartbeat_expires: timedelta = HEARTBEAT_EXPIRES,
) -> Verdict:
    """Return what became of a launch.

    Parameters
    ----------
    launch
        A launch that has not ended.
    queued, ended
        What SLURM knows of its job.
    now
        Time of the question.
    this_host
        Where processes can be looked up; None for this machine.
    heartbeat_expires
        Age at which the heartbeat of a run without a job counts as ended.
    """
    job_id = launch.job_id
    if launch.death is not None and launch.state == "RUNNING":
        return Verdict(launch, LOST, "killed", launch.death)  # its job may well go on
    if job_id is None:
        if launch.state == "RESERVED":
            return _judge_unnumbered(launch, now)
        return _judge_process(
            launch, now, this_host or socket.gethostname(), heartbeat_expires
        )
    if job_id in queued:
        return _judge_queued(launch, queued[job_id])
    if job_id in ended:
        end = ended[job_id]
        reason = f"job {job_id} ended: {end.state}"
        return Verdict(launch, LOST, end.cause, reason, end)
    return Verdict(launch, UNKNOWN, "", f"SLURM does not know job {job_id}")


def _judge_queued(launch: OpenLaunch, job: QueuedJob) -> Verdict:
    # A job that SLURM has begun anew no longer runs what it ran before.
    if (
        launch.state == "RUNNING"
        and job.start is not None
        and launch.since.timestamp() < job.start - _CLOCK_DIFFERENCE_S
    ):
        reason = f"job {job.job_id} was requeued and began anew"
        return Verdict(launch, LOST, "node", reason)
    # Nor does one that waits again; where a launch was, it has noted itself.
    if launch.state == "RUNNING" and launch.pid and job.state == "PENDING":
        reason = f"job {job.job_id} was requeued and waits again"
        return Verdict(launch, LOST, "node", reason)
    return Verdict(launch, ALIVE, "", f"job {job.job_id} is {job.state}")


def _judge_unnumbered(launch: OpenLaunch, now: datetime) -> Verdict:
    if now - launch.since > UNNUMBERED_EXPIRES:
        return Verdict(launch, LOST, "unstarted", "no job was submitted")
    return Verdict(launch, ALIVE, "", "it is being submitted")


def _judge_process(
    launch: OpenLaunch, now: datetime, this_host: str, expires: timedelta
) -> Verdict:
    """Judge a run without a job: by its process if it is here, else its heartbeat."""
    if launch.pid is not None and launch.host == this_host:
        if _lives(launch.pid):
            return Verdict(launch, ALIVE, "", f"process {launch.pid} lives")
        return Verdict(launch, LOST, "killed", f"process {launch.pid} is gone")
    age = now - launch.seen
    if age > expires:
        minutes = age.total_seconds() / 60
        reason = f"no sign of life for {minutes:.0f} minutes"
        return Verdict(launch, LOST, "killed", reason)
    return Verdict(launch, ALIVE, "", "its heartbeat is fresh")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def lost_run_error(verdict: Verdict) -> NanoOSError:
    """Return the error that a lost run is stored with; its class decides a rerun."""
    job = verdict.job
    evidence: dict[str, Any] = {
        "cause": verdict.cause,
        "reason": verdict.reason,
        "host": verdict.launch.host,
    }
    if job is not None:
        evidence |= {
            "job": job.job_id,
            "state": job.state,
            "exit_code": job.exit_code,
            "signal": job.signal,
            "nodes": job.nodes,
            "partition": job.partition,
            "limit_s": job.limit_s,
            "memory_mib": job.memory_mib,
        }
    if verdict.cause == "timeout":
        return OutOfTimeError(
            f"SLURM ended it at its walltime: {verdict.reason}",
            evidence=evidence,
            advice="rerun it: it continues from its last checkpoint",
        )
    if verdict.cause == "cancelled":
        return LostRunError(
            f"somebody cancelled it: {verdict.reason}",
            evidence=evidence,
            advice=(
                "what was finished is kept; to go on: nanoos rerun --failed --class "
                "cancelled"
            ),
        )
    if verdict.cause == "oom":
        return OutOfMemoryError(
            f"SLURM ended it for its memory: {verdict.reason}",
            evidence=evidence,
            advice="rerun it with more memory",
        )
    return LostRunError(
        f"the run is gone: {verdict.reason}",
        evidence=evidence,
        advice="rerun it: what was finished is kept",
    )


# -------------------------------------------------------------------------- reconcile


def open_launches(
    database: Any, now: datetime | None = None
) -> tuple[list[OpenLaunch], list[int]]:
    """Return launches that have not ended, and fireworks that lag behind theirs.

    A firework lags when its process died between the two writes that end a launch:
    the launch has ended, the firework has not heard of it. Or between the writes that
    begin one: it is reserved, and there is no launch. Whether that process still lives
    nobody can tell, so such a one counts after some minutes only: refreshed at once, it
    would be taken, and run, twice. Three queries.
    """
    now = now or datetime.now(UTC)
    with store_errors("read open launches"):
        fireworks = list(
            database["fireworks"].find(
                {"state": {"$in": ["RUNNING", "RESERVED"]}},
                {
                    "fw_id": 1,
                    "name": 1,
                    "launches": 1,
                    "state": 1,
                    "updated_on": 1,
                    _UNSTARTED: 1,
                },
            )
        )
        ids = [fw["launches"][-1] for fw in fireworks if fw.get("launches")]
        launches = {
            launch["launch_id"]: launch
            for launch in database["launches"].find(
                {"launch_id": {"$in": ids}},
                {"launch_id": 1, "state": 1, "state_history": 1, "host": 1},
            )
        }
    places = read_places(database, ids)
    found, lagging = [], []
    for firework in fireworks:
        launch = launches.get(
            firework["launches"][-1] if firework["launches"] else None
        )
        if launch is None or launch["state"] not in {"RESERVED", "RUNNING"}:
            taken = firework.get("updated_on")
            being_written = (
                firework["state"] == "RESERVED"
                and taken is not None
                and now - utc(taken) <= UNNUMBERED_EXPIRES
            )
            if not being_written:
                lagging.append(firework["fw_id"])
            continue
        place = places.get(launch["launch_id"])
        found.append(_open_launch(firework, launch, place))
    return found, lagging


def _open_launch(
    firework: Mapping[str, Any], launch: Mapping[str, Any], place: LaunchPlace | None
) -> OpenLaunch:
    history = launch["state_history"]
    last = history[-1]
    reserved = next(
        (h["reservation_id"] for h in history if "reservation_id" in h), None
    )
    seen = utc(last.get("updated_on") or last["created_on"])
    return OpenLaunch(
        launch_id=launch["launch_id"],
        fw_id=firework["fw_id"],
        name=firework["name"],
        state=launch["state"],
        # One that began elsewhere, by hand, is not in the job that was to begin it.
        job_id=place.job_id if place else reserved,
        host=place.host if place else str(launch.get("host", "")),
        pid=place.pid if place else None,
        since=utc(last["created_on"]),
        seen=max(seen, place.beat) if place else seen,
        death=place.death if place else None,
        unstarted=_unstarted(firework),
    )


def _unstarted(firework: Mapping[str, Any]) -> int:
    nanoos = (firework.get("spec") or {}).get(SPEC_KEY) or {}
    return int(nanoos.get("unstarted", 0))


def reconcile(
    launchpad: Any,
    *,
    dry_run: bool = False,
    heartbeat_expires: timedelta = HEARTBEAT_EXPIRES,
    lock_expires: timedelta = LOCK_EXPIRES,
    slurm: bool = True,
    accounting: bool = True,
    now: datetime | None = None,
) -> Reconciliation:
    """Find what the launchpad believes wrongly, and put it right.

    Parameters
    ----------
    launchpad
        Of FireWorks.
    dry_run
        Only report.
    heartbeat_expires, lock_expires
        See ``judge``; age of a workflow's lock at which it is removed.
    slurm, accounting
        Whether there is a queue, and whether ``sacct`` can be asked.
    now
        Time of the question; None for the present.
    """
    database = launchpad.db
    now = now or datetime.now(UTC)
    report = Reconciliation(slurm=slurm)
    report.unlocked, locked = _stale_locks(launchpad, now, lock_expires, dry_run)
    launches, lagging = open_launches(database, now)
    for fw_id in lagging:
        # FireWorks would wait five minutes for the lock, then fail.
        if fw_id in locked:
            report.locked.append(fw_id)
            continue
        report.refreshed.append(fw_id)
        if not dry_run:
            _refresh(launchpad, fw_id)
    jobs = {launch.job_id for launch in launches if launch.job_id is not None}
    queued = queued_jobs() if slurm and jobs else {}
    gone = jobs - queued.keys()
    ended = _ended(gone, accounting) if slurm and gone else {}
    for launch in launches:
        verdict = judge(launch, queued, ended, now, heartbeat_expires=heartbeat_expires)
        if verdict.fate == ALIVE:
            report.alive += 1
        elif verdict.fate == UNKNOWN:
            report.unknown.append(verdict)
        elif launch.fw_id in locked:
            report.locked.append(launch.fw_id)
        elif launch.state == "RESERVED":
            _release(verdict, report)
        else:
            report.lost.append(verdict)
    if not dry_run:
        end_lost(launchpad, report.lost)
        _give_back(launchpad, report)
    return report


def _ended(jobs: set[str], accounting: bool) -> dict[str, EndedJob]:
    """Ask accounting, or the controller while accounting does not answer.

    The controller forgets: what it does not know stays unknown until then.
    """
    try:
        return ended_jobs(jobs, accounting=accounting)
    except (LaunchError, MissingDependencyError) as error:
        if not accounting:
            raise
        logger.warning("SLURM's accounting does not answer: %s", error)
        return ended_jobs(jobs, accounting=False)


def _refresh(launchpad: Any, fw_id: int) -> None:
    """Let a workflow hear of its launches; one that cannot does not stop the rest."""
    try:
        launchpad._refresh_wf(fw_id)
    except RuntimeError as error:  # FireWorks' own, after it has set it FIZZLED
        logger.warning("firework %d: %s", fw_id, str(error).splitlines()[-1:])


def end_lost(launchpad: Any, verdicts: Iterable[Verdict]) -> None:
    """Set lost runs FIZZLED, but those that have ended by themselves since."""
    fizzle(
        launchpad,
        [
            Lost(
                verdict.launch.fw_id,
                verdict.launch.launch_id,
                verdict.launch.state,
                lost_run_error(verdict),
            )
            for verdict in verdicts
        ],
    )


def _release(verdict: Verdict, report: Reconciliation) -> None:
    """Decide on a reservation whose job ended before the firework began.

    A firework whose jobs end so again and again is paused: it would be submitted for
    ever, before all others.
    """
    if verdict.cause in _LEFT_TO_RERUN:
        report.lost.append(verdict)
    elif verdict.cause in _OWN_FAULTS and verdict.launch.unstarted + 1 >= MAX_UNSTARTED:
        report.paused.append(verdict)
    else:
        report.unreserved.append(verdict)


def _give_back(launchpad: Any, report: Reconciliation) -> None:
    give_back(
        launchpad,
        [
            Reservation(
                verdict.launch.fw_id,
                verdict.launch.launch_id,
                pause=pause,
                count=_UNSTARTED if verdict.cause in _OWN_FAULTS else None,
            )
            for pause, verdicts in ((False, report.unreserved), (True, report.paused))
            for verdict in verdicts
        ],
    )


def _stale_locks(
    launchpad: Any, now: datetime, expires: timedelta, dry_run: bool
) -> tuple[list[int], set[int]]:
    """Remove locks of workflows whose holder is gone.

    A lock has no date, so each is noted when it is first seen; if its workflow was
    changed since, it was released and is another one.

    Returns
    -------
    tuple
        First firework of each workflow that was unlocked, and all fireworks of those
        that stay locked.
    """
    notes = launchpad.db["stale_locks"]
    found = locks(launchpad)
    with store_errors("look for stale locks"):
        since = {
            note["_id"]: utc(note["since"])
            for note in notes.find()
            if note["_id"] in found
            and note.get("changed") == found[note["_id"]].changed
        }
        stale = [key for key, seen in since.items() if now - seen >= expires]
        if not dry_run:
            for key in found.keys() - since.keys():
                note = {"since": now, "changed": found[key].changed}
                notes.update_one({"_id": key}, {"$set": note}, upsert=True)
            notes.delete_many({"_id": {"$nin": [k for k in found if k not in stale]}})
            if stale:
                launchpad.workflows.update_many(
                    {"_id": {"$in": stale}}, {"$unset": {"locked": ""}}
                )
        first = [found.pop(key).nodes[0] for key in stale]
    if not dry_run:
        for fw_id in first:
            _refresh(launchpad, fw_id)
    return first, {fw_id for lock in found.values() for fw_id in lock.nodes}


def causes(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Return the number of verdicts by cause."""
    return dict(Counter(verdict.cause for verdict in verdicts))
