"""Many crystal graphs in flat arrays, and batches of them as one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.graphs import (
    HEADER_BYTES,
    CrystalGraph,
    read_headers,
    unpack_graph,
)


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """Several graphs as one flat graph with atoms numbered through.

    Parameters
    ----------
    numbers
        ``(n_atoms,) int64``.
    edge_index
        ``(2, n_edges) int64``, centre and neighbour among all atoms of the batch.
    distances
        ``(n_edges,) float32``, Å.
    graph_index
        ``(n_atoms,) int64``, the graph of each atom.
    degrees
        ``(n_atoms,) int64``, edges of each atom.
    graph_sizes
        ``(n_graphs,) int64``, atoms of each graph.
    """

    numbers: NDArray[np.int64]
    edge_index: NDArray[np.int64]
    distances: NDArray[np.float32]
    graph_index: NDArray[np.int64]
    degrees: NDArray[np.int64]
    graph_sizes: NDArray[np.int64]

    @property
    def n_graphs(self) -> int:
        """Number of graphs."""
        return int(self.graph_sizes.shape[0])


@dataclass(frozen=True, eq=False)
class GraphTable:
    """Many graphs in flat arrays, which may be memory-mapped files.

    Parameters
    ----------
    numbers, degrees
        ``(n_atoms,) uint8`` and ``(n_atoms,) uint16`` over all graphs.
    neighbors, distances
        ``(n_edges,)``, index within its own graph, ``int32`` or, in files, ``int16``
        where that is enough, and ``float32`` in Å.
    atom_start, edge_start
        ``(n_graphs + 1,) int64``: graph g owns ``atom_start[g]:atom_start[g + 1]``.
    cutoff_radius, max_neighbors
        How all of the graphs were built.
    vectors
        ``(n_edges, 3) float32``, from centre to neighbour, Å; None where they were
        not kept.
    """

    numbers: NDArray[np.uint8]
    degrees: NDArray[np.uint16]
    neighbors: NDArray[np.signedinteger]
    distances: NDArray[np.float32]
    atom_start: NDArray[np.int64]
    edge_start: NDArray[np.int64]
    cutoff_radius: float
    max_neighbors: int | None
    vectors: NDArray[np.float32] | None = None

    @classmethod
    def from_graphs(cls, graphs: Sequence[CrystalGraph]) -> GraphTable:
        """Flatten graphs, in their order.

        Raises
        ------
        InputError
            If there are none, they were built in different ways, or an atom has over
            65535 neighbours.
        """
        if not graphs:
            raise InputError("a graph table needs at least one graph")
        kinds = {(graph.cutoff_radius, graph.max_neighbors) for graph in graphs}
        cutoff_radius, max_neighbors = _only_one_kind(kinds)
        vectors = [graph.vectors for graph in graphs if graph.vectors is not None]
        if len(vectors) not in (0, len(graphs)):
            raise _mixed()
        return GraphTable(
            numbers=np.concatenate([graph.numbers for graph in graphs]),
            degrees=degree_column(np.concatenate([g.degrees for g in graphs])),
            neighbors=np.concatenate([graph.edge_index[1] for graph in graphs]),
            distances=np.concatenate([g.distances for g in graphs]).astype(np.float32),
            atom_start=_starts([graph.n_atoms for graph in graphs]),
            edge_start=_starts([graph.n_edges for graph in graphs]),
            cutoff_radius=cutoff_radius,
            max_neighbors=max_neighbors,
            vectors=np.concatenate(vectors) if vectors else None,
        )

    @classmethod
    def from_packed(cls, blobs: Sequence[bytes]) -> GraphTable:
        """Flatten packed graphs without unpacking them one by one.

        Raises
        ------
        InputError
            As :meth:`from_graphs`.
        CorruptArtifactError
            As :func:`nanoos_fw.ml.graphs.unpack_graph`.
        """
        if not blobs:
            raise InputError("a graph table needs at least one graph")
        alike = read_headers(blobs)
        if alike is None:  # or damaged, which the slow way tells
            return cls.from_graphs([unpack_graph(blob) for blob in blobs])
        wide_index, has_vectors, cutoff_radius, max_neighbors, n_atoms, n_edges = alike
        size = 4 if wide_index else 2
        a1 = HEADER_BYTES + n_atoms
        a2 = a1 + 2 * n_atoms
        a3 = a2 + size * n_edges
        a4 = a3 + 4 * n_edges
        vectors = None
        if has_vectors:
            tails = zip(blobs, a4.tolist(), strict=True)
            flat = np.frombuffer(b"".join(blob[end:] for blob, end in tails), "<f4")
            vectors = flat.astype("f4", copy=False).reshape(-1, 3)
        # Equal keys in all blobs let whole columns be cut out at once.
        numbers, degrees, neighbors, distances = [], [], [], []
        ends = zip(blobs, a1.tolist(), a2.tolist(), a3.tolist(), a4.tolist(),
                   strict=True)  # fmt: skip
        for blob, e1, e2, e3, e4 in ends:
            numbers.append(blob[HEADER_BYTES:e1])
            degrees.append(blob[e1:e2])
            neighbors.append(blob[e2:e3])
            distances.append(blob[e3:e4])
        join = b"".join
        index = "<i4" if wide_index else "<i2"
        atom_start, edge_start = _starts(n_atoms), _starts(n_edges)
        counts = np.frombuffer(join(degrees), "<u2").astype(np.uint16, copy=False)
        _check_degrees(counts, atom_start, edge_start)
        return GraphTable(
            numbers=np.frombuffer(join(numbers), dtype="u1"),
            degrees=counts,
            neighbors=np.frombuffer(join(neighbors), index).astype(np.int32),
            distances=np.frombuffer(join(distances), "<f4").astype("f4", copy=False),
            atom_start=atom_start,
            edge_start=edge_start,
            cutoff_radius=cutoff_radius,
            max_neighbors=max_neighbors,
            vectors=vectors,
        )

    @classmethod
    def concatenate(cls, tables: Sequence[GraphTable]) -> GraphTable:
        """Lay tables end to end.

        Raises
        ------
        InputError
            As :meth:`from_graphs`.
        """
        if not tables:
            raise InputError("a graph table needs at least one graph")
        _only_one_kind({(t.cutoff_radius, t.max_neighbors) for t in tables})
        if len(tables) == 1:
            return tables[0]
        vectors = [table.vectors for table in tables if table.vectors is not None]
        if len(vectors) not in (0, len(tables)):
            raise _mixed()
        return GraphTable(
            numbers=np.concatenate([table.numbers for table in tables]),
            degrees=np.concatenate([table.degrees for table in tables]),
            neighbors=np.concatenate([table.neighbors for table in tables]),
            distances=np.concatenate([table.distances for table in tables]),
            atom_start=_starts(np.concatenate([np.diff(t.atom_start) for t in tables])),
            edge_start=_starts(np.concatenate([np.diff(t.edge_start) for t in tables])),
            cutoff_radius=tables[0].cutoff_radius,
            max_neighbors=tables[0].max_neighbors,
            vectors=np.concatenate(vectors) if vectors else None,
        )

    def __len__(self) -> int:
        return int(self.atom_start.shape[0]) - 1

    @property
    def graph_sizes(self) -> NDArray[np.int64]:
        """Atoms of each graph, ``(n_graphs,) int64``."""
        return np.diff(self.atom_start)

    def loads(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how much work some graphs are to a network, ``(n,) int64``.

        Counted in edges; an atom takes as long as about two.
        """
        edges = self.edge_start[rows + 1] - self.edge_start[rows]
        return edges + 2 * (self.atom_start[rows + 1] - self.atom_start[rows])

    def batch(self, rows: NDArray[np.int64] | Sequence[int]) -> GraphBatch:
        """Return some graphs as one batch, in the order of ``rows``."""
        wanted = np.asarray(rows, dtype=np.int64)
        sizes = self.atom_start[wanted + 1] - self.atom_start[wanted]
        edges_of = self.edge_start[wanted + 1] - self.edge_start[wanted]
        atoms = _ranges(self.atom_start[wanted], sizes)
        edges = _ranges(self.edge_start[wanted], edges_of)
        degrees = self.degrees[atoms].astype(np.int64)
        shift = np.cumsum(sizes) - sizes
        edge_index = np.empty((2, len(edges)), dtype=np.int64)
        edge_index[0] = np.repeat(np.arange(len(atoms)), degrees)
        edge_index[1] = self.neighbors[edges] + np.repeat(shift, edges_of)
        return GraphBatch(
            numbers=self.numbers[atoms].astype(np.int64),
            edge_index=edge_index,
            distances=np.asarray(self.distances[edges]),
            graph_index=np.repeat(np.arange(len(wanted)), sizes),
            degrees=degrees,
            graph_sizes=sizes,
        )

    def select(self, rows: NDArray[np.int64] | Sequence[int]) -> GraphTable:
        """Return a table (in memory) of some graphs, in the order of ``rows``."""
        wanted = np.asarray(rows, dtype=np.int64)
        sizes = self.atom_start[wanted + 1] - self.atom_start[wanted]
        edges_of = self.edge_start[wanted + 1] - self.edge_start[wanted]
        atoms = _ranges(self.atom_start[wanted], sizes)
        edges = _ranges(self.edge_start[wanted], edges_of)
        return GraphTable(
            numbers=np.asarray(self.numbers[atoms]),
            degrees=np.asarray(self.degrees[atoms]),
            neighbors=np.asarray(self.neighbors[edges]),
            distances=np.asarray(self.distances[edges]),
            atom_start=_starts(sizes),
            edge_start=_starts(edges_of),
            cutoff_radius=self.cutoff_radius,
            max_neighbors=self.max_neighbors,
            vectors=None if self.vectors is None else np.asarray(self.vectors[edges]),
        )


def collate_graphs(graphs: Sequence[CrystalGraph]) -> GraphBatch:
    """Return graphs as one batch, in their order."""
    return GraphTable.from_graphs(graphs).batch(np.arange(len(graphs)))


def degree_column(degrees: NDArray[np.integer]) -> NDArray[np.uint16]:
    """Return the numbers of neighbours of atoms as a table keeps them.

    Raises
    ------
    InputError
        If one does not fit.
    """
    most = int(degrees.max(initial=0))
    if most > np.iinfo(np.uint16).max:
        raise InputError(
            f"an atom has {most} neighbours; a table has room for "
            f"{np.iinfo(np.uint16).max}",
            advice="use a smaller cutoff_radius or max_neighbors",
        )
    return degrees.astype(np.uint16)


# ------------------------------------------------------------------------- private


def _check_degrees(
    degrees: NDArray[np.uint16],
    atom_start: NDArray[np.int64],
    edge_start: NDArray[np.int64],
) -> None:
    """Refuse packed graphs whose neighbours would be given to other atoms."""
    ends = np.concatenate([[0], np.cumsum(degrees, dtype=np.int64)])[atom_start]
    if not np.array_equal(ends, edge_start):
        graph = int(np.flatnonzero(np.diff(ends) != np.diff(edge_start))[0])
        raise CorruptArtifactError(
            f"the degrees of packed crystal graph {graph} of {len(ends) - 1} add up to "
            f"{ends[graph + 1] - ends[graph]}, not to its "
            f"{edge_start[graph + 1] - edge_start[graph]} edges",
            advice="featurize the structure again",
        )


def _only_one_kind(kinds: set[tuple[float, int | None]]) -> tuple[float, int | None]:
    if len(kinds) > 1:
        raise InputError(
            "graphs built in different ways cannot be mixed",
            evidence={"cutoff_radius, max_neighbors": sorted(map(str, kinds))},
            advice="featurize all structures with the same parameters",
        )
    (kind,) = kinds
    return kind


def _mixed() -> InputError:
    return InputError(
        "graphs with and without the vectors of their edges cannot be mixed",
        advice="featurize all structures with the same parameters",
    )


def _starts(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))])


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the concatenation of ``arange(start, start + length)``."""
    total = int(lengths.sum())
    return np.arange(total) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)
