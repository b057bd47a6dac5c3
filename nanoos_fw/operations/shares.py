"""What of an allocation belongs to one slot: processors, GPUs and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanoos_fw.errors import InputError


@dataclass(frozen=True)
class Share:
    """Processors and GPUs of a slot; ``bound`` if the processors are its own.

    ``memory_mib`` is its part of what the job may use on this node, None if nobody
    limits that.
    """

    cpus: tuple[int, ...]
    gpus: tuple[str, ...]
    bound: bool
    memory_mib: float | None = None


def shares(
    slots: int, environ: Mapping[str, str] | None = None, affinity: Any = None
) -> list[Share]:
    """Divide processors and GPUs among slots, neighbours together.

    Processors are bound only if SLURM has bound the job to its own (or outside of
    SLURM): otherwise nobody knows which of a shared node's they are, and the number of
    threads alone keeps slots apart. With fewer GPUs than slots neighbours share one.

    Raises
    ------
    InputError
        If there are more slots than processors.
    """
    env = os.environ if environ is None else environ
    cpus = sorted(os.sched_getaffinity(0) if affinity is None else affinity)
    allocated = env.get("SLURM_CPUS_ON_NODE", "")
    bound = True
    if "SLURM_JOB_ID" in env and allocated.isdigit() and int(allocated) < len(cpus):
        cpus, bound = cpus[: int(allocated)], False
    if not 1 <= slots <= len(cpus):
        raise InputError(
            f"{slots} slots do not fit {len(cpus)} processors",
            evidence={"cpus": cpus},
            advice="give --slots between 1 and the number of processors",
        )
    gpus = [g for g in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if g.strip()]
    memory = memory_per_cpu(env)
    found = []
    for number in range(slots):
        first, last = (len(cpus) * n // slots for n in (number, number + 1))
        mine = gpus[len(gpus) * number // slots : len(gpus) * (number + 1) // slots]
        if gpus and len(gpus) < slots:
            mine = [gpus[number * len(gpus) // slots]]
        part = None if memory is None else memory * (last - first)
        found.append(Share(tuple(cpus[first:last]), tuple(mine), bound, part))
    return found


def memory_per_cpu(environ: Mapping[str, str]) -> float | None:
    """Return the memory of a job on this node over its processors there, in MiB.

    None if SLURM does not say, as where it does not count memory.
    """
    for_each = environ.get("SLURM_MEM_PER_CPU", "")
    if for_each.isdigit() and int(for_each):
        return float(for_each)
    memory = environ.get("SLURM_MEM_PER_NODE", "")
    allocated = environ.get("SLURM_CPUS_ON_NODE", "")
    if memory.isdigit() and int(memory) and allocated.isdigit() and int(allocated):
        return int(memory) / int(allocated)
    return None


def slot_environment(
    share: Share,
    number: int,
    threads: int,
    times: tuple[float | None, float | None],
    environ: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the environment of a slot.

    Parameters
    ----------
    share
        Of the slot.
    number
        Of the slot.
    threads
        Of each rank.
    times
        Start and end of the allocation, so that not every slot asks the controller.
    """
    env = dict(os.environ if environ is None else environ)
    ranks = max(1, len(share.cpus) // threads)
    env["NANO_OS_SLOT"] = str(number)
    env["NANO_OS_RANKS"] = str(ranks)
    env["NANO_OS_THREADS"] = str(threads)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        env[name] = str(threads)
    if share.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
    start, end = times
    if end is not None:
        env["SLURM_JOB_START_TIME"] = str(int(start or time.time()))
        env["SLURM_JOB_END_TIME"] = str(int(end))
    # A step would take the memory of the whole node, and the next one wait for it.
    memory = memory_per_cpu(env)
    if memory is not None and env.pop("SLURM_MEM_PER_NODE", None) is not None:
        env["SLURM_MEM_PER_CPU"] = str(int(memory))
    return env
