from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from pydantic import ValidationError
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.datasets import (
    OUTLIER,
    PARTS,
    DatasetConfig,
    adopt_dataset,
    build_regression_dataset,
    building,
    check_leakage,
    open_dataset,
    split_train_val,
    write_dataset,
    write_regression_dataset,
)
from nanoos_fw.ml.exports import (
    FORMATS,
    export_dataset,
    export_dataset_to_pandas,
)
from nanoos_fw.ml.graphs import CrystalGraph, build_graph, pack_graph
from nanoos_fw.ml.shards import ShardWriter
from nanoos_fw.provenance import content_key, sha256_bytes

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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_property": "bandgap"}, "target_property"),
        ({"unit": "meV/atom"}, "target_unit"),
        ({"min_samples": 41}, "min_samples"),
    ],
)
def test_splitting_anew_does_not_change_what_the_targets_are(change, words):
    dataset = build_regression_dataset(GRAPHS, TARGETS, CONFIG)
    with pytest.raises(InputError, match=words):
        split_train_val(dataset, CONFIG.model_copy(update=change))


def test_splitting_anew_keeps_the_unit_and_the_mark_of_mock_targets():
    own = CONFIG.model_copy(update={"target_property": "hardness", "unit": "GPa"})
    dataset = build_regression_dataset(GRAPHS, TARGETS, own)
    plain = own.model_copy(update={"unit": None, "seed": 8})
    assert split_train_val(dataset, plain).train.unit == "GPa"
    mock = CONFIG.model_copy(update={"mock_targets": True})
    made_up = build_regression_dataset(GRAPHS, TARGETS, mock)
    with pytest.raises(InputError, match="mock_targets"):
        split_train_val(made_up, CONFIG)
    with pytest.raises(InputError, match="no part 'validation'"):
        made_up.part("validation")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.0] * 32 + [1.0] * 8, "half of the training targets"),
        ([0.0, 1.0], "are outliers"),  # quartiles of 0.25 and 0.75
    ],
)
def test_a_filter_that_cannot_judge_is_refused(values, words):
    config = DatasetConfig(
        target_property="bandgap", train_fraction=1, val_fraction=0, test_fraction=0,
        iqr_factor=0.1, min_samples=1,
    )  # fmt: skip
    targets = dict(zip(TARGETS, values, strict=False))
    with pytest.raises(InputError, match=words):
        build_regression_dataset(GRAPHS, targets, config)


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


@pytest.mark.parametrize("order", ["small", "small large", "large small small"])
def test_neighbors_take_two_bytes_unless_a_crystal_is_too_large(
    tmp_path, monkeypatch, order
):
    monkeypatch.setattr("nanoos_fw.ml.shards._NUMBERS_AT_ONCE", 7)
    n = 40_000
    ring = np.stack([np.arange(n), np.roll(np.arange(n), 1)]).astype(np.int32)
    tables = {
        "small": GraphTable.from_graphs([GRAPHS["s00"], GRAPHS["s01"]]),
        "large": GraphTable.from_graphs(
            [CrystalGraph(np.full(n, 29, "u1"), ring, np.full(n, 2.0), 8.0, 12)]
        ),
    }
    chosen = [tables[name] for name in order.split()]
    with ShardWriter(tmp_path) as writer:
        for table in chosen:
            writer.append(table)
        files = writer.finish()
    written = np.load(tmp_path / "neighbors.npy")
    assert written.dtype == (np.int32 if "large" in order else np.int16)
    assert {path.name for path in tmp_path.iterdir()} == set(files)
    expected = np.concatenate([table.neighbors for table in chosen])
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("name", ["distances.npy", "numbers.npy", "manifest.json"])
def test_changed_files_are_noticed(tmp_path, name):
    write_dataset(build_regression_dataset(GRAPHS, TARGETS, CONFIG), tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-10] ^= 1
    (tmp_path / name).write_bytes(bytes(data))
    with pytest.raises(CorruptArtifactError):
        open_dataset(tmp_path)


def test_a_shard_that_was_cut_off_is_noticed_without_its_checksum(tmp_path):
    write_dataset(build_regression_dataset(GRAPHS, TARGETS, CONFIG), tmp_path)
    data = (tmp_path / "distances.npy").read_bytes()
    (tmp_path / "distances.npy").write_bytes(data[:-8])
    with pytest.raises(CorruptArtifactError, match=r"distances\.npy"):
        open_dataset(tmp_path, verify=False)


def test_a_column_keeps_its_type(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.column("targets", np.zeros(3))
        for other in (np.zeros(3, np.float32), np.zeros((3, 2))):
            with pytest.raises(ValueError, match="column targets"):
                writer.column("targets", other)


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
    [
        {"train_fraction": 0.9},
        {"seeed": 1},
        {"iqr_factor": 0},
        {"min_samples": 0},
        {"iqr_factor": float("inf")},
    ],
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


def test_every_format_has_the_same_rows_and_parquet_their_types_and_units(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    config = CONFIG.model_copy(update={"iqr_factor": 0.5})
    dataset = build_regression_dataset(GRAPHS, TARGETS, config)
    for ending in FORMATS:
        assert export_dataset(dataset, tmp_path / f"d{ending}") == N
    table = parquet.read_table(tmp_path / "d.parquet")
    target = "formation_energy_per_atom"
    text = {
        "structure_id", "part", "unit", "elements", "formula", "dataset_hash",
    }  # fmt: skip
    for field in table.schema:
        if field.name in text:
            assert pa.types.is_string(field.type) or pa.types.is_large_string(
                field.type
            )
        else:
            assert field.type == (pa.float64() if field.name == target else pa.int64())
    assert table.column_names == [
        "structure_id", "part", target, "unit", "n_atoms", "n_edges", "elements",
        "formula", "dataset_hash",
    ]  # fmt: skip
    about = json.loads(table.schema.metadata[b"PANDAS_ATTRS"])
    assert about == {
        "units": {target: "eV/atom"},
        "dataset_hash": dataset.dataset_hash,
    }
    rows = table.to_pylist()
    assert [row["structure_id"] for row in rows] == list(dataset.ids)
    assert {row["structure_id"]: row[target] for row in rows} == TARGETS
    assert [row["part"] for row in rows] == list(dataset.parts)
    assert OUTLIER in dataset.parts
    assert {(row["unit"], row["dataset_hash"]) for row in rows} == {
        ("eV/atom", dataset.dataset_hash)
    }
    lines = (tmp_path / "d.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    with (tmp_path / "d.csv").open(newline="") as stream:
        written = list(csv.DictReader(stream))
    numbers = {target: float, "n_atoms": int, "n_edges": int}
    assert [
        {name: numbers.get(name, str)(text) for name, text in row.items()}
        for row in written
    ] == rows


# ------------------------------------------------------------------------ streamed


def stream(targets=TARGETS):
    return ((name, pack_graph(GRAPHS[name])) for name in sorted(targets))


@pytest.mark.parametrize("split", ["random", "composition", "kfold", "time"])
def test_a_streamed_dataset_has_the_bytes_of_one_built_in_memory(
    tmp_path, monkeypatch, split
):
    monkeypatch.setattr(building, "GRAPHS_AT_ONCE", 7)
    config = CONFIG.model_copy(update={"split": split, "iqr_factor": 0.5})
    times = {name: f"2026-01-{1 + i % 28:02d}" for i, name in enumerate(GRAPHS)}
    times = times if split == "time" else None
    dataset = build_regression_dataset(GRAPHS, TARGETS, config, times=times)
    expected = write_dataset(dataset, tmp_path / "memory")
    manifest, leakage = write_regression_dataset(
        stream(), TARGETS, config, tmp_path / "stream", times=times
    )
    assert files(tmp_path / "stream") == files(tmp_path / "memory")
    assert manifest == expected
    assert manifest["removed"] == [list(row) for row in dataset.removed]
    assert manifest["removed"]
    assert leakage == check_leakage(dataset)


def test_the_hash_is_the_content_key_of_all_columns(monkeypatch):
    monkeypatch.setattr(building, "_ITEMS_AT_ONCE", 3)
    dataset = build_regression_dataset(GRAPHS, TARGETS, CONFIG)
    content = {
        "config": CONFIG.model_dump(mode="json"),
        "ids": list(dataset.ids),
        "targets": dataset.targets.tolist(),
        "graphs": [sha256_bytes(pack_graph(GRAPHS[name])) for name in dataset.ids],
        "parts": list(dataset.parts),
    }
    assert dataset.dataset_hash == content_key("dataset", content)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (sorted(TARGETS)[:-1], "1 structures with a target have no graph"),
        (sorted(TARGETS, reverse=True), "sorted by id"),
        ([*sorted(TARGETS), "s00"], "next target that of 'none'"),
    ],
)
def test_a_stream_that_breaks_off_leaves_nothing(tmp_path, names, words):
    graphs = ((name, GRAPHS[name]) for name in names)
    with pytest.raises(InputError) as raised:
        write_regression_dataset(graphs, TARGETS, CONFIG, tmp_path)
    assert words in str(raised.value) + str(raised.value.advice)
    assert list(tmp_path.iterdir()) == []


def test_mock_targets_are_marked_and_are_another_dataset(tmp_path):
    mock = CONFIG.model_copy(update={"mock_targets": True})
    dataset = build_regression_dataset(GRAPHS, TARGETS, mock)
    real = build_regression_dataset(GRAPHS, TARGETS, CONFIG)
    assert write_dataset(dataset, tmp_path / "mock")["mock_targets"] is True
    assert write_dataset(real, tmp_path / "real")["mock_targets"] is False
    assert open_dataset(tmp_path / "mock").mock_targets
    assert not open_dataset(tmp_path / "real").mock_targets
    assert dataset.dataset_hash != real.dataset_hash


def test_datasets_with_rows_in_the_manifest_still_open(tmp_path):
    dataset = build_regression_dataset(GRAPHS, TARGETS, CONFIG)
    manifest = write_dataset(dataset, tmp_path)
    del manifest["manifest_sha256"], manifest["mock_targets"], manifest["removed"]
    for name in ("ids", "parts", "targets"):
        (tmp_path / f"{name}.npy").unlink()
        del manifest["files"][f"{name}.npy"]
    manifest |= {
        "schema_version": 1,
        "ids": list(dataset.ids),
        "parts": list(dataset.parts),
        "targets": dataset.targets.tolist(),
    }
    manifest["manifest_sha256"] = content_key("dataset manifest", manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    old = open_dataset(tmp_path)
    write_dataset(old, tmp_path / "new")
    write_dataset(dataset, tmp_path / "expected")
    assert files(tmp_path / "new") == files(tmp_path / "expected")

    manifest["schema_version"] = 3
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = content_key("dataset manifest", manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="schema 3"):
        open_dataset(tmp_path)


def test_columns_on_disk_read_like_tuples(tmp_path):
    dataset = build_regression_dataset(GRAPHS, TARGETS, CONFIG)
    write_dataset(dataset, tmp_path)
    back = open_dataset(tmp_path)
    for name in ("ids", "parts"):
        ours, theirs = getattr(dataset, name), getattr(back, name)
        assert not isinstance(theirs, tuple)
        assert tuple(theirs) == ours
        assert theirs == ours
        assert ours == theirs
        assert theirs != ours[:-1]
        assert theirs[3:7] == ours[3:7]
        assert theirs[-1] == ours[-1]
        assert theirs.index(ours[5]) == ours.index(ours[5])
    assert [back.parts.count(p) for p in (*PARTS, "x")] == [28, 8, 4, 0]
    for part in (*PARTS, "x"):
        np.testing.assert_array_equal(back.rows(part), dataset.rows(part))


def test_a_dataset_moves_to_the_folder_of_its_hash_once(tmp_path):
    dataset = build_regression_dataset(GRAPHS, TARGETS, CONFIG)
    for name in ("first", "second", "third"):
        write_dataset(dataset, tmp_path / name)
    written = files(tmp_path / "first")
    place = tmp_path / "datasets" / "ab"
    adopt_dataset(tmp_path / "first", place)
    assert files(place) == written
    adopt_dataset(tmp_path / "second", place)  # is there
    assert files(place) == written
    (place / "manifest.json").unlink()  # of a build that was killed
    (place / "numbers.npy").write_bytes(b"half")
    adopt_dataset(tmp_path / "third", place)
    assert files(place) == written


def test_ids_that_a_column_cannot_hold_are_refused(tmp_path):
    graphs = {f"{name}\0": graph for name, graph in GRAPHS.items()}
    targets = {f"{name}\0": value for name, value in TARGETS.items()}
    dataset = build_regression_dataset(graphs, targets, CONFIG)
    with pytest.raises(InputError, match="NUL"):
        write_dataset(dataset, tmp_path)
