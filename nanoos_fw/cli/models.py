"""``nanoos models``: the model registry."""

from __future__ import annotations

import argparse
from typing import Any

from nanoos_fw.cli.common import add_json, add_launchpad, launchpad_of, print_json


def add_commands(commands: Any) -> None:
    """Add ``models`` and what it can do."""
    group = commands.add_parser("models", help="look at and manage registered models")
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")

    listed = actions.add_parser("list", help="list the registered models")
    add_json(listed)
    add_launchpad(listed)
    listed.set_defaults(command=_list)


def _list(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.stores.models import ModelRegistry

    records = ModelRegistry(launchpad.db).list_models()
    if arguments.json:
        print_json([record.to_dict() for record in records])
        return 0
    for record in records:
        test = record.metrics.get("test", {})
        error = f"test MAE {test['mae']:.4f} {record.unit}" if test else "not tested"
        print(f"{record.reference:40} {record.model_type:8} {record.target} {error}")
    if not records:
        print("no model is registered")
    return 0
