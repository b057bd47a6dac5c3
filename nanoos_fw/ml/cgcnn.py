"""Crystal graph convolutional networks: ensembles and their predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.crystal_tables import build_table
from nanoos_fw.ml.ensembles import (
    build_networks,
    dropout_spread,
    ensemble,
    predict_table,
    state_of,
    targets_of_outputs,
)
from nanoos_fw.ml.features import AnyGraph, as_graph
from nanoos_fw.ml.inference import FoldedNetwork, fold_network, run_networks
from nanoos_fw.ml.model_files import (
    ATOM_TABLE,
    REFERENCE,
    Architecture,
    ModelCard,
    atom_features,
    save_checkpoint,
)
from nanoos_fw.ml.network_models import NetworkModel

if TYPE_CHECKING:
    from pymatgen.core import Structure

__all__ = [
    "AnyGraph",
    "Architecture",
    "CGCNNModel",
    "ModelCard",
    "atom_features",
    "build_networks",
    "dropout_spread",
    "ensemble",
    "predict_table",
    "save_checkpoint",
]


class CGCNNModel(NetworkModel):
    """An ensemble of crystal graph networks for one property.

    Parameters
    ----------
    model_name, target_property, model_version, threads
        As in :class:`nanoos_fw.ml.network_models.NetworkModel`.
    hidden_dim, num_layers
        Sizes asked for; a checkpoint brings its own.

    References
    ----------
    T. Xie, J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018).
    """

    model_type = "CGCNN"

    def __init__(
        self,
        model_name: str,
        target_property: str,
        hidden_dim: int = 64,
        num_layers: int = 3,
        *,
        model_version: str | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(
            model_name,
            target_property,
            Architecture(hidden_dim=hidden_dim, num_layers=num_layers),
            model_version=model_version,
            threads=threads,
        )
        self._folded: list[FoldedNetwork] = []

    def table_of(self, graphs: Sequence[AnyGraph]) -> GraphTable:
        """Return graphs as the table that this kind of model predicts from."""
        packed = [graph for graph in graphs if isinstance(graph, bytes)]
        if len(packed) == len(graphs):
            return GraphTable.from_packed(packed)
        return GraphTable.from_graphs([as_graph(graph) for graph in graphs])

    def prepare(self, table: GraphTable) -> GraphTable:
        """Return a table of a dataset as this kind of model predicts from it."""
        return table

    def predict_rows(
        self, table: GraphTable, batch_size: int = 256
    ) -> NDArray[np.float64]:
        """Return the prediction of each member for a table, ``(n_members, n)``.

        Raises
        ------
        InputError
            If the graphs were built in another way than those of the training.
        """
        card = self._loaded()
        self._check_graphs(card, table)
        outputs = run_networks(
            self._folded,
            table,
            pad_to=card.max_neighbors if card.pad_neighbors else None,
            threads=self.threads,
        )
        numbers = np.asarray(table.numbers)
        sums = np.add.reduceat(self._arrays[REFERENCE][numbers], table.atom_start[:-1])
        return targets_of_outputs(card, outputs, sums / table.graph_sizes)

    def _take(
        self, card: ModelCard, arrays: dict[str, NDArray[Any]], name: str
    ) -> None:
        """Make ready for predictions; refuse weights that do not fit the card."""
        self._folded = [
            _fold(card, arrays, index, name) for index in range(card.n_members)
        ]

    def _build_table(
        self, card: ModelCard, crystals: Sequence[Structure | Mapping[str, Any]]
    ) -> tuple[
        GraphTable | None,
        NDArray[np.int64],
        dict[int, InputError | CorruptArtifactError],
    ]:
        return build_table(
            crystals,
            cutoff_radius=card.cutoff_radius,
            max_neighbors=card.max_neighbors,
        )


# ------------------------------------------------------------------------- private


def _fold(
    card: ModelCard, arrays: Mapping[str, NDArray[Any]], index: int, name: str
) -> FoldedNetwork:
    if not isinstance(card.architecture, Architecture):
        raise CorruptArtifactError(
            f"{name} is not a CGCNN: its network works on {card.architecture.kind}",
            advice="open it by nanoos_fw.ml.predictors.open_model",
        )
    try:
        return fold_network(
            card.architecture,
            arrays[ATOM_TABLE],
            state_of(arrays, index),
            card.precision,
        )
    except (KeyError, ValueError) as error:
        raise CorruptArtifactError(
            f"member {index} of {name} does not fit its architecture: {error}",
            advice="train the model again",
        ) from error
