"""``nanoos work``: run many fireworks inside one allocation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli.common import finish, print_json

if TYPE_CHECKING:
    from nanoos_fw.operations.workers import WorkSummary


def add_commands(commands: Any) -> None:
    """Add ``work``."""
    work = commands.add_parser(
        "work",
        help="run many fireworks in this allocation, several at a time",
        description=(
            "Divide the processors and GPUs of this node's allocation into slots, each "
            "of which runs one firework after another until nothing is left, or not "
            "enough time. What does not fit is left for another worker. TERM, USR1, "
            "USR2 and Ctrl-C let running fireworks hand themselves over; a file "
            "'drain' in the folder lets them finish; both take no further ones. "
            "'nanoos init --slurm' writes work.sh, a job array of such workers."
        ),
    )
    work.add_argument(
        "--category",
        action="append",
        default=[],
        help="of the fireworks to run (prep, train, infer, md); may be given several "
        "times (default: all)",
    )
    work.add_argument(
        "--slots",
        type=int,
        default=1,
        metavar="N",
        help="fireworks at a time (default: %(default)s)",
    )
    work.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="threads of each MPI rank; a slot has as many ranks as its processors "
        "allow (default: %(default)s)",
    )
    work.add_argument(
        "--idle",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="a slot leaves when nothing was to be run for so long "
        "(default: %(default)g)",
    )
    work.add_argument(
        "--walltime",
        metavar="TIME",
        help="limit outside of SLURM (minutes, H:MM:SS, D-HH:MM:SS); inside, the end "
        "of the allocation decides",
    )
    work.add_argument(
        "--dir",
        type=Path,
        default=Path("work"),
        help="folder for logs and launch directories (default: %(default)s)",
    )
    finish(work, _work)


def _work(arguments: argparse.Namespace) -> int:
    from nanoos_fw.errors import InputError
    from nanoos_fw.operations.workers import WorkPlan
    from nanoos_fw.operations.workers import work as run_worker
    from nanoos_fw.settings import load_settings
    from nanoos_fw.slurm import walltime_seconds
    from nanoos_fw.stores.embedded import embedded_file

    path = arguments.launchpad or load_settings().launchpad
    if embedded_file() or (path is not None and path.is_dir()):
        raise InputError(
            "the embedded database belongs to one process",
            advice="give the my_launchpad.yaml of a MongoDB server with -l",
        )
    if arguments.threads < 1 or arguments.idle < 0:
        raise InputError("--threads must be at least 1, and --idle not negative")
    walltime = None
    if arguments.walltime is not None:
        try:
            walltime = walltime_seconds(arguments.walltime)
        except ValueError as error:
            raise InputError(f"--walltime: {error}") from error
    out = sys.stderr if arguments.json else sys.stdout
    summary = run_worker(
        WorkPlan(
            launchpad=path,
            categories=tuple(arguments.category),
            slots=arguments.slots,
            threads=arguments.threads,
            idle_s=arguments.idle,
            walltime_s=walltime,
            folder=arguments.dir,
        ),
        lambda line: print(line, file=out, flush=True),
    )
    if arguments.json:
        print_json(summary.to_dict())
    else:
        print("\n".join(_lines(summary)))
    # A failed firework is the campaign's business; a worker without slots is not well.
    return 1 if all(slot.died and not slot.states for slot in summary.slots) else 0


def _lines(summary: WorkSummary) -> list[str]:
    lines = ["", "slot  fireworks  busy      left because"]
    for slot in summary.slots:
        count = sum(slot.states.values())
        busy = 100 * slot.busy_s / summary.wall_s if summary.wall_s else 0.0
        lines.append(f"{slot.number:4d}  {count:9d}  {busy:4.0f} %    {slot.left}")
    ended = ", ".join(f"{n} {state.lower()}" for state, n in summary.states.items())
    lines.append(f"{summary.worker}: {ended or 'nothing'} in {summary.wall_s:.0f} s")
    if summary.lost:
        ids = ", ".join(map(str, summary.lost))
        lines.append(f"lost with their slots: fireworks {ids}; next: nanoos reconcile")
    return lines
