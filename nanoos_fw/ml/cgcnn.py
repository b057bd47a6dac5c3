"""Crystal graph convolutional networks: ensembles, predictions, checkpoints."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanoos_fw.errors import (
    CorruptArtifactError,
    InputError,
    MissingDependencyError,
)
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.features import element_table, graph_from_repr
from nanoos_fw.ml.graphs import CrystalGraph, unpack_graph
from nanoos_fw.ml.uncertainty import (
    DEFAULT_COVERAGE,
    Predictions,
    Uncertainty,
    UncertaintyCard,
    has_dropout,
    thinned,
)
from nanoos_fw.provenance import canonical_json, sha256_bytes, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from nanoos_fw.ml.network import CrystalGraphNetwork

AnyGraph = Mapping[str, Any] | CrystalGraph | bytes
"""What a model predicts for: ``graph_repr``, a graph, or a packed graph."""

_FORMAT = "nanoos_fw.cgcnn"
_CARD, _DIGEST = "card", "card_sha256"
_ATOM_TABLE, _REFERENCE = "atom_table", "element_reference"
_FETCH = (
    "weights are read from safetensors files only, since unpickling a file can run "
    "code; fetch or train the model again"
)
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
    gaussian_max: float = Field(default=8.0, gt=0.0)
    gaussian_step: float = Field(default=0.2, gt=0.0)
    gaussian_width: float = Field(default=0.2, gt=0.0)

    def gaussian_centers(self) -> NDArray[np.float64]:
        """Return the centres of the Gaussians in Å."""
        count = int(self.gaussian_max / self.gaussian_step + 0.5)
        return np.linspace(0.0, self.gaussian_max, count + 1)


class ModelCard(BaseModel):
    """What a checkpoint says about itself.

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
<<<<<<< HEAD
    uncertainty
        Intervals and domain; their arrays are in the same file. None for weights
        that came without calibration.
=======
    classes
        Names of the classes; empty for a number. With two, the prediction is the
        probability of the second.
    pad_neighbors
        Atoms with fewer than ``max_neighbors`` get what the published program gave
        them: the crystal's first atom at cutoff_radius + 1 Å.
    origin
        Where imported weights come from; empty for our own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    target_property: str
    unit: str
    target_mean: float
    target_std: float
    n_members: int = Field(ge=1)
    architecture: Architecture
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


class CGCNNModel:
    """An ensemble of crystal graph networks for one property.

    Parameters
    ----------
    model_name
        Name under which predictions are recorded.
    target_property
        Name of the target.
    hidden_dim, num_layers
        Sizes asked for; a checkpoint brings its own.

    References
    ----------
    T. Xie, J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018); ensembles:
    B. Lakshminarayanan et al., Adv. Neural Inf. Process. Syst. 30 (2017).
    """

    def __init__(
        self,
        model_name: str,
        target_property: str,
        hidden_dim: int = 64,
        num_layers: int = 3,
    ) -> None:
        self.model_name = model_name
        self.target_property = target_property
        self.architecture = Architecture(hidden_dim=hidden_dim, num_layers=num_layers)
        self.card: ModelCard | None = None
        self.checkpoint_sha256: str | None = None
        self._members: list[CrystalGraphNetwork] = []
        self._reference = np.zeros(119)
        self._uncertainty: Uncertainty | None = None

    @property
    def n_members(self) -> int:
        """Networks in the ensemble; 0 without weights."""
        return len(self._members)

    @property
    def unit(self) -> str:
        """Unit of predictions."""
        return self._loaded().unit

    def load_from_checkpoint(
        self, path: str | Path, *, sha256: str | None = None
    ) -> CGCNNModel:
        """Load weights and return the model itself.

        Parameters
        ----------
        path
            A file of :func:`save_checkpoint`.
        sha256
            Refuse a file with another checksum.

        Raises
        ------
        InputError
            If the file is missing or predicts another property.
        CorruptArtifactError
            If the file is no checkpoint or not the one named by ``sha256``.
        """
        file = Path(path)
        if not file.exists():
            raise InputError(
                f"there is no checkpoint {file}",
                advice="train a model, or fetch the file from the model registry",
            )
        data = file.read_bytes()
        self.load_bytes(data, name=str(file), sha256=sha256)
        return self

    def load_bytes(
        self, data: bytes, *, name: str = "checkpoint", sha256: str | None = None
    ) -> CGCNNModel:
        """Load weights from the bytes of a checkpoint; see above."""
        digest = sha256_bytes(data)
        if sha256 is not None and digest != sha256:
            raise CorruptArtifactError(
                f"{name} does not match its checksum",
                evidence={"sha256": digest, "sha256_expected": sha256},
                advice="fetch the file again",
            )
        card, tensors = _read_checkpoint(data, name)
        if card.target_property != self.target_property:
            raise InputError(
                f"{name} predicts {card.target_property}, not {self.target_property}",
                advice="load it as a model of its own property",
            )
        self._members = _build_members(card, tensors, name)
        self._reference = tensors[_REFERENCE].double().numpy()
        self._uncertainty = _read_uncertainty(card, tensors, name)
        self.card, self.architecture = card, card.architecture
        self.checkpoint_sha256 = digest
        return self

    def unseen_elements(self, graph: AnyGraph) -> list[str]:
        """Return the elements of a graph that the training set did not hold."""
        seen = self._loaded().elements
        numbers = np.unique(_as_graph(graph).numbers)
        return [_symbol(int(z)) for z in numbers if int(z) not in seen]

    def predict(
        self, graph_repr: AnyGraph, *, coverage: float = DEFAULT_COVERAGE
    ) -> dict[str, Any]:
        """Predict the target of one structure.

        Parameters
        ----------
        graph_repr
            The structure's graph in any of its forms.
        coverage
            Probability with which the interval is to hold the truth.

        Returns
        -------
        dict
            ``prediction`` (mean of the ensemble) and ``uncertainty`` (calibrated
            spread of its members, or of passes with dropout; None with neither) in
            ``unit``; ``interval`` (lower and upper end, or None without calibration)
            and its ``coverage``; ``unit``, ``target_property``, ``model_name``,
            ``checkpoint_sha256``, ``n_members``; ``out_of_domain``, ``distance`` to
            the training structures and ``unseen_elements``: what the network says
            about an element it never saw is no prediction.

        Raises
        ------
        MissingDependencyError
            If the model has no weights.
        InputError
            If the graph was built in another way than those of the training.
        """
        card = self._loaded()
        found = self.predict_full([graph_repr], coverage=coverage)
        mean = float(found.mean[0])
        half = None if found.half_width is None else float(found.half_width[0])
        return {
            "prediction": mean,
            "uncertainty": None if found.std is None else float(found.std[0]),
            "interval": None if half is None else [mean - half, mean + half],
            "coverage": coverage,
            "unit": card.unit,
            "target_property": card.target_property,
            "model_name": self.model_name,
            "checkpoint_sha256": self.checkpoint_sha256,
            "n_members": self.n_members,
            "out_of_domain": bool(found.out_of_domain[0]),
            "distance": None if found.distance is None else float(found.distance[0]),
            "unseen_elements": found.unseen_elements[0],
        }

    def predict_full(
        self,
        graphs: Sequence[AnyGraph],
        *,
        coverage: float = DEFAULT_COVERAGE,
        batch_size: int = 256,
    ) -> Predictions:
        """Predict many structures, with intervals and distance to the training.

        Parameters
        ----------
        graphs
            Graphs in any of their forms.
        coverage
            Of the intervals.
        batch_size
            Graphs per forward pass.
        """
        card = self._loaded()
        opened = [_as_graph(graph) for graph in graphs]
        unseen = [self.unseen_elements(graph) for graph in opened]
        outside = np.array([bool(names) for names in unseen], dtype=bool)
        members = self.predict_members(opened, batch_size)
        mean, std = ensemble(members, card.uncertainty_scale)
        calibration, half_width, distance = self._uncertainty, None, None
        if calibration is not None and opened:
            table = GraphTable.from_graphs(opened)
            raw = None if std is None else std / card.uncertainty_scale
            if calibration.card.dropout_passes:
                raw = dropout_spread(
                    self._members,
                    card,
                    self._reference,
                    table,
                    passes=calibration.card.dropout_passes,
                    seed=calibration.card.seed,
                    batch_size=batch_size,
                )
                std = card.uncertainty_scale * raw
            spread = np.zeros(len(opened)) if raw is None else raw
            half_width = calibration.half_width(spread, coverage)
            distance = calibration.distance(table)
            outside |= distance > calibration.card.domain_threshold
        return Predictions(mean, std, half_width, coverage, distance, unseen, outside)

    def predict_many(
        self, graphs: Sequence[AnyGraph], batch_size: int = 256
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Predict the target of many structures.

        Parameters
        ----------
        graphs
            Graphs in any of their forms.
        batch_size
            Graphs per forward pass; decides memory, not the answer (up to rounding).

        Returns
        -------
        mean, std
            ``(n,) float64`` in the unit of the target; see :func:`ensemble`.
        """
        members = self.predict_members(graphs, batch_size)
        return ensemble(members, self._loaded().uncertainty_scale)

    def predict_members(
        self, graphs: Sequence[AnyGraph], batch_size: int = 256
    ) -> NDArray[np.float64]:
        """Return the prediction of each member, ``(n_members, n) float64``."""
        card = self._loaded()
        if not graphs:
            return np.zeros((self.n_members, 0))
        table = GraphTable.from_graphs([_as_graph(graph) for graph in graphs])
        self._check_graphs(card, table)
        return predict_table(
            self._members, card, self._reference, table, batch_size=batch_size
        )

    def _loaded(self) -> ModelCard:
        if self.card is None:
            raise MissingDependencyError(
                f"model {self.model_name!r} has no weights",
                advice=(
                    "train one with train_cgcnn_model and load its checkpoint by "
                    "load_from_checkpoint(path), or take a registered one by get_model"
                ),
            )
        return self.card

    def _check_graphs(self, card: ModelCard, table: GraphTable) -> None:
        built = (table.cutoff_radius, table.max_neighbors)
        wanted = (card.cutoff_radius, card.max_neighbors)
        if built != wanted:
            raise InputError(
                f"model {self.model_name!r} needs graphs with cutoff_radius "
                f"{wanted[0]} Å and max_neighbors {wanted[1]}, not {built[0]} Å and "
                f"{built[1]}",
                advice="featurize the structures with the model's parameters",
            )


def predict_table(
    members: Sequence[CrystalGraphNetwork],
    card: ModelCard,
    reference: NDArray[np.float64],
    table: GraphTable,
    *,
    rows: NDArray[np.int64] | None = None,
    batch_size: int = 256,
) -> NDArray[np.float64]:
    """Return the prediction of each network for rows of a table, ``(members, n)``."""
    import torch

    from nanoos_fw.ml.network import TensorBatch

    wanted = np.arange(len(table)) if rows is None else rows
    dtype = getattr(torch, card.precision)
    answers = np.empty((len(members), len(wanted)))
    for member in members:
        member.eval()
    with torch.inference_mode():
        for start in range(0, len(wanted), batch_size):
            chunk = wanted[start : start + batch_size]
            arrays = table.batch(chunk)
            batch = TensorBatch.from_batch(arrays, dtype)
            offset = card.target_mean + np.bincount(
                arrays.graph_index,
                weights=reference[arrays.numbers],
                minlength=len(chunk),
            ) / np.maximum(arrays.graph_sizes, 1)
            for index, member in enumerate(members):
                output = member(batch).double().numpy()
                answers[index, start : start + len(chunk)] = (
                    offset + card.target_std * output
                )
    return answers


def ensemble(
    members: NDArray[np.float64], scale: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return mean and uncertainty of an ensemble.

    Parameters
    ----------
    members
        ``(n_members, n)`` predictions.
    scale
        The card's ``uncertainty_scale``.

    Returns
    -------
    mean, std
        ``(n,)``; ``std`` is ``scale`` times the standard deviation over the members
        (n_members - 1 in the denominator), None with one member.
    """
    std = scale * members.std(axis=0, ddof=1) if len(members) > 1 else None
    return members.mean(axis=0), std


def dropout_spread(
    members: Sequence[CrystalGraphNetwork],
    card: ModelCard,
    reference: NDArray[np.float64],
    table: GraphTable,
    *,
    passes: int,
    seed: int,
    batch_size: int = 256,
) -> NDArray[np.float64]:
    """Return the standard deviation over passes with dropout of all members, ``(n,)``.

    Parameters
    ----------
    members, card, reference, table, batch_size
        As :func:`predict_table`.
    passes
        Of each member that has dropout.
    seed
        Chooses the masks: equal seeds give equal answers, whatever the batches.
    """
    samples = []
    for index, member in enumerate(members):
        for number in range(passes if has_dropout([member]) else 1):
            mask = (seed, index, number)
            with thinned(member, mask) if has_dropout([member]) else nullcontext():
                samples.append(
                    predict_table(
                        [member], card, reference, table, batch_size=batch_size
                    )[0]
                )
    return np.asarray(np.std(samples, axis=0, ddof=1))


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
    members: Sequence[Mapping[str, Tensor]],
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
        ``state_dict()`` of each network.
    atom_table
        ``(119, n_features)``, the description of the elements.
    reference
        ``(119,)``, element reference in the unit of the target; zeros for none.
    uncertainty
        Its card becomes that of ``card``.
    """
    import torch
    from safetensors.torch import save

    if uncertainty is not None:
        card = card.model_copy(update={"uncertainty": uncertainty.card})

    tensors = {
        _ATOM_TABLE: torch.from_numpy(np.array(atom_table, dtype=np.float32)),
        _REFERENCE: torch.from_numpy(np.array(reference, dtype=np.float64)),
    }
    for name, array in ({} if uncertainty is None else uncertainty.tensors()).items():
        tensors[name] = torch.from_numpy(np.array(array))
    for index, state in enumerate(members):
        for name, tensor in state.items():
            tensors[f"members.{index}.{name}"] = tensor.detach().clone().contiguous()
    text = canonical_json(card.model_dump(mode="json"))
    # Safetensors checks no content: the digest covers card and tensors. One entry
    # only, since the file format leaves the order of several to chance.
    header = {_CARD: text, _DIGEST: _digest(text, tensors)}
    data = save(tensors, metadata={_FORMAT: canonical_json(header)})
    write_atomic(path, data)
    return sha256_bytes(data)


# ------------------------------------------------------------------------- private


def _read_checkpoint(data: bytes, name: str) -> tuple[ModelCard, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        header = json.loads(metadata[_FORMAT])
        card = ModelCard.model_validate_json(header[_CARD])
        intact = header[_DIGEST] == _digest(header[_CARD], tensors)
    except (SafetensorError, ValidationError, KeyError, ValueError) as error:
        raise CorruptArtifactError(
            f"{name} is not a CGCNN checkpoint: {error}", advice=_FETCH
        ) from error
    if not intact:
        raise CorruptArtifactError(
            f"the tensors of {name} do not match their checksum", advice=_FETCH
        )
    return card, tensors


def _read_uncertainty(
    card: ModelCard, tensors: Mapping[str, Tensor], name: str
) -> Uncertainty | None:
    if card.uncertainty is None:
        return None
    try:
        return Uncertainty.from_tensors(card.uncertainty, tensors)
    except KeyError as error:
        raise CorruptArtifactError(
            f"{name} has no {error} for its uncertainty", advice=_FETCH
        ) from error


def _digest(card: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(card.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _build_members(
    card: ModelCard, tensors: Mapping[str, Tensor], name: str
) -> list[CrystalGraphNetwork]:
    import torch

    from nanoos_fw.ml.network import CrystalGraphNetwork

    members = []
    table = tensors[_ATOM_TABLE].numpy()
    for index in range(card.n_members):
        network = CrystalGraphNetwork(card.architecture, table)
        network = network.to(getattr(torch, card.precision))
        prefix = f"members.{index}."
        state = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise CorruptArtifactError(
                f"member {index} of {name} does not fit its architecture: {error}",
                advice="train the model again",
            ) from error
        network.eval()
        members.append(network)
    return members


def _as_graph(graph: AnyGraph) -> CrystalGraph:
    if isinstance(graph, CrystalGraph):
        return graph
    if isinstance(graph, bytes):
        return unpack_graph(graph)
    return graph_from_repr(graph)


@functools.cache
def _symbol(z: int) -> str:
    from pymatgen.core.periodic_table import Element

    return str(Element.from_Z(z).symbol)
