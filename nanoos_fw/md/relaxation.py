"""Relaxation of many small structures at once; also a rank program.

Each rank holds one LAMMPS instance of its own and works on its share of the
structures; nothing is exchanged. Cell and positions are relaxed together by a
limited-memory BFGS method whose every step is a fresh evaluation, so a result depends
on neither the number of ranks nor the order of the structures.

Each result is one line of JSON, on disk before the next structure starts: a killed
run keeps what it has, and the next one does the rest.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from nanoos_fw.errors import (
    InputError,
    LaunchError,
    NanoOSError,
    OutOfTimeError,
    SimulationError,
)
from nanoos_fw.md.box import LammpsBox, tensor_to_voigt
from nanoos_fw.md.calculator import Evaluation, LammpsCalculator
from nanoos_fw.md.potentials import Potential
from nanoos_fw.parallel import (
    Communicator,
    Resources,
    StopRequest,
    launch_ranks,
    report_progress,
    run_rank_program,
)
from nanoos_fw.provenance import content_key, read_json, write_json
from nanoos_fw.units import EV_PER_A3_IN_BAR

if TYPE_CHECKING:
    from pymatgen.core import Structure

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

CONFIG, STRUCTURES = "relaxation.json", "structures.json"
MIN_DISTANCE_A = 0.5
_PROGRESS_EVERY = 10
_MAX_DEATHS = 2

# Optimizer. Lengths are bounded per step so that no step leaves the basin; the
# stiffnesses are typical of metals and only the first step depends on them.
_MAX_MOVE_A = 0.15
_MAX_STRAIN = 0.04
_ATOM_STIFFNESS_EV_A2 = 8.0
_CELL_STIFFNESS_EV_A3 = 1.0
_MEMORY = 40
_ARMIJO = 1e-4
_CURVATURE = 1e-10
_MAX_BACKTRACKS = 12
# Tables are cut, not tapered: energies jump by about this much per atom as
# neighbours cross the cutoff, and a decrease below it cannot be asked for.
_ENERGY_NOISE_EV_PER_ATOM = 1e-7


class RelaxationSettings(BaseModel):
    """What to relax and how far.

    Parameters
    ----------
    relax
        False evaluates the structures as they are.
    relax_cell
        Whether the cell may change its size and shape; positions always may.
    max_force_ev_a
        Converged when no force on an atom exceeds this.
    max_stress_bar
        Converged when no component of the stress differs from the wanted pressure
        by more than this.
    pressure_bar
        Hydrostatic pressure to relax to.
    max_steps
        Steps of the optimizer before the structure is given up as not converged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    relax: bool = True
    relax_cell: bool = True
    max_force_ev_a: float = Field(default=1e-3, gt=0.0, le=1.0)
    max_stress_bar: float = Field(default=50.0, gt=0.0, le=1e5)
    pressure_bar: float = Field(default=0.0, ge=-1e6, le=1e8)
    max_steps: int = Field(default=500, ge=1, le=100_000)


@dataclass(frozen=True)
class RelaxationResult:
    """What became of one structure.

    Parameters
    ----------
    converged
        All tolerances met; for ``relax=False``, evaluated.
    error
        Why there is no usable result; None if there is one. A structure that did not
        converge has both numbers and an error.
    error_class
        Short name of the failure: ``not_converged``, ``atoms_too_close``, ...
    species
        Element of each site, in the order given.
    energy_ev, energy_per_atom_ev
        Potential energy in eV.
    volume_a3
        Volume of the cell in Å³.
    lattice_a
        Rows a, b, c in Å, in the orientation given (no rotation is added).
    frac_coords
        Fractional coordinates, in the order of the sites; not wrapped, so that they
        continue the coordinates given.
    max_force_ev_a
        Largest force on an atom in eV/Å.
    pressure_bar
        Minus a third of the trace of the stress.
    stress_bar
        xx, yy, zz, xy, xz, yz in bar, positive under tension.
    n_steps, n_evaluations
        Steps of the optimizer, and energies computed for them.
    initial_energy_per_atom_ev
        Energy per atom of the structure as given.
    """

    converged: bool
    species: tuple[str, ...]
    error: str | None = None
    error_class: str | None = None
    energy_ev: float | None = None
    energy_per_atom_ev: float | None = None
    volume_a3: float | None = None
    lattice_a: tuple[tuple[float, ...], ...] | None = None
    frac_coords: tuple[tuple[float, ...], ...] | None = None
    max_force_ev_a: float | None = None
    pressure_bar: float | None = None
    stress_bar: tuple[float, ...] | None = None
    n_steps: int = 0
    n_evaluations: int = 0
    initial_energy_per_atom_ev: float | None = None

    @property
    def n_atoms(self) -> int:
        """Number of sites."""
        return len(self.species)

    def structure(self) -> Structure:
        """Return the relaxed structure.

        Raises
        ------
        SimulationError
            If there is none; carries the reason.
        """
        if self.lattice_a is None or self.frac_coords is None:
            raise SimulationError(f"there is no relaxed structure: {self.error}")
        from pymatgen.core import Lattice, Structure

        return Structure(
            Lattice(self.lattice_a), list(self.species), list(self.frac_coords)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RelaxationResult:
        """Rebuild a result from `to_dict`."""
        values = dict(data)
        for name in ("species", "stress_bar"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        for name in ("lattice_a", "frac_coords"):
            if values.get(name) is not None:
                values[name] = tuple(tuple(row) for row in values[name])
        return cls(**values)


# --------------------------------------------------------------------------- parent


def relax_structures(
    structures: Mapping[str, Structure],
    potential: Potential,
    work_dir: Path,
    *,
    settings: RelaxationSettings | None = None,
    resources: Resources | None = None,
    deadline: float | None = None,
) -> dict[str, RelaxationResult]:
    """Relax many structures in a child program and return what became of each.

    Results found in the work directory are taken over if structure, potential and
    settings are the same, so a second call does only the rest.

    Parameters
    ----------
    structures
        Ordered structures under names of the caller's choice.
    potential
        Potential that knows their elements.
    work_dir
        Folder of this piece of work; holds the results as they come.
    settings
        Tolerances; None takes the defaults.
    resources
        Ranks and launcher; None takes one rank.
    deadline
        Unix time by which to stop.

    Returns
    -------
    dict of str to RelaxationResult
        One for every name, failures included.

    Raises
    ------
    OutOfTimeError
        If the deadline came first; the finished ones are on disk.
    NanoOSError
        If the program as a whole failed: no LAMMPS, no launcher, a bad potential.
    """
    settings = settings or RelaxationSettings()
    resources = resources or Resources()
    work_dir.mkdir(parents=True, exist_ok=True)
    potential.install(work_dir)
    tasks: dict[str, dict[str, Any]] = {}
    results: dict[str, RelaxationResult] = {}
    for name, structure in structures.items():
        try:
            tasks[name] = _task(structure, potential, settings)
        except NanoOSError as error:
            results[name] = _failure([], error)
    deaths: Counter[str] = Counter()
    while True:
        done = _read_results(work_dir)
        todo = []
        for name, task in tasks.items():
            if task["key"] in done:
                results[name] = done[task["key"]]
            elif deaths[task["key"]] >= _MAX_DEATHS:
                crash = SimulationError(
                    "LAMMPS died on this structure", evidence={"class": "crash"}
                )
                results[name] = _failure(task["species"], crash)
            else:
                todo.append(task)
        if not todo:
            return {name: results[name] for name in structures}
        _clear_starts(work_dir)
        write_json(work_dir / STRUCTURES, todo)
        config = {
            "potential": potential.model_dump(mode="json"),
            "settings": settings.model_dump(mode="json"),
            "deadline": deadline,
        }
        write_json(work_dir / CONFIG, config)
        # No more ranks than structures: an idle rank costs a start of LAMMPS.
        ranks = min(resources.ranks, len(todo))
        try:
            launch_ranks(
                "nanoos_fw.md.relaxation",
                work_dir / CONFIG,
                resources=Resources(ranks, resources.threads, resources.launcher),
                deadline=deadline,
            )
        except LaunchError as error:
            # A crash inside LAMMPS takes the rank with it. Whoever was being computed
            # is tried once more and then given up, so that the others get their turn.
            suspects = _started(work_dir) - set(_read_results(work_dir))
            if "exit_code" not in error.evidence or not suspects:
                raise
            logger.warning("the ranks died while on %d structures", len(suspects))
            deaths.update(suspects)


def _task(
    structure: Structure, potential: Potential, settings: RelaxationSettings
) -> dict[str, Any]:
    if not structure.is_ordered:
        raise InputError(
            f"{structure.formula} has partially occupied sites",
            evidence={"class": "disordered"},
            advice="give an ordered structure",
        )
    species = [site.specie.symbol for site in structure]
    potential.check_elements(species)
    body: dict[str, Any] = {
        "species": species,
        "lattice": structure.lattice.matrix.tolist(),
        "frac_coords": structure.frac_coords.tolist(),
    }
    if not np.isfinite(
        [*np.ravel(body["lattice"]), *np.ravel(body["frac_coords"])]
    ).all():
        raise InputError(
            f"{structure.formula} has coordinates that are not finite",
            evidence={"class": "not_a_number"},
        )
    body["key"] = content_key(
        "relaxation",
        {**body, "potential": potential.identity, "settings": settings.model_dump()},
    )
    return body


def _failure(
    species: Sequence[str], error: NanoOSError, **numbers: Any
) -> RelaxationResult:
    return RelaxationResult(
        converged=False,
        species=tuple(species),
        error=error.message,
        error_class=str(error.evidence.get("class", error.kind)),
        **numbers,
    )


def _read_results(work_dir: Path) -> dict[str, RelaxationResult]:
    results = {}
    for path in sorted(work_dir.glob("results.*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                results[row["key"]] = RelaxationResult.from_dict(row["result"])
            except (ValueError, KeyError, TypeError):
                # The last line of a killed rank may be cut: it is computed again.
                logger.warning("%s: a line is cut short", path)
    return results


def _started(work_dir: Path) -> set[str]:
    return {p.read_text(encoding="utf-8") for p in work_dir.glob("started.*")}


def _clear_starts(work_dir: Path) -> None:
    for path in work_dir.glob("started.*"):
        path.unlink()


# ---------------------------------------------------------------------------- ranks


def main(
    config: dict[str, Any], work_dir: Path, comm: Communicator, stop: StopRequest
) -> dict[str, Any]:
    """Rank program: relax this rank's share of ``structures.json``."""
    potential = Potential.model_validate(config["potential"])
    settings = RelaxationSettings.model_validate(config["settings"])
    tasks = read_json(work_dir / STRUCTURES)
    share = deal([(_cost(task), task["key"]) for task in tasks], comm.size)[comm.rank]
    wanted = set(share)
    # One chemical system after the other: the pair style is kept in between.
    mine = sorted(
        (task for task in tasks if task["key"] in wanted),
        key=lambda task: (sorted(set(task["species"])), task["key"]),
    )
    finished = 0
    started = work_dir / f"started.{comm.rank}"
    path = work_dir / f"results.{comm.rank}.jsonl"
    with (
        LammpsCalculator(potential, work_dir) as calculator,
        path.open("ab") as file,
    ):
        _end_cut_line(path, file)
        for task in mine:
            started.write_text(task["key"], encoding="utf-8")
            result = relax_one(calculator, task, settings, stop)
            if result is None:
                break
            row = {"key": task["key"], "result": result.to_dict()}
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            finished += 1
            if comm.rank == 0 and finished % _PROGRESS_EVERY == 0:
                report_progress(
                    work_dir,
                    min(finished * comm.size, len(tasks)),
                    len(tasks),
                    "relaxed structures",
                )
    started.unlink(missing_ok=True)
    counts = comm.gather(finished)
    if comm.any(finished < len(mine)):
        raise OutOfTimeError(
            f"stopped by {stop.reason} before all {len(tasks)} structures were done",
            evidence={"finished": sum(counts) if counts else finished},
            advice="run again: the finished ones are kept",
        )
    return {"finished": sum(counts or [])}


def _cost(task: Mapping[str, Any]) -> int:
    return len(task["species"])


def deal(costs: Sequence[tuple[int, str]], size: int) -> list[list[str]]:
    """Share keys between ranks so that the sums of their costs are nearly equal.

    Parameters
    ----------
    costs
        Cost and key of each structure.
    size
        Number of ranks.

    Returns
    -------
    list of list of str
        Keys of each rank; the largest first, each to the rank with the least work.
    """
    shares: list[list[str]] = [[] for _ in range(size)]
    load = [0] * size
    for cost, key in sorted(costs, key=lambda pair: (-pair[0], pair[1])):
        rank = load.index(min(load))
        shares[rank].append(key)
        load[rank] += cost
    return shares


def _end_cut_line(path: Path, file: Any) -> None:
    """Start on a new line after a cut one, which would swallow the next result."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        file.write(b"\n")


def relax_one(
    calculator: LammpsCalculator,
    task: Mapping[str, Any],
    settings: RelaxationSettings,
    stop: StopRequest | None = None,
) -> RelaxationResult | None:
    """Relax one structure; a failure becomes a result.

    Parameters
    ----------
    calculator
        LAMMPS instance to use.
    task
        ``species``, ``lattice`` (Å) and ``frac_coords``.
    settings
        Tolerances.
    stop
        Asked before every step.

    Returns
    -------
    RelaxationResult or None
        None if it was asked to stop.
    """
    species = list(task["species"])
    lattice = np.array(task["lattice"], dtype=np.float64)
    frac = np.array(task["frac_coords"], dtype=np.float64)
    try:
        check_distances(species, lattice, frac)
        calculator.load(species, lattice)
        state = _Relaxation(calculator, species, lattice, frac, settings)
        for _ in state.steps():
            if stop is not None and stop.requested:
                return None
    except NanoOSError as error:
        calculator.reset()
        return _failure(species, error)
    return state.result()


def check_distances(species: Sequence[str], lattice: Array, frac: Array) -> None:
    """Refuse atoms closer than 0.5 Å: LAMMPS computes them without a word.

    Raises
    ------
    InputError
        Naming the two sites.
    """
    box = LammpsBox.from_lattice(lattice)  # reduced: 27 images are enough
    reduced = frac @ np.linalg.inv(box.basis)
    shifts = np.array(np.meshgrid(*[(-1, 0, 1)] * 3, indexing="ij")).reshape(3, -1).T
    self_images = np.linalg.norm(shifts[np.any(shifts, axis=1)] @ box.matrix, axis=1)
    if self_images.min() < MIN_DISTANCE_A:
        raise InputError(
            f"the cell repeats after {self_images.min():.3f} Å",
            evidence={"class": "atoms_too_close"},
        )
    # By rows: memory stays linear in the number of atoms.
    for i in range(len(species) - 1):
        delta = reduced[i + 1 :] - reduced[i]
        delta -= np.rint(delta)
        vectors = (delta[:, None, :] + shifts[None, :, :]) @ box.matrix
        distances = np.sqrt(np.einsum("ijk,ijk->ij", vectors, vectors)).min(axis=1)
        j = int(distances.argmin())
        if distances[j] < MIN_DISTANCE_A:
            other = i + 1 + j
            raise InputError(
                f"sites {i} ({species[i]}) and {other} ({species[other]}) are "
                f"{distances[j]:.3f} Å apart",
                evidence={"class": "atoms_too_close", "sites": [i, other]},
            )


@dataclass
class _Point:
    """A trial state: coordinates, enthalpy and gradient."""

    lattice: Array
    frac: Array
    evaluation: Evaluation
    enthalpy: float
    gradient: Array


@dataclass
class _Relaxation:
    """Limited-memory BFGS over positions and cell of one structure.

    The coordinates are Cartesian moves of the atoms in the undeformed cell and the
    six components of a symmetric strain, which leaves out rotations. After every
    accepted step the cell becomes the new reference; moves and strains are small,
    so the stored curvature stays good.

    References
    ----------
    J. Nocedal, S. J. Wright, Numerical Optimization, 2nd ed., algorithm 7.4.
    """

    calculator: LammpsCalculator
    species: Sequence[str]
    lattice: Array
    frac: Array
    settings: RelaxationSettings
    n_steps: int = 0
    n_evaluations: int = 0
    converged: bool = False
    error: SimulationError | None = None
    initial_energy: float = math.nan
    _memory: list[tuple[Array, Array, float]] = field(default_factory=list)

    def steps(self) -> Iterator[None]:
        """Run; yields before every evaluation."""
        n = len(self.species)
        self.point = self._evaluate(self.lattice, self.frac)
        self.initial_energy = self.point.evaluation.energy_ev
        volume = abs(np.linalg.det(self.lattice))
        # One length scale for strains, so that one norm serves for both.
        self.scale = math.sqrt(_CELL_STIFFNESS_EV_A3 * volume / _ATOM_STIFFNESS_EV_A2)
        first_volume = volume / n
        while not self._is_converged():
            if not self.settings.relax:
                self.converged = True
                return
            if self.n_steps >= self.settings.max_steps:
                self.error = SimulationError(
                    f"not converged after {self.n_steps} steps",
                    evidence={"class": "not_converged"},
                )
                return
            yield
            if not self._step():
                self.error = SimulationError(
                    "the line search found no lower energy",
                    evidence={"class": "not_converged"},
                )
                return
            self.n_steps += 1
            ratio = abs(np.linalg.det(self.point.lattice)) / n / first_volume
            if not 0.2 < ratio < 5.0:
                raise SimulationError(
                    f"the volume changed by a factor of {ratio:.2f}",
                    evidence={"class": "volume_diverged", "ratio": ratio},
                )
        self.converged = True

    def _evaluate(self, lattice: Array, frac: Array) -> _Point:
        evaluation = self.calculator.evaluate(lattice, frac)
        self.n_evaluations += 1
        volume = abs(np.linalg.det(lattice))
        pressure = self.settings.pressure_bar / EV_PER_A3_IN_BAR
        stress = evaluation.stress_ev_a3 + pressure * np.eye(3)
        strain_gradient = (volume * stress)[np.triu_indices(3)]
        strain_gradient[[1, 2, 4]] *= 2.0  # xy stands for two components
        if not self.settings.relax_cell:
            strain_gradient = np.zeros(6)
        gradient = np.concatenate([-evaluation.forces_ev_a.ravel(), strain_gradient])
        enthalpy = evaluation.energy_ev + pressure * volume
        return _Point(lattice, frac, evaluation, enthalpy, gradient)

    def _moved(self, step: Array) -> _Point:
        xx, xy, xz, yy, yz, zz = step[-6:]
        strain = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
        moves = step[:-6].reshape(-1, 3)
        frac = self.point.frac + moves @ np.linalg.inv(self.point.lattice)
        lattice = self.point.lattice @ (np.eye(3) + strain)
        return self._evaluate(lattice, frac)

    def _is_converged(self) -> bool:
        force, excess = self._residuals()
        return force <= self.settings.max_force_ev_a and (
            not self.settings.relax_cell or excess <= self.settings.max_stress_bar
        )

    def _residuals(self) -> tuple[float, float]:
        e = self.point.evaluation
        force = float(np.sqrt((e.forces_ev_a**2).sum(axis=1)).max())
        stress = e.stress_ev_a3 * EV_PER_A3_IN_BAR
        excess = stress + self.settings.pressure_bar * np.eye(3)
        return force, float(np.abs(excess).max())

    def _inverse_stiffness(self, vector: Array) -> Array:
        out = vector / _ATOM_STIFFNESS_EV_A2
        out[-6:] /= self.scale**2
        return out

    def _direction(self) -> Array:
        """Return minus the inverse Hessian times the gradient (two-loop recursion)."""
        q = self.point.gradient.copy()
        alphas = []
        for s, y, rho in reversed(self._memory):
            alpha = rho * (s @ q)
            q -= alpha * y
            alphas.append(alpha)
        q = self._inverse_stiffness(q)
        if self._memory:
            s, y, rho = self._memory[-1]
            q *= 1.0 / (rho * (y @ self._inverse_stiffness(y)))
        for (s, y, rho), alpha in zip(self._memory, reversed(alphas), strict=True):
            q += (alpha - rho * (y @ q)) * s
        return -q

    def _step(self) -> bool:
        """Take one step downhill; False if there is none."""
        direction = self._direction()
        slope = direction @ self.point.gradient
        if slope >= 0.0:
            self._memory.clear()
            direction = self._direction()
            slope = direction @ self.point.gradient
        moves = np.sqrt((direction[:-6].reshape(-1, 3) ** 2).sum(axis=1)).max()
        strain = np.abs(direction[-6:]).max()
        length = min(1.0, _MAX_MOVE_A / max(moves, 1e-300))
        length = min(length, _MAX_STRAIN / max(strain, 1e-300))
        noise = _ENERGY_NOISE_EV_PER_ATOM * len(self.species)
        for _ in range(_MAX_BACKTRACKS):
            step = length * direction
            trial = self._moved(step)
            bound = self.point.enthalpy + _ARMIJO * length * slope
            if trial.enthalpy <= bound or self._is_better_by_gradient(trial, noise):
                self._remember(step, trial)
                self.point = trial
                return True
            # Minimum of the parabola through value, slope and new value.
            rise = trial.enthalpy - self.point.enthalpy - length * slope
            length *= min(0.5, max(0.1, -length * slope / (2.0 * rise)))
        if self._memory:
            self._memory.clear()
            return self._step()
        return False

    def _is_better_by_gradient(self, trial: _Point, noise: float) -> bool:
        """Whether the energy is level to its noise and the gradient smaller."""
        level = trial.enthalpy <= self.point.enthalpy + noise
        return level and self._norm(trial.gradient) < self._norm(self.point.gradient)

    def _norm(self, gradient: Array) -> float:
        return float(math.sqrt(gradient @ self._inverse_stiffness(gradient)))

    def _remember(self, step: Array, trial: _Point) -> None:
        y = trial.gradient - self.point.gradient
        curvature = float(step @ y)
        if curvature > _CURVATURE * np.linalg.norm(step) * np.linalg.norm(y):
            self._memory.append((step, y, 1.0 / curvature))
            del self._memory[:-_MEMORY]

    def result(self) -> RelaxationResult:
        """Return the final state, converged or not."""
        e, n = self.point.evaluation, len(self.species)
        stress = e.stress_ev_a3 * EV_PER_A3_IN_BAR
        numbers: dict[str, Any] = {
            "energy_ev": e.energy_ev,
            "energy_per_atom_ev": e.energy_ev / n,
            "volume_a3": float(abs(np.linalg.det(self.point.lattice))),
            "lattice_a": tuple(map(tuple, self.point.lattice.tolist())),
            "frac_coords": tuple(map(tuple, self.point.frac.tolist())),
            "max_force_ev_a": self._residuals()[0],
            "pressure_bar": float(-np.trace(stress) / 3.0),
            "stress_bar": tuple(tensor_to_voigt(stress).tolist()),
            "n_steps": self.n_steps,
            "n_evaluations": self.n_evaluations,
            "initial_energy_per_atom_ev": self.initial_energy / n,
        }
        if self.error is not None:
            return _failure(self.species, self.error, **numbers)
        return RelaxationResult(converged=True, species=tuple(self.species), **numbers)


if __name__ == "__main__":
    run_rank_program(main)
