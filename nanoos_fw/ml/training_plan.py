"""What a training is on: normalized targets, sizes of the network, first weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.crystals import element_symbol
from nanoos_fw.errors import InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn_format import published_element_vectors
from nanoos_fw.ml.datasets import Dataset
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.ml.metrics import element_fractions, fit_element_reference
from nanoos_fw.ml.model_files import (
    ATOM_TABLE,
    REFERENCE,
    AnyArchitecture,
    Architecture,
    LineGraphArchitecture,
    ModelCard,
    atom_features,
)
from nanoos_fw.ml.parents import check_parent, check_without_parent, read_parent
from nanoos_fw.ml.training_config import TrainingConfig

if TYPE_CHECKING:
    from nanoos_fw.ml.fitting import FitData


@dataclass(frozen=True, eq=False)
class TrainingPlan:
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


def make_plan(
    training: TrainingConfig, dataset: Dataset, table: GraphTable, parent: Path | None
) -> TrainingPlan:
    """Return what a training on a dataset starts from, the same on all ranks."""
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
    if parent is None:
        check_without_parent(training)
    else:
        # Not named, it would be no part of the key of the training.
        card, arrays, _ = read_parent(parent, training.parent_sha256 or "")
        check_parent(training, card, table, parent)
        mock = mock or card.mock_targets
        atom_table, members = arrays[ATOM_TABLE], card.n_members
        # Expansion and dropout come with the weights; all else was compared.
        architecture = card.architecture.model_copy(
            update={"dropout": training.dropout}
        )
        if training.normalizer == "keep":
            if dataset.unit != card.unit:
                raise InputError(
                    f"the dataset is in {dataset.unit or 'no unit'}, the parent in "
                    f"{card.unit or 'no unit'}: its scale cannot be kept",
                    advice="build the dataset with the parent's unit, or take "
                    "normalizer: refit",
                )
            reference = np.asarray(arrays[REFERENCE], dtype=np.float64)
            scale = (card.target_mean, card.target_std)
    _check_described(dataset, fractions, atom_table)
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
        feature_version=FEATURE_VERSION,
    )
    return TrainingPlan(
        data, card, atom_table, reference, composition, fractions, arrays, members
    )


# ------------------------------------------------------------------------- private


def _architecture(training: TrainingConfig, cutoff_radius: float) -> AnyArchitecture:
    """Return the sizes of a new network for graphs of a cutoff (Å)."""
    if training.gaussian_step >= cutoff_radius:
        raise InputError(
            f"gaussian_step {training.gaussian_step:g} Å leaves no Gaussians to tell "
            f"distances up to {cutoff_radius:g} Å apart by",
            advice="lower it, to 0.2 Å say",
        )
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


def _check_described(
    dataset: Dataset, fractions: NDArray[np.float64], atom_table: NDArray[np.float32]
) -> None:
    """Refuse elements that the network is told nothing of: they would be one."""
    without = fractions[:, ~atom_table.any(axis=1)] > 0
    rows = np.flatnonzero(without.any(axis=1))
    if len(rows):
        numbers = np.flatnonzero(~atom_table.any(axis=1))[without.any(axis=0)]
        symbols = [element_symbol(int(z)) for z in numbers]
        raise InputError(
            f"there is no description of {', '.join(symbols)}, which {len(rows)} "
            f"structures hold, such as {dataset.ids[rows[0]]}",
            advice="leave them out, or use element_vectors: own without a parent",
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
