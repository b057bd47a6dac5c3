"""How far a prediction can be trusted: spread, calibrated intervals, distance.

Three answers beside a prediction. The *spread* of an ensemble, or of one network
with dropout switched on, says where the model is unsure. A *conformal interval* turns
it into a width that holds the truth with a stated probability, as far as new
structures are drawn like those of the validation part. The *distance* to the training
structures says where that premise fails.

What the flag for the domain means: an element that training did not hold, or a
distance, in composition and coordination, that at most about a twentieth of structures
like the training set has. Measured on left-out chemistries
(``scripts/benchmarks/domain.py``), the distance alone finds a minority of them: a
structure without the flag is not known to be in the domain, and one with it need not be
predicted badly. The larger of this distance and that in the network's own vectors,
flagging as many of the validation part, found more of some chemistries left out and
fewer of others, so it is not the rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from nanoos_fw.errors import InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.descriptors import describe_graphs, nearest_distance

Spread = Literal["none", "ensemble", "mc_dropout", "ensemble+mc_dropout"]

DEFAULT_COVERAGE = 0.9
DROPOUT_SAMPLES = 32
_MAX_SCORES = 8192
_MAX_REFERENCES = 4096
_NEIGHBORS = 3
_IN_DOMAIN = 0.95
_FLOORS = (0.1, 0.3, 1.0, 3.0, 10.0, 100.0)  # in units of the median spread
_SCORES, _REFERENCES = "uncertainty.scores", "uncertainty.references"
_CENTRE, _SCALE = "uncertainty.centre", "uncertainty.scale"


class UncertaintyCard(BaseModel):
    """The numbers of an :class:`Uncertainty` that a model card holds.

    Parameters
    ----------
    spread
        Where the spread comes from.
    dropout_passes, seed
        Forward passes of each member with dropout on, and the seed of their masks.
    floor
        Added to the spread before errors are divided by it, in the unit of the
        target: a row whose members happen to agree must not get a width of zero. See
        :func:`normalized_scores`.
    domain_neighbors, domain_threshold
        A structure is out of domain if its mean distance to this many nearest
        training structures is larger than this: a twentieth of structures like those
        of the training are. The threshold is conformal on the validation part.
    n_calibration
        Validation rows that the intervals go by.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spread: Spread
    dropout_passes: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)
    floor: float = Field(gt=0.0)
    domain_neighbors: int = Field(ge=1)
    domain_threshold: float = Field(ge=0.0)
    n_calibration: int = Field(ge=0)


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of many structures, in the unit of the target.

    Parameters
    ----------
    mean
        ``(n,)``.
    std
        ``(n,)``, calibrated spread; None if the model has none.
    half_width
        ``(n,)``: the truth is within ``mean ± half_width`` with probability
        ``coverage``; None if the model was not calibrated, or on too few rows for
        this coverage.
    coverage
        Asked for.
    distance
        ``(n,)``, mean distance to the nearest training structures, in standard
        deviations of the training part per descriptor; None without reference.
    unseen_elements
        Of each structure, the elements that training did not hold.
    out_of_domain
        ``(n,) bool``: unseen elements, or too far from the training structures.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64] | None
    half_width: NDArray[np.float64] | None
    coverage: float
    distance: NDArray[np.float64] | None
    unseen_elements: list[list[str]]
    out_of_domain: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """What turns the spread of a model into intervals, and knows its domain.

    Parameters
    ----------
    card
        The numbers.
    scores
        ``(m,) float64``, sorted: errors of validation rows over (spread + floor).
    references
        ``(r, d) float32``, standardized descriptors of training structures.
    centre, scale
        ``(d,) float64``, which standardize a descriptor.

    Notes
    -----
    Split conformal prediction with normalized scores. With m exchangeable rows the
    k-th smallest score, k = ceil((m + 1) coverage), bounds that of a new row with a
    probability of at least ``coverage`` and at most ``coverage + 1/(m + 1)``. The
    validation part also chose the best epoch, so the errors on it are slightly
    small; the test part judges what that costs.

    References
    ----------
    A. N. Angelopoulos, S. Bates, arXiv:2107.07511 (2021).
    """

    card: UncertaintyCard
    scores: NDArray[np.float64]
    references: NDArray[np.float32]
    centre: NDArray[np.float64]
    scale: NDArray[np.float64]

    def half_width(
        self, spread: NDArray[np.float64], coverage: float
    ) -> NDArray[np.float64] | None:
        """Return half the width of the interval, ``(n,)``, in the unit of the target.

        None if there are too few calibration rows for the coverage: no finite width
        could promise it.
        """
        factor = conformal_quantile(self.scores, coverage)
        return None if factor is None else factor * (spread + self.card.floor)

    def distance(self, table: GraphTable) -> NDArray[np.float64]:
        """Return the mean distance of graphs to the nearest training structures.

        ``(n,)``: root mean square over the descriptors, each in standard deviations
        of the training part.
        """
        vectors = (describe_graphs(table) - self.centre) / self.scale
        return nearest_distance(
            vectors.astype(np.float32), self.references, self.card.domain_neighbors
        )

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the arrays under the names they have in a checkpoint."""
        return {
            _SCORES: self.scores,
            _REFERENCES: self.references,
            _CENTRE: self.centre,
            _SCALE: self.scale,
        }

    @classmethod
    def from_tensors(
        cls, card: UncertaintyCard, tensors: Mapping[str, NDArray[Any]]
    ) -> Uncertainty:
        """Put a stored one together; the tensors may hold others, too.

        Raises
        ------
        KeyError
            If an array is missing.
        """
        return cls(
            card=card,
            scores=tensors[_SCORES],
            references=tensors[_REFERENCES],
            centre=tensors[_CENTRE],
            scale=tensors[_SCALE],
        )


def fit_uncertainty(
    table: GraphTable,
    errors: NDArray[np.float64],
    spread: NDArray[np.float64] | None,
    train: NDArray[np.int64],
    val: NDArray[np.int64],
    *,
    source: Spread,
    dropout_passes: int = 0,
    seed: int = 0,
) -> Uncertainty:
    """Calibrate intervals on the validation part and learn the domain of training.

    Parameters
    ----------
    table
        All graphs.
    errors
        ``(n,)``, prediction minus truth of each row, in the unit of the target; only
        those of validation rows are used.
    spread
        ``(n,)`` of each row, not scaled, or None: all intervals are then equally
        wide.
    train, val
        Row numbers. Without validation rows there are no intervals.
    source, dropout_passes, seed
        See :class:`UncertaintyCard`; the seed also chooses which rows stand for all
        if there are more than a checkpoint should hold.
    """
    rng = np.random.default_rng([seed, 0x0D])
    floor, scores = normalized_scores(
        errors[val], None if spread is None else spread[val], rng
    )
    vectors = describe_graphs(table.select(np.concatenate([train, val])))
    known, held = vectors[: len(train)], vectors[len(train) :]
    centre, scale = _standard(known)
    references = _some(((known - centre) / scale).astype(np.float32), rng)
    k = max(1, min(_NEIGHBORS, len(references) - 1))
    judged = ((held - centre) / scale).astype(np.float32)
    distances = np.sort(nearest_distance(judged, references, k))
    threshold = conformal_quantile(distances, _IN_DOMAIN)
    if threshold is None:  # too few validation rows
        threshold = _threshold_within(references, k)
    return Uncertainty(
        card=UncertaintyCard(
            spread=source,
            dropout_passes=dropout_passes,
            seed=seed,
            floor=floor,
            domain_neighbors=k,
            domain_threshold=threshold,
            n_calibration=len(scores),
        ),
        scores=scores,
        references=references,
        centre=centre,
        scale=scale,
    )


def calibrate_uncertainty(
    table: GraphTable,
    errors: NDArray[np.float64],
    spread: NDArray[np.float64] | None,
    *,
    source: Spread,
    dropout_passes: int = 0,
    seed: int = 0,
) -> Uncertainty:
    """Calibrate a model, whose training is not known, on labelled structures.

    The intervals then hold for structures like these, and the domain is theirs: the
    distance is to them.

    Parameters
    ----------
    table
        Structures that the model was not trained on.
    errors, spread
        ``(n,)`` as in :func:`fit_uncertainty`, of every row.
    source, dropout_passes, seed
        See :func:`fit_uncertainty`.
    """
    rng = np.random.default_rng([seed, 0x0D])
    floor, scores = normalized_scores(errors, spread, rng)
    vectors = describe_graphs(table)
    centre, scale = _standard(vectors)
    references = _some(((vectors - centre) / scale).astype(np.float32), rng)
    k = max(1, min(_NEIGHBORS, len(references) - 1))
    return Uncertainty(
        card=UncertaintyCard(
            spread=source,
            dropout_passes=dropout_passes,
            seed=seed,
            floor=floor,
            domain_neighbors=k,
            domain_threshold=_threshold_within(references, k),
            n_calibration=len(scores),
        ),
        scores=scores,
        references=references,
        centre=centre,
        scale=scale,
    )


def normalized_scores(
    errors: NDArray[np.float64],
    spread: NDArray[np.float64] | None,
    rng: np.random.Generator,
) -> tuple[float, NDArray[np.float64]]:
    """Return the floor of a spread, and the errors over (spread + floor), sorted.

    Parameters
    ----------
    errors
        ``(n,)``, prediction minus truth of rows that were not learned.
    spread
        ``(n,)``, not scaled; None: all rows have a width of 1.
    rng
        Chooses which scores stand for all if there are more than a file should hold.

    Returns
    -------
    floor, scores
        ``floor`` in the unit of the target, ``scores`` ``(m,)``.

    Notes
    -----
    How much the spread says is to be found out: that of two members is close to zero
    by chance on many rows, whose errors are then divided by next to nothing, and the
    quantile, with it all intervals, becomes several times too wide. So the floor is
    the one of a few multiples of the median spread, from a tenth (the spread decides)
    to a hundred (all widths are alike), under which the errors are likeliest, as
    Laplace variables of scale proportional to spread + floor. One number from six,
    chosen by likelihood and not by width, costs next to no coverage.
    """
    if spread is None or not len(errors):
        floor, width = 1.0, np.ones(len(errors))
    else:
        floor = _floor_of(errors, spread)
        width = spread + floor
    scores = np.sort(np.abs(errors) / width)
    if len(scores) > _MAX_SCORES:
        scores = np.sort(rng.choice(scores, _MAX_SCORES, replace=False))
    return floor, scores


def conformal_quantile(
    scores: NDArray[np.float64], coverage: float = DEFAULT_COVERAGE
) -> float | None:
    """Return the score that a new one stays below with probability ``coverage``.

    Parameters
    ----------
    scores
        ``(m,)``, sorted.
    coverage
        Between 0 and 1.

    Returns
    -------
    float or None
        The k-th smallest score, k = ceil((m + 1) coverage); None if k > m.
    """
    if not 0.0 < coverage < 1.0:
        raise InputError(f"coverage must be between 0 and 1, not {coverage}")
    # 10 * 0.9 may come out above 9; a rank must not depend on that.
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return None if rank > len(scores) else float(scores[rank - 1])


# ------------------------------------------------------------------------- private


def _floor_of(errors: NDArray[np.float64], spread: NDArray[np.float64]) -> float:
    """Return the floor under which errors follow spread + floor most likely."""
    size = np.abs(errors)
    least = 1e-9 * max(1.0, float(size.max()))
    best, answer = math.inf, least
    for factor in _FLOORS:
        floor = max(factor * float(np.median(spread)), least)
        width = spread + floor
        # Minus the likelihood of a Laplace distribution, at its most likely scale.
        unlikely = float(np.log(width).mean())
        unlikely += math.log(max(float((size / width).mean()), 1e-300))
        if unlikely < best:
            best, answer = unlikely, floor
    return answer


def _threshold_within(references: NDArray[np.float32], k: int) -> float:
    """Return the distance that a twentieth of structures is beyond, from the others."""
    distances = nearest_distance(references, references, k, skip_self=True)
    return float(np.quantile(distances, _IN_DOMAIN))


def _standard(
    vectors: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    centre, scale = vectors.mean(axis=0), vectors.std(axis=0)
    # A descriptor that hardly varies in training still tells when it does elsewhere.
    return centre, np.maximum(scale, 0.01 * np.maximum(np.abs(centre), 1.0))


def _some(
    references: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    if len(references) <= _MAX_REFERENCES:
        return references
    chosen = rng.choice(len(references), _MAX_REFERENCES, replace=False)
    return references[np.sort(chosen)]
