"""Report data of labels, training and evaluation, in the unit of the target."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from nanoos_fw.errors import InputError
from nanoos_fw.reports.base import (
    Epochs,
    NotAvailable,
    Quantity,
    ReportModel,
    Series,
    Text,
    require_lengths,
)


class Labels(ReportModel):
    """Formation energies that the model learns from.

    Parameters
    ----------
    energies_by_prototype
        Prototype name to formation energies, eV/atom.
    method
        How they were computed, as a phrase: "LAMMPS relaxation of cell and atoms
        with the potential ...".
    """

    energies_by_prototype: dict[str, Series]
    method: Text

    @model_validator(mode="after")
    def _has_values(self) -> Labels:
        require_lengths("labels", sum(map(len, self.energies_by_prototype.values())))
        return self


class MemberCurve(ReportModel):
    """Learning curve of one ensemble member.

    Parameters
    ----------
    member
        Number of the member, from 1.
    seed
        Seed of its initial weights and batch order.
    epochs
        ``(n,)`` epoch numbers, rising.
    train_loss
        ``(n,)`` training loss per epoch.
    validation_mae
        ``(n,)`` validation MAE per epoch, in the unit of the target.
    best_epoch
        Epoch whose weights were kept; one of ``epochs``.
    """

    member: PositiveInt
    seed: int
    epochs: Epochs
    train_loss: Series
    validation_mae: Series
    best_epoch: int

    @model_validator(mode="after")
    def _belongs_together(self) -> MemberCurve:
        require_lengths(
            f"learning curve of member {self.member}",
            len(self.epochs),
            train_loss=self.train_loss,
            validation_mae=self.validation_mae,
        )
        if self.best_epoch not in self.epochs:
            raise InputError(
                f"member {self.member} has no epoch {self.best_epoch} on its curve",
                evidence={"first": self.epochs[0], "last": self.epochs[-1]},
                advice="number best_epoch like epochs",
            )
        return self

    @property
    def best_validation_mae(self) -> float:
        """Validation MAE at the kept epoch, in the unit of the target."""
        return self.validation_mae[self.epochs.index(self.best_epoch)]


class AliasMove(ReportModel):
    """One move of an alias in the model registry.

    Parameters
    ----------
    alias
        Which alias.
    model
        Reference that it pointed at from then on; None: at no model.
    time, by, reason
        When (ISO 8601), who, why.
    """

    alias: Text
    model: str | None
    time: Text
    by: Text
    reason: str


class Training(ReportModel):
    """How the ensemble was trained.

    Parameters
    ----------
    members
        One curve per ensemble member.
    loss_name
        What ``train_loss`` is, with its unit: "mean squared error of the
        standardised target, no unit".
    n_train, n_validation, n_test
        Number of structures in each part.
    n_parameters
        Number of trainable parameters of one member, if known.
    model
        Its reference in the registry.
    moves
        Of the aliases of its name, oldest first.
    quantity
        That it predicts.
    """

    members: Annotated[tuple[MemberCurve, ...], Field(min_length=1)]
    loss_name: Text
    n_train: PositiveInt
    n_validation: NonNegativeInt
    n_test: NonNegativeInt
    n_parameters: PositiveInt | None = None
    model: str = ""
    moves: tuple[AliasMove, ...] = ()
    quantity: Quantity = Quantity()


class Scores(ReportModel):
    """Errors of one predictor on the test part.

    Parameters
    ----------
    name
        "mean of the training labels", "linear regression on composition".
    mae, rmse
        Mean absolute and root-mean-square error, in the unit of the target.
    r2
        Coefficient of determination; None if the targets do not vary.
    """

    name: Text
    mae: NonNegativeFloat
    rmse: NonNegativeFloat
    r2: float | None


class PredictionInterval(ReportModel):
    """A calibrated interval around each test prediction.

    Parameters
    ----------
    level
        Stated coverage, between 0 and 1.
    half_widths
        ``(n_test,)`` half widths, in the unit of the target.
    method
        "split conformal on the validation part".
    """

    level: Annotated[float, Field(gt=0, lt=1)]
    half_widths: Series
    method: Text


class CalibrationCurve(ReportModel):
    """How often intervals hold the truth, against how often they say they do.

    Parameters
    ----------
    levels
        ``(n,)`` stated coverages, rising, between 0 and 1.
    observed
        ``(n,)`` shares of the test structures inside.
    n_calibration
        Structures that the intervals go by.
    """

    levels: Series
    observed: Series
    n_calibration: PositiveInt

    @model_validator(mode="after")
    def _belongs_together(self) -> CalibrationCurve:
        require_lengths("calibration", len(self.levels), observed=self.observed)
        return self


class Evaluation(ReportModel):
    """The model on structures it has never seen.

    Parameters
    ----------
    targets, predictions
        ``(n_test,)`` in the unit of the target.
    uncertainties
        ``(n_test,)`` standard deviation stated by the model, or None.
    uncertainty_name
        "standard deviation over 4 ensemble members".
    mean_predictor
        Scores of always predicting the mean of the training labels.
    baselines
        Scores of other predictors on the same test part.
    interval
        A calibrated interval, if the screening uses one.
    calibration
        The same at other levels.
    formulas
        ``(n_test,)`` names shown on hover, or None.
    quantity
        That is predicted.
    """

    targets: Series
    predictions: Series
    uncertainties: Series | None
    uncertainty_name: str = ""
    mean_predictor: Scores | NotAvailable
    baselines: tuple[Scores, ...] = ()
    interval: PredictionInterval | None = None
    calibration: CalibrationCurve | None = None
    formulas: tuple[str, ...] | None = None
    quantity: Quantity = Quantity()

    @model_validator(mode="after")
    def _belongs_together(self) -> Evaluation:
        expected = len(self.targets)
        interval = self.interval.half_widths if self.interval else None
        require_lengths(
            "evaluation",
            expected,
            predictions=self.predictions,
            uncertainties=self.uncertainties,
            interval=interval,
        )
        if self.formulas is not None and len(self.formulas) != expected:
            raise InputError(
                f"evaluation: formulas must have {expected} values",
                evidence={"expected": expected, "formulas": len(self.formulas)},
            )
        negative = [u for u in self.uncertainties or () if u < 0]
        if negative:
            raise InputError(
                "evaluation: uncertainties are standard deviations, not negative",
                evidence={"negative": len(negative), "smallest": min(negative)},
            )
        return self


def regression_scores(name: str, targets: Series, predictions: Series) -> Scores:
    """Return MAE, RMSE and R² of predictions, in their unit.

    Parameters
    ----------
    name
        Name of the predictor.
    targets, predictions
        ``(n,)`` in one unit.

    Raises
    ------
    InputError
        If the lengths differ or there is no value.

    Notes
    -----
    R² = 1 - Σ(y - ŷ)² / Σ(y - ȳ)² with the mean of the targets given here, so that
    a mean predictor fitted elsewhere may fall below zero.
    """
    require_lengths(name, len(targets), predictions=predictions)
    y = np.asarray(targets, dtype=np.float64)
    error = np.asarray(predictions, dtype=np.float64) - y
    spread = float(np.sum((y - y.mean()) ** 2))
    return Scores(
        name=name,
        mae=float(np.mean(np.abs(error))),
        rmse=float(np.sqrt(np.mean(error**2))),
        r2=1.0 - float(np.sum(error**2)) / spread if np.ptp(y) > 0 else None,
    )
