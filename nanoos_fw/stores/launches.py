"""What FireWorks' own collections tell of a campaign; nothing here writes to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nanoos_fw.errors import NanoOSError, error_from_dict
from nanoos_fw.faults import disk_full_in_text
from nanoos_fw.stores.database import store_errors
from nanoos_fw.stores.places import read_cores

# Key of our part of a firework's spec: campaign, stage, key, work_root.
SPEC_KEY = "nanoos"
# Key below SPEC_KEY: a firework that continues one whose allocation ended.
CONTINUATION = "continuation"
# Key below SPEC_KEY: why a firework was set aside by qlaunch, see ``queue_adapter``.
PARKED = "parked"


@dataclass(frozen=True)
class FailedFirework:
    """A fizzled firework and what is known of the cause."""

    fw_id: int
    name: str
    stage: str
    error: NanoOSError


@dataclass(frozen=True)
class StageTime:
    """Launches of one stage: number, summed and elapsed wall time in s.

    ``core_s`` is the sum of wall time times allocated cores; None if those of a launch
    are not known.
    """

    stage: str
    launches: int
    wall_s: float
    elapsed_s: float
    core_s: float | None


def failed_fireworks(database: Any, campaign: str) -> list[FailedFirework]:
    """Return the fizzled fireworks of a campaign with their causes."""
    query = {f"spec.{SPEC_KEY}.campaign": campaign, "state": "FIZZLED"}
    with store_errors("read fireworks"):
        documents = list(database["fireworks"].find(query).sort("fw_id", 1))
        launches = {
            launch["fw_id"]: launch
            for launch in database["launches"]
            .find({"fw_id": {"$in": [d["fw_id"] for d in documents]}})
            .sort("launch_id", 1)
            if launch["state"] == "FIZZLED"
        }
    return [
        FailedFirework(
            fw_id=document["fw_id"],
            name=document["name"],
            stage=document["spec"][SPEC_KEY]["stage"],
            error=launch_error(launches.get(document["fw_id"])),
        )
        for document in documents
    ]


def launch_error(launch: Mapping[str, Any] | None) -> NanoOSError:
    """Return the error that a fizzled launch document tells of."""
    stored = ((launch or {}).get("action") or {}).get("stored_data") or {}
    exception = stored.get("_exception") or {}
    if exception.get("_details"):
        return error_from_dict(exception["_details"])
    trace = str(exception.get("_stacktrace", ""))
    full = disk_full_in_text(trace, (launch or {}).get("launch_dir"))
    if full is not None:  # of FireWorks' own files, or of a task that is not ours
        return full
    last = trace.strip().splitlines()[-1:] or ["it left no message"]
    return NanoOSError(
        f"programming error or lost run: {last[0]}",
        evidence={"stacktrace": trace[-2000:]},
        advice="look at it with 'lpad get_fws -d all -i' and the firework's id",
    )


def stage_times(database: Any, campaign: str) -> tuple[list[StageTime], list[str]]:
    """Return the time that finished launches took by stage, and their hosts."""
    query = {f"spec.{SPEC_KEY}.campaign": campaign}
    with store_errors("read launches"):
        stages = {
            document["fw_id"]: document["spec"][SPEC_KEY]
            for document in database["fireworks"].find(query, {"fw_id": 1, "spec": 1})
        }
        launches = list(
            database["launches"].find(
                {"fw_id": {"$in": list(stages)}},
                {"launch_id": 1, "fw_id": 1, "time_start": 1, "time_end": 1, "host": 1},
            )
        )
    cores = read_cores(database, [launch["launch_id"] for launch in launches])
    spans: dict[tuple[int, str], list[tuple[datetime, datetime]]] = {}
    core_s: dict[tuple[int, str], list[float]] = {}
    hosts = set()
    for launch in launches:
        start, end = launch.get("time_start"), launch.get("time_end")
        if start is None or end is None:
            continue
        spec = stages[launch["fw_id"]]
        stage = spec.get("order", 0), spec["stage"]
        begin, stop = _time(start), _time(end)
        spans.setdefault(stage, []).append((begin, stop))
        core_s.setdefault(stage, []).append(
            (stop - begin).total_seconds() * cores.get(launch["launch_id"], math.nan)
        )
        hosts.add(str(launch["host"]))
    times = [
        StageTime(
            stage=stage,
            launches=len(times),
            wall_s=sum((end - start).total_seconds() for start, end in times),
            elapsed_s=(
                max(end for _, end in times) - min(start for start, _ in times)
            ).total_seconds(),
            core_s=None if math.isnan(total := sum(core_s[order, stage])) else total,
        )
        for (order, stage), times in sorted(spans.items())
    ]
    return times, sorted(hosts)


def _time(value: Any) -> datetime:
    """FireWorks stores times as ISO text."""
    return value if isinstance(value, datetime) else datetime.fromisoformat(value)
