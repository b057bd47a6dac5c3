"""Figures of ranking, discovery and molecular dynamics, in plain JSON values.

Text from users passes through :mod:`nanoos_fw.reports.formatting`, which escapes it:
plotly reads ``<a>`` and ``<b>`` in labels.
"""

from __future__ import annotations

import math

import numpy as np
from markupsafe import Markup, escape

from nanoos_fw.reports.data import (
    Discovery,
    MDPanel,
    MSDCurves,
    Ranking,
    RDFCurves,
    ThermoSeries,
    VDOSCurves,
)
from nanoos_fw.reports.drawing import (
    DASHES,
    INK,
    MAX_POINTS,
    MUTED,
    PALETTE,
    Figure,
    Layout,
    Trace,
    compact,
    decade_axis,
    rounded,
    stride,
    thinned,
)
from nanoos_fw.reports.formatting import formula, number, with_error
from nanoos_fw.reports.statistics import discovery_result


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
        "x": compact([row.predicted for row in rows]),
        "y": names,
        "marker": {"color": PALETTE[0], "size": 10, "symbol": "circle"},
        "hovertemplate": "%{y}: %{x:.3f} eV/atom",
    }
    if all(row.uncertainty is not None for row in rows):
        predicted["error_x"] = {
            "type": "data",
            "array": rounded([row.uncertainty or 0.0 for row in rows]),
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
        links["x"] += [*rounded([row.predicted, value]), None]
        links["y"] += [name, name, None]
    relaxed = {
        "type": "scatter",
        "mode": "markers",
        "name": "LAMMPS, relaxed",
        "x": compact(computed),
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
            "y": compact([*upper, *lower[::-1]]),
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
            "y": compact(mean),
            "line": {"color": MUTED, "width": 1.4, "dash": "dash"},
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
            **decade_axis(1, n),
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
    step = stride(len(panel.time_ps), MAX_POINTS)
    time = compact(panel.time_ps[::step])
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
                "y": compact(np.asarray(series.values[::step]) / divisor),
                "yaxis": axis,
                "line": {"color": PALETTE[0], "width": 1},
                "hovertemplate": f"%{{x}} ps: %{{y}}<extra>{unit}</extra>",
            }
        )
        # Reference lines as traces: they get a legend entry, shapes do not.
        average = getattr(series.average, "mean", None)
        references = (
            ("Average", average, production, PALETTE[1], "solid"),
            ("Set point", series.set_point, start, INK, "dot"),
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
                    "x": rounded([begin, end]),
                    "y": rounded([value / divisor] * 2, 8),
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
        thinned(len(panel.time_ps), step, "frame"),
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
    r = compact(rdf.r)
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Total" if i == 0 else str(escape(label.replace("-", "–"))),
            "x": r,
            "y": compact(values),
            "line": {
                "color": INK if i == 0 else PALETTE[(i - 1) % len(PALETTE)],
                "width": 2.2 if i == 0 else 1.4,
                "dash": DASHES[i % len(DASHES)],
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


def msd_figure(msd: MSDCurves, panel: MDPanel, name: str) -> Figure:
    """Return mean squared displacements, with the diffusion coefficients."""
    step = stride(len(msd.time_ps), MAX_POINTS)
    said = []
    for element, found in msd.diffusion.items():
        who = "all atoms" if element == "all" else element
        if found.value is None:
            said.append(Markup("{}: no diffusive motion found").format(who))
            continue
        value = with_error(found.value, found.standard_error)
        doubt = "" if found.diffusive else ", though the motion is not diffusive"
        said.append(Markup("{}: D = {} Å²/ps{}").format(who, value, doubt))
    caption = Markup("{}: mean squared displacement against lag{}{}.{}").format(
        formula(panel.formula),
        "; " if said else "",
        Markup("; ").join(said),
        thinned(len(msd.time_ps), step, "lag"),
    )
    return _curves_figure(
        (f"{name}-msd", f"Mean squared displacements of {panel.formula} against time"),
        caption,
        msd.time_ps[::step],
        {"total": msd.total[::step]}
        | {element: curve[::step] for element, curve in msd.by_element.items()},
        ("Lag (ps)", "Mean squared displacement (Å²)", "%{x:.3f} ps: %{y:.4f} Å²"),
    )


def vdos_figure(vdos: VDOSCurves, panel: MDPanel, name: str) -> Figure:
    """Return vibrational densities of states."""
    step = stride(len(vdos.frequency_thz), MAX_POINTS)
    doubt = "" if vdos.is_resolved else " Frames are too far apart for the fastest."
    caption = Markup("{}: vibrational density of states.{}{}").format(
        formula(panel.formula),
        doubt,
        thinned(len(vdos.frequency_thz), step, "frequency"),
    )
    return _curves_figure(
        (
            f"{name}-vdos",
            f"Vibrational densities of states of {panel.formula} against frequency",
        ),
        caption,
        vdos.frequency_thz[::step],
        {"total": vdos.total[::step]}
        | {element: curve[::step] for element, curve in vdos.by_element.items()},
        ("Frequency (THz)", "Modes per THz", "%{x:.2f} THz: %{y:.3f}"),
    )


def _curves_figure(
    title: tuple[str, str],
    caption: Markup,
    x: tuple[float, ...],
    curves: dict[str, tuple[float, ...]],
    words: tuple[str, str, str],
) -> Figure:
    """Return curves of all atoms and of elements; `words`: both axes, and hovering."""
    data: list[Trace] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "All atoms" if i == 0 else str(escape(label)),
            "x": compact(x),
            "y": compact(values),
            "line": {
                "color": INK if i == 0 else PALETTE[(i - 1) % len(PALETTE)],
                "width": 2.2 if i == 0 else 1.4,
                "dash": DASHES[i % len(DASHES)],
            },
            "hovertemplate": words[2],
        }
        for i, (label, values) in enumerate(curves.items())
    ]
    layout: Layout = {
        # The margin holds these labels. Were it fitted to them, a label that comes and
        # goes at the end of the axis would have the figure drawn again and again.
        "xaxis": {"title": {"text": words[0]}, "automargin": False},
        "yaxis": {"title": {"text": words[1]}},
    }
    return Figure(*title, caption, data, layout, 320)
