from __future__ import annotations

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from sklearn.ensemble import RandomForestRegressor

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.features import extract_structure_features
from nanoos_fw.ml.forest import (
    ForestModel,
    load_forest,
    scalar_matrix,
)
from nanoos_fw.ml.forest_fitting import fit_forest
from nanoos_fw.ml.graph_scalars import graph_scalars
from nanoos_fw.ml.graphs import build_graph, pack_graph

FACES = [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]


def alloys(n, seed=0):
    """Strained cells of four atoms, and an energy that scalars can explain."""
    rng = np.random.default_rng(seed)
    made, energies = [], []
    for _ in range(n):
        species = rng.choice(["Cu", "Au", "Ag", "Al"], 4)
        a = rng.uniform(3.6, 4.2)
        crystal = Structure(Lattice.cubic(a), species, [[0, 0, 0], *FACES])
        crystal.perturb(0.05, seed=int(rng.integers(1 << 30)))
        made.append(crystal)
        energies.append(np.mean(crystal.atomic_numbers) / 20 + (a - 3.9) ** 2)
    return made, np.array(energies)


@pytest.fixture(scope="module")
def data():
    crystals, energies = alloys(80)
    graphs = [build_graph(crystal) for crystal in crystals]
    return graphs, energies


@pytest.fixture(scope="module")
def forest(data):
    graphs, energies = data
    return fit_forest(
        graph_scalars(GraphTable.from_graphs(graphs[:60])),
        energies[:60],
        seed=3,
        target_property="energy",
        unit="eV/atom",
        n_trees=20,
    )


def test_predictions_equal_those_of_scikit_learn_bit_for_bit():
    rng = np.random.default_rng(1)
    x, x_new = rng.normal(size=(90, 7)), rng.normal(size=(5000, 7))
    y = x[:, 0] ** 2 + np.sin(3 * x[:, 1]) + 0.1 * rng.normal(size=90)
    mine = fit_forest(x, y, seed=5, n_trees=13, max_features=0.5)
    theirs = RandomForestRegressor(13, max_features=0.5, random_state=5).fit(x, y)
    mean, std = mine.predict_features(x_new)
    assert np.array_equal(mean, theirs.predict(x_new))
    trees = np.stack([tree.predict(x_new) for tree in theirs.estimators_])
    assert np.array_equal(mine.predict_trees(x_new), trees)
    scale = mine.card.uncertainty_scale
    assert np.allclose(std, scale * trees.std(axis=0, ddof=1))
    assert std.min() >= 0
    assert std.max() > 0.1


def test_intervals_go_by_the_trees_that_did_not_see_a_row(tmp_path):
    rng = np.random.default_rng(2)

    def draw(n):
        x = rng.normal(size=(n, 5))
        noise = (0.1 + 0.3 * (x[:, 2] > 0)) * rng.normal(size=n)
        return x, 2 * x[:, 0] + np.sin(3 * x[:, 1]) + noise

    (x, y), (x_new, y_new) = draw(400), draw(4000)
    mine = fit_forest(x, y, seed=1, n_trees=60)
    theirs = RandomForestRegressor(
        60, max_features=1 / 3, random_state=1, oob_score=True
    ).fit(x, y)
    seen = theirs.estimators_samples_
    spread = np.empty(400)
    trees = np.stack([tree.predict(x) for tree in theirs.estimators_])
    known = [set(rows.tolist()) for rows in seen]
    for row in range(400):
        said = [trees[t, row] for t in range(60) if row not in known[t]]
        spread[row] = np.std(said, ddof=1)
        assert np.mean(said) == pytest.approx(theirs.oob_prediction_[row])
    floor = 0.1 * np.median(spread)
    errors = np.abs(theirs.oob_prediction_ - y)
    np.testing.assert_allclose(mine.scores, np.sort(errors / (spread + floor)))
    assert mine.card.interval_floor == pytest.approx(floor)
    mean, std = mine.predict_features(x_new)
    for coverage in (0.5, 0.8, 0.9):
        held = np.abs(mean - y_new) <= mine.half_width(std, coverage)
        # 400 rows choose the width: three standard deviations of a binomial share.
        assert abs(held.mean() - coverage) < 3 * np.sqrt(
            coverage * (1 - coverage) / 400
        )
    held = np.abs(mean - y_new) <= std
    assert abs(held.mean() - 0.683) < 0.07
    mine.save(tmp_path / "f")
    again = load_forest(tmp_path / "f")
    np.testing.assert_array_equal(again.half_width(std), mine.half_width(std))
    # Too few rows promise nothing.
    few = fit_forest(x[:9], y[:9], n_trees=60)
    assert few.half_width(std) is None
    assert mine.half_width(std, 0.999) is None


def test_files_bring_back_the_same_forest(forest, data, tmp_path):
    graphs, _ = data
    digest = forest.save(tmp_path / "forest.safetensors")
    again = load_forest(tmp_path / "forest.safetensors", model_name="base")
    assert again.checkpoint_sha256 == digest
    assert again.card == forest.card
    assert np.array_equal(again.predict_many(graphs)[0], forest.predict_many(graphs)[0])
    answer = again.predict(graphs[0])
    assert answer["unit"] == "eV/atom"
    assert (answer["model_name"], answer["model_type"]) == ("base", "RandomForest")
    assert answer["checkpoint_sha256"] == digest
    low, high = answer["interval"]
    assert low < answer["prediction"] < high
    assert answer["distance"] is None
    assert forest.save(tmp_path / "again") == digest


def test_changed_files_are_refused(forest, tmp_path):
    path = tmp_path / "forest.safetensors"
    forest.save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    with pytest.raises(CorruptArtifactError, match="checksum"):
        load_forest(bytes(data))
    with pytest.raises(CorruptArtifactError, match="not a forest"):
        load_forest(b"\x80\x02}q\x00.")
    with pytest.raises(InputError, match="no checkpoint"):
        load_forest(tmp_path / "none")


def test_it_learns_and_its_spread_grows_away_from_the_data(forest, data):
    graphs, energies = data
    mean, std = forest.predict_many(graphs[60:])
    guess = np.abs(energies[60:] - energies[:60].mean()).mean()
    assert np.abs(mean - energies[60:]).mean() < 0.5 * guess
    assert std.mean() > forest.predict_many(graphs[:60])[1].mean()


def test_all_forms_of_a_graph_give_the_same(forest):
    crystal = alloys(1, seed=9)[0][0]
    graph_repr, _ = extract_structure_features(crystal, 8.0, 12)
    graph = build_graph(crystal)
    expected = forest.predict(graph)["prediction"]
    assert forest.predict(graph_repr)["prediction"] == expected
    # Packed distances are float32, as those of the training table.
    assert forest.predict(pack_graph(graph))["prediction"] == expected


def test_scalars_do_not_depend_on_cell_order_or_orientation():
    crystal = alloys(1, seed=4)[0][0]
    turned = crystal.copy()
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    turned = Structure(
        Lattice(crystal.lattice.matrix @ rotation),
        crystal.species[::-1],
        crystal.frac_coords[::-1],
    )
    graphs = [build_graph(s) for s in (crystal, turned, crystal * (2, 1, 1))]
    values = graph_scalars(GraphTable.from_graphs(graphs)).values
    assert np.isfinite(values).all()
    assert np.allclose(values[1], values[0], rtol=1e-6, atol=1e-6)
    assert np.allclose(values[2], values[0], rtol=1e-6, atol=1e-6)


def test_elemental_scalars_are_those_of_the_features(data):
    crystals, _ = alloys(3, seed=6)
    graphs = [build_graph(crystal) for crystal in crystals]
    found = graph_scalars(GraphTable.from_graphs(graphs))
    distances = np.array([g.distances.reshape(4, 12).min(axis=1) for g in graphs])
    for row, crystal in enumerate(crystals):
        named = dict(zip(found.names, found.values[row], strict=True))
        _, scalars = extract_structure_features(crystal)
        shared = [name for name in scalars if name in named]
        assert len(shared) == 11 * 5 + 1
        for name in shared:
            assert named[name] == pytest.approx(scalars[name], abs=1e-9)
        assert named["nearest_distance_mean"] == pytest.approx(
            distances[row].mean(), rel=1e-6
        )


def test_scalars_by_name_and_missing_values():
    rows = [{"a": float(i), "fraction_Cu": i / 40, "n_sites": 3.0} for i in range(40)]
    del rows[7]["a"], rows[8]["fraction_Cu"]
    matrix = scalar_matrix(rows, ["a", "fraction_Cu"])
    assert np.isnan(matrix[7, 0])
    assert matrix[8, 1] == 0
    model = fit_forest(rows, np.arange(40.0), seed=0, n_trees=5)
    assert model.card.feature_names == ("a", "fraction_Cu")
    filled, _ = model.predict_features([{"fraction_Cu": 0.5}])
    median = float(np.median([float(i) for i in range(40) if i != 7]))
    expected, _ = model.predict_features([{"a": median, "fraction_Cu": 0.5}])
    assert filled[0] == expected[0]
    with pytest.raises(InputError, match="graphs do not hold"):
        model.predict(build_graph(alloys(1)[0][0]))


def test_elements_and_graphs_of_other_kinds_are_told(forest):
    strange = Structure(Lattice.cubic(3.9), ["Pt", "Cu"], [[0, 0, 0], [0.5] * 3])
    answer = forest.predict(build_graph(strange))
    assert answer["out_of_domain"]
    assert answer["unseen_elements"] == ["Pt"]
    with pytest.raises(InputError, match="needs graphs with cutoff_radius 8"):
        forest.predict(build_graph(strange, cutoff_radius=6.0))


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(InputError, match="no value in any row"):
        fit_forest(np.array([[np.nan, 1.0], [np.nan, 2.0]]), np.array([1.0, 2.0]))
    with pytest.raises(InputError, match="training set"):
        fit_forest(np.zeros((3, 2)), np.zeros(2))
    with pytest.raises(InputError, match="finite"):
        fit_forest(np.zeros((2, 2)), np.array([1.0, np.nan]))


def test_the_seed_decides(data):
    graphs, energies = data
    table = graph_scalars(GraphTable.from_graphs(graphs))
    one, same, other = (
        fit_forest(table, energies, seed, n_trees=4).predict_features(table)[0]
        for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert isinstance(fit_forest(table, energies, n_trees=2), ForestModel)
