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
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.errors import InputError, LaunchError, SimulationError
from nanoos_fw.faults import crashed
from nanoos_fw.md.catalogue import Catalogue
from nanoos_fw.md.cells import check_finite, site_charges, site_elements, supercell
from nanoos_fw.md.failures import changes, correction, refuse_more_corrections
from nanoos_fw.md.inputs import (
    DATA_FILE,
    SCRIPT,
    MDConfig,
    timestep_warnings,
    write_input,
)
from nanoos_fw.md.output import (
    CORRECTIONS,
    OUTPUT,
    SIMULATION,
    convergence,
    corrections_of,
    final_structure,
    newest_try,
    not_converged,
    parse_output,
    read_simulation,
    simulation_box,
    simulation_thermo,
)
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.protocols import ALIASES, PROPERTIES
from nanoos_fw.md.restarts import (
    UNREADABLE,
    drop_segments_after,
    is_exact,
    newest_origin,
    put_away,
    record_segment,
)
from nanoos_fw.md.simulation import CONFIG
from nanoos_fw.md.trajectory import read_thermo
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

FINISHED = "finished.json"
_INPUT = "input"
EXECUTABLE = "nanoos_fw.md.executable"
# Without a new timestep or row for so long, a rank is taken to hang.
STALL_S = 1800.0
_MAX_UNREADABLE = 4


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
        LAMMPS executable to use instead of the Python module, which makes elastic
        constants and equations of state all the same; None takes the setting
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
        done = corrections_of(work_dir)
        values = _named(parameters)
        # What was corrected is not asked for anew by other parameters.
        self._refuse_another(structure, values, work_dir)
        refuse_more_corrections(done, max_corrections)
        for entry in done:
            values |= {name: new for name, (_, new) in entry["changes"].items()}
        while True:
            place = newest_try(work_dir)
            input_dir = self.prepare_input(structure, values, place)
            try:
                outcome = self.execute(input_dir, place / OUTPUT, **options)
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
                        "failed_output": str(place / OUTPUT),
                    }
                )
                write_json(work_dir / CORRECTIONS, done)
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
        self._refuse_another(structure, parameters, work_dir)
        directory = work_dir / _INPUT
        plan = _Plan.of(structure, parameters, directory)
        box, elements = write_input(plan.cell, plan.config, plan.potential, directory)
        warnings = timestep_warnings(plan.config, plan.potential, elements)
        write_json(directory / SIMULATION, {**plan.simulation, "warnings": warnings})
        lengths = " × ".join(f"{length:.2f}" for length in box.lengths)
        logger.info("%d atoms in a box of %s Å", len(plan.cell), lengths)
        return directory

    def _refuse_another(
        self, structure: Structure, parameters: Mapping[str, Any], work_dir: Path
    ) -> None:
        """Refuse another simulation than the one whose output is there already.

        Before anything is written: the input of that one stays what it was.
        """
        output_dir = work_dir / OUTPUT
        if not (output_dir / SIMULATION).exists():
            return
        with tempfile.TemporaryDirectory() as folder:
            plan = _Plan.of(structure, parameters, Path(folder))
        _check_key(output_dir, plan.simulation["key"])

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
        _check_key(output_dir, simulation["key"])
        if (output_dir / FINISHED).exists():
            finished: dict[str, Any] = read_json(output_dir / FINISHED)
            return finished
        for name in (DATA_FILE, SCRIPT):
            shutil.copyfile(input_dir / name, output_dir / name)
        potential = Potential.model_validate(simulation["potential"])
        # The copy beside the script, so that a moved work directory still runs.
        potential.relocated(input_dir).install(output_dir)
        write_json(output_dir / SIMULATION, simulation)
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
            "exact": is_exact(output_dir),
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
        config = MDConfig.model_validate(simulation["config"])
        ranks, threads = resources.ranks, resources.threads
        extra: dict[str, Any] = {}
        if config.workflow_type in PROPERTIES:
            module = "nanoos_fw.md.properties"
        else:
            command = self.command or load_settings().lammps_command
            if command:
                # A rank program too, of one rank: it starts and stops the executable.
                module = EXECUTABLE
                extra = {
                    "command": command,
                    "ranks": resources.ranks,
                    "launcher": resources.launcher,
                }
                resources = Resources(1, resources.threads)
        # Ranks whose parent was killed may write for another moment.
        clear_messages(output_dir)
        for _ in range(_MAX_UNREADABLE):
            origin = newest_origin(output_dir, config)
            drop_segments_after(output_dir, origin.step)
            record_segment(output_dir, origin, ranks, threads)
            task = {
                "simulation": simulation,
                "deadline": deadline,
                "origin": asdict(origin),
                "threads": threads,
                **extra,
            }
            write_json(output_dir / CONFIG, task, durable=False)
            try:
                server = self._server_for(module, resources)
                if server is not None:
                    return server.run(
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
                put_away(output_dir, origin.file, error)
            except LaunchError as error:
                # Damage that LAMMPS does not survive: it died before its first row.
                if not crashed(error.evidence.get("exit_code")):
                    raise
                log = output_dir / f"log.{origin.step:012d}.lammps"
                if origin.file is None or (log.exists() and len(read_thermo(log))):
                    raise
                put_away(output_dir, origin.file, error)
        raise SimulationError(
            f"no restart file in {output_dir} can be read",
            evidence={"class": "restart_unreadable"},
            advice=f"look at the files that end in {UNREADABLE}",
        )

    def _server_for(self, module: str, resources: Resources) -> ForkServer | None:
        """Return the server, if it has what is asked for: program, rank, threads."""
        server = self.server
        if server is None or module == EXECUTABLE or resources.launcher is not None:
            return None
        fits = resources.ranks == 1 and resources.threads == server.threads
        return server if fits else None

    def parse_output(self, output_dir: Path) -> dict[str, Any]:
        """Read what a simulation left, finished or not.

        Returns and errors are those of `output.parse_output`.
        """
        return parse_output(output_dir)


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


@dataclass(frozen=True)
class _Plan:
    """A simulation before its files are written; ``simulation`` describes it."""

    cell: Structure
    config: MDConfig
    potential: Potential
    simulation: dict[str, Any]

    @classmethod
    def of(
        cls, structure: Structure, parameters: Mapping[str, Any], directory: Path
    ) -> _Plan:
        """Make sense of parameters; a generated potential is in the directory."""
        values = dict(parameters)
        chosen = values.pop("potential", None)
        config = MDConfig.from_parameters(values)
        potential = Catalogue().resolve(chosen, site_elements(structure), directory)
        cell = supercell(structure, config.supercell_min_atoms)
        species = site_elements(cell)
        check_finite(species, cell.lattice.matrix, cell.frac_coords)  # the key is JSON
        simulation = {
            "config": config.model_dump(mode="json"),
            "potential": potential.model_dump(mode="json"),
            "elements": sorted(set(species)),
            "species": species,
            "lattice": cell.lattice.matrix.tolist(),
            "frac_coords": cell.frac_coords.tolist(),
        }
        charges = site_charges(cell) if potential.charges != "none" else None
        if charges is not None:
            simulation["charges"] = charges.tolist()
        # Interactions are equal whatever timestep a recipe advises; runs are not.
        timestep_fs = (config.timestep_fs or potential.timestep_fs) * config.is_dynamics
        key = content_key(
            "simulation",
            {
                **simulation,
                "potential": potential.identity,
                "timestep_fs": timestep_fs,
            },
        )
        return cls(cell, config, potential, {"key": key, **simulation})


def _check_key(output_dir: Path, key: str) -> None:
    """Refuse a folder that holds the output of another simulation."""
    path = output_dir / SIMULATION
    if path.exists() and (found := read_json(path).get("key")) != key:
        raise InputError(
            f"{output_dir} holds the output of another simulation",
            evidence={"key": found, "new": key},
            advice="choose an empty folder",
        )


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with one name each: a correction overrides what was given."""
    chosen: dict[str, Any] = {}
    for given, value in values.items():
        name = ALIASES.get(given, given)
        if name in chosen:
            raise InputError(f"{name} is given twice, by two names", advice="give one")
        chosen[name] = value
    return chosen
