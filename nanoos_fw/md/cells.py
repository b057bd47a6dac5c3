"""Structures on their way into a simulation: sites, distances, supercells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.md.box import LammpsBox, pairs_within, perpendicular_widths
from nanoos_fw.md.potential_terms import check_element

if TYPE_CHECKING:
    from pymatgen.core import Structure

Array = NDArray[np.float64]

MIN_DISTANCE_A = 0.5


def check_finite(species: Sequence[str], lattice: Array, frac: Array) -> LammpsBox:
    """Return the box of a cell whose numbers are finite; refuse others.

    Raises
    ------
    InputError
        Naming the site whose coordinates are not finite, or the lattice.
    """
    if not np.isfinite(frac).all():
        bad = int(np.flatnonzero(~np.isfinite(frac).all(axis=1))[0])
        raise InputError(
            f"site {bad} ({species[bad]}) has no finite coordinates: "
            f"{frac[bad].tolist()}",
            evidence={"class": "not_finite", "site": bad},
            advice="correct the coordinates of this site",
        )
    return LammpsBox.from_lattice(lattice)


def check_distances(species: Sequence[str], lattice: Array, frac: Array) -> None:
    """Refuse atoms closer than 0.5 Å: LAMMPS computes them without a word.

    Raises
    ------
    InputError
        Naming the two sites, or the one whose coordinates are not finite.
    """
    box = check_finite(species, lattice, frac)
    first, second, shifts, distances = pairs_within(
        box.positions(frac), box.matrix, MIN_DISTANCE_A
    )
    image = first == second
    repeats = image & shifts.any(axis=1)
    if repeats.any():
        raise InputError(
            f"the cell repeats after {distances[repeats].min():.3f} Å",
            evidence={"class": "atoms_too_close"},
            advice="check the lattice vectors and their unit",
        )
    if image.all():
        return
    first, second, distances = first[~image], second[~image], distances[~image]
    closest = int(distances.argmin())
    i, j = sorted((int(first[closest]), int(second[closest])))
    raise InputError(
        f"sites {i} ({species[i]}) and {j} ({species[j]}) are "
        f"{distances[closest]:.3f} Å apart",
        evidence={"class": "atoms_too_close", "sites": [i, j]},
        advice="remove duplicate atoms, or check the cell and its units",
    )


def site_elements(structure: Structure) -> list[str]:
    """Return the element of each site.

    Raises
    ------
    InputError
        If a site is partially occupied, is deuterium, tritium or no element at all,
        or if the structure has no sites.
    """
    if len(structure) == 0:
        raise InputError("the structure has no sites", advice="give one with atoms")
    elements = []
    for number, site in enumerate(structure):
        if not site.is_ordered:
            raise InputError(
                f"site {number} is partially occupied",
                evidence={
                    "class": "disordered",
                    "occupancies": {str(k): v for k, v in site.species.items()},
                },
                advice="give an ordered structure",
            )
        # An Element's value is its own name, also for D; a Species holds an element.
        specie = site.specie
        symbol = str(getattr(getattr(specie, "element", specie), "value", specie))
        try:
            elements.append(check_element(symbol))
        except InputError as error:
            raise InputError(
                f"site {number} holds {symbol}, which is no element of the periodic "
                "table",
                evidence={"class": "no_element", "site": number, "species": symbol},
                advice="replace D and T by H, and labels by elements",
            ) from error
    return elements


def site_charges(structure: Structure) -> Array | None:
    """Return the charge of each site, or None if the structure has none.

    The site property ``charge`` comes first, then oxidation states.

    Returns
    -------
    ndarray or None
        ``(n_atoms,) float64``, elementary charges.

    Raises
    ------
    InputError
        If some sites have a charge and others not, or one is not finite.
    """
    properties = structure.site_properties.get("charge")
    if properties is not None:
        values = list(properties)
    else:
        # Species have the attribute, elements do not.
        values = [getattr(site.specie, "oxi_state", None) for site in structure]
    if all(value is None for value in values):
        return None
    for number, value in enumerate(values):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise InputError(
                f"site {number} ({structure[number].species_string}) has charge "
                f"{value!r}, while others have charges",
                evidence={"class": "charges", "site": number},
                advice="give every site a finite charge, or none",
            )
    return np.array(values, dtype=np.float64)


def supercell(structure: Structure, min_atoms: int) -> Structure:
    """Return a supercell with at least so many atoms, as near to a cube as it can be.

    The lattice is reduced, then repeated along its vectors so that opposite faces
    are about equally far apart in all three directions.

    Parameters
    ----------
    structure
        Any structure.
    min_atoms
        Least number of atoms.

    Returns
    -------
    Structure
        In the same orientation; a copy if the structure is large enough already.
    """
    if len(structure) >= min_atoms:
        return structure.copy()
    reduced = structure.get_reduced_structure(reduction_algo="LLL")
    widths = perpendicular_widths(reduced.lattice.matrix)
    least = min_atoms / len(structure)
    # The smallest common width, covered by whole cells, that gives enough atoms.
    for width in sorted(k * w for w in widths for k in range(1, math.ceil(least) + 1)):
        repeats = [max(1, math.ceil(width / w - 1e-9)) for w in widths]
        if math.prod(repeats) >= least:
            break
    return reduced * repeats
