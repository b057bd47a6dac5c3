"""Structures on their way into a simulation: sites, distances, supercells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.md.box import LammpsBox, perpendicular_widths

if TYPE_CHECKING:
    from pymatgen.core import Structure

Array = NDArray[np.float64]

MIN_DISTANCE_A = 0.5


def check_distances(species: Sequence[str], lattice: Array, frac: Array) -> None:
    """Refuse atoms closer than 0.5 Å: LAMMPS computes them without a word.

    Raises
    ------
    InputError
        Naming the two sites.
    """
    box = LammpsBox.from_lattice(lattice)  # reduced: 27 images are enough
    reduced = frac @ np.linalg.inv(box.basis)
    shifts = np.array(np.meshgrid(*[(-1, 0, 1)] * 3, indexing="ij")).reshape(3, -1).T
    self_images = np.linalg.norm(shifts[np.any(shifts, axis=1)] @ box.matrix, axis=1)
    if self_images.min() < MIN_DISTANCE_A:
        raise InputError(
            f"the cell repeats after {self_images.min():.3f} Å",
            evidence={"class": "atoms_too_close"},
        )
    # By rows: memory stays linear in the number of atoms.
    for i in range(len(species) - 1):
        delta = reduced[i + 1 :] - reduced[i]
        delta -= np.rint(delta)
        vectors = (delta[:, None, :] + shifts[None, :, :]) @ box.matrix
        distances = np.sqrt(np.einsum("ijk,ijk->ij", vectors, vectors)).min(axis=1)
        j = int(distances.argmin())
        if distances[j] < MIN_DISTANCE_A:
            other = i + 1 + j
            raise InputError(
                f"sites {i} ({species[i]}) and {other} ({species[other]}) are "
                f"{distances[j]:.3f} Å apart",
                evidence={"class": "atoms_too_close", "sites": [i, other]},
            )


def site_elements(structure: Structure) -> list[str]:
    """Return the element of each site.

    Raises
    ------
    InputError
        If a site is partially occupied, or the structure has no sites.
    """
    if len(structure) == 0:
        raise InputError("the structure has no sites")
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
    return [site.specie.symbol for site in structure]


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
