"""Training of CGCNN ensembles: the call, and the program its ranks run.

The ranks read the dataset's files and talk by MPI; they know no database. Teams of
ranks fit the members of the ensemble at the same time, the ranks of a team share each
batch. A finished member is never fitted again, an unfinished one goes on from its last
checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.datasets import Dataset, open_dataset
from nanoos_fw.ml.line_graph import with_angles
from nanoos_fw.ml.parents import check_without_parent, with_parent
from nanoos_fw.ml.teams import FitContext, fit_members
from nanoos_fw.ml.training_config import (
    PUBLISHED,
    LearningCurve,
    TrainingConfig,
    TrainingResult,
    read_training_config,
    training_key,
)
from nanoos_fw.ml.training_outcome import (
    CHECKPOINT,
    finish_training,
    judge_baselines,
)
from nanoos_fw.ml.training_plan import make_plan
from nanoos_fw.parallel import (
    Communicator,
    Resources,
    StopRequest,
    launch_ranks,
    run_rank_program,
)
from nanoos_fw.provenance import sha256_file, write_json

__all__ = [
    "CHECKPOINT",
    "PUBLISHED",
    "RANK_CONFIG",
    "RANK_PROGRAM",
    "LearningCurve",
    "TrainingConfig",
    "TrainingResult",
    "check_without_parent",
    "main",
    "read_training_config",
    "train_cgcnn_model",
    "with_parent",
]

logger = logging.getLogger(__name__)

RANK_PROGRAM = "nanoos_fw.ml.training"
RANK_CONFIG = "train.json"
_PRELOAD_BYTES = 1 << 28


def train_cgcnn_model(
    target: str,
    config: TrainingConfig | Mapping[str, Any] | None = None,
    *,
    dataset_dir: str | Path,
    work_dir: str | Path,
    resources: Resources = Resources(),  # noqa: B008 - frozen
    deadline: float | None = None,
    pause_after: int | None = None,
    parent: str | Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> TrainingResult:
    """Train an ensemble on the ranks of a child program.

    Parameters
    ----------
    target
        Target property.
    config
        Hyper-parameters; None takes the defaults.
    dataset_dir
        Directory of :func:`nanoos_fw.ml.datasets.write_dataset`.
    work_dir
        Holds checkpoints and the result. Called again with the same directory, the
        training goes on where it stopped, bit for bit at equal numbers of ranks and
        threads.
    resources
        Ranks, threads and launcher.
    deadline
        Unix time by which the ranks are to have written a checkpoint and stopped.
    pause_after
        Stop after this many epochs and return the model as it is then. The schedule
        is still that of ``config.epochs``: called again with a larger number, or
        None, the training goes on as if it had not paused, bit for bit.
    parent
        Checkpoint whose weights are trained further. Sizes that ``config`` does not
        give are those of the parent.
    device
        ``auto`` takes GPUs where there are any, one for each rank of a node.

    Raises
    ------
    InputError
        If dataset, target and config do not fit, or the training diverges.
    OutOfTimeError
        If the deadline or a signal came first; a checkpoint is on disk.
    CorruptArtifactError
        If a file of the dataset or a checkpoint does not match its checksum.
    LaunchError
        If the ranks died.

    Notes
    -----
    The caller holds ``work_dir`` (:func:`nanoos_fw.parallel.locked`) where two
    launches could meet.

    References
    ----------
    T. Xie, J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018).
    """
    if isinstance(config, TrainingConfig):
        checked = config
    else:
        checked = read_training_config({"target": target, **(config or {})})
    if checked.target != target:
        raise InputError(f"the config is for {checked.target!r}, not {target!r}")
    if parent is not None:
        checked = with_parent(checked, Path(parent))
    else:
        check_without_parent(checked)
    directory = Path(work_dir).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / RANK_CONFIG
    write_json(
        path,
        {
            "config": checked.model_dump(mode="json"),
            "dataset_dir": str(Path(dataset_dir).resolve()),
            "threads": resources.threads,
            "deadline": deadline,
            "pause_after": pause_after,
            "parent": None if parent is None else str(Path(parent).resolve()),
            "device": device,
        },
    )
    result = launch_ranks(RANK_PROGRAM, path, resources=resources, deadline=deadline)
    trained = TrainingResult(**result)
    if sha256_file(Path(trained.checkpoint)) != trained.checkpoint_sha256:
        raise CorruptArtifactError(
            f"{trained.checkpoint} does not match its checksum",
            evidence={"sha256_expected": trained.checkpoint_sha256},
            advice=f"delete {directory} and train again",
        )
    return trained


# ------------------------------------------------------------------------ the ranks


def main(
    config: dict[str, Any], work_dir: Path, comm: Communicator, stop: StopRequest
) -> dict[str, Any]:
    """Train on all ranks; the body of the rank program."""
    import torch

    from nanoos_fw.ml.fitting import Fit
    from nanoos_fw.ml.process_groups import (
        GroupCommunicator,
        choose_backend,
        choose_device,
    )

    start = time.time()
    torch.set_num_threads(int(config["threads"]))
    training = TrainingConfig(**config["config"])
    dataset = _open(Path(config["dataset_dir"]), comm)
    _check(dataset, training)
    table = _preload(dataset.graphs)
    if training.model_type == "line_graph":
        table = with_angles(table, training.angle_cutoff)
    parent = config.get("parent")
    plan = make_plan(training, dataset, table, None if parent is None else Path(parent))
    key = training_key(training, dataset.dataset_hash)
    device = choose_device(config.get("device", "cpu"), comm)

    def group(team: Communicator) -> Communicator:
        backend = config.get("backend") or choose_backend(device, team)
        if backend is None or team.size == 1:
            return team
        return GroupCommunicator(team, backend)

    fits = fit_members(
        training,
        lambda member, team: Fit(
            training,
            plan.card.architecture,
            plan.atom_table,
            plan.data,
            member,
            team,
            device=device,
            start=plan.start(member),
        ),
        FitContext(work_dir, key, comm, stop, config.get("pause_after"), group),
    )
    result: dict[str, Any] = {}
    if comm.rank == 0:
        result = finish_training(training, plan, dataset, table, fits, work_dir)
        result["baselines"] = judge_baselines(training, plan, dataset, table)
        result["ranks"] = comm.size
        result["device"] = str(device)
        result["wall_s"] = time.time() - start
    return result


def _open(directory: Path, comm: Communicator) -> Dataset:
    """Let one rank read every byte for the checksums, then all map the files."""
    if comm.rank == 0:
        dataset = open_dataset(directory)
        comm.barrier()
        return dataset
    comm.barrier()
    return open_dataset(directory, verify=False)


def _check(dataset: Dataset, training: TrainingConfig) -> None:
    if dataset.config.target_property != training.target:
        raise InputError(
            f"the dataset holds {dataset.config.target_property!r}, not "
            f"{training.target!r}"
        )
    n_train = len(dataset.rows("train"))
    if n_train < 2:
        raise InputError(f"{n_train} training rows are too few to train on")
    if training.patience is not None and not len(dataset.rows("val")):
        raise InputError(
            "patience needs a validation part and the dataset has none",
            advice="set val_fraction in the dataset or patience to None",
        )


def _preload(table: GraphTable) -> GraphTable:
    """Read small tables into memory: mapped pages cost a little on each access."""
    size = table.neighbors.nbytes + table.distances.nbytes
    size += 0 if table.vectors is None else table.vectors.nbytes
    return table.select(np.arange(len(table))) if size <= _PRELOAD_BYTES else table


if __name__ == "__main__":
    run_rank_program(main)
