"""Graphs as bytes: what the feature store keeps of each structure.

A header, then Z u1, degree u2, neighbour i2 or i4, distance f4, and with geometry
offsets i1 or i2 and the lattice f8, or else with vectors those as f4. Little endian
throughout.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.graphs.arrays import CrystalArrays
from nanoos_fw.ml.graphs.building import graph_error, vectors_of_arrays
from nanoos_fw.ml.graphs.crystal import (
    MAX_DEGREE,
    CrystalGraph,
    centres,
    check_parameters,
)

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
_WIDE_INDEX, _GEOMETRY, _WIDE_OFFSETS, _VECTORS = 1, 2, 4, 8


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
    if degrees.max(initial=0) > MAX_DEGREE:
        raise InputError(
            f"an atom has {degrees.max()} neighbours; a packed graph has room for "
            f"{MAX_DEGREE}",
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
    return _with_header(
        payload,
        flags,
        graph.max_neighbors,
        graph.n_atoms,
        graph.n_edges,
        graph.cutoff_radius,
    )


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
    check_parameters(cutoff_radius, max_neighbors)
    found = flat.nearest(cutoff_radius, max_neighbors)
    starts = flat.atom_start
    if (
        np.diff(starts).max(initial=0) > np.iinfo(np.int16).max
        or found.degrees.max(initial=0) > MAX_DEGREE
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
    radius = float(cutoff_radius)
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
        packed.append(_with_header(payload, flags, max_neighbors, b - a, f - e, radius))
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
    lengths = _packed_size(n_atoms, n_edges, flags)
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


def _with_header(
    payload: bytes,
    flags: int,
    max_neighbors: int | None,
    n_atoms: int,
    n_edges: int,
    cutoff_radius: float,
) -> bytes:
    kept = max_neighbors or 0
    fields = (_MAGIC, _PACK_VERSION, flags, kept, n_atoms, n_edges, cutoff_radius)
    checksum = zlib.crc32(payload, zlib.crc32(_HEADER.pack(*fields, 0)))
    return _HEADER.pack(*fields, checksum) + payload


def _packed_size(n_atoms: Any, n_edges: Any, flags: int) -> Any:
    """Return the bytes of a packed graph, or of many that were made in one way."""
    per_edge, fixed = 8 if flags & _WIDE_INDEX else 6, HEADER_BYTES
    if flags & _GEOMETRY:
        per_edge += 6 if flags & _WIDE_OFFSETS else 3
        fixed += 72
    if flags & _VECTORS:
        per_edge += 12
    return fixed + 3 * n_atoms + per_edge * n_edges


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
    size = _packed_size(n_atoms, n_edges, flags)
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


def _unpack_numbers(data: bytes, n_atoms: int, n_edges: int, flags: int) -> Any:
    return np.frombuffer(data, _NUMBER, n_atoms, HEADER_BYTES).copy()


def _unpack_edges(data: bytes, n_atoms: int, n_edges: int, flags: int) -> Any:
    begin = HEADER_BYTES + n_atoms
    edge_index = np.empty((2, n_edges), _INDEX)
    degrees = np.frombuffer(data, _DEGREE, n_atoms, begin)
    centre = centres(n_atoms).repeat(degrees)
    if len(centre) != n_edges:
        raise CorruptArtifactError(
            f"the degrees of a packed crystal graph add up to {len(centre)}, not to "
            f"its {n_edges} edges",
            advice="featurize the structure again",
        )
    edge_index[0] = centre
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
