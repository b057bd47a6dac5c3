"""Which candidates to label next: acquisition functions, in batches that differ.

A batch is chosen from predictions of one model. The score of a candidate is the larger
the more it is worth a label; candidates are then taken one at a time, and what was
taken lowers the worth of what is like it. Nothing depends on the order of the
candidates: equal scores are decided by the id, the lower one first, and random numbers
by a hash of seed and id.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from nanoos_fw.errors import InputError
from nanoos_fw.ml.ranking import expected_improvement, normal_of
from nanoos_fw.provenance import content_key

Floats = NDArray[np.float64]
Objective = Literal["min", "max"]
AcquisitionName = Literal["ucb", "ei", "thompson", "mean", "uncertainty", "random"]
Diversity = Literal["variance", "k-centre", "none"]

_HASH_DIGITS = 15  # hexadecimal, of a number below 2^60
_LENGTH_ROWS = 2000
_JITTER = 1e-9


class Selection(BaseModel):
    """How a batch is chosen.

    Parameters
    ----------
    size
        Candidates of a batch.
    acquisition
        ``mean``: the best prediction. ``ucb``: the optimistic end of the prediction,
        ``kappa`` standard deviations from it. ``ei``: expected improvement on the best
        label [1]_. ``thompson``: a draw from N(mean, std²) for each candidate [2]_.
        ``uncertainty``: the largest standard deviation. ``random``: by a hash.
    kappa
        Of ``ucb``.
    diversity
        ``variance``: taking a candidate lowers the standard deviation of those like it
        as its label would in a Gaussian process, before the next is taken [3]_;
        without effect on ``mean``, ``thompson`` and ``random``, whose scores hold no
        deviation. ``k-centre``: of the best ``pool_factor`` times ``size``
        candidates, the best, then always the one farthest from all taken and
        labelled ones [4]_. ``none``: the best scores.
    pool_factor
        Of the batch size: how many of the best scores compete for a place in the
        batch, where it is to differ.
    length
        Of the Gaussian kernel of ``variance``, in standard deviations per descriptor.
        None: the median distance of candidates to their nearest other.
    out_of_domain
        ``keep`` lets candidates compete that the model is not made for: a label there
        teaches it most. ``drop`` leaves them out.

    References
    ----------
    .. [1] D. R. Jones, M. Schonlau, W. J. Welch, J. Glob. Optim. 13, 455 (1998).
    .. [2] W. R. Thompson, Biometrika 25, 285 (1933).
    .. [3] T. Desautels, A. Krause, J. W. Burdick, J. Mach. Learn. Res. 15, 4053 (2014).
    .. [4] T. F. Gonzalez, Theor. Comput. Sci. 38, 293 (1985); O. Sener, S. Savarese,
       ICLR (2018), arXiv:1708.00489.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: int = Field(default=20, ge=1)
    acquisition: AcquisitionName = "ucb"
    kappa: float = Field(default=1.0, ge=0)
    diversity: Diversity = "variance"
    pool_factor: int = Field(default=20, ge=1)
    length: float | None = Field(default=None, gt=0)
    out_of_domain: Literal["keep", "drop"] = "keep"


@dataclass(frozen=True, eq=False)
class Pool:
    """Candidates that may be labelled, with what a model says of them.

    Parameters
    ----------
    ids
        Of ``n`` candidates.
    mean
        ``(n,)``, in the unit of the target.
    std
        ``(n,)``; None if the model states none.
    out_of_domain
        ``(n,) bool``.
    """

    ids: Sequence[str]
    mean: Floats
    std: Floats | None
    out_of_domain: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64]) -> Pool:
        """Return some of the candidates, in the order of the rows."""
        return Pool(
            [self.ids[row] for row in rows],
            self.mean[rows],
            None if self.std is None else self.std[rows],
            self.out_of_domain[rows],
        )


@dataclass(frozen=True)
class Pick:
    """A chosen candidate: its score when it was taken, and its prediction."""

    id: str
    score: float | None = None
    mean: float | None = None
    std: float | None = None
    out_of_domain: bool = False


def shortlist(
    pool: Pool,
    selection: Selection,
    *,
    objective: Objective = "min",
    best: float | None = None,
    seed: int = 0,
) -> tuple[Pool, Floats]:
    """Return the candidates that compete for a place in the batch, best score first.

    Parameters
    ----------
    pool
        All that may be labelled.
    selection
        How.
    objective
        Whether low or high values are wanted.
    best
        Best label so far; ``ei`` needs it.
    seed
        Of ``thompson`` and ``random``.

    Returns
    -------
    tuple
        The candidates, and ``(m,)`` their scores: more is better.

    Raises
    ------
    InputError
        If the acquisition needs what the model does not state, or a score is not
        finite, or an id comes twice.
    """
    if len(set(pool.ids)) != len(pool.ids):
        raise InputError("a candidate comes twice in the pool to choose from")
    if selection.out_of_domain == "drop":
        pool = pool.take(np.flatnonzero(~pool.out_of_domain))
    scores = _scores(pool, pool.std, selection, objective, best, seed)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise InputError(
            f"the score of {pool.ids[bad[0]]} is not finite",
            evidence={"mean": float(pool.mean[bad[0]])},
            advice="look at the model's prediction for it",
        )
    order = _best_first(scores, pool.ids)
    if selection.diversity != "none":
        order = order[: selection.pool_factor * selection.size]
    else:
        order = order[: selection.size]
    return pool.take(order), scores[order]


def select_batch(
    pool: Pool,
    scores: Floats,
    selection: Selection,
    *,
    vectors: Floats | None = None,
    labelled: Floats | None = None,
    size: int | None = None,
    objective: Objective = "min",
    best: float | None = None,
    seed: int = 0,
) -> list[Pick]:
    """Choose a batch, in the order in which candidates were taken.

    Parameters
    ----------
    pool, scores
        Of :func:`shortlist`, with the same selection, objective, best and seed.
    vectors
        ``(m, d)``, standardized descriptors of the pool; needed for diversity.
    labelled
        ``(l, d)``, those of the labelled candidates; ``k-centre`` keeps away from them.
    size
        If less is left of the budget than ``selection.size``.
    """
    size = min(selection.size if size is None else size, len(pool))
    if selection.diversity == "none":
        order = list(range(size))
        taken = scores[:size].tolist()
    elif vectors is None or len(vectors) != len(pool):
        raise InputError(
            f"diversity {selection.diversity!r} needs a descriptor of each candidate"
        )
    elif selection.diversity == "k-centre":
        order = farthest_first(vectors, pool.ids, size, known=labelled)
        taken = [float(scores[row]) for row in order]
    else:
        order, taken = _spread_out(
            pool, scores, selection, vectors, size, objective, best, seed
        )
    return [
        Pick(
            id=pool.ids[row],
            score=float(score),
            mean=float(pool.mean[row]),
            std=None if pool.std is None else float(pool.std[row]),
            out_of_domain=bool(pool.out_of_domain[row]),
        )
        for row, score in zip(order, taken, strict=True)
    ]


def farthest_first(
    vectors: Floats, ids: Sequence[str], size: int, *, known: Floats | None = None
) -> list[int]:
    """Return rows, each the farthest from those before it and from the known ones.

    The first row of ``vectors`` comes first. Ties go to the lower id.

    References
    ----------
    T. F. Gonzalez, Theor. Comput. Sci. 38, 293 (1985).
    """
    size = min(size, len(vectors))
    if size == 0:
        return []
    rows = [0]
    nearest = _squares(vectors, vectors[:1])[:, 0]
    for start in range(0, 0 if known is None else len(known), 256):
        part = known[start : start + 256]  # type: ignore[index]
        nearest = np.minimum(nearest, _squares(vectors, part).min(axis=1))
    free = np.ones(len(vectors), dtype=bool)
    free[0] = False
    while len(rows) < size:
        # Rounding must not decide between equal distances.
        row = int(_best_first(np.where(free, np.round(nearest, 9), -1.0), ids)[0])
        rows.append(row)
        free[row] = False
        nearest = np.minimum(nearest, _squares(vectors, vectors[row : row + 1])[:, 0])
    return rows


def random_order(ids: Sequence[str], seed: int) -> list[int]:
    """Return rows in an order that seed and ids decide, whatever the order given."""
    return [int(row) for row in _best_first(_uniform(ids, seed), ids)]


def standardized(vectors: Floats, others: Sequence[Floats] = ()) -> list[Floats]:
    """Return descriptors in standard deviations of the first set.

    Columns that do not vary there are left out.
    """
    centre, scale = vectors.mean(axis=0), vectors.std(axis=0)
    vary = scale > 1e-9 * np.maximum(1.0, np.abs(centre))
    return [
        np.asarray((part[:, vary] - centre[vary]) / scale[vary])
        for part in (vectors, *others)
    ]


# ------------------------------------------------------------------------- private


def _scores(
    pool: Pool,
    std: Floats | None,
    selection: Selection,
    objective: Objective,
    best: float | None,
    seed: int,
) -> Floats:
    """Return scores of which more is better."""
    sign = 1.0 if objective == "min" else -1.0
    name = selection.acquisition
    if name == "mean":
        return -sign * pool.mean
    if name == "random":
        return _uniform(pool.ids, seed)
    if std is None:
        raise InputError(
            f"the model states no uncertainty, which {name!r} needs",
            advice="train an ensemble of two or more, or choose 'mean' or 'random'",
        )
    if name == "uncertainty":
        return std
    if name == "ucb":
        return -sign * pool.mean + selection.kappa * std
    if name == "thompson":
        return -sign * (pool.mean + std * normal_of(_numbers(pool.ids), seed))
    if best is None:
        raise InputError("expected improvement needs the best label so far")
    return expected_improvement(sign * (best - pool.mean), std)


def _spread_out(
    pool: Pool,
    scores: Floats,
    selection: Selection,
    vectors: Floats,
    size: int,
    objective: Objective,
    best: float | None,
    seed: int,
) -> tuple[list[int], list[float]]:
    """Take candidates one at a time, each as if the labels before it were known.

    The deviations follow a Gaussian process with the correlations of the kernel:
    after taking candidate t, the variance of the others falls by the square of their
    covariance with t, as a row of a pivoted Cholesky factor tells.
    """
    if selection.acquisition in ("mean", "thompson", "random"):
        return list(range(size)), scores[:size].tolist()
    length = selection.length or _typical_distance(vectors)
    assert pool.std is not None  # as _scores has asked
    left = np.ones(len(pool))  # share of the variance that is left
    factors = np.zeros((size, len(pool)))
    free = np.ones(len(pool), dtype=bool)
    order: list[int] = []
    taken: list[float] = []
    for step in range(size):
        now = _scores(pool, pool.std * np.sqrt(left), selection, objective, best, seed)
        row = int(_best_first(np.where(free, now, -np.inf), pool.ids)[0])
        order.append(row)
        taken.append(float(now[row]))
        free[row] = False
        kernel = np.exp(
            -0.5 * _squares(vectors, vectors[row : row + 1])[:, 0] / length**2
        )
        pivot = math.sqrt(max(left[row], 0.0) + _JITTER)
        factors[step] = (kernel - factors[:step, row] @ factors[:step]) / pivot
        left = np.clip(left - factors[step] ** 2, 0.0, 1.0)
    return order, taken


def _best_first(scores: Floats, ids: Sequence[str]) -> NDArray[np.int64]:
    return np.lexsort((np.array(ids, dtype=str), -scores))


def _squares(vectors: Floats, others: Floats) -> Floats:
    """Return mean squares over the descriptors of all differences, ``(n, m)``.

    Without a descriptor that varies all are equal.
    """
    if not vectors.shape[1]:
        return np.zeros((len(vectors), len(others)))
    differences = vectors[:, None, :] - others[None, :, :]
    return np.asarray((differences**2).mean(axis=2))


def _typical_distance(vectors: Floats) -> float:
    """Return the median distance to the nearest other that is not the same."""
    some = vectors[:_LENGTH_ROWS]
    nearest = []
    for row in range(len(some)):
        squares = _squares(some, some[row : row + 1])[:, 0]
        others = squares[squares > _JITTER]
        if len(others):
            nearest.append(math.sqrt(float(others.min())))
    return float(np.median(nearest)) if nearest else 1.0


def _numbers(ids: Sequence[str]) -> NDArray[np.int64]:
    hashes = [content_key("candidate", name)[:_HASH_DIGITS] for name in ids]
    return np.array([int(digits, 16) for digits in hashes], dtype=np.int64)


def _uniform(ids: Sequence[str], seed: int) -> Floats:
    hashes = [content_key("draw", [seed, name])[:_HASH_DIGITS] for name in ids]
    return np.array([int(digits, 16) / 16.0**_HASH_DIGITS for digits in hashes])
