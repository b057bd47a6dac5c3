"""The LAMMPS engine: prepare a simulation, run it on MPI ranks, read its output.

`LAMMPSEngine` is what callers use; the module is also the rank program that holds
LAMMPS. The ranks run the same commands as the script ``in.lammps`` of the input
folder, in short pieces (``run ... pre no``), between which all of them agree whether
to stop. A stopped or killed simulation goes on from its newest whole restart file to
the same last step; rows and frames that are computed again replace the earlier ones.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import (
    InputError,
    OutOfTimeError,
    SimulationError,
)
from nanoos_fw.md.box import LammpsBox
from nanoos_fw.md.calculator import check_pair_style, open_lammps, run_commands
from nanoos_fw.md.catalogue import Catalogue
from nanoos_fw.md.cells import site_elements, supercell
from nanoos_fw.md.inputs import (
    DATA_FILE,
    SCRIPT,
    MDConfig,
    Stage,
    render_parts,
    run_command,
    write_input,
)
from nanoos_fw.md.output import (
    FINAL,
    SIMULATION,
    averages,
    final_structure,
    read_simulation,
    simulation_box,
    simulation_thermo,
)
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.trajectory import (
    first_step_of,
    read_thermo,
    segment_files,
)
from nanoos_fw.parallel import (
    Communicator,
    Resources,
    StopRequest,
    launch_ranks,
    report_progress,
    run_rank_program,
)
from nanoos_fw.provenance import content_key, read_json, write_json

if TYPE_CHECKING:
    from pymatgen.core import Structure

__all__ = [
    "ENGINES",
    "LAMMPSEngine",
    "final_structure",
    "get_engine",
    "main",
    "simulation_box",
    "simulation_thermo",
]

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

CONFIG, FINISHED = "md.json", "finished.json"
_INPUT = "input"
_STOP_RESTART = "restart.stop"
_RESTARTS = ("restart.a", "restart.b", _STOP_RESTART)
# Ranks ask about a stop this often; the first pieces are short and find the pace.
_PIECE_S = 1.0
_FIRST_PIECE = 10
_MAX_PACE = 5.0


class LAMMPSEngine:
    """Classical molecular dynamics with LAMMPS.

    Examples
    --------
    >>> engine = LAMMPSEngine()
    >>> inputs = engine.prepare_input(structure, {"temperature": 300.0}, work_dir)
    >>> engine.execute(inputs, work_dir / "output", resources=Resources(ranks=2))
    >>> engine.parse_output(work_dir / "output")["avg_temperature"]
    """

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
        identity = {**simulation, "potential": potential.identity}
        write_json(
            directory / SIMULATION,
            {"key": content_key("simulation", identity), **simulation},
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

        Returns
        -------
        dict
            ``success`` (True), ``steps``, ``n_atoms``, ``segments``, ``wall_s``,
            ``output_dir``, ``lammps_version``.

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
        write_json(output_dir / CONFIG, {"simulation": simulation, "deadline": end})
        began = time.time()
        result = launch_ranks(
            "nanoos_fw.md.engine",
            output_dir / CONFIG,
            resources=resources or Resources(),
            deadline=end,
        )
        outcome = {
            "success": True,
            **result,
            "wall_s": time.time() - began,
            "output_dir": str(output_dir),
        }
        write_json(output_dir / FINISHED, outcome)
        return outcome

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
            ``trajectory_files``.

        Raises
        ------
        InputError
            If the folder holds no simulation.
        """
        simulation = read_simulation(output_dir)
        config = MDConfig.model_validate(simulation["config"])
        table = simulation_thermo(output_dir)
        production = table
        if config.is_dynamics and config.equilibration_steps:
            production = table.after(config.equilibration_steps)
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
        if complete:
            result["final_structure"] = final_structure(output_dir).as_dict()
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


# ---------------------------------------------------------------------------- ranks


@dataclass
class _Pace:
    """How many steps make a piece of about a second; the same on all ranks."""

    steps: int = _FIRST_PIECE

    def learn(self, done: int, seconds: float) -> None:
        wanted = done * _PIECE_S / max(seconds, 1e-3)
        self.steps = max(1, int(min(wanted, _MAX_PACE * self.steps)))


def main(
    config: dict[str, Any], work_dir: Path, comm: Communicator, stop: StopRequest
) -> dict[str, Any]:
    """Rank program: run the simulation of ``md.json``, from a restart if there is."""
    simulation = config["simulation"]
    md = MDConfig.model_validate(simulation["config"])
    potential = Potential.model_validate(simulation["potential"])
    box = LammpsBox.from_lattice(np.array(simulation["lattice"]))
    found = _newest_restart(work_dir) if comm.rank == 0 else None
    if comm.rank == 0:
        _drop_segments_after(work_dir, found[1] if found else 0)
    restart, first_step = comm.broadcast(found) or (None, 0)
    parts = render_parts(
        md,
        potential,
        simulation["elements"],
        box,
        first_step=first_step,
        restart_file=restart,
    )
    log = work_dir / f"log.{first_step:012d}.lammps"
    # The ranks work in work_dir, so files are named without folders.
    lmp = open_lammps(comm.mpi, log=Path(log.name), accelerated=True)
    check_pair_style(lmp, potential)
    try:
        run_commands(lmp, parts.start)
        _check_atoms(lmp, len(simulation["species"]))
        run_commands(lmp, parts.settings + parts.velocities + parts.output)
        for stage, commands in zip(md.stages(), parts.stages, strict=True):
            if _step(lmp) >= stage.last_step:
                continue
            run_commands(lmp, commands)
            if stage.ensemble != "minimize":
                _run_stage(lmp, stage, md, work_dir, comm, stop)
                run_commands(lmp, "unfix integrate")
        _write_final(lmp, work_dir, comm)
    except SimulationError as error:
        table = read_thermo(log) if log.exists() else None
        error.evidence["last_step"] = int(table.step[-1]) if table else 0
        raise
    result = {
        "steps": _step(lmp),
        "n_atoms": len(simulation["species"]),
        "segments": len(segment_files(work_dir, "log.*.lammps")),
        "lammps_version": int(lmp.version()),
        "ranks": comm.size,
    }
    lmp.close()
    return result


def _run_stage(
    lmp: Any,
    stage: Stage,
    config: MDConfig,
    work_dir: Path,
    comm: Communicator,
    stop: StopRequest,
) -> None:
    pace, options = _Pace(), " post no"
    while (step := _step(lmp)) < stage.last_step:
        if comm.any(stop.requested):
            # Written beside and renamed: a kill during the write leaves the old one.
            run_commands(lmp, f"write_restart {_STOP_RESTART}.new")
            if comm.rank == 0:
                (work_dir / f"{_STOP_RESTART}.new").replace(work_dir / _STOP_RESTART)
            comm.barrier()
            raise OutOfTimeError(
                f"stopped by {stop.reason} at step {step} of {config.total_steps}",
                evidence={"step": step, "total_steps": config.total_steps},
                advice="execute it again: it continues from here",
            )
        began = time.monotonic()
        target = min(stage.last_step, step + pace.steps)
        run_commands(lmp, run_command(stage, target, options))
        # Later pieces go on as if there had been no pause.
        options = " pre no post no"
        pace.learn(target - step, time.monotonic() - began)
        pace.steps = comm.broadcast(pace.steps)
        if comm.rank == 0:
            report_progress(work_dir, target, config.total_steps, "timesteps")


def _check_atoms(lmp: Any, n_atoms: int) -> None:
    if lmp.get_natoms() != n_atoms:
        raise SimulationError(
            f"LAMMPS read {lmp.get_natoms()} of {n_atoms} atoms",
            evidence={"class": "atoms_not_created"},
        )


def _step(lmp: Any) -> int:
    return int(lmp.extract_global("ntimestep"))


def _newest_restart(work_dir: Path) -> tuple[str, int] | None:
    """Return the restart file with the largest step that LAMMPS can read.

    Tried in an instance of one rank: a cut file raises on one rank only, and the
    others of a larger instance would wait for it for ever.
    """
    found = []
    for name in _RESTARTS:
        if not (work_dir / name).exists():
            continue
        lmp = open_lammps()
        try:
            run_commands(lmp, f"read_restart {name}")
            found.append((_step(lmp), name))
        except SimulationError as error:
            logger.warning("%s cannot be read: %s", name, error)
        finally:
            lmp.close()
    if not found:
        return None
    step, name = max(found)
    return name, step


def _drop_segments_after(work_dir: Path, step: int) -> None:
    """Put away segments that begin later: they belong to a past that is left.

    That happens when the newest restart file was cut and an older one is used.
    """
    for pattern in ("log.*.lammps", "trajectory.*.bin"):
        for path in segment_files(work_dir, pattern):
            if first_step_of(path) > step:
                logger.warning("%s is computed again", path)
                path.replace(path.with_name(f"{path.name}.dropped"))


def _write_final(lmp: Any, work_dir: Path, comm: Communicator) -> None:
    run_commands(lmp, "write_data final.data")
    positions = np.array(lmp.gather_atoms("x", 1, 3)).reshape(-1, 3)
    low, high, xy, yz, xz, *_ = lmp.extract_box()
    lx, ly, lz = np.array(high) - np.array(low)
    matrix = np.array([[lx, 0.0, 0.0], [xy, ly, 0.0], [xz, yz, lz]])
    if not np.isfinite(positions).all():
        raise SimulationError(
            "positions are not finite", evidence={"class": "not_a_number"}
        )
    if comm.rank == 0:
        write_json(
            work_dir / FINAL,
            {
                "step": _step(lmp),
                "matrix": matrix.tolist(),
                "positions": (positions - np.array(low)).tolist(),
            },
        )


if __name__ == "__main__":
    run_rank_program(main)
