"""Potentials by the commands that a LAMMPS user would write, through a whitelist.

What a user writes as ``pair_style`` and ``pair_coeff`` is taken apart into numbers,
names of styles, files, elements and known keywords; only these are put together again,
so that nothing else can reach a script.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanoos_fw.errors import InputError
from nanoos_fw.md.installed import installed_lammps
from nanoos_fw.md.potential_files import read_header, read_reax
from nanoos_fw.md.potential_folders import (
    STYLE_UNITS,
    check_units_tag,
    find_potential_file,
    potential_file,
)
from nanoos_fw.md.potential_terms import (
    ABSENT,
    OVERLAY,
    PLAIN_WORD,
    PairCoefficient,
    PairTerm,
    PotentialFix,
    Word,
    check_element,
    check_safe_name,
    check_style,
)
from nanoos_fw.md.potentials import Potential, qeq_reaxff, safe_timestep_fs
from nanoos_fw.md.unit_systems import Units
from nanoos_fw.settings import load_settings

_NEAR_NAMES = 5

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
                "nanoos_fw.md.pair_commands.PotentialCommands lists",
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
        units = STYLE_UNITS.get(term.style, commands.units)
        if units != commands.units:
            raise InputError(
                f"pair style {term.style} is in {units} units, not {commands.units}",
                advice=f"set units: {units}",
            )
    for path in files:
        head = path.read_bytes()[:4096].decode("utf-8", errors="replace")
        check_units_tag(read_header(head), commands.units, path)
    fixes = tuple(_parse_fix(text, commands.units) for text in commands.fixes)
    reactive = [term for term in terms if term.style == "reaxff"]
    if reactive and not fixes:
        fixes = _reax_fixes(reactive[0], files)
    charges = commands.charges or _charges_of(terms, fixes)
    return Potential(
        name=commands.name,
        terms=terms,
        files=tuple(potential_file(path) for path in files),
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
        styles = installed_lammps(load_settings().lammps_command).pair_styles
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


def script_elements(pair_style: str, pair_coeff: Sequence[str]) -> tuple[str, ...]:
    """Return the elements of the types: what a ``* *`` command ends with.

    Raises
    ------
    InputError
        If no command names all of them.
    """
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
    header = read_reax(path.read_text(encoding="utf-8", errors="replace"))
    return (qeq_reaxff(header.taper_a),)


def _charges_of(
    terms: Sequence[PairTerm], fixes: Sequence[PotentialFix]
) -> Literal["none", "given", "equilibrated"]:
    if fixes:
        return "equilibrated"
    return "given" if any("coul" in term.style for term in terms) else "none"
