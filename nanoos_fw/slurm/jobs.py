"""Jobs in the queue and jobs that have ended: one command each, whatever their number.

A job that is not in the queue has not therefore succeeded: accounting knows how it
ended, and a job that neither knows is unknown, not completed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from nanoos_fw.errors import LaunchError, MissingDependencyError
from nanoos_fw.slurm.commands import run_slurm, slurm_time
from nanoos_fw.slurm.request import memory_mib, walltime_seconds

logger = logging.getLogger(__name__)

# Job numbers per sacct command: the kernel limits the length of a command line.
_SACCT_BATCH = 2000
_LIVING = frozenset(
    {
        "PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED",
        "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING", "RESV_DEL_HOLD", "SIGNALING",
        "SPECIAL_EXIT", "STAGE_OUT", "STOPPED",
    }
)  # fmt: skip
# State of accounting -> class of the failure.
_CAUSES = {
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "OUT_OF_MEMORY": "oom",
    "NODE_FAIL": "node",
    "BOOT_FAIL": "node",
    "PREEMPTED": "preempted",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    "FAILED": "code",
    "COMPLETED": "completed",
}


@dataclass(frozen=True)
class QueuedJob:
    """A job that SLURM still has."""

    job_id: str
    array_id: str
    state: str
    partition: str
    name: str
    reason: str
    start: float | None = None


@dataclass(frozen=True)
class EndedJob:
    """How a job ended.

    Parameters
    ----------
    state
        SLURM's own word, such as ``NODE_FAIL``.
    memory_mib
        What was allocated on each node.
    out_of_memory
        Whether the job, or one of its steps, was killed for memory; SLURM calls a
        job whose script noticed this merely FAILED.
    """

    job_id: str
    state: str
    exit_code: int
    signal: int
    nodes: str
    start: float | None
    end: float | None
    limit_s: float | None
    out_of_memory: bool
    memory_mib: float | None = None
    partition: str = ""

    @property
    def cause(self) -> str:
        """Class of the end: timeout, oom, node, preempted, cancelled, code, ..."""
        if self.out_of_memory:
            return "oom"
        return _CAUSES.get(self.state, "unknown")


def has_accounting() -> bool:
    """Return whether ``sacct`` has anything to say on this cluster."""
    config = run_slurm(["scontrol", "show", "config"])
    found = re.search(r"^AccountingStorageType\s*=\s*(\S+)", config, re.MULTILINE)
    return found is not None and not found[1].endswith(("/none", "(null)"))


def queued_jobs() -> dict[str, QueuedJob]:
    """Return the jobs that SLURM still has, of all users, by their number.

    Tasks of an array count one by one, and can be looked up by the array's number
    too. One ``squeue`` command.
    """
    answer = run_slurm(
        # Of hidden partitions, too: a job that is not shown would count as ended.
        ["squeue", "--all", "--noheader", "--array", "--format=%A|%F|%T|%P|%S|%r|%j"]
    )
    jobs: dict[str, QueuedJob] = {}
    for line in answer.splitlines():
        words = line.strip().split("|", 6)
        if len(words) == 7:
            number, array, state, partition, start, reason, name = words
            began = None if state == "PENDING" else slurm_time(start)  # else a guess
            job = QueuedJob(number, array, state, partition, name, reason, began)
            jobs[number] = job
            jobs.setdefault(array, job)
    return jobs


def ended_jobs(
    job_ids: Iterable[str], *, accounting: bool = True
) -> dict[str, EndedJob]:
    """Return how jobs ended, by their number; those that nobody knows are missing.

    Parameters
    ----------
    job_ids
        Numbers of jobs.
    accounting
        Ask ``sacct``. Without accounting the controller is asked, which knows ended
        jobs for some minutes (``MinJobAge``).
    """
    wanted = sorted({job for job in job_ids if job.isdigit()})
    if not wanted:
        return {}
    if not accounting:
        return {
            number: job
            for number, job in _from_controller().items()
            if number in set(wanted)
        }
    found: dict[str, EndedJob] = {}
    for first in range(0, len(wanted), _SACCT_BATCH):
        found |= _from_accounting(wanted[first : first + _SACCT_BATCH])
    return found


# ----------------------------------------------------------------------------- this job

# The controller's word is there at once, accounting's a moment later; SLURM gives
# KillWait (30 s by default) from its TERM to its KILL.
_WORD_TIMEOUT_S, _WORD_POLL_S = 6.0, 0.5
_CLOCK_DIFFERENCE_S = 60.0


def was_cancelled(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether somebody has cancelled the job that this process runs in.

    For a process that was asked to stop: SLURM sends the same TERM at the end of the
    walltime, before a preemption, and for ``scancel``. Only the last is somebody's
    wish that the work end. By then the controller has the job as CANCELLED, or
    COMPLETING without a reason of its own; accounting says which where there is one.
    False outside of SLURM, and if SLURM does not answer.
    """
    env = os.environ if environ is None else environ
    number = env.get("SLURM_JOB_ID", "")
    if not number.isdigit():
        return False
    try:
        return _cancelled(number)
    except (LaunchError, MissingDependencyError) as error:
        logger.warning("whether job %s was cancelled is not known: %s", number, error)
        return False


def _cancelled(number: str) -> bool:
    text = run_slurm(
        ["scontrol", "show", "job", "--oneliner", number], timeout_s=_WORD_TIMEOUT_S
    )
    fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", text))
    state = str(fields.get("JobState", ""))
    if state != "COMPLETING":
        # Else it was warned of its end, or of a preemption after a time of grace.
        return state == "CANCELLED"
    if _has_reason(fields):
        return False
    if shutil.which("sacct") is None or not has_accounting():
        return True
    until = time.monotonic() + _WORD_TIMEOUT_S
    while time.monotonic() < until:
        ended = _from_accounting([number]).get(number)
        if ended is not None:
            return ended.cause == "cancelled"
        time.sleep(_WORD_POLL_S)
    return True


def _has_reason(fields: Mapping[str, str]) -> bool:
    """Tell whether a job that is being ended is so by SLURM and not by somebody."""
    if fields.get("Reason", "None") not in {"None", "(null)"}:
        return True  # TimeLimit, NodeDown
    if slurm_time(fields.get("PreemptTime", "")) is not None:
        return True
    end = slurm_time(fields.get("EndTime", ""))
    # Of a requeued job it is the end of the next time.
    return end is not None and end > time.time() + _CLOCK_DIFFERENCE_S


_SACCT_FIELDS = (
    "JobIDRaw,State,ExitCode,Start,End,NodeList,Timelimit,AllocTRES,Partition"
)


def _from_accounting(job_ids: list[str]) -> dict[str, EndedJob]:
    answer = run_slurm(
        [
            "sacct",
            "--noheader",
            "--parsable2",
            f"--format={_SACCT_FIELDS}",
            f"--jobs={','.join(job_ids)}",
        ]
    )
    return parse_sacct(answer)


def parse_sacct(text: str) -> dict[str, EndedJob]:
    """Return the ended jobs in the output of ``sacct``; a requeued job counts last."""
    jobs: dict[str, EndedJob] = {}
    steps_without_memory: set[str] = set()
    for line in text.splitlines():
        words = line.split("|")
        if len(words) != 9:
            continue
        number, state, exit_code, start, end, nodes, limit, tres, partition = words
        state = state.split()[0].rstrip("+") if state else ""  # CANCELLED by 1000
        if "." in number:
            if state == "OUT_OF_MEMORY":
                steps_without_memory.add(number.partition(".")[0])
            continue
        if state in _LIVING:
            jobs.pop(number, None)
            continue
        jobs[number] = _ended(
            number, state, exit_code, start, end, nodes, limit, tres, partition
        )
    return {
        number: replace(job, out_of_memory=True)
        if number in steps_without_memory
        else job
        for number, job in jobs.items()
    }


def _from_controller() -> dict[str, EndedJob]:
    try:
        answer = run_slurm(["scontrol", "show", "job", "--oneliner"])
    except LaunchError as error:
        if "No jobs in the system" in str(error):
            return {}
        raise
    return parse_scontrol_jobs(answer)


def parse_scontrol_jobs(text: str) -> dict[str, EndedJob]:
    """Return the ended jobs in the output of ``scontrol show job --oneliner``."""
    jobs = {}
    for line in text.splitlines():
        fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line))
        state = fields.get("JobState", "")
        if "JobId" not in fields or state in _LIVING:
            continue
        jobs[fields["JobId"]] = _ended(
            fields["JobId"],
            state,
            fields.get("ExitCode", "0:0"),
            fields.get("StartTime", ""),
            fields.get("EndTime", ""),
            fields.get("NodeList", ""),
            fields.get("TimeLimit", ""),
            fields.get("TRES", ""),
            fields.get("Partition", ""),
        )
    return jobs


def _ended(
    number: str,
    state: str,
    exit_code: str,
    start: str,
    end: str,
    nodes: str,
    limit: str,
    tres: str,
    partition: str,
) -> EndedJob:
    code, _, signal = exit_code.partition(":")
    try:
        limit_s = walltime_seconds(limit)
    except ValueError:  # Partition_Limit
        limit_s = None
    return EndedJob(
        job_id=number,
        state=state,
        exit_code=int(code or 0),
        signal=int(signal or 0),
        nodes="" if nodes in {"None assigned", "(null)"} else nodes,
        start=slurm_time(start),
        end=slurm_time(end),
        limit_s=limit_s,
        out_of_memory=state == "OUT_OF_MEMORY",
        memory_mib=_memory_per_node(tres),
        partition=partition,
    )


def _memory_per_node(tres: str) -> float | None:
    """Return the memory of each node in a list like ``cpu=2,mem=6026M,node=2``."""
    found = dict(re.findall(r"(\w+)=([0-9.]+[KMGT]?)", tres))
    if "mem" not in found:
        return None
    amount, unit = re.match(r"([0-9.]+)([KMGT]?)", found["mem"]).groups()  # type: ignore[union-attr]
    return float(amount) * memory_mib(f"1{unit}") / float(found.get("node", 1))
