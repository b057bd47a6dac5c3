"""Models that predict from atoms, bonds and angles, and their fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn import AnyGraph, CGCNNModel, build_networks, predict_table
from nanoos_fw.ml.line_graph import (
    LineGraphTable,
    line_graphs_of_crystals,
    line_graphs_of_reprs,
)
from nanoos_fw.ml.metrics import calibrate, element_fractions, fit_element_reference
from nanoos_fw.ml.model_files import (
    REFERENCE,
    LineGraphArchitecture,
    ModelCard,
    atom_features,
    save_checkpoint,
)
from nanoos_fw.parallel import Communicator

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from nanoos_fw.ml.network import Network
    from nanoos_fw.ml.training import TrainingConfig


class LineGraphModel(CGCNNModel):
    """An ensemble of networks on atoms, bonds and angles, for one property.

    Parameters
    ----------
    model_name, target_property, model_version, threads
        As in :class:`nanoos_fw.ml.cgcnn.CGCNNModel`. Predictions are by torch.

    References
    ----------
    K. Choudhary, B. DeCost, npj Comput. Mater. 7, 185 (2021).
    """

    model_type = "LineGraph"

    def __init__(
        self,
        model_name: str,
        target_property: str,
        *,
        model_version: str | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(
            model_name, target_property, model_version=model_version, threads=threads
        )
        self.architecture = LineGraphArchitecture(kind="line_graph")
        self._members: list[Network] = []

    def table_of(self, graphs: Sequence[AnyGraph]) -> LineGraphTable:
        """Return graphs of ``extract_structure_features`` as a table with angles."""
        sizes = _sizes(self._loaded(), self.model_name)
        return line_graphs_of_reprs(graphs, angle_cutoff=sizes.angle_cutoff)

    def predict_rows(
        self, table: GraphTable, batch_size: int = 64
    ) -> NDArray[np.float64]:
        """Return the prediction of each member for a table, ``(n_members, n)``."""
        card = self._loaded()
        self._check_graphs(card, table)
        reference = self._arrays[REFERENCE]
        return predict_table(
            self._members, card, reference, table, batch_size=min(batch_size, 64)
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


def fit_line_graph(
    table: LineGraphTable,
    targets: NDArray[np.float64],
    train: NDArray[np.int64],
    val: NDArray[np.int64],
    config: TrainingConfig,
    architecture: LineGraphArchitecture,
    path: Path,
    *,
    unit: str,
    dataset_hash: str = "",
) -> str:
    """Fit an ensemble by the training loop of all networks; return its SHA-256.

    Parameters
    ----------
    table
        ``n`` graphs.
    targets
        ``(n,)`` in ``unit``; rows outside ``train`` and ``val`` unused.
    train, val
        Row numbers.
    config
        Of the fit; its sizes of networks do not count.
    architecture
        Sizes.
    path
        Checkpoint to write.
    unit, dataset_hash
        For the card.

    Raises
    ------
    InputError
        If table and architecture have different cutoffs, or the fit diverges.
    """
    from nanoos_fw.ml.fitting import Fit, FitData

    cutoffs = (table.cutoff_radius, table.angle_cutoff)
    if cutoffs != (architecture.gaussian_max, architecture.angle_cutoff):
        raise InputError(
            f"the graphs have cutoffs of {cutoffs[0]} and {cutoffs[1]} Å, the network "
            f"{architecture.gaussian_max} and {architecture.angle_cutoff} Å"
        )
    fractions = element_fractions(table)
    reference = np.zeros(119)
    if config.element_reference:
        reference = fit_element_reference(fractions[train], targets[train])
    residual = targets - fractions @ reference
    mean, std = float(residual[train].mean()), float(residual[train].std())
    card = ModelCard(
        target_property=config.target,
        unit=unit,
        target_mean=mean,
        target_std=std,
        n_members=config.ensemble_size,
        architecture=architecture,
        cutoff_radius=table.cutoff_radius,
        max_neighbors=None,
        elements=tuple(np.flatnonzero(fractions[train].any(axis=0)).tolist()),
        dataset_hash=dataset_hash,
        n_train=len(train),
        precision="float64" if config.precision == "float64" else "float32",
    )
    data = FitData(table, (residual - mean) / std, train, val, std)
    fits = []
    for member in range(config.ensemble_size):
        fit = Fit(config, architecture, atom_features(), data, member, Communicator())
        while not fit.done:
            fit.run_epoch(lambda: False)
        fit.use_best()
        fits.append(fit)
    if len(fits) > 1 and len(val):
        networks = [fit.network for fit in fits]
        members = predict_table(networks, card, reference, table, rows=val)
        spread = members.std(axis=0, ddof=1)
        scale = calibrate(targets[val], members.mean(axis=0), spread)
        card = card.model_copy(update={"uncertainty_scale": scale})
    states = [fit.weights() for fit in fits]
    return save_checkpoint(path, card, states, atom_features(), reference)


# ------------------------------------------------------------------------- private


def _sizes(card: ModelCard, name: str) -> LineGraphArchitecture:
    if not isinstance(card.architecture, LineGraphArchitecture):
        raise CorruptArtifactError(
            f"{name} is not a network on angles",
            advice="open it by nanoos_fw.ml.predictors.open_model",
        )
    return card.architecture
