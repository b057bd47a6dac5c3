"""How many jobs a user may have in the queue: what accounting says, and who counts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nanoos_fw.slurm.commands import run_slurm
from nanoos_fw.slurm.request import SlurmRequest


@dataclass(frozen=True)
class SubmitLimit:
    """Most jobs that may wait and run at a time, and whose limit it is.

    Parameters
    ----------
    jobs
        Of one user.
    partition
        In which they count; None for all.
    source
        In words.
    """

    jobs: int
    partition: str | None
    source: str


def submit_limits(request: SlurmRequest, user: str) -> list[SubmitLimit]:
    """Ask what limits SLURM enforces for the jobs of a user; a few short commands.

    Returns
    -------
    list of SubmitLimit
        Of the user's associations and of the qualities of service that apply: the
        one of the request, or the association's, and that of the partition. Empty if
        SLURM enforces none.
    """
    config = run_slurm(["scontrol", "show", "config"])
    enforced = re.search(r"^AccountingStorageEnforce\s*=\s*(.*)$", config, re.MULTILINE)
    if enforced is None or "limits" not in enforced[1]:
        return []
    return parse_limits(
        request,
        run_slurm(
            [
                "sacctmgr", "--noheader", "--parsable2", "show", "associations",
                f"user={user}", "format=Account,Partition,DefaultQOS,MaxSubmitJobs",
            ]
        ),
        run_slurm(
            [
                "sacctmgr", "--noheader", "--parsable2", "show", "qos",
                "format=Name,MaxSubmitJobsPU",
            ]
        ),
        run_slurm(["scontrol", "show", "partition", "--oneliner"]),
    )  # fmt: skip


def parse_limits(
    request: SlurmRequest, associations: str, qualities: str, partitions: str
) -> list[SubmitLimit]:
    """Return the limits in the output of the three commands, for a request."""
    found = []
    of_quality = {
        words[0]: int(words[1])
        for words in (line.split("|") for line in qualities.splitlines())
        if len(words) == 2 and words[1].isdigit()
    }
    names = {request.qos} if request.qos else set()
    for line in associations.splitlines():
        words = line.split("|")
        if len(words) != 4:
            continue
        account, partition, quality, most = words
        if request.account and account != request.account:
            continue
        if partition and request.queue and partition not in request.queue.split(","):
            continue
        if quality and not request.qos:
            names.add(quality)
        if most.isdigit():
            found.append(
                SubmitLimit(int(most), partition or None, f"account {account}")
            )
    found += [
        SubmitLimit(of_quality[quality], None, f"QOS {quality}")
        for quality in sorted(names & of_quality.keys())
    ]
    for line in partitions.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        name, quality = fields.get("PartitionName"), fields.get("QoS", "")
        mine = (
            name in request.queue.split(",")
            if request.queue
            else fields.get("Default") == "YES"
        )
        if mine and quality in of_quality:
            limit = SubmitLimit(of_quality[quality], name, f"partition {name}")
            found.append(limit)
    return found


def jobs_of(user: str, partition: str | None = None, name: str | None = None) -> int:
    """Return how many jobs of a user SLURM has; tasks of arrays count one by one."""
    command = ["squeue", "--noheader", "--array", "--format=%A", f"--user={user}"]
    if partition:
        command.append(f"--partition={partition}")
    if name:
        command.append(f"--name={name}")
    return len(run_slurm(command).split())
