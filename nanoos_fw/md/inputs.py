"""What LAMMPS is given: a checked configuration, the data file and the script.

LAMMPS accepts much that is wrong without a word (a timestep of zero, atoms on top of
each other, a negative temperature), so the ranges are checked here. No text of the
user reaches a script: only numbers that passed their range, elements of the periodic
table and names of a fixed alphabet do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.md.box import LammpsBox
from nanoos_fw.md.cells import site_charges, site_elements, supercell
from nanoos_fw.md.potential_checks import check_potential
from nanoos_fw.md.potential_terms import atomic_mass, check_safe_name
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.protocols import MAX_INT32, MDConfig, Stage
from nanoos_fw.md.trajectory import DUMP_COLUMNS, THERMO_COLUMNS
from nanoos_fw.md.unit_systems import UnitSystem, unit_system
from nanoos_fw.templates import render_template

if TYPE_CHECKING:
    from pymatgen.core import Structure

__all__ = [
    "LammpsBox",
    "MDConfig",
    "Origin",
    "ScriptParts",
    "Stage",
    "barostat_of",
    "data_file_text",
    "next_restart",
    "render_parts",
    "restart_name",
    "run_command",
    "site_elements",
    "supercell",
    "write_input",
]

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

DATA_FILE, SCRIPT = "structure.data", "in.lammps"
WRITE_FINAL = "write_data final.data nocoeff\n"
# Nose-Hoover: periods of about 100 and 1000 steps, as the LAMMPS manual advises.
_THERMOSTAT_STEPS = 100
_BAROSTAT_STEPS = 1000
_WARN_TIMESTEP_FS, _WARN_TIMESTEP_WITH_H_FS = 5.0, 1.0
_SAFE_FACTOR = 2.0
_EVALUATIONS_PER_STEP = 10
_MAX_MOVE_A = 0.1
_CELL_ROUNDS = 10


@dataclass(frozen=True)
class ScriptParts:
    """The commands of a simulation; `script` is all of them in order.

    Parameters
    ----------
    start
        Creates the system from the data file, or reads it from a restart file.
    settings
        Timestep, neighbour list and thermo output.
    prelude
        Minimization before the dynamics, and initial velocities.
    output
        Frames.
    stages
        For each stage of the schedule, the commands before its run.
    runs
        For each stage, its run with the restart files in between; empty for
        minimization, whose commands run.
    """

    start: str
    settings: str
    prelude: str
    output: str
    stages: tuple[str, ...]
    runs: tuple[str, ...]

    @property
    def script(self) -> str:
        """The whole input script."""
        return self._text([True] * len(self.stages), "")

    def script_after(self, step: int, config: MDConfig, *, timer: str = "") -> str:
        """Return the script of what is left to do after a timestep.

        Parameters
        ----------
        step
            Timestep that the script begins at.
        config
            The simulation.
        timer
            Command that limits the time, after the settings.
        """
        left = [
            not config.is_dynamics or stage.last_step > step
            for stage in config.stages()
        ]
        return self._text(left, timer)

    def _text(self, wanted: Sequence[bool], timer: str) -> str:
        body = [self.start, self.settings + timer, self.prelude, self.output]
        for number, (stage, run, do) in enumerate(
            zip(self.stages, self.runs, wanted, strict=True), start=1
        ):
            if do:
                body += [stage, f"{run}unfix {fix_of(number)}\n" if run else ""]
        body.append(WRITE_FINAL)
        return "\n".join(part for part in body if part)


@dataclass(frozen=True)
class Origin:
    """What a segment of a simulation begins from.

    Parameters
    ----------
    step
        Timestep; it names the segment's files.
    file
        Restart file or portable data file; None begins with the structure.
    """

    step: int = 0
    file: str | None = None

    @property
    def is_portable(self) -> bool:
        """Whether the file is text that any LAMMPS reads, without thermostat."""
        return self.file is not None and self.file.endswith(".data")


def render_parts(
    config: MDConfig,
    potential: Potential,
    elements: Sequence[str],
    box: LammpsBox,
    *,
    origin: Origin | None = None,
    on_stop: str = "",
    threads: int = 1,
) -> ScriptParts:
    """Return the LAMMPS commands of a simulation.

    Parameters
    ----------
    config
        The simulation.
    potential
        The potential; its files go beside the script.
    elements
        The element of each atom type.
    box
        The box, which decides on the barostat.
    origin
        What this segment begins from; None begins with the structure.
    on_stop
        Commands, each in quotes, for when LAMMPS' clock ends a run too early.
    threads
        OpenMP threads of each rank; more than one takes the ``omp`` variants of
        styles, whose sums have another order.

    Raises
    ------
    InputError
        If the potential does not know an element, or a file name is unsafe.
    """
    origin = origin or Origin()
    units = unit_system(potential.units)
    timestep_fs = config.timestep_fs or potential.timestep_fs
    title = f"{config.workflow_type} of {' '.join(elements)} with {potential.name}"
    common = {
        "title": "".join(c for c in title if c.isalnum() or c in " ._-"),
        "system_commands": "\n".join(potential.system_commands()),
        "suffix": _suffix(threads),
        "pair_commands": "\n".join(potential.pair_commands(elements)),
    }
    if origin.file is None or origin.is_portable:
        start = render_template(
            "lammps/start.in",
            data_file=check_safe_name(origin.file or DATA_FILE),
            **common,
        )
    else:
        start = render_template(
            "lammps/resume.in", restart_file=check_safe_name(origin.file), **common
        )
    settings = render_template(
        "lammps/settings.in",
        skin=repr(units.to_lammps("length", config.neighbor_skin_a)),
        neighbor_every=config.neighbor_every,
        neighbor_one=config.neighbor_one,
        neighbor_page=max(100_000, 10 * config.neighbor_one),
        timestep=repr(units.to_lammps("time", timestep_fs)),
        thermo_columns=" ".join(THERMO_COLUMNS),
        thermo_every=config.thermo_every,
    )
    if origin.is_portable and origin.step:
        # With the timestep known, from which LAMMPS takes the time so far.
        settings += f"reset_timestep {origin.step}\n"
    output = prelude = ""
    first_frame = origin.step + 1 if origin.file is not None else 0
    if config.is_dynamics and config.dump_every:
        output = render_template(
            "lammps/output.in",
            dump_every=config.dump_every,
            first_step=f"{first_frame:012d}",
            # The frame of this very step ends the segment before.
            delay=f"dump_modify frames delay {first_frame}\n" if first_frame else "",
            dump_columns=" ".join(DUMP_COLUMNS),
        )
    if config.is_dynamics and origin.file is None:
        if config.pre_minimize_steps:
            prelude += minimization(
                "minimization before dynamics", config, units, config.pre_minimize_steps
            )
            prelude += "reset_timestep 0\n"
        prelude += render_template(
            "lammps/velocities.in",
            temperature_k=repr(config.stages()[0].start_k),
            seed=config.seed,
        )
    stages = config.stages()
    return ScriptParts(
        start,
        settings,
        prelude,
        output,
        tuple(
            _stage(stage, number, config, box, units, timestep_fs)
            for number, stage in enumerate(stages, start=1)
        ),
        tuple(
            _run_with_restarts(stage, number, config, on_stop)
            if config.is_dynamics
            else ""
            for number, stage in enumerate(stages, start=1)
        ),
    )


def _suffix(threads: int) -> str:
    """Return the commands that choose among the variants of styles."""
    if threads == 1:
        return "suffix opt"
    return f"package omp {threads}\nsuffix hybrid omp opt"


def fix_of(number: int) -> str:
    """Return the name of the fix of a stage, the first of which is 1.

    Each has its own: LAMMPS hands the thermostat of a restart file to the fix of the
    same name, and that of a stage that is over must not go on in the next.
    """
    return f"stage{number}"


def restart_name(step: int, config: MDConfig) -> str:
    """Return the restart file of a timestep: two take turns."""
    return f"restart.{step // config.restart_every % 2}"


def next_restart(step: int, stage: Stage, config: MDConfig) -> int:
    """Return the timestep up to which LAMMPS runs in one go from here."""
    return min(
        stage.last_step, (step // config.restart_every + 1) * config.restart_every
    )


def run_command(stage: Stage, last_step: int, options: str = "") -> str:
    """Return the command that runs up to a timestep within a stage's ramp."""
    return (
        f"run {last_step} upto start {stage.first_step} stop {stage.last_step}{options}"
    )


def barostat_of(config: MDConfig, box: LammpsBox) -> str:
    """Return which box lengths and tilts the barostat may change."""
    if config.barostat != "auto":
        return config.barostat
    return "aniso" if box.is_orthogonal else "tri"


def data_file_text(
    box: LammpsBox,
    elements: Sequence[str],
    species: Sequence[str],
    frac_coords: Array,
    *,
    triclinic: bool | None = None,
    units: UnitSystem | None = None,
    charges: Array | None = None,
) -> str:
    """Return the LAMMPS data file of a structure, with 17 digits.

    Parameters
    ----------
    box
        Box of the structure's lattice.
    elements
        The element of each atom type.
    species
        The element of each site; atom ``i + 1`` is site ``i``.
    frac_coords
        ``(n_atoms, 3) float64``: fractional coordinates in the lattice.
    triclinic
        Whether to write tilts; None writes them if there are any.
    units
        Unit system of the file; None takes metal units.
    charges
        ``(n_atoms,) float64``: charge of each site in elementary charges, for atom
        style ``charge``; None writes atom style ``atomic``.
    """
    units = units or unit_system("metal")
    one = units.length_a
    lengths, tilts = (np.array(values) / one for values in (box.lengths, box.tilts))
    lines = [
        f"# {' '.join(elements)}: {units.name} units",
        "",
        f"{len(species)} atoms",
        f"{len(elements)} atom types",
        "",
        *(f"0.0 {x:.17g} {a}lo {a}hi" for x, a in zip(lengths, "xyz", strict=True)),
    ]
    if triclinic if triclinic is not None else not box.is_orthogonal:
        lines.append(" ".join(f"{tilt:.17g}" for tilt in tilts) + " xy xz yz")
    lines += ["", "Masses", ""]
    for number, element in enumerate(elements, start=1):
        mass = units.to_lammps("mass", atomic_mass(element))
        lines.append(f"{number} {mass:.17g} # {element}")
    lines += ["", f"Atoms # {'atomic' if charges is None else 'charge'}", ""]
    types = {element: i for i, element in enumerate(elements, start=1)}
    rows = box.positions(frac_coords) / one
    if charges is not None:
        rows = np.column_stack([charges, rows])  # in e in all unit systems
    for i, (symbol, row) in enumerate(zip(species, rows, strict=True), start=1):
        lines.append(f"{i} {types[symbol]} " + " ".join(f"{x:.17g}" for x in row))
    return "\n".join(lines) + "\n"


def write_input(
    structure: Structure, config: MDConfig, potential: Potential, directory: Path
) -> tuple[LammpsBox, tuple[str, ...]]:
    """Write data file, script and potential files into a folder.

    Returns
    -------
    box, elements
        The map to LAMMPS, and the element of each atom type.

    Raises
    ------
    InputError
        If structure, potential and configuration do not go together.
    """
    species = site_elements(structure)
    elements = tuple(sorted(set(species)))
    for warning in check_potential(structure, potential):
        logger.warning("%s", warning)
    config.check_atoms(len(species))
    matrix, frac = structure.lattice.matrix, structure.frac_coords
    box = LammpsBox.from_lattice(matrix)
    for warning in timestep_warnings(config, potential, elements):
        logger.warning("%s", warning)
    parts = render_parts(config, potential, elements, box)
    directory.mkdir(parents=True, exist_ok=True)
    potential.install(directory)
    # A barostat that shears needs a box that can.
    tri = True if _uses_tri(config, box) else None
    charges = None
    if potential.charges != "none":
        # Without charges an equilibration begins from zero.
        found = site_charges(structure)
        charges = np.zeros(len(species)) if found is None else found
    text = data_file_text(
        box,
        elements,
        species,
        frac,
        triclinic=tri,
        units=unit_system(potential.units),
        charges=charges,
    )
    (directory / DATA_FILE).write_text(text, encoding="utf-8")
    (directory / SCRIPT).write_text(parts.script, encoding="utf-8")
    return box, elements


def timestep_warnings(
    config: MDConfig, potential: Potential, elements: Sequence[str]
) -> list[str]:
    """Return what is to be said of a timestep that is longer than is safe."""
    if not config.is_dynamics or config.timestep_fs is None:
        return []
    step, warnings = config.timestep_fs, []
    if step > _SAFE_FACTOR * potential.timestep_fs:
        warnings.append(
            f"a timestep of {step:g} fs is long for {potential.name!r}, whose "
            f"own is {potential.timestep_fs:g} fs: energy may drift, atoms get lost"
        )
    limit = _WARN_TIMESTEP_WITH_H_FS if "H" in elements else _WARN_TIMESTEP_FS
    if step > limit:
        with_h = " with hydrogen" if "H" in elements else ""
        warnings.append(
            f"a timestep of {step:g} fs is long{with_h}: atoms may get lost"
        )
    return warnings


def minimization(name: str, config: MDConfig, units: UnitSystem, steps: int) -> str:
    """Return the commands that minimize the positions."""
    fields = {
        "name": name,
        "max_force": repr(units.to_lammps("force", config.max_force_ev_a)),
        "num_steps": steps,
        "max_evaluations": min(MAX_INT32, _EVALUATIONS_PER_STEP * steps),
        "dmax": repr(units.to_lammps("length", _MAX_MOVE_A)),
    }
    return render_template("lammps/minimize.in", **fields)


def _stage(
    stage: Stage,
    number: int,
    config: MDConfig,
    box: LammpsBox,
    units: UnitSystem,
    timestep_fs: float,
) -> str:
    if stage.ensemble == "minimize":
        text = minimization(stage.name, config, units, config.num_steps)
        if config.relax_cell:
            # The energy of a large strain is not what the fix takes it for, so a
            # new one takes the present cell as its reference, until nothing moves.
            text += _CELL_ROUNDS * render_template(
                "lammps/relax.in",
                fix=fix_of(number),
                barostat=barostat_of(config, box),
                pressure=repr(units.to_lammps("pressure", config.pressure_bar)),
                max_force=repr(units.to_lammps("force", config.max_force_ev_a)),
                num_steps=config.num_steps,
                max_evaluations=min(
                    MAX_INT32, _EVALUATIONS_PER_STEP * config.num_steps
                ),
            )
        return text
    thermostat_fs = config.thermostat_fs or _THERMOSTAT_STEPS * timestep_fs
    fields: dict[str, object] = {
        "name": stage.name,
        "fix": fix_of(number),
        "start_k": repr(stage.start_k),
        "stop_k": repr(stage.stop_k),
        "thermostat": repr(units.to_lammps("time", thermostat_fs)),
    }
    if stage.ensemble == "npt":
        barostat_fs = config.barostat_fs or _BAROSTAT_STEPS * timestep_fs
        barostat = barostat_of(config, box)
        fields |= {
            "barostat": barostat,
            "pressure": repr(units.to_lammps("pressure", config.pressure_bar)),
            "barostat_time": repr(units.to_lammps("time", barostat_fs)),
            # A flipped box would no longer be the basis the results are mapped by.
            "flip": " flip no" if barostat == "tri" else "",
        }
    return render_template(f"lammps/{stage.ensemble}.in", **fields)


def _run_with_restarts(
    stage: Stage, number: int, config: MDConfig, on_stop: str
) -> str:
    """Return the run of a stage, set up anew after each restart file."""
    if next_restart(stage.first_step, stage, config) == stage.last_step:
        text = run_command(stage, stage.last_step, " post no") + "\n"
        if on_stop:
            text += f'if "$(step) < {stage.last_step}" then {on_stop}\n'
        if stage.last_step % config.restart_every == 0:
            text += f"write_restart {restart_name(stage.last_step, config)}\n"
        return text
    return render_template(
        "lammps/blocks.in",
        number=number,
        every=config.restart_every,
        first_step=stage.first_step,
        last_step=stage.last_step,
        check=f'if "$(step) < ${{goal}}" then {on_stop}\n' if on_stop else "",
    )


def _uses_tri(config: MDConfig, box: LammpsBox) -> bool:
    changes = config.relax_cell or any(s.ensemble == "npt" for s in config.stages())
    return changes and barostat_of(config, box) == "tri"
