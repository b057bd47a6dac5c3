"""Intervals for models that came without: conformal on labelled structures.

Published weights say nothing of their errors, and a model may be used on other
structures than it was trained for. Errors on labelled structures that it has not
learned give both kinds intervals with a stated coverage, for structures like these.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanoos_fw.errors import InputError
from nanoos_fw.ml.datasets import Dataset
from nanoos_fw.ml.forest import ForestModel
from nanoos_fw.ml.graph_scalars import graph_scalars
from nanoos_fw.ml.metrics import calibrate
from nanoos_fw.ml.network_models import NetworkModel
from nanoos_fw.ml.predictors import PropertyModel
from nanoos_fw.ml.uncertainty import (
    DEFAULT_COVERAGE,
    Spread,
    calibrate_uncertainty,
)

MIN_ROWS = 20


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Parameters
    ----------
    sha256
        Of the file of the calibrated model.
    parts, n
        Of the dataset, and its rows in them.
    mae
        On these rows, in the unit of the target.
    coverage, mean_half_width
        Of the intervals, ``mean_half_width`` in the unit of the target. They hold
        this share of the rows by construction: how they hold elsewhere, only other
        structures can tell.
    """

    sha256: str
    parts: tuple[str, ...]
    n: int
    mae: float
    coverage: float
    mean_half_width: float

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON-compatible values."""
        return {**asdict(self), "parts": list(self.parts)}


def calibrate_model(
    model: PropertyModel,
    dataset: Dataset,
    path: Path,
    *,
    learned: Collection[str] = (),
) -> Calibration:
    """Write a model with intervals that go by its errors on a dataset.

    Parameters
    ----------
    model
        Network or forest of this project. Weights and predictions stay as they are.
    dataset
        Of the model's target, in its unit, with graphs built as it wants them. All
        rows count, but of the dataset that the model was trained on only the
        validation part: errors on rows it has learned are too small.
    path
        File to write.
    learned
        Hashes of other datasets whose training parts it has learned, such as that of
        a model it was trained from.

    Raises
    ------
    InputError
        If dataset and model do not fit, there are too few rows, or the model
        predicts classes, whose probabilities have no intervals.

    References
    ----------
    A. N. Angelopoulos, S. Bates, arXiv:2107.07511 (2021).
    """
    if not isinstance(model, NetworkModel | ForestModel) or model.card is None:
        raise InputError(
            f"{model.model_type} models state their uncertainty themselves",
            advice="calibrate networks and forests",
        )
    _check(model, dataset)
    parts: tuple[str, ...] = ("train", "val", "test", "outlier")
    if dataset.dataset_hash in {model.card.dataset_hash, *learned}:
        parts = ("val",)
    rows = np.concatenate([dataset.rows(part) for part in parts])
    if len(rows) < MIN_ROWS:
        raise InputError(
            f"{len(rows)} rows are too few for a calibration, which needs {MIN_ROWS}",
            evidence={"parts": list(parts)},
            advice="label more structures that the model was not trained on",
        )
    table, truth = dataset.graphs.select(np.sort(rows)), dataset.targets[np.sort(rows)]
    if isinstance(model, ForestModel):
        mean, std = model.predict_features(graph_scalars(table))
        if model.n_members < 2:
            raise InputError("a forest of one tree has no spread to calibrate")
        spread = std / model.card.uncertainty_scale
        judged = model.calibrated(mean - truth, spread)
        digest = judged.save(path)
        half_width = judged.half_width(judged.card.uncertainty_scale * spread)
    else:
        mean, known = model.mean_and_spread(model.prepare(table))
        old = model.uncertainty
        source: Spread = "none" if model.n_members < 2 else "ensemble"
        uncertainty = calibrate_uncertainty(
            table,
            mean - truth,
            known,
            source=source if old is None else old.card.spread,
            dropout_passes=0 if old is None else old.card.dropout_passes,
            seed=0 if old is None else old.card.seed,
        )
        scale = 1.0 if known is None else calibrate(truth, mean, known)
        digest = model.save(path, uncertainty, scale)
        half_width = uncertainty.half_width(
            np.zeros(len(mean)) if known is None else known, DEFAULT_COVERAGE
        )
    assert half_width is not None  # MIN_ROWS are enough for the coverage
    return Calibration(
        sha256=digest,
        parts=parts,
        n=len(rows),
        mae=float(np.abs(mean - truth).mean()),
        coverage=DEFAULT_COVERAGE,
        mean_half_width=float(half_width.mean()),
    )


# ------------------------------------------------------------------------- private


def _check(model: NetworkModel | ForestModel, dataset: Dataset) -> None:
    if dataset.mock_targets:
        raise InputError("mock targets cannot calibrate a model")
    target = dataset.config.target_property
    if target != model.target_property:
        raise InputError(
            f"the dataset holds {target!r}, the model predicts "
            f"{model.target_property!r}",
            advice="build a dataset of the model's target",
        )
    if dataset.unit != model.unit:
        raise InputError(
            f"the dataset is in {dataset.unit or 'no unit'}, the model in "
            f"{model.unit or 'no unit'}",
            advice="build the dataset with the model's unit",
        )
    if (
        isinstance(model, NetworkModel)
        and model.card is not None
        and model.card.classes
    ):
        raise InputError(
            f"model {model.model_name!r} predicts classes: their probabilities have "
            "no intervals"
        )
