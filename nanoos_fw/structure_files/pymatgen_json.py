"""JSON of pymatgen structures: one, a list, a mapping, or one per line.

A record is ``Structure.as_dict()``, or a mapping with such a ``structure`` beside its
properties, as ``ComputedStructureEntry.as_dict()`` and downloads of the Materials
Project are. Only structures are built: classes named in ``@class`` are not imported.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from nanoos_fw.errors import InputError
from nanoos_fw.structure_files.entries import Item, Parsed, failing, numbers_of

_CHUNK = 1 << 20
_MAX_RECORD = 1 << 28
_LABELS = ("material_id", "entry_id", "task_id", "label", "name", "id", "_id")


def json_items(stream: TextIO, path: str) -> Iterator[Item]:
    """Yield the records of a JSON file; a list is read record by record."""
    first = stream.read(1)
    while first.isspace():
        first = stream.read(1)
    if first == "[":
        yield from _array(stream, path)
    elif first == "{":
        yield from _objects(first, stream, path)
    elif first:
        raise InputError(f"{path} does not start like JSON: {first!r}")


def json_line_items(stream: TextIO, path: str) -> Iterator[Item]:
    """Yield the records of a file with one JSON record per line."""
    return _lines(stream, path)


def _objects(first: str, stream: TextIO, path: str) -> Iterator[Item]:
    line = first + stream.readline()
    try:
        json.loads(line)
    except ValueError:
        rest = stream.read()
    else:
        yield from _lines(itertools.chain([line], stream), path)
        return
    try:
        document = json.loads(line + rest)
    except ValueError as error:
        following = rest.splitlines()
        if any(text.startswith("{") for text in following):
            yield from _lines(itertools.chain([line], following), path)
            return
        raise InputError(f"{path} is not JSON: {error}") from error
    yield from _document(document)


def _lines(lines: Iterable[str], path: str) -> Iterator[Item]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError as error:
            yield failing(InputError(f"record {number} of {path} is not JSON: {error}"))
            continue
        yield from _document(document)


def _document(document: Any) -> Iterator[Item]:
    """Yield one record, or those of a mapping from identifiers to records."""
    if (
        isinstance(document, dict)
        and document
        and not _is_record(document)
        and all(_is_record(value) for value in document.values())
    ):
        for label, record in document.items():
            yield Item(functools.partial(_parse, record), label)
        return
    yield _item(document)


def _array(stream: TextIO, path: str) -> Iterator[Item]:
    decoder = json.JSONDecoder()
    text, position, done = "", 0, False
    expect_value = False
    while True:
        while position < len(text) and text[position].isspace():
            position += 1
        if position < len(text):
            character = text[position]
            if character == "]" and not expect_value:
                return
            if character == "," and not expect_value:
                position, expect_value = position + 1, True
                continue
            try:
                value, end = decoder.raw_decode(text, position)
            except ValueError as error:
                if done or len(text) - position > _MAX_RECORD:
                    raise InputError(
                        f"{path} is not JSON in or after this record: {error}",
                        advice="what follows in the list was not read",
                    ) from error
            else:
                position, expect_value = end, False
                yield _item(value)
                continue
        elif done:
            raise InputError(f"{path} ends inside its list", advice="it was cut short")
        # Doubling keeps the cost of trying again proportional to the size.
        more = stream.read(max(_CHUNK, len(text) - position))
        text, position, done = text[position:] + more, 0, not more


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and (
        {"lattice", "sites"} <= value.keys() or isinstance(value.get("structure"), dict)
    )


def _item(record: Any) -> Item:
    label = None
    if isinstance(record, dict):
        names = (record.get(key) for key in _LABELS)
        label = next((name for name in names if isinstance(name, str) and name), None)
    return Item(functools.partial(_parse, record), label)


def _parse(record: Any) -> Parsed:
    from pymatgen.core import Structure

    if not isinstance(record, dict):
        raise InputError(f"a record is a {type(record).__name__}, not a JSON object")
    if not _is_record(record):
        raise InputError(
            "a record has neither lattice and sites nor a structure",
            evidence={"keys": sorted(map(str, record))[:20]},
            advice="write crystals with Structure.as_dict()",
        )
    notes: list[str] = []
    body = record.get("structure", record)
    if body is record:
        scalars: Mapping[str, Any] = record.get("properties") or {}
    else:
        scalars = {**(record.get("data") or {}), **record}
    # from_dict takes the given structure apart, so hand it over whole.
    return Parsed(Structure.from_dict(body), numbers_of(scalars, notes), notes)
