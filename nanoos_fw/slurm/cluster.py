"""What a cluster offers: partitions, their limits and nodes; does a request fit."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from nanoos_fw.errors import InputError, LaunchError, MissingDependencyError
from nanoos_fw.slurm.access import (
    Access,
    Submitter,
    access_problems,
    parse_access,
    read_submitter,
)
from nanoos_fw.slurm.commands import run_slurm
from nanoos_fw.slurm.policy import (
    JobLimits,
    Policy,
    longest_s,
    policy_problems,
    read_policy,
)
from nanoos_fw.slurm.request import SlurmRequest, memory_mib, walltime_seconds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """A node as ``sinfo`` describes it, and as a partition lets jobs use it.

    ``memory_mib`` is what jobs may ask for; 1 where the site has not configured it.
    """

    name: str
    cpus: int
    memory_mib: int
    gpus: int
    state: str


# States of nodes that do not take jobs, perhaps for good.
_AWAY = ("down", "drain", "fail", "maint", "powered_down", "unknown", "future")


@dataclass(frozen=True)
class Partition:
    """A partition and its limits; infinite where there is none.

    ``state`` is UP, DOWN (jobs wait), DRAIN or INACTIVE (jobs are refused); ``qos`` is
    the QOS whose limits apply to all of its jobs.
    """

    name: str
    default: bool
    state: str
    max_time_s: float
    max_nodes: float
    nodes: tuple[Node, ...]
    min_nodes: int = 1
    access: Access = field(default_factory=Access)
    qos: str | None = None

    @property
    def up(self) -> bool:
        """Whether its jobs begin."""
        return self.state == "UP"

    @property
    def usable(self) -> tuple[Node, ...]:
        """Nodes that take jobs; all of them if none does at the moment."""
        found = tuple(n for n in self.nodes if not n.state.lower().startswith(_AWAY))
        return found or self.nodes

    @property
    def cpus(self) -> int:
        """Processors of its largest node."""
        return max((node.cpus for node in self.nodes), default=0)

    @property
    def memory_mib(self) -> int:
        """Memory of its largest node."""
        return max((node.memory_mib for node in self.nodes), default=0)

    @property
    def gpus(self) -> int:
        """GPUs of the node that has most."""
        return max((node.gpus for node in self.nodes), default=0)


@dataclass(frozen=True)
class Cluster:
    """A SLURM cluster, for a user; without one partitions are open to all.

    ``enforces_limits`` tells whether those of accounting, the ``policy``, count.
    """

    name: str
    version: str
    max_array_size: int
    accounting: bool
    partitions: tuple[Partition, ...]
    submitter: Submitter | None = None
    enforces_limits: bool = False
    policy: Policy = field(default_factory=Policy)

    def limits(self, request: SlurmRequest, partition: Partition) -> list[JobLimits]:
        """Return what accounting limits a job to; see ``slurm.policy``."""
        return self.policy.of(request, partition.name, partition.qos, self.submitter)

    def longest_s(self, request: SlurmRequest, partition: Partition) -> float:
        """Return the longest walltime of a job in a partition, in s."""
        by_policy, _ = longest_s(self.limits(request, partition))
        if self.policy.lifts("PartitionTimeLimit", request, self.submitter):
            return by_policy
        return min(by_policy, partition.max_time_s)

    def partition(self, name: str | None) -> Partition:
        """Return a partition by name, or the default one.

        Raises
        ------
        InputError
            If there is none of this name.
        """
        for partition in self.partitions:
            if partition.name == name or (name is None and partition.default):
                return partition
        names = ", ".join(p.name for p in self.partitions)
        what = "default partition" if name is None else f"partition {name!r}"
        raise InputError(
            f"cluster {self.name!r} has no {what}", advice=f"partitions: {names}"
        )


def read_cluster() -> Cluster:
    """Ask ``scontrol`` and ``sinfo`` what the cluster offers: three short commands.

    Three more go to accounting if partitions have lists of accounts or QOS, and five
    if SLURM enforces limits of accounting.
    """
    cluster = parse_cluster(
        partitions=run_slurm(["scontrol", "show", "partition", "--oneliner"]),
        nodes=run_slurm(
            ["sinfo", "--noheader", "--Node", "--format=%R|%N|%c|%m|%G|%T"]
        ),
        config=run_slurm(["scontrol", "show", "config"]),
    )
    asked = any(partition.access.asks_accounting for partition in cluster.partitions)
    asked = cluster.accounting and (asked or cluster.enforces_limits)
    who = read_submitter(cluster.name, accounting=asked)
    policy = Policy()
    if cluster.enforces_limits:
        try:
            policy = read_policy(cluster.name, who.user)
        except (LaunchError, MissingDependencyError) as error:
            logger.warning("limits of accounting are not known: %s", error)
    return replace(cluster, submitter=who, policy=policy)


def parse_cluster(partitions: str, nodes: str, config: str) -> Cluster:
    """Return a cluster from the output of the three commands."""
    settings = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", config, re.MULTILINE))
    by_partition: dict[str, list[Node]] = {}
    for line in nodes.splitlines():
        words = [word.strip() for word in line.split("|")]
        if len(words) != 6:
            continue
        partition, name, cpus, memory, gres, state = words
        by_partition.setdefault(partition, []).append(
            Node(
                name=name,
                cpus=int(cpus.rstrip("+")),
                memory_mib=int(memory.rstrip("+")),
                gpus=_gpus(gres),
                state=state.rstrip("*~#!%$@^-"),
            )
        )
    found = []
    for line in partitions.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        if "PartitionName" not in fields:
            continue
        name = fields["PartitionName"]
        found.append(
            Partition(
                name=name,
                default=fields.get("Default") == "YES",
                state=fields.get("State", "UP").upper(),
                max_time_s=walltime_seconds(fields.get("MaxTime", "UNLIMITED")),
                max_nodes=_limit(fields.get("MaxNodes", "UNLIMITED")),
                min_nodes=int(fields.get("MinNodes", "1")),
                access=parse_access(fields),
                qos=fields.get("QoS", "N/A").replace("N/A", "") or None,
                nodes=tuple(_as_allowed(n, fields) for n in by_partition.get(name, ())),
            )
        )
    return Cluster(
        name=settings.get("ClusterName", "cluster"),
        version=settings.get("SLURM_VERSION", ""),
        max_array_size=int(settings.get("MaxArraySize", "1001")),
        accounting=settings.get("AccountingStorageType", "").strip()
        not in {"", "accounting_storage/none", "(null)"},
        partitions=tuple(found),
        enforces_limits=bool(
            {"limits", "safe"}
            & set(settings.get("AccountingStorageEnforce", "").split(","))
        ),
    )


def _as_allowed(node: Node, fields: Mapping[str, str]) -> Node:
    """Return a node with what the partition gives of it to a job."""
    cpus, memory = (
        _limit(fields.get(name, "UNLIMITED"))
        for name in ("MaxCPUsPerNode", "MaxMemPerNode")
    )
    return replace(
        node,
        cpus=int(min(node.cpus, cpus or math.inf)),
        memory_mib=int(min(node.memory_mib, memory or math.inf)),
    )


def _limit(text: str) -> float:
    return math.inf if text.upper() in {"UNLIMITED", "INFINITE"} else float(text)


def _gpus(gres: str) -> int:
    """Return the GPUs in a list such as ``gpu:a100:4(S:0-1),nvme:1``."""
    return sum(
        int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", gres)
    )


# ------------------------------------------------------------------------ does it fit


def request_problems(request: SlurmRequest, cluster: Cluster) -> list[str]:
    """Return why the cluster could never run a request; empty if it could.

    Only what SLURM itself would refuse, or leave pending for ever, is a problem.
    With several partitions (``a,b``) one that can run it is enough.
    """
    names = [None] if request.queue is None else request.queue.split(",")
    reasons = []
    for name in names:
        found = _problems_in(request, cluster, cluster.partition(name))
        if not found:
            return []
        reasons += found
    return reasons


def over_policy(request: SlurmRequest, cluster: Cluster) -> list[str]:
    """Return what of a request exceeds the limits of accounting in all its partitions.

    Unlike the other problems SLURM may not tell of these: the job waits for ever.
    """
    names = [None] if request.queue is None else request.queue.split(",")
    reasons = []
    for partition in map(cluster.partition, names):
        found = policy_problems(request, cluster.limits(request, partition))
        if not found:
            return []
        reasons += found
    return list(dict.fromkeys(reasons))


def check_request(request: SlurmRequest, cluster: Cluster, what: str) -> None:
    """Refuse a request that the cluster could never run.

    Raises
    ------
    InputError
        Names the work, the request and the limits that it exceeds.
    """
    problems = request_problems(request, cluster)
    if problems:
        raise InputError(
            f"{what}: {'; '.join(problems)}",
            evidence={"request": request.model_dump(mode="json", exclude_none=True)},
            advice="change the request (_queueadapter, my_qadapter.yaml), or choose "
            "another partition (queue)",
        )


def _door_problems(
    request: SlurmRequest, cluster: Cluster, partition: Partition, where: str
) -> list[str]:
    """Return why a partition takes no such job, whatever its nodes are."""
    problems = []
    if not partition.up:
        state = partition.state
        refuses = "jobs wait" if state == "DOWN" else "SLURM refuses jobs"
        problems.append(f"{where} is not up but {state}: {refuses} until it is")
    problems += access_problems(request, partition.access, cluster.submitter, where)
    if request.nodes is not None and request.nodes < partition.min_nodes:
        problems.append(
            f"{request.nodes} nodes are below the {partition.min_nodes} of {where} "
            f"(MinNodes)"
        )
    return problems


def _problems_in(
    request: SlurmRequest, cluster: Cluster, partition: Partition
) -> list[str]:
    where = f"partition {partition.name!r}"
    problems = _door_problems(request, cluster, partition, where)
    problems += policy_problems(request, cluster.limits(request, partition))

    def lifted(flag: str) -> bool:
        return cluster.policy.lifts(flag, request, cluster.submitter)

    if request.walltime is not None and not lifted("PartitionTimeLimit"):
        asked = walltime_seconds(request.walltime)
        if asked > partition.max_time_s:
            problems.append(
                f"walltime {request.walltime} exceeds the "
                f"{partition.max_time_s / 3600:g} h of {where}"
            )
    nodes = request.nodes or 1
    most = float(len(partition.nodes))
    if not lifted("PartitionMaxNodes"):
        most = min(partition.max_nodes, most)
    if nodes > most:
        problems.append(f"{nodes} nodes exceed the {most:g} of {where}")
    cpus = request.cpus_per_task or 1
    per_node = request.ntasks_per_node or math.ceil(request.tasks / max(nodes, 1))
    if request.nodes is None and request.ntasks_per_node is None:
        per_node = 1  # SLURM spreads the tasks over as many nodes as it takes
        total = sum(
            sorted((n.cpus for n in partition.nodes), reverse=True)[: int(most)]
        )
        if request.tasks * cpus > total:
            problems.append(
                f"{request.tasks} tasks of {cpus} processors exceed the {total} of "
                f"{where}"
            )
    if per_node * cpus > partition.cpus:
        problems.append(
            f"{per_node} x {cpus} processors on a node exceed the {partition.cpus} of "
            f"{where}"
        )
    memory = memory_mib(request.mem) if request.mem is not None else 0.0
    if request.mem_per_cpu is not None:
        memory = memory_mib(request.mem_per_cpu) * cpus * per_node
    if memory > partition.memory_mib:
        problems.append(
            f"{memory:.0f} MiB on a node exceed the {partition.memory_mib} of {where}"
        )
    gpus = _asked_gpus(request)
    if gpus > partition.gpus:
        problems.append(f"{gpus} GPUs on a node exceed the {partition.gpus} of {where}")
    if request.array is not None:
        last = max(int(n) for n in re.findall(r"\d+", request.array.split("%")[0]))
        if last >= cluster.max_array_size:
            problems.append(
                f"array index {last} is not below MaxArraySize {cluster.max_array_size}"
            )
    return problems


def _asked_gpus(request: SlurmRequest) -> int:
    """Return the GPUs that a single node must have."""
    if request.gres is not None:
        return _gpus(request.gres) or (
            1 if re.search(r"(^|,)gpu($|,)", request.gres) else 0
        )
    for value, tasks in (
        (request.gpus_per_node, 1),
        (request.gpus_per_task, 1),
        (request.gpus, request.nodes or 1),
    ):
        if value is not None:
            count = int(str(value).rpartition(":")[2])
            return math.ceil(count / tasks)
    return 0
