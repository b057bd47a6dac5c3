"""Crystals as flat arrays: from structures, their dictionaries, or stored documents."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.crystals import HEAVIEST, check_periodic, decode_arrays
from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.neighbors import NeighborList, list_nearest

if TYPE_CHECKING:
    from pymatgen.core import Structure

# Where pymatgen's sites keep what their properties return.
_STORED = {name: operator.attrgetter(f"_{name}") for name in ("species", "frac_coords")}


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

    def nearest(self, cutoff_radius: float, max_neighbors: int | None) -> NeighborList:
        """Return the neighbours of all atoms, as ``list_nearest`` does."""
        return list_nearest(
            self.lattices,
            self.frac_coords,
            self.numbers,
            self.atom_start,
            cutoff_radius,
            max_neighbors,
        )


def read_arrays(
    crystals: Iterable[Structure | Mapping[str, Any]],
) -> tuple[CrystalArrays, dict[int, InputError | CorruptArtifactError]]:
    """Return crystals as flat arrays, and why some have none, by position.

    Parameters
    ----------
    crystals
        pymatgen structures; their dictionaries (``Structure.as_dict``), from which the
        arrays are taken without making a structure; or documents of
        :func:`nanoos_fw.crystals.encode_structure`.
    """
    positions: list[int] = []
    numbers: list[NDArray[np.uint8]] = []
    lattices: list[NDArray[np.float64]] = []
    frac_coords: list[NDArray[np.float64]] = []
    errors: dict[int, InputError | CorruptArtifactError] = {}
    for position, crystal in enumerate(crystals):
        try:
            if not isinstance(crystal, Mapping):
                own = numbers_of(crystal)
                lattice, coords = crystal.lattice.matrix, frac_coords_of(crystal)
            elif "sites" in crystal:
                own, lattice, coords = arrays_of_dict(crystal)
            else:
                own, lattice, coords = decode_arrays(crystal)
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


def arrays_of_dict(
    crystal: Mapping[str, Any],
) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64]]:
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


def numbers_of(structure: Structure) -> NDArray[np.uint8]:
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
                if not 0 < number <= HEAVIEST:
                    raise InputError(
                        f"site {index} of {structure.composition.formula} is no "
                        f"element: {specie}"
                    )
                found = known[id(specie)] = (specie, number)
            known[id(species)] = (species, found[1])
        numbers.append(found[1])
    return np.frombuffer(numbers, dtype=np.uint8)


def frac_coords_of(structure: Structure) -> NDArray[np.float64]:
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


@functools.cache
def _number_of_symbol() -> dict[str, int]:
    from pymatgen.core import Element

    # Deuterium and tritium are hydrogen to a graph.
    return {element.symbol: element.Z for element in Element} | {"D": 1, "T": 1}
