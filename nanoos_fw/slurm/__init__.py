"""SLURM: what to ask of it, what it offers, and what became of a job."""

from __future__ import annotations

from nanoos_fw.slurm.cluster import (
    Cluster,
    Node,
    Partition,
    check_request,
    over_policy,
    parse_cluster,
    read_cluster,
    request_problems,
)
from nanoos_fw.slurm.commands import (
    allocation_deadline,
    allocation_times,
    run_slurm,
    slurm_time,
)
from nanoos_fw.slurm.jobs import (
    EndedJob,
    QueuedJob,
    ended_jobs,
    has_accounting,
    parse_sacct,
    parse_scontrol_jobs,
    queued_jobs,
    was_cancelled,
)
from nanoos_fw.slurm.limits import SubmitLimit, jobs_of, submit_limits
from nanoos_fw.slurm.request import (
    SlurmRequest,
    batch_script,
    memory_mib,
    slurm_request,
    walltime_seconds,
)

__all__ = [
    "Cluster",
    "EndedJob",
    "Node",
    "Partition",
    "QueuedJob",
    "SlurmRequest",
    "SubmitLimit",
    "allocation_deadline",
    "allocation_times",
    "batch_script",
    "check_request",
    "ended_jobs",
    "has_accounting",
    "jobs_of",
    "memory_mib",
    "over_policy",
    "parse_cluster",
    "parse_sacct",
    "parse_scontrol_jobs",
    "queued_jobs",
    "read_cluster",
    "request_problems",
    "run_slurm",
    "slurm_request",
    "slurm_time",
    "submit_limits",
    "walltime_seconds",
    "was_cancelled",
]
