"""``nanoos models``: the model registry."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli import calibrate, import_cgcnn
from nanoos_fw.cli.common import finish, launchpad_of, print_json, save_if_embedded

if TYPE_CHECKING:
    from nanoos_fw.stores.models import ModelRecord

_REFERENCE = "name@version, name@alias, name@latest, or best:mae[:target]"
_PARTS = ("train", "val", "test")


def add_commands(commands: Any) -> None:
    """Add ``models`` and what it can do."""
    group = commands.add_parser("models", help="look at and manage registered models")
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")

    listed = _action(actions, "list", "list the registered models", _list)
    listed.add_argument("--target", help="only models of this property")
    listed.add_argument("--name", help="only versions of this model")
    _add_sort(listed)

    shown = _action(actions, "show", "show a version, its aliases and its use", _show)
    shown.add_argument("reference", help=_REFERENCE)

    compared = _action(actions, "compare", "compare versions, the best first", _compare)
    compared.add_argument("references", nargs="+", metavar="REFERENCE", help=_REFERENCE)
    _add_sort(compared)

    activated = _action(actions, "activate", "point an alias at a version", _activate)
    activated.add_argument("reference", help=_REFERENCE)
    _add_alias(activated, reason=True)

    taken = _action(actions, "deactivate", "take an alias off a model", _deactivate)
    taken.add_argument("name")
    _add_alias(taken, reason=True)

    back = _action(
        actions, "rollback", "point an alias at its version before", _rollback
    )
    back.add_argument("name")
    _add_alias(back, reason=False)

    exported = _action(actions, "export", "write weights and record to files", _export)
    exported.add_argument("reference", help=_REFERENCE)
    exported.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder"
    )

    verified = _action(
        actions, "verify", "read all weights and compare their checksums", _verify
    )
    verified.add_argument(
        "references", nargs="*", metavar="REFERENCE", help="default: all versions"
    )

    import_cgcnn.add_command(actions)
    calibrate.add_command(actions)

    garbage = _action(
        actions, "gc", "remove weights that nothing needs; only says so without --yes",
        _gc,
    )  # fmt: skip
    chosen = garbage.add_mutually_exclusive_group()
    chosen.add_argument(
        "--dry-run", action="store_true", help="change nothing; this is the default"
    )
    chosen.add_argument("--yes", action="store_true", help="remove them")
    garbage.add_argument(
        "--keep",
        type=int,
        metavar="N",
        help="of each alias, keep N versions before the current one (default: all)",
    )


def _action(actions: Any, name: str, words: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=words)
    finish(parser, run)
    return parser


def _add_sort(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sort", metavar="METRIC", help="mae, rmse, mse, r2: the best first"
    )
    parser.add_argument(
        "--part",
        choices=_PARTS,
        default="val",
        help="part of the dataset that the metric is of (default: %(default)s)",
    )


def _add_alias(parser: argparse.ArgumentParser, *, reason: bool) -> None:
    parser.add_argument("--alias", default="active", help="default: %(default)s")
    parser.add_argument(
        "--reason", required=reason, default="rolled back", help="kept in the history"
    )


# ------------------------------------------------------------------------- commands


def _list(arguments: argparse.Namespace) -> int:
    registry, _ = _open(arguments)
    records = registry.list_models(
        name=arguments.name,
        target=arguments.target,
        sort=arguments.sort,
        part=arguments.part,
    )
    if arguments.json:
        print_json([record.to_dict() for record in records])
        return 0
    metric = arguments.sort or "mae"
    for record in records:
        print(_line(record, metric, arguments.part))
    if not records:
        print("no model is registered")
    return 0


def _line(record: ModelRecord, metric: str, part: str) -> str:
    mark = "*" if record.is_active else " "
    return (
        f"{mark} {record.reference:40} {record.model_type:12} {record.target:28} "
        f"{_state(record) or _error(record, metric, part)}"
    )


def _state(record: ModelRecord) -> str | None:
    if record.removed is not None:
        return f"weights removed {record.removed}"
    return None if record.has_weights else "no weights installed"


def _error(record: ModelRecord, metric: str, part: str) -> str:
    from nanoos_fw.stores.models import metric_of

    value = metric_of(record, metric, part)
    if value is None:
        return f"{part} {metric} not stated"
    unit = f" {record.unit}" if metric in ("mae", "rmse") else ""
    mock = "; mock targets" if record.has_mock_targets else ""
    return f"{part} {metric} {value:.4f}{unit}{mock}"


def _show(arguments: argparse.Namespace) -> int:
    registry, _ = _open(arguments)
    record = registry.get(arguments.reference)
    history = registry.history(record.name)
    used = registry.n_predictions(record.reference)
    if arguments.json:
        print_json(
            {
                **record.to_dict(),
                "predictions": used,
                "alias_history": [entry.to_dict() for entry in history],
            }
        )
        return 0
    print(f"model       {record.reference} ({record.model_type})")
    print(f"predicts    {record.target} ({record.unit})")
    print(
        f"weights     {_state(record) or f'{record.storage}, SHA-256 {record.sha256}'}"
    )
    if not record.has_weights and record.removed is None:
        from nanoos_fw.stores.system_models import install_advice

        print(f"            {install_advice(record.name)}")
    print(f"created     {record.created}, parent {record.parent or 'none'}")
    print(f"dataset     {record.dataset_info.get('dataset_hash', 'not stated')}")
    for part in _PARTS:
        if record.metrics.get(part):
            errors = (_error(record, metric, part) for metric in ("mae", "rmse", "r2"))
            print(f"errors      {', '.join(errors)}")
    print(f"predictions {used}")
    for entry in history:
        version = entry.version or "none"
        back = f", back to move {entry.restores}" if entry.restores else ""
        print(
            f"alias       {entry.alias} {entry.sequence}: {version}, {entry.time}, "
            f"{entry.by}: {entry.reason}{back}"
        )
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    registry, _ = _open(arguments)
    from nanoos_fw.stores.models import compare_models

    records = [registry.get(reference) for reference in arguments.references]
    found = compare_models(records, arguments.sort or "mae", arguments.part)
    if arguments.json:
        print_json(found)
        return 0
    width = max(len(row["model"]) for row in found["models"])
    for row in found["models"]:
        numbers = "  ".join(
            f"{part} {metric} {'-' if value is None else format(value, '.4f')}"
            for part, metrics in row["metrics"].items()
            for metric, value in metrics.items()
        )
        print(f"{row['model']:{width}}  {numbers}")
    for key, values in found["differences"].items():
        print(f"differs     {key}: {', '.join(map(str, values))}")
    for warning in found["warnings"]:
        print(f"warning     {warning}")
    return 0


def _activate(arguments: argparse.Namespace) -> int:
    registry, launchpad = _open(arguments)
    record = registry.get(arguments.reference)
    registry.activate(record.reference, alias=arguments.alias, reason=arguments.reason)
    return _moved(arguments, launchpad, record.name, record.reference)


def _deactivate(arguments: argparse.Namespace) -> int:
    registry, launchpad = _open(arguments)
    registry.deactivate(arguments.name, alias=arguments.alias, reason=arguments.reason)
    return _moved(arguments, launchpad, arguments.name, None)


def _rollback(arguments: argparse.Namespace) -> int:
    registry, launchpad = _open(arguments)
    record = registry.roll_back(
        arguments.name, alias=arguments.alias, reason=arguments.reason
    )
    return _moved(arguments, launchpad, arguments.name, record.reference)


def _moved(
    arguments: argparse.Namespace, launchpad: Any, name: str, model: str | None
) -> int:
    save_if_embedded(launchpad)
    if arguments.json:
        print_json({"name": name, "alias": arguments.alias, "model": model})
    else:
        print(f"{name}@{arguments.alias} is {model or 'no model any more'}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    registry, _ = _open(arguments)
    from nanoos_fw.errors import InputError
    from nanoos_fw.stores.model_upkeep import export_model

    record = registry.get(arguments.reference)
    try:
        files = export_model(registry, record, arguments.output)
    except OSError as error:
        raise InputError(
            f"cannot write in {arguments.output}: {error.strerror}",
            advice="choose a folder you may write",
        ) from error
    if arguments.json:
        print_json({"model": record.reference, "files": [str(file) for file in files]})
    else:
        for file in files:
            print(file)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    registry, _ = _open(arguments)
    from nanoos_fw.stores.model_upkeep import verify_models

    records = (
        [registry.get(reference) for reference in arguments.references]
        if arguments.references
        else registry.list_models()
    )
    checks = verify_models(registry, records)
    if arguments.json:
        print_json([check.to_dict() for check in checks])
    else:
        for check in checks:
            problem = f": {check.problem}" if check.problem else ""
            print(f"{check.reference:40} {check.status}{problem}")
    return 1 if any(check.status == "broken" for check in checks) else 0


def _gc(arguments: argparse.Namespace) -> int:
    _, launchpad = _open(arguments)
    from nanoos_fw.stores.model_upkeep import collect_garbage, find_garbage

    if arguments.yes:
        entries = collect_garbage(launchpad.db, keep=arguments.keep)
        save_if_embedded(launchpad)
    else:
        entries = find_garbage(launchpad.db, keep=arguments.keep)
    if arguments.json:
        print_json(
            {"dry_run": not arguments.yes, "models": [e.to_dict() for e in entries]}
        )
        return 0
    for entry in entries:
        if entry.kept:
            print(f"kept         {entry.reference}: {', '.join(entry.kept)}")
        else:
            done = "removed" if arguments.yes else "would remove"
            print(f"{done:12} {entry.reference}: {entry.bytes} bytes")
    freed = sum(entry.bytes for entry in entries if not entry.kept)
    print(
        f"{freed} bytes freed"
        if arguments.yes
        else f"{freed} bytes; --yes removes them"
    )
    return 0


def _open(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the registry and the launchpad."""
    launchpad = launchpad_of(arguments)
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.models import ModelRegistry

    return ModelRegistry(open_database(launchpad)), launchpad
