from __future__ import annotations

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure
from scipy import stats
from torch import nn

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn import (
    Architecture,
    CGCNNModel,
    ModelCard,
    atom_features,
    dropout_spread,
    save_checkpoint,
)
from nanoos_fw.ml.descriptors import describe_graphs, nearest_distance
from nanoos_fw.ml.ensembles import has_dropout, thinned
from nanoos_fw.ml.graphs import build_graph
from nanoos_fw.ml.network import CrystalGraphNetwork
from nanoos_fw.ml.uncertainty import (
    Uncertainty,
    UncertaintyCard,
    conformal_quantile,
    fit_uncertainty,
    normalized_scores,
)

METALS = ["Al", "Ni", "Ti", "Fe", "Cu", "Zr"]


def calibrated(scores, floor=1e-9, **changes):
    card = {
        "spread": "ensemble",
        "floor": floor,
        "domain_neighbors": 1,
        "domain_threshold": 1.0,
        "n_calibration": len(scores),
    }
    return Uncertainty(
        card=UncertaintyCard(**{**card, **changes}),
        scores=np.sort(scores),
        references=np.zeros((1, 30), dtype=np.float32),
        centre=np.zeros(30),
        scale=np.ones(30),
    )


def table_of(structures, **changes):
    return GraphTable.from_graphs([build_graph(s, **changes) for s in structures])


def alloy(rng, kind="CsCl", elements=METALS):
    a, b = rng.choice(elements, 2, replace=False)
    length = rng.uniform(2.9, 3.5)
    if kind == "CsCl":
        found = Structure(Lattice.cubic(length), [a, b], [[0, 0, 0], [0.5] * 3])
    else:  # face centred, as in rock salt or in zinc blende
        cell = 0.8 * length * (np.ones((3, 3)) - np.eye(3))
        shift = 0.5 if kind == "rock salt" else 0.25
        found = Structure(cell, [a, b], [[0, 0, 0], [shift] * 3])
    return found.perturb(0.05)


# ------------------------------------------------------------------------ intervals


def test_the_quantile_is_the_one_of_finite_samples():
    scores = np.arange(1.0, 10.0)  # nine of them
    assert conformal_quantile(scores, 0.9) == 9.0  # the 9th of 10 places
    assert conformal_quantile(scores, 0.89) == 9.0
    assert conformal_quantile(scores, 0.8) == 8.0
    assert conformal_quantile(scores, 0.91) is None
    assert conformal_quantile(np.array([]), 0.5) is None
    for bad in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="coverage"):
            conformal_quantile(scores, bad)


def heteroscedastic(rng, n):
    """Errors whose size is known up to a factor, and not of a normal law."""
    sigma = np.exp(rng.normal(scale=0.8, size=n))
    return 0.3 * sigma * rng.standard_t(4, size=n), sigma


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_intervals_hold_as_often_as_they_say(level):
    """Over calibrations the coverage has a Beta law: mean and quantiles are known."""
    n, repeats = 100, 300
    k = int(np.ceil((n + 1) * level))
    law = stats.beta(k, n + 1 - k)
    held = []
    for seed in range(repeats):
        rng = np.random.default_rng([1, seed])
        errors, sigma = heteroscedastic(rng, n)
        made = calibrated(np.abs(errors) / (sigma + 1e-9))
        errors, sigma = heteroscedastic(rng, 4000)
        held.append(np.mean(np.abs(errors) <= made.half_width(sigma, level)))
    assert abs(np.mean(held) - law.mean()) < 4 * law.std() / np.sqrt(repeats)
    assert stats.kstest(held, law.cdf).pvalue > 1e-3
    if level == 0.9:
        assert 0.85 < np.mean(held) < 0.95
        inside = np.mean([0.85 <= value <= 0.95 for value in held])
        expected = law.cdf(0.95) - law.cdf(0.85)
        assert abs(inside - expected) < 4 * np.sqrt(expected / 4 / repeats)


def test_normalized_intervals_hold_for_sure_and_for_unsure_predictions():
    rng = np.random.default_rng(5)
    errors, sigma = heteroscedastic(rng, 4000)
    new_errors, new_sigma = heteroscedastic(rng, 20_000)
    sure = new_sigma < np.quantile(new_sigma, 0.2)
    normal = calibrated(np.abs(errors) / (sigma + 1e-9))
    inside = np.abs(new_errors) <= normal.half_width(new_sigma, 0.9)
    assert inside[sure].mean() == pytest.approx(0.9, abs=0.02)
    assert inside[~sure].mean() == pytest.approx(0.9, abs=0.02)
    # What intervals of one width do: right on average, wrong for either kind.
    equal = calibrated(np.abs(errors), floor=1.0, spread="none")
    flat = np.abs(new_errors) <= equal.half_width(np.zeros(len(new_sigma)), 0.9)
    assert flat.mean() == pytest.approx(0.9, abs=0.02)
    assert flat[sure].mean() > 0.98


@pytest.mark.parametrize(("n", "members"), [(100, 2), (20, 2), (100, 5)])
def test_a_spread_that_says_nothing_makes_no_wide_intervals(n, members):
    """Members that differ by chance alone: one width for all is the best there is."""
    held, widths, best = [], [], []
    for seed in range(300):
        rng = np.random.default_rng([2, seed])
        errors = rng.laplace(size=n + 500)
        spread = 0.2 * rng.normal(size=(members, n + 500)).std(axis=0, ddof=1)
        floor, scores = normalized_scores(errors[:n], spread[:n], rng)
        width = conformal_quantile(scores, 0.9) * (spread[n:] + floor)
        held.append(np.mean(np.abs(errors[n:]) <= width))
        widths.append(width.mean())
        best.append(conformal_quantile(np.sort(np.abs(errors[:n])), 0.9))
    law = stats.beta(np.ceil(0.9 * (n + 1)), n + 1 - np.ceil(0.9 * (n + 1)))
    assert np.mean(held) == pytest.approx(law.mean(), abs=0.01)
    assert np.mean(widths) < 1.15 * np.mean(best)


def test_a_spread_that_says_all_is_kept():
    """Errors known up to a factor: intervals are about as wide as those of sigma."""
    held, widths, best = [], [], []
    for seed in range(300):
        rng = np.random.default_rng([3, seed])
        errors, sigma = heteroscedastic(rng, 600)
        floor, scores = normalized_scores(errors[:100], sigma[:100], rng)
        width = conformal_quantile(scores, 0.9) * (sigma[100:] + floor)
        held.append(np.mean(np.abs(errors[100:]) <= width))
        widths.append(width.mean())
        ideal = np.sort(np.abs(errors[:100]) / sigma[:100])
        best.append((conformal_quantile(ideal, 0.9) * sigma[100:]).mean())
    assert np.mean(held) == pytest.approx(0.9, abs=0.01)
    assert np.mean(widths) < 1.05 * np.mean(best)


def test_members_that_agree_everywhere_leave_one_width():
    errors = np.linspace(-1.0, 1.0, 41)
    floor, scores = normalized_scores(errors, np.zeros(41), np.random.default_rng(0))
    assert floor > 0.0
    np.testing.assert_allclose(scores * floor, np.sort(np.abs(errors)))
    exact = normalized_scores(np.zeros(41), np.zeros(41), np.random.default_rng(0))
    assert np.isfinite(exact[1]).all()


def test_the_fit_takes_validation_rows_only():
    rng = np.random.default_rng(2)
    table = table_of([alloy(rng) for _ in range(60)])
    errors, spread = heteroscedastic(rng, 60)
    train, val = np.arange(30), np.arange(30, 50)
    made = fit_uncertainty(table, errors, spread, train, val, source="ensemble")
    floor = made.card.floor
    np.testing.assert_allclose(
        made.scores, np.sort(np.abs(errors[30:50]) / (spread[30:50] + floor))
    )
    errors[50:], spread[50:] = 1e9, 1e-9
    errors[:30], spread[:30] = 0.0, 1e-9  # a network knows what it has learned
    again = fit_uncertainty(table, errors, spread, train, val, source="ensemble")
    np.testing.assert_array_equal(again.scores, made.scores)
    assert again.card == made.card
    without = fit_uncertainty(table, errors, None, train, val, source="none")
    np.testing.assert_allclose(without.scores, np.sort(np.abs(errors[30:50])))
    np.testing.assert_allclose(
        without.half_width(np.zeros(3), 0.5), [np.sort(np.abs(errors[30:50]))[10]] * 3
    )
    nothing = fit_uncertainty(
        table, errors, spread, train, np.array([], dtype=np.int64), source="ensemble"
    )
    assert nothing.half_width(spread, 0.1) is None
    assert nothing.card.domain_threshold > 0.0


# --------------------------------------------------------------------------- domain


def test_the_distance_is_that_of_the_naive_loop():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1500, 7)).astype(np.float32)
    references = rng.normal(size=(40, 7)).astype(np.float32)
    found = nearest_distance(vectors, references, 3)
    for row in (0, 1023, 1024, 1499):
        gaps = [np.sqrt(np.mean((vectors[row] - r) ** 2.0)) for r in references]
        assert found[row] == pytest.approx(np.mean(sorted(gaps)[:3]), rel=1e-5)
    own = nearest_distance(references, references, 2, skip_self=True)
    for row in (0, 39):
        gaps = [np.sqrt(np.mean((references[row] - r) ** 2.0)) for r in references]
        assert own[row] == pytest.approx(np.mean(sorted(gaps)[1:3]), rel=1e-5)
    assert nearest_distance(references[:1], references[:1], 1, skip_self=True) == [0.0]


@pytest.mark.parametrize("max_neighbors", [12, None])
def test_the_description_does_not_depend_on_the_cell(triclinic, max_neighbors):
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    rotated = Structure(
        Lattice(triclinic.lattice.matrix @ rotation),
        triclinic.species,
        triclinic.frac_coords,
    )
    permuted = Structure.from_sites([triclinic[i] for i in (2, 0, 1)])
    kinds = [triclinic, rotated, permuted, triclinic * (2, 1, 2)]
    rows = describe_graphs(
        table_of(kinds, cutoff_radius=6.0, max_neighbors=max_neighbors)
    )
    assert rows.shape == (4, 30)
    np.testing.assert_allclose(rows, rows[[0]].repeat(4, axis=0), atol=1e-5)


def test_the_description_of_rock_salt_is_known(rock_salt):
    (row,) = describe_graphs(table_of([rock_salt]))
    d1, spread = row[14], row[15]
    assert d1 == pytest.approx(5.64 / 2, abs=1e-5)
    assert spread == pytest.approx(0.0, abs=1e-5)
    # Six at d1, then the second shell at sqrt(2) d1.
    np.testing.assert_allclose(row[16:27], [1.0] * 5 + [np.sqrt(2)] * 6, rtol=1e-5)
    assert row[27] == pytest.approx(6.0)
    assert row[28] == pytest.approx(1.0)  # all of them other elements
    # Pauling electronegativities of Na and Cl.
    assert row[0] == pytest.approx((0.93 + 3.16) / 2)
    assert row[1] == pytest.approx((3.16 - 0.93) / 2)


def test_an_isolated_atom_has_a_description():
    lonely = Structure(Lattice.cubic(20), ["Ar"], [[0, 0, 0]])
    table = GraphTable(
        numbers=np.array([18], dtype=np.uint8),
        degrees=np.array([0], dtype=np.uint16),
        neighbors=np.array([], dtype=np.int32),
        distances=np.array([], dtype=np.float32),
        atom_start=np.array([0, 1]),
        edge_start=np.array([0, 0]),
        cutoff_radius=8.0,
        max_neighbors=12,
    )
    assert lonely.num_sites == 1
    (row,) = describe_graphs(table)
    assert np.isfinite(row).all()
    assert row[14] == 8.0


@pytest.fixture(scope="module")
def known():
    """A model's surroundings: perturbed CsCl alloys of six metals."""
    rng = np.random.default_rng(3)
    structures = [alloy(rng) for _ in range(360)]
    table = table_of(structures)
    domain = fit_uncertainty(
        table,
        np.zeros(360),
        None,
        np.arange(240),
        np.arange(240, 360),
        source="none",
    )
    return domain, rng


def flagged(domain, structures):
    distances = domain.distance(table_of(structures))
    return float(np.mean(distances > domain.card.domain_threshold))


@pytest.mark.parametrize("kind", ["rock salt", "zinc blende"])
def test_prototypes_left_out_are_out_of_domain(known, kind):
    domain, rng = known
    assert flagged(domain, [alloy(rng, kind) for _ in range(50)]) == 1.0


def test_elements_left_out_are_far_away_too(known):
    domain, rng = known
    oxygens = [alloy(rng, elements=["O", "F", "S"]) for _ in range(50)]
    assert flagged(domain, oxygens) == 1.0


def test_structures_like_those_of_the_training_are_in_domain(known):
    domain, rng = known
    new = [alloy(rng) for _ in range(300)]
    # 5 % is meant, within 4.5 standard deviations of 300 draws and 120 that decide.
    margin = 4.5 * np.sqrt(0.05 * 0.95 * (1 / 300 + 1 / 120))
    assert 0.0 < flagged(domain, new) < 0.05 + margin


# -------------------------------------------------------------------------- dropout


def test_a_mask_is_one_for_all_rows_and_repeatable():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 1))
    x = torch.ones(8, 20)
    with torch.no_grad():
        with thinned(net, [0, 1]):
            first = net(x)
            alone = net(x[3:4])
        with thinned(net, [0, 1]):
            again = net(x)
        with thinned(net, [0, 2]):
            other = net(x)
        plain = net(x)
    assert torch.equal(first, again)
    assert torch.equal(first[:1].expand(8, 1), first)
    torch.testing.assert_close(alone[0], first[3])
    assert not torch.equal(first, other)
    torch.testing.assert_close(plain, nn.functional.linear(x, *net[1].parameters()))


def test_the_spread_of_dropout_is_that_of_the_closed_form():
    """Var of sum(w x m/(1-p)) is p/(1-p) sum(w² x²) for independent masks m."""
    rate, passes = 0.3, 4000
    net = nn.Sequential(nn.Dropout(rate), nn.Linear(6, 1, bias=False))
    x = torch.arange(1.0, 7.0).reshape(1, 6)
    outputs = []
    with torch.no_grad():
        for number in range(passes):
            with thinned(net, [4, number]):
                outputs.append(float(net(x)))
        exact = float((net[1].weight * x).square().sum()) * rate / (1 - rate)
        mean = float(net(x))
    assert np.mean(outputs) == pytest.approx(mean, abs=4 * np.sqrt(exact / passes))
    # The relative error of a variance is about sqrt(2 / n), or a little more.
    assert np.var(outputs) == pytest.approx(exact, rel=6 * np.sqrt(2 / passes))


def test_a_network_that_passes_no_dropout_is_an_error():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

    with (
        pytest.raises(RuntimeError, match="without passing a dropout layer"),
        thinned(Bypass(), [0]),
    ):
        pass
    assert not has_dropout([nn.Linear(1, 1), nn.Dropout(0.0)])


# ------------------------------------------------------------------- in a checkpoint


ARCHITECTURE = Architecture(hidden_dim=8, num_layers=1, readout_dim=8)


def card(n_members=1, **changes):
    fields = {
        "target_property": "energy_per_atom",
        "unit": "eV/atom",
        "target_mean": -3.0,
        "target_std": 2.0,
        "n_members": n_members,
        "architecture": ARCHITECTURE,
        "cutoff_radius": 8.0,
        "max_neighbors": 12,
        "elements": (13, 22, 26, 28, 29, 40),
        "dataset_hash": "0" * 40,
        "n_train": 30,
        "uncertainty_scale": 1.7,
    }
    return ModelCard(**{**fields, **changes})


def networks(n):
    torch.manual_seed(0)
    return [CrystalGraphNetwork(ARCHITECTURE, atom_features()).eval() for _ in range(n)]


def test_dropout_of_an_ensemble_does_not_depend_on_batches():
    rng = np.random.default_rng(9)
    table = table_of([alloy(rng) for _ in range(12)])
    members = networks(2)
    for member in members:
        member.dense = nn.Sequential(nn.Dropout(0.3), member.dense)
    arguments = (members, card(2), np.zeros(119), table)
    found = dropout_spread(*arguments, passes=6, seed=1)
    assert (found > 0).all()
    batched = dropout_spread(*arguments, passes=6, seed=1, batch_size=5)
    np.testing.assert_allclose(found, batched, rtol=1e-4)
    assert not np.allclose(found, dropout_spread(*arguments, passes=6, seed=2))
    reverse = dropout_spread(
        members, card(2), np.zeros(119), table.select(np.arange(12)[::-1]),
        passes=6, seed=1,
    )  # fmt: skip
    np.testing.assert_allclose(found, reverse[::-1], rtol=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    rng = np.random.default_rng(11)
    structures = [alloy(rng) for _ in range(60)]
    graphs = [build_graph(s) for s in structures]
    errors, spread = heteroscedastic(rng, 60)
    made = fit_uncertainty(
        GraphTable.from_graphs(graphs),
        errors,
        spread,
        np.arange(30),
        np.arange(30, 60),
        source="ensemble",
    )
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    states = [member.state_dict() for member in networks(3)]
    save_checkpoint(path, card(3), states, atom_features(), np.zeros(119), made)
    return path, made, graphs


def test_a_loaded_model_states_the_intervals_it_was_saved_with(checkpoint):
    path, made, graphs = checkpoint
    model = CGCNNModel("m", "energy_per_atom").load_from_checkpoint(path)
    found = model.predict_full(graphs[:7], coverage=0.8)
    members = model.predict_members(graphs[:7])
    raw = members.std(axis=0, ddof=1)
    np.testing.assert_allclose(found.mean, members.mean(axis=0))
    np.testing.assert_allclose(found.std, 1.7 * raw)
    factor = made.scores[int(np.ceil(31 * 0.8)) - 1]
    np.testing.assert_allclose(found.half_width, factor * (raw + made.card.floor))
    np.testing.assert_allclose(
        found.distance, made.distance(GraphTable.from_graphs(graphs[:7]))
    )
    one = model.predict(graphs[4], coverage=0.8)
    low, high = one["interval"]
    assert (low + high) / 2 == pytest.approx(one["prediction"])
    assert (high - low) / 2 == pytest.approx(found.half_width[4], rel=1e-4)
    assert one["distance"] == pytest.approx(found.distance[4])
    assert one["coverage"] == 0.8
    assert model.predict(graphs[0], coverage=0.99)["interval"] is None  # 30 rows
    assert model.predict_full([]).mean.shape == (0,)


def test_a_strange_structure_is_flagged_with_its_reason(checkpoint, rock_salt):
    path, made, graphs = checkpoint
    model = CGCNNModel("m", "energy_per_atom").load_from_checkpoint(path)
    inside = model.predict(graphs[0])
    assert not inside["out_of_domain"]
    outside = model.predict(build_graph(rock_salt))
    assert outside["unseen_elements"] == ["Na", "Cl"]
    assert outside["out_of_domain"]
    far = model.predict(build_graph(alloy(np.random.default_rng(0), "zinc blende")))
    assert (far["unseen_elements"], far["out_of_domain"]) == ([], True)
    assert far["distance"] > made.card.domain_threshold


def test_a_checkpoint_without_its_arrays_is_refused(tmp_path, checkpoint):
    made = checkpoint[1]
    path = tmp_path / "model.safetensors"
    half = card(1, uncertainty=made.card)
    states = [member.state_dict() for member in networks(1)]
    save_checkpoint(path, half, states, atom_features(), np.zeros(119))
    with pytest.raises(CorruptArtifactError, match="uncertainty"):
        CGCNNModel("m", "energy_per_atom").load_from_checkpoint(path)
