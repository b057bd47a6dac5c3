"""Files and folders: which reader, in which order, and what becomes of failures."""

from __future__ import annotations

import bz2
import csv
import gzip
import itertools
import lzma
import math
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO, cast

from nanoos_fw.crystals import DEFAULT_MIN_DISTANCE, check_structure
from nanoos_fw.errors import InputError
from nanoos_fw.structure_files.cif import cif_items
from nanoos_fw.structure_files.entries import (
    EntryFailure,
    Item,
    Source,
    StructureEntry,
    as_error,
)
from nanoos_fw.structure_files.extxyz import xyz_items
from nanoos_fw.structure_files.pymatgen_json import json_items, json_line_items
from nanoos_fw.structure_files.vasp import poscar_items

Entry = StructureEntry | EntryFailure
Reader = Callable[[TextIO, str], Iterator[Item]]

_COMPRESSED = {".gz", ".xz", ".bz2"}
_READERS: dict[str, Reader] = {
    ".cif": cif_items,
    ".vasp": poscar_items,
    ".poscar": poscar_items,
    ".contcar": poscar_items,
    ".xyz": xyz_items,
    ".extxyz": xyz_items,
    ".json": json_items,
    ".jsonl": json_line_items,
    ".ndjson": json_line_items,
}
_POSCAR = re.compile(r"(POSCAR|CONTCAR)([._-].*)?")
_ID_PROP, _ATOM_INIT = "id_prop.csv", "atom_init.json"


def read_structures(
    path: Path | str,
    *,
    id_prop_target: str = "target",
    min_distance: float = DEFAULT_MIN_DISTANCE,
) -> Iterator[Entry]:
    """Yield every crystal of a file or folder, and every failure, one by one.

    Parameters
    ----------
    path
        CIF with one or more blocks (``.cif``); ``POSCAR``, ``CONTCAR``, ``.vasp``;
        extended XYZ (``.xyz``, ``.extxyz``) with a lattice; pymatgen JSON (``.json``,
        ``.jsonl``, ``.ndjson``); each also with ``.gz``, ``.xz`` or ``.bz2``. A folder
        is read with its subfolders in the order of their names, hidden ones left out.
        A folder with ``id_prop.csv`` follows the CGCNN convention: rows ``id,number``
        beside files ``id.cif``.
    id_prop_target
        Name of the property that ``id_prop.csv`` gives.
    min_distance
        Å, for `nanoos_fw.crystals.check_structure`.

    Yields
    ------
    StructureEntry or EntryFailure
        Nothing is raised for bad input: a path that does not exist, a damaged file, an
        unknown suffix and a bad entry are failures, after which reading goes on.

    Raises
    ------
    InputError
        If `min_distance` is not a length.

    Notes
    -----
    Per-atom columns of extended XYZ other than species, positions and charges, such as
    forces, are not kept.
    """
    if not (math.isfinite(min_distance) and min_distance >= 0):
        raise InputError(f"min_distance must be a number of Å >= 0, not {min_distance}")
    return _read(Path(path), id_prop_target, min_distance, set())


def _read(
    path: Path, target: str, min_distance: float, visited: set[tuple[int, int]]
) -> Iterator[Entry]:
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            yield from _read_file(path, min_distance)
            return
        if not stat.S_ISDIR(status.st_mode):  # opening a pipe would wait for ever
            yield _failure(path, 0, InputError(f"{path} is neither file nor folder"))
            return
        identity = (status.st_dev, status.st_ino)
        if identity in visited:  # a link back to a folder already read
            return
        visited.add(identity)
        names = sorted(
            child.name for child in path.iterdir() if not child.name.startswith(".")
        )
    except OSError as error:
        yield _failure(path, 0, error)
        return
    if _ID_PROP in names:
        yield from _read_id_prop(path, target, min_distance, names)
        names = [name for name in names if (path / name).is_dir()]
    for name in names:
        yield from _read(path / name, target, min_distance, visited)


def _read_file(path: Path, min_distance: float) -> Iterator[Entry]:
    """Yield the entries of one file."""
    index = 0
    waiting: Item | None = None  # kept back to know whether it is the only one
    failed: Exception | None = None
    try:
        with _open(path) as stream:
            for item in _reader(path)(stream, str(path)):
                if waiting is not None:
                    yield _entry(waiting, path, index, several=True, limit=min_distance)
                    index += 1
                waiting = item
    # The edge of a batch: whatever this file does, the next one is read.
    except Exception as error:  # becomes a failure below
        failed = error
    if waiting is not None:
        several = index > 0 or failed is not None
        yield _entry(waiting, path, index, several=several, limit=min_distance)
        index += 1
    if failed is not None:
        yield _failure(path, index, failed)
    elif index == 0:
        yield _failure(path, 0, InputError(f"{path} is empty"))


def _entry(item: Item, path: Path, index: int, *, several: bool, limit: float) -> Entry:
    """Parse and check one item."""
    default = f"{_stem(path)}#{index}" if several else _stem(path)
    label, source = item.label or default, Source(str(path), index)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            parsed = item.parse()
            check_structure(parsed.structure, min_distance=limit)
        except Exception as error:  # the edge of a batch: this entry fails
            return EntryFailure(label, source, as_error(error, str(path)))
    about_code = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
    messages = [
        str(warning.message)
        for warning in caught
        if not issubclass(warning.category, about_code)
    ]
    notes = dict.fromkeys(" ".join(n.split()) for n in (*parsed.notes, *messages))
    return StructureEntry(
        structure=parsed.structure,
        label=label,
        source=source,
        properties=parsed.properties,
        notes=tuple(notes),
    )


def _failure(path: Path, index: int, error: Exception) -> EntryFailure:
    label = f"{_stem(path)}#{index}" if index else _stem(path)
    return EntryFailure(label, Source(str(path), index), as_error(error, str(path)))


# ------------------------------------------------------------------------- folders


def _read_id_prop(
    folder: Path, target: str, min_distance: float, names: list[str]
) -> Iterator[Entry]:
    """Yield the rows of ``id_prop.csv``, then the files that it does not list."""
    table = folder / _ID_PROP
    files = {_stem(folder / n): n for n in names if _suffix(n) == ".cif"}
    seen: set[str] = set()
    index = 0
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            for row in csv.reader(stream):
                if not any(cell.strip() for cell in row):
                    continue
                identifier = row[0].strip()
                repeated = identifier in seen
                seen.add(identifier)
                try:
                    value = _id_prop_value(row, index, repeated=repeated)
                    file = _listed_file(folder, identifier, files, index)
                except InputError as error:
                    yield EntryFailure(identifier, Source(str(table), index), error)
                else:
                    yield from _only_entry(
                        file, identifier, {target: value}, min_distance
                    )
                index += 1
    except Exception as error:  # the edge of a batch: a damaged table
        yield _failure(table, index, error)
    if index == 0:
        yield _failure(table, 0, InputError(f"{table} has no rows"))
    listed = {files[identifier] for identifier in seen & files.keys()}
    for name in names:
        path = folder / name
        if name in listed or name in {_ID_PROP, _ATOM_INIT} or path.is_dir():
            continue
        yield _failure(path, 0, InputError(f"{path} is not listed in {_ID_PROP}"))


def _id_prop_value(row: list[str], index: int, *, repeated: bool) -> float:
    identifier = row[0].strip()
    if len(row) != 2:
        raise InputError(
            f"row {index} of {_ID_PROP} has {len(row)} columns instead of id,number",
            evidence={"row": row[:5]},
        )
    if repeated:
        raise InputError(f"row {index} of {_ID_PROP} repeats the id {identifier}")
    try:
        value = float(row[1])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(
            f"row {index} of {_ID_PROP} has no finite number for {identifier}: "
            f"{row[1]!r}"
        )
    return value


def _listed_file(
    folder: Path, identifier: str, files: dict[str, str], index: int
) -> Path:
    if identifier not in files:
        raise InputError(
            f"row {index} of {_ID_PROP} lists {identifier}, but there is no "
            f"{folder / identifier}.cif"
        )
    return folder / files[identifier]


def _only_entry(
    file: Path, identifier: str, properties: dict[str, float], min_distance: float
) -> Iterator[Entry]:
    """Yield the crystal of a listed file, which must hold no more than one."""
    entries = list(itertools.islice(_read_file(file, min_distance), 2))
    if len(entries) > 1:
        error = InputError(
            f"{file} holds several entries, but {_ID_PROP} gives one number",
            advice="write one crystal per file",
        )
        yield EntryFailure(identifier, Source(str(file), 0), error)
        return
    for entry in entries:
        if isinstance(entry, StructureEntry):
            entry.properties.update(properties)
        yield entry


# --------------------------------------------------------------------------- names


def _open(path: Path) -> TextIO:
    """Open a file as UTF-8 text, unpacking it by its suffix."""
    match path.suffix.lower():
        case ".gz":
            return cast("TextIO", gzip.open(path, "rt", encoding="utf-8-sig"))
        case ".xz":
            return lzma.open(path, "rt", encoding="utf-8-sig")
        case ".bz2":
            return bz2.open(path, "rt", encoding="utf-8-sig")
        case _:
            return path.open(encoding="utf-8-sig")


def _plain_name(name: str) -> str:
    suffix = Path(name).suffix
    return name[: -len(suffix)] if suffix.lower() in _COMPRESSED else name


def _suffix(name: str) -> str:
    return Path(_plain_name(name)).suffix.lower()


def _reader(path: Path) -> Reader:
    reader = _READERS.get(_suffix(path.name))
    if reader is None and _POSCAR.fullmatch(_plain_name(path.name)):
        reader = poscar_items
    if reader is None:
        raise InputError(
            f"{path} has no suffix of a structure file",
            advice=f"known are POSCAR, CONTCAR and {' '.join(_READERS)}, "
            "also with .gz, .xz or .bz2",
        )
    return reader


def _stem(path: Path) -> str:
    """Return the name of a file without suffixes; of a bare POSCAR, its folder's."""
    name = _plain_name(path.name)
    if name in {"POSCAR", "CONTCAR"}:
        return path.resolve().parent.name or name
    return name[: -len(_suffix(name))] if _suffix(name) in _READERS else name
