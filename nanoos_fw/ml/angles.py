"""Angles and dihedrals of a crystal graph, made when a model asks for them.

Their number grows with the square and the cube of the number of neighbours:
:func:`count_angles` and :func:`count_dihedrals` say beforehand what they take. Nothing
of this is stored; the vectors come from the graph and the sites.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.ml.graphs import CrystalGraph, cartesian_vectors

DEFAULT_MAX_BYTES = 1 << 30
_STRAIGHT = 1e-6  # sine of a bond angle below which three atoms lie on a line
_VECTOR_TOLERANCE = 1e-5  # Å; packed graphs keep distances as float32


@dataclass(frozen=True)
class TupleCount:
    """What a list of angles or dihedrals takes.

    Parameters
    ----------
    n
        Entries; for dihedrals an upper bound.
    n_bytes
        Memory of the finished arrays; about five times as much while they are made.
    """

    n: int
    n_bytes: int


@dataclass(frozen=True, eq=False)
class AngleList:
    """Edges of the line graph: pairs of edges of the graph with a common centre.

    Parameters
    ----------
    edge_pairs
        ``(2, n_angles) int32``, two edges e < f of one centre, sorted by e, then f.
    angles
        ``(n_angles,) float64``, between them at the centre, rad, 0 to pi.
    """

    edge_pairs: NDArray[np.int32]
    angles: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DihedralList:
    """Chains j - i - k - l around a central edge i -> k.

    Parameters
    ----------
    edge_triples
        ``(3, n_dihedrals) int32``: edge i -> j, central edge i -> k, edge k -> l,
        sorted by the central edge, then the first, then the last.
    dihedrals
        ``(n_dihedrals,) float64``, rad, -pi to pi, 0 where j and l are on the same
        side, with the sign of IUPAC.
    """

    edge_triples: NDArray[np.int32]
    dihedrals: NDArray[np.float64]


def edge_vectors(
    graph: CrystalGraph, frac_coords: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the vectors from centre to neighbour, ``(n_edges, 3)`` in Å.

    Parameters
    ----------
    graph
        Graph with geometry.
    frac_coords
        ``(n_atoms, 3)`` of the structure that the graph was built from.

    Raises
    ------
    InputError
        If the graph has no geometry, or its distances are not those of the sites.
    """
    if graph.offsets is None or graph.lattice is None:
        raise InputError(
            "a graph packed without geometry has no edge vectors",
            advice="build it from the structure",
        )
    sites = np.asarray(frac_coords, dtype=np.float64)
    if sites.shape != (graph.n_atoms, 3):
        raise InputError(
            f"coordinates of shape {sites.shape} do not fit {graph.n_atoms} atoms"
        )
    i, j = graph.edge_index
    vectors = cartesian_vectors(sites[j] + graph.offsets - sites[i], graph.lattice)
    lengths = np.linalg.norm(vectors, axis=1)
    if not np.allclose(lengths, graph.distances, rtol=0, atol=_VECTOR_TOLERANCE):
        raise InputError(
            "the distances of the graph are not those of these sites",
            evidence={
                "largest_difference_a": float(np.abs(lengths - graph.distances).max())
            },
        )
    return np.asarray(vectors)


def count_angles(graph: CrystalGraph) -> TupleCount:
    """Return the number of angles, exactly, without building them."""
    degrees = graph.degrees
    n = int((degrees * (degrees - 1) // 2).sum())
    return TupleCount(n, n * (2 * 4 + 8))


def count_dihedrals(graph: CrystalGraph) -> TupleCount:
    """Return an upper bound of the number of dihedrals, without building them.

    The bound counts what :func:`build_dihedrals` leaves out: ways back, and chains
    with no dihedral.
    """
    degrees = graph.degrees
    i, k = graph.edge_index
    n = int(((degrees[i] - 1) * degrees[k]).sum())
    return TupleCount(n, n * (3 * 4 + 8))


def build_angles(
    graph: CrystalGraph,
    vectors: NDArray[np.float64],
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> AngleList:
    """Build the line graph of a graph.

    Parameters
    ----------
    graph
        Edges sorted by centre.
    vectors
        Of :func:`edge_vectors`.
    max_bytes
        Refuse a list that takes more.

    Raises
    ------
    InputError
        If the list would be too large, or the vectors do not fit.
    """
    _check(graph, vectors, count_angles(graph), max_bytes, "angles")
    degrees = graph.degrees
    ends = np.cumsum(degrees)[graph.edge_index[0]]
    edges = np.arange(graph.n_edges)
    following = ends - edges - 1
    first = np.repeat(edges, following)
    second = _runs(edges + 1, following)
    u, v = vectors[first], vectors[second]
    # Unlike the arc cosine, this keeps its digits near 0 and pi.
    cross = np.linalg.norm(np.cross(u, v), axis=1)
    angles = np.arctan2(cross, np.einsum("ij,ij->i", u, v))
    return AngleList(np.stack([first, second]).astype(np.int32), angles)


def build_dihedrals(
    graph: CrystalGraph,
    vectors: NDArray[np.float64],
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> DihedralList:
    """Build all dihedrals j - i - k - l of four different atoms.

    Left out are chains with three atoms on a line, which have no dihedral. A chain
    whose central edge is in the graph both ways appears twice, once from each end.

    Parameters
    ----------
    graph
        Graph with geometry, edges sorted by centre.
    vectors, max_bytes
        As in :func:`build_angles`.

    Raises
    ------
    InputError
        As :func:`build_angles`.
    """
    _check(graph, vectors, count_dihedrals(graph), max_bytes, "dihedrals")
    if graph.offsets is None:
        raise InputError("a graph packed without geometry has no dihedrals")
    degrees = graph.degrees
    begin = np.cumsum(degrees) - degrees
    i, k = graph.edge_index
    edges = np.arange(graph.n_edges)
    # Pairs (central, first), then triples with every edge of k.
    central = np.repeat(edges, degrees[i])
    first = _runs(begin[i], degrees[i])
    differ = first != central
    central, first = central[differ], first[differ]
    many = degrees[k[central]]
    last = _runs(begin[k[central]], many)
    central, first = np.repeat(central, many), np.repeat(first, many)
    end = graph.offsets[central] + graph.offsets[last]
    neighbor = graph.edge_index[1]
    back = (neighbor[last] == i[central]) & ~end.any(axis=1)
    ring = (neighbor[last] == neighbor[first]) & (end == graph.offsets[first]).all(1)
    keep = ~(back | ring)
    central, first, last = central[keep], first[keep], last[keep]
    a, b, c = -vectors[first], vectors[central], vectors[last]
    left, right = np.cross(a, b), np.cross(b, c)
    lengths = np.linalg.norm(vectors, axis=1)
    bent = np.linalg.norm(left, axis=1) > _STRAIGHT * lengths[first] * lengths[central]
    bent &= np.linalg.norm(right, axis=1) > _STRAIGHT * lengths[central] * lengths[last]
    sine = lengths[central] * np.einsum("ij,ij->i", a, right)
    dihedrals = np.arctan2(sine, np.einsum("ij,ij->i", left, right))
    triples = np.stack([first, central, last])[:, bent]
    return DihedralList(triples.astype(np.int32), dihedrals[bent])


# ------------------------------------------------------------------------- private


def _runs(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the concatenation of ``arange(start, start + length)``."""
    total = int(lengths.sum())
    return np.arange(total) + np.repeat(starts - np.cumsum(lengths) + lengths, lengths)


def _check(
    graph: CrystalGraph,
    vectors: NDArray[np.float64],
    count: TupleCount,
    max_bytes: int,
    what: str,
) -> None:
    if vectors.shape != (graph.n_edges, 3):
        raise InputError(
            f"vectors of shape {vectors.shape} do not fit {graph.n_edges} edges",
            advice="take those of edge_vectors",
        )
    if count.n_bytes > max_bytes:
        raise InputError(
            f"{count.n} {what} would take {count.n_bytes / 2**20:.0f} MiB",
            evidence={"n": count.n, "n_bytes": count.n_bytes, "max_bytes": max_bytes},
            advice="take fewer neighbours, or raise max_bytes",
        )
