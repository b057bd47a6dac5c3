"""Figures of a screening: as many points for ten million candidates as for ten."""

from __future__ import annotations

import math

import numpy as np
from markupsafe import Markup, escape

from nanoos_fw.reports.data import NotAvailable
from nanoos_fw.reports.drawing import MUTED, OTHER, PALETTE, Figure, Trace, compact
from nanoos_fw.reports.formatting import number
from nanoos_fw.reports.learning_figures import calibration_figure
from nanoos_fw.reports.screen_data import ScreenModelPart, ScreenPart


def screen_figures(part: ScreenPart, prefix: str) -> list[Figure]:
    """Return the figures of a screening; names begin with ``prefix``."""
    found = [
        _histogram(model, f"{prefix}-model-{number}")
        for number, model in enumerate(part.models)
        if model.counts
    ]
    if part.found_at:
        found.append(_found_figure(part, f"{prefix}-found"))
    for place, model in enumerate(part.models):
        if not isinstance(model.calibration, NotAvailable):
            figure = calibration_figure(model.calibration, model.n_test)
            found.append(
                Figure(
                    f"{prefix}-calibration-{place}",
                    f"{model.reference}: {figure.label}",
                    Markup("{}: {}").format(model.reference, figure.caption),
                    figure.data,
                    figure.layout,
                    figure.height,
                    figure.square,
                )
            )
    return found


def _axis(model: ScreenModelPart) -> str:
    unit = f" ({model.unit})" if model.unit else ""
    return str(escape(f"{model.target}{unit}"))


def _histogram(model: ScreenModelPart, name: str) -> Figure:
    edges = np.asarray(model.edges)
    width = float(edges[1] - edges[0])
    # Differences of bins are smaller than those of values: more digits than compact.
    centres = [float(f"{x:.6g}") for x in (edges[:-1] + edges[1:]) / 2]
    outside = np.asarray(model.outside)
    inside = np.asarray(model.counts) - outside
    data: list[Trace] = [
        {
            "type": "bar",
            "name": label,
            "x": centres,
            "y": values.tolist(),
            "width": width,
            "marker": {"color": colour, "line": {"color": "#ffffff", "width": 0.5}},
            "hovertemplate": "%{x}: %{y}<extra></extra>",
        }
        for label, values, colour in (
            ("In the model's domain", inside, PALETTE[0]),
            ("Out of it", outside, OTHER),
        )
        if values.any()
    ]
    layout = {
        "barmode": "stack",
        "bargap": 0,
        "showlegend": True,
        "legend": {"traceorder": "normal"},
        "xaxis": {"title": {"text": _axis(model)}},
        "yaxis": {"title": {"text": "Candidates"}},
    }
    total = int(np.sum(model.counts))
    return Figure(
        name,
        f"Histogram of the predictions of {model.reference}",
        Markup("Predictions of {} for {} candidates; {} of them are unlike its "
               "training data.").format(
            model.reference, number(total), number(int(outside.sum()))
        ),
        data,
        layout,
        360,
    )  # fmt: skip


def _found_figure(part: ScreenPart, name: str) -> Figure:
    k = len(part.found_at)
    screened = part.screened
    grid = np.linspace(0, screened, 41)
    share = grid / screened
    mean = k * share
    error = np.sqrt(k * share * (1 - share))
    low, high = np.clip(mean - 2 * error, 0, k), np.clip(mean + 2 * error, 0, k)
    data: list[Trace] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Evenly spread, ± 2 standard deviations",
            "x": compact(np.concatenate([grid, grid[::-1]])),
            "y": compact(np.concatenate([high, low[::-1]])),
            "fill": "toself",
            "fillcolor": "rgba(154,165,177,.3)",
            "line": {"width": 0},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Evenly spread",
            "x": [0, screened],
            "y": [0, k],
            "line": {"color": MUTED, "width": 1.4, "dash": "dash"},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Found",
            "x": [0, *part.found_at, screened],
            "y": [*range(k + 1), k],
            "line": {"color": PALETTE[0], "width": 2.2, "shape": "hv"},
            "hovertemplate": "%{x} screened: %{y} found<extra></extra>",
        },
    ]
    layout = {
        "xaxis": {"title": {"text": "Candidates screened"}},
        "yaxis": {
            "title": {"text": f"Of the best {k} found"},
            "range": [0, k * 1.04],
            "dtick": max(1, math.ceil(k / 10)),
        },
    }
    return Figure(
        name,
        f"Number of the best {k} found against number of candidates screened",
        Markup(
            "How many of the {k} best-ranked candidates were met among the first n of "
            "the sequence. Had the screening ended there, the rest would have been "
            "missed; a sequence in random order follows the grey band."
        ).format(k=number(k)),
        data,
        layout,
        360,
    )
