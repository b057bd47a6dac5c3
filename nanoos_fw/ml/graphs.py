"""Crystal graphs: periodic neighbours, their order and their bytes.

Conventions of every array here and downstream: an *edge* goes from a centre atom
``i = edge_index[0]`` to a neighbour ``j = edge_index[1]`` in the cell
``offsets`` (integer lattice vectors), and ``distances`` holds
``|r_j + offsets @ lattice - r_i|`` in Å. Edges are sorted by centre.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError

if TYPE_CHECKING:
    from pymatgen.core import Structure

TIE_TOLERANCE = 1e-4
"""Distances closer than this (Å) belong to one shell; see :func:`build_graph`."""
ENVIRONMENT_TOLERANCE = 1e-3
"""Environment numbers closer than this belong to one class (dimensionless)."""
MIN_DISTANCE = 0.1
"""Two sites closer than this (Å) are one site written twice."""

_NUMERICAL_TOLERANCE = 1e-8
_MAX_DEGREE = np.iinfo(np.uint16).max

# Packed form: this header, then Z u1, degree u2, neighbour i2 or i4, distance f4, and
# with geometry offsets i1 or i2 and the lattice f8. Little endian throughout.
_HEADER = struct.Struct("<4sBBHIIdI")
_MAGIC = b"NOCG"
_PACK_VERSION = 1
_WIDE_INDEX, _GEOMETRY, _WIDE_OFFSETS = 1, 2, 4


@dataclass(frozen=True, eq=False)
class CrystalGraph:
    """The neighbours of every atom of one crystal.

    Parameters
    ----------
    numbers
        ``(n_atoms,) uint8``, atomic numbers.
    edge_index
        ``(2, n_edges) int32``, centre and neighbour, sorted by centre.
    distances
        ``(n_edges,) float64``, Å.
    cutoff_radius
        Å; no edge is longer.
    max_neighbors
        Neighbours kept of each atom, or None for all within the cutoff.
    offsets
        ``(n_edges, 3) int32``, cell of the neighbour. None for a graph that was
        packed without geometry.
    lattice
        ``(3, 3) float64``, rows are lattice vectors in Å. None like ``offsets``.
    """

    numbers: NDArray[np.uint8]
    edge_index: NDArray[np.int32]
    distances: NDArray[np.float64]
    cutoff_radius: float
    max_neighbors: int | None = None
    offsets: NDArray[np.int32] | None = None
    lattice: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        n_edges = self.distances.shape[0]
        offsets = (n_edges, 3) if self.offsets is None else self.offsets.shape
        lattice = (3, 3) if self.lattice is None else self.lattice.shape
        if (
            self.numbers.ndim != 1
            or self.edge_index.shape != (2, n_edges)
            or offsets != (n_edges, 3)
            or lattice != (3, 3)
        ):
            raise InputError(
                "the arrays of a crystal graph do not fit together",
                evidence={
                    "numbers": list(self.numbers.shape),
                    "edge_index": list(self.edge_index.shape),
                    "distances": list(self.distances.shape),
                    "offsets": list(offsets),
                    "lattice": list(lattice),
                },
            )

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return int(self.numbers.shape[0])

    @property
    def n_edges(self) -> int:
        """Number of edges; each pair of atoms counts once per direction."""
        return int(self.distances.shape[0])

    @property
    def degrees(self) -> NDArray[np.int64]:
        """Neighbours of each atom, ``(n_atoms,) int64``."""
        return np.bincount(self.edge_index[0], minlength=self.n_atoms)


def build_graph(
    structure: Structure,
    *,
    cutoff_radius: float = 8.0,
    max_neighbors: int | None = 12,
) -> CrystalGraph:
    """Build the graph of an ordered periodic structure.

    Parameters
    ----------
    structure
        pymatgen structure; sites outside the cell are fine.
    cutoff_radius
        Å. All periodic images within it count, those of the atom itself included.
    max_neighbors
        Keep the nearest this many of each atom; None keeps all. An atom with fewer
        keeps what it has: nothing is padded.

    Raises
    ------
    InputError
        If the structure is empty, disordered, not finite, flat, has coincident
        sites, or an atom has no neighbour within the cutoff.

    Notes
    -----
    Distances of one atom that follow each other within ``TIE_TOLERANCE`` form a
    shell. Edges are sorted by centre, then shell, then by quantities that know
    nothing of orientation: atomic number of the neighbour, class of its environment,
    its index, its cell. When the k-th neighbour falls inside a shell, the first in
    this order stay. The environment number of an atom is the sum of Z exp(-d / Å)
    over the shells up to the one that holds its own k-th neighbour, so the choice
    does not depend on the supercell or the order of the sites unless two sites of
    one element differ only beyond those shells. The published CGCNN code sorts by
    distance alone, where rounding decides [1]_.

    References
    ----------
    .. [1] T. Xie, J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018).
    """
    numbers = _numbers(structure, cutoff_radius, max_neighbors)
    radius = cutoff_radius
    if max_neighbors is not None:
        # A sphere that holds 2k + 1 neighbours on average nearly always holds k
        # around each atom, and is far smaller than the usual cutoff.
        volume = structure.volume / len(numbers)
        guess = ((2 * max_neighbors + 1) * volume * 0.75 / math.pi) ** (1 / 3)
        radius = min(cutoff_radius, guess)
    while True:
        centre, neighbor, offsets, distances = _neighbors(structure, radius)
        shell = _shells(centre, distances)
        if radius >= cutoff_radius or max_neighbors is None:
            break
        if _complete(centre, distances, shell, len(numbers), max_neighbors, radius):
            break
        radius = min(cutoff_radius, 1.3 * radius)
    _check_edges(structure, centre, neighbor, distances, len(numbers), cutoff_radius)
    order = _order(numbers, centre, neighbor, offsets, distances, shell, max_neighbors)
    return CrystalGraph(
        numbers=numbers,
        edge_index=np.stack([centre[order], neighbor[order]]).astype(np.int32),
        distances=distances[order],
        cutoff_radius=float(cutoff_radius),
        max_neighbors=max_neighbors,
        offsets=offsets[order].astype(np.int32),
        lattice=np.array(structure.lattice.matrix, dtype=np.float64),
    )


def nearest_neighbors(graph: CrystalGraph, max_neighbors: int) -> CrystalGraph:
    """Return the graph with the nearest few neighbours of each atom.

    The tie rule is that of :func:`build_graph`, so this equals building the graph
    with ``max_neighbors`` from the start.

    Raises
    ------
    InputError
        If the graph holds fewer neighbours already, or has lost its geometry.
    """
    if max_neighbors < 1 or (graph.max_neighbors or max_neighbors) < max_neighbors:
        raise InputError(
            f"cannot take {max_neighbors} neighbours of a graph that was built with "
            f"{graph.max_neighbors}"
        )
    if graph.offsets is None:
        raise InputError(
            "cannot choose among neighbours of a graph packed without geometry",
            advice="build it from the structure",
        )
    if max_neighbors == graph.max_neighbors:
        return graph
    centre, neighbor = (row.astype(np.int64) for row in graph.edge_index)
    by_distance = np.lexsort((graph.distances, centre))
    centre, neighbor = centre[by_distance], neighbor[by_distance]
    distances, offsets = graph.distances[by_distance], graph.offsets[by_distance]
    order = _order(
        graph.numbers,
        centre,
        neighbor,
        offsets.astype(np.int64),
        distances,
        _shells(centre, distances),
        max_neighbors,
    )
    return CrystalGraph(
        numbers=graph.numbers,
        edge_index=np.stack([centre[order], neighbor[order]]).astype(np.int32),
        distances=distances[order],
        cutoff_radius=graph.cutoff_radius,
        max_neighbors=max_neighbors,
        offsets=offsets[order],
        lattice=graph.lattice,
    )


# --------------------------------------------------------------------------- bytes


def pack_graph(graph: CrystalGraph, *, geometry: bool = False) -> bytes:
    """Return a graph as bytes: about 75 per atom with 12 neighbours.

    Parameters
    ----------
    graph
        Graph with edges sorted by centre.
    geometry
        Keep offsets and lattice too (36 bytes more per atom with 12 neighbours).
        Models that see distances only do not need them.

    Raises
    ------
    InputError
        If edges are not sorted by centre or an atom has over 65535 neighbours.

    Notes
    -----
    Equal graphs give equal bytes, so the SHA-256 of the bytes names the graph.
    Distances are stored as float32 (4e-7 Å at 8 Å).
    """
    degrees = graph.degrees
    if degrees.max(initial=0) > _MAX_DEGREE or np.any(np.diff(graph.edge_index[0]) < 0):
        raise InputError(
            "a graph can be packed if its edges are sorted by centre and no atom has "
            f"over {_MAX_DEGREE} neighbours"
        )
    flags = _WIDE_INDEX if graph.n_atoms > np.iinfo(np.int16).max else 0
    body = [
        graph.numbers.astype("u1").tobytes(),
        degrees.astype("<u2").tobytes(),
        graph.edge_index[1].astype("<i4" if flags else "<i2").tobytes(),
        graph.distances.astype("<f4").tobytes(),
    ]
    if geometry:
        if graph.offsets is None or graph.lattice is None:
            raise InputError(
                "the graph has no geometry to pack", advice="build it again"
            )
        flags |= _GEOMETRY
        if np.abs(graph.offsets).max(initial=0) > np.iinfo(np.int8).max:
            flags |= _WIDE_OFFSETS
        width = "<i2" if flags & _WIDE_OFFSETS else "i1"
        body += [
            graph.offsets.astype(width).tobytes(),
            graph.lattice.astype("<f8").tobytes(),
        ]
    payload = b"".join(body)
    fields = (
        _MAGIC,
        _PACK_VERSION,
        flags,
        graph.max_neighbors or 0,
        graph.n_atoms,
        graph.n_edges,
        graph.cutoff_radius,
    )
    checksum = zlib.crc32(payload, zlib.crc32(_HEADER.pack(*fields, 0)))
    return _HEADER.pack(*fields, checksum) + payload


def unpack_graph(data: bytes) -> CrystalGraph:
    """Return the graph of :func:`pack_graph`.

    Raises
    ------
    CorruptArtifactError
        If the bytes are no packed graph, are of another version, or fail the
        checksum.
    """
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise CorruptArtifactError(
            f"{len(data)} bytes are not a packed crystal graph",
            evidence={"starts_with": bytes(data[:4]).hex()},
            advice="featurize the structure again",
        )
    *fields, checksum = _HEADER.unpack_from(data)
    _, version, flags, max_neighbors, n_atoms, n_edges, cutoff_radius = fields
    dtypes: list[tuple[str, int]] = [
        ("u1", n_atoms),
        ("<u2", n_atoms),
        ("<i4" if flags & _WIDE_INDEX else "<i2", n_edges),
        ("<f4", n_edges),
    ]
    if flags & _GEOMETRY:
        dtypes.append(("<i2" if flags & _WIDE_OFFSETS else "i1", 3 * n_edges))
        dtypes.append(("<f8", 9))
    size = _HEADER.size + sum(np.dtype(kind).itemsize * n for kind, n in dtypes)
    computed = zlib.crc32(data[_HEADER.size :], zlib.crc32(_HEADER.pack(*fields, 0)))
    if version != _PACK_VERSION or size != len(data) or computed != checksum:
        raise CorruptArtifactError(
            "a packed crystal graph does not match its header",
            evidence={
                "version": version,
                "bytes": len(data),
                "bytes_expected": size,
                "checksum_ok": computed == checksum,
            },
            advice="featurize the structure again",
        )
    arrays: list[NDArray[Any]] = []
    position = _HEADER.size
    for kind, count in dtypes:
        arrays.append(np.frombuffer(data, dtype=kind, count=count, offset=position))
        position += np.dtype(kind).itemsize * count
    centre = np.repeat(np.arange(n_atoms, dtype=np.int32), arrays[1])
    with_geometry = bool(flags & _GEOMETRY)
    return CrystalGraph(
        numbers=arrays[0].astype(np.uint8),
        edge_index=np.stack([centre, arrays[2].astype(np.int32)]),
        distances=arrays[3].astype(np.float64),
        cutoff_radius=cutoff_radius,
        max_neighbors=max_neighbors or None,
        offsets=arrays[4].astype(np.int32).reshape(-1, 3) if with_geometry else None,
        lattice=arrays[5].astype(np.float64).reshape(3, 3) if with_geometry else None,
    )


# ------------------------------------------------------------------------- private


def _numbers(
    structure: Structure, cutoff_radius: float, max_neighbors: int | None
) -> NDArray[np.uint8]:
    """Check a structure and return its atomic numbers."""
    if not (math.isfinite(cutoff_radius) and cutoff_radius > 0):
        raise InputError(f"cutoff_radius must be positive, not {cutoff_radius}")
    if max_neighbors is not None and not 0 < max_neighbors <= _MAX_DEGREE:
        raise InputError(f"max_neighbors must be 1 to {_MAX_DEGREE}: {max_neighbors}")
    if len(structure) == 0:
        raise InputError("the structure has no sites")
    if not structure.is_ordered:
        site = next(site for site in structure if not site.is_ordered)
        raise InputError(
            f"the structure is disordered: {site.species_string} at "
            f"{np.round(site.frac_coords, 4).tolist()}",
            advice="enumerate ordered structures first",
        )
    name = structure.composition.reduced_formula
    matrix, coordinates = structure.lattice.matrix, structure.frac_coords
    if not (np.isfinite(matrix).all() and np.isfinite(coordinates).all()):
        raise InputError(f"{name} has coordinates or a lattice that are not finite")
    if structure.volume < MIN_DISTANCE**3:
        raise InputError(
            f"{name} has no volume ({structure.volume:.3g} Å³)",
            evidence={"lattice": matrix.tolist()},
        )
    # Dummy species have a Z made from their name; only elements are on the table.
    symbols = [site.specie for site in structure]
    numbers = [getattr(getattr(s, "element", s), "Z", 0) for s in symbols]
    strange = {str(s) for s, z in zip(symbols, numbers, strict=True) if not 0 < z < 119}
    if strange:
        raise InputError(f"{name} has sites that are no element: {sorted(strange)}")
    return np.array(numbers, dtype=np.uint8)


def _neighbors(
    structure: Structure, radius: float
) -> tuple[
    NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]
]:
    """Return centre, neighbour, offsets, distances, sorted by centre and distance."""
    centre, neighbor, offsets, distances = structure.get_neighbor_list(
        radius, numerical_tol=_NUMERICAL_TOLERANCE
    )
    order = np.lexsort((distances, centre))
    return (
        centre[order].astype(np.int64),
        neighbor[order].astype(np.int64),
        offsets[order].astype(np.int64),
        distances[order].astype(np.float64),
    )


def _shells(
    centre: NDArray[np.int64], distances: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the shell number of edges sorted by centre and distance."""
    new = (np.diff(centre) != 0) | (np.diff(distances) > TIE_TOLERANCE)
    return np.concatenate([np.zeros(min(1, len(centre)), np.int64), np.cumsum(new)])


def _kth_shell(
    centre: NDArray[np.int64], shell: NDArray[np.int64], n_atoms: int, k: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the shell of each atom's k-th neighbour, and which atoms have k."""
    degrees = np.bincount(centre, minlength=n_atoms)
    starts = np.cumsum(degrees) - degrees
    last = starts + np.minimum(degrees, k) - 1
    return np.where(degrees > 0, shell[last], -1), degrees >= k


def _complete(
    centre: NDArray[np.int64],
    distances: NDArray[np.float64],
    shell: NDArray[np.int64],
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


def _order(
    numbers: NDArray[np.uint8],
    centre: NDArray[np.int64],
    neighbor: NDArray[np.int64],
    offsets: NDArray[np.int64],
    distances: NDArray[np.float64],
    shell: NDArray[np.int64],
    k: int | None,
) -> NDArray[np.int64]:
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


def _check_edges(
    structure: Structure,
    centre: NDArray[np.int64],
    neighbor: NDArray[np.int64],
    distances: NDArray[np.float64],
    n_atoms: int,
    cutoff_radius: float,
) -> None:
    name = structure.composition.reduced_formula
    close = np.flatnonzero(distances < MIN_DISTANCE)
    if len(close):
        i, j = int(centre[close[0]]), int(neighbor[close[0]])
        raise InputError(
            f"sites {i} and {j} of {name} are {distances[close[0]]:.3g} Å apart",
            advice="remove duplicate sites",
        )
    lonely = np.flatnonzero(np.bincount(centre, minlength=n_atoms) == 0)
    if len(lonely):
        raise InputError(
            f"site {lonely[0]} of {name} is isolated: no neighbour within "
            f"{cutoff_radius} Å",
            evidence={"isolated_sites": lonely[:20].tolist()},
            advice="use a larger cutoff_radius if the gap is meant",
        )
