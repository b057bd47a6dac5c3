"""What a simulation does: its parameters, checked, and the schedule they stand for.

Users give K, fs, bar, Å and eV, whatever units the potential was fitted in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from nanoos_fw.errors import InputError

MAX_INT32 = 2**31 - 1

WorkflowType = Literal[
    "MD_NVE_LAMMPS",
    "MD_NVT_LAMMPS",
    "MD_NPT_LAMMPS",
    "MD_ANNEAL_LAMMPS",
    "MD_MELT_QUENCH_LAMMPS",
    "MINIMIZE_LAMMPS",
    "STATIC_LAMMPS",
    "ELASTIC_LAMMPS",
    "EOS_LAMMPS",
]
Barostat = Literal["auto", "iso", "aniso", "tri"]
Ensemble = Literal["nve", "nvt", "npt", "minimize", "static"]

# Names of LAMMPS users, and the fields they stand for.
ALIASES = {
    "temperature": "temperature_k",
    "pressure": "pressure_bar",
    "timestep": "timestep_fs",
}
# No steps in time.
STILL_WORKFLOWS = ("MINIMIZE_LAMMPS", "STATIC_LAMMPS", "ELASTIC_LAMMPS", "EOS_LAMMPS")
# Many structures through one instance, instead of one script.
PROPERTIES = ("ELASTIC_LAMMPS", "EOS_LAMMPS")
_FLAGS = ("relax_cell",)
_RAMPS = ("MD_ANNEAL_LAMMPS", "MD_MELT_QUENCH_LAMMPS")


class ScheduleStep(BaseModel):
    """One part of an annealing schedule, which begins where the one before ended.

    Parameters
    ----------
    action
        ``heat`` and ``cool`` change the temperature at a constant rate; ``hold``
        keeps it.
    steps
        Timesteps.
    temperature_k
        Temperature at the end; None for ``hold``.
    ensemble
        Constant pressure or volume; None takes ``anneal_ensemble``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    action: Literal["heat", "hold", "cool"]
    steps: int = Field(ge=1, le=MAX_INT32)
    temperature_k: float | None = Field(default=None, gt=0.0, le=1e5)
    ensemble: Literal["npt", "nvt"] | None = None


class MDConfig(BaseModel):
    """A simulation, without its structure and potential.

    Parameters
    ----------
    workflow_type
        Constant energy, volume or pressure; annealing; melting and quenching;
        minimization; one evaluation; elastic constants; equation of state.
    temperature_k
        Temperature; ``temperature`` is accepted too.
    pressure_bar
        Pressure of the barostat, or to minimize at; ``pressure`` is accepted too.
    timestep_fs
        Timestep; None takes the potential's. ``timestep`` is accepted too.
    equilibration_steps
        Steps before the ones that averages are taken over. Those of constant energy
        are at constant temperature; those of melting are the melt.
    num_steps
        Steps of production; for annealing all steps after equilibration; for
        minimization the largest number of steps.
    thermo_every, dump_every
        Steps between rows of the thermo table and between frames; ``dump_every = 0``
        writes no frames.
    restart_every
        Steps between restart files. At these steps a simulation is set up anew, so
        that one continued from there is the same to the last bit.
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
        Top temperature of annealing, or of the melt. Without a schedule, a quarter of
        the steps of annealing heats, a quarter holds, the rest cools to
        ``temperature_k``; three quarters of those of melting and quenching quench,
        the rest holds.
    schedule
        Parts of annealing after equilibration; instead of ``anneal_temperature_k``.
    anneal_ensemble
        Whether annealing is at constant pressure or volume.
    relax_cell
        Whether minimization changes the cell as well, to ``pressure_bar``.
    max_force_ev_a
        Minimization ends when no component of a force is larger.
    max_stress_bar
        With ``relax_cell``: what the stress may differ from the pressure.
    pre_minimize_steps
        Largest number of steps of a minimization before dynamics; 0 for none.
    neighbor_skin_a, neighbor_every, neighbor_one
        Neighbour lists hold atoms this much beyond the cutoff, are checked at so many
        steps, and hold at most so many neighbours of an atom.
    max_strain, strain_points
        Of elastic constants and equation of state: the largest strain (0.005; 0.02
        of the volume's cube root) and the number of strains on each side.
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
    schedule: tuple[ScheduleStep, ...] = ()
    anneal_ensemble: Literal["npt", "nvt"] = "npt"
    relax_cell: bool = False
    max_force_ev_a: float = Field(default=1e-3, gt=0.0, le=10.0)
    max_stress_bar: float = Field(default=50.0, gt=0.0, le=1e5)
    pre_minimize_steps: int = Field(default=0, ge=0, le=1_000_000)
    neighbor_skin_a: float = Field(default=1.0, ge=0.0, le=10.0)
    neighbor_every: int = Field(default=1, ge=1, le=100)
    neighbor_one: int = Field(default=2000, ge=100, le=100_000)
    max_strain: float | None = Field(default=None, gt=0.0, le=0.1)
    strain_points: int = Field(default=2, ge=1, le=20)

    @model_validator(mode="before")
    @classmethod
    def _steps_of_schedule(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not data.get("schedule"):
            return data
        try:
            steps = sum(
                part.steps if isinstance(part, ScheduleStep) else int(part["steps"])
                for part in data["schedule"]
            )
        except (TypeError, KeyError, ValueError):
            return data  # the fields say what is wrong
        if data.get("num_steps", steps) != steps:
            raise ValueError(
                f"the schedule has {steps} steps, num_steps {data['num_steps']}"
            )
        return {**data, "num_steps": steps}

    # The last is the first to run.
    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, data: Any) -> Any:
        """Refuse true and false for numbers: pydantic would take them for 1 and 0."""
        if not isinstance(data, Mapping):
            return data
        schedule = data.get("schedule")
        parts = schedule if isinstance(schedule, list | tuple) else ()
        for holder in (data, *(part for part in parts if isinstance(part, Mapping))):
            for name, value in holder.items():
                if isinstance(value, bool) and name not in _FLAGS:
                    raise ValueError(f"{name} is a number, not {value}")
        return data

    @model_validator(mode="after")
    def _consistent(self) -> MDConfig:
        if self.schedule:
            self._check_schedule()
        elif self.workflow_type in _RAMPS:
            top = self.anneal_temperature_k
            if top is None or top <= self.temperature_k:
                raise ValueError(
                    f"{self.workflow_type} needs anneal_temperature_k above "
                    f"temperature_k ({self.temperature_k} K), not {top}"
                )
            if self.num_steps < 4:
                raise ValueError("annealing needs at least 4 steps")
        elif self.anneal_temperature_k is not None:
            raise ValueError(
                "anneal_temperature_k belongs to MD_ANNEAL_LAMMPS and "
                "MD_MELT_QUENCH_LAMMPS only"
            )
        if self.equilibration_steps + self.num_steps > MAX_INT32:
            raise ValueError("LAMMPS runs at most 2147483647 steps")
        return self

    def _check_schedule(self) -> None:
        if self.workflow_type != "MD_ANNEAL_LAMMPS":
            raise ValueError("schedule belongs to MD_ANNEAL_LAMMPS only")
        if self.anneal_temperature_k is not None:
            raise ValueError("give either schedule or anneal_temperature_k")
        now = self.temperature_k
        for number, part in enumerate(self.schedule, start=1):
            end = part.temperature_k
            right = {
                "heat": end is not None and end > now,
                "cool": end is not None and end < now,
                "hold": end is None or end == now,
            }[part.action]
            if not right:
                raise ValueError(
                    f"part {number} of the schedule cannot {part.action} from {now} K "
                    f"to {end} K"
                )
            now = end or now

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> MDConfig:
        """Return the checked configuration of loose parameters.

        Raises
        ------
        InputError
            Naming every parameter that is unknown or out of range, or one that differs
            from its default and has no effect on the workflow.
        """
        try:
            config = cls.model_validate(dict(parameters))
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
        config.check_effects()
        return config

    def check_effects(self) -> None:
        """Refuse what was asked for and would be passed over without a word.

        Not in the model itself: simulations that were stored before can be read.

        Raises
        ------
        InputError
            Naming the parameter and the workflow.
        """
        kind, fields = self.workflow_type, type(self).model_fields
        stages = self.stages()
        minimized = kind == "MINIMIZE_LAMMPS"
        effects = {
            "temperature_k": self.is_dynamics,
            "pressure_bar": any(stage.ensemble == "npt" for stage in stages)
            or (minimized and self.relax_cell),
            "relax_cell": minimized,
            "pre_minimize_steps": self.is_dynamics,
            "anneal_ensemble": kind in _RAMPS,
            "max_strain": kind in PROPERTIES,
            "strain_points": kind in PROPERTIES,
        }
        for name, has_effect in effects.items():
            value = getattr(self, name)
            if not has_effect and value != fields[name].default:
                raise InputError(
                    f"{name} ({value}) has no effect on {kind}",
                    evidence={"parameter": name, "workflow_type": kind},
                    advice=f"leave {name} out, or choose a workflow that knows it",
                )

    def check_atoms(self, n_atoms: int) -> None:
        """Refuse dynamics of one atom: there is no motion beside that of its centre.

        Raises
        ------
        InputError
            For dynamics of a cell of one atom.
        """
        if self.is_dynamics and n_atoms < 2:
            raise InputError(
                f"{self.workflow_type} of a cell of one atom: its momentum is zero, so "
                "it has no temperature",
                evidence={"n_atoms": n_atoms},
                advice="raise supercell_min_atoms",
            )

    @property
    def is_dynamics(self) -> bool:
        """Whether atoms move in time, rather than downhill or not at all."""
        return self.workflow_type not in STILL_WORKFLOWS

    @property
    def has_frames(self) -> bool:
        """Whether it leaves a trajectory."""
        return self.is_dynamics and self.dump_every > 0

    @property
    def total_steps(self) -> int:
        """Equilibration and production together."""
        return self.num_steps + (self.equilibration_steps if self.is_dynamics else 0)

    @property
    def production_start(self) -> int:
        """Step after which averages are taken.

        After a ramp nothing is in equilibrium, so what counts of an annealed system
        is the last part, if it holds the temperature.
        """
        if self.workflow_type not in _RAMPS:
            return self.equilibration_steps if self.is_dynamics else 0
        last = self.stages()[-1]
        held = last.start_k == last.stop_k
        return last.first_step if held else self.equilibration_steps

    @property
    def production_temperature_k(self) -> float | None:
        """Temperature after `production_start`; None if it changes there."""
        kept = {
            value
            for stage in self.stages()
            if stage.last_step > self.production_start
            for value in (stage.start_k, stage.stop_k)
        }
        return kept.pop() if len(kept) == 1 else None

    @property
    def production_ensemble(self) -> Ensemble:
        """What the last part of the simulation holds constant."""
        return self.stages()[-1].ensemble

    def stages(self) -> tuple[Stage, ...]:
        """Return the parts of the simulation in their order."""
        low, first, last = (
            self.temperature_k,
            self.equilibration_steps,
            self.total_steps,
        )
        kind = self.workflow_type
        stages: list[Stage]
        if kind in STILL_WORKFLOWS:
            if kind == "MINIMIZE_LAMMPS":
                return (Stage("minimization", "minimize", 0, last, low, low),)
            return (Stage("evaluation", "static", 0, last, low, low),)
        if kind == "MD_NVT_LAMMPS":
            stages = [Stage("constant volume", "nvt", 0, last, low, low)]
        elif kind == "MD_NPT_LAMMPS":
            stages = [Stage("constant pressure", "npt", 0, last, low, low)]
        elif kind == "MD_NVE_LAMMPS":
            stages = [
                Stage("equilibration", "nvt", 0, first, low, low),
                Stage("constant energy", "nve", first, last, low, low),
            ]
        elif self.schedule:
            stages = self._scheduled_stages()
        else:
            stages = self._standard_ramps()
        return tuple(stage for stage in stages if stage.last_step > stage.first_step)

    def _standard_ramps(self) -> list[Stage]:
        low, high = self.temperature_k, self.anneal_temperature_k or self.temperature_k
        first, last = self.equilibration_steps, self.total_steps
        ensemble, quarter = self.anneal_ensemble, self.num_steps // 4
        if self.workflow_type == "MD_MELT_QUENCH_LAMMPS":
            cold = last - quarter
            return [
                Stage("melt", ensemble, 0, first, high, high),
                Stage("quench", ensemble, first, cold, high, low),
                Stage("glass", ensemble, cold, last, low, low),
            ]
        return [
            Stage("equilibration", ensemble, 0, first, low, low),
            Stage("heating", ensemble, first, first + quarter, low, high),
            Stage(
                "holding", ensemble, first + quarter, first + 2 * quarter, high, high
            ),
            Stage("cooling", ensemble, first + 2 * quarter, last, high, low),
        ]

    def _scheduled_stages(self) -> list[Stage]:
        now, step = self.temperature_k, self.equilibration_steps
        stages = [Stage("equilibration", self.anneal_ensemble, 0, step, now, now)]
        for number, part in enumerate(self.schedule, start=1):
            end = part.temperature_k or now
            stages.append(
                Stage(
                    f"{part.action} {number}",
                    part.ensemble or self.anneal_ensemble,
                    step,
                    step + part.steps,
                    now,
                    end,
                )
            )
            now, step = end, step + part.steps
        return stages


@dataclass(frozen=True)
class Stage:
    """A part of a simulation with one ensemble and one temperature ramp.

    Parameters
    ----------
    name
        For the log.
    ensemble
        Also the name of the template.
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
