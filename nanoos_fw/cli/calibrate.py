"""``nanoos models calibrate``: intervals for a registered model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nanoos_fw.cli.common import finish, open_launchpad, print_json, save_if_embedded


def add_command(actions: Any) -> None:
    """Add the action to those of ``models``."""
    parser = actions.add_parser(
        "calibrate",
        help="give a model intervals, by its errors on labelled structures",
        description=(
            "Predict structures of a dataset that the model was not trained on, and "
            "register the same weights with the intervals that their errors give, as "
            "the next version of the name. Its intervals hold for structures like "
            "these. Nothing is activated."
        ),
    )
    parser.add_argument("reference", metavar="NAME", help="name, name@version, ...")
    parser.add_argument(
        "--dataset", type=Path, required=True, metavar="DIR", help="its directory"
    )
    finish(parser, _calibrate)


def _calibrate(arguments: argparse.Namespace) -> int:
    from nanoos_fw.settings import load_settings

    settings = load_settings()
    launchpad = open_launchpad(arguments, settings)
    from nanoos_fw.operations.models import calibrate_registered
    from nanoos_fw.stores.database import open_database

    answer = calibrate_registered(
        open_database(launchpad),
        arguments.reference,
        arguments.dataset,
        settings.work_dir.resolve(),
    )
    save_if_embedded(launchpad)
    if arguments.json:
        print_json(answer.to_dict())
        return 0
    record, found = answer.record, answer.calibration
    unit = f" {record.unit}" if record.unit else ""
    print(
        f"{record.reference}: {answer.parent.reference} with intervals from {found.n} "
        f"structures of {arguments.dataset}, where its MAE is {found.mae:.4g}{unit}"
    )
    print(
        f"{100 * found.coverage:g} % intervals are ±{found.mean_half_width:.4g}{unit} "
        "on average; they hold for structures like these"
    )
    return 0
