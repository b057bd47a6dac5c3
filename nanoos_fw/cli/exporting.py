"""``nanoos export`` and ``nanoos import-results``: results as files, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nanoos_fw.cli.common import (
    add_json,
    add_launchpad,
    database_of,
    finish,
    launchpad_of,
    print_json,
    save_if_embedded,
)


def add_commands(commands: Any) -> None:
    """Add both."""
    group = commands.add_parser(
        "export",
        help="write predictions or simulations to a file",
        description=(
            "Files tell units and provenance, and 'nanoos import-results' brings them "
            "into another database, bit for bit."
        ),
    )
    actions = group.add_subparsers(title="results", required=True, metavar="RESULTS")
    predictions = _action(actions, "predictions", "of a model for stored structures")
    predictions.add_argument("model", metavar="MODEL", help="in the registry")
    predictions.add_argument(
        "--set", dest="in_set", metavar="NAME", help="of structures"
    )
    predictions.set_defaults(command=_predictions)
    simulations = _action(actions, "simulations", "with their results")
    simulations.add_argument("kind", choices=("md", "relaxation"))
    simulations.set_defaults(command=_simulations)

    back = commands.add_parser(
        "import-results", help="bring exported predictions or simulations in"
    )
    back.add_argument("file", type=Path, metavar="FILE")
    finish(back, _import)


def _action(actions: Any, name: str, words: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=words)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE",
        help=".csv, .jsonl, .parquet, or .extxyz with the structures",
    )  # fmt: skip
    add_json(parser)
    add_launchpad(parser)
    return parser


def _predictions(arguments: argparse.Namespace) -> int:
    from nanoos_fw.operations.result_exports import export_predictions

    return _written(
        arguments,
        export_predictions(
            database_of(arguments), arguments.model, arguments.output, arguments.in_set
        ),
    )


def _simulations(arguments: argparse.Namespace) -> int:
    from nanoos_fw.operations.result_exports import export_simulations

    return _written(
        arguments,
        export_simulations(database_of(arguments), arguments.kind, arguments.output),
    )


def _written(arguments: argparse.Namespace, rows: int) -> int:
    if arguments.json:
        print_json({"file": str(arguments.output), "rows": rows})
    else:
        print(f"{arguments.output}: {rows} rows")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.result_exports import import_results
    from nanoos_fw.stores.database import open_database

    found = import_results(open_database(launchpad), arguments.file)
    save_if_embedded(launchpad)
    if arguments.json:
        print_json({"kind": found.kind, "rows": found.rows, "added": found.added})
    else:
        print(f"{found.rows} {found.kind}: {found.added} are new")
    return 0
