"""What graphs are like in composition and surroundings, and how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.features import element_table

_SHELL = 12
_FIRST_SHELL = 1.15
_BLOCK = 1024
_ATOMIC = (
    "electronegativity",
    "covalent_radius",
    "group",
    "period",
    "ionization_energy",
    "molar_volume",
    "melting_point",
)


def nearest_distance(
    vectors: NDArray[np.float32],
    references: NDArray[np.float32],
    k: int,
    *,
    skip_self: bool = False,
) -> NDArray[np.float64]:
    """Return the mean distance of each vector to its ``k`` nearest references.

    Parameters
    ----------
    vectors, references
        ``(n, d)`` and ``(r, d)``, standardized.
    k
        Number of neighbours.
    skip_self
        The vectors are the references: row i does not count for itself.

    Returns
    -------
    ``(n,) float64``
        Euclidean distances over the square root of ``d``.
    """
    far = references.astype(np.float64)
    squares = (far * far).sum(axis=1)
    k = min(k, len(far) - skip_self)
    answer = np.zeros(len(vectors))
    if k < 1:
        return answer
    for start in range(0, len(vectors), _BLOCK):
        near = vectors[start : start + _BLOCK].astype(np.float64)
        table = (near * near).sum(axis=1)[:, None] + squares - 2.0 * near @ far.T
        if skip_self:
            rows = np.arange(len(near))
            table[rows, rows + start] = np.inf
        closest = np.partition(table, k - 1, axis=1)[:, :k]
        answer[start : start + _BLOCK] = np.sqrt(np.maximum(closest, 0.0)).mean(axis=1)
    return answer / math.sqrt(max(1, far.shape[1]))


def describe_graphs(table: GraphTable) -> NDArray[np.float64]:
    """Return what composition and surroundings of graphs are like, ``(n, 30)``.

    Mean and standard deviation over the atoms of seven properties of the elements;
    mean and standard deviation over the atoms of the distance d1 to the nearest
    neighbour (Å), means of the distances to the 2nd to 12th in units of d1, of the
    number of neighbours within 1.15 d1 among the first twelve, of the share of other
    elements among those, and of the 12th distance (Å). No answer depends on the
    choice of cell, its orientation, or the order of sites. Where a neighbour is
    beyond the cutoff radius, that radius stands for it.
    """
    sizes = table.graph_sizes
    graph = np.repeat(np.arange(len(table)), sizes)
    numbers = np.asarray(table.numbers, dtype=np.int64)
    shells, unlike = _shells(table, numbers)
    nearest = np.maximum(shells[:, :1], 1e-6)
    ratios = shells / nearest
    close = ratios <= _FIRST_SHELL
    n_close = np.maximum(close.sum(axis=1), 1)
    columns = [
        *_atomic_columns(numbers, graph, sizes),
        *_moments(shells[:, 0], graph, sizes),
        *(_mean(ratios[:, j], graph, sizes) for j in range(1, _SHELL)),
        _mean(n_close.astype(float), graph, sizes),
        _mean((unlike & close).sum(axis=1) / n_close, graph, sizes),
        _mean(shells[:, -1], graph, sizes),
    ]
    return np.stack(columns, axis=1)


# ------------------------------------------------------------------------- private


def _mean(
    values: NDArray[np.float64], graph: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.float64]:
    total = np.bincount(graph, weights=values, minlength=len(sizes))
    return total / np.maximum(sizes, 1)


def _moments(
    values: NDArray[np.float64], graph: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean = _mean(values, graph, sizes)
    return mean, np.sqrt(_mean((values - mean[graph]) ** 2, graph, sizes))


def _atomic_columns(
    numbers: NDArray[np.int64], graph: NDArray[np.int64], sizes: NDArray[np.int64]
) -> Iterator[NDArray[np.float64]]:
    elements = element_table()
    for name in _ATOMIC:
        values, known = elements.column(name)
        filled = np.where(known, values, values[known].mean())
        yield from _moments(filled[numbers], graph, sizes)


def _shells(
    table: GraphTable, numbers: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the first twelve distances of each atom, and which are to other elements.

    ``(n_atoms, 12) float64`` in Å, rising, and ``(n_atoms, 12) bool``.
    """
    degrees = np.asarray(table.degrees, dtype=np.int64)
    centre = np.repeat(np.arange(len(degrees)), degrees)
    edges_of = np.diff(table.edge_start)
    neighbor = np.asarray(table.neighbors, dtype=np.int64) + np.repeat(
        table.atom_start[:-1], edges_of
    )
    distances = np.asarray(table.distances, dtype=np.float64)
    order = np.lexsort((distances, centre))
    start = np.cumsum(degrees) - degrees
    rank = np.arange(len(order)) - start[centre]  # centres come in rising order
    first = rank < _SHELL
    chosen, atom, place = order[first], centre[first], rank[first]
    shells = np.full((len(degrees), _SHELL), float(table.cutoff_radius))
    shells[atom, place] = distances[chosen]
    unlike = np.zeros((len(degrees), _SHELL), dtype=bool)
    unlike[atom, place] = numbers[neighbor[chosen]] != numbers[atom]
    return shells, unlike
