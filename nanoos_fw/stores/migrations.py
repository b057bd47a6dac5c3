"""Schema versions of the database: one step up and one step down each.

Every step can be repeated, and a step that was killed half-way is finished by running
it again: the version is written after the last document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanoos_fw.errors import InputError, StoreError
from nanoos_fw.stores.database import (
    INDEXES,
    SCHEMA_VERSION,
    ensure_indexes,
    get_artifact,
    put_artifact,
    schema_version,
    set_schema_version,
    store_errors,
)
from nanoos_fw.stores.models import ModelRegistry
from nanoos_fw.stores.system_models import declare_system_models

_MAX_INLINE_BYTES = 15_000_000  # of a document's 16 MB


@dataclass(frozen=True)
class Migration:
    """One step between two schema versions.

    Parameters
    ----------
    version
        Of the schema above the step.
    title
        What it changes, for people.
    pending_up, pending_down
        Number of documents that the step would change.
    up, down
        Make the step and return how many documents changed.
    """

    version: int
    title: str
    pending_up: Callable[[Any], int]
    up: Callable[[Any], int]
    pending_down: Callable[[Any], int]
    down: Callable[[Any], int]


@dataclass(frozen=True)
class Step:
    """A migration as it was, or would be, made."""

    source: int
    target: int
    title: str
    documents: int

    def to_dict(self) -> dict[str, Any]:
        """Return the step as JSON-compatible values."""
        return {
            "from": self.source,
            "to": self.target,
            "title": self.title,
            "documents": self.documents,
        }


# ---------------------------------------------------------------- 1 <-> 2: features

_FEATURES = "structure_features"
_NEW_FIELDS = ("artifact", "size", "described", "computed")
# Not taken from INDEXES, which is of the newest version.
_NEW_INDEXES = (("parameters", "version", "status"), ("version",))


def _features_pending_up(database: Any) -> int:
    return int(database[_FEATURES].count_documents({"artifact": {"$exists": False}}))


def _features_up(database: Any) -> int:
    collection, changed = database[_FEATURES], 0
    for fields in _NEW_INDEXES:
        collection.create_index([(name, 1) for name in fields])
    for document in collection.find({"artifact": {"$exists": False}}, {"graph": 1}):
        graph = document["graph"]
        # When and with which parameters in clear is not known of old entries.
        added = {
            "artifact": False,
            "size": 0 if graph is None else len(graph),
            "described": None,
            "computed": None,
        }
        collection.update_one({"_id": document["_id"]}, {"$set": added})
        changed += 1
    return changed


def _features_pending_down(database: Any) -> int:
    return int(database[_FEATURES].count_documents({"artifact": {"$exists": True}}))


def _features_down(database: Any) -> int:
    collection, changed = database[_FEATURES], 0
    unset = {"$unset": dict.fromkeys(_NEW_FIELDS, "")}
    for document in collection.find({"artifact": {"$exists": True}}, {"graph": 0}):
        query = {"_id": document["_id"]}
        if not document["artifact"]:
            collection.update_one(query, unset)
        elif document["size"] <= _MAX_INLINE_BYTES:
            graph = get_artifact(database, document["sha256"])
            collection.update_one(query, {"$set": {"graph": graph}, **unset})
        else:  # schema 1 has no place for it: to be computed again
            collection.delete_one(query)
        changed += 1
    names = {tuple(n for n, _ in i["key"]): name for name, i in _indexes(collection)}
    for fields in _NEW_INDEXES:
        if fields in names:
            collection.drop_index(names[fields])
    return changed


# ------------------------------------------------------------------ 2 <-> 3: models

_MODELS = "models"
_DECLARED = {"version": 0}  # names of system models: schema 2 has no place for them
_MODEL_FIELDS = {"storage": "gridfs", "removed": None}


def _models_pending_up(database: Any) -> int:
    return int(database[_MODELS].count_documents({"storage": {"$exists": False}}))


def _models_up(database: Any) -> int:
    changed = database[_MODELS].update_many(
        {"storage": {"$exists": False}}, {"$set": _MODEL_FIELDS}
    )
    declare_system_models(database)
    return int(changed.modified_count)


def _models_pending_down(database: Any) -> int:
    return int(database[_MODELS].count_documents({"storage": {"$exists": True}}))


def _models_down(database: Any) -> int:
    # Schema 2 reads weights from the artifacts only. Weights in files of the user go
    # there first, verified; versions whose weights are gone stay as they are.
    registry = ModelRegistry(database)
    for document in list(database[_MODELS].find({"storage": "file", "removed": None})):
        record = registry.get(document["_id"])
        put_artifact(database, registry.read_weights(record))
    declared = database[_MODELS].delete_many(_DECLARED).deleted_count
    changed = database[_MODELS].update_many(
        {"storage": {"$exists": True}}, {"$unset": dict.fromkeys(_MODEL_FIELDS, "")}
    )
    return int(declared + changed.modified_count)


MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        version=2,
        title="feature entries know size, time, parameters, and their artifact",
        pending_up=_features_pending_up,
        up=_features_up,
        pending_down=_features_pending_down,
        down=_features_down,
    ),
    Migration(
        version=3,
        title="models know where their weights are; the system models are declared",
        pending_up=_models_pending_up,
        up=_models_up,
        pending_down=_models_pending_down,
        down=_models_down,
    ),
)
"""All steps from schema 1 on, in order."""


# ------------------------------------------------------------------------ the steps


def migrate(
    database: Any, *, target: int = SCHEMA_VERSION, dry_run: bool = False
) -> list[Step]:
    """Bring the database to a schema version, up or down.

    Parameters
    ----------
    database
        The launchpad's database.
    target
        1 to ``SCHEMA_VERSION``.
    dry_run
        Count what would change, and write nothing.

    Returns
    -------
    list of Step
        In the order made; empty if there is nothing to do.

    Raises
    ------
    InputError
        If there is no such version.
    StoreError
        If the database is of a newer release.
    """
    if not 1 <= target <= SCHEMA_VERSION:
        raise InputError(
            f"there is no schema {target}",
            advice=f"this release knows 1 to {SCHEMA_VERSION}",
        )
    with store_errors("migrate the database"):
        version = schema_version(database)
        if version is None:  # nothing of ours is there yet
            version = SCHEMA_VERSION if not dry_run else target
            if not dry_run:
                ensure_indexes(database)
                set_schema_version(database, version)
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"the database has schema {version}, this release knows "
                f"{SCHEMA_VERSION}",
                advice="migrate it down with the release that made it",
            )
        steps = []
        while version != target:
            step = _step(database, version, up=version < target, dry_run=dry_run)
            steps.append(step)
            version = step.target
            if not dry_run:
                set_schema_version(database, version)
        if not dry_run and version == SCHEMA_VERSION:
            ensure_indexes(database)
    return steps


def _step(database: Any, version: int, *, up: bool, dry_run: bool) -> Step:
    wanted = version + 1 if up else version
    migration = next(m for m in MIGRATIONS if m.version == wanted)
    if dry_run:
        work = migration.pending_up if up else migration.pending_down
    else:
        work = migration.up if up else migration.down
    target = version + 1 if up else version - 1
    return Step(version, target, migration.title, work(database))


def database_status(database: Any) -> dict[str, Any]:
    """Return schema, steps to make, documents and missing indexes of the stores."""
    with store_errors("look at the database"):
        version = schema_version(database)
        missing = [
            f"{collection}({', '.join(fields)})"
            for collection, indexes in INDEXES.items()
            for fields, _ in indexes
            if fields not in _fields_of_indexes(database[collection])
        ]
        counts = {name: database[name].count_documents({}) for name in INDEXES}
    pending: list[dict[str, Any]] = []
    if version is not None and version < SCHEMA_VERSION:
        pending = [step.to_dict() for step in migrate(database, dry_run=True)]
    return {
        "schema": version,
        "known_schema": SCHEMA_VERSION,
        "pending": pending,
        "documents": counts,
        "missing_indexes": missing,
    }


def _fields_of_indexes(collection: Any) -> set[tuple[str, ...]]:
    return {
        tuple(name for name, _ in index["key"]) for _, index in _indexes(collection)
    }


def _indexes(collection: Any) -> list[tuple[str, Any]]:
    return list(collection.index_information().items())
