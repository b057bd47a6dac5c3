"""Structure of a trajectory: distances (RDF, coordination) and angles (ADF).

The loops are compiled by numba where it is installed (``pip install nanoos_fw[fast]``);
without it pymatgen's neighbour list does the same, several times slower. Frames come
one at a time, so memory does not grow with their number.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.md.box import pairs_within
from nanoos_fw.md.trajectory import Frame

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

# Bins of the pair search: fine along a, where atoms lie side by side in memory.
_BINS_PER_RADIUS = (8, 2, 2)
_MAX_BINS_PER_ATOM = 8
# A sphere with more lattice vectors than this is a mistake in r_max.
_MAX_IMAGES = 1_000_000


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

    def shell(self, first_minimum_a: float) -> float:
        """Return the coordination number up to a distance, in between bins too."""
        width = 2.0 * self.r_a[0]
        ends = np.concatenate([[0.0], self.r_a + 0.5 * width])
        return float(
            np.interp(first_minimum_a, ends, np.concatenate([[0.0], self.coordination]))
        )


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
        Frames of one simulation, such as a `Trajectory`.
    r_max
        Largest distance in Å. Beyond half of the cell, images of atoms are counted
        beside the atoms: right for a crystal, while a liquid then repeats itself.
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
        counts = _distance_counts(frame, numbers, r_max, bins)
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
        raise InputError(
            "there are no frames to take a distribution from",
            advice="dump more often, or look at the equilibration's length",
        )
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


@dataclass(frozen=True)
class AngleDistribution:
    """Angles between the neighbours of an atom.

    Parameters
    ----------
    angle_deg
        ``(n_bins,) float64``, degrees: middle of each bin.
    density
        By types (end, centre, end), lower end first: ``(n_bins,) float64``, 1/degree;
        the integral over 180° is 1. A random gas gives ``sin(angle) / 2`` per radian.
    angles_per_centre
        By the same keys: mean number of such angles at an atom of the centre's type.
    n_frames
        Frames averaged over.
    """

    angle_deg: Array
    density: dict[tuple[int, int, int], Array]
    angles_per_centre: dict[tuple[int, int, int], float]
    n_frames: int


def angle_distributions(
    frames: Iterable[Frame],
    cutoff_a: float | Mapping[tuple[int, int], float],
    bins: int = 180,
) -> AngleDistribution:
    """Return the distribution of angles end–centre–end within a distance.

    Parameters
    ----------
    frames
        Frames of one simulation, such as a `Trajectory`.
    cutoff_a
        How far neighbours are, in Å: one distance, or one by pair of types (either
        order); the first minimum of g(r) as a rule. Pairs left out are no neighbours.
    bins
        Number of bins between 0° and 180°.

    Raises
    ------
    InputError
        If there are no frames, or no distance is positive.
    """
    distances = list(cutoff_a.values()) if isinstance(cutoff_a, Mapping) else [cutoff_a]
    if bins < 1 or not distances or not all(0.0 < d < math.inf for d in distances):
        raise InputError(f"cutoffs ({distances}) and bins ({bins}) must be positive")
    sums: dict[tuple[int, int, int], Integers] = {}
    centres: dict[int, int] = {}
    n_frames = 0
    for frame in frames:
        kinds, numbers = np.unique(frame.types, return_inverse=True)
        cutoffs = np.zeros((len(kinds), len(kinds)))
        for (i, a), (j, b) in itertools.product(enumerate(kinds.tolist()), repeat=2):
            cutoffs[i, j] = (
                cutoff_a.get((a, b), cutoff_a.get((b, a), 0.0))
                if isinstance(cutoff_a, Mapping)
                else cutoff_a
            )
        counts = _angle_counts(frame, numbers, cutoffs, bins)
        for i, population in enumerate(np.bincount(numbers)):
            centre = int(kinds[i])
            centres[centre] = centres.get(centre, 0) + int(population)
            for j, k in itertools.combinations_with_replacement(range(len(kinds)), 2):
                key = (int(kinds[j]), centre, int(kinds[k]))
                sums[key] = sums.get(key, np.zeros(bins, np.int64)) + counts[i, j, k]
        n_frames += 1
    if n_frames == 0:
        raise InputError("there are no frames to take angles from")
    width = 180.0 / bins
    found = {key: values for key, values in sums.items() if values.any()}
    return AngleDistribution(
        angle_deg=np.asarray(width * (np.arange(bins) + 0.5), np.float64),
        density={key: v / (v.sum() * width) for key, v in found.items()},
        angles_per_centre={
            key: float(v.sum()) / centres[key[1]] for key, v in found.items()
        },
        n_frames=n_frames,
    )


# ------------------------------------------------------------------------- private


def is_compiled() -> bool:
    """Tell whether numba runs the loops over pairs."""
    return importlib.util.find_spec("numba") is not None


def _kernels() -> ModuleType | None:
    if not is_compiled():
        return None
    from nanoos_fw.md import pair_kernels

    return pair_kernels


def _restricted(frame: Frame) -> tuple[Array, Array]:
    """Return positions and ``lx xy ly xz yz lz`` with a along x and b in the plane."""
    matrix, positions = frame.matrix, frame.positions
    if np.triu(matrix, 1).any() or (np.diag(matrix) <= 0.0).any():
        q, r = np.linalg.qr(matrix.T)
        signs = np.sign(np.diag(r))
        matrix, positions = (r * signs[:, None]).T, positions @ (q * signs)
    cell = matrix[[0, 1, 1, 2, 2, 2], [0, 0, 1, 0, 1, 2]]
    return np.ascontiguousarray(positions), np.ascontiguousarray(cell)


def _binned(
    kernels: ModuleType, frame: Frame, numbers: Integers, radius: float
) -> tuple[Any, ...]:
    """Return cell, shape of the bins, and what the kernels want to know of atoms."""
    positions, cell = _restricted(frame)
    if not (np.isfinite(positions).all() and np.isfinite(cell).all()):
        raise InputError(f"the frame of step {frame.step} holds numbers not finite")
    lengths = cell[[0, 2, 5]]
    images = 4.19 * radius**3 / np.prod(lengths)
    if images > _MAX_IMAGES:
        raise InputError(
            f"a distance of {radius:g} Å reaches {images:.1e} images of the cell",
            evidence={"lengths_a": lengths.tolist()},
        )
    shape = np.maximum(1, (lengths / radius * _BINS_PER_RADIUS).astype(np.int64))
    while np.prod(shape) > max(_MAX_BINS_PER_ATOM * len(numbers), 1):
        widest = int(np.argmax(shape))
        shape[widest] = (shape[widest] + 1) // 2
    sorted_atoms = kernels.sort_into_bins(positions, cell, numbers, shape)
    return cell, shape, *sorted_atoms[:6]


def _distance_counts(frame: Frame, numbers: Integers, r_max: float, bins: int) -> Array:
    """Count neighbours by types and distance, all images within ``r_max``.

    Returns
    -------
    numpy.ndarray
        ``(n_types, n_types, n_bins) float64``.
    """
    n_types = int(numbers.max()) + 1
    kernels = _kernels()
    if kernels is not None:
        atoms = _binned(kernels, frame, numbers, r_max)
        once = kernels.count_distances(r_max, bins, n_types, *atoms)
        return np.asarray(once + once.transpose(1, 0, 2), np.float64)
    first, second, _, distances = _neighbors(frame, r_max)
    near = distances < r_max
    place = np.minimum((distances[near] * (bins / r_max)).astype(np.int64), bins - 1)
    pair = numbers[first[near]] * n_types + numbers[second[near]]
    counts = np.bincount(pair * bins + place, minlength=n_types * n_types * bins)
    return counts.reshape(n_types, n_types, bins).astype(np.float64)


def _angle_counts(
    frame: Frame, numbers: Integers, cutoffs: Array, bins: int
) -> Integers:
    """Count angles: ``(n_types, n_types, n_types, n_bins) int64``, centre first."""
    n_types = len(cutoffs)
    kernels = _kernels()
    if kernels is not None:
        atoms = _binned(kernels, frame, numbers, float(cutoffs.max()))
        found: Integers = kernels.count_angles(cutoffs, bins, n_types, *atoms)
        return found
    first, second, shifts, distances = _neighbors(frame, float(cutoffs.max()))
    keep = distances < cutoffs[numbers[first], numbers[second]]
    first, second, shifts = first[keep], second[keep], shifts[keep]
    vectors = frame.positions[second] + shifts @ frame.matrix - frame.positions[first]
    vectors = vectors / np.linalg.norm(vectors, axis=1)[:, None]
    counts = np.zeros((n_types, n_types, n_types, bins), np.int64)
    for atom in np.unique(first):
        mine = first == atom
        directions, ends = vectors[mine], numbers[second[mine]]
        i, j = np.triu_indices(len(ends), 1)
        cosines = np.clip((directions[i] * directions[j]).sum(axis=1), -1.0, 1.0)
        place = (np.arccos(cosines) * (bins / math.pi)).astype(np.int64)
        low, high = np.minimum(ends[i], ends[j]), np.maximum(ends[i], ends[j])
        np.add.at(counts[numbers[atom]], (low, high, np.minimum(place, bins - 1)), 1)
    return counts


def _neighbors(
    frame: Frame, radius: float
) -> tuple[Integers, Integers, Integers, Array]:
    """Return pairs, lattice vectors and distances from pymatgen's neighbour list."""
    first, second, shifts, distances = pairs_within(
        frame.positions, frame.matrix, radius
    )
    # The atom itself, at distance exactly zero, is no neighbour.
    itself = (first == second) & (shifts == 0).all(axis=1)
    keep = ~itself
    return (
        first[keep],
        second[keep],
        shifts[keep].astype(np.int64),
        distances[keep],
    )
