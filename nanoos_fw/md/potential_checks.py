"""What is checked of a structure and a potential before anything is queued."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from nanoos_fw.errors import (
    CorruptArtifactError,
    InputError,
    MissingDependencyError,
)
from nanoos_fw.md.box import LammpsBox
from nanoos_fw.md.cells import check_distances, site_charges, site_elements
from nanoos_fw.md.installed import InstalledLammps, installed_lammps
from nanoos_fw.md.potential_files import read_header
from nanoos_fw.md.potentials import Potential
from nanoos_fw.provenance import sha256_file
from nanoos_fw.settings import load_settings

if TYPE_CHECKING:
    from pymatgen.core import Structure

logger = logging.getLogger(__name__)

_NEUTRAL_E = 0.01
_HEADER_BYTES = 4096


def check_potential(
    structure: Structure,
    potential: Potential,
    *,
    installed: InstalledLammps | None = None,
) -> tuple[str, ...]:
    """Refuse what LAMMPS would refuse later, or worse, would take.

    Called before a simulation is queued and again before it starts.

    Parameters
    ----------
    structure
        The structure that is to be simulated.
    potential
        Its potential.
    installed
        The LAMMPS that will run; None asks the one that the settings name.

    Returns
    -------
    tuple of str
        Warnings: what is allowed and may surprise.

    Raises
    ------
    InputError
        For a structure that cannot be simulated (disordered, atoms closer than
        0.5 Å, no volume, not finite), an element that the potential lacks, units
        that are not those of a file, or charges that are missing or do not add up to
        zero.
    MissingDependencyError
        If the installed LAMMPS lacks a style, or a file is gone.
    CorruptArtifactError
        If a file has changed since the recipe was made.
    """
    species = site_elements(structure)
    LammpsBox.from_lattice(structure.lattice.matrix)
    check_distances(species, structure.lattice.matrix, structure.frac_coords)
    potential.check_elements(species)
    check_styles(potential, installed)
    check_files(potential)
    return check_charges(structure, potential)


def check_styles(
    potential: Potential, installed: InstalledLammps | None = None
) -> None:
    """Refuse a potential whose pair or fix styles LAMMPS was built without.

    Raises
    ------
    MissingDependencyError
        Naming the style and the version of LAMMPS.
    """
    lammps = installed
    if lammps is None:
        lammps = installed_lammps(load_settings().lammps_command)
    missing = [s for s in potential.pair_styles if s not in lammps.pair_styles]
    missing += [f.style for f in potential.fixes if f.style not in lammps.fix_styles]
    if missing:
        raise MissingDependencyError(
            f"potential {potential.name!r} needs {', '.join(missing)}, which LAMMPS "
            f"{lammps.version} does not have",
            evidence={"missing": missing, "packages": sorted(lammps.packages)},
            advice="install a LAMMPS built with the package of this style, or choose "
            "another potential",
        )


def check_files(potential: Potential) -> None:
    """Refuse a potential whose files are gone, have changed, or are in other units.

    Raises
    ------
    MissingDependencyError
        If a file cannot be read.
    CorruptArtifactError
        If its SHA-256 is not that of the recipe.
    InputError
        If its ``UNITS`` tag is not the recipe's.
    """
    for file in potential.files:
        try:
            digest = sha256_file(file.path)
            with file.path.open("rb") as handle:
                head = handle.read(_HEADER_BYTES)
        except OSError as error:
            raise MissingDependencyError(
                f"potential file {file.path} cannot be read: {error.strerror}",
                advice="make the potential again from its name",
            ) from error
        if digest != file.sha256:
            raise CorruptArtifactError(
                f"potential file {file.path} has changed",
                evidence={"expected": file.sha256, "found": digest},
                advice="restore the file, or make the potential again",
            )
        tag = read_header(head.decode("utf-8", errors="replace")).units
        if tag and tag != potential.units:
            raise InputError(
                f"potential file {file.name} is in {tag} units, and the potential "
                f"{potential.name!r} in {potential.units} units",
                evidence={"path": str(file.path)},
                advice=f"make the recipe with units {tag}",
            )


def check_charges(structure: Structure, potential: Potential) -> tuple[str, ...]:
    """Refuse charges that are missing or do not add up to zero, if they count.

    Returns
    -------
    tuple of str
        A warning if the structure has charges and the potential knows none.

    Raises
    ------
    InputError
        If the potential takes charges from the structure, and cannot take these.
    """
    charges = site_charges(structure)
    if potential.charges == "given":
        if charges is None:
            raise InputError(
                f"potential {potential.name!r} needs charges, and the structure has "
                "none",
                evidence={"class": "charges"},
                advice="give the site property 'charge' or oxidation states",
            )
        total = float(charges.sum())
        if abs(total) > _NEUTRAL_E:
            raise InputError(
                f"the charges of the structure add up to {total:+.3f} e",
                evidence={"class": "charges", "total_e": total},
                advice="a periodic crystal must be neutral: correct the charges",
            )
    elif potential.charges == "none" and charges is not None and charges.any():
        return (
            f"potential {potential.name!r} knows no charges: those of the structure "
            "have no effect",
        )
    return ()
