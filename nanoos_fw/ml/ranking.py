"""Ranking of screened candidates: streamed over chunks, reproducible, with stated ties.

Every function reads chunks one at a time and keeps only the best, whatever the number
of candidates. Ties are broken by the candidate's number: the lower one comes first.
Scores are computed in double precision from the stored values, so the answer depends
on nothing but these; not on the order of the chunks or who computed them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from nanoos_fw.errors import InputError
from nanoos_fw.ml.permutations import scramble
from nanoos_fw.ml.screening_engine import ChunkResult, ModelColumns
from nanoos_fw.provenance import content_key

if TYPE_CHECKING:
    from pymatgen.core import Structure

Objective = Literal["min", "max"]
Acquisition = Literal["mean", "ucb", "ei", "thompson"]
TIE_RULE = "of equal scores the lower candidate number comes first"
_HALF = 2.0**-53


class Ranking(BaseModel):
    """How candidates are ordered, and which take part.

    Parameters
    ----------
    model
        Number of the model in the screening.
    objective
        Whether low or high values of its target are wanted.
    acquisition
        ``mean``: the prediction. ``ucb``: the optimistic end, mean - kappa std for
        ``min`` and mean + kappa std for ``max``. ``ei``: the expected improvement on
        ``best`` [1]_. ``thompson``: one draw from N(mean, std²) for each candidate,
        decided by ``seed`` and the candidate's number only [2]_.
    kappa
        Of ``ucb``.
    best
        Best value known so far, in the unit of the target; ``ei`` needs it.
    seed
        Of ``thompson``.
    include_out_of_domain
        Rank candidates whose prediction cannot be trusted, too.
    new_compositions
        Leave out compositions of the known set.
    min_novelty, max_novelty
        Distance to the nearest training structures, as
        :class:`nanoos_fw.ml.uncertainty.Predictions` defines it.

    References
    ----------
    .. [1] D. R. Jones, M. Schonlau, W. J. Welch, J. Glob. Optim. 13, 455 (1998).
    .. [2] W. R. Thompson, Biometrika 25, 285 (1933).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: int = Field(default=0, ge=0)
    objective: Objective = "min"
    acquisition: Acquisition = "mean"
    kappa: float = Field(default=1.0, ge=0)
    best: float | None = None
    seed: int = Field(default=0, ge=0)
    include_out_of_domain: bool = False
    new_compositions: bool = False
    min_novelty: float | None = None
    max_novelty: float | None = None


@dataclass(frozen=True, eq=False)
class Ranked:
    """The best candidates, best first.

    Parameters
    ----------
    indices
        ``(k,) int64``, numbers of the candidates.
    scores
        ``(k,)`` or, of a Pareto front, ``(k, n_objectives) float64``.
    n_ranked
        How many took part.
    """

    indices: NDArray[np.int64]
    scores: NDArray[np.float64]
    n_ranked: int


def score_chunk(
    chunk: ChunkResult, ranking: Ranking
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return numbers and scores of the candidates of a chunk that take part.

    Raises
    ------
    InputError
        If the screening has no such model, or the model states no uncertainty or
        distance where one is needed.
    """
    if not len(chunk.indices):
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    columns = _columns_of(chunk, ranking.model)
    keep = _takes_part(chunk, columns, ranking)
    indices = chunk.indices[keep]
    mean = columns.mean.astype(np.float64)[keep]
    if ranking.acquisition == "mean":
        return indices, mean
    if columns.std is None:
        raise InputError(
            f"the model states no uncertainty, which {ranking.acquisition!r} needs",
            advice="screen with an ensemble, or rank by 'mean'",
        )
    std = columns.std.astype(np.float64)[keep]
    sign = 1.0 if ranking.objective == "min" else -1.0
    if ranking.acquisition == "ucb":
        return indices, mean - sign * ranking.kappa * std
    if ranking.acquisition == "thompson":
        return indices, mean + std * normal_of(indices, ranking.seed)
    if ranking.best is None:
        raise InputError(
            "expected improvement needs the best value known so far",
            advice="give 'best', for example the best label of the training set",
        )
    return indices, expected_improvement(sign * (ranking.best - mean), std)


def rank_top(chunks: Iterable[ChunkResult], k: int, ranking: Ranking) -> Ranked:
    """Return the best ``k`` candidates, best first, ties by number.

    Scores are values of the target and better as the objective says, but for ``ei``,
    of which more is better.
    """
    if k < 1:
        raise InputError(f"k must be at least 1, not {k}")
    ascending = ranking.objective == "min" and ranking.acquisition != "ei"
    sign = 1.0 if ascending else -1.0
    indices, scores = np.zeros(0, dtype=np.int64), np.zeros(0)
    total = 0
    for chunk in chunks:
        new, values = score_chunk(chunk, ranking)
        total += len(new)
        indices = np.concatenate([indices, new])
        scores = np.concatenate([scores, values])
        order = np.lexsort((indices, sign * scores))[:k]
        indices, scores = indices[order], scores[order]
    if len(np.unique(indices)) < len(indices):
        raise InputError("a candidate comes twice in the chunks to rank")
    return Ranked(indices, scores, total)


def pareto_front(chunks: Iterable[ChunkResult], rankings: Sequence[Ranking]) -> Ranked:
    """Return the candidates that no other beats in all objectives.

    Parameters
    ----------
    chunks
        Of one screening.
    rankings
        One for each objective; a candidate must take part in all.

    Returns
    -------
    Ranked
        In the order of the first objective, then the next, then the number. Of
        candidates with equal scores all stay.
    """
    if len(rankings) < 2:
        raise InputError("a Pareto front needs at least two objectives")
    signs = np.array(
        [
            1.0 if r.objective == "min" and r.acquisition != "ei" else -1.0
            for r in rankings
        ]
    )
    indices = np.zeros(0, dtype=np.int64)
    front = np.zeros((0, len(rankings)))
    total = 0
    for chunk in chunks:
        found = [score_chunk(chunk, ranking) for ranking in rankings]
        common = found[0][0]
        for own, _ in found[1:]:
            common = np.intersect1d(common, own, assume_unique=True)
        total += len(common)
        values = np.stack(
            [scores[np.searchsorted(own, common)] for own, scores in found], axis=1
        )
        new = signs * values
        keep = ~_beaten(new, front)
        new, common = new[keep], common[keep]
        own_front = _front_of(new)
        new, common = new[own_front], common[own_front]
        stay = ~_beaten(front, new)
        front = np.concatenate([front[stay], new])
        indices = np.concatenate([indices[stay], common])
    order = np.lexsort((indices, *front.T[::-1]))
    return Ranked(indices[order], signs * front[order], total)


def expected_improvement(
    gain: NDArray[np.float64], std: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return E[max(x, 0)] of x normal with mean ``gain`` and deviation ``std``."""
    from scipy.special import ndtr  # type: ignore[import-untyped]

    z = np.divide(gain, std, out=np.zeros_like(gain), where=std > 0)
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    spread = gain * ndtr(z) + std * density
    return np.where(std > 0, np.maximum(spread, 0.0), np.maximum(gain, 0.0))


def normal_of(indices: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Return a standard normal number for each candidate, decided by seed and number.

    Two hashed uniform numbers go through the transform of G. E. P. Box and
    M. E. Muller, Ann. Math. Stat. 29, 610 (1958).
    """
    key = np.uint64(int(content_key("thompson", seed)[:16], 16))
    with np.errstate(over="ignore"):
        base = np.asarray(indices, dtype=np.uint64) * np.uint64(2) + key
        first, second = scramble(base), scramble(base + np.uint64(1))
    u = ((first >> np.uint64(11)).astype(np.float64) + 0.5) * _HALF
    v = (second >> np.uint64(11)).astype(np.float64) * _HALF
    return np.asarray(np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * math.pi * v))


def distinct_structures(structures: Sequence[Structure]) -> list[int]:
    """Return the places of structures that equal none before them.

    For relaxed candidates: different starts often end in one crystal. Equal are those
    that pymatgen's ``StructureMatcher`` maps on each other with lengths within 5 %,
    angles within 3°, and sites within a tenth of the mean length per atom. Volumes
    are not scaled.
    """
    from pymatgen.analysis.structure_matcher import StructureMatcher

    matcher = StructureMatcher(ltol=0.05, stol=0.1, angle_tol=3, scale=False)
    kept: dict[str, list[int]] = {}
    for place, structure in enumerate(structures):
        alike = kept.setdefault(structure.composition.reduced_formula, [])
        if not any(matcher.fit(structures[other], structure) for other in alike):
            alike.append(place)
    return sorted(place for places in kept.values() for place in places)


# ------------------------------------------------------------------------- private


def _columns_of(chunk: ChunkResult, model: int) -> ModelColumns:
    if model >= len(chunk.models):
        raise InputError(
            f"the screening has {len(chunk.models)} models, none with number {model}"
        )
    return chunk.models[model]


def _takes_part(
    chunk: ChunkResult, columns: ModelColumns, ranking: Ranking
) -> NDArray[np.bool_]:
    keep = np.ones(len(columns.mean), dtype=bool)
    if not ranking.include_out_of_domain:
        keep &= ~columns.out_of_domain
    if ranking.new_compositions:
        keep &= ~chunk.known
    if ranking.min_novelty is not None or ranking.max_novelty is not None:
        if columns.distance is None:
            raise InputError(
                "the model states no distance to its training structures",
                advice="screen with a calibrated model",
            )
        if ranking.min_novelty is not None:
            keep &= columns.distance >= ranking.min_novelty
        if ranking.max_novelty is not None:
            keep &= columns.distance <= ranking.max_novelty
    return keep


def _beaten(rows: NDArray[np.float64], by: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which rows another set holds a better one for (all <=, one <)."""
    beaten = np.zeros(len(rows), dtype=bool)
    for other in by:
        beaten |= (other <= rows).all(axis=1) & (other < rows).any(axis=1)
    return beaten


def _front_of(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the places of rows that no other row beats."""
    # A row can only be beaten by one that sorts before it.
    left = np.lexsort(rows.T[::-1])
    front: list[int] = []
    while len(left):
        best = rows[left[0]]
        front.append(int(left[0]))
        others = rows[left[1:]]
        beaten = (best <= others).all(axis=1) & (best < others).any(axis=1)
        left = left[1:][~beaten]
    return np.array(front, dtype=np.int64)
