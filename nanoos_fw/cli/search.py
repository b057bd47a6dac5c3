"""``nanoos search``: hyper-parameter searches."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli.common import finish, launchpad_of, print_json, save_if_embedded

if TYPE_CHECKING:
    from nanoos_fw.operations.searches import SubmittedSearch
    from nanoos_fw.stores.search_records import SearchRecords


def add_commands(commands: Any) -> None:
    """Add ``search`` and what it can do."""
    group = commands.add_parser("search", help="search hyper-parameters of a model")
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")

    created = actions.add_parser(
        "create",
        help="create a search and submit its workers",
        description=(
            "FILE is YAML: name, dataset_dir, training (target, epochs, ...), space "
            "(hyper-parameter: {kind: float, low: 1.0e-4, high: 1.0e-2, log: true}, "
            "{kind: int, ...} or {kind: choice, values: [...]}), method (random, tpe, "
            "halving) and budget (trials, epochs, node_hours)."
        ),
    )
    created.add_argument("file", type=Path, metavar="FILE")
    _add_workers(created)
    finish(created, _create)

    resumed = actions.add_parser(
        "resume", help="submit more workers, also to a stopped search"
    )
    resumed.add_argument("name")
    _add_workers(resumed)
    finish(resumed, _resume)

    status = actions.add_parser("status", help="show how far a search is")
    status.add_argument("name", nargs="?", help="without it: list the searches")
    status.add_argument("--table", action="store_true", help="show every trial")
    finish(status, _status)

    best = actions.add_parser("best", help="show the best configuration so far")
    best.add_argument("name")
    finish(best, _best)

    stop = actions.add_parser("stop", help="begin no more trials")
    stop.add_argument("name")
    finish(stop, _stop)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="fireworks that work on it at the same time (default: %(default)s)",
    )


# ------------------------------------------------------------------------- commands


def _create(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.searches import create_search, read_search_file

    config = read_search_file(arguments.file)
    found = create_search(launchpad, config, _work_root(), workers=arguments.workers)
    return _tell_submitted(arguments, launchpad, found)


def _resume(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.searches import resume_search

    found = resume_search(
        launchpad, arguments.name, _work_root(), workers=arguments.workers
    )
    return _tell_submitted(arguments, launchpad, found)


def _work_root() -> Path:
    from nanoos_fw.settings import load_settings

    return load_settings().work_dir


def _tell_submitted(
    arguments: argparse.Namespace, launchpad: Any, found: SubmittedSearch
) -> int:
    save_if_embedded(launchpad)
    name, workers = found.search, found.workers
    if arguments.json:
        print_json(asdict(found))
    elif workers:
        print(f"search {name!r}: {workers} workers are submitted; rlaunch runs them")
    else:
        print(f"search {name!r} has its workers; 'nanoos search resume' adds more")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    store, _ = _open(arguments)
    if arguments.name is None:
        names = store.names()
        if arguments.json:
            print_json(names)
        else:
            print("\n".join(names) or "no search")
        return 0
    found = store.status(arguments.name)
    rows = store.table(arguments.name) if arguments.table else None
    if arguments.json:
        print_json(found if rows is None else {**found, "table": rows})
        return 0
    counts = ", ".join(f"{n} {state}" for state, n in found["trials"].items() if n)
    spent, budget = found["spent"], found["budget"]
    print(f"search  {found['name']} ({found['method']}): {found['state']}")
    print(f"trials  {counts or 'none yet'}")
    for what, value in spent.items():
        limit = f" of {budget[what]}" if budget[what] is not None else ""
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"spent   {shown}{limit} {what.replace('_', ' ')}")
    if found["best"]:
        print(f"best    {_words(found['best'])}")
    if found["model"]:
        print(f"model   {found['model']}")
    for row in rows or ():
        print(f"trial   {_words({**row, 'epochs': max(row['values'], default=0)})}")
    return 0


def _words(row: dict[str, Any]) -> str:
    value = "not judged" if row["value"] is None else f"{row['value']:.6g}"
    settings = ", ".join(
        f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}"
        for name, v in row["parameters"].items()
    )
    state = f"{row['state']}, " if "state" in row else ""
    return f"{row['number']}: {state}{value} after {row['epochs']} epochs; {settings}"


def _best(arguments: argparse.Namespace) -> int:
    store, _ = _open(arguments)
    from nanoos_fw.errors import InputError

    found = store.status(arguments.name)
    if found["best"] is None:
        raise InputError(
            f"no trial of search {arguments.name!r} has been judged yet",
            advice=f"see 'nanoos search status {arguments.name}'",
        )
    config = store.config(arguments.name)
    training = config.training_of(found["best"]["parameters"]).model_dump(mode="json")
    answer = {**found["best"], "training": training, "model": found["model"]}
    if arguments.json:
        print_json(answer)
    else:
        print(f"trial {_words(found['best'])}")
        for name, value in training.items():
            print(f"  {name}: {value}")
        print(f"model {found['model'] or 'not registered yet'}")
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    store, launchpad = _open(arguments)
    store.stop(arguments.name)
    save_if_embedded(launchpad)
    state = store.state(arguments.name)
    if arguments.json:
        print_json({"search": arguments.name, "state": state})
    else:
        print(f"search {arguments.name!r} is {state}; running trials run to their end")
    return 0


def _open(arguments: argparse.Namespace) -> tuple[SearchRecords, Any]:
    """Return what is known of searches, and the launchpad."""
    launchpad = launchpad_of(arguments)
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.search_records import SearchRecords

    return SearchRecords(open_database(launchpad)), launchpad
