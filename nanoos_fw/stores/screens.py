"""Screenings: their description, and predictions in one document for each chunk.

A document for each candidate costs several hundred bytes and an index entry; a packed
chunk costs under twenty for each candidate and model. The first candidate's number is
part of the chunk's ``_id``, so the database itself refuses a second one, a range of
them is read in order without a further index, and a single candidate is found by
division.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanoos_fw.errors import InputError, StoreError
from nanoos_fw.ml.candidate_filters import (
    CandidateStatus,
    count_elements,
    unique_compositions,
)
from nanoos_fw.ml.candidate_packs import PackReport, write_pack
from nanoos_fw.ml.graphs import read_arrays
from nanoos_fw.ml.screening_engine import ChunkResult, ScreenSpec, decode_chunk
from nanoos_fw.ml.screening_worker import ScreenJob
from nanoos_fw.provenance import utc_now
from nanoos_fw.stores.database import (
    get_artifact,
    put_artifact,
    store_errors,
    upsert_many,
)
from nanoos_fw.stores.structures import StructureStore

_AT_ONCE = 16
_KEYS_AT_ONCE = 1000


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
        For each model: ``reference``, ``target``, ``unit``, ``sha256``.
    known_digest
        Of the known compositions when it was made.
    created
        UTC.
    campaign
        That it belongs to, if any.
    core_s_estimated
        Seconds of one core that all candidates were expected to take when fireworks
        were submitted, by the throughput measured then; None if they were not.
    """

    name: str
    key: str
    spec: dict[str, Any]
    count: int
    models: tuple[dict[str, Any], ...]
    known_digest: str
    created: str
    campaign: str | None = None
    core_s_estimated: float | None = None

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
            "created": utc_now(), "campaign": screen.campaign,
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
        if screen.campaign not in (None, stored.campaign):
            raise InputError(
                f"{screen.name!r} belongs to "
                + (
                    f"campaign {stored.campaign!r}"
                    if stored.campaign
                    else "no campaign"
                ),
                advice="give this one another name",
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
            campaign=found.get("campaign"),
            core_s_estimated=found.get("core_s_estimated"),
        )

    def names(self, campaign: str | None = None) -> list[str]:
        """Return the names of all screenings, or those of a campaign, sorted."""
        query = {} if campaign is None else {"campaign": campaign}
        with store_errors("list screenings"):
            return sorted(d["_id"] for d in self._screens.find(query, {"_id": 1}))

    def set_estimate(self, name: str, core_s: float) -> None:
        """Note what a screening is expected to cost, unless it was noted before."""
        with store_errors("note the estimate of a screening"):
            self._screens.update_one(
                {"_id": name, "core_s_estimated": {"$exists": False}},
                {"$set": {"core_s_estimated": core_s}},
            )

    def put_chunks(self, key: str, documents: Sequence[Mapping[str, Any]]) -> int:
        """Store chunks once each and return how many are new."""
        upserts = [
            ({"_id": _chunk_id(key, document["start"])}, {"$setOnInsert": document})
            for document in documents
        ]
        with store_errors("store predictions"):
            return len(upsert_many(self._chunks, upserts))

    def starts(self, key: str, start: int = 0, stop: int | None = None) -> set[int]:
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

    def best_rate(self, screen: Screen, stop: int) -> float:
        """Return candidates per second and core of the fastest chunk before one."""
        with store_errors("read throughput"):
            found = self._chunks.find(
                _between(screen.key, 0, stop), {"n": 1, "wall_s": 1}
            )
            rates = [float(d["n"]) / max(float(d["wall_s"]), 1e-6) for d in found]
        if not rates:
            raise StoreError(f"no chunk of {screen.name!r} is stored yet")
        return max(rates)

    def proof(self, screen: Screen) -> dict[str, Any]:
        """Show that every candidate has exactly one outcome.

        Returns
        -------
        dict
            ``candidates``, ``outcomes``, ``missing`` and ``repeated`` candidates,
            ``by_status``, and ``sha256`` over all outcomes in their order: equal for
            equal screenings, however often they were interrupted.
        """
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


def register_screen(
    database: Any, name: str, spec: ScreenSpec, *, campaign: str | None = None
) -> Screen:
    """Store what is to be screened; again, with the same answer, if it is there.

    References of models become versions, and the compositions of the known set are
    kept as they are now. The report of ``campaign`` shows the screening.

    Raises
    ------
    InputError
        If the name belongs to another screening, or a model or the candidates are not
        there.
    """
    from nanoos_fw.ml.candidates import open_candidates
    from nanoos_fw.stores.models import ModelRegistry

    if not name.strip():
        raise InputError("a screening needs a name")
    registry = ModelRegistry(database)
    records = [registry.get(reference) for reference in spec.models]
    if len({record.reference for record in records}) < len(records):
        raise InputError("a model is given twice", evidence={"models": spec.models})
    source = open_candidates(spec.candidates)
    digest = put_artifact(database, _compositions_of(database, spec.known_set))
    without = [record.reference for record in records if record.sha256 is None]
    if without:
        raise InputError(
            f"no weights are installed of {', '.join(without)}",
            advice="see 'nanoos models show'",
        )
    weights = [str(record.sha256) for record in records]
    screen = Screen(
        name=name,
        key=spec.key(source, weights, digest),
        spec=spec.model_dump(mode="json"),
        count=len(source),
        models=tuple(
            {
                "reference": record.reference,
                "target": record.target,
                "unit": record.unit,
                "sha256": record.sha256,
            }
            for record in records
        ),
        known_digest=digest,
        created="",
        campaign=campaign,
    )
    return ScreenStore(database).put(screen)


def stream_name(campaign: str) -> str:
    """Return the name of the screening of a campaign's own sequence."""
    return f"{campaign}-stream"


def screen_job(database: Any, screen: Screen, work_dir: Path) -> ScreenJob:
    """Return what workers need, with the weights as verified files."""
    from nanoos_fw.stores.models import ModelRegistry

    registry = ModelRegistry(database)
    weights = []
    for own in screen.models:
        path = work_dir / f"{own['sha256']}.model"
        if not path.is_file():
            registry.write_weights(registry.get(own["reference"]), path)
        weights.append((str(path.resolve()), own["sha256"]))
    known = json.loads(get_artifact(database, screen.known_digest))
    return ScreenJob(
        spec=screen.spec,
        weights=weights,
        known=[tuple((int(z), int(n)) for z, n in own) for own in known],
    )


def pack_set(database: Any, in_set: str | None, directory: Path) -> PackReport:
    """Write the structures of a set of the store, or all, into a pack, by key."""
    store = StructureStore(database)
    keys = store.keys(in_set)

    def crystals() -> Iterator[tuple[str, Mapping[str, Any] | Exception]]:
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            part = keys[start : start + _KEYS_AT_ONCE]
            yield from store.encoded(part).items()

    return write_pack(crystals(), directory)


# ------------------------------------------------------------------------- private


def _compositions_of(database: Any, in_set: str | None) -> bytes:
    """Return the reduced compositions of a set as JSON, sorted; none without a set."""
    found: set[tuple[tuple[int, int], ...]] = set()
    if in_set is not None:
        store = StructureStore(database)
        keys = store.keys(in_set)
        if not keys:
            raise InputError(f"no structure is in the set {in_set!r}")
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            documents = store.encoded(keys[start : start + _KEYS_AT_ONCE])
            flat, errors = read_arrays(documents.values())
            for error in errors.values():
                raise error
            found.update(unique_compositions(count_elements(flat))[0])
    return json.dumps(sorted(found)).encode()


def _chunk_id(key: str, start: int) -> str:
    return f"{key}:{start:016d}"


def _between(key: str, start: int, stop: int | None) -> dict[str, Any]:
    end = f"{key};" if stop is None else _chunk_id(key, stop)  # ; follows :
    return {"_id": {"$gte": _chunk_id(key, start), "$lt": end}}


def _counted(status: Any) -> tuple[list[int], list[int]]:
    values, counts = np.unique(status, return_counts=True)
    return values.tolist(), counts.tolist()
