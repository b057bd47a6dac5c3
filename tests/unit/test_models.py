"""The model registry, on the in-memory database and on a server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import (
    CorruptArtifactError,
    InputError,
    MissingDependencyError,
    StoreError,
)
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn import CGCNNModel
from nanoos_fw.ml.forest_fitting import fit_forest
from nanoos_fw.ml.graph_scalars import graph_scalars
from nanoos_fw.ml.graphs import build_graph
from nanoos_fw.stores import aliases, model_upkeep
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import ensure_indexes, get_artifact, open_database
from nanoos_fw.stores.model_upkeep import (
    collect_garbage,
    export_model,
    find_garbage,
    verify_models,
)
from nanoos_fw.stores.models import (
    ModelRecord,
    ModelRegistry,
    Prediction,
    compare_models,
    get_model,
    list_models,
    register_model,
)
from nanoos_fw.stores.system_models import SYSTEM_MODELS

TARGET = "formation_energy_per_atom"


class Launchpad:
    def __init__(self, db: Any) -> None:
        self.db = db


@pytest.fixture(
    params=[
        "embedded_database",
        pytest.param("mongodb_database", marks=pytest.mark.mongodb),
    ]
)
def database(request: pytest.FixtureRequest) -> Any:
    return open_database(Launchpad(request.getfixturevalue(request.param)))


@pytest.fixture
def registry(database: Any) -> ModelRegistry:
    return ModelRegistry(database)


def register(registry: ModelRegistry, weights: Path, key: str, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "name": "energies",
        "target": TARGET,
        "unit": "eV/atom",
        "model_type": "CGCNN",
        "weights": weights,
        "training_key": key,
        "training_config": {"epochs": 3},
        "metrics": {"val": {"mae": 0.1}, "test": {"mae": 0.2}},
        "dataset_info": {"dataset_hash": "d" * 40},
        "environment": {"host": "trainer"},
    }
    return registry.register(**{**arguments, **changes})


def versions(registry: ModelRegistry, folder: Path, n: int, **changes: Any) -> None:
    for number in range(1, n + 1):
        weights = folder / f"weights{number}"
        weights.write_bytes(f"weights {number}".encode())
        register(registry, weights, f"key{number}", **changes)


# ------------------------------------------------------------------------- versions


def test_versions_are_immutable_and_one_per_training(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    weights = tmp_path / "w"
    weights.write_bytes(b"weights one")
    first = register(registry, weights, "k1")
    assert (
        register(registry, weights, "k1").reference == first.reference == "energies@1"
    )
    weights.write_bytes(b"weights two")
    second = register(registry, weights, "k2", parent="energies@1")
    assert (second.version, second.parent) == (2, "energies@1")
    assert registry.find("k2") == second
    assert registry.find("k3") is None
    assert registry.get("energies@latest") == second
    assert registry.get("energies@1") == first
    assert [r.version for r in registry.list_models(name="energies")] == [1, 2]
    out = registry.write_weights(first, tmp_path / "out" / "w")
    assert out.read_bytes() == b"weights one"
    with pytest.raises(InputError, match="no model energies@9"):
        register(registry, weights, "k4", parent="energies@9")


def test_a_record_says_where_it_comes_from(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    versions(registry, tmp_path, 1)
    found = registry.get("energies@1").to_dict()
    assert set(found) == set(ModelRecord.model_fields)
    assert found["environment"]["host"] == "trainer"
    assert found["environment"]["registered_by"]["nanoos_fw"]
    assert found["dataset_info"] == {"dataset_hash": "d" * 40}
    assert (found["is_active"], found["is_system_provided"]) == (False, False)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("name", ["", "a@b", "a:b"])
def test_a_model_name_that_breaks_references_is_refused(
    registry: ModelRegistry, tmp_path: Path, name: str
) -> None:
    (tmp_path / "w").write_bytes(b"w")
    with pytest.raises(InputError, match="model name"):
        register(registry, tmp_path / "w", "k", name=name)


def test_weights_in_a_file_stay_there_and_are_verified(
    registry: ModelRegistry, database: Any, tmp_path: Path
) -> None:
    versions(registry, tmp_path, 1, storage="file")
    record = registry.get("energies@1")
    path = tmp_path / "weights1"
    assert record.checkpoint_path == str(path)
    with pytest.raises(StoreError, match="not in the database"):
        get_artifact(database, str(record.sha256))
    assert registry.read_weights(record) == b"weights 1"
    path.write_bytes(b"weights x")
    with pytest.raises(CorruptArtifactError, match="energies@1"):
        registry.read_weights(record)
    path.unlink()
    with pytest.raises(StoreError, match=r"energies@1 cannot be read"):
        registry.read_weights(record)
    (check,) = verify_models(registry, [record])
    assert check.status == "broken"


def test_every_version_is_verified(
    registry: ModelRegistry, database: Any, tmp_path: Path
) -> None:
    versions(registry, tmp_path, 2)
    chunk = database["artifacts.chunks"].find_one({"data": b"weights 2"})
    database["artifacts.chunks"].update_one(
        {"_id": chunk["_id"]}, {"$set": {"data": b"weights x"}}
    )
    found = {c.reference: c for c in verify_models(registry, registry.list_models())}
    assert found["energies@1"].status == "ok"
    assert found["energies@2"].status == "broken"
    assert "checksum" in str(found["energies@2"].problem)
    assert found["cgcnn_bandgap_v1@0"].status == "no weights"


# ----------------------------------------------------------------------- references


def test_the_best_version_goes_by_validation_and_one_target(
    registry: ModelRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def metrics(val: float, test: float, r2: float) -> dict[str, Any]:
        return {"val": {"mae": val, "r2": r2}, "test": {"mae": test}}

    with pytest.raises(InputError, match="no model states mae"):
        registry.get("best:mae")
    (tmp_path / "w").write_bytes(b"w")
    for key, values in {
        "k1": {"metrics": metrics(0.3, 0.1, 0.9)},
        "k2": {"metrics": metrics(0.2, 0.4, 0.7)},
        "k3": {"metrics": metrics(0.2, 0.3, 0.8)},  # a tie with the older one
        "k4": {"metrics": {}},
        "k5": {"metrics": metrics(0.1, 0.1, 1.0),
               "dataset_info": {"mock_targets": True}},
    }.items():  # fmt: skip
        register(registry, tmp_path / "w", key, **values)
    assert registry.get("best:mae").reference == "energies@2"
    assert registry.get("best:r2").reference == "energies@1"
    assert registry.best("mae", part="test").reference == "energies@1"
    listed = registry.list_models(sort="mae")
    assert [r.version for r in listed if r.name == "energies"] == [5, 2, 3, 1, 4]
    assert registry.list_models(sort="r2", part="val")[0].version == 5
    assert "datasets" not in caplog.text
    register(
        registry, tmp_path / "w", "k6", name="gaps", target="bandgap",
        dataset_info={"dataset_hash": "e" * 40}, metrics=metrics(0.01, 0.01, 1.0),
    )  # fmt: skip
    with pytest.raises(InputError, match="different targets"):
        registry.get("best:mae")
    assert registry.get(f"best:mae:{TARGET}").reference == "energies@2"
    assert registry.get("best:mae:bandgap").reference == "gaps@1"
    with pytest.raises(InputError, match="no model states f1"):
        registry.get("best:f1")


def test_the_best_of_classes_has_the_largest_area(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    (tmp_path / "w").write_bytes(b"w")
    for key, area in (("a", 0.6), ("b", 0.9), ("c", float("nan"))):
        metrics = {"val": {"roc_auc": area, "within_interval": area, "mae": 1.0 - area}}
        register(registry, tmp_path / "w", key, metrics=metrics)
    assert registry.get("best:roc_auc").reference == "energies@2"
    # What is not a number is not the best, wherever it stands.
    register(registry, tmp_path / "w", "d", metrics={"val": {"mae": 0.2}})
    assert registry.get("best:mae").reference == "energies@2"
    listed = registry.list_models(name="energies", sort="mae")
    assert [r.version for r in listed] == [2, 4, 1, 3]
    with pytest.raises(InputError, match="within_interval does not say"):
        registry.get("best:within_interval")


def test_errors_in_different_units_are_not_compared(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    (tmp_path / "w").write_bytes(b"w")
    register(registry, tmp_path / "w", "a", unit="eV/atom")
    register(registry, tmp_path / "w", "b", unit="kJ/mol")
    with pytest.raises(InputError, match="eV/atom, kJ/mol"):
        registry.get("best:mae")
    warnings = compare_models(registry.list_models(name="energies"))["warnings"]
    assert warnings == ["different units: the errors cannot be compared"]


def test_a_rollback_to_removed_weights_moves_nothing(
    registry: ModelRegistry, database: Any, tmp_path: Path
) -> None:
    versions(registry, tmp_path, 3)
    for number in (1, 2, 3):
        registry.activate(f"energies@{number}", reason="better")
    removed = [g.reference for g in collect_garbage(database, keep=0)]
    assert removed == ["energies@1", "energies@2"]
    with pytest.raises(MissingDependencyError, match="energies@2 were removed"):
        registry.roll_back("energies")
    assert registry.get("energies").reference == "energies@3"
    assert len(registry.history("energies")) == 3


def test_errors_on_several_datasets_are_warned_of(
    registry: ModelRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "w").write_bytes(b"w")
    for key in "ab":
        register(registry, tmp_path / "w", key, dataset_info={"dataset_hash": key * 40})
    registry.get("best:mae")
    assert "2 datasets" in caplog.text
    found = compare_models(registry.list_models(name="energies"))
    assert found["warnings"] == ["different datasets: the errors cannot be compared"]


def test_a_comparison_shows_what_differs(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    (tmp_path / "w").write_bytes(b"w")
    for key, mae, dim in (("a", 0.3, 64), ("b", 0.2, 32)):
        register(
            registry, tmp_path / "w", key, metrics={"val": {"mae": mae}},
            training_config={"epochs": 3, "hidden_dim": dim},
        )  # fmt: skip
    found = compare_models(registry.list_models(name="energies"))
    assert [row["model"] for row in found["models"]] == ["energies@2", "energies@1"]
    assert found["models"][0]["metrics"]["val"]["mae"] == 0.2
    assert found["models"][0]["metrics"]["test"]["mae"] is None
    assert found["differences"] == {"hidden_dim": [32, 64]}
    assert found["warnings"] == []


# -------------------------------------------------------------------------- aliases


def test_aliases_move_and_keep_their_history(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    versions(registry, tmp_path, 2)
    with pytest.raises(InputError, match="energies@active"):
        registry.get("energies")
    registry.activate("energies@1", reason="first")
    registry.activate("energies@1", reason="again: no entry")
    registry.activate("energies@2", reason="better")
    registry.activate("energies@1", alias="champion", reason="trusted")
    assert registry.get("energies").version == 2
    assert registry.get("energies").is_active
    assert not registry.get("energies@champion").is_active
    moves = registry.history("energies", "active")
    assert [(m.sequence, m.version, m.reason) for m in moves] == [
        (1, 1, "first"),
        (2, 2, "better"),
    ]
    assert all("@" in m.by and m.time.endswith("+00:00") for m in moves)
    assert {m.alias for m in registry.history("energies")} == {"active", "champion"}


def test_rolling_back_goes_back_step_by_step(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    versions(registry, tmp_path, 4)
    for version in (1, 2, 3):
        registry.activate(f"energies@{version}", reason="newer")
    assert registry.roll_back("energies", reason="3 is wrong").version == 2
    assert registry.get("energies").version == 2
    registry.activate("energies@4", reason="newer")
    assert registry.roll_back("energies").version == 2
    assert registry.roll_back("energies").version == 1
    with pytest.raises(InputError, match="no earlier version"):
        registry.roll_back("energies")
    moves = registry.history("energies")
    assert [m.version for m in moves] == [1, 2, 3, 2, 4, 2, 1]
    assert [m.restores for m in moves] == [None, None, None, 2, None, 2, 1]
    with pytest.raises(InputError, match="no earlier version"):
        registry.roll_back("unknown")


def test_a_rollback_does_not_undo_the_move_of_somebody_else(
    registry: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(registry, tmp_path, 3)
    registry.activate("energies@1", reason="first")
    registry.activate("energies@2", reason="better")
    look = aliases.AliasLog.history

    def seen_too_early(self: Any, name: str, alias: str | None = None) -> Any:
        found = look(self, name, alias)
        monkeypatch.undo()
        registry.activate("energies@3", reason="meanwhile")
        return found

    monkeypatch.setattr(aliases.AliasLog, "history", seen_too_early)
    with pytest.raises(StoreError, match="moved meanwhile"):
        registry.roll_back("energies")
    assert registry.get("energies").version == 3


def test_an_alias_can_be_taken_off(registry: ModelRegistry, tmp_path: Path) -> None:
    versions(registry, tmp_path, 2)
    registry.activate("energies@1", reason="first")
    registry.activate("energies@2", reason="better")
    registry.deactivate("energies", reason="both are wrong")
    with pytest.raises(InputError, match="no model energies@active"):
        registry.get("energies")
    assert not any(record.is_active for record in registry.list_models())
    with pytest.raises(InputError, match="no version of 'energies' is 'active'"):
        registry.deactivate("energies", reason="again")
    assert registry.roll_back("energies").version == 2


@pytest.mark.parametrize("alias", ["latest", "7", "", "a b", "a@b"])
def test_an_alias_that_breaks_references_is_refused(
    registry: ModelRegistry, tmp_path: Path, alias: str
) -> None:
    versions(registry, tmp_path, 1)
    with pytest.raises(InputError, match="cannot be an alias"):
        registry.activate("energies@1", alias=alias, reason="r")


@pytest.mark.parametrize(
    "info", [{"mock_targets": True}, {"config": {"mock_targets": True}}]
)
def test_a_model_of_mock_targets_never_becomes_active(
    registry: ModelRegistry, tmp_path: Path, info: dict[str, Any]
) -> None:
    versions(registry, tmp_path, 1, dataset_info=info)
    for alias in ("active", "champion"):
        with pytest.raises(InputError, match="mock targets"):
            registry.activate("energies@1", alias=alias, reason="r")
    assert registry.history("energies") == []


# ------------------------------------------------------------------- system models


def test_system_models_say_that_their_weights_are_missing(
    registry: ModelRegistry, database: Any
) -> None:
    open_database(Launchpad(database))  # again: no second entry
    declared = registry.list_models()
    assert [r.name for r in declared] == sorted(SYSTEM_MODELS)
    for record in declared:
        assert (record.version, record.has_weights) == (0, False)
        assert record.is_system_provided
        assert (record.sha256, record.is_active) == (None, False)
        assert registry.get(record.name) == record
        with pytest.raises(MissingDependencyError, match="nanoos models import-cgcnn"):
            registry.load(record.name)
        with pytest.raises(MissingDependencyError, match="no weights are installed"):
            registry.activate(record.name, reason="r")
        with pytest.raises(MissingDependencyError, match=record.name):
            get_model(record.name, database=database)


def test_a_system_model_is_usable_once_its_weights_are_there(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    (tmp_path / "w").write_bytes(b"w")
    with pytest.raises(InputError, match="for 'bandgap'"):
        register(registry, tmp_path / "w", "k", name="cgcnn_bandgap_v1")
    record = register(
        registry, tmp_path / "w", "k", name="cgcnn_bandgap_v1", target="bandgap"
    )
    assert (record.reference, record.is_system_provided) == ("cgcnn_bandgap_v1@1", True)
    assert registry.get("cgcnn_bandgap_v1") == record
    assert registry.read_weights(record) == b"w"
    registry.activate(record.reference, reason="imported")
    assert registry.get("cgcnn_bandgap_v1").is_active


# ------------------------------------------------------------------- garbage, export


def kept_because(database: Any, **options: Any) -> dict[str, tuple[str, ...]]:
    return {g.reference: g.kept for g in find_garbage(database, **options)}


def test_garbage_is_what_nothing_refers_to(
    registry: ModelRegistry, database: Any, tmp_path: Path
) -> None:
    versions(registry, tmp_path, 8)
    (tmp_path / "w").write_bytes(b"child")
    register(registry, tmp_path / "w", "child", parent="energies@2")
    register(registry, tmp_path / "w", "file", storage="file")
    for version in (3, 4, 5):
        registry.activate(f"energies@{version}", reason="r")
    registry.put_predictions("energies@6", [Prediction("s", 1.0, None, False)])
    CampaignStore(database).create("c", {})
    CampaignStore(database).record("c", model="energies@7")
    register(
        registry, tmp_path / "weights1", "sys", name="cgcnn_bandgap_v1",
        target="bandgap",
    )  # fmt: skip
    kept = kept_because(database)
    assert kept == {
        "energies@1": (),
        "energies@2": ("parent of energies@9",),
        "energies@3": ("rollback of alias 'active'",),
        "energies@4": ("rollback of alias 'active'",),
        "energies@5": ("alias 'active'",),
        "energies@6": ("predictions",),
        "energies@7": ("campaign 'c'",),
        "energies@8": (),
        "energies@9": (),
        "energies@10": ("its weights are a file outside the database",),
        "cgcnn_bandgap_v1@1": ("system-provided",),
    }
    with pytest.raises(InputError, match="must not be negative"):
        find_garbage(database, keep=-1)
    only_one = kept_because(database, keep=1)
    assert (only_one["energies@3"], only_one["energies@4"]) == (
        (),
        ("rollback of alias 'active'",),
    )
    assert len(list(database["artifacts.files"].find())) == 9
    removed = collect_garbage(database)
    assert [g.reference for g in removed] == ["energies@1", "energies@8", "energies@9"]
    # Weights 1 are those of the system model, too.
    assert registry.read_weights(registry.get("cgcnn_bandgap_v1")) == b"weights 1"
    assert {g.reference: g.bytes for g in removed} == {
        "energies@1": 0,
        "energies@8": len(b"weights 8"),
        "energies@9": len(b"child"),
    }
    assert len(list(database["artifacts.files"].find())) == 7
    for record in registry.list_models():
        if record.has_weights:
            registry.read_weights(record)
    assert kept_because(database)["energies@2"] == ()  # its child is gone
    assert [g.reference for g in collect_garbage(database)] == ["energies@2"]
    assert collect_garbage(database) == []


def test_a_removed_version_is_no_other_one_later(
    registry: ModelRegistry, database: Any, tmp_path: Path
) -> None:
    versions(registry, tmp_path, 1)
    collect_garbage(database)
    record = registry.get("energies@1")
    assert record.removed
    with pytest.raises(MissingDependencyError, match="were removed"):
        registry.load("energies@1")
    with pytest.raises(MissingDependencyError, match="were removed"):
        registry.activate("energies@1", reason="r")
    assert registry.find("key1") is None
    again = register(registry, tmp_path / "weights1", "key1")
    assert again.reference == "energies@2"
    assert registry.read_weights(again) == b"weights 1"
    assert not registry.get("energies@1").has_weights


def test_an_alias_that_comes_in_between_saves_the_weights(
    registry: ModelRegistry,
    database: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions(registry, tmp_path, 1)
    look = model_upkeep.find_garbage

    def seen_too_early(*arguments: Any, **options: Any) -> Any:
        found = look(*arguments, **options)
        registry.activate("energies@1", reason="meanwhile")
        return found

    monkeypatch.setattr(model_upkeep, "find_garbage", seen_too_early)
    assert collect_garbage(database) == []
    record = registry.get("energies")
    assert (record.version, record.removed, record.training_key) == (1, None, "key1")
    assert registry.read_weights(record) == b"weights 1"


def test_an_export_holds_weights_record_and_history(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    versions(registry, tmp_path, 1)
    registry.activate("energies@1", reason="first")
    weights, described = export_model(
        registry, registry.get("energies"), tmp_path / "out"
    )
    assert weights.read_bytes() == b"weights 1"
    found = json.loads(described.read_text())
    assert found["alias_history"][0]["reason"] == "first"
    assert ModelRecord(
        **{k: v for k, v in found.items() if k != "alias_history"}
    ) == registry.get("energies")


# ------------------------------------------------------------------ models that work


def crystals() -> list[Any]:
    return [
        build_graph(
            Structure(Lattice.cubic(3 + 0.1 * i), ["Cu", "Al"], [[0] * 3, [0.5] * 3])
        )
        for i in range(8)
    ]


def small_network(path: Path, **changes: Any) -> Path:
    """Write weights of a small network and return where."""
    import torch

    from nanoos_fw.ml.cgcnn import (
        Architecture,
        ModelCard,
        atom_features,
        save_checkpoint,
    )
    from nanoos_fw.ml.network import CrystalGraphNetwork

    torch.manual_seed(0)
    architecture = Architecture(hidden_dim=8, num_layers=1, readout_dim=8)
    network = CrystalGraphNetwork(architecture, atom_features())
    card = ModelCard(
        target_property=TARGET, unit="eV/atom", target_mean=0.0, target_std=1.0,
        n_members=1, architecture=architecture, cutoff_radius=8.0, max_neighbors=12,
        elements=(13, 29), dataset_hash="a" * 40, n_train=7, **changes,
    )  # fmt: skip
    save_checkpoint(path, card, [network.state_dict()], atom_features(), np.zeros(119))
    return path


def test_a_model_comes_back_ready_to_predict(database: Any, tmp_path: Path) -> None:
    path = small_network(tmp_path / "model.safetensors")
    model = CGCNNModel("alloys", TARGET).load_from_checkpoint(path)
    record = register_model(model, path, metrics={"val": {"mae": 1}}, database=database)
    assert (record.reference, record.unit) == ("alloys@1", "eV/atom")
    assert record.dataset_info["dataset_hash"] == "a" * 40
    assert register_model(model, path, database=database) == record
    listed = list_models(target=TARGET, sort="mae", database=database)
    assert listed[0].reference == "alloys@1"
    for reference in ("alloys@1", "alloys@latest", "best:mae"):
        found = get_model(reference, database=database)
        expected = {**model.predict(crystals()[3]), "model_version": "alloys@1"}
        assert found.predict(crystals()[3]) == expected
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InputError, match="does not hold the weights"):
        register_model(model, path, database=database)


@pytest.mark.parametrize("kind", ["network", "forest", "parent", "real"])
def test_weights_say_themselves_that_their_targets_were_made_up(
    registry: ModelRegistry, database: Any, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "weights.safetensors"
    if kind == "forest":
        scalars = graph_scalars(GraphTable.from_graphs(crystals()))
        values = np.linspace(-1.0, 1.0, 8)
        fit_forest(
            scalars, values, n_trees=2, target_property=TARGET, mock_targets=True
        ).save(path)
        record = register(registry, path, "k", name="alloys")
    else:
        path = small_network(path, mock_targets=kind == "network")
        parent = None
        if kind == "parent":
            old = small_network(tmp_path / "old.safetensors", mock_targets=True)
            parent = register(registry, old, "k", name="alloys").reference
        model = CGCNNModel("alloys", TARGET).load_from_checkpoint(path)
        record = register_model(model, path, parent=parent, database=database)
    assert record.has_mock_targets is (kind != "real")
    assert registry.get(record.reference).has_mock_targets is (kind != "real")
    if kind == "real":
        assert b"mock_targets" not in path.read_bytes()
        registry.activate(record.reference, reason="r")
    else:
        with pytest.raises(InputError, match="mock targets"):
            registry.activate(record.reference, reason="r")


@pytest.mark.parametrize("kind", ["network", "forest"])
def test_weights_fitted_to_other_features_are_refused(
    registry: ModelRegistry, tmp_path: Path, kind: str, monkeypatch: Any
) -> None:
    def written(version: int) -> Path:
        monkeypatch.setattr("nanoos_fw.ml.forest_fitting.FEATURE_VERSION", version)
        path = tmp_path / f"{version}.safetensors"
        if kind == "network":
            return small_network(path, feature_version=version)
        scalars = graph_scalars(GraphTable.from_graphs(crystals()))
        fit_forest(
            scalars, np.linspace(-1.0, 1.0, 8), n_trees=2, target_property=TARGET
        ).save(path)
        return path

    types = {"network": "CGCNN", "forest": "RandomForest"}
    for version in (1, 2):
        register(
            registry, written(version), str(version), name="m", model_type=types[kind]
        )
    # Files of the first version have the bytes that they had before.
    assert b"feature_version" not in (tmp_path / "1.safetensors").read_bytes()
    assert registry.load("m@1").predict_many(crystals())
    with pytest.raises(InputError, match="version 2, this program makes version 1"):
        registry.load("m@2")
    monkeypatch.setattr("nanoos_fw.ml.weight_files.FEATURE_VERSION", 2)
    assert registry.load("m@2").predict_many(crystals())
    with pytest.raises(InputError, match="version 1, this program makes version 2"):
        registry.load("m@1")


def test_a_forest_comes_back_ready_to_predict(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    table = GraphTable.from_graphs(crystals())
    forest = fit_forest(
        graph_scalars(table),
        np.linspace(-1.0, 1.0, 8),
        n_trees=5,
        target_property=TARGET,
    )
    path = tmp_path / "forest.safetensors"
    forest.save(path)
    register(registry, path, "k", name="forest", model_type="RandomForest")
    found = registry.load("forest@1")
    np.testing.assert_array_equal(
        found.predict_many(crystals())[0], forest.predict_many(crystals())[0]
    )
    full = found.predict_full(crystals())
    assert full.half_width is None
    np.testing.assert_array_equal(full.std, forest.predict_many(crystals())[1])


# ---------------------------------------------------------------------------- races

_RACER = """
import sys
from pathlib import Path
import pymongo
from nanoos_fw.stores.models import ModelRegistry
uri, name, weights, number = sys.argv[1:]
registry = ModelRegistry(pymongo.MongoClient(uri)[name])
print("ready", flush=True)
sys.stdin.readline()
done = []
for turn in range(4):
    record = registry.register(
        name="energies", target="t", unit="eV", model_type="CGCNN",
        weights=Path(weights), training_key=f"{number}-{turn}", training_config={},
        metrics={}, dataset_info={}, environment={},
    )
    shared = registry.register(
        name="energies", target="t", unit="eV", model_type="CGCNN",
        weights=Path(weights), training_key=f"shared-{turn}", training_config={},
        metrics={}, dataset_info={}, environment={},
    )
    registry.activate(record.reference, reason=f"process {number}, turn {turn}")
    done.append((record.version, shared.version))
print(done)
"""


@pytest.mark.mongodb
def test_the_index_decides_races_between_processes(
    mongodb_database: Any, tmp_path: Path
) -> None:
    import ast
    import os

    ensure_indexes(mongodb_database)
    weights = tmp_path / "w"
    weights.write_bytes(b"w")
    uri = os.environ["NANO_OS_TEST_MONGODB_URI"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, uri, mongodb_database.name, str(weights),
             str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(8)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8
    pairs = [ast.literal_eval(output) for output in outputs]
    own = [version for rows in pairs for version, _ in rows]
    shared = [{rows[turn][1] for rows in pairs} for turn in range(4)]
    assert all(len(found) == 1 for found in shared)  # one version per training
    everything = sorted([*own, *(version for found in shared for version in found)])
    assert everything == list(range(1, 8 * 4 + 4 + 1))  # no gap, none twice
    registry = ModelRegistry(mongodb_database)
    assert len(registry.list_models(name="energies")) == 36
    moves = registry.history("energies", "active")
    assert [m.sequence for m in moves] == list(range(1, 33))
    assert sorted(m.version for m in moves) == sorted(own)
    assert len({m.reason for m in moves}) == 32
    assert mongodb_database["artifacts.files"].count_documents({}) == 1


@pytest.mark.mongodb
def test_the_index_decides_races_between_threads(
    mongodb_database: Any, tmp_path: Path
) -> None:
    ensure_indexes(mongodb_database)
    registry = ModelRegistry(mongodb_database)
    (tmp_path / "w").write_bytes(b"w")
    # Two trainings, each registered by four workers at once.
    keys = ["k1", "k2"] * 4
    references: list[str] = []
    threads = [
        threading.Thread(
            target=lambda key=key: references.append(
                register(registry, tmp_path / "w", key).reference
            )
        )
        for key in keys
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(references) == ["energies@1"] * 4 + ["energies@2"] * 4
    assert mongodb_database["models"].count_documents({}) == 2
    assert mongodb_database["artifacts.files"].count_documents({}) == 1


# ---------------------------------------------------------------------- predictions


def test_a_prediction_is_written_once(registry: ModelRegistry) -> None:
    rows = [
        Prediction("s", -0.1, 0.02, False, 0.05, 0.9, 0.4),
        Prediction("t", 0.3, None, True),
    ]
    assert registry.put_predictions("m@1", rows) == 2
    assert (
        registry.put_predictions("m@1", [*rows, Prediction("u", 0.0, 0.1, False)]) == 1
    )
    assert registry.put_predictions("m@2", rows) == 2
    assert registry.predictions("m@1", ["t", "s", "x"]) == [rows[1], rows[0]]
    assert registry.put_predictions("m@1", []) == 0
    assert registry.n_predictions("m@1") == 3


def test_predictions_from_other_features_are_not_seen(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = Prediction("s", -0.1, None, False), Prediction("s", -0.2, None, False)
    assert registry.put_predictions("m@1", [old]) == 1
    monkeypatch.setattr("nanoos_fw.ml.features.FEATURE_VERSION", 2)
    assert registry.predictions("m@1", ["s"]) == []
    assert registry.put_predictions("m@1", [new]) == 1
    assert registry.predictions("m@1", ["s"]) == [new]
    assert registry.n_predictions("m@1") == 1
    monkeypatch.setattr("nanoos_fw.ml.features.FEATURE_VERSION", 1)
    assert registry.predictions("m@1", ["s"]) == [old]


def test_a_prediction_of_an_older_release_has_no_interval(
    registry: ModelRegistry, database: Any
) -> None:
    database["predictions"].insert_one(
        {"model": "m@1", "structure": "s", "prediction": 1.0, "uncertainty": None,
         "out_of_domain": False}
    )  # fmt: skip
    assert registry.predictions("m@1", ["s"]) == [Prediction("s", 1.0, None, False)]
