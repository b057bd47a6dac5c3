"""The command line: parsing and printing only.

Nothing heavy is imported before a command needs it: ``nanoos --help`` is immediate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw import __version__
from nanoos_fw.cli import (
    active,
    campaigns,
    cluster,
    databases,
    datasets,
    exporting,
    features,
    models,
    operations,
    potentials,
    retention,
    screening,
    search,
    simulations,
    tables,
    templates,
    training,
    web,
    work,
)
from nanoos_fw.cli.common import (
    add_launchpad,
    launchpad_of,
    open_launchpad,
    print_json,
    save_if_embedded,
)
from nanoos_fw.errors import InputError, NanoOSError
from nanoos_fw.faults import disk_full
from nanoos_fw.parallel.files import RESUMABLE_EXIT

if TYPE_CHECKING:
    from nanoos_fw.operations import ImportReport
    from nanoos_fw.settings import Settings

_SHOWN_ENTRIES = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: a stated error, or failed work. 2: bad usage. 130: interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except NanoOSError as error:
        if arguments.debug:
            raise
        from nanoos_fw.console import error_lines

        print("\n".join(error_lines(error)), file=sys.stderr)
        return RESUMABLE_EXIT if error.resumable else 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nanoos … | head
        sys.stderr.close()
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        print(_words_for(error), file=sys.stderr)
        return 1


def _words_for(error: Exception) -> str:
    """Return what to say of an error that no operation has put into words."""
    if (full := disk_full(error)) is not None:
        return (
            f"error: {full.message}\n"
            "  next: free space there, then run the same command again"
        )
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"error: {error.filename}: {error.strerror}"
    return (
        f"error: unexpected {type(error).__name__}: {error}\n"
        "  next: run again with 'nanoos --debug …' and report what it prints"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanoos",
        description="ML-accelerated materials screening on SLURM with FireWorks.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="screen binary alloys of 16 metals: a real campaign in minutes",
        description=(
            "Screen the ordered binary alloys of 16 metals for their formation "
            "energy: LAMMPS labels, a CGCNN ensemble ranks, LAMMPS checks the best, "
            "a report shows it. Killed at any time, the same command continues."
        ),
    )
    demo.add_argument(
        "--dir",
        type=Path,
        default=Path("nanoos-demo"),
        help="folder of the demonstration (default: %(default)s)",
    )
    demo.add_argument(
        "--verify",
        action="store_true",
        help="also relax all candidates, to see how many of the best were found",
    )
    demo.add_argument(
        "--submit",
        action="store_true",
        help="only submit to the MongoDB server of -l, to run with rlaunch or qlaunch",
    )
    demo.add_argument(
        "--slurm",
        type=Path,
        metavar="FOLDER",
        help="run it through SLURM, as packed workers, with the files that "
        "'nanoos init --slurm' wrote to FOLDER",
    )
    demo.add_argument("--name", default="demo", help="campaign (default: %(default)s)")
    add_launchpad(demo)
    demo.set_defaults(command=_demo)

    structures = commands.add_parser(
        "import",
        help="import CIF, POSCAR, extxyz, pymatgen JSON, or a CGCNN folder",
        description=(
            "Read structures and the numbers that come with them into the store. "
            "Entries that cannot be used are reported one by one."
        ),
    )
    structures.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    structures.add_argument(
        "--set",
        default="imported",
        dest="in_set",
        help="named set of the structures (default: %(default)s)",
    )
    structures.add_argument(
        "--target",
        default="target",
        help="name of the property in the second column of id_prop.csv "
        "(default: %(default)s)",
    )
    structures.add_argument("--json", action="store_true", help="print JSON")
    add_launchpad(structures)
    structures.set_defaults(command=_import)

    report = commands.add_parser(
        "report", help="write the HTML report of a campaign from the stores"
    )
    report.add_argument("campaign")
    report.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="file to write"
    )
    add_launchpad(report)
    report.set_defaults(command=_report)

    active.add_commands(commands)
    features.add_commands(commands)
    tables.add_commands(commands)
    datasets.add_commands(commands)
    models.add_commands(commands)
    search.add_commands(commands)
    screening.add_commands(commands)
    exporting.add_commands(commands)
    databases.add_commands(commands)
    potentials.add_commands(commands)
    simulations.add_commands(commands)
    templates.add_commands(commands)
    training.add_commands(commands)
    cluster.add_commands(commands)
    operations.add_commands(commands)
    web.add_commands(commands)
    work.add_commands(commands)
    campaigns.add_commands(commands)
    retention.add_commands(commands)
    return parser


# ------------------------------------------------------------------------- commands


def _demo(arguments: argparse.Namespace) -> int:
    from nanoos_fw.settings import load_settings

    settings = load_settings()
    if arguments.slurm is not None:
        return _demo_slurm(arguments, settings)
    if arguments.submit:
        return _demo_submit(arguments, settings)
    if arguments.launchpad is not None:
        raise InputError(
            "-l needs --submit: without it the demonstration brings its own database",
            advice="nanoos demo --submit -l my_launchpad.yaml",
        )
    return _demo_embedded(arguments, settings)


def _demo_submit(arguments: argparse.Namespace, settings: Settings) -> int:
    launchpad = open_launchpad(arguments, settings)
    from nanoos_fw import demo

    work_root = settings.work_dir.resolve()
    report = work_root / f"{arguments.name}-report.html"
    plan = demo.demo_plan(arguments.name, work_root, report)
    demo.submit(launchpad, plan, verify=arguments.verify)
    path = arguments.launchpad or settings.launchpad
    option = f" -l {path}" if path else ""
    print(
        f"campaign {plan.name!r} is submitted; run it, from as many terminals or jobs "
        f"as you like, with\n"
        f"  rlaunch{option} rapidfire\n"
        f"and look at it with\n"
        f"  nanoos status{option} {plan.name}\n"
        f"Work directories: {plan.work_root}"
    )
    return 0


def _demo_slurm(arguments: argparse.Namespace, settings: Settings) -> int:
    from nanoos_fw import demo
    from nanoos_fw.operations.cluster_files import LAUNCHPAD_FILE, submit_workers
    from nanoos_fw.stores.database import load_launchpad

    folder = arguments.slurm.resolve()
    launchpad = load_launchpad(folder / LAUNCHPAD_FILE)
    work_root = (arguments.dir / "work").resolve()
    report = (arguments.dir / "report.html").resolve()
    work_root.mkdir(parents=True, exist_ok=True)
    plan = demo.demo_plan(arguments.name, work_root, report)
    demo.submit(launchpad, plan, verify=arguments.verify)
    job = submit_workers(folder)
    print(f"campaign {plan.name!r} is submitted; job {job} works on it")
    outcome = demo.watch(launchpad, plan, job, say=lambda line: print(line, flush=True))
    print("\n".join(demo.summary(launchpad, plan, outcome)))
    return 1 if outcome.failed or outcome.report is None else 0


def _demo_embedded(arguments: argparse.Namespace, settings: Settings) -> int:
    from rich.console import Console

    from nanoos_fw.parallel import Resources, launch_command, locked
    from nanoos_fw.stores.embedded import open_embedded

    # Asked before anything is computed: without it every firework would fail.
    launch_command(Resources(ranks=settings.ranks, launcher=settings.mpi_launcher))
    folder = arguments.dir.resolve()
    with locked(folder):
        launchpad = open_embedded(folder, create=True)
        from nanoos_fw import demo
        from nanoos_fw.console import CampaignProgress

        console = Console()
        plan = demo.demo_plan(arguments.name, folder / "work", folder / "report.html")
        demo.submit(launchpad, plan, verify=arguments.verify)
        total, done = demo.progress(launchpad, plan.name)
        console.print(
            f"campaign {plan.name!r} in {folder}: {done} of {total} fireworks done",
            highlight=False,
        )
        bars = CampaignProgress(console, total, done)
        with bars.shown():
            outcome = demo.run(launchpad, plan, folder, on_launch=bars.launched)
        print("\n".join(demo.summary(launchpad, plan, outcome)))
        return 1 if outcome.failed or outcome.report is None else 0


def _import(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from rich.console import Console

    from nanoos_fw.operations import import_structures
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.structures import StructureStore

    store = StructureStore(open_database(launchpad))
    console = Console(stderr=True)
    with console.status("reading structures") as status:
        report = import_structures(
            store,
            arguments.paths,
            in_set=arguments.in_set,
            id_prop_target=arguments.target,
            on_entry=lambda r: status.update(f"{r.total} entries read"),
        )
    save_if_embedded(launchpad)
    if arguments.json:
        print_json(_import_json(report))
    else:
        _print_import(report, arguments.in_set)
    return 1 if report.failures or report.total == 0 else 0


def _import_json(report: ImportReport) -> dict[str, Any]:
    return {
        "added": report.added,
        "duplicates": [
            {"label": label, "structure": key} for label, key in report.duplicates
        ],
        "failures": [
            {"label": f.label, "source": str(f.source), **f.error.to_dict()}
            for f in report.failures
        ],
        "notes": [{"label": label, "note": note} for label, note in report.notes],
    }


def _print_import(report: ImportReport, in_set: str) -> None:
    for failure in report.failures:
        print(f"refused    {failure.source}: {failure.error}")
    for label, key in report.duplicates[:_SHOWN_ENTRIES]:
        print(f"duplicate  {label} (structure {key[:12]})")
    more = len(report.duplicates) - _SHOWN_ENTRIES
    if more > 0:
        print(f"duplicate  … and {more} more (--json lists all)")
    for label, note in report.notes[:_SHOWN_ENTRIES]:
        print(f"note       {label}: {note}")
    more = len(report.notes) - _SHOWN_ENTRIES
    if more > 0:
        print(f"note       … and {more} more (--json lists all)")
    print(
        f"{report.total} entries: {report.added} added to set {in_set!r}, "
        f"{len(report.duplicates)} duplicates, {len(report.failures)} refused"
    )


def _report(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.reports import write_report
    from nanoos_fw.stores.database import open_database

    path = write_report(open_database(launchpad), arguments.campaign, arguments.output)
    print(path)
    return 0
