"""``nanoos search``: hyper-parameter searches."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nanoos_fw.cli.common import finish, launchpad_of, print_json, save_if_embedded


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
    store, launchpad = _open(arguments)
    from nanoos_fw.ml.search import check_dataset

    config = _read(arguments.file)
    config = config.model_copy(
        update={"dataset_dir": str(Path(config.dataset_dir).resolve())}
    )
    store.create(config, check_dataset(config))
    return _submit(arguments, store, launchpad, config.name)


def _resume(arguments: argparse.Namespace) -> int:
    store, launchpad = _open(arguments)
    store.resume(arguments.name)
    return _submit(arguments, store, launchpad, arguments.name)


def _submit(
    arguments: argparse.Namespace, store: Any, launchpad: Any, name: str
) -> int:
    from nanoos_fw.operations import prepare_launchpad, submit
    from nanoos_fw.settings import load_settings
    from nanoos_fw.workflows import search_workflow

    root = str(load_settings().work_dir.resolve())
    turn = 0 if arguments.command is _create else 1 + store.next_turn(name)
    prepare_launchpad(launchpad)
    added = submit(launchpad, search_workflow(name, root, arguments.workers, turn))
    save_if_embedded(launchpad)
    workers = arguments.workers if added else 0
    if arguments.json:
        print_json({"search": name, "workers": workers, "work_root": root})
    elif added:
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


def _read(path: Path) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from nanoos_fw.errors import InputError
    from nanoos_fw.ml.search import read_search

    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read search {path}: {error}") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{path} describes no search", advice="see 'nanoos search create --help'"
        )
    return read_search(values)


def _open(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the store and the launchpad."""
    launchpad = launchpad_of(arguments)
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.searches import SearchStore

    return SearchStore(open_database(launchpad)), launchpad
