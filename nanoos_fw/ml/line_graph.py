"""Graphs with angles, and models that predict from them.

A model that sees angles must see all neighbours within its cutoff: of neighbours that
are equally far, a graph with a fixed number of them keeps some, and the angles between
those depend on how the cell was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphBatch, GraphTable, degree_column
from nanoos_fw.ml.features import AnyGraph, as_graph
from nanoos_fw.ml.graphs import (
    CrystalArrays,
    CrystalGraph,
    graph_error,
    read_arrays,
    vectors_of_arrays,
)

if TYPE_CHECKING:
    from pymatgen.core import Structure

_CRYSTALS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class LineGraphBatch(GraphBatch):
    """A :class:`GraphBatch` with the angles of its edges.

    Parameters
    ----------
    edge_pairs
        ``(2, n_pairs) int64``: two different edges with a common centre, both as
        short as the cutoff of angles; each pair in both orders, sorted by the first.
    cosines
        ``(n_pairs,) float32``, of the angle between them.
    """

    edge_pairs: NDArray[np.int64]
    cosines: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LineGraphTable(GraphTable):
    """A :class:`GraphTable` with vectors, whose batches have angles.

    Parameters
    ----------
    angle_cutoff
        Å.
    """

    angle_cutoff: float = field(kw_only=True)

    def batch(self, rows: NDArray[np.int64] | Sequence[int]) -> LineGraphBatch:
        """Return some graphs as one batch, in the order of ``rows``."""
        plain = super().batch(rows)
        edges = self._edges_of(rows)
        pairs, cosines = pair_edges(
            plain.degrees, plain.distances, self._vectors[edges], self.angle_cutoff
        )
        return LineGraphBatch(**vars(plain), edge_pairs=pairs, cosines=cosines)

    def select(self, rows: NDArray[np.int64] | Sequence[int]) -> LineGraphTable:
        """Return a table (in memory) of some graphs, in the order of ``rows``."""
        plain = super().select(rows)
        return LineGraphTable(**vars(plain), angle_cutoff=self.angle_cutoff)

    def loads(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how much work some graphs are to a network, ``(n,) int64``.

        Counted in angles, each in both orders; an edge takes as long as about two.
        """
        loads = []
        for row in rows:
            edges = slice(self.edge_start[row], self.edge_start[row + 1])
            atoms = slice(self.atom_start[row], self.atom_start[row + 1])
            ends = np.cumsum(self.degrees[atoms].astype(np.int64))
            short = np.cumsum(self.distances[edges] <= self.angle_cutoff)
            counts = np.diff(np.append(0, short)[np.append(0, ends)])
            loads.append((counts * (counts - 1)).sum() + 2 * len(short))
        return np.array(loads, dtype=np.int64)

    @property
    def _vectors(self) -> NDArray[np.float32]:
        if self.vectors is None:
            raise _no_vectors()
        return self.vectors

    def _edges_of(self, rows: NDArray[np.int64] | Sequence[int]) -> NDArray[np.int64]:
        spans = [
            np.arange(self.edge_start[row], self.edge_start[row + 1])
            for row in np.asarray(rows, dtype=np.int64)
        ]
        return np.concatenate([np.zeros(0, dtype=np.int64), *spans])


def with_angles(table: GraphTable, angle_cutoff: float) -> LineGraphTable:
    """Return a table whose batches have angles; its arrays are not copied.

    Parameters
    ----------
    table
        Graphs of all neighbours within a cutoff, with vectors.
    angle_cutoff
        Å.

    Raises
    ------
    InputError
        If there are no vectors, the number of neighbours was fixed, or angles would
        reach further than the graphs.
    """
    if table.vectors is None:
        raise _no_vectors()
    if table.max_neighbors is not None:
        raise InputError(
            f"graphs of {table.max_neighbors} neighbours do not do for angles: which "
            "of equally far neighbours they hold depends on the choice of the cell",
            advice="featurize with all neighbours within the cutoff "
            "(`--neighbors 0`, max_neighbors: null)",
        )
    if angle_cutoff > table.cutoff_radius:
        raise InputError(
            f"angle_cutoff {angle_cutoff:g} Å is beyond the cutoff of the graphs, "
            f"{table.cutoff_radius:g} Å",
            advice="lower angle_cutoff, or featurize with a larger cutoff_radius",
        )
    return LineGraphTable(**{**vars(table), "angle_cutoff": angle_cutoff})


def pair_edges(
    degrees: NDArray[np.int64],
    distances: NDArray[np.float32],
    vectors: NDArray[np.float32],
    angle_cutoff: float,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the pairs of short edges with a common centre, and their cosines.

    Parameters
    ----------
    degrees
        ``(n_atoms,)``, edges of each atom; edges are sorted by centre.
    distances, vectors
        ``(n_edges,)`` and ``(n_edges, 3)``, Å.
    angle_cutoff
        Å.

    Returns
    -------
    edge_pairs, cosines
        As in :class:`LineGraphBatch`.
    """
    centre = np.repeat(np.arange(len(degrees)), degrees)
    short = np.flatnonzero(distances <= angle_cutoff)
    counts = np.bincount(centre[short], minlength=len(degrees))
    begins = np.cumsum(counts) - counts
    # Each short edge meets all short edges of its centre, then not itself.
    many = counts[centre[short]]
    first = np.repeat(np.arange(len(short)), many)
    inside = np.arange(len(first)) - np.repeat(np.cumsum(many) - many, many)
    second = inside + np.repeat(begins[centre[short]], many)
    differ = first != second
    pairs = np.stack([short[first[differ]], short[second[differ]]])
    units = vectors / np.maximum(distances, 1e-12)[:, None]
    cosines = np.einsum("ij,ij->i", units[pairs[0]], units[pairs[1]])
    return pairs, np.clip(cosines, -1.0, 1.0).astype(np.float32)


def line_graphs_of_crystals(
    crystals: Sequence[Structure | Mapping[str, Any]],
    *,
    cutoff_radius: float,
    angle_cutoff: float,
) -> tuple[
    LineGraphTable | None,
    NDArray[np.int64],
    dict[int, InputError | CorruptArtifactError],
]:
    """Build the graphs with angles of many crystals.

    Parameters
    ----------
    crystals
        As in :func:`nanoos_fw.ml.crystal_tables.build_table`.
    cutoff_radius, angle_cutoff
        Å, of bonds and of bonds that make angles.

    Returns
    -------
    table, positions, errors
        As :func:`nanoos_fw.ml.crystal_tables.build_table`.
    """
    errors: dict[int, InputError | CorruptArtifactError] = {}
    tables: list[LineGraphTable] = []
    positions: list[int] = []
    for begin in range(0, len(crystals), _CRYSTALS_AT_ONCE):
        flat, refused = read_arrays(crystals[begin : begin + _CRYSTALS_AT_ONCE])
        errors.update({begin + at: error for at, error in refused.items()})
        if not len(flat.positions):
            continue
        table, good = _build(flat, begin, cutoff_radius, angle_cutoff, errors)
        if len(good):
            tables.append(table)
            positions += (begin + flat.positions[good]).tolist()
    places = np.array(positions, dtype=np.int64)
    whole = None
    if tables:
        whole = with_angles(GraphTable.concatenate(tables), angle_cutoff)
    return whole, places, dict(sorted(errors.items()))


def line_graphs_of(
    graphs: Sequence[AnyGraph], *, angle_cutoff: float
) -> LineGraphTable:
    """Return graphs in any form that holds the vectors of edges as a table.

    Parameters
    ----------
    graphs
        Each packed with vectors, or of :func:`.features.extract_structure_features`.
    angle_cutoff
        Å.

    Raises
    ------
    InputError
        As :func:`with_angles`.
    """
    packed = [graph for graph in graphs if isinstance(graph, bytes)]
    if len(packed) == len(graphs):
        table = GraphTable.from_packed(packed)
    else:
        table = GraphTable.from_graphs([_with_vectors(graph) for graph in graphs])
    return with_angles(table, angle_cutoff)


# ------------------------------------------------------------------------- private


def _no_vectors() -> InputError:
    return InputError(
        "a model that sees angles needs the vectors of the edges, which these graphs "
        "do not hold",
        advice="featurize with vectors (`nanoos features compute --vectors`), give "
        "the graph_repr of extract_structure_features, or the structures themselves",
    )


def _with_vectors(graph: AnyGraph) -> CrystalGraph:
    if not isinstance(graph, Mapping) or graph.get("vectors") is None:
        return as_graph(graph)
    plain = as_graph(graph)
    own = np.asarray(graph["vectors"], dtype=np.float32)
    lengths = np.linalg.norm(own, axis=-1)
    if own.shape != (plain.n_edges, 3) or not np.allclose(
        lengths, plain.distances, atol=1e-4
    ):
        raise InputError("the vectors of the graph are not those of its edges")
    return replace(plain, vectors=own)


def _build(
    flat: CrystalArrays,
    begin: int,
    cutoff_radius: float,
    angle_cutoff: float,
    errors: dict[int, InputError | CorruptArtifactError],
) -> tuple[LineGraphTable, NDArray[np.int64]]:
    found = flat.nearest(cutoff_radius, None)
    for row in np.flatnonzero(found.status).tolist():
        errors[begin + int(flat.positions[row])] = graph_error(
            flat, found, row, cutoff_radius
        )
    table = LineGraphTable(
        numbers=flat.numbers,
        degrees=degree_column(found.degrees),
        neighbors=found.neighbors,
        distances=found.distances.astype(np.float32),
        atom_start=flat.atom_start,
        edge_start=np.concatenate([[0], np.cumsum(found.degrees)])[flat.atom_start],
        cutoff_radius=float(cutoff_radius),
        max_neighbors=None,
        vectors=vectors_of_arrays(flat, found),
        angle_cutoff=angle_cutoff,
    )
    good = np.flatnonzero(found.status == 0)
    return (table if len(good) == len(table) else table.select(good)), good
