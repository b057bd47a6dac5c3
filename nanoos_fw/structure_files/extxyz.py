"""Extended XYZ, frame by frame.

The second line of a frame holds ``key=value`` pairs. ``Lattice`` gives three vectors,
``Properties`` the columns as name:type:width, ``pbc`` the periodic directions.

References
----------
The specification at https://github.com/libAtoms/extxyz.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.structure_files.entries import Item, Parsed, failing, numbers_of

_COUNT = re.compile(r"\s*\d{1,9}\s*")
_PAIR = re.compile(
    r"""(?P<key>[^\s=]+)\s*=\s*
    (?:"(?P<double>(?:\\.|[^"\\])*)"
      |'(?P<single>(?:\\.|[^'\\])*)'
      |\{(?P<brace>[^}]*)\}
      |\[(?P<bracket>[^\]]*)\]
      |(?P<bare>\S+))""",
    re.VERBOSE,
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eEdD][+-]?\d+)?|[+-]?(nan|inf)", re.I)
_COLUMNS = re.compile(r"[^:]+:[SRIL]:[1-9]\d{0,3}(:[^:]+:[SRIL]:[1-9]\d{0,3})*")
_TRUE, _FALSE = {"t", "true", "1"}, {"f", "false", "0"}
_RESERVED = {"lattice", "properties", "pbc"}
_PLAIN_XYZ = "species:S:1:pos:R:3"
_SPECIES = ("species", "symbols", "element")
_NUMBERS = ("Z", "numbers", "atomic_numbers")
_POSITIONS = ("pos", "positions")
_CHARGES = ("charge", "charges", "initial_charges")
_LABELS = ("label", "name", "material_id")


class _Lines:
    """Lines with their numbers, that can be put back."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._returned: list[str] = []
        self.number = 0

    def next(self) -> str | None:
        line = self._returned.pop() if self._returned else self._stream.readline()
        if not line:
            return None
        self.number += 1
        return line

    def put_back(self, line: str) -> None:
        self._returned.append(line)
        self.number -= 1

    def skip_to_frame(self) -> None:
        """Go to the next line that is a count with ``key=value`` pairs below."""
        while (line := self.next()) is not None:
            if not _COUNT.fullmatch(line):
                continue
            comment = self.next()
            if comment is None:
                return
            self.put_back(comment)
            if "=" in comment:
                self.put_back(line)
                return


def xyz_items(stream: TextIO, path: str) -> Iterator[Item]:
    """Yield the frames of an extended XYZ file.

    After a broken frame reading goes on at the next line that looks like the start
    of one.
    """
    lines = _Lines(stream)
    while (header := lines.next()) is not None:
        if not header.strip():
            continue
        start = lines.number
        if not _COUNT.fullmatch(header):
            lines.skip_to_frame()
            yield failing(
                InputError(
                    f"line {start} of {path} should be a number of atoms: "
                    f"{header.strip()[:60]!r}",
                    evidence={"line": start, "lines_skipped": lines.number - start + 1},
                )
            )
            continue
        n_atoms = int(header)
        comment = lines.next() or ""
        rows: list[str] = []
        while len(rows) < n_atoms and (line := lines.next()) is not None:
            if _COUNT.fullmatch(line):  # the next frame: an atom has more columns
                lines.put_back(line)
                break
            rows.append(line)
        info = parse_comment(comment)
        label = next((info[key] for key in _LABELS if key in info), None)
        yield Item(functools.partial(_parse, n_atoms, info, rows, start), label)


def parse_comment(comment: str) -> dict[str, str]:
    """Return the ``key=value`` pairs of a comment line; values without quotes."""
    info = {}
    for match in _PAIR.finditer(comment):
        kind = match.lastgroup or "bare"
        value = match[kind]
        if kind in {"double", "single"}:
            value = re.sub(r"\\(.)", r"\1", value)
        elif kind == "bracket":
            value = value.replace(",", " ")
        info[match["key"].strip("\"'")] = value
    return info


def _parse(n_atoms: int, info: dict[str, str], rows: list[str], start: int) -> Parsed:
    from pymatgen.core import Lattice, Structure

    if len(rows) < n_atoms:
        raise InputError(
            f"the frame at line {start} announces {n_atoms} atoms and has {len(rows)}",
            advice="the file was cut short, or the number is wrong",
        )
    lower = {key.lower(): value for key, value in info.items()}
    matrix = _lattice(lower, start)
    table = [row.split() for row in rows]
    columns = _columns(lower.get("properties") or _PLAIN_XYZ)
    width = max(stop for _, stop in columns.values())
    for offset, cells in enumerate(table):
        if len(cells) < width:
            raise InputError(
                f"line {start + 2 + offset} has {len(cells)} columns, fewer than the "
                f"{width} of Properties"
            )
    positions = _numeric(table, columns, _POSITIONS, 3, start)
    if positions is None:
        raise InputError(f"the frame at line {start} has no column pos:R:3")
    charges = _numeric(table, columns, _CHARGES, 1, start)
    structure = Structure(
        Lattice(matrix, pbc=_pbc(lower, start)),
        _species(table, columns, start),
        positions,
        coords_are_cartesian=True,
        site_properties=None if charges is None else {"charge": charges[:, 0].tolist()},
    )
    notes: list[str] = []
    return Parsed(structure, _properties(info, start, notes), notes)


def _lattice(lower: dict[str, str], start: int) -> NDArray[np.float64]:
    text = lower.get("lattice")
    if text is None:
        raise InputError(
            f"the frame at line {start} has no Lattice, so it is no crystal",
            advice='add Lattice="ax ay az bx by bz cx cy cz" to its comment line',
        )
    values = text.split()
    if len(values) != 9:
        raise InputError(
            f"Lattice of the frame at line {start} has {len(values)} numbers "
            "instead of 9",
            evidence={"lattice": text[:200]},
        )
    try:
        matrix = np.array(values, dtype=np.float64).reshape(3, 3)
    except ValueError as error:
        raise InputError(
            f"Lattice of the frame at line {start}: {error}",
            evidence={"lattice": text[:200]},
        ) from error
    if not np.linalg.det(matrix):
        raise InputError(f"Lattice of the frame at line {start} has no volume")
    return matrix


def _pbc(lower: dict[str, str], start: int) -> tuple[bool, bool, bool]:
    """Return the periodic directions; a cell without ``pbc`` is periodic in all."""
    words = lower.get("pbc", "T T T").lower().split()
    if len(words) != 3 or not set(words) <= _TRUE | _FALSE:
        raise InputError(
            f"pbc of the frame at line {start} is {lower['pbc']!r}, not like 'T T T'"
        )
    return words[0] in _TRUE, words[1] in _TRUE, words[2] in _TRUE


def _columns(properties: str) -> dict[str, tuple[int, int]]:
    """Return the columns of each property as (first, stop)."""
    if not _COLUMNS.fullmatch(properties):
        raise InputError(
            f"Properties is not a list of name:type:width: {properties[:200]!r}"
        )
    parts = properties.split(":")
    columns, first = {}, 0
    for name, width in zip(parts[::3], map(int, parts[2::3]), strict=True):
        columns[name] = (first, first + width)
        first += width
    return columns


def _find(
    columns: dict[str, tuple[int, int]], names: Sequence[str], width: int
) -> tuple[int, int] | None:
    for name in names:
        if name in columns and columns[name][1] - columns[name][0] == width:
            return columns[name]
    return None


def _numeric(
    table: list[list[str]],
    columns: dict[str, tuple[int, int]],
    names: Sequence[str],
    width: int,
    start: int,
) -> NDArray[np.float64] | None:
    found = _find(columns, names, width)
    if found is None:
        return None
    first, stop = found
    try:
        values = np.array([row[first:stop] for row in table], dtype=np.float64)
    except ValueError as error:
        raise InputError(f"{names[0]} of the frame at line {start}: {error}") from error
    return values.reshape(len(table), width)


def _species(
    table: list[list[str]], columns: dict[str, tuple[int, int]], start: int
) -> list[Any]:
    from pymatgen.core import Element

    symbols, numbers = _find(columns, _SPECIES, 1), _find(columns, _NUMBERS, 1)
    column = symbols or numbers
    if column is None:
        raise InputError(f"the frame at line {start} has no column species:S:1")
    words = [row[column[0]] for row in table]
    known: dict[str, Any] = {}
    for word in set(words):
        try:
            known[word] = (
                Element.from_Z(int(word)) if word.isdecimal() else Element(word)
            )
        except ValueError:
            line = start + 2 + words.index(word)
            raise InputError(
                f"line {line} holds an atom of no known element: {word!r}"
            ) from None
    return [known[word] for word in words]


def _properties(info: dict[str, str], start: int, notes: list[str]) -> dict[str, float]:
    values = {
        key: float(value.replace("d", "e").replace("D", "e"))
        for key, value in info.items()
        if key.lower() not in _RESERVED and _NUMBER.fullmatch(value)
    }
    lower = {key.lower(): value for key, value in info.items()}
    unit = lower.get("energy_unit", lower.get("energy_units", "eV"))
    if unit.lower() != "ev" and any("energy" in key.lower() for key in values):
        raise InputError(
            f"energies of the frame at line {start} are in {unit}, not in eV",
            advice="convert them",
        )
    return numbers_of(values, notes)
