"""Expansion and bulk modulus against a Gaussian model of the NPT ensemble."""

from __future__ import annotations

import numpy as np
import pytest

from nanoos_fw.errors import InputError
from nanoos_fw.md.thermodynamics import npt_fluctuations, thermal_expansion
from nanoos_fw.md.trajectory import ThermoTable
from nanoos_fw.units import BOLTZMANN_EV_PER_K, EV_PER_A3_IN_BAR, EV_PER_A3_IN_GPA

T, V, ALPHA, MODULUS_GPA, PRESSURE = 400.0, 5000.0, 6e-5, 40.0, 2000.0
KT = BOLTZMANN_EV_PER_K * T


def run(n, seed, phi=0.6):
    """Rows whose volume and enthalpy have the exact NPT covariances, correlated."""
    rng = np.random.default_rng(seed)
    var_v = KT * V / (MODULUS_GPA / EV_PER_A3_IN_GPA)
    cov_vh = ALPHA * KT * T * V
    var_h = 30.0 * KT**2 + cov_vh**2 / var_v
    factor = np.linalg.cholesky([[var_v, cov_vh], [cov_vh, var_h]])
    z = np.empty((n, 2))
    z[0] = rng.normal(size=2)
    for i in range(1, n):
        z[i] = phi * z[i - 1] + np.sqrt(1 - phi**2) * rng.normal(size=2)
    volume, enthalpy = (z @ factor.T + [V, -800.0]).T
    energy = enthalpy - PRESSURE / EV_PER_A3_IN_BAR * volume
    return ThermoTable(
        {"step": np.arange(n), "volume_a3": volume, "total_energy_ev": energy}, {}
    )


def test_fluctuations_give_both_numbers_with_errors_that_hold():
    z = {"thermal_expansion": [], "bulk_modulus": []}
    exact = {"thermal_expansion": ALPHA, "bulk_modulus": MODULUS_GPA}
    for seed in range(60):
        found = npt_fluctuations(run(3000, seed), T, PRESSURE)
        for name, value in found.items():
            z[name].append((value.value - exact[name]) / value.standard_error)
            assert value.value == pytest.approx(exact[name], rel=0.5)
    assert found["thermal_expansion"].unit == "1/K"
    assert found["bulk_modulus"].unit == "GPa"
    for values in z.values():
        assert 0.7 < np.std(values) < 1.4
        assert abs(np.mean(values)) < 0.5


def test_too_few_rows_say_so():
    for table in (run(20, 1), run(200, 1, phi=0.99)):
        with pytest.raises(InputError, match="8 independent blocks"):
            npt_fluctuations(table, T, PRESSURE)


def test_expansion_of_runs_at_several_temperatures():
    rng = np.random.default_rng(1)
    temperatures = [200.0, 300.0, 400.0, 500.0]
    z = []
    for _ in range(200):
        volumes = {
            t: (V * np.exp(ALPHA * t) * (1 + 2e-4 * rng.normal()), 2e-4 * V)
            for t in temperatures
        }
        found = thermal_expansion(volumes)
        z.append((found.value - ALPHA) / found.standard_error)
    assert np.std(z) == pytest.approx(1.0, abs=0.2)
    with pytest.raises(InputError, match="two temperatures"):
        thermal_expansion({300.0: (1.0, 0.1)})
    with pytest.raises(InputError, match="must be positive"):
        thermal_expansion({300.0: (1.0, 0.1), 400.0: (1.0, 0.0)})
