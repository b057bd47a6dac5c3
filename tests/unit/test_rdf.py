"""Distances and angles: closed forms, naive counts, and independent programs."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from dump_writer import write_binary

from nanoos_fw.errors import InputError
from nanoos_fw.md import rdf
from nanoos_fw.md.rdf import (
    angle_distributions,
    radial_distribution,
    radial_distributions,
)
from nanoos_fw.md.trajectory import Frame, Trajectory

FCC = np.array([[0.0, 0, 0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
TRICLINIC = np.array([[9.0, 0, 0], [3.9, 7.0, 0], [-4.1, 3.2, 8.0]])


@pytest.fixture(params=["compiled", "numpy"])
def either(request, monkeypatch):
    """Run a test with the compiled loops and without."""
    if request.param == "numpy":
        monkeypatch.setattr(rdf, "is_compiled", lambda: False)
    else:
        pytest.importorskip("numba")
    return request.param


def random_frame(seed, n, matrix, n_types=1):
    rng = np.random.default_rng(seed)
    positions = rng.uniform(-2.0, 3.0, size=(n, 3)) @ matrix
    return Frame(0, matrix, rng.integers(1, n_types + 1, n), positions)


def cubic(a, cells, basis=FCC):
    grid = np.array(list(itertools.product(range(cells), repeat=3)))
    sites = (grid[:, None, :] + basis).reshape(-1, 3) * a
    return Frame(0, np.eye(3) * a * cells, np.ones(len(sites), int), sites)


@pytest.mark.parametrize("r_max", [0.8, 3.0, 11.0])
@pytest.mark.parametrize("n", [1, 2, 60])
def test_loops_with_and_without_numba_count_the_same(monkeypatch, r_max, n):
    pytest.importorskip("numba")
    frame = random_frame(n, n, TRICLINIC, n_types=3)
    compiled = radial_distributions([frame], r_max, 37)
    monkeypatch.setattr(rdf, "is_compiled", lambda: False)
    plain = radial_distributions([frame], r_max, 37)
    assert set(compiled) == set(plain)
    for pair, curve in compiled.items():
        np.testing.assert_allclose(curve.g, plain[pair].g, rtol=1e-12, err_msg=pair)
    assert compiled[None].coordination[-1] == pytest.approx(
        4.19 * r_max**3 * n / frame.volume_a3, rel=1.0, abs=3
    )


def test_shells_of_a_perfect_crystal_are_exact(either):
    # fcc: 12, 6, 24, 12, 24, 8 neighbours at sqrt(1/2), 1, sqrt(3/2), ... of a.
    a = 3.6
    curve = radial_distribution([cubic(a, 3)], 2.05 * a, bins=820)
    shells = np.array([12, 6, 24, 12, 24, 8, 48])
    radii = a * np.sqrt(np.arange(1, 8) / 2.0)
    for k, radius in enumerate(radii):
        assert curve.shell(radius + 0.02) == shells[: k + 1].sum()
        assert curve.shell(radius - 0.02) == shells[:k].sum()
    assert set(np.flatnonzero(curve.g)) == {
        int(r / (2.05 * a / 820))
        for r in a * np.sqrt(np.arange(1, 9) / 2.0)
        if r < 2.05 * a
    }


def test_a_skewed_cell_is_the_supercell_of_the_same_crystal(either):
    # The primitive cell, skewed far, and the cubic cell of one fcc crystal with two
    # kinds of atoms in layers would differ; with one kind they must not.
    a = 4.0
    primitive = a * np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]])
    skewed = np.array([[1, 0, 0], [3, 1, 0], [-2, 5, 1]]) @ primitive
    one = Frame(0, skewed, np.array([1]), np.array([[0.3, 0.2, 0.1]]))
    bins = 97
    left = radial_distribution([one], 9.3, bins)
    right = radial_distribution([cubic(a, 2)], 9.3, bins)
    np.testing.assert_allclose(left.g, right.g, rtol=1e-9)
    np.testing.assert_allclose(left.coordination, right.coordination, rtol=1e-12)


def test_ideal_gas_is_flat_within_its_counting_error(either):
    n, n_frames, bins, r_max = 300, 12, 40, 7.0
    matrix = TRICLINIC * 2.0
    curve = radial_distribution(
        [random_frame(s, n, matrix) for s in range(n_frames)], r_max, bins
    )
    shells = 4 / 3 * math.pi * np.diff(np.linspace(0, r_max, bins + 1) ** 3)
    pairs = n_frames * n * (n - 1) / 2 * shells / abs(np.linalg.det(matrix))
    z = (curve.g - (1.0 - 1.0 / n)) * np.sqrt(pairs)
    assert np.abs(z[2:]).max() < 4.5
    assert 0.5 < z[2:].std() < 1.5


def test_rotated_and_left_handed_boxes_give_the_same_curve(either):
    frame = random_frame(3, 40, TRICLINIC, n_types=2)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    for q in (turn, -turn):
        moved = Frame(0, frame.matrix @ q, frame.types, frame.positions @ q + 5.0)
        for pair, curve in radial_distributions([frame], 6.0, 50).items():
            np.testing.assert_allclose(
                radial_distributions([moved], 6.0, 50)[pair].g, curve.g, rtol=1e-9
            )


def test_distances_agree_with_freud_mdanalysis_and_ase():
    freud = pytest.importorskip("freud")
    distances = pytest.importorskip("MDAnalysis.lib.distances")
    ase_geometry = pytest.importorskip("ase.geometry.analysis")
    ase = pytest.importorskip("ase")
    a, n, r_max, bins = 21.0, 800, 9.0, 90
    rng = np.random.default_rng(4)
    positions = (rng.uniform(0, a, (n, 3))).astype(np.float32).astype(float)
    frame = Frame(0, np.eye(3) * a, np.ones(n, int), positions)
    ours = radial_distribution([frame], r_max, bins).g
    tool = freud.density.RDF(bins, r_max)
    box = freud.box.Box.cube(a)
    tool.compute((box, box.wrap(positions - a / 2)))
    # freud divides by N - 1 instead of N where the box is larger than the sphere.
    assert np.abs(tool.rdf[3:] - ours[3:]).max() < 0.002
    pairs = distances.self_capped_distance(
        positions.astype(np.float32), r_max, box=[a, a, a, 90, 90, 90]
    )[1]
    shells = 4 / 3 * math.pi * np.diff(np.linspace(0, r_max, bins + 1) ** 3)
    theirs = 2.0 * np.histogram(pairs, bins, (0, r_max))[0] * a**3 / n**2 / shells
    # A pair at the border of a bin falls to either side in single precision.
    assert np.abs(theirs - ours)[5:].max() < 0.01
    assert abs(((theirs - ours) * shells).sum()) < 0.01
    atoms = ase.Atoms(f"Ar{n}", positions, cell=[a] * 3, pbc=True)
    found = ase_geometry.get_rdf(atoms, r_max, bins, no_dists=True)
    np.testing.assert_allclose(found, ours, rtol=1e-9)


# --------------------------------------------------------------------------- angles


def naive_angles(frame, cutoff, bins):
    shifts = np.array(list(itertools.product(range(-2, 3), repeat=3))) @ frame.matrix
    counts = {}
    for i, centre in enumerate(frame.positions):
        ends = []
        for j, other in enumerate(frame.positions):
            for shift in shifts:
                vector = other + shift - centre
                r = np.linalg.norm(vector)
                if 1e-6 < r < cutoff:
                    ends.append((int(frame.types[j]), vector / r))
        for (a, u), (b, v) in itertools.combinations(ends, 2):
            angle = math.degrees(math.acos(np.clip(u @ v, -1, 1)))
            key = (min(a, b), int(frame.types[i]), max(a, b))
            counts.setdefault(key, np.zeros(bins))[
                min(bins - 1, int(angle * bins / 180))
            ] += 1
    return counts


def test_angles_are_those_of_the_naive_count(either):
    wrapped = random_frame(8, 14, TRICLINIC, n_types=2)
    frac = wrapped.positions @ np.linalg.inv(TRICLINIC)
    frame = Frame(0, TRICLINIC, wrapped.types, (frac - np.floor(frac)) @ TRICLINIC)
    expected = naive_angles(frame, 5.0, 45)
    found = angle_distributions([wrapped], 5.0, 45)
    assert set(found.density) == set(expected)
    for key, counts in expected.items():
        np.testing.assert_allclose(
            found.density[key], counts / counts.sum() / 4.0, rtol=1e-9
        )
        centres = (frame.types == key[1]).sum()
        assert found.angles_per_centre[key] == pytest.approx(counts.sum() / centres)


def test_angles_of_diamond_and_of_a_gas(either):
    basis = np.concatenate([FCC, FCC + 0.25])
    found = angle_distributions([cubic(5.43, 2, basis)], 2.6, bins=360)
    (curve,) = found.density.values()
    tetrahedral = math.degrees(math.acos(-1 / 3))
    assert found.angle_deg[curve.argmax()] == pytest.approx(tetrahedral, abs=0.25)
    assert (curve > 0).sum() == 1
    assert found.angles_per_centre[1, 1, 1] == pytest.approx(6.0)
    gas = angle_distributions(
        [random_frame(s, 150, TRICLINIC * 1.5) for s in range(4)], 4.0, 18
    )
    flat = gas.density[1, 1, 1] / (
        np.sin(np.radians(gas.angle_deg)) / 2 * math.pi / 180
    )
    assert np.abs(flat - 1.0).max() < 0.15


def test_cutoffs_by_pair_leave_the_others_out(either):
    frame = random_frame(9, 40, TRICLINIC, n_types=2)
    found = angle_distributions([frame], {(2, 1): 4.0}, 30)
    assert {(key[0], key[2]) for key in found.density if key[1] == 1} == {(2, 2)}
    assert {(key[0], key[2]) for key in found.density if key[1] == 2} == {(1, 1)}
    for bad in (0.0, -1.0, {}, float("nan")):
        with pytest.raises(InputError, match="must be positive"):
            angle_distributions([frame], bad)
    with pytest.raises(InputError, match="no frames"):
        angle_distributions([], 3.0)


def test_memory_does_not_grow_with_the_number_of_frames(tmp_path):
    pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    positions = rng.uniform(0, 15, (1, 200, 3))
    peaks = []
    for n_frames in (50, 1600):
        path = write_binary(
            tmp_path / f"{n_frames}.bin",
            np.broadcast_to(positions, (n_frames, 200, 3)),
            np.eye(3) * 15,
        )
        trajectory = Trajectory(path)
        radial_distributions(trajectory[:1], 3.0, 20)
        tracemalloc.start()
        radial_distributions(trajectory, 3.0, 20)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 1600 frames are 13 MB of atoms.
    assert peaks[1] < 2e6
    assert peaks[1] < 3 * peaks[0]


def test_a_distance_that_reaches_too_many_images_is_refused(either):
    if either == "numpy":
        pytest.skip("pymatgen has no bound")
    with pytest.raises(InputError, match="images of the cell"):
        radial_distribution([random_frame(1, 3, TRICLINIC)], 1e4)
