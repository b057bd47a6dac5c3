"""How good predictions are, and what a model without structure would reach."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.ml.batches import GraphTable


def regression_metrics(
    truth: NDArray[np.float64],
    mean: NDArray[np.float64],
    std: NDArray[np.float64] | None = None,
) -> dict[str, float | int | None]:
    """Return MSE, MAE, RMSE and R² of predictions.

    Parameters
    ----------
    truth, mean
        ``(n,)`` true and predicted values, in the unit of the target.
    std
        ``(n,)`` predicted uncertainty; adds ``within_1_std`` and ``within_2_std``,
        the shares of rows whose error is smaller (0.683 and 0.954 for an honest
        normal error bar).

    Returns
    -------
    dict
        Values are None where they are not defined: all of them without rows, ``r2``
        also with fewer than two different true values.
    """
    n = len(truth)
    metrics: dict[str, float | int | None] = {"n": n}
    if n == 0:
        return metrics | dict.fromkeys(("mse", "mae", "rmse", "r2"))
    error = mean - truth
    mse = float(np.mean(error**2))
    metrics |= {
        "mse": mse,
        "mae": float(np.mean(np.abs(error))),
        "rmse": float(np.sqrt(mse)),
        "r2": r_squared(mse, truth),
    }
    if std is not None:
        metrics["within_1_std"] = float(np.mean(np.abs(error) <= std))
        metrics["within_2_std"] = float(np.mean(np.abs(error) <= 2 * std))
    return metrics


def r_squared(mse: float, truth: NDArray[np.float64]) -> float | None:
    """Return one minus the mean squared error over the variance of the truth.

    None with fewer than two different values: their variance is zero, or what rounding
    makes of it.
    """
    if not len(truth) or np.ptp(truth) == 0.0:
        return None
    return 1.0 - mse / float(np.var(truth))


def classification_metrics(
    truth: NDArray[np.float64], probability: NDArray[np.float64]
) -> dict[str, float | int | None]:
    """Return accuracy, area under the ROC curve and mean negative log-likelihood.

    Parameters
    ----------
    truth
        ``(n,)``, 0 or 1.
    probability
        ``(n,)`` of class 1.

    Returns
    -------
    dict
        ``accuracy`` at 0.5, ``roc_auc``, ``nll``; None where not defined.
    """
    n_ones = int((truth > 0.5).sum())
    n_zeros = len(truth) - n_ones
    if len(truth) == 0:
        return {"accuracy": None, "roc_auc": None, "nll": None}
    likely = np.where(truth > 0.5, probability, 1.0 - probability)
    auc = None
    if n_ones and n_zeros:
        # Share of pairs in the right order, ties count half (Mann and Whitney).
        _, place, count = np.unique(
            probability, return_inverse=True, return_counts=True
        )
        rank = (np.cumsum(count) - (count - 1) / 2)[place]
        above = rank[truth > 0.5].sum() - n_ones * (n_ones + 1) / 2
        auc = float(above / (n_ones * n_zeros))
    return {
        "accuracy": float(((probability > 0.5) == (truth > 0.5)).mean()),
        "roc_auc": auc,
        "nll": float(-np.log(np.maximum(likely, 1e-300)).mean()),
    }


def element_errors(
    fractions: NDArray[np.float64], error: NDArray[np.float64]
) -> dict[str, dict[str, float | int]]:
    """Return rows and mean absolute error of the structures that hold an element.

    Parameters
    ----------
    fractions
        ``(n, 119)``, see :func:`element_fractions`.
    error
        ``(n,)``.

    Returns
    -------
    dict
        ``n`` and ``mae`` by symbol, by atomic number.
    """
    from pymatgen.core.periodic_table import Element

    found: dict[str, dict[str, float | int]] = {}
    for z in np.flatnonzero(fractions.any(axis=0)).tolist():
        holds = np.abs(error[fractions[:, z] > 0])
        found[Element.from_Z(z).symbol] = {"n": len(holds), "mae": float(holds.mean())}
    return found


def calibrate(
    truth: NDArray[np.float64],
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
) -> float:
    """Return the factor on ``std`` that makes 68.3 % of the errors smaller than it.

    A quantile, since a mean of squares would hang on the one row whose members
    happen to agree. 1 if no row has a spread.
    """
    spread = std > 0
    if not spread.any():
        return 1.0
    ratios = np.abs(mean - truth)[spread] / std[spread]
    return float(max(np.quantile(ratios, 0.683), 1e-3))


def element_fractions(table: GraphTable) -> NDArray[np.float64]:
    """Return the atomic fraction of each element, ``(n_graphs, 119)``, column Z."""
    sizes = table.graph_sizes
    graph = np.repeat(np.arange(len(table)), sizes)
    fractions = np.zeros((len(table), 119))
    np.add.at(fractions, (graph, np.asarray(table.numbers)), 1.0)
    return fractions / sizes[:, None]


def fit_element_reference(
    fractions: NDArray[np.float64], targets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Fit target = sum over elements of fraction times reference.

    Parameters
    ----------
    fractions
        ``(n, 119)`` of the training rows.
    targets
        ``(n,)`` in the unit of the target.

    Returns
    -------
    ``(119,) float64``
        The least-squares reference of each element in the unit of the target, the
        one nearest to the mean of the targets where rows do not decide. Elements
        without rows get the mean.
    """
    mean = targets.mean()
    solution, *_ = np.linalg.lstsq(fractions, targets - mean, rcond=1e-8)
    return np.asarray(solution + mean)
