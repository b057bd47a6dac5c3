"""Firetasks that run molecular dynamics and analyse trajectories."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, model_validator

from nanoos_fw.errors import InputError, SimulationError, validation_problems
from nanoos_fw.firetasks.base import NanoTask, Parameters, TaskContext
from nanoos_fw.firetasks.relaxation import PotentialChoice, RelaxationMethod
from nanoos_fw.md.analysis import AnalysisName, AnalysisRequest, analyze_simulation
from nanoos_fw.md.cells import supercell
from nanoos_fw.md.engine import LAMMPSEngine
from nanoos_fw.md.failures import refuse_more_corrections
from nanoos_fw.md.fork_server import shared_server
from nanoos_fw.md.inputs import MDConfig
from nanoos_fw.md.output import not_converged, read_simulation
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.relaxation import RelaxationResult
from nanoos_fw.parallel import locked
from nanoos_fw.provenance import run_environment
from nanoos_fw.stores.database import put_artifact
from nanoos_fw.stores.simulations import Simulation, method_key, simulation_key

if TYPE_CHECKING:
    from pymatgen.core import Structure

# Rows of the thermo table that go into the database; the log has all.
_MAX_THERMO_ROWS = 2000
# Sites of a structure in a document, of which the server takes at most 16 MiB.
_MAX_SITES = 5000
_NUMBERS = (
    "final_energy",
    "final_potential_energy",
    "final_stress_bar",
    "converged",
    "max_force_ev_a",
    "max_stress_bar",
    "elastic",
    "eos",
)
# A rank with fewer atoms spends its time on messages.
_ATOMS_PER_RANK = 250


class MDMethod(Parameters):
    """A molecular dynamics run and what is computed of its trajectory.

    A failure of LAMMPS that has a correction is tried again ``max_corrections`` times;
    what was changed is part of the result.
    """

    config: MDConfig
    rdf_max_a: float = Field(default=8.0, gt=0)
    rdf_bins: int = Field(default=160, ge=10)
    analyses: tuple[AnalysisName, ...] = Field(default=("rdf", "msd"), min_length=1)
    vdos_longest_ps: float | None = Field(default=None, gt=0)
    adf_cutoff_a: float | None = Field(default=None, gt=0)
    max_corrections: int = Field(default=2, ge=0, le=10)

    @property
    def request(self) -> AnalysisRequest:
        """What is computed of the trajectory."""
        return AnalysisRequest(
            analyses=self.analyses,
            rdf_max_a=self.rdf_max_a,
            rdf_bins=self.rdf_bins,
            vdos_longest_ps=self.vdos_longest_ps,
            adf_cutoff_a=self.adf_cutoff_a,
        )

    def check(self) -> None:
        """Refuse what would fail in every run, before anything is queued.

        Raises
        ------
        InputError
            If a parameter has no effect, the analysis cannot be made, or the
            trajectory would have no frames to analyse.
        """
        config = self.config
        config.check_effects()
        try:
            _ = self.request
        except ValidationError as error:
            raise InputError(
                f"the analysis cannot be made: {validation_problems(error)}"
            ) from error
        if not config.has_frames:
            return
        last_frame = config.total_steps // config.dump_every * config.dump_every
        if last_frame <= config.production_start:
            raise InputError(
                f"the trajectory would have no frames to analyse: none of the steps "
                f"{config.production_start + 1} to {config.total_steps} is a multiple "
                f"of dump_every ({config.dump_every})",
                advice="lower dump_every; 0 writes and analyses no frames",
            )

    def key(self, potential: Potential, relaxation: str | None = None) -> str:
        """Return the key under which runs are stored.

        Parameters
        ----------
        potential
            Its timestep is that of a run without one.
        relaxation
            Method of the relaxed structures that runs begin with; None for structures
            as they were stored.
        """
        config = self.config
        about: dict[str, Any] = {"config": config.model_dump(mode="json")}
        if relaxation is None:
            about["potential"] = potential.identity
        else:
            about["relaxation"] = relaxation
        if config.is_dynamics:
            about["timestep_fs"] = config.timestep_fs or potential.timestep_fs
        return method_key("md", about)


class MDParameters(Parameters):
    """Parameters of RunMDTask and AnalyzeTrajectoryTask.

    Either a ranked candidate of a campaign, from its relaxed structure, or a stored
    structure as it is.

    Parameters
    ----------
    campaign, rank, relaxation
        Whose ranking, the place in it, and how the structure was relaxed.
    structure, potential
        Key of the structure, and what it is simulated with.
    md
        The simulation.
    """

    campaign: str | None = None
    rank: int | None = Field(default=None, ge=1)
    relaxation: RelaxationMethod | None = None
    structure: str | None = None
    potential: PotentialChoice | None = None
    md: MDMethod

    @model_validator(mode="after")
    def _one_choice(self) -> MDParameters:
        ranked = (self.campaign, self.rank, self.relaxation)
        stored = (self.structure, self.potential)
        for chosen, other in ((ranked, stored), (stored, ranked)):
            if all(v is not None for v in chosen) and not any(
                v is not None for v in other
            ):
                return self
        raise ValueError(
            "give either campaign, rank and relaxation, or structure and potential"
        )


@dataclass(frozen=True)
class _Run:
    """What the parameters stand for.

    Parameters
    ----------
    structure
        Key of the structure.
    method
        Key under which the result is stored.
    start
        Structure that the simulation begins with.
    potential
        Its potential.
    """

    structure: str
    method: str
    start: Structure
    potential: Potential


def _resolve(place: TaskContext, parameters: MDParameters) -> _Run:
    """Find the structure to begin with, and the potential."""
    if parameters.relaxation is not None:
        return _ranked(place, parameters, parameters.relaxation)
    assert parameters.structure is not None
    assert parameters.potential is not None
    key, potential = parameters.structure, parameters.potential.resolve(place)
    return _Run(
        structure=key,
        method=parameters.md.key(potential),
        start=place.structures.get_many([key])[key].structure,
        potential=potential,
    )


def _ranked(
    place: TaskContext, parameters: MDParameters, relaxation: RelaxationMethod
) -> _Run:
    """Find the candidate of a rank and its relaxed structure."""
    assert parameters.campaign is not None
    assert parameters.rank is not None
    ranking = place.campaigns.output(parameters.campaign, "ranking")
    if parameters.rank > len(ranking):
        raise InputError(
            f"campaign {parameters.campaign!r} has no rank {parameters.rank}",
            evidence={"ranked": len(ranking)},
            advice="lower md_runs, or raise top_k",
        )
    key = ranking[parameters.rank - 1]
    potential = relaxation.potential.resolve(place)
    method = relaxation.key(potential)
    simulation = place.simulations.find([key], method).get(key)
    if simulation is None or simulation.status == "failed":
        error = (simulation.error or {}) if simulation else {}
        raise SimulationError(
            f"the candidate of rank {parameters.rank} has no relaxed structure",
            evidence={"structure": key, "relaxation": error.get("message", "missing")},
            advice="see the relaxation's own error; the other ranks go on",
        )
    return _Run(
        structure=key,
        method=parameters.md.key(potential, method),
        start=RelaxationResult.from_dict(simulation.result).structure(),
        potential=potential,
    )


class RunMDTask(NanoTask):
    """Simulate a ranked candidate from its relaxed structure, or a stored structure."""

    _fw_name = "{{nanoos_fw.firetasks.RunMDTask}}"
    parameters_model = MDParameters
    parameters: MDParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Run, or continue from the restart file that an earlier launch left."""
        parameters = self.parameters
        run = _resolve(place, parameters)
        which = {"structure": run.structure, "method": run.method}
        if parameters.campaign is not None:
            analyses = parameters.md.request.keys
            place.campaigns.record(
                parameters.campaign,
                **{f"md.{parameters.rank}": {**which, "analyses": analyses}},
            )
        found = place.simulations.find([run.structure], run.method)
        simulation = found.get(run.structure)
        if simulation is None:
            simulation = self._simulate(place, run)
            place.simulations.put_many([simulation])
        elif simulation.result:
            refuse_more_corrections(
                simulation.result.get("corrections", ()), parameters.md.max_corrections
            )
        return {
            **which,
            "hit": bool(found),
            "status": simulation.status,
            "output_dir": simulation.files["output_dir"],
        }

    def _simulate(self, place: TaskContext, run: _Run) -> Simulation:
        config = self.parameters.md.config
        work_dir = place.work_dir("md", simulation_key(run.structure, run.method))
        n_atoms = len(supercell(run.start, config.supercell_min_atoms))
        resources = place.resources_for(n_atoms // _ATOMS_PER_RANK)
        engine = LAMMPSEngine(server=shared_server())
        with locked(work_dir):
            outcome = engine.run(
                run.start,
                {**config.model_dump(), "potential": run.potential},
                work_dir,
                max_corrections=self.parameters.md.max_corrections,
                timeout=None,
                resources=resources,
                deadline=place.deadline,
            )
            output_dir = Path(outcome["output_dir"])
            # What ran: a correction may have changed the timestep.
            config = MDConfig.model_validate(read_simulation(output_dir)["config"])
            parsed = engine.parse_output(output_dir)
            error = not_converged(output_dir)
        # Elastic constants and equations of state have no rows.
        every = max(1, math.ceil(len(parsed["thermo"]["step"]) / _MAX_THERMO_ROWS))
        return Simulation(
            structure=run.structure,
            method=run.method,
            kind="md",
            # As of relaxations: kept with its numbers, and taken for no result.
            status="done" if error is None else "failed",
            error=None if error is None else error.to_dict(),
            result={
                "workflow_type": parsed["workflow_type"],
                "ensemble": config.production_ensemble,
                "n_atoms": parsed["n_atoms"],
                "steps": parsed["steps"],
                "timestep_fs": config.timestep_fs or run.potential.timestep_fs,
                "equilibration_steps": config.equilibration_steps,
                "temperature_k": config.production_temperature_k
                or config.temperature_k,
                "pressure_bar": config.pressure_bar,
                "seed": config.seed,
                "corrections": outcome["corrections"],
                "averages": parsed["averages"],
                "units": parsed["units"],
                **{name: parsed[name] for name in _NUMBERS if name in parsed},
                "thermo": {n: v[::every] for n, v in parsed["thermo"].items()},
                "final_structure": _bounded(place, parsed["final_structure"]),
            },
            files={"input_dir": outcome["input_dir"], "output_dir": str(output_dir)},
            environment={
                **run_environment(),
                "ranks": outcome["ranks"],
                "threads": place.resources.threads,
                "lammps_version": outcome["lammps_version"],
                "segments": outcome["segments"],
                "wall_s": round(outcome["wall_s"], 3),
            },
        )


def _bounded(place: TaskContext, structure: dict[str, Any]) -> dict[str, Any]:
    """Return a structure's dictionary, or where it is if it is large."""
    if len(structure["sites"]) <= _MAX_SITES:
        return structure
    data = json.dumps(structure, separators=(",", ":")).encode()
    return {"artifact": put_artifact(place.database, data), "format": "pymatgen"}


class AnalyzeTrajectoryTask(NanoTask):
    """Analyse the trajectory of a finished run.

    Numbers, with their units, go into the simulation's document, curves into artifacts
    (``.npz``) whose digests stand beside them.
    """

    _fw_name = "{{nanoos_fw.firetasks.AnalyzeTrajectoryTask}}"
    parameters_model = MDParameters
    parameters: MDParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Analyse the production part and store the curves with the run."""
        run = _resolve(place, self.parameters)
        found = place.simulations.find([run.structure], run.method)
        if run.structure not in found:
            raise InputError(
                f"{self._what()} has not been simulated",
                advice="rerun the firework with its RunMDTask",
            )
        simulation = found[run.structure]
        if simulation.status == "failed":
            raise SimulationError(
                f"the simulation of {self._what()} failed",
                evidence={"simulation": (simulation.error or {}).get("message")},
                advice="see the simulation's own error",
            )
        request = self.parameters.md.request
        analysis = analyze_simulation(Path(simulation.files["output_dir"]), request)
        for name, document in analysis.documents(request):
            if analysis.arrays.get(name):
                curves = analysis.packed(name)
                document["artifact"] = put_artifact(place.database, curves)
            place.simulations.analysed(simulation, request.key(name), document)
        return {
            "structure": run.structure,
            "analyses": sorted(analysis.numbers),
            "failed": sorted(analysis.failures),
        }

    def _what(self) -> str:
        parameters = self.parameters
        if parameters.campaign is None:
            return f"structure {parameters.structure}"
        return f"rank {parameters.rank} of campaign {parameters.campaign!r}"
