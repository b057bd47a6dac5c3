from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.calibration import MIN_ROWS, calibrate_model
from nanoos_fw.ml.cgcnn import (
    Architecture,
    CGCNNModel,
    ModelCard,
    atom_features,
    save_checkpoint,
)
from nanoos_fw.ml.datasets import (
    DatasetConfig,
    build_regression_dataset,
    write_dataset,
)
from nanoos_fw.ml.forest import load_forest
from nanoos_fw.ml.forest_fitting import fit_forest
from nanoos_fw.ml.graph_scalars import graph_scalars
from nanoos_fw.ml.graphs import build_graph
from nanoos_fw.ml.network import build_network
from nanoos_fw.operations.models import calibrate_registered
from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.models import get_model, register_model

SIZES = Architecture(hidden_dim=6, num_layers=1, readout_dim=6, gaussian_step=0.5)
TARGET = "bandgap"


def write_model(path, n_members=1, **changes):
    torch.manual_seed(0)
    states = [
        build_network(SIZES, atom_features()).state_dict() for _ in range(n_members)
    ]
    fields = {
        "target_property": TARGET, "unit": "eV", "target_mean": 1.0, "target_std": 5.0,
        "n_members": n_members, "architecture": SIZES, "cutoff_radius": 8.0,
        "max_neighbors": 12, "elements": (8, 29), "dataset_hash": "", "n_train": 9,
    }  # fmt: skip
    card = ModelCard(**{**fields, **changes})
    save_checkpoint(path, card, states, atom_features(), np.zeros(119))
    return CGCNNModel("m", TARGET).load_from_checkpoint(path)


def crystals(n, seed):
    rng = np.random.default_rng(seed)
    made = {}
    for number in range(n):
        cell = Lattice.tetragonal(*rng.uniform(3.6, 4.6, 2))
        made[f"s{seed}-{number:03d}"] = build_graph(
            Structure(cell, ["Cu", "O"], [[0, 0, 0], rng.uniform(0.4, 0.6, 3)])
        )
    return made


def labelled(model, graphs, noise, seed, **changes):
    said, _ = model.predict_many(list(graphs.values()))
    rng = np.random.default_rng(seed)
    targets = dict(zip(graphs, said + noise * rng.normal(size=len(said)), strict=True))
    config = DatasetConfig(**{"target_property": TARGET, "unit": "eV", **changes})
    return build_regression_dataset(graphs, targets, config)


def test_a_model_without_uncertainty_says_so_and_gets_intervals(tmp_path):
    model = write_model(tmp_path / "published")
    graphs = crystals(200, 1)
    bare = model.predict(graphs["s1-000"])
    assert bare["uncertainty"] is bare["interval"] is bare["distance"] is None
    dataset = labelled(model, graphs, 0.3, 1)
    found = calibrate_model(model, dataset, tmp_path / "calibrated")
    assert (found.n, found.parts[0]) == (200, "train")
    ready = CGCNNModel("m", TARGET).load_from_checkpoint(
        tmp_path / "calibrated", sha256=found.sha256
    )
    # One network has no spread: all intervals are the 181st smallest of 200 errors.
    errors = np.abs(ready.predict_many(dataset_graphs(dataset))[0] - dataset.targets)
    full = ready.predict_full(list(graphs.values()))
    np.testing.assert_allclose(full.half_width, np.sort(errors)[180], rtol=1e-6)
    assert full.std is None
    assert found.mae == pytest.approx(errors.mean(), rel=1e-6)
    # New structures of the same kind are held as often as stated.
    fresh = labelled(model, crystals(600, 2), 0.3, 2)
    said = ready.predict_full(dataset_graphs(fresh))
    np.testing.assert_array_equal(
        said.mean, model.predict_many(dataset_graphs(fresh))[0]
    )
    held = np.abs(said.mean - fresh.targets) <= said.half_width
    assert 0.83 < held.mean() < 0.96
    assert said.out_of_domain.mean() < 0.1
    strange = build_graph(
        Structure(Lattice.cubic(9.0), ["Cu", "O"], [[0] * 3, [0.1] * 3])
    )
    assert ready.predict(strange)["out_of_domain"] is True
    low, high = ready.predict(graphs["s1-000"])["interval"]
    assert high - low == pytest.approx(2 * np.sort(errors)[180], rel=1e-6)


def dataset_graphs(dataset):
    return [one_graph(dataset.graphs, row) for row in range(dataset.num_samples)]


def one_graph(table, row):
    from nanoos_fw.ml.graphs import CrystalGraph

    batch = table.batch([row])
    return CrystalGraph(
        numbers=batch.numbers.astype(np.uint8),
        edge_index=batch.edge_index.astype(np.int32),
        distances=batch.distances.astype(np.float64),
        cutoff_radius=table.cutoff_radius,
        max_neighbors=table.max_neighbors,
    )


def test_ensembles_and_forests_are_calibrated_by_their_spread(tmp_path):
    graphs = crystals(80, 3)
    model = write_model(tmp_path / "two", 2)
    dataset = labelled(model, graphs, 0.2, 3)
    found = calibrate_model(model, dataset, tmp_path / "calibrated")
    ready = CGCNNModel("m", TARGET).load_from_checkpoint(tmp_path / "calibrated")
    full = ready.predict_full(dataset_graphs(dataset))
    errors = np.abs(full.mean - dataset.targets)
    assert np.mean(errors <= full.std) == pytest.approx(0.683, abs=0.02)
    assert 0.9 <= np.mean(errors <= full.half_width) < 0.95
    assert np.ptp(full.half_width) > 0
    assert found.mean_half_width == pytest.approx(full.half_width.mean(), rel=1e-6)
    # Again, from the calibrated one: its weights decide, not what it said before.
    again = calibrate_model(ready, dataset, tmp_path / "again")
    assert again.sha256 == found.sha256

    other = labelled(model, crystals(60, 4), 0.2, 4)
    forest = fit_forest(
        graph_scalars(other.graphs), other.targets, n_trees=20,
        target_property=TARGET, unit="eV",
    )  # fmt: skip
    calibrate_model(forest, dataset, tmp_path / "forest")
    ready = load_forest(tmp_path / "forest")
    full = ready.predict_full(dataset_graphs(dataset))
    held = np.abs(full.mean - dataset.targets) <= full.half_width
    assert 0.9 <= held.mean() < 0.95
    np.testing.assert_array_equal(
        full.mean, forest.predict_full(dataset_graphs(dataset)).mean
    )


def test_what_the_model_has_learned_does_not_calibrate_it(tmp_path):
    graphs = crystals(120, 5)
    model = write_model(tmp_path / "m")
    dataset = labelled(model, graphs, 0.3, 5, train_fraction=0.5, val_fraction=0.3,
                       test_fraction=0.2)  # fmt: skip
    own = write_model(tmp_path / "own", dataset_hash=dataset.dataset_hash)
    found = calibrate_model(own, dataset, tmp_path / "out")
    assert (found.parts, found.n) == (("val",), len(dataset.rows("val")))
    # Trained further from a model that had learned them.
    child = write_model(tmp_path / "child", dataset_hash="e" * 40)
    found = calibrate_model(
        child, dataset, tmp_path / "out", learned={dataset.dataset_hash}
    )
    assert (found.parts, found.n) == (("val",), len(dataset.rows("val")))


def test_a_registered_model_is_calibrated_as_its_next_version(
    embedded_database, tmp_path
):
    database = open_database(SimpleNamespace(db=embedded_database))
    model = write_model(tmp_path / "m")
    dataset = labelled(model, crystals(120, 7), 0.3, 7, train_fraction=0.5,
                       val_fraction=0.3, test_fraction=0.2)  # fmt: skip
    write_dataset(dataset, tmp_path / "dataset")
    for number, digest in ((1, dataset.dataset_hash), (2, "e" * 40)):
        # The second one was trained further from the first, on other structures.
        file = tmp_path / f"version{number}"
        made = write_model(file, dataset_hash=digest, n_train=number)
        parent = None if number == 1 else "m@1"
        metrics = {"test": {"mae": 0.2, "within_interval": 0.97, "within_1_std": 0.5}}
        register_model(made, file, parent=parent, metrics=metrics, database=database)
    call = (database, "m@2", tmp_path / "dataset", tmp_path / "work")
    found = calibrate_registered(*call)
    assert (found.record.reference, found.record.parent) == ("m@3", "m@2")
    # The errors are those of the weights, the shares those of intervals that went.
    assert found.record.metrics["test"] == {"mae": 0.2}
    assert found.calibration.parts == ("val",)
    assert found.to_dict()["n"] == len(dataset.rows("val"))
    assert calibrate_registered(*call).record.reference == "m@3"
    answer = get_model("m@3", database=database).predict(one_graph(dataset.graphs, 0))
    assert answer["interval"] is not None
    # Again, from itself: what its parents have learned, it has.
    again = calibrate_registered(database, "m@3", *call[2:])
    assert again.calibration.parts == ("val",)


def test_what_does_not_fit_is_refused(tmp_path):
    model = write_model(tmp_path / "m")
    graphs = crystals(30, 6)
    out = tmp_path / "out"
    for change, words in (
        ({"target_property": "density"}, "the dataset holds 'density'"),
        ({"unit": "meV"}, "the dataset is in meV, the model in eV"),
        ({"mock_targets": True}, "mock targets"),
    ):
        with pytest.raises(InputError, match=words):
            calibrate_model(model, labelled(model, graphs, 0.1, 6, **change), out)
    few = dict(list(graphs.items())[: MIN_ROWS - 1])
    with pytest.raises(InputError, match="too few"):
        calibrate_model(model, labelled(model, few, 0.1, 6), out)
    dataset = labelled(model, graphs, 0.1, 6)
    wider = dataclasses.replace(
        dataset,
        graphs=GraphTable(**{**vars(dataset.graphs), "cutoff_radius": 9.0}),
    )
    with pytest.raises(InputError, match="needs graphs with cutoff_radius"):
        calibrate_model(model, wider, out)
    assert not out.exists()
