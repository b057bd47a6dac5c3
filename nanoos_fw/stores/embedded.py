"""FireWorks' embedded database: a file, for one process at a time, without a server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nanoos_fw.errors import (
    CorruptArtifactError,
    InputError,
    MissingDependencyError,
    StoreError,
)
from nanoos_fw.provenance import write_atomic

EMBEDDED_VARIABLE = "MONGOMOCK_SERVERSTORE_FILE"
EMBEDDED_FILE = "database.json"


def embedded_file() -> Path | None:
    """Return the file of FireWorks' single-process database, if that mode is on."""
    name = os.environ.get(EMBEDDED_VARIABLE)
    return Path(name) if name else None


def open_embedded(folder: Path, *, create: bool = False) -> Any:
    """Return a LaunchPad on FireWorks' embedded single-process database.

    The mode belongs to the whole process: FireWorks decides on it when it is first
    imported, so this must be called before anything imports FireWorks.

    Parameters
    ----------
    folder
        Holds the database, and the two files with which ``lpad`` finds it when it
        is started there.
    create
        Make the folder and an empty database if there is none.

    Raises
    ------
    MissingDependencyError
        If mongomock is not installed.
    InputError
        If the folder holds no database, or cannot be written.
    CorruptArtifactError
        If the file is not a database.
    """
    import importlib.util
    import sys

    if importlib.util.find_spec("mongomock_persistence") is None:
        raise MissingDependencyError(
            "the embedded database needs mongomock",
            advice="pip install 'nanoos_fw[embedded]'",
        )
    path = _embedded_folder(folder.resolve(), create)
    if os.environ.get(EMBEDDED_VARIABLE) != str(path):
        if "fireworks.fw_config" in sys.modules:
            raise StoreError(
                "FireWorks was imported before the embedded database was chosen",
                advice=f"set {EMBEDDED_VARIABLE}={path} before starting Python",
            )
        os.environ[EMBEDDED_VARIABLE] = str(path)
    return load_embedded(path)


def load_embedded(path: Path) -> Any:
    """Return a LaunchPad on the embedded database in a file.

    Raises
    ------
    CorruptArtifactError
        If the file is not a database.
    """
    from bson.errors import BSONError
    from fireworks.core.launchpad import LaunchPad

    class EmbeddedLaunchPad(LaunchPad):  # type: ignore[misc]
        """A LaunchPad without heartbeats: nobody else could read them.

        FireWorks sends them from a thread, and mongomock is not made for two.
        """

        def ping_launch(self, launch_id: int, checkpoint: Any = None) -> None:
            if checkpoint is not None:
                super().ping_launch(launch_id, checkpoint=checkpoint)

    try:
        launchpad = EmbeddedLaunchPad(strm_lvl="WARNING")
    except (ValueError, KeyError, TypeError, AttributeError, BSONError) as error:
        raise CorruptArtifactError(
            f"{path} is not an embedded database: {error}",
            advice="move it away to start anew",
        ) from error
    # mongomock writes the file once, in place, when Python ends. A process that is
    # killed would lose everything, or leave half a file: save_embedded replaces it.
    launchpad.connection._store._finalizer.detach()
    return launchpad


def _embedded_folder(folder: Path, create: bool) -> Path:
    path = folder / EMBEDDED_FILE
    if path.exists():
        return path
    if not create:
        raise InputError(
            f"{folder} holds no embedded database",
            advice="give a my_launchpad.yaml, or a folder that 'nanoos demo' made",
        )
    ours = {"my_launchpad.yaml", "FW_config.yaml"}  # of a creation that was killed
    others = [
        entry
        for entry in (folder.iterdir() if folder.is_dir() else ())
        if entry.name not in ours and not entry.name.startswith(".")
    ]
    if others or (folder.exists() and not folder.is_dir()):
        raise InputError(
            f"{folder} holds something else than an embedded database",
            advice="choose a new or an empty folder",
        )
    launchpad_file = folder / "my_launchpad.yaml"
    try:
        write_atomic(
            launchpad_file,
            "# The embedded database of FW_config.yaml: one process at a time.\n"
            "host: localhost\nport: 27017\nname: fireworks\n",
        )
        # JSON strings are YAML strings: any path is quoted right.
        write_atomic(
            folder / "FW_config.yaml",
            f"MONGOMOCK_SERVERSTORE_FILE: {json.dumps(str(path))}\n"
            f"LAUNCHPAD_LOC: {json.dumps(str(launchpad_file))}\n",
        )
        write_atomic(path, "{}")
    except OSError as error:
        raise InputError(
            f"cannot write in {folder}: {error.strerror}",
            advice="choose a folder you may write",
        ) from error
    return path


def save_embedded(launchpad: Any) -> None:
    """Write the embedded database to its file, atomically."""
    from bson import json_util

    path = embedded_file()
    if path is None:
        raise StoreError("the database is not an embedded one")
    store = launchpad.connection._store
    write_atomic(path, json_util.dumps(store.to_dict()))
