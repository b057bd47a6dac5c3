"""Candidates to predictions, a chunk of a sequence at a time, in flat arrays.

A screening is a sequence of candidates, filters and models, cut into chunks of a fixed
size. A chunk is the unit of work, of storage and of checkpoints: its result is decided
by the screening and its number, whoever computes it, and whether for the first time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.candidate_filters import CandidateFilter, CandidateStatus, known_in
from nanoos_fw.ml.candidates import CandidateSource, CandidateSpec, take_rows
from nanoos_fw.ml.cgcnn import CGCNNModel
from nanoos_fw.ml.crystal_tables import build_table_of_arrays
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.ml.graphs import CrystalArrays, build_graphs
from nanoos_fw.ml.line_graph_model import LineGraphModel
from nanoos_fw.ml.uncertainty import DEFAULT_COVERAGE
from nanoos_fw.provenance import content_key

if TYPE_CHECKING:
    from nanoos_fw.ml.batches import GraphTable
    from nanoos_fw.ml.predictors import PropertyModel
    from nanoos_fw.ml.uncertainty import Predictions

DEFAULT_CHUNK = 4096
_OPTIONAL = ("std", "half_width", "distance")
_Answer = tuple["Predictions | None", NDArray[np.int64]]


class ScreenSpec(BaseModel):
    """What is screened, and how.

    Parameters
    ----------
    candidates
        See :mod:`nanoos_fw.ml.candidates`.
    models
        References in the registry; several targets are predicted in one pass.
    filters
        Candidates that fail are counted by reason and not predicted.
    known_set
        Set of the structure store: candidates of its compositions are marked.
    coverage
        Of the intervals.
    chunk
        Candidates that are predicted and stored together; a killed worker loses no
        more.
    cutoff_radius, max_neighbors
        Of the graphs for models that do not state how theirs are built (forests).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidates: CandidateSpec
    models: tuple[str, ...] = Field(min_length=1)
    filters: CandidateFilter = CandidateFilter()
    known_set: str | None = None
    coverage: float = Field(default=DEFAULT_COVERAGE, gt=0, lt=1)
    chunk: int = Field(default=DEFAULT_CHUNK, ge=1, le=65536)
    cutoff_radius: float = Field(default=8.0, gt=0)
    max_neighbors: int | None = Field(default=12, ge=1)

    def key(self, source: CandidateSource, weights: Sequence[str], known: str) -> str:
        """Return the key under which results are stored.

        Parameters
        ----------
        source
            The opened candidates.
        weights
            SHA-256 of each model's weights.
        known
            Digest of the known compositions.
        """
        own = self.model_dump(mode="json", exclude={"candidates", "models"})
        return content_key(
            "screen",
            {
                **own,
                "candidates": source.key(),
                "weights": list(weights),
                "known": known,
                "features": FEATURE_VERSION,
            },
        )


def read_screen(value: Any) -> ScreenSpec:
    """Return a checked description of a screening.

    Raises
    ------
    InputError
        If it is none; names the field.
    """
    try:
        return ScreenSpec.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"screening: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            advice=f"fields: {', '.join(ScreenSpec.model_fields)}",
        ) from error


@dataclass(frozen=True, eq=False)
class ModelColumns:
    """Predictions of one model for the ``m`` predicted candidates of a chunk.

    ``(m,) float32`` each, in the unit of the target; None where the model states
    none. See :class:`nanoos_fw.ml.uncertainty.Predictions`.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32] | None
    half_width: NDArray[np.float32] | None
    distance: NDArray[np.float32] | None
    out_of_domain: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ChunkResult:
    """What became of candidates ``start`` to ``start + n`` - 1.

    Parameters
    ----------
    start
        Number of the first candidate.
    status
        ``(n,) uint8``, values of :class:`CandidateStatus`.
    known
        ``(m,) bool`` of the predicted candidates: their composition is a known one.
    models
        In the order of the screening.
    wall_s
        Seconds of one process.
    """

    start: int
    status: NDArray[np.uint8]
    known: NDArray[np.bool_]
    models: tuple[ModelColumns, ...]
    wall_s: float = 0.0

    @property
    def stop(self) -> int:
        """Number after the last candidate."""
        return self.start + len(self.status)

    @property
    def indices(self) -> NDArray[np.int64]:
        """Numbers of the predicted candidates, ``(m,) int64``."""
        return self.start + np.flatnonzero(self.status == CandidateStatus.PREDICTED)


def screen_chunk(
    source: CandidateSource,
    models: Sequence[PropertyModel],
    start: int,
    stop: int,
    spec: ScreenSpec,
    known: Collection[tuple[tuple[int, int], ...]] = (),
) -> ChunkResult:
    """Generate, filter, featurize and predict one window of candidates.

    Models whose graphs are built alike share them.
    """
    status = np.full(stop - start, CandidateStatus.LEFT_OUT, dtype=np.uint8)
    status[source.unreadable(start, stop)] = CandidateStatus.UNREADABLE
    flat = source.window(start, stop)
    judged = spec.filters.status(flat)
    status[flat.positions] = judged
    rows = np.flatnonzero(judged == 0)
    if len(rows) < len(judged):
        flat = take_rows(flat, rows)
    tables: dict[tuple[float, int | None], tuple[Any, NDArray[np.int64]]] = {}
    keep = np.ones(len(flat.positions), dtype=bool)
    for cutoff, neighbors in _kinds_of_graphs(models, spec):
        table, places, _ = build_table_of_arrays(
            flat, cutoff_radius=cutoff, max_neighbors=neighbors
        )
        tables[cutoff, neighbors] = table, places
        without = np.ones(len(keep), dtype=bool)
        without[places] = False
        _mark(status, flat, keep & without, CandidateStatus.NO_GRAPH)
        keep &= ~without
        if table is not None:
            close = np.zeros(len(keep), dtype=bool)
            close[places] = spec.filters.too_close(table)
            _mark(status, flat, keep & close, CandidateStatus.DISTANCE)
            keep &= ~close
    rows = np.flatnonzero(keep)
    answers = [_predict(model, flat, keep, tables, spec) for model in models]
    answered = np.ones(len(rows), dtype=bool)
    for answer in answers:
        answered &= _has_numbers(answer, len(rows))
    keep[rows[~answered]] = False
    without = np.zeros(len(keep), dtype=bool)
    without[rows[~answered]] = True
    _mark(status, flat, without, CandidateStatus.NO_PREDICTION)
    columns = [_columns(answer, answered) for answer in answers]
    return ChunkResult(
        start=start,
        status=status,
        known=known_in(flat, known)[keep],
        models=tuple(columns),
    )


def encode_chunk(chunk: ChunkResult) -> dict[str, Any]:
    """Return a chunk as a document of few bytes for each candidate, with checksum."""
    document: dict[str, Any] = {
        "start": chunk.start,
        "n": len(chunk.status),
        "predicted": len(chunk.known),
        "status": chunk.status.tobytes() if chunk.status.any() else b"",
        "known": np.packbits(chunk.known).tobytes() if chunk.known.any() else b"",
        "models": [
            {
                "mean": own.mean.astype("<f4").tobytes(),
                **{
                    name: getattr(own, name).astype("<f4").tobytes()
                    for name in _OPTIONAL
                    if getattr(own, name) is not None
                },
                "outside": np.packbits(own.out_of_domain).tobytes(),
            }
            for own in chunk.models
        ],
    }
    return {**document, "sha256": _digest(document), "wall_s": round(chunk.wall_s, 4)}


def decode_chunk(document: Mapping[str, Any]) -> ChunkResult:
    """Return the chunk of a document.

    Raises
    ------
    CorruptArtifactError
        If it does not match its checksum.
    """
    if _digest(document) != document["sha256"]:
        raise CorruptArtifactError(
            f"stored predictions from candidate {document['start']} on are damaged",
            advice="delete this chunk and run the screening again",
        )
    n, m = document["n"], document["predicted"]
    status = np.zeros(n, dtype=np.uint8)
    if document["status"]:
        status = np.frombuffer(document["status"], dtype=np.uint8)
    known = np.zeros(m, dtype=bool)
    if document["known"]:
        known = _bits(document["known"], m)
    return ChunkResult(
        start=document["start"],
        status=status,
        known=known,
        models=tuple(
            ModelColumns(
                mean=np.frombuffer(own["mean"], dtype="<f4"),
                **{
                    name: np.frombuffer(own[name], dtype="<f4") if name in own else None
                    for name in _OPTIONAL
                },
                out_of_domain=_bits(own["outside"], m),
            )
            for own in document["models"]
        ),
        wall_s=document["wall_s"],
    )


def chunk_starts(
    count: int, chunk: int, start: int = 0, stop: int | None = None
) -> range:
    """Return the first candidates of the chunks of a window.

    Raises
    ------
    InputError
        If the window does not begin and end between chunks.
    """
    end = count if stop is None else stop
    if not 0 <= start < end <= count or start % chunk or (end % chunk and end != count):
        raise InputError(
            f"[{start}, {end}) is no window of whole chunks",
            evidence={"candidates": count, "chunk": chunk},
        )
    return range(start, end, chunk)


# ------------------------------------------------------------------------- private


def _shares_tables(model: PropertyModel) -> bool:
    return isinstance(model, CGCNNModel)


def _kinds_of_graphs(
    models: Sequence[PropertyModel], spec: ScreenSpec
) -> list[tuple[float, int | None]]:
    """Return how the graphs of the models are built; at least one kind."""
    kinds: dict[tuple[float, int | None], None] = {}
    for model in models:
        if _shares_tables(model):
            kinds[_kind(model)] = None
    return list(kinds) or [(spec.cutoff_radius, spec.max_neighbors)]


def _kind(model: Any) -> tuple[float, int | None]:
    return model.card.cutoff_radius, model.card.max_neighbors


def _predict(
    model: PropertyModel,
    flat: CrystalArrays,
    keep: NDArray[np.bool_],
    tables: Mapping[tuple[float, int | None], tuple[Any, NDArray[np.int64]]],
    spec: ScreenSpec,
) -> _Answer:
    """Return what a model says of the kept candidates, and of which of these."""
    if not keep.any():
        return None, np.zeros(0, dtype=np.int64)
    if _shares_tables(model):
        table: GraphTable
        table, places = tables[_kind(model)]
        chosen = np.flatnonzero(keep[places])
        if len(chosen) < len(places):
            table = table.select(chosen)
        found = model.predict_table(table, coverage=spec.coverage)  # type: ignore[attr-defined]
        return found, np.arange(len(chosen))
    documents = [_document(flat, row) for row in np.flatnonzero(keep).tolist()]
    if isinstance(model, LineGraphModel):
        found, places, _ = model.predict_crystals(documents, coverage=spec.coverage)
        return found, places
    graphs, _ = build_graphs(
        documents, cutoff_radius=spec.cutoff_radius, max_neighbors=spec.max_neighbors
    )
    there = np.array([at for at, graph in enumerate(graphs) if graph], dtype=np.int64)
    if not len(there):
        return None, there
    full = model.predict_full([g for g in graphs if g], coverage=spec.coverage)
    return full, there


def _document(flat: CrystalArrays, row: int) -> dict[str, Any]:
    atoms = slice(int(flat.atom_start[row]), int(flat.atom_start[row + 1]))
    return {
        "n_sites": atoms.stop - atoms.start,
        "numbers": flat.numbers[atoms].tobytes(),
        "lattice": flat.lattices[row].astype("<f8").tobytes(),
        "frac_coords": flat.frac_coords[atoms].astype("<f8").tobytes(),
    }


def _mark(
    status: NDArray[np.uint8],
    flat: CrystalArrays,
    rows: NDArray[np.bool_],
    reason: CandidateStatus,
) -> None:
    status[flat.positions[rows]] = reason


def _has_numbers(answer: _Answer, n: int) -> NDArray[np.bool_]:
    """Tell which of ``n`` candidates a model gave finite numbers for."""
    found, places = answer
    good = np.zeros(n, dtype=bool)
    if found is not None:
        if len(found.mean) != len(places):
            raise InputError(
                f"a model answered {len(found.mean)} of {len(places)} candidates"
            )
        finite = np.isfinite(found.mean.astype(np.float32))
        if found.std is not None:
            finite &= np.isfinite(found.std)
        good[places] = finite
    return good


def _columns(answer: _Answer, wanted: NDArray[np.bool_]) -> ModelColumns:
    """Return the columns of the wanted candidates, all of which a model answered."""
    found, places = answer
    if found is None or not wanted.any():
        nothing = np.zeros(0, dtype=np.float32)
        return ModelColumns(nothing, None, None, None, np.zeros(0, dtype=bool))
    chosen = wanted[places]

    def small(values: NDArray[np.float64] | None) -> NDArray[np.float32] | None:
        return None if values is None else values[chosen].astype(np.float32)

    return ModelColumns(
        mean=found.mean[chosen].astype(np.float32),
        std=small(found.std),
        half_width=small(found.half_width),
        distance=small(found.distance),
        out_of_domain=found.out_of_domain[chosen],
    )


def _digest(document: Mapping[str, Any]) -> str:
    total = hashlib.sha256()
    for name in ("start", "n", "predicted"):
        total.update(int(document[name]).to_bytes(8, "little"))
    total.update(bytes(document["status"]) + b"|" + bytes(document["known"]))
    for own in document["models"]:
        for name in ("mean", *_OPTIONAL, "outside"):
            total.update(name.encode() + bytes(own.get(name, b"")))
    return total.hexdigest()


def _bits(data: bytes, n: int) -> NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=n).astype(bool)
