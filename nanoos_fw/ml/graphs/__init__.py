"""Crystal graphs: periodic neighbours, their order and their bytes.

Conventions of every array here and downstream: an *edge* goes from a centre atom
``i = edge_index[0]`` to a neighbour ``j = edge_index[1]`` in the cell
``offsets`` (integer lattice vectors), and ``distances`` holds
``|r_j + offsets @ lattice - r_i|`` in Å. Edges are sorted by centre.
"""

from __future__ import annotations

from nanoos_fw.ml.graphs.arrays import CrystalArrays, arrays_of_dict, read_arrays
from nanoos_fw.ml.graphs.building import (
    build_graph,
    build_graph_arrays,
    build_graphs,
    cartesian_vectors,
    graph_error,
    nearest_neighbors,
    vectors_of_arrays,
)
from nanoos_fw.ml.graphs.crystal import MAX_DEGREE, CrystalGraph
from nanoos_fw.ml.graphs.packing import (
    HEADER_BYTES,
    PackedHeader,
    pack_arrays,
    pack_graph,
    read_header,
    read_headers,
    unpack_graph,
)

__all__ = [
    "HEADER_BYTES",
    "MAX_DEGREE",
    "CrystalArrays",
    "CrystalGraph",
    "PackedHeader",
    "arrays_of_dict",
    "build_graph",
    "build_graph_arrays",
    "build_graphs",
    "cartesian_vectors",
    "graph_error",
    "nearest_neighbors",
    "pack_arrays",
    "pack_graph",
    "read_arrays",
    "read_header",
    "read_headers",
    "unpack_graph",
    "vectors_of_arrays",
]
