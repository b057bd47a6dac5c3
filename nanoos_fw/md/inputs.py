"""What LAMMPS is given: a checked configuration, the data file and the script.

LAMMPS accepts much that is wrong without a word (a timestep of zero, atoms on top of
each other, a negative temperature), so the ranges are checked here. No text of the
user reaches a script: only numbers that passed their range, elements of the periodic
table and names of a fixed alphabet do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from nanoos_fw.errors import InputError
from nanoos_fw.md.box import LammpsBox
from nanoos_fw.md.cells import site_charges, site_elements, supercell
from nanoos_fw.md.potential_checks import check_potential
from nanoos_fw.md.potentials import (
    Potential,
    atomic_mass,
    check_safe_name,
)
from nanoos_fw.md.trajectory import DUMP_COLUMNS, THERMO_COLUMNS
from nanoos_fw.templates import render_template

if TYPE_CHECKING:
    from pymatgen.core import Structure

__all__ = [
    "LammpsBox",
    "MDConfig",
    "ScriptParts",
    "Stage",
    "barostat_of",
    "data_file_text",
    "render_parts",
    "run_command",
    "site_elements",
    "supercell",
    "write_input",
]

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

DATA_FILE, SCRIPT = "structure.data", "in.lammps"
MAX_INT32 = 2**31 - 1
# Nose-Hoover: periods of about 100 and 1000 steps, as the LAMMPS manual advises.
_THERMOSTAT_STEPS = 100
_BAROSTAT_STEPS = 1000
_SKIN_A = 1.0
_WARN_TIMESTEP_FS, _WARN_TIMESTEP_WITH_H_FS = 5.0, 1.0
_EVALUATIONS_PER_STEP = 10

WorkflowType = Literal[
    "MD_NVT_LAMMPS", "MD_NPT_LAMMPS", "MD_ANNEAL_LAMMPS", "MINIMIZE_LAMMPS"
]
Barostat = Literal["auto", "iso", "aniso", "tri"]


class MDConfig(BaseModel):
    """A simulation, without its structure and potential.

    Parameters
    ----------
    workflow_type
        Constant volume, constant pressure, simulated annealing, or minimization of
        the positions.
    temperature_k
        Temperature; ``temperature`` is accepted too.
    pressure_bar
        Pressure of the barostat; ``pressure`` is accepted too.
    timestep_fs
        Timestep; None takes the potential's. ``timestep`` is accepted too.
    equilibration_steps
        Steps before the ones that averages are taken over.
    num_steps
        Steps of production; for annealing all steps after equilibration; for
        minimization the largest number of steps.
    thermo_every, dump_every
        Steps between rows of the thermo table and between frames; ``dump_every = 0``
        writes no frames.
    restart_every
        Steps between restart files.
    seed
        Seed of the initial velocities.
    supercell_min_atoms
        The cell is repeated until it has at least so many atoms, as near to a cube
        as its shape allows; 1 leaves it.
    thermostat_fs, barostat_fs
        Damping times; None takes 100 and 1000 timesteps.
    barostat
        What may change: ``iso`` one scale, ``aniso`` three lengths, ``tri`` all six;
        ``auto`` is ``aniso`` for orthogonal cells and ``tri`` for others.
    anneal_temperature_k
        Top temperature of annealing. A quarter of the steps heats, a quarter holds,
        the rest cools to ``temperature_k``.
    anneal_ensemble
        Whether annealing is at constant pressure or volume.
    max_force_ev_a
        Minimization ends when no component of a force is larger.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )

    schema_version: Literal[1] = 1
    workflow_type: WorkflowType = "MD_NVT_LAMMPS"
    temperature_k: float = Field(
        default=300.0,
        gt=0.0,
        le=1e5,
        validation_alias=AliasChoices("temperature_k", "temperature"),
    )
    pressure_bar: float = Field(
        default=1.0,
        ge=-1e6,
        le=1e8,
        validation_alias=AliasChoices("pressure_bar", "pressure"),
    )
    timestep_fs: float | None = Field(
        default=None,
        gt=0.0,
        le=20.0,
        validation_alias=AliasChoices("timestep_fs", "timestep"),
    )
    equilibration_steps: int = Field(default=2000, ge=0, le=MAX_INT32)
    num_steps: int = Field(default=10_000, ge=1, le=MAX_INT32)
    thermo_every: int = Field(default=50, ge=1, le=MAX_INT32)
    dump_every: int = Field(default=100, ge=0, le=MAX_INT32)
    restart_every: int = Field(default=2000, ge=1, le=MAX_INT32)
    seed: int = Field(default=1, ge=1, le=MAX_INT32)
    supercell_min_atoms: int = Field(default=1, ge=1, le=10_000_000)
    thermostat_fs: float | None = Field(default=None, gt=0.0, le=1e6)
    barostat_fs: float | None = Field(default=None, gt=0.0, le=1e7)
    barostat: Barostat = "auto"
    anneal_temperature_k: float | None = Field(default=None, gt=0.0, le=1e5)
    anneal_ensemble: Literal["npt", "nvt"] = "npt"
    max_force_ev_a: float = Field(default=1e-3, gt=0.0, le=10.0)

    @model_validator(mode="after")
    def _consistent(self) -> MDConfig:
        if self.workflow_type == "MD_ANNEAL_LAMMPS":
            top = self.anneal_temperature_k
            if top is None or top <= self.temperature_k:
                raise ValueError(
                    "MD_ANNEAL_LAMMPS needs anneal_temperature_k above temperature_k "
                    f"({self.temperature_k} K), not {top}"
                )
            if self.num_steps < 4:
                raise ValueError("annealing needs at least 4 steps")
        elif self.anneal_temperature_k is not None:
            raise ValueError("anneal_temperature_k belongs to MD_ANNEAL_LAMMPS only")
        if self.equilibration_steps + self.num_steps > MAX_INT32:
            raise ValueError("LAMMPS runs at most 2147483647 steps")
        return self

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> MDConfig:
        """Return the checked configuration of loose parameters.

        Raises
        ------
        InputError
            Naming every parameter that is unknown or out of range.
        """
        try:
            return cls.model_validate(dict(parameters))
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, item['loc'])) or 'parameters'}: {item['msg']}"
                for item in error.errors()
            ]
            raise InputError(
                f"the simulation cannot be set up: {'; '.join(problems)}",
                evidence={"problems": problems},
                advice="correct these parameters",
            ) from error

    @property
    def is_dynamics(self) -> bool:
        """Whether atoms move in time, rather than downhill."""
        return self.workflow_type != "MINIMIZE_LAMMPS"

    @property
    def total_steps(self) -> int:
        """Equilibration and production together."""
        return self.num_steps + (self.equilibration_steps if self.is_dynamics else 0)

    def stages(self) -> tuple[Stage, ...]:
        """Return the schedule."""
        low, first, last = (
            self.temperature_k,
            self.equilibration_steps,
            self.total_steps,
        )
        pressure: Ensemble = "npt"
        if self.workflow_type == "MINIMIZE_LAMMPS":
            return (Stage("minimization", "minimize", 0, last, low, low),)
        if self.workflow_type == "MD_NVT_LAMMPS":
            return (Stage("constant volume", "nvt", 0, last, low, low),)
        if self.workflow_type == "MD_NPT_LAMMPS":
            return (Stage("constant pressure", pressure, 0, last, low, low),)
        high = self.anneal_temperature_k or low
        ensemble = self.anneal_ensemble
        quarter = self.num_steps // 4
        stages = [
            Stage("equilibration", ensemble, 0, first, low, low),
            Stage("heating", ensemble, first, first + quarter, low, high),
            Stage(
                "holding", ensemble, first + quarter, first + 2 * quarter, high, high
            ),
            Stage("cooling", ensemble, first + 2 * quarter, last, high, low),
        ]
        return tuple(stage for stage in stages if stage.last_step > stage.first_step)


Ensemble = Literal["nvt", "npt", "minimize"]


@dataclass(frozen=True)
class Stage:
    """A part of a simulation with one ensemble and one temperature ramp.

    Parameters
    ----------
    name
        For the log.
    ensemble
        ``nvt``, ``npt`` or ``minimize``; also the name of the template.
    first_step, last_step
        Timesteps between which it runs.
    start_k, stop_k
        Temperatures at its ends.
    """

    name: str
    ensemble: Ensemble
    first_step: int
    last_step: int
    start_k: float
    stop_k: float


@dataclass(frozen=True)
class ScriptParts:
    """The commands of a simulation; `script` is all of them in order.

    Parameters
    ----------
    start
        Creates the system from the data file.
    settings
        Timestep, neighbour list and thermo output.
    velocities
        Initial velocities.
    output
        Restart files and frames.
    stages
        For each stage of the schedule, the commands before its run.
    runs
        For each stage, the run itself; empty for minimization, whose commands run.
    """

    start: str
    settings: str
    velocities: str
    output: str
    stages: tuple[str, ...]
    runs: tuple[str, ...]

    @property
    def script(self) -> str:
        """The whole input script."""
        body = [self.start, self.settings, self.velocities, self.output]
        for stage, run in zip(self.stages, self.runs, strict=True):
            body += [stage, f"{run}\nunfix integrate\n" if run else ""]
        body.append("write_data final.data\n")
        return "\n".join(part for part in body if part)


def render_parts(
    config: MDConfig,
    potential: Potential,
    elements: Sequence[str],
    box: LammpsBox,
    *,
    first_step: int = 0,
    restart_file: str | None = None,
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
    first_step
        Step at which this segment begins; it names the trajectory file.
    restart_file
        Restart file to begin from instead of the data file.

    Raises
    ------
    InputError
        If the potential does not know an element, or a file name is unsafe.
    """
    step_ps = (config.timestep_fs or potential.timestep_fs) / 1000.0
    title = f"{config.workflow_type} of {' '.join(elements)} with {potential.name}"
    common = {
        "title": "".join(c for c in title if c.isalnum() or c in " ._-"),
        "units": potential.units,
        "pair_commands": "\n".join(potential.pair_commands(elements)),
    }
    if restart_file is None:
        start = render_template(
            "lammps/start.in",
            atom_style=potential.atom_style,
            data_file=DATA_FILE,
            **common,
        )
    else:
        start = render_template(
            "lammps/resume.in", restart_file=check_safe_name(restart_file), **common
        )
    settings = render_template(
        "lammps/settings.in",
        skin_a=_SKIN_A,
        timestep_ps=repr(step_ps),
        thermo_columns=" ".join(THERMO_COLUMNS),
        thermo_every=config.thermo_every,
    )
    output = ""
    if config.is_dynamics:
        output += render_template(
            "lammps/restart.in", restart_every=config.restart_every
        )
        if config.dump_every:
            output += render_template(
                "lammps/output.in",
                dump_every=config.dump_every,
                first_step=f"{first_step:012d}",
                dump_columns=" ".join(DUMP_COLUMNS),
            )
    velocities = ""
    if config.is_dynamics and restart_file is None:
        velocities = render_template(
            "lammps/velocities.in",
            temperature_k=repr(config.stages()[0].start_k),
            seed=config.seed,
        )
    stages = tuple(_stage(s, config, box, step_ps) for s in config.stages())
    runs = tuple(
        run_command(s, s.last_step) if config.is_dynamics else ""
        for s in config.stages()
    )
    return ScriptParts(start, settings, velocities, output, stages, runs)


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
    charges
        ``(n_atoms,) float64``, e, for atom style ``charge``; None is ``atomic``.
    """
    lengths, tilts = box.lengths, box.tilts
    lines = [
        "# " + " ".join(elements) + ": lengths in Angstrom, masses in u",
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
        lines.append(f"{number} {atomic_mass(element):.17g} # {element}")
    style = "atomic" if charges is None else "charge"
    lines += ["", f"Atoms # {style}", ""]
    types = {element: i for i, element in enumerate(elements, start=1)}
    for i, (symbol, xyz) in enumerate(
        zip(species, box.positions(frac_coords), strict=True), start=1
    ):
        charge = "" if charges is None else f"{charges[i - 1]:.17g} "
        place = " ".join(f"{x:.17g}" for x in xyz)
        lines.append(f"{i} {types[symbol]} {charge}{place}")
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
    matrix, frac = structure.lattice.matrix, structure.frac_coords
    box = LammpsBox.from_lattice(matrix)
    timestep_fs = config.timestep_fs or potential.timestep_fs
    limit = _WARN_TIMESTEP_WITH_H_FS if "H" in elements else _WARN_TIMESTEP_FS
    if config.is_dynamics and timestep_fs > limit:
        logger.warning("a timestep of %g fs is long: atoms may get lost", timestep_fs)
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
    text = data_file_text(box, elements, species, frac, triclinic=tri, charges=charges)
    (directory / DATA_FILE).write_text(text, encoding="utf-8")
    (directory / SCRIPT).write_text(parts.script, encoding="utf-8")
    return box, elements


def _stage(stage: Stage, config: MDConfig, box: LammpsBox, step_ps: float) -> str:
    if stage.ensemble == "minimize":
        return render_template(
            "lammps/minimize.in",
            name=stage.name,
            max_force_ev_a=repr(config.max_force_ev_a),
            num_steps=config.num_steps,
            max_evaluations=min(MAX_INT32, _EVALUATIONS_PER_STEP * config.num_steps),
        )
    thermostat_ps = (
        _THERMOSTAT_STEPS * step_ps
        if config.thermostat_fs is None
        else config.thermostat_fs / 1000.0
    )
    fields: dict[str, object] = {
        "name": stage.name,
        "start_k": repr(stage.start_k),
        "stop_k": repr(stage.stop_k),
        "thermostat_ps": repr(thermostat_ps),
    }
    if stage.ensemble == "npt":
        barostat_ps = (
            _BAROSTAT_STEPS * step_ps
            if config.barostat_fs is None
            else config.barostat_fs / 1000.0
        )
        barostat = barostat_of(config, box)
        fields |= {
            "barostat": barostat,
            "pressure_bar": repr(config.pressure_bar),
            "barostat_ps": repr(barostat_ps),
            # A flipped box would no longer be the basis the results are mapped by.
            "flip": " flip no" if barostat == "tri" else "",
        }
    return render_template(f"lammps/{stage.ensemble}.in", **fields)


def _uses_tri(config: MDConfig, box: LammpsBox) -> bool:
    uses = any(stage.ensemble == "npt" for stage in config.stages())
    return uses and barostat_of(config, box) == "tri"
