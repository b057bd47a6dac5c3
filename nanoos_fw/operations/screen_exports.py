"""Predictions of a screening as files, with units and provenance, and back.

One row for each predicted candidate, in the order of their numbers or of a ranking.
Numbers are written with the fewest digits that give the stored float32 back, so a file
that is read again has the same rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw import __version__
from nanoos_fw.errors import CorruptArtifactError, InputError, MissingDependencyError
from nanoos_fw.ml.candidate_filters import REASONS, CandidateStatus
from nanoos_fw.ml.candidates import CandidateSource, open_candidates
from nanoos_fw.ml.graphs import element_symbol
from nanoos_fw.ml.ranking import Ranked
from nanoos_fw.ml.screening_engine import ChunkResult
from nanoos_fw.provenance import utc_now
from nanoos_fw.stores.screens import Screen, ScreenStore

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]
FORMATS = (".csv", ".jsonl", ".parquet", ".extxyz")
_MARK = "# nanoos-screen "
_NUMBERS = ("mean", "std", "half_width", "distance")
_AT_ONCE = 4096
_PROVENANCE = b"nanoos-screen"
_NAMES_OF = {False: ("candidate",), True: ("candidate", "label")}
_LAST_FIELD = 'pbc="T T T" '
_TEXTS = frozenset({"label", "outcome", "reason"})


def export_screen(
    store: ScreenStore, screen: Screen, path: Path, ranked: Ranked | None = None
) -> int:
    """Write predictions to a file and return the number of rows.

    Parameters
    ----------
    store, screen
        Of the predictions.
    path
        ``.csv``, ``.jsonl``, ``.parquet`` (needs pyarrow) or ``.extxyz``, which holds
        the structures, too. Appears when it is whole.
    ranked
        Only these candidates, in this order, with ``rank`` and ``score``; all without.
    """
    source = open_candidates(screen.spec["candidates"])
    if ranked is None:
        rows = _all_rows(store, screen, source)
    else:
        rows = _some(store, screen, source, ranked)
    return _write(path, provenance_of(screen), rows, _columns(screen, source), source)


def export_refused(store: ScreenStore, screen: Screen, path: Path) -> int:
    """Write what was not predicted, one row each with its outcome and the reason.

    With the rows of :func:`export_screen` these are all candidates. ``path`` may end as
    there, but for ``.extxyz``: what could not be read has no structure.
    """
    if path.suffix == ".extxyz":
        raise InputError(
            "candidates that were refused cannot be written as structures",
            advice="let the name end in .csv, .jsonl or .parquet",
        )
    source = open_candidates(screen.spec["candidates"])
    names = [*_NAMES_OF[source.label(0) is not None], "outcome", "reason"]
    head = {**provenance_of(screen), "refused": True}
    return _write(path, head, refused_rows(store, screen, source), names, source)


def refused_rows(
    store: ScreenStore, screen: Screen, source: CandidateSource
) -> Iterator[Row]:
    """Yield candidates that were not predicted: outcome and reason."""
    for chunk in store.chunks(screen.key):
        for place in np.flatnonzero(chunk.status).tolist():
            index = chunk.start + place
            status = CandidateStatus(int(chunk.status[place]))
            reason = REASONS[status]
            if status is CandidateStatus.UNREADABLE:
                reason = source.failure(index) or reason
            yield {
                **_name_of(source, index),
                "outcome": status.name.lower(),
                "reason": reason,
            }


def _write(
    path: Path,
    head: Mapping[str, Any],
    rows: Iterable[Row],
    columns: Sequence[str],
    source: CandidateSource,
) -> int:
    suffix = _suffix_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    count = 0

    def counted() -> Iterator[Row]:
        nonlocal count
        for row in rows:
            count += 1
            yield row

    try:
        if suffix == ".parquet":
            _write_parquet(temporary, head, counted(), columns)
        else:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                if suffix == ".csv":
                    _write_csv(file, head, counted(), columns)
                elif suffix == ".jsonl":
                    _write_lines(file, head, counted())
                else:
                    _write_extxyz(file, head, counted(), source)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def read_export(path: Path) -> tuple[dict[str, Any], Iterator[Row]]:
    """Return provenance and rows of a file of :func:`export_screen`.

    Raises
    ------
    CorruptArtifactError
        If it is none.
    """
    suffix = _suffix_of(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    with path.open(newline="", encoding="utf-8") as file:
        first = file.readline()
    if suffix == ".extxyz":
        with path.open(encoding="utf-8") as file:
            file.readline()
            first = file.readline()
        return _head(_extxyz_field(first, "provenance"), path), _read_extxyz(path)
    if suffix == ".csv":
        if not first.startswith(_MARK):
            raise _foreign(path)
        return _head(first.removeprefix(_MARK), path), _read_csv(path)
    return _head(first, path), _read_lines(path)


def provenance_of(screen: Screen) -> dict[str, Any]:
    """Return what a file says about its rows: origin, models and units."""
    units = {"candidate": "1", "rank": "1"}
    for prefix, own in zip(prefixes_of(screen), screen.models, strict=True):
        for name in ("mean", "std", "half_width"):
            units[f"{prefix}.{name}"] = own["unit"]
        units[f"{prefix}.distance"] = "standard deviations of the training set"
    return {
        "screen": screen.name,
        "key": screen.key,
        "candidates": screen.spec["candidates"],
        "coverage": screen.spec["coverage"],
        "models": list(screen.models),
        "units": units,
        "created": screen.created,
        "exported": utc_now(),
        "nanoos_fw": __version__,
    }


def prefixes_of(screen: Screen) -> list[str]:
    """Return the beginning of each model's columns: its target, or its reference."""
    targets = [own["target"] for own in screen.models]
    return [
        own["target"] if targets.count(own["target"]) == 1 else own["reference"]
        for own in screen.models
    ]


def rows_of(
    chunk: ChunkResult,
    screen: Screen,
    source: CandidateSource,
    chosen: Sequence[int] | None = None,
) -> Iterator[Row]:
    """Yield the rows of a chunk, or those at some places among its predictions."""
    places = range(len(chunk.known)) if chosen is None else chosen
    indices = chunk.indices
    prefixes = prefixes_of(screen)
    for place in places:
        row = _name_of(source, int(indices[place]))
        row["known_composition"] = bool(chunk.known[place])
        for prefix, own in zip(prefixes, chunk.models, strict=True):
            for name in _NUMBERS:
                values: NDArray[np.float32] | None = getattr(own, name)
                row[f"{prefix}.{name}"] = (
                    None if values is None else _plain(values[place])
                )
            row[f"{prefix}.out_of_domain"] = bool(own.out_of_domain[place])
        yield row


def ranked_rows(store: ScreenStore, screen: Screen, ranked: Ranked) -> list[Row]:
    """Return the rows of ranked candidates, best first, with rank, score, formula."""
    source = open_candidates(screen.spec["candidates"])
    found = list(_some(store, screen, source, ranked))
    for row in found:
        flat = source.window(row["candidate"], row["candidate"] + 1)
        row["formula"] = _formula(flat.numbers)
        row["n_sites"] = len(flat.numbers)
    return found


# ------------------------------------------------------------------------- private


def _plain(value: np.float32) -> float:
    """Return the double with the fewest digits that rounds to a float32."""
    return float(str(value))


def _name_of(source: CandidateSource, index: int) -> Row:
    """Return the number of a candidate, and its label if it comes from a file."""
    label = source.label(index)
    return (
        {"candidate": index} if label is None else {"candidate": index, "label": label}
    )


def _all_rows(
    store: ScreenStore, screen: Screen, source: CandidateSource
) -> Iterator[Row]:
    for chunk in store.chunks(screen.key):
        yield from rows_of(chunk, screen, source)


def _some(
    store: ScreenStore, screen: Screen, source: CandidateSource, ranked: Ranked
) -> Iterator[Row]:
    """Yield rows in the order of a ranking; each chunk is read once."""
    by_chunk: dict[int, list[int]] = {}
    for index in ranked.indices.tolist():
        by_chunk.setdefault(index - index % screen.chunk, []).append(index)
    found: dict[int, Row] = {}
    for members in by_chunk.values():
        chunk = store.chunk_of(screen, members[0])
        places = np.searchsorted(chunk.indices, members).tolist()
        found.update(zip(members, rows_of(chunk, screen, source, places), strict=True))
    scores = ranked.scores.tolist()
    for rank, index in enumerate(ranked.indices.tolist(), start=1):
        yield {"rank": rank, "score": scores[rank - 1], **found[index]}


def _formula(numbers: NDArray[np.uint8]) -> str:
    elements, counts = np.unique(numbers, return_counts=True)
    pairs = sorted(
        (element_symbol(int(z)), int(n)) for z, n in zip(elements, counts, strict=True)
    )
    return "".join(f"{name}{n if n > 1 else ''}" for name, n in pairs)


def _columns(screen: Screen, source: CandidateSource) -> list[str]:
    names = [*_NAMES_OF[source.label(0) is not None], "known_composition"]
    for prefix in prefixes_of(screen):
        names += [f"{prefix}.{name}" for name in (*_NUMBERS, "out_of_domain")]
    return names


def _write_csv(
    file: IO[str], head: Mapping[str, Any], rows: Iterable[Row], columns: Sequence[str]
) -> None:
    file.write(_MARK + json.dumps(head) + "\n")
    writer: Any = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: _cell(name, value) for name, value in row.items()})
    if writer is None:
        csv.writer(file, lineterminator="\n").writerow(columns)


def _cell(name: str, value: Any) -> str:
    if name in _TEXTS:
        return str(value)
    return "" if value is None else json.dumps(value)


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        file.readline()
        for row in csv.DictReader(file):
            yield {
                k: v if k in _TEXTS else json.loads(v) if v else None
                for k, v in row.items()
            }


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
    file: IO[str],
    head: Mapping[str, Any],
    rows: Iterable[Row],
    source: CandidateSource,
) -> None:
    # In every frame would be a hundred times the size; the first one tells.
    quoted = json.dumps(head).replace("'", "\\u0027")
    said = f"provenance='{quoted}' "
    for row in rows:
        flat = source.window(row["candidate"], row["candidate"] + 1)
        lattice = flat.lattices[0]
        places = flat.frac_coords @ lattice
        vectors = " ".join(repr(float(v)) for v in lattice.ravel())
        fields = " ".join(f"{k}={json.dumps(v)}" for k, v in row.items())
        file.write(f"{len(places)}\n")
        file.write(
            f'Lattice="{vectors}" Properties=species:S:1:pos:R:3 pbc="T T T" '
            f"{said}{fields}\n"
        )
        said = ""
        for number, place in zip(flat.numbers.tolist(), places.tolist(), strict=True):
            file.write(f"{element_symbol(number)} {place[0]!r} {place[1]!r} ")
            file.write(f"{place[2]!r}\n")


def _read_extxyz(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        while line := file.readline():
            comment = file.readline()
            for _ in range(int(line)):
                file.readline()
            start = comment.index(_LAST_FIELD) + len(_LAST_FIELD)
            if comment.startswith("provenance='", start):
                start = comment.index("'", start + len("provenance='")) + 1
            yield _fields(comment[start:])


def _fields(text: str) -> Row:
    """Return ``name=JSON`` fields with blanks between; texts may hold blanks."""
    row: Row = {}
    decoder = json.JSONDecoder()
    at = 0
    while at < len(text.rstrip()):
        equals = text.index("=", at)
        value, end = decoder.raw_decode(text, equals + 1)
        row[text[at:equals].strip()] = value
        at = end
    return row


def _extxyz_field(comment: str, name: str) -> str:
    return comment.partition(f"{name}='")[2].partition("'")[0]


def _write_parquet(
    path: Path, head: Mapping[str, Any], rows: Iterable[Row], columns: Sequence[str]
) -> None:
    pa, pq = _pyarrow()
    metadata = {_PROVENANCE: json.dumps(head).encode()}
    rows = iter(rows)
    first = next(rows, None)
    names = columns if first is None else list(first)
    schema = pa.schema([(name, _kind(pa, name)) for name in names], metadata=metadata)
    with pq.ParquetWriter(path, schema) as writer:
        waiting = [] if first is None else [first]
        for row in rows:
            waiting.append(row)
            if len(waiting) == _AT_ONCE:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, schema=schema))


def _kind(pa: Any, name: str) -> pyarrow.DataType:
    kinds: dict[str, Callable[[], Any]] = {
        "candidate": pa.int64, "rank": pa.int64, "known_composition": pa.bool_,
    }  # fmt: skip
    if name == "score":
        return pa.float64()
    if name in _TEXTS:
        return pa.string()
    if name.endswith(".out_of_domain"):
        return pa.bool_()
    return kinds.get(name, pa.float32)()


def _read_parquet(path: Path) -> tuple[dict[str, Any], Iterator[Row]]:
    _, pq = _pyarrow()
    file = pq.ParquetFile(path)
    head = (file.schema_arrow.metadata or {}).get(_PROVENANCE, b"").decode()
    small = {f.name for f in file.schema_arrow if str(f.type) == "float"}

    def rows() -> Iterator[Row]:
        for batch in file.iter_batches(batch_size=_AT_ONCE):
            for row in batch.to_pylist():
                yield {
                    k: _plain(np.float32(v)) if k in small and v is not None else v
                    for k, v in row.items()
                }

    return _head(head, path), rows()


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
    if not isinstance(head, dict) or "screen" not in head or "units" not in head:
        raise _foreign(path)
    return head


def _foreign(path: Path) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{path} is no export of a screening", advice="see 'nanoos screen export'"
    )
