"""Scalar features of graphs, none of which depends on the choice of the cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.features import STATISTICS, element_table

GRAPH_SCALARS = "graph"
"""Source of features that :func:`graph_scalars` makes."""
_ATOM_QUANTITIES = ("nearest_distance", "mean_distance", "farthest_distance")


@dataclass(frozen=True, eq=False)
class GraphScalars:
    """Scalar features of many graphs.

    Parameters
    ----------
    names
        Of the ``p`` columns.
    values
        ``(n, p) float64``; NaN where an element has no published value.
    elements
        Atomic numbers that occur.
    cutoff_radius, max_neighbors
        How the graphs were built.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]
    elements: tuple[int, ...]
    cutoff_radius: float
    max_neighbors: int | None


def graph_scalars(table: GraphTable) -> GraphScalars:
    """Return scalar features of graphs, none of which depends on the size of the cell.

    Parameters
    ----------
    table
        ``n`` graphs. Composition: number of elements, and over the atoms the mean,
        minimum, maximum, range and standard deviation of each elemental property
        (:data:`nanoos_fw.ml.features.ELEMENT_PROPERTIES`). Structure: the same
        statistics of the distance (Å) from an atom to its nearest, its average and
        its farthest neighbour in the graph, and of the number of neighbours.

    Notes
    -----
    The elemental part is the description of L. Ward et al., npj Comput. Mater. 2,
    16028 (2016), on fewer properties.
    """
    starts = table.atom_start[:-1]
    sizes = table.graph_sizes
    numbers = np.asarray(table.numbers)
    elements = element_table()
    degrees = np.asarray(table.degrees).astype(np.int64)
    edge_starts = np.cumsum(degrees) - degrees
    distances = np.asarray(table.distances, dtype=np.float64)
    filled = degrees > 0
    per_atom = np.full((len(_ATOM_QUANTITIES), len(numbers)), np.nan)
    if filled.any():
        begin = edge_starts[filled]
        per_atom[0, filled] = np.minimum.reduceat(distances, begin)
        per_atom[1, filled] = np.add.reduceat(distances, begin) / degrees[filled]
        per_atom[2, filled] = np.maximum.reduceat(distances, begin)
    quantities = {
        name: np.where(elements.known[numbers, i], elements.values[numbers, i], np.nan)
        for i, name in enumerate(elements.names)
    }
    quantities |= dict(zip(_ATOM_QUANTITIES, per_atom, strict=True))
    quantities["n_neighbors"] = degrees.astype(np.float64)
    names, columns = ["n_elements"], [_distinct(numbers, starts, sizes)]
    for name, values in quantities.items():
        mean = np.add.reduceat(values, starts) / sizes
        low = np.minimum.reduceat(values, starts)
        high = np.maximum.reduceat(values, starts)
        deviation = (values - np.repeat(mean, sizes)) ** 2
        std = np.sqrt(np.add.reduceat(deviation, starts) / sizes)
        names += [f"{name}_{statistic}" for statistic in STATISTICS]
        columns += [mean, low, high, high - low, std]
    return GraphScalars(
        tuple(names),
        np.stack(columns, axis=1),
        tuple(np.unique(numbers).tolist()),
        table.cutoff_radius,
        table.max_neighbors,
    )


# ------------------------------------------------------------------------- private


def _distinct(
    numbers: NDArray[np.uint8], starts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the number of elements of each graph."""
    seen = np.zeros((len(starts), 119), dtype=bool)
    seen[np.repeat(np.arange(len(starts)), sizes), numbers] = True
    return np.asarray(seen.sum(axis=1), dtype=np.float64)
