"""Plots of a simulation as PNG or SVG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.md.analysis import Analysis
from nanoos_fw.md.trajectory import ThermoTable
from nanoos_fw.provenance import write_atomic

Array = NDArray[np.float64]
PlotFormat = Literal["png", "svg"]

# Okabe and Ito: told apart with any kind of colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SIZE_INCHES, _DPI = (6.4, 4.0), 150

THERMO_PLOTS: dict[str, tuple[str, str]] = {
    "temperature": ("temperature_k", "temperature (K)"),
    "energy": ("potential_energy_ev", "energy (eV)"),
    "pressure": ("pressure_bar", "pressure (bar)"),
    "volume": ("volume_a3", "volume (Å³)"),
}


@dataclass(frozen=True)
class _Curve:
    label: str
    x: Array
    y: Array


def plot_simulation(
    table: ThermoTable,
    averages: Mapping[str, Mapping[str, Any]],
    analysis: Analysis | None,
    folder: Path,
    *,
    plot_format: PlotFormat = "png",
    production_ps: float = 0.0,
) -> list[Path]:
    """Write the plots of a simulation and return their files.

    Parameters
    ----------
    table
        The thermo table.
    averages
        Means of the production part (`output.averages`), drawn with their errors.
    analysis
        Curves of the trajectory; None leaves them out.
    folder
        Where the files go; it is made if need be.
    plot_format
        ``png`` or ``svg``.
    production_ps
        Time at which production begins; what is before is shaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (column, label) in THERMO_PLOTS.items():
        if column not in table.columns or len(table) < 2:
            continue
        time = table["time_ps"] if "time_ps" in table.columns else table["step"]
        curves = [_Curve("potential" if name == "energy" else "", time, table[column])]
        if name == "energy" and "total_energy_ev" in table.columns:
            curves.append(_Curve("total", time, table["total_energy_ev"]))
        figure = _figure(
            curves, "time (ps)" if "time_ps" in table.columns else "step", label
        )
        axes = figure.axes[0]
        if production_ps > 0.0:
            axes.axvspan(0.0, production_ps, color="0.92", zorder=0)
        if average := averages.get(column):
            mean, error = average["mean"], average["standard_error"]
            axes.axhline(mean, color="black", lw=1.0, ls="--")
            axes.set_title(
                f"mean {mean:.6g} ± {error:.2g} {average['unit']}", fontsize=10
            )
        written.append(_save(figure, folder / f"{name}.{plot_format}"))
    if analysis is not None:
        for name, figure in _analysis_figures(analysis).items():
            written.append(_save(figure, folder / f"{name}.{plot_format}"))
    return written


def _analysis_figures(analysis: Analysis) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    arrays, numbers = analysis.arrays, analysis.numbers
    if rdf := arrays.get("rdf"):
        curves = [_Curve("all", rdf["r_a"], rdf["total"])]
        parts = [name for name in rdf if name.startswith("g_")]
        if len(parts) > 1:
            curves += [
                _Curve(name[2:].replace("_", "–"), rdf["r_a"], rdf[name])
                for name in parts
            ]
        figures["rdf"] = _figure(curves, "distance (Å)", "g(r)")
        figures["rdf"].axes[0].axhline(1.0, color="0.7", lw=0.8, zorder=0)
    if adf := arrays.get("adf"):
        curves = [
            _Curve(name[8:].replace("-", "–"), adf["angle_deg"], adf[name])
            for name in adf
            if name.startswith("density_")
        ]
        figures["adf"] = _figure(curves, "angle (°)", "density (1/°)")
    if msd := arrays.get("msd"):
        last = max(2, len(msd["time_ps"]) // 2)
        curves = [
            _Curve(
                "all" if name == "total_a2" else name.removesuffix("_a2"),
                msd["time_ps"][:last],
                msd[name][:last],
            )
            for name in msd
            if name.endswith("_a2")
        ]
        figures["msd"] = _figure(
            curves if len(curves) > 2 else curves[:1],
            "time (ps)",
            "mean squared displacement (Å²)",
        )
        fit = numbers["msd"]["diffusion"]["all"]
        if fit["value"] is None:
            title = "not diffusive"
        else:
            title = f"D = {fit['value']:.3g} ± {fit['standard_error']:.1g} Å²/ps"
        figures["msd"].axes[0].set_title(title, fontsize=10)
    if vdos := arrays.get("vdos"):
        frequency = vdos["frequency_thz"]
        curves = [
            _Curve(
                "all" if name == "total_per_thz" else name.removesuffix("_per_thz"),
                frequency,
                vdos[name],
            )
            for name in vdos
            if name.endswith("_per_thz")
        ]
        figures["vdos"] = _figure(
            curves if len(curves) > 2 else curves[:1],
            "frequency (THz)",
            "density of states (1/THz)",
        )
        axes = figures["vdos"].axes[0]
        # All but a thousandth of the modes.
        shares = np.cumsum(np.abs(vdos["total_per_thz"]))
        end = frequency[int(np.searchsorted(shares, 0.999 * shares[-1]))]
        axes.set_xlim(0.0, min(float(frequency[-1]), 1.2 * float(end)))
        title = f"{numbers['vdos']['n_modes']:.4g} modes"
        if not numbers["vdos"]["is_resolved"]:
            title += ", NOT resolved: dump more often"
        axes.set_title(title, fontsize=10)
        figures["vacf"] = _figure(
            [_Curve("", vdos["time_ps"], vdos["vacf"])],
            "time (ps)",
            "velocity autocorrelation",
        )
        figures["vacf"].axes[0].axhline(0.0, color="0.7", lw=0.8, zorder=0)
    return figures


def _figure(curves: list[_Curve], x_label: str, y_label: str) -> Any:
    # A figure of its own backend: neither a display nor pyplot's state is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        axes.plot(
            curve.x,
            curve.y,
            color=_COLORS[number % len(_COLORS)],
            lw=1.3,
            label=curve.label or None,
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.margins(x=0.0)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return figure


def _save(figure: Any, path: Path) -> Path:
    import io

    from matplotlib import rc_context

    buffer = io.BytesIO()
    # The same numbers give the same bytes: no date, no random ids.
    with rc_context({"svg.hashsalt": "nanoos"}):
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(buffer, format=path.suffix[1:], dpi=_DPI, metadata=metadata)
    write_atomic(path, buffer.getvalue())
    return path
