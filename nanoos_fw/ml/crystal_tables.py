"""From crystals to the table that models predict from, with no objects in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable, degree_column
from nanoos_fw.ml.graphs import CrystalArrays, graph_error, read_arrays

if TYPE_CHECKING:
    from pymatgen.core import Structure

_CRYSTALS_AT_ONCE = 64  # bounds the memory of one search; larger calls are no faster

_Error = InputError | CorruptArtifactError


def build_table(
    crystals: Sequence[Structure | Mapping[str, Any]],
    *,
    cutoff_radius: float = 8.0,
    max_neighbors: int | None = 12,
) -> tuple[GraphTable | None, NDArray[np.int64], dict[int, _Error]]:
    """Build the graphs of many crystals as one table.

    Parameters
    ----------
    crystals
        As in :func:`nanoos_fw.ml.graphs.read_arrays`.
    cutoff_radius, max_neighbors
        As in :func:`nanoos_fw.ml.graphs.build_graph`, whose graphs these are.

    Returns
    -------
    table
        Graphs of those that have one; None if none has.
    positions
        ``(n_graphs,)``, the place of each in ``crystals``.
    errors
        Why the others have none, by place.
    """
    errors: dict[int, _Error] = {}

    def pieces() -> Iterator[tuple[int, CrystalArrays]]:
        for begin in range(0, len(crystals), _CRYSTALS_AT_ONCE):
            flat, refused = read_arrays(crystals[begin : begin + _CRYSTALS_AT_ONCE])
            errors.update({begin + at: error for at, error in refused.items()})
            yield begin, flat

    return _table_of(pieces(), cutoff_radius, max_neighbors, errors)


def build_table_of_arrays(
    flat: CrystalArrays,
    *,
    cutoff_radius: float = 8.0,
    max_neighbors: int | None = 12,
) -> tuple[GraphTable | None, NDArray[np.int64], dict[int, _Error]]:
    """Do what :func:`build_table` does for crystals in flat arrays.

    Places are rows of the arrays, whatever their ``positions`` say.
    """
    starts = flat.atom_start

    def pieces() -> Iterator[tuple[int, CrystalArrays]]:
        for begin in range(0, len(starts) - 1, _CRYSTALS_AT_ONCE):
            end = min(begin + _CRYSTALS_AT_ONCE, len(starts) - 1)
            atoms = slice(int(starts[begin]), int(starts[end]))
            yield (
                begin,
                CrystalArrays(
                    numbers=flat.numbers[atoms],
                    lattices=flat.lattices[begin:end],
                    frac_coords=flat.frac_coords[atoms],
                    atom_start=starts[begin : end + 1] - starts[begin],
                    positions=np.arange(end - begin),
                ),
            )

    return _table_of(pieces(), cutoff_radius, max_neighbors, {})


def _table_of(
    flats: Iterable[tuple[int, CrystalArrays]],
    cutoff_radius: float,
    max_neighbors: int | None,
    errors: dict[int, _Error],
) -> tuple[GraphTable | None, NDArray[np.int64], dict[int, _Error]]:
    """Search the neighbours of flat crystals, which begin at the given places."""
    parts: dict[str, list[NDArray[Any]]] = {
        name: []
        for name in (
            "numbers", "degrees", "neighbors", "distances", "sizes", "edges", "places",
        )
    }  # fmt: skip
    for begin, flat in flats:
        if not len(flat.positions):
            continue
        found = flat.nearest(cutoff_radius, max_neighbors)
        sizes = np.diff(flat.atom_start)
        good = found.status == 0
        edge_of = np.concatenate([[0], np.cumsum(found.degrees)])[flat.atom_start]
        numbers, degrees = flat.numbers, found.degrees
        if not good.all():  # they have no edges: only their atoms go
            for row in np.flatnonzero(~good).tolist():
                errors[begin + int(flat.positions[row])] = graph_error(
                    flat, found, row, cutoff_radius
                )
            keep = np.repeat(good, sizes)
            numbers, degrees = numbers[keep], degrees[keep]
        parts["numbers"].append(numbers)
        parts["degrees"].append(degree_column(degrees))
        parts["neighbors"].append(found.neighbors)
        parts["distances"].append(found.distances.astype(np.float32))
        parts["sizes"].append(sizes[good])
        parts["edges"].append(np.diff(edge_of)[good])
        parts["places"].append(begin + flat.positions[good])
    whole: dict[str, NDArray[Any]] = {
        name: np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
        for name, arrays in parts.items()
    }
    if not len(whole["places"]):
        return None, whole["places"], dict(sorted(errors.items()))
    table = GraphTable(
        numbers=whole["numbers"],
        degrees=whole["degrees"],
        neighbors=whole["neighbors"],
        distances=whole["distances"],
        atom_start=np.concatenate([[0], np.cumsum(whole["sizes"])]),
        edge_start=np.concatenate([[0], np.cumsum(whole["edges"])]),
        cutoff_radius=float(cutoff_radius),
        max_neighbors=max_neighbors,
    )
    return table, whole["places"], dict(sorted(errors.items()))
