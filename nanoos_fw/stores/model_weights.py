"""The weights of registered models: in the database or in files, always verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanoos_fw.errors import CorruptArtifactError, MissingDependencyError, StoreError
from nanoos_fw.provenance import sha256_bytes
from nanoos_fw.stores.database import get_artifact
from nanoos_fw.stores.model_records import ModelRecord
from nanoos_fw.stores.system_models import install_advice


class WeightStore:
    """Where the weights of versions are read from."""

    def __init__(self, database: Any) -> None:
        self._database = database

    def read(self, record: ModelRecord) -> bytes:
        """Return the weights of a version, verified by their SHA-256.

        Raises
        ------
        MissingDependencyError
            If no weights are installed, or they were removed.
        StoreError
            If they are not where they should be.
        CorruptArtifactError
            If they are not the ones that were registered.
        """
        self.check_there(record)
        assert record.sha256 is not None
        if record.storage == "gridfs":
            return get_artifact(self._database, record.sha256)
        path = Path(record.checkpoint_path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(
                f"the weights of {record.reference} cannot be read from {path}: "
                f"{error.strerror}",
                advice="bring the file back, or register the model again",
            ) from error
        found = sha256_bytes(data)
        if found != record.sha256:
            raise CorruptArtifactError(
                f"{path} does not hold the weights of {record.reference}",
                evidence={"sha256": found, "sha256_expected": record.sha256},
                advice="bring the file back, or register the model again",
            )
        return data

    def check_there(self, record: ModelRecord) -> None:
        """Refuse a version without weights.

        Raises
        ------
        MissingDependencyError
            If none are installed, which says how to get them, or they were removed.
        """
        if record.storage == "none":
            raise MissingDependencyError(
                f"no weights are installed for the model {record.name!r}",
                evidence={"model": record.reference},
                advice=install_advice(record.name),
            )
        if record.removed is not None:
            raise MissingDependencyError(
                f"the weights of {record.reference} were removed on {record.removed}",
                evidence={"training_key": record.training_key},
                advice="train it again, which registers a new version",
            )
