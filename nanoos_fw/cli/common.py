"""What the commands share: the launchpad they work on, and JSON."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanoos_fw.settings import Settings


def add_launchpad(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the database."""
    parser.add_argument(
        "-l",
        "--launchpad",
        type=Path,
        help=(
            "my_launchpad.yaml, or the folder of a demonstration; default: "
            "NANO_OS_LAUNCHPAD, then the file FireWorks finds"
        ),
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option for output that programs read."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def finish(parser: argparse.ArgumentParser, command: Callable[..., int]) -> None:
    """Add the options of a command that works on a database, and what it runs."""
    add_json(parser)
    add_launchpad(parser)
    parser.set_defaults(command=command)


def print_json(value: Any) -> None:
    """Print a value as JSON; numbers that JSON does not have as text."""
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=1, ensure_ascii=False)
    print(text)


def _finite(value: Any) -> Any:
    """Return a value with ``nan`` and ``inf`` as text, wherever they are in it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def print_locked(fw_ids: Iterable[int]) -> None:
    """Name fireworks that were passed over as a process has locked their workflow."""
    for fw_id in fw_ids:
        print(
            f"{'locked':11} workflow of firework {fw_id}, by a process that may be "
            "gone: nanoos reconcile removes a lock that it has seen for ten minutes"
        )


def open_launchpad(arguments: argparse.Namespace, settings: Settings) -> Any:
    """Return the launchpad that -l, the settings or FireWorks name."""
    from nanoos_fw.stores.database import load_launchpad
    from nanoos_fw.stores.embedded import open_embedded

    path: Path | None = arguments.launchpad or settings.launchpad
    if path is not None and path.is_dir():
        return open_embedded(path)
    return load_launchpad(path)


def launchpad_of(arguments: argparse.Namespace) -> Any:
    """Return the launchpad, with the settings in effect."""
    from nanoos_fw.settings import load_settings

    return open_launchpad(arguments, load_settings())


def database_of(arguments: argparse.Namespace) -> Any:
    """Return the database of the launchpad, for commands that only read."""
    launchpad = launchpad_of(arguments)
    from nanoos_fw.stores.database import open_database

    return open_database(launchpad)


def save_if_embedded(launchpad: Any) -> None:
    """Write an embedded database to its file; a server has written it already."""
    from nanoos_fw.stores.embedded import embedded_file, save_embedded

    if embedded_file():
        save_embedded(launchpad)
