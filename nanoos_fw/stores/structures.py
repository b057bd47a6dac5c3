"""Structures by content hash."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanoos_fw.crystals import (
    decode_structure,
    encode_structure,
    structure_key,
    summarize,
)
from nanoos_fw.errors import InputError
from nanoos_fw.provenance import utc_now
from nanoos_fw.stores.database import store_errors, upsert_many

if TYPE_CHECKING:
    from pymatgen.core import Structure

_BATCH = 1000
_KEYS_PER_QUERY = 5000
_KEY_START = re.compile(r"[0-9a-f]{6,40}")


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
class StructureLabels:
    """What came with a structure, without its sites.

    Parameters
    ----------
    created
        When it was stored, ISO 8601 in UTC.
    """

    key: str
    label: str
    properties: dict[str, float]
    n_sites: int
    created: str


@dataclass(frozen=True)
class AddResult:
    """Keys in the order given, and which of them were new."""

    keys: list[str]
    added: list[bool]


class StructureStore:
    """The collection ``structures``."""

    def __init__(self, database: Any) -> None:
        self._structures = database["structures"]

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

    def keys(self, in_set: str | None = None) -> list[str]:
        """Return the keys of a set, or of all structures, sorted."""
        query = {} if in_set is None else {"sets": in_set}
        with store_errors("list structures"):
            cursor = self._structures.find(query, {"_id": 1})
            return sorted(document["_id"] for document in cursor)

    def sets(self) -> list[str]:
        """Return the names of all sets, sorted."""
        with store_errors("list sets"):
            return sorted(self._structures.distinct("sets"))

    def find_keys(self, names: Sequence[str]) -> list[str]:
        """Return the keys that keys, unique beginnings of keys, or labels mean.

        Raises
        ------
        InputError
            If a name means no structure, or more than one.
        """
        keys = []
        for name in names:
            query: dict[str, Any] = {"$or": [{"_id": name}, {"label": name}]}
            if _KEY_START.fullmatch(name):
                beyond = name + "g"  # the digit after f
                query["$or"].append({"_id": {"$gte": name, "$lt": beyond}})
            with store_errors("look for a structure"):
                found = [d["_id"] for d in self._structures.find(query, {"_id": 1})]
            if name in found:
                found = [name]
            if len(found) != 1:
                raise InputError(
                    f"{name!r} is the key or label of {len(found)} structures",
                    evidence={"structures": sorted(found)[:10]},
                    advice=("give more of the key" if found else "see 'nanoos import'"),
                )
            keys.append(found[0])
        return list(dict.fromkeys(keys))

    def encoded(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return stored structures as ``crystals.encode_structure`` left them.

        Raises
        ------
        InputError
            If a key is unknown; names the first ones.
        """
        documents = self._fields(keys, ("structure",))
        return {key: document["structure"] for key, document in documents.items()}

    def sizes(self, keys: Sequence[str]) -> dict[str, int]:
        """Return the number of sites by key; raises like :meth:`encoded`."""
        documents = self._fields(keys, ("n_sites",))
        return {key: int(document["n_sites"]) for key, document in documents.items()}

    def labels(self, keys: Sequence[str]) -> dict[str, StructureLabels]:
        """Return what datasets need of structures; raises like :meth:`encoded`."""
        fields = ("label", "properties", "n_sites", "created")
        return {
            key: StructureLabels(
                key=key,
                label=document["label"],
                properties=dict(document["properties"]),
                n_sites=int(document["n_sites"]),
                created=str(document["created"]),
            )
            for key, document in self._fields(keys, fields).items()
        }

    def _fields(
        self, keys: Sequence[str], fields: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        with store_errors("read structures"):
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                part = list(keys[start : start + _KEYS_PER_QUERY])
                cursor = self._structures.find(
                    {"_id": {"$in": part}}, dict.fromkeys(fields, 1)
                )
                found.update((document["_id"], document) for document in cursor)
        _refuse_missing(keys, found)
        return {key: found[key] for key in keys}

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
        _refuse_missing(keys, found)
        return {key: found[key] for key in keys}

    def count(self, in_set: str | None = None) -> int:
        """Return the number of structures, of one set or of all."""
        with store_errors("count structures"):
            query = {} if in_set is None else {"sets": in_set}
            return int(self._structures.count_documents(query))


def _refuse_missing(keys: Sequence[str], found: Mapping[str, Any]) -> None:
    missing = [key for key in keys if key not in found]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(keys)} structures are not in the store",
            evidence={"first": missing[:5]},
            advice="import them with 'nanoos import'",
        )


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
