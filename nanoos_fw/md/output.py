"""The output of one simulation: table, final structure, averages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanoos_fw.errors import CorruptArtifactError, InputError, SimulationError
from nanoos_fw.md.box import LammpsBox, tensor_to_voigt, voigt_to_tensor
from nanoos_fw.md.inputs import MDConfig, barostat_of
from nanoos_fw.md.protocols import PROPERTIES
from nanoos_fw.md.restarts import SEGMENT_RECORD
from nanoos_fw.md.statistics import block_analysis, detect_equilibration, mser
from nanoos_fw.md.trajectory import (
    ThermoTable,
    Trajectory,
    read_thermo,
    segment_files,
)
from nanoos_fw.md.unit_systems import unit_system
from nanoos_fw.provenance import read_json

if TYPE_CHECKING:
    from pymatgen.core import Structure

SIMULATION, FINAL, PROPERTIES_FILE = (
    "simulation.json",
    "final.json",
    "properties.json",
)
OUTPUT, CORRECTIONS = "output", "corrections.json"
_AVERAGED = (
    "temperature_k",
    "potential_energy_ev",
    "total_energy_ev",
    "pressure_bar",
    "volume_a3",
    "lx_a",
    "ly_a",
    "lz_a",
)
_STEADY = ("temperature_k", "potential_energy_ev", "pressure_bar", "volume_a3")
_PRESSURES = ("pxx_bar", "pyy_bar", "pzz_bar", "pxy_bar", "pxz_bar", "pyz_bar")
_MIN_ROWS = 4


def corrections_of(work_dir: Path) -> list[dict[str, Any]]:
    """Return what `LAMMPSEngine.run` has corrected in a work folder so far."""
    record = work_dir / CORRECTIONS
    done: list[dict[str, Any]] = read_json(record) if record.exists() else []
    return done


def newest_try(work_dir: Path) -> Path:
    """Return the folder of the last try: each correction has one of its own."""
    done = corrections_of(work_dir)
    return work_dir / f"try-{len(done)}" if done else work_dir


def read_simulation(directory: Path) -> dict[str, Any]:
    """Return what a folder's simulation is: configuration, potential and cell.

    Raises
    ------
    InputError
        If the folder holds none.
    """
    path = directory / SIMULATION
    if not path.exists():
        raise InputError(
            f"{directory} holds no prepared simulation",
            advice="call LAMMPSEngine.prepare_input first",
        )
    simulation: dict[str, Any] = read_json(path)
    if not isinstance(simulation, dict) or "config" not in simulation:
        raise CorruptArtifactError(f"{path} does not describe a simulation")
    return simulation


def simulation_thermo(output_dir: Path) -> ThermoTable:
    """Return the thermo table of a simulation, equally spaced.

    Rows that the ranks printed where they paused, or where the simulation ended in
    between, are left out; for minimizations, which end where they converge, all are
    kept. Components of the pressure are in the frame of the structure, lengths and
    tilts (``lx_a``, ``xy_a``) those of LAMMPS' box.
    """
    config = MDConfig.model_validate(read_simulation(output_dir)["config"])
    return _equally_spaced(all_rows(output_dir), config)


def all_rows(output_dir: Path) -> ThermoTable:
    """Return every row that a simulation printed; the last is its newest state."""
    simulation = read_simulation(output_dir)
    table = read_thermo(segment_files(output_dir, "log.*.lammps"))
    table = in_our_units(table, simulation["potential"].get("units", "metal"))
    return _in_lattice_frame(table, simulation_box(output_dir))


def _equally_spaced(table: ThermoTable, config: MDConfig) -> ThermoTable:
    if not config.is_dynamics or not len(table):
        return table
    keep = table.step % config.thermo_every == 0
    return ThermoTable({k: v[keep] for k, v in table.columns.items()}, table.units)


def _in_lattice_frame(table: ThermoTable, box: LammpsBox) -> ThermoTable:
    """Return the table with the pressure's components rotated back."""
    if not set(_PRESSURES) <= set(table.columns):
        return table
    if np.array_equal(box.rotation, np.eye(3)):
        return table
    values = np.array([table[name] for name in _PRESSURES])
    turned = [
        tensor_to_voigt(box.tensor_from_box(voigt_to_tensor(row))) for row in values.T
    ]
    columns = dict(zip(_PRESSURES, np.array(turned).T, strict=True))
    return ThermoTable({**table.columns, **columns}, table.units)


# Quantity that each unit of the thermo table stands for.
_QUANTITIES = {
    "eV": "energy",
    "bar": "pressure",
    "Å": "length",
    "Å³": "volume",
    "ps": "time",
}


def in_our_units(table: ThermoTable, units: str) -> ThermoTable:
    """Return a table that LAMMPS printed in its unit system in the units used here.

    Parameters
    ----------
    table
        As `read_thermo` gives it: the names are those of our units, the numbers
        LAMMPS' own.
    units
        LAMMPS unit style.
    """
    if units == "metal":
        return table
    system = unit_system(units)
    columns = {}
    for name, values in table.columns.items():
        quantity = _QUANTITIES.get(table.units[name])
        factor = system.factor(quantity) if quantity else 1.0
        columns[name] = values * (factor / 1000.0 if quantity == "time" else factor)
    return ThermoTable(columns, table.units)


def simulation_elements(output_dir: Path) -> tuple[str, ...]:
    """Return the element of each atom type, type 1 first."""
    return tuple(read_simulation(output_dir)["elements"])


def simulation_box(output_dir: Path) -> LammpsBox:
    """Return the map between the simulated cell and the box of LAMMPS."""
    simulation = read_simulation(output_dir)
    return LammpsBox.from_lattice(np.array(simulation["lattice"]))


def final_structure(output_dir: Path) -> Structure:
    """Return the last structure, in the orientation and site order of the first.

    With the charges that were given, if the potential knows charges.

    Raises
    ------
    InputError
        If the simulation is not finished.
    """
    if not (output_dir / FINAL).exists():
        raise InputError(
            f"the simulation in {output_dir} is not finished",
            advice="execute it again: it continues",
        )
    from pymatgen.core import Lattice, Structure

    simulation, final = read_simulation(output_dir), read_json(output_dir / FINAL)
    charges = simulation.get("charges")
    box, matrix = simulation_box(output_dir), np.array(final["matrix"])
    return Structure(
        Lattice(box.lattice(matrix)),
        simulation["species"],
        box.frac_coords(np.array(final["positions"]), matrix),
        to_unit_cell=True,
        site_properties=None if charges is None else {"charge": charges},
    )


def convergence(output_dir: Path) -> dict[str, Any] | None:
    """Return whether a finished minimization reached its tolerances.

    LAMMPS ends a minimization at its last step, or where its line search finds no
    lower energy, as quietly as at its tolerances; so the last state is measured.

    Returns
    -------
    dict or None
        ``converged``; ``max_force_ev_a``: largest component of a force;
        ``max_stress_bar``: with ``relax_cell``, how far the stress that the cell could
        follow is from the wanted pressure, else None. None for other workflows.
    """
    simulation = read_simulation(output_dir)
    config = MDConfig.model_validate(simulation["config"])
    if config.workflow_type != "MINIMIZE_LAMMPS":
        return None
    final = read_json(output_dir / FINAL)
    force = float(np.abs(np.array(final["forces"])).max())
    converged, excess = force <= config.max_force_ev_a, None
    if config.relax_cell:
        barostat = barostat_of(config, simulation_box(output_dir))
        stress = np.array(final["stress_bar"]) + config.pressure_bar * np.eye(3)
        if barostat == "iso":
            stress = np.array([np.trace(stress) / 3.0])
        elif barostat == "aniso":
            stress = np.diag(stress)
        excess = float(np.abs(stress).max())
        converged = converged and excess <= config.max_stress_bar
    return {
        "converged": converged,
        "max_force_ev_a": force,
        "max_stress_bar": excess,
    }


def not_converged(output_dir: Path) -> SimulationError | None:
    """Return the error of a minimization that missed its tolerances, else None."""
    found = convergence(output_dir)
    if found is None or found["converged"]:
        return None
    config = MDConfig.model_validate(read_simulation(output_dir)["config"])
    left = f"{found['max_force_ev_a']:.3g} eV/Å"
    if found["max_stress_bar"] is not None:
        left += f" and {found['max_stress_bar']:.3g} bar"
    return SimulationError(
        f"the minimization in {output_dir} ended before it converged: {left} are left",
        evidence={
            "class": "not_converged",
            **found,
            "tolerance_ev_a": config.max_force_ev_a,
            "tolerance_bar": config.max_stress_bar if config.relax_cell else None,
        },
        advice="raise num_steps, or the tolerances max_force_ev_a and max_stress_bar",
    )


def averages(table: ThermoTable) -> dict[str, dict[str, Any]]:
    """Return means with their errors of the columns that have a steady state.

    Rows before equilibrium are left out: as many as the slowest of temperature,
    energy, pressure and volume needs, the same for all columns.

    Returns
    -------
    dict
        By column: ``mean``; ``standard_error`` (see `statistics.block_analysis`);
        ``n_samples`` averaged over; ``equilibrated``, how many rows were left out;
        ``settled``, False if the series drifts to its end (MSER-5); ``plateau``,
        False if the error is a lower bound since the run is too short;
        ``inefficiency``; ``unit``.
    """
    columns = {
        name: table[name]
        for name in _AVERAGED
        if name in table.columns and np.isfinite(table[name]).all()
    }
    if len(table) < _MIN_ROWS:
        return {}
    start = max(
        (detect_equilibration(columns[n])[0] for n in _STEADY if n in columns),
        default=0,
    )
    found: dict[str, dict[str, Any]] = {}
    for name, values in columns.items():
        average = block_analysis(values[start:])
        found[name] = {
            "mean": average.mean,
            "standard_error": average.standard_error,
            "n_samples": len(values) - start,
            "equilibrated": start,
            "settled": mser(values)[1],
            "plateau": average.plateau,
            "inefficiency": average.inefficiency,
            "unit": table.units[name],
        }
    return found


def production_averages(
    table: ThermoTable, config: MDConfig
) -> dict[str, dict[str, Any]]:
    """Return `averages` of the production part; none over a ramp of temperature."""
    if not config.is_dynamics or config.production_temperature_k is None:
        return {}
    if config.production_start:
        table = table.after(config.production_start)
    return averages(table)


def simulation_trajectory(output_dir: Path) -> Trajectory:
    """Return the frames of a simulation, in Å and Å/ps whatever its unit system.

    Raises
    ------
    InputError
        If it wrote no frames.
    """
    units = unit_system(read_simulation(output_dir)["potential"].get("units", "metal"))
    files = segment_files(output_dir, "trajectory.*.bin")
    if not files:
        raise InputError(
            f"the simulation in {output_dir} left no trajectory",
            advice="run it with dump_every above 0",
        )
    return Trajectory(
        files, length_a=units.length_a, velocity_a_ps=1000.0 * units.velocity_a_fs
    )


def parse_output(output_dir: Path) -> dict[str, Any]:
    """Read what a simulation left, finished or not.

    Returns
    -------
    dict
        ``complete``; ``workflow_type``; ``n_atoms``; ``steps``; ``thermo``
        (columns as lists) with ``units``; ``averages`` of the production part,
        each with ``mean``, ``standard_error``, ``n_samples`` and ``equilibrated``
        (how many samples from the start of production still drift), empty if the
        temperature changes there; ``avg_temperature`` (K), ``avg_pressure`` (bar),
        ``avg_volume`` (Å³),
        ``final_energy`` (eV, potential and kinetic energy of the whole cell),
        ``final_potential_energy`` (eV); ``final_structure`` (pymatgen
        dictionary, orientation and sites as given) if complete;
        ``trajectory_files``; but for strained copies ``final_velocities_a_fs`` (Å/fs),
        ``final_forces_ev_a`` and ``final_stress_bar`` (positive under tension; of
        dynamics with its kinetic part), in the orientation and order of the
        structure; for minimizations ``converged``,
        ``max_force_ev_a`` and ``max_stress_bar`` (see `output.convergence`), with a
        warning if it is not; ``elastic`` or ``eos`` of those workflows;
        ``segments``: where each launch began; ``warnings``.

    Raises
    ------
    InputError
        If the folder holds no simulation.
    """
    simulation = read_simulation(output_dir)
    config = MDConfig.model_validate(simulation["config"])
    rows = all_rows(output_dir)
    table = _equally_spaced(rows, config)
    means = production_averages(table, config)
    final = output_dir / FINAL
    complete = final.exists()
    result: dict[str, Any] = {
        "complete": complete,
        "workflow_type": config.workflow_type,
        "n_atoms": len(simulation["species"]),
        "steps": int(rows.step[-1]) if len(rows) else 0,
        "total_steps": config.total_steps,
        "thermo": table.to_dict(),
        "units": table.units,
        "averages": means,
        "trajectory_files": [
            str(path) for path in segment_files(output_dir, "trajectory.*.bin")
        ],
    }
    for name, column in (
        ("avg_temperature", "temperature_k"),
        ("avg_pressure", "pressure_bar"),
        ("avg_volume", "volume_a3"),
        ("avg_potential_energy", "potential_energy_ev"),
    ):
        average = means.get(column)
        result[name] = average["mean"] if average else None
    for name, column in (
        ("final_energy", "total_energy_ev"),
        ("final_potential_energy", "potential_energy_ev"),
    ):
        result[name] = float(rows[column][-1]) if len(rows) else None
    if config.workflow_type in PROPERTIES and complete:
        result |= read_json(output_dir / PROPERTIES_FILE)
    if complete:
        result["final_structure"] = final_structure(output_dir).as_dict()
        result |= _final_arrays(read_json(final), simulation_box(output_dir))
        result |= convergence(output_dir) or {}
    record = output_dir / SEGMENT_RECORD
    result["segments"] = read_json(record) if record.exists() else []
    result["warnings"] = [*simulation.get("warnings", [])]
    if complete and (error := not_converged(output_dir)):
        result["warnings"].append(error.message)
    if config.is_dynamics and config.production_temperature_k is None:
        result["warnings"].append(
            "the temperature changes to the end: nothing is averaged over it"
        )
    if missing := _missing_rows(table, config, complete):
        result["warnings"].append(f"{missing} rows of the thermo table are missing")
    return result


def _final_arrays(final: dict[str, Any], box: LammpsBox) -> dict[str, Any]:
    """Return the last velocities, forces and stress, in the frame of the lattice."""
    found: dict[str, Any] = {}
    for name, field in (("velocities", "a_fs"), ("forces", "ev_a")):
        if name in final:
            values = box.from_box(np.array(final[name]))
            found[f"final_{name}_{field}"] = values.tolist()
    if "stress_bar" in final:
        stress = box.tensor_from_box(np.array(final["stress_bar"]))
        found["final_stress_bar"] = stress.tolist()
    if "energy_ev" in final:
        found["final_potential_energy"] = final["energy_ev"]
    return found


def _missing_rows(table: ThermoTable, config: MDConfig, complete: bool) -> int:
    """Return how many rows of a finished simulation's table are not there."""
    if not complete or not config.is_dynamics:
        return 0
    return config.total_steps // config.thermo_every + 1 - len(table)
