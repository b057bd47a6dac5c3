"""Checkpoints of a training: the last states of each member."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.parallel import Communicator
from nanoos_fw.provenance import sha256_bytes, write_atomic

if TYPE_CHECKING:
    from nanoos_fw.ml.fitting import Fit

logger = logging.getLogger(__name__)

_RECORD = "record"
_NAME = re.compile(r"member(\d+)-epoch(\d+)-step(\d+)-([0-9a-f]{64})\.safetensors")


class Checkpoints:
    """The states of the members on disk.

    A file appears under its name all at once, and the name holds epoch, step and the
    checksum of its content: no other file has to agree with it. Older files go when
    a newer one is there, all but the last few.

    Parameters
    ----------
    work_dir
        Where they lie.
    key
        Of configuration and dataset; checkpoints of another key are refused.
    comm
        Ranks of a fit: rank 0 reads and writes.
    keep
        Checkpoints of each member that stay.
    """

    def __init__(
        self, work_dir: Path, key: str, comm: Communicator, keep: int = 2
    ) -> None:
        self.work_dir, self.key, self.comm, self.keep = work_dir, key, comm, keep
        self._saved_at = time.monotonic()

    def load(self, fit: Fit) -> None:
        """Put a member back to its last intact checkpoint, if it has any.

        Raises
        ------
        InputError
            If a checkpoint is of another training.
        CorruptArtifactError
            If there are checkpoints and none matches its checksum.
        """
        from safetensors.torch import load

        data = self.comm.broadcast(self._read(fit) if self.comm.rank == 0 else None)
        self._saved_at = time.monotonic()
        if data is None:
            return
        fit.restore_record(_header(data)["state"])
        fit.restore(load(data))

    def save(self, fit: Fit) -> None:
        """Write a member's state (rank 0; the others need not wait)."""
        from safetensors.torch import save

        if self.comm.rank != 0:
            return
        header = {"key": self.key, "state": fit.record()}
        data = save(fit.state(), metadata={_RECORD: json.dumps(header)})
        write_atomic(
            self.work_dir
            / (
                f"member{fit.member}-epoch{fit.history.epochs:05d}"
                f"-step{fit.position.step:06d}-{sha256_bytes(data)}.safetensors"
            ),
            data,
        )
        for old in self.files(fit.member)[self.keep :]:
            old.unlink(missing_ok=True)
        self._saved_at = time.monotonic()

    def save_if_due(self, fit: Fit, minutes: float) -> None:
        """Write a member's state if the last one is older than this."""
        if time.monotonic() - self._saved_at >= 60.0 * minutes:
            self.save(fit)

    def files(self, member: int) -> list[Path]:
        """Return the checkpoints of a member, the newest first."""
        found = []
        for path in self.work_dir.glob(f"member{member}-epoch*.safetensors"):
            match = _NAME.fullmatch(path.name)
            if match:
                found.append(((int(match[2]), int(match[3]), match[4]), path))
        return [path for _, path in sorted(found, reverse=True)]

    def _read(self, fit: Fit) -> bytes | None:
        """Return the last intact checkpoint of a member."""
        files, damaged = self.files(fit.member), []
        for path in files:
            match = _NAME.fullmatch(path.name)
            data = path.read_bytes()
            if match is None or sha256_bytes(data) != match[4]:
                logger.warning(
                    "checkpoint %s does not match its checksum: the one before is "
                    "taken",
                    path,
                )
                damaged.append(path)
                continue
            key = _header(data)["key"]
            if key != self.key:
                raise InputError(
                    f"{self.work_dir} holds the checkpoints of another training",
                    evidence={"key": key, "key_expected": self.key},
                    advice="use another work directory, or delete this one",
                )
            for other in damaged:  # not one of those that are kept
                other.rename(other.with_name(f"{other.name}.damaged"))
            return data
        if files:
            raise CorruptArtifactError(
                f"no checkpoint of member {fit.member} matches its checksum",
                evidence={"files": [path.name for path in files]},
                advice=f"delete these files in {self.work_dir} to fit it anew",
            )
        return None


def _header(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    record: dict[str, Any] = json.loads(header["__metadata__"][_RECORD])
    return record
