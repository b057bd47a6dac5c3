"""What came of a training: the ensemble's files, and how good it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.datasets import PARTS, Dataset
from nanoos_fw.ml.ensembles import (
    dropout_spread,
    ensemble,
    has_dropout,
    predict_table,
)
from nanoos_fw.ml.forest_fitting import fit_forest
from nanoos_fw.ml.graph_scalars import graph_scalars
from nanoos_fw.ml.metrics import (
    calibrate,
    classification_metrics,
    element_errors,
    regression_metrics,
)
from nanoos_fw.ml.model_files import save_checkpoint
from nanoos_fw.ml.training_config import TrainingConfig
from nanoos_fw.ml.training_plan import TrainingPlan
from nanoos_fw.ml.uncertainty import (
    DEFAULT_COVERAGE,
    DROPOUT_SAMPLES,
    Spread,
    Uncertainty,
    fit_uncertainty,
)
from nanoos_fw.provenance import run_environment

if TYPE_CHECKING:
    from nanoos_fw.ml.fitting import Fit

CHECKPOINT = "model.safetensors"
LAST_CHECKPOINT = "model-last.safetensors"


def finish_training(
    training: TrainingConfig,
    plan: TrainingPlan,
    dataset: Dataset,
    table: GraphTable,
    fits: list[Fit],
    work_dir: Path,
) -> dict[str, Any]:
    """Write the ensemble and judge it (rank 0)."""
    card, reference, atom_table = plan.card, plan.reference, plan.atom_table
    for fit in fits:
        fit.use_last()
    last = work_dir / LAST_CHECKPOINT
    last_digest = save_checkpoint(
        last, card, [fit.weights() for fit in fits], atom_table, reference
    )
    for fit in fits:
        fit.use_best()
    networks = [fit.network.cpu() for fit in fits]
    members = predict_table(networks, card, reference, table)
    _check_finite(members, training)
    mean, std = ensemble(members)
    passes = -(-DROPOUT_SAMPLES // len(networks)) if has_dropout(networks) else 0
    if passes:
        std = dropout_spread(
            networks, card, reference, table, passes=passes, seed=training.seed
        )
    uncertainty = _uncertainty(training, dataset, table, mean, std, passes)
    half_width = uncertainty.half_width(
        np.zeros(len(mean)) if std is None else std, DEFAULT_COVERAGE
    )
    val = dataset.rows("val")
    if std is not None and len(val):
        scale = calibrate(dataset.targets[val], mean[val], std[val])
        card = card.model_copy(update={"uncertainty_scale": scale})
        std = scale * std
    path = work_dir / CHECKPOINT
    weights = [network.state_dict() for network in networks]
    digest = save_checkpoint(path, card, weights, atom_table, reference, uncertainty)
    metrics = _by_part(dataset, mean, std, half_width)
    if training.classes:
        for part in PARTS:
            rows = dataset.rows(part)
            metrics[part] |= classification_metrics(dataset.targets[rows], mean[rows])
    return {
        "target": training.target,
        "unit": dataset.unit,
        "checkpoint": str(path),
        "checkpoint_sha256": digest,
        "last_checkpoint": str(last),
        "last_checkpoint_sha256": last_digest,
        "dataset_hash": dataset.dataset_hash,
        "config": training.model_dump(mode="json"),
        "curves": [
            {"member": fit.member, "epochs": fit.history.epochs, **vars(fit.history)}
            for fit in fits
        ],
        "metrics": metrics,
        "uncertainty_scale": card.uncertainty_scale,
        "predictions": {
            part: [
                {
                    "structure_id": dataset.ids[row],
                    "target": float(dataset.targets[row]),
                    "mean": float(mean[row]),
                    "std": None if std is None else float(std[row]),
                    "half_width": (
                        None if half_width is None else float(half_width[row])
                    ),
                    "members": members[:, row].tolist(),
                }
                for row in dataset.rows(part)
            ]
            for part in PARTS[1:]
        },
        "per_element": {
            part: element_errors(
                plan.fractions[dataset.rows(part)],
                (mean - dataset.targets)[dataset.rows(part)],
            )
            for part in PARTS[1:]
        },
        "parent": _ancestry(training),
        "n_parameters": sum(p.numel() for p in networks[0].parameters()),
        "environment": run_environment(),
    }


def judge_baselines(
    training: TrainingConfig, plan: TrainingPlan, dataset: Dataset, table: GraphTable
) -> dict[str, Any]:
    """Judge what is simpler on the same parts."""
    constant = np.full(dataset.num_samples, dataset.target_mean)
    found = {
        "mean": _by_part(dataset, constant, None),
        "composition": _by_part(dataset, plan.fractions @ plan.composition, None),
    }
    if training.forest_baseline:
        train = dataset.rows("train")
        forest = fit_forest(
            graph_scalars(table.select(train)),
            dataset.targets[train],
            training.seed,
            target_property=training.target,
            unit=dataset.unit,
            dataset_hash=dataset.dataset_hash,
            mock_targets=dataset.mock_targets,
        )
        said, std = forest.predict_features(graph_scalars(table))
        half_width = None if training.classes else forest.half_width(std)
        found["forest"] = _by_part(dataset, said, std, half_width)
    return found


# ------------------------------------------------------------------------- private


def _check_finite(members: NDArray[np.float64], training: TrainingConfig) -> None:
    """Refuse a model that answers by what is no number, such as after a last step."""
    wrong = ~np.isfinite(members).all(axis=1)
    if wrong.any():
        raise InputError(
            f"training of member {int(np.flatnonzero(wrong)[0])} diverged: its "
            "predictions are not finite",
            evidence={"learning_rate": training.learning_rate},
            advice="lower learning_rate, or set clip_norm",
        )


def _ancestry(training: TrainingConfig) -> dict[str, Any] | None:
    if training.parent_sha256 is None:
        return None
    return {
        "sha256": training.parent_sha256,
        "frozen": list(training.freeze),
        "normalizer": training.normalizer,
    }


def _uncertainty(
    training: TrainingConfig,
    dataset: Dataset,
    table: GraphTable,
    mean: NDArray[np.float64],
    spread: NDArray[np.float64] | None,
    passes: int,
) -> Uncertainty:
    source: Spread = "ensemble" if training.ensemble_size > 1 else "none"
    if passes:
        source = "mc_dropout" if source == "none" else "ensemble+mc_dropout"
    found = fit_uncertainty(
        table,
        mean - dataset.targets,
        spread,
        dataset.rows("train"),
        dataset.rows("val"),
        source=source,
        dropout_passes=passes,
        seed=training.seed,
    )
    if not training.classes:
        return found
    # The truth is a label, which an interval around a probability says nothing of.
    card = found.card.model_copy(update={"n_calibration": 0})
    return replace(found, card=card, scores=np.zeros(0))


def _by_part(
    dataset: Dataset,
    mean: NDArray[np.float64],
    std: NDArray[np.float64] | None,
    half_width: NDArray[np.float64] | None = None,
) -> dict[str, dict[str, float | int | None]]:
    metrics = {}
    for part in PARTS:
        rows = dataset.rows(part)
        error_bar = None if std is None else std[rows]
        metrics[part] = regression_metrics(dataset.targets[rows], mean[rows], error_bar)
        if half_width is not None and len(rows):
            held = np.abs(mean[rows] - dataset.targets[rows]) <= half_width[rows]
            metrics[part]["within_interval"] = float(held.mean())
    return metrics
