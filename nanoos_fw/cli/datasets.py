"""``nanoos dataset``: build, show and export frozen datasets."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli.common import add_json, finish, launchpad_of, print_json
from nanoos_fw.cli.features import (
    add_parameters,
    add_selection,
    keys_of_set,
    parameters_of,
    selected_keys,
)
from nanoos_fw.errors import InputError

if TYPE_CHECKING:
    from nanoos_fw.ml.datasets import Dataset
    from nanoos_fw.stores.structures import StructureStore

_SPLITS = ("random", "composition", "kfold", "composition-kfold", "time", "stable")
_SHOWN = 10


def add_commands(commands: Any) -> None:
    """Add ``dataset`` and what it can do."""
    group = commands.add_parser("dataset", help="build, show or export a dataset")
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")

    build = actions.add_parser(
        "build",
        help="freeze labels and features of a set into a dataset",
        description=(
            "Labels are numbers imported with the structures or in a table; "
            "NAME_per_atom is NAME divided by the number of sites. With --campaign or "
            "--method they come from simulations: formation_energy_per_atom, energy, "
            "energy_per_atom, volume, volume_per_atom, pressure, max_force, or any "
            "number of the results, such as averages.density.mean. The same input "
            "gives the same bytes."
        ),
    )
    add_selection(build)
    build.add_argument(
        "--campaign",
        metavar="NAME",
        help="take labels from the relaxations of a campaign, by its method and "
        "against its relaxed elements",
    )
    build.add_argument(
        "--method", metavar="KEY", help="take labels from simulations by this method"
    )
    build.add_argument(
        "--references",
        metavar="SET",
        help="set of the relaxed elements, for formation energies by --method",
    )
    build.add_argument(
        "--mock-targets",
        action="store_true",
        help="make the targets up, to try a workflow out; models trained on them "
        "cannot be activated",
    )
    build.add_argument("--target", required=True, metavar="NAME")
    build.add_argument("--unit", help="unit of the target, if it is not a known one")
    build.add_argument(
        "--split", choices=_SPLITS, default="random", help="default: %(default)s"
    )
    build.add_argument(
        "--train-fraction", type=float, default=0.8, help="default: %(default)s"
    )
    build.add_argument(
        "--val-fraction",
        type=float,
        help="default: half of the rest; the test part gets what is left",
    )
    build.add_argument("--folds", type=int, default=5, help="default: %(default)s")
    build.add_argument("--fold", type=int, default=0, help="from 0: the test part")
    build.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    build.add_argument(
        "--min-samples", type=int, default=10, help="default: %(default)s"
    )
    build.add_argument(
        "--iqr",
        type=float,
        metavar="F",
        help="take outliers out of the training part: F interquartile ranges",
    )
    build.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    add_parameters(build)
    finish(build, _build)

    show = actions.add_parser("show", help="show what a dataset holds")
    show.add_argument("directory", type=Path, metavar="DIR")
    add_json(show)
    show.set_defaults(command=_show)

    export = actions.add_parser("export", help="write a dataset as a table")
    export.add_argument("directory", type=Path, metavar="DIR")
    export.add_argument(
        "-o", "--output", type=Path, required=True, help=".csv, .jsonl or .parquet"
    )
    add_json(export)
    export.set_defaults(command=_export)


def _build(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from rich.console import Console

    from nanoos_fw.console import CountProgress
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.datasets import build_train_val_datasets
    from nanoos_fw.stores.structures import StructureStore

    database = open_database(launchpad)
    structures = StructureStore(database)
    keys = selected_keys(structures, arguments)
    method, references = _label_source(database, structures, arguments)
    fractions: dict[str, Any] = {}
    if arguments.val_fraction is not None:
        rest = 1 - arguments.train_fraction - arguments.val_fraction
        # Rounding must not make a negative fraction of nothing.
        test = 0.0 if abs(rest) < 1e-9 else rest
        fractions = {"val_fraction": arguments.val_fraction, "test_fraction": test}
    progress = CountProgress(Console(stderr=True), "reading graphs", len(keys))
    with progress.shown(), _writable(arguments.output):
        built = build_train_val_datasets(
            database,
            arguments.target,
            arguments.train_fraction,
            arguments.min_samples,
            keys=keys,
            features=parameters_of(arguments).model_dump(mode="json"),
            method=method,
            references=references,
            directory=arguments.output,
            on_progress=lambda done, _: progress.update(done),
            seed=arguments.seed,
            iqr_factor=arguments.iqr,
            unit=arguments.unit,
            split=arguments.split,
            n_folds=arguments.folds,
            fold=arguments.fold,
            mock_targets=arguments.mock_targets,
            **fractions,
        )
    found = {
        **_description(built.dataset),
        "directory": str(arguments.output),
        "without_label": built.without_label,
        "failed_labels": built.failed_labels,
        "without_features": built.without_features,
        "leakage": built.leakage.to_dict(),
    }
    if arguments.json:
        print_json(found)
        return 0
    _print_description(found)
    for key, reason in list(built.without_features.items())[:_SHOWN]:
        print(f"left out   {key[:12]}: no features: {reason}")
    print(
        f"{arguments.output}: {built.dataset.num_samples} of {len(keys)} structures; "
        f"{len(built.without_label)} without label, "
        f"{len(built.without_features)} without features"
    )
    return 0


@contextlib.contextmanager
def _writable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror}") from error


def _label_source(
    database: Any, structures: StructureStore, arguments: argparse.Namespace
) -> tuple[str | None, list[str]]:
    """Return method and relaxed elements, if labels come from simulations."""
    from nanoos_fw.stores.campaigns import CampaignStore

    if arguments.campaign is not None:
        if arguments.method is not None or arguments.references is not None:
            raise InputError("give --campaign, or --method with --references")
        campaigns = CampaignStore(database)
        method = str(campaigns.output(arguments.campaign, "method"))
        return method, structures.keys(f"{arguments.campaign}/references")
    if arguments.references is None:
        return arguments.method, []
    if arguments.method is None:
        raise InputError("--references needs --method")
    return arguments.method, keys_of_set(structures, arguments.references)


def _show(arguments: argparse.Namespace) -> int:
    from nanoos_fw.ml.datasets import check_leakage, open_dataset

    dataset = open_dataset(arguments.directory)
    found = {**_description(dataset), "leakage": check_leakage(dataset).to_dict()}
    if arguments.json:
        print_json(found)
    else:
        _print_description(found)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from nanoos_fw.ml.datasets import open_dataset
    from nanoos_fw.ml.exports import export_dataset

    rows = export_dataset(open_dataset(arguments.directory), arguments.output)
    if arguments.json:
        print_json({"file": str(arguments.output), "rows": rows})
    else:
        print(f"{arguments.output}: {rows} rows")
    return 0


def _description(dataset: Dataset) -> dict[str, Any]:
    return {
        "dataset_hash": dataset.dataset_hash,
        "target_property": dataset.config.target_property,
        "unit": dataset.unit,
        "mock_targets": dataset.mock_targets,
        "split": dataset.config.split,
        "seed": dataset.config.seed,
        "counts": {
            part: dataset.parts.count(part)
            for part in ("train", "val", "test", "outlier")
        },
        "target_mean": dataset.target_mean,
        "target_std": dataset.target_std,
        "outlier_bounds": dataset.outlier_bounds,
        "removed": [list(row) for row in dataset.removed],
        "cutoff_radius": dataset.graphs.cutoff_radius,
        "max_neighbors": dataset.graphs.max_neighbors,
    }


def _print_description(found: dict[str, Any]) -> None:
    unit = found["unit"] or "unit not known"
    counts = ", ".join(f"{n} {part}" for part, n in found["counts"].items())
    leakage = found["leakage"]
    print(f"dataset    {found['dataset_hash']}")
    print(f"target     {found['target_property']} ({unit})")
    if found["mock_targets"]:
        print("target     made up (mock): no model of it can be activated")
    print(f"rows       {counts}")
    print(f"split      {found['split']}, seed {found['seed']}")
    print(f"training   mean {found['target_mean']:.6g}, std {found['target_std']:.6g}")
    print(
        f"leakage    {leakage['same_structure']} structures and "
        f"{leakage['same_formula']} formulas in more than one part"
    )
    for ids in leakage["structures"][:_SHOWN]:
        print(f"leakage    one graph: {', '.join(name[:12] for name in ids)}")
    for key, value in found["removed"][:_SHOWN]:
        print(f"outlier    {key[:12]}: {value:.6g}")
