"""Models that enter the registry by another way than a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Not for type checkers alone: the reference looks the fields of results up.
from nanoos_fw.ml.calibration import Calibration
from nanoos_fw.ml.model_files import ModelCard
from nanoos_fw.ml.published import PublishedCheckpoint
from nanoos_fw.provenance import content_key, run_environment
from nanoos_fw.stores.models import ModelRecord, ModelRegistry

_FOLDER, _WEIGHTS = "models", "weights.safetensors"


@dataclass(frozen=True)
class CalibratedModel:
    """A version with new intervals.

    Parameters
    ----------
    record, parent
        The new version, and the one whose weights it has.
    calibration
        What was found.
    dataset_hash
        Of the structures that it goes by.
    """

    record: ModelRecord
    parent: ModelRecord
    calibration: Calibration
    dataset_hash: str

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as JSON-compatible values."""
        return {
            "model": self.record.reference,
            "parent": self.parent.reference,
            **self.calibration.to_dict(),
            "dataset_hash": self.dataset_hash,
        }


@dataclass(frozen=True)
class ImportedModel:
    """A checkpoint of the published program in the registry.

    Parameters
    ----------
    record
        The version.
    card
        What the weights say about themselves.
    checkpoint
        The file they come from.
    """

    record: ModelRecord
    card: ModelCard
    checkpoint: PublishedCheckpoint


def calibrate_registered(
    database: Any, reference: str, dataset: Path, work_root: Path
) -> CalibratedModel:
    """Register the weights of a version with intervals from labelled structures.

    Parameters
    ----------
    database
        Of ``open_database``.
    reference
        ``name``, ``name@version``, ``best:mae``, ...
    dataset
        Folder of a dataset of structures that the model was not trained on. Of a
        dataset that it, or a version it was trained from, was trained on, only the
        validation part counts; that structures of another dataset were learned
        cannot be seen.
    work_root
        Folder of the work directories.

    Returns
    -------
    CalibratedModel
        With the next version of the name. Done again, the one that is there; nothing
        is activated.

    Raises
    ------
    InputError
        If there is no such version, or model and dataset do not fit: see
        :func:`nanoos_fw.ml.calibration.calibrate_model`.
    """
    from nanoos_fw.ml.calibration import calibrate_model
    from nanoos_fw.ml.datasets import open_dataset

    registry = ModelRegistry(database)
    parent = registry.get(reference)
    model = registry.load(parent)
    labelled = open_dataset(dataset)
    key = content_key(
        "calibrated", {"model": parent.sha256, "dataset": labelled.dataset_hash}
    )
    weights = work_root / _FOLDER / f"calibrated-{key[:16]}" / _WEIGHTS
    found = calibrate_model(
        model, labelled, weights, learned=_learned(registry, parent)
    )
    told = {**found.to_dict(), "dataset_hash": labelled.dataset_hash}
    record = registry.register(
        name=parent.name,
        target=parent.target,
        unit=parent.unit,
        model_type=parent.model_type,
        weights=weights,
        training_key=content_key("calibrated version", [parent.name, key]),
        training_config=parent.training_config,
        metrics={
            **_without_shares(parent.metrics),
            "calibration": {"n": found.n, "mae": found.mae},
        },
        dataset_info={**parent.dataset_info, "calibration": told},
        environment=run_environment(),
        parent=parent.reference,
    )
    return CalibratedModel(record, parent, found, labelled.dataset_hash)


def import_checkpoint(
    database: Any,
    file: Path,
    name: str,
    target: str,
    work_root: Path,
    *,
    unit: str | None = None,
    atom_init: Path | None = None,
) -> ImportedModel:
    """Register a checkpoint of the published CGCNN program (``*.pth.tar``).

    The file is read without running code that it might hold.

    Parameters
    ----------
    database
        Of ``open_database``.
    file
        The checkpoint.
    name
        In the registry.
    target, unit, atom_init
        As in :func:`nanoos_fw.ml.published.import_published`.
    work_root
        Folder of the work directories.

    Returns
    -------
    ImportedModel
        With the next version of the name; done again, with the one that is there.

    Raises
    ------
    InputError
        If the name cannot be used, or the file predicts something else.
    CorruptArtifactError
        If the file is no such checkpoint.
    """
    from nanoos_fw.ml.published import MODEL_TYPE, import_published, read_published

    checkpoint = read_published(file)
    weights = work_root / _FOLDER / f"cgcnn-{checkpoint.sha256[:16]}" / _WEIGHTS
    card, digest = import_published(
        file, weights, target, unit=unit, atom_init=atom_init
    )
    measure, best = "roc_auc" if card.classes else "mae", checkpoint.best_metric
    record = ModelRegistry(database).register(
        name=name,
        target=card.target_property,
        unit=card.unit,
        model_type=MODEL_TYPE,
        weights=weights,
        training_key=content_key("imported", {"name": name, "sha256": digest}),
        training_config={"architecture": card.architecture.model_dump(mode="json")},
        metrics={} if best is None else {"val": {measure: best}},
        dataset_info={"origin": card.origin, "counts": {"train": card.n_train}},
        environment=run_environment(),
    )
    return ImportedModel(record, card, checkpoint)


# ------------------------------------------------------------------------- private


def _without_shares(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics without the shares inside error bars, which were of others."""
    return {
        part: {k: v for k, v in numbers.items() if not k.startswith("within_")}
        for part, numbers in metrics.items()
    }


def _learned(registry: ModelRegistry, record: ModelRecord) -> set[str]:
    """Return the hashes of all datasets that a version was trained on, one by one."""
    found = set()
    version: ModelRecord | None = record
    while version is not None:
        found.add(str(version.dataset_info.get("dataset_hash") or ""))
        version = None if version.parent is None else registry.get(version.parent)
    return found - {""}
