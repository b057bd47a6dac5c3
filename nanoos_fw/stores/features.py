"""Cached features: one entry per structure, extraction parameters and version.

An entry is either whole (``ok``: a packed graph with its checksum, and scalars) or
``quarantined`` with the reason. The unique index on (structure, parameters, version)
decides every race: workers that compute the same entry leave one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanoos_fw.errors import CorruptArtifactError, NanoOSError
from nanoos_fw.provenance import content_key, sha256_bytes, utc_now
from nanoos_fw.stores.database import (
    get_artifact,
    put_artifact,
    store_errors,
    upsert_many,
)

HIT = "hit"
COMPUTED = "computed"
STALE = "stale"
QUARANTINED = "quarantined"
MISSING = "missing"
STATES = (HIT, COMPUTED, STALE, QUARANTINED, MISSING)
"""What a structure's features can be; ``computed`` is a hit this run has made."""

# MongoDB refuses documents over 16 MB; scalars and the answer to a batched read need
# room too. About 110,000 atoms with 12 neighbours each.
MAX_INLINE_BYTES = 8 * 1024 * 1024
# Keys per query, and bytes of graphs per write: both far below 16 MB and 48 MB.
_KEYS_PER_QUERY = 5000
# Of a reader that wants little memory: a megabyte of small graphs.
_GRAPHS_AT_ONCE = 1000
_OK = "ok"


@dataclass(frozen=True)
class Features:
    """Cached features of one structure: a packed graph and named scalars."""

    structure: str
    graph: bytes
    scalars: dict[str, float]


@dataclass(frozen=True)
class FeatureStatus:
    """What the store has for one structure.

    Parameters
    ----------
    state
        One of ``STATES``.
    error
        Of a quarantined structure: ``NanoOSError.to_dict()``.
    versions
        Of a stale structure: the feature versions it has entries of. When the
        current version is among them, its entries are of other parameters.
    """

    state: str
    error: dict[str, Any] | None = None
    versions: tuple[int, ...] = ()

    @property
    def reason(self) -> str:
        """Why the structure has no current features, in words; empty for a hit."""
        if self.error is not None:
            return str(self.error.get("message", "unknown"))
        if self.state == STALE:
            versions = ", ".join(map(str, self.versions))
            return f"entries of version {versions} with other version or parameters"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Return the status as JSON-compatible values."""
        return {**asdict(self), "versions": list(self.versions), "reason": self.reason}


class FeatureStore:
    """The collection ``structure_features``.

    Parameters
    ----------
    database
        The launchpad's database.
    max_inline_bytes
        Graphs of more bytes go to the artifact store; the entry keeps the checksum,
        under which they are found there.
    """

    def __init__(
        self, database: Any, *, max_inline_bytes: int = MAX_INLINE_BYTES
    ) -> None:
        self._database = database
        self._features = database["structure_features"]
        self._max_inline_bytes = max_inline_bytes

    # ------------------------------------------------------------------- status

    def state(
        self, keys: Sequence[str], parameters: Mapping[str, Any], version: int
    ) -> dict[str, str]:
        """Return ``ok`` or ``quarantined`` for the keys that have an entry."""
        found: dict[str, str] = {}
        fields = {"structure": 1, "status": 1}
        for document in self._entries(keys, fields, parameters, version):
            found[document["structure"]] = document["status"]
        return found

    def status(
        self, keys: Sequence[str], parameters: Mapping[str, Any], version: int
    ) -> dict[str, FeatureStatus]:
        """Return what the store has for every key, in the order of the keys.

        A structure is *stale* when it has entries, but only of another feature
        version or of other parameters.
        """
        wanted = parameters_key(parameters)
        fields = {"structure": 1, "parameters": 1, "version": 1, "status": 1}
        current: dict[str, FeatureStatus] = {}
        others: dict[str, set[int]] = {}
        for document in self._entries(keys, {**fields, "error": 1}):
            key = document["structure"]
            if document["parameters"] != wanted or document["version"] != version:
                others.setdefault(key, set()).add(int(document["version"]))
            elif document["status"] == _OK:
                current[key] = FeatureStatus(HIT)
            else:
                current[key] = FeatureStatus(QUARANTINED, dict(document["error"]))
        for key, versions in others.items():
            current.setdefault(key, FeatureStatus(STALE, None, tuple(sorted(versions))))
        missing = FeatureStatus(MISSING)
        return {key: current.get(key, missing) for key in keys}

    def quarantined(
        self, keys: Sequence[str], parameters: Mapping[str, Any], version: int
    ) -> dict[str, dict[str, Any]]:
        """Return why structures have no features, by structure key."""
        fields = {"structure": 1, "error": 1}
        extra = {"status": QUARANTINED}
        entries = self._entries(keys, fields, parameters, version, extra)
        return {document["structure"]: dict(document["error"]) for document in entries}

    def entries(self, structure: str) -> list[dict[str, Any]]:
        """Return all entries of a structure without their arrays, newest first."""
        with store_errors("read features"):
            found = list(self._features.find({"structure": structure}, {"graph": 0}))
        found.sort(key=lambda d: (-int(d["version"]), str(d["parameters"])))
        return [{k: v for k, v in d.items() if k != "_id"} for d in found]

    # --------------------------------------------------------------- read, write

    def put(
        self,
        features: Sequence[Features],
        failures: Mapping[str, NanoOSError],
        parameters: Mapping[str, Any],
        version: int,
        *,
        replace: bool = False,
    ) -> None:
        """Store features, and quarantine structures that have none, once per key.

        Features replace a quarantine. A failure replaces features only with
        ``replace``: that a worker on a crowded node ran out of time does not undo
        what another has computed.
        """
        identity = {"parameters": parameters_key(parameters), "version": version}
        # All fields are set each time: an entry that was quarantined becomes whole.
        common = {"described": dict(parameters), "computed": utc_now()}
        upserts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for entry in features:
            digest, inline = sha256_bytes(entry.graph), True
            if len(entry.graph) > self._max_inline_bytes:
                put_artifact(self._database, entry.graph)
                inline = False
            whole = {
                **common,
                "status": _OK,
                "graph": entry.graph if inline else None,
                "artifact": not inline,
                "size": len(entry.graph),
                "sha256": digest,
                "scalars": entry.scalars,
                "error": None,
            }
            upserts.append(
                ({"structure": entry.structure, **identity}, {"$set": whole})
            )
        for key, error in failures.items():
            query = {"structure": key, **identity}
            if not replace:
                query["status"] = {"$ne": _OK}
            empty = {
                **common,
                "status": QUARANTINED,
                "graph": None,
                "artifact": False,
                "size": 0,
                "sha256": None,
                "scalars": None,
                "error": error.to_dict(),
            }
            upserts.append((query, {"$set": empty}))
        with store_errors("store features"):
            for part in _parts(upserts, self._max_inline_bytes):
                upsert_many(self._features, part)

    def get(
        self, keys: Sequence[str], parameters: Mapping[str, Any], version: int
    ) -> dict[str, Features]:
        """Return the features that are there and good, by structure key.

        Raises
        ------
        CorruptArtifactError
            If a graph fails its checksum.
        """
        found = {}
        for document in self._entries(keys, None, parameters, version, {"status": _OK}):
            key, graph = self._graph(document)
            found[key] = Features(key, graph, dict(document["scalars"]))
        return {key: found[key] for key in keys if key in found}

    def graphs(
        self, keys: Sequence[str], parameters: Mapping[str, Any], version: int
    ) -> dict[str, bytes]:
        """Return the packed graphs alone, like :meth:`get` and in half its time."""
        fields = {"structure": 1, "graph": 1, "sha256": 1, "artifact": 1}
        extra = {"status": _OK}
        entries = self._entries(keys, fields, parameters, version, extra)
        found = dict(map(self._graph, entries))
        return {key: found[key] for key in keys if key in found}

    def stream_graphs(
        self,
        keys: Sequence[str],
        parameters: Mapping[str, Any],
        version: int,
        *,
        at_once: int = _GRAPHS_AT_ONCE,
    ) -> Iterator[tuple[str, bytes]]:
        """Yield the packed graphs that are there, in the order of the keys.

        Holds ``at_once`` of them.
        """
        for start in range(0, len(keys), at_once):
            part = keys[start : start + at_once]
            yield from self.graphs(part, parameters, version).items()

    def _graph(self, document: Mapping[str, Any]) -> tuple[str, bytes]:
        """Return the key and the verified graph of an entry."""
        key = document["structure"]
        if document["artifact"]:
            graph = get_artifact(self._database, document["sha256"])
        else:
            graph = bytes(document["graph"])
        if sha256_bytes(graph) != document["sha256"]:
            raise CorruptArtifactError(
                f"the features of structure {key} fail their checksum",
                advice=f"run 'nanoos features compute --force {key}'",
            )
        return key, graph

    def _entries(
        self,
        keys: Sequence[str],
        fields: Mapping[str, int] | None,
        parameters: Mapping[str, Any] | None = None,
        version: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Iterator[Mapping[str, Any]]:
        query: dict[str, Any] = dict(extra or {})
        if parameters is not None:
            query["parameters"] = parameters_key(parameters)
        if version is not None:
            query["version"] = version
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            query["structure"] = {"$in": list(keys[start : start + _KEYS_PER_QUERY])}
            with store_errors("read features"):
                yield from self._features.find(query, fields)


def parameters_key(parameters: Mapping[str, Any]) -> str:
    """Return the key under which features of these parameters are cached."""
    return content_key("feature_parameters", dict(parameters))


def _parts(
    upserts: Sequence[tuple[dict[str, Any], dict[str, Any]]], max_bytes: int
) -> Iterator[list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Split writes so that no message is over the server's 48 MB."""
    part: list[tuple[dict[str, Any], dict[str, Any]]] = []
    size = 0
    for query, update in upserts:
        graph = update["$set"]["graph"]
        size += 0 if graph is None else len(graph)
        if part and size > 2 * max_bytes:
            yield part
            part, size = [], 0 if graph is None else len(graph)
        part.append((query, update))
    if part:
        yield part
