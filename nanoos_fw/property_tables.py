"""Tables of properties from elsewhere: CSV or JSON lines, checked row by row.

A row names a structure (its key or label, or a file that holds it), a value and,
unless it is said for the whole table, a unit.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoos_fw.errors import InputError
from nanoos_fw.units import (
    EV_IN_JOULE,
    EV_PER_A3_IN_BAR,
    KCAL_PER_MOL_IN_EV,
    unit_of,
)

_STRUCTURE_COLUMNS = ("structure_id", "structure", "key", "id", "label")
_FILE_COLUMNS = ("file", "path")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
_KNOWN_COLUMNS = 20

# What one of each unit is in the first of its family (CODATA 2018).
_HARTREE_EV = 27.211386245988
_BOHR_A = 0.529177210903
_FAMILIES: tuple[dict[str, float], ...] = (
    {
        "eV": 1.0,
        "meV": 1e-3,
        "Ha": _HARTREE_EV,
        "Ry": _HARTREE_EV / 2,
        "J": 1 / EV_IN_JOULE,
        "kJ/mol": KCAL_PER_MOL_IN_EV / 4.184,
        "kcal/mol": KCAL_PER_MOL_IN_EV,
    },
    {"Å": 1.0, "A": 1.0, "nm": 10.0, "pm": 0.01, "bohr": _BOHR_A},
    {
        "Å³": 1.0,
        "A^3": 1.0,
        "Å^3": 1.0,
        "nm³": 1e3,
        "nm^3": 1e3,
        "bohr^3": _BOHR_A**3,
    },
    {
        "bar": 1.0,
        "kbar": 1e3,
        "Pa": 1e-5,
        "MPa": 10.0,
        "GPa": 1e4,
        "eV/Å³": EV_PER_A3_IN_BAR,
    },
    {"g/cm³": 1.0, "g/cm^3": 1.0, "kg/m³": 1e-3, "kg/m^3": 1e-3},
    {"eV/Å": 1.0, "eV/A": 1.0, "Ha/bohr": _HARTREE_EV / _BOHR_A},
    {"fs": 1.0, "ps": 1e3, "ns": 1e6},
    {"K": 1.0},
    {"u": 1.0},
)
_ATOM = "/atom"


@dataclass(frozen=True)
class TableColumns:
    """Which columns of a table hold what; None is found by common names.

    Parameters
    ----------
    structure
        Key or label of a stored structure (``structure_id``, ``structure``, ``key``,
        ``id``, ``label``).
    file
        File of the structure, relative to the table (``file``, ``path``).
    value
        The number (the name of the property, ``value``).
    unit
        Unit of the row (``unit``).
    """

    structure: str | None = None
    file: str | None = None
    value: str | None = None
    unit: str | None = None


@dataclass(frozen=True)
class PropertyRow:
    """A row that can be used.

    Parameters
    ----------
    line
        In the file, from 1.
    structure, file
        One of them is None.
    value
        In the unit in which the property is stored.
    unit
        That unit.
    """

    line: int
    structure: str | None
    file: str | None
    value: float
    unit: str


@dataclass(frozen=True)
class RowFailure:
    """A row that cannot be used, and why."""

    line: int
    error: InputError


def stored_unit(name: str, unit: str | None) -> str | None:
    """Return the unit in which a property is stored, or None if its rows decide.

    Parameters
    ----------
    name
        Of the property.
    unit
        That of the table, or None if its rows tell theirs.

    Raises
    ------
    InputError
        If the name cannot be that of a property.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be the name of a property",
            advice="letters, digits and underscores, beginning with a letter",
        )
    return unit_of(name) or unit


def conversion(given: str, wanted: str) -> float:
    """Return by what a number in one unit is multiplied to be in another.

    Raises
    ------
    InputError
        If the units do not measure the same.
    """
    if given == wanted:
        return 1.0
    per_atom = given.endswith(_ATOM), wanted.endswith(_ATOM)
    if per_atom[0] == per_atom[1]:
        plain = given.removesuffix(_ATOM), wanted.removesuffix(_ATOM)
        for family in _FAMILIES:
            if plain[0] in family and plain[1] in family:
                return family[plain[0]] / family[plain[1]]
    raise InputError(
        f"{given!r} cannot be converted to {wanted!r}",
        evidence={"given": given, "wanted": wanted},
        advice=f"give the values in {wanted}",
    )


def read_property_table(
    path: Path,
    name: str,
    *,
    unit: str | None = None,
    columns: TableColumns | None = None,
) -> Iterator[PropertyRow | RowFailure]:
    """Yield the rows of a table, and why some cannot be used, one by one.

    Parameters
    ----------
    path
        ``.csv`` with a line of names, or ``.jsonl`` with an object in each line.
    name
        Of the property.
    unit
        Of all values; None if the rows tell theirs. The unit of a property that is
        not one of this program's is then that of the first row, and rows in other
        units are converted to it.
    columns
        Where to find what.

    Raises
    ------
    InputError
        If the file cannot be read, or lacks a column.
    """
    wanted = stored_unit(name, unit)
    found: TableColumns | None = None
    factors: dict[str, float] = {}
    for line, content in _rows(path):
        if isinstance(content, InputError):
            yield RowFailure(line, content)
            continue
        if found is None:
            found = _columns(path, list(content), name, unit, columns or TableColumns())
            if wanted is None and found.unit is None:
                raise InputError(
                    f"the unit of {name!r} is not known",
                    advice="give it, as in --unit eV; --unit 1 for a pure number; or "
                    "a column of units",
                )
        try:
            wanted = wanted or _unit(content, found, unit)
            yield _read(line, content, found, unit, wanted, factors)
        except InputError as error:
            yield RowFailure(line, error)
    if found is None:
        raise InputError(f"{path} has no rows")


# ------------------------------------------------------------------------- private


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | InputError]]:
    if path.suffix not in (".csv", ".jsonl"):
        raise InputError(
            f"{path.name!r} is no table",
            advice="let the name end in .csv or .jsonl",
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                names = reader.fieldnames or ()
                twice = sorted({n for n in names if n and names.count(n) > 1})
                if twice:  # a row would have the last of them, whichever was meant
                    raise InputError(
                        f"{path} has several columns {twice[0]!r}",
                        evidence={"columns": twice[:_KNOWN_COLUMNS]},
                        advice="leave one of each name",
                    )
                for row in reader:
                    if None in row or None in row.values():
                        n = len(names)
                        yield (
                            reader.line_num,
                            InputError(f"the row does not have {n} fields"),
                        )
                    else:
                        yield reader.line_num, row
                return
            for number, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except ValueError as error:
                    yield number, InputError(f"the line is not JSON: {error}")
                    continue
                if isinstance(row, dict):
                    yield number, row
                else:
                    yield number, InputError("the line is no JSON object")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _read(
    line: int,
    content: Mapping[str, Any],
    columns: TableColumns,
    unit: str | None,
    wanted: str,
    factors: dict[str, float],
) -> PropertyRow:
    own = _unit(content, columns, unit)
    if own not in factors:
        factors[own] = conversion(own, wanted)
    value = _number(content.get(columns.value or ""), columns.value) * factors[own]
    if not math.isfinite(value):
        raise InputError(f"{columns.value} in {own} is too large to be in {wanted}")
    structure = _text(content, columns.structure)
    file = None if structure else _text(content, columns.file)
    if not structure and not file:
        raise InputError("the row names no structure")
    return PropertyRow(line, structure, file, value, wanted)


def _unit(content: Mapping[str, Any], columns: TableColumns, unit: str | None) -> str:
    own = _text(content, columns.unit) or unit
    if not own:
        raise InputError("the row has no unit")
    return own


def _columns(
    path: Path, names: list[str], prop: str, unit: str | None, asked: TableColumns
) -> TableColumns:
    def find(column: str | None, usual: Sequence[str]) -> str | None:
        if column is None:
            return next((name for name in usual if name in names), None)
        if column not in names:
            raise _no_column(path, f"column {column!r}", names)
        return column

    found = TableColumns(
        structure=find(asked.structure, () if asked.file else _STRUCTURE_COLUMNS),
        file=find(asked.file, () if asked.structure else _FILE_COLUMNS),
        value=find(asked.value, (prop, "value")),
        unit=find(asked.unit, ("unit",)),
    )
    if found.structure is None and found.file is None:
        raise _no_column(path, "column that names structures", names)
    if found.value is None:
        raise _no_column(path, f"column {prop!r} or 'value'", names)
    if found.unit is None and unit is None and unit_of(prop):
        raise _no_column(path, "column 'unit', and no unit is given", names)
    return found


def _no_column(path: Path, what: str, names: list[str]) -> InputError:
    return InputError(
        f"{path} has no {what}",
        evidence={"columns": names[:_KNOWN_COLUMNS]},
        advice=f"columns: {', '.join(map(str, names[:_KNOWN_COLUMNS]))}",
    )


def _number(value: Any, column: str | None) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise InputError(f"{column} is {value!r}, which is no number") from None
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{column} is {value!r}, which is no finite number")
    return number


def _text(row: Mapping[str, Any], column: str | None) -> str | None:
    if column is None or row.get(column) is None:
        return None
    return str(row[column]).strip() or None
