"""Random forests on scalar features: the baseline beside every network.

A forest is fitted by scikit-learn and kept as arrays: predictions need numpy alone,
and a file of it holds no code. Its intervals go by the errors of each training row in
the trees that did not see it (out of bag), so no rows are set aside for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from nanoos_fw.crystals import element_symbol
from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.features import AnyGraph, as_graph
from nanoos_fw.ml.graph_scalars import GRAPH_SCALARS, GraphScalars, graph_scalars
from nanoos_fw.ml.metrics import calibrate
from nanoos_fw.ml.uncertainty import (
    DEFAULT_COVERAGE,
    Predictions,
    conformal_quantile,
    normalized_scores,
)
from nanoos_fw.ml.weight_files import (
    FOREST_FORMAT,
    WeightCard,
    read_weights,
    save_weights,
)
from nanoos_fw.provenance import sha256_bytes

MODEL_TYPE = "RandomForest"

_ARRAYS = ("tree_start", "feature", "threshold", "left", "right", "value", "fill")
_SCORES = "scores"
_ROWS_AT_ONCE = 4096
_FETCH = "fetch or fit the forest again"


class ForestCard(WeightCard):
    """What a forest says about itself; see also :class:`WeightCard`.

    Parameters
    ----------
    target_property, unit
        What is predicted.
    feature_names
        Columns, in order.
    source
        ``graph``: the columns of :func:`graph_scalars`, so that graphs can be
        predicted; ``scalars``: given by name.
    cutoff_radius, max_neighbors
        How graphs must be built; None for ``scalars``.
    elements
        Atomic numbers seen in training; empty if only scalars were seen.
    n_train, n_trees, seed
        Of the fit.
    dataset_hash
        Dataset behind the forest; empty if there is none.
    uncertainty_scale
        Factor from the spread of the trees to the uncertainty: 68.3 % of the errors out
        of bag are smaller than it; 1 without such rows.
    interval_floor
        Added to the spread before errors are divided by it, in the unit of the
        target; None for a forest without intervals.
    """

    schema_version: Literal[1] = 1
    target_property: str = "target"
    unit: str = ""
    feature_names: tuple[str, ...]
    source: Literal["graph", "scalars"]
    cutoff_radius: float | None = None
    max_neighbors: int | None = None
    elements: tuple[int, ...] = ()
    n_train: int
    n_trees: int
    seed: int
    dataset_hash: str = ""
    uncertainty_scale: float = Field(default=1.0, gt=0.0)
    interval_floor: float | None = Field(default=None, gt=0.0)


@dataclass(frozen=True, eq=False)
class ForestModel:
    """A fitted forest: trees as arrays, and its card.

    Parameters
    ----------
    card
        What it is.
    tree_start
        ``(n_trees + 1,) int64``: tree t owns nodes ``tree_start[t]:tree_start[t+1]``.
    feature, left, right
        ``(n_nodes,) int32``: column that a node looks at, -1 in a leaf, and the
        nodes (in all trees) to go to.
    threshold, value
        ``(n_nodes,) float64``: go left if not larger; mean of the training targets.
    fill
        ``(p,) float64``, taken for a missing value: median of the training rows.
    scores
        ``(m,) float64``, sorted: errors over (spread + floor), out of bag or of rows
        of a calibration. Empty without intervals.
    model_name
        Name under which predictions are recorded.
    checkpoint_sha256
        Of the file it was read from.
    version
        In a registry.
    """

    card: ForestCard
    tree_start: NDArray[np.int64]
    feature: NDArray[np.int32]
    threshold: NDArray[np.float64]
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    value: NDArray[np.float64]
    fill: NDArray[np.float64]
    scores: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    model_name: str = MODEL_TYPE
    checkpoint_sha256: str | None = None
    version: str | None = None

    @property
    def target_property(self) -> str:
        """Name of the target."""
        return self.card.target_property

    @property
    def unit(self) -> str:
        """Unit of predictions."""
        return self.card.unit

    @property
    def model_type(self) -> str:
        """Kind of model, as the registry names it."""
        return MODEL_TYPE

    @property
    def model_version(self) -> str | None:
        """Version in the registry, else the checksum of the file."""
        if self.version is not None or self.checkpoint_sha256 is None:
            return self.version
        return f"sha256:{self.checkpoint_sha256}"

    @property
    def n_members(self) -> int:
        """Trees."""
        return len(self.tree_start) - 1

    # ------------------------------------------------------------------ predictions

    def predict_trees(
        self, features: NDArray[np.float64] | GraphScalars | Sequence[Mapping[str, Any]]
    ) -> NDArray[np.float64]:
        """Return the prediction of each tree, ``(n_trees, n) float64``.

        Parameters
        ----------
        features
            ``(n, p)`` in the order of the card, what :func:`graph_scalars` returns,
            or scalars by name.
        """
        matrix = self._matrix(features)
        answers = np.empty((self.n_members, len(matrix)))
        for start in range(0, len(matrix), _ROWS_AT_ONCE):
            rows = matrix[start : start + _ROWS_AT_ONCE]
            for tree in range(self.n_members):
                node = np.full(len(rows), self.tree_start[tree], dtype=np.int64)
                active = np.arange(len(rows))
                while True:
                    column = self.feature[node[active]]
                    inner = column >= 0
                    active, column = active[inner], column[inner]
                    if not len(active):
                        break
                    here = node[active]
                    # float32 against float64, as scikit-learn compares.
                    low = rows[active, column] <= self.threshold[here]
                    node[active] = np.where(low, self.left[here], self.right[here])
                answers[tree, start : start + len(rows)] = self.value[node]
        return answers

    def predict_features(
        self, features: NDArray[np.float64] | GraphScalars | Sequence[Mapping[str, Any]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return mean and uncertainty for features, as :meth:`predict_many`."""
        trees = self.predict_trees(features)
        mean = np.zeros(trees.shape[1])
        for tree in trees:  # one after the other, as scikit-learn adds them up
            mean += tree
        mean /= len(trees)
        if len(trees) < 2:
            return mean, np.full(len(mean), np.nan)
        return mean, self.card.uncertainty_scale * trees.std(axis=0, ddof=1)

    def predict_many(
        self, graphs: Sequence[AnyGraph], batch_size: int = 4096
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Predict the target of many structures.

        Parameters
        ----------
        graphs
            Graphs in any of their forms.
        batch_size
            Graphs at once; decides memory, not the answer.

        Returns
        -------
        mean, std
            ``(n,) float64`` in the unit of the target; ``std`` is the standard
            deviation over the trees times the card's ``uncertainty_scale``.

        Raises
        ------
        InputError
            If the forest was fitted on scalars that a graph does not hold, or the
            graphs were built in another way.
        """
        if self.card.source != GRAPH_SCALARS:
            raise InputError(
                f"forest {self.model_name!r} was fitted on scalars, which graphs do "
                "not hold",
                advice="call predict_features, or fit it on graph_scalars",
            )
        means, stds = [np.zeros(0)], [np.zeros(0)]
        for start in range(0, len(graphs), batch_size):
            some = [as_graph(graph) for graph in graphs[start : start + batch_size]]
            mean, std = self.predict_features(
                graph_scalars(GraphTable.from_graphs(some))
            )
            means.append(mean)
            stds.append(std)
        spread = None if self.n_members < 2 else np.concatenate(stds)
        return np.concatenate(means), spread

    def predict_full(
        self, graphs: Sequence[AnyGraph], *, coverage: float = DEFAULT_COVERAGE
    ) -> Predictions:
        """Predict many structures, with intervals; a forest states no distance."""
        mean, std = self.predict_many(graphs)
        half_width = self.half_width(std, coverage)
        unseen = [self.unseen_elements(graph) for graph in graphs]
        outside = np.array([bool(names) for names in unseen], dtype=bool)
        return Predictions(mean, std, half_width, coverage, None, unseen, outside)

    def half_width(
        self, std: NDArray[np.float64] | None, coverage: float = DEFAULT_COVERAGE
    ) -> NDArray[np.float64] | None:
        """Return half the width of the intervals, ``(n,)``, in the unit of the target.

        Parameters
        ----------
        std
            Uncertainty as :meth:`predict_many` returns it.
        coverage
            Probability with which ``mean ± half_width`` holds the truth, for rows
            drawn like those of the training. Errors out of bag are of fewer trees
            than the forest has: the true coverage is rather higher.

        Returns
        -------
        ``(n,) float64`` or None
            None without scores, or with too few for the coverage.

        References
        ----------
        U. Johansson et al., Mach. Learn. 97, 155 (2014).
        """
        factor = conformal_quantile(self.scores, coverage)
        floor = self.card.interval_floor
        if factor is None or floor is None or std is None:
            return None
        return factor * (std / self.card.uncertainty_scale + floor)

    def predict(
        self, graph_repr: AnyGraph, *, coverage: float = DEFAULT_COVERAGE
    ) -> dict[str, Any]:
        """Predict one structure; keys as in :meth:`.NetworkModel.predict`."""
        graph = as_graph(graph_repr)
        found = self.predict_full([graph], coverage=coverage)
        mean = float(found.mean[0])
        half = None if found.half_width is None else float(found.half_width[0])
        unseen = found.unseen_elements[0]
        return {
            "prediction": mean,
            "uncertainty": None if found.std is None else float(found.std[0]),
            "interval": None if half is None else [mean - half, mean + half],
            "coverage": coverage,
            "unit": self.unit,
            "target_property": self.target_property,
            "model_name": self.model_name,
            "model_version": self.model_version,
            "model_type": self.model_type,
            "checkpoint_sha256": self.checkpoint_sha256,
            "n_members": self.n_members,
            "out_of_domain": bool(unseen),
            "distance": None,
            "unseen_elements": unseen,
        }

    def unseen_elements(self, graph: AnyGraph) -> list[str]:
        """Return the elements of a graph that the training set did not hold."""
        if not self.card.elements:
            return []
        seen = self.card.elements
        numbers = np.unique(as_graph(graph).numbers)
        return [element_symbol(int(z)) for z in numbers if int(z) not in seen]

    # ----------------------------------------------------------------------- files

    def with_card(self, **changes: Any) -> ForestModel:
        """Return the forest with another card, such as a calibrated one."""
        return replace(self, card=self.card.model_copy(update=changes))

    def calibrated(
        self, errors: NDArray[np.float64], spread: NDArray[np.float64]
    ) -> ForestModel:
        """Return the forest with uncertainty and intervals from errors it did not see.

        Parameters
        ----------
        errors
            ``(m,)``, prediction minus truth of rows that no tree in question learned.
        spread
            ``(m,)``, standard deviation over those trees, not scaled.
        """
        rng = np.random.default_rng([self.card.seed, 0x0B])
        floor, scores = normalized_scores(errors, spread, rng)
        scale = calibrate(np.zeros(len(errors)), errors, spread)
        return replace(
            self.with_card(interval_floor=floor, uncertainty_scale=scale),
            scores=scores,
        )

    def save(self, path: Path) -> str:
        """Write the forest as one safetensors file, atomically; return its SHA-256."""
        names = (*_ARRAYS, *((_SCORES,) if len(self.scores) else ()))
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in names}
        return save_weights(path, FOREST_FORMAT, self.card, arrays)

    def _matrix(
        self, features: NDArray[np.float64] | GraphScalars | Sequence[Mapping[str, Any]]
    ) -> NDArray[np.float32]:
        card = self.card
        if isinstance(features, GraphScalars):
            built = (features.cutoff_radius, features.max_neighbors)
            wanted = (card.cutoff_radius, card.max_neighbors)
            if card.source == GRAPH_SCALARS and built != wanted:
                raise InputError(
                    f"forest {self.model_name!r} needs graphs with cutoff_radius "
                    f"{wanted[0]} Å and max_neighbors {wanted[1]}, not {built[0]} Å "
                    f"and {built[1]}",
                    advice="featurize the structures with the model's parameters",
                )
            _check_names(features.names, card.feature_names)
            values = features.values
        elif isinstance(features, np.ndarray):
            values = np.asarray(features, dtype=np.float64)
        else:
            values = scalar_matrix(features, card.feature_names)
        if values.ndim != 2 or values.shape[1] != len(card.feature_names):
            raise InputError(
                f"features of shape {values.shape} do not fit the "
                f"{len(card.feature_names)} columns of the forest"
            )
        return filled_features(values, self.fill)


def scalar_matrix(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> NDArray[np.float64]:
    """Return named scalars as ``(n, p) float64``; NaN where a row lacks one.

    The fraction of an element that a row does not name is 0.
    """
    absent = [0.0 if name.startswith("fraction_") else np.nan for name in names]
    matrix = np.empty((len(rows), len(names)))
    for i, row in enumerate(rows):
        pairs = zip(names, absent, strict=True)
        matrix[i] = [float(row.get(name, other)) for name, other in pairs]
    return matrix


def load_forest(
    source: str | Path | bytes,
    *,
    model_name: str = MODEL_TYPE,
    model_version: str | None = None,
) -> ForestModel:
    """Read a file of :meth:`ForestModel.save`, or its bytes.

    Raises
    ------
    InputError
        If there is no such file, or it was fitted to features of another version.
    CorruptArtifactError
        If it is no forest, or does not match its checksum.
    """
    if isinstance(source, bytes):
        data, name = source, "checkpoint"
    else:
        path = Path(source)
        if not path.exists():
            raise InputError(f"there is no checkpoint {path}", advice=_FETCH)
        data, name = path.read_bytes(), str(path)
    card, arrays = read_weights(data, name, FOREST_FORMAT, ForestCard)
    if missing := [key for key in _ARRAYS if key not in arrays]:
        raise CorruptArtifactError(f"{name} has no {', '.join(missing)}", advice=_FETCH)
    fields: dict[str, Any] = {
        key: arrays[key] for key in (*_ARRAYS, _SCORES) if key in arrays
    }
    return ForestModel(
        card=card,
        model_name=model_name,
        version=model_version,
        checkpoint_sha256=sha256_bytes(data),
        **fields,
    )


def filled_features(
    values: NDArray[np.float64], fill: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return features as trees see them, missing ones by ``fill`` ``(p,)``."""
    filled = np.where(np.isnan(values), fill, values)
    return np.asarray(filled, dtype=np.float32)


# ------------------------------------------------------------------------- private


def _check_names(given: Sequence[str], wanted: Sequence[str]) -> None:
    if tuple(given) != tuple(wanted):
        missing = sorted(set(wanted) - set(given))
        raise InputError(
            "the features are not those of the forest",
            evidence={"missing": missing[:10], "n_given": len(given)},
            advice="make them with the release that fitted the forest, or fit it again",
        )
