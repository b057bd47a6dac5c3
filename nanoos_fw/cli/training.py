"""``nanoos train``: train a model on a dataset directory, without a database."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nanoos_fw.cli.common import add_json, print_json
from nanoos_fw.errors import InputError


def add_commands(commands: Any) -> None:
    """Add ``train`` and what it can do."""
    group = commands.add_parser("train", help="train a model on a dataset")
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")
    run = actions.add_parser(
        "run",
        help="train here and now, and leave the model in a folder",
        description=(
            "Interrupted, the same command continues from the last checkpoint. What "
            "is not in the file of settings has its default."
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


def _run(arguments: argparse.Namespace) -> int:
    from nanoos_fw.ml.training import train_cgcnn_model
    from nanoos_fw.parallel import Resources, locked

    values = {} if arguments.config is None else _read(arguments.config)
    with locked(arguments.output):
        result = train_cgcnn_model(
            arguments.target,
            values,
            dataset_dir=arguments.dataset,
            work_dir=arguments.output,
            resources=Resources(ranks=arguments.ranks, threads=arguments.threads),
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
