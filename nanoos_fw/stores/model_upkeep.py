"""Upkeep of the model registry: verify weights, export, collect garbage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanoos_fw.errors import InputError, NanoOSError
from nanoos_fw.provenance import utc_now, write_json
from nanoos_fw.stores.aliases import NOTHING, AliasEntry
from nanoos_fw.stores.database import artifact_sizes, delete_artifact, store_errors
from nanoos_fw.stores.models import ModelRecord, ModelRegistry

WEIGHTS_FILE = "weights.safetensors"
RECORD_FILE = "model.json"


@dataclass(frozen=True)
class Check:
    """What the verification of a version found.

    Parameters
    ----------
    reference
        The version.
    status
        ``ok``, ``no weights`` (declared or removed) or ``broken``.
    problem
        Why, unless it is ok.
    """

    reference: str
    status: str
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the check as JSON-compatible values."""
        return asdict(self)


@dataclass(frozen=True)
class Garbage:
    """A version whose weights nothing needs, or why they are kept.

    Parameters
    ----------
    reference
        The version.
    kept
        Reasons; without any the weights can be removed.
    bytes
        What removing them frees: artifacts that no other version uses.
    """

    reference: str
    kept: tuple[str, ...]
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON-compatible values."""
        return {**asdict(self), "kept": list(self.kept)}


def verify_models(
    registry: ModelRegistry, records: Iterable[ModelRecord]
) -> list[Check]:
    """Read the weights of versions, every byte, and compare their checksums."""
    checks = []
    for record in records:
        if not record.has_weights:
            reason = f"removed {record.removed}" if record.removed else "none installed"
            checks.append(Check(record.reference, "no weights", reason))
            continue
        try:
            registry.read_weights(record)
        except NanoOSError as error:
            checks.append(Check(record.reference, "broken", str(error)))
        else:
            checks.append(Check(record.reference, "ok"))
    return checks


def export_model(
    registry: ModelRegistry, record: ModelRecord, directory: Path
) -> list[Path]:
    """Write weights and record of a version into a folder, and return the files."""
    weights = registry.write_weights(record, directory / WEIGHTS_FILE)
    described = directory / RECORD_FILE
    history = [entry.to_dict() for entry in registry.history(record.name)]
    write_json(described, {**record.to_dict(), "alias_history": history})
    return [weights, described]


def find_garbage(database: Any, *, keep: int | None = None) -> list[Garbage]:
    """Return all versions with weights in the database, and why they are kept.

    A version is kept if an alias points at it, or pointed at it before, a campaign
    or a search names it, predictions were made with it, a version that has weights
    was trained from it, or it is system-provided. Weights in files of the user are
    never touched.

    Parameters
    ----------
    database
        Of ``open_database``.
    keep
        Of each alias, how many versions before the current one stay for a rollback;
        None for all.

    Raises
    ------
    InputError
        If ``keep`` is negative.
    """
    if keep is not None and keep < 0:
        raise InputError(f"keep must not be negative: {keep}")
    registry = ModelRegistry(database)
    records = registry.list_models()
    reasons = _reasons(database, registry, records, keep)
    living = [r for r in records if r.has_weights and r.storage == "gridfs"]
    users: dict[str, set[str]] = defaultdict(set)
    for record in living:
        for digest in _artifacts(record):
            users[digest].add(record.reference)
    sizes = artifact_sizes(database, list(users))
    found = []
    for record in records:
        if not record.has_weights:
            continue
        own = [d for d in _artifacts(record) if users[d] == {record.reference}]
        freed = sum(sizes.get(digest, 0) for digest in own)
        kept = list(reasons[record.reference])
        if record.storage == "file":
            kept.append("its weights are a file outside the database")
        found.append(Garbage(record.reference, tuple(kept), freed))
    return found


def collect_garbage(database: Any, *, keep: int | None = None) -> list[Garbage]:
    """Remove the weights that nothing needs, and return whose they were.

    The versions stay, without weights: a number once used never means something
    else. Training the same again registers a new version.
    """
    removed = []
    for garbage in find_garbage(database, keep=keep):
        if garbage.kept:
            continue
        record = ModelRegistry(database).get(garbage.reference)
        # First the mark, under the condition that nothing has changed: whoever comes
        # now finds no weights and says so, rather than a version that breaks later.
        with store_errors(f"remove the weights of {record.reference}"):
            marked = database["models"].update_one(
                {"_id": record.reference, "removed": None},
                {
                    "$set": {
                        "removed": utc_now(),
                        "training_key": (
                            f"{record.training_key}/removed/{record.reference}"
                        ),
                    }
                },
            )
        if not marked.modified_count:
            continue
        again = reasons_to_keep(database, record, keep)
        if again:  # an alias or a campaign came between look and mark
            with store_errors(f"keep the weights of {record.reference}"):
                database["models"].update_one(
                    {"_id": record.reference},
                    {"$set": {"removed": None, "training_key": record.training_key}},
                )
            continue
        for digest in _artifacts(record):
            if not _used(database, digest):
                delete_artifact(database, digest)
        removed.append(garbage)
    return removed


def reasons_to_keep(database: Any, record: ModelRecord, keep: int | None) -> list[str]:
    """Return why a version is to be kept, as things are now."""
    registry = ModelRegistry(database)
    return _reasons(database, registry, registry.list_models(), keep)[record.reference]


# ------------------------------------------------------------------------- private


def _artifacts(record: ModelRecord) -> list[str]:
    """Return the artifacts that a version alone could need, weights first."""
    found = [record.sha256 if record.storage == "gridfs" else None, record.details]
    return [digest for digest in found if digest]


def _used(database: Any, digest: str) -> bool:
    """Tell whether any document with artifacts names this one."""
    queries = {
        "models": {
            "removed": None,
            "$or": [{"sha256": digest, "storage": "gridfs"}, {"details": digest}],
        },
        "structure_features": {"artifact": True, "sha256": digest},
    }
    with store_errors(f"look who uses artifact {digest[:12]}"):
        return any(
            database[collection].find_one(query, {"_id": 1}) is not None
            for collection, query in queries.items()
        )


def _reasons(
    database: Any,
    registry: ModelRegistry,
    records: list[ModelRecord],
    keep: int | None,
) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for reference, reason in (
        *_of_aliases(registry, records, keep),
        *_of_documents(database),
    ):
        reasons[reference].append(reason)
    for record in records:
        if record.parent and record.removed is None:
            reasons[record.parent].append(f"parent of {record.reference}")
        if record.is_system_provided:
            reasons[record.reference].append("system-provided")
        if registry.n_predictions(record.reference):
            reasons[record.reference].append("predictions")
    return reasons


def _of_aliases(
    registry: ModelRegistry, records: list[ModelRecord], keep: int | None
) -> Iterator[tuple[str, str]]:
    for name in sorted({record.name for record in records}):
        by_alias: dict[str, list[AliasEntry]] = defaultdict(list)
        for entry in registry.history(name):
            by_alias[entry.alias].append(entry)
        for alias, history in by_alias.items():
            for place, version in enumerate(_newest_first(history)):
                if place == 0 and version == history[-1].version:
                    yield f"{name}@{version}", f"alias {alias!r}"
                elif keep is None or place <= keep:
                    yield f"{name}@{version}", f"rollback of alias {alias!r}"


def _of_documents(database: Any) -> Iterator[tuple[str, str]]:
    with store_errors("look who uses the models"):
        for campaign in database["campaigns"].find({}, {"outputs.model": 1}):
            model = campaign.get("outputs", {}).get("model")
            if model:
                yield model, f"campaign {campaign['_id']!r}"
        for search in database["searches"].find({}, {"model": 1}):
            if search.get("model"):
                yield search["model"], f"search {search['_id']!r}"


def _newest_first(history: list[AliasEntry]) -> list[int]:
    """Return the versions of a history, each once, the last used one first."""
    versions = [e.version for e in reversed(history) if e.version != NOTHING]
    return list(dict.fromkeys(versions))
