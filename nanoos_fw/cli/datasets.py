"""``nanoos dataset``: build, show and export frozen datasets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli.common import add_json, add_launchpad, launchpad_of, print_json
from nanoos_fw.cli.features import add_parameters, keys_of_set, parameters_of
from nanoos_fw.errors import InputError

if TYPE_CHECKING:
    from nanoos_fw.ml.datasets import Dataset

_SPLITS = ("random", "composition", "kfold", "composition-kfold", "time")
_SHOWN = 10


def add_commands(commands: Any) -> None:
    """Add ``dataset`` and what it can do."""
    group = commands.add_parser("dataset", help="build, show or export a dataset")
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")

    build = actions.add_parser(
        "build",
        help="freeze labels and features of a set into a dataset",
        description=(
            "Labels are numbers imported with the structures; NAME_per_atom is NAME "
            "divided by the number of sites. The same input gives the same bytes."
        ),
    )
    build.add_argument("--set", dest="in_set", required=True, metavar="NAME")
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
    add_json(build)
    add_launchpad(build)
    build.set_defaults(command=_build)

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
    from nanoos_fw.ml.datasets import write_dataset
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.datasets import build_train_val_datasets
    from nanoos_fw.stores.structures import StructureStore

    database = open_database(launchpad)
    keys = keys_of_set(StructureStore(database), arguments.in_set)
    fractions: dict[str, Any] = {}
    if arguments.val_fraction is not None:
        rest = 1 - arguments.train_fraction - arguments.val_fraction
        # Rounding must not make a negative fraction of nothing.
        test = 0.0 if abs(rest) < 1e-9 else rest
        fractions = {"val_fraction": arguments.val_fraction, "test_fraction": test}
    built = build_train_val_datasets(
        database,
        arguments.target,
        arguments.train_fraction,
        arguments.min_samples,
        keys=keys,
        features=parameters_of(arguments).model_dump(mode="json"),
        seed=arguments.seed,
        iqr_factor=arguments.iqr,
        unit=arguments.unit,
        split=arguments.split,
        n_folds=arguments.folds,
        fold=arguments.fold,
        **fractions,
    )
    try:
        write_dataset(built.dataset, arguments.output)
    except OSError as error:
        raise InputError(
            f"cannot write {arguments.output}: {error.strerror}"
        ) from error
    found = {
        **_description(built.dataset),
        "directory": str(arguments.output),
        "without_label": built.without_label,
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
