"""``nanoos screen``: predict sequences of candidates, rank and export them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli.common import (
    add_launchpad,
    finish,
    launchpad_of,
    print_json,
    save_if_embedded,
)
from nanoos_fw.errors import InputError, validation_problems

if TYPE_CHECKING:
    from nanoos_fw.ml.ranking import Ranked, Ranking
    from nanoos_fw.stores.screens import Screen, ScreenStore


def add_commands(commands: Any) -> None:
    """Add ``screen`` and what it can do."""
    group = commands.add_parser(
        "screen", help="predict millions of candidates and rank them"
    )
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")

    pack = actions.add_parser(
        "pack",
        help="read candidates of files or of the store once, for a screening",
        description="Prints the specification of the candidates.",
    )
    pack.add_argument("paths", nargs="*", type=Path, metavar="PATH")
    pack.add_argument("--set", dest="in_set", metavar="NAME", help="set of the store")
    pack.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="new folder"
    )
    add_launchpad(pack)
    pack.set_defaults(command=_pack)

    run = _action(actions, "run", "screen here; the same command continues", _run)
    _add_spec(run)
    run.add_argument("--workers", type=int, default=1, metavar="N", help="processes")

    submit = _action(actions, "submit", "submit the screening as fireworks", _submit)
    _add_spec(submit)
    submit.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        help="that a firework lasts, by the throughput measured now (default: 10)",
    )

    _action(actions, "status", "count what is done, and estimate the rest", _status)
    _action(
        actions, "verify", "show that every candidate has exactly one outcome", _verify
    )

    top = _action(actions, "top", "list the best candidates", _top)
    top.add_argument("-k", type=int, default=10, help="how many (default: 10)")
    _add_ranking(top)

    export = _action(actions, "export", "write predictions to a file", _export)
    export.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE",
        help=".csv, .jsonl, .parquet, or .extxyz with the structures",
    )  # fmt: skip
    export.add_argument("-k", type=int, help="only the best; all without")
    export.add_argument(
        "--refused", action="store_true",
        help="the candidates without a prediction instead, with the reason",
    )  # fmt: skip
    _add_ranking(export)

    report = _action(actions, "report", "write a self-contained HTML page", _report)
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: NAME.html here"
    )
    _add_ranking(report)


def _action(actions: Any, name: str, words: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=words)
    parser.add_argument("name", help="of the screening")
    finish(parser, run)
    return parser


def _add_spec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--spec",
        type=Path,
        metavar="FILE",
        help="YAML or JSON with candidates, models, filters; the first time",
    )
    parser.add_argument(
        "--campaign", metavar="NAME", help="whose report shows it; with --spec"
    )


def _add_ranking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--objective", choices=("min", "max"), default="min")
    parser.add_argument(
        "--by", choices=("mean", "ucb", "ei", "thompson"), default="mean",
        help="acquisition function (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--model", type=int, default=0, metavar="N", help="from 0")
    parser.add_argument("--kappa", type=float, default=1.0, help="of ucb")
    parser.add_argument("--best", type=float, help="best known value, for ei")
    parser.add_argument("--seed", type=int, default=0, help="of thompson")
    parser.add_argument(
        "--all-domains", action="store_true", help="also out of the model's domain"
    )
    parser.add_argument(
        "--new", action="store_true", help="no composition of the known set"
    )
    parser.add_argument("--min-novelty", type=float, metavar="D")
    parser.add_argument("--max-novelty", type=float, metavar="D")
    parser.add_argument(
        "--pareto", metavar="N:min,N:max", help="the front of several models instead"
    )


# ------------------------------------------------------------------------- commands


def _pack(arguments: argparse.Namespace) -> int:
    from nanoos_fw.ml.candidate_packs import read_files, write_pack

    if bool(arguments.paths) == (arguments.in_set is not None):
        raise InputError("give files to pack, or --set, and not both")
    if arguments.paths:
        report = write_pack(read_files(arguments.paths), arguments.output)
    else:
        from nanoos_fw.stores.database import open_database
        from nanoos_fw.stores.screens import pack_set

        database = open_database(launchpad_of(arguments))
        report = pack_set(database, arguments.in_set, arguments.output)
    print_json(
        {
            "candidates": report.spec.model_dump(mode="json"),
            "count": report.count,
            "failed": report.n_failures,
            "failures": report.failures,
            "repeated_labels": report.n_repeated,
        }
    )
    return 1 if report.n_failures else 0


def _run(arguments: argparse.Namespace) -> int:
    database, store, screen, launchpad = _opened(arguments)
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from nanoos_fw.firetasks.screening import run_window
    from nanoos_fw.operations.screens import screen_dir
    from nanoos_fw.settings import load_settings

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        there = store.progress(screen).chunks
        bar = bars.add_task(screen.name, total=screen.n_chunks, completed=there)
        answer = run_window(
            database,
            screen,
            screen_dir(screen, load_settings().work_dir.resolve()),
            workers=arguments.workers,
            on_chunk=lambda _done, _wall_s: bars.advance(bar),
        )
    save_if_embedded(launchpad)
    if arguments.json:
        print_json(answer)
    else:
        print(
            f"{answer['written']} of {answer['chunks']} chunks were screened now, "
            f"{answer['hit']} were stored already"
        )
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    _, _, screen, launchpad = _opened(arguments)
    from nanoos_fw.operations.screens import submit_screen
    from nanoos_fw.settings import load_settings

    settings = load_settings()
    done = submit_screen(
        launchpad,
        screen,
        settings.work_dir,
        minutes=arguments.minutes,
        workers=settings.ranks,
    )
    save_if_embedded(launchpad)
    answer = {
        "screen": screen.name,
        "fireworks": done.fireworks,
        "window": done.window,
        "submitted": done.added,
    }
    if arguments.json:
        print_json(answer)
    else:
        state = "submitted" if done.added else "were submitted before"
        print(f"{done.fireworks} fireworks of {done.window} candidates {state}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    _, store, screen, _ = _opened(arguments)
    found = store.progress(screen)
    left = screen.count - found.candidates
    remaining = left / found.rate if found.rate else None
    answer = {
        "screen": screen.name,
        "models": [own["reference"] for own in screen.models],
        "candidates": screen.count,
        "done": found.candidates,
        "predicted": found.predicted,
        "chunks": [found.chunks, found.n_chunks],
        "per_core_s": round(found.rate, 1),
        "core_s_left": None if remaining is None else round(remaining, 1),
        "core_s_used": round(found.core_s, 1),
        "core_s_estimated": screen.core_s_estimated,
    }
    if arguments.json:
        print_json(answer)
    else:
        eta = "" if remaining is None else f", {remaining / 3600:.2f} core-hours left"
        print(
            f"{screen.name}: {found.candidates} of {screen.count} candidates done, "
            f"{found.predicted} predicted, {found.rate:.0f}/s per core{eta}"
        )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    _, store, screen, _ = _opened(arguments)
    proof = store.proof(screen)
    if arguments.json:
        print_json(proof)
    else:
        for name, value in proof.items():
            print(f"{name}: {value}")
    return 1 if proof["missing"] or proof["repeated"] else 0


def _top(arguments: argparse.Namespace) -> int:
    _, store, screen, _ = _opened(arguments)
    from nanoos_fw.operations.screen_exports import prefixes_of, ranked_rows

    _warn_unfinished(store, screen)
    ranked = _ranked(arguments, store, screen, arguments.k)
    rows = ranked_rows(store, screen, ranked)
    if arguments.json:
        print_json(rows)
        return 0
    prefixes = prefixes_of(screen)
    for row in rows:
        values = ", ".join(
            f"{prefix} {row[f'{prefix}.mean']:.5g} {own['unit']}"
            for prefix, own in zip(prefixes, screen.models, strict=True)
        )
        name = row.get("label", row["candidate"])
        print(f"{row['rank']:5} {name!s:>12} {row['formula']:20} {values}")
    print(f"{ranked.n_ranked} candidates are ranked; ties: the lower number first")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    _, store, screen, _ = _opened(arguments)
    from nanoos_fw.operations.screen_exports import export_refused, export_screen

    _warn_unfinished(store, screen)
    ranked = None
    if arguments.k is not None or arguments.pareto:
        k = screen.count if arguments.k is None else arguments.k
        ranked = _ranked(arguments, store, screen, k)
    if arguments.refused:
        if ranked is not None:
            raise InputError("--refused are not ranked: leave -k and --pareto out")
        count = export_refused(store, screen, arguments.output)
    else:
        count = export_screen(store, screen, arguments.output, ranked)
    if arguments.json:
        print_json({"file": str(arguments.output), "rows": count})
    else:
        print(f"{arguments.output}: {count} rows")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    database, _, screen, _ = _opened(arguments)
    from nanoos_fw.reports import write_screen_report

    if arguments.pareto:
        raise InputError("a report ranks by one model: give --model, not --pareto")
    path = arguments.output or Path(f"{screen.name}.html")
    written = write_screen_report(database, screen.name, path, _ranking(arguments))
    if arguments.json:
        print_json({"file": str(written), "bytes": written.stat().st_size})
    else:
        print(written)
    return 0


def _opened(
    arguments: argparse.Namespace,
) -> tuple[Any, ScreenStore, Screen, Any]:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.screens import ScreenStore, register_screen

    database = open_database(launchpad)
    store = ScreenStore(database)
    if getattr(arguments, "spec", None) is None:
        return database, store, store.get(arguments.name), launchpad
    from nanoos_fw.ml.screening_engine import read_screen

    if arguments.campaign is not None:
        from nanoos_fw.stores.campaigns import CampaignStore

        CampaignStore(database).get(arguments.campaign)
    screen = register_screen(
        database,
        arguments.name,
        read_screen(_read(arguments.spec)),
        campaign=arguments.campaign,
    )
    return database, store, screen, launchpad


def _warn_unfinished(store: ScreenStore, screen: Screen) -> None:
    done = store.progress(screen).candidates
    if done < screen.count:
        print(
            f"note: only {done} of {screen.count} candidates have been screened yet; "
            "what follows knows no others",
            file=sys.stderr,
        )


def _ranked(
    arguments: argparse.Namespace, store: ScreenStore, screen: Screen, k: int
) -> Ranked:
    from nanoos_fw.ml.ranking import pareto_front, rank_top

    if arguments.pareto is None:
        return rank_top(store.chunks(screen.key), k, _ranking(arguments))
    parts = [part.partition(":") for part in arguments.pareto.split(",")]
    if any(not n.isdigit() or way not in ("min", "max") for n, _, way in parts):
        raise InputError("--pareto takes model:min or model:max, separated by commas")
    rankings = [_ranking(arguments, model=int(n), objective=way) for n, _, way in parts]
    return pareto_front(store.chunks(screen.key), rankings)


def _ranking(arguments: argparse.Namespace, **changes: Any) -> Ranking:
    from pydantic import ValidationError

    from nanoos_fw.ml.ranking import Ranking

    given = {
        "model": arguments.model,
        "objective": arguments.objective,
        "acquisition": arguments.by,
        "kappa": arguments.kappa,
        "best": arguments.best,
        "seed": arguments.seed,
        "include_out_of_domain": arguments.all_domains,
        "new_compositions": arguments.new,
        "min_novelty": arguments.min_novelty,
        "max_novelty": arguments.max_novelty,
    }
    try:
        return Ranking.model_validate({**given, **changes})
    except ValidationError as error:
        raise InputError(f"bad ranking: {validation_problems(error)}") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if path.suffix == ".json":
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}") from error
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe").load(path.read_text())
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
