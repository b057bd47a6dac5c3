"""How a dataset is made of labelled graphs."""

from __future__ import annotations

import math
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from nanoos_fw.ml.splits import SplitStrategy
from nanoos_fw.units import unit_of

_SCHEMA_VERSION = 1
_LATER_FIELDS = ("split", "n_folds", "fold", "mock_targets")


class DatasetConfig(BaseModel):
    """How a dataset is made of labelled graphs.

    Parameters
    ----------
    target_property
        Name of the target, such as ``"formation_energy_per_atom"``.
    train_fraction, val_fraction, test_fraction
        Shares of the rows; they add up to one.
    seed
        Chooses the split, together with the ids.
    min_samples
        Fewer rows are refused.
    iqr_factor
        Take rows out of the training part whose target is further than this many
        interquartile ranges from the quartiles (of the training part); None takes
        out none. Validation and test keep every row: they judge the model.
    unit
        Unit of the target; None looks it up in ``nanoos_fw.units``.
    split
        ``random``; ``composition`` keeps all rows of a reduced formula in one part;
        ``kfold`` and ``composition-kfold`` make the ``fold``-th of ``n_folds`` equal
        shares the test part (``test_fraction`` is not used) and divide the rest in
        the proportion of ``train_fraction`` to ``val_fraction``; ``time`` trains on
        the oldest rows and tests on the newest; ``stable`` lets a hash decide each row
        on its own, so that no row ever changes its part when others come, and the
        shares are met on average.
    mock_targets
        The targets are made up, to try a workflow out: what is trained on them
        predicts nothing and must never be activated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_property: str = Field(min_length=1)
    train_fraction: float = Field(default=0.8, gt=0.0, le=1.0)
    val_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    test_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    seed: int = Field(default=0, ge=0)
    min_samples: int = Field(default=10, ge=1)
    iqr_factor: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    unit: str | None = None
    split: SplitStrategy = "random"
    n_folds: int = Field(default=5, ge=2)
    fold: int = Field(default=0, ge=0)
    mock_targets: bool = False
    schema_version: int = Field(default=_SCHEMA_VERSION, ge=1, le=_SCHEMA_VERSION)

    @property
    def target_unit(self) -> str:
        """Unit of the target; empty if nobody has said it."""
        return unit_of(self.target_property) if self.unit is None else self.unit

    @model_validator(mode="after")
    def _fractions_add_up(self) -> DatasetConfig:
        total = self.train_fraction + self.val_fraction + self.test_fraction
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            raise ValueError(
                f"train, val and test fractions add up to {total:.6g}, not 1"
            )
        if self.fold >= self.n_folds:
            raise ValueError(f"fold {self.fold} is not below n_folds {self.n_folds}")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Keys of datasets and plans hash this: what is at its default is left out,
        # as it was before there was a choice.
        values: dict[str, Any] = handler(self)
        for name in _LATER_FIELDS:
            if values[name] == type(self).model_fields[name].default:
                del values[name]
        return values
