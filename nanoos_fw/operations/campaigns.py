"""Campaigns as a whole: create, submit, pause, resume, cancel.

Everything that changes a firework goes through FireWorks' own functions, so that
``lpad`` by hand and these commands can be mixed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.errors import InputError, LaunchError, validation_problems
from nanoos_fw.operations.locks import unlocked
from nanoos_fw.provenance import utc_now
from nanoos_fw.slurm import queued_jobs, run_slurm
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import store_errors
from nanoos_fw.stores.labels import FORMATION_ENERGY
from nanoos_fw.stores.launches import PARKED, SPEC_KEY
from nanoos_fw.stores.reservations import cancel_reservation

if TYPE_CHECKING:
    from nanoos_fw.firetasks.campaign_plan import CampaignPlan
    from nanoos_fw.firetasks.relaxation import PotentialChoice

logger = logging.getLogger(__name__)

CAMPAIGN = f"spec.{SPEC_KEY}.campaign"
_ACTIVE = ("RUNNING", "RESERVED")
_JOBS_GONE_S = 90.0
_JOBS_POLL_S = 1.0


# ---------------------------------------------------------------- create and submit


def read_plan(path: Path) -> CampaignPlan:
    """Read a plan from YAML or JSON.

    Raises
    ------
    InputError
        If it cannot be read, or is no plan; names all fields that are wrong.
    """
    from pydantic import ValidationError
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from nanoos_fw.firetasks.campaign_plan import CampaignPlan

    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise InputError(
            f"cannot read the plan {path}: {error}",
            advice="a plan is YAML or JSON with the fields of CampaignPlan",
        ) from error
    try:
        return CampaignPlan.model_validate(data)
    except ValidationError as error:
        raise InputError(
            f"{path} is no plan of a campaign: {validation_problems(error)}",
            advice=f"known fields: {', '.join(CampaignPlan.model_fields)}",
        ) from error


def create(
    launchpad: Any, plan: CampaignPlan, *, candidates: str, references: str
) -> int:
    """Store a campaign's plan, and choose its structures from named sets.

    The same plan again is accepted. Chunk sizes that the plan does not give follow from
    the size of the structures.

    Parameters
    ----------
    launchpad
        Of FireWorks; it is prepared if nobody has.
    plan
        As read: its fields that were set are known.
    candidates, references
        Sets of structures, as ``nanoos import --set`` fills them.

    Returns
    -------
    int
        Number of candidates.

    Raises
    ------
    InputError
        If a set has no structures, the plan cannot be carried out
        (:meth:`CampaignPlan.check`), the potential or the references lack an element,
        or a campaign of this name has another plan.
    """
    from nanoos_fw.firetasks.campaign_plan import choose_labelled
    from nanoos_fw.operations.campaign import prepare_launchpad
    from nanoos_fw.operations.estimates import sized_plan
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.structures import StructureStore

    if plan.stream is not None:
        plan.stream.windows()  # refuses a sequence that cannot be opened
    prepare_launchpad(launchpad)
    database = open_database(launchpad)
    store = StructureStore(database)
    sets = {plan.candidates: candidates, plan.references: references}
    found = {name: store.keys(given) for name, given in sets.items()}
    for name, given in sets.items():
        if not found[name]:
            raise InputError(
                f"set {given!r} has no structures",
                advice=f"nanoos import FILES --set {given}",
            )
    every = sorted({key for keys in found.values() for key in keys})
    plan.check(store.iterate(every))
    streamed = set() if plan.stream is None else plan.stream.elements()
    check_elements(
        plan.name,
        plan.relaxation.potential,
        store.elements(candidates) | streamed,
        store.elements(references),
        pure=store.elements(references, alone=True)
        if plan.training.target == FORMATION_ENERGY
        else None,
    )
    plan = sized_plan(database, plan, plan.model_fields_set, every)
    CampaignStore(database).create(plan.name, plan.model_dump(mode="json"))
    for name, keys in found.items():
        store.add_to_set(keys, name)
    mine = found[plan.candidates]
    store.add_to_set(
        choose_labelled(mine, plan.label_fraction, plan.seed), plan.labelled
    )
    return len(mine)


def check_elements(
    campaign: str,
    potential: PotentialChoice,
    candidates: set[str],
    references: set[str],
    *,
    pure: set[str] | None,
) -> None:
    """Refuse elements that would only fail in fireworks, after others had run.

    Parameters
    ----------
    candidates, references
        Elements of the structures.
    pure
        Elements that are alone in a reference, from which formation energies are
        measured; None if none are.

    Raises
    ------
    InputError
        Naming the elements.
    """
    if lacking := sorted((candidates | references) - set(potential.elements)):
        raise InputError(
            f"the potential of campaign {campaign!r} is not asked to know "
            f"{', '.join(lacking)}",
            evidence={"elements of the potential": potential.elements},
            advice="name them in the potential's elements, or leave the structures "
            "with them out of the sets",
        )
    if pure is None:
        return
    if lacking := sorted(candidates - pure):
        raise InputError(
            f"the references of campaign {campaign!r} have no structure of "
            f"{', '.join(lacking)} alone, from which formation energies of the "
            "candidates would be measured",
            evidence={"references": sorted(pure)},
            advice="nanoos import FILES --set SET_OF_THE_REFERENCES",
        )


@dataclass(frozen=True)
class Submitted:
    """Workflows of a campaign: added, completed after a kill, or there before."""

    added: int
    completed: int
    there: int


def submit(launchpad: Any, campaign: str, *, verify: bool = False) -> Submitted:
    """Submit what is not submitted yet of a campaign.

    Parameters
    ----------
    verify
        Also relax all candidates, to compare.

    Raises
    ------
    InputError
        If there is no such campaign, or SLURM cannot give what a firework asks for.
    """
    from nanoos_fw.firetasks.campaign_plan import CampaignPlan
    from nanoos_fw.operations.submission import submit_many
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.structures import StructureStore
    from nanoos_fw.workflows import screening_workflow, verification_workflow

    database = open_database(launchpad)
    document = CampaignStore(database).get(campaign)
    plan = CampaignPlan.model_validate(document["plan"])
    store = StructureStore(database)
    candidates = store.keys(plan.candidates)
    workflows = [screening_workflow(plan, candidates, store.keys(plan.references))]
    if verify:
        workflows.append(verification_workflow(plan, candidates))
    added, mended = submit_many(launchpad, workflows)
    return Submitted(added, mended, len(workflows) - added - mended)


# ----------------------------------------------------------------- pause and resume


@dataclass
class Changed:
    """What a command did to the fireworks of a campaign.

    ``locked`` are those that it passed over: a process that may be gone has locked
    their workflow.
    """

    changed: int = 0
    cancelled_jobs: list[str] = field(default_factory=list)
    left_running: list[int] = field(default_factory=list)
    locked: list[int] = field(default_factory=list)


def pause(launchpad: Any, campaign: str, *, slurm: bool) -> Changed:
    """Let nothing of a campaign begin; what runs goes on to its end.

    Jobs that wait in the queue are cancelled, or they would begin.
    """
    CampaignStore(launchpad.db).get(campaign)
    report = Changed()
    if slurm:
        _release_reserved(launchpad, campaign, report, pending_only=True)
    _set_state(launchpad, campaign, ("READY", "WAITING"), "PAUSED", report)
    report.left_running = fireworks_in(launchpad, campaign, _ACTIVE)
    note(launchpad, campaign, "paused")
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
                {CAMPAIGN: campaign, flag: {"$exists": True}},
                {"$unset": {flag: ""}},
            )
    _set_state(launchpad, campaign, ("PAUSED",), "WAITING", report, chosen)
    note(launchpad, campaign, "resumed")
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
    note(launchpad, campaign, "cancelled")
    _defuse(launchpad, campaign, report)  # first, so that nothing takes their place
    if slurm:
        _release_reserved(launchpad, campaign, report, pending_only=False)
        running = _jobs(launchpad, campaign, ("RUNNING",))
        _scancel(list(running.values()), report)
        until = time.monotonic() + wait_s
        while _still(report.cancelled_jobs) and time.monotonic() < until:
            time.sleep(_JOBS_POLL_S)
        _end_cancelled(launchpad, running, report)
        # A warned firework may have handed over to a continuation.
        _defuse(launchpad, campaign, report)
    report.left_running = fireworks_in(launchpad, campaign, _ACTIVE)
    return report


_DEFUSABLE = ("READY", "WAITING", "PAUSED", "FIZZLED")


def _defuse(launchpad: Any, campaign: str, report: Changed) -> None:
    _set_state(launchpad, campaign, _DEFUSABLE, "DEFUSED", report)


def _set_state(
    launchpad: Any,
    campaign: str,
    states: Sequence[str],
    state: str,
    report: Changed,
    also: Mapping[str, Any] | None = None,
) -> None:
    """Bring the fireworks that are in some states into another one."""
    fw_ids = fireworks_in(launchpad, campaign, states, also)
    for fw_id in unlocked(launchpad, fw_ids, report.locked):
        report.changed += _set_one(launchpad, fw_id, states, state)


def _set_one(launchpad: Any, fw_id: int, states: Sequence[str], state: str) -> bool:
    """Set a firework's state, unless it has begun or ended since it was looked at.

    FireWorks' ``defuse_fw`` would rerun such a one, also one that has completed.
    """
    with store_errors(f"set firework {fw_id} {state}"):
        found = launchpad.fireworks.find_one_and_update(
            {"fw_id": fw_id, "state": {"$in": list(states)}},
            {"$set": {"state": state, "updated_on": datetime.now(UTC)}},
        )
        if found is None:
            return False
        launchpad._refresh_wf(fw_id)
    return True


def _end_cancelled(launchpad: Any, running: Mapping[int, str], report: Changed) -> None:
    """Set what died with its job FIZZLED, with that cause."""
    from nanoos_fw.operations.reconcile import LOST, Verdict, end_lost, open_launches

    cancelled = set(report.cancelled_jobs)
    ended = cancelled - _still(cancelled)
    launches, lagging = open_launches(launchpad.db)
    verdicts = {}
    for launch in launches:
        job = running.get(launch.fw_id)
        if launch.state == "RUNNING" and job in ended:
            reason = f"job {job} was cancelled with its campaign"
            verdicts[launch.fw_id] = Verdict(launch, LOST, "cancelled", reason)
    free = list(unlocked(launchpad, verdicts, report.locked))
    end_lost(launchpad, [verdicts[fw_id] for fw_id in free])
    for fw_id in unlocked(launchpad, set(lagging) & running.keys(), report.locked):
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
    # One that has begun since the queue was asked goes on.
    options = ["--state=PENDING"] if pending_only else []
    _scancel(list(reserved.values()), report, options)
    for fw_id in unlocked(launchpad, reserved, report.locked):
        firework = launchpad.fireworks.find_one(
            {"fw_id": fw_id, "state": "RESERVED"}, {"launches": 1}
        )
        if firework is not None:
            cancel_reservation(launchpad, firework["launches"][-1])
            if not pending_only:
                report.changed += _set_one(launchpad, fw_id, _DEFUSABLE, "DEFUSED")


def _jobs(launchpad: Any, campaign: str, states: Sequence[str]) -> dict[int, str]:
    """Return the jobs that were submitted for one firework each, by firework."""
    with store_errors("read jobs"):
        last = {
            document["launches"][-1]: document["fw_id"]
            for document in launchpad.fireworks.find(
                {CAMPAIGN: campaign, "state": {"$in": list(states)}},
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


def _scancel(jobs: Sequence[str], report: Changed, options: Sequence[str] = ()) -> None:
    for first in range(0, len(jobs), 200):
        part = list(jobs[first : first + 200])
        try:
            run_slurm(["scancel", *options, *part])
        except LaunchError as error:
            # Of jobs that had ended meanwhile; those that live on are found below.
            logger.warning("%s", error)
        report.cancelled_jobs += part


def _still(jobs: Collection[str]) -> set[str]:
    return set(jobs) & queued_jobs().keys() if jobs else set()


def fireworks_in(
    launchpad: Any,
    campaign: str,
    states: Sequence[str],
    also: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the fireworks of a campaign that are in some states, in order."""
    query = {CAMPAIGN: campaign, "state": {"$in": list(states)}, **(also or {})}
    with store_errors("read fireworks"):
        return sorted(d["fw_id"] for d in launchpad.fireworks.find(query, {"fw_id": 1}))


def note(launchpad: Any, campaign: str, what: str, **more: Any) -> None:
    """Add to a campaign's history."""
    with store_errors("note what was done to a campaign"):
        launchpad.db["campaigns"].update_one(
            {"_id": campaign},
            {"$push": {"history": {"what": what, "time": utc_now(), **more}}},
        )
