"""A whole screening in a few hundred numbers, whatever the number of candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.ml.candidate_filters import CandidateStatus
from nanoos_fw.ml.screening_engine import ChunkResult

_BINS = 60


@dataclass(frozen=True, eq=False)
class ModelSummary:
    """Predictions of one model, in the unit of its target.

    Parameters
    ----------
    edges, counts
        ``(n_bins + 1,)`` and ``(n_bins,)``: the histogram of all predictions, equal
        bins from the lowest to the highest.
    outside
        ``(n_bins,)``, those of them that are out of the model's domain.
    mean_std, mean_half_width
        Means over the predictions; None where the model states none.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    outside: NDArray[np.int64]
    mean_std: float | None
    mean_half_width: float | None


@dataclass(frozen=True, eq=False)
class ScreenSummary:
    """What became of all candidates.

    Parameters
    ----------
    outcomes
        Number of candidates by outcome; only those that occur.
    known
        Predicted candidates of a known composition.
    models
        In the order of the screening; empty without any prediction.
    rates
        Candidates per second and core of the stored chunks: least, first decile,
        median, last decile, largest. None without a chunk.
    core_s
        Seconds of processes.
    """

    outcomes: dict[CandidateStatus, int]
    known: int
    models: tuple[ModelSummary, ...]
    rates: tuple[float, float, float, float, float] | None
    core_s: float


def summarize_screen(read: Callable[[], Iterable[ChunkResult]]) -> ScreenSummary:
    """Summarize chunks, of which one at a time is held.

    Parameters
    ----------
    read
        Gives the chunks of a screening; called twice, since the bins of a histogram
        follow from all values.
    """
    outcomes: Counter[int] = Counter()
    known, core_s = 0, 0.0
    rates: list[float] = []
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] = np.zeros(0)
    sums: list[dict[str, float]] = []
    predicted = 0
    for chunk in read():
        values, counts = np.unique(chunk.status, return_counts=True)
        outcomes.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        known += int(chunk.known.sum())
        core_s += chunk.wall_s
        rates.append(len(chunk.status) / max(chunk.wall_s, 1e-6))
        if not len(chunk.known):
            continue
        predicted += len(chunk.known)
        least = np.array([own.mean.min() for own in chunk.models], dtype=np.float64)
        most = np.array([own.mean.max() for own in chunk.models], dtype=np.float64)
        low = least if low is None else np.minimum(low, least)
        high = most if len(high) == 0 else np.maximum(high, most)
        sums = sums or [{} for _ in chunk.models]
        for total, own in zip(sums, chunk.models, strict=True):
            for name in ("std", "half_width"):
                column = getattr(own, name)
                if column is not None:
                    more = float(column.sum(dtype=np.float64))
                    total[name] = total.get(name, 0.0) + more
    models: list[ModelSummary] = []
    if low is not None:
        edges = [
            np.linspace(a, b if b > a else a + 1e-6, _BINS + 1)
            for a, b in zip(low, high, strict=True)
        ]
        found = np.zeros((2, len(edges), _BINS), dtype=np.int64)
        for chunk in read():
            for number, own in enumerate(chunk.models if len(chunk.known) else ()):
                every = own.mean.astype(np.float64)
                for row, part in enumerate((every, every[own.out_of_domain])):
                    found[row, number] += np.histogram(part, edges[number])[0]
        models = [
            ModelSummary(
                edges=edges[number],
                counts=found[0, number],
                outside=found[1, number],
                mean_std=_mean(total.get("std"), predicted),
                mean_half_width=_mean(total.get("half_width"), predicted),
            )
            for number, total in enumerate(sums)
        ]
    return ScreenSummary(
        outcomes={CandidateStatus(s): n for s, n in sorted(outcomes.items())},
        known=known,
        models=tuple(models),
        rates=_deciles(rates),
        core_s=core_s,
    )


def _mean(total: float | None, n: int) -> float | None:
    return None if total is None else total / n


def _deciles(rates: list[float]) -> tuple[float, float, float, float, float] | None:
    if not rates:
        return None
    a, b, c, d, e = np.quantile(rates, [0, 0.1, 0.5, 0.9, 1]).tolist()
    return a, b, c, d, e
