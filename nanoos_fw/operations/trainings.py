"""Submit a training on the folder of a dataset, whose model goes into the registry."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.errors import InputError
from nanoos_fw.operations import prepare_launchpad, submit
from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.models import ModelRegistry, check_name

if TYPE_CHECKING:
    from nanoos_fw.ml.training_config import TrainingConfig
    from nanoos_fw.stores.models import ModelRecord


@dataclass(frozen=True)
class SubmittedTraining:
    """A training in the launchpad.

    Parameters
    ----------
    model
        Name that its model will have in the registry.
    parent
        ``name@version`` that is trained further, if any.
    workflow
        Key of the workflow.
    added
        Whether it was not there before.
    """

    model: str
    parent: str | None
    workflow: str
    added: bool


def submit_training(
    launchpad: Any,
    dataset: Path,
    target: str,
    model_name: str,
    work_root: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    parent: str | None = None,
    activate: bool = False,
) -> SubmittedTraining:
    """Submit a training; the same one of the same name is submitted once.

    Parameters
    ----------
    launchpad
        Where its firework goes, and whose registry its model.
    dataset
        Folder, which all workers see.
    target
        Property that the dataset holds.
    model_name
        In the registry.
    work_root
        Folder of the work directories, which all workers share.
    settings
        Of :class:`nanoos_fw.ml.training_config.TrainingConfig`; what is not given has
        its default.
    parent
        Registered model to train further. Its version is fixed now, since an alias may
        move until the training begins.
    activate
        Make the new version the active one.

    Raises
    ------
    InputError
        If dataset, settings and target do not belong together, there is no such
        parent, or versions of the name predict another quantity or in another unit.
    """
    from nanoos_fw.ml.training import check_without_parent, read_training_config
    from nanoos_fw.workflows import training_workflow

    values = dict(settings or {})
    if values.setdefault("target", target) != target:
        raise InputError(f"the settings are for {values['target']!r}, not {target!r}")
    training, version = read_training_config(values), None
    models = ModelRegistry(open_database(launchpad))
    if parent is None:
        check_without_parent(training)
    else:
        record = models.get(parent)
        version = record.reference
        training = _with_registered(training, models, record)
    check_name(model_name, training.target)
    dataset_hash, unit = _held(dataset, training.target)
    _check_versions(models, model_name, training.target, unit)
    workflow = training_workflow(
        str(dataset.resolve()),
        dataset_hash,
        training,
        model_name,
        str(work_root.resolve()),
        parent=version,
        activate=activate,
    )
    prepare_launchpad(launchpad)
    added = submit(launchpad, workflow)
    return SubmittedTraining(model_name, version, str(workflow.metadata["key"]), added)


# ------------------------------------------------------------------------- private


def _with_registered(
    training: TrainingConfig, models: ModelRegistry, record: ModelRecord
) -> TrainingConfig:
    """Return a config that names a registered parent and has its sizes."""
    from nanoos_fw.ml.training import with_parent

    with tempfile.TemporaryDirectory() as folder:
        path = models.write_weights(record, Path(folder) / "parent")
        return with_parent(training, path)


def _held(directory: Path, target: str) -> tuple[str, str]:
    """Return hash and unit of a dataset of the target."""
    from nanoos_fw.ml.datasets import open_dataset

    dataset = open_dataset(directory, verify=False)
    held = dataset.config.target_property
    if held != target:
        raise InputError(f"{directory} holds {held!r}, not {target!r}")
    return dataset.dataset_hash, dataset.unit


def _check_versions(models: ModelRegistry, name: str, target: str, unit: str) -> None:
    """Let an alias of a name not move from one quantity to another."""
    for record in models.list_models(name=name):
        if (record.target, record.unit) != (target, unit):
            raise InputError(
                f"{record.reference} predicts {record.target!r} in "
                f"{record.unit or 'no unit'}, the dataset holds {target!r} in "
                f"{unit or 'no unit'}",
                advice="choose another name for the model",
            )
