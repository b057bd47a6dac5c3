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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn import (
    Architecture,
    ModelCard,
    atom_features,
    dropout_spread,
    ensemble,
    predict_table,
    save_checkpoint,
)
from nanoos_fw.ml.datasets import PARTS, Dataset, open_dataset
from nanoos_fw.ml.metrics import (
    calibrate,
    element_fractions,
    fit_element_reference,
    regression_metrics,
)
from nanoos_fw.ml.teams import FitContext, fit_members
from nanoos_fw.ml.uncertainty import (
    DEFAULT_COVERAGE,
    DROPOUT_SAMPLES,
    Spread,
    Uncertainty,
    fit_uncertainty,
    has_dropout,
)
from nanoos_fw.parallel import (
    Communicator,
    Resources,
    StopRequest,
    launch_ranks,
    run_rank_program,
)
from nanoos_fw.provenance import (
    content_key,
    run_environment,
    sha256_file,
    write_json,
)

if TYPE_CHECKING:
    from nanoos_fw.ml.fitting import Fit, FitData

logger = logging.getLogger(__name__)

RANK_PROGRAM = "nanoos_fw.ml.training"
RANK_CONFIG = "train.json"
CHECKPOINT = "model.safetensors"
_PRELOAD_BYTES = 1 << 28


class TrainingConfig(BaseModel):
    """How an ensemble is trained.

    Parameters
    ----------
    target
        Target property; must be that of the dataset.
    epochs
        Passes over the training part, for each member.
    batch_size
        Graphs per step over all ranks; batches of an epoch are nearly equal.
    learning_rate
        Highest rate.
    hidden_dim, num_layers, readout_dim
        Sizes of the network.
    gaussian_step
        Distance between Gaussians of the bond expansion, and their width (Å).
    ensemble_size
        Networks, differing in initial weights and order of rows. One gives no
        uncertainty.
    optimizer, weight_decay
        AdamW or SGD with momentum 0.9. Only weight matrices decay.
    schedule, warmup_fraction
        Linear rise over this share of all steps, then a cosine to zero or constant.
    loss
        Of the normalized target.
    averaging_epochs
        The model's weights are a running average with this memory, which smooths the
        noise of small batches; 0 takes the weights of the last step.
    patience
        Stop a member after this many epochs without a lower validation error; None
        goes on to the end. The weights of the best epoch are kept either way.
    element_reference
        Let the network learn what a linear model in composition leaves over.
    checkpoint_every
        Epochs between checkpoints.
    seed
        Decides every random number.
    precision
        Of weights and arithmetic.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str = Field(min_length=1)
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=32, ge=2)
    learning_rate: float = Field(default=3e-3, gt=0.0)
    hidden_dim: int = Field(default=64, ge=1)
    num_layers: int = Field(default=2, ge=1)
    readout_dim: int = Field(default=128, ge=1)
    gaussian_step: float = Field(default=0.2, gt=0.0)
    ensemble_size: int = Field(default=5, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = Field(default=1e-2, ge=0.0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.05, ge=0.0, le=1.0)
    loss: Literal["mse", "mae", "huber"] = "mse"
    averaging_epochs: float = Field(default=5.0, ge=0.0)
    patience: int | None = Field(default=None, ge=1)
    element_reference: bool = True
    checkpoint_every: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0)
    precision: Literal["float32", "float64"] = "float32"
    schema_version: Literal[1] = 1


class LearningCurve(BaseModel):
    """One member's way: entries per epoch, loss normalized, errors in the unit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    member: int
    epochs: int
    best_epoch: int
    train_loss: list[float]
    val_mae: list[float]
    learning_rate: list[float]


class TrainingResult(BaseModel):
    """What a training gave.

    Parameters
    ----------
    target, unit
        What the model predicts.
    checkpoint, checkpoint_sha256
        The ensemble's file.
    dataset_hash, config
        What it was trained on, and how.
    curves
        Learning curve of each member.
    metrics
        Of the ensemble mean by part: ``n``, ``mse``, ``mae``, ``rmse``, ``r2`` and,
        with several members, ``within_1_std``, ``within_2_std``;
        ``within_interval`` is the share inside the 90 % interval; units follow
        ``unit``.
    baselines
        The same by part for ``mean`` (of the training targets) and ``composition``
        (least squares in the fractions of the elements): what needs no structure.
    predictions
        For validation and test: rows of ``structure_id``, ``target``, ``mean``,
        ``std`` (None with one member and no dropout) and ``half_width`` of the 90 %
        interval (None without validation rows).
    uncertainty_scale
        See :class:`nanoos_fw.ml.cgcnn.ModelCard`.
    n_parameters
        Weights of one member.
    ranks, wall_s
        Of the launch that finished; time in seconds, earlier launches not counted.
    environment
        Versions and host.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    unit: str
    checkpoint: str
    checkpoint_sha256: str
    dataset_hash: str
    config: TrainingConfig
    curves: list[LearningCurve]
    metrics: dict[str, dict[str, float | int | None]]
    baselines: dict[str, dict[str, dict[str, float | int | None]]]
    predictions: dict[str, list[dict[str, Any]]]
    uncertainty_scale: float
    n_parameters: int
    ranks: int
    wall_s: float
    environment: dict[str, Any]


def train_cgcnn_model(
    target: str,
    config: TrainingConfig | Mapping[str, Any] | None = None,
    *,
    dataset_dir: str | Path,
    work_dir: str | Path,
    resources: Resources = Resources(),  # noqa: B008 - frozen
    deadline: float | None = None,
    pause_after: int | None = None,
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
        training goes on where it stopped, bit for bit at an equal number of ranks.
    resources
        Ranks, threads and launcher.
    deadline
        Unix time by which the ranks are to have written a checkpoint and stopped.
    pause_after
        Stop after this many epochs and return the model as it is then. The schedule
        is still that of ``config.epochs``: called again with a larger number, or
        None, the training goes on as if it had not paused, bit for bit.

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
        try:
            checked = TrainingConfig(**{"target": target, **(config or {})})
        except ValidationError as error:
            raise InputError(f"the training config is not valid: {error}") from error
    if checked.target != target:
        raise InputError(f"the config is for {checked.target!r}, not {target!r}")
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

    start = time.time()
    torch.set_num_threads(int(config["threads"]))
    training = TrainingConfig(**config["config"])
    dataset = _open(Path(config["dataset_dir"]), comm)
    _check(dataset, training)
    table = _preload(dataset.graphs)
    fractions = element_fractions(table)
    composition = fit_element_reference(
        fractions[dataset.rows("train")], dataset.targets[dataset.rows("train")]
    )
    reference = composition if training.element_reference else np.zeros(119)
    data, mean, std = _fit_data(dataset, table, fractions @ reference)
    card = ModelCard(
        target_property=training.target,
        unit=dataset.unit,
        target_mean=mean,
        target_std=std,
        n_members=training.ensemble_size,
        architecture=Architecture(
            hidden_dim=training.hidden_dim,
            num_layers=training.num_layers,
            readout_dim=training.readout_dim,
            gaussian_max=table.cutoff_radius,
            gaussian_step=training.gaussian_step,
            gaussian_width=training.gaussian_step,
        ),
        cutoff_radius=table.cutoff_radius,
        max_neighbors=table.max_neighbors,
        elements=tuple(np.flatnonzero(fractions[data.train].any(axis=0)).tolist()),
        dataset_hash=dataset.dataset_hash,
        n_train=len(data.train),
        precision=training.precision,
    )
    key = content_key(
        "training",
        {"config": training.model_dump(mode="json"), "dataset": dataset.dataset_hash},
    )
    fits = fit_members(
        training,
        lambda member, team: Fit(
            training, card.architecture, atom_features(), data, member, team
        ),
        FitContext(work_dir, key, comm, stop, config.get("pause_after")),
    )
    result: dict[str, Any] = {}
    if comm.rank == 0:
        result = _finish(training, card, dataset, table, reference, fits, work_dir)
        constant = np.full(dataset.num_samples, dataset.target_mean)
        result["baselines"] = {
            "mean": _by_part(dataset, constant, None),
            "composition": _by_part(dataset, fractions @ composition, None),
        }
        result["ranks"] = comm.size
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
    return table.select(np.arange(len(table))) if size <= _PRELOAD_BYTES else table


def _fit_data(
    dataset: Dataset, table: GraphTable, composition: NDArray[np.float64]
) -> tuple[FitData, float, float]:
    from nanoos_fw.ml.fitting import FitData

    train = dataset.rows("train")
    residual = dataset.targets - composition
    mean, std = float(residual[train].mean()), float(residual[train].std())
    if std < 1e-12 * max(1.0, float(np.abs(dataset.targets[train]).max())):
        raise InputError(
            "composition alone explains the training targets: nothing is left to "
            "learn from structure",
            advice="set element_reference to False, or label more structures",
        )
    data = FitData(
        table=table,
        targets=(residual - mean) / std,
        train=train,
        val=dataset.rows("val"),
        scale=std,
    )
    return data, mean, std


def _finish(
    training: TrainingConfig,
    card: ModelCard,
    dataset: Dataset,
    table: GraphTable,
    reference: NDArray[np.float64],
    fits: list[Fit],
    work_dir: Path,
) -> dict[str, Any]:
    """Write the ensemble and judge it (rank 0)."""
    networks = [fit.network for fit in fits]
    members = predict_table(networks, card, reference, table)
    mean, std = ensemble(members)
    passes = -(-DROPOUT_SAMPLES // len(networks)) if has_dropout(networks) else 0
    if passes:
        std = dropout_spread(
            networks, card, reference, table, passes=passes, seed=training.seed
        )
    uncertainty = _uncertainty(training, dataset, table, mean, std, passes)
    half_width = uncertainty.half_width(
        np.zeros(len(mean)) if std is None else std, DEFAULT_COVERAGE
    )
    val = dataset.rows("val")
    if std is not None and len(val):
        scale = calibrate(dataset.targets[val], mean[val], std[val])
        card = card.model_copy(update={"uncertainty_scale": scale})
        std = scale * std
    path = work_dir / CHECKPOINT
    weights = [fit.weights() for fit in fits]
    digest = save_checkpoint(
        path, card, weights, atom_features(), reference, uncertainty
    )
    return {
        "target": training.target,
        "unit": dataset.unit,
        "checkpoint": str(path),
        "checkpoint_sha256": digest,
        "dataset_hash": dataset.dataset_hash,
        "config": training.model_dump(mode="json"),
        "curves": [
            {"member": fit.member, "epochs": fit.history.epochs, **vars(fit.history)}
            for fit in fits
        ],
        "metrics": _by_part(dataset, mean, std, half_width),
        "uncertainty_scale": card.uncertainty_scale,
        "predictions": {
            part: [
                {
                    "structure_id": dataset.ids[row],
                    "target": float(dataset.targets[row]),
                    "mean": float(mean[row]),
                    "std": None if std is None else float(std[row]),
                    "half_width": (
                        None if half_width is None else float(half_width[row])
                    ),
                }
                for row in dataset.rows(part)
            ]
            for part in PARTS[1:]
        },
        "n_parameters": sum(p.numel() for p in fits[0].network.parameters()),
        "environment": run_environment(),
    }


def _uncertainty(
    training: TrainingConfig,
    dataset: Dataset,
    table: GraphTable,
    mean: NDArray[np.float64],
    spread: NDArray[np.float64] | None,
    passes: int,
) -> Uncertainty:
    source: Spread = "ensemble" if training.ensemble_size > 1 else "none"
    if passes:
        source = "mc_dropout" if source == "none" else "ensemble+mc_dropout"
    return fit_uncertainty(
        table,
        mean - dataset.targets,
        spread,
        dataset.rows("train"),
        dataset.rows("val"),
        source=source,
        dropout_passes=passes,
        seed=training.seed,
    )


def _by_part(
    dataset: Dataset,
    mean: NDArray[np.float64],
    std: NDArray[np.float64] | None,
    half_width: NDArray[np.float64] | None = None,
) -> dict[str, dict[str, float | int | None]]:
    metrics = {}
    for part in PARTS:
        rows = dataset.rows(part)
        error_bar = None if std is None else std[rows]
        metrics[part] = regression_metrics(dataset.targets[rows], mean[rows], error_bar)
        if half_width is not None and len(rows):
            held = np.abs(mean[rows] - dataset.targets[rows]) <= half_width[rows]
            metrics[part]["within_interval"] = float(held.mean())
    return metrics


if __name__ == "__main__":
    run_rank_program(main)
