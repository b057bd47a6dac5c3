"""Graphs from structures and arrays: the neighbours that are found, in their order."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.crystals import HEAVIEST, element_symbol
from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.graphs.arrays import (
    CrystalArrays,
    frac_coords_of,
    numbers_of,
    read_arrays,
)
from nanoos_fw.ml.graphs.crystal import CrystalGraph, centres, check_parameters
from nanoos_fw.ml.lattices import CLOSE, FLAT, ISOLATED, NOT_FINITE, TOO_MANY
from nanoos_fw.ml.neighbors import (
    NeighborList,
    list_nearest_of_one,
    order_of_edges,
    shells_of,
)

if TYPE_CHECKING:
    from pymatgen.core import Structure

# Bounds the memory of one call of the search; larger calls are no faster.
_CRYSTALS_AT_ONCE = 64


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
    check_parameters(cutoff_radius, max_neighbors)
    return _build(
        numbers_of(structure),
        structure.lattice.matrix,
        frac_coords_of(structure),
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
    check_parameters(cutoff_radius, max_neighbors)
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
    strange = (values < 1) | (values > HEAVIEST)
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
        As in :func:`read_arrays`.
    cutoff_radius, max_neighbors
        As in :func:`build_graph`, whose graphs these are.

    Returns
    -------
    graphs
        One for each crystal, None where it has none.
    errors
        Why, by position.
    """
    check_parameters(cutoff_radius, max_neighbors)
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


# ------------------------------------------------------------------------- private


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
    edge_index[0] = centres(len(numbers)).repeat(found.degrees)
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


def _build_some(
    flat: CrystalArrays,
    cutoff_radius: float,
    max_neighbors: int | None,
    begin: int,
    graphs: list[CrystalGraph | None],
    errors: dict[int, InputError | CorruptArtifactError],
) -> None:
    """Build graphs with one call, and put them where they belong."""
    found = flat.nearest(cutoff_radius, max_neighbors)
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
