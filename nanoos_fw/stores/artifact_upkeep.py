"""Artifacts that nothing refers to any more: find them, remove them safely.

A reference is any text in the database that is the digest of an artifact, in whatever
field: a new kind of document cannot be forgotten here. Only collections of very many
documents that hold none, or one in a known field, are not read whole.

Whoever stores bytes that are there already touches their entry (``put_artifact``), and
the document that refers to them follows at once. So an entry that is removed only if it
was not touched for longer than that can take has no document on its way to it; the
condition is part of the deletion, which the database decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from bson import ObjectId

from nanoos_fw.stores.database import ARTIFACTS, store_errors

_DIGEST = re.compile(r"[0-9a-f]{64}")
# Without references, or with one in a known field; a line for each document otherwise.
_NONE = frozenset(
    {
        "structures",
        "predictions",
        "screen_chunks",
        "workflows",
        "gc_journal",
        f"{ARTIFACTS}.files",
        f"{ARTIFACTS}.chunks",
        "fw_gridfs.chunks",
    }
)
_ONE: Mapping[str, tuple[dict[str, Any], dict[str, int]]] = {
    "structure_features": ({"artifact": True}, {"sha256": 1}),
}


def unreferenced(database: Any, before: datetime) -> dict[str, int]:
    """Return the bytes of artifacts that nothing refers to, by digest.

    Parameters
    ----------
    before
        Only what was stored, and touched last, before.
    """
    with store_errors("look for artifacts"):
        found = {
            entry["filename"]: int(entry["length"])
            for entry in database[f"{ARTIFACTS}.files"].find(
                _untouched(before), {"filename": 1, "length": 1}
            )
        }
        if found:
            for digest in _references(database, before):
                found.pop(digest, None)
                if not found:
                    break
    return found


def _untouched(before: datetime) -> dict[str, Any]:
    return {
        "uploadDate": {"$lt": before},
        "$or": [{"touched": {"$exists": False}}, {"touched": {"$lt": before}}],
    }


def _references(database: Any, before: datetime) -> Iterator[str]:
    for name in database.list_collection_names():
        if name in _NONE or name.startswith("system."):
            continue
        query, fields = _ONE.get(name, ({}, None))
        for document in database[name].find(query, fields):
            if name == "models" and _removed(document, before):
                continue  # only the number stays, as a tombstone
            yield from _digests(document)


def _removed(document: Mapping[str, Any], before: datetime) -> bool:
    """Tell whether a model's weights were removed so long ago that it is final."""
    when = document.get("removed")
    if not isinstance(when, str):
        return False
    time = datetime.fromisoformat(when)
    return (time if time.tzinfo else time.replace(tzinfo=UTC)) < before


def _digests(value: Any) -> Iterator[str]:
    """Yield all digests in a document, also where they are a part of a longer text."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            if len(item) >= 64:
                yield from _DIGEST.findall(item)
        elif isinstance(item, Mapping):
            todo += item.keys()
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item


def remove_unreferenced(database: Any, digest: str, before: datetime) -> bool:
    """Remove an artifact unless it was touched meanwhile; return whether it was.

    Its entry goes first: from then on it does not exist, and whoever stores the same
    bytes writes them anew.
    """
    with store_errors(f"remove artifact {digest[:12]}"):
        entry = database[f"{ARTIFACTS}.files"].find_one_and_delete(
            {"filename": digest, **_untouched(before)}
        )
        if entry is None:
            return False
        database[f"{ARTIFACTS}.chunks"].delete_many({"files_id": entry["_id"]})
    return True


def unfinished_parts(database: Any, before: datetime) -> dict[Any, int]:
    """Return the number of parts without an entry, by the id the entry would have.

    A process that is killed while it stores an artifact leaves them.
    """
    oldest = ObjectId.from_datetime(before)
    with store_errors("look for parts of artifacts"):
        counts = {
            row["_id"]: int(row["parts"])
            for row in database[f"{ARTIFACTS}.chunks"].aggregate(
                [
                    {"$match": {"files_id": {"$lt": oldest}}},
                    {"$group": {"_id": "$files_id", "parts": {"$sum": 1}}},
                ]
            )
        }
        for known in _known_files(database, counts):
            counts.pop(known, None)
    return counts


def _known_files(database: Any, ids: Iterable[Any]) -> Iterator[Any]:
    wanted = list(ids)
    for first in range(0, len(wanted), 5000):
        query = {"_id": {"$in": wanted[first : first + 5000]}}
        for entry in database[f"{ARTIFACTS}.files"].find(query, {"_id": 1}):
            yield entry["_id"]


def remove_parts(database: Any, file_id: Any) -> int:
    """Remove parts without an entry; return how many."""
    with store_errors("remove parts of an artifact"):
        if database[f"{ARTIFACTS}.files"].find_one({"_id": file_id}) is not None:
            return 0
        chunks = database[f"{ARTIFACTS}.chunks"]
        return int(chunks.delete_many({"files_id": file_id}).deleted_count)
