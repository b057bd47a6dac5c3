"""Models that predict from atoms, bonds and angles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.ensembles import build_networks, predict_table
from nanoos_fw.ml.features import AnyGraph
from nanoos_fw.ml.line_graph import (
    LineGraphTable,
    line_graphs_of,
    line_graphs_of_crystals,
    with_angles,
)
from nanoos_fw.ml.model_files import REFERENCE, LineGraphArchitecture, ModelCard
from nanoos_fw.ml.network_models import NetworkModel
from nanoos_fw.ml.training_config import MODEL_TYPES

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from nanoos_fw.ml.network import Network


class LineGraphModel(NetworkModel):
    """An ensemble of networks on atoms, bonds and angles, for one property.

    Parameters
    ----------
    model_name, target_property, model_version, threads
        As in :class:`nanoos_fw.ml.network_models.NetworkModel`. Predictions are by
        torch.

    References
    ----------
    K. Choudhary, B. DeCost, npj Comput. Mater. 7, 185 (2021).
    """

    model_type = MODEL_TYPES["line_graph"]

    def __init__(
        self,
        model_name: str,
        target_property: str,
        *,
        model_version: str | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(
            model_name,
            target_property,
            LineGraphArchitecture(kind="line_graph"),
            model_version=model_version,
            threads=threads,
        )
        self._members: list[Network] = []

    def table_of(self, graphs: Sequence[AnyGraph]) -> LineGraphTable:
        """Return graphs that hold the vectors of edges as a table with angles."""
        sizes = _sizes(self._loaded(), self.model_name)
        return line_graphs_of(graphs, angle_cutoff=sizes.angle_cutoff)

    def prepare(self, table: GraphTable) -> LineGraphTable:
        """Return a table with vectors as one with angles."""
        sizes = _sizes(self._loaded(), self.model_name)
        return with_angles(table, sizes.angle_cutoff)

    def predict_rows(
        self, table: GraphTable, batch_size: int = 256
    ) -> NDArray[np.float64]:
        """Return the prediction of each member for a table, ``(n_members, n)``."""
        card = self._loaded()
        self._check_graphs(card, table)
        reference = self._arrays[REFERENCE]
        return predict_table(
            self._members, card, reference, table, batch_size=batch_size
        )

    def _take(
        self, card: ModelCard, arrays: dict[str, NDArray[Any]], name: str
    ) -> None:
        _sizes(card, name)
        self._members = build_networks(card, arrays, name)

    def _build_table(
        self, card: ModelCard, crystals: Sequence[Structure | Mapping[str, Any]]
    ) -> tuple[
        GraphTable | None,
        NDArray[np.int64],
        dict[int, InputError | CorruptArtifactError],
    ]:
        return line_graphs_of_crystals(
            crystals,
            cutoff_radius=card.cutoff_radius,
            angle_cutoff=_sizes(card, self.model_name).angle_cutoff,
        )


# ------------------------------------------------------------------------- private


def _sizes(card: ModelCard, name: str) -> LineGraphArchitecture:
    if not isinstance(card.architecture, LineGraphArchitecture):
        raise CorruptArtifactError(
            f"{name} is not a network on angles",
            advice="open it by nanoos_fw.ml.predictors.open_model",
        )
    return card.architecture
