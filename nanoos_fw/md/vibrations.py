"""How atoms vibrate: velocity autocorrelation and vibrational density of states."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.md.series import (
    MEMORY_MB,
    check_series,
    fast_length,
    velocity_series,
)
from nanoos_fw.md.trajectory import Trajectory
from nanoos_fw.units import ATOMIC_MASS_KG, BOLTZMANN_EV_PER_K, EV_IN_JOULE

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

# u (Å/ps)² in eV.
_EV_PER_U_A2_PS2 = ATOMIC_MASS_KG * 1e4 / EV_IN_JOULE
# The uppermost tenth of the band holds no more than this of a spectrum that the
# interval of the frames resolves.
_TOP_BAND, _MOST_IN_TOP_BAND = 0.9, 0.01
_MIN_LAGS = 8


@dataclass(frozen=True)
class Vibrations:
    """Velocity autocorrelation and vibrational density of states, mass-weighted.

    Parameters
    ----------
    time_ps
        ``(n_lags,) float64``.
    vacf
        ``(n_lags,) float64``: ``sum_i m_i <v_i(0) v_i(t)>`` over that at t = 0.
    frequency_thz
        ``(n_frequencies,) float64``, from 0 to the sampling limit.
    total
        ``(n_frequencies,) float64``, 1/THz: density of states of the whole cell.
    by_type
        The same for the atoms of each type; they add up to the total.
    temperature_k
        Kinetic temperature, of three degrees of freedom per atom.
    n_modes
        Integral of the density: ``3 N`` times the kinetic temperature over the one
        the density was normalised with. A harmonic crystal at equilibrium, its centre
        of mass at rest, has ``3 N - 3``.
    n_atoms
        Number of atoms of each type.
    limit_thz
        Highest frequency that frames at this interval can show.
    is_resolved
        Whether the spectrum has ended below that limit. Otherwise faster vibrations
        appear at wrong, lower frequencies.
    """

    time_ps: Array
    vacf: Array
    frequency_thz: Array
    total: Array
    by_type: dict[int, Array]
    temperature_k: float
    n_modes: float
    n_atoms: dict[int, int]
    limit_thz: float
    is_resolved: bool


def trajectory_vibrations(
    trajectory: Trajectory,
    timestep_ps: float,
    masses: Sequence[float],
    *,
    temperature_k: float | None = None,
    longest_ps: float | None = None,
    velocity_factor: float = 1.0,
    memory_mb: float = MEMORY_MB,
) -> Vibrations:
    """Return velocity autocorrelation and density of states of a trajectory.

    ``g(f) = 4 / kT integral_0^inf w(t) sum_i m_i <v_i(0) v_i(t)> cos(2 pi f t) dt``
    with a Hann window w that ends at ``longest_ps``; peaks are about
    ``1 / longest_ps`` wide.

    Parameters
    ----------
    trajectory
        Equally spaced frames with velocities. Frames must follow each other faster
        than half a period of the fastest vibration (10 fs show up to 50 THz).
    timestep_ps
        Timestep of the simulation.
    masses
        Mass of each type in u.
    temperature_k
        Temperature of the simulation; None takes the kinetic one, with which the
        integral is 3 N by construction and checks nothing.
    longest_ps
        Longest lag; None takes a quarter of the trajectory.
    velocity_factor
        What makes Å/ps of the velocities: 1 for metal units, 1000 for real units.
    memory_mb
        Bound on the memory for the atoms' velocities.

    Raises
    ------
    InputError
        If the frames cannot be used; says why.

    References
    ----------
    J. M. Dickey, A. Paskin, Phys. Rev. 188, 1407 (1969).
    """
    n_atoms = check_series(trajectory, "a density of states")
    step = trajectory.interval() * timestep_ps
    n = len(trajectory)
    n_lags = n // 4 if longest_ps is None else int(longest_ps / step)
    n_lags = min(n_lags, n - 1)
    if n_lags < _MIN_LAGS:
        raise InputError(
            f"a density of states needs {_MIN_LAGS} lags or more, not {n_lags}",
            evidence={"frames": n, "interval_ps": step},
            advice="dump more often, or run longer",
        )
    types = next(iter(trajectory)).types
    if types.max() > len(masses):
        raise InputError(f"no mass was given for type {int(types.max())}")
    sums = _spectra(trajectory, types, n_lags, memory_mb)
    correlations = {
        kind: velocity_factor**2 * masses[kind - 1] * values / (n - np.arange(n_lags))
        for kind, values in sorted(sums.items())
    }
    total = np.sum(list(correlations.values()), axis=0)
    if not total[0] > 0.0:
        raise InputError("all velocities are zero")
    kinetic_k = total[0] * _EV_PER_U_A2_PS2 / (3.0 * n_atoms * BOLTZMANN_EV_PER_K)
    scale = _EV_PER_U_A2_PS2 / (BOLTZMANN_EV_PER_K * (temperature_k or kinetic_k))
    densities = {k: scale * _transform(c, step) for k, c in correlations.items()}
    density = np.sum(list(densities.values()), axis=0)
    frequency = np.linspace(0.0, 0.5 / step, len(density))
    # Densities are even functions: the first and last point count half.
    weights = np.full(len(density), frequency[1])
    weights[[0, -1]] *= 0.5
    top = frequency > _TOP_BAND * frequency[-1]
    share = float(np.abs(density[top]) @ weights[top] / (density @ weights))
    found = Vibrations(
        time_ps=np.asarray(step * np.arange(n_lags), np.float64),
        vacf=np.asarray(total / total[0]),
        frequency_thz=frequency,
        total=density,
        by_type=densities,
        temperature_k=float(kinetic_k),
        n_modes=float(density @ weights),
        n_atoms={int(k): int((types == k).sum()) for k in densities},
        limit_thz=float(frequency[-1]),
        is_resolved=share <= _MOST_IN_TOP_BAND,
    )
    if not found.is_resolved:
        logger.warning(
            "%.0f %% of the vibrations lie near the limit of %.3g THz that frames "
            "every %.3g fs can show: faster ones appear at wrong frequencies; dump "
            "velocities more often",
            100.0 * share,
            found.limit_thz,
            1000.0 * step,
        )
    return found


def _spectra(
    trajectory: Trajectory, types: NDArray[np.int64], n_lags: int, memory_mb: float
) -> dict[int, Array]:
    """Return ``sum_i sum_t v_i(t) v_i(t + lag)`` of each type."""
    n = len(trajectory)
    size = fast_length(n + n_lags)
    spectra: dict[int, Array] = {}
    for block in velocity_series(trajectory, types, memory_mb=memory_mb):
        for kind in np.unique(block.types).tolist():
            mine = np.flatnonzero(block.types == kind)
            spectrum = spectra.setdefault(kind, np.zeros(size // 2 + 1))
            step = max(1, 2**16 // n)
            for first in range(0, len(mine), step):
                part = block.values[mine[first : first + step]]
                transform = np.fft.rfft(part, size, axis=2)
                spectrum += np.einsum("akf,akf->f", transform.real, transform.real)
                spectrum += np.einsum("akf,akf->f", transform.imag, transform.imag)
    return {k: np.fft.irfft(s, size)[:n_lags] for k, s in spectra.items()}


def _transform(correlation: Array, step_ps: float) -> Array:
    """Return ``4 integral w(t) C(t) cos(2 pi f t) dt`` on frequencies to the limit."""
    n = len(correlation)
    window = 0.5 * (1.0 + np.cos(math.pi * np.arange(n) / n))
    size = fast_length(4 * n)
    size += size % 2
    even = np.zeros(size)
    even[:n] = window * correlation
    # C(-t) = C(t); the point at t = 0 is there once.
    even[size - n + 1 :] = even[1:n][::-1]
    return np.asarray(2.0 * step_ps * np.fft.rfft(even).real)
