"""Style and helpers shared by the figures: palette, axes, rounding, thinning."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from nanoos_fw.reports.formatting import number

Trace = dict[str, Any]
Layout = dict[str, Any]

# Okabe and Ito's palette, safe for colour-blind readers; no yellow, slate for black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#3D4852")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
INK, MUTED, _GRID, OTHER = "#1f2933", "#52606d", "#e4e9ef", "#9aa5b1"
FONT = (
    'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, '
    '"Liberation Sans", sans-serif'
)

MAX_POINTS = 1500
MAX_SCATTER = 3000
_HISTOGRAM_BINS = 40

_AXIS = {
    "showline": True,
    "linecolor": OTHER,
    "linewidth": 1,
    "ticks": "outside",
    "ticklen": 4,
    "tickcolor": OTHER,
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
        "font": {"family": FONT, "size": 12, "color": INK},
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
    square
        Whether the height shall not exceed the width by much.
    """

    name: str
    label: str
    caption: Markup
    data: list[Trace]
    layout: Layout
    height: int = 380
    square: bool = False


def bin_edges(values: ArrayLike) -> Any:
    """Return histogram edges on round numbers, at most ``_HISTOGRAM_BINS`` bins."""
    array = np.asarray(values, dtype=np.float64)
    low, high = float(array.min()), float(array.max())
    raw = (high - low) / _HISTOGRAM_BINS or max(abs(low), 1.0) / 100
    magnitude = 10.0 ** math.floor(math.log10(raw))
    width = next(f * magnitude for f in (1, 2, 5, 10, 20) if f * magnitude >= raw)
    first = math.floor(low / width)
    last = max(math.ceil(high / width), first + 1)
    return np.arange(first, last + 1) * width


def compact(values: ArrayLike) -> list[float]:
    """Round to a few thousandths of the range: invisible, and much shorter text."""
    array = np.asarray(values, dtype=np.float64)
    span = float(np.ptp(array)) or float(np.abs(array).max()) or 1.0
    decimals = max(0, math.ceil(-math.log10(span / 5000)))
    return [float(x) for x in np.round(array, decimals)]


def rounded(values: Iterable[float], digits: int = 5) -> list[float]:
    """Round to significant digits."""
    return [float(f"{value:.{digits}g}") for value in values]


def all_values(traces: Sequence[Trace]) -> list[float]:
    """Return the y values of all traces."""
    return [value for trace in traces for value in trace["y"]]


def stride(n: int, limit: int) -> int:
    """Return the step that draws at most ``limit`` of ``n`` points."""
    return max(1, math.ceil(n / limit))


def thinned(n: int, step: int, noun: str) -> str:
    """Return the sentence that owns up to points left out, or nothing."""
    if step == 1:
        return ""
    return f" One {noun} in {step} of {number(n)} is drawn."


def reference_line(axis: str, at: float) -> dict[str, Any]:
    """Return a dotted line across the figure at one value of an axis."""
    other = "y" if axis == "x" else "x"
    return {
        "type": "line",
        f"{axis}0": at,
        f"{axis}1": at,
        f"{other}0": 0,
        f"{other}1": 1,
        f"{other}ref": "paper",
        "line": {"color": MUTED, "width": 1, "dash": "dot"},
    }


def log_axis(title: str, values: Sequence[float]) -> Layout:
    """Return a logarithmic axis with labelled 1, 2, 5 ticks, or a linear one.

    A loss of exactly zero has no logarithm; the axis is then linear.
    """
    if min(values) <= 0:
        return {"title": {"text": title}, "rangemode": "tozero"}
    return {"title": {"text": title}, **decade_axis(min(values), max(values))}


def decade_axis(low: float, high: float) -> Layout:
    """Return a logarithmic range with two to ten labelled ticks on round numbers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors: tuple[int, ...] = (1, 2, 5) if last - first <= 3 else (1,)
    if high / low < 20:
        factors = (1, 2, 3, 5, 7)
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
