"""The figures of a report as plotly traces and layouts, in plain JSON values.

Text from users passes through :mod:`nanoos_fw.reports.formatting`, which escapes it:
plotly reads ``<a>`` and ``<b>`` in labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike

from nanoos_fw.reports.data import (
    Discovery,
    Evaluation,
    Labels,
    MDPanel,
    Ranking,
    RDFCurves,
    ThermoSeries,
    Training,
)
from nanoos_fw.reports.formatting import formula, number, prototype
from nanoos_fw.reports.statistics import discovery_result

Trace = dict[str, Any]
Layout = dict[str, Any]

# Okabe and Ito's palette without its yellow, safe for colour-blind readers.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
_INK, _MUTED, _GRID, _OTHER = "#1f2933", "#52606d", "#e4e9ef", "#9aa5b1"
FONT = (
    'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, '
    '"Liberation Sans", sans-serif'
)

_MAX_POINTS = 1500
_MAX_SCATTER = 3000
_MAX_PROTOTYPES = len(PALETTE) - 1
_HISTOGRAM_BINS = 40

_AXIS = {
    "showline": True,
    "linecolor": _OTHER,
    "linewidth": 1,
    "ticks": "outside",
    "ticklen": 4,
    "tickcolor": _OTHER,
    "gridcolor": _GRID,
    "zeroline": False,
    "automargin": True,
    "separatethousands": True,
    "exponentformat": "none",
    "title": {"standoff": 8, "font": {"size": 13}},
}

# Shared by all figures, embedded once.
TEMPLATE: Layout = {
    "layout": {
        "font": {"family": FONT, "size": 12, "color": _INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "#ffffff",
        "colorway": list(PALETTE),
        "margin": {"l": 58, "r": 14, "t": 14, "b": 46},
        "separators": ".\N{NARROW NO-BREAK SPACE}",
        "hoverlabel": {"font": {"family": FONT, "size": 12}},
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "font": {"size": 12},
        },
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
}


@dataclass(frozen=True)
class Figure:
    """One figure.

    Parameters
    ----------
    name
        Unique in the report; becomes an HTML id.
    label
        One sentence for readers who do not see it.
    caption
        Shown below it.
    data, layout
        Plotly traces and layout, JSON values.
    height
        Pixels.
    """

    name: str
    label: str
    caption: Markup
    data: list[Trace]
    layout: Layout
    height: int = 380


def labels_figure(part: Labels) -> Figure:
    """Return the stacked histogram of label energies, one colour per prototype."""
    groups = sorted(
        ((name, np.asarray(v)) for name, v in part.energies_by_prototype.items() if v),
        key=lambda item: (-len(item[1]), item[0]),
    )
    shown = groups if len(groups) <= _MAX_PROTOTYPES + 1 else groups[:_MAX_PROTOTYPES]
    rest = groups[len(shown) :]
    everything = np.concatenate([values for _, values in groups])
    edges = _bin_edges(everything)
    width = float(edges[1] - edges[0])
    centres = _compact((edges[:-1] + edges[1:]) / 2)

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
                "color": _OTHER if rest and i == len(named) - 1 else PALETTE[i],
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
        "shapes": [_line("x", 0.0)],
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
        step = _stride(len(member.epochs), _MAX_POINTS)
        best = member.epochs.index(member.best_epoch)
        line: Trace = {
            "type": "scatter",
            "mode": "lines",
            "name": f"Member {member.member}",
            "legendgroup": str(member.member),
            "x": list(member.epochs[::step]),
            "line": {
                "color": PALETTE[i % len(PALETTE)],
                "dash": _DASHES[i % len(_DASHES)],
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
        milli_mae = [1000 * value for value in member.validation_mae]
        loss.append({**line, "y": _significant(member.train_loss[::step])})
        loss.append({**mark, "y": _significant([member.train_loss[best]])})
        validation.append({**line, "y": _significant(milli_mae[::step])})
        validation.append({**mark, "y": _significant([milli_mae[best]])})
    epochs = {"title": {"text": "Epoch"}}
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
                "yaxis": _log_axis("Training loss", _values(loss)),
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
                "yaxis": _log_axis("Validation MAE (meV/atom)", _values(validation)),
            },
            340,
        ),
    ]


def parity_figure(part: Evaluation) -> Figure:
    """Return predictions against targets on the test part, with error bars."""
    n = len(part.targets)
    step = _stride(n, _MAX_SCATTER)
    low = min(*part.targets, *part.predictions)
    high = max(*part.targets, *part.predictions)
    pad = 0.05 * (high - low) or 0.05
    ends = _compact([low - pad, high + pad])
    points: Trace = {
        "type": "scatter",
        "mode": "markers",
        "name": "Test structure",
        "x": _compact(part.targets[::step]),
        "y": _compact(part.predictions[::step]),
        "marker": {
            "color": PALETTE[0],
            "size": 6,
            "opacity": 0.75,
            "line": {"color": "#ffffff", "width": 0.5},
        },
        "hovertemplate": "computed %{x:.3f}, predicted %{y:.3f} eV/atom"
        "<extra>%{text}</extra>",
        "text": [str(formula(f)) for f in part.formulas[::step]]
        if part.formulas
        else "",
    }
    bars = ""
    if part.uncertainties is not None:
        points["error_y"] = {
            "type": "data",
            "array": _compact(part.uncertainties[::step]),
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
        "line": {"color": _MUTED, "width": 1, "dash": "dot"},
        "hoverinfo": "skip",
    }
    layout = {
        "xaxis": {
            "title": {"text": "Computed formation energy (eV/atom)"},
            "range": ends,
            "constrain": "domain",
        },
        "yaxis": {
            "title": {"text": "Predicted formation energy (eV/atom)"},
            "range": ends,
            "scaleanchor": "x",
            "constrain": "domain",
        },
    }
    caption = Markup(
        "Predicted against computed formation energy of the {} test structures.{}{}"
    ).format(number(n), bars, _thinned(n, step, "structure"))
    return Figure(
        "parity",
        f"Parity plot of {n} test structures, computed against predicted, eV/atom",
        caption,
        [diagonal, points],
        layout,
        430,
    )


def uncertainty_figure(part: Evaluation) -> Figure:
    """Return the test errors against the stated standard deviation."""
    if part.uncertainties is None:
        return _residual_figure(part)
    n = len(part.targets)
    step = _stride(n, _MAX_SCATTER)
    sigma = 1000 * np.asarray(part.uncertainties)
    errors = 1000 * np.abs(np.subtract(part.predictions, part.targets))
    top = float(sigma.max()) * 1.05 or 1.0
    lines = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": _compact([0.0, top]),
            "y": _compact([0.0, factor * top]),
            "line": {"color": colour, "width": 1.4, "dash": dash},
            "hoverinfo": "skip",
        }
        for name, factor, colour, dash in (
            ("|error| = σ", 1, _MUTED, "solid"),
            ("|error| = 2σ", 2, PALETTE[1], "dash"),
        )
    ]
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": "Test structure",
        "x": _compact(sigma[::step]),
        "y": _compact(errors[::step]),
        "marker": {
            "color": PALETTE[0],
            "size": 6,
            "opacity": 0.75,
            "line": {"color": "#ffffff", "width": 0.5},
        },
        "hovertemplate": "σ %{x:.1f}, |error| %{y:.1f} meV/atom<extra>%{text}</extra>",
        "text": [str(formula(f)) for f in part.formulas[::step]]
        if part.formulas
        else "",
    }
    layout = {
        "xaxis": {
            "title": {"text": "Stated uncertainty σ (meV/atom)"},
            "range": [0, top],
        },
        "yaxis": {
            "title": {"text": "|Predicted − computed| (meV/atom)"},
            "rangemode": "tozero",
            "range": [0, 1.05 * max(float(errors.max()), 1e-6)],
        },
    }
    caption = Markup(
        "Size of the test error against the uncertainty σ, the {}. For well-calibrated "
        "Gaussian errors 68 % of the points lie below the solid line and 95 % below "
        "the dashed one.{}"
    ).format(
        part.uncertainty_name or "stated uncertainty", _thinned(n, step, "structure")
    )
    return Figure(
        "uncertainty",
        f"Absolute error against stated uncertainty for {n} test structures, meV/atom",
        caption,
        [points, *lines],
        layout,
        430,
    )


def _residual_figure(part: Evaluation) -> Figure:
    residuals = 1000 * np.subtract(part.predictions, part.targets)
    edges = _bin_edges(residuals)
    data = [
        {
            "type": "bar",
            "x": _compact((edges[:-1] + edges[1:]) / 2),
            "y": np.histogram(residuals, edges)[0].tolist(),
            "width": float(edges[1] - edges[0]),
            "marker": {"color": PALETTE[0], "line": {"color": "#ffffff", "width": 0.5}},
            "hovertemplate": "%{x:.1f} meV/atom: %{y}<extra></extra>",
        }
    ]
    layout = {
        "bargap": 0,
        "xaxis": {"title": {"text": "Predicted − computed (meV/atom)"}},
        "yaxis": {"title": {"text": "Number of test structures"}},
        "shapes": [_line("x", 0.0)],
    }
    return Figure(
        "residuals",
        f"Histogram of {len(residuals)} test residuals in meV/atom",
        Markup(
            "Residuals on the test part. The model states no uncertainty, so its "
            "calibration cannot be judged."
        ),
        data,
        layout,
        430,
    )


def top_figure(part: Ranking) -> Figure | None:
    """Return predicted and LAMMPS energies of the relaxed candidates, if any."""
    rows = [row for row in part.candidates if isinstance(row.lammps, float)]
    if not rows:
        return None
    names = [f"{row.rank}. {formula(row.formula)}" for row in rows]
    computed = [row.lammps for row in rows if isinstance(row.lammps, float)]
    predicted: Trace = {
        "type": "scatter",
        "mode": "markers",
        "name": "Predicted",
        "x": _compact([row.predicted for row in rows]),
        "y": names,
        "marker": {"color": PALETTE[0], "size": 10, "symbol": "circle"},
        "hovertemplate": "%{y}: %{x:.3f} eV/atom",
    }
    if all(row.uncertainty is not None for row in rows):
        predicted["error_x"] = {
            "type": "data",
            "array": _significant([row.uncertainty or 0.0 for row in rows]),
            "color": PALETTE[0],
            "thickness": 1.5,
            "width": 4,
        }
    links: Trace = {
        "type": "scatter",
        "mode": "lines",
        "showlegend": False,
        "hoverinfo": "skip",
        "line": {"color": "#cbd2d9", "width": 4},
        "x": [],
        "y": [],
    }
    for name, row, value in zip(names, rows, computed, strict=True):
        links["x"] += [*_significant([row.predicted, value]), None]
        links["y"] += [name, name, None]
    relaxed = {
        "type": "scatter",
        "mode": "markers",
        "name": "LAMMPS, relaxed",
        "x": _compact(computed),
        "y": names,
        "marker": {
            "color": "#ffffff",
            "size": 10,
            "symbol": "diamond",
            "line": {"color": PALETTE[1], "width": 2},
        },
        "hovertemplate": "%{y}: %{x:.3f} eV/atom",
    }
    layout = {
        "xaxis": {"title": {"text": "Formation energy (eV/atom)"}},
        "yaxis": {
            "autorange": "reversed",
            "type": "category",
            "tickfont": {"size": 13},
            "ticks": "",
        },
        "margin": {"l": 20},
    }
    return Figure(
        "top",
        "Predicted and LAMMPS formation energies of the relaxed candidates, eV/atom",
        Markup(
            "Prediction (dots; bars ± one stated uncertainty) and LAMMPS value after "
            "relaxation (diamonds) of the {} best-ranked candidates with both values."
        ).format(number(len(rows))),
        [links, predicted, relaxed],
        layout,
        max(240, 96 + 30 * len(rows)),
    )


def discovery_figure(part: Discovery) -> Figure:
    """Return the number of truly best candidates found against candidates tried.

    Notes
    -----
    In a random order the number found after n of N tries is hypergeometric: mean
    k n/N, variance k (n/N)(1 - n/N)(N - k)/(N - 1).
    """
    result = discovery_result(part)
    n, k = result.n, result.k
    tried = np.unique(np.geomspace(1, n, 80).round().astype(int))
    fraction = tried / n
    mean = k * fraction
    deviation = np.sqrt(k * fraction * (1 - fraction) * (n - k) / max(n - 1, 1))
    upper = np.minimum(mean + 2 * deviation, np.minimum(tried, k))
    lower = np.maximum(mean - 2 * deviation, np.maximum(0, tried - (n - k)))
    model_x = [1, *result.ranks, n]
    model_y = [0, *range(1, k + 1), k]
    if result.ranks[0] == 1:
        model_x, model_y = model_x[1:], model_y[1:]
    x = tried.tolist()
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Random order, ± 2 standard deviations",
            "x": x + x[::-1],
            "y": _compact([*upper, *lower[::-1]]),
            "fill": "toself",
            "fillcolor": "rgba(154,165,177,.3)",
            "line": {"width": 0},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Random order, mean",
            "x": x,
            "y": _compact(mean),
            "line": {"color": _MUTED, "width": 1.4, "dash": "dash"},
            "hovertemplate": "%{x} tried: %{y:.2f} found",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Perfect order",
            "x": [*range(1, k + 1), n],
            "y": [*range(1, k + 1), k],
            "line": {"color": PALETTE[2], "width": 1.4, "dash": "dot", "shape": "hv"},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Model's order",
            "x": model_x,
            "y": model_y,
            "line": {"color": PALETTE[0], "width": 2.4, "shape": "hv"},
            "hovertemplate": "%{x} tried: %{y} found",
        },
    ]
    layout = {
        "xaxis": {
            "title": {"text": "Candidates tried, in predicted order"},
            **_decade_axis(1, n),
        },
        "yaxis": {
            "title": {"text": f"Of the true top {k} found"},
            "range": [0, k * 1.04],
            "dtick": max(1, math.ceil(k / 10)),
        },
    }
    return Figure(
        "discovery",
        f"Number of the true top {k} found against number of candidates tried",
        Markup(
            "How many of the {k} candidates with the lowest computed formation energy "
            "are found when {n} candidates are tried in the model's order; logarithmic "
            "scale. Population: {population}."
        ).format(k=k, n=number(n), population=part.population),
        data,
        layout,
        400,
    )


def md_figure(panel: MDPanel, name: str) -> Figure:
    """Return temperature, pressure, volume and potential energy against time."""
    step = _stride(len(panel.time_ps), _MAX_POINTS)
    time = _compact(panel.time_ps[::step])
    start, end = panel.time_ps[0], panel.time_ps[-1]
    production = max(start, min(panel.equilibration_ps, end))
    rows: list[tuple[str, ThermoSeries, float]] = [
        ("Temperature<br>(K)", panel.temperature_k, 1.0),
        ("Pressure<br>(bar)", panel.pressure_bar, 1.0),
        ("Volume<br>(Å³)", panel.volume_a3, 1.0),
        ("Potential energy<br>(eV/atom)", panel.potential_energy_ev, panel.n_atoms),
    ]
    data: list[Trace] = []
    layout: Layout = {
        "showlegend": True,
        "margin": {"l": 74, "t": 10},
        "shapes": [],
        "xaxis": {
            "title": {"text": "Time (ps)"},
            "anchor": "y4",
            "range": [start, end],
        },
    }
    gap = 0.045
    height = (1 - gap * (len(rows) - 1)) / len(rows)
    for i, (title, series, divisor) in enumerate(rows):
        axis = "y" if i == 0 else f"y{i + 1}"
        top = 1 - i * (height + gap)
        layout["yaxis" if i == 0 else f"yaxis{i + 1}"] = {
            "domain": [max(0.0, top - height), top],
            "title": {"text": title, "font": {"size": 12}, "standoff": 6},
            "nticks": 5,
            "anchor": "x",
        }
        unit = title.replace("<br>", " ")
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "Simulation",
                "legendgroup": "simulation",
                "showlegend": i == 0,
                "x": time,
                "y": _compact(np.asarray(series.values[::step]) / divisor),
                "yaxis": axis,
                "line": {"color": PALETTE[0], "width": 1},
                "hovertemplate": f"%{{x}} ps: %{{y}}<extra>{unit}</extra>",
            }
        )
        # Reference lines as traces: they get a legend entry, shapes do not.
        average = getattr(series.average, "mean", None)
        references = (
            ("Average", average, production, PALETTE[1], "solid"),
            ("Set point", series.set_point, start, _INK, "dot"),
        )
        for label, value, begin, colour, dash in references:
            if value is None:
                continue
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": label,
                    "legendgroup": label,
                    "showlegend": not any(trace["name"] == label for trace in data),
                    "x": _significant([begin, end]),
                    "y": _significant([value / divisor] * 2, 8),
                    "yaxis": axis,
                    "line": {"color": colour, "width": 1.6, "dash": dash},
                    "hoverinfo": "skip",
                }
            )
    if production > start:
        layout["shapes"].append(
            {
                "type": "rect",
                "xref": "x",
                "yref": "paper",
                "x0": start,
                "x1": production,
                "y0": 0,
                "y1": 1,
                "fillcolor": "#9aa5b1",
                "opacity": 0.18,
                "line": {"width": 0},
                "layer": "below",
            }
        )
    shaded = " The shaded part is equilibration and left out of averages."
    caption = Markup("{}: thermodynamic quantities against time.{}{}").format(
        formula(panel.formula),
        shaded if production > start else "",
        _thinned(len(panel.time_ps), step, "frame"),
    )
    return Figure(
        f"{name}-thermo",
        f"Temperature, pressure, volume and potential energy of {panel.formula} "
        "against time",
        caption,
        data,
        layout,
        600,
    )


def rdf_figure(rdf: RDFCurves, panel: MDPanel, name: str) -> Figure:
    """Return total and partial radial distribution functions."""
    curves = [("total", rdf.total), *rdf.partials.items()]
    r = _compact(rdf.r)
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Total" if i == 0 else str(escape(label.replace("-", "–"))),
            "x": r,
            "y": _compact(values),
            "line": {
                "color": _INK if i == 0 else PALETTE[(i - 1) % len(PALETTE)],
                "width": 2.2 if i == 0 else 1.4,
                "dash": _DASHES[i % len(_DASHES)],
            },
            "hovertemplate": "%{x:.2f} Å: %{y:.2f}",
        }
        for i, (label, values) in enumerate(curves)
    ]
    layout = {
        "xaxis": {"title": {"text": "Distance r (Å)"}, "range": [0, r[-1]]},
        "yaxis": {"title": {"text": "g(r)"}, "rangemode": "tozero"},
    }
    return Figure(
        f"{name}-rdf",
        f"Radial distribution functions of {panel.formula} against distance in Å",
        Markup(
            "{}: radial distribution function of all pairs and of each pair of "
            "elements (no unit; 1 is a uniform density)."
        ).format(formula(panel.formula)),
        data,
        layout,
        320,
    )


def _bin_edges(values: ArrayLike) -> Any:
    """Return histogram edges on round numbers, at most ``_HISTOGRAM_BINS`` bins."""
    array = np.asarray(values, dtype=np.float64)
    low, high = float(array.min()), float(array.max())
    raw = (high - low) / _HISTOGRAM_BINS or max(abs(low), 1.0) / 100
    magnitude = 10.0 ** math.floor(math.log10(raw))
    width = next(f * magnitude for f in (1, 2, 5, 10, 20) if f * magnitude >= raw)
    first = math.floor(low / width)
    last = max(math.ceil(high / width), first + 1)
    return np.arange(first, last + 1) * width


def _compact(values: ArrayLike) -> list[float]:
    """Round to a few thousandths of the range: invisible, and much shorter text."""
    array = np.asarray(values, dtype=np.float64)
    span = float(np.ptp(array)) or float(np.abs(array).max()) or 1.0
    decimals = max(0, math.ceil(-math.log10(span / 5000)))
    return [float(x) for x in np.round(array, decimals)]


def _significant(values: Iterable[float], digits: int = 5) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]


def _values(traces: Sequence[Trace]) -> list[float]:
    return [value for trace in traces for value in trace["y"]]


def _stride(n: int, limit: int) -> int:
    return max(1, math.ceil(n / limit))


def _thinned(n: int, step: int, noun: str) -> str:
    if step == 1:
        return ""
    return f" One {noun} in {step} of {number(n)} is drawn."


def _line(axis: str, at: float) -> dict[str, Any]:
    other = "y" if axis == "x" else "x"
    return {
        "type": "line",
        f"{axis}0": at,
        f"{axis}1": at,
        f"{other}0": 0,
        f"{other}1": 1,
        f"{other}ref": "paper",
        "line": {"color": _MUTED, "width": 1, "dash": "dot"},
    }


def _log_axis(title: str, values: Sequence[float]) -> Layout:
    """Return a logarithmic axis with labelled 1, 2, 5 ticks, or a linear one.

    A loss of exactly zero has no logarithm; the axis is then linear.
    """
    if min(values) <= 0:
        return {"title": {"text": title}, "rangemode": "tozero"}
    return {"title": {"text": title}, **_decade_axis(min(values), max(values))}


def _decade_axis(low: float, high: float) -> Layout:
    """Return a logarithmic range with ticks at 1, 2 and 5 of each decade."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
    ends = [math.log10(low), math.log10(high)]
    pad = 0.03 * (ends[1] - ends[0]) + 0.01
    return {
        "type": "log",
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [_tick(value) for value in ticks],
        "range": [ends[0] - pad, ends[1] + pad],
    }


def _tick(value: float) -> str:
    return number(value) if value >= 1 else f"{value:.10f}".rstrip("0")
