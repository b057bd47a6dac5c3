"""Firetasks of a round of active learning: hand out, extend, train further, predict.

All name a campaign and a round; what they make is recorded with that round, so that any
of them can be run again at any time, in any order of rounds, with the same result.
"""

from __future__ import annotations

import json
import secrets
import shutil
from typing import Any

import numpy as np
from pydantic import Field

from nanoos_fw.errors import InputError
from nanoos_fw.firetasks.active_plan import ActivePlan, FileLabels, LammpsLabels
from nanoos_fw.firetasks.active_state import (
    RoundParameters,
    candidate_keys,
    free_candidates,
    known_set,
    label_source,
    open_round,
)
from nanoos_fw.firetasks.base import NanoTask, TaskContext
from nanoos_fw.firetasks.ml import TrainModelTask, predict_missing
from nanoos_fw.ml.datasets import adopt_dataset
from nanoos_fw.provenance import write_atomic
from nanoos_fw.stores.active import LabelValues, Round, label_values
from nanoos_fw.stores.datasets import TargetValues, build_from_targets
from nanoos_fw.structure_files.writing import SUFFIXES, structure_text

_MAX_LISTED = 20


class ExportBatchTask(NanoTask):
    """Write a batch to files, for labels that are made elsewhere."""

    _fw_name = "{{nanoos_fw.firetasks.ExportBatchTask}}"
    parameters_model = RoundParameters
    parameters: RoundParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Write one file for each candidate, and a list of them."""
        opened = open_round(place, self.parameters)
        plan, decided = opened.plan, opened.decided
        assert isinstance(plan.labels, FileLabels)
        folder = place.work_root / "batches" / plan.name / f"{decided.number:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        stored = place.structures.get_many(decided.batch)
        rows = []
        for pick in decided.picks:
            entry = stored[pick.id]
            name = f"{pick.id}{SUFFIXES[plan.labels.format]}"
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
        opened.record("waiting", {"folder": str(folder)})
        return {"folder": str(folder), "files": len(rows)}


class ExtendDatasetTask(NanoTask):
    """Freeze the labels up to a round into a dataset with its own hash."""

    _fw_name = "{{nanoos_fw.firetasks.ExtendDatasetTask}}"
    parameters_model = RoundParameters
    parameters: RoundParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Collect, check how many labels the batch has, and build."""
        opened = open_round(place, self.parameters)
        plan, decided = opened.plan, opened.decided
        source = label_source(place, plan)
        keys = place.structures.keys(known_set(plan))
        keys += [key for r in (*opened.before, decided) for key in r.batch]
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
        opened.record("dataset", record)
        if opened.is_last:
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
        opened = open_round(place, self.parameters)
        plan, number = opened.plan, opened.decided.number
        dataset = opened.decided.dataset
        if dataset is None:
            raise InputError(
                f"round {number} of campaign {plan.name!r} has no dataset yet"
            )
        parent = None
        if number > 0 and plan.retraining.warm_start:
            before = opened.before[-1].model
            if before is None:
                raise InputError(
                    f"round {number - 1} of campaign {plan.name!r} has no "
                    "model to train further"
                )
            parent = str(before["reference"])
        answer = TrainModelTask(
            dataset_dir=str(place.work_dir("datasets", dataset["hash"])),
            dataset_hash=dataset["hash"],
            model_name=plan.model_name,
            training=plan.training_of(number).model_dump(mode="json"),
            parent=parent,
        ).run(place)
        record = place.models.get(str(answer["model"]))
        metrics = {
            part: {name: found.get(name) for name in ("n", "mae", "rmse", "r2")}
            for part, found in record.metrics.items()
            if part in ("train", "val", "test")
        }
        opened.record(
            "model",
            {"reference": record.reference, "parent": parent, "metrics": metrics},
        )
        if opened.is_last:
            place.models.activate(
                record.reference,
                reason=f"round {number} of campaign {plan.name}",
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
        opened = open_round(place, parameters)
        plan, model = opened.plan, opened.decided.model
        if model is None:
            raise InputError(
                f"round {parameters.round} of campaign {plan.name!r} has no model yet"
            )
        window = candidate_keys(place, plan)[parameters.start : parameters.stop]
        free = set(free_candidates(place, plan, [*opened.before, opened.decided]))
        return predict_missing(
            place,
            str(model["reference"]),
            [key for key in window if key in free],
            plan.features,
        )


# ------------------------------------------------------------------------- private


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
