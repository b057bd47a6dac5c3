"""Splits by group, fold and time, what they leak, and datasets from the stores."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import InputError, MissingDependencyError
from nanoos_fw.firetasks import BuildDatasetTask, TrainModelTask
from nanoos_fw.firetasks.base import TaskContext
from nanoos_fw.ml import training
from nanoos_fw.ml.datasets import (
    DatasetConfig,
    build_regression_dataset,
    check_leakage,
    open_dataset,
    split_train_val,
    write_dataset,
)
from nanoos_fw.ml.exports import export_dataset
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.ml.graphs import build_graph, pack_graph
from nanoos_fw.ml.splits import reduced_formulas
from nanoos_fw.ml.weight_files import says_mock_targets
from nanoos_fw.parallel import Communicator, StopRequest
from nanoos_fw.settings import load_settings
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import ensure_indexes
from nanoos_fw.stores.datasets import build_train_val_datasets
from nanoos_fw.stores.features import Features, FeatureStore
from nanoos_fw.stores.simulations import Simulation, SimulationStore
from nanoos_fw.stores.structures import NewStructure, StructureStore

N = 60
METALS = ["Ni", "Ti", "Fe", "Co", "Cu", "Zn", "Ag", "Au", "Pd", "Pt"]
FEATURES = {"cutoff_radius": 8.0, "max_neighbors": 12}


def b2(a: float, first: str, second: str) -> Structure:
    return Structure(Lattice.cubic(a), [first, second], [[0, 0, 0], [0.5, 0.5, 0.5]])


STRUCTURES = [b2(3.0 + 0.01 * i, "Al", METALS[i % 10]) for i in range(N)]
GRAPHS = {f"s{i:02d}": build_graph(s) for i, s in enumerate(STRUCTURES)}
TARGETS = dict(zip(GRAPHS, np.random.default_rng(1).normal(size=N), strict=True))
TIMES = {name: f"2026-01-01T00:{(7 * i) % 60:02d}:00" for i, name in enumerate(GRAPHS)}


def config(split: Any, **changes: Any) -> DatasetConfig:
    values = {"train_fraction": 0.7, "val_fraction": 0.1, "test_fraction": 0.2}
    return DatasetConfig(
        target_property="energy_per_atom", split=split, **{**values, **changes}
    )


def parts(split: Any, **changes: Any) -> dict[str, str]:
    dataset = build_regression_dataset(
        GRAPHS, TARGETS, config(split, **changes), times=TIMES
    )
    return dict(zip(dataset.ids, dataset.parts, strict=True))


def formula(name: str) -> str:
    return METALS[int(name[1:]) % 10]


def test_formulas_are_reduced_as_pymatgen_reduces_them() -> None:
    structures = [
        STRUCTURES[0] * (2, 1, 1),
        Structure(Lattice.cubic(4), ["Cu"] * 3 + ["Au"], [[0, 0, 0], [0.5, 0.5, 0],
                  [0, 0.5, 0.5], [0.5, 0, 0.5]]),
    ]  # fmt: skip
    graphs = {str(i): build_graph(s) for i, s in enumerate(structures)}
    settings = config("random", min_samples=1, test_fraction=0, train_fraction=0.9)
    dataset = build_regression_dataset(graphs, {"0": 0.0, "1": 1.0}, settings)
    assert reduced_formulas(dataset.graphs) == ["AlNi", "AuCu3"]


def test_a_composition_is_in_one_part() -> None:
    found = parts("composition")
    of: dict[str, set[str]] = {}
    for name, part in found.items():
        of.setdefault(formula(name), set()).add(part)
    assert all(len(there) == 1 for there in of.values())
    counts = [list(found.values()).count(part) for part in ("train", "val", "test")]
    assert counts == [42, 6, 12]
    assert parts("composition", seed=5) != found


@pytest.mark.parametrize("split", ["kfold", "composition-kfold"])
def test_every_row_is_tested_once_in_all_folds(split: str) -> None:
    folds = [parts(split, n_folds=5, fold=fold) for fold in range(5)]
    tested = [name for fold in folds for name, part in fold.items() if part == "test"]
    assert sorted(tested) == sorted(GRAPHS)
    assert all(list(fold.values()).count("test") == 12 for fold in folds)
    assert all(list(fold.values()).count("val") == 6 for fold in folds)
    if split == "composition-kfold":
        for fold in folds:
            of: dict[str, set[str]] = {}
            for name, part in fold.items():
                of.setdefault(formula(name), set()).add(part)
            assert all(len(there) == 1 for there in of.values())


def test_the_newest_rows_are_tested() -> None:
    found = parts("time")
    latest = {
        p: max(TIMES[n] for n in GRAPHS if found[n] == p) for p in ("train", "val")
    }
    earliest = {
        p: min(TIMES[n] for n in GRAPHS if found[n] == p) for p in ("val", "test")
    }
    assert latest["train"] < earliest["val"] <= latest["val"] < earliest["test"]
    with pytest.raises(InputError, match="60 rows have no time"):
        build_regression_dataset(GRAPHS, TARGETS, config("time"))
    some = {name: time for name, time in TIMES.items() if name != "s07"}
    with pytest.raises(InputError, match="1 rows have no time"):
        build_regression_dataset(GRAPHS, TARGETS, config("time"), times=some)


def test_times_are_compared_as_times() -> None:
    # As text, the hour of another zone and a date alone would be in the wrong place.
    wholes = dict.fromkeys(GRAPHS, "2026-01-02T00:00:00+00:00")
    newest = {"s03": "2026-01-03", "s09": "2026-01-02T23:30:00-02:00"}
    oldest = {"s11": "2026-01-02T01:00:00+02:00", "s20": "2025-12-31T10:00:00Z"}
    dataset = build_regression_dataset(
        GRAPHS,
        TARGETS,
        config("time", test_fraction=2 / N, val_fraction=(N - 4) / N,
               train_fraction=2 / N),
        times={**wholes, **newest, **oldest},
    )  # fmt: skip
    found = dict(zip(dataset.ids, dataset.parts, strict=True))
    assert {name for name, part in found.items() if part == "test"} == set(newest)
    assert {name for name, part in found.items() if part == "train"} == set(oldest)
    with pytest.raises(InputError, match="time of s05 is 'yesterday'"):
        build_regression_dataset(
            GRAPHS, TARGETS, config("time"), times={**wholes, "s05": "yesterday"}
        )


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValidationError, match="not below n_folds"):
        config("kfold", n_folds=3, fold=3)
    with pytest.raises(InputError, match="11 folds"):
        parts("composition-kfold", n_folds=11)
    one = dict.fromkeys(GRAPHS, GRAPHS["s00"])
    with pytest.raises(InputError, match="none to train on"):
        build_regression_dataset(
            one, TARGETS, config("composition", test_fraction=0.9, train_fraction=0.05,
                                 val_fraction=0.05),
        )  # fmt: skip


def test_settings_of_before_keep_their_key_and_their_files(tmp_path: Path) -> None:
    plain = config("random")
    assert not {"split", "n_folds", "fold"} & set(plain.model_dump(mode="json"))
    chosen = config("kfold", fold=2)
    dumped = chosen.model_dump(mode="json")
    assert (dumped["split"], dumped["fold"]) == ("kfold", 2)
    assert DatasetConfig(**dumped) == chosen
    dataset = build_regression_dataset(GRAPHS, TARGETS, config("time"), times=TIMES)
    write_dataset(dataset, tmp_path)
    back = open_dataset(tmp_path)
    assert (back.times, back.config) == (dataset.times, dataset.config)
    anew = split_train_val(back, config("random"))
    assert anew.test.num_samples == 12


def test_leakage_is_found_across_parts_only() -> None:
    twice = {**GRAPHS, "s00again": GRAPHS["s00"], "s01again": GRAPHS["s01"]}
    targets = {**TARGETS, "s00again": 0.5, "s01again": 0.6}
    seeds = range(40)
    seen = set()
    for seed in seeds:
        dataset = build_regression_dataset(twice, targets, config("random", seed=seed))
        part = dict(zip(dataset.ids, dataset.parts, strict=True))
        leakage = check_leakage(dataset)
        expected = [
            [name, f"{name}again"]
            for name in ("s00", "s01")
            if part[name] != part[f"{name}again"]
        ]
        assert leakage.structures == expected
        seen.add(len(expected))
        assert set(leakage.formulas) <= {f"Al{m}" if m > "Al" else f"{m}Al"
                                         for m in METALS}  # fmt: skip
    assert seen == {0, 1, 2}
    grouped = build_regression_dataset(twice, targets, config("composition"))
    assert check_leakage(grouped).to_dict() == {
        "same_structure": 0,
        "same_formula": 0,
        "structures": [],
        "formulas": {},
    }


# ------------------------------------------------------------------------- exports


def test_exports_hold_targets_exactly_with_units(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    dataset = build_regression_dataset(GRAPHS, TARGETS, config("random"))
    assert export_dataset(dataset, tmp_path / "d.csv") == N
    with (tmp_path / "d.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    written = [float(row["energy_per_atom"]) for row in table]
    np.testing.assert_array_equal(written, dataset.targets)
    assert {row["unit"] for row in table} == {"eV/atom"}
    assert {row["dataset_hash"] for row in table} == {dataset.dataset_hash}
    export_dataset(dataset, tmp_path / "d.jsonl")
    text = (tmp_path / "d.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    np.testing.assert_array_equal(
        [row["energy_per_atom"] for row in rows], dataset.targets
    )
    assert rows[0]["formula"] == "AlNi"
    with pytest.raises(InputError, match="names no format"):
        export_dataset(dataset, tmp_path / "d.xlsx")


def test_parquet_is_written_or_its_package_named(tmp_path: Path) -> None:
    dataset = build_regression_dataset(GRAPHS, TARGETS, config("random"))
    path = tmp_path / "d.parquet"
    if importlib.util.find_spec("pyarrow") is None:
        with pytest.raises(MissingDependencyError, match="pyarrow"):
            export_dataset(dataset, path)
        assert not path.exists()
        return
    import pandas as pd

    export_dataset(dataset, path)
    np.testing.assert_array_equal(
        pd.read_parquet(path)["energy_per_atom"], dataset.targets
    )


# ------------------------------------------------------------------- from the stores


@pytest.fixture
def database(embedded_database: Any) -> Any:
    """Sixty labelled structures; the first two have no features, the last no label."""
    ensure_indexes(embedded_database)
    entries = [
        NewStructure(s, f"s{i}", {"energy": -float(i)} if i < N - 1 else {})
        for i, s in enumerate(STRUCTURES)
    ]
    keys = StructureStore(embedded_database).add(entries, in_set="all").keys
    found = [
        Features(key, pack_graph(graph), {})
        for key, graph in zip(keys[2:], list(GRAPHS.values())[2:], strict=True)
    ]
    FeatureStore(embedded_database).put(
        found, {keys[0]: InputError("atoms overlap")}, FEATURES, FEATURE_VERSION
    )
    return embedded_database


def test_labels_come_from_imported_properties(database: Any) -> None:
    built = build_train_val_datasets(
        database, "energy_per_atom", 0.6, in_set="all", features=FEATURES
    )
    assert built.dataset.num_samples == N - 3
    assert built.dataset.unit == "eV/atom"
    assert sorted(built.dataset.targets) == [-i / 2 for i in range(N - 2, 1, -1)]
    assert len(built.without_label) == 1
    assert sorted(built.without_features.values()) == ["atoms overlap", "missing"]
    sizes = [
        p.num_samples for p in (built.split.train, built.split.val, built.split.test)
    ]
    assert sizes == [35, 11, 11]
    assert built.leakage.structures == []
    whole = build_train_val_datasets(
        database, "energy", 0.6, in_set="all", features=FEATURES, split="time"
    )
    assert whole.dataset.times is not None
    assert min(whole.dataset.targets) == -(N - 2)


def test_what_gives_no_dataset_is_told_with_the_next_step(database: Any) -> None:
    def build(target: str = "energy", **changes: Any) -> Any:
        arguments = {"in_set": "all", "features": FEATURES, **changes}
        return build_train_val_datasets(database, target, **arguments)

    with pytest.raises(InputError, match="imported properties: energy"):
        build("bandgap")
    with pytest.raises(InputError, match="nanoos features compute"):
        build(features={"cutoff_radius": 4.0})
    with pytest.raises(InputError, match="bad dataset settings"):
        build(train_fraction=1.5)
    with pytest.raises(InputError, match="either the keys or the set"):
        build(keys=["a"])


def test_a_dataset_is_written_while_it_is_read(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"in_set": "all", "features": FEATURES, "iqr_factor": 1}
    (tmp_path / "passing").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "passing"))
    memory = build_train_val_datasets(database, "energy", 0.6, **arguments)
    # Without a folder: mapped all the same, and nothing is left lying about.
    assert isinstance(memory.dataset.graphs.distances, np.memmap)
    assert list((tmp_path / "passing").iterdir()) == []
    write_dataset(memory.dataset, tmp_path / "memory")
    steps: list[tuple[int, int]] = []
    written = build_train_val_datasets(
        database, "energy", 0.6, directory=tmp_path / "written",
        on_progress=lambda *step: steps.append(step), **arguments,
    )  # fmt: skip
    assert isinstance(written.dataset.graphs.distances, np.memmap)
    assert written.leakage == memory.leakage
    assert steps[-1] == (N - 3, N - 3)
    for path in (tmp_path / "memory").iterdir():
        assert (tmp_path / "written" / path.name).read_bytes() == path.read_bytes()
    assert written.split.train.ids == memory.split.train.ids


def test_labels_come_from_simulations(database: Any) -> None:
    structures = StructureStore(database)
    keys = structures.keys("all")
    elements = ["Al", *METALS]
    cells = [Structure(Lattice.cubic(3), [e], [[0] * 3]) for e in elements]
    references = structures.add(
        [NewStructure(cell, e) for cell, e in zip(cells, elements, strict=True)],
        in_set="elements",
    ).keys
    results: dict[str, dict[str, Any]] = {
        key: {
            "energy_ev": -4.0 - 0.1 * i,
            "energy_per_atom_ev": -2.0 - 0.05 * i,
            "volume_a3": 30.0 + i,
            "averages": {"density": {"mean": 5.0 + i}, "name": "x"},
        }
        for i, key in enumerate(keys)
    }
    results |= {key: {"energy_ev": -1.0 * i} for i, key in enumerate(references)}
    failed = keys[7]
    SimulationStore(database).put_many(
        Simulation(key, "m", "relaxation", "done", result)
        if key != failed
        else Simulation(key, "m", "relaxation", "failed", error={"message": "burst"})
        for key, result in results.items()
    )

    def build(target: str, **changes: Any) -> Any:
        arguments: dict[str, Any] = {"in_set": "all", "features": FEATURES}
        return build_train_val_datasets(
            database, target, **{**arguments, "method": "m", **changes}
        )

    energy_of = dict(zip(elements, [-1.0 * i for i in range(11)], strict=True))
    built = build("formation_energy_per_atom", references=references)
    assert built.failed_labels == {failed: "burst"}
    stored = structures.get_many(list(built.dataset.ids))
    for key, target in zip(built.dataset.ids, built.dataset.targets, strict=True):
        parts = sum(energy_of[site.specie.symbol] for site in stored[key].structure)
        assert target == pytest.approx((results[key]["energy_ev"] - parts) / 2)
    for target, unit, value in (
        ("energy", "eV", lambda r: r["energy_ev"]),
        ("energy_per_atom", "eV/atom", lambda r: r["energy_per_atom_ev"]),
        ("volume_per_atom", "Å³/atom", lambda r: r["volume_a3"] / 2),
        ("averages.density.mean", "", lambda r: r["averages"]["density"]["mean"]),
    ):
        built = build(target)
        assert built.dataset.unit == unit
        assert built.dataset.targets.tolist() == [
            value(results[key]) for key in built.dataset.ids
        ]
        assert failed in built.without_label
    with pytest.raises(InputError, match=r"no number 'averages\.name'"):
        build("averages.name")
    with pytest.raises(InputError, match="needs the relaxed elements"):
        build("formation_energy_per_atom")
    with pytest.raises(InputError, match="by method 'other'") as raised:
        build("energy", method="other")
    assert raised.value.evidence == {"methods": ["m"]}
    with pytest.raises(InputError, match="not in meV"):
        build("energy", unit="meV")


def test_mock_targets_need_no_labels_and_say_so(database: Any) -> None:
    built = build_train_val_datasets(
        database, "anything", in_set="all", features=FEATURES, mock_targets=True
    )
    assert built.dataset.mock_targets
    assert built.dataset.num_samples == N - 2
    assert np.abs(built.dataset.targets).max() < 1
    assert 0.4 < built.dataset.targets.std() < 0.75  # of an even spread: 0.577


def test_units_of_tables_reach_the_dataset(database: Any) -> None:
    structures = StructureStore(database)
    keys = structures.keys("all")
    values = {key: float(i) for i, key in enumerate(keys)}
    structures.set_property("hardness", values, unit="GPa", source="a paper")

    def build(**changes: Any) -> Any:
        arguments: dict[str, Any] = {"in_set": "all", "features": FEATURES, **changes}
        return build_train_val_datasets(database, "hardness", **arguments)

    assert build().dataset.unit == "GPa"
    with pytest.raises(InputError, match="are in GPa, not in bar"):
        build(unit="bar")
    structures.set_property("hardness", {keys[5]: 1.0}, unit="bar", source="another",
                            replace=True)  # fmt: skip
    with pytest.raises(InputError, match="several units: GPa, bar"):
        build()


def test_labels_of_no_or_another_unit_are_not_taken_for_the_usual(
    database: Any,
) -> None:
    structures = StructureStore(database)
    keys = structures.keys("all")

    def build(target: str) -> Any:
        return build_train_val_datasets(
            database, target, in_set="all", features=FEATURES
        )

    # Energies that came with structures are in eV, as these are.
    structures.set_property("energy", {keys[5]: -9.0}, unit="eV", source="a table",
                            replace=True)  # fmt: skip
    assert build("energy_per_atom").dataset.unit == "eV/atom"
    structures.set_property("energy", {k: -9.0 - i for i, k in enumerate(keys)},
                            unit="Ry", source="a code", replace=True)  # fmt: skip
    for target in ("energy", "energy_per_atom"):
        with pytest.raises(InputError, match="are in Ry"):
            build(target)
    database["structures"].update_many({}, {"$set": {"properties.hardness": 3.0}})
    structures.set_property("hardness", {keys[5]: 1.0}, unit="GPa", source="a paper",
                            replace=True)  # fmt: skip
    with pytest.raises(InputError, match="several units: GPa, not known"):
        build("hardness")


def context(database: Any, folder: Path) -> TaskContext:
    return TaskContext.on(
        database,
        settings=load_settings(),
        work_root=folder,
    )


def test_a_model_trained_on_a_mock_dataset_is_kept_and_not_activated(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = context(database, tmp_path)
    built = build_train_val_datasets(
        database, "hardness", in_set="all", features=FEATURES, mock_targets=True
    )
    key = built.dataset.dataset_hash
    write_dataset(built.dataset, place.work_dir("datasets", key))
    place.campaigns.create("c", {})
    place.campaigns.record("c", dataset=key)

    def train_here(
        target: str, config: training.TrainingConfig, **places: Any
    ) -> training.TrainingResult:
        """Train in this process instead of one of its own."""
        job = {
            "config": config.model_dump(mode="json"),
            "dataset_dir": str(places["dataset_dir"]),
            "threads": 1,
            "pause_after": None,
        }
        found = training.main(job, places["work_dir"], Communicator(), StopRequest())
        return training.TrainingResult(**found)

    monkeypatch.setattr("nanoos_fw.firetasks.ml.train_cgcnn_model", train_here)
    task = TrainModelTask(
        campaign="c",
        model_name="made_up",
        training={
            "target": "hardness", "epochs": 1, "hidden_dim": 8, "num_layers": 1,
            "readout_dim": 8, "ensemble_size": 1,
        },
    )  # fmt: skip
    for _ in range(2):  # a rerun finds it in the registry, and does not activate it
        with pytest.raises(InputError, match="mock targets"):
            task.run(place)
    (record,) = [r for r in place.models.list_models() if r.name == "made_up"]
    assert record.has_weights
    assert record.dataset_info["mock_targets"] is True
    assert says_mock_targets(Path(record.checkpoint_path))
    assert not record.is_active
    assert place.models.history("made_up") == []


def test_the_firetask_builds_from_imported_labels(
    database: Any, tmp_path: Path
) -> None:
    store = StructureStore(database)
    keys = store.keys("all")
    store.set_property(
        "hardness", {k: float(i) for i, k in enumerate(keys[:-1])}, unit="GPa",
        source="a paper",
    )  # fmt: skip
    CampaignStore(database).create("c", {})
    place = context(database, tmp_path)
    task = BuildDatasetTask(
        campaign="c", structures=keys, dataset={"target_property": "hardness"}
    )
    answer = task.run(place)
    assert (answer["without_label"], answer["without_features"]) == (1, 2)
    assert task.run(place) == answer
    dataset = open_dataset(place.work_dir("datasets", answer["dataset"]))
    assert (dataset.unit, dataset.num_samples) == ("GPa", N - 3)
    assert CampaignStore(database).get("c")["outputs"] == {"dataset": answer["dataset"]}
    left = [path.name for path in (tmp_path / "datasets").iterdir()]
    assert left == [answer["dataset"][:2]]
