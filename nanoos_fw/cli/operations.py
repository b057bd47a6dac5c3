"""``nanoos reconcile`` and ``nanoos rerun``: lost runs, and failed ones."""

from __future__ import annotations

import argparse
import shutil
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli.common import (
    finish,
    launchpad_of,
    print_json,
    print_locked,
    save_if_embedded,
)

if TYPE_CHECKING:
    from nanoos_fw.operations.reconcile import Verdict
    from nanoos_fw.operations.rerun import Attempt


def add_commands(commands: Any) -> None:
    """Add ``reconcile`` and ``rerun``."""
    reconcile = commands.add_parser(
        "reconcile",
        help="find lost runs, dead reservations and stale locks, and put them right",
        description=(
            "Ask SLURM's queue, then its accounting, then the heartbeat, what became "
            "of the runs that the launchpad believes in. A lost run becomes FIZZLED "
            "with its cause; a dead reservation becomes READY."
        ),
    )
    reconcile.add_argument(
        "--dry-run", action="store_true", help="report, change nothing"
    )
    reconcile.add_argument(
        "--heartbeat-minutes",
        type=float,
        default=30.0,
        metavar="N",
        help="age of the heartbeat at which a run without a SLURM job is lost "
        "(default: %(default)g)",
    )
    reconcile.add_argument(
        "--lock-minutes",
        type=float,
        default=10.0,
        metavar="N",
        help="age at which the lock of a workflow is removed, counted from the first "
        "reconcile that saw it (default: %(default)g)",
    )
    finish(reconcile, _reconcile)

    rerun = commands.add_parser(
        "rerun",
        help="rerun failed fireworks, each according to why it failed",
        description=(
            "Out of time: longer walltime. Out of memory: more memory. Node failure: "
            "without that node. Database away, killed, preempted: as it was. "
            "A full disk, jobs that somebody cancelled, programming errors and bad "
            "input are left alone unless --class names them. Each has a limit of "
            "attempts."
        ),
    )
    what = rerun.add_mutually_exclusive_group(required=True)
    what.add_argument("--failed", action="store_true", help="rerun what has failed")
    what.add_argument(
        "--undo",
        nargs="?",
        const="",
        metavar="BATCH",
        help="take back a rerun that has not begun (default: the last one)",
    )
    rerun.add_argument(
        "--class",
        action="append",
        default=[],
        dest="classes",
        metavar="CLASS",
        help="only failures of this class: timeout, oom, node, preempted, killed, "
        "store, launch, disk, cancelled, lammps, input, code; may be given several "
        "times",
    )
    rerun.add_argument("--campaign", help="only fireworks of this campaign")
    rerun.add_argument("--dry-run", action="store_true", help="say what would be done")
    finish(rerun, _rerun)


def _reconcile(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.reconcile import reconcile
    from nanoos_fw.slurm import has_accounting

    slurm = shutil.which("squeue") is not None
    report = reconcile(
        launchpad,
        dry_run=arguments.dry_run,
        heartbeat_expires=timedelta(minutes=arguments.heartbeat_minutes),
        lock_expires=timedelta(minutes=arguments.lock_minutes),
        slurm=slurm,
        accounting=has_accounting() if slurm else False,
    )
    if not arguments.dry_run:
        save_if_embedded(launchpad)
    lists = {
        "lost": report.lost,
        "unreserved": report.unreserved,
        "paused": report.paused,
        "unknown": report.unknown,
    }
    if arguments.json:
        print_json(
            {
                "alive": report.alive,
                **{name: [_row(v) for v in found] for name, found in lists.items()},
                "refreshed": report.refreshed,
                "unlocked": report.unlocked,
                "locked": report.locked,
                "dry_run": arguments.dry_run,
            }
        )
        return 0
    for name, found in lists.items():
        for verdict in found:
            launch = verdict.launch
            cause = f" [{verdict.cause}]" if verdict.cause else ""
            print(
                f"{name:11} firework {launch.fw_id} ({launch.name}): "
                f"{verdict.reason}{cause}"
            )
    for fw_id in report.refreshed:
        print(f"{'refreshed':11} firework {fw_id}: its launch had ended")
    for fw_id in report.unlocked:
        print(f"{'unlocked':11} workflow of firework {fw_id}")
    print_locked(report.locked)
    print(
        f"{report.alive} alive, {len(report.lost)} lost, "
        f"{len(report.unreserved) + len(report.paused)} dead reservations, "
        f"{len(report.unknown)} unknown"
        f"{' (nothing was changed)' if arguments.dry_run else ''}"
    )
    if report.unknown:
        print(
            "unknown runs are left alone; one that is surely gone: lpad rerun_fws -i ID"
        )
    if report.lost:
        print("next: nanoos rerun --failed --dry-run")
    return 0


def _row(verdict: Verdict) -> dict[str, Any]:
    return {
        "fw_id": verdict.launch.fw_id,
        "name": verdict.launch.name,
        "job": verdict.launch.job_id,
        "cause": verdict.cause,
        "reason": verdict.reason,
    }


def _rerun(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.rerun import rerun_failed_fireworks, undo_reruns
    from nanoos_fw.slurm import read_cluster

    if arguments.undo is not None:
        undone, begun, locked = undo_reruns(launchpad, arguments.undo or None)
        save_if_embedded(launchpad)
        if arguments.json:
            print_json({"undone": undone, "begun": begun, "locked": locked})
            return 0
        print_locked(locked)
        print(f"{undone} reruns taken back, {begun} had begun")
        return 0
    # The limits of the cluster; on a machine without SLURM there are none.
    cluster = read_cluster() if shutil.which("sinfo") else None
    report = rerun_failed_fireworks(
        launchpad,
        campaign=arguments.campaign,
        classes=arguments.classes,
        cluster=cluster,
        dry_run=arguments.dry_run,
    )
    if not arguments.dry_run:
        save_if_embedded(launchpad)
    if arguments.json:
        print_json(
            {
                "batch": report.batch,
                "rerun": [_attempt(a) for a in report.rerun],
                "refused": [_attempt(a) for a in report.refused],
                "locked": report.locked,
                "dry_run": arguments.dry_run,
            }
        )
        return 0
    for attempt in report.rerun:
        changes = ", ".join(attempt.changes) or "as it was"
        print(
            f"rerun    firework {attempt.fw_id} ({attempt.name}) [{attempt.failure}, "
            f"attempt {attempt.previous + 2}]: {changes}; "
            f"{attempt.descendants} descendants wait for it"
        )
    for attempt in report.refused:
        print(
            f"left     firework {attempt.fw_id} ({attempt.name}) [{attempt.failure}]: "
            f"{attempt.refused}; {attempt.error.message}"
        )
    print_locked(report.locked)
    would = "would be rerun" if arguments.dry_run else "rerun"
    print(f"{len(report.rerun)} {would}, {len(report.refused)} left")
    if report.batch and report.rerun:
        print(f"to take it back: nanoos rerun --undo {report.batch}")
    return 0


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "fw_id": attempt.fw_id,
        "name": attempt.name,
        "stage": attempt.stage,
        "class": attempt.failure,
        "error": attempt.error.to_dict(),
        "previous": attempt.previous,
        "queueadapter": attempt.resources,
        "changes": list(attempt.changes),
        "refused": attempt.refused,
        "descendants": attempt.descendants,
    }
