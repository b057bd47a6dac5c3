"""``nanoos campaign`` and ``nanoos status``: campaigns from a plan to an archive."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli.common import (
    finish,
    launchpad_of,
    print_json,
    print_locked,
    save_if_embedded,
)

if TYPE_CHECKING:
    from nanoos_fw.operations.campaigns import Changed
    from nanoos_fw.operations.status import CampaignStatus
    from nanoos_fw.stores.launches import FailedFirework

_SHOWN_FAILURES = 20


def add_commands(commands: Any) -> None:
    """Add ``status``, and ``campaign`` with its commands."""
    status = commands.add_parser(
        "status", help="show where a campaign stands, or list the campaigns"
    )
    status.add_argument("campaign", nargs="?", help="without it: list the campaigns")
    _finish_status(status)

    campaign = commands.add_parser(
        "campaign", help="create, submit, watch, pause, cancel and archive campaigns"
    )
    actions = campaign.add_subparsers(required=True, metavar="ACTION")

    create = actions.add_parser(
        "create",
        help="store a plan; structures come from named sets",
        description=(
            "Store the plan of a campaign (YAML or JSON, fields of CampaignPlan). "
            "Its structures are those of the sets that 'nanoos import --set' filled. "
            "The same plan again is accepted, another one under its name is not."
        ),
    )
    create.add_argument("plan", type=Path)
    create.add_argument("--candidates", metavar="SET", required=True)
    create.add_argument("--references", metavar="SET", required=True)
    finish(create, _create)

    submit = actions.add_parser(
        "submit", help="submit what is not submitted yet; again is harmless"
    )
    submit.add_argument("campaign")
    submit.add_argument(
        "--verify", action="store_true", help="also relax all candidates"
    )
    finish(submit, _submit)

    status = actions.add_parser("status", help="the same as 'nanoos status'")
    status.add_argument("campaign")
    _finish_status(status)

    for name, command, text in (
        ("pause", _pause, "let nothing further begin; what runs goes on to its end"),
        ("cancel", _cancel, "end its jobs in the queue and its open fireworks"),
    ):
        parser = actions.add_parser(name, help=text)
        parser.add_argument("campaign")
        finish(parser, command)

    resume = actions.add_parser("resume", help="let a paused campaign go on")
    resume.add_argument("campaign")
    resume.add_argument(
        "--parked",
        action="store_true",
        help="also fireworks that were parked because SLURM refused their jobs",
    )
    finish(resume, _resume)

    archive = actions.add_parser(
        "archive",
        help="move its workflows out of the launchpad into a file; results stay",
    )
    archive.add_argument("campaign")
    archive.add_argument(
        "-o",
        "--output",
        type=Path,
        help="file to write (default: CAMPAIGN.jsonl.gz)",
    )
    finish(archive, _archive)


def _finish_status(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Count the fireworks of a campaign by stage, state and cause of failure, with "
        "throughput and time to go. The exit code is 1 if any has failed."
    )
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=5.0,
        metavar="S",
        help="show it anew every S seconds until all is finished (default: 5)",
    )
    finish(parser, _status)


def _create(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.campaigns import create, read_plan

    plan = read_plan(arguments.plan)
    candidates = create(
        launchpad,
        plan,
        candidates=arguments.candidates,
        references=arguments.references,
    )
    save_if_embedded(launchpad)
    if arguments.json:
        print_json({"campaign": plan.name, "candidates": candidates})
    else:
        print(
            f"campaign {plan.name!r}: {candidates} candidates\n"
            f"next: nanoos campaign submit {plan.name}"
        )
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.campaigns import submit

    done = submit(launchpad, arguments.campaign, verify=arguments.verify)
    save_if_embedded(launchpad)
    if arguments.json:
        print_json(asdict(done))
    else:
        print(
            f"workflows: {done.added} added, {done.completed} completed, {done.there} "
            "were there"
        )
    return 0


def _status(arguments: argparse.Namespace) -> int:
    launchpad = launchpad_of(arguments)
    from nanoos_fw.operations.status import campaign_status
    from nanoos_fw.stores.campaigns import CampaignStore
    from nanoos_fw.stores.launches import failed_fireworks

    if arguments.campaign is None:
        names = CampaignStore(launchpad.db).names()
        print(json.dumps(names) if arguments.json else "\n".join(names) or "none")
        return 0
    document = CampaignStore(launchpad.db).get(arguments.campaign)
    if arguments.watch is not None:
        return _watch(arguments, launchpad)
    archived = document.get("archive")
    status = campaign_status(launchpad.db, arguments.campaign)
    if archived and not status.stages:
        if arguments.json:
            print_json({**archived["status"], "archive": archived["file"]})
        else:
            states = _counts(archived["status"]["states"])
            print(f"archived {archived['time']} in {archived['file']}: {states}")
        return 0
    # Few questions for a campaign that is well; one that is not may have thousands.
    failed = failed_fireworks(launchpad.db, arguments.campaign) if status.causes else []
    if arguments.json:
        rows = [
            {"fw_id": f.fw_id, "stage": f.stage, **f.error.to_dict()} for f in failed
        ]
        print_json({**status.to_dict(), "failed": rows})
    else:
        print("\n".join([*_lines(status), *_failures(failed)]))
    return 1 if status.states.get("FIZZLED") else 0


def _lines(status: CampaignStatus) -> list[str]:
    if not status.stages:
        return [f"nothing is submitted; nanoos campaign submit {status.name}"]
    lines = []
    for stage, counts in status.stages.items():
        causes = status.causes.get(stage)
        why = f"  [{_counts(causes)}]" if causes else ""
        lines.append(f"{stage:12} {_counts(counts)}{why}")
    if status.parked:
        lines.append(
            f"{status.parked} parked: SLURM refused their jobs; see their spec"
        )
    if status.eta_s:
        lines.append(
            f"{status.per_hour:.1f} fireworks an hour; at that rate "
            f"{status.eta_s / 3600:.1f} h to go"
        )
    return lines


def _failures(failed: Sequence[FailedFirework]) -> list[str]:
    lines = [
        f"failed: firework {entry.fw_id} ({entry.stage}): {entry.error}"
        for entry in failed[:_SHOWN_FAILURES]
    ]
    if len(failed) > _SHOWN_FAILURES:
        lines.append(f"and {len(failed) - _SHOWN_FAILURES} more (--json lists all)")
    return lines


def _watch(arguments: argparse.Namespace, launchpad: Any) -> int:
    from nanoos_fw.errors import InputError

    if arguments.json or not arguments.watch >= 1:
        raise InputError(
            "--watch is for people: at least 1 second, and without --json",
            advice="give --json without --watch to a program",
        )
    from rich.console import Console

    from nanoos_fw.cli.watching import watch_campaign
    from nanoos_fw.operations.status import campaign_status

    last = watch_campaign(
        Console(),
        lambda: campaign_status(launchpad.db, arguments.campaign),
        every_s=arguments.watch,
    )
    return 1 if last.states.get("FIZZLED") else 0


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {state.lower()}" for state, number in counts.items())


def _pause(arguments: argparse.Namespace) -> int:
    from nanoos_fw.operations.campaigns import pause

    launchpad = launchpad_of(arguments)
    return _changed(
        arguments,
        launchpad,
        pause(launchpad, arguments.campaign, slurm=_slurm()),
        "paused",
    )


def _resume(arguments: argparse.Namespace) -> int:
    from nanoos_fw.operations.campaigns import resume

    launchpad = launchpad_of(arguments)
    report = resume(launchpad, arguments.campaign, parked=arguments.parked)
    return _changed(arguments, launchpad, report, "resumed")


def _cancel(arguments: argparse.Namespace) -> int:
    from nanoos_fw.operations.campaigns import cancel

    launchpad = launchpad_of(arguments)
    report = cancel(launchpad, arguments.campaign, slurm=_slurm())
    return _changed(arguments, launchpad, report, "defused")


def _slurm() -> bool:
    return shutil.which("squeue") is not None


def _changed(
    arguments: argparse.Namespace, launchpad: Any, report: Changed, done: str
) -> int:
    save_if_embedded(launchpad)
    if arguments.json:
        print_json(
            {
                done: report.changed,
                "cancelled_jobs": report.cancelled_jobs,
                "left_running": report.left_running,
                "locked": report.locked,
            }
        )
        return 0
    print_locked(report.locked)
    print(f"{report.changed} fireworks {done}")
    if report.cancelled_jobs:
        print(f"{len(report.cancelled_jobs)} jobs cancelled")
    if report.left_running:
        ids = ", ".join(map(str, report.left_running[:20]))
        print(f"{len(report.left_running)} still run or are being submitted: {ids}")
    return 0


def _archive(arguments: argparse.Namespace) -> int:
    from nanoos_fw.operations.archives import archive

    launchpad = launchpad_of(arguments)
    name = arguments.campaign
    file = arguments.output or Path(f"{name}.jsonl.gz")
    record = archive(launchpad, name, file)
    save_if_embedded(launchpad)
    if arguments.json:
        print_json(record)
    else:
        print(
            f"{record['fireworks']} fireworks and {record['launches']} launches are in "
            f"{record['file']}"
        )
    return 0
