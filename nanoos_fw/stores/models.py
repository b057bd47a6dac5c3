"""Model registry: immutable versions, movable aliases, verified weights."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanoos_fw.errors import InputError, MissingDependencyError, StoreError
from nanoos_fw.provenance import (
    content_key,
    package_versions,
    sha256_file,
    utc_now,
    write_atomic,
)
from nanoos_fw.stores.aliases import ACTIVE, LATEST, NOTHING, AliasEntry, AliasLog
from nanoos_fw.stores.database import put_artifact, store_errors
from nanoos_fw.stores.model_records import (
    MOCK_TARGETS,
    ModelRecord,
    best_model,
    compare_models,
    merit,
    metric_of,
)
from nanoos_fw.stores.model_weights import WeightStore
from nanoos_fw.stores.predictions import Prediction, PredictionStore
from nanoos_fw.stores.system_models import SYSTEM_MODELS, check_name

if TYPE_CHECKING:
    from nanoos_fw.ml.network_models import NetworkModel
    from nanoos_fw.ml.predictors import PropertyModel

__all__ = [
    "ACTIVE",
    "ModelRecord",
    "ModelRegistry",
    "Prediction",
    "check_name",
    "compare_models",
    "get_model",
    "list_models",
    "metric_of",
    "register_model",
]

_REGISTER_TRIES = 50
_BEST = "best"


class ModelRegistry:
    """The collections ``models`` and ``model_aliases``, and the predictions."""

    def __init__(self, database: Any) -> None:
        self._database = database
        self._models = database["models"]
        self._aliases = AliasLog(database)
        self._weights = WeightStore(database)
        self._predictions = PredictionStore(database)

    # ------------------------------------------------------------------- versions

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
        storage: Literal["gridfs", "file"] = "gridfs",
    ) -> ModelRecord:
        """Register trained weights as the next version of a name.

        Training with the same key again returns the version that is there: a rerun
        makes no second one. The unique indexes decide races between workers.

        Parameters
        ----------
        name
            Without ``@`` and ``:``. The names of system models take weights for
            their own target only.
        target, unit, model_type
            What it predicts, and how.
        weights
            File of the weights. ``storage="gridfs"`` copies it into the database;
            ``"file"`` leaves it there, where all machines must find it.
        training_key
            Content key of all that decided the weights.
        training_config, metrics, dataset_info, environment
            How, how well, on what (``dataset_hash`` of the manifest) and where.
            That the weights or a parent come from mock targets is added.
            Who registered it is added to the environment.
        details
            Artifact with learning curves and predictions.
        parent
            Version that the training began with.
        """
        from nanoos_fw.ml.weight_files import says_mock_targets

        check_name(name, target)
        mock = says_mock_targets(weights)
        if parent is not None:
            older = self.get(parent)
            parent, mock = older.reference, mock or older.has_mock_targets
        if mock:
            # Whoever registers may not know it, or forget it.
            dataset_info = {**dataset_info, MOCK_TARGETS: True}
        digest = sha256_file(weights)
        environment = {
            **environment,
            "registered_by": {
                "host": socket.gethostname(),
                "nanoos_fw": package_versions().get("nanoos_fw"),
            },
        }
        # The entry after the weights: there is no entry whose weights never came.
        if storage == "gridfs":
            put_artifact(self._database, weights.read_bytes())
        for _ in range(_REGISTER_TRIES):
            with store_errors(f"register model {name}"):
                existing = self._models.find_one({"training_key": training_key})
            if existing is not None:
                return self._read(existing)
            record = ModelRecord(
                name=name,
                version=self._last_version(name) + 1,
                target=target,
                unit=unit,
                model_type=model_type,
                sha256=digest,
                checkpoint_path=str(
                    weights.resolve() if storage == "file" else weights
                ),
                storage=storage,
                training_key=training_key,
                training_config=dict(training_config),
                metrics=dict(metrics),
                dataset_info=dict(dataset_info),
                environment=environment,
                details=details,
                parent=parent,
                is_system_provided=name in SYSTEM_MODELS,
                created=utc_now(),
            )
            if self._insert(record):
                if storage == "gridfs":
                    # A collection of garbage may have met the weights before the
                    # entry was there to protect them.
                    put_artifact(self._database, weights.read_bytes())
                return record
        raise StoreError(
            f"no free version of model {name!r} after {_REGISTER_TRIES} tries",
            advice="rerun this firework",
        )

    def find(self, training_key: str) -> ModelRecord | None:
        """Return the version that a training made, if it has been registered."""
        with store_errors("look for a trained model"):
            document = self._models.find_one({"training_key": training_key})
        return None if document is None else self._read(document)

    def get(self, reference: str) -> ModelRecord:
        """Return a version by a reference.

        Parameters
        ----------
        reference
            ``name@version``, ``name@latest``, ``name@alias``; a bare name means
            ``name@active``. ``best:mae`` is the version with the lowest MAE,
            ``best:mae:formation_energy_per_atom`` that for one target; see
            :meth:`best`. A system model that nothing was activated for is its
            latest version.

        Raises
        ------
        InputError
            If there is no such model, version or alias.
        """
        if reference.startswith(f"{_BEST}:"):
            metric, _, target = reference.removeprefix(f"{_BEST}:").partition(":")
            return self.best(metric, target=target or None)
        name, _, selector = reference.partition("@")
        selector = selector or ACTIVE
        version: int | None
        if selector.isdecimal():
            # A number that the database cannot hold is that of no version.
            version = int(selector) if len(selector) < 19 else None
        elif selector == LATEST:
            version = self._last_version(name, none=-1)
        else:
            version = self._aliases.version(name, selector)
            if version is None and selector == ACTIVE and name in SYSTEM_MODELS:
                version = self._last_version(name, none=-1)
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
        return self._read(document)

    def list_models(
        self,
        *,
        name: str | None = None,
        target: str | None = None,
        sort: str | None = None,
        part: str = "val",
    ) -> list[ModelRecord]:
        """Return all versions.

        Parameters
        ----------
        name, target
            Only these.
        sort
            Metric: the best version first, those that do not state it last. None
            sorts by name and version.
        part
            Part of the dataset that the metric is of.
        """
        query = {k: v for k, v in (("name", name), ("target", target)) if v is not None}
        with store_errors("list models"):
            documents = list(self._models.find(query))
        active = self._aliases.current()
        records = sorted(
            (_record(d, active.get(d["name"]) == d["version"]) for d in documents),
            key=lambda r: (r.name, r.version),
        )
        if sort is None:
            return records
        return sorted(records, key=lambda record: merit(record, sort, part))

    def best(
        self, metric: str, *, target: str | None = None, part: str | None = None
    ) -> ModelRecord:
        """Return the version with the best metric.

        Parameters
        ----------
        metric
            ``mae``, ``rmse``, ``mse``: the lowest; ``r2``: the highest.
        target
            Needed where the registry holds models of several targets: their
            numbers cannot be compared.
        part
            Part of the dataset. By default the validation part, since what has
            chosen a model cannot judge it any more; the test part if no model
            states the former.

        Raises
        ------
        InputError
            If no usable model states the metric, their targets or units differ, or
            the metric is none that is good high or low.
        """
        usable = [
            record
            for record in self.list_models(target=target)
            if record.has_weights and not record.has_mock_targets
        ]
        return best_model(usable, metric, target=target, part=part)

    # -------------------------------------------------------------------- aliases

    def activate(self, reference: str, *, alias: str = ACTIVE, reason: str) -> None:
        """Point an alias at a version; the history of the alias is kept.

        Raises
        ------
        InputError
            If the version has no weights, or was trained on mock targets: nothing
            may take its numbers for real.
        """
        record = self.get(reference)
        if record.has_mock_targets:
            raise InputError(
                f"{record.reference} was trained on mock targets and cannot be made "
                f"{alias!r}",
                evidence={"dataset_info": {MOCK_TARGETS: True}},
                advice="train on computed or measured targets",
            )
        self._weights.check_there(record)
        self._aliases.move(record.name, alias, record.version, reason)
        # A collection of garbage marks first and looks at aliases then, this the other
        # way round: one of the two sees the other.
        try:
            self._weights.check_there(self.get(record.reference))
        except MissingDependencyError:
            self.deactivate(record.name, alias=alias, reason="its weights were removed")
            raise

    def deactivate(self, name: str, *, alias: str = ACTIVE, reason: str) -> None:
        """Take an alias off; ``name@alias`` is then no model.

        Raises
        ------
        InputError
            If the alias points at nothing.
        """
        if self._aliases.version(name, alias) is None:
            raise InputError(f"no version of {name!r} is {alias!r}")
        self._aliases.move(name, alias, NOTHING, reason)

    def roll_back(
        self, name: str, *, alias: str = ACTIVE, reason: str = "rolled back"
    ) -> ModelRecord:
        """Point an alias at the version it pointed at before, and return that.

        Repeated, it goes back further.

        Raises
        ------
        InputError
            If there is none.
        MissingDependencyError
            If its weights were removed; the alias stays where it is.
        StoreError
            If somebody else moves the alias at the same time.
        """
        entry = self._aliases.roll_back(
            name,
            alias,
            reason,
            check=lambda version: self._weights.check_there(
                self.get(f"{name}@{version}")
            ),
        )
        return self.get(f"{name}@{entry.version}")

    def history(self, name: str, alias: str | None = None) -> list[AliasEntry]:
        """Return all moves of the aliases of a name, oldest first."""
        return self._aliases.history(name, alias)

    # -------------------------------------------------------------------- weights

    def read_weights(self, record: ModelRecord) -> bytes:
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
        return self._weights.read(record)

    def write_weights(self, record: ModelRecord, path: Path) -> Path:
        """Write the weights of a version to a file, verified, and return its path."""
        write_atomic(path, self.read_weights(record))
        return path

    def load(
        self, reference: str | ModelRecord, *, threads: int | None = None
    ) -> PropertyModel:
        """Return a version's model, ready to predict, from verified weights.

        Parameters
        ----------
        reference
            As in :meth:`get`, or a record.
        threads
            Of predictions; None takes ``OMP_NUM_THREADS``, or all cores.

        Raises
        ------
        InputError
            If there is no such version.
        MissingDependencyError
            If its weights are not installed; says how to get them.
        """
        record = self.get(reference) if isinstance(reference, str) else reference
        from nanoos_fw.ml.predictors import open_model

        return open_model(
            self.read_weights(record),
            model_name=record.name,
            model_version=record.reference,
            target_property=record.target,
            sha256=record.sha256,
            threads=threads,
        )

    # ---------------------------------------------------------------- predictions

    def put_predictions(self, model: str, rows: Iterable[Prediction]) -> int:
        """Store predictions once per (model, structure); return how many are new."""
        return self._predictions.put(model, rows)

    def predictions(self, model: str, structures: Sequence[str]) -> list[Prediction]:
        """Return the predictions there are for the structures, in their order."""
        return self._predictions.get(model, structures)

    def n_predictions(self, model: str) -> int:
        """Return how many predictions a version has."""
        return self._predictions.count(model)

    # -------------------------------------------------------------------- private

    def _insert(self, record: ModelRecord) -> bool:
        from pymongo.errors import DuplicateKeyError

        document = record.to_dict()
        del document["is_active"]
        with store_errors(f"register model {record.name}"):
            try:
                self._models.insert_one({"_id": record.reference, **document})
            except DuplicateKeyError:
                return False  # another worker took this version or this key
        return True

    def _read(self, document: Mapping[str, Any]) -> ModelRecord:
        active = self._aliases.version(document["name"])
        return _record(document, active == document["version"])

    def _last_version(self, name: str, none: int = 0) -> int:
        with store_errors(f"read the versions of {name}"):
            document = self._models.find_one(
                {"name": name}, {"version": 1}, sort=[("version", -1)]
            )
        return none if document is None else int(document["version"])


# ----------------------------------------------------------------- the short calls


def register_model(
    model: NetworkModel,
    weights: Path,
    *,
    metrics: Mapping[str, Any] | None = None,
    dataset_info: Mapping[str, Any] | None = None,
    parent: str | None = None,
    database: Any = None,
) -> ModelRecord:
    """Register a loaded model under its name.

    Parameters
    ----------
    model
        With weights.
    weights
        The file they were loaded from.
    metrics, dataset_info, parent
        As in :meth:`ModelRegistry.register`; the manifest's hash and the training
        rows are taken from the model itself.
    database
        Of ``open_database``; None takes that of the settings.

    Raises
    ------
    InputError
        If the file holds other weights.
    """
    card = model.card
    digest = sha256_file(weights)
    if card is None or model.checkpoint_sha256 != digest:
        raise InputError(
            f"{weights} does not hold the weights of model {model.model_name!r}",
            evidence={"sha256": digest, "sha256_expected": model.checkpoint_sha256},
            advice="load the model from this file first",
        )
    return _registry(database).register(
        name=model.model_name,
        target=card.target_property,
        unit=card.unit,
        model_type=model.model_type,
        weights=weights,
        training_key=content_key("weights", [model.model_name, digest]),
        training_config=card.architecture.model_dump(mode="json"),
        metrics=metrics or {},
        dataset_info={
            "dataset_hash": card.dataset_hash,
            "counts": {"train": card.n_train},
            **(dataset_info or {}),
        },
        environment={},
        parent=parent,
    )


def get_model(model_name: str, *, database: Any = None) -> PropertyModel:
    """Return a registered model, ready to predict.

    Parameters
    ----------
    model_name
        Any reference: ``name``, ``name@version``, ``name@alias``, ``best:mae``.
    database
        Of ``open_database``; None takes that of the settings.
    """
    return _registry(database).load(model_name)


def list_models(
    *, target: str | None = None, sort: str | None = None, database: Any = None
) -> list[ModelRecord]:
    """Return all registered versions; see :meth:`ModelRegistry.list_models`."""
    return _registry(database).list_models(target=target, sort=sort)


# ------------------------------------------------------------------------- private


def _registry(database: Any) -> ModelRegistry:
    if database is None:
        from nanoos_fw.settings import load_settings
        from nanoos_fw.stores.database import load_launchpad, open_database

        database = open_database(load_launchpad(load_settings().launchpad))
    return ModelRegistry(database)


def _record(document: Mapping[str, Any], is_active: bool) -> ModelRecord:
    fields = {k: v for k, v in document.items() if k != "_id"}
    return ModelRecord(**fields, is_active=is_active)
