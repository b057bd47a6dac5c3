"""Fit random forests by scikit-learn, and keep them as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.ml.forest import ForestCard, ForestModel, filled_features, scalar_matrix
from nanoos_fw.ml.graph_scalars import GRAPH_SCALARS, GraphScalars

_MIN_CALIBRATION = 10


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
    forest.fit(filled_features(values, fill), truth)
    card = ForestCard(
        target_property=target_property,
        unit=unit,
        feature_names=columns,
        n_train=len(truth),
        n_trees=n_trees,
        seed=seed,
        dataset_hash=dataset_hash,
        mock_targets=mock_targets,
        feature_version=FEATURE_VERSION,
        **fields,
    )
    trees: dict[str, Any] = _tree_arrays(forest.estimators_)
    model = ForestModel(card=card, fill=fill, **trees)
    said, spread = _out_of_bag(model.predict_trees(values), forest.estimators_samples_)
    judged = np.isfinite(spread)
    if judged.sum() < _MIN_CALIBRATION:
        return model
    return model.calibrated((said - truth)[judged], spread[judged])


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
