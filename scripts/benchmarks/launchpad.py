"""A launchpad of 100,000 fireworks: insertion, checkout, status, reconcile.

    python scripts/benchmarks/launchpad.py --uri mongodb://HOST:PORT --json out.json

Small workflows of five fireworks without work (one, three after it, one after these),
once through nanoos_fw and once through plain FireWorks in the same process, each in a
database of its own. Times are of the whole operation, queries are counted by the
driver. Plain FireWorks' ``add_wf`` is measured on ``--plain-sample`` workflows at both
ends of the filling, to show whether its rate depends on the size; the rest is filled
by its ``bulk_add_wfs``. SLURM is faked for ``reconcile``: a ``squeue`` that knows half
of the jobs, a ``sacct`` that knows the others.

With ``--keep NAME`` the databases stay, and a later call with ``--steps`` takes them
up, so that long measurements can be cut in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pymongo
from fireworks import Firework, FWorker, PyTask, Workflow
from fireworks.core.launchpad import LaunchPad
from fireworks.core.rocket_launcher import rapidfire
from pymongo import monitoring

from nanoos_fw.operations import prepare_launchpad, quiet_fireworks, submit_many
from nanoos_fw.operations.reconcile import reconcile
from nanoos_fw.operations.slots import Slot, SlotConfig
from nanoos_fw.operations.status import campaign_status
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import open_database

PER_WORKFLOW = 5
CAMPAIGN = "benchmark"
STEPS = ("insert", "checkout", "status", "reconcile")


class Queries(monitoring.CommandListener):
    """Counts what is sent to the server, by kind."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command_name not in {"hello", "ping", "endSessions", "isMaster"}:
            self.sent[event.command_name] += 1

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        """Nothing: it was counted when it was sent."""

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        """Nothing: it was counted when it was sent."""


QUERIES = Queries()


@contextmanager
def measured(fireworks: int | None = None) -> Iterator[dict[str, Any]]:
    """Fill a dictionary with time, queries, and rate per firework."""
    found: dict[str, Any] = {}
    before, began = QUERIES.sent.copy(), time.perf_counter()
    yield found
    found["wall_s"] = round(time.perf_counter() - began, 3)
    sent = QUERIES.sent - before
    found["queries"] = sum(sent.values())
    found["by_kind"] = dict(sent.most_common())
    number = found.get("fireworks", fireworks)
    if number:
        found["fireworks"] = number
        found["per_second"] = round(number / found["wall_s"], 1)
        found["queries_per_firework"] = round(found["queries"] / number, 3)


def workflow(number: int) -> Workflow:
    """Return the workflow of a number, which a campaign would have."""

    def firework(stage: str, part: int, parents: Sequence[Firework] = ()) -> Firework:
        spec = {
            "_category": "prep",
            "nanoos": {
                "campaign": CAMPAIGN,
                "stage": stage,
                "order": ("first", "middle", "last").index(stage),
                "key": f"{number:08x}-{part}",
                "work_root": "/scratch/nanoos-work",
            },
        }
        task = PyTask(func="os.getcwd")
        return Firework([task], spec=spec, name=stage, parents=list(parents))

    first = firework("first", 0)
    middle = [firework("middle", part, [first]) for part in (1, 2, 3)]
    last = firework("last", 4, middle)
    return Workflow(
        [first, *middle, last],
        name=f"benchmark {number}",
        metadata={"campaign": CAMPAIGN, "key": f"{number:08x}"},
    )


def launchpad_of(uri: str, name: str) -> Any:
    made = LaunchPad(host=uri, name=name, uri_mode=True, strm_lvl="ERROR")
    prepare_launchpad(made)
    open_database(made)
    CampaignStore(made.db).create(CAMPAIGN, {})
    return made


# ---------------------------------------------------------------------------- insertion


def insert(ours: Any, plain: Any, workflows: int, sample: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with measured(workflows * PER_WORKFLOW) as found["nanoos_submit_many"]:
        added, _ = submit_many(ours, map(workflow, range(workflows)))
        assert added == workflows
    with measured() as found["nanoos_submit_many_again"]:
        added, mended = submit_many(ours, map(workflow, range(workflows)))
        assert (added, mended) == (0, 0)
    with measured(sample * PER_WORKFLOW) as found["plain_add_wf_first"]:
        for number in range(sample):
            plain.add_wf(workflow(number))
    rest = range(sample, workflows - sample)
    with measured(len(rest) * PER_WORKFLOW) as found["plain_bulk_add_wfs"]:
        for first in range(rest.start, rest.stop, 500):
            part = range(first, min(first + 500, rest.stop))
            plain.bulk_add_wfs([workflow(n) for n in part])
    with measured(sample * PER_WORKFLOW) as found["plain_add_wf_last"]:
        for number in range(workflows - sample, workflows):
            plain.add_wf(workflow(number))
    for launchpad in (ours, plain):
        there = launchpad.fireworks.count_documents({})
        assert there == workflows * PER_WORKFLOW, there
    return found


# ----------------------------------------------------------------------------- checkout


def checkout(ours: Any, plain: Any, number: int, folder: Path) -> dict[str, Any]:
    """Run fireworks without work: what remains is checkout and completion."""
    found: dict[str, Any] = {}
    here = Path.cwd()
    drain, work = folder / "drain", folder / "slot"
    work.mkdir()
    ended: list[str] = []

    def tell(event: Any) -> None:
        if event["event"] == "ended":
            ended.append(event["state"])
            if len(ended) == number:
                drain.touch()

    config = SlotConfig(
        launchpad=None, categories=("prep",), worker="benchmark", number=1, cpus=None,
        ranks=1, gpus=0, idle_s=1.0, folder=work, drain_files=(drain,),
        parent=os.getppid(),
    )  # fmt: skip
    deadline = time.time() + 86400.0  # so that the query for what fits is the real one
    try:
        with measured(number) as found["nanoos_work_slot"]:
            Slot(config, ours, tell, deadline).run()
        assert ended == ["COMPLETED"] * number, Counter(ended)
        os.chdir(folder)
        with measured(number) as found["plain_rapidfire"]:
            rapidfire(
                plain,
                FWorker(category="prep"),
                nlaunches=number,
                sleep_time=0,
                strm_lvl="ERROR",
            )
    finally:
        os.chdir(here)
    return found


# ------------------------------------------------------------------------------- status


def status(ours: Any, plain: Any, sample: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with measured() as found["nanoos_campaign_status"]:
        answer = campaign_status(ours.db, CAMPAIGN)
    found["nanoos_campaign_status"]["states"] = answer.states
    with measured() as found["plain_count_by_state"]:
        # What 'lpad get_fws -s STATE -d count' does, state by state.
        counts = {
            state: plain.get_fw_ids({"state": state}, count_only=True)
            for state in Firework.STATE_RANKS
        }
    found["plain_count_by_state"]["states"] = {s: n for s, n in counts.items() if n}
    some = [d["nodes"][0] for d in plain.workflows.find({}, {"nodes": 1}).limit(sample)]
    with measured(sample * PER_WORKFLOW) as found["plain_get_wf_summary_dict"]:
        for fw_id in some:
            plain.get_wf_summary_dict(fw_id)
    return found


# ---------------------------------------------------------------------------- reconcile


def reserve(launchpad: Any, number: int, job: int) -> list[tuple[int, int]]:
    """Put fireworks into the queue as ``qlaunch -r`` does; return them and the jobs."""
    worker = FWorker(category="prep")
    found = []
    for job_id in range(job, job + number):
        firework, launch_id = launchpad.reserve_fw(worker, "/")
        launchpad.set_reservation_id(launch_id, job_id)
        found.append((firework.fw_id, job_id))
    return found


def begin(launchpad: Any, fw_ids: Sequence[int]) -> None:
    """Begin fireworks as their jobs do."""
    for fw_id in fw_ids:
        launchpad.checkout_fw(FWorker(category="prep"), "/", fw_id=fw_id)


def fake_slurm(folder: Path, queued: Sequence[int], ended: Sequence[int]) -> None:
    """Write a squeue that has some jobs, and a sacct that knows how others ended."""
    rows = "\n".join(f"{n}|{n}|PENDING|main|N/A|Priority|job" for n in queued)
    (folder / "squeue.txt").write_text(rows + "\n")
    line = "|NODE_FAIL|0:0|2026-01-01T00:00:00|2026-01-01T00:01:00|n1|01:00:00|cpu=1"
    rows = "\n".join(f"{n}{line}" for n in ended)
    (folder / "sacct.txt").write_text(rows + "\n")
    for name in ("squeue", "sacct"):
        program = folder / name
        program.write_text(f"#!/bin/sh\nexec cat {folder}/{name}.txt\n")
        program.chmod(0o755)


def end_what_is_open(ours: Any, plain: Any, programs: Path) -> None:
    """Give back what an earlier call with ``--keep`` has left in the queue."""
    rows = ours.launches.find(
        {"state": {"$in": ["RESERVED", "RUNNING"]}}, {"state_history": 1}
    )
    jobs = [int(row["state_history"][0]["reservation_id"]) for row in rows]
    fake_slurm(programs, [], jobs)
    reconcile(ours)
    plain.detect_unreserved(expiration_secs=0, rerun=True)
    plain.detect_lostruns(expiration_secs=0, fizzle=True)


def reconciliation(ours: Any, plain: Any, number: int, folder: Path) -> dict[str, Any]:
    """Half of the jobs wait; of the others half have ended before, half in their work.

    Plain FireWorks, which asks no queue, takes all that are open for lost.
    """
    found: dict[str, Any] = {"jobs": number}
    programs = folder / "programs"
    programs.mkdir()
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{programs}:{before}"
    half, quarter = number // 2, number // 4
    try:
        end_what_is_open(ours, plain, programs)
        for launchpad in (ours, plain):
            fireworks = reserve(launchpad, number, 1_000_000)
            begin(launchpad, [fw_id for fw_id, _ in fireworks[-quarter:]])
        jobs = [job for _, job in fireworks]
        fake_slurm(programs, jobs[:half], jobs[half:])

        def found_all(report: Any) -> bool:
            numbers = (report.alive, len(report.unreserved), len(report.lost))
            return numbers == (half, number - half - quarter, quarter)

        with measured() as found["nanoos_reconcile_dry_run"]:
            assert found_all(reconcile(ours, dry_run=True))
        with measured() as found["nanoos_reconcile_half_lost"]:
            assert found_all(reconcile(ours))
        with measured() as found["nanoos_reconcile_all_well"]:
            assert reconcile(ours).clean
    finally:
        os.environ["PATH"] = before
    # Without the queue, by age alone: the nearest that FireWorks has.
    with measured() as found["plain_detect_unreserved"]:
        plain.detect_unreserved(expiration_secs=86400)
    with measured() as found["plain_detect_lostruns"]:
        plain.detect_lostruns(expiration_secs=86400)
    with measured() as found["plain_detect_unreserved_and_rerun_all"]:
        plain.detect_unreserved(expiration_secs=0, rerun=True)
    with measured() as found["plain_detect_lostruns_and_fizzle_all"]:
        plain.detect_lostruns(expiration_secs=0, fizzle=True)
    return found


# --------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uri", required=True, help="of a MongoDB server")
    parser.add_argument("--fireworks", type=int, default=100_000)
    parser.add_argument("--plain-sample", type=int, default=200, help="workflows")
    parser.add_argument("--checkouts", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=500, help="in reconcile")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--keep", metavar="NAME", help="of the databases, which stay")
    parser.add_argument("--drop", action="store_true", help="drop those of --keep")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    monitoring.register(QUERIES)
    quiet_fireworks()
    name = arguments.keep or f"nanoos_benchmark_{uuid.uuid4().hex[:12]}"
    names = {"ours": f"{name}_ours", "plain": f"{name}_plain"}
    client: Any = pymongo.MongoClient(arguments.uri)
    server = client.server_info()
    steps = arguments.steps.split(",")
    if set(steps) - set(STEPS):
        parser.error(f"steps are {', '.join(STEPS)}")
    result: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "processors": os.cpu_count(),
            "load_before": os.getloadavg(),
            "server": f"{server['version']} {server.get('gitVersion', '')}",
        },
        "fireworks": arguments.fireworks,
        "per_workflow": PER_WORKFLOW,
    }
    try:
        ours, plain = (launchpad_of(arguments.uri, n) for n in names.values())
        workflows = arguments.fireworks // PER_WORKFLOW
        with tempfile.TemporaryDirectory(prefix="nanoos-benchmark-") as text:
            folder = Path(text)
            for step in steps:
                if step == "insert":
                    done = insert(ours, plain, workflows, arguments.plain_sample)
                elif step == "checkout":
                    done = checkout(ours, plain, arguments.checkouts, folder)
                elif step == "status":
                    done = status(ours, plain, arguments.plain_sample)
                else:
                    done = reconciliation(ours, plain, arguments.jobs, folder)
                result[step] = done
                print(json.dumps({step: done}, indent=1), flush=True)
    finally:
        if arguments.drop or not arguments.keep:
            for name in names.values():
                client.drop_database(name)
    result["machine"]["load_after"] = os.getloadavg()
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
