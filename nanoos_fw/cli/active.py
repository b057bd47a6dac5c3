"""``nanoos active``: campaigns that choose what to label next."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli.common import (
    add_json,
    finish,
    launchpad_of,
    print_json,
    save_if_embedded,
)
from nanoos_fw.errors import InputError

if TYPE_CHECKING:
    from nanoos_fw.firetasks.active_plan import ActivePlan
    from nanoos_fw.operations.active import ActiveStatus

_TEMPLATE = "active/alloys.yaml"
_COLUMNS = (
    "round", "batch", "labels", "failed", "best", "predicted-MAE", "val-MAE", "model",
)  # fmt: skip


def add_commands(commands: Any) -> None:
    """Add ``active`` and what it can do."""
    group = commands.add_parser(
        "active", help="learn actively: label, train, choose what to label next"
    )
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")

    template = actions.add_parser(
        "template", help="print a campaign file to change, or write it"
    )
    template.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="new file, instead of printing",
    )
    template.set_defaults(command=_template)

    check = actions.add_parser("check", help="check a campaign file; queue nothing")
    check.add_argument("file", type=Path, metavar="FILE")
    add_json(check)
    check.set_defaults(command=_check)

    submit = actions.add_parser(
        "submit",
        help="submit a campaign; again is harmless",
        description="FILE is YAML; 'nanoos active template' prints one.",
    )
    submit.add_argument("file", type=Path, metavar="FILE")
    finish(submit, _submit)

    status = _action(actions, "status", "show the rounds so far", _status)
    status.add_argument("--batch", type=int, metavar="N", help="list a round's batch")

    labels = _action(
        actions, "import", "bring labels that the campaign waits for", _import
    )
    labels.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    labels.add_argument("--source", default="", help="how they were made")

    failed = _action(actions, "fail", "say that candidates will get no label", _fail)
    failed.add_argument("structures", nargs="+", metavar="KEY")
    failed.add_argument("--reason", required=True)

    go_on = _action(actions, "continue", "go on with the labels there are", _continue)
    go_on.add_argument(
        "--partial", action="store_true", help="do not wait for those that lack one"
    )

    _action(actions, "stop", "end with the round that is running", _stop)

    extend = _action(
        actions, "extend", "change the stop rules; a stopped campaign goes on", _extend
    )
    extend.add_argument("--labels", type=int, dest="max_labels", metavar="N")
    extend.add_argument("--rounds", type=int, dest="max_rounds", metavar="N")
    extend.add_argument("--core-hours", type=float, dest="max_core_hours", metavar="H")
    extend.add_argument("--patience", type=int, metavar="N")


def _action(actions: Any, name: str, words: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=words)
    parser.add_argument("campaign")
    finish(parser, run)
    return parser


# ------------------------------------------------------------------------- commands


def _template(arguments: argparse.Namespace) -> int:
    from nanoos_fw.provenance import write_atomic
    from nanoos_fw.templates import load_template

    text = load_template(_TEMPLATE)
    if arguments.output is None:
        print(text, end="")
        return 0
    if arguments.output.exists():
        raise InputError(
            f"{arguments.output} exists", advice="choose the name of a new file"
        )
    write_atomic(arguments.output, text)
    print(arguments.output)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    plan = _read(arguments.file)
    from nanoos_fw.firetasks.active_rounds import check_labelling

    check_labelling(plan)
    if arguments.json:
        print_json(plan.model_dump(mode="json"))
    else:
        print(f"campaign {plan.name!r} is valid")
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.active import submit_active

    plan, new = submit_active(launchpad, _read(arguments.file))
    save_if_embedded(launchpad)
    if arguments.json:
        print_json(
            {"campaign": plan.name, "work_root": plan.work_root, "submitted": new}
        )
    elif new:
        print(
            f"campaign {plan.name!r} is submitted; run it with rlaunch or qlaunch, and "
            f"look at it with 'nanoos active status {plan.name}'"
        )
    else:
        print(f"campaign {plan.name!r} was submitted before")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.active import active_status
    from nanoos_fw.stores.database import open_database

    database = open_database(launchpad)
    if arguments.batch is not None:
        return _batch(database, arguments)
    found = active_status(database, arguments.campaign)
    if arguments.json:
        print_json(found.to_dict())
        return 0
    print("\n".join(_lines(found)))
    return 0


def _lines(found: ActiveStatus) -> list[str]:
    why = f" ({found.reason})" if found.reason else ""
    budget = ", ".join(f"{name} {value}" for name, value in found.budget.items())
    lines = [
        f"{found.campaign}: {found.state}{why}",
        f"{found.labels} of {found.candidates} candidates given out; {budget}",
    ]
    if found.best is not None:
        structure = (found.best_structure or "")[:12]
        lines.append(f"best {found.best:.5g} {found.unit} ({structure})")
    if found.rounds:
        lines.append(" ".join(f"{name:>14}" for name in _COLUMNS))
    lines += [
        " ".join(
            f"{_cell(value):>14}"
            for value in (
                row.round, row.batch, row.labelled, row.failed, row.best,
                row.prediction_mae, row.val_mae, row.model,
            )
        )
        for row in found.rounds
    ]  # fmt: skip
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _batch(database: Any, arguments: argparse.Namespace) -> int:
    from nanoos_fw.stores.active import ActiveStore
    from nanoos_fw.stores.structures import StructureStore

    found = ActiveStore(database).get(arguments.campaign, arguments.batch)
    formulas = StructureStore(database).formulas(found.batch)
    rows: list[dict[str, Any]] = [
        {
            "structure": pick.id,
            "formula": formulas.get(pick.id),
            "score": pick.score,
            "predicted": pick.mean,
            "std": pick.std,
            "out_of_domain": pick.out_of_domain,
        }
        for pick in found.picks
    ]
    if arguments.json:
        print_json(rows)
        return 0
    for row in rows:
        mean, std = _cell(row["predicted"]), _cell(row["std"])
        flag = " out of domain" if row["out_of_domain"] else ""
        print(f"{row['structure'][:12]} {row['formula']:16} {mean} ± {std}{flag}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.active import import_labels
    from nanoos_fw.stores.database import open_database

    report = import_labels(
        open_database(launchpad),
        arguments.campaign,
        arguments.paths,
        source=arguments.source,
    )
    save_if_embedded(launchpad)
    if arguments.json:
        print_json(
            {
                "written": report.written,
                "there": report.there,
                "refused": report.refused,
            }
        )
    else:
        for name, reason in report.refused.items():
            print(f"refused    {name}: {reason}")
        print(
            f"{len(report.written)} labels written, {len(report.there)} were there, "
            f"{len(report.refused)} refused; next: nanoos active continue "
            f"{arguments.campaign}"
        )
    return 1 if report.refused else 0


def _fail(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.active import fail_labels
    from nanoos_fw.stores.database import open_database

    keys = fail_labels(
        open_database(launchpad),
        arguments.campaign,
        arguments.structures,
        arguments.reason,
    )
    save_if_embedded(launchpad)
    return _say(arguments, {"failed": keys}, f"{len(keys)} candidates have no label")


def _continue(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.active import continue_active

    new = continue_active(launchpad, arguments.campaign, partial=arguments.partial)
    save_if_embedded(launchpad)
    words = "goes on" if new else "went on before"
    return _say(
        arguments, {"submitted": new}, f"campaign {arguments.campaign!r} {words}"
    )


def _stop(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.active import stop_active
    from nanoos_fw.stores.database import open_database

    stop_active(open_database(launchpad), arguments.campaign)
    save_if_embedded(launchpad)
    return _say(
        arguments,
        {"stop_asked": True},
        f"campaign {arguments.campaign!r} ends with the round that is running",
    )


def _extend(arguments: argparse.Namespace) -> int:
    names = ("max_labels", "max_rounds", "max_core_hours", "patience")
    changes = {
        name: getattr(arguments, name)
        for name in names
        if getattr(arguments, name) is not None
    }
    if not changes:
        raise InputError(
            "give the rules to change",
            advice="--labels, --rounds, --core-hours, --patience",
        )
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.active import extend_active

    extend_active(launchpad, arguments.campaign, changes)
    save_if_embedded(launchpad)
    return _say(
        arguments, changes, f"campaign {arguments.campaign!r} has other stop rules"
    )


def _say(arguments: argparse.Namespace, answer: dict[str, Any], words: str) -> int:
    if arguments.json:
        print_json({"campaign": arguments.campaign, **answer})
    else:
        print(words)
    return 0


def _read(path: Path) -> ActivePlan:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read campaign {path}: {error}") from error
    from nanoos_fw.operations.active import read_plan

    return read_plan(values)
