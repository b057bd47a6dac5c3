"""What the next attempt after a failure gets, by the class of the failure."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanoos_fw.errors import InputError, NanoOSError
from nanoos_fw.faults import DISK_CLASS, MEMORY_CLASS, OUT_OF_MEMORY, killed
from nanoos_fw.slurm import (
    Cluster,
    Partition,
    memory_mib,
    slurm_request,
    walltime_seconds,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """What the next attempt after a failure of a class gets.

    Parameters
    ----------
    attempts
        Reruns after failures of this class; None for no limit.
    longer, memory
        Factors of walltime and memory.
    exclude
        Whether the node is excluded.
    why
        For the user, where there is no rerun.
    """

    attempts: int | None
    longer: float = 1.0
    memory: float = 1.0
    exclude: bool = False
    why: str = ""


RULES: dict[str, Rule] = {
    "timeout": Rule(attempts=5, longer=1.5),
    "oom": Rule(attempts=3, memory=1.75),
    "node": Rule(attempts=5, exclude=True),
    "preempted": Rule(attempts=None),
    "killed": Rule(attempts=3),
    "store": Rule(attempts=5),
    "launch": Rule(attempts=1),
    "disk": Rule(attempts=0, why="its disk is full; free space, then name the class"),
    "cancelled": Rule(attempts=0, why="somebody cancelled its job"),
    "lammps": Rule(attempts=0, why="it would fail again; change its settings"),
    "input": Rule(attempts=0, why="it would fail again; correct the input"),
    "code": Rule(attempts=0, why="it would fail again; correct the program"),
}
CLASSES = tuple(RULES)
# ``class`` in the evidence of the stored error, and its kind -> class.
_EVIDENCE = {DISK_CLASS: "disk", MEMORY_CLASS: "oom"}
_KINDS = {
    "out_of_time": "timeout",
    "out_of_memory": "oom",
    "disk_full": "disk",
    "store": "store",
    "launch": "launch",
    "simulation": "lammps",
    "input": "input",
    "missing_dependency": "input",
    "corrupt_artifact": "input",
}


def failure_class(error: NanoOSError) -> str:
    """Return the class of a failure, from the stored error."""
    if error.kind == "lost_run":
        cause = str(error.evidence.get("cause"))
        return cause if cause in RULES and cause != "code" else "killed"
    named = _EVIDENCE.get(str(error.evidence.get("class")))
    if named is not None:
        return named
    if error.kind == "launch":
        log = str(error.evidence.get("log_tail", ""))
        if any(sign in log for sign in OUT_OF_MEMORY):
            return "oom"
        if killed(error.evidence.get("exit_code")):
            return "killed"
    return _KINDS.get(error.kind, "code")


def next_resources(
    before: Mapping[str, Any],
    rule: Rule,
    error: NanoOSError,
    cluster: Cluster | None,
) -> tuple[dict[str, Any], list[str], str]:
    """Return the next request, what changed, and why it cannot grow any more."""
    after = dict(before)
    changes: list[str] = []
    partition = _partition(before, error, cluster)
    if rule.longer > 1:
        had = error.evidence.get("limit_s")
        if before.get("walltime") is not None:
            had = walltime_seconds(before["walltime"])
        if had and math.isfinite(had):
            asked = min(had * rule.longer, _longest_s(before, partition, cluster))
            # At the partition's limit it goes on with what it gets: it resumes.
            if asked > had:
                minutes = math.floor(asked / 60)
                after["walltime"] = f"{minutes // 60}:{minutes % 60:02d}:00"
                changes.append(f"walltime {after['walltime']}")
    if rule.memory > 1:
        had = error.evidence.get("memory_mib")
        if before.get("mem") is not None:
            had = memory_mib(before["mem"])
        if not had and before.get("mem_per_cpu") is not None:
            had = memory_mib(before["mem_per_cpu"]) * _processors_on_node(before)
        if not had:
            return after, changes, "its memory request is not known; set _queueadapter"
        most = partition.memory_mib if partition else math.inf
        if had >= most:
            return after, changes, f"it had all the memory of a node, {had:.0f} MiB"
        after.pop("mem_per_cpu", None)
        after["mem"] = f"{math.ceil(min(had * rule.memory, most))}M"
        changes.append(f"memory {after['mem']}")
    if rule.exclude:
        node = str(error.evidence.get("nodes") or "")
        excluded = _excluded(node, before, partition)
        if excluded is not None:
            after["exclude_nodes"] = excluded
            changes.append(f"without node {node}")
    return after, changes, ""


def _partition(
    before: Mapping[str, Any], error: NanoOSError, cluster: Cluster | None
) -> Partition | None:
    """Return the partition that the next attempt goes to, as far as it is known."""
    if cluster is None:
        return None
    queue = before.get("queue") or error.evidence.get("partition")
    try:
        return cluster.partition(str(queue).split(",")[0] if queue else None)
    except InputError as unknown:  # it is gone, or none is the default
        logger.warning("limits are not known: %s", unknown)
        return None


def _longest_s(
    before: Mapping[str, Any], partition: Partition | None, cluster: Cluster | None
) -> float:
    """Return the longest walltime that a partition and accounting allow, in s."""
    if partition is None or cluster is None:
        return math.inf
    chosen = {n: before[n] for n in ("account", "qos") if before.get(n) is not None}
    return cluster.longest_s(slurm_request(chosen), partition)


def _processors_on_node(before: Mapping[str, Any]) -> int:
    tasks = before.get("ntasks_per_node")
    if tasks is None:
        tasks = math.ceil(
            int(before.get("ntasks") or 1) / int(before.get("nodes") or 1)
        )
    return int(tasks) * int(before.get("cpus_per_task") or 1)


def _excluded(
    node: str, before: Mapping[str, Any], partition: Partition | None
) -> str | None:
    """Return the nodes to exclude after one has failed; None if they stay as they are.

    Those that failed earlier may come again where too few would be left without them:
    SLURM would refuse the job.
    """
    # A list of several nodes does not say which one failed.
    if not re.fullmatch(r"[\w.-]+", node):
        return None
    listed = str(before.get("exclude_nodes") or "")
    names = set(listed.split(","))
    if node in names:
        return None
    there = {n.name for n in partition.nodes} if partition else set()
    needed = int(before.get("nodes") or 1)
    if not there or "[" in listed or len(there - names - {node}) >= needed:
        return f"{listed},{node}" if listed else node
    return node if len(there - {node}) >= needed else None
