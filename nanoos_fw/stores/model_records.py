"""What the model registry knows of a version, and how versions compare."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nanoos_fw.errors import InputError

logger = logging.getLogger(__name__)

Storage = Literal["gridfs", "file", "none"]

PARTS = ("val", "test")
_HIGHER_IS_BETTER = frozenset(
    {"r2", "accuracy", "auc", "roc_auc", "f1", "precision", "recall"}
)
# Shares that are right at a value of their own, and counts.
_NO_MERIT = frozenset({"n", "within_interval", "within_1_std", "within_2_std"})
MOCK_TARGETS = "mock_targets"


class ModelRecord(BaseModel):
    """One immutable version of a model.

    ``is_active`` alone is no part of the version: it tells where the alias
    ``active`` pointed when the record was read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str
    version: int = Field(ge=0, description="from 1; 0 is a name without weights")
    target: str
    unit: str
    model_type: str
    sha256: str | None = Field(
        description="SHA-256 of the weights; also their artifact"
    )
    checkpoint_path: str = Field(
        description="where training left the weights; with storage 'file', the weights"
    )
    storage: Storage = Field(default="gridfs", description="where the weights are")
    training_key: str = Field(description="content key of data, settings and code")
    training_config: dict[str, Any]
    metrics: dict[str, Any]
    dataset_info: dict[str, Any]
    environment: dict[str, Any]
    details: str | None = Field(
        default=None, description="artifact: learning curves and test predictions"
    )
    parent: str | None = None
    is_system_provided: bool = False
    removed: str | None = Field(
        default=None, description="when the weights were taken out, to save space"
    )
    created: str
    is_active: bool = False

    @property
    def reference(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def has_weights(self) -> bool:
        """False for a declared system model, and after its weights were removed."""
        return self.storage != "none" and self.removed is None

    @property
    def has_mock_targets(self) -> bool:
        """True if it was trained on numbers that are not measured or computed."""
        config = self.dataset_info.get("config") or {}
        return bool(self.dataset_info.get(MOCK_TARGETS) or config.get(MOCK_TARGETS))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-compatible values."""
        return self.model_dump(mode="json")


def metric_of(record: ModelRecord, metric: str, part: str) -> float | None:
    """Return a metric of a part (``val``, ``test``); None where there is no number."""
    value = (record.metrics.get(part) or {}).get(metric)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def higher_is_better(metric: str) -> bool:
    """Tell which way a metric is good."""
    return metric in _HIGHER_IS_BETTER


def says_which_is_better(metric: str) -> bool:
    """Tell whether models can be ordered by a metric."""
    return metric not in _NO_MERIT


def best_model(
    records: Sequence[ModelRecord],
    metric: str,
    *,
    target: str | None = None,
    part: str | None = None,
) -> ModelRecord:
    """Return the version with the best metric; a tie goes to the first.

    Parameters
    ----------
    records
        To choose from.
    metric, part
        As in :meth:`nanoos_fw.stores.models.ModelRegistry.best`.
    target
        That of all records, for messages.

    Raises
    ------
    InputError
        If none states the metric, their targets or units differ, or the metric is
        none that is good high or low.
    """
    if not says_which_is_better(metric):
        raise InputError(
            f"{metric} does not say which model is better",
            advice="take mae, rmse, mse, r2, accuracy, roc_auc or nll",
        )
    parts = PARTS if part is None else (part,)
    stated: list[ModelRecord] = []
    judged = parts[0]
    for judged in parts:
        stated = [r for r in records if metric_of(r, metric, judged) is not None]
        if stated:
            break
    if not stated:
        raise InputError(
            f"no model states {metric} of {' or '.join(parts)}"
            + (f" for target {target!r}" if target else ""),
            evidence={"models": [r.reference for r in records[:20]]},
            advice="see 'nanoos models list --json' for what is stated",
        )
    targets = sorted({record.target for record in stated})
    if len(targets) > 1:
        raise InputError(
            f"the {metric} of different targets cannot be compared: "
            f"{', '.join(targets)}",
            advice=f"name one, as in best:{metric}:{targets[0]}",
        )
    units = sorted({record.unit for record in stated})
    if len(units) > 1:
        raise InputError(
            f"the {metric} in different units cannot be compared: "
            f"{', '.join(unit or 'none' for unit in units)}",
            evidence={"models": {r.reference: r.unit for r in stated[:20]}},
            advice="compare models of one unit, named by name@version",
        )
    datasets = {record.dataset_info.get("dataset_hash") for record in stated}
    if len(datasets) > 1:
        logger.warning(
            "the %s of %d models were measured on %d datasets: they are not "
            "strictly comparable",
            metric,
            len(stated),
            len(datasets),
        )
    return min(stated, key=lambda record: merit(record, metric, judged))


def compare_models(
    records: Sequence[ModelRecord], metric: str = "mae", part: str = "val"
) -> dict[str, Any]:
    """Return versions side by side.

    Parameters
    ----------
    records
        At least one.
    metric, part
        Sorted by these, the best first.

    Returns
    -------
    dict
        ``models``: rows of ``model``, ``metrics`` (part -> mae, rmse, r2; None where
        not stated), ``dataset``, ``active``; ``differences``: setting -> its value in
        each row, where they are not alike; ``warnings``: why numbers cannot be
        compared.
    """
    ordered = sorted(records, key=lambda record: merit(record, metric, part))
    names = dict.fromkeys(("mae", "rmse", "r2", metric))
    settings = {name: None for r in ordered for name in r.training_config}
    values = {
        name: [record.training_config.get(name) for record in ordered]
        for name in settings
    }
    warnings = []
    for what, found in (
        ("targets", [record.target for record in ordered]),
        ("units", [record.unit for record in ordered]),
        ("datasets", [record.dataset_info.get("dataset_hash") for record in ordered]),
    ):
        if any(value != found[0] for value in found):
            warnings.append(f"different {what}: the errors cannot be compared")
    return {
        "models": [
            {
                "model": record.reference,
                "metrics": {
                    p: {name: metric_of(record, name, p) for name in names}
                    for p in PARTS
                },
                "dataset": record.dataset_info.get("dataset_hash"),
                "active": record.is_active,
            }
            for record in ordered
        ],
        "differences": {
            name: row for name, row in values.items() if any(v != row[0] for v in row)
        },
        "warnings": warnings,
    }


def merit(record: ModelRecord, metric: str, part: str) -> tuple[bool, float]:
    """Return what sorts the best first, and last what does not state the metric."""
    value = metric_of(record, metric, part)
    sign = -1.0 if higher_is_better(metric) else 1.0
    return (True, 0.0) if value is None else (False, sign * value)
