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
    from nanoos_fw.ml.calibration import calibrate_model
    from nanoos_fw.ml.datasets import open_dataset
    from nanoos_fw.provenance import content_key, run_environment
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.models import ModelRegistry

    registry = ModelRegistry(open_database(launchpad))
    parent = registry.get(arguments.reference)
    model = registry.load(parent)
    dataset = open_dataset(arguments.dataset)
    key = content_key(
        "calibrated", {"model": parent.sha256, "dataset": dataset.dataset_hash}
    )
    folder = settings.work_dir.resolve() / "models" / f"calibrated-{key[:16]}"
    weights = folder / "weights.safetensors"
    found = calibrate_model(model, dataset, weights)
    told = {**found.to_dict(), "dataset_hash": dataset.dataset_hash}
    record = registry.register(
        name=parent.name,
        target=parent.target,
        unit=parent.unit,
        model_type=parent.model_type,
        weights=weights,
        training_key=content_key("calibrated version", [parent.name, key]),
        training_config=parent.training_config,
        metrics={**parent.metrics, "calibration": {"n": found.n, "mae": found.mae}},
        dataset_info={**parent.dataset_info, "calibration": told},
        environment=run_environment(),
        parent=parent.reference,
    )
    save_if_embedded(launchpad)
    if arguments.json:
        print_json({"model": record.reference, "parent": parent.reference, **told})
        return 0
    unit = f" {record.unit}" if record.unit else ""
    print(
        f"{record.reference}: {parent.reference} with intervals from {found.n} "
        f"structures of {arguments.dataset}, where its MAE is {found.mae:.4g}{unit}"
    )
    print(
        f"{100 * found.coverage:g} % intervals are ±{found.mean_half_width:.4g}{unit} "
        "on average; they hold for structures like these"
    )
    return 0
