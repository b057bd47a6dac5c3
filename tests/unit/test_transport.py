"""Displacements and diffusion: exact formulas, and errors right over many runs."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from dump_writer import binary_frame, write_binary

from nanoos_fw.errors import InputError
from nanoos_fw.md.series import atoms_at_once, fast_length
from nanoos_fw.md.trajectory import Trajectory
from nanoos_fw.md.transport import (
    arrhenius,
    diffusion,
    finite_size_correction,
    mean_squared_displacement,
    trajectory_msd,
)
from nanoos_fw.units import BOLTZMANN_EV_PER_K

CELL = np.array([[11.0, 0, 0], [2.0, 9.0, 0], [-3.0, 1.0, 12.0]])


def naive_msd(x):
    """Average over atoms and origins, ``x (frames, atoms, 3)``."""
    return np.array(
        [0.0] + [((x[k:] - x[:-k]) ** 2).sum(axis=2).mean() for k in range(1, len(x))]
    )


def walk(seed, n_frames, n_atoms):
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(size=(n_frames, n_atoms, 3)), axis=0)


@pytest.mark.parametrize("memory_mb", [256.0, 1e-6])
def test_displacements_of_a_file_are_the_naive_ones_by_type(tmp_path, memory_mb):
    x = walk(1, 90, 11) * 2.0 + 300.0
    types = np.arange(11) % 3 + 1
    path = write_binary(tmp_path / "t.bin", x, CELL, types=types, every=20)
    trajectory = Trajectory(path)
    found = trajectory_msd(trajectory, 0.002, remove_drift=False, memory_mb=memory_mb)
    np.testing.assert_allclose(found.total, naive_msd(x), rtol=1e-9)
    np.testing.assert_allclose(found.time_ps, 0.04 * np.arange(90))
    assert found.n_atoms == {1: 4, 2: 4, 3: 3}
    for kind, curve in found.by_type.items():
        np.testing.assert_allclose(curve, naive_msd(x[:, types == kind]), rtol=1e-9)
    assert atoms_at_once(trajectory, 1e-6) == 1


def test_long_walks_are_exact_too():
    x = walk(2, 4000, 3)
    found = mean_squared_displacement(x)
    lags = np.array([1, 2, 3, 10, 100, 1000, 3999])
    expected = [((x[k:] - x[:-k]) ** 2).sum(axis=2).mean() for k in lags]
    np.testing.assert_allclose(found[lags], expected, rtol=1e-9)


def test_drift_of_the_centre_of_mass_is_removed(tmp_path):
    x = walk(3, 60, 9)
    types = np.array([1, 1, 1, 1, 2, 2, 2, 2, 2])
    masses = np.array([7.0, 30.0])
    weights = masses[types - 1]
    centre = np.einsum("a,fak->fk", weights, x) / weights.sum()
    expected = naive_msd(x - centre[:, None, :])
    drift = np.arange(60)[:, None, None] * np.array([3.0, -1.0, 0.5])
    path = write_binary(tmp_path / "t.bin", x + drift, CELL, types=types)
    found = trajectory_msd(Trajectory(path), 1.0, masses=masses)
    np.testing.assert_allclose(found.total, expected, rtol=1e-9)


def breathing(seed, n_frames, n_atoms, fluctuation):
    """A walk in a box that breathes and shears; paths, positions, boxes."""
    rng = np.random.default_rng(seed)
    noise = np.empty((n_frames, 3, 3))
    noise[0] = rng.normal(size=(3, 3))
    for i in range(1, n_frames):
        noise[i] = 0.6 * noise[i - 1] + 0.8 * rng.normal(size=(3, 3))
    boxes = CELL * (1.0 + fluctuation * np.tril(noise))
    kicks = rng.normal(size=(n_frames, n_atoms, 3)) * 0.7
    kicks -= kicks.mean(axis=1, keepdims=True)
    scaled = np.empty((n_frames, n_atoms, 3))
    scaled[0] = rng.uniform(size=(n_atoms, 3))
    for i in range(1, n_frames):
        # The walk happens in the box as it is in between.
        middle = 0.5 * (boxes[i] + boxes[i - 1])
        scaled[i] = scaled[i - 1] + kicks[i] @ np.linalg.inv(middle)
    return np.cumsum(kicks, axis=0), scaled @ boxes, boxes


def test_a_barostat_does_not_add_to_displacements(tmp_path):
    paths, unwrapped, boxes = breathing(4, 1500, 40, 0.03)
    path = write_binary(tmp_path / "t.bin", unwrapped, boxes)
    found = trajectory_msd(Trajectory(path), 1.0).total
    np.testing.assert_allclose(found, naive_msd(paths), rtol=1e-9)
    # Unwrapped positions taken at face value are wrong at the shortest lag: far
    # atoms jump with every change of the box.
    assert mean_squared_displacement(unwrapped)[1] > 1.5 * found[1]
    # The toroidal scheme (von Bülow et al., eq. 6) from wrapped positions, in an
    # implementation that shares nothing with ours.
    inverse = np.linalg.inv(boxes)
    scaled = np.einsum("fak,fkl->fal", unwrapped, inverse)
    wrapped = np.einsum("fak,fkl->fal", scaled - np.floor(scaled), boxes)
    torus = np.zeros_like(wrapped)
    for i in range(1, len(wrapped)):
        step = (wrapped[i] - wrapped[i - 1]) @ inverse[i]
        torus[i] = torus[i - 1] + (step - np.rint(step)) @ boxes[i]
    lags = np.array([50, 200])
    # It keeps the breathing of positions within the box, which adds a constant.
    np.testing.assert_allclose(naive_msd(torus)[lags], found[lags], rtol=0.05)


def test_positions_that_were_wrapped_are_refused(tmp_path):
    path = tmp_path / "t.bin"
    rows = np.array([[1, 1, 0.5, 0.5, 0.5]], float)
    path.write_bytes(
        b"".join(binary_frame(s, rows, CELL, "id type x y z") for s in range(20))
    )
    with pytest.raises(InputError, match="unwrapped positions"):
        trajectory_msd(Trajectory(path), 1.0)


def test_atoms_that_change_are_refused(tmp_path):
    path = tmp_path / "t.bin"
    rows = np.array([[i, 1, 0.5, 0.5, i] for i in (1, 2, 3)], float)
    columns = "id type xu yu zu"
    more = [binary_frame(s, rows[: 3 - (s > 1)], CELL, columns) for s in range(4)]
    path.write_bytes(b"".join(more))
    with pytest.raises(InputError, match="same atoms in all frames"):
        trajectory_msd(Trajectory(path), 1.0)
    other = rows.copy()
    other[1, 1] = 2
    path.write_bytes(
        b"".join(
            binary_frame(s, other if s == 2 else rows, CELL, columns) for s in range(4)
        )
    )
    with pytest.raises(InputError, match="changes its type"):
        trajectory_msd(Trajectory(path), 1.0)
    other[:, 1] = 2
    path.write_bytes(b"".join(binary_frame(s, other, CELL, columns) for s in range(4)))
    with pytest.raises(InputError, match="no mass was given for type 2"):
        trajectory_msd(Trajectory(path), 1.0, masses=[1.0])


def test_memory_is_bounded_whatever_the_number_of_frames(tmp_path):
    peaks = []
    for n_frames in (400, 4000):
        x = walk(5, n_frames, 20)
        trajectory = Trajectory(write_binary(tmp_path / "t.bin", x, CELL))
        tracemalloc.start()
        trajectory_msd(trajectory, 1.0, memory_mb=2.0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 4000 frames take 10 MB with their transforms. What grows are numbers per
    # frame, not per frame and atom: step, box, centre, sums.
    assert peaks[1] < 5e6
    assert atoms_at_once(trajectory, 2.0) == 2


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 11, 37, 101, 1999, 2187, 12345])
def test_length_of_transforms_has_small_factors_only(n):
    def smooth(m):
        for p in (2, 3, 5):
            while m % p == 0:
                m //= p
        return m == 1

    expected = next(m for m in range(n, 2 * n + 1) if smooth(m))
    assert fast_length(n) == expected


# ------------------------------------------------------------------------ diffusion


@pytest.mark.parametrize(
    ("n_frames", "n_atoms", "options"),
    [
        (300, 40, {}),
        (300, 40, {"first_ps": 5.0, "last_ps": 60.0}),
        (120, 200, {"first_ps": 1.0}),
    ],
)
def test_error_of_diffusion_is_right_over_many_walks(n_frames, n_atoms, options):
    time = np.arange(n_frames) * 1.0
    z = []
    for seed in range(80):
        msd = mean_squared_displacement(walk(seed, n_frames, n_atoms))
        found = diffusion(time, msd, n_atoms, **options)
        assert found.coefficient_a2_ps == pytest.approx(0.5, rel=0.2)
        z.append((found.coefficient_a2_ps - 0.5) / found.standard_error_a2_ps)
    # Standard deviation of 80 standard normal numbers: 1 +- 0.08.
    assert 0.75 < np.std(z) < 1.3
    assert abs(np.mean(z)) < 4 / math.sqrt(80)


def test_an_ordinary_fit_would_have_claimed_too_small_an_error():
    msd = mean_squared_displacement(walk(1, 300, 40))
    found = diffusion(np.arange(300.0), msd, 40, first_ps=5.0, last_ps=60.0)
    lags = np.arange(5, 61)
    (slope, _), covariance = np.polyfit(lags, msd[lags], 1, cov=True)
    assert math.sqrt(covariance[0, 0]) / 6 < 0.5 * found.standard_error_a2_ps
    assert slope / 6 == pytest.approx(found.coefficient_a2_ps, abs=0.1)


def test_motion_that_is_not_diffusive_has_no_coefficient():
    rng = np.random.default_rng(3)
    time = np.arange(400) * 0.1
    caged = rng.normal(size=(400, 30, 3))
    found = diffusion(time, mean_squared_displacement(caged), 30)
    assert found.coefficient_a2_ps is None
    assert not found.diffusive
    assert found.exponent == pytest.approx(0.0, abs=0.1)
    flight = time[:, None, None] * rng.normal(size=(1, 30, 3))
    found = diffusion(time, mean_squared_displacement(flight), 30)
    assert found.coefficient_a2_ps is None
    assert found.exponent == pytest.approx(2.0, abs=0.01)


def test_ballistic_start_is_left_out_of_the_fit():
    # Langevin motion: MSD = 6 D (t - tau (1 - exp(-t / tau))).
    tau, step, n, n_atoms = 5.0, 0.5, 2000, 60
    rng = np.random.default_rng(6)
    decay = math.exp(-step / tau)
    v = np.empty((n, n_atoms, 3))
    v[0] = rng.normal(size=(n_atoms, 3))
    for i in range(1, n):
        v[i] = decay * v[i - 1] + math.sqrt(1 - decay**2) * rng.normal(
            size=(n_atoms, 3)
        )
    x = np.cumsum(v, axis=0) * step
    # Sum of a geometric series: D of this discrete process.
    exact = 0.5 * step * (1 + decay) / (1 - decay)
    found = diffusion(np.arange(n) * step, mean_squared_displacement(x), n_atoms)
    assert found.first_ps > tau
    error = found.standard_error_a2_ps
    assert abs(found.coefficient_a2_ps - exact) < 3.5 * error
    assert error < 0.1 * exact
    assert found.offset_a2 < 0.0


def test_diffusion_refuses_what_it_cannot_use():
    with pytest.raises(InputError, match="16 frames"):
        diffusion(np.arange(10.0), np.arange(10.0), 5)
    with pytest.raises(InputError, match="no two lags"):
        diffusion(np.arange(50.0), np.arange(50.0), 5, first_ps=20.0, last_ps=10.0)


def test_arrhenius_law_is_found_with_its_error():
    energy, prefactor = 0.42, 30.0
    temperatures = np.array([600.0, 700.0, 800.0, 1000.0])
    exact = prefactor * np.exp(-energy / (BOLTZMANN_EV_PER_K * temperatures))
    fit = arrhenius({t: (d, 0.1 * d) for t, d in zip(temperatures, exact, strict=True)})
    assert fit.activation_energy_ev == pytest.approx(energy)
    assert fit.prefactor_a2_ps == pytest.approx(prefactor)
    assert fit.chi_squared == pytest.approx(0.0, abs=1e-12)
    rng = np.random.default_rng(2)
    z, chi = [], []
    for _ in range(300):
        noisy = exact * np.exp(0.1 * rng.normal(size=4))
        fit = arrhenius(
            {t: (d, 0.1 * d) for t, d in zip(temperatures, noisy, strict=True)}
        )
        z.append((fit.activation_energy_ev - energy) / fit.activation_energy_error_ev)
        chi.append(fit.chi_squared)
    assert np.std(z) == pytest.approx(1.0, abs=0.15)
    assert np.mean(chi) == pytest.approx(2.0, abs=0.5)
    for bad in ({300.0: (1.0, 0.1)}, {300.0: (1.0, 0.1), 400.0: (-1.0, 0.1)}):
        with pytest.raises(InputError):
            arrhenius(bad)


def test_finite_size_correction_of_water():
    # Yeh and Hummer: TIP3P, 298 K, 0.31 mPa s, L = 18.6 Å: about 1.1e-5 cm²/s.
    found = finite_size_correction(298.0, 0.31e-3, 18.6)
    assert found == pytest.approx(
        2.837297 * 1.380649e-23 * 298 / (6 * math.pi * 0.31e-3 * 18.6e-10) * 1e8
    )
    assert 0.09 < found < 0.13


def test_displacements_agree_with_freud():
    freud = pytest.importorskip("freud")
    x = walk(7, 200, 50)
    tool = freud.msd.MSD(mode="window")
    tool.compute(positions=x)
    ours = mean_squared_displacement(x)
    # freud works in single precision.
    np.testing.assert_allclose(tool.msd, ours, rtol=5e-3, atol=1e-3)
    np.testing.assert_allclose(ours, naive_msd(x), rtol=1e-9)
