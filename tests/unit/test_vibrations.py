"""Vibrations: harmonic crystals whose frequencies have closed forms."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest
from dump_writer import write_binary

from nanoos_fw.errors import InputError
from nanoos_fw.md.trajectory import Trajectory
from nanoos_fw.md.vibrations import trajectory_vibrations
from nanoos_fw.units import ATOMIC_MASS_KG, BOLTZMANN_EV_PER_K, EV_IN_JOULE

EV = ATOMIC_MASS_KG * 1e4 / EV_IN_JOULE  # u (Å/ps)²
KELVIN = 300.0
KT = BOLTZMANN_EV_PER_K * KELVIN / EV  # u (Å/ps)²


def dump(folder, velocities, types=None, every=1):
    n_atoms = velocities.shape[1]
    positions = np.zeros_like(velocities)
    path = write_binary(
        folder / "t.bin",
        positions,
        np.eye(3) * (5.0 + n_atoms),
        types=types,
        velocities=velocities,
        every=every,
    )
    return Trajectory(path)


def mode_velocities(frequencies, vectors, masses, times, seed):
    """Superpose normal modes with kT each; ``vectors (3 n_atoms, n_modes)``."""
    rng = np.random.default_rng(seed)
    phases = rng.uniform(0, 2 * math.pi, len(frequencies))
    # <v²> of a mode coordinate is kT: amplitude sqrt(2 kT).
    modes = math.sqrt(2 * KT) * np.cos(
        2 * math.pi * np.outer(times, frequencies) + phases
    )
    v = modes @ vectors.T / np.sqrt(np.repeat(masses, 3))
    return v.reshape(len(times), -1, 3)


def integral(found, low, high, curve=None):
    curve = found.total if curve is None else curve
    inside = (found.frequency_thz >= low) & (found.frequency_thz < high)
    return curve[inside].sum() * found.frequency_thz[1]


def test_einstein_solid_has_three_modes_an_atom_at_its_frequencies(tmp_path):
    masses, frequencies = np.array([20.0, 60.0]), np.array([9.0, 4.0])
    types = np.array([1, 2, 2, 1, 2])
    step = 0.01
    times = np.arange(4000) * step
    v = mode_velocities(
        np.repeat(frequencies[types - 1], 3),
        np.eye(15),
        masses[types - 1],
        times,
        1,
    )
    found = trajectory_vibrations(
        dump(tmp_path, v, types, every=10),
        step / 10,
        masses,
        temperature_k=KELVIN,
        longest_ps=8.0,
        memory_mb=0.5,
    )
    assert found.limit_thz == pytest.approx(0.5 / step)
    assert found.is_resolved
    assert found.n_modes == pytest.approx(15.0, rel=0.01)
    assert found.temperature_k == pytest.approx(KELVIN, rel=0.01)
    for kind, count in ((1, 2), (2, 3)):
        curve, frequency = found.by_type[kind], frequencies[kind - 1]
        peak = found.frequency_thz[curve.argmax()]
        assert peak == pytest.approx(frequency, abs=0.03)
        around = integral(found, frequency - 0.5, frequency + 0.5, curve)
        assert around == pytest.approx(3 * count, rel=0.02)
    np.testing.assert_allclose(
        found.total, found.by_type[1] + found.by_type[2], atol=1e-9
    )
    exact = (
        6 * np.cos(2 * math.pi * 9.0 * found.time_ps)
        + 9 * np.cos(2 * math.pi * 4.0 * found.time_ps)
    ) / 15
    np.testing.assert_allclose(found.vacf, exact, atol=0.03)


def fcc_modes(cells, k, mass):
    """Normal modes of springs between nearest neighbours, in real space."""
    basis = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    grid = np.array(list(itertools.product(range(cells), repeat=3)))
    sites = (grid[:, None] + basis).reshape(-1, 3)
    n = len(sites)
    matrix = np.zeros((n, 3, n, 3))
    for i in range(n):
        d = sites - sites[i]
        d -= cells * np.rint(d / cells)
        for j in np.flatnonzero(np.abs((d**2).sum(axis=1) - 0.5) < 1e-9):
            unit = d[j] / np.linalg.norm(d[j])
            spring = k / mass * np.outer(unit, unit)
            matrix[i, :, i, :] += spring
            matrix[i, :, j, :] -= spring
    values, vectors = np.linalg.eigh(matrix.reshape(3 * n, 3 * n))
    return np.sqrt(np.maximum(values, 0.0)) / (2 * math.pi), vectors


def analytic_fcc(cells, k, mass):
    """``K/M sum_neighbours (1 - cos(k R)) R R`` at the wave vectors of the cell."""
    neighbours = [
        v
        for v in itertools.product((-0.5, 0, 0.5), repeat=3)
        if np.isclose(np.dot(v, v), 0.5)
    ]
    found = []
    whole = range(2 * cells)
    waves = {
        tuple(
            np.round(np.mod(q @ [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]], 1), 9)
        ): q
        for q in np.array(list(itertools.product(whole, repeat=3))) / cells
    }
    for q in waves.values():
        d = np.zeros((3, 3))
        for r in map(np.array, neighbours):
            d += (1 - math.cos(2 * math.pi * q @ r)) * 2 * np.outer(r, r)
        found.extend(np.sqrt(np.maximum(np.linalg.eigvalsh(d * k / mass), 0)))
    return np.sort(found) / (2 * math.pi)


def test_fcc_with_springs_vibrates_at_the_phonon_frequencies(tmp_path):
    mass, k = 40.0, 4.0e4  # u, u/ps²
    frequencies, vectors = fcc_modes(2, k, mass)
    exact = analytic_fcc(2, k, mass)
    assert len(exact) == 96
    np.testing.assert_allclose(np.sort(frequencies), exact, atol=1e-6)
    # At X: sqrt(8 K/M) and sqrt(4 K/M).
    assert exact[-1] == pytest.approx(math.sqrt(8 * k / mass) / (2 * math.pi))
    moving = frequencies > 1e-3
    times = np.arange(6000) * 0.02
    v = mode_velocities(
        frequencies[moving], vectors[:, moving], np.full(32, mass), times, 2
    )
    found = trajectory_vibrations(
        dump(tmp_path, v), 0.02, [mass], temperature_k=KELVIN, longest_ps=25.0
    )
    # The three translations carry nothing.
    assert found.n_modes == pytest.approx(96 - 3, rel=0.01)
    assert found.is_resolved
    levels, counts = np.unique(np.round(exact[exact > 1e-3], 6), return_counts=True)
    assert len(levels) >= 4
    width = 0.12
    for level, count in zip(levels, counts, strict=True):
        assert np.diff(levels).min() > 2 * width
        found_modes = integral(found, level - width, level + width)
        assert found_modes == pytest.approx(count, rel=0.05, abs=0.1)
        near = np.abs(found.frequency_thz - level) < width
        peak = found.frequency_thz[near][found.total[near].argmax()]
        assert peak == pytest.approx(level, abs=0.02)


def test_too_few_frames_a_period_are_said(tmp_path, caplog):
    # 9 THz shown every 0.06 ps: the limit is 8.33 THz, the peak appears at 7.67.
    times = np.arange(2000) * 0.06
    v = mode_velocities(np.full(6, 9.0), np.eye(6), np.full(2, 20.0), times, 3)
    with caplog.at_level(logging.WARNING):
        found = trajectory_vibrations(dump(tmp_path, v), 0.06, [20.0])
    assert not found.is_resolved
    assert "limit of 8.33 THz" in caplog.text
    assert found.frequency_thz[found.total.argmax()] == pytest.approx(7.67, abs=0.02)


def test_real_units_and_missing_velocities(tmp_path):
    times = np.arange(500) * 0.01
    v = mode_velocities(np.full(6, 5.0), np.eye(6), np.full(2, 20.0), times, 4)
    one = trajectory_vibrations(dump(tmp_path, v), 0.01, [20.0])
    other = trajectory_vibrations(
        dump(tmp_path, v / 1000.0), 0.01, [20.0], velocity_factor=1000.0
    )
    np.testing.assert_allclose(other.total, one.total, rtol=1e-9)
    assert other.temperature_k == pytest.approx(one.temperature_k)
    path = write_binary(tmp_path / "x.bin", np.zeros((50, 2, 3)), np.eye(3) * 9)
    with pytest.raises(InputError, match="dump vx vy vz"):
        trajectory_vibrations(Trajectory(path), 0.01, [20.0])
    with pytest.raises(InputError, match="8 lags or more"):
        trajectory_vibrations(dump(tmp_path, v)[:12], 0.01, [20.0])
    part = dump(tmp_path, v)
    with pytest.raises(InputError, match="not equally spaced"):
        trajectory_vibrations(part[np.array([0, 1, 3])], 0.01, [20.0])
