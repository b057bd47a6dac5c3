"""Report data of a screening: of constant size, however many candidates it has."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from nanoos_fw.errors import InputError
from nanoos_fw.reports.base import NotAvailable, ReportModel, Series, Text, plain
from nanoos_fw.reports.candidate_data import CrystalPicture
from nanoos_fw.reports.learning_data import CalibrationCurve

Counts = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(plain)]


class ScreenOutcome(ReportModel):
    """What became of some candidates: ``name``, in words ``reason``, and how many."""

    name: Text
    reason: Text
    count: PositiveInt


class ScreenModelPart(ReportModel):
    """One model of a screening, in the unit of its target.

    Parameters
    ----------
    reference, target, unit, sha256
        As the registry has them.
    edges, counts, outside
        Histogram of the predictions, and those of them out of the model's domain;
        empty without any.
    mean_std, mean_half_width
        Means over the predictions, if the model states them.
    calibration, n_test
        On the part that the training held out, if its rows are stored.
    test_mae
        There, if known.
    """

    reference: Text
    target: Text
    unit: str
    sha256: Text
    edges: Series
    counts: Counts
    outside: Counts
    mean_std: NonNegativeFloat | None
    mean_half_width: NonNegativeFloat | None
    test_mae: NonNegativeFloat | None
    calibration: CalibrationCurve | NotAvailable
    n_test: NonNegativeInt


class ScreenPrediction(ReportModel):
    """What one model says of one candidate."""

    mean: float
    std: NonNegativeFloat | None
    half_width: NonNegativeFloat | None
    out_of_domain: bool


class ScreenRow(ReportModel):
    """One of the best candidates; ``label`` is its name in a file or the store."""

    rank: PositiveInt
    candidate: NonNegativeInt
    label: str | None
    formula: Text
    n_sites: PositiveInt
    known_composition: bool
    predictions: tuple[ScreenPrediction, ...]
    structure: CrystalPicture | None


class ScreenPart(ReportModel):
    """A screening.

    Parameters
    ----------
    name, key, created
        As the store has them.
    n_candidates
        In all, screened or not.
    outcomes
        Of the screened ones, those that were predicted first.
    known
        Predicted candidates of a known composition.
    coverage
        Of the intervals.
    core_hours, core_hours_estimated
        Used by the chunks; and expected for all candidates when fireworks were
        submitted, if they were.
    rates
        Candidates per second and core over chunks: least, first decile, median, last
        decile, largest.
    models
        In the order of the screening.
    best
        The best-ranked candidates; empty without a prediction.
    n_ranked
        How many took part.
    ranked_by, tie_rule
        In words.
    found_at
        How many candidates were screened when the 1st, 2nd, ... of the best was met,
        in the order of the sequence; rising.
    n_discovered
        Of how many best these are.
    description
        Candidates and filters, as JSON.
    """

    name: Text
    key: Text
    created: str
    n_candidates: PositiveInt
    outcomes: tuple[ScreenOutcome, ...]
    known: NonNegativeInt
    coverage: float
    core_hours: NonNegativeFloat
    core_hours_estimated: NonNegativeFloat | None
    rates: tuple[float, float, float, float, float] | None
    models: Annotated[tuple[ScreenModelPart, ...], Field(min_length=1)]
    best: tuple[ScreenRow, ...]
    n_ranked: NonNegativeInt
    ranked_by: Text
    tie_rule: Text
    found_at: Annotated[tuple[PositiveInt, ...], BeforeValidator(plain)]
    description: str

    @model_validator(mode="after")
    def _adds_up(self) -> ScreenPart:
        if self.screened > self.n_candidates:
            raise InputError(
                f"screening {self.name}: more outcomes than candidates",
                evidence={"outcomes": self.screened, "candidates": self.n_candidates},
                advice="nanoos screen verify tells which come twice",
            )
        return self

    @property
    def screened(self) -> int:
        """Number of candidates with an outcome."""
        return sum(outcome.count for outcome in self.outcomes)

    @property
    def predicted(self) -> int:
        """Number of candidates with predictions."""
        return sum(o.count for o in self.outcomes if o.name == "predicted")

    @property
    def rate(self) -> float | None:
        """Candidates per second and core over all chunks."""
        return self.screened / (3600 * self.core_hours) if self.core_hours else None
