"""Files of network ensembles: what they say about themselves, and their weights.

Weights are read and written as numpy arrays: none of this needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from nanoos_fw.ml.features import element_table
from nanoos_fw.ml.uncertainty import Uncertainty, UncertaintyCard
from nanoos_fw.ml.weight_files import (
    NETWORK_FORMAT,
    WeightCard,
    read_weights,
    save_weights,
)

ATOM_TABLE, REFERENCE = "atom_table", "element_reference"
_N_BINS = 10
_BINNED = (
    "electronegativity",
    "covalent_radius",
    "atomic_radius",
    "ionization_energy",
    "molar_volume",
    "melting_point",
)
_N_GROUPS, _N_PERIODS = 18, 7


class Architecture(BaseModel):
    """Sizes of the network.

    Parameters
    ----------
    hidden_dim
        Length of the atom vectors.
    num_layers
        Gated convolutions.
    readout_dim, dense_layers
        Width and number of the dense layers after pooling.
    n_outputs
        1 for a number; for classes, one of each.
    dropout
        Share of the units of the first dense layer that drop out in training.
    gaussian_max, gaussian_step
        Distances are expanded in Gaussians at 0, step ... max (Å).
    gaussian_width
        Width w of exp(-(d - mu)² / w²), Å.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_dim: int = Field(default=64, ge=1)
    num_layers: int = Field(default=3, ge=1)
    readout_dim: int = Field(default=128, ge=1)
    dense_layers: int = Field(default=1, ge=1)
    n_outputs: int = Field(default=1, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    gaussian_max: float = Field(default=8.0, gt=0.0)
    gaussian_step: float = Field(default=0.2, gt=0.0)
    gaussian_width: float = Field(default=0.2, gt=0.0)

    def gaussian_centers(self) -> NDArray[np.float64]:
        """Return the centres of the Gaussians in Å."""
        count = int(self.gaussian_max / self.gaussian_step + 0.5)
        return np.linspace(0.0, self.gaussian_max, count + 1)


class LineGraphArchitecture(BaseModel):
    """Sizes of the network on bonds and angles; see :mod:`.line_graph_network`.

    Parameters
    ----------
    kind
        Tells it from the other architecture.
    hidden_dim
        Length of the vectors of atoms, bonds and angles.
    angle_layers
        Layers that pass messages between bonds over angles, then between atoms.
    atom_layers
        Layers after them, between atoms only.
    angle_cutoff
        Å; bonds as short as this make angles with each other.
    n_angle_gaussians
        Gaussians over the cosine, from -1 to 1.
    gaussian_max, gaussian_step, gaussian_width
        Of distances, as in :class:`Architecture`.
    n_outputs
        1 for a number; for classes, one of each.
    dropout
        Share of the units of the pooled vector that drop out in training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["line_graph"]
    hidden_dim: int = Field(default=32, ge=1)
    angle_layers: int = Field(default=2, ge=1)
    atom_layers: int = Field(default=1, ge=0)
    angle_cutoff: float = Field(default=3.5, gt=0.0)
    n_angle_gaussians: int = Field(default=20, ge=2)
    gaussian_max: float = Field(default=6.0, gt=0.0)
    gaussian_step: float = Field(default=0.2, gt=0.0)
    gaussian_width: float = Field(default=0.3, gt=0.0)
    n_outputs: int = Field(default=1, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    def gaussian_centers(self) -> NDArray[np.float64]:
        """Return the centres of the Gaussians of distances in Å."""
        count = int(self.gaussian_max / self.gaussian_step + 0.5)
        return np.linspace(0.0, self.gaussian_max, count + 1)


AnyArchitecture = Architecture | LineGraphArchitecture
"""Networks whose weights a file may hold; without ``kind`` it is the first."""


class ModelCard(WeightCard):
    """What a checkpoint says about itself; see also :class:`WeightCard`.

    Parameters
    ----------
    target_property, unit
        What is predicted.
    target_mean, target_std
        Scale of the network's output, in ``unit``; prediction = mean + std * output
        + mean over atoms of the element reference.
    n_members
        Networks in the ensemble.
    cutoff_radius, max_neighbors
        How graphs must be built.
    elements
        Atomic numbers seen in training; of weights that came without this
        knowledge, those that the element vectors describe.
    dataset_hash
        Dataset the weights come from.
    n_train
        Training rows.
    precision
        Type of the weights.
    uncertainty_scale
        Factor from the spread of the members to the uncertainty, fitted on the
        validation part so that 68 % of its errors are smaller: ensembles alone are
        overconfident.
    uncertainty
        Intervals and domain; their arrays are in the same file. None for weights
        that came without calibration.
    classes
        Names of the classes; empty for a number. With two, the prediction is the
        probability of the second.
    pad_neighbors
        Atoms with fewer than ``max_neighbors`` get what the published program gave
        them: the crystal's first atom at cutoff_radius + 1 Å.
    origin
        Where imported weights come from; empty for our own.
    """

    schema_version: Literal[1] = 1
    target_property: str
    unit: str
    target_mean: float
    target_std: float
    n_members: int = Field(ge=1)
    architecture: AnyArchitecture
    cutoff_radius: float
    max_neighbors: int | None
    elements: tuple[int, ...]
    dataset_hash: str
    n_train: int
    precision: Literal["float32", "float64"] = "float32"
    uncertainty_scale: float = Field(default=1.0, gt=0.0)
    uncertainty: UncertaintyCard | None = None
    classes: tuple[str, ...] = ()
    pad_neighbors: bool = False
    origin: dict[str, str | float | int | None] = Field(default_factory=dict)


def atom_features() -> NDArray[np.float32]:
    """Return the fixed description of the elements, ``(119, n) float32``, row Z.

    One-hot group and period; then ten Gaussians over the range of the elements for
    each of electronegativity, covalent and atomic radius, ionization energy, molar
    volume and melting point. An unknown value leaves its ten columns zero. The
    published network bins its properties in the same spirit.
    """
    table = element_table()
    columns = []
    for name, count in (("group", _N_GROUPS), ("period", _N_PERIODS)):
        values, known = table.column(name)
        hot = values[:, None] == np.arange(1, count + 1)
        columns.append(np.where(known[:, None], hot, 0.0))
    for name in _BINNED:
        values, known = table.column(name)
        low, high = values[known].min(), values[known].max()
        centers = np.linspace(low, high, _N_BINS)
        width = centers[1] - centers[0]
        smooth = np.exp(-(((values[:, None] - centers) / width) ** 2))
        columns.append(np.where(known[:, None], smooth, 0.0))
    return np.concatenate(columns, axis=1).astype(np.float32)


def save_checkpoint(
    path: Path,
    card: ModelCard,
    members: Sequence[Mapping[str, Any]],
    atom_table: NDArray[np.float32],
    reference: NDArray[np.float64],
    uncertainty: Uncertainty | None = None,
) -> str:
    """Write an ensemble as one safetensors file, atomically, and return its SHA-256.

    Parameters
    ----------
    path
        File to write.
    card
        Metadata.
    members
        ``state_dict()`` of each network, as tensors or arrays.
    atom_table
        ``(119, n_features)``, the description of the elements.
    reference
        ``(119,)``, element reference in the unit of the target; zeros for none.
    uncertainty
        Its card becomes that of ``card``.
    """
    if uncertainty is not None:
        card = card.model_copy(update={"uncertainty": uncertainty.card})

    arrays: dict[str, NDArray[Any]] = {
        ATOM_TABLE: np.ascontiguousarray(atom_table, dtype=np.float32),
        REFERENCE: np.ascontiguousarray(reference, dtype=np.float64),
    }
    for name, array in ({} if uncertainty is None else uncertainty.tensors()).items():
        arrays[name] = np.ascontiguousarray(array)
    for index, state in enumerate(members):
        for name, tensor in state.items():
            arrays[f"members.{index}.{name}"] = _array(tensor)
    return save_weights(path, NETWORK_FORMAT, card, arrays)


def read_checkpoint(
    data: bytes, name: str = "checkpoint"
) -> tuple[ModelCard, dict[str, NDArray[Any]]]:
    """Return card and arrays of a file of :func:`save_checkpoint`.

    Raises
    ------
    CorruptArtifactError
        If the bytes are no such file, or do not match their checksum.
    InputError
        If the weights were fitted to features of another version.
    """
    return read_weights(data, name, NETWORK_FORMAT, ModelCard)


# ------------------------------------------------------------------------- private


def _array(tensor: Any) -> NDArray[Any]:
    """Return a tensor of torch, or an array, as an array."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu().numpy()
    return np.ascontiguousarray(tensor)
