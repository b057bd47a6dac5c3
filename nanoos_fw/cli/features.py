"""``nanoos features``: compute, count and show the cached features."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli.common import finish, launchpad_of, print_json, save_if_embedded
from nanoos_fw.errors import InputError

if TYPE_CHECKING:
    from nanoos_fw.firetasks.featurization import FeatureParameters
    from nanoos_fw.stores.structures import StructureStore

_SHOWN = 20


def add_commands(commands: Any) -> None:
    """Add ``features`` and what it can do."""
    group = commands.add_parser("features", help="compute or show cached features")
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")

    compute = actions.add_parser(
        "compute",
        help="compute the features that the store does not have",
        description=(
            "A structure that cannot be featurized, or needs more time or memory than "
            "allowed, is quarantined with the reason and does not stop the rest. "
            "Killed at any time, the same command continues; any number may run at "
            "once."
        ),
    )
    _add_structures(compute)
    add_parameters(compute)
    compute.add_argument(
        "--force", action="store_true", help="compute again what is there"
    )
    compute.add_argument(
        "--retry", action="store_true", help="compute again what is quarantined"
    )
    compute.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes (default: 1)"
    )
    compute.add_argument(
        "--timeout", type=float, metavar="S", help="seconds for one structure"
    )
    compute.add_argument(
        "--memory", type=int, metavar="MIB", help="MiB for one structure"
    )
    finish(compute, _compute)

    status = actions.add_parser(
        "status", help="count hit, stale, quarantined and missing structures"
    )
    add_selection(status)
    add_parameters(status)
    finish(status, _status)

    show = actions.add_parser("show", help="show the features of one structure")
    show.add_argument("structure", metavar="ID", help="key, its beginning, or label")
    finish(show, _show)


def add_parameters(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide which features are meant."""
    parser.add_argument(
        "--cutoff", type=float, metavar="Å", help="cutoff radius (default: 8)"
    )
    parser.add_argument(
        "--neighbors",
        type=int,
        metavar="K",
        help="nearest neighbours of each atom (default: 12; 0: all in the cutoff)",
    )
    parser.add_argument(
        "--vectors",
        action="store_true",
        help="keep the vectors of edges, which networks on angles need",
    )


def parameters_of(arguments: argparse.Namespace) -> FeatureParameters:
    """Return the extraction parameters of the options."""
    from pydantic import ValidationError

    from nanoos_fw.firetasks.featurization import FeatureParameters

    given: dict[str, Any] = {}
    if arguments.cutoff is not None:
        given["cutoff_radius"] = arguments.cutoff
    if arguments.neighbors is not None:
        given["max_neighbors"] = arguments.neighbors or None
    if arguments.vectors:
        given["vectors"] = True
    try:
        return FeatureParameters(**given)
    except ValidationError as error:
        raise InputError(f"bad parameters: {error.errors()[0]['msg']}") from error


def _add_structures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "structures", nargs="*", metavar="ID", help="key, its beginning, or label"
    )
    parser.add_argument("--all", action="store_true", help="all structures")
    add_selection(parser)


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose structures by set or by query."""
    parser.add_argument("--set", dest="in_set", metavar="NAME", help="a named set")
    parser.add_argument(
        "--query",
        metavar="JSON",
        help="""a MongoDB query, e.g. '{"elements": "Fe", "n_sites": {"$lte": 20}}'""",
    )


def selected_keys(store: StructureStore, arguments: argparse.Namespace) -> list[str]:
    """Return the keys of the set, of what the query finds, or of all structures."""
    if arguments.query is None:
        return keys_of_set(store, arguments.in_set)
    if arguments.in_set is not None:
        raise InputError(
            "give --set or --query, not both",
            advice="""a query can name a set: '{"sets": "NAME", ...}'""",
        )
    try:
        query = json.loads(arguments.query)
    except ValueError as error:
        raise InputError(f"--query is not JSON: {error}") from error
    keys = store.query_keys(query)
    if not keys:
        raise InputError(
            f"the query finds none of {store.count()} structures",
            evidence={"query": query},
        )
    return keys


def keys_of_set(store: StructureStore, in_set: str | None) -> list[str]:
    """Return the keys of a set, or of all; an empty set is an error."""
    keys = store.keys(in_set)
    if not keys:
        sets = store.sets()
        raise InputError(
            f"there is no set {in_set!r}" if in_set else "the store has no structures",
            advice=(
                f"sets: {', '.join(sets[:10])}"
                if sets
                else "import some with 'nanoos import'"
            ),
        )
    return keys


def _compute(arguments: argparse.Namespace) -> int:
    given = (
        bool(arguments.structures),
        arguments.all,
        arguments.in_set is not None,
        arguments.query is not None,
    )
    if sum(given) != 1:
        raise InputError(
            "say which structures: give IDs, or --all, --set NAME or --query JSON",
            advice="see 'nanoos features compute --help'",
        )
    if arguments.workers < 1:
        raise InputError(f"--workers must be at least 1, not {arguments.workers}")
    launchpad = launchpad_of(arguments)
    from pydantic import ValidationError
    from rich.console import Console

    from nanoos_fw.console import CountProgress
    from nanoos_fw.firetasks.featurization import compute_features
    from nanoos_fw.ml.featurizing import FeatureGuard
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.structures import StructureStore

    limits = {"timeout_s": arguments.timeout, "memory_mb": arguments.memory}
    try:
        guard = FeatureGuard(**{k: v for k, v in limits.items() if v is not None})
    except ValidationError as error:
        entry = error.errors()[0]
        raise InputError(f"bad {entry['loc'][0]}: {entry['msg']}") from error
    parameters = parameters_of(arguments)
    database = open_database(launchpad)
    store = StructureStore(database)
    if arguments.structures:
        keys = store.find_keys(arguments.structures)
    else:
        keys = selected_keys(store, arguments)
    progress = CountProgress(Console(stderr=True), "featurizing", len(keys))
    try:
        with progress.shown():
            report = compute_features(
                database,
                keys,
                parameters,
                force_recompute=arguments.force,
                retry_quarantined=arguments.retry,
                workers=arguments.workers,
                guard=guard,
                on_progress=lambda r: progress.update(r.done),
            )
    finally:
        save_if_embedded(launchpad)
    if arguments.json:
        status = {key: entry.to_dict() for key, entry in report.status().items()}
        print_json({"counts": report.counts(), "structures": status})
    else:
        _print_quarantined(
            {k: str(e["message"]) for k, e in report.quarantined.items()}
        )
        counts = ", ".join(f"{n} {state}" for state, n in report.counts().items())
        print(f"{len(keys)} structures: {counts}")
    return 1 if report.quarantined else 0


def _print_quarantined(reasons: dict[str, str]) -> None:
    for key, reason in sorted(reasons.items())[:_SHOWN]:
        print(f"quarantined  {key[:12]}: {reason}")
    if len(reasons) > _SHOWN:
        print(f"quarantined  … and {len(reasons) - _SHOWN} more (--json lists all)")


def _status(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.ml.features import FEATURE_VERSION
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.features import STATES, FeatureStore
    from nanoos_fw.stores.structures import StructureStore

    database = open_database(launchpad)
    keys = selected_keys(StructureStore(database), arguments)
    described = parameters_of(arguments).model_dump(mode="json")
    status = FeatureStore(database).status(keys, described, FEATURE_VERSION)
    counts = Counter(entry.state for entry in status.values())
    if arguments.json:
        print_json(
            {
                "feature_version": FEATURE_VERSION,
                "parameters": described,
                "counts": {s: counts[s] for s in STATES if s != "computed"},
                "structures": {key: entry.to_dict() for key, entry in status.items()},
            }
        )
        return 0
    _print_quarantined({k: e.reason for k, e in status.items() if e.error is not None})
    words = ", ".join(f"{counts[s]} {s}" for s in STATES if s != "computed")
    print(f"{len(keys)} structures, feature version {FEATURE_VERSION}: {words}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.ml.features import scalar_unit
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.features import FeatureStore
    from nanoos_fw.stores.structures import StructureStore

    database = open_database(launchpad)
    store = StructureStore(database)
    (key,) = store.find_keys([arguments.structure])
    entries = FeatureStore(database).entries(key)
    if arguments.json:
        print_json({"structure": key, "entries": entries})
        return 0
    stored = store.get_many([key])[key]
    print(f"{key}  {stored.formula}  {stored.label}")
    for entry in entries:
        described = entry.get("described") or {"parameters": entry["parameters"][:12]}
        words = ", ".join(f"{name} {value}" for name, value in described.items())
        print(f"\nversion {entry['version']}, {words}: {entry['status']}")
        if entry["error"]:
            print(f"  {entry['error']['message']}")
            continue
        place = " in the artifact store" if entry.get("artifact") else ""
        print(f"  graph: {entry['size']} bytes{place}, sha256 {entry['sha256'][:12]}")
        for name, value in sorted(entry["scalars"].items()):
            print(f"  {name:36} {value:<12.6g} {scalar_unit(name)}".rstrip())
    if not entries:
        print("no features; 'nanoos features compute' makes them")
    return 0
