"""The parts of an interatomic potential: names, styles, coefficients, files.

Whatever stands in a command of LAMMPS passes a whitelist here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from nanoos_fw.errors import InputError

SAFE_NAME = re.compile(r"[A-Za-z0-9._+-]+\Z")
STYLE_NAME = re.compile(r"[a-z][a-z0-9]*([/_][a-z0-9]+)*\Z")
# What stands between numbers and file names: keywords of LAMMPS, tags of elements.
PLAIN_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]*(/[A-Za-z0-9_]+)*\Z")
TYPE_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9]*\Z")
ABSENT = "NULL"  # LAMMPS' word for a type that a pair style does not know
OVERLAY = "hybrid/overlay"
_ISOTOPES = ("D", "T")


Word = StrictInt | StrictFloat | StrictStr


def check_safe_name(name: str) -> str:
    """Return a file name that may stand in a LAMMPS script, unchanged.

    LAMMPS executes what follows a newline and substitutes ``$``, so names are
    whitelisted rather than quoted.

    Raises
    ------
    InputError
        If the name holds anything but letters, digits and ``. _ + -``, or starts
        with a dot or a dash.
    """
    if not SAFE_NAME.match(name) or name[0] in ".-":
        raise InputError(
            f"file name {name!r} cannot be used in a LAMMPS script",
            advice="rename it to letters, digits, '.', '_', '+' and '-'",
        )
    return name


def check_style(style: str) -> str:
    """Return the name of a style of LAMMPS, unchanged.

    Raises
    ------
    InputError
        If it is not made of lower-case words between slashes.
    """
    if not STYLE_NAME.match(style):
        raise InputError(
            f"{style!r} is not the name of a LAMMPS style",
            advice="a style is named like 'tersoff' or 'eam/alloy'",
        )
    return style


def check_words(words: Sequence[Word]) -> tuple[Word, ...]:
    """Return the words of a command, unchanged.

    Raises
    ------
    InputError
        If a text is neither a safe file name nor a plain word, or a number is not
        finite.
    """
    for word in words:
        if isinstance(word, str):
            if not PLAIN_WORD.match(word):
                check_safe_name(word)
        elif not abs(word) < float("inf"):
            raise InputError(f"{word!r} is not a number that LAMMPS can be given")
    return tuple(words)


class PotentialFile(BaseModel):
    """A file of a potential: where it is, and what it must contain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    path: Path
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    _safe = field_validator("name")(check_safe_name)


class PairCoefficient(BaseModel):
    """One ``pair_coeff`` command, by elements instead of the numbers of types.

    Parameters
    ----------
    between
        Two elements, or None for all types (``* *``). Left out where the simulation
        lacks one of them.
    words
        File names, numbers and keywords.
    labels
        For commands that end with a name for each type: the name in the file of each
        element it knows. Types of other elements get ``NULL``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    between: tuple[str, str] | None = None
    words: tuple[Word, ...] = ()
    labels: dict[str, str] = Field(default_factory=dict)

    _words = field_validator("words")(check_words)

    @model_validator(mode="after")
    def _check(self) -> PairCoefficient:
        for element in (*(self.between or ()), *self.labels):
            check_element(element)
        for label in self.labels.values():
            if not TYPE_LABEL.match(label):
                raise InputError(
                    f"{label!r} is no name of an atom type",
                    advice="it takes letters and digits, such as 'Si' or 'Ni4'",
                )
        return self


class PairTerm(BaseModel):
    """One pair style with its arguments and coefficients.

    Parameters
    ----------
    style
        LAMMPS pair style, without accelerator suffix.
    arguments
        Numbers, keywords and file names of ``pair_style``.
    coefficients
        Its ``pair_coeff`` commands.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    style: str
    arguments: tuple[Word, ...] = ()
    coefficients: tuple[PairCoefficient, ...] = Field(min_length=1)

    _style = field_validator("style")(check_style)
    _words = field_validator("arguments")(check_words)


class PotentialFix(BaseModel):
    """A fix that a potential cannot do without, on all atoms, such as ``qeq/reaxff``.

    Parameters
    ----------
    style
        LAMMPS fix style.
    arguments
        Numbers, keywords and file names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    style: str
    arguments: tuple[Word, ...] = ()

    _style = field_validator("style")(check_style)
    _words = field_validator("arguments")(check_words)


@lru_cache(maxsize=256)
def check_element(symbol: str) -> str:
    """Return the symbol of an element of the periodic table, unchanged.

    Raises
    ------
    InputError
        If it is none. Atom types are named by elements only: a label such as
        ``Si # Xx`` would be cut at the ``#`` by LAMMPS without a word.
    """
    from pymatgen.core import Element

    # pymatgen takes D and T too, as hydrogen: with the wrong mass in half its tables.
    if not Element.is_valid_symbol(symbol) or symbol in _ISOTOPES:
        raise InputError(
            f"{symbol!r} is not an element of the periodic table",
            advice="name atoms by symbols such as 'Si', without labels or isotopes",
        )
    return symbol


def atomic_mass(symbol: str) -> float:
    """Return the standard atomic mass of an element in u."""
    from pymatgen.core import Element

    return float(Element(check_element(symbol)).atomic_mass)


def coefficient_commands(
    coefficient: PairCoefficient, prefix: Sequence[str], elements: Sequence[str]
) -> list[str]:
    """Return the ``pair_coeff`` command of a coefficient; none if a type is missing.

    Parameters
    ----------
    coefficient
        What to write.
    prefix
        Words before it: the style, and its number, under ``hybrid/overlay``.
    elements
        The element of each atom type.
    """
    words = [*prefix, *map(word_text, coefficient.words)]
    if coefficient.labels:
        words += [coefficient.labels.get(element, ABSENT) for element in elements]
    if coefficient.between is None:
        return [" ".join(["pair_coeff * *", *words])]
    if not set(coefficient.between) <= set(elements):
        return []
    # LAMMPS wants the lower type first.
    i, j = sorted(elements.index(element) + 1 for element in coefficient.between)
    return [" ".join([f"pair_coeff {i} {j}", *words])]


def word_text(word: Word) -> str:
    """Return a word as it stands in a command."""
    return word if isinstance(word, str) else repr(word)
