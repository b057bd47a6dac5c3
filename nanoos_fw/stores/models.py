"""Model registry: immutable versions, movable aliases, predictions."""

from __future__ import annotations

import getpass
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from nanoos_fw.errors import InputError, StoreError
from nanoos_fw.provenance import utc_now, write_atomic
from nanoos_fw.stores.database import (
    get_artifact,
    put_artifact,
    store_errors,
    upsert_many,
)

ACTIVE = "active"
_REGISTER_TRIES = 20


class ModelRecord(BaseModel):
    """One immutable version of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str
    version: int = Field(ge=1)
    target: str
    unit: str
    model_type: str
    sha256: str = Field(description="SHA-256 of the weights; also their artifact")
    checkpoint_path: str = Field(description="where training left the weights")
    training_key: str = Field(description="content key of data, settings and code")
    training_config: dict[str, Any]
    metrics: dict[str, Any]
    dataset_info: dict[str, Any]
    environment: dict[str, Any]
    details: str | None = Field(
        default=None, description="artifact: learning curves and test predictions"
    )
    parent: str | None = None
    is_system_provided: bool = False
    created: str

    @property
    def reference(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-compatible values."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Prediction:
    """The prediction of one model version for one structure, in the target's unit."""

    structure: str
    prediction: float
    uncertainty: float | None
    out_of_domain: bool

    def to_row(self) -> dict[str, Any]:
        """Return the row that ``ml.screening.rank_candidates`` ranks."""
        return {
            "structure_id": self.structure,
            "mean": self.prediction,
            "std": self.uncertainty,
            "out_of_domain": self.out_of_domain,
        }


class ModelRegistry:
    """The collections ``models``, ``model_aliases`` and ``predictions``."""

    def __init__(self, database: Any) -> None:
        self._database = database
        self._models = database["models"]
        self._aliases = database["model_aliases"]
        self._predictions = database["predictions"]

    def register(
        self,
        *,
        name: str,
        target: str,
        unit: str,
        model_type: str,
        weights: Path,
        training_key: str,
        training_config: Mapping[str, Any],
        metrics: Mapping[str, Any],
        dataset_info: Mapping[str, Any],
        environment: Mapping[str, Any],
        details: str | None = None,
        parent: str | None = None,
    ) -> ModelRecord:
        """Register trained weights as the next version of a name.

        Training with the same key again returns the version that is there: a rerun
        makes no second one. The unique indexes decide races between workers.
        """
        from pymongo.errors import DuplicateKeyError

        if not name or "@" in name or ":" in name:
            raise InputError(f"model name {name!r} must not be empty or hold '@', ':'")
        digest = put_artifact(self._database, weights.read_bytes())
        for _ in range(_REGISTER_TRIES):
            with store_errors(f"register model {name}"):
                existing = self._models.find_one({"training_key": training_key})
                if existing is not None:
                    return _record(existing)
                record = ModelRecord(
                    name=name,
                    version=self._last_version(name) + 1,
                    target=target,
                    unit=unit,
                    model_type=model_type,
                    sha256=digest,
                    checkpoint_path=str(weights),
                    training_key=training_key,
                    training_config=dict(training_config),
                    metrics=dict(metrics),
                    dataset_info=dict(dataset_info),
                    environment=dict(environment),
                    details=details,
                    parent=parent,
                    created=utc_now(),
                )
                try:
                    self._models.insert_one(
                        {"_id": record.reference, **record.to_dict()}
                    )
                except DuplicateKeyError:
                    continue  # another worker took this version or this key
                return record
        raise StoreError(
            f"no free version of model {name!r} after {_REGISTER_TRIES} tries",
            advice="rerun this firework",
        )

    def find(self, training_key: str) -> ModelRecord | None:
        """Return the version that a training made, if it has been registered."""
        with store_errors("look for a trained model"):
            document = self._models.find_one({"training_key": training_key})
        return None if document is None else _record(document)

    def get(self, reference: str) -> ModelRecord:
        """Return a version by ``name@version``, ``name@latest`` or ``name@alias``.

        A bare name means ``name@active``.

        Raises
        ------
        InputError
            If there is no such model, version or alias.
        """
        name, _, selector = reference.partition("@")
        selector = selector or ACTIVE
        version: int | None
        if selector.isdigit():
            version = int(selector)
        elif selector == "latest":
            version = self._last_version(name) or None
        else:
            version = self._alias(name, selector)
        with store_errors(f"read model {reference}"):
            document = (
                None
                if version is None
                else self._models.find_one({"name": name, "version": version})
            )
        if document is None:
            versions = [r.reference for r in self.list_models(name=name)]
            raise InputError(
                f"there is no model {name}@{selector}",
                evidence={"versions": versions[:20]},
                advice=f"known versions: {', '.join(versions[:5]) or 'none'}",
            )
        return _record(document)

    def list_models(
        self, *, name: str | None = None, target: str | None = None
    ) -> list[ModelRecord]:
        """Return all versions, by name and version."""
        query = {k: v for k, v in (("name", name), ("target", target)) if v is not None}
        with store_errors("list models"):
            documents = list(self._models.find(query))
        return sorted(
            (_record(d) for d in documents), key=lambda r: (r.name, r.version)
        )

    def activate(self, reference: str, *, alias: str = ACTIVE, reason: str) -> None:
        """Point an alias at a version; the history of the alias is kept."""
        from pymongo.errors import DuplicateKeyError

        record = self.get(reference)
        for _ in range(_REGISTER_TRIES):
            with store_errors(f"activate {reference}"):
                last = self._alias_entry(record.name, alias)
                if last is not None and last["version"] == record.version:
                    return
                try:
                    self._aliases.insert_one(
                        {
                            "name": record.name,
                            "alias": alias,
                            "sequence": 1 if last is None else last["sequence"] + 1,
                            "version": record.version,
                            "reason": reason,
                            "by": getpass.getuser(),
                            "time": utc_now(),
                        }
                    )
                except DuplicateKeyError:
                    continue
                return
        raise StoreError(f"alias {alias!r} of {record.name!r} keeps being moved")

    def write_weights(self, record: ModelRecord, path: Path) -> Path:
        """Write the weights of a version to a file, verified, and return its path."""
        write_atomic(path, get_artifact(self._database, record.sha256))
        return path

    # -------------------------------------------------------------- predictions

    def put_predictions(self, model: str, rows: Iterable[Prediction]) -> int:
        """Store predictions once per (model, structure); return how many are new."""
        upserts = [
            (
                {"model": model, "structure": row.structure},
                {
                    "$setOnInsert": {
                        "prediction": row.prediction,
                        "uncertainty": row.uncertainty,
                        "out_of_domain": row.out_of_domain,
                    }
                },
            )
            for row in rows
        ]
        with store_errors("store predictions"):
            return len(upsert_many(self._predictions, upserts))

    def predictions(self, model: str, structures: Sequence[str]) -> list[Prediction]:
        """Return the predictions there are for the structures, in their order."""
        query = {"model": model, "structure": {"$in": list(structures)}}
        with store_errors("read predictions"):
            found = {d["structure"]: d for d in self._predictions.find(query)}
        return [
            Prediction(
                structure=key,
                prediction=float(found[key]["prediction"]),
                uncertainty=found[key]["uncertainty"],
                out_of_domain=bool(found[key]["out_of_domain"]),
            )
            for key in structures
            if key in found
        ]

    def _last_version(self, name: str) -> int:
        document = self._models.find_one(
            {"name": name}, {"version": 1}, sort=[("version", -1)]
        )
        return 0 if document is None else int(document["version"])

    def _alias_entry(self, name: str, alias: str) -> dict[str, Any] | None:
        entry: dict[str, Any] | None = self._aliases.find_one(
            {"name": name, "alias": alias}, sort=[("sequence", -1)]
        )
        return entry

    def _alias(self, name: str, alias: str) -> int | None:
        with store_errors(f"read alias {alias}"):
            entry = self._alias_entry(name, alias)
        return None if entry is None else int(entry["version"])


def _record(document: Mapping[str, Any]) -> ModelRecord:
    return ModelRecord(**{k: v for k, v in document.items() if k != "_id"})
