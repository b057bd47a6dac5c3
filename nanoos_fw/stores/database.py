"""The connection, the indexes and the binary artifacts: one place for each.

The stores live in the database of the user's own LaunchPad, beside ``fireworks``,
``launches`` and ``workflows``: one ``my_launchpad.yaml`` is all a campaign needs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from nanoos_fw.errors import (
    CorruptArtifactError,
    InputError,
    StoreError,
)
from nanoos_fw.provenance import sha256_bytes
from nanoos_fw.stores.embedded import EMBEDDED_VARIABLE, embedded_file, load_embedded
from nanoos_fw.stores.outages import is_outage
from nanoos_fw.stores.system_models import declare_system_models

SCHEMA_VERSION = 3
_SELECTION_TIMEOUT_MS = 10_000
ARTIFACTS = "artifacts"
_PUT_TRIES = 5
_DUPLICATE = 11000  # MongoDB's error code of a unique key that is there
_LONGEST_PAUSE_S = 30.0
_T = TypeVar("_T")

logger = logging.getLogger(__name__)

# Collection -> indexes: (fields, unique). All unique keys are content keys or names,
# so the database decides every race.
INDEXES: dict[str, tuple[tuple[tuple[str, ...], bool], ...]] = {
    "structures": ((("sets",), False), (("chemical_system",), False)),
    "structure_features": (
        (("structure", "parameters", "version"), True),
        (("parameters", "version", "status"), False),
        (("version",), False),
    ),
    "simulations": ((("structure", "method"), False),),
    "models": (
        (("name", "version"), True),
        (("training_key",), True),
        (("target",), False),
    ),
    "model_aliases": ((("name", "alias", "sequence"), True),),
    "predictions": ((("model", "structure"), True), (("model", "prediction"), False)),
    "screens": (),
    "screen_chunks": (),
    "active_rounds": ((("campaign",), False),),
    "campaigns": (),
    "searches": (),
    "trials": ((("search", "number"), True),),
    "launch_places": ((("fw_id",), False),),
    "stale_locks": (),
    "reruns": ((("fw_id",), False), (("batch",), False)),
    "artifacts.files": ((("filename",), True),),
    "gc_journal": ((("what",), False), (("batch",), False)),
}


def load_launchpad(path: Path | None) -> Any:
    """Return the user's LaunchPad.

    Parameters
    ----------
    path
        ``my_launchpad.yaml``, or None for the one FireWorks finds by its own rules
        (``FW_config.yaml``, ``~/.fireworks``, ``$FW_CONFIG_FILE``).

    Raises
    ------
    InputError
        If the file is missing or its content makes no connection (a port that is no
        number, an unknown option).
    StoreError
        If the server cannot be reached.
    """
    from fireworks import fw_config
    from fireworks.core.launchpad import LaunchPad
    from pymongo.errors import ConfigurationError, InvalidURI

    embedded = embedded_file()  # set by FireWorks, too, from a FW_config.yaml
    if embedded is not None:
        if path is not None:
            raise InputError(
                f"{path} cannot be used: FireWorks is configured for the embedded "
                f"database {embedded}",
                advice=f"leave the folder of that FW_config.yaml, or unset "
                f"{EMBEDDED_VARIABLE}",
            )
        return load_embedded(embedded)
    location = path or fw_config.LAUNCHPAD_LOC
    if location is None:
        raise InputError(
            "no my_launchpad.yaml was found",
            advice=(
                "run 'lpad init', or pass -l my_launchpad.yaml, or set "
                "NANO_OS_LAUNCHPAD"
            ),
        )
    data = _read_launchpad_file(Path(location))
    options = dict(data.get("mongoclient_kwargs") or {})
    host = str(data.setdefault("host", "localhost"))
    # An option given to the client would beat the same one in the user's URI.
    if "serverselectiontimeoutms" not in host.lower():
        options.setdefault("serverSelectionTimeoutMS", _SELECTION_TIMEOUT_MS)
    data["mongoclient_kwargs"] = options
    data.setdefault("strm_lvl", "WARNING")
    port = data.get("port")
    if isinstance(port, int) and not 0 < port < 65536:
        raise InputError(f"{location}: port {port} is not between 1 and 65535")
    try:
        launchpad = LaunchPad.from_dict(data)
    except (ConfigurationError, InvalidURI, TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"{location} describes no database connection: {error}",
            evidence={
                "host": redacted(host),
                "port": data.get("port"),
            },
            advice="check host, port and name; 'lpad init' writes a valid file",
        ) from error
    try:
        check_connection(launchpad)
    except StoreError:
        launchpad.connection.close()
        raise
    return launchpad


def check_connection(launchpad: Any) -> None:
    """Ask the server for an answer.

    Raises
    ------
    StoreError
        If none comes; names the server, without its password.
    """
    from pymongo.errors import PyMongoError

    try:
        launchpad.connection.admin.command("ping")
    except PyMongoError as error:
        where = redacted(str(launchpad.host))
        if not launchpad.uri_mode:
            where += f":{launchpad.port}"
        raise StoreError(
            f"no answer from the MongoDB server at {where}",
            evidence={"error": str(error)[:300]},
            advice="check that it runs and that this machine may reach it",
        ) from error


def redacted(uri: str) -> str:
    """Return a MongoDB URI without user name and password."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "a URI that cannot be read"
    if "@" not in parts.netloc:
        return uri
    return uri.replace(parts.netloc, "***@" + parts.netloc.rsplit("@", 1)[1])


def open_database(launchpad: Any) -> Any:
    """Return the launchpad's database with all indexes of the stores in place.

    Raises
    ------
    StoreError
        If the database has the schema of another release, newer or older.
    """
    database = launchpad.db
    with store_errors("prepare the database"):
        found = schema_version(database)
        if found is not None and found > SCHEMA_VERSION:
            raise StoreError(
                f"the database has schema {found}, this release knows {SCHEMA_VERSION}",
                advice="upgrade nanoos_fw on this machine",
            )
        if found is not None and found < SCHEMA_VERSION:
            raise StoreError(
                f"the database has schema {found}, this release needs {SCHEMA_VERSION}",
                advice="run 'nanoos db migrate' while no campaign is running",
            )
        ensure_indexes(database)
        declare_system_models(database)
        if found is None:
            set_schema_version(database, SCHEMA_VERSION)
    return database


def schema_version(database: Any) -> int | None:
    """Return the schema version of the database; None if no release has opened it."""
    document = database["nanoos_schema"].find_one({"_id": "schema"})
    return None if document is None else int(document["version"])


def set_schema_version(database: Any, version: int) -> None:
    """Note the schema version, which its documents have."""
    database["nanoos_schema"].update_one(
        {"_id": "schema"}, {"$set": {"version": version}}, upsert=True
    )


def ensure_indexes(database: Any) -> None:
    """Create the indexes of all stores; those that exist are left alone."""
    for collection, indexes in INDEXES.items():
        for fields, unique in indexes:
            database[collection].create_index([(f, 1) for f in fields], unique=unique)


@contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """Turn driver errors into StoreError with what was being done."""
    from pymongo.errors import PyMongoError

    try:
        yield
    except PyMongoError as error:
        raise StoreError(
            f"cannot {doing}: {type(error).__name__}",
            evidence={"error": str(error)[:500]},
            advice="check the database server; rerunning is safe",
        ) from error


class Patience:
    """Do store operations again while the server is away, for a bounded time.

    For operations that may be done twice. Errors of other kinds pass at once.

    Parameters
    ----------
    seconds
        Give up when no operation has succeeded for so long.
    pause_s
        First pause; it doubles up to 30 s.
    """

    def __init__(self, seconds: float = 600.0, pause_s: float = 1.0) -> None:
        self._seconds, self._pause_s = seconds, pause_s

    def run(self, operation: Callable[[], _T]) -> _T:
        """Return what the operation returns.

        Raises
        ------
        StoreError
            If the server has not come back in time.
        """
        began = time.monotonic()
        pause, tries = self._pause_s, 0
        while True:
            try:
                result = operation()
            except StoreError as error:
                tries += 1
                left = began + self._seconds - time.monotonic()
                if not is_outage(error.__cause__) or left <= 0:
                    raise
                pause_now = min(pause, left)
                logger.warning(
                    "%s; try %d, again in %.0f s, for %.0f s at most",
                    error, tries, pause_now, left,
                )  # fmt: skip
                time.sleep(pause_now)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                if tries:
                    logger.warning("the database server is back after %d tries", tries)
                return result


def upsert_many(
    collection: Any, upserts: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> set[int]:
    """Write (filter, update) pairs and return the indices that made new documents.

    The filters name unique keys. A duplicate key means that another worker wrote the
    same content between look-up and insert, which is as good.
    """
    from pymongo import UpdateOne
    from pymongo.errors import BulkWriteError, DuplicateKeyError

    if not upserts:
        return set()
    if type(collection).__module__.startswith("mongomock"):
        # mongomock 4.3 does not know the bulk operations of pymongo >= 4.9.
        created = set()
        for index, (query, update) in enumerate(upserts):
            with suppress(DuplicateKeyError):
                answer = collection.update_one(query, update, upsert=True)
                if answer.upserted_id is not None:
                    created.add(index)
        return created
    operations = [UpdateOne(query, update, upsert=True) for query, update in upserts]
    try:
        result = collection.bulk_write(operations, ordered=False)
    except BulkWriteError as error:
        details = error.details or {}
        errors = details.get("writeErrors", [])
        if any(entry.get("code") != _DUPLICATE for entry in errors):
            raise
        return {entry["index"] for entry in details.get("upserted", [])}
    return set(result.upserted_ids or {})


def insert_new(collection: Any, documents: Sequence[Mapping[str, Any]]) -> set[int]:
    """Insert documents and return the indices of those that were there before.

    There is whatever has the same ``_id`` or another unique key: written by another
    process, or by the try before this one, whose answer got lost.
    """
    from pymongo.errors import BulkWriteError

    if not documents:
        return set()
    try:
        collection.insert_many(documents, ordered=False)
    except BulkWriteError as error:
        errors = (error.details or {}).get("writeErrors", [])
        if not errors or any(entry.get("code") != _DUPLICATE for entry in errors):
            raise
        return {entry["index"] for entry in errors}
    return set()


def update_many(
    collection: Any, updates: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> None:
    """Apply (filter, update) pairs to documents that are there."""
    from pymongo import UpdateOne

    if not updates:
        return
    if type(collection).__module__.startswith("mongomock"):  # as in upsert_many
        for query, update in updates:
            collection.update_one(query, update)
        return
    collection.bulk_write([UpdateOne(q, u) for q, u in updates], ordered=False)


# --------------------------------------------------------------------- artifacts


def put_artifact(database: Any, data: bytes) -> str:
    """Store bytes in GridFS under their SHA-256, once, and return it.

    Bytes that are there are touched, so that `artifact_upkeep` leaves them until a
    document refers to them.
    """
    import gridfs
    from pymongo.errors import DuplicateKeyError

    digest = sha256_bytes(data)
    files = gridfs.GridFS(database, ARTIFACTS)
    with store_errors(f"store artifact {digest[:12]}"):
        for _ in range(_PUT_TRIES):
            touched = {"$set": {"touched": datetime.now(UTC)}}
            entries = database[f"{ARTIFACTS}.files"]
            if entries.update_one({"filename": digest}, touched).matched_count:
                return digest
            try:
                files.put(data, filename=digest)
            except (DuplicateKeyError, gridfs.errors.FileExists):
                # Another worker was first, and the bytes are the same; or an answer got
                # lost between two parts, and the next try writes them under a new id.
                continue
            return digest
    raise StoreError(
        f"artifact {digest[:12]} could not be stored",
        evidence={"tries": _PUT_TRIES, "bytes": len(data)},
        advice="check the database server; rerunning is safe",
    )


def get_artifact(database: Any, digest: str) -> bytes:
    """Return the bytes of an artifact, verified.

    Raises
    ------
    StoreError
        If it is not there.
    CorruptArtifactError
        If the bytes do not have the digest they are stored under.
    """
    import gridfs

    files = gridfs.GridFS(database, ARTIFACTS)
    with store_errors(f"read artifact {digest[:12]}"):
        try:
            data = bytes(files.get_last_version(filename=digest).read())
        except gridfs.errors.NoFile as error:
            removed = database["gc_journal"].find_one({"what": digest})
            when = f"; 'nanoos gc' removed it {removed['time']}" if removed else ""
            raise StoreError(
                f"artifact {digest} is not in the database{when}",
                advice="rerun the firework that made it",
            ) from error
        except gridfs.errors.CorruptGridFile as error:
            raise CorruptArtifactError(f"artifact {digest}: {error}") from error
    if sha256_bytes(data) != digest:
        raise CorruptArtifactError(
            f"artifact {digest} fails its checksum", advice="rerun what made it"
        )
    return data


def artifact_sizes(database: Any, digests: Sequence[str]) -> dict[str, int]:
    """Return the bytes of those artifacts that are there."""
    with store_errors("measure artifacts"):
        found = database[f"{ARTIFACTS}.files"].find(
            {"filename": {"$in": list(digests)}}, {"filename": 1, "length": 1}
        )
        return {entry["filename"]: int(entry["length"]) for entry in found}


def delete_artifact(database: Any, digest: str) -> None:
    """Delete an artifact, if it is there."""
    import gridfs

    files = gridfs.GridFS(database, ARTIFACTS)
    with store_errors(f"delete artifact {digest[:12]}"):
        for entry in list(database[f"{ARTIFACTS}.files"].find({"filename": digest})):
            files.delete(entry["_id"])


def _read_launchpad_file(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"launchpad file {path} does not exist",
            advice="'lpad init' writes one",
        ) from error
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read launchpad file {path}: {error}") from error
    if not isinstance(data, dict) or "host" not in data:
        raise InputError(
            f"{path} has no 'host': it is not a my_launchpad.yaml",
            advice="'lpad init' writes a valid file",
        )
    return dict(data)
