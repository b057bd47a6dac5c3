"""Firetasks of active learning: choose, hand out, extend, train further, predict.

All name a campaign and a round; what they make is recorded with that round, so that any
of them can be run again at any time, in any order of rounds, with the same result.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from nanoos_fw.errors import InputError
from nanoos_fw.firetasks.active_plan import ActivePlan, FileLabels, LammpsLabels
from nanoos_fw.firetasks.base import NanoTask, Parameters, TaskContext
from nanoos_fw.firetasks.ml import TrainModelTask, predict_missing
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
from nanoos_fw.ml.datasets import adopt_dataset
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.ml.stopping import Progress, StopRules, check_stop, labels_left
from nanoos_fw.ml.uncertainty import describe_graphs
from nanoos_fw.provenance import content_key, write_atomic
from nanoos_fw.stores.active import (
    ActiveStore,
    LabelSource,
    LabelValues,
    Round,
    label_values,
)
from nanoos_fw.stores.datasets import TargetValues, build_from_targets
from nanoos_fw.stores.launches import stage_times

_MAX_LISTED = 20
_PARALLEL_STAGES = ("references", "label", "train")
_DESCRIBED_AT_ONCE = 2000
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


class ExportBatchTask(NanoTask):
    """Write a batch to files, for labels that are made elsewhere."""

    _fw_name = "{{nanoos_fw.firetasks.ExportBatchTask}}"
    parameters_model = RoundParameters
    parameters: RoundParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Write one file for each candidate, and a list of them."""
        parameters = self.parameters
        store = ActiveStore(place.database)
        plan = plan_of(place, parameters.campaign)
        assert isinstance(plan.labels, FileLabels)
        decided = store.get(plan.name, parameters.round)
        folder = place.work_root / "batches" / plan.name / f"{decided.number:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        stored = place.structures.get_many(decided.batch)
        rows = []
        for pick in decided.picks:
            entry = stored[pick.id]
            name = f"{pick.id}{_SUFFIXES[plan.labels.format]}"
            text = structure_text(entry.structure, pick.id, plan.labels.format)
            write_atomic(folder / name, text)
            rows.append(
                {
                    "structure": pick.id,
                    "file": name,
                    "formula": entry.formula,
                    "label": entry.label,
                    "predicted": pick.mean,
                    "std": pick.std,
                }
            )
        about = {"campaign": plan.name, "round": decided.number, "target": plan.target,
                 "unit": plan.unit, "candidates": rows}  # fmt: skip
        write_atomic(folder / "batch.json", json.dumps(about, indent=1) + "\n")
        store.record(plan.name, decided.number, "waiting", {"folder": str(folder)})
        return {"folder": str(folder), "files": len(rows)}


class ExtendDatasetTask(NanoTask):
    """Freeze the labels up to a round into a dataset with its own hash."""

    _fw_name = "{{nanoos_fw.firetasks.ExtendDatasetTask}}"
    parameters_model = RoundParameters
    parameters: RoundParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Collect, check how many labels the batch has, and build."""
        parameters = self.parameters
        store = ActiveStore(place.database)
        plan = plan_of(place, parameters.campaign)
        rounds = store.rounds(plan.name)[: parameters.round + 1]
        decided = store.get(plan.name, parameters.round)
        source = label_source(place, plan)
        keys = place.structures.keys(known_set(plan))
        keys += [key for r in rounds for key in r.batch]
        labels = label_values(place.database, source, list(dict.fromkeys(keys)))
        failed = self._check(plan, decided, labels)
        # The hash, which names the folder, is known when all graphs have been read.
        building = place.work_root / "datasets" / f".building-{secrets.token_hex(8)}"
        try:
            dataset, without, _ = build_from_targets(
                place.database,
                TargetValues(labels.values, labels.unit or None, {}, labels.failures),
                plan.dataset,
                features=plan.features.model_dump(mode="json"),
                directory=building,
            )
            adopt_dataset(building, place.work_dir("datasets", dataset.dataset_hash))
        finally:
            shutil.rmtree(building, ignore_errors=True)
        record = {
            "hash": dataset.dataset_hash,
            "counts": {p: dataset.parts.count(p) for p in sorted(set(dataset.parts))},
            "unit": dataset.unit,
            "labels": len(labels.values),
            "failed": dict(list(failed.items())[:_MAX_LISTED]),
            "n_failed": len(failed),
            "without_features": len(without),
            **_best_of(plan, labels.values),
            "errors": _errors(decided, labels.values),
        }
        store.record(plan.name, decided.number, "dataset", record)
        if store.find(plan.name, decided.number + 1) is None:
            self._for_the_report(place, plan, dataset.dataset_hash)
        return {
            "dataset": dataset.dataset_hash,
            "counts": record["counts"],
            "labels": record["labels"],
            "failed": len(failed),
            "best": record["best"],
        }

    def _check(
        self, plan: ActivePlan, decided: Round, labels: LabelValues
    ) -> dict[str, str]:
        """Return why candidates of the batch have no label.

        Raises
        ------
        InputError
            If some are still to come, or too many have none.
        """
        batch = decided.batch
        pending = sorted(set(labels.pending) & set(batch))
        if pending and not isinstance(plan.labels, FileLabels):
            raise InputError(
                f"{len(pending)} candidates of round {decided.number} have not been "
                "labelled yet",
                evidence={"first": pending[:5]},
                advice="rerun the fireworks that label them",
            )
        failed = {key: labels.failures[key] for key in batch if key in labels.failures}
        failed |= dict.fromkeys(pending, "no label was imported")
        done = len(batch) - len(failed)
        if done < plan.min_label_share * len(batch):
            raise InputError(
                f"{done} of {len(batch)} candidates of round {decided.number} have "
                f"labels, fewer than min_label_share = {plan.min_label_share}",
                evidence={"reasons": dict(list(failed.items())[:5])},
                advice="see why they failed; with labels for them, rerun this firework",
            )
        return failed

    @staticmethod
    def _for_the_report(place: TaskContext, plan: ActivePlan, dataset: str) -> None:
        outputs: dict[str, Any] = {"dataset": dataset}
        if isinstance(plan.labels, LammpsLabels):
            potential = plan.labels.method.potential.resolve(place)
            files = potential.files
            outputs["potential"] = {
                "name": potential.name,
                "citation": potential.citation,
                "sha256": files[0].sha256 if files else "",
            }
            if plan.needs_references:
                outputs["method"] = plan.labels.method.key(potential)
        place.campaigns.record(plan.name, **outputs)


class RetrainTask(NanoTask):
    """Train on the dataset of a round, from the version of the round before."""

    _fw_name = "{{nanoos_fw.firetasks.RetrainTask}}"
    parameters_model = RoundParameters
    parameters: RoundParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Train and register, unless the registry has the version."""
        parameters = self.parameters
        store = ActiveStore(place.database)
        plan = plan_of(place, parameters.campaign)
        dataset = store.get(plan.name, parameters.round).dataset
        if dataset is None:
            raise InputError(
                f"round {parameters.round} of campaign {plan.name!r} has no dataset yet"
            )
        parent = None
        if parameters.round > 0 and plan.retraining.warm_start:
            before = store.get(plan.name, parameters.round - 1).model
            if before is None:
                raise InputError(
                    f"round {parameters.round - 1} of campaign {plan.name!r} has no "
                    "model to train further"
                )
            parent = str(before["reference"])
        answer = TrainModelTask(
            dataset_dir=str(place.work_dir("datasets", dataset["hash"])),
            dataset_hash=dataset["hash"],
            model_name=plan.model_name,
            training=plan.training_of(parameters.round).model_dump(mode="json"),
            parent=parent,
        ).run(place)
        record = place.models.get(str(answer["model"]))
        metrics = {
            part: {name: found.get(name) for name in ("n", "mae", "rmse", "r2")}
            for part, found in record.metrics.items()
            if part in ("train", "val", "test")
        }
        store.record(
            plan.name,
            parameters.round,
            "model",
            {"reference": record.reference, "parent": parent, "metrics": metrics},
        )
        if store.find(plan.name, parameters.round + 1) is None:
            place.models.activate(
                record.reference,
                reason=f"round {parameters.round} of campaign {plan.name}",
            )
            place.campaigns.record(plan.name, model=record.reference)
        return {**answer, "parent": parent, "val": metrics.get("val")}


class ScreenPoolParameters(RoundParameters):
    """Parameters of ScreenPoolTask.

    Parameters
    ----------
    start, stop
        Window of the sorted keys of all candidates; those with labels are passed over.
    """

    start: int = Field(ge=0)
    stop: int = Field(ge=1)


class ScreenPoolTask(NanoTask):
    """Predict candidates without label with the model of a round."""

    _fw_name = "{{nanoos_fw.firetasks.ScreenPoolTask}}"
    parameters_model = ScreenPoolParameters
    parameters: ScreenPoolParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Predict what has no row yet."""
        parameters = self.parameters
        store = ActiveStore(place.database)
        plan = plan_of(place, parameters.campaign)
        rounds = store.rounds(plan.name)[: parameters.round + 1]
        model = rounds[-1].model if len(rounds) == parameters.round + 1 else None
        if model is None:
            raise InputError(
                f"round {parameters.round} of campaign {plan.name!r} has no model yet"
            )
        window = candidate_keys(place, plan)[parameters.start : parameters.stop]
        free = set(free_candidates(place, plan, rounds))
        return predict_missing(
            place,
            str(model["reference"]),
            [key for key in window if key in free],
            plan.features,
        )


# ------------------------------------------------------------------- shared with others


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


_SUFFIXES = {"extxyz": ".extxyz", "poscar": ".vasp", "cif": ".cif"}


def structure_text(structure: Any, key: str, file_format: str) -> str:
    """Return a structure as text that names its key."""
    if file_format == "cif":
        from pymatgen.io.cif import CifWriter

        text = str(CifWriter(structure, significant_figures=12))
        _, _, rest = text.partition("data_")
        return f"data_{key}\n{rest.partition(chr(10))[2]}"
    if file_format == "poscar":
        from pymatgen.io.vasp import Poscar

        return str(Poscar(structure, comment=key).get_str(significant_figures=12))
    numbers = " ".join(repr(float(x)) for x in structure.lattice.matrix.ravel())
    lines = [
        str(len(structure)),
        f'Lattice="{numbers}" Properties=species:S:1:pos:R:3 '
        f'structure_id={key} pbc="T T T"',
    ]
    for site in structure:
        x, y, z = (repr(float(value)) for value in site.coords)
        lines.append(f"{site.specie.symbol} {x} {y} {z}")
    return "\n".join(lines) + "\n"


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


def _best_of(plan: ActivePlan, values: dict[str, float]) -> dict[str, Any]:
    sign = 1.0 if plan.objective == "min" else -1.0
    ordered = sorted(values, key=lambda key: (sign * values[key], key))
    top = ordered[: plan.stop.top]
    enough = len(top) == plan.stop.top
    return {
        "best": values[ordered[0]],
        "best_structure": ordered[0],
        "best_mean": float(np.mean([values[key] for key in top])) if enough else None,
    }


def _errors(decided: Round, values: dict[str, float]) -> dict[str, Any] | None:
    """Return how well the batch was predicted before it had labels."""
    pairs = [
        (pick.mean - values[pick.id], pick.std)
        for pick in decided.picks
        if pick.mean is not None and pick.id in values
    ]
    if not pairs:
        return None
    errors = np.array([error for error, _ in pairs])
    stds = [std for _, std in pairs]
    within = None
    if None not in stds:
        within = float((np.abs(errors) <= np.array(stds, dtype=np.float64)).mean())
    return {
        "n": len(pairs),
        "mae": float(np.abs(errors).mean()),
        "bias": float(errors.mean()),
        "within_1_std": within,
    }
