"""Predictions of a screening as files, with units and provenance.

One row for each predicted candidate, in the order of their numbers or of a ranking;
and one for each of the others, with the reason. :mod:`nanoos_fw.operations.row_files`
reads them back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw import __version__
from nanoos_fw.crystals import element_symbol
from nanoos_fw.ml.candidate_filters import REASONS, CandidateStatus
from nanoos_fw.ml.candidates import CandidateSource, open_candidates
from nanoos_fw.ml.ranking import Ranked
from nanoos_fw.ml.screening_engine import ChunkResult
from nanoos_fw.operations.row_files import Kind, Row, plain_single, write_rows
from nanoos_fw.provenance import utc_now
from nanoos_fw.stores.screens import Screen, ScreenStore

_NUMBERS = ("mean", "std", "half_width", "distance")


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
        Only these candidates, in this order, with ``rank`` and ``score``, of a Pareto
        front ``score.1``, ``score.2``, ...; all without.
    """
    source = open_candidates(screen.spec["candidates"])
    columns = _columns(screen, source)
    if ranked is None:
        rows = _all_rows(store, screen, source)
    else:
        rows = _some(store, screen, source, ranked)
        scores: dict[str, Kind] = dict.fromkeys(_scores_of(ranked), "double")
        columns = {"rank": "int", **scores, **columns}

    def crystal_of(row: Row) -> Any:
        flat = source.window(row["candidate"], row["candidate"] + 1)
        return flat.numbers, flat.lattices[0], flat.frac_coords

    return write_rows(path, provenance_of(store, screen), columns, rows, crystal_of)


def export_refused(store: ScreenStore, screen: Screen, path: Path) -> int:
    """Write what was not predicted, one row each with its outcome and the reason.

    With the rows of :func:`export_screen` these are all candidates. ``path`` may end as
    there, but for ``.extxyz``: what could not be read has no structure.
    """
    source = open_candidates(screen.spec["candidates"])
    columns: dict[str, Kind] = {
        **_names_of(source), "outcome": "text", "reason": "text",
    }  # fmt: skip
    head = {**provenance_of(store, screen), "refused": True}
    return write_rows(path, head, columns, refused_rows(store, screen, source))


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


def provenance_of(store: ScreenStore, screen: Screen) -> dict[str, Any]:
    """Return what a file says about its rows: origin, models and units.

    Of ``count`` candidates as many as ``screened`` had an outcome then.
    """
    units = {"candidate": "1", "rank": "1"}
    for prefix, own in zip(prefixes_of(screen), screen.models, strict=True):
        for name in ("mean", "std", "half_width"):
            units[f"{prefix}.{name}"] = own["unit"]
        units[f"{prefix}.distance"] = "standard deviations of the training set"
    return {
        "screen": screen.name,
        "key": screen.key,
        "candidates": screen.spec["candidates"],
        "count": screen.count,
        "screened": store.progress(screen).candidates,
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
                    None if values is None else plain_single(values[place])
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
    names = _scores_of(ranked)
    # Also where no candidate takes part.
    scores = ranked.scores.reshape(len(ranked.indices), len(names)).tolist()
    for rank, index in enumerate(ranked.indices.tolist(), start=1):
        own = dict(zip(names, scores[rank - 1], strict=True))
        yield {"rank": rank, **own, **found[index]}


def _scores_of(ranked: Ranked) -> list[str]:
    if ranked.scores.ndim == 1:
        return ["score"]
    return [f"score.{number + 1}" for number in range(ranked.scores.shape[1])]


def _formula(numbers: NDArray[np.uint8]) -> str:
    elements, counts = np.unique(numbers, return_counts=True)
    pairs = sorted(
        (element_symbol(int(z)), int(n)) for z, n in zip(elements, counts, strict=True)
    )
    return "".join(f"{name}{n if n > 1 else ''}" for name, n in pairs)


def _names_of(source: CandidateSource) -> dict[str, Kind]:
    if source.label(0) is None:
        return {"candidate": "int"}
    return {"candidate": "int", "label": "text"}


def _columns(screen: Screen, source: CandidateSource) -> dict[str, Kind]:
    columns: dict[str, Kind] = {**_names_of(source), "known_composition": "bool"}
    for prefix in prefixes_of(screen):
        columns |= {f"{prefix}.{name}": "single" for name in _NUMBERS}
        columns[f"{prefix}.out_of_domain"] = "bool"
    return columns
