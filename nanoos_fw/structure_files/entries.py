"""What reading structures gives: entries and failures."""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from nanoos_fw.errors import InputError, NanoOSError

if TYPE_CHECKING:
    from pymatgen.core import Structure

_MESSAGE_CHARS = 300


class Source(NamedTuple):
    """Where an entry is: a file, and the position of the entry in it, from 0."""

    path: str
    index: int  # type: ignore[assignment]  # the name hides tuple.index

    def __str__(self) -> str:
        return f"{self.path}#{self.index}"


@dataclass(frozen=True)
class StructureEntry:
    """A crystal that passed `nanoos_fw.crystals.check_structure`.

    Parameters
    ----------
    structure
        The crystal, in the cell the file gives.
    label
        What to call it: its identifier in the file if it has one, else the file name
        without suffix, with ``#index`` if the file holds several.
    source
        File and position.
    properties
        Finite numbers that came with it, under the names of the file. Energies are in
        eV and belong to the whole cell unless the name says otherwise.
    notes
        What the reader corrected or found strange, without refusing the entry.
    """

    structure: Structure
    label: str
    source: Source
    properties: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EntryFailure:
    """An entry, file or folder that gave no crystal, and why."""

    label: str
    source: Source
    error: NanoOSError


@dataclass(frozen=True)
class Parsed:
    """The outcome of parsing one entry, before it is checked."""

    structure: Structure
    properties: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Item:
    """One entry of a file, cut out but not parsed.

    ``parse`` may raise anything: the reader turns it into a failure of this entry.
    """

    parse: Callable[[], Parsed]
    label: str | None = None


def failing(error: NanoOSError, label: str | None = None) -> Item:
    """Return an item that fails with the given error."""

    def parse() -> Parsed:
        raise error

    return Item(parse, label)


def as_error(error: Exception, path: str) -> NanoOSError:
    """Return the project's error for whatever went wrong with a file."""
    if isinstance(error, NanoOSError):
        return error
    # BadGzipFile is an OSError, so damage is looked for first.
    damaged = (EOFError, lzma.LZMAError, zlib.error)
    if isinstance(error, damaged) or (
        isinstance(error, OSError) and error.errno is None
    ):
        return InputError(
            f"{path} is damaged or cut short: {_short(error)}",
            advice="copy or download it again",
        )
    if isinstance(error, OSError):
        missing = isinstance(error, FileNotFoundError)
        why = "does not exist" if missing else f"cannot be read: {error.strerror}"
        return InputError(f"{path} {why}")
    if isinstance(error, UnicodeDecodeError):
        return InputError(
            f"{path} is not UTF-8 text (byte {error.object[error.start]:#04x})",
            advice="convert it, for example with 'iconv -f latin1 -t utf-8'",
        )
    if isinstance(error, ValueError):  # parsers say with it what is wrong
        return InputError(
            f"cannot make a crystal of this entry of {path}: {_short(error)}"
        )
    return InputError(
        f"this entry of {path} is damaged or not of its format",
        evidence={"parser": f"{type(error).__name__}: {_short(error)}"},
        advice="open it in an editor or a structure viewer",
    )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _MESSAGE_CHARS else text[:_MESSAGE_CHARS] + "..."


def numbers_of(values: Mapping[str, Any], notes: list[str]) -> dict[str, float]:
    """Return the finite numbers among values; note those that are not finite."""
    numbers = {}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isfinite(value):
            numbers[name] = float(value)
        else:
            notes.append(f"property {name} is {value} and was left out")
    return numbers
