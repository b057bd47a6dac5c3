"""Random forests on scalar features: the baseline beside every network.

A forest is fitted by scikit-learn and kept as arrays: predictions need numpy alone,
and a file of it holds no code. Its intervals go by the errors of each training row in
the trees that did not see it (out of bag), so no rows are set aside for them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanoos_fw.crystals import element_symbol
from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.features import STATISTICS, AnyGraph, as_graph, element_table
from nanoos_fw.ml.metrics import calibrate
from nanoos_fw.ml.model_files import FOREST_FORMAT, card_text
from nanoos_fw.ml.uncertainty import (
    DEFAULT_COVERAGE,
    Predictions,
    conformal_quantile,
    normalized_scores,
)
from nanoos_fw.provenance import canonical_json, sha256_bytes, write_atomic

MODEL_TYPE = "RandomForest"
GRAPH_SCALARS = "graph"
"""Source of features that :func:`graph_scalars` makes."""

_ATOM_QUANTITIES = ("nearest_distance", "mean_distance", "farthest_distance")
_ARRAYS = ("tree_start", "feature", "threshold", "left", "right", "value", "fill")
_SCORES = "scores"
_ROWS_AT_ONCE = 4096
_MIN_CALIBRATION = 10
_FETCH = "fetch or fit the forest again"


class ForestCard(BaseModel):
    """What a forest says about itself.

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
    mock_targets
        The targets are made-up numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    mock_targets: bool = False


@dataclass(frozen=True, eq=False)
class GraphScalars:
    """Scalar features of many graphs.

    Parameters
    ----------
    names
        Of the ``p`` columns.
    values
        ``(n, p) float64``; NaN where an element has no published value.
    elements
        Atomic numbers that occur.
    cutoff_radius, max_neighbors
        How the graphs were built.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]
    elements: tuple[int, ...]
    cutoff_radius: float
    max_neighbors: int | None


def graph_scalars(table: GraphTable) -> GraphScalars:
    """Return scalar features of graphs, none of which depends on the size of the cell.

    Parameters
    ----------
    table
        ``n`` graphs. Composition: number of elements, and over the atoms the mean,
        minimum, maximum, range and standard deviation of each elemental property
        (:data:`nanoos_fw.ml.features.ELEMENT_PROPERTIES`). Structure: the same
        statistics of the distance (Å) from an atom to its nearest, its average and
        its farthest neighbour in the graph, and of the number of neighbours.

    Notes
    -----
    The elemental part is the description of L. Ward et al., npj Comput. Mater. 2,
    16028 (2016), on fewer properties.
    """
    starts = table.atom_start[:-1]
    sizes = table.graph_sizes
    numbers = np.asarray(table.numbers)
    elements = element_table()
    degrees = np.asarray(table.degrees).astype(np.int64)
    edge_starts = np.cumsum(degrees) - degrees
    distances = np.asarray(table.distances, dtype=np.float64)
    filled = degrees > 0
    per_atom = np.full((len(_ATOM_QUANTITIES), len(numbers)), np.nan)
    if filled.any():
        begin = edge_starts[filled]
        per_atom[0, filled] = np.minimum.reduceat(distances, begin)
        per_atom[1, filled] = np.add.reduceat(distances, begin) / degrees[filled]
        per_atom[2, filled] = np.maximum.reduceat(distances, begin)
    quantities = {
        name: np.where(elements.known[numbers, i], elements.values[numbers, i], np.nan)
        for i, name in enumerate(elements.names)
    }
    quantities |= dict(zip(_ATOM_QUANTITIES, per_atom, strict=True))
    quantities["n_neighbors"] = degrees.astype(np.float64)
    names, columns = ["n_elements"], [_distinct(numbers, starts, sizes)]
    for name, values in quantities.items():
        mean = np.add.reduceat(values, starts) / sizes
        low = np.minimum.reduceat(values, starts)
        high = np.maximum.reduceat(values, starts)
        deviation = (values - np.repeat(mean, sizes)) ** 2
        std = np.sqrt(np.add.reduceat(deviation, starts) / sizes)
        names += [f"{name}_{statistic}" for statistic in STATISTICS]
        columns += [mean, low, high, high - low, std]
    return GraphScalars(
        tuple(names),
        np.stack(columns, axis=1),
        tuple(np.unique(numbers).tolist()),
        table.cutoff_radius,
        table.max_neighbors,
    )


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
        """Predict one structure; keys as in :meth:`.cgcnn.CGCNNModel.predict`."""
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
        from safetensors.numpy import save

        names = (*_ARRAYS, *((_SCORES,) if len(self.scores) else ()))
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in names}
        text = card_text(self.card)
        header = {"card": text, "card_sha256": _digest(text, arrays)}
        data = save(arrays, metadata={FOREST_FORMAT: canonical_json(header)})
        write_atomic(path, data)
        return sha256_bytes(data)

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
        return _filled(values, self.fill)


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


def fit_forest(
    features: NDArray[np.float64] | GraphScalars | Sequence[Mapping[str, Any]],
    targets: NDArray[np.float64],
    seed: int = 0,
    *,
    names: Sequence[str] | None = None,
    target_property: str = "target",
    unit: str = "",
    n_trees: int = 100,
    max_features: float = 1 / 3,
    min_samples_leaf: int = 1,
    dataset_hash: str = "",
    mock_targets: bool = False,
    n_jobs: int = 1,
) -> ForestModel:
    """Fit a random forest.

    Parameters
    ----------
    features
        Of the training rows: what :func:`graph_scalars` returns, ``(n, p)`` with
        ``names``, or scalars by name. NaN counts as missing.
    targets
        ``(n,)`` in ``unit``.
    seed
        Decides the forest, whatever ``n_jobs`` is.
    names
        Columns to use; None takes all that occur (without ``n_sites``, which depends
        on the choice of the cell).
    target_property, unit, dataset_hash, mock_targets
        For the card.
    n_trees, max_features, min_samples_leaf
        Trees; share of the columns tried at a split; rows of a leaf.
    n_jobs
        Threads of the fit.

    Raises
    ------
    InputError
        If there are fewer than two rows, a column has no value in any row, targets
        are not finite, or the shapes do not fit.

    References
    ----------
    L. Breiman, Mach. Learn. 45, 5 (2001).
    """
    from sklearn.ensemble import RandomForestRegressor

    truth = np.asarray(targets, dtype=np.float64)
    fields: dict[str, Any] = {"source": "scalars"}
    if isinstance(features, GraphScalars):
        columns, values = tuple(features.names), features.values
        fields = {
            "source": GRAPH_SCALARS,
            "cutoff_radius": features.cutoff_radius,
            "max_neighbors": features.max_neighbors,
            "elements": features.elements,
        }
    elif isinstance(features, np.ndarray):
        values = np.asarray(features, dtype=np.float64)
        columns = tuple(names or (f"x{i}" for i in range(values.shape[-1])))
    else:
        found = {name for row in features for name in row} - {"n_sites"}
        columns = tuple(names if names is not None else sorted(found))
        values = scalar_matrix(features, columns)
    if values.shape != (len(truth), len(columns)) or len(truth) < 2 or not columns:
        raise InputError(
            f"features {values.shape} with {len(columns)} names and targets "
            f"{truth.shape} do not make a training set"
        )
    if not np.isfinite(truth).all() or np.isinf(values).any():
        raise InputError("targets must be finite, and features finite or missing")
    empty = np.isnan(values).all(axis=0)
    if empty.any():
        raise InputError(
            f"{columns[int(np.flatnonzero(empty)[0])]} has no value in any row",
            evidence={"columns": [columns[i] for i in np.flatnonzero(empty)]},
            advice="leave the column out",
        )
    fill = np.nanmedian(values, axis=0)
    forest = RandomForestRegressor(
        n_estimators=n_trees,
        max_features=max_features,
        min_samples_leaf=min_samples_leaf,
        random_state=seed,
        n_jobs=n_jobs,
    )
    forest.fit(_filled(values, fill), truth)
    card = ForestCard(
        target_property=target_property,
        unit=unit,
        feature_names=columns,
        n_train=len(truth),
        n_trees=n_trees,
        seed=seed,
        dataset_hash=dataset_hash,
        mock_targets=mock_targets,
        **fields,
    )
    trees: dict[str, Any] = _tree_arrays(forest.estimators_)
    model = ForestModel(card=card, fill=fill, **trees)
    said, spread = _out_of_bag(model.predict_trees(values), forest.estimators_samples_)
    judged = np.isfinite(spread)
    if judged.sum() < _MIN_CALIBRATION:
        return model
    return model.calibrated((said - truth)[judged], spread[judged])


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
        If there is no such file.
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
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        header = json.loads(metadata[FOREST_FORMAT])
        card = ForestCard.model_validate_json(header["card"])
        intact = header["card_sha256"] == _digest(header["card"], arrays)
        chosen = {key: arrays[key] for key in _ARRAYS}
        if _SCORES in arrays:
            chosen[_SCORES] = arrays[_SCORES]
    except (SafetensorError, ValidationError, KeyError, ValueError) as error:
        raise CorruptArtifactError(
            f"{name} is not a forest: {error}", advice=_FETCH
        ) from error
    if not intact:
        raise CorruptArtifactError(
            f"the arrays of {name} do not match their checksum", advice=_FETCH
        )
    fields: dict[str, Any] = dict(chosen)
    return ForestModel(
        card=card,
        model_name=model_name,
        version=model_version,
        checkpoint_sha256=sha256_bytes(data),
        **fields,
    )


# ------------------------------------------------------------------------- private


def _out_of_bag(
    trees: NDArray[np.float64], seen: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and spread over the trees that did not see a row, ``(n,)`` each.

    NaN where fewer than two did not.
    """
    unseen = np.ones(trees.shape, dtype=bool)
    for tree, rows in enumerate(seen):
        unseen[tree, rows] = False
    count = unseen.sum(axis=0).astype(np.float64)
    count[count < 2] = np.nan
    mean = np.where(unseen, trees, 0.0).sum(axis=0) / count
    squares = np.where(unseen, (trees - mean) ** 2, 0.0).sum(axis=0)
    return mean, np.sqrt(squares / (count - 1))


def _tree_arrays(estimators: Sequence[Any]) -> dict[str, NDArray[Any]]:
    parts: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("feature", "threshold", "left", "right", "value")
    }
    starts = [0]
    for estimator in estimators:
        tree = estimator.tree_
        leaf = tree.children_left < 0
        parts["feature"].append(np.where(leaf, -1, tree.feature))
        parts["threshold"].append(np.where(leaf, 0.0, tree.threshold))
        parts["left"].append(np.where(leaf, -1, tree.children_left + starts[-1]))
        parts["right"].append(np.where(leaf, -1, tree.children_right + starts[-1]))
        parts["value"].append(tree.value[:, 0, 0])
        starts.append(starts[-1] + tree.node_count)
    whole = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    for name in ("feature", "left", "right"):
        whole[name] = whole[name].astype(np.int32)
    return {**whole, "tree_start": np.array(starts, dtype=np.int64)}


def _filled(
    values: NDArray[np.float64], fill: NDArray[np.float64]
) -> NDArray[np.float32]:
    filled = np.where(np.isnan(values), fill, values)
    return np.asarray(filled, dtype=np.float32)


def _distinct(
    numbers: NDArray[np.uint8], starts: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the number of elements of each graph."""
    seen = np.zeros((len(starts), 119), dtype=bool)
    seen[np.repeat(np.arange(len(starts)), sizes), numbers] = True
    return np.asarray(seen.sum(axis=1), dtype=np.float64)


def _check_names(given: Sequence[str], wanted: Sequence[str]) -> None:
    if tuple(given) != tuple(wanted):
        missing = sorted(set(wanted) - set(given))
        raise InputError(
            "the features are not those of the forest",
            evidence={"missing": missing[:10], "n_given": len(given)},
            advice="make them with the release that fitted the forest, or fit it again",
        )


def _digest(card: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(card.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}{array.shape}{array.dtype.str}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
