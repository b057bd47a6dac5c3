"""Relaxation of one structure: cell and positions together, by limited-memory BFGS.

Every step is a fresh evaluation without memory of the neighbour list or of a
reference cell, so there is nothing to restart and no stall, and tolerances on forces
and on every component of the stress are met or reported as not met.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from nanoos_fw.errors import NanoOSError, SimulationError
from nanoos_fw.faults import is_environment
from nanoos_fw.md.box import tensor_to_voigt
from nanoos_fw.md.calculator import Evaluation, LammpsCalculator
from nanoos_fw.md.cells import check_distances
from nanoos_fw.parallel import StopRequest
from nanoos_fw.units import EV_PER_A3_IN_BAR

if TYPE_CHECKING:
    from pymatgen.core import Structure

Array = NDArray[np.float64]

# Optimizer. Lengths are bounded per step so that no step leaves the basin; the
# stiffnesses are typical of metals and only the first step depends on them.
_MAX_MOVE_A = 0.15
_MAX_STRAIN = 0.04
_ATOM_STIFFNESS_EV_A2 = 8.0
_CELL_STIFFNESS_EV_A3 = 1.0
# Components xy, xz, yz of a strain stand for two each. Carrying the factor sqrt(2)
# makes the norm of the six that of the tensor, so that a rotated crystal takes the
# same path.
_OFF_DIAGONAL = [1, 2, 4]
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
    charges
        Charge of each site in e as given; None if there were none.
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
    charges: tuple[float, ...] | None = None

    @property
    def n_atoms(self) -> int:
        """Number of sites."""
        return len(self.species)

    def structure(self) -> Structure:
        """Return the relaxed structure, with the charges that were given.

        Raises
        ------
        SimulationError
            If there is none; carries the reason.
        """
        if self.lattice_a is None or self.frac_coords is None:
            raise SimulationError(f"there is no relaxed structure: {self.error}")
        from pymatgen.core import Lattice, Structure

        charges = None if self.charges is None else {"charge": list(self.charges)}
        return Structure(
            Lattice(self.lattice_a),
            list(self.species),
            list(self.frac_coords),
            site_properties=charges,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RelaxationResult:
        """Rebuild a result from `to_dict`."""
        values = dict(data)
        for name in ("species", "stress_bar", "charges"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        for name in ("lattice_a", "frac_coords"):
            if values.get(name) is not None:
                values[name] = tuple(tuple(row) for row in values[name])
        return cls(**values)


def relax_one(
    calculator: LammpsCalculator,
    task: Mapping[str, Any],
    settings: RelaxationSettings,
    stop: StopRequest | None = None,
) -> RelaxationResult | None:
    """Relax one structure; a failure of its own becomes a result.

    Parameters
    ----------
    calculator
        LAMMPS instance to use.
    task
        ``species``, ``lattice`` (Å), ``frac_coords``, and ``charges`` if there are.
    settings
        Tolerances.
    stop
        Asked before every step.

    Returns
    -------
    RelaxationResult or None
        None if it was asked to stop.

    Raises
    ------
    NanoOSError
        If the failure is the machine's: no memory, a full disk.
    """
    species = list(task["species"])
    lattice = np.array(task["lattice"], dtype=np.float64)
    frac = np.array(task["frac_coords"], dtype=np.float64)
    try:
        check_distances(species, lattice, frac)
        calculator.load(species, lattice, task.get("charges"))
        state = _Relaxation(calculator, species, lattice, frac, settings)
        for _ in state.steps():
            if stop is not None and stop.requested:
                return None
    except NanoOSError as error:
        if is_environment(error):
            raise
        calculator.reset()
        return failed_result(species, error)
    charges = task.get("charges")
    if charges is None:
        return state.result()
    return replace(state.result(), charges=tuple(map(float, charges)))


def failed_result(
    species: Sequence[str], error: NanoOSError, **numbers: Any
) -> RelaxationResult:
    """Return the result of a structure that failed, with its reason."""
    return RelaxationResult(
        converged=False,
        species=tuple(species),
        error=error.message,
        error_class=str(error.evidence.get("class", error.kind)),
        **numbers,
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
        strain_gradient[_OFF_DIAGONAL] *= math.sqrt(2.0)
        if not self.settings.relax_cell:
            strain_gradient = np.zeros(6)
        gradient = np.concatenate([-evaluation.forces_ev_a.ravel(), strain_gradient])
        enthalpy = evaluation.energy_ev + pressure * volume
        return _Point(lattice, frac, evaluation, enthalpy, gradient)

    def _moved(self, step: Array) -> _Point:
        components = step[-6:].copy()
        components[_OFF_DIAGONAL] /= math.sqrt(2.0)
        xx, xy, xz, yy, yz, zz = components
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
        strain = float(np.linalg.norm(direction[-6:]))
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
        # Strains are free of rotation one by one, their product is not quite.
        deformation = np.linalg.solve(self.lattice, self.point.lattice)
        u, _, vt = np.linalg.svd(deformation)
        turn = u @ vt
        lattice = self.point.lattice @ turn.T
        stress = turn @ e.stress_ev_a3 @ turn.T * EV_PER_A3_IN_BAR
        numbers: dict[str, Any] = {
            "energy_ev": e.energy_ev,
            "energy_per_atom_ev": e.energy_ev / n,
            "volume_a3": float(abs(np.linalg.det(self.point.lattice))),
            "lattice_a": tuple(map(tuple, lattice.tolist())),
            "frac_coords": tuple(map(tuple, self.point.frac.tolist())),
            "max_force_ev_a": self._residuals()[0],
            "pressure_bar": float(-np.trace(stress) / 3.0),
            "stress_bar": tuple(tensor_to_voigt(stress).tolist()),
            "n_steps": self.n_steps,
            "n_evaluations": self.n_evaluations,
            "initial_energy_per_atom_ev": self.initial_energy / n,
        }
        if self.error is not None:
            return failed_result(self.species, self.error, **numbers)
        return RelaxationResult(converged=True, species=tuple(self.species), **numbers)
