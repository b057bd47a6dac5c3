"""Models that are ensembles of networks: their files, predictions and intervals.

What a kind of network does by itself is in :mod:`nanoos_fw.ml.cgcnn` and
:mod:`nanoos_fw.ml.line_graph_model`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.crystals import element_symbol
from nanoos_fw.errors import (
    CorruptArtifactError,
    InputError,
    MissingDependencyError,
    NanoOSError,
)
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.ensembles import (
    build_networks,
    dropout_spread,
    ensemble,
    state_of,
)
from nanoos_fw.ml.features import AnyGraph, as_graph
from nanoos_fw.ml.model_files import (
    ATOM_TABLE,
    REFERENCE,
    AnyArchitecture,
    ModelCard,
    read_checkpoint,
    save_checkpoint,
)
from nanoos_fw.ml.system_models import SYSTEM_MODELS, install_advice
from nanoos_fw.ml.uncertainty import (
    DEFAULT_COVERAGE,
    Predictions,
    Uncertainty,
)
from nanoos_fw.ml.weight_files import FETCH
from nanoos_fw.provenance import sha256_bytes

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from nanoos_fw.ml.network import Network


class NetworkModel(ABC):
    """An ensemble of networks for one property.

    Parameters
    ----------
    model_name
        Name under which predictions are recorded.
    target_property
        Name of the target.
    architecture
        Sizes asked for; a checkpoint brings its own.
    model_version
        Version in a registry, such as ``name@3``; without one, predictions name the
        checksum of the weights.
    threads
        Of predictions; None takes ``OMP_NUM_THREADS``, or all cores that this process
        may use. Does not change the answer.

    References
    ----------
    Ensembles: B. Lakshminarayanan et al., Adv. Neural Inf. Process. Syst. 30 (2017).
    """

    model_type: str

    def __init__(
        self,
        model_name: str,
        target_property: str,
        architecture: AnyArchitecture,
        *,
        model_version: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.model_name = model_name
        self.target_property = target_property
        self.architecture = architecture
        self.card: ModelCard | None = None
        self.checkpoint_sha256: str | None = None
        self.threads = threads
        self._version = model_version
        self._arrays: dict[str, NDArray[Any]] = {}
        self._uncertainty: Uncertainty | None = None

    @property
    def n_members(self) -> int:
        """Networks in the ensemble; 0 without weights."""
        return 0 if self.card is None else self.card.n_members

    @property
    def unit(self) -> str:
        """Unit of predictions."""
        return self._loaded().unit

    @property
    def model_version(self) -> str | None:
        """Version in the registry, else the checksum of the weights."""
        if self._version is not None or self.checkpoint_sha256 is None:
            return self._version
        return f"sha256:{self.checkpoint_sha256}"

    def load_from_checkpoint(
        self, path: str | Path, *, sha256: str | None = None
    ) -> Self:
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
    ) -> Self:
        """Load weights from the bytes of a checkpoint; see above."""
        digest = sha256_bytes(data)
        if sha256 is not None and digest != sha256:
            raise CorruptArtifactError(
                f"{name} does not match its checksum",
                evidence={"sha256": digest, "sha256_expected": sha256},
                advice="fetch the file again",
            )
        card, arrays = read_checkpoint(data, name)
        if card.target_property != self.target_property:
            raise InputError(
                f"{name} predicts {card.target_property}, not {self.target_property}",
                advice="load it as a model of its own property",
            )
        self._take(card, arrays, name)
        self._uncertainty = _read_uncertainty(card, arrays, name)
        self._arrays = arrays
        self.card, self.architecture = card, card.architecture
        self.checkpoint_sha256 = digest
        return self

    def networks(self) -> list[Network]:
        """Return the members as networks of torch, for what folded ones cannot do."""
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        return build_networks(self._loaded(), self._arrays, self.model_name)

    def unseen_elements(self, graph: AnyGraph) -> list[str]:
        """Return the elements of a graph that the training set did not hold."""
        seen = self._loaded().elements
        numbers = np.unique(as_graph(graph).numbers)
        return [element_symbol(int(z)) for z in numbers if int(z) not in seen]

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
            ``unit``; ``interval`` (lower and upper end; None without calibration, and
            of classes) and its ``coverage``; ``unit``, ``target_property``,
            ``model_name``, ``model_version``, ``model_type``, ``checkpoint_sha256``,
            ``n_members``;
            ``out_of_domain``, ``distance`` to the training structures and
            ``unseen_elements``: what the network says about an element it never saw
            is no prediction. Of classes, ``prediction`` is the probability of the
            last of ``classes``, and ``predicted_class`` the likelier of two.

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
        answer = {
            "prediction": mean,
            "uncertainty": None if found.std is None else float(found.std[0]),
            "interval": None if half is None else [mean - half, mean + half],
            "coverage": coverage,
            "unit": card.unit,
            "target_property": card.target_property,
            "model_name": self.model_name,
            "model_version": self.model_version,
            "model_type": self.model_type,
            "checkpoint_sha256": self.checkpoint_sha256,
            "n_members": self.n_members,
            "out_of_domain": bool(found.out_of_domain[0]),
            "distance": None if found.distance is None else float(found.distance[0]),
            "unseen_elements": found.unseen_elements[0],
        }
        if card.classes:
            answer["classes"] = list(card.classes)
            answer["predicted_class"] = card.classes[mean > 0.5]
        return answer

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
            Graphs per pass of torch, where torch computes.
        """
        card = self._loaded()
        if not graphs:
            return _no_predictions(card, coverage, self._uncertainty)
        return self._judge(self.table_of(graphs), coverage, batch_size)

    def predict_crystals(
        self,
        crystals: Sequence[Structure | Mapping[str, Any]],
        *,
        coverage: float = DEFAULT_COVERAGE,
    ) -> tuple[Predictions, NDArray[np.int64], dict[int, NanoOSError]]:
        """Predict crystals without features made before.

        Parameters
        ----------
        crystals
            As in :func:`nanoos_fw.ml.crystal_tables.build_table`.
        coverage
            Of the intervals.

        Returns
        -------
        predictions
            Of those that have a graph.
        positions
            ``(n,)``, the place of each in ``crystals``.
        errors
            Why the others have none, by place.
        """
        card = self._loaded()
        table, positions, errors = self._build_table(card, crystals)
        if table is None:
            nothing = _no_predictions(card, coverage, self._uncertainty)
            return nothing, positions, dict(errors)
        return self._judge(table, coverage, 256), positions, dict(errors)

    def predict_table(
        self, table: GraphTable, *, coverage: float = DEFAULT_COVERAGE
    ) -> Predictions:
        """Do what :meth:`predict_full` does for graphs that are a table already.

        Raises
        ------
        InputError
            If the graphs were built in another way than those of the training.
        """
        return self._judge(table, coverage, 256)

    def _judge(
        self, table: GraphTable, coverage: float, batch_size: int
    ) -> Predictions:
        card = self._loaded()
        unseen = _unseen_by_graph(table, card.elements)
        outside = np.array([bool(names) for names in unseen], dtype=bool)
        mean, raw = self.mean_and_spread(table, batch_size)
        std = None if raw is None else card.uncertainty_scale * raw
        calibration, half_width, distance = self._uncertainty, None, None
        if calibration is not None:
            spread = np.zeros(len(table)) if raw is None else raw
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
            Graphs per pass of torch, where torch computes; decides memory, not the
            answer.

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
        self._loaded()
        if not graphs:
            return np.zeros((self.n_members, 0))
        return self.predict_rows(self.table_of(graphs), batch_size)

    def mean_and_spread(
        self, table: GraphTable, batch_size: int = 256
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Return the prediction for a table, and the spread before it is scaled.

        ``(n,)`` each, in the unit of the target. The spread is that of the members,
        or of passes with dropout where the model was calibrated with them; None with
        neither.
        """
        mean, spread = ensemble(self.predict_rows(table, batch_size))
        known = self._uncertainty
        if known is not None and known.card.dropout_passes:
            spread = dropout_spread(
                self.networks(),
                self._loaded(),
                self._arrays[REFERENCE],
                table,
                passes=known.card.dropout_passes,
                seed=known.card.seed,
                batch_size=batch_size,
            )
        return mean, spread

    @property
    def uncertainty(self) -> Uncertainty | None:
        """What intervals and domain go by; None for a model that states neither."""
        return self._uncertainty

    def save(
        self, path: Path, uncertainty: Uncertainty, uncertainty_scale: float
    ) -> str:
        """Write the weights with another calibration; return the SHA-256 of the file.

        Parameters
        ----------
        path
            File to write.
        uncertainty, uncertainty_scale
            Intervals and domain; factor from spread to uncertainty.
        """
        card = self._loaded().model_copy(
            update={"uncertainty_scale": uncertainty_scale}
        )
        members = [state_of(self._arrays, n) for n in range(card.n_members)]
        table, reference = self._arrays[ATOM_TABLE], self._arrays[REFERENCE]
        return save_checkpoint(path, card, members, table, reference, uncertainty)

    @abstractmethod
    def table_of(self, graphs: Sequence[AnyGraph]) -> GraphTable:
        """Return graphs as the table that this kind of model predicts from."""

    @abstractmethod
    def prepare(self, table: GraphTable) -> GraphTable:
        """Return a table of a dataset as this kind of model predicts from it."""

    @abstractmethod
    def predict_rows(
        self, table: GraphTable, batch_size: int = 256
    ) -> NDArray[np.float64]:
        """Return the prediction of each member for a table, ``(n_members, n)``.

        Raises
        ------
        InputError
            If the graphs were built in another way than those of the training.
        """

    @abstractmethod
    def _take(
        self, card: ModelCard, arrays: dict[str, NDArray[Any]], name: str
    ) -> None:
        """Make ready for predictions; refuse weights that do not fit the card."""

    @abstractmethod
    def _build_table(
        self, card: ModelCard, crystals: Sequence[Structure | Mapping[str, Any]]
    ) -> tuple[
        GraphTable | None,
        NDArray[np.int64],
        dict[int, InputError | CorruptArtifactError],
    ]:
        """Return the table of crystals, their places, and why others have none."""

    def _loaded(self) -> ModelCard:
        if self.card is None:
            advice = (
                "train one with train_cgcnn_model and load its checkpoint by "
                "load_from_checkpoint(path), or take a registered one by get_model"
            )
            if self.model_name in SYSTEM_MODELS:
                advice = f"{install_advice(self.model_name)}, or {advice}"
            raise MissingDependencyError(
                f"model {self.model_name!r} has no weights", advice=advice
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


# ------------------------------------------------------------------------- private


def _unseen_by_graph(table: GraphTable, elements: Sequence[int]) -> list[list[str]]:
    """Return for each graph the elements that are not among ``elements``."""
    seen = np.zeros(256, dtype=bool)
    seen[list(elements)] = True
    numbers = np.asarray(table.numbers)
    unseen: list[list[str]] = [[] for _ in range(len(table))]
    strange = np.flatnonzero(~seen[numbers])
    rows = np.searchsorted(table.atom_start, strange, side="right") - 1
    for row, z in sorted(
        set(zip(rows.tolist(), numbers[strange].tolist(), strict=True))
    ):
        unseen[row].append(element_symbol(z))
    return unseen


def _no_predictions(
    card: ModelCard, coverage: float, calibration: Uncertainty | None
) -> Predictions:
    nothing = np.zeros(0)
    calibrated = calibration is not None
    spread = card.n_members > 1 or (
        calibration is not None and calibration.card.dropout_passes > 0
    )
    return Predictions(
        nothing,
        nothing if spread else None,
        nothing if calibrated else None,
        coverage,
        nothing if calibrated else None,
        [],
        np.zeros(0, dtype=bool),
    )


def _read_uncertainty(
    card: ModelCard, arrays: Mapping[str, NDArray[Any]], name: str
) -> Uncertainty | None:
    if card.uncertainty is None:
        return None
    try:
        return Uncertainty.from_tensors(card.uncertainty, arrays)
    except KeyError as error:
        raise CorruptArtifactError(
            f"{name} has no {error} for its uncertainty", advice=FETCH
        ) from error
