"""Checkpoints of a training: one state and one record for each member."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.parallel import Communicator
from nanoos_fw.provenance import read_json, sha256_bytes, write_atomic, write_json

if TYPE_CHECKING:
    from nanoos_fw.ml.fitting import Fit

_HISTORY = "history"


class Checkpoints:
    """The states of the members on disk.

    A state is written under a name that holds its epoch, then the member's record
    (``member0.json``) is replaced, then the older state removed: at any instant the
    record names a complete file.

    Parameters
    ----------
    work_dir
        Where they lie.
    key
        Of configuration and dataset; checkpoints of another key are refused.
    comm
        Ranks of a fit: rank 0 writes, all read.
    """

    def __init__(self, work_dir: Path, key: str, comm: Communicator) -> None:
        self.work_dir, self.key, self.comm = work_dir, key, comm

    def load(self, fit: Fit) -> None:
        """Put a member back to its last checkpoint, if it has one.

        Raises
        ------
        InputError
            If the checkpoint is of another training.
        CorruptArtifactError
            If the file does not match its checksum.
        """
        from safetensors.torch import load

        path = self._record(fit)
        record = read_json(path) if self.comm.rank == 0 and path.exists() else None
        record = self.comm.broadcast(record)
        if record is None:
            return
        if record["key"] != self.key:
            raise InputError(
                f"{self.work_dir} holds the checkpoints of another training",
                evidence={"key": record["key"], "key_expected": self.key},
                advice="use another work directory, or delete this one",
            )
        file = self.work_dir / record["file"]
        data = file.read_bytes() if file.exists() else b""
        if sha256_bytes(data) != record["sha256"]:
            raise CorruptArtifactError(
                f"checkpoint {file} is missing or does not match its checksum",
                evidence={"sha256_expected": record["sha256"]},
                advice=f"delete {path} to fit this member anew",
            )
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        for name, value in json.loads(header["__metadata__"][_HISTORY]).items():
            setattr(fit.history, name, value)
        fit.restore(load(data))

    def save(self, fit: Fit) -> None:
        """Write a member's state (rank 0); all ranks of the fit wait for it."""
        from safetensors.torch import save

        if self.comm.rank == 0:
            name = f"member{fit.member}-epoch{fit.history.epochs:05d}.safetensors"
            data = save(fit.state(), metadata={_HISTORY: json.dumps(vars(fit.history))})
            write_atomic(self.work_dir / name, data)
            write_json(
                self._record(fit),
                {
                    "key": self.key,
                    "file": name,
                    "sha256": sha256_bytes(data),
                    "epochs": fit.history.epochs,
                },
            )
            for older in self.work_dir.glob(f"member{fit.member}-*.safetensors"):
                if older.name != name:
                    older.unlink(missing_ok=True)
        self.comm.barrier()

    def _record(self, fit: Fit) -> Path:
        return self.work_dir / f"member{fit.member}.json"
