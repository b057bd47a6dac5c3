"""How large and long a job may be by accounting: limits of QOS and associations.

SLURM refuses a job beyond them, or leaves it pending for ever. Of each limit the first
that is set counts: that of the partition's QOS, of the job's, of the association;
a QOS with the flag ``OverPartQOS`` comes before the partition's [1]_.

.. [1] https://slurm.schedmd.com/resource_limits.html
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nanoos_fw.slurm.access import Submitter
from nanoos_fw.slurm.commands import run_slurm
from nanoos_fw.slurm.request import SlurmRequest, memory_mib, walltime_seconds

# Columns of sacctmgr that hold resources, as SLURM's documentation calls them.
_OF_JOB, _OF_USER, _OF_GROUP = "MaxTRES", "MaxTRESPU", "GrpTRES"
_MIB = {"K": 1 / 1024, "G": 1024.0, "T": 1024.0**2, "P": 1024.0**3}
_UNITS = {"cpu": "processors", "mem": "MiB", "node": "nodes", "gres/gpu": "GPUs"}


@dataclass(frozen=True)
class JobLimits:
    """What one QOS or association allows a job; what is absent is not limited by it.

    Parameters
    ----------
    source
        In words.
    wall_s
        SLURM's ``MaxWall``; None without a limit.
    resources
        Name of a limit (``MaxTRES``) -> resource (``cpu``, ``mem``, ``node``,
        ``gres/gpu``) -> most of it, memory in MiB.
    flags
        Of a QOS.
    """

    source: str
    wall_s: float | None = None
    resources: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Policy:
    """Limits that SLURM enforces: of all QOS, and of the user's associations.

    Parameters
    ----------
    qualities
        By name of the QOS.
    associations
        By account and partition; of all partitions with an empty name.
    """

    qualities: Mapping[str, JobLimits] = field(default_factory=dict)
    associations: Mapping[tuple[str, str], JobLimits] = field(default_factory=dict)

    def of(
        self,
        request: SlurmRequest,
        partition: str,
        partition_qos: str | None,
        who: Submitter | None,
    ) -> list[JobLimits]:
        """Return the limits that apply to a job in a partition, in their order.

        What accounting does not tell is left out; and so are the association's where
        the QOS is not known, whose limits may go before.
        """
        quality = request.qos if who is None else who.qos(request)
        found = [
            self.qualities[name]
            for name in (partition_qos, quality)
            if name is not None and name in self.qualities
        ]
        if len(found) == 2 and "OverPartQOS" in found[1].flags:
            found.reverse()
        if who is None or quality is None:
            return found
        account = who.account(request) or ""
        for key in ((account, partition), (account, "")):
            if key in self.associations:
                return [*found, self.associations[key]]
        return found

    def lifts(self, flag: str, request: SlurmRequest, who: Submitter | None) -> bool:
        """Tell whether the job's QOS lifts a limit of the partition.

        ``PartitionTimeLimit`` and ``PartitionMaxNodes`` do; as flags of the partition's
        own QOS they are without effect.
        """
        quality = request.qos if who is None else who.qos(request)
        own = None if quality is None else self.qualities.get(quality)
        return own is not None and flag in own.flags


def read_policy(cluster: str, user: str) -> Policy:
    """Ask accounting for the limits of all QOS and of a user: two short commands."""
    show = ["sacctmgr", "--noheader", "--parsable2", "show"]
    return parse_policy(
        run_slurm(
            [*show, "qos", "format=Name,Flags,MaxWall,MaxTRES,MaxTRESPU,GrpTRES"]
        ),
        run_slurm(
            [
                *show, "associations", f"cluster={cluster}", f"user={user}",
                "format=Account,Partition,MaxWall,MaxTRES,GrpTRES",
            ]
        ),
    )  # fmt: skip


def parse_policy(qualities: str, associations: str) -> Policy:
    """Return the limits in the output of the two commands."""
    return Policy(
        {
            name: JobLimits(
                f"QOS {name!r}",
                _wall(wall),
                _resources((_OF_JOB, job), (_OF_USER, user), (_OF_GROUP, group)),
                frozenset(flags.split(",")),
            )
            for name, flags, wall, job, user, group in _rows(qualities, 6)
        },
        {
            (account, partition): JobLimits(
                f"account {account!r}",
                _wall(wall),
                _resources((_OF_JOB, job), (_OF_GROUP, group)),
            )
            for account, partition, wall, job, group in _rows(associations, 5)
        },
    )


def longest_s(limits: Sequence[JobLimits]) -> tuple[float, str]:
    """Return the longest walltime in s, and by whom; infinite without a limit."""
    for own in limits:
        if own.wall_s is not None:
            return own.wall_s, own.source
    return math.inf, ""


def policy_problems(request: SlurmRequest, limits: Sequence[JobLimits]) -> list[str]:
    """Return what of a request exceeds the limits that apply to it."""
    problems = []
    most_s, source = longest_s(limits)
    if request.walltime is not None and walltime_seconds(request.walltime) > most_s:
        problems.append(
            f"walltime {request.walltime} exceeds the {most_s / 3600:g} h of {source} "
            "(MaxWall)"
        )
    asked = asked_resources(request)
    for name in (_OF_JOB, _OF_USER, _OF_GROUP):
        for resource, amount in asked.items():
            for own in limits:
                most = own.resources.get(name, {}).get(resource)
                if most is None:
                    continue
                if amount > most:
                    problems.append(
                        f"{amount:g} {_UNITS[resource]} exceed the {most:g} of "
                        f"{own.source} ({name})"
                    )
                break
    return problems


def asked_resources(request: SlurmRequest) -> dict[str, float]:
    """Return what a request asks for in all, at least; memory in MiB, if it says."""
    nodes = request.nodes or 1
    cpus = request.tasks * (request.cpus_per_task or 1)
    asked: dict[str, float] = {"node": nodes, "cpu": cpus}
    if request.mem is not None:
        asked["mem"] = nodes * memory_mib(request.mem)  # 0: all of the nodes, unknown
    elif request.mem_per_cpu is not None:
        asked["mem"] = cpus * memory_mib(request.mem_per_cpu)
    gpus = [
        int(str(value).rpartition(":")[2]) * times
        for value, times in (
            (request.gpus, 1),
            (request.gpus_per_node, nodes),
            (request.gpus_per_task, request.tasks),
        )
        if value is not None
    ]
    asked["gres/gpu"] = max(gpus, default=0)
    return asked


def _rows(text: str, words: int) -> Iterator[list[str]]:
    for line in text.splitlines():
        row = line.split("|")
        if len(row) == words and row[0]:
            yield row


def _wall(text: str) -> float | None:
    return walltime_seconds(text) if text else None


def _resources(*columns: tuple[str, str]) -> dict[str, dict[str, float]]:
    found = {}
    for name, text in columns:
        amounts = {}
        pattern = r"([^=,]+)=([\d.]+)([KMGTP]?)"
        for resource, number, unit in re.findall(pattern, text):
            if resource in _UNITS:
                amounts[resource] = float(number) * _MIB.get(unit, 1.0)
        found[name] = amounts
    return found
