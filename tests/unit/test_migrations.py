"""Migrations up and down, on the in-memory database and on a server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nanoos_fw.errors import InputError, StoreError
from nanoos_fw.stores import migrations
from nanoos_fw.stores.database import (
    SCHEMA_VERSION,
    get_artifact,
    open_database,
    put_artifact,
    schema_version,
    set_schema_version,
)
from nanoos_fw.stores.features import Features, FeatureStore
from nanoos_fw.stores.migrations import MIGRATIONS, database_status, migrate
from nanoos_fw.stores.models import ModelRegistry

PARAMETERS = {"cutoff_radius": 8.0}


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
    return request.getfixturevalue(request.param)


def old_database(database: Any) -> None:
    """As the first release left it."""
    key = {"parameters": "p", "version": 1}
    database["structure_features"].create_index(
        [("structure", 1), ("parameters", 1), ("version", 1)], unique=True
    )
    database["structure_features"].insert_many(
        [
            {"structure": "a", **key, "status": "ok", "graph": b"four", "sha256": "x",
             "scalars": {"n": 1.0}, "error": None},
            {"structure": "b", **key, "status": "quarantined", "graph": None,
             "sha256": None, "scalars": None, "error": {"message": "m"}},
        ]
    )  # fmt: skip
    set_schema_version(database, 1)


def content(database: Any) -> list[dict[str, Any]]:
    documents = database["structure_features"].find({}, {"_id": 0})
    return sorted((dict(d) for d in documents), key=lambda d: str(d["structure"]))


def index_fields(database: Any) -> set[tuple[str, ...]]:
    information = database["structure_features"].index_information()
    return {tuple(n for n, _ in index["key"]) for index in information.values()}


def test_there_is_one_step_for_each_version() -> None:
    assert [m.version for m in MIGRATIONS] == list(range(2, SCHEMA_VERSION + 1))


def test_up_and_down_give_back_what_was_there(database: Any) -> None:
    old_database(database)
    before, indexes = content(database), index_fields(database)
    (step,) = migrate(database, target=2)
    assert (step.source, step.target, step.documents) == (1, 2, 2)
    assert schema_version(database) == 2
    after = {d["structure"]: d for d in content(database)}
    assert (after["a"]["size"], after["b"]["size"]) == (4, 0)
    assert after["a"]["artifact"] is False
    assert ("version",) in index_fields(database)
    assert migrate(database, target=2) == []
    (step,) = migrate(database, target=1)
    assert (step.source, step.target, step.documents) == (2, 1, 2)
    assert (content(database), index_fields(database)) == (before, indexes)
    assert schema_version(database) == 1


def test_a_dry_run_changes_nothing(database: Any) -> None:
    old_database(database)
    before, indexes = content(database), index_fields(database)
    (step,) = migrate(database, target=2, dry_run=True)
    assert step.documents == 2
    assert (content(database), index_fields(database)) == (before, indexes)
    assert schema_version(database) == 1


def test_a_step_that_was_killed_is_finished(
    database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_database(database)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(migrations, "set_schema_version", killed)
        with pytest.raises(KeyboardInterrupt):
            migrate(database, target=2)
    assert schema_version(database) == 1
    (step,) = migrate(database, target=2)
    assert (step.documents, schema_version(database)) == (0, 2)


def test_a_graph_in_the_artifacts_comes_back_on_the_way_down(database: Any) -> None:
    open_database(Launchpad(database))
    store = FeatureStore(database, max_inline_bytes=100)
    graph = os.urandom(1000)
    store.put([Features("large", graph, {})], {}, PARAMETERS, 1)
    migrate(database, target=1)
    (document,) = content(database)
    assert bytes(document["graph"]) == graph
    assert "artifact" not in document
    migrate(database)
    assert FeatureStore(database).get(["large"], PARAMETERS, 1)["large"].graph == graph


def test_a_graph_too_large_for_the_old_schema_is_left_out(
    database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "_MAX_INLINE_BYTES", 500)
    open_database(Launchpad(database))
    store = FeatureStore(database, max_inline_bytes=100)
    store.put([Features("large", os.urandom(1000), {})], {}, PARAMETERS, 1)
    migrate(database, target=1)
    assert content(database) == []


def models_of_schema_2(database: Any) -> list[dict[str, Any]]:
    """As the release with schema 2 left them."""
    common = {
        "target": "energy", "unit": "eV", "model_type": "CGCNN", "checkpoint_path": "p",
        "training_config": {}, "metrics": {}, "dataset_info": {}, "environment": {},
        "details": None, "parent": None, "is_system_provided": False, "created": "t",
    }  # fmt: skip
    documents = []
    for version, data in enumerate((b"one", b"two"), start=1):
        digest = put_artifact(database, data)
        key = {"name": "m", "version": version, "training_key": f"k{version}"}
        documents.append({"_id": f"m@{version}", "sha256": digest, **key, **common})
    database["models"].insert_many([dict(document) for document in documents])
    database["model_aliases"].insert_one(
        {"name": "m", "alias": "active", "sequence": 1, "version": 2, "reason": "r",
         "by": "somebody", "time": "t"}
    )  # fmt: skip
    set_schema_version(database, 2)
    return documents


def test_models_of_an_older_release_are_there_after_the_migration(
    database: Any,
) -> None:
    before = models_of_schema_2(database)
    (planned,) = migrate(database, target=3, dry_run=True)
    assert planned.documents == 2
    assert list(database["models"].find().sort("_id", 1)) == before
    (step,) = migrate(database, target=3)
    assert (step.source, step.target, step.documents) == (2, 3, 2)
    registry = ModelRegistry(database)
    record = registry.get("m")
    assert (record.reference, record.is_active, record.storage) == (
        "m@2",
        True,
        "gridfs",
    )
    assert registry.read_weights(record) == b"two"
    assert registry.history("m")[0].by == "somebody"
    declared = [r.name for r in registry.list_models() if r.is_system_provided]
    assert declared == ["cgcnn_bandgap_v1", "cgcnn_formation_energy_v1"]
    (step,) = migrate(database, target=2)
    assert step.documents == 4
    assert list(database["models"].find().sort("_id", 1)) == before


def test_weights_in_files_go_into_the_database_on_the_way_down(
    database: Any, tmp_path: Path
) -> None:
    open_database(Launchpad(database))
    path = tmp_path / "weights"
    path.write_bytes(b"in a file")
    ModelRegistry(database).register(
        name="m", target="energy", unit="eV", model_type="CGCNN", weights=path,
        training_key="k", training_config={}, metrics={}, dataset_info={},
        environment={}, storage="file",
    )  # fmt: skip
    migrate(database, target=2)
    (document,) = database["models"].find()
    assert get_artifact(database, document["sha256"]) == b"in a file"
    assert "storage" not in document


def test_an_older_schema_is_refused_with_the_next_step(database: Any) -> None:
    old_database(database)
    with pytest.raises(StoreError, match="nanoos db migrate"):
        open_database(Launchpad(database))
    migrate(database)
    open_database(Launchpad(database))


def test_what_cannot_be_migrated_is_refused(database: Any) -> None:
    with pytest.raises(InputError, match="no schema 0"):
        migrate(database, target=0)
    set_schema_version(database, SCHEMA_VERSION + 1)
    with pytest.raises(StoreError, match="release that made it"):
        migrate(database)


def test_the_status_names_steps_and_missing_indexes(database: Any) -> None:
    put_artifact(database, b"x")
    assert database_status(database)["schema"] is None
    old_database(database)
    status = database_status(database)
    assert (status["schema"], status["known_schema"]) == (1, SCHEMA_VERSION)
    assert [step["documents"] for step in status["pending"]] == [2, 0]
    assert "structure_features(version)" in status["missing_indexes"]
    assert status["documents"]["structure_features"] == 2
    migrate(database)
    status = database_status(database)
    assert (status["pending"], status["missing_indexes"]) == ([], [])
