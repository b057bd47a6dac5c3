"""What nothing needs any more: ``nanoos gc`` says what it is, and removes it if asked.

Kept is all that a registered model, a dataset, a simulation, a campaign or a launch in
the launchpad refers to, and all that is younger than ``older_than``: what is being
written just now has no reference yet. What is removed is written into the journal (the
collection ``gc_journal``) before: the journal is the tombstone, and a removal that was
killed is finished by the next one.
"""

from __future__ import annotations

import getpass
import gzip
import json
import logging
import re
import shutil
import socket
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from nanoos_fw.errors import InputError
from nanoos_fw.provenance import sha256_bytes, utc_now
from nanoos_fw.stores.artifact_upkeep import (
    remove_parts,
    remove_unreferenced,
    unfinished_parts,
    unreferenced,
)
from nanoos_fw.stores.database import store_errors

logger = logging.getLogger(__name__)

KINDS = ("launches", "artifacts", "parts", "actions", "features")
# Whatever is asked for: longer than any process takes from bytes to their document.
MIN_AGE = timedelta(hours=1)
JOURNAL = "gc_journal"
# What FireWorks calls the folders that it makes for launches.
_LAUNCH_DIR = re.compile(r"launcher_\d")
_TAKEN = ".nanoos-gc-"
_CHUNK_BYTES = 255 * 1024  # of GridFS: a part has so many bytes at most


@dataclass(frozen=True)
class Waste:
    """Something that nothing needs.

    Parameters
    ----------
    kind
        One of ``KINDS``.
    what
        Folder, digest, id, or feature version.
    why
        In words.
    bytes
        What removing it frees, on disk or in the database.
    items
        How many launch directories, artifacts or entries it stands for.
    """

    kind: str
    what: str
    why: str
    bytes: int
    items: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON-compatible values."""
        return asdict(self)


@dataclass
class Collected:
    """What was found, or removed; and what looks like waste and is kept.

    Parameters
    ----------
    batch
        Of the journal; None if nothing was removed.
    """

    waste: list[Waste] = field(default_factory=list)
    kept: list[Waste] = field(default_factory=list)
    batch: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all waste."""
        return sum(entry.bytes for entry in self.waste)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return {
            "dry_run": self.batch is None,
            "batch": self.batch,
            "bytes": self.bytes,
            "waste": [entry.to_dict() for entry in self.waste],
            "kept": [entry.to_dict() for entry in self.kept],
        }


def collect_waste(
    database: Any,
    *,
    remove: bool = False,
    older_than: timedelta = timedelta(days=7),
    kinds: Collection[str] = KINDS,
    now: datetime | None = None,
) -> Collected:
    """Find what nothing needs, and remove it if asked.

    Any number of these may run at once, beside any work: each removal is decided by the
    database or the file system, and counts where it was done.

    Parameters
    ----------
    database
        Of ``open_database``.
    remove
        Remove it; otherwise nothing is changed.
    older_than
        Age that makes waste; ``MIN_AGE`` at least.
    kinds
        Some of ``KINDS``.

    Raises
    ------
    InputError
        If a kind is unknown, or the age too low.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise InputError(
            f"no kind of waste {', '.join(sorted(unknown))}",
            advice=f"kinds: {', '.join(KINDS)}",
        )
    if older_than < MIN_AGE:
        raise InputError(
            f"an age of {older_than} is too low: results that are being written have "
            "no reference yet",
            advice=f"give at least {MIN_AGE}",
        )
    time = now or datetime.now(UTC)
    before = time - older_than
    found = Collected()
    if remove:
        found.batch = f"{utc_now()}-{getpass.getuser()}"
        _finish_folders(database)
    for kind in KINDS:
        if kind not in kinds:
            continue
        for entry, kept in _FINDERS[kind](database, before):
            if kept:
                found.kept.append(entry)
            elif found.batch is None or _removed(database, entry, found.batch, before):
                found.waste.append(entry)
    return found


def _removed(database: Any, entry: Waste, batch: str, before: datetime) -> bool:
    row = {
        **entry.to_dict(),
        "batch": batch,
        "time": utc_now(),
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "state": "begun",
    }
    with store_errors("write the journal"):
        key = {"_id": database[JOURNAL].insert_one(row).inserted_id}
    done = _REMOVERS[entry.kind](database, entry, before)
    with store_errors("write the journal"):
        if done:
            database[JOURNAL].update_one(key, {"$set": {"state": "removed"}})
        else:  # it was needed again, or another process was faster
            database[JOURNAL].delete_one(key)
    return done


def journal(database: Any, limit: int = 20) -> list[dict[str, Any]]:
    """Return the last batches: when, by whom, how much of each kind."""
    with store_errors("read the journal"):
        rows = database[JOURNAL].aggregate(
            [
                {"$match": {"state": "removed"}},
                {
                    "$group": {
                        "_id": {"batch": "$batch", "kind": "$kind"},
                        "items": {"$sum": "$items"},
                        "bytes": {"$sum": "$bytes"},
                    }
                },
            ]
        )
        batches: dict[str, dict[str, Any]] = {}
        for row in rows:
            batch = batches.setdefault(row["_id"]["batch"], {"bytes": 0, "kinds": {}})
            batch["bytes"] += row["bytes"]
            batch["kinds"][row["_id"]["kind"]] = row["items"]
    return [{"batch": b, **batches[b]} for b in sorted(batches, reverse=True)[:limit]]


_Found = Iterator[tuple[Waste, bool]]


# ------------------------------------------------------------------ launch directories


def _find_launches(database: Any, before: datetime) -> _Found:
    """Yield launch directories of archived campaigns, as their archives name them."""
    with store_errors("look for archives"):
        archived = [
            (document["_id"], record)
            for document in database["campaigns"].find(
                {"archive.file": {"$exists": True}}, {"archive": 1}
            )
            for record in (*document["archive"].get("earlier", ()), document["archive"])
        ]
    needed: set[str] | None = None
    for campaign, record in archived:
        why = f"launch directory of campaign {campaign!r}, archived {record['time']}"
        if _time(record["time"]) >= before:
            continue
        try:
            named = _launch_dirs(Path(record["file"]), record["sha256"])
        except (OSError, ValueError) as error:
            logger.warning("the archive of campaign %r: %s", campaign, error)
            kept = Waste("launches", record["file"], f"cannot be read: {error}", 0, 0)
            yield kept, True
            continue
        there = [path for path in named if path.is_dir() and not path.is_symlink()]
        if not there:
            continue
        if needed is None:
            needed = _needed_paths(database)
        live = _live(database, there)
        for path in there:
            bytes_, newest, nested = _measure(path)
            reason = ""
            if not _LAUNCH_DIR.match(path.name):
                reason = "not a folder that FireWorks has made"
            elif str(path) in needed or str(path.resolve()) in needed:
                reason = "results that are in use are in it"
            elif str(path) in live:
                reason = "a launch in the launchpad uses it"
            elif nested:
                reason = f"another launch is in it: {nested}"
            elif newest >= before.timestamp():
                reason = "a file in it is younger"
            yield (
                Waste("launches", str(path), reason or why, bytes_),
                bool(reason),
            )


def _launch_dirs(file: Path, sha256: str) -> list[Path]:
    data = file.read_bytes()
    if sha256_bytes(data) != sha256:
        raise ValueError(f"{file} is not what was archived")
    found: dict[Path, None] = {}
    for line in gzip.decompress(data).decode().splitlines():
        row = json.loads(line)
        if row["collection"] == "launches":
            path = Path(row["document"].get("launch_dir") or "")
            if path.is_absolute():
                found[path] = None
    return sorted(found)


def _needed_paths(database: Any) -> set[str]:
    """Return all paths that stored results name, and all folders these are in."""
    found: set[str] = set()
    sources: tuple[tuple[str, Mapping[str, int]], ...] = (
        ("simulations", {"files": 1}),
        ("campaigns", {"plan": 1, "outputs": 1, "archive": 1}),
        ("models", {}),
        ("searches", {}),
        ("screens", {}),
    )
    with store_errors("look for paths in use"):
        for name, fields in sources:
            for document in database[name].find({}, fields or None):
                for text in _texts(document):
                    if text.startswith("/") and text not in found:
                        path = Path(text)
                        found.update(map(str, (path, *path.parents)))
                        found.update(map(str, path.resolve().parents))
    return found


def _texts(value: Any) -> Iterator[str]:
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item


def _live(database: Any, paths: Iterable[Path]) -> set[str]:
    """Return those that a launch in the launchpad has, also of other campaigns."""
    query = {"launch_dir": {"$in": [str(path) for path in paths]}}
    with store_errors("look for launches"):
        return {
            document["launch_dir"]
            for document in database["launches"].find(query, {"launch_dir": 1})
        }


def _measure(folder: Path) -> tuple[int, float, str]:
    """Return bytes, time of the newest file, and a launch directory inside, if any."""
    bytes_, newest, nested = 0, folder.stat().st_mtime, ""
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        newest = max(newest, status.st_mtime)
        if path.is_symlink() or not path.is_dir():
            bytes_ += status.st_size
        elif _LAUNCH_DIR.match(path.name):
            nested = path.name
    return bytes_, newest, nested


def _remove_launch(database: Any, entry: Waste, before: datetime) -> bool:
    path = Path(entry.what)
    taken = path.with_name(f"{_TAKEN}{path.name}")
    if _live(database, [path]):
        return False
    try:
        path.rename(taken)  # of several processes one has it
    except OSError as error:
        logger.warning("%s stays: %s", path, error.strerror)
        return False
    shutil.rmtree(taken, ignore_errors=True)
    return not taken.exists()


def _finish_folders(database: Any) -> None:
    """Remove the rest of folders whose removal was killed."""
    with store_errors("read the journal"):
        begun = database[JOURNAL].find({"kind": "launches", "state": "begun"})
        for row in list(begun):
            path = Path(row["what"])
            taken = path.with_name(f"{_TAKEN}{path.name}")
            if row["host"] == socket.gethostname() and taken.exists():
                shutil.rmtree(taken, ignore_errors=True)
                database[JOURNAL].update_one(
                    {"_id": row["_id"]}, {"$set": {"state": "removed"}}
                )


# ------------------------------------------------------------------------ the database


def _find_artifacts(database: Any, before: datetime) -> _Found:
    for digest, bytes_ in unreferenced(database, before).items():
        yield Waste("artifacts", digest, "no document refers to it", bytes_), False


def _remove_artifact(database: Any, entry: Waste, before: datetime) -> bool:
    return remove_unreferenced(database, entry.what, before)


def _find_parts(database: Any, before: datetime) -> _Found:
    for file_id, parts in unfinished_parts(database, before).items():
        why = f"{parts} parts of an artifact whose storing was killed"
        yield Waste("parts", str(file_id), why, parts * _CHUNK_BYTES, parts), False


def _remove_parts(database: Any, entry: Waste, before: datetime) -> bool:
    from bson import ObjectId

    return remove_parts(database, ObjectId(entry.what)) > 0


def _find_actions(database: Any, before: datetime) -> _Found:
    """Yield what FireWorks keeps in GridFS for launches that are gone."""
    with store_errors("look for actions of launches"):
        files = list(
            database["fw_gridfs.files"].find(
                {"uploadDate": {"$lt": before}},
                {"metadata.launch_id": 1, "length": 1},
            )
        )
        ids = [entry.get("metadata", {}).get("launch_id") for entry in files]
        there = {
            launch["launch_id"]
            for launch in database["launches"].find(
                {"launch_id": {"$in": ids}}, {"launch_id": 1}
            )
        }
    for entry, launch_id in zip(files, ids, strict=True):
        if launch_id is not None and launch_id not in there:
            why = f"action of launch {launch_id}, which is not in the launchpad"
            yield Waste("actions", str(entry["_id"]), why, int(entry["length"])), False


def _remove_action(database: Any, entry: Waste, before: datetime) -> bool:
    import gridfs
    from bson import ObjectId

    with store_errors("remove an action"):
        file_id = ObjectId(entry.what)
        known = database["fw_gridfs.files"].find_one({"_id": file_id}) is not None
        gridfs.GridFS(database, "fw_gridfs").delete(file_id)
    return known


def _find_features(database: Any, before: datetime) -> _Found:
    """Yield features of older versions, which no code of this release reads."""
    from nanoos_fw.ml.features import FEATURE_VERSION

    with store_errors("look for features of older versions"):
        rows = list(
            database["structure_features"].aggregate(
                [
                    {"$match": _old_features(FEATURE_VERSION, before)},
                    {
                        "$group": {
                            "_id": "$version",
                            "entries": {"$sum": 1},
                            "bytes": {"$sum": {"$ifNull": ["$size", 0]}},
                        }
                    },
                ]
            )
        )
    for row in sorted(rows, key=lambda row: row["_id"]):
        why = f"this release computes version {FEATURE_VERSION}"
        yield (
            Waste("features", str(row["_id"]), why, row["bytes"], row["entries"]),
            False,
        )


def _old_features(version: int, before: datetime) -> dict[str, Any]:
    return {"version": {"$lt": version}, "computed": {"$lt": before.isoformat()}}


def _remove_features(database: Any, entry: Waste, before: datetime) -> bool:
    # Their artifacts have no reference then, and go with the next collection.
    query = {**_old_features(int(entry.what) + 1, before), "version": int(entry.what)}
    with store_errors("remove features"):
        return bool(database["structure_features"].delete_many(query).deleted_count)


_FINDERS = {
    "launches": _find_launches,
    "artifacts": _find_artifacts,
    "parts": _find_parts,
    "actions": _find_actions,
    "features": _find_features,
}
_REMOVERS = {
    "launches": _remove_launch,
    "artifacts": _remove_artifact,
    "parts": _remove_parts,
    "actions": _remove_action,
    "features": _remove_features,
}


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def by_kind(waste: Iterable[Waste]) -> dict[str, int]:
    """Return the number of items by kind."""
    found: Counter[str] = Counter()
    for entry in waste:
        found[entry.kind] += entry.items
    return dict(found)
