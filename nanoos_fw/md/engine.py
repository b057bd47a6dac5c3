"""The LAMMPS engine: prepare a simulation, run it, read its output.

LAMMPS runs in child processes only: on MPI ranks through its Python module
(`nanoos_fw.md.simulation`), in a child of a warm server, or as an executable
(`nanoos_fw.md.executable`). A stopped or killed simulation goes on from its newest
whole restart file to the same last step; rows and frames that are computed again
replace the earlier ones.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanoos_fw.errors import InputError, LaunchError, NanoOSError, SimulationError
from nanoos_fw.md.box import LammpsBox
from nanoos_fw.md.catalogue import Catalogue
from nanoos_fw.md.cells import site_charges, site_elements, supercell
from nanoos_fw.md.failures import changes, correction
from nanoos_fw.md.inputs import (
    DATA_FILE,
    SCRIPT,
    MDConfig,
    Origin,
    timestep_warnings,
    write_input,
)
from nanoos_fw.md.output import (
    FINAL,
    SIMULATION,
    averages,
    convergence,
    final_structure,
    not_converged,
    read_simulation,
    simulation_box,
    simulation_thermo,
)
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.properties import RESULT_FILE
from nanoos_fw.md.protocols import PROPERTIES
from nanoos_fw.md.restarts import (
    PORTABLE,
    STOP_RESTART,
    UNREADABLE,
    drop_segments_after,
    newest_origin,
)
from nanoos_fw.md.simulation import CONFIG
from nanoos_fw.md.trajectory import ThermoTable, read_thermo, segment_files
from nanoos_fw.parallel import Resources, clear_messages, launch_ranks
from nanoos_fw.provenance import content_key, read_json, write_json
from nanoos_fw.settings import load_settings

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from nanoos_fw.md.fork_server import ForkServer

__all__ = [
    "ENGINES",
    "LAMMPSEngine",
    "final_structure",
    "get_engine",
    "simulation_box",
    "simulation_thermo",
]

logger = logging.getLogger(__name__)

FINISHED, CORRECTIONS, SEGMENT_RECORD = (
    "finished.json",
    "corrections.json",
    "segments.json",
)
_INPUT, _OUTPUT = "input", "output"
# Without a new timestep or row for so long, a rank is taken to hang.
STALL_S = 1800.0
_MAX_UNREADABLE = 4
_CRASHES = (-6, -11, 134, 139)  # abort and segmentation fault


class LAMMPSEngine:
    """Classical molecular dynamics with LAMMPS.

    Examples
    --------
    >>> engine = LAMMPSEngine()
    >>> inputs = engine.prepare_input(structure, {"temperature": 300.0}, work_dir)
    >>> engine.execute(inputs, work_dir / "output", resources=Resources(ranks=2))
    >>> engine.parse_output(work_dir / "output")["avg_temperature"]

    Parameters
    ----------
    command
        LAMMPS executable to use instead of the Python module; None takes the setting
        ``NANO_OS_LAMMPS_COMMAND``, if there is one.
    server
        Warm server in whose children simulations of one rank run.
    """

    def __init__(
        self, command: str | None = None, server: ForkServer | None = None
    ) -> None:
        self.command = command
        self.server = server

    def run(
        self,
        structure: Structure,
        parameters: Mapping[str, Any],
        work_dir: Path,
        *,
        max_corrections: int = 2,
        **options: Any,
    ) -> dict[str, Any]:
        """Prepare and execute, and correct a failure that has a correction.

        Each try has a folder of its own (``try-1`` is the first correction), so that
        the rows of a failed one are kept. Called again, it goes on with the try that
        was being made.

        Parameters
        ----------
        structure, parameters
            See `prepare_input`.
        work_dir
            Folder of this simulation.
        max_corrections
            Largest number of corrections; 0 for none.
        **options
            See `execute`.

        Returns
        -------
        dict
            As of `execute`, and ``corrections``: for each the error (``class``,
            ``message``, ``last_step``), the ``reason``, the ``changes`` (old and new
            value of each field) and the ``failed_output`` folder.

        Raises
        ------
        NanoOSError
            See `execute`. A `SimulationError` carries the corrections tried as
            evidence.
        """
        record = work_dir / CORRECTIONS
        done: list[dict[str, Any]] = read_json(record) if record.exists() else []
        values = dict(parameters)
        for entry in done:
            values |= {name: new for name, (_, new) in entry["changes"].items()}
        while True:
            place = work_dir / f"try-{len(done)}" if done else work_dir
            input_dir = self.prepare_input(structure, _named(values), place)
            try:
                outcome = self.execute(input_dir, place / _OUTPUT, **options)
            except SimulationError as error:
                error.evidence["corrections"] = done
                if len(done) >= max_corrections:
                    raise
                simulation = read_simulation(input_dir)
                config = MDConfig.model_validate(simulation["config"])
                timestep_fs = config.timestep_fs or float(
                    simulation["potential"]["timestep_fs"]
                )
                next_try = correction(error, config, timestep_fs)
                if next_try is None:
                    raise
                changed = changes(config, next_try.config)
                logger.warning("%s; %s", error.message, next_try.reason)
                done.append(
                    {
                        "class": error.evidence.get("class"),
                        "message": error.message,
                        "last_step": error.evidence.get("last_step"),
                        "reason": next_try.reason,
                        "changes": changed,
                        "failed_output": str(place / _OUTPUT),
                    }
                )
                write_json(record, done)
                values |= {name: new for name, (_, new) in changed.items()}
            else:
                return {**outcome, "corrections": done, "input_dir": str(input_dir)}

    def prepare_input(
        self, structure: Structure, parameters: Mapping[str, Any], work_dir: Path
    ) -> Path:
        """Write the input of a simulation.

        Parameters
        ----------
        structure
            Ordered structure; repeated to ``supercell_min_atoms``.
        parameters
            Fields of `MDConfig`, and ``potential``: a name, a style such as
            ``"tersoff"``, a recipe or commands; see `catalogue.Catalogue.resolve`.
            Without one the 16-metal EAM is taken if it knows all elements.
        work_dir
            Folder of this simulation.

        Returns
        -------
        Path
            The input folder: ``in.lammps``, ``structure.data``, the potential's
            files, and ``simulation.json`` for `execute`.

        Raises
        ------
        InputError
            If structure, potential and parameters do not go together.
        """
        values = dict(parameters)
        chosen = values.pop("potential", None)
        config = MDConfig.from_parameters(values)
        directory = work_dir / _INPUT
        potential = Catalogue().resolve(chosen, site_elements(structure), directory)
        cell = supercell(structure, config.supercell_min_atoms)
        box, elements = write_input(cell, config, potential, directory)
        simulation = {
            "config": config.model_dump(mode="json"),
            "potential": potential.model_dump(mode="json"),
            "elements": list(elements),
            "species": site_elements(cell),
            "lattice": cell.lattice.matrix.tolist(),
            "frac_coords": cell.frac_coords.tolist(),
        }
        charges = site_charges(cell) if potential.charges != "none" else None
        if charges is not None:
            simulation["charges"] = charges.tolist()
        identity = {**simulation, "potential": potential.identity}
        write_json(
            directory / SIMULATION,
            {
                "key": content_key("simulation", identity),
                **simulation,
                "warnings": timestep_warnings(config, potential, elements),
            },
        )
        lengths = " × ".join(f"{length:.2f}" for length in box.lengths)
        logger.info("%d atoms in a box of %s Å", len(cell), lengths)
        return directory

    def execute(
        self,
        input_dir: Path,
        output_dir: Path,
        timeout: float | None = 3600.0,
        resources: Resources | None = None,
        deadline: float | None = None,
        stall_s: float | None = STALL_S,
    ) -> dict[str, Any]:
        """Run a prepared simulation to its end, or continue one that was stopped.

        The caller holds the output folder (``parallel.locked``) if others might
        write to it.

        Parameters
        ----------
        input_dir
            Folder made by `prepare_input`.
        output_dir
            Folder for all output. One that holds a part of the same simulation is
            continued; a finished one is not run again.
        timeout
            Seconds after which to stop with a restart file; None waits.
        resources
            Ranks and launcher; None takes one rank.
        deadline
            Unix time by which to stop; the earlier of both counts.
        stall_s
            Seconds without a new timestep or row after which the ranks are killed;
            None waits for ever.

        Returns
        -------
        dict
            ``success``: True, but for a minimization that ended before it reached its
            tolerances; for minimizations, ``converged`` and what is left, see
            `output.convergence`; ``steps``, ``n_atoms``, ``segments``, ``wall_s``,
            ``output_dir``, ``lammps_version``; ``exact`` tells whether every segment
            began at a restart step, on as many ranks and threads as the first, so
            that the result is that of an uninterrupted run to the last bit.

        Raises
        ------
        OutOfTimeError
            If time ran out; executing again continues.
        SimulationError
            If LAMMPS failed; carries its message and a class.
        InputError
            If the folder holds another simulation, or the input is not prepared.
        """
        simulation = read_simulation(input_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        mine = output_dir / SIMULATION
        if mine.exists() and read_json(mine).get("key") != simulation["key"]:
            raise InputError(
                f"{output_dir} holds the output of another simulation",
                evidence={"key": read_json(mine).get("key"), "new": simulation["key"]},
                advice="choose an empty folder",
            )
        if (output_dir / FINISHED).exists():
            finished: dict[str, Any] = read_json(output_dir / FINISHED)
            return finished
        for name in (DATA_FILE, SCRIPT):
            shutil.copyfile(input_dir / name, output_dir / name)
        potential = Potential.model_validate(simulation["potential"])
        # The copy beside the script, so that a moved work directory still runs.
        potential.relocated(input_dir).install(output_dir)
        write_json(mine, simulation)
        limits = [deadline] if deadline is not None else []
        if timeout is not None:
            limits.append(time.time() + timeout)
        end = min(limits, default=None)
        began = time.time()
        resources = resources or Resources()
        result = self._launch(simulation, output_dir, resources, end, stall_s)
        found = convergence(output_dir)
        if error := not_converged(output_dir):
            logger.warning("%s", error.message)
        outcome = {
            "success": found is None or found["converged"],
            **result,
            **(found or {}),
            "wall_s": time.time() - began,
            "output_dir": str(output_dir),
            "exact": _is_exact(output_dir),
        }
        write_json(output_dir / FINISHED, outcome)
        return outcome

    def _launch(
        self,
        simulation: dict[str, Any],
        output_dir: Path,
        resources: Resources,
        deadline: float | None,
        stall_s: float | None,
    ) -> dict[str, Any]:
        module = "nanoos_fw.md.simulation"
        ranks, threads = resources.ranks, resources.threads
        extra: dict[str, Any] = {}
        if simulation["config"]["workflow_type"] in PROPERTIES:
            module = "nanoos_fw.md.properties"
        else:
            command = self.command or load_settings().lammps_command
            if command:
                # A rank program too, of one rank: it starts and stops the executable.
                module = "nanoos_fw.md.executable"
                extra = {
                    "command": command,
                    "ranks": resources.ranks,
                    "launcher": resources.launcher,
                }
                resources = Resources(1, resources.threads)
        # Ranks whose parent was killed may write for another moment.
        clear_messages(output_dir)
        for _ in range(_MAX_UNREADABLE):
            origin = newest_origin(output_dir)
            drop_segments_after(output_dir, origin.step)
            _record_segment(output_dir, origin, ranks, threads)
            config = {
                "simulation": simulation,
                "deadline": deadline,
                "origin": asdict(origin),
                "threads": threads,
                **extra,
            }
            write_json(output_dir / CONFIG, config, durable=False)
            try:
                if self.server is not None and resources.ranks == 1:
                    return self.server.run(
                        module, output_dir / CONFIG, resources, deadline, stall_s
                    )
                return launch_ranks(
                    module,
                    output_dir / CONFIG,
                    resources=resources,
                    deadline=deadline,
                    stall_s=stall_s,
                    signs=("log.*.lammps",),
                )
            except SimulationError as error:
                if error.evidence.get("class") != "restart_unreadable":
                    raise
                if origin.file is None:
                    raise
                _put_away(output_dir, origin.file, error)
            except LaunchError as error:
                # Damage that LAMMPS does not survive: it died before its first row.
                if error.evidence.get("exit_code") not in _CRASHES:
                    raise
                log = output_dir / f"log.{origin.step:012d}.lammps"
                if origin.file is None or (log.exists() and len(read_thermo(log))):
                    raise
                _put_away(output_dir, origin.file, error)
        raise SimulationError(
            f"no restart file in {output_dir} can be read",
            evidence={"class": "restart_unreadable"},
            advice=f"look at the files that end in {UNREADABLE}",
        )

    def parse_output(self, output_dir: Path) -> dict[str, Any]:
        """Read what a simulation left, finished or not.

        Returns
        -------
        dict
            ``complete``; ``workflow_type``; ``n_atoms``; ``steps``; ``thermo``
            (columns as lists) with ``units``; ``averages`` of the production part,
            each with ``mean``, ``standard_error``, ``n_samples`` and ``equilibrated``
            (how many samples from the start of production still drift);
            ``avg_temperature`` (K), ``avg_pressure`` (bar), ``avg_volume`` (Å³),
            ``final_energy`` (eV, potential and kinetic energy of the whole cell),
            ``final_potential_energy`` (eV); ``final_structure`` (pymatgen
            dictionary, orientation and sites as given) if complete;
            ``trajectory_files``; ``final_velocities_a_fs`` (Å/fs), and for static
            evaluations and minimizations ``final_forces_ev_a`` and
            ``final_stress_bar`` (positive under tension), in the orientation and
            order of the structure; for minimizations ``converged``,
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
        table = simulation_thermo(output_dir)
        production = table
        if config.is_dynamics and config.production_start:
            production = table.after(config.production_start)
        means = averages(production) if config.is_dynamics else {}
        final = output_dir / FINAL
        complete = final.exists()
        result: dict[str, Any] = {
            "complete": complete,
            "workflow_type": config.workflow_type,
            "n_atoms": len(simulation["species"]),
            "steps": int(table.step[-1]) if len(table) else 0,
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
            result[name] = float(table[column][-1]) if len(table) else None
        if config.workflow_type in PROPERTIES and complete:
            result |= read_json(output_dir / RESULT_FILE)
        if complete:
            result["final_structure"] = final_structure(output_dir).as_dict()
            result |= _final_arrays(read_json(final), simulation_box(output_dir))
            result |= convergence(output_dir) or {}
        record = output_dir / SEGMENT_RECORD
        result["segments"] = read_json(record) if record.exists() else []
        result["warnings"] = [*simulation.get("warnings", [])]
        if complete and (error := not_converged(output_dir)):
            result["warnings"].append(error.message)
        if missing := _missing_rows(table, config, complete):
            result["warnings"].append(f"{missing} rows of the thermo table are missing")
        return result


ENGINES: dict[str, type[LAMMPSEngine]] = {
    "LAMMPS": LAMMPSEngine,
    "LAMMPS_MD": LAMMPSEngine,
}


def get_engine(name: str) -> type[LAMMPSEngine]:
    """Return an engine class by its name.

    Raises
    ------
    InputError
        If there is no such engine; lists those there are.
    """
    try:
        return ENGINES[name]
    except KeyError:
        raise InputError(
            f"there is no engine {name!r}", advice=f"known: {', '.join(ENGINES)}"
        ) from None


# ------------------------------------------------------------------------- private


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with one name each: a correction overrides what was given."""
    names = {
        "temperature": "temperature_k",
        "pressure": "pressure_bar",
        "timestep": "timestep_fs",
    }
    chosen = {names[k]: v for k, v in values.items() if k in names}
    return {**chosen, **{k: v for k, v in values.items() if k not in names}}


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


def _put_away(output_dir: Path, name: str, error: NanoOSError) -> None:
    logger.warning("%s is put away: %s", name, error.message)
    (output_dir / name).replace(output_dir / f"{name}{UNREADABLE}")


def _record_segment(output_dir: Path, origin: Origin, ranks: int, threads: int) -> None:
    """Write down where a launch begins, and with how many ranks and threads."""
    path = output_dir / SEGMENT_RECORD
    segments = read_json(path) if path.exists() else []
    segments = [s for s in segments if s["step"] < origin.step]
    this = {**asdict(origin), "ranks": ranks, "threads": threads}
    write_json(path, [*segments, this])


def _is_exact(output_dir: Path) -> bool:
    """Whether the run is to the last bit what it would be without interruption."""
    segments = read_json(output_dir / SEGMENT_RECORD)
    kinds = {(s["ranks"], s.get("threads", 1)) for s in segments}
    files = {s["file"] for s in segments}
    return len(kinds) == 1 and files.isdisjoint((STOP_RESTART, PORTABLE))
