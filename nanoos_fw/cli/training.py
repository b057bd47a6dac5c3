"""``nanoos train``: train a model on a dataset directory, here or as a firework."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli.common import (
    add_json,
    add_launchpad,
    launchpad_of,
    print_json,
    save_if_embedded,
)
from nanoos_fw.errors import InputError

if TYPE_CHECKING:
    from nanoos_fw.ml.training import TrainingConfig
    from nanoos_fw.stores.models import ModelRecord, ModelRegistry


def add_commands(commands: Any) -> None:
    """Add ``train`` and what it can do."""
    group = commands.add_parser("train", help="train a model on a dataset")
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")
    run = actions.add_parser(
        "run",
        help="train here and now, and leave the model in a folder",
        description=(
            "Interrupted, or stopped before the end of a SLURM allocation (exit code "
            "75), the same command continues from the last checkpoint. What is not in "
            "the file of settings has its default."
        ),
    )
    run.add_argument("dataset", type=Path, metavar="DATASET", help="its directory")
    run.add_argument("--target", required=True, metavar="NAME")
    run.add_argument("--config", type=Path, metavar="FILE", help="settings, YAML")
    run.add_argument("--parent", type=Path, metavar="FILE", help="train it further")
    run.add_argument("--ranks", type=int, default=1, help="default: %(default)s")
    run.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    run.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    add_json(run)
    run.set_defaults(command=_run)

    submit = actions.add_parser(
        "submit",
        help="submit a training, whose model goes into the registry",
        description=(
            "Dataset and work directories must be where all workers see them. The "
            "firework continues in as many jobs as it takes. The same training of the "
            "same name is submitted once."
        ),
    )
    submit.add_argument("dataset", type=Path, metavar="DATASET", help="its directory")
    submit.add_argument("--target", required=True, metavar="PROPERTY")
    submit.add_argument(
        "--name", required=True, metavar="MODEL", help="in the registry"
    )
    submit.add_argument("--config", type=Path, metavar="FILE", help="settings, YAML")
    submit.add_argument(
        "--parent", metavar="MODEL", help="registered model to train further"
    )
    submit.add_argument(
        "--activate", action="store_true", help="make it the active version"
    )
    add_json(submit)
    add_launchpad(submit)
    submit.set_defaults(command=_submit)


def _run(arguments: argparse.Namespace) -> int:
    from nanoos_fw.ml.training import train_cgcnn_model
    from nanoos_fw.parallel import Resources, locked
    from nanoos_fw.slurm import allocation_deadline

    values = {} if arguments.config is None else _read(arguments.config)
    with locked(arguments.output):
        result = train_cgcnn_model(
            arguments.target,
            values,
            dataset_dir=arguments.dataset,
            work_dir=arguments.output,
            resources=Resources(ranks=arguments.ranks, threads=arguments.threads),
            deadline=allocation_deadline(),
            parent=arguments.parent,
        )
    if arguments.json:
        print_json(result.model_dump(mode="json"))
        return 0
    for name, parts in (("model", result.metrics), *result.baselines.items()):
        told = ", ".join(
            f"{part} {numbers['mae']:.4g}"
            for part, numbers in parts.items()
            if numbers["mae"] is not None
        )
        print(f"{name:12} MAE ({result.unit}): {told}")
    print(result.checkpoint)
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.ml.training import check_without_parent, read_training_config
    from nanoos_fw.operations import prepare_launchpad, submit
    from nanoos_fw.settings import load_settings
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.models import ModelRegistry, check_name
    from nanoos_fw.workflows import training_workflow

    values = {} if arguments.config is None else _read(arguments.config)
    if values.setdefault("target", arguments.target) != arguments.target:
        raise InputError(
            f"{arguments.config} is for {values['target']!r}, not {arguments.target!r}"
        )
    training, parent = read_training_config(values), None
    models = ModelRegistry(open_database(launchpad))
    if arguments.parent is not None:
        record = models.get(arguments.parent)
        # An alias may move until the training begins; the version does not.
        parent = record.reference
        training = _with_registered(training, models, record)
    else:
        check_without_parent(training)
    check_name(arguments.name, training.target)
    root = str(load_settings().work_dir.resolve())
    workflow = training_workflow(
        str(arguments.dataset.resolve()),
        _dataset_hash(arguments.dataset, training.target),
        training,
        arguments.name,
        root,
        parent=parent,
        activate=arguments.activate,
    )
    prepare_launchpad(launchpad)
    added = submit(launchpad, workflow)
    save_if_embedded(launchpad)
    if arguments.json:
        answer = {"model": arguments.name, "parent": parent, "added": added}
        print_json({**answer, "work_root": root})
    elif added:
        print(f"training of {arguments.name!r} is submitted; rlaunch runs it")
    else:
        print(f"this training of {arguments.name!r} is there already")
    return 0


def _with_registered(
    training: TrainingConfig, models: ModelRegistry, record: ModelRecord
) -> TrainingConfig:
    """Return a config that names a registered parent and has its sizes."""
    from nanoos_fw.ml.training import with_parent

    with tempfile.TemporaryDirectory() as folder:
        path = models.write_weights(record, Path(folder) / "parent")
        return with_parent(training, path)


def _dataset_hash(directory: Path, target: str) -> str:
    from nanoos_fw.ml.datasets import open_dataset

    dataset = open_dataset(directory, verify=False)
    held = dataset.config.target_property
    if held != target:
        raise InputError(f"{directory} holds {held!r}, not {target!r}")
    return dataset.dataset_hash


def _read(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, YAMLError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings by name")
    return values
