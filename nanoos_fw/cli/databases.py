"""``nanoos db``: the schema of the database."""

from __future__ import annotations

import argparse
from typing import Any

from nanoos_fw.cli.common import finish, launchpad_of, print_json, save_if_embedded


def add_commands(commands: Any) -> None:
    """Add ``db`` and what it can do."""
    group = commands.add_parser("db", help="show or migrate the database's schema")
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")

    status = actions.add_parser("status", help="schema, documents, missing indexes")
    finish(status, _status)

    move = actions.add_parser(
        "migrate",
        help="bring the database to the schema of this release, or another",
        description=(
            "Killed at any time, the same command continues. Make a backup first, and "
            "let no campaign run meanwhile."
        ),
    )
    move.add_argument(
        "--to", type=int, metavar="N", help="schema version (default: the newest)"
    )
    move.add_argument(
        "--dry-run", action="store_true", help="say what would change, change nothing"
    )
    finish(move, _migrate)


def _status(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.stores.migrations import database_status

    status = database_status(launchpad.db)
    if arguments.json:
        print_json(status)
    else:
        schema, known = status["schema"], status["known_schema"]
        print(f"schema {schema or 'none yet'}, this release: {known}")
        for name, count in status["documents"].items():
            print(f"{name:20} {count} documents")
        for index in status["missing_indexes"]:
            print(f"missing index: {index}")
        for step in status["pending"]:
            print(f"to do: {_words(step)}")
    behind = status["schema"] is not None and status["schema"] != status["known_schema"]
    return 1 if behind else 0


def _migrate(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.stores.database import SCHEMA_VERSION
    from nanoos_fw.stores.migrations import migrate

    target = SCHEMA_VERSION if arguments.to is None else arguments.to
    steps = migrate(launchpad.db, target=target, dry_run=arguments.dry_run)
    if not arguments.dry_run:
        save_if_embedded(launchpad)
    found = [step.to_dict() for step in steps]
    if arguments.json:
        print_json({"schema": target, "dry_run": arguments.dry_run, "steps": found})
        return 0
    for step in found:
        print(f"{'would do: ' if arguments.dry_run else ''}{_words(step)}")
    if not found:
        print(f"the database has schema {target}: nothing to do")
    return 0


def _words(step: dict[str, Any]) -> str:
    return (
        f"schema {step['from']} -> {step['to']}: {step['title']} "
        f"({step['documents']} documents)"
    )
