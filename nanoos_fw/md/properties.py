"""Elastic constants and equation of state of one crystal; a rank program.

Many strained copies of one crystal go through one LAMMPS instance per rank, whose
pair style is kept; internal coordinates are relaxed in each. A result depends on
neither the number of ranks nor their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import OutOfTimeError, SimulationError
from nanoos_fw.md.box import LammpsBox, voigt_to_tensor
from nanoos_fw.md.calculator import LammpsCalculator
from nanoos_fw.md.optimizer import RelaxationResult, RelaxationSettings, relax_one
from nanoos_fw.md.output import FINAL, PROPERTIES_FILE
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.protocols import MDConfig
from nanoos_fw.parallel import (
    Communicator,
    StopRequest,
    report_progress,
    run_rank_program,
)
from nanoos_fw.provenance import write_json
from nanoos_fw.units import EV_PER_A3_IN_BAR, EV_PER_A3_IN_GPA

Array = NDArray[np.float64]

_BAR_IN_GPA = EV_PER_A3_IN_GPA / EV_PER_A3_IN_BAR
# Derivatives by finite differences ask for more than a structure does.
_MAX_FORCE_EV_A = 1e-5
_MAX_STRESS_BAR = 1.0
_ELASTIC_STRAIN, _VOLUME_STRAIN = 0.005, 0.02
_MIN_EOS_POINTS = 3
# Voigt's order, by components of a tensor.
_VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
_SYMPREC = 1e-3


# ----------------------------------------------------------------- elastic constants


@dataclass(frozen=True)
class ElasticConstants:
    """Stiffness of a crystal at zero stress and zero temperature.

    Parameters
    ----------
    stiffness_gpa
        ``(6, 6)``: in Voigt's order (xx yy zz yz xz xy), for engineering shear
        strains, in the Cartesian frame of the structure; as computed.
    symmetrized_gpa
        The mean over the point group and of the matrix with its transpose.
    asymmetry_gpa
        Largest difference between an element and its mirror image: the error of the
        finite differences, since energies have second derivatives.
    symmetry_residual_gpa
        Largest difference between the two matrices: zero if the crystal's symmetry
        came out as it must.
    stable
        Whether all eigenvalues are positive (Born's condition).
    bulk_gpa, shear_gpa
        Hill's means of Voigt's and Reuss' bounds, which are beside them.
    young_gpa, poisson
        Of the polycrystal with these moduli.
    universal_anisotropy
        Zero for isotropic crystals (Ranganathan and Ostoja-Starzewski, 2008).
    """

    stiffness_gpa: list[list[float]]
    symmetrized_gpa: list[list[float]]
    asymmetry_gpa: float
    symmetry_residual_gpa: float
    stable: bool
    bulk_gpa: float
    bulk_voigt_gpa: float
    bulk_reuss_gpa: float
    shear_gpa: float
    shear_voigt_gpa: float
    shear_reuss_gpa: float
    young_gpa: float
    poisson: float
    universal_anisotropy: float


def strain_tensor(component: int, size: float) -> Array:
    """Return the symmetric strain of a Voigt component; shears are engineering's."""
    i, j = _VOIGT[component]
    strain = np.zeros((3, 3))
    strain[i, j] += 0.5 * size
    strain[j, i] += 0.5 * size
    return strain


def elastic_constants(
    strains: Sequence[float], stresses_gpa: Array, rotations: Sequence[Array]
) -> ElasticConstants:
    """Return the constants from the stresses of strained crystals.

    Parameters
    ----------
    strains
        Sizes of the strains, the same for each component; with both signs.
    stresses_gpa
        ``(6, n_strains, 6) float64``: for each component and size, the Cauchy stress
        in Voigt's order, positive under tension.
    rotations
        Cartesian operations ``(3, 3)`` of the point group.

    Notes
    -----
    The slope at zero of an odd polynomial through all sizes: the even orders drop out
    by symmetry, and the more sizes, the more odd orders are taken account of. At zero
    stress all definitions of stress and strain give the same constants.
    """
    sizes = np.asarray(strains, dtype=np.float64)
    orders = range(1, 2 * len({round(abs(x), 12) for x in sizes}), 2)
    basis = np.column_stack([sizes**order for order in orders])
    stiffness = np.empty((6, 6))
    for component in range(6):
        odd = stresses_gpa[component] - stresses_gpa[component].mean(axis=0)
        slopes = np.linalg.lstsq(basis, odd, rcond=None)[0]
        stiffness[:, component] = slopes[0]
    symmetrized = _symmetrized(0.5 * (stiffness + stiffness.T), rotations)
    return ElasticConstants(
        stiffness_gpa=stiffness.tolist(),
        symmetrized_gpa=symmetrized.tolist(),
        asymmetry_gpa=float(np.abs(stiffness - stiffness.T).max()),
        symmetry_residual_gpa=float(np.abs(stiffness - symmetrized).max()),
        stable=bool(np.linalg.eigvalsh(symmetrized).min() > 0.0),
        **_moduli(symmetrized),
    )


def _moduli(c: Array) -> dict[str, float]:
    """Return the means of Voigt, Reuss and Hill (Proc. Phys. Soc. A 65, 349, 1952)."""
    s = np.asarray(np.linalg.pinv(c), dtype=np.float64)

    def sums(m: Array) -> tuple[float, float, float]:
        return (
            float(np.trace(m[:3, :3])),
            float(m[0, 1] + m[0, 2] + m[1, 2]),
            float(np.trace(m[3:, 3:])),
        )

    a, b, d = sums(c)
    kv, gv = (a + 2 * b) / 9, (a - b + 3 * d) / 15
    a, b, d = sums(s)
    kr, gr = 1 / (a + 2 * b), 15 / (4 * a - 4 * b + 3 * d)
    k, g = 0.5 * (kv + kr), 0.5 * (gv + gr)
    return {
        "bulk_gpa": k,
        "bulk_voigt_gpa": kv,
        "bulk_reuss_gpa": kr,
        "shear_gpa": g,
        "shear_voigt_gpa": gv,
        "shear_reuss_gpa": gr,
        "young_gpa": 9 * k * g / (3 * k + g),
        "poisson": (3 * k - 2 * g) / (2 * (3 * k + g)),
        "universal_anisotropy": 5 * gv / gr + kv / kr - 6,
    }


def _symmetrized(stiffness: Array, rotations: Sequence[Array]) -> Array:
    """Return the mean of a stiffness over rotations of the crystal."""
    tensor = np.empty((3, 3, 3, 3))
    for i in range(6):
        for j in range(6):
            (a, b), (c, d) = _VOIGT[i], _VOIGT[j]
            for p, q in ((a, b), (b, a)):
                for r, s in ((c, d), (d, c)):
                    tensor[p, q, r, s] = stiffness[i, j]
    mean = np.mean(
        [
            np.einsum("ai,bj,ck,dl,ijkl->abcd", r, r, r, r, tensor)
            for r in (rotations or [np.eye(3)])
        ],
        axis=0,
    )
    return np.array(
        [[mean[(*_VOIGT[i], *_VOIGT[j])] for j in range(6)] for i in range(6)]
    )


def point_group(species: Sequence[str], lattice: Array, frac: Array) -> list[Array]:
    """Return the Cartesian operations of a crystal's point group."""
    from pymatgen.core import Lattice, Structure
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    structure = Structure(Lattice(lattice), list(species), frac)
    found = SpacegroupAnalyzer(structure, symprec=_SYMPREC)
    return [
        np.array(operation.rotation_matrix)
        for operation in found.get_point_group_operations(cartesian=True)
    ]


# ----------------------------------------------------------------- equation of state


@dataclass(frozen=True)
class EquationOfState:
    """Third-order Birch-Murnaghan equation of state, per cell.

    Parameters
    ----------
    volume_a3, energy_ev
        Volume and energy at zero pressure.
    bulk_gpa, bulk_derivative
        Bulk modulus there, and its derivative by pressure.
    rms_ev
        Root mean square of the fit's residuals.
    volumes_a3, energies_ev
        What was fitted.
    """

    volume_a3: float
    energy_ev: float
    bulk_gpa: float
    bulk_derivative: float
    rms_ev: float
    volumes_a3: list[float]
    energies_ev: list[float]


def fit_birch_murnaghan(
    volumes_a3: Sequence[float], energies_ev: Sequence[float]
) -> EquationOfState:
    """Fit energies of a cell at several volumes.

    The energy is a cubic polynomial of ``V^(-2/3)``, so the fit is linear.

    Raises
    ------
    SimulationError
        If there are fewer than four points, or no minimum among them.

    References
    ----------
    F. Birch, Phys. Rev. 71, 809 (1947).
    """
    v, e = np.asarray(volumes_a3, float), np.asarray(energies_ev, float)
    if len(v) < 4:
        raise SimulationError(
            f"an equation of state needs 4 points, not {len(v)}",
            evidence={"class": "fit"},
        )
    # Scaled, so that the powers are of the size of one.
    middle = v.mean()
    x = (v / middle) ** (-2.0 / 3.0)
    poly = np.polynomial.Polynomial.fit(x, e, 3).convert()
    d1, d2, d3 = poly.deriv(1), poly.deriv(2), poly.deriv(3)
    roots = [complex(root) for root in d1.roots()]
    minima = [
        r.real for r in roots if abs(r.imag) < 1e-9 and r.real > 0 and d2(r.real) > 0
    ]
    if not minima:
        raise SimulationError(
            "the energies have no minimum among these volumes",
            evidence={"class": "fit", "volumes_a3": v.tolist()},
            advice="relax the structure first, or take a larger max_strain",
        )
    x0 = min(minima, key=lambda value: abs(value - 1.0))
    # Derivatives by the volume in units of the middle one.
    second = 4 / 9 * x0**5 * d2(x0)
    third = -20 / 9 * x0**6.5 * d2(x0) - 8 / 27 * x0**7.5 * d3(x0)
    v0 = x0**-1.5
    return EquationOfState(
        volume_a3=float(v0 * middle),
        energy_ev=float(poly(x0)),
        bulk_gpa=float(v0 * second / middle * EV_PER_A3_IN_GPA),
        bulk_derivative=float(-1 - v0 * third / second),
        rms_ev=float(np.sqrt(np.mean((poly(x) - e) ** 2))),
        volumes_a3=v.tolist(),
        energies_ev=e.tolist(),
    )


# ---------------------------------------------------------------------------- ranks


@dataclass
class _Work:
    """The evaluations of one rank."""

    calculator: LammpsCalculator
    species: list[str]
    charges: Any
    comm: Communicator
    stop: StopRequest
    work_dir: Path

    def relax(self, lattice: Array, frac: Array, **settings: Any) -> RelaxationResult:
        """Relax a copy of the crystal, tightly."""
        task = {
            "species": self.species,
            "lattice": lattice,
            "frac_coords": frac,
            "charges": self.charges,
        }
        limits = RelaxationSettings(
            max_force_ev_a=_MAX_FORCE_EV_A,
            max_stress_bar=_MAX_STRESS_BAR,
            max_steps=2000,
            **settings,
        )
        result = relax_one(self.calculator, task, limits, self.stop)
        if result is None:
            raise _StopError
        if not result.converged:
            raise SimulationError(
                f"a strained copy was not relaxed: {result.error}",
                evidence={"class": result.error_class},
                advice="use a smaller max_strain, or look at the structure",
            )
        return result

    def shared(self, count: int, one: Any) -> list[Any]:
        """Return ``one(i)`` for all i, the ranks taking turns."""
        mine, stopped = {}, False
        for i in range(self.comm.rank, count, self.comm.size):
            try:
                mine[i] = one(i)
            except _StopError:
                stopped = True
                break
            if self.comm.rank == 0:
                report_progress(self.work_dir, i + 1, count, "strained copies")
        if self.comm.any(stopped):
            raise _stopped(self.stop)
        gathered = self.comm.gather(mine)
        merged = {k: v for part in gathered or [] for k, v in part.items()}
        found: list[Any] = self.comm.broadcast([merged[i] for i in sorted(merged)])
        return found


class _StopError(Exception):
    """A rank was asked to stop."""


def _stopped(stop: StopRequest) -> OutOfTimeError:
    return OutOfTimeError(
        f"stopped by {stop.reason}",
        advice="execute it again: it begins anew, give it more time",
    )


def strained_copies(md: MDConfig) -> int:
    """Return how many strained copies a property takes, after the crystal itself."""
    if md.workflow_type == "ELASTIC_LAMMPS":
        return 6 * 2 * md.strain_points
    if md.workflow_type == "EOS_LAMMPS":
        return 2 * max(_MIN_EOS_POINTS, md.strain_points) + 1
    return 0


def main(
    config: dict[str, Any], work_dir: Path, comm: Communicator, stop: StopRequest
) -> dict[str, Any]:
    """Rank program: the property that ``md.json`` asks for."""
    simulation = config["simulation"]
    md = MDConfig.model_validate(simulation["config"])
    potential = Potential.model_validate(simulation["potential"]).relocated(work_dir)
    lattice = np.array(simulation["lattice"])
    frac = np.array(simulation["frac_coords"])
    with LammpsCalculator(potential, work_dir) as calculator:
        work = _Work(
            calculator,
            list(simulation["species"]),
            simulation.get("charges"),
            comm,
            stop,
            work_dir,
        )
        try:
            # Every rank relaxes the crystal itself: cheaper than sending it.
            relaxed = work.relax(lattice, frac)
        except _StopError:
            raise _stopped(stop) from None
        if md.workflow_type == "ELASTIC_LAMMPS":
            found = {"elastic": asdict(_elastic(work, relaxed, md))}
        else:
            found = {"eos": asdict(_equation_of_state(work, relaxed, md))}
        version = int(calculator.version)
    if comm.rank == 0:
        properties = {**found, "relaxed_energy_ev": relaxed.energy_ev}
        write_json(work_dir / PROPERTIES_FILE, properties)
        box = LammpsBox.from_lattice(lattice)
        matrix = box.basis @ np.array(relaxed.lattice_a) @ box.rotation
        reduced = np.array(relaxed.frac_coords) @ np.linalg.inv(box.basis)
        write_json(
            work_dir / FINAL,
            {
                "step": 0,
                "matrix": matrix.tolist(),
                "positions": (reduced @ matrix).tolist(),
            },
        )
    return {
        "steps": 0,
        "n_atoms": len(work.species),
        "segments": 0,
        "lammps_version": version,
        "ranks": comm.size,
    }


def _elastic(work: _Work, relaxed: RelaxationResult, md: MDConfig) -> ElasticConstants:
    largest = md.max_strain or _ELASTIC_STRAIN
    one_side = [largest * k / md.strain_points for k in range(1, md.strain_points + 1)]
    sizes = [-size for size in one_side] + one_side
    lattice = np.array(relaxed.lattice_a)
    frac = np.array(relaxed.frac_coords)
    jobs = [(component, size) for component in range(6) for size in sizes]

    def one(number: int) -> list[float]:
        strained = lattice @ (np.eye(3) + strain_tensor(*jobs[number]))
        result = work.relax(strained, frac, relax_cell=False)
        tensor = voigt_to_tensor(np.array(result.stress_bar)) * _BAR_IN_GPA
        return [float(tensor[i, j]) for i, j in _VOIGT]

    stresses = np.array(work.shared(len(jobs), one)).reshape(6, len(sizes), 6)
    return elastic_constants(sizes, stresses, point_group(work.species, lattice, frac))


def _equation_of_state(
    work: _Work, relaxed: RelaxationResult, md: MDConfig
) -> EquationOfState:
    """Relax at several pressures: the shape of the cell is that of each pressure."""
    largest = md.max_strain or _VOLUME_STRAIN
    count = max(_MIN_EOS_POINTS, md.strain_points)
    lattice, frac = np.array(relaxed.lattice_a), np.array(relaxed.frac_coords)
    # A first guess of the bulk modulus, for pressures that give about these strains.
    step = 0.002
    try:
        small, large = (
            work.relax(lattice * (1 + s), frac, relax_cell=False).pressure_bar
            for s in (-step, step)
        )
    except _StopError:
        raise _stopped(work.stop) from None
    bulk_bar = ((small or 0.0) - (large or 0.0)) / (6 * step)
    if bulk_bar <= 0.0:
        raise SimulationError(
            f"the bulk modulus is {bulk_bar:.3g} bar: the crystal is not stable",
            evidence={"class": "unstable"},
        )
    strains = [largest * k / count for k in range(-count, count + 1)]

    def one(number: int) -> tuple[float, float]:
        s = strains[number]
        # Murnaghan's law with B' = 4.5.
        pressure = bulk_bar / 4.5 * ((1 + s) ** (-3 * 4.5) - 1)
        result = work.relax(lattice * (1 + s), frac, pressure_bar=pressure)
        return float(result.volume_a3 or 0.0), float(result.energy_ev or 0.0)

    points = work.shared(len(strains), one)
    return fit_birch_murnaghan(*zip(*points, strict=True))


if __name__ == "__main__":
    run_rank_program(main)
