"""From crystals to the table that models predict from, with no objects in between."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.crystals import decode_arrays
from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable, degree_column
from nanoos_fw.ml.graphs import CrystalArrays, graph_error, read_arrays
from nanoos_fw.ml.neighbors import list_nearest

if TYPE_CHECKING:
    from pymatgen.core import Structure

_CRYSTALS_AT_ONCE = 64  # bounds the memory of one search; larger calls are no faster

_Arrays = tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64]]
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
        pymatgen structures; their dictionaries (``Structure.as_dict``), from which the
        arrays are taken without making a structure; or documents of
        :func:`nanoos_fw.crystals.encode_structure`.
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
    flats = (
        (
            begin,
            read_crystals(crystals[begin : begin + _CRYSTALS_AT_ONCE], begin, errors),
        )
        for begin in range(0, len(crystals), _CRYSTALS_AT_ONCE)
    )
    return _table_of(flats, cutoff_radius, max_neighbors, errors)


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
        found = list_nearest(
            flat.lattices,
            flat.frac_coords,
            flat.numbers,
            flat.atom_start,
            cutoff_radius,
            max_neighbors,
        )
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


def arrays_of_dict(crystal: Mapping[str, Any]) -> _Arrays:
    """Return atomic numbers, lattice (Å) and fractional coordinates of a dictionary.

    Parameters
    ----------
    crystal
        Of ``Structure.as_dict``, or its JSON. Oxidation states do not count.

    Raises
    ------
    InputError
        If it is disordered, not periodic in three directions, holds what is no
        element, or is no such dictionary.
    """
    table = _number_of_symbol()
    try:
        lattice = np.array(crystal["lattice"]["matrix"], dtype=np.float64)
        pbc = crystal["lattice"].get("pbc", (True, True, True))
        sites = crystal["sites"]
        coords = np.array([site["abc"] for site in sites], dtype=np.float64)
        numbers = np.empty(len(sites), dtype=np.uint8)
        for index, site in enumerate(sites):
            (specie,) = site["species"] if len(site["species"]) == 1 else (None,)
            if specie is None or specie["occu"] != 1:
                raise InputError(
                    f"the structure is disordered at site {index}",
                    evidence={"species": str(site["species"])[:200]},
                    advice="enumerate ordered structures first",
                )
            numbers[index] = table[specie["element"]]
    except KeyError as error:
        raise InputError(
            f"the dictionary of a structure has no {error}, or it is no element"
        ) from error
    except (TypeError, ValueError) as error:
        raise InputError(f"this is no dictionary of a structure: {error}") from error
    if not all(pbc):
        raise InputError(
            "the dictionary of a structure is not periodic in three directions",
            evidence={"pbc": [bool(flag) for flag in pbc]},
            advice="if its vacuum is part of the cell, set pbc to true",
        )
    if lattice.shape != (3, 3) or coords.shape != (len(numbers), 3) or not len(numbers):
        raise InputError(
            "the dictionary of a structure needs a lattice (3, 3) and sites",
            evidence={"lattice": list(lattice.shape), "sites": list(coords.shape)},
        )
    return numbers, lattice, coords


# ------------------------------------------------------------------------- private


def read_crystals(
    crystals: Sequence[Structure | Mapping[str, Any]],
    begin: int,
    errors: dict[int, _Error],
) -> CrystalArrays:
    """Return flat arrays; ``positions`` count from the first of these crystals."""
    found: list[_Arrays] = []
    positions: list[int] = []
    for position, crystal in enumerate(crystals):
        try:
            found.append(_arrays(crystal))
        except (InputError, CorruptArtifactError) as error:
            errors[begin + position] = error
            continue
        positions.append(position)
    atom_start = np.zeros(len(found) + 1, dtype=np.int64)
    np.cumsum([len(numbers) for numbers, _, _ in found], out=atom_start[1:])
    return CrystalArrays(
        numbers=np.concatenate([np.empty(0, np.uint8), *(n for n, _, _ in found)]),
        lattices=np.array([b for _, b, _ in found], dtype=np.float64).reshape(-1, 3, 3),
        frac_coords=np.concatenate([np.empty((0, 3)), *(c for _, _, c in found)]),
        atom_start=atom_start,
        positions=np.array(positions, dtype=np.int64),
    )


def _arrays(crystal: Structure | Mapping[str, Any]) -> _Arrays:
    if isinstance(crystal, Mapping):
        return arrays_of_dict(crystal) if "sites" in crystal else decode_arrays(crystal)
    flat, errors = read_arrays([crystal])
    if errors:
        raise errors[0]
    return flat.numbers, flat.lattices[0], flat.frac_coords


@functools.cache
def _number_of_symbol() -> dict[str, int]:
    from pymatgen.core import Element

    # Deuterium and tritium are hydrogen to a graph.
    return {element.symbol: element.Z for element in Element} | {"D": 1, "T": 1}
