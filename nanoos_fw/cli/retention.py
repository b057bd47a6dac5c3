"""``nanoos gc``: what nothing needs any more."""

from __future__ import annotations

import argparse
from datetime import timedelta
from typing import Any

from nanoos_fw.cli.common import finish, launchpad_of, print_json, save_if_embedded

_SHOWN = 20


def add_commands(commands: Any) -> None:
    """Add ``gc``."""
    collect = commands.add_parser(
        "gc",
        help="say what nothing needs any more, and remove it with --yes",
        description=(
            "Find launch directories of archived campaigns, artifacts that nothing "
            "refers to, parts of artifacts that were never finished, actions of "
            "launches that are gone, and features of older versions. What a model, a "
            "simulation, a campaign or a launch refers to is kept, and so is what is "
            "young. Nothing is changed without --yes. A removal cannot be undone: the "
            "journal names what was removed, when, by whom and why, and holds no copy. "
            "(For weights of models: nanoos models gc.)"
        ),
    )
    chosen = collect.add_mutually_exclusive_group()
    chosen.add_argument(
        "--dry-run", action="store_true", help="change nothing; this is the default"
    )
    chosen.add_argument("--yes", action="store_true", help="remove it")
    chosen.add_argument(
        "--journal", action="store_true", help="show what was removed, last first"
    )
    collect.add_argument(
        "--days",
        type=float,
        default=7.0,
        metavar="N",
        help="only what is older than N days (default: %(default)g)",
    )
    collect.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="KIND",
        help="launches, artifacts, parts, actions or features; may be given several "
        "times (default: all)",
    )
    finish(collect, _gc)


def _gc(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.retention import KINDS, by_kind, collect_waste, journal
    from nanoos_fw.stores.database import open_database

    database = open_database(launchpad)
    if arguments.journal:
        batches = journal(database)
        if arguments.json:
            print_json(batches)
        for batch in () if arguments.json else batches:
            kinds = ", ".join(f"{n} {kind}" for kind, n in batch["kinds"].items())
            print(f"{batch['batch']}: {kinds}; {batch['bytes']} bytes")
        return 0
    found = collect_waste(
        database,
        remove=arguments.yes,
        older_than=timedelta(days=arguments.days),
        kinds=arguments.only or KINDS,
    )
    save_if_embedded(launchpad)
    if arguments.json:
        print_json(found.to_dict())
        return 0
    verb = "removed" if arguments.yes else "would remove"
    for word, entries in (("kept", found.kept), (verb, found.waste)):
        for entry in entries[:_SHOWN]:
            print(
                f"{word:12} {entry.kind:9} {entry.what}: {entry.why}; "
                f"{entry.bytes} bytes"
            )
        if len(entries) > _SHOWN:
            print(f"{word:12} and {len(entries) - _SHOWN} more (--json lists all)")
    total = ", ".join(f"{n} {kind}" for kind, n in by_kind(found.waste).items())
    end = "" if arguments.yes or not found.waste else "; --yes removes them, for good"
    print(f"{total or 'nothing'}: {found.bytes} bytes{end}")
    return 0
