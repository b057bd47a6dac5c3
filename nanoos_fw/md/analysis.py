"""What a trajectory says: averages with honest errors, structure, diffusion.

Values along a trajectory are correlated, so an error bar from the number of samples
is too small; every mean here comes with an error that knows the correlation time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.md.trajectory import Frame

Array = NDArray[np.float64]

_MIN_BLOCKS = 4
_MIN_SAMPLES = 4
_ORIGINS = 100


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
    sums = _autocorrelation_sums(deviations)
    lags = np.arange(n)
    correlation = sums / (n - lags) / variance
    negative = np.flatnonzero(correlation <= 0.0)
    end = int(negative[0]) if len(negative) else n
    weights = 1.0 - lags[1:end] / n
    return max(1.0, 1.0 + 2.0 * float(weights @ correlation[1:end]))


def block_average(series: Array) -> tuple[float, float]:
    """Return the mean of a correlated series and the standard error of that mean.

    Neighbouring samples are averaged in pairs, again and again. The naive error of
    the blocks grows until the blocks are independent; the largest value that the
    noise of its own estimate does not explain away is taken, and at least that of
    the statistical inefficiency.

    Parameters
    ----------
    series
        ``(n,) float64``: equally spaced samples of an equilibrated quantity.

    Returns
    -------
    mean, standard_error
        In the unit of the series. The error is infinite for fewer than four
        samples: nothing can be said about it.

    References
    ----------
    H. Flyvbjerg, H. G. Petersen, J. Chem. Phys. 91, 461 (1989).
    """
    values = _series(series)
    mean = float(values.mean())
    if len(values) < _MIN_SAMPLES:
        return mean, math.inf
    blocks, errors = values, []
    while len(blocks) >= _MIN_BLOCKS:
        n = len(blocks)
        error = float(blocks.std(ddof=1)) / math.sqrt(n)
        # Relative uncertainty of the error itself: 1 / sqrt(2 (n - 1)).
        errors.append((error, error / math.sqrt(2.0 * (n - 1))))
        blocks = 0.5 * (blocks[0 : n - n % 2 : 2] + blocks[1 : n - n % 2 + 1 : 2])
    best, _ = errors[0]
    for error, uncertainty in errors[1:]:
        if error - uncertainty > best:
            best = error
    n_effective = len(values) / statistical_inefficiency(values)
    correlated = float(values.std(ddof=1)) / math.sqrt(max(1.0, n_effective))
    return mean, max(best, correlated)


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


@dataclass(frozen=True)
class RadialDistribution:
    """Pair distribution of a trajectory.

    Parameters
    ----------
    r_a
        ``(n_bins,) float64``, Å: middle of each bin.
    g
        ``(n_bins,) float64``: density of neighbours relative to the mean density.
    coordination
        ``(n_bins,) float64``: neighbours of an atom up to the end of each bin.
    n_frames
        Frames averaged over.
    pair
        The two atom types, or None for all atoms.
    """

    r_a: Array
    g: Array
    coordination: Array
    n_frames: int
    pair: tuple[int, int] | None = None


def radial_distribution(
    frames: Iterable[Frame],
    r_max: float,
    bins: int = 200,
    pair: tuple[int, int] | None = None,
) -> RadialDistribution:
    """Return g(r), exact for cells of any shape and for distances beyond half of it.

    Every image within ``r_max`` is counted, of other atoms and of the atom itself:
    in a crystal of one atom per cell all neighbours are images. The mean density is
    that of all atoms, ``N/V``, so an ideal gas of N atoms in a periodic cell gives
    ``1 - 1/N`` below the first image of an atom itself, as it is in the canonical
    ensemble, and 1 in the limit of large N.

    Parameters
    ----------
    frames
        Frames of one simulation.
    r_max
        Largest distance in Å.
    bins
        Number of bins between 0 and ``r_max``.
    pair
        Types (first, second): neighbours of the second type around atoms of the
        first. None counts all.

    Returns
    -------
    RadialDistribution
        Averaged over frames, each with its own volume.

    Raises
    ------
    InputError
        If there are no frames, no atoms of a type, or a bound is not positive.

    References
    ----------
    M. P. Allen, D. J. Tildesley, Computer Simulation of Liquids, 2nd ed., 8.2.
    """
    found = radial_distributions(frames, r_max, bins)
    if pair is not None and pair not in found:
        types = sorted({kind for key in found if key is not None for kind in key})
        missing = next(kind for kind in pair if kind not in types)
        raise InputError(
            f"there are no atoms of type {missing}", evidence={"types": types}
        )
    return found[pair]


def radial_distributions(
    frames: Iterable[Frame], r_max: float, bins: int = 200
) -> dict[tuple[int, int] | None, RadialDistribution]:
    """Return g(r) of all atoms (key None) and of every ordered pair of types.

    The frames are read once; see :func:`radial_distribution`.
    """
    if not (r_max > 0.0 and math.isfinite(r_max) and bins > 0):
        raise InputError(f"r_max ({r_max}) and bins ({bins}) must be positive")
    edges = np.linspace(0.0, r_max, bins + 1)
    shells = 4.0 / 3.0 * math.pi * np.diff(edges**3)
    # Neighbours of an atom, and g(r), summed over frames, by pair.
    sums: dict[tuple[int, int] | None, tuple[Array, Array]] = {}
    n_frames = 0
    for frame in frames:
        kinds, numbers = np.unique(frame.types, return_inverse=True)
        populations = np.bincount(numbers)
        counts = _distance_counts(frame, numbers, edges)
        pairs: list[tuple[tuple[int, int] | None, Array, int, int]] = [
            ((int(a), int(b)), counts[i, j], populations[i], populations[j])
            for i, a in enumerate(kinds)
            for j, b in enumerate(kinds)
        ]
        n_atoms = len(frame.types)
        pairs.append((None, counts.sum(axis=(0, 1)), n_atoms, n_atoms))
        for pair, found, n_first, n_second in pairs:
            neighbours = found / n_first
            g = neighbours / (n_second / frame.volume_a3 * shells)
            before = sums.get(pair, (np.zeros(bins), np.zeros(bins)))
            sums[pair] = (before[0] + neighbours, before[1] + g)
        n_frames += 1
    if n_frames == 0:
        raise InputError("there are no frames to take a distribution from")
    return {
        pair: RadialDistribution(
            r_a=0.5 * (edges[1:] + edges[:-1]),
            g=g / n_frames,
            coordination=np.cumsum(neighbours / n_frames),
            n_frames=n_frames,
            pair=pair,
        )
        for pair, (neighbours, g) in sums.items()
    }


def mean_squared_displacement(positions: Array) -> Array:
    """Return the mean squared displacement over all origins, by FFT.

    Parameters
    ----------
    positions
        ``(n_frames, n_atoms, 3) float64``, Å: unwrapped, equally spaced in time, in a
        cell of fixed size and without drift of the centre of mass.

    Returns
    -------
    numpy.ndarray
        ``(n_frames,) float64``, Å²: average over atoms and origins for each lag in
        frames.

    Raises
    ------
    InputError
        If the shape is another.

    References
    ----------
    V. Calandrini et al., Collection SFN 12, 201 (2011), section 4.2.1.
    """
    x = np.asarray(positions, dtype=np.float64)
    if x.ndim != 3 or x.shape[2] != 3 or x.shape[0] < 1 or x.shape[1] < 1:
        raise InputError(f"positions must be (frames, atoms, 3), not {x.shape}")
    n = x.shape[0]
    # Large offsets cancel badly in the difference of squares below.
    x = x - x.mean(axis=0)
    squares = (x**2).sum(axis=2)
    total = np.zeros(n)
    for atom in range(x.shape[1]):
        cross = sum(_autocorrelation_sums(x[:, atom, axis]) for axis in range(3))
        square = squares[:, atom]
        # Sum over origins of r(t)^2 + r(t + lag)^2, from one running sum.
        partial = np.concatenate([[0.0], np.cumsum(square)])
        lags = np.arange(n)
        both = (partial[n] - partial[lags]) + partial[n - lags]
        total += (both - 2.0 * cross) / (n - lags)
    msd = total / x.shape[1]
    msd[0] = 0.0
    return np.asarray(msd)


# ------------------------------------------------------------------------- private


def _series(series: Array | Sequence[float]) -> Array:
    values = np.asarray(series, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise InputError(
            f"a series must be finite numbers in one dimension, not shape "
            f"{values.shape}"
        )
    return values


def _autocorrelation_sums(values: Array) -> Array:
    """Return ``sum_t x(t) x(t + lag)`` for all lags; zeros pad off the wrap-around."""
    n = len(values)
    size = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(values, size)
    return np.asarray(np.fft.irfft(spectrum * np.conj(spectrum), size)[:n])


def _distance_counts(frame: Frame, numbers: NDArray[np.int64], edges: Array) -> Array:
    """Count neighbours by types and distance, all images within the last edge.

    Returns
    -------
    numpy.ndarray
        ``(n_types, n_types, n_bins) float64``.
    """
    from pymatgen.optimization.neighbors import find_points_in_spheres

    positions = np.ascontiguousarray(frame.positions)
    r_max, bins, n_types = float(edges[-1]), len(edges) - 1, int(numbers.max()) + 1
    first, second, _, distances = find_points_in_spheres(
        positions,
        positions,
        r_max,
        np.ones(3, dtype=np.int64),
        np.ascontiguousarray(frame.matrix),
        1e-8,
    )
    # The atom itself, at distance exactly zero, is no neighbour.
    near = (distances > 1e-6) & (distances < r_max)
    place = np.minimum((distances[near] * (bins / r_max)).astype(np.int64), bins - 1)
    pair = numbers[first[near]] * n_types + numbers[second[near]]
    counts = np.bincount(pair * bins + place, minlength=n_types * n_types * bins)
    return counts.reshape(n_types, n_types, bins).astype(np.float64)
