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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn_format import published_element_vectors
from nanoos_fw.ml.datasets import PARTS, Dataset, open_dataset
from nanoos_fw.ml.ensembles import (
    dropout_spread,
    ensemble,
    has_dropout,
    predict_table,
)
from nanoos_fw.ml.forest_fitting import fit_forest
from nanoos_fw.ml.graph_scalars import graph_scalars
from nanoos_fw.ml.line_graph import with_angles
from nanoos_fw.ml.metrics import (
    calibrate,
    classification_metrics,
    element_errors,
    element_fractions,
    fit_element_reference,
    regression_metrics,
)
from nanoos_fw.ml.model_files import (
    ATOM_TABLE,
    REFERENCE,
    AnyArchitecture,
    Architecture,
    LineGraphArchitecture,
    ModelCard,
    atom_features,
    read_checkpoint,
    save_checkpoint,
)
from nanoos_fw.ml.teams import FitContext, fit_members
from nanoos_fw.ml.training_config import (
    PUBLISHED,
    LearningCurve,
    TrainingConfig,
    TrainingResult,
    read_training_config,
)
from nanoos_fw.ml.uncertainty import (
    DEFAULT_COVERAGE,
    DROPOUT_SAMPLES,
    Spread,
    Uncertainty,
    fit_uncertainty,
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
    sha256_bytes,
    sha256_file,
    write_json,
)

if TYPE_CHECKING:
    from nanoos_fw.ml.fitting import Fit, FitData

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
CHECKPOINT = "model.safetensors"
LAST_CHECKPOINT = "model-last.safetensors"
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
        training goes on where it stopped, bit for bit at an equal number of ranks.
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


def check_without_parent(config: TrainingConfig) -> None:
    """Refuse a config that needs a parent.

    Raises
    ------
    InputError
        If it does.
    """
    if config.parent_sha256 is not None:
        raise InputError(
            "the config names a parent by its checksum, but no file was given",
            advice="give the file as parent",
        )
    if config.freeze or config.normalizer == "keep":
        raise InputError(
            "freeze and normalizer = keep need a parent to take them from",
            advice="give a checkpoint as parent",
        )


def with_parent(config: TrainingConfig, parent: Path) -> TrainingConfig:
    """Return a config that names a parent and has its sizes.

    Raises
    ------
    InputError
        If the file is missing, or the config gives sizes that the parent does not
        have, or the parent is the answer to another question.
    CorruptArtifactError
        If the file is no checkpoint.
    """
    card, _, digest = _read_parent(parent)
    if card.target_property != config.target:
        raise InputError(
            f"{parent} predicts {card.target_property}, not {config.target}",
            advice="train further what predicts the same property",
        )
    sizes = _sizes(card)
    given = config.model_dump(exclude_unset=True)
    for name, value in sizes.items():
        if name in given and given[name] != value:
            raise InputError(
                f"{name} is {given[name]} in the config but {value} in {parent}",
                advice=f"leave {name} out to take that of the parent",
            )
    if config.parent_sha256 not in (None, digest):
        raise InputError(
            f"{parent} is not the parent that the config names",
            evidence={"sha256": digest, "sha256_expected": config.parent_sha256},
        )
    # Copies keep what was given apart from defaults, for the next time.
    values = {**given, **sizes, "parent_sha256": digest}
    return read_training_config(values)


# ------------------------------------------------------------------------ the ranks


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is trained on, and how its numbers are to be read."""

    data: FitData
    card: ModelCard
    atom_table: NDArray[np.float32]
    reference: NDArray[np.float64]
    composition: NDArray[np.float64]
    fractions: NDArray[np.float64]
    parent: dict[str, NDArray[Any]] | None
    parent_members: int

    def start(self, member: int) -> dict[str, NDArray[Any]] | None:
        """Return the weights that a member starts from."""
        if self.parent is None:
            return None
        prefix = f"members.{member % self.parent_members}."
        return {
            name.removeprefix(prefix): value
            for name, value in self.parent.items()
            if name.startswith(prefix)
        }


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
    plan = _plan(training, dataset, table, None if parent is None else Path(parent))
    key = content_key(
        "training",
        {"config": training.model_dump(mode="json"), "dataset": dataset.dataset_hash},
    )
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
        result = _finish(training, plan, dataset, table, fits, work_dir)
        result["baselines"] = _baselines(training, plan, dataset, table)
        result["ranks"] = comm.size
        result["device"] = str(device)
        result["wall_s"] = time.time() - start
    return result


def _plan(
    training: TrainingConfig, dataset: Dataset, table: GraphTable, parent: Path | None
) -> _Plan:
    fractions = element_fractions(table)
    train = dataset.rows("train")
    composition = fit_element_reference(fractions[train], dataset.targets[train])
    reference = composition if training.element_reference else np.zeros(119)
    atom_table = atom_features()
    if training.element_vectors == "published":
        atom_table, _ = published_element_vectors()
    architecture = _architecture(training, table.cutoff_radius)
    scale: tuple[float, float] | None = None
    arrays, members, mock = None, 0, dataset.mock_targets
    if parent is not None:
        card, arrays, _ = _read_parent(parent)
        _check_parent(training, card, table, parent)
        mock = mock or card.mock_targets
        atom_table, members = arrays[ATOM_TABLE], card.n_members
        # Expansion and dropout come with the weights; all else was compared.
        architecture = card.architecture.model_copy(
            update={"dropout": training.dropout}
        )
        if training.normalizer == "keep":
            reference = np.asarray(arrays[REFERENCE], dtype=np.float64)
            scale = (card.target_mean, card.target_std)
    if training.classes:
        scale = (0.0, 1.0)
        _check_labels(dataset)
    data, mean, std = _fit_data(dataset, table, fractions @ reference, scale)
    card = ModelCard(
        target_property=training.target,
        unit=dataset.unit,
        target_mean=mean,
        target_std=std,
        n_members=training.ensemble_size,
        architecture=architecture,
        cutoff_radius=table.cutoff_radius,
        max_neighbors=table.max_neighbors,
        elements=tuple(np.flatnonzero(fractions[data.train].any(axis=0)).tolist()),
        dataset_hash=dataset.dataset_hash,
        n_train=len(data.train),
        precision="float64" if training.precision == "float64" else "float32",
        classes=training.classes,
        mock_targets=mock,
    )
    return _Plan(
        data, card, atom_table, reference, composition, fractions, arrays, members
    )


def _architecture(training: TrainingConfig, cutoff_radius: float) -> AnyArchitecture:
    """Return the sizes of a new network for graphs of a cutoff (Å)."""
    n_outputs = max(1, len(training.classes))
    if training.model_type == "line_graph":
        return LineGraphArchitecture(
            kind="line_graph",
            hidden_dim=training.hidden_dim,
            angle_layers=training.angle_layers,
            atom_layers=training.num_layers - training.angle_layers,
            angle_cutoff=training.angle_cutoff,
            n_angle_gaussians=training.angle_gaussians,
            n_outputs=n_outputs,
            dropout=training.dropout,
            gaussian_max=cutoff_radius,
            gaussian_step=training.gaussian_step,
            gaussian_width=1.5 * training.gaussian_step,
        )
    return Architecture(
        hidden_dim=training.hidden_dim,
        num_layers=training.num_layers,
        readout_dim=training.readout_dim,
        dense_layers=training.dense_layers,
        n_outputs=n_outputs,
        dropout=training.dropout,
        gaussian_max=cutoff_radius,
        gaussian_step=training.gaussian_step,
        gaussian_width=training.gaussian_step,
    )


def _read_parent(path: Path) -> tuple[ModelCard, dict[str, NDArray[Any]], str]:
    if not path.is_file():
        raise InputError(
            f"there is no checkpoint {path} to train further",
            advice="give the file of a model, or fetch it from the model registry",
        )
    raw = path.read_bytes()
    card, arrays = read_checkpoint(raw, str(path))
    return card, arrays, sha256_bytes(raw)


def _sizes(card: ModelCard) -> dict[str, Any]:
    """Return the fields of a config that a parent decides."""
    architecture = card.architecture
    if isinstance(architecture, LineGraphArchitecture):
        return {
            "model_type": "line_graph",
            "hidden_dim": architecture.hidden_dim,
            "num_layers": architecture.angle_layers + architecture.atom_layers,
            "angle_layers": architecture.angle_layers,
            "angle_cutoff": architecture.angle_cutoff,
            "angle_gaussians": architecture.n_angle_gaussians,
            "gaussian_step": architecture.gaussian_step,
        }
    return {
        "model_type": "cgcnn",
        "hidden_dim": architecture.hidden_dim,
        "num_layers": architecture.num_layers,
        "readout_dim": architecture.readout_dim,
        "dense_layers": architecture.dense_layers,
        "gaussian_step": architecture.gaussian_step,
    }


def _check_parent(
    training: TrainingConfig, card: ModelCard, table: GraphTable, path: Path
) -> None:
    sizes = _sizes(card)
    differ = {
        name: (getattr(training, name), value)
        for name, value in sizes.items()
        if getattr(training, name) != value
    }
    built = (table.cutoff_radius, table.max_neighbors)
    if built != (card.cutoff_radius, card.max_neighbors):
        differ["cutoff_radius, max_neighbors"] = (
            built,
            (card.cutoff_radius, card.max_neighbors),
        )
    if len(training.classes) != len(card.classes):
        differ["classes"] = (training.classes, card.classes)
    if differ:
        raise InputError(
            f"training and parent {path} do not fit: {', '.join(differ)}",
            evidence={
                name: {"training": ours, "parent": theirs}
                for name, (ours, theirs) in differ.items()
            },
            advice="use the parent's sizes and graphs",
        )


def _check_labels(dataset: Dataset) -> None:
    wrong = ~np.isin(dataset.targets, (0.0, 1.0))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InputError(
            f"{int(wrong.sum())} targets are neither 0 nor 1, such as "
            f"{dataset.targets[row]} of {dataset.ids[row]}",
            advice="label the two classes by 0 and 1, or leave classes out",
        )


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


def _fit_data(
    dataset: Dataset,
    table: GraphTable,
    composition: NDArray[np.float64],
    scale: tuple[float, float] | None,
) -> tuple[FitData, float, float]:
    from nanoos_fw.ml.fitting import FitData

    train = dataset.rows("train")
    residual = dataset.targets - composition
    if scale is None:
        mean, std = float(residual[train].mean()), float(residual[train].std())
    else:
        mean, std = scale
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
    plan: _Plan,
    dataset: Dataset,
    table: GraphTable,
    fits: list[Fit],
    work_dir: Path,
) -> dict[str, Any]:
    """Write the ensemble and judge it (rank 0)."""
    card, reference, atom_table = plan.card, plan.reference, plan.atom_table
    for fit in fits:
        fit.use_last()
    last = work_dir / LAST_CHECKPOINT
    last_digest = save_checkpoint(
        last, card, [fit.weights() for fit in fits], atom_table, reference
    )
    for fit in fits:
        fit.use_best()
    networks = [fit.network.cpu() for fit in fits]
    members = predict_table(networks, card, reference, table)
    _check_finite(members, training)
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
    weights = [network.state_dict() for network in networks]
    digest = save_checkpoint(path, card, weights, atom_table, reference, uncertainty)
    metrics = _by_part(dataset, mean, std, half_width)
    if training.classes:
        for part in PARTS:
            rows = dataset.rows(part)
            metrics[part] |= classification_metrics(dataset.targets[rows], mean[rows])
    return {
        "target": training.target,
        "unit": dataset.unit,
        "checkpoint": str(path),
        "checkpoint_sha256": digest,
        "last_checkpoint": str(last),
        "last_checkpoint_sha256": last_digest,
        "dataset_hash": dataset.dataset_hash,
        "config": training.model_dump(mode="json"),
        "curves": [
            {"member": fit.member, "epochs": fit.history.epochs, **vars(fit.history)}
            for fit in fits
        ],
        "metrics": metrics,
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
                    "members": members[:, row].tolist(),
                }
                for row in dataset.rows(part)
            ]
            for part in PARTS[1:]
        },
        "per_element": {
            part: element_errors(
                plan.fractions[dataset.rows(part)],
                (mean - dataset.targets)[dataset.rows(part)],
            )
            for part in PARTS[1:]
        },
        "parent": _ancestry(training),
        "n_parameters": sum(p.numel() for p in networks[0].parameters()),
        "environment": run_environment(),
    }


def _check_finite(members: NDArray[np.float64], training: TrainingConfig) -> None:
    """Refuse a model that answers by what is no number, such as after a last step."""
    wrong = ~np.isfinite(members).all(axis=1)
    if wrong.any():
        raise InputError(
            f"training of member {int(np.flatnonzero(wrong)[0])} diverged: its "
            "predictions are not finite",
            evidence={"learning_rate": training.learning_rate},
            advice="lower learning_rate, or set clip_norm",
        )


def _ancestry(training: TrainingConfig) -> dict[str, Any] | None:
    if training.parent_sha256 is None:
        return None
    return {
        "sha256": training.parent_sha256,
        "frozen": list(training.freeze),
        "normalizer": training.normalizer,
    }


def _baselines(
    training: TrainingConfig, plan: _Plan, dataset: Dataset, table: GraphTable
) -> dict[str, Any]:
    """Judge what is simpler on the same parts."""
    constant = np.full(dataset.num_samples, dataset.target_mean)
    found = {
        "mean": _by_part(dataset, constant, None),
        "composition": _by_part(dataset, plan.fractions @ plan.composition, None),
    }
    if training.forest_baseline:
        train = dataset.rows("train")
        forest = fit_forest(
            graph_scalars(table.select(train)),
            dataset.targets[train],
            training.seed,
            target_property=training.target,
            unit=dataset.unit,
            dataset_hash=dataset.dataset_hash,
            mock_targets=dataset.mock_targets,
        )
        said, std = forest.predict_features(graph_scalars(table))
        half_width = forest.half_width(std)
        found["forest"] = _by_part(dataset, said, std, half_width)
    return found


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
