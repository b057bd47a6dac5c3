"""What the firetasks of active learning and its commands ask of a campaign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from nanoos_fw.errors import InputError
from nanoos_fw.firetasks.active_plan import ActivePlan, FileLabels, LammpsLabels
from nanoos_fw.firetasks.base import Parameters, TaskContext
from nanoos_fw.ml.stopping import StopRules
from nanoos_fw.provenance import content_key
from nanoos_fw.stores.active import ActiveStore, LabelSource, Round
from nanoos_fw.stores.launches import stage_times

_PARALLEL_STAGES = ("references", "label", "train")
_SECONDS_PER_HOUR = 3600.0


class RoundParameters(Parameters):
    """Parameters of all tasks of a round.

    Parameters
    ----------
    campaign
        An active-learning campaign.
    round
        From 0.
    """

    campaign: str
    round: int = Field(ge=0)


@dataclass(frozen=True)
class OpenedRound:
    """A round that has been decided, and what came before it.

    Parameters
    ----------
    before
        The rounds before it, in their order.
    """

    store: ActiveStore
    plan: ActivePlan
    before: list[Round]
    decided: Round

    def record(self, name: str, value: dict[str, Any]) -> None:
        """Note what a stage of the round has made."""
        self.store.record(self.plan.name, self.decided.number, name, value)

    @property
    def is_last(self) -> bool:
        """Whether nothing was decided after it."""
        return self.store.find(self.plan.name, self.decided.number + 1) is None


def open_round(place: TaskContext, parameters: RoundParameters) -> OpenedRound:
    """Return the round that a firetask belongs to.

    Raises
    ------
    InputError
        If it has not been decided.
    """
    store = ActiveStore(place.database)
    plan = plan_of(place, parameters.campaign)
    before = [r for r in store.rounds(plan.name) if r.number < parameters.round]
    return OpenedRound(store, plan, before, store.get(plan.name, parameters.round))


def plan_of(place: TaskContext, campaign: str) -> ActivePlan:
    """Return the plan of an active-learning campaign."""
    plan = place.campaigns.get(campaign)["plan"]
    if "selection" not in plan:
        raise InputError(f"campaign {campaign!r} does not learn actively")
    return ActivePlan.model_validate(plan)


def rules_of(place: TaskContext, plan: ActivePlan) -> StopRules:
    """Return the rules in effect: those of the plan, or that came later."""
    changed = place.campaigns.get(plan.name)["outputs"].get("stop_rules")
    return plan.stop if changed is None else StopRules.model_validate(changed)


def known_set(plan: ActivePlan) -> str:
    """Return the set of candidates whose labels were there at the beginning."""
    return f"{plan.name}/known"


def candidate_keys(place: TaskContext, plan: ActivePlan) -> list[str]:
    """Return the keys of all candidates, sorted.

    Raises
    ------
    InputError
        If they are not those that the campaign began with.
    """
    keys = place.structures.keys(plan.candidate_set)
    expected = place.campaigns.output(plan.name, "candidates")
    if content_key("candidates", keys) != expected["key"]:
        raise InputError(
            f"the set {plan.candidate_set!r} has changed since the campaign began",
            evidence={"candidates": len(keys), "before": expected["count"]},
            advice="begin another campaign with the new candidates",
        )
    return keys


def free_candidates(
    place: TaskContext, plan: ActivePlan, rounds: Sequence[Round]
) -> list[str]:
    """Return the keys of the candidates that no round has chosen, sorted."""
    taken = {key for r in rounds for key in r.batch}
    taken |= set(place.structures.keys(known_set(plan)))
    return [key for key in candidate_keys(place, plan) if key not in taken]


def label_source(place: TaskContext, plan: ActivePlan) -> LabelSource:
    """Return where the labels of a campaign are."""
    if isinstance(plan.labels, LammpsLabels):
        potential = plan.labels.method.potential.resolve(place)
        references: tuple[str, ...] = ()
        if plan.needs_references:
            references = tuple(place.structures.keys(plan.reference_set))
        return LabelSource(
            target=plan.target,
            unit=plan.unit,
            method=plan.labels.method.key(potential),
            relaxations=True,
            references=references,
        )
    return LabelSource(
        target=plan.target,
        unit=plan.unit,
        method=plan.label_key(),
        imported=isinstance(plan.labels, FileLabels),
    )


def has_round(database: Any, campaign: str, number: int) -> bool:
    """Tell whether a workflow has the fireworks of a round.

    FireWorks stores new fireworks before the workflow that they belong to. Those of a
    launch that was killed in between belong to none, and are deleted here.
    """
    query = {"spec.nanoos.campaign": campaign, "spec.nanoos.round": number}
    ids = [d["fw_id"] for d in database["fireworks"].find(query, {"fw_id": 1})]
    if not ids:
        return False
    if database["workflows"].find_one({"nodes": {"$in": ids}}, {"_id": 1}) is not None:
        return True
    database["fireworks"].delete_many({"fw_id": {"$in": ids}})
    return False


def core_hours(place: TaskContext, campaign: str) -> float:
    """Return wall time of finished launches times the cores that they could use."""
    cores = place.settings.ranks * place.settings.threads
    times, _ = stage_times(place.database, campaign)
    seconds = sum(
        time.wall_s * (cores if time.stage in _PARALLEL_STAGES else 1) for time in times
    )
    return round(seconds / _SECONDS_PER_HOUR, 6)
