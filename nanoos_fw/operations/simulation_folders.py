"""What the folder of a simulation says: how far it is, and its plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanoos_fw.errors import InputError, NanoOSError
from nanoos_fw.md.engine import FINISHED
from nanoos_fw.md.output import (
    OUTPUT,
    SIMULATION,
    all_rows,
    convergence,
    newest_try,
    production_averages,
    read_simulation,
    simulation_thermo,
)
from nanoos_fw.md.protocols import MDConfig
from nanoos_fw.md.restarts import newest_origin

if TYPE_CHECKING:
    from nanoos_fw.md.analysis import AnalysisRequest
    from nanoos_fw.md.plots import PlotFormat
    from nanoos_fw.md.trajectory import ThermoTable

_SHOWN = ("temperature_k", "total_energy_ev", "pressure_bar", "volume_a3")


def output_dir_of(run: Path) -> Path:
    """Return the output folder of a simulation, or of its last try.

    Parameters
    ----------
    run
        The output folder itself, or the one above.

    Raises
    ------
    InputError
        If there is no simulation.
    """
    # prepare_input leaves its own copy beside the output.
    for folder in (newest_try(run) / OUTPUT, run):
        if (folder / SIMULATION).exists():
            return folder
    raise InputError(
        f"{run} holds no simulation", advice=f"give the folder with {SIMULATION}"
    )


def simulation_status(run: Path) -> dict[str, Any]:
    """Return how far a simulation is, finished or not.

    Parameters
    ----------
    run
        See `output_dir_of`.

    Returns
    -------
    dict
        ``workflow_type``; ``finished``; ``converged``, of finished minimizations;
        ``step`` and ``total_steps``; ``restart_step``, from which it would go on;
        ``last``: temperature, energy, pressure and volume of the newest row, each
        with ``value`` and ``unit``.

    Raises
    ------
    InputError
        If there is no simulation.
    """
    output = output_dir_of(run)
    config = MDConfig.model_validate(read_simulation(output)["config"])
    finished = (output / FINISHED).exists()
    table = all_rows(output)
    # Stopped before its first row, it has none.
    last = {n: float(values[-1]) for n, values in table.columns.items() if len(values)}
    return {
        "workflow_type": config.workflow_type,
        "finished": finished,
        "converged": (convergence(output) or {}).get("converged") if finished else None,
        "step": int(table.step[-1]) if len(table) else 0,
        "total_steps": config.total_steps,
        "restart_step": newest_origin(output, config).step,
        "last": {
            name: {"value": last[name], "unit": table.units[name]}
            for name in _SHOWN
            if name in last
        },
    }


@dataclass(frozen=True)
class SimulationPlots:
    """The plots of a simulation.

    Parameters
    ----------
    paths
        Their files.
    failures
        Why an analysis has none, by its name.
    """

    paths: tuple[Path, ...]
    failures: dict[str, NanoOSError]


def plot_run(
    run: Path,
    request: AnalysisRequest,
    folder: Path,
    *,
    plot_format: PlotFormat = "png",
) -> SimulationPlots:
    """Plot the thermo table of a simulation and the analyses of its trajectory.

    Parameters
    ----------
    run
        See `output_dir_of`.
    request
        Analyses; made where there are frames.
    folder
        Where the files go.
    plot_format
        ``png`` or ``svg``.

    Raises
    ------
    InputError
        If there is no simulation, or none with a row yet.
    """
    from nanoos_fw.md.analysis import analyze_simulation
    from nanoos_fw.md.plots import plot_simulation

    output = output_dir_of(run)
    config = MDConfig.model_validate(read_simulation(output)["config"])
    table = simulation_thermo(output)
    if not len(table):
        raise InputError(f"{output} has no thermo output yet", advice="run it first")
    analysis = None
    if config.is_dynamics and config.dump_every:
        analysis = analyze_simulation(output, request)
    paths = plot_simulation(
        table,
        production_averages(table, config),
        analysis,
        folder,
        plot_format=plot_format,
        production_ps=_time_of(table, config.production_start),
    )
    return SimulationPlots(tuple(paths), {} if analysis is None else analysis.failures)


def _time_of(table: ThermoTable, step: int) -> float:
    if "time_ps" not in table.columns or step == 0:
        return 0.0
    return float(np.interp(step, table["step"], table["time_ps"]))
