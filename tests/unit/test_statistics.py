"""Averages of correlated series: errors right over many runs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nanoos_fw.errors import InputError
from nanoos_fw.md.statistics import block_analysis, detect_equilibration, mser


def correlated(n, phi, seed):
    """AR(1) with unit variance; its inefficiency is (1 + phi) / (1 - phi)."""
    rng = np.random.default_rng(seed)
    x = np.empty(n)
    x[0] = rng.normal()
    kicks = rng.normal(size=n) * math.sqrt(1.0 - phi**2)
    for i in range(1, n):
        x[i] = phi * x[i - 1] + kicks[i]
    return x


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_error_bars_cover_the_mean_as_often_as_they_say(phi):
    found = [block_analysis(correlated(2000, phi, s)) for s in range(150)]
    z = np.array([f.mean / f.standard_error for f in found])
    assert all(f.plateau for f in found)
    # 68 % and 95 % of normal errors; 150 runs scatter by 4 and 2 %.
    assert 0.55 < (np.abs(z) < 1).mean() < 0.85
    assert (np.abs(z) < 2).mean() > 0.9
    assert np.median([f.block_size for f in found]) >= 0.3 * (1 + phi) / (1 - phi)


def test_a_series_too_short_for_its_correlation_says_so():
    short = [block_analysis(correlated(100, 0.98, s)) for s in range(40)]
    assert sum(f.plateau for f in short) <= 4
    few = block_analysis(np.array([1.0, 2.0, 4.0]))
    assert few.standard_error == math.inf
    assert not few.plateau
    constant = block_analysis(np.full(64, 0.1))
    assert constant.plateau
    assert constant.standard_error == pytest.approx(0.0, abs=1e-15)


def test_both_methods_find_where_a_transient_ends():
    x = correlated(3000, 0.5, 1)
    x[:600] += np.linspace(15.0, 0.0, 600)
    start, ended = mser(x)
    assert ended
    assert 450 <= start <= 800
    assert start % 5 == 0
    assert 450 <= detect_equilibration(x)[0] <= 900


def test_a_drift_to_the_end_is_no_equilibrium():
    x = correlated(2000, 0.5, 2) + np.linspace(0.0, 40.0, 2000)
    assert not mser(x)[1]
    start, ended = mser(correlated(2000, 0.3, 3))
    assert ended
    assert start < 700
    assert mser(np.arange(10.0)) == (0, False)
    with pytest.raises(InputError):
        mser(np.array([1.0, np.nan]))
