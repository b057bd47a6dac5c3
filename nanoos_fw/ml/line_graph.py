"""Graphs with angles, and models that predict from them.

A model that sees angles must see all neighbours within its cutoff: of neighbours that
are equally far, a graph with a fixed number of them keeps some, and the angles between
those depend on how the cell was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphBatch, GraphTable
from nanoos_fw.ml.crystal_tables import read_crystals
from nanoos_fw.ml.features import graph_from_repr
from nanoos_fw.ml.graphs import CrystalArrays, graph_error
from nanoos_fw.ml.neighbors import list_nearest

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
    """A :class:`GraphTable` whose batches have angles.

    Parameters
    ----------
    vectors
        ``(n_edges, 3) float32``, from centre to neighbour, Å.
    angle_cutoff
        Å.
    """

    vectors: NDArray[np.float32]
    angle_cutoff: float

    def batch(self, rows: NDArray[np.int64] | Sequence[int]) -> LineGraphBatch:
        """Return some graphs as one batch, in the order of ``rows``."""
        plain = super().batch(rows)
        vectors = self.vectors[self._edges_of(rows)]
        pairs, cosines = pair_edges(
            plain.degrees, plain.distances, vectors, self.angle_cutoff
        )
        return LineGraphBatch(**vars(plain), edge_pairs=pairs, cosines=cosines)

    def select(self, rows: NDArray[np.int64] | Sequence[int]) -> LineGraphTable:
        """Return a table (in memory) of some graphs, in the order of ``rows``."""
        plain = super().select(rows)
        return LineGraphTable(
            **vars(plain),
            vectors=np.asarray(self.vectors[self._edges_of(rows)]),
            angle_cutoff=self.angle_cutoff,
        )

    def _edges_of(self, rows: NDArray[np.int64] | Sequence[int]) -> NDArray[np.int64]:
        spans = [
            np.arange(self.edge_start[row], self.edge_start[row + 1])
            for row in np.asarray(rows, dtype=np.int64)
        ]
        return np.concatenate([np.zeros(0, dtype=np.int64), *spans])


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
        flat = read_crystals(crystals[begin : begin + _CRYSTALS_AT_ONCE], begin, errors)
        if not len(flat.positions):
            continue
        table, good = _build(flat, begin, cutoff_radius, angle_cutoff, errors)
        if len(good):
            tables.append(table)
            positions += (begin + flat.positions[good]).tolist()
    places = np.array(positions, dtype=np.int64)
    whole = _join(tables) if tables else None
    return whole, places, dict(sorted(errors.items()))


def line_graphs_of_reprs(
    graph_reprs: Sequence[Any], *, angle_cutoff: float
) -> LineGraphTable:
    """Return graphs of :func:`.features.extract_structure_features` as a table.

    Raises
    ------
    InputError
        If one has no vectors, as packed graphs, or was built with a fixed number of
        neighbours.
    """
    graphs = []
    vectors = [np.zeros((0, 3), dtype=np.float32)]
    for graph_repr in graph_reprs:
        if not isinstance(graph_repr, Mapping) or graph_repr.get("vectors") is None:
            raise InputError(
                "a model that sees angles needs the vectors of the edges, which this "
                "graph does not hold",
                advice="give it the graph_repr of extract_structure_features, or the "
                "structure itself to predict_crystals",
            )
        graph = graph_from_repr(graph_repr)
        own = np.asarray(graph_repr["vectors"], dtype=np.float32)
        lengths = np.linalg.norm(own, axis=-1)
        if own.shape != (graph.n_edges, 3) or not np.allclose(
            lengths, graph.distances, atol=1e-4
        ):
            raise InputError("the vectors of the graph are not those of its edges")
        graphs.append(graph)
        vectors.append(own)
    return LineGraphTable(
        **vars(GraphTable.from_graphs(graphs)),
        vectors=np.concatenate(vectors),
        angle_cutoff=angle_cutoff,
    )


# ------------------------------------------------------------------------- private


def _build(
    flat: CrystalArrays,
    begin: int,
    cutoff_radius: float,
    angle_cutoff: float,
    errors: dict[int, InputError | CorruptArtifactError],
) -> tuple[LineGraphTable, NDArray[np.int64]]:
    found = list_nearest(
        flat.lattices,
        flat.frac_coords,
        flat.numbers,
        flat.atom_start,
        cutoff_radius,
        None,
    )
    for row in np.flatnonzero(found.status).tolist():
        errors[begin + int(flat.positions[row])] = graph_error(
            flat, found, row, cutoff_radius
        )
    sizes = np.diff(flat.atom_start)
    edge_start = np.concatenate([[0], np.cumsum(found.degrees)])[flat.atom_start]
    edges_of = np.diff(edge_start)
    crystal = np.repeat(np.arange(len(sizes)), edges_of)
    first = flat.atom_start[crystal]
    centre = np.repeat(np.arange(len(flat.numbers)), found.degrees)
    steps = flat.frac_coords[first + found.neighbors] + found.offsets
    steps -= flat.frac_coords[centre]
    vectors = np.einsum("ij,ijk->ik", steps, flat.lattices[crystal])
    table = LineGraphTable(
        numbers=flat.numbers,
        degrees=found.degrees.astype(np.uint16),
        neighbors=found.neighbors,
        distances=found.distances.astype(np.float32),
        atom_start=flat.atom_start,
        edge_start=edge_start,
        cutoff_radius=float(cutoff_radius),
        max_neighbors=None,
        vectors=vectors.astype(np.float32),
        angle_cutoff=angle_cutoff,
    )
    good = np.flatnonzero(found.status == 0)
    return (table if len(good) == len(sizes) else table.select(good)), good


def _join(tables: Sequence[LineGraphTable]) -> LineGraphTable:
    def starts(name: str) -> NDArray[np.int64]:
        lengths = [np.diff(getattr(table, name)) for table in tables]
        return np.concatenate([[0], np.cumsum(np.concatenate(lengths))])

    columns = ("numbers", "degrees", "neighbors", "distances", "vectors")
    whole: dict[str, Any] = {
        name: np.concatenate([getattr(table, name) for table in tables])
        for name in columns
    }
    return LineGraphTable(
        **whole,
        atom_start=starts("atom_start"),
        edge_start=starts("edge_start"),
        cutoff_radius=tables[0].cutoff_radius,
        max_neighbors=None,
        angle_cutoff=tables[0].angle_cutoff,
    )
