from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import InputError
from nanoos_fw.md.analysis import (
    _first_minimum,
    _shells,
    block_average,
    detect_equilibration,
    mean_squared_displacement,
    radial_distribution,
    radial_distributions,
    statistical_inefficiency,
)
from nanoos_fw.md.trajectory import Frame


def correlated(n: int, phi: float, seed: int) -> np.ndarray:
    """AR(1) with unit variance; its inefficiency is (1 + phi) / (1 - phi)."""
    rng = np.random.default_rng(seed)
    x = np.empty(n)
    x[0] = rng.normal()
    kicks = rng.normal(size=n) * math.sqrt(1.0 - phi**2)
    for i in range(1, n):
        x[i] = phi * x[i - 1] + kicks[i]
    return x


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_inefficiency_of_an_autoregressive_series(phi):
    exact = (1 + phi) / (1 - phi)
    found = [statistical_inefficiency(correlated(20_000, phi, s)) for s in range(5)]
    assert np.mean(found) == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("phi", [0.0, 0.9])
def test_block_error_is_that_of_the_mean_over_many_runs(phi):
    results = [block_average(correlated(2000, phi, s)) for s in range(100)]
    spread = np.std([mean for mean, _ in results])
    assert np.median([error for _, error in results]) == pytest.approx(spread, rel=0.35)
    naive = 1.0 / math.sqrt(2000)
    assert spread == pytest.approx(naive * math.sqrt((1 + phi) / (1 - phi)), rel=0.25)


def test_block_average_of_a_constant_and_of_few_samples():
    assert block_average(np.full(100, 0.1)) == (pytest.approx(0.1), pytest.approx(0.0))
    mean, error = block_average(np.array([1.0, 2.0, 3.0]))
    assert mean == 2.0
    assert error == math.inf


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [[1.0, 2.0]]])
def test_series_must_be_finite_numbers(bad):
    with pytest.raises(InputError):
        block_average(np.array(bad))


def test_equilibration_is_found_where_the_drift_ends():
    x = correlated(2000, 0.5, 7)
    x[:400] += np.linspace(20.0, 0.0, 400)
    start, _ = detect_equilibration(x)
    assert 300 <= start <= 600
    start, _ = detect_equilibration(correlated(2000, 0.5, 8))
    assert start < 400


# ------------------------------------------------------------------------------ RDF


def naive_counts(frame, edges, first, second):
    """Distances to all images in a block that is certainly large enough."""
    inverse = np.linalg.inv(frame.matrix)
    n = int(np.ceil(edges[-1] * np.linalg.norm(inverse, axis=0).max())) + 2
    shifts = np.array(list(itertools.product(range(-n, n + 1), repeat=3)))
    counts = np.zeros(len(edges) - 1)
    for i in first:
        for j in second:
            vectors = frame.positions[j] - frame.positions[i] + shifts @ frame.matrix
            r = np.linalg.norm(vectors, axis=1)
            counts += np.histogram(r[r > 1e-6], edges)[0]
    return counts


def random_frame(seed, n, matrix, types=None):
    rng = np.random.default_rng(seed)
    positions = rng.uniform(-1.0, 2.0, size=(n, 3)) @ matrix
    kinds = np.ones(n, int) if types is None else np.array(types)
    return Frame(step=0, matrix=matrix, types=kinds, positions=positions)


TRICLINIC = np.array([[5.0, 0, 0], [2.1, 4.0, 0], [-1.9, 1.7, 6.0]])


@pytest.mark.parametrize("r_max", [1.5, 4.0, 9.0])
def test_distribution_in_a_skewed_cell_matches_the_naive_one(r_max):
    frame = random_frame(1, 6, TRICLINIC, [1, 1, 2, 2, 2, 1])
    edges = np.linspace(0.0, r_max, 41)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    for pair in (None, (1, 2), (2, 2)):
        kinds = frame.types
        first = range(6) if pair is None else np.flatnonzero(kinds == pair[0])
        second = range(6) if pair is None else np.flatnonzero(kinds == pair[1])
        counts = naive_counts(frame, edges, first, second)
        density = len(second) / frame.volume_a3
        rdf = radial_distribution([frame], r_max, bins=40, pair=pair)
        np.testing.assert_allclose(rdf.g, counts / (len(first) * density * shells))
        assert rdf.coordination[-1] == pytest.approx(counts.sum() / len(first))


def test_ideal_gas_has_a_flat_distribution():
    n, frames = 150, 20
    matrix = TRICLINIC * 3
    rdf = radial_distribution(
        [random_frame(s, n, matrix) for s in range(frames)], 6.0, bins=30
    )
    shells = 4 / 3 * np.pi * np.diff(np.linspace(0.0, 6.0, 31) ** 3)
    expected = 1.0 - 1.0 / n
    # Poisson error of each bin, with pairs counted twice.
    pairs = frames * n * n / abs(np.linalg.det(matrix)) * shells / 2
    z = (rdf.g - expected) * np.sqrt(pairs)
    assert np.abs(z[3:]).max() < 5.0
    weighted = (rdf.g * shells).sum() / shells.sum()
    assert weighted == pytest.approx(expected, abs=4 / math.sqrt(pairs.sum()))


def test_partials_add_up_to_the_total_and_are_symmetric():
    frame = random_frame(2, 9, TRICLINIC, [1, 1, 2, 2, 2, 1, 1, 1, 2])
    total = radial_distribution([frame], 5.0, 20).g
    c = {1: 5 / 9, 2: 4 / 9}
    parts = {
        p: radial_distribution([frame], 5.0, 20, pair=p).g
        for p in itertools.product((1, 2), repeat=2)
    }
    np.testing.assert_allclose(parts[1, 2], parts[2, 1])
    np.testing.assert_allclose(
        total, sum(c[a] * c[b] * g for (a, b), g in parts.items()), atol=1e-12
    )


def test_one_atom_cell_counts_its_own_images():
    fcc = 3.6 * np.array([[0.0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    frame = Frame(0, fcc, np.array([1]), np.zeros((1, 3)))
    rdf = radial_distribution([frame], 4.0, bins=400)
    nearest = 3.6 / math.sqrt(2)
    assert rdf.coordination[np.searchsorted(rdf.r_a, nearest + 0.1)] == 12
    assert rdf.coordination[-1] == 18
    assert rdf.r_a[rdf.g.argmax()] == pytest.approx(nearest, abs=0.011)


@pytest.mark.parametrize("spread", [1e-3, 0.02, 0.05, 0.1])
@pytest.mark.parametrize(
    ("group", "a", "species", "neighbours"),
    [
        ("Fd-3m", 5.431, {"Si": [0, 0, 0]}, 4),
        ("F-43m", 4.36, {"Si": [0, 0, 0], "C": [0.25, 0.25, 0.25]}, 4),
        ("Fm-3m", 5.64, {"Na": [0, 0, 0], "Cl": [0.5, 0.5, 0.5]}, 6),
        ("Fm-3m", 3.615, {"Cu": [0, 0, 0]}, 12),
    ],
)
def test_the_first_shell_is_the_nearest_not_the_highest(
    group, a, species, neighbours, spread
):
    # The second shell of diamond rises above the first in a cold crystal, and one
    # whose atoms are at rest has no distances at all between its shells.
    crystal = Structure.from_spacegroup(
        group, Lattice.cubic(a), list(species), list(species.values())
    )
    crystal *= [3, 3, 3]
    rng = np.random.default_rng(5)
    kinds = np.ones(len(crystal), np.int64)
    frames = [
        Frame(
            i,
            crystal.lattice.matrix,
            kinds,
            crystal.cart_coords + rng.normal(0.0, spread, (len(crystal), 3)),
        )
        for i in range(5)
    ]
    rdf = radial_distribution(frames, 8.0, bins=160)
    assert rdf.shell(_first_minimum(rdf.r_a, rdf.g)) == pytest.approx(
        neighbours, abs=0.01
    )


def test_the_shell_of_a_pair_ends_at_its_own_minimum():
    perovskite = Structure.from_spacegroup(
        "Pm-3m",
        Lattice.cubic(3.905),
        ["Sr", "Ti", "O"],
        [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]],
    )
    elements = ("O", "Sr", "Ti")
    perovskite *= [3, 3, 3]
    kinds = np.array([elements.index(s.specie.symbol) + 1 for s in perovskite])
    rng = np.random.default_rng(7)
    frames = [
        Frame(
            i,
            perovskite.lattice.matrix,
            kinds,
            perovskite.cart_coords + rng.normal(0.0, 0.05, (len(perovskite), 3)),
        )
        for i in range(5)
    ]
    minima, shells = _shells(radial_distributions(frames, 5.8, bins=116), elements)
    found = {name: round(number, 1) for name, number in shells.items()}
    assert next(iter(found)) == "all"
    del found["all"]
    assert found == {
        "Ti-O": 6, "O-Ti": 2, "Sr-O": 12, "O-Sr": 4, "Sr-Ti": 8, "Ti-Sr": 8,
        "Sr-Sr": 6, "Ti-Ti": 6, "O-O": 8,
    }  # fmt: skip
    assert minima["Ti-O"] < 2.76 < minima["Sr-O"]  # where the oxygen of Sr begins


def test_a_shell_that_the_distances_end_in_has_no_minimum():
    r = 0.05 * (np.arange(160) + 0.5)
    shell = 1.0 + 2.0 * np.exp(-(((r - 2.5) / 0.3) ** 2))
    assert _first_minimum(r[r < 2.6], shell[r < 2.6]) is None  # still in the peak
    assert _first_minimum(r, np.ones_like(r)) is None


def test_distribution_refuses_nonsense():
    frame = random_frame(3, 3, TRICLINIC)
    with pytest.raises(InputError, match="no frames"):
        radial_distribution([], 3.0)
    with pytest.raises(InputError, match="type 2"):
        radial_distribution([frame], 3.0, pair=(1, 2))
    for r_max in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError):
            radial_distribution([frame], r_max)


# ------------------------------------------------------------------------------ MSD


def test_displacement_matches_the_naive_formula_far_from_the_origin():
    rng = np.random.default_rng(5)
    x = np.cumsum(rng.normal(size=(37, 4, 3)), axis=0) + 1e4
    naive = [0.0] + [
        ((x[lag:] - x[:-lag]) ** 2).sum(axis=2).mean() for lag in range(1, 37)
    ]
    np.testing.assert_allclose(mean_squared_displacement(x), naive, rtol=1e-9)


def test_ballistic_motion_and_random_walk():
    times = np.arange(50.0)[:, None, None]
    velocity = np.array([[[0.3, -0.2, 0.1]]])
    msd = mean_squared_displacement(times * velocity)
    np.testing.assert_allclose(msd, 0.14 * times[:, 0, 0] ** 2, atol=1e-9)
    rng = np.random.default_rng(6)
    walk = np.cumsum(rng.normal(size=(400, 500, 3)), axis=0)
    lags = np.arange(1, 40)
    np.testing.assert_allclose(
        mean_squared_displacement(walk)[lags] / lags, 3.0, rtol=0.05
    )


def test_displacement_refuses_other_shapes():
    with pytest.raises(InputError):
        mean_squared_displacement(np.zeros((5, 3)))
