"""Structures by content hash."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanoos_fw.crystals import (
    decode_arrays,
    decode_structure,
    encode_structure,
    structure_key,
    summarize,
)
from nanoos_fw.errors import InputError
from nanoos_fw.provenance import utc_now
from nanoos_fw.stores.database import store_errors, update_many, upsert_many

if TYPE_CHECKING:
    from pymatgen.core import Structure

_BATCH = 1000
_KEYS_PER_QUERY = 5000
_QUERY_FIELDS = (
    "formula", "chemical_system", "elements", "n_sites", "volume_a3", "label",
    "prototype", "sets", "source",
)  # fmt: skip
_QUERY_OPERATORS = (
    "$eq", "$ne", "$lt", "$lte", "$gt", "$gte", "$in", "$nin", "$all", "$exists",
    "$regex", "$not", "$size",
)  # fmt: skip
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
    units
        Units of the properties that came in a table and have been recorded with it.
    """

    key: str
    label: str
    properties: dict[str, float]
    n_sites: int
    created: str
    units: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AddResult:
    """Keys in the order given, and which of them were new."""

    keys: list[str]
    added: list[bool]


@dataclass(frozen=True)
class PropertyResult:
    """What became of the values of a property.

    Parameters
    ----------
    written, unchanged
        Structure keys.
    conflicts
        Structure key -> the value there is, and the one that was not written.
    """

    written: list[str]
    unchanged: list[str]
    conflicts: dict[str, tuple[float, float]]


class StructureStore:
    """The collection ``structures``."""

    def __init__(self, database: Any) -> None:
        self._structures = database["structures"]

    def add(self, entries: Iterable[NewStructure], *, in_set: str) -> AddResult:
        """Store structures once each and put them into a named set.

        A structure that is there already keeps its document; only the set is added.
        For numbers that come with it, see :meth:`add_properties`.

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

    def elements(self, in_set: str, *, alone: bool = False) -> set[str]:
        """Return the elements of a set's structures.

        Parameters
        ----------
        alone
            Only of structures of one element.
        """
        query: dict[str, Any] = {"sets": in_set}
        if alone:
            query["elements"] = {"$size": 1}
        with store_errors("list elements"):
            return set(self._structures.distinct("elements", query))

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

    def element_counts(self, keys: Sequence[str]) -> dict[str, dict[str, int]]:
        """Return the atoms of each element by key; raises like :meth:`encoded`.

        Elements come in the order in which the sites have them.
        """
        from pymatgen.core import Element

        counts: dict[str, dict[str, int]] = {}
        symbols = [""] + [str(Element.from_Z(z).symbol) for z in range(1, 119)]
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            part = keys[start : start + _KEYS_PER_QUERY]
            for key, document in self.encoded(part).items():
                own: dict[str, int] = {}
                for z in decode_arrays(document)[0].tolist():
                    own[symbols[z]] = own.get(symbols[z], 0) + 1
                counts[key] = own
        return counts

    def labels(self, keys: Sequence[str]) -> dict[str, StructureLabels]:
        """Return what datasets need of structures; raises like :meth:`encoded`."""
        fields = ("label", "properties", "property_sources", "n_sites", "created")
        return {
            key: StructureLabels(
                key=key,
                label=document["label"],
                properties=dict(document["properties"]),
                n_sites=int(document["n_sites"]),
                created=str(document["created"]),
                units={
                    name: str(source["unit"])
                    for name, source in document.get("property_sources", {}).items()
                },
            )
            for key, document in self._fields(keys, fields).items()
        }

    def resolve(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Return the keys of the structures that have a name as key or label."""
        found: dict[str, list[str]] = {name: [] for name in names}
        for start in range(0, len(names), _KEYS_PER_QUERY):
            part = list(names[start : start + _KEYS_PER_QUERY])
            query = {"$or": [{"_id": {"$in": part}}, {"label": {"$in": part}}]}
            with store_errors("look for structures"):
                documents = list(self._structures.find(query, {"label": 1}))
            for document in documents:
                for name in {document["_id"], document["label"]} & found.keys():
                    found[name].append(document["_id"])
        # A key means its structure, whatever is called like it.
        return {
            name: [name] if name in keys else sorted(keys)
            for name, keys in found.items()
        }

    def set_property(
        self,
        name: str,
        values: Mapping[str, float],
        *,
        unit: str,
        source: str,
        replace: bool = False,
    ) -> PropertyResult:
        """Give stored structures a property, and note where it came from.

        Parameters
        ----------
        name, unit, source
            Of the property; the unit in which it is stored; where the values are from.
        values
            By structure key.
        replace
            Write over values that differ; without it they are reported.
        """
        known = self._fields(list(values), ("properties", "property_sources"))
        changes, unchanged, conflicts = [], [], {}
        for key, value in values.items():
            properties = known[key]["properties"]
            noted = known[key].get("property_sources", {}).get(name, {}).get("unit")
            before = properties.get(name)
            same_unit = noted in (None, unit)
            if before is not None and same_unit and _close(before, value):
                unchanged.append(key)
            elif before is not None and not replace:
                conflicts[key] = (float(before), value)
            else:
                note = {"unit": unit, "source": source, "imported": utc_now()}
                change = {
                    f"properties.{name}": float(value),
                    f"property_sources.{name}": note,
                }
                changes.append(({"_id": key}, {"$set": change}))
        for start in range(0, len(changes), _BATCH):
            with store_errors("store a property"):
                update_many(self._structures, changes[start : start + _BATCH])
        return PropertyResult([c[0]["_id"] for c in changes], unchanged, conflicts)

    def add_properties(self, key: str, properties: Mapping[str, float]) -> None:
        """Give a stored structure the numbers of another source that it lacks.

        Raises
        ------
        InputError
            If a number differs from the one that is there; nothing is changed then.
        """
        if not properties:
            return
        known = self._fields([key], ("properties",))[key]["properties"]
        differing = [
            f"{name} = {known[name]!r}, not {value!r}"
            for name, value in properties.items()
            if name in known and not _close(known[name], value)
        ]
        # In an update, a dot would mean a field inside another.
        unusable = [
            n for n in properties if n not in known and ("." in n or n[0] == "$")
        ]
        if differing or unusable:
            words = f"with {'; '.join(differing[:5])}"
            if not differing:
                words = f"without {unusable[0]!r}, which cannot be added"
            raise InputError(
                f"structure {key} is in the store {words}",
                evidence={"structure": key},
                advice="leave the number out, or give the right one by 'nanoos "
                "import-table --replace'",
            )
        new = {
            f"properties.{n}": float(v) for n, v in properties.items() if n not in known
        }
        if new:
            with store_errors("store properties"):
                self._structures.update_one({"_id": key}, {"$set": new})

    def query_keys(self, query: Mapping[str, Any]) -> list[str]:
        """Return the keys of the structures that a query finds, sorted.

        Parameters
        ----------
        query
            MongoDB query on ``formula``, ``chemical_system``, ``elements``,
            ``n_sites``, ``volume_a3``, ``label``, ``prototype``, ``sets``, ``source``
            and ``properties.<name>``, with comparisons, ``$in``, ``$nin``, ``$all``,
            ``$exists``, ``$regex``, ``$and``, ``$or`` and ``$not``.

        Raises
        ------
        InputError
            If it asks for anything else.
        """
        from pymongo.errors import OperationFailure

        _check_query(query)
        with store_errors("look for structures"):
            try:
                found = self._structures.find(dict(query), {"_id": 1})
                return sorted(document["_id"] for document in found)
            except (OperationFailure, OverflowError) as error:
                raise InputError(
                    f"the server does not understand the query: {error}",
                    evidence={"query": str(query)[:200]},
                ) from error

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

    def iterate(self, keys: Sequence[str]) -> Iterator[StoredStructure]:
        """Yield stored structures, of which some are read at a time."""
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            part = keys[start : start + _KEYS_PER_QUERY]
            yield from self.get_many(part).values()

    def formulas(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the formulas of structures by key; unknown keys are left out."""
        query = {"_id": {"$in": list(keys)}}
        with store_errors("read formulas"):
            found = self._structures.find(query, {"formula": 1})
            return {document["_id"]: document["formula"] for document in found}

    def count(self, in_set: str | None = None) -> int:
        """Return the number of structures, of one set or of all."""
        with store_errors("count structures"):
            query = {} if in_set is None else {"sets": in_set}
            return int(self._structures.count_documents(query))


def _close(a: float, b: float) -> bool:
    """Tell whether values differ by rounding alone."""
    return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-15)


def _check_query(query: Any, *, inside: bool = False) -> None:
    """Refuse fields that structures do not have, and operators that run code."""
    if not isinstance(query, Mapping):
        raise InputError(
            f"a query is a JSON object, not {type(query).__name__}",
            advice="""for example '{"elements": "Fe", "n_sites": {"$lte": 20}}'""",
        )
    for name, value in query.items():
        if name in ("$and", "$or") and not inside:
            if not isinstance(value, list) or not value:
                raise InputError(f"{name} in a query needs a list of queries")
            for part in value:
                _check_query(part)
        elif inside:
            if name not in _QUERY_OPERATORS:
                raise InputError(
                    f"a query cannot use {name!r}",
                    advice=f"operators: {', '.join(_QUERY_OPERATORS)}, $and, $or",
                )
            if name == "$not":
                _check_query(value, inside=True)
        elif name in _QUERY_FIELDS or re.fullmatch(r"properties\.\w+", name):
            if isinstance(value, Mapping):
                _check_query(value, inside=True)
        else:
            raise InputError(
                f"structures have no field {name!r}",
                advice=f"fields: {', '.join(_QUERY_FIELDS)}, properties.NAME",
            )


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
