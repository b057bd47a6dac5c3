"""Structures by content hash, and their cached features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanoos_fw.crystals import (
    decode_structure,
    encode_structure,
    structure_key,
    summarize,
)
from nanoos_fw.errors import CorruptArtifactError, InputError, NanoOSError
from nanoos_fw.provenance import content_key, sha256_bytes, utc_now
from nanoos_fw.stores.database import store_errors, upsert_many

if TYPE_CHECKING:
    from pymatgen.core import Structure

_BATCH = 1000


@dataclass(frozen=True)
class NewStructure:
    """A structure on its way into the store.

    Parameters
    ----------
    structure
        Checked crystal.
    label
        What people call it: a file name, ``Cu3Au L1_2``.
    properties
        Numbers that came with it, such as ``energy`` in eV.
    source
        Where it came from: a path and index, or a generator.
    prototype
        Strukturbericht designation, if generated.
    """

    structure: Structure
    label: str
    properties: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    prototype: str | None = None


@dataclass(frozen=True)
class StoredStructure:
    """A structure as the store knows it."""

    key: str
    structure: Structure
    label: str
    properties: dict[str, float]
    prototype: str | None
    formula: str
    chemical_system: str


@dataclass(frozen=True)
class AddResult:
    """Keys in the order given, and which of them were new."""

    keys: list[str]
    added: list[bool]


@dataclass(frozen=True)
class Features:
    """Cached features of one structure: a packed graph and named scalars."""

    structure: str
    graph: bytes
    scalars: dict[str, float]


class StructureStore:
    """The collections ``structures`` and ``structure_features``."""

    def __init__(self, database: Any) -> None:
        self._structures = database["structures"]
        self._features = database["structure_features"]

    def add(self, entries: Iterable[NewStructure], *, in_set: str) -> AddResult:
        """Store structures once each and put them into a named set.

        A structure that is there already keeps its document; only the set is added.

        Returns
        -------
        AddResult
            ``added[i]`` is False for a structure that the store, or an earlier entry
            of this call, already had.
        """
        documents: dict[str, dict[str, Any]] = {}
        keys: list[str] = []
        first: list[bool] = []
        for entry in entries:
            key = structure_key(entry.structure)
            keys.append(key)
            first.append(key not in documents)
            documents.setdefault(key, _document(entry))
        new: set[str] = set()
        items = list(documents.items())
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            upserts = [
                (
                    {"_id": key},
                    {"$setOnInsert": document, "$addToSet": {"sets": in_set}},
                )
                for key, document in batch
            ]
            with store_errors("store structures"):
                created = upsert_many(self._structures, upserts)
            new.update(batch[index][0] for index in created)
        added = [
            key in new and is_first for key, is_first in zip(keys, first, strict=True)
        ]
        return AddResult(keys=keys, added=added)

    def add_to_set(self, keys: Sequence[str], in_set: str) -> None:
        """Put stored structures into a further set."""
        with store_errors("put structures into a set"):
            self._structures.update_many(
                {"_id": {"$in": list(keys)}}, {"$addToSet": {"sets": in_set}}
            )

    def keys(self, in_set: str) -> list[str]:
        """Return the keys of a set, sorted."""
        with store_errors("list structures"):
            cursor = self._structures.find({"sets": in_set}, {"_id": 1})
            return sorted(document["_id"] for document in cursor)

    def get_many(self, keys: Sequence[str]) -> dict[str, StoredStructure]:
        """Return stored structures by key.

        Raises
        ------
        InputError
            If a key is unknown; names the first ones.
        """
        with store_errors("read structures"):
            documents = list(self._structures.find({"_id": {"$in": list(keys)}}))
        found = {document["_id"]: _stored(document) for document in documents}
        missing = [key for key in keys if key not in found]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(keys)} structures are not in the store",
                evidence={"first": missing[:5]},
                advice="import them with 'nanoos import'",
            )
        return {key: found[key] for key in keys}

    def count(self, in_set: str | None = None) -> int:
        """Return the number of structures, of one set or of all."""
        with store_errors("count structures"):
            query = {} if in_set is None else {"sets": in_set}
            return int(self._structures.count_documents(query))

    # ----------------------------------------------------------------- features

    def feature_state(
        self, keys: Sequence[str], parameters: Mapping[str, Any], version: int
    ) -> dict[str, str]:
        """Return ``ok`` or ``quarantined`` for the keys that have an entry."""
        query = {
            "structure": {"$in": list(keys)},
            "parameters": parameters_key(parameters),
            "version": version,
        }
        with store_errors("read features"):
            cursor = self._features.find(query, {"structure": 1, "status": 1})
            return {document["structure"]: document["status"] for document in cursor}

    def put_features(
        self,
        features: Sequence[Features],
        failures: Mapping[str, NanoOSError],
        parameters: Mapping[str, Any],
        version: int,
    ) -> None:
        """Store features, and quarantine structures that have none, once per key."""
        identity = {"parameters": parameters_key(parameters), "version": version}
        # All fields are set each time: an entry that was quarantined becomes whole.
        entries: dict[str, dict[str, Any]] = {
            entry.structure: {
                "status": "ok",
                "graph": entry.graph,
                "sha256": sha256_bytes(entry.graph),
                "scalars": entry.scalars,
                "error": None,
            }
            for entry in features
        }
        for key, error in failures.items():
            entries[key] = {
                "status": "quarantined",
                "graph": None,
                "sha256": None,
                "scalars": None,
                "error": error.to_dict(),
            }
        with store_errors("store features"):
            upsert_many(
                self._features,
                [
                    ({"structure": key, **identity}, {"$set": entry})
                    for key, entry in entries.items()
                ],
            )

    def features(
        self, keys: Sequence[str], parameters: Mapping[str, Any], version: int
    ) -> dict[str, Features]:
        """Return the features that are there and good, by structure key.

        Raises
        ------
        CorruptArtifactError
            If a graph fails its checksum.
        """
        query = {
            "structure": {"$in": list(keys)},
            "parameters": parameters_key(parameters),
            "version": version,
            "status": "ok",
        }
        with store_errors("read features"):
            documents = list(self._features.find(query))
        found = {}
        for document in documents:
            graph = bytes(document["graph"])
            if sha256_bytes(graph) != document["sha256"]:
                raise CorruptArtifactError(
                    f"the features of structure {document['structure']} fail their "
                    "checksum",
                    advice="featurize again with force_recompute",
                )
            found[document["structure"]] = Features(
                structure=document["structure"],
                graph=graph,
                scalars=dict(document["scalars"]),
            )
        return {key: found[key] for key in keys if key in found}

    def quarantined(
        self, keys: Sequence[str], parameters: Mapping[str, Any], version: int
    ) -> dict[str, dict[str, Any]]:
        """Return why structures have no features, by structure key."""
        query = {
            "structure": {"$in": list(keys)},
            "parameters": parameters_key(parameters),
            "version": version,
            "status": "quarantined",
        }
        with store_errors("read features"):
            return {
                d["structure"]: dict(d["error"]) for d in self._features.find(query)
            }


def parameters_key(parameters: Mapping[str, Any]) -> str:
    """Return the key under which features of these parameters are cached."""
    return content_key("feature_parameters", dict(parameters))


def _document(entry: NewStructure) -> dict[str, Any]:
    return {
        **summarize(entry.structure),
        "structure": encode_structure(entry.structure),
        "label": entry.label,
        "properties": dict(entry.properties),
        "source": entry.source,
        "prototype": entry.prototype,
        "created": utc_now(),
    }


def _stored(document: Mapping[str, Any]) -> StoredStructure:
    return StoredStructure(
        key=document["_id"],
        structure=decode_structure(document["structure"]),
        label=document["label"],
        properties=dict(document["properties"]),
        prototype=document["prototype"],
        formula=document["formula"],
        chemical_system=document["chemical_system"],
    )
