"""``nanoos import-table``: properties of stored structures from a table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nanoos_fw.cli.common import finish, launchpad_of, print_json, save_if_embedded

_SHOWN = 20


def add_commands(commands: Any) -> None:
    """Add ``import-table``."""
    table = commands.add_parser(
        "import-table",
        help="import a property of stored structures from CSV or JSON lines",
        description=(
            "Each row names a structure, by key or label or by a file that holds it, "
            "and a value with its unit. Units are checked and converted; rows that "
            "cannot be used are reported one by one and change nothing."
        ),
    )
    table.add_argument("table", type=Path, metavar="FILE", help=".csv or .jsonl")
    table.add_argument("--property", required=True, metavar="NAME", dest="name")
    table.add_argument(
        "--unit", help="unit of the values; without it the rows tell theirs"
    )
    table.add_argument(
        "--source", required=True, metavar="TEXT", help="where the values are from"
    )
    for option, what in (
        ("structure", "key or label of the structure"),
        ("file", "file of the structure, relative to the table"),
        ("value", "the value"),
        ("unit", "its unit"),
    ):
        table.add_argument(
            f"--{option}-column", metavar="COLUMN", help=f"column with {what}"
        )
    table.add_argument(
        "--set",
        dest="in_set",
        default="imported",
        metavar="NAME",
        help="set of structures read from files (default: %(default)s)",
    )
    table.add_argument(
        "--replace", action="store_true", help="write over values that differ"
    )
    finish(table, _import_table)


def _import_table(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations import import_property_table
    from nanoos_fw.property_tables import TableColumns
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.structures import StructureStore

    report = import_property_table(
        StructureStore(open_database(launchpad)),
        arguments.table,
        arguments.name,
        unit=arguments.unit,
        columns=TableColumns(
            structure=arguments.structure_column,
            file=arguments.file_column,
            value=arguments.value_column,
            unit=arguments.unit_column,
        ),
        source=arguments.source,
        in_set=arguments.in_set,
        replace=arguments.replace,
    )
    save_if_embedded(launchpad)
    failures = sorted(report.failures.items())
    if arguments.json:
        print_json(
            {
                "property": arguments.name,
                "unit": report.unit,
                "written": report.written,
                "unchanged": report.unchanged,
                "structures_added": report.added,
                "failures": [
                    {"line": line, **error.to_dict()} for line, error in failures
                ],
            }
        )
    else:
        for line, error in failures[:_SHOWN]:
            print(f"refused    line {line}: {error}")
        if len(failures) > _SHOWN:
            print(f"refused    … and {len(failures) - _SHOWN} more (--json lists all)")
        print(
            f"{report.total} rows: {arguments.name} ({report.unit or 'no unit'}) of "
            f"{len(report.written)} structures written, {len(report.unchanged)} "
            f"unchanged, {len(failures)} refused"
        )
    return 1 if failures else 0
