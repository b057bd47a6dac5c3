"""The firetask of active learning that decides: a batch and its round, or the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nanoos_fw.errors import InputError
from nanoos_fw.firetasks.active_plan import ActivePlan
from nanoos_fw.firetasks.active_state import (
    RoundParameters,
    core_hours,
    free_candidates,
    has_round,
    known_set,
    plan_of,
    rules_of,
)
from nanoos_fw.firetasks.base import NanoTask, TaskContext
from nanoos_fw.ml.acquisition import (
    Floats,
    Pick,
    Pool,
    farthest_first,
    random_order,
    select_batch,
    shortlist,
    standardized,
)
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.descriptors import describe_graphs
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.ml.stopping import Progress, StopRules, check_stop, labels_left
from nanoos_fw.provenance import content_key
from nanoos_fw.stores.active import ActiveStore, Round

_MAX_LISTED = 20
_DESCRIBED_AT_ONCE = 2000


class SelectBatchTask(NanoTask):
    """Decide how the campaign goes on: choose a batch and add its round, or end it.

    The decision is stored once. Run again, this finds the decision, and adds the round
    only if its fireworks are not in the workflow.
    """

    _fw_name = "{{nanoos_fw.firetasks.SelectBatchTask}}"
    parameters_model = RoundParameters
    parameters: RoundParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Decide, unless it has been decided."""
        parameters = self.parameters
        store = ActiveStore(place.database)
        plan = plan_of(place, parameters.campaign)
        decided = store.find(plan.name, parameters.round)
        if decided is None:
            decided = store.decide(plan.name, self._decide(place, plan, store))
        place.structures.add_to_set(decided.batch, plan.labelled_set)
        place.campaigns.record(plan.name, stopped=decided.stop)
        return {
            "round": decided.number,
            "batch": len(decided.picks),
            "first": decided.batch[:_MAX_LISTED],
            "chosen_by": decided.chosen_by,
            "stop": decided.stop,
        }

    def additions(self, place: TaskContext) -> list[Any]:
        """Return the fireworks of the round, unless the workflow has them."""
        from nanoos_fw.firetasks.active_rounds import round_workflow

        parameters = self.parameters
        plan = plan_of(place, parameters.campaign)
        if has_round(place.database, plan.name, parameters.round):
            return []
        decided = ActiveStore(place.database).get(plan.name, parameters.round)
        count = place.structures.count(plan.candidate_set)
        references: list[str] = []
        if decided.number == 0 and plan.needs_references:
            references = place.structures.keys(plan.reference_set)
        workflow = round_workflow(plan, decided, count, references)
        return [] if workflow is None else [workflow]

    def _decide(
        self, place: TaskContext, plan: ActivePlan, store: ActiveStore
    ) -> Round:
        number = self.parameters.round
        rounds = store.rounds(plan.name)
        if [r.number for r in rounds] != list(range(number)):
            raise InputError(
                f"round {number} of campaign {plan.name!r} does not follow on those "
                "that have been decided",
                evidence={"rounds": [r.number for r in rounds]},
            )
        free = free_candidates(place, plan, rounds)
        rules = rules_of(place, plan)
        labels = sum(len(r.picks) for r in rounds)
        if number == 0:
            return self._first(place, plan, free, rules)
        last = rounds[-1]
        if last.model is None:
            raise InputError(
                f"round {last.number} of campaign {plan.name!r} has no model yet",
                advice="run its training first",
            )
        reference = str(last.model["reference"])
        pool = _pool(place, plan, reference, free)
        best = [None if r.dataset is None else r.dataset["best_mean"] for r in rounds]
        progress = Progress(
            labels=labels,
            rounds=number,
            candidates_left=int(
                (~pool.out_of_domain).sum()
                if plan.selection.out_of_domain == "drop"
                else len(pool)
            ),
            core_hours=core_hours(place, plan.name),
            best=best,
            val_mae=(last.model["metrics"].get("val") or {}).get("mae"),
            max_std=None if pool.std is None or not len(pool) else pool.std.max(),
            asked=bool(place.campaigns.get(plan.name)["outputs"].get("stop_asked")),
        )
        shown = {
            "labels": progress.labels,
            "candidates_left": progress.candidates_left,
            "core_hours": progress.core_hours,
            "val_mae": progress.val_mae,
            "max_std": None if progress.max_std is None else float(progress.max_std),
            "out_of_domain": int(pool.out_of_domain.sum()),
        }
        stop = check_stop(rules, progress, plan.objective)
        if stop is not None:
            return Round(
                number=number,
                chosen_by=reference,
                stop={"rule": stop.rule, "reason": stop.reason},
                progress=shown,
            )
        size = plan.selection.size
        left = labels_left(rules, labels)
        picks = self._choose(
            place, plan, rounds, pool, size if left is None else min(size, left)
        )
        return Round(number=number, picks=tuple(picks), chosen_by=reference,
                     progress=shown)  # fmt: skip

    def _first(
        self,
        place: TaskContext,
        plan: ActivePlan,
        free: Sequence[str],
        rules: StopRules,
    ) -> Round:
        """Choose the first batch, as far as labels are not known already."""
        known = place.structures.count(known_set(plan))
        size = max(0, plan.initial.size - known)
        left = labels_left(rules, 0)
        size = size if left is None else min(size, left)
        if plan.initial.method == "random":
            rows = random_order(free, plan.seed)[:size]
            keys = [free[row] for row in rows]
        else:
            described, vectors = _described(place, plan, free)
            (scaled,) = standardized(vectors)
            # Nearest to the centre first, which farthest_first begins with.
            centre = np.round((scaled**2).mean(axis=1), 9)
            order = np.lexsort((np.array(described, dtype=str), centre))
            described = [described[row] for row in order]
            chosen = farthest_first(scaled[order], described, size)
            keys = [described[row] for row in chosen]
        return Round(number=0, picks=tuple(Pick(key) for key in keys),
                     progress={"known": known})  # fmt: skip

    def _choose(
        self,
        place: TaskContext,
        plan: ActivePlan,
        rounds: Sequence[Round],
        pool: Pool,
        size: int,
    ) -> list[Pick]:
        number = self.parameters.round
        seed = int(content_key("batch", [plan.seed, number])[:8], 16)
        best = rounds[-1].dataset["best"] if rounds[-1].dataset else None
        how: dict[str, Any] = {"objective": plan.objective, "best": best, "seed": seed}
        short, scores = shortlist(pool, plan.selection, **how)
        vectors = labelled = None
        if plan.selection.diversity != "none":
            keys, vectors = _described(place, plan, short.ids)
            assert keys == list(short.ids)  # predicted, so they have features
            given = [key for r in rounds for key in r.batch]
            _, others = _described(place, plan, given)
            vectors, labelled = standardized(vectors, [others])
        return select_batch(
            short,
            scores,
            plan.selection,
            vectors=vectors,
            labelled=labelled,
            size=size,
            **how,
        )


# ------------------------------------------------------------------------- private


def _pool(
    place: TaskContext, plan: ActivePlan, reference: str, free: Sequence[str]
) -> Pool:
    """Return the candidates with their predictions; those without features cannot be.

    Raises
    ------
    InputError
        If one that has features has not been predicted.
    """
    rows = place.models.predictions(reference, free)
    if len(rows) < len(free):
        predicted = {row.structure for row in rows}
        missing = [key for key in free if key not in predicted]
        described = plan.features.model_dump(mode="json")
        state = place.features.state(missing, described, FEATURE_VERSION)
        lost = [key for key in missing if state.get(key) == "ok"]
        if lost:
            raise InputError(
                f"{len(lost)} candidates have not been predicted by {reference}",
                evidence={"first": lost[:5]},
                advice="rerun the fireworks that screen them",
            )
    stds = [row.uncertainty for row in rows]
    return Pool(
        ids=[row.structure for row in rows],
        mean=np.array([row.prediction for row in rows]),
        std=None if None in stds else np.array(stds, dtype=np.float64),
        out_of_domain=np.array([row.out_of_domain for row in rows], dtype=bool),
    )


def _described(
    place: TaskContext, plan: ActivePlan, keys: Sequence[str]
) -> tuple[list[str], Floats]:
    """Return descriptors of the candidates that have features, and their keys."""
    described = plan.features.model_dump(mode="json")
    found: list[str] = []
    parts: list[Floats] = [np.zeros((0, 0))]
    for start in range(0, len(keys), _DESCRIBED_AT_ONCE):
        graphs = place.features.graphs(
            keys[start : start + _DESCRIBED_AT_ONCE], described, FEATURE_VERSION
        )
        if graphs:
            found += graphs
            parts.append(describe_graphs(GraphTable.from_packed(list(graphs.values()))))
    if not found:
        raise InputError(
            f"none of {len(keys)} candidates has features",
            advice="see the featurize fireworks",
        )
    return found, np.concatenate(parts[1:])
