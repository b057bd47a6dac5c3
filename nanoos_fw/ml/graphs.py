"""Crystal graphs: periodic neighbours, their order and their bytes.

Conventions of every array here and downstream: an *edge* goes from a centre atom
``i = edge_index[0]`` to a neighbour ``j = edge_index[1]`` in the cell
``offsets`` (integer lattice vectors), and ``distances`` holds
``|r_j + offsets @ lattice - r_i|`` in Å. Edges are sorted by centre.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.crystals import check_periodic, decode_arrays
from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.lattices import CLOSE, FLAT, ISOLATED, NOT_FINITE, TOO_MANY
from nanoos_fw.ml.neighbors import (
    NeighborList,
    list_nearest,
    list_nearest_of_one,
    order_of_edges,
    shells_of,
)

if TYPE_CHECKING:
    from pymatgen.core import Structure

_HEAVIEST = 118
# Bounds the memory of one call of the search; larger calls are no faster.
_CRYSTALS_AT_ONCE = 64
_MAX_DEGREE = np.iinfo(np.uint16).max

# Packed form: this header, then Z u1, degree u2, neighbour i2 or i4, distance f4, and
# with geometry offsets i1 or i2 and the lattice f8, or else with vectors those as f4.
# Little endian throughout.
_HEADER = struct.Struct("<4sBBHIIdI")
_HEADER_FIELDS = np.dtype(
    [
        ("magic", "S4"),
        ("version", "u1"),
        ("flags", "u1"),
        ("max_neighbors", "<u2"),
        ("n_atoms", "<u4"),
        ("n_edges", "<u4"),
        ("cutoff_radius", "<f8"),
        ("checksum", "<u4"),
    ]
)
HEADER_BYTES = _HEADER.size
_CHECKSUM_AT = HEADER_BYTES - 4
_NO_CHECKSUM = bytes(4)
_MAGIC = b"NOCG"
_PACK_VERSION = 1
_NARROW, _WIDE = np.dtype("<i2"), np.dtype("<i4")
_NUMBER, _DEGREE, _DISTANCE = np.dtype("u1"), np.dtype("<u2"), np.dtype("<f4")
_INDEX, _FLOAT = np.dtype(np.int32), np.dtype(np.float64)
# Found once: a graph is unpacked in less than 2 µs.
_read_fields, _crc32 = _HEADER.unpack_from, zlib.crc32
_CENTRES = np.arange(1024, dtype=np.int32)
# Where pymatgen's sites keep what their properties return.
_STORED = {name: operator.attrgetter(f"_{name}") for name in ("species", "frac_coords")}
_WIDE_INDEX, _GEOMETRY, _WIDE_OFFSETS, _VECTORS = 1, 2, 4, 8


@dataclass(frozen=True, eq=False)
class CrystalGraph:
    """The neighbours of every atom of one crystal.

    Arrays that are no graph are refused.

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
    vectors
        ``(n_edges, 3) float32``, from centre to neighbour in Å, of a graph that was
        packed with them; else None, see :func:`nanoos_fw.ml.angles.edge_vectors`.
    """

    numbers: NDArray[np.uint8]
    edge_index: NDArray[np.int32]
    distances: NDArray[np.float64]
    cutoff_radius: float
    max_neighbors: int | None = None
    offsets: NDArray[np.int32] | None = None
    lattice: NDArray[np.float64] | None = None
    vectors: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        _check_parameters(self.cutoff_radius, self.max_neighbors)
        n_edges = len(self.distances)
        offsets = (n_edges, 3) if self.offsets is None else self.offsets.shape
        vectors = (n_edges, 3) if self.vectors is None else self.vectors.shape
        lattice = (3, 3) if self.lattice is None else self.lattice.shape
        if (
            self.numbers.ndim != 1
            or self.edge_index.shape != (2, n_edges)
            or offsets != (n_edges, 3)
            or lattice != (3, 3)
            or vectors != (n_edges, 3)
        ):
            raise InputError(
                "the arrays of a crystal graph do not fit together",
                evidence={
                    "numbers": list(self.numbers.shape),
                    "edge_index": list(self.edge_index.shape),
                    "distances": list(self.distances.shape),
                    "offsets": list(offsets),
                    "lattice": list(lattice),
                    "vectors": list(vectors),
                },
            )
        self._check_values()

    def _check_values(self) -> None:
        """Refuse what no search gives, and what would be read as something else."""
        strange = (self.numbers < 1) | (self.numbers > _HEAVIEST)
        if strange.any():
            raise InputError(
                f"{self.numbers[strange][0]} is no atomic number",
                evidence={"atom": int(strange.argmax())},
            )
        ends, centre = self.edge_index, self.edge_index[0]
        if self.n_edges and (
            (centre[1:] < centre[:-1]).any()
            or ends.min() < 0
            or ends.max() >= self.n_atoms
        ):
            raise InputError(
                "the graph's edges are unsorted or point to missing atoms",
                advice="sort them by centre",
            )
        # Also false for NaN.
        if not ((self.distances >= 0) & (self.distances < np.inf)).all():
            raise InputError("the graph has distances that are not finite")
        if self.max_neighbors is not None:
            most = int(self.degrees.max(initial=0))
            if most > self.max_neighbors:
                raise InputError(
                    f"an atom of the graph has {most} neighbours, more than "
                    f"max_neighbors = {self.max_neighbors}"
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


@dataclass(frozen=True, eq=False)
class CrystalArrays:
    """Several crystals in flat arrays.

    Parameters
    ----------
    numbers
        ``(n_atoms,) uint8``, atomic numbers.
    lattices
        ``(n_crystals, 3, 3) float64``, rows are lattice vectors in Å.
    frac_coords
        ``(n_atoms, 3) float64``.
    atom_start
        ``(n_crystals + 1,) int64``.
    positions
        ``(n_crystals,) int64``, where each came from, since some may have been refused.
    """

    numbers: NDArray[np.uint8]
    lattices: NDArray[np.float64]
    frac_coords: NDArray[np.float64]
    atom_start: NDArray[np.int64]
    positions: NDArray[np.int64]


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
        If the structure is empty, disordered, not finite, not periodic in three
        directions, flat, has coincident sites, or an atom has no neighbour within the
        cutoff.

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
    _check_parameters(cutoff_radius, max_neighbors)
    return _build(
        _numbers(structure),
        structure.lattice.matrix,
        _frac_coords(structure),
        cutoff_radius,
        max_neighbors,
    )


def build_graph_arrays(
    numbers: NDArray[np.integer],
    lattice: NDArray[np.float64],
    frac_coords: NDArray[np.float64],
    *,
    cutoff_radius: float = 8.0,
    max_neighbors: int | None = 12,
) -> CrystalGraph:
    """Build the graph of a crystal that is given as arrays.

    Parameters
    ----------
    numbers
        ``(n_atoms,)``, atomic numbers.
    lattice
        ``(3, 3)``, rows are lattice vectors in Å.
    frac_coords
        ``(n_atoms, 3)``.
    cutoff_radius, max_neighbors
        As in :func:`build_graph`.

    Raises
    ------
    InputError
        As :func:`build_graph`, and if the arrays do not fit together.
    """
    _check_parameters(cutoff_radius, max_neighbors)
    values = np.asarray(numbers)
    if values.ndim != 1 or np.shape(lattice) != (3, 3):
        raise InputError(
            "a crystal needs numbers (n,) and a lattice (3, 3)",
            evidence={
                "numbers": list(values.shape),
                "lattice": list(np.shape(lattice)),
            },
        )
    if len(values) == 0:
        raise InputError("the structure has no sites")
    if values.dtype.kind not in "iu":
        raise InputError(f"atomic numbers must be integers, not {values.dtype}")
    strange = (values < 1) | (values > _HEAVIEST)
    if strange.any():
        raise InputError(
            f"{int(values[strange][0])} is no atomic number",
            evidence={"site": int(np.flatnonzero(strange)[0])},
        )
    return _build(
        values.astype(np.uint8), lattice, frac_coords, cutoff_radius, max_neighbors
    )


def build_graphs(
    crystals: Iterable[Structure | Mapping[str, Any]],
    *,
    cutoff_radius: float = 8.0,
    max_neighbors: int | None = 12,
) -> tuple[list[CrystalGraph | None], dict[int, InputError | CorruptArtifactError]]:
    """Build the graphs of many crystals in few calls of the compiled search.

    Parameters
    ----------
    crystals
        pymatgen structures, or documents of
        :func:`nanoos_fw.crystals.encode_structure`, whose arrays are taken as they
        are, without a structure in between.
    cutoff_radius, max_neighbors
        As in :func:`build_graph`, whose graphs these are.

    Returns
    -------
    graphs
        One for each crystal, None where it has none.
    errors
        Why, by position.
    """
    _check_parameters(cutoff_radius, max_neighbors)
    graphs: list[CrystalGraph | None] = []
    errors: dict[int, InputError | CorruptArtifactError] = {}
    source = iter(crystals)
    while some := list(itertools.islice(source, _CRYSTALS_AT_ONCE)):
        begin = len(graphs)
        graphs += [None] * len(some)
        flat, refused = read_arrays(some)
        errors.update({begin + at: error for at, error in refused.items()})
        _build_some(flat, cutoff_radius, max_neighbors, begin, graphs, errors)
    return graphs, dict(sorted(errors.items()))


def read_arrays(
    crystals: Iterable[Structure | Mapping[str, Any]],
) -> tuple[CrystalArrays, dict[int, InputError | CorruptArtifactError]]:
    """Return crystals as flat arrays, and why some have none, by position."""
    positions: list[int] = []
    numbers: list[NDArray[np.uint8]] = []
    lattices: list[NDArray[np.float64]] = []
    frac_coords: list[NDArray[np.float64]] = []
    errors: dict[int, InputError | CorruptArtifactError] = {}
    for position, crystal in enumerate(crystals):
        try:
            if isinstance(crystal, Mapping):
                own, lattice, coords = decode_arrays(crystal)
            else:
                own = _numbers(crystal)
                lattice, coords = crystal.lattice.matrix, _frac_coords(crystal)
        except (InputError, CorruptArtifactError) as error:
            errors[position] = error
            continue
        positions.append(position)
        numbers.append(own)
        lattices.append(lattice)
        frac_coords.append(coords)
    atom_start = np.zeros(len(numbers) + 1, dtype=np.int64)
    np.cumsum([len(own) for own in numbers], out=atom_start[1:])
    flat = CrystalArrays(
        numbers=np.concatenate([np.empty(0, np.uint8), *numbers]),
        lattices=np.array(lattices, dtype=np.float64).reshape(-1, 3, 3),
        frac_coords=np.concatenate([np.empty((0, 3)), *frac_coords]),
        atom_start=atom_start,
        positions=np.array(positions, dtype=np.int64),
    )
    return flat, errors


def graph_error(
    flat: CrystalArrays, found: NeighborList, row: int, cutoff_radius: float
) -> InputError:
    """Return why a row of flat crystals has no graph."""
    own = slice(int(flat.atom_start[row]), int(flat.atom_start[row + 1]))
    return _error_of(
        int(found.status[row]),
        found.detail[row],
        flat.numbers[own],
        flat.lattices[row],
        cutoff_radius,
    )


def nearest_neighbors(graph: CrystalGraph, max_neighbors: int) -> CrystalGraph:
    """Return the graph with the nearest few neighbours of each atom.

    The tie rule is that of :func:`build_graph`, so this equals building the graph
    with ``max_neighbors`` from the start.

    Raises
    ------
    InputError
        If the graph holds fewer neighbours already, has lost its geometry, or was cut
        off itself: neighbours as far as the last that is wanted may be gone, and the
        tie rule compares them all.
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
    if graph.max_neighbors is not None and graph.degrees.max() == graph.max_neighbors:
        raise InputError(
            f"cannot choose {max_neighbors} neighbours of each atom among the nearest "
            f"{graph.max_neighbors}: ties may have been cut off",
            advice=f"build the graph with max_neighbors {max_neighbors}, or with None",
        )
    centre, neighbor = (row.astype(np.int64) for row in graph.edge_index)
    by_distance = np.lexsort((graph.distances, centre))
    centre, neighbor = centre[by_distance], neighbor[by_distance]
    distances, offsets = graph.distances[by_distance], graph.offsets[by_distance]
    order = order_of_edges(
        graph.numbers,
        centre,
        neighbor,
        offsets.astype(np.int64),
        distances,
        shells_of(centre, distances),
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


def cartesian_vectors(
    steps: NDArray[np.float64], lattices: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the Cartesian vectors of steps in fractional coordinates.

    Term by term, so that equal edges give equal bits however many are done at once.

    Parameters
    ----------
    steps
        ``(n_edges, 3)``.
    lattices
        ``(n_edges, 3, 3)`` or ``(3, 3)``, rows are lattice vectors in Å.

    Returns
    -------
    ``(n_edges, 3) float64``
        Å.
    """
    vectors = steps[:, :1] * lattices[..., 0, :]
    vectors += steps[:, 1:2] * lattices[..., 1, :]
    vectors += steps[:, 2:] * lattices[..., 2, :]
    return vectors


def vectors_of_arrays(flat: CrystalArrays, found: NeighborList) -> NDArray[np.float32]:
    """Return the vectors of the edges that were found in several crystals.

    ``(n_edges, 3) float32``, from centre to neighbour, Å.
    """
    sizes = np.diff(flat.atom_start)
    edge_start = np.concatenate([[0], np.cumsum(found.degrees)])[flat.atom_start]
    edges_of = np.diff(edge_start)
    crystal = np.repeat(np.arange(len(sizes)), edges_of)
    centre = np.repeat(np.arange(len(flat.numbers)), found.degrees)
    first = flat.atom_start[crystal]
    steps = flat.frac_coords[first + found.neighbors] + found.offsets
    steps -= flat.frac_coords[centre]
    return cartesian_vectors(steps, flat.lattices[crystal]).astype(np.float32)


def pack_graph(
    graph: CrystalGraph, *, geometry: bool = False, vectors: bool = False
) -> bytes:
    """Return a graph as bytes: about 75 per atom with 12 neighbours.

    Parameters
    ----------
    graph
        Any graph.
    geometry
        Keep offsets and lattice too (36 bytes more per atom with 12 neighbours).
        Models that see distances only do not need them.
    vectors
        Keep the vectors of the edges instead (12 bytes more per edge), which models
        that see angles need.

    Raises
    ------
    InputError
        If an atom has over 65535 neighbours, both forms of geometry are asked for, or
        offsets go beyond 32767 cells.

    Notes
    -----
    Equal graphs give equal bytes, so the SHA-256 of the bytes names the graph.
    Distances are stored as float32 (4e-7 Å at 8 Å).
    """
    degrees = graph.degrees
    if degrees.max(initial=0) > _MAX_DEGREE:
        raise InputError(
            f"an atom has {degrees.max()} neighbours; a packed graph has room for "
            f"{_MAX_DEGREE}",
            advice="use a smaller cutoff_radius or max_neighbors",
        )
    if geometry and vectors:
        raise InputError(
            "a graph is packed with its geometry or with vectors, not both"
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
        offsets = graph.offsets
        furthest = max(int(offsets.max(initial=0)), -int(offsets.min(initial=0)))
        if furthest > np.iinfo(np.int8).max:
            flags |= _WIDE_OFFSETS
        if furthest > np.iinfo(np.int16).max:
            raise InputError(
                f"a neighbour is {furthest} cells away; a packed graph has room for "
                f"{np.iinfo(np.int16).max}",
                advice="move the sites into the cell first",
            )
        width = "<i2" if flags & _WIDE_OFFSETS else "i1"
        body += [
            graph.offsets.astype(width).tobytes(),
            graph.lattice.astype("<f8").tobytes(),
        ]
    elif vectors:
        if graph.vectors is None:
            raise InputError(
                "the graph has no vectors to pack", advice="build it again"
            )
        flags |= _VECTORS
        body.append(graph.vectors.astype("<f4").tobytes())
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


def pack_arrays(
    flat: CrystalArrays,
    cutoff_radius: float,
    max_neighbors: int | None,
    *,
    vectors: bool = False,
) -> list[bytes | InputError]:
    """Return the packed graph of each crystal, or why it has none.

    The bytes are those of :func:`pack_graph` without geometry, made without a graph
    in between.

    Raises
    ------
    InputError
        If a crystal has over 32767 atoms, or an atom over 65535 neighbours: these are
        packed one by one.
    """
    _check_parameters(cutoff_radius, max_neighbors)
    found = list_nearest(
        flat.lattices,
        flat.frac_coords,
        flat.numbers,
        flat.atom_start,
        cutoff_radius,
        max_neighbors,
    )
    starts = flat.atom_start
    if (
        np.diff(starts).max(initial=0) > np.iinfo(np.int16).max
        or found.degrees.max(initial=0) > _MAX_DEGREE
    ):
        raise InputError("the crystals are too large to be packed together")
    edges = np.concatenate([[0], np.cumsum(found.degrees)])[starts].tolist()
    numbers, degrees = flat.numbers.tobytes(), found.degrees.astype("<u2").tobytes()
    neighbors = found.neighbors.astype("<i2").tobytes()
    distances = found.distances.astype("<f4").tobytes()
    steps = b""
    if vectors:
        steps = vectors_of_arrays(flat, found).astype("<f4", copy=False).tobytes()
    flags = _VECTORS if vectors else 0
    atoms, status = starts.tolist(), found.status.tolist()
    packed: list[bytes | InputError] = []
    radius, kept = float(cutoff_radius), max_neighbors or 0
    for row, code in enumerate(status):
        if code:
            packed.append(graph_error(flat, found, row, cutoff_radius))
            continue
        a, b, e, f = atoms[row], atoms[row + 1], edges[row], edges[row + 1]
        payload = b"".join(
            (
                numbers[a:b],
                degrees[2 * a : 2 * b],
                neighbors[2 * e : 2 * f],
                distances[4 * e : 4 * f],
                steps[12 * e : 12 * f],
            )
        )
        fields = (_MAGIC, _PACK_VERSION, flags, kept, b - a, f - e, radius)
        checksum = zlib.crc32(payload, zlib.crc32(_HEADER.pack(*fields, 0)))
        packed.append(_HEADER.pack(*fields, checksum) + payload)
    return packed


def unpack_graph(data: bytes) -> CrystalGraph:
    """Return the graph of :func:`pack_graph`.

    All bytes are checked now; each array is made when it is first asked for.

    Raises
    ------
    CorruptArtifactError
        If the bytes are no packed graph, are of another version, or fail the
        checksum.
    """
    data = bytes(data)  # the same object, unless it could be changed later
    n_atoms, n_edges, cutoff_radius, max_neighbors, flags = _parse(data)
    # Not by __init__, which would ask for the arrays.
    graph: CrystalGraph = object.__new__(_PackedGraph)
    object.__setattr__(
        graph,
        "__dict__",
        {
            "cutoff_radius": cutoff_radius,
            "max_neighbors": max_neighbors,
            "_packed": (data, n_atoms, n_edges, flags),
        },
    )
    return graph


def _unpack_numbers(data: bytes, n_atoms: int, n_edges: int, flags: int) -> Any:
    return np.frombuffer(data, _NUMBER, n_atoms, HEADER_BYTES).copy()


def _unpack_edges(data: bytes, n_atoms: int, n_edges: int, flags: int) -> Any:
    begin = HEADER_BYTES + n_atoms
    edge_index = np.empty((2, n_edges), _INDEX)
    degrees = np.frombuffer(data, _DEGREE, n_atoms, begin)
    centres = _centres(n_atoms).repeat(degrees)
    if len(centres) != n_edges:
        raise CorruptArtifactError(
            f"the degrees of a packed crystal graph add up to {len(centres)}, not to "
            f"its {n_edges} edges",
            advice="featurize the structure again",
        )
    edge_index[0] = centres
    kind = _WIDE if flags & _WIDE_INDEX else _NARROW
    edge_index[1] = np.frombuffer(data, kind, n_edges, begin + 2 * n_atoms)
    return edge_index


def _unpack_distances(data: bytes, n_atoms: int, n_edges: int, flags: int) -> Any:
    begin = _begin_of_distances(n_atoms, n_edges, flags)
    return np.frombuffer(data, _DISTANCE, n_edges, begin).astype(_FLOAT)


def _unpack_offsets(data: bytes, n_atoms: int, n_edges: int, flags: int) -> Any:
    if not flags & _GEOMETRY:
        return None
    begin = _begin_of_distances(n_atoms, n_edges, flags) + 4 * n_edges
    kind = "<i2" if flags & _WIDE_OFFSETS else "i1"
    kept = np.frombuffer(data, kind, 3 * n_edges, begin)
    return kept.astype(np.int32).reshape(-1, 3)


def _unpack_lattice(data: bytes, n_atoms: int, n_edges: int, flags: int) -> Any:
    if not flags & _GEOMETRY:
        return None
    lattice = np.frombuffer(data, "<f8", 9, len(data) - 72)
    return lattice.astype(np.float64).reshape(3, 3)


def _unpack_vectors(data: bytes, n_atoms: int, n_edges: int, flags: int) -> Any:
    if not flags & _VECTORS:
        return None
    begin = _begin_of_distances(n_atoms, n_edges, flags) + 4 * n_edges
    vectors = np.frombuffer(data, _DISTANCE, 3 * n_edges, begin)
    return vectors.astype(np.float32).reshape(-1, 3)


def _begin_of_distances(n_atoms: int, n_edges: int, flags: int) -> int:
    index = 4 if flags & _WIDE_INDEX else 2
    return HEADER_BYTES + 3 * n_atoms + index * n_edges


class _OnDemand:
    """An array of a packed graph: made when first asked for, then an attribute."""

    def __init__(self, make: Callable[[bytes, int, int, int], Any]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, graph: Any, owner: type | None = None) -> Any:
        if graph is None:
            return self
        values = graph.__dict__
        made = values[self._name] = self._make(*values["_packed"])
        return made


class _PackedGraph(CrystalGraph):
    """A graph over its packed bytes, which were checked."""

    numbers = _OnDemand(_unpack_numbers)
    edge_index = _OnDemand(_unpack_edges)
    distances = _OnDemand(_unpack_distances)
    offsets = _OnDemand(_unpack_offsets)
    lattice = _OnDemand(_unpack_lattice)
    vectors = _OnDemand(_unpack_vectors)


class PackedHeader(NamedTuple):
    """What the first bytes of a packed graph say, checked.

    Parameters
    ----------
    n_atoms, n_edges, cutoff_radius, max_neighbors
        As in :class:`CrystalGraph`.
    flags
        Bits of the format.
    """

    n_atoms: int
    n_edges: int
    cutoff_radius: float
    max_neighbors: int | None
    flags: int

    @property
    def wide_index(self) -> bool:
        """Neighbours have 4 bytes instead of 2."""
        return bool(self.flags & _WIDE_INDEX)

    @property
    def has_geometry(self) -> bool:
        """Offsets and lattice follow the distances."""
        return bool(self.flags & _GEOMETRY)

    @property
    def has_vectors(self) -> bool:
        """Vectors of the edges follow the distances."""
        return bool(self.flags & _VECTORS)


def read_header(data: bytes) -> PackedHeader:
    """Check a packed graph and return its header.

    Raises
    ------
    CorruptArtifactError
        As :func:`unpack_graph`.
    """
    return PackedHeader(*_parse(data))


def _parse(data: bytes) -> tuple[int, int, float, int | None, int]:
    """Return the fields of :class:`PackedHeader`, checked."""
    if len(data) < HEADER_BYTES or data[:4] != _MAGIC:
        raise CorruptArtifactError(
            f"{len(data)} bytes are not a packed crystal graph",
            evidence={"starts_with": bytes(data[:4]).hex()},
            advice="featurize the structure again",
        )
    _, version, flags, max_neighbors, n_atoms, n_edges, cutoff_radius, checksum = (
        _read_fields(data)
    )
    size = HEADER_BYTES + 3 * n_atoms + (8 if flags & _WIDE_INDEX else 6) * n_edges
    if flags & _GEOMETRY:
        size += (6 if flags & _WIDE_OFFSETS else 3) * n_edges + 72
    if flags & _VECTORS:
        size += 12 * n_edges
    # The checksum covers the header with its own field zero.
    computed = _crc32(data[HEADER_BYTES:], _crc32(data[:_CHECKSUM_AT] + _NO_CHECKSUM))
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
    return n_atoms, n_edges, cutoff_radius, max_neighbors or None, flags


def read_headers(
    blobs: Sequence[bytes],
) -> tuple[bool, bool, float, int | None, NDArray[np.int64], NDArray[np.int64]] | None:
    """Check packed graphs that were all made in one way, at once.

    Returns
    -------
    tuple or None
        Whether neighbours have 4 bytes, whether there are vectors, cutoff radius,
        neighbours kept, numbers of atoms and of edges. None if
        they are not alike, or one of them is not good: :func:`read_header` tells.
    """
    size = HEADER_BYTES
    heads = np.frombuffer(b"".join([blob[:size] for blob in blobs]), dtype="u1")
    if len(heads) != size * len(blobs):
        return None
    fields = heads.view(_HEADER_FIELDS)
    first = fields[0]
    flags = int(first["flags"])
    alike = all(
        (fields[name] == first[name]).all()
        for name in ("flags", "max_neighbors", "cutoff_radius")
    )
    if not alike:
        return None
    n_atoms = fields["n_atoms"].astype(np.int64)
    n_edges = fields["n_edges"].astype(np.int64)
    lengths = size + 3 * n_atoms + (8 if flags & _WIDE_INDEX else 6) * n_edges
    if flags & _GEOMETRY:
        lengths += (6 if flags & _WIDE_OFFSETS else 3) * n_edges + 72
    if flags & _VECTORS:
        lengths += 12 * n_edges
    crc32, end, blank = _crc32, _CHECKSUM_AT, _NO_CHECKSUM
    checksums = [crc32(b[size:], crc32(b[:end] + blank)) for b in blobs]
    good = (
        (fields["magic"] == _MAGIC).all()
        and (fields["version"] == _PACK_VERSION).all()
        and lengths.tolist() == list(map(len, blobs))
        and fields["checksum"].tolist() == checksums
    )
    if not good:
        return None
    cutoff_radius, kept = float(first["cutoff_radius"]), int(first["max_neighbors"])
    wide, vectors = bool(flags & _WIDE_INDEX), bool(flags & _VECTORS)
    return wide, vectors, cutoff_radius, kept or None, n_atoms, n_edges


# ------------------------------------------------------------------------- private


def _check_parameters(cutoff_radius: float, max_neighbors: int | None) -> None:
    if not (math.isfinite(cutoff_radius) and cutoff_radius > 0):
        raise InputError(f"cutoff_radius must be positive, not {cutoff_radius}")
    if max_neighbors is None:
        return
    whole = isinstance(max_neighbors, int | np.integer)
    if not (whole and 0 < max_neighbors <= _MAX_DEGREE):
        raise InputError(f"max_neighbors must be 1 to {_MAX_DEGREE}: {max_neighbors}")


def _numbers(structure: Structure) -> NDArray[np.uint8]:
    """Return the atomic numbers of an ordered periodic structure of elements.

    Oxidation states do not count, and to a graph D and T are hydrogen.
    """
    sites = structure.sites
    if len(sites) == 0:
        raise InputError("the structure has no sites")
    check_periodic(structure)
    # Sites of one element mostly share one object. What a key is the address of is
    # kept with it, so that no other object can have that address meanwhile.
    known: dict[int, tuple[Any, int]] = {}
    numbers = bytearray()
    for index, species in enumerate(_values(sites, "species")):
        found = known.get(id(species))
        if found is None:
            contents = tuple(species.items())
            if len(contents) != 1 or contents[0][1] != 1:
                site = sites[index]
                raise InputError(
                    f"the structure is disordered: {site.species_string} at "
                    f"{np.round(site.frac_coords, 4).tolist()}",
                    advice="enumerate ordered structures first",
                )
            specie = contents[0][0]
            found = known.get(id(specie))
            if found is None:
                # Dummy species have a Z made from their name; only elements have one
                # that is in the table.
                number = getattr(getattr(specie, "element", specie), "Z", 0)
                if not 0 < number <= _HEAVIEST:
                    raise InputError(
                        f"site {index} of {structure.composition.formula} is no "
                        f"element: {specie}"
                    )
                found = known[id(specie)] = (specie, number)
            known[id(species)] = (species, found[1])
        numbers.append(found[1])
    return np.frombuffer(numbers, dtype=np.uint8)


def _frac_coords(structure: Structure) -> NDArray[np.float64]:
    """Return the fractional coordinates of a structure that has sites."""
    rows = _values(structure.sites, "frac_coords")
    return np.array(rows, dtype=np.float64)


def _values(sites: Sequence[Any], name: str) -> list[Any]:
    """Return a property of all sites."""
    try:
        # What the property returns, without a call in Python for each site.
        return list(map(_STORED[name], sites))
    except AttributeError:
        return [getattr(site, name) for site in sites]


def _build(
    numbers: NDArray[np.uint8],
    lattice: NDArray[np.float64],
    frac_coords: NDArray[np.float64],
    cutoff_radius: float,
    max_neighbors: int | None,
) -> CrystalGraph:
    lattice = np.array(lattice, dtype=np.float64)
    found = list_nearest_of_one(
        lattice, frac_coords, numbers, cutoff_radius, max_neighbors
    )
    if found.status[0]:
        raise _error_of(
            int(found.status[0]), found.detail[0], numbers, lattice, cutoff_radius
        )
    edge_index = np.empty((2, len(found.neighbors)), dtype=np.int32)
    edge_index[0] = _centres(len(numbers)).repeat(found.degrees)
    edge_index[1] = found.neighbors
    # Not by __init__: these arrays fit, and it takes as long as a small search.
    graph: CrystalGraph = object.__new__(CrystalGraph)
    graph.__dict__.update(
        numbers=numbers,
        edge_index=edge_index,
        distances=found.distances,
        cutoff_radius=float(cutoff_radius),
        max_neighbors=max_neighbors,
        offsets=found.offsets,
        lattice=lattice,
        vectors=None,
    )
    return graph


def _centres(n_atoms: int) -> NDArray[np.int32]:
    """Return 0, 1, ... ``n_atoms - 1``, read only."""
    if n_atoms <= len(_CENTRES):
        return _CENTRES[:n_atoms]
    return np.arange(n_atoms, dtype=np.int32)


def _build_some(
    flat: CrystalArrays,
    cutoff_radius: float,
    max_neighbors: int | None,
    begin: int,
    graphs: list[CrystalGraph | None],
    errors: dict[int, InputError | CorruptArtifactError],
) -> None:
    """Build graphs with one call, and put them where they belong."""
    found = list_nearest(
        flat.lattices,
        flat.frac_coords,
        flat.numbers,
        flat.atom_start,
        cutoff_radius,
        max_neighbors,
    )
    starts = flat.atom_start
    local = np.arange(len(flat.numbers), dtype=np.int32)
    local -= np.repeat(starts[:-1], np.diff(starts)).astype(np.int32)
    edge_index = np.empty((2, len(found.neighbors)), dtype=np.int32)
    edge_index[0] = np.repeat(local, found.degrees)
    edge_index[1] = found.neighbors
    edge_start = np.concatenate([[0], np.cumsum(found.degrees)])[starts].tolist()
    atom_start = starts.tolist()
    for row, position in enumerate(flat.positions.tolist()):
        if found.status[row]:
            errors[begin + position] = graph_error(flat, found, row, cutoff_radius)
            continue
        # Copies: a graph must not keep its whole batch in memory.
        mine = slice(edge_start[row], edge_start[row + 1])
        graphs[begin + position] = CrystalGraph(
            numbers=flat.numbers[atom_start[row] : atom_start[row + 1]].copy(),
            edge_index=edge_index[:, mine].copy(),
            distances=found.distances[mine].copy(),
            cutoff_radius=float(cutoff_radius),
            max_neighbors=max_neighbors,
            offsets=found.offsets[mine].copy(),
            lattice=flat.lattices[row].copy(),
        )


def _error_of(
    status: int,
    detail: NDArray[np.float64],
    numbers: NDArray[np.uint8],
    lattice: NDArray[np.float64],
    cutoff_radius: float,
) -> InputError:
    """Return the error that a status of the neighbour search stands for."""
    name = _formula(numbers)
    i, j, value = int(detail[0]), int(detail[1]), float(detail[2])
    if status == NOT_FINITE:
        return InputError(
            f"{name} has coordinates or a lattice that are not finite, or sites over "
            "a million cells away"
        )
    if status == FLAT:
        return InputError(
            f"{name} has no volume ({abs(np.linalg.det(lattice)):.3g} Å³)",
            evidence={"lattice": lattice.tolist()},
            advice="give three cell vectors that do not lie in one plane",
        )
    if status == CLOSE:
        return InputError(
            f"sites {i} and {j} of {name} are {value:.3g} Å apart",
            evidence={"sites": [i, j], "distance_a": value},
            advice="remove duplicate sites",
        )
    if status == ISOLATED:
        return InputError(
            f"site {i} of {name} is isolated: no neighbour within {cutoff_radius} Å",
            evidence={"site": i},
            advice="use a larger cutoff_radius if the gap is meant",
        )
    if status == TOO_MANY:
        return InputError(
            f"{name} would have about {value:.2g} edges",
            evidence={"cutoff_radius": cutoff_radius},
            advice="use a smaller cutoff_radius or max_neighbors",
        )
    return InputError(f"{name} has neighbours over two billion cells away")


def _formula(numbers: NDArray[np.uint8]) -> str:
    from pymatgen.core import Composition

    elements, counts = np.unique(numbers, return_counts=True)
    content = {
        element_symbol(int(z)): int(n) for z, n in zip(elements, counts, strict=True)
    }
    with warnings.catch_warnings():
        # pymatgen orders by electronegativity, and warns that noble gases have none.
        warnings.simplefilter("ignore", UserWarning)
        return str(Composition(content).reduced_formula)


@functools.cache
def element_symbol(number: int) -> str:
    """Return the symbol of an atomic number."""
    from pymatgen.core import Element

    return str(Element.from_Z(number).symbol)
