"""Averages of correlated series: where equilibrium begins, and honest errors.

Values along a trajectory are correlated, so an error bar from the number of samples
is too small; every mean here comes with an error that knows the correlation time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError

Array = NDArray[np.float64]

_MIN_BLOCKS = 4
_MIN_SAMPLES = 4
_ORIGINS = 100
_MSER_BATCH = 5


def statistical_inefficiency(series: Array) -> float:
    """Return g: how many samples count as one independent sample, at least 1.

    ``g = 1 + 2 sum_t (1 - t/n) C(t)`` with the normalised autocorrelation C, summed
    until C first falls to zero.

    Parameters
    ----------
    series
        ``(n,) float64``: equally spaced samples.

    References
    ----------
    J. D. Chodera et al., J. Chem. Theory Comput. 3, 26 (2007), section 2.4.
    """
    values = _series(series)
    n = len(values)
    deviations = values - values.mean()
    # A constant leaves rounding errors, which have no correlation time.
    variance = float(deviations @ deviations) / n
    if variance <= (1e-14 * max(1e-300, float(np.abs(values).max()))) ** 2:
        return 1.0
    sums = autocorrelation_sums(deviations)
    lags = np.arange(n)
    correlation = sums / (n - lags) / variance
    negative = np.flatnonzero(correlation <= 0.0)
    end = int(negative[0]) if len(negative) else n
    weights = 1.0 - lags[1:end] / n
    return max(1.0, 1.0 + 2.0 * float(weights @ correlation[1:end]))


@dataclass(frozen=True)
class BlockAverage:
    """Mean of a correlated series with the standard error of that mean.

    Parameters
    ----------
    mean, standard_error
        In the unit of the series. The error is infinite for fewer than four samples:
        nothing can be said about it.
    block_size
        Samples in a block at the plateau.
    plateau
        Whether the error stopped growing with the size of the blocks. Otherwise the
        series is too short for its correlation time, and the error is a lower bound.
    inefficiency
        How many samples count as one independent sample.
    errors
        ``(n_levels,) float64``: error from blocks of 1, 2, 4, ... samples.
    """

    mean: float
    standard_error: float
    block_size: int
    plateau: bool
    inefficiency: float
    errors: Array


def block_analysis(series: Array) -> BlockAverage:
    """Return the mean of a correlated series and the standard error of that mean.

    Neighbouring samples are averaged in pairs, again and again. The naive error of
    the blocks grows until the blocks are independent, then scatters more and more.
    The plateau begins at the smallest block of B samples with
    ``B**3 > 2 n (error(B) / error(1))**4``, which balances the remaining bias against
    the scatter. The error is that of the plateau or of the statistical inefficiency,
    whichever is larger; without a plateau, the largest of all blocks.

    Parameters
    ----------
    series
        ``(n,) float64``: equally spaced samples of an equilibrated quantity.

    References
    ----------
    H. Flyvbjerg, H. G. Petersen, J. Chem. Phys. 91, 461 (1989).
    R. M. Lee et al., Phys. Rev. E 83, 066706 (2011), eq. 17 (the plateau).
    """
    values = _series(series)
    n, mean = len(values), float(np.mean(_series(series)))
    if n < _MIN_SAMPLES:
        return BlockAverage(mean, math.inf, 1, False, math.nan, np.empty(0))
    blocks, errors = values, []
    while len(blocks) >= _MIN_BLOCKS:
        errors.append(float(blocks.std(ddof=1)) / math.sqrt(len(blocks)))
        even = len(blocks) - len(blocks) % 2
        blocks = 0.5 * (blocks[0:even:2] + blocks[1:even:2])
    found = np.array(errors)
    g = statistical_inefficiency(values)
    correlated = float(values.std(ddof=1)) * math.sqrt(min(1.0, g / n))
    sizes = 2.0 ** np.arange(len(found))
    growth = found / found[0] if found[0] > 0.0 else np.ones_like(found)
    flat = np.flatnonzero(sizes**3 > 2.0 * n * growth**4)
    plateau = bool(len(flat)) or not found.any()
    level = int(flat[0]) if len(flat) else int(np.argmax(found))
    return BlockAverage(
        mean=mean,
        standard_error=max(float(found[level]), correlated),
        block_size=2**level,
        plateau=plateau,
        inefficiency=g,
        errors=found,
    )


def block_average(series: Array) -> tuple[float, float]:
    """Return mean and standard error of a correlated series; see `block_analysis`."""
    found = block_analysis(series)
    return found.mean, found.standard_error


def detect_equilibration(series: Array, n_origins: int = _ORIGINS) -> tuple[int, float]:
    """Return where equilibrium begins, and the inefficiency from there on.

    The start is chosen so that the rest holds the most independent samples: earlier
    starts include the drift, which looks like a long correlation, later ones throw
    samples away.

    Parameters
    ----------
    series
        ``(n,) float64``: equally spaced samples.
    n_origins
        Number of starts that are tried, equally spaced.

    Returns
    -------
    start, inefficiency
        First sample of the equilibrated part, and g of that part.

    References
    ----------
    J. D. Chodera, J. Chem. Theory Comput. 12, 1799 (2016).
    """
    values = _series(series)
    n = len(values)
    best = (0, statistical_inefficiency(values))
    most = n / best[1]
    for start in np.unique(np.linspace(0, n - 1, n_origins, dtype=int)):
        if n - start < _MIN_SAMPLES:
            break
        g = statistical_inefficiency(values[start:])
        if (n - start) / g > most:
            most, best = (n - start) / g, (int(start), g)
    return best


def mser(series: Array) -> tuple[int, bool]:
    """Return where the transient ends by MSER-5, and whether it ends in time.

    The start is the one for which the standard error of the mean of the rest, taken
    as if it were uncorrelated, is smallest; batches of five samples smooth the
    noise. A start in the second half says that the series is too short.

    Parameters
    ----------
    series
        ``(n,) float64``: equally spaced samples.

    Returns
    -------
    start, ended
        First sample of the rest; False if it lies in the second half.

    References
    ----------
    K. P. White, M. J. Cobb, S. C. Spratt, Proc. Winter Simulation Conf. (2000), 755.
    """
    values = _series(series)
    n_batches = len(values) // _MSER_BATCH
    if n_batches < 2 * _MIN_SAMPLES:
        return 0, False
    batches = values[: n_batches * _MSER_BATCH].reshape(n_batches, -1).mean(axis=1)
    batches = batches - batches.mean()
    # Sums over the rest from every start, the last batches left out as too few.
    left = np.arange(n_batches, 0, -1)
    sums, squares = batches[::-1].cumsum()[::-1], (batches**2)[::-1].cumsum()[::-1]
    statistic = (squares - sums**2 / left) / left**2
    start = int(np.argmin(statistic[: n_batches - _MIN_SAMPLES]))
    return start * _MSER_BATCH, start <= n_batches // 2


# ------------------------------------------------------------------------- private


def _series(series: Array | Sequence[float]) -> Array:
    values = np.asarray(series, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise InputError(
            f"a series must be finite numbers in one dimension, not shape "
            f"{values.shape}"
        )
    return values


def autocorrelation_sums(values: Array) -> Array:
    """Return ``sum_t x(t) x(t + lag)`` for all lags; zeros pad off the wrap-around."""
    n = len(values)
    size = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(values, size)
    return np.asarray(np.fft.irfft(spectrum * np.conj(spectrum), size)[:n])
