"""CIF, block by block, with guards where pymatgen's parser reads on regardless.

pymatgen's parser is lenient: it drops sites that it cannot name, takes ``.`` for 0,
deletes a Unicode minus, falls back to P1 when it does not know the symmetry, and lets
the later of two equally named blocks win. Here each block is parsed on its own and
refused where the result would not be the crystal that the file describes.

References
----------
S. R. Hall, F. H. Allen and I. D. Brown, Acta Cryst. A47, 655 (1991); the CIF core
dictionary of the IUCr for the data names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from nanoos_fw.errors import InputError
from nanoos_fw.structure_files.entries import Item, Parsed

if TYPE_CHECKING:
    from pymatgen.core import Structure
    from pymatgen.io.cif import CifParser

# Refined occupancies such as 1.003(4) mean a full site.
_OCCUPANCY_TOLERANCE = 1.01
_COORDINATES = ("_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z")
_GROUPS = re.compile(r"Wat|wat|OH|NO3")
_WATER = {"Hw", "Ow"}
_P1 = {"p1", "1", "?", ".", ""}
_DEFAULTED_TO_P1 = "Defaulting to P1"
_IMPLICIT_HYDROGEN = "implicit hydrogens"


@dataclass
class _Block:
    name: str
    lines: list[str]
    structural: bool = False
    foreign: list[str] = field(default_factory=list)
    open_text: bool = False


def cif_items(stream: TextIO, path: str) -> Iterator[Item]:
    """Yield the blocks of a CIF that describe a crystal.

    Blocks without cell and atoms (publication data, powder patterns) are passed over.

    Raises
    ------
    InputError
        If there is no block, or none with a cell or atoms.
    """
    n_blocks = n_items = 0
    for block in _blocks(stream):
        n_blocks += 1
        if not (block.structural or block.open_text):
            continue
        n_items += 1
        yield Item(functools.partial(_parse, block), None)
    if n_blocks == 0:
        raise InputError(f"{path} has no data_ block, so it is not a CIF")
    if n_items == 0:
        raise InputError(f"no block of {path} has a cell and atoms")


def _blocks(stream: TextIO) -> Iterator[_Block]:
    """Cut a CIF at its ``data_`` headers, minding multi-line text fields."""
    block: _Block | None = None
    in_text = False
    for line in stream:
        if in_text:
            in_text = not line.startswith(";")
            if in_text:
                # pymatgen cuts at data_ inside text fields, too.
                line = re.sub(r"^(\s*)data_", r"\1data-", line)  # noqa: PLW2901
        elif line.startswith(";"):
            in_text = True
        elif line.lstrip()[:5].lower() == "data_":
            if block is not None:
                yield block
            name = line.strip()[5:]
            # Names such as powder_pattern have a meaning for pymatgen, cases too.
            block = _Block(name, ["data_block\n"])
            continue
        elif block is not None:
            tag = line.lstrip()[:11].lower()
            block.structural |= tag.startswith(("_cell_", "_cell.", "_atom_site"))
            if not line.isascii() and not re.search(r"['\"#]", line):
                block.foreign.append(line.strip())
        if block is not None:
            block.lines.append(line)
    if block is not None:
        block.open_text = in_text
        yield block


def _parse(block: _Block) -> Parsed:
    from pymatgen.io.cif import CifParser

    if block.open_text:
        raise InputError(
            f"block {block.name} ends inside a text field", advice="it was cut short"
        )
    if block.foreign:
        raise InputError(
            f"block {block.name} has characters outside ASCII in its data, which "
            "would be dropped",
            evidence={"line": block.foreign[0]},
            advice="write minus signs as '-'",
        )
    parser = CifParser.from_str(
        "".join(block.lines),
        occupancy_tolerance=_OCCUPANCY_TOLERANCE,
        check_cif=False,
    )
    data = next(iter(parser.as_dict().values()))
    notes: list[str] = []
    _check_atoms(data, notes)
    structures = parser.parse_structures(primitive=False, on_error="raise")
    if len(structures) != 1:
        raise InputError(f"block {block.name} gave {len(structures)} crystals")
    structure = structures[0]
    notes.extend(getattr(parser, "warnings", ()))
    _check_symmetry(data, notes)
    if "implicit_hydrogens" in structure.site_properties or any(
        _IMPLICIT_HYDROGEN in note for note in notes
    ):
        raise InputError(
            f"block {block.name} leaves out hydrogen atoms that it counts",
            advice="add their positions",
        )
    if structure.is_ordered:
        _check_formula(parser, data, structure, notes)
    return Parsed(structure, {}, notes)


def _check_atoms(data: Mapping[str, Any], notes: list[str]) -> None:
    """Refuse atom rows that the parser would drop, misread or invent."""
    labels = data.get("_atom_site_label")
    symbols = data.get("_atom_site_type_symbol")
    if not labels:
        raise InputError("the block has no _atom_site_label")
    columns = [data.get(name) for name in _COORDINATES]
    if any(not column for column in columns):
        raise InputError("the block has no fractional coordinates")
    if isinstance(labels, str) or any(isinstance(column, str) for column in columns):
        raise InputError(
            "the atom is given without loop_, which is not supported",
            advice="put loop_ and the names of its columns before its values",
        )
    for name in (*_COORDINATES, "_atom_site_occupancy"):
        for label, value in zip(labels, data.get(name) or (), strict=False):
            if value == ".":
                raise InputError(f"atom {label} has no value for {name}")
    for row, label in enumerate(labels):
        _check_symbol(label, symbols[row] if symbols else None, notes)


def _check_symbol(label: str, symbol: str | None, notes: list[str]) -> None:
    from pymatgen.core import Element

    text = label if symbol is None else symbol
    if " + " in text:  # '0.8Nb + 0.2Zr': disorder, refused later by its own name
        return
    match = re.match(r"[A-Za-z]+", text)
    word = match.group() if match else ""
    if Element.is_valid_symbol(word.title()) or word in _WATER:
        return
    intended = symbol is not None or re.fullmatch(r"[A-Z][a-z]+", word)
    if not word or intended or _GROUPS.match(text):
        raise InputError(
            f"atom {label} is no known element: {text!r}",
            evidence={"label": label, "type_symbol": symbol},
            advice="name one element per atom in _atom_site_type_symbol",
        )
    notes.append(f"the element of atom {label} was guessed from its label")


def _check_symmetry(data: Mapping[str, Any], notes: list[str]) -> None:
    if not _is_p1_by_default(notes):
        return
    for name, value in data.items():
        if not re.match(r"_(symmetry_)?(space_group_)?(name|IT_n|Int_T)", name):
            continue
        if str(value).replace(" ", "").strip("'\"").lower() not in _P1:
            raise InputError(
                f"the symmetry operations of {name} {value} are unknown, so most of "
                "the atoms would be missing",
                advice="list them under _symmetry_equiv_pos_as_xyz",
            )


def _check_formula(
    parser: CifParser,
    data: Mapping[str, Any],
    structure: Structure,
    notes: list[str],
) -> None:
    """Refuse a crystal that is not what the formula of its block says."""
    from pymatgen.core import Composition

    if not (
        data.get("_chemical_formula_sum") or data.get("_chemical_formula_structural")
    ):
        return
    reason = parser.check(structure)
    if reason is not None:
        reason = " ".join(reason.split())
        if reason.startswith(("Missing elements", "Incorrect stoichiometry")):
            raise InputError(
                f"the atoms do not agree with the formula of the block: {reason}",
                advice="the file is incomplete, or its formula is wrong",
            )
        notes.append(reason)
    try:
        formula = Composition(data["_chemical_formula_sum"])
        units = float(data.get("_cell_formula_units_Z", 0))
    except (KeyError, ValueError, TypeError):
        return
    n_sites, n_formula = len(structure), float(formula.num_atoms)
    expected = {n_formula * (units or 1)}
    if units and not any(amount % units for amount in formula.values()):
        expected.add(n_formula)  # some programs write the formula of the whole cell
    if n_sites < n_formula or (n_sites < min(expected) and _is_p1_by_default(notes)):
        raise InputError(
            f"the block has {n_sites} atoms instead of {min(expected):g} by its "
            f"formula {data['_chemical_formula_sum']}",
            advice="the file is incomplete, or its formula is wrong",
        )
    if units and n_sites not in expected:
        notes.append(
            f"{n_sites} atoms, where formula and Z of the block give {max(expected):g}"
        )


def _is_p1_by_default(notes: list[str]) -> bool:
    return any(_DEFAULTED_TO_P1 in note for note in notes)
