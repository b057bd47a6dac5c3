"""How far atoms go: mean squared displacement, diffusion, its activation energy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.md.series import (
    MEMORY_MB,
    check_series,
    displacement_series,
    fast_length,
    motion,
)
from nanoos_fw.md.trajectory import Trajectory
from nanoos_fw.units import BOLTZMANN_EV_PER_K, EV_IN_JOULE

Array = NDArray[np.float64]

# Å²/ps in cm²/s.
CM2_S_PER_A2_PS = 1e-4
_MAX_LAGS = 24
# The local exponent of diffusive motion, d ln MSD / d ln t, differs from 1 by no more.
_EXPONENT_TOLERANCE = 0.1
_SIGMAS = 3.0
# Lags beyond this part of the trajectory have few independent origins.
_LAST_PART = 0.25
# Madelung-like constant of a cubic periodic box.
_YEH_HUMMER = 2.837297


@dataclass(frozen=True)
class MeanSquaredDisplacement:
    """Mean squared displacement over all time origins.

    Parameters
    ----------
    time_ps
        ``(n_lags,) float64``.
    total
        ``(n_lags,) float64``, Å²: average over all atoms.
    by_type
        The same for each type of atom.
    n_atoms
        Number of atoms of each type.
    n_frames
        Frames of the trajectory.
    """

    time_ps: Array
    total: Array
    by_type: dict[int, Array]
    n_atoms: dict[int, int]
    n_frames: int


def trajectory_msd(
    trajectory: Trajectory,
    timestep_ps: float,
    *,
    masses: Sequence[float] | None = None,
    remove_drift: bool = True,
    memory_mb: float = MEMORY_MB,
) -> MeanSquaredDisplacement:
    """Return the mean squared displacement of a trajectory of any length.

    Parameters
    ----------
    trajectory
        Equally spaced frames with unwrapped positions or image flags. A box that
        changes is accounted for (see `series.displacement_series`).
    timestep_ps
        Timestep of the simulation.
    masses
        Mass of each type, u, for the centre of mass; None takes all atoms alike.
    remove_drift
        Whether displacements are relative to the centre of mass. LAMMPS keeps the
        total momentum, so as a rule this changes rounding errors only.
    memory_mb
        Bound on the memory for the atoms' paths.

    Raises
    ------
    InputError
        If the frames cannot be used; says why.
    """
    n_atoms = check_series(trajectory, "a mean squared displacement")
    weights = None if masses is None else np.asarray(masses, np.float64)
    moved = motion(trajectory, weights)
    n = len(trajectory)
    sums: dict[int, Array] = {}
    counts: dict[int, int] = {}
    for block in displacement_series(
        trajectory, moved, remove_drift=remove_drift, memory_mb=memory_mb
    ):
        for kind in np.unique(block.types).tolist():
            mine = block.types == kind
            part = block.values if mine.all() else block.values[mine]
            sums[kind] = sums.get(kind, np.zeros(n)) + _msd_sum(part)
            counts[kind] = counts.get(kind, 0) + int(mine.sum())
    time = np.arange(n) * (trajectory.interval() * timestep_ps)
    return MeanSquaredDisplacement(
        time_ps=np.asarray(time),
        total=np.sum(list(sums.values()), axis=0) / n_atoms,
        by_type={kind: sums[kind] / counts[kind] for kind in sorted(sums)},
        n_atoms=dict(sorted(counts.items())),
        n_frames=n,
    )


def mean_squared_displacement(positions: Array) -> Array:
    """Return the mean squared displacement over all origins, by FFT.

    Parameters
    ----------
    positions
        ``(n_frames, n_atoms, 3) float64``, Å: unwrapped, equally spaced in time, in a
        cell of fixed size and without drift of the centre of mass.

    Returns
    -------
    numpy.ndarray
        ``(n_frames,) float64``, Å²: average over atoms and origins for each lag in
        frames.

    Raises
    ------
    InputError
        If the shape is another.

    References
    ----------
    V. Calandrini et al., Collection SFN 12, 201 (2011), section 4.2.1.
    """
    x = np.asarray(positions, dtype=np.float64)
    if x.ndim != 3 or x.shape[2] != 3 or x.shape[0] < 1 or x.shape[1] < 1:
        raise InputError(f"positions must be (frames, atoms, 3), not {x.shape}")
    n, n_atoms, _ = x.shape
    total = np.zeros(n)
    # In pieces that stay in the processor's cache.
    size = max(1, 2**16 // n)
    for first in range(0, n_atoms, size):
        part = np.ascontiguousarray(x[:, first : first + size].transpose(1, 2, 0))
        total += _msd_sum(part)
    return np.asarray(total / n_atoms)


def _msd_sum(paths: Array) -> Array:
    """Return the mean squared displacement, summed over atoms.

    ``sum_t |r(t + lag) - r(t)|^2`` is a running sum of squares less twice the
    autocorrelation. Both are sums over atoms, so all atoms share one transform back.
    """
    n_atoms, _, n = paths.shape
    size = fast_length(2 * n - 1)
    spectrum = np.zeros(size // 2 + 1)
    square = np.zeros(n)
    step = max(1, 2**16 // n)
    for first in range(0, n_atoms, step):
        x = paths[first : first + step]
        # Large offsets cancel badly in the difference of squares below.
        x = x - x.mean(axis=2, keepdims=True)
        square += np.einsum("akf,akf->f", x, x)
        transform = np.fft.rfft(x, size, axis=2)
        spectrum += np.einsum("akf,akf->f", transform.real, transform.real)
        spectrum += np.einsum("akf,akf->f", transform.imag, transform.imag)
    cross = np.fft.irfft(spectrum, size)[:n]
    # Sum over origins of r(t)^2 + r(t + lag)^2, from one running sum.
    partial = np.concatenate([[0.0], np.cumsum(square)])
    lags = np.arange(n)
    both = (partial[n] - partial[lags]) + partial[n - lags]
    msd = (both - 2.0 * cross) / (n - lags)
    msd[0] = 0.0
    return np.asarray(msd)


# ------------------------------------------------------------------------ diffusion


@dataclass(frozen=True)
class Diffusion:
    """A diffusion coefficient.

    Parameters
    ----------
    coefficient_a2_ps, standard_error_a2_ps
        Å²/ps (1 Å²/ps = 1e-4 cm²/s); None if the motion is not diffusive.
    offset_a2
        Å²: where the line meets zero time; what ballistic motion and vibrations add.
    first_ps, last_ps
        Lags between which the line was fitted.
    exponent
        ``d ln MSD / d ln t`` over this range; 1 for diffusion.
    diffusive
        Whether the exponent is 1 within its error from ``first_ps`` on. A solid, or
        a run too short for its atoms to leave their cages, is not.
    """

    coefficient_a2_ps: float | None
    standard_error_a2_ps: float | None
    offset_a2: float | None
    first_ps: float | None
    last_ps: float | None
    exponent: float | None
    diffusive: bool


def diffusion(
    time_ps: Array,
    msd_a2: Array,
    n_atoms: int,
    *,
    first_ps: float | None = None,
    last_ps: float | None = None,
) -> Diffusion:
    """Return D of ``MSD = 6 D t + offset`` with an error that knows the correlations.

    Values at different lags come from the same trajectory and lags share their
    origins, so an ordinary fit gives an error that is far too small. The line is
    fitted by generalised least squares with the covariance of a random walk of
    independent atoms, exact for overlapping origins.

    The coefficient is that of the periodic box: add `finite_size_correction` for the
    infinite system.

    Parameters
    ----------
    time_ps, msd_a2
        ``(n_frames,) float64``: all lags of the trajectory, from 0.
    n_atoms
        Atoms averaged over.
    first_ps, last_ps
        Range of the fit. By default it begins where the local exponent becomes 1
        within 0.1 or three standard errors and stays so, and ends at a quarter of
        the trajectory.

    Raises
    ------
    InputError
        If there are fewer than 16 lags, or the range holds fewer than two.

    References
    ----------
    J. T. Bullerjahn, S. von Bülow, G. Hummer, J. Chem. Phys. 153, 024116 (2020).
    A. R. McCluskey, S. W. Coles, B. J. Morgan, J. Chem. Theory Comput. 21, 79 (2025).
    """
    t, msd = np.asarray(time_ps, np.float64), np.asarray(msd_a2, np.float64)
    n = len(t)
    if n < 16 or len(msd) != n:
        raise InputError(
            f"a diffusion coefficient needs 16 frames or more, not {n}",
            advice="dump more often, or run longer",
        )
    step = float(t[1] - t[0])
    last = int(_LAST_PART * n) if last_ps is None else int(last_ps / step + 0.5)
    last = min(last, n - 1)
    found = _diffusive_from(msd, n, n_atoms, last)
    first = found if first_ps is None else max(1, int(first_ps / step + 0.5))
    if first is None:
        return Diffusion(
            None, None, None, None, None, _exponent(msd, last // 4, last), False
        )
    if last - first < 1:
        raise InputError(
            f"no two lags lie between {first * step:g} and {last * step:g} ps",
            evidence={"interval_ps": step, "frames": n},
        )
    lags = np.unique(
        np.linspace(first, last, min(_MAX_LAGS, last - first + 1), dtype=int)
    )
    overlaps = _walk_covariance(lags, n)
    design = np.column_stack([6.0 * step * lags, np.ones(len(lags))])
    # The covariance is proportional to D², so the weights do not depend on it.
    weighted = np.linalg.solve(overlaps, design)
    normal = np.linalg.inv(design.T @ weighted)
    slope, offset = normal @ (weighted.T @ msd[lags])
    # Variance of a component's displacement in one frame is 2 D step.
    variance = (2.0 * slope * step) ** 2 * normal[0, 0] * 3.0 / n_atoms
    return Diffusion(
        coefficient_a2_ps=float(slope),
        standard_error_a2_ps=math.sqrt(variance),
        offset_a2=float(offset),
        first_ps=float(lags[0] * step),
        last_ps=float(lags[-1] * step),
        exponent=_exponent(msd, int(lags[0]), int(lags[-1])),
        diffusive=found is not None and first >= found,
    )


def _walk_covariance(lags: NDArray[np.int64], n: int) -> Array:
    """Return the covariance of the mean squared displacements of a random walk.

    Of one component with steps of unit variance and n frames. Displacements over
    windows that share k steps have the covariance k, their squares ``2 k**2``.
    """
    covariance = np.empty((len(lags), len(lags)))
    for i, a in enumerate(lags.tolist()):
        for j, b in enumerate(lags[: i + 1].tolist()):
            # Windows [s, s + a) and [s + d, s + d + b), for every distance d.
            d = np.arange(-b + 1, a)
            shared = np.minimum(a, d + b) - np.maximum(0, d)
            origins = np.minimum(n - a, n - b - d) - np.maximum(0, -d)
            total = float(
                (np.maximum(origins, 0) * shared.astype(np.float64) ** 2).sum()
            )
            covariance[i, j] = covariance[j, i] = 2.0 * total / ((n - a) * (n - b))
    return covariance


def _exponent(msd: Array, first: int, last: int) -> float | None:
    if first < 1 or last <= first or msd[first] <= 0.0 or msd[last] <= 0.0:
        return None
    return float(math.log(msd[last] / msd[first]) / math.log(last / first))


def _diffusive_from(msd: Array, n: int, n_atoms: int, last: int) -> int | None:
    """Return the first lag from which on the motion is diffusive, if there is one."""
    lags = [1]
    while 2 * lags[-1] <= last:
        lags.append(2 * lags[-1])
    first = None
    for a in reversed(lags[:-1]):
        exponent = _exponent(msd, a, 2 * a)
        if exponent is None:
            break
        c = _walk_covariance(np.array([a, 2 * a]), n) / (3.0 * n_atoms)
        # Relative values: the mean squared displacement of the walk is the lag.
        spread = c[0, 0] / a**2 + c[1, 1] / (4 * a**2) - 2.0 * c[0, 1] / (2 * a**2)
        error = math.sqrt(max(0.0, spread)) / math.log(2.0)
        if abs(exponent - 1.0) > max(_EXPONENT_TOLERANCE, _SIGMAS * error):
            break
        first = a
    return first


def finite_size_correction(
    temperature_k: float, viscosity_pa_s: float, box_a: float
) -> float:
    """Return what to add to D of a cubic periodic box for the infinite liquid, Å²/ps.

    Parameters
    ----------
    temperature_k, viscosity_pa_s
        Of the liquid.
    box_a
        Edge of the cubic box in Å.

    References
    ----------
    I.-C. Yeh, G. Hummer, J. Phys. Chem. B 108, 15873 (2004).
    """
    if min(temperature_k, viscosity_pa_s, box_a) <= 0.0:
        raise InputError("temperature, viscosity and box must be positive")
    boltzmann = BOLTZMANN_EV_PER_K * EV_IN_JOULE
    si = (
        _YEH_HUMMER
        * boltzmann
        * temperature_k
        / (6.0 * math.pi * viscosity_pa_s * box_a * 1e-10)
    )
    return si * 1e20 / 1e12


@dataclass(frozen=True)
class Arrhenius:
    """``D = D0 exp(-E / kT)``.

    Parameters
    ----------
    activation_energy_ev, activation_energy_error_ev
        E and its standard error.
    prefactor_a2_ps
        D0 in Å²/ps; ``prefactor_factor`` is the factor of its standard error, which
        is symmetric on a logarithmic scale.
    chi_squared
        Sum of squared deviations in standard errors; about the number of
        temperatures less two if the law holds.
    """

    activation_energy_ev: float
    activation_energy_error_ev: float
    prefactor_a2_ps: float
    prefactor_factor: float
    chi_squared: float


def arrhenius(coefficients: Mapping[float, tuple[float, float]]) -> Arrhenius:
    """Fit the activation energy of diffusion.

    Parameters
    ----------
    coefficients
        By temperature in K: D and its standard error, in Å²/ps.

    Raises
    ------
    InputError
        If there are fewer than two temperatures, or a value is not positive.
    """
    if len(coefficients) < 2:
        raise InputError(
            f"an activation energy needs two temperatures, not {len(coefficients)}"
        )
    values = np.array([(t, d, e) for t, (d, e) in sorted(coefficients.items())])
    if not (np.isfinite(values).all() and (values > 0.0).all()):
        raise InputError(
            "temperatures, coefficients and their errors must be positive",
            evidence={"coefficients": values.tolist()},
        )
    t, d, e = values.T
    design = np.column_stack([np.ones(len(t)), -1.0 / (BOLTZMANN_EV_PER_K * t)])
    # The error of ln D is the relative error of D.
    weights = (d / e)[:, None]
    normal = np.linalg.inv((design * weights).T @ (design * weights))
    fit = normal @ ((design * weights).T @ (np.log(d) * weights[:, 0]))
    left = (np.log(d) - design @ fit) * weights[:, 0]
    return Arrhenius(
        activation_energy_ev=float(fit[1]),
        activation_energy_error_ev=math.sqrt(normal[1, 1]),
        prefactor_a2_ps=math.exp(fit[0]),
        prefactor_factor=math.exp(math.sqrt(normal[0, 0])),
        chi_squared=float(left @ left),
    )
