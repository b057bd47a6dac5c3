from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.datasets import (
    OUTLIER,
    PARTS,
    DatasetConfig,
    build_regression_dataset,
    open_dataset,
    split_train_val,
    write_dataset,
)
from nanoos_fw.ml.exports import export_dataset_to_pandas
from nanoos_fw.ml.graphs import build_graph, pack_graph

N = 40
RNG = np.random.default_rng(0)


def b2(a: float, first: str, second: str) -> Structure:
    return Structure(Lattice.cubic(a), [first, second], [[0, 0, 0], [0.5, 0.5, 0.5]])


GRAPHS = {
    f"s{i:02d}": build_graph(b2(3.0 + 0.01 * i, "Al", ["Ni", "Ti", "Fe"][i % 3]))
    for i in range(N)
}
TARGETS = {name: float(x) for name, x in zip(GRAPHS, RNG.normal(size=N), strict=True)}
CONFIG = DatasetConfig(
    target_property="formation_energy_per_atom",
    train_fraction=0.7,
    val_fraction=0.2,
    test_fraction=0.1,
    seed=3,
)


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_parts_have_the_asked_sizes_and_cover_all_rows_once():
    dataset = build_regression_dataset(GRAPHS, TARGETS, CONFIG)
    assert dataset.ids == tuple(sorted(GRAPHS))
    split = split_train_val(dataset)
    assert [part.num_samples for part in (split.train, split.val, split.test)] == [
        28,
        8,
        4,
    ]
    together = split.train.ids + split.val.ids + split.test.ids
    assert sorted(together) == list(dataset.ids)


def test_order_of_rows_and_form_of_graphs_do_not_matter(tmp_path):
    names = list(GRAPHS)
    RNG.shuffle(names)
    shuffled = {name: pack_graph(GRAPHS[name], geometry=True) for name in names}
    targets = {name: TARGETS[name] for name in reversed(names)}
    write_dataset(build_regression_dataset(GRAPHS, TARGETS, CONFIG), tmp_path / "a")
    write_dataset(build_regression_dataset(shuffled, targets, CONFIG), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_statistics_come_from_the_training_part_alone():
    dataset = build_regression_dataset(GRAPHS, TARGETS, CONFIG)
    train = [TARGETS[i] for i in split_train_val(dataset).train.ids]
    assert dataset.target_mean == pytest.approx(np.mean(train), abs=1e-12)
    assert dataset.target_std == pytest.approx(np.std(train), abs=1e-12)
    held_out = split_train_val(dataset).test.ids[0]
    changed = build_regression_dataset(GRAPHS, {**TARGETS, held_out: 1e6}, CONFIG)
    assert changed.target_mean == dataset.target_mean
    assert changed.dataset_hash != dataset.dataset_hash
    assert split_train_val(dataset).val.target_mean == dataset.target_mean


def test_every_input_changes_the_hash():
    plain = build_regression_dataset(GRAPHS, TARGETS, CONFIG).dataset_hash
    other_graph = {**GRAPHS, "s00": GRAPHS["s01"]}
    seeded = CONFIG.model_copy(update={"seed": 4})
    hashes = {
        plain,
        build_regression_dataset(other_graph, TARGETS, CONFIG).dataset_hash,
        build_regression_dataset(GRAPHS, TARGETS, seeded).dataset_hash,
        build_regression_dataset(
            GRAPHS, {**TARGETS, "s00": np.nextafter(TARGETS["s00"], 9)}, CONFIG
        ).dataset_hash,
    }
    assert len(hashes) == 4


def test_outliers_leave_the_training_part_only():
    config = CONFIG.model_copy(update={"iqr_factor": 1.5})
    split = split_train_val(build_regression_dataset(GRAPHS, TARGETS, CONFIG))
    wild = {split.train.ids[0]: 50.0, split.test.ids[0]: -50.0}
    dataset = build_regression_dataset(GRAPHS, {**TARGETS, **wild}, config)
    train = np.array([{**TARGETS, **wild}[name] for name in split.train.ids])
    low, high = np.percentile(train, [25, 75])
    bounds = (low - 1.5 * (high - low), high + 1.5 * (high - low))
    assert dataset.outlier_bounds == pytest.approx(bounds)
    expected = {
        (name, value)
        for name, value in zip(split.train.ids, train, strict=True)
        if not bounds[0] <= value <= bounds[1]
    }
    assert (split.train.ids[0], 50.0) in expected
    assert set(dataset.removed) == expected
    new = split_train_val(dataset)
    assert new.test.ids == split.test.ids
    assert dataset.target_mean == pytest.approx(new.train.targets.mean())
    assert dataset.parts.count(OUTLIER) == len(expected)


def test_a_dataset_can_be_split_anew():
    dataset = build_regression_dataset(GRAPHS, TARGETS, CONFIG)
    other = CONFIG.model_copy(update={"seed": 9})
    anew = split_train_val(dataset, other)
    direct = build_regression_dataset(GRAPHS, TARGETS, other)
    assert anew.train.ids == split_train_val(direct).train.ids
    assert anew.train.dataset_hash == direct.dataset_hash
    assert anew.train.ids != split_train_val(dataset).train.ids


def test_parts_carry_their_own_graphs():
    split = split_train_val(build_regression_dataset(GRAPHS, TARGETS, CONFIG))
    row = 2
    batch = split.val.graphs.batch([row])
    graph = GRAPHS[split.val.ids[row]]
    np.testing.assert_array_equal(batch.numbers, graph.numbers)
    np.testing.assert_allclose(batch.distances, graph.distances, rtol=1e-6)
    assert split.val.targets[row] == TARGETS[split.val.ids[row]]


def test_growing_a_dataset_moves_few_rows():
    few = {name: TARGETS[name] for name in list(TARGETS)[:-2]}
    small = build_regression_dataset(GRAPHS, few, CONFIG)
    large = build_regression_dataset(GRAPHS, TARGETS, CONFIG)
    before = dict(zip(small.ids, small.parts, strict=True))
    after = dict(zip(large.ids, large.parts, strict=True))
    assert sum(before[name] != after[name] for name in before) <= 4


def test_written_datasets_open_as_they_were(tmp_path):
    dataset = build_regression_dataset(GRAPHS, TARGETS, CONFIG)
    manifest = write_dataset(dataset, tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    assert manifest["counts"] == {"train": 28, "val": 8, "test": 4, "outlier": 0}
    back = open_dataset(tmp_path)
    assert isinstance(back.graphs.neighbors, np.memmap)
    assert back.config == CONFIG
    assert back.unit == "eV/atom"
    for name in ("ids", "parts", "target_mean", "target_std", "dataset_hash"):
        assert getattr(back, name) == getattr(dataset, name)
    np.testing.assert_array_equal(back.targets, dataset.targets)
    rows = np.arange(N)
    ours, theirs = dataset.graphs.batch(rows), back.graphs.batch(rows)
    for name in ("numbers", "edge_index", "distances", "graph_index"):
        np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name))
    written = files(tmp_path)
    write_dataset(back, tmp_path / "again")
    assert files(tmp_path / "again") == written


@pytest.mark.parametrize("name", ["distances.npy", "numbers.npy", "manifest.json"])
def test_changed_files_are_noticed(tmp_path, name):
    write_dataset(build_regression_dataset(GRAPHS, TARGETS, CONFIG), tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-10] ^= 1
    (tmp_path / name).write_bytes(bytes(data))
    with pytest.raises(CorruptArtifactError):
        open_dataset(tmp_path)


def test_a_missing_shard_and_a_missing_dataset_are_noticed(tmp_path):
    with pytest.raises(InputError, match="no dataset"):
        open_dataset(tmp_path)
    write_dataset(build_regression_dataset(GRAPHS, TARGETS, CONFIG), tmp_path)
    (tmp_path / "degrees.npy").unlink()
    with pytest.raises(CorruptArtifactError, match=r"degrees\.npy"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("graphs", "targets", "words"),
    [
        (GRAPHS, {**TARGETS, "unknown": 1.0}, "no graph"),
        (GRAPHS, {"s00": 1.0}, "min_samples"),
        (GRAPHS, {**TARGETS, "s07": float("nan")}, "not finite"),
        (GRAPHS, dict.fromkeys(TARGETS, 0.1), "equal"),
        (
            {**GRAPHS, "s00": build_graph(b2(3, "Al", "Ni"), max_neighbors=6)},
            TARGETS,
            "different ways",
        ),
    ],
)
def test_unusable_rows_are_refused(graphs, targets, words):
    with pytest.raises(InputError, match=words):
        build_regression_dataset(graphs, targets, CONFIG)


@pytest.mark.parametrize(
    "change",
    [{"train_fraction": 0.9}, {"seeed": 1}, {"iqr_factor": 0}, {"min_samples": 0}],
)
def test_bad_configs_are_refused(change):
    with pytest.raises(ValidationError):
        DatasetConfig(**{**CONFIG.model_dump(), **change})


def test_pandas_export_has_one_row_per_structure():
    dataset = build_regression_dataset(GRAPHS, TARGETS, CONFIG)
    frame = export_dataset_to_pandas(dataset)
    assert list(frame["structure_id"]) == list(dataset.ids)
    assert frame["part"].isin(PARTS).all()
    row = frame.set_index("structure_id").loc["s04"]
    assert row["formation_energy_per_atom"] == TARGETS["s04"]
    assert (row["elements"], row["n_atoms"], row["n_edges"]) == ("Al Ti", 2, 24)
