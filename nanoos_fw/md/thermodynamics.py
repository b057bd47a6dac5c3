"""Thermal expansion and compressibility, from fluctuations or from several runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.md.statistics import statistical_inefficiency
from nanoos_fw.md.trajectory import ThermoTable
from nanoos_fw.units import BOLTZMANN_EV_PER_K, EV_PER_A3_IN_BAR, EV_PER_A3_IN_GPA

Array = NDArray[np.float64]

_MIN_BLOCKS, _MAX_BLOCKS = 8, 32
_MIN_ROWS = 32


@dataclass(frozen=True)
class Measured:
    """A number with its standard error and unit."""

    value: float
    standard_error: float
    unit: str

    def to_dict(self) -> dict[str, float | str]:
        """Return value, error and unit by name."""
        return {
            "value": self.value,
            "standard_error": self.standard_error,
            "unit": self.unit,
        }


def npt_fluctuations(
    table: ThermoTable, temperature_k: float, pressure_bar: float
) -> dict[str, Measured]:
    """Return what the fluctuations of an equilibrated NPT run say.

    ``thermal_expansion = cov(V, H) / (k T² V)`` of the volume, with the enthalpy
    ``H = E + P V``, and ``bulk_modulus = k T V / var(V)`` at constant temperature.
    Errors by jackknife over blocks longer than the correlation time.

    Parameters
    ----------
    table
        Rows after equilibration.
    temperature_k, pressure_bar
        Set points of thermostat and barostat.

    Raises
    ------
    InputError
        If there are too few independent rows.

    References
    ----------
    M. P. Allen, D. J. Tildesley, Computer Simulation of Liquids, 2nd ed., 2.5.
    """
    volume, energy = table["volume_a3"], table["total_energy_ev"]
    n = len(volume)
    g = statistical_inefficiency(volume) if n >= _MIN_ROWS else math.inf
    n_blocks = min(_MAX_BLOCKS, int(n / max(2.0, 2.0 * g)) if n >= _MIN_ROWS else 0)
    if n_blocks < _MIN_BLOCKS:
        raise InputError(
            f"fluctuations need {_MIN_BLOCKS} independent blocks, not {n_blocks}",
            evidence={"rows": n, "inefficiency": None if math.isinf(g) else g},
            advice="run longer, or print the thermo table more often",
        )
    enthalpy = energy + pressure_bar / EV_PER_A3_IN_BAR * volume
    kt = BOLTZMANN_EV_PER_K * temperature_k

    def expansion(rows: NDArray[np.int64]) -> float:
        v, h = volume[rows], enthalpy[rows]
        return float(np.cov(v, h)[0, 1] / (kt * temperature_k * v.mean()))

    def modulus(rows: NDArray[np.int64]) -> float:
        v = volume[rows]
        return float(kt * v.mean() / v.var(ddof=1) * EV_PER_A3_IN_GPA)

    return {
        "thermal_expansion": _jackknife(expansion, n, n_blocks, "1/K"),
        "bulk_modulus": _jackknife(modulus, n, n_blocks, "GPa"),
    }


def _jackknife(
    estimate: Callable[[NDArray[np.int64]], float], n: int, n_blocks: int, unit: str
) -> Measured:
    rows = np.arange(n)
    edges = np.linspace(0, n, n_blocks + 1, dtype=int)
    left_out = np.array(
        [
            estimate(np.concatenate([rows[: edges[i]], rows[edges[i + 1] :]]))
            for i in range(n_blocks)
        ]
    )
    variance = (n_blocks - 1) / n_blocks * ((left_out - left_out.mean()) ** 2).sum()
    whole = estimate(rows)
    # The jackknife takes away the bias of a variance from few independent rows.
    value = n_blocks * whole - (n_blocks - 1) * float(left_out.mean())
    return Measured(value, math.sqrt(variance), unit)


def thermal_expansion(volumes: Mapping[float, tuple[float, float]]) -> Measured:
    """Return the volumetric expansion ``d ln V / dT`` of NPT runs.

    Parameters
    ----------
    volumes
        By temperature in K: mean volume and its standard error, of the same atoms at
        the same pressure. A straight line in ln V is fitted, so keep the range small.

    Raises
    ------
    InputError
        If there are fewer than two temperatures, or a value is not positive.
    """
    if len(volumes) < 2:
        raise InputError(f"an expansion needs two temperatures, not {len(volumes)}")
    values = np.array([(t, v, e) for t, (v, e) in sorted(volumes.items())])
    if not (np.isfinite(values).all() and (values > 0.0).all()):
        raise InputError(
            "temperatures, volumes and their errors must be positive",
            evidence={"volumes": values.tolist()},
        )
    t, v, e = values.T
    weights = (v / e) ** 2
    centre = (weights * t).sum() / weights.sum()
    spread = (weights * (t - centre) ** 2).sum()
    slope = (weights * (t - centre) * np.log(v)).sum() / spread
    return Measured(float(slope), 1.0 / math.sqrt(spread), "1/K")
