"""How much memory fireworks take, from the size of their work.

Peaks measured by ``scripts/benchmarks/memory.py``, with half as much again: an estimate
that is too low costs a job. A firework needs memory for its process, which includes the
first compilation, for each rank or worker, and for its atoms, wherever these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SAFETY = 1.5
# The process of a firework: imports, the database, the first compilation.
_JOB_MIB = 290.0
# Of a rank before it has any atoms: a LAMMPS rank, one that trains, a screening worker.
_SIMULATION_MIB, _TRAINING_MIB, _SCREENING_MIB = 60.0, 320.0, 205.0
_SCREENING_JOB_MIB = 450.0
# Of an atom: neighbour lists, forces and positions (4.1 to 4.3 measured from 32,000 to
# 256,000 embedded atoms); in featurizing neighbours within
# the cutoff; in training all that a backward pass needs, for each channel and layer.
_SIMULATION_KIB, _FEATURE_KIB, _CHANNEL_KIB = 5.0, 1.7, 0.06


def memory_needs(
    name: str, task: Mapping[str, Any], *, atoms: float, largest: float, mean: float
) -> tuple[float, float]:
    """Return what a firetask needs once, and for each rank, in MiB.

    Parameters
    ----------
    name
        Of the firetask.
    task
        Its parameters.
    atoms
        Of its simulation, if it is one.
    largest, mean
        Sites of the largest of its structures, and of an average one.
    """
    job, rank = _JOB_MIB, 0.0
    if name == "RunMDTask":
        job += atoms * _SIMULATION_KIB / 1024
        rank = _SIMULATION_MIB
    elif name == "RelaxStructuresTask":
        job += largest * _SIMULATION_KIB / 1024
        rank = _SIMULATION_MIB
    elif name == "FeaturizeStructuresTask":
        job += largest * _FEATURE_KIB / 1024
    elif name == "TrainModelTask":
        training = task["training"]
        batch = int(training.get("batch_size") or 32)
        wide = int(training.get("hidden_dim") or 64)
        deep = int(training.get("num_layers") or 2)
        # Larger ones of a batch come together with smaller ones; ranks share a batch.
        job += batch * mean * wide * deep * _CHANNEL_KIB / 1024
        rank = _TRAINING_MIB
    elif name in {"ScreenCandidatesTask", "ScreenWindowTask"}:
        job, rank = _SCREENING_JOB_MIB, _SCREENING_MIB
    return _SAFETY * job, _SAFETY * rank
