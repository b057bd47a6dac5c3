"""A structure as the text of a file that names its key."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pymatgen.core import Structure

SUFFIXES = {"extxyz": ".extxyz", "poscar": ".vasp", "cif": ".cif"}


def structure_text(structure: Structure, key: str, file_format: str) -> str:
    """Return a structure as text that names its key.

    Parameters
    ----------
    file_format
        One of ``SUFFIXES``.
    """
    if file_format == "cif":
        from pymatgen.io.cif import CifWriter

        text = str(CifWriter(structure, significant_figures=12))
        _, _, rest = text.partition("data_")
        return f"data_{key}\n{rest.partition(chr(10))[2]}"
    if file_format == "poscar":
        from pymatgen.io.vasp import Poscar

        return str(Poscar(structure, comment=key).get_str(significant_figures=12))
    numbers = " ".join(repr(float(x)) for x in structure.lattice.matrix.ravel())
    lines = [
        str(len(structure)),
        f'Lattice="{numbers}" Properties=species:S:1:pos:R:3 '
        f'structure_id={key} pbc="T T T"',
    ]
    for site in structure:
        x, y, z = (repr(float(value)) for value in site.coords)
        lines.append(f"{site.specie.symbol} {x} {y} {z}")
    return "\n".join(lines) + "\n"
