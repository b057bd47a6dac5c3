"""Import of properties of stored structures from tables."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from nanoos_fw.errors import InputError, NanoOSError
from nanoos_fw.property_tables import (
    PropertyRow,
    RowFailure,
    TableColumns,
    read_property_table,
    stored_unit,
)
from nanoos_fw.provenance import sha256_file
from nanoos_fw.stores.structures import NewStructure, StructureStore


@dataclass
class TableReport:
    """What became of every row of a table of properties.

    Parameters
    ----------
    unit
        In which the values are stored; empty if no row tells the unit of a property
        that is not known.
    written, unchanged
        Structures that have the value now, and that had it before.
    added
        Structures that came from files of the table.
    failures
        Line -> why the row was not used.
    """

    unit: str
    written: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    added: int = 0
    failures: dict[int, NanoOSError] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of rows."""
        return len(self.written) + len(self.unchanged) + len(self.failures)


def import_property_table(
    store: StructureStore,
    path: Path,
    name: str,
    *,
    unit: str | None = None,
    columns: TableColumns | None = None,
    source: str = "",
    in_set: str = "imported",
    replace: bool = False,
) -> TableReport:
    """Give stored structures a property from a table, row by row.

    Parameters
    ----------
    path, name, unit, columns
        As in :func:`nanoos_fw.property_tables.read_property_table`.
    source
        Where the values are from: a paper, a database and its version. The SHA-256 of
        the table is recorded with it.
    in_set
        Set of structures that are read from files the table names.
    replace
        Write over values that differ.

    Raises
    ------
    InputError
        If the table cannot be read, or lacks a column. What is wrong with a row is in
        the report.
    """
    report = TableReport(unit=stored_unit(name, unit) or "")
    rows: list[PropertyRow] = []
    for row in read_property_table(path, name, unit=unit, columns=columns):
        if isinstance(row, RowFailure):
            report.failures[row.line] = row.error
        else:
            rows.append(row)
            report.unit = row.unit
    names = list(dict.fromkeys(row.structure for row in rows if row.structure))
    keys_of = store.resolve(names)
    values: dict[str, float] = {}
    line_of: dict[str, int] = {}
    for row in rows:
        try:
            if row.structure is not None:
                key = _only(row.structure, keys_of[row.structure])
            else:
                key = _from_file(store, path.parent / str(row.file), in_set, report)
            if key in values:
                raise _twice(key, line_of[key], values[key], row.value)
        except InputError as error:
            report.failures[row.line] = error
            continue
        values[key], line_of[key] = row.value, row.line
    origin = f"{source or path.name} (sha256 {sha256_file(path)})"
    result = store.set_property(
        name, values, unit=report.unit, source=origin, replace=replace
    )
    report.written, report.unchanged = result.written, result.unchanged
    for key, (before, value) in result.conflicts.items():
        report.failures[line_of[key]] = InputError(
            f"structure {key} has {name} = {before!r} already, not {value!r}",
            evidence={"structure": key},
            advice="leave the row out, or replace values that differ",
        )
    return report


def _twice(key: str, line: int, before: float, value: float) -> InputError:
    words = "" if before == value else f" and says {before!r}, not {value!r}"
    return InputError(
        f"line {line} is about the same structure{words}", evidence={"structure": key}
    )


def _only(name: str, keys: list[str]) -> str:
    if len(keys) != 1:
        raise InputError(
            f"{name!r} is the key or label of {len(keys)} structures",
            evidence={"structures": keys[:10]},
            advice="give the key" if keys else "import the structure first",
        )
    return keys[0]


def _from_file(
    store: StructureStore, path: Path, in_set: str, report: TableReport
) -> str:
    from nanoos_fw.structure_files import EntryFailure, read_structures

    entries = list(itertools.islice(read_structures(path), 2))
    if len(entries) != 1:
        words = "several structures" if entries else "no structure"
        raise InputError(
            f"{path} holds {words}, not one",
            advice="name a file of one structure",
        )
    (entry,) = entries
    if isinstance(entry, EntryFailure):
        raise InputError(f"{path}: {entry.error}")
    new = NewStructure(
        structure=entry.structure,
        label=entry.label,
        properties=entry.properties,
        source=str(entry.source),
    )
    result = store.add([new], in_set=in_set)
    report.added += sum(result.added)
    return result.keys[0]
