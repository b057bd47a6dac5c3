"""``nanoos train``: train a model on a dataset directory, here or as a firework."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nanoos_fw.cli.common import (
    add_json,
    finish,
    launchpad_of,
    print_json,
    save_if_embedded,
)
from nanoos_fw.errors import InputError


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
    finish(submit, _submit)


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
    from nanoos_fw.operations.trainings import submit_training
    from nanoos_fw.settings import load_settings

    root = load_settings().work_dir.resolve()
    found = submit_training(
        launchpad,
        arguments.dataset,
        arguments.target,
        arguments.name,
        root,
        settings={} if arguments.config is None else _read(arguments.config),
        parent=arguments.parent,
        activate=arguments.activate,
    )
    save_if_embedded(launchpad)
    if arguments.json:
        print_json(
            {
                "model": found.model,
                "parent": found.parent,
                "added": found.added,
                "work_root": str(root),
            }
        )
    elif found.added:
        print(f"training of {arguments.name!r} is submitted; rlaunch runs it")
    else:
        print(f"this training of {arguments.name!r} is there already")
    return 0


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
