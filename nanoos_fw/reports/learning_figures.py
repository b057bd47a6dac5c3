"""Figures of labels, training and test errors, in plain JSON values.

Text from users passes through :mod:`nanoos_fw.reports.formatting`, which escapes it:
plotly reads ``<a>`` and ``<b>`` in labels.
"""

from __future__ import annotations

import numpy as np
from markupsafe import Markup, escape

from nanoos_fw.reports.data import (
    CalibrationCurve,
    Evaluation,
    Labels,
    Training,
)
from nanoos_fw.reports.drawing import (
    DASHES,
    MAX_POINTS,
    MAX_SCATTER,
    MUTED,
    OTHER,
    PALETTE,
    Figure,
    Trace,
    all_values,
    bin_edges,
    compact,
    log_axis,
    reference_line,
    rounded,
    stride,
    thinned,
)
from nanoos_fw.reports.formatting import formula, number, percent, prototype
from nanoos_fw.reports.statistics import WITHIN_ONE_SIGMA, WITHIN_TWO_SIGMA

# Plain, then hatched colours, and grey for the rest.
_MAX_PROTOTYPES = 2 * len(PALETTE) - 1


def labels_figure(part: Labels) -> Figure:
    """Return the stacked histogram of label energies, one colour per prototype."""
    groups = sorted(
        ((name, np.asarray(v)) for name, v in part.energies_by_prototype.items() if v),
        key=lambda item: (-len(item[1]), item[0]),
    )
    shown = groups if len(groups) <= _MAX_PROTOTYPES + 1 else groups[:_MAX_PROTOTYPES]
    rest = groups[len(shown) :]
    everything = np.concatenate([values for _, values in groups])
    edges = bin_edges(everything)
    width = float(edges[1] - edges[0])
    centres = compact((edges[:-1] + edges[1:]) / 2)

    named = [(str(prototype(name)), values) for name, values in shown]
    if rest:
        merged = np.concatenate([values for _, values in rest])
        named.append((f"{len(rest)} other prototypes", merged))
    data = [
        {
            "type": "bar",
            "name": name,
            "x": centres,
            "y": np.histogram(values, edges)[0].tolist(),
            "width": width,
            "marker": {
                "color": OTHER
                if rest and i == len(named) - 1
                else PALETTE[i % len(PALETTE)],
                "pattern": {
                    "shape": "/" if i >= len(PALETTE) else "",
                    "fillmode": "overlay",
                    "fgcolor": "#ffffff",
                    "size": 6,
                    "solidity": 0.35,
                },
                "line": {"color": "#ffffff", "width": 0.5},
            },
            "hovertemplate": f"%{{x:.3f}} ± {width / 2:.3f} eV/atom: %{{y}}",
        }
        for i, (name, values) in enumerate(named)
    ]
    layout = {
        "barmode": "stack",
        "bargap": 0,
        "xaxis": {"title": {"text": "Formation energy (eV/atom)"}},
        "yaxis": {"title": {"text": "Number of structures"}},
        "legend": {"traceorder": "normal"},
        "shapes": [reference_line("x", 0.0)],
    }
    caption = Markup(
        "Formation energies of the labelled structures by prototype, stacked; bins of "
        "{} eV/atom. The dotted line marks zero, the energy of the elements. "
        "Labels: {}."
    ).format(number(width, 3), part.method)
    return Figure(
        "labels",
        f"Histogram of {len(everything)} formation energies in eV/atom, by prototype",
        caption,
        data,
        layout,
    )


def learning_figures(part: Training) -> list[Figure]:
    """Return training loss and validation MAE against epoch, one line per member."""
    loss, validation = [], []
    for i, member in enumerate(part.members):
        step = stride(len(member.epochs), MAX_POINTS)
        best = member.epochs.index(member.best_epoch)
        line: Trace = {
            "type": "scatter",
            "mode": "lines",
            "name": str(member.member),
            "legendgroup": str(member.member),
            "x": list(member.epochs[::step]),
            "line": {
                "color": PALETTE[i % len(PALETTE)],
                "dash": DASHES[i % len(DASHES)],
                "width": 1.6,
            },
        }
        mark: Trace = {
            "type": "scatter",
            "mode": "markers",
            "name": f"Member {member.member}, best epoch",
            "legendgroup": str(member.member),
            "showlegend": False,
            "x": [member.best_epoch],
            "marker": {
                "color": PALETTE[i % len(PALETTE)],
                "size": 10,
                "symbol": "circle",
                "line": {"color": "#ffffff", "width": 1.5},
            },
        }
        scale = part.quantity.error_scale
        errors = [scale * value for value in member.validation_mae]
        loss.append({**line, "y": rounded(member.train_loss[::step])})
        loss.append({**mark, "y": rounded([member.train_loss[best]])})
        validation.append({**line, "y": rounded(errors[::step])})
        validation.append({**mark, "y": rounded([errors[best]])})
    epochs = {"title": {"text": "Epoch"}}
    legend = {"title": {"text": "Member ", "side": "left"}, "tracegroupgap": 0}
    n = len(part.members)
    return [
        Figure(
            "training-loss",
            f"Training loss against epoch for {n} ensemble members",
            Markup(
                "Training loss ({}) per epoch, logarithmic scale. Dots mark the epoch "
                "whose weights were kept."
            ).format(part.loss_name),
            loss,
            {
                "xaxis": epochs,
                "legend": legend,
                "yaxis": log_axis("Training loss", all_values(loss)),
            },
            340,
        ),
        Figure(
            "validation-error",
            f"Validation error against epoch for {n} ensemble members",
            Markup(
                "Mean absolute error on the {} validation structures per epoch, "
                "logarithmic scale. Dots mark the epoch whose weights were kept."
            ).format(number(part.n_validation)),
            validation,
            {
                "xaxis": epochs,
                "legend": legend,
                "yaxis": log_axis(
                    f"Validation MAE{part.quantity.in_unit(error=True)}",
                    all_values(validation),
                ),
            },
            340,
        ),
    ]


def parity_figure(part: Evaluation) -> Figure:
    """Return predictions against targets on the test part, with error bars."""
    n, what = len(part.targets), part.quantity
    digits, unit = ".3f" if what.is_energy else ".4g", escape(what.unit)
    step = stride(n, MAX_SCATTER)
    low = min(*part.targets, *part.predictions)
    high = max(*part.targets, *part.predictions)
    pad = 0.05 * (high - low) or 0.05
    ends = compact([low - pad, high + pad])
    points: Trace = {
        "type": "scatter",
        "mode": "markers",
        "name": "Test structure",
        "x": compact(part.targets[::step]),
        "y": compact(part.predictions[::step]),
        "marker": {
            "color": PALETTE[0],
            "size": 6,
            "opacity": 0.75,
            "line": {"color": "#ffffff", "width": 0.5},
        },
        "hovertemplate": f"computed %{{x:{digits}}}, predicted %{{y:{digits}}} {unit}"
        "<extra>%{text}</extra>",
        "text": [str(formula(f)) for f in part.formulas[::step]]
        if part.formulas
        else "",
    }
    bars = ""
    if part.uncertainties is not None:
        points["error_y"] = {
            "type": "data",
            "array": compact(part.uncertainties[::step]),
            "color": "rgba(0,114,178,.35)",
            "thickness": 1,
            "width": 0,
        }
        bars = f" Bars: ± one {part.uncertainty_name}."
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "name": "Perfect prediction",
        "x": ends,
        "y": ends,
        "line": {"color": MUTED, "width": 1, "dash": "dot"},
        "hoverinfo": "skip",
    }
    layout = {
        "xaxis": {
            "title": {"text": str(escape(what.axis("Computed")))},
            "range": ends,
            "constrain": "domain",
        },
        "yaxis": {
            "title": {"text": str(escape(what.axis("Predicted")))},
            "range": ends,
            "scaleanchor": "x",
            "constrain": "domain",
        },
    }
    caption = Markup(
        "Predicted against computed {} of the {} test structures.{}{}"
    ).format(what.name, number(n), bars, thinned(n, step, "structure"))
    return Figure(
        "parity",
        f"Parity plot of {n} test structures, computed against predicted"
        f"{what.in_unit()}",
        caption,
        [diagonal, points],
        layout,
        430,
        square=True,
    )


def uncertainty_figure(part: Evaluation) -> Figure:
    """Return the test errors against the stated standard deviation."""
    if part.uncertainties is None:
        return _residual_figure(part)
    n, what = len(part.targets), part.quantity
    digits, unit = ".1f" if what.is_energy else ".3g", escape(what.error_unit)
    step = stride(n, MAX_SCATTER)
    sigma = what.error_scale * np.asarray(part.uncertainties)
    errors = what.error_scale * np.abs(np.subtract(part.predictions, part.targets))
    in_unit = escape(what.in_unit(error=True))
    top = float(sigma.max()) * 1.05 or 1.0
    lines = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": compact([0.0, top]),
            "y": compact([0.0, factor * top]),
            "line": {"color": colour, "width": 1.4, "dash": dash},
            "hoverinfo": "skip",
        }
        for name, factor, colour, dash in (
            ("|error| = σ", 1, MUTED, "solid"),
            ("|error| = 2σ", 2, PALETTE[1], "dash"),
        )
    ]
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": "Test structure",
        "x": compact(sigma[::step]),
        "y": compact(errors[::step]),
        "marker": {
            "color": PALETTE[0],
            "size": 6,
            "opacity": 0.75,
            "line": {"color": "#ffffff", "width": 0.5},
        },
        "hovertemplate": f"σ %{{x:{digits}}}, |error| %{{y:{digits}}} {unit}"
        "<extra>%{text}</extra>",
        "text": [str(formula(f)) for f in part.formulas[::step]]
        if part.formulas
        else "",
    }
    layout = {
        "xaxis": {
            "title": {"text": f"Stated uncertainty σ{in_unit}"},
            "range": [0, top],
        },
        "yaxis": {
            "title": {"text": f"|Predicted − computed|{in_unit}"},
            "rangemode": "tozero",
            "range": [0, 1.05 * (float(errors.max()) or 1.0)],
        },
    }
    caption = Markup(
        "Size of the test error against the uncertainty σ, the {}. For well-calibrated "
        "Gaussian errors {} of the points lie below the solid line and {} below the "
        "dashed one.{}"
    ).format(
        part.uncertainty_name or "stated uncertainty",
        percent(WITHIN_ONE_SIGMA),
        percent(WITHIN_TWO_SIGMA),
        thinned(n, step, "structure"),
    )
    return Figure(
        "uncertainty",
        f"Absolute error against stated uncertainty for {n} test structures"
        f"{what.in_unit(error=True)}",
        caption,
        [points, *lines],
        layout,
        430,
        square=True,
    )


def calibration_figure(part: CalibrationCurve, n_test: int) -> Figure:
    """Return the observed against the stated coverage of intervals."""
    levels = np.asarray(part.levels)
    grid = np.linspace(0.0, 1.0, 51)
    # Rows of the test part vary, and those the intervals were made from as well.
    error = np.sqrt(grid * (1 - grid) * (1 / n_test + 1 / (part.n_calibration + 2)))
    low, high = np.clip(grid - 2 * error, 0, 1), np.clip(grid + 2 * error, 0, 1)
    band: Trace = {
        "type": "scatter",
        "mode": "lines",
        "name": "Two standard errors",
        "x": compact(np.concatenate([grid, grid[::-1]])),
        "y": compact(np.concatenate([low, high[::-1]])),
        "fill": "toself",
        "fillcolor": "rgba(120,120,120,.18)",
        "line": {"width": 0},
        "hoverinfo": "skip",
    }
    diagonal: Trace = {
        "type": "scatter",
        "mode": "lines",
        "name": "Honest intervals",
        "x": [0.0, 1.0],
        "y": [0.0, 1.0],
        "line": {"color": MUTED, "width": 1, "dash": "dot"},
        "hoverinfo": "skip",
    }
    curve: Trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "Test structures",
        "x": compact(levels),
        "y": compact(part.observed),
        "line": {"color": PALETTE[0], "width": 1.6},
        "marker": {"color": PALETTE[0], "size": 6},
        "hovertemplate": "stated %{x:.2f}, observed %{y:.3f}<extra></extra>",
    }
    caption = Markup(
        "Share of the {} test structures inside the conformal interval against its "
        "stated coverage; intervals go by {} validation structures. Honest intervals "
        "stay in the grey band 19 times out of 20."
    ).format(number(n_test), number(part.n_calibration))
    axis = {"range": [0, 1]}
    return Figure(
        "calibration",
        f"Observed against stated coverage of intervals on {n_test} test structures",
        caption,
        [band, diagonal, curve],
        {
            "xaxis": {"title": {"text": "Stated coverage"}, **axis},
            "yaxis": {"title": {"text": "Observed coverage"}, **axis},
        },
        430,
        square=True,
    )


def _residual_figure(part: Evaluation) -> Figure:
    what = part.quantity
    in_unit = escape(what.in_unit(error=True))
    digits, unit = ".1f" if what.is_energy else ".3g", escape(what.error_unit)
    residuals = what.error_scale * np.subtract(part.predictions, part.targets)
    edges = bin_edges(residuals)
    data = [
        {
            "type": "bar",
            "x": compact((edges[:-1] + edges[1:]) / 2),
            "y": np.histogram(residuals, edges)[0].tolist(),
            "width": float(edges[1] - edges[0]),
            "marker": {"color": PALETTE[0], "line": {"color": "#ffffff", "width": 0.5}},
            "hovertemplate": f"%{{x:{digits}}} {unit}: %{{y}}<extra></extra>",
        }
    ]
    layout = {
        "bargap": 0,
        "xaxis": {"title": {"text": f"Predicted − computed{in_unit}"}},
        "yaxis": {"title": {"text": "Number of test structures"}},
        "shapes": [reference_line("x", 0.0)],
    }
    return Figure(
        "residuals",
        f"Histogram of {len(residuals)} test residuals{what.in_unit(error=True)}",
        Markup(
            "Residuals on the test part. The model states no uncertainty, so its "
            "calibration cannot be judged."
        ),
        data,
        layout,
        430,
        square=True,
    )
