"""Screening: predictions in chunks, ranking with a stated tie rule, and its quality."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.ml.graphs import CrystalGraph
from nanoos_fw.ml.uncertainty import DEFAULT_COVERAGE

if TYPE_CHECKING:
    from nanoos_fw.ml.predictors import PropertyModel

Objective = Literal["min", "max"]
Acquisition = Literal["mean", "lcb"]


def predict_in_chunks(
    model: PropertyModel,
    graphs: Iterable[tuple[str, CrystalGraph | bytes]],
    chunk: int = 1024,
    *,
    coverage: float = DEFAULT_COVERAGE,
) -> Iterator[list[dict[str, Any]]]:
    """Predict candidates a chunk at a time, so that memory does not grow.

    Parameters
    ----------
    model
        Model with weights.
    graphs
        Pairs of structure id and graph, packed or not; read lazily.
    chunk
        Candidates per chunk.
    coverage
        Probability with which ``mean ± half_width`` is to hold the truth.

    Yields
    ------
    list of dict
        For each candidate, in order: ``structure_id``; ``mean``, ``std`` and
        ``half_width`` in the unit of the target (None where the model states none);
        ``distance`` to the training structures, ``out_of_domain`` and
        ``unseen_elements`` (in the structure, not in the training set).
    """
    if chunk < 1:
        raise InputError(f"chunk must be at least 1, not {chunk}")
    stream = iter(graphs)
    while pairs := list(islice(stream, chunk)):
        ids = [structure_id for structure_id, _ in pairs]
        found = model.predict_full([graph for _, graph in pairs], coverage=coverage)
        yield [
            {
                "structure_id": structure_id,
                "mean": float(found.mean[index]),
                "std": _at(found.std, index),
                "half_width": _at(found.half_width, index),
                "distance": _at(found.distance, index),
                "out_of_domain": bool(found.out_of_domain[index]),
                "unseen_elements": found.unseen_elements[index],
            }
            for index, structure_id in enumerate(ids)
        ]


def rank_candidates(
    rows: Iterable[Mapping[str, Any]],
    k: int | None = None,
    objective: Objective = "min",
    acquisition: Acquisition = "mean",
    *,
    kappa: float = 1.0,
    include_out_of_domain: bool = False,
) -> list[dict[str, Any]]:
    """Return the best ``k`` candidates, best first.

    Parameters
    ----------
    rows
        Rows of :func:`predict_in_chunks`; further keys are kept.
    k
        How many; None for all.
    objective
        ``"min"`` looks for low values of the target, ``"max"`` for high ones.
    acquisition
        ``"mean"`` scores by the prediction; ``"lcb"`` by the optimistic confidence
        bound: mean - kappa std for ``"min"``, mean + kappa std for ``"max"``.
    kappa
        Weight of the uncertainty, dimensionless.
    include_out_of_domain
        Rank candidates with elements the model has never seen, or far from all
        training structures. By default they are left out: neither their mean nor
        their std can be trusted. That costs about a twentieth of candidates like the
        training structures, too; see :mod:`nanoos_fw.ml.uncertainty`.

    Returns
    -------
    list of dict
        Copies of the rows with ``score`` (in the unit of the target) and ``rank``
        (1 is best). Equal scores are ordered by structure id, so the answer depends
        on the set of rows only.

    Raises
    ------
    InputError
        If a score is not finite, an id comes twice, or ``"lcb"`` meets a prediction
        without uncertainty.
    """
    if objective not in {"min", "max"} or acquisition not in {"mean", "lcb"}:
        raise InputError(
            f"objective {objective!r} must be 'min' or 'max', acquisition "
            f"{acquisition!r} 'mean' or 'lcb'"
        )
    if k is not None and k < 0:
        raise InputError(f"k must not be negative: {k}")
    sign = 1.0 if objective == "min" else -1.0
    scored: list[tuple[float, str, dict[str, Any]]] = []
    for row in rows:
        if row.get("out_of_domain") and not include_out_of_domain:
            continue
        structure_id, score = str(row["structure_id"]), float(row["mean"])
        if acquisition == "lcb":
            if row.get("std") is None:
                raise InputError(
                    f"the prediction for {structure_id} has no uncertainty",
                    advice="train an ensemble, or rank by acquisition='mean'",
                )
            score -= sign * kappa * float(row["std"])
        if not np.isfinite(score):
            raise InputError(f"the score of {structure_id} is not finite: {score}")
        scored.append((sign * score, structure_id, {**row, "score": score}))
    ids = {structure_id for _, structure_id, _ in scored}
    if len(ids) != len(scored):
        raise InputError(f"{len(scored)} rows hold {len(ids)} different structures")
    scored.sort(key=lambda item: item[:2])
    best = scored if k is None else scored[:k]
    return [{**row, "rank": rank} for rank, (_, _, row) in enumerate(best, start=1)]


def discovery_curve(
    scores: Sequence[float] | NDArray[np.float64],
    truth: Sequence[float] | NDArray[np.float64],
    n_best: int,
    objective: Objective = "min",
) -> NDArray[np.int64]:
    """Return how many of the truly best candidates the first n by score contain.

    Parameters
    ----------
    scores, truth
        ``(n,)`` predicted scores and true values, in one order.
    n_best
        How many candidates count as the truly best.
    objective
        Whether low or high values are wanted, of both.

    Returns
    -------
    ``(n + 1,) int64``
        Entry m: how many of the truly best ``n_best`` are among the first m by
        score. Ties of either are broken by position.
    """
    predicted, true = _columns(scores, truth)
    if not 1 <= n_best <= len(true):
        raise InputError(f"n_best must be 1 to {len(true)}, not {n_best}")
    hits = np.zeros(len(true), dtype=np.int64)
    hits[_best_first(true, objective)[:n_best]] = 1
    found = np.cumsum(hits[_best_first(predicted, objective)])
    return np.concatenate([np.zeros(1, dtype=np.int64), found])


def precision_at_k(
    scores: Sequence[float] | NDArray[np.float64],
    truth: Sequence[float] | NDArray[np.float64],
    k: int,
    *,
    n_best: int | None = None,
    objective: Objective = "min",
) -> float:
    """Return the share of the first ``k`` by score that is truly among the best.

    ``n_best`` defaults to ``k``, where precision and recall are the same number.
    """
    curve = discovery_curve(scores, truth, n_best or k, objective)
    _check_k(k, len(curve) - 1)
    return float(curve[k]) / k


def recall_at_k(
    scores: Sequence[float] | NDArray[np.float64],
    truth: Sequence[float] | NDArray[np.float64],
    k: int,
    *,
    n_best: int,
    objective: Objective = "min",
) -> float:
    """Return the share of the truly best ``n_best`` found in the first ``k``."""
    curve = discovery_curve(scores, truth, n_best, objective)
    _check_k(k, len(curve) - 1)
    return float(curve[k]) / n_best


def enrichment_at_k(
    scores: Sequence[float] | NDArray[np.float64],
    truth: Sequence[float] | NDArray[np.float64],
    k: int,
    *,
    n_best: int,
    objective: Objective = "min",
) -> float:
    """Return precision at ``k`` over that of a random order (1: no better)."""
    precision = precision_at_k(scores, truth, k, n_best=n_best, objective=objective)
    return precision * len(truth) / n_best


# ------------------------------------------------------------------------- private


def _at(values: NDArray[np.float64] | None, index: int) -> float | None:
    return None if values is None else float(values[index])


def _columns(
    scores: Sequence[float] | NDArray[np.float64],
    truth: Sequence[float] | NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    predicted = np.asarray(scores, dtype=np.float64)
    true = np.asarray(truth, dtype=np.float64)
    if predicted.ndim != 1 or predicted.shape != true.shape:
        raise InputError(
            f"scores {predicted.shape} and truth {true.shape} must be of one length"
        )
    if not (np.isfinite(predicted).all() and np.isfinite(true).all()):
        raise InputError("scores and truth must be finite")
    return predicted, true


def _best_first(values: NDArray[np.float64], objective: Objective) -> NDArray[np.int64]:
    return np.argsort(values if objective == "min" else -values, kind="stable")


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise InputError(f"k must be 1 to {n}, not {k}")
