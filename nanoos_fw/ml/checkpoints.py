"""Checkpoints of a training: one file per member, one index that says which count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.parallel import Communicator
from nanoos_fw.provenance import read_json, sha256_bytes, write_atomic, write_json

if TYPE_CHECKING:
    from nanoos_fw.ml.fitting import Fit

INDEX = "checkpoints.json"
_HISTORY = "history"


class Checkpoints:
    """The states of the members on disk, and the index that says which count.

    A state is written under a name that holds its epoch, then the index is replaced,
    then the older state removed: at any instant the index names a complete file.

    Parameters
    ----------
    work_dir
        Where they lie.
    key
        Of configuration and dataset; checkpoints of another key are refused.
    comm
        Rank 0 writes, all read.

    Raises
    ------
    InputError
        If the directory holds the checkpoints of another training.
    """

    def __init__(
        self,
        work_dir: Path,
        key: str,
        comm: Communicator,
    ) -> None:
        self.work_dir, self.comm = work_dir, comm
        self.key = key
        index = None
        path = work_dir / INDEX
        if comm.rank == 0 and path.exists():
            index = read_json(path)
        self.index: dict[str, Any] = comm.broadcast(index) or {
            "key": self.key,
            "members": {},
        }
        if self.index["key"] != self.key:
            raise InputError(
                f"{work_dir} holds the checkpoints of another training",
                evidence={"key": self.index["key"], "key_expected": self.key},
                advice="use another work directory, or delete this one",
            )

    def load(self, fit: Fit) -> None:
        """Put a member back to its last checkpoint, if it has one.

        Raises
        ------
        CorruptArtifactError
            If the file does not match its checksum.
        """
        from safetensors.torch import load

        entry = self.index["members"].get(str(fit.member))
        if entry is None:
            return
        path = self.work_dir / entry["file"]
        data = path.read_bytes() if path.exists() else b""
        if sha256_bytes(data) != entry["sha256"]:
            raise CorruptArtifactError(
                f"checkpoint {path} is missing or does not match its checksum",
                evidence={"sha256_expected": entry["sha256"]},
                advice=f"delete {self.work_dir / INDEX} and train again",
            )
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        history = json.loads(header["__metadata__"][_HISTORY])
        for name, value in history.items():
            setattr(fit.history, name, value)
        fit.restore(load(data))

    def save(self, fit: Fit) -> None:
        """Write a member's state (rank 0); all ranks wait for it."""
        from safetensors.torch import save

        if self.comm.rank == 0:
            name = f"member{fit.member}-epoch{fit.history.epochs:05d}.safetensors"
            data = save(fit.state(), metadata={_HISTORY: json.dumps(vars(fit.history))})
            write_atomic(self.work_dir / name, data)
            old = self.index["members"].get(str(fit.member), {}).get("file")
            self.index["members"][str(fit.member)] = {
                "file": name,
                "sha256": sha256_bytes(data),
                "epochs": fit.history.epochs,
            }
            write_json(self.work_dir / INDEX, self.index)
            if old not in {None, name}:
                (self.work_dir / old).unlink(missing_ok=True)
        self.comm.barrier()
