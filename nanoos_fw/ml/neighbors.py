"""Periodic neighbours of many crystals: flat arrays in, flat arrays out.

The loops are compiled by numba where it is installed (``pip install
'nanoos_fw[fast]'``); without it numpy does the same search, several times slower, with
the same result. All cells are searched exactly, however flat or skewed, and whatever
their size is compared to the cutoff.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.ml import lattices as cells
from nanoos_fw.ml.lattices import (
    CUTOFF_TOLERANCE,
    ENVIRONMENT_TOLERANCE,
    MIN_DISTANCE,
    TIE_TOLERANCE,
)

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]

_STEP = 1e-9  # as in neighbor_kernels
_PAIRS_AT_ONCE = 100_000
# exp(-n²); exp(-10.5²) is below the smallest float32.
_BELL = np.exp(-(np.arange(12.0) ** 2))


@dataclass(frozen=True, eq=False)
class NeighborList:
    """Neighbours in several crystals.

    Parameters
    ----------
    degrees
        ``(n_atoms,) int64``, neighbours of each atom of all crystals.
    neighbors
        ``(n_edges,) int32``, sorted by centre; index within the crystal.
    offsets
        ``(n_edges, 3) int32``, cell of the neighbour.
    distances
        ``(n_edges,) float64``, Å.
    status
        ``(n_crystals,) int64``, 0, or why a crystal has no edges here: a constant of
        :mod:`nanoos_fw.ml.lattices`.
    detail
        ``(n_crystals, 3) float64``, which sites and what distance the status is about.
    """

    degrees: _Ints
    neighbors: NDArray[np.int32]
    offsets: NDArray[np.int32]
    distances: _Floats
    status: _Ints
    detail: _Floats


def is_compiled() -> bool:
    """Tell whether numba runs the search."""
    return importlib.util.find_spec("numba") is not None


def list_neighbors(
    lattices: _Floats, frac_coords: _Floats, atom_start: _Ints, cutoff_radius: float
) -> NeighborList:
    """List all periodic neighbours within a cutoff.

    Parameters
    ----------
    lattices
        ``(n_crystals, 3, 3)``, rows are lattice vectors in Å.
    frac_coords
        ``(n_atoms, 3)`` of all crystals; sites outside the cell are fine.
    atom_start
        ``(n_crystals + 1,)``: crystal g owns atoms ``atom_start[g]:atom_start[g + 1]``.
    cutoff_radius
        Å.

    Returns
    -------
    NeighborList
        Within one centre in no particular order. Coincident sites are neighbours at
        distance 0, and an isolated site has none: that is not an error here.

    Raises
    ------
    InputError
        If the arrays do not fit together. What is wrong with one crystal is in
        ``status``.
    """
    lattices, frac_coords, atom_start = _checked(lattices, frac_coords, atom_start)
    _check_cutoff(cutoff_radius)
    kernels = _kernels()
    if kernels is not None:
        return NeighborList(
            *kernels.list_all(lattices, frac_coords, atom_start, float(cutoff_radius))
        )
    return _by_numpy(lattices, frac_coords, None, atom_start, cutoff_radius, None)


def list_nearest(
    lattices: _Floats,
    frac_coords: _Floats,
    numbers: NDArray[np.uint8],
    atom_start: _Ints,
    cutoff_radius: float,
    max_neighbors: int | None,
) -> NeighborList:
    """List the nearest neighbours in the order of :func:`~.graphs.build_graph`.

    Parameters
    ----------
    lattices, frac_coords, atom_start, cutoff_radius
        As in :func:`list_neighbors`.
    numbers
        ``(n_atoms,) uint8``, atomic numbers.
    max_neighbors
        Neighbours to keep of each atom, or None for all.

    Returns
    -------
    NeighborList
        Crystals with coincident or isolated sites have no edges but a status.

    Raises
    ------
    InputError
        As :func:`list_neighbors`.

    Notes
    -----
    The search starts at the radius where about 1.5 times ``max_neighbors`` sites are
    expected, and widens it for the atoms that have too few.
    """
    lattices, frac_coords, atom_start = _checked(lattices, frac_coords, atom_start)
    numbers = np.ascontiguousarray(numbers, dtype=np.uint8)
    _check_cutoff(cutoff_radius)
    if numbers.shape != frac_coords.shape[:1]:
        raise InputError(
            f"{len(numbers)} atomic numbers do not fit {len(frac_coords)} sites"
        )
    if max_neighbors is not None and max_neighbors < 1:
        raise InputError(f"max_neighbors must be at least 1, not {max_neighbors}")
    kernels = _kernels()
    if kernels is not None:
        return NeighborList(
            *kernels.list_sorted(
                lattices,
                frac_coords,
                numbers,
                atom_start,
                float(cutoff_radius),
                int(max_neighbors or 0),
            )
        )
    return _by_numpy(
        lattices, frac_coords, numbers, atom_start, cutoff_radius, max_neighbors
    )


def list_nearest_of_one(
    lattice: _Floats,
    frac_coords: _Floats,
    numbers: NDArray[np.uint8],
    cutoff_radius: float,
    max_neighbors: int | None,
) -> NeighborList:
    """Do what :func:`list_nearest` does for one crystal whose numbers were checked.

    Parameters
    ----------
    lattice, frac_coords, numbers
        ``(3, 3) float64``, ``(n_atoms, 3)`` and ``(n_atoms,) uint8``.
    cutoff_radius, max_neighbors
        As in :func:`list_nearest`, and checked.

    Notes
    -----
    Checking arrays takes a third as long as the search in a small crystal.
    """
    kernels = _kernels()
    frac_coords = np.ascontiguousarray(frac_coords, dtype=np.float64)
    if kernels is None or frac_coords.shape != (len(numbers), 3):
        start = np.array([0, len(numbers)])
        return list_nearest(
            lattice[None], frac_coords, numbers, start, cutoff_radius, max_neighbors
        )
    return NeighborList(
        *kernels.list_sorted(
            lattice[None],
            frac_coords,
            numbers,
            np.array([0, len(numbers)]),
            float(cutoff_radius),
            int(max_neighbors or 0),
        )
    )


def expand_in_gaussians(
    distances: NDArray[np.floating], step: float, n_centers: int
) -> NDArray[np.float32]:
    """Return exp(-(d - mu)² / step²) at mu = 0, step, 2 step ...

    Parameters
    ----------
    distances
        ``(n,)``, Å, not negative.
    step
        Å, spacing and width.
    n_centers
        Number of centres.

    Returns
    -------
    ndarray
        ``(n, n_centers) float32``, within 1e-7 of the formula.
    """
    values = np.ascontiguousarray(distances, dtype=np.float64)
    kernels = _kernels()
    if kernels is not None:
        out = np.empty((len(values), n_centers), dtype=np.float32)
        kernels.expand(values, 1.0 / step, _BELL, out)
        return out
    centers = np.arange(n_centers) * step
    return np.exp(-(((values[:, None] - centers) / step) ** 2)).astype(np.float32)


# ----------------------------------------------------------------- order of edges


def shells_of(centre: _Ints, distances: _Floats) -> _Ints:
    """Return the shell number of edges sorted by centre and distance."""
    new = (np.diff(centre) != 0) | (np.diff(distances) > TIE_TOLERANCE)
    return np.concatenate([np.zeros(min(1, len(centre)), np.int64), np.cumsum(new)])


def order_of_edges(
    numbers: NDArray[np.uint8],
    centre: _Ints,
    neighbor: _Ints,
    offsets: _Ints,
    distances: _Floats,
    shell: _Ints,
    k: int | None,
) -> _Ints:
    """Return the edges to keep in their order (input sorted by centre, distance)."""
    n_atoms = len(numbers)
    cell = (offsets[:, 2], offsets[:, 1], offsets[:, 0], neighbor)
    z = numbers[neighbor].astype(np.int64)
    if k is None:
        return np.lexsort((*cell, z, shell))
    kth, _ = _kth_shell(centre, shell, n_atoms, k)
    near = shell <= kth[centre]
    environment = np.bincount(
        centre[near],
        weights=z[near] * np.exp(-distances[near]),
        minlength=n_atoms,
    )
    by_value = np.argsort(environment)
    classes = np.empty(n_atoms, dtype=np.int64)
    steps = np.diff(environment[by_value]) > ENVIRONMENT_TOLERANCE
    classes[by_value] = np.concatenate([[0], np.cumsum(steps)])
    order = np.lexsort((*cell, classes[neighbor], z, shell))
    degrees = np.bincount(centre, minlength=n_atoms)
    position = np.arange(len(centre)) - np.repeat(np.cumsum(degrees) - degrees, degrees)
    return order[position < k]


# ------------------------------------------------------------------------- private


@functools.cache
def _kernels() -> ModuleType | None:
    """Return the compiled search, or None without numba."""
    if not is_compiled():
        return None
    from nanoos_fw.ml import nearest_kernels

    return nearest_kernels


def _checked(
    lattices: _Floats, frac_coords: _Floats, atom_start: _Ints
) -> tuple[_Floats, _Floats, _Ints]:
    lattices = np.ascontiguousarray(lattices, dtype=np.float64)
    frac_coords = np.ascontiguousarray(frac_coords, dtype=np.float64)
    atom_start = np.ascontiguousarray(atom_start, dtype=np.int64)
    if (
        lattices.ndim != 3
        or lattices.shape[1:] != (3, 3)
        or frac_coords.ndim != 2
        or frac_coords.shape[1] != 3
        or atom_start.shape != (len(lattices) + 1,)
        or atom_start[0] != 0
        or atom_start[-1] != len(frac_coords)
        or (atom_start[1:] < atom_start[:-1]).any()
    ):
        raise InputError(
            "the arrays of the crystals do not fit together",
            evidence={
                "lattices": list(lattices.shape),
                "frac_coords": list(frac_coords.shape),
                "atom_start": list(atom_start.shape),
            },
        )
    return lattices, frac_coords, atom_start


def _check_cutoff(cutoff_radius: float) -> None:
    if not 0 < cutoff_radius < np.inf:
        raise InputError(f"cutoff_radius must be positive, not {cutoff_radius}")


def _by_numpy(
    lattices: _Floats,
    frac_coords: _Floats,
    numbers: NDArray[np.uint8] | None,
    atom_start: _Ints,
    cutoff: float,
    k: int | None,
) -> NeighborList:
    """Do what the kernels do; without numbers, what ``list_all`` does."""
    status = np.zeros(len(lattices), dtype=np.int64)
    detail = np.zeros((len(lattices), 3))
    degrees = np.zeros(len(frac_coords), dtype=np.int64)
    parts: list[tuple[_Ints, _Ints, _Floats]] = []
    for g, lattice in enumerate(lattices):
        mine = slice(int(atom_start[g]), int(atom_start[g + 1]))
        code, facts, found = _one_by_numpy(
            lattice,
            frac_coords[mine],
            None if numbers is None else numbers[mine],
            cutoff,
            k,
        )
        status[g], detail[g] = code, facts
        if found is not None:
            centre, neighbor, offsets, distances = found
            degrees[mine] = np.bincount(centre, minlength=mine.stop - mine.start)
            parts.append((neighbor, offsets, distances))
    return NeighborList(
        degrees,
        np.concatenate([np.empty(0, np.int32), *(part[0] for part in parts)]).astype(
            np.int32
        ),
        np.concatenate([np.empty((0, 3), np.int32), *(p[1] for p in parts)]).astype(
            np.int32
        ),
        np.concatenate([np.empty(0), *(part[2] for part in parts)]),
        status,
        detail,
    )


def _one_by_numpy(  # noqa: PLR0911
    lattice: _Floats,
    frac_coords: _Floats,
    numbers: NDArray[np.uint8] | None,
    cutoff: float,
    k: int | None,
) -> tuple[int, tuple[float, float, float], tuple[_Ints, _Ints, _Ints, _Floats] | None]:
    n = len(frac_coords)
    cell, transform = np.empty(6), np.empty((3, 3), dtype=np.int64)
    frac, pos = np.empty((n, 3)), np.empty((n, 3))
    shift = np.empty((n, 3), dtype=np.int64)
    with np.errstate(all="ignore"):
        code, volume, plain = cells.prepare_cell(lattice, cell, transform)
        if code == 0:
            code = cells.wrap_sites(
                frac_coords, cell, transform, plain, frac, pos, shift
            )
    if code:
        return code, (0, 0, 0), None
    expected = n * n * 4 / 3 * np.pi * cutoff**3 / volume
    if k is None and expected > cells.MAX_EDGES:
        return cells.TOO_MANY, (0, 0, expected), None
    if numbers is not None and cell[0] < MIN_DISTANCE and cell[0] <= cutoff:
        return cells.CLOSE, (0, 0, float(cell[0])), None
    radius = cutoff
    if k is not None and n:
        guess = ((2 * k + 1) * volume / n * 0.75 / np.pi) ** (1 / 3)
        radius = min(cutoff, guess)
    while True:
        centre, neighbor, steps, distances = _enumerate(pos, cell, radius)
        shell = shells_of(centre, distances)
        if radius >= cutoff or k is None:
            break
        if _complete(centre, distances, shell, n, k, radius):
            break
        radius = min(cutoff, 1.3 * radius)
    offsets = (steps - shift[neighbor] + shift[centre]) @ transform
    if np.abs(offsets).max(initial=0) > np.iinfo(np.int32).max:
        return cells.OVERFLOW, (0, 0, 0), None
    if numbers is None:
        return 0, (0, 0, 0), (centre, neighbor, offsets, distances)
    close = np.flatnonzero(distances < MIN_DISTANCE)
    if len(close):
        e = close[0]
        facts = (float(centre[e]), float(neighbor[e]), float(distances[e]))
        return cells.CLOSE, facts, None
    lonely = np.flatnonzero(np.bincount(centre, minlength=n) == 0)
    if len(lonely):
        return cells.ISOLATED, (float(lonely[0]), 0, 0), None
    order = order_of_edges(numbers, centre, neighbor, offsets, distances, shell, k)
    kept = (centre[order], neighbor[order], offsets[order], distances[order])
    return 0, (0, 0, 0), kept


def _enumerate(
    pos: _Floats, cell: _Floats, radius: float
) -> tuple[_Ints, _Ints, _Ints, _Floats]:
    """Return centre, neighbour, steps, distances, sorted by centre and distance.

    The enumeration of ``neighbor_kernels._gather_pairs``, all pairs side by side.
    """
    n = len(pos)
    l00, l10, l11, l20, l21, l22 = cell
    limit = radius * radius + CUTOFF_TOLERANCE
    reach = np.sqrt(limit)
    parts = []
    rows = max(1, _PAIRS_AT_ONCE // max(n, 1))
    for begin in range(0, n, rows):
        i = np.repeat(np.arange(begin, min(begin + rows, n)), n)
        j = np.tile(np.arange(n), len(i) // n)
        x, y, z = (pos[j] - pos[i]).T
        pair, c = _ranges((-reach - z) / l22, (reach - z) / l22)
        z = z[pair] + c * l22
        y, x = y[pair] + c * l21, x[pair] + c * l20
        rest = limit - z * z
        half = np.sqrt(np.maximum(rest, 0.0))
        layer, b = _ranges((-half - y) / l11, (half - y) / l11)
        pair, c, z = pair[layer], c[layer], z[layer]
        y, x = y[layer] + b * l11, x[layer] + b * l10
        left = rest[layer] - y * y
        side = np.sqrt(np.maximum(left, 0.0))
        line, a = _ranges((-side - x) / l00, (side - x) / l00)
        pair, x = pair[line], x[line] + a * l00
        y, z = y[line], z[line]
        squared = x * x + y * y + z * z
        steps = np.column_stack([a, b[line], c[line]])
        i, j = i[pair], j[pair]
        inside = (squared < limit) & ((i != j) | steps.any(axis=1))
        parts.append((i[inside], j[inside], steps[inside], np.sqrt(squared[inside])))
    if not parts:
        empty = np.empty(0, dtype=np.int64)
        return empty, empty, np.empty((0, 3), dtype=np.int64), np.empty(0)
    centre, neighbor, steps, distances = (
        np.concatenate(columns) for columns in zip(*parts, strict=True)
    )
    order = np.lexsort((distances, centre))
    return centre[order], neighbor[order], steps[order], distances[order]


def _ranges(low: _Floats, high: _Floats) -> tuple[_Ints, _Ints]:
    """Return all integers in [low, high], and which interval each belongs to."""
    first = np.ceil(low - _STEP).astype(np.int64)
    counts = np.floor(high + _STEP).astype(np.int64) - first + 1
    counts = np.maximum(counts, 0)
    owner = np.repeat(np.arange(len(low)), counts)
    begin = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) - begin[owner] + first[owner]


def _kth_shell(
    centre: _Ints, shell: _Ints, n_atoms: int, k: int
) -> tuple[_Ints, NDArray[np.bool_]]:
    """Return the shell of each atom's k-th neighbour, and which atoms have k."""
    degrees = np.bincount(centre, minlength=n_atoms)
    starts = np.cumsum(degrees) - degrees
    last = starts + np.minimum(degrees, k) - 1
    return np.where(degrees > 0, shell[last], -1), degrees >= k


def _complete(
    centre: _Ints,
    distances: _Floats,
    shell: _Ints,
    n_atoms: int,
    k: int,
    radius: float,
) -> bool:
    """Tell whether the whole shell of every k-th neighbour is within the radius."""
    if len(centre) == 0:
        return False
    kth, enough = _kth_shell(centre, shell, n_atoms, k)
    if not enough.all():
        return False
    ends = distances[np.searchsorted(shell, kth, side="right") - 1]
    return bool(ends.max() < radius - 2 * TIE_TOLERANCE)
