"""Operating active-learning campaigns: submit, look, bring labels, go on, stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanoos_fw.crystals import structure_key
from nanoos_fw.errors import InputError, NanoOSError, SimulationError
from nanoos_fw.firetasks.active_plan import (
    ActivePlan,
    AlloyCandidates,
    FileLabels,
    LammpsLabels,
)
from nanoos_fw.firetasks.active_rounds import (
    active_workflow,
    check_labelling,
    learning_workflow,
    select_workflow,
)
from nanoos_fw.firetasks.active_state import known_set, label_source, rules_of
from nanoos_fw.firetasks.base import TaskContext
from nanoos_fw.ml.stopping import StopRules
from nanoos_fw.operations.alloys import alloy_candidates, alloy_references
from nanoos_fw.operations.campaign import prepare_launchpad
from nanoos_fw.operations.campaigns import check_elements
from nanoos_fw.operations.submission import submit
from nanoos_fw.provenance import content_key, run_environment
from nanoos_fw.settings import Settings, load_settings
from nanoos_fw.stores.active import ActiveStore, Round, label_values, put_labels
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import open_database, store_errors
from nanoos_fw.stores.structures import StructureStore

RUNNING, WAITING, STOPPED = "running", "waiting for labels", "stopped"
_MAX_LISTED = 20


@dataclass(frozen=True)
class RoundStatus:
    """A round as a row of a table; energies and errors in the unit of the target.

    Parameters
    ----------
    labelled
        Candidates given out up to this round.
    failed
        Of this batch, without a label.
    prediction_mae
        Error of the earlier model on this batch, made before it had labels.
    val_mae
        Of the model trained on it.
    """

    round: int
    batch: int
    labelled: int
    failed: int | None
    best: float | None
    prediction_mae: float | None
    val_mae: float | None
    model: str | None


@dataclass(frozen=True)
class ActiveStatus:
    """Where a campaign stands.

    Parameters
    ----------
    state
        ``running``, ``waiting for labels`` or ``stopped``.
    reason
        Why it stopped, or what it waits for.
    budget
        Rules in effect.
    """

    campaign: str
    state: str
    reason: str | None
    target: str
    unit: str
    candidates: int
    labels: int
    best: float | None
    best_structure: str | None
    budget: dict[str, Any]
    rounds: list[RoundStatus] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible values."""
        return asdict(self)


@dataclass(frozen=True)
class LabelReport:
    """What became of imported labels: structure keys, and entries that were refused."""

    written: list[str]
    there: list[str]
    refused: dict[str, str]


def read_plan(values: Any) -> ActivePlan:
    """Return a checked plan.

    Raises
    ------
    InputError
        If a key is unknown or a value is not valid; names each.
    """
    if not isinstance(values, Mapping):
        raise InputError(
            "the file describes no campaign",
            advice="'nanoos active template' prints one to begin with",
        )
    try:
        return ActivePlan.model_validate(dict(values))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ")
            for e in error.errors()
        )
        raise InputError(
            f"the campaign is not valid: {problems}",
            advice=f"fields: {', '.join(ActivePlan.model_fields)}",
        ) from error


def submit_active(
    launchpad: Any, plan: ActivePlan, settings: Settings | None = None
) -> tuple[ActivePlan, bool]:
    """Put candidates, campaign and its first workflow into the database.

    Doing it again changes nothing, and completes a submission that was killed.

    Returns
    -------
    tuple
        The plan with its folders, and whether the workflow is new.

    Raises
    ------
    InputError
        If there are no candidates, labels cannot be made, or a campaign of this name
        has another plan.
    """
    settings = settings or load_settings()
    root = Path(plan.work_root or settings.work_dir).resolve()
    report = Path(plan.report or root / f"{plan.name}-report.html").resolve()
    plan = plan.model_copy(update={"work_root": str(root), "report": str(report)})
    check_labelling(plan)
    database = open_database(launchpad)
    prepare_launchpad(launchpad)
    campaigns, structures = CampaignStore(database), StructureStore(database)
    # Before anything is stored: a campaign of this name could not be corrected then.
    _check_elements(structures, plan)
    _check_count(structures, plan)
    campaigns.create(plan.name, plan.model_dump(mode="json"))
    if campaigns.get(plan.name)["outputs"].get("candidates") is None:
        structures.add_to_set(_candidates(structures, plan), plan.candidate_set)
        found = structures.keys(plan.candidate_set)
        place = context(database, plan, settings)
        if isinstance(plan.labels, FileLabels):
            labels = label_values(database, label_source(place, plan), found)
            structures.add_to_set(sorted(labels.values), known_set(plan))
        campaigns.record(
            plan.name,
            candidates={
                "key": content_key("candidates", found),
                "count": len(found),
            },
        )
    found = structures.keys(plan.candidate_set)
    return plan, submit(launchpad, active_workflow(plan, found))


def active_status(database: Any, campaign: str) -> ActiveStatus:
    """Return where an active-learning campaign stands."""
    plan = _plan(database, campaign)
    store = ActiveStore(database)
    place = context(database, plan)
    rounds = store.rounds(campaign)
    outputs = CampaignStore(database).get(campaign)["outputs"]
    state, reason = RUNNING, None
    stop = rounds[-1].stop if rounds else None
    if stop is not None:
        state, reason = STOPPED, f"{stop['rule']}: {stop['reason']}"
    elif _waits(plan, rounds):
        folder = (rounds[-1].waiting or {})["folder"]
        state, reason = WAITING, f"the batch is in {folder}"
    rows = []
    labelled = 0
    for entry in rounds:
        if entry.stop is not None:
            continue
        labelled += len(entry.picks)
        dataset, model = entry.dataset or {}, entry.model or {}
        errors = dataset.get("errors") or {}
        val = (model.get("metrics") or {}).get("val") or {}
        rows.append(
            RoundStatus(
                round=entry.number,
                batch=len(entry.picks),
                labelled=labelled,
                failed=dataset.get("n_failed"),
                best=dataset.get("best"),
                prediction_mae=errors.get("mae"),
                val_mae=val.get("mae"),
                model=model.get("reference"),
            )
        )
    known = [r.dataset for r in rounds if r.dataset is not None]
    return ActiveStatus(
        campaign=campaign,
        state=state,
        reason=reason,
        target=plan.target,
        unit=plan.unit,
        candidates=int(outputs.get("candidates", {}).get("count", 0)),
        labels=labelled,
        best=known[-1]["best"] if known else None,
        best_structure=known[-1]["best_structure"] if known else None,
        budget=rules_of(place, plan).model_dump(mode="json", exclude_none=True),
        rounds=rows,
    )


def import_labels(
    database: Any, campaign: str, paths: Sequence[Path], *, source: str = ""
) -> LabelReport:
    """Read labels of the batch that a campaign waits for from files of structures.

    An entry belongs to the candidate whose key it is called by, by its identifier in
    the file or its file's or folder's name; or whose structure it is. It may have been
    relaxed meanwhile, but must hold the same atoms. Its value is the property
    ``target`` of the file, or for a target per atom that of the whole cell.

    Parameters
    ----------
    paths
        Files or folders, see ``structure_files.read_structures``.
    source
        How they were made, stored with them.
    """
    from nanoos_fw.crystals import structure_key
    from nanoos_fw.structure_files import EntryFailure, read_structures

    plan = _plan(database, campaign)
    place = context(database, plan)
    entry = _waiting_round(database, plan)
    batch = set(entry.batch)
    atoms = place.structures.element_counts(entry.batch)
    origin = label_source(place, plan)
    values: dict[str, float] = {}
    refused: dict[str, str] = {}
    doubtful: set[str] = set()
    for path in paths:
        for found in read_structures(path, id_prop_target=plan.target):
            name = str(found.source)
            if isinstance(found, EntryFailure):
                refused[name] = str(found.error)
                continue
            names = [found.label, *Path(found.source.path).parts[-2:]]
            names = [Path(n).name.partition(".")[0].partition("#")[0] for n in names]
            names.append(structure_key(found.structure))
            key = next((n for n in names if n in batch), None)
            if key is None:
                refused[name] = "it belongs to no candidate of the batch"
                continue
            counts = {
                str(element.symbol): round(n)
                for element, n in found.structure.composition.items()
            }
            if counts != atoms[key]:
                refused[name] = f"its atoms {counts} are not those of {key}"
                continue
            value = _value_of(plan, found.properties, len(found.structure))
            if value is None:
                known = ", ".join(sorted(found.properties)) or "none"
                refused[name] = f"it has no {plan.target}; properties: {known}"
            elif not math.isfinite(value):
                refused[name] = f"its {plan.target} is no finite number: {value}"
            elif key in values and values[key] != value:
                refused[name] = f"{key} has another label in another entry"
                doubtful.add(key)
            else:
                values[key] = value
    for key in doubtful:  # the order of files must not choose, nor of steps in one
        del values[key]
        refused[key] = "its entries have different labels: give one"
    there = place.simulations.find(sorted(values), origin.method)
    for key, simulation in there.items():
        if simulation.result.get("value") != values[key]:
            refused[key] = "there is another label, or a failure, of it already"
    new = {key: value for key, value in values.items() if key not in there}
    about = {**run_environment(), "source": source or ", ".join(map(str, paths))}
    put_labels(database, origin, new, {}, about=about)
    return LabelReport(sorted(new), sorted(there), refused)


def fail_labels(
    database: Any, campaign: str, keys: Sequence[str], reason: str
) -> list[str]:
    """Record that candidates of the waiting batch will have no label."""
    plan = _plan(database, campaign)
    place = context(database, plan)
    batch = _waiting_round(database, plan).batch
    strange = sorted(set(keys) - set(batch))
    if strange:
        raise InputError(
            f"{strange[0]} is not in the batch that the campaign waits for",
            evidence={"batch": batch[:_MAX_LISTED]},
        )
    error: NanoOSError = SimulationError(reason, advice="it is left out of the dataset")
    failures = {key: error.to_dict() for key in keys}
    put_labels(
        database, label_source(place, plan), {}, failures, about=run_environment()
    )
    return sorted(keys)


def continue_active(launchpad: Any, campaign: str, *, partial: bool = False) -> bool:
    """Let a campaign that waited for labels go on; return whether it does so now.

    Parameters
    ----------
    partial
        Do not wait for candidates of the batch that have neither a label nor a
        failure.

    Raises
    ------
    InputError
        If labels are missing, or the campaign waits for none.
    """
    database = open_database(launchpad)
    plan = _plan(database, campaign)
    place = context(database, plan)
    entry = _waiting_round(database, plan)
    labels = label_values(database, label_source(place, plan), entry.batch)
    done = len(entry.batch) - len(labels.pending) - len(labels.failures)
    needed = math.ceil(plan.min_label_share * len(entry.batch))
    if labels.pending and not partial:
        raise InputError(
            f"{len(labels.pending)} of {len(entry.batch)} candidates of round "
            f"{entry.number} have no label yet",
            evidence={"first": labels.pending[:5]},
            advice="import them, or go on without them: --partial",
        )
    if done < needed:
        raise InputError(
            f"{done} of {len(entry.batch)} candidates of round {entry.number} have "
            f"labels; min_label_share asks for {needed}",
            advice="import more labels",
        )
    count = place.structures.count(plan.candidate_set)
    return submit(launchpad, learning_workflow(plan, entry.number, count))


def stop_active(database: Any, campaign: str) -> None:
    """End a campaign with the round that is running."""
    plan = _plan(database, campaign)
    CampaignStore(database).record(plan.name, stop_asked=True)


def extend_active(launchpad: Any, campaign: str, changes: Mapping[str, Any]) -> None:
    """Change the stop rules of a campaign; one that has stopped goes on.

    Parameters
    ----------
    changes
        Fields of ``StopRules``; None takes a rule away.

    Raises
    ------
    InputError
        If the rules are not valid.
    """
    database = open_database(launchpad)
    plan = _plan(database, campaign)
    place = context(database, plan)
    before = rules_of(place, plan).model_dump(mode="json")
    try:
        rules = StopRules.model_validate({**before, **changes})
    except ValidationError as error:
        raise InputError(f"the rules are not valid: {error}") from error
    store, campaigns = ActiveStore(database), CampaignStore(database)
    campaigns.record(
        campaign, stop_rules=rules.model_dump(mode="json"), stop_asked=False
    )
    rounds = store.rounds(campaign)
    if not rounds or rounds[-1].stop is None:
        return
    last = rounds[-1].number
    # The report that was added when it ended belongs to this round no longer.
    with store_errors("reopen a campaign"):
        launchpad.fireworks.update_many(
            {"spec.nanoos.campaign": campaign, "spec.nanoos.round": last},
            {"$unset": {"spec.nanoos.round": ""}},
        )
    turn = int(campaigns.get(campaign)["outputs"].get("turn", 0)) + 1
    campaigns.record(campaign, turn=turn, stopped=None)
    store.reopen(campaign, last)
    submit(launchpad, select_workflow(plan, last, turn))


def context(
    database: Any, plan: ActivePlan, settings: Settings | None = None
) -> TaskContext:
    """Return what the firetasks of a campaign see, for use in this process."""
    settings = settings or load_settings()
    return TaskContext.on(
        database,
        settings=settings,
        work_root=Path(plan.work_root or settings.work_dir).resolve(),
    )


# ------------------------------------------------------------------------- private


def _plan(database: Any, campaign: str) -> ActivePlan:
    values = CampaignStore(database).get(campaign)["plan"]
    if "selection" not in values:
        raise InputError(
            f"campaign {campaign!r} does not learn actively",
            advice=f"see 'nanoos status {campaign}'",
        )
    return ActivePlan.model_validate(values)


def _candidates(structures: StructureStore, plan: ActivePlan) -> list[str]:
    """Return the keys of the candidates, which are in the store then."""
    chosen = plan.candidates
    if isinstance(chosen, AlloyCandidates):
        added = structures.add(
            alloy_candidates(chosen.alloys), in_set=plan.candidate_set
        )
        if plan.needs_references:
            structures.add(alloy_references(chosen.alloys), in_set=plan.reference_set)
        return sorted(set(added.keys))
    if plan.needs_references and chosen.references is not None:
        structures.add_to_set(structures.keys(chosen.references), plan.reference_set)
    return structures.keys(chosen.set)


def _check_count(structures: StructureStore, plan: ActivePlan) -> None:
    """Refuse fewer candidates than the first labels."""
    chosen = plan.candidates
    if isinstance(chosen, AlloyCandidates):
        made = alloy_candidates(chosen.alloys)
        count = len({structure_key(entry.structure) for entry in made})
    else:
        count = structures.count(chosen.set)
    if count < plan.initial.size:
        raise InputError(
            f"{count} candidates are fewer than initial.size = {plan.initial.size}",
            advice="import more with 'nanoos import --set', or lower initial.size",
        )


def _check_elements(structures: StructureStore, plan: ActivePlan) -> None:
    """Refuse what LAMMPS could not label."""
    if not isinstance(plan.labels, LammpsLabels):
        return
    chosen, potential = plan.candidates, plan.labels.method.potential
    if isinstance(chosen, AlloyCandidates):
        candidates = references = pure = set(chosen.alloys)
    else:
        potential.check(structures.iterate(structures.keys(chosen.set)))
        candidates, references, pure = structures.elements(chosen.set), set(), set()
        if plan.needs_references and chosen.references is not None:
            references = structures.elements(chosen.references)
            pure = structures.elements(chosen.references, alone=True)
    check_elements(
        plan.name,
        potential,
        candidates,
        references,
        pure=pure if plan.needs_references else None,
    )


def _waits(plan: ActivePlan, rounds: Sequence[Round]) -> bool:
    if not rounds or not isinstance(plan.labels, FileLabels):
        return False
    last = rounds[-1]
    return last.stop is None and last.waiting is not None and last.dataset is None


def _waiting_round(database: Any, plan: ActivePlan) -> Round:
    rounds = ActiveStore(database).rounds(plan.name)
    if not _waits(plan, rounds):
        raise InputError(
            f"campaign {plan.name!r} waits for no labels",
            advice=f"see 'nanoos active status {plan.name}'",
        )
    return rounds[-1]


def _value_of(
    plan: ActivePlan, properties: Mapping[str, float], n_sites: int
) -> float | None:
    if plan.target in properties:
        return float(properties[plan.target])
    whole = plan.target.removesuffix("_per_atom")
    if whole != plan.target and whole in properties:
        return float(properties[whole]) / n_sites
    return None
