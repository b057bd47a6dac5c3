"""Screenings: their description, and predictions in one document for each chunk.

A document for each candidate costs several hundred bytes and an index entry; a packed
chunk costs under twenty for each candidate and model. The first candidate's number is
part of the chunk's ``_id``, so the database itself refuses a second one, a range of
them is read in order without a further index, and a single candidate is found by
division.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoos_fw.errors import InputError, StoreError
from nanoos_fw.ml.candidate_filters import CandidateStatus
from nanoos_fw.ml.screening_engine import ChunkResult, decode_chunk
from nanoos_fw.provenance import utc_now
from nanoos_fw.stores.database import store_errors, upsert_many

_AT_ONCE = 64


@dataclass(frozen=True)
class Screen:
    """A screening.

    Parameters
    ----------
    name
        What people call it.
    key
        Under which results are stored; decided by candidates, filters and weights.
    spec
        ``ScreenSpec`` as JSON.
    count
        Number of candidates.
    models
        For each model: ``reference``, ``name``, ``target``, ``unit``, ``sha256``.
    known_digest
        Of the known compositions when it was made.
    created
        UTC.
    """

    name: str
    key: str
    spec: dict[str, Any]
    count: int
    models: tuple[dict[str, Any], ...]
    known_digest: str
    created: str

    @property
    def chunk(self) -> int:
        """Candidates per chunk."""
        return int(self.spec["chunk"])

    @property
    def n_chunks(self) -> int:
        """Number of chunks when all is done."""
        return -(-self.count // self.chunk)


@dataclass(frozen=True)
class ScreenProgress:
    """How far a screening is.

    Parameters
    ----------
    chunks, n_chunks
        Stored, and all.
    candidates, predicted
        In stored chunks; the difference was filtered out.
    core_s
        Seconds of processes that the stored chunks took.
    """

    chunks: int
    n_chunks: int
    candidates: int
    predicted: int
    core_s: float

    @property
    def rate(self) -> float:
        """Candidates per second and core; 0 before the first chunk."""
        return self.candidates / self.core_s if self.core_s else 0.0

    @property
    def done(self) -> bool:
        """Whether all chunks are stored."""
        return self.chunks == self.n_chunks


class ScreenStore:
    """The collections ``screens`` and ``screen_chunks``."""

    def __init__(self, database: Any) -> None:
        self._screens = database["screens"]
        self._chunks = database["screen_chunks"]

    def put(self, screen: Screen) -> Screen:
        """Store a screening under its name, once.

        Raises
        ------
        InputError
            If the name belongs to another screening.
        """
        document = {
            "key": screen.key, "spec": screen.spec, "count": screen.count,
            "models": list(screen.models), "known_digest": screen.known_digest,
            "created": utc_now(),
        }  # fmt: skip
        with store_errors("store a screening"):
            upsert_many(
                self._screens, [({"_id": screen.name}, {"$setOnInsert": document})]
            )
        stored = self.get(screen.name)
        if stored.key != screen.key:
            raise InputError(
                f"{screen.name!r} is another screening already",
                evidence={"key": stored.key, "key_now": screen.key},
                advice="give this one another name; a model alias may have moved",
            )
        return stored

    def get(self, name: str) -> Screen:
        """Return a screening.

        Raises
        ------
        InputError
            If there is none of this name.
        """
        with store_errors("read a screening"):
            found = self._screens.find_one({"_id": name})
        if found is None:
            raise InputError(
                f"there is no screening {name!r}", evidence={"known": self.names()[:20]}
            )
        return Screen(
            name=name,
            key=found["key"],
            spec=found["spec"],
            count=int(found["count"]),
            models=tuple(found["models"]),
            known_digest=found["known_digest"],
            created=found["created"],
        )

    def names(self) -> list[str]:
        """Return the names of all screenings, sorted."""
        with store_errors("list screenings"):
            return sorted(d["_id"] for d in self._screens.find({}, {"_id": 1}))

    def put_chunks(self, key: str, documents: Sequence[Mapping[str, Any]]) -> int:
        """Store chunks once each and return how many are new."""
        upserts = [
            ({"_id": _chunk_id(key, document["start"])}, {"$setOnInsert": document})
            for document in documents
        ]
        with store_errors("store predictions"):
            return len(upsert_many(self._chunks, upserts))

    def starts(
        self, key: str, start: int = 0, stop: int | None = None
    ) -> set[int]:
        """Return the first candidates of the chunks that are stored."""
        with store_errors("list stored chunks"):
            found = self._chunks.find(_between(key, start, stop), {"_id": 1})
            return {int(d["_id"].rsplit(":", 1)[1]) for d in found}

    def chunks(
        self, key: str, start: int = 0, stop: int | None = None
    ) -> Iterator[ChunkResult]:
        """Yield stored chunks in the order of their candidates, one at a time.

        Raises
        ------
        CorruptArtifactError
            If one does not match its checksum.
        """
        with store_errors("read predictions"):
            cursor = (
                self._chunks.find(_between(key, start, stop))
                .sort("_id", 1)
                .batch_size(_AT_ONCE)
            )
            for document in cursor:
                yield decode_chunk(document)

    def chunk_of(self, screen: Screen, index: int) -> ChunkResult:
        """Return the chunk that holds one candidate.

        Raises
        ------
        InputError
            If there is no such candidate.
        StoreError
            If it was not screened yet.
        """
        if not 0 <= index < screen.count:
            raise InputError(f"{screen.name!r} has no candidate {index}")
        start = index - index % screen.chunk
        for chunk in self.chunks(screen.key, start, start + 1):
            return chunk
        raise StoreError(
            f"candidate {index} of {screen.name!r} was not screened yet",
            advice=f"nanoos screen run {screen.name}",
        )

    def progress(self, screen: Screen) -> ScreenProgress:
        """Count what is stored."""
        fields = {"n": 1, "predicted": 1, "wall_s": 1}
        chunks, n, predicted, core_s = 0, 0, 0, 0.0
        with store_errors("count predictions"):
            for found in self._chunks.find(_between(screen.key, 0, None), fields):
                chunks += 1
                n += int(found["n"])
                predicted += int(found["predicted"])
                core_s += float(found["wall_s"])
        return ScreenProgress(chunks, screen.n_chunks, n, predicted, core_s)

    def proof(self, screen: Screen) -> dict[str, Any]:
        """Show that every candidate has exactly one outcome.

        Returns
        -------
        dict
            ``candidates``, ``outcomes``, ``missing`` and ``repeated`` candidates,
            ``by_status``, and ``sha256`` over all outcomes in their order: equal for
            equal screenings, however often they were interrupted.
        """
        import hashlib

        total = hashlib.sha256()
        by_status: Counter[int] = Counter()
        expected, outcomes, missing, repeated = 0, 0, 0, 0
        for chunk in self.chunks(screen.key):
            missing += max(0, chunk.start - expected)
            repeated += max(0, expected - chunk.start)
            expected = max(expected, chunk.stop)
            outcomes += len(chunk.status)
            for status, count in zip(*_counted(chunk.status), strict=True):
                by_status[status] += count
            total.update(chunk.start.to_bytes(8, "little") + chunk.status.tobytes())
            total.update(chunk.known.tobytes())
            for own in chunk.models:
                for values in (own.mean, own.std, own.half_width, own.distance):
                    total.update(b"-" if values is None else values.tobytes())
                total.update(own.out_of_domain.tobytes())
        missing += screen.count - expected
        return {
            "candidates": screen.count,
            "outcomes": outcomes,
            "missing": missing,
            "repeated": repeated,
            "by_status": {
                CandidateStatus(s).name.lower(): n for s, n in sorted(by_status.items())
            },
            "sha256": total.hexdigest(),
        }


# ------------------------------------------------------------------------- private


def _chunk_id(key: str, start: int) -> str:
    return f"{key}:{start:016d}"


def _between(key: str, start: int, stop: int | None) -> dict[str, Any]:
    end = f"{key};" if stop is None else _chunk_id(key, stop)  # ; follows :
    return {"_id": {"$gte": _chunk_id(key, start), "$lt": end}}


def _counted(status: Any) -> tuple[list[int], list[int]]:
    import numpy as np

    values, counts = np.unique(status, return_counts=True)
    return values.tolist(), counts.tolist()
