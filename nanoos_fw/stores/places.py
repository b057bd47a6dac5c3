"""Where a launch runs: SLURM job, host, process, and its heartbeat.

FireWorks knows the SLURM job only of reserved launches, and its heartbeat ends with the
first database error. So each firetask writes down where it runs, and beats by itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nanoos_fw.stores.database import store_errors

logger = logging.getLogger(__name__)

BEAT_S = 60.0
COLLECTION = "launch_places"


@dataclass(frozen=True)
class LaunchPlace:
    """Where a launch runs; see the fields of ``noted_place``.

    ``death`` tells how its process ended, if a packed worker saw it end.
    """

    launch_id: int
    fw_id: int
    host: str
    pid: int
    job_id: str | None
    started: datetime
    beat: datetime
    death: str | None = None


@contextlib.contextmanager
def noted_place(
    database: Any,
    fw_id: int,
    environ: Mapping[str, str] | None = None,
    *,
    cores: int | None = None,
) -> Iterator[None]:
    """Write down where this launch runs, and beat until the block ends.

    A database that is away for a while stops neither the work nor the heartbeat.

    Parameters
    ----------
    cores
        That its children may use; a job of SLURM has those that SLURM says.
    """
    env = os.environ if environ is None else environ
    with store_errors("note where a launch runs"):
        launch = database["launches"].find_one(
            {"fw_id": fw_id, "state": "RUNNING"},
            {"launch_id": 1},
            sort=[("launch_id", -1)],
        )
    if launch is None:
        yield
        return
    now = datetime.now(UTC)
    place: dict[str, Any] = {
        "fw_id": fw_id,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm": slurm_ids(env),
        "cores": allocated_cores(env, cores),
        "started": now,
        "beat": now,
    }
    if "NANO_OS_SLOT" in env:  # one of several in its allocation
        place["slot"] = {
            "number": int(env["NANO_OS_SLOT"]),
            "cpus": sorted(os.sched_getaffinity(0)),
            "gpus": env.get("CUDA_VISIBLE_DEVICES", ""),
        }
    key = {"_id": launch["launch_id"]}
    with store_errors("note where a launch runs"):
        database[COLLECTION].update_one(key, {"$set": place}, upsert=True)
    if type(database).__module__.startswith("mongomock"):
        yield  # made for one thread, and nobody else could read the heartbeat
        return
    end = threading.Event()

    def beat() -> None:
        from pymongo.errors import PyMongoError

        while not end.wait(BEAT_S):
            try:
                database[COLLECTION].update_one(
                    key, {"$set": {"beat": datetime.now(UTC)}}
                )
            except PyMongoError as error:
                logger.warning("no heartbeat: %s", error)

    thread = threading.Thread(target=beat, name="nanoos-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()


def allocated_cores(env: Mapping[str, str], usable: int | None) -> int | None:
    """Return the cores that nobody else can have while a launch runs.

    All of its job's, on all nodes; in a slot of a packed worker, and outside of SLURM,
    those it may use.
    """
    text = env.get("SLURM_JOB_CPUS_PER_NODE", "")
    if "NANO_OS_SLOT" in env or not text:
        return usable
    # 4(x2),2: two nodes of 4 and one of 2
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return sum(int(count) * int(nodes or 1) for count, nodes in groups) or usable


def slurm_ids(env: Mapping[str, str]) -> dict[str, str]:
    """Return what SLURM calls the place of a process: job, array task, step, node."""
    names = (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_STEP_ID",
        "SLURM_JOB_PARTITION",
        "SLURM_CLUSTER_NAME",
        "SLURM_RESTART_COUNT",
    )
    found = {
        name.removeprefix("SLURM_").lower(): env[name] for name in names if name in env
    }
    if "SLURMD_NODENAME" in env:
        found["node"] = env["SLURMD_NODENAME"]
    return found


def note_death(
    database: Any,
    *,
    launch_id: int,
    fw_id: int,
    pid: int,
    reason: str,
    environ: Mapping[str, str] | None = None,
) -> None:
    """Write down that the process of a launch has ended without ending the launch.

    Its allocation may go on for days; without this nobody would look for it before.
    The launch may not have come to note its place itself.
    """
    now = datetime.now(UTC)
    first = {
        "slurm": slurm_ids(os.environ if environ is None else environ),
        "started": now,
        "beat": now,
    }
    database[COLLECTION].update_one(
        {"_id": launch_id},
        {
            "$set": {
                "fw_id": fw_id,
                "host": socket.gethostname(),
                "pid": pid,
                "death": reason,
            },
            "$setOnInsert": first,
        },
        upsert=True,
    )


def read_places(database: Any, launch_ids: list[int]) -> dict[int, LaunchPlace]:
    """Return the places of launches that have noted one. One query."""
    with store_errors("read where launches run"):
        documents = list(database[COLLECTION].find({"_id": {"$in": launch_ids}}))
    return {
        document["_id"]: LaunchPlace(
            launch_id=document["_id"],
            fw_id=document["fw_id"],
            host=document["host"],
            pid=document["pid"],
            job_id=document["slurm"].get("job_id"),
            started=utc(document["started"]),
            beat=utc(document["beat"]),
            death=document.get("death"),
        )
        for document in documents
    }


def read_cores(database: Any, launch_ids: list[int]) -> dict[int, int]:
    """Return the cores of launches, as far as they are known. One query."""
    query = {"_id": {"$in": launch_ids}, "cores": {"$gt": 0}}
    with store_errors("read the cores of launches"):
        found = database[COLLECTION].find(query, {"cores": 1})
        return {document["_id"]: int(document["cores"]) for document in found}


def utc(value: Any) -> datetime:
    """Return a time of the database; both it and FireWorks keep UTC."""
    time = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    return time if time.tzinfo else time.replace(tzinfo=UTC)
