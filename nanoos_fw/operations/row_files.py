"""Tables of results as files that say where they are from, and come back as they were.

CSV, JSON lines, Parquet and extended XYZ hold the same rows. Each file begins with its
provenance, units of the columns included. Numbers are written with the fewest digits
that give the stored one back, float32 ones too, so that reading returns equal bits.
"""

from __future__ import annotations

import csv
import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.crystals import element_symbol
from nanoos_fw.errors import CorruptArtifactError, InputError, MissingDependencyError
from nanoos_fw.provenance import sync_directory, sync_file

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]
Kind = Literal["int", "bool", "text", "single", "double", "json"]
# Atomic numbers, lattice (Å, rows are vectors) and fractional coordinates of a row.
CrystalOf = Callable[
    [Row], tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64]]
]

# A simulation with its series is one field; Python's own limit is 128 KiB.
_MAX_FIELD = 2**31 - 1
FORMATS = (".csv", ".jsonl", ".parquet", ".extxyz")
_MARK = "# nanoos-rows "
_AT_ONCE = 4096
_PROVENANCE = b"nanoos-rows"
_BEFORE_FIELDS = 'pbc="T T T" '


def write_rows(
    path: Path,
    head: Mapping[str, Any],
    columns: Mapping[str, Kind],
    rows: Iterable[Row],
    crystal_of: CrystalOf | None = None,
) -> int:
    """Write rows to a file, which appears when it is whole, and return their number.

    Parameters
    ----------
    path
        ``.csv``, ``.jsonl``, ``.parquet`` (needs pyarrow) or ``.extxyz``.
    head
        Provenance, JSON values; ``units`` of the columns belong to it.
    columns
        Name and kind of each, in their order; every row has all of them, None where
        there is no value. ``json`` is any JSON value.
    rows
        Read once, one at a time.
    crystal_of
        Gives the crystal of a row; ``.extxyz`` needs it.

    Raises
    ------
    InputError
        If the ending is not known, or crystals are missing.
    """
    suffix = _suffix_of(path)
    if suffix == ".extxyz" and crystal_of is None:
        raise InputError(
            "these rows have no structures to be written",
            advice="let the name end in .csv, .jsonl or .parquet",
        )
    told = {**head, "columns": dict(columns)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    count = 0

    def counted() -> Iterator[Row]:
        nonlocal count
        for row in rows:
            count += 1
            yield row

    try:
        if suffix == ".parquet":
            with temporary.open("wb") as binary:
                _write_parquet(binary, told, columns, counted())
                sync_file(binary)
        else:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                if suffix == ".csv":
                    _write_csv(file, told, columns, counted())
                elif suffix == ".jsonl":
                    _write_lines(file, told, counted())
                elif crystal_of is not None:
                    _write_extxyz(file, told, counted(), crystal_of)
                sync_file(file)
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def read_rows(path: Path) -> tuple[dict[str, Any], Iterator[Row]]:
    """Return provenance and rows of a file of :func:`write_rows`.

    Raises
    ------
    InputError
        If there is no such file, or its ending is not known.
    CorruptArtifactError
        If it is none of these files.
    """
    suffix = _suffix_of(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if suffix == ".parquet":
        return _read_parquet(path)
    with path.open(newline="", encoding="utf-8") as file:
        first = file.readline()
        if suffix == ".extxyz":
            first = file.readline()
    if suffix == ".extxyz":
        text = first.partition("provenance='")[2].partition("'")[0]
        return _head(text, path), _checked(path, _read_extxyz(path))
    if suffix == ".csv":
        if not first.startswith(_MARK):
            raise _foreign(path)
        head = _head(first.removeprefix(_MARK), path)
        return head, _checked(path, _read_csv(path, head["columns"]))
    return _head(first, path), _checked(path, _read_lines(path))


def plain_single(value: np.float32) -> float:
    """Return the double with the fewest digits that rounds to a float32."""
    return float(str(value))


# ------------------------------------------------------------------------- private


def _write_csv(
    file: IO[str],
    head: Mapping[str, Any],
    columns: Mapping[str, Kind],
    rows: Iterable[Row],
) -> None:
    file.write(_MARK + json.dumps(head) + "\n")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(kind, row[name]) for name, kind in columns.items()])


def _cell(kind: Kind, value: Any) -> str:
    if value is None:
        return ""
    # An empty text is no missing one.
    if kind == "text" and value and not value.startswith('"'):
        return str(value)
    return json.dumps(value)


def _checked(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """Say of a row that cannot be read which it is."""
    number = 0
    try:
        for row in rows:
            number += 1
            yield row
    except (ValueError, KeyError, csv.Error) as error:
        raise CorruptArtifactError(
            f"{path} is damaged after {number} rows: {error}",
            advice="copy or export it again; rows that are there already are known",
        ) from error


def _read_csv(path: Path, columns: Mapping[str, Kind]) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        file.readline()
        csv.field_size_limit(_MAX_FIELD)
        reader = csv.reader(file)
        if next(reader, None) != list(columns):
            raise _foreign(path)
        for cells in reader:
            yield {
                name: _value(kind, cell)
                for (name, kind), cell in zip(columns.items(), cells, strict=True)
            }


def _value(kind: Kind, cell: str) -> Any:
    if not cell:
        return None
    return cell if kind == "text" and not cell.startswith('"') else json.loads(cell)


def _write_lines(file: IO[str], head: Mapping[str, Any], rows: Iterable[Row]) -> None:
    file.write(json.dumps(head) + "\n")
    for row in rows:
        file.write(json.dumps(row) + "\n")


def _read_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        file.readline()
        for line in file:
            yield json.loads(line)


def _write_extxyz(
    file: IO[str], head: Mapping[str, Any], rows: Iterable[Row], crystal_of: CrystalOf
) -> None:
    # In every frame would be a hundred times the size; the first one tells.
    quoted = json.dumps(head).replace("'", "\\u0027")
    said = f"provenance='{quoted}' "
    for row in rows:
        numbers, lattice, frac_coords = crystal_of(row)
        places = frac_coords @ lattice
        vectors = " ".join(repr(float(v)) for v in lattice.ravel())
        fields = " ".join(f"{k}={json.dumps(v)}" for k, v in row.items())
        file.write(f"{len(places)}\n")
        file.write(
            f'Lattice="{vectors}" Properties=species:S:1:pos:R:3 {_BEFORE_FIELDS}'
            f"{said}{fields}\n"
        )
        said = ""
        for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
            file.write(f"{element_symbol(number)} {place[0]!r} {place[1]!r} ")
            file.write(f"{place[2]!r}\n")


def _read_extxyz(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        while line := file.readline():
            comment = file.readline()
            for _ in range(int(line)):
                file.readline()
            start = comment.index(_BEFORE_FIELDS) + len(_BEFORE_FIELDS)
            if comment.startswith("provenance='", start):
                start = comment.index("'", start + len("provenance='")) + 1
            yield _fields(comment[start:].strip())


def _fields(text: str) -> Row:
    """Return ``name=JSON`` fields with blanks between; texts may hold blanks."""
    row: Row = {}
    decoder = json.JSONDecoder()
    at = 0
    while at < len(text):
        equals = text.index("=", at)
        value, end = decoder.raw_decode(text, equals + 1)
        row[text[at:equals].strip()] = value
        at = end
    return row


def _write_parquet(
    file: IO[bytes],
    head: Mapping[str, Any],
    columns: Mapping[str, Kind],
    rows: Iterable[Row],
) -> None:
    pa, pq = _pyarrow()
    metadata = {_PROVENANCE: json.dumps(head).encode()}
    types: dict[Kind, pyarrow.DataType] = {
        "int": pa.int64(), "bool": pa.bool_(), "text": pa.string(),
        "single": pa.float32(), "double": pa.float64(), "json": pa.string(),
    }  # fmt: skip
    schema = pa.schema([(n, types[k]) for n, k in columns.items()], metadata=metadata)
    texts = [name for name, kind in columns.items() if kind == "json"]
    with pq.ParquetWriter(file, schema) as writer:
        waiting: list[Row] = []
        for row in rows:
            packed = {name: json.dumps(row[name]) for name in texts}
            waiting.append({**row, **packed})
            if len(waiting) == _AT_ONCE:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, schema=schema))


def _read_parquet(path: Path) -> tuple[dict[str, Any], Iterator[Row]]:
    pa, pq = _pyarrow()
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise _foreign(path) from error
    text = (file.schema_arrow.metadata or {}).get(_PROVENANCE, b"").decode()
    head = _head(text, path)
    convert: dict[str, Callable[[Any], Any]] = {}
    for name, kind in head["columns"].items():
        if kind == "json":
            convert[name] = json.loads
        elif kind == "single":
            convert[name] = lambda value: plain_single(np.float32(value))

    def rows() -> Iterator[Row]:
        for batch in file.iter_batches(batch_size=_AT_ONCE):
            for row in batch.to_pylist():
                yield {
                    name: convert[name](value)
                    if name in convert and value is not None
                    else value
                    for name, value in row.items()
                }

    return head, rows()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet needs pyarrow", advice="pip install 'nanoos_fw[tables]'"
        ) from error
    return pyarrow, pyarrow.parquet


def _suffix_of(path: Path) -> str:
    if path.suffix not in FORMATS:
        raise InputError(
            f"{path.name} has none of the known endings", evidence={"known": FORMATS}
        )
    return path.suffix


def _head(text: str, path: Path) -> dict[str, Any]:
    try:
        head = json.loads(text)
    except ValueError as error:
        raise _foreign(path) from error
    if not isinstance(head, dict) or not {"units", "columns"} <= head.keys():
        raise _foreign(path)
    return head


def _foreign(path: Path) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{path} is no export of results",
        advice="see 'nanoos export' and 'nanoos screen export'",
    )
