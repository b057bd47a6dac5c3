"""``nanoos models`` from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanoos_fw.cli import main
from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.models import ModelRegistry

TARGET = "formation_energy_per_atom"


class Launchpad:
    def __init__(self, db: Any) -> None:
        self.db = db


class Nanoos:
    """Runs commands on a server's database, in this process."""

    def __init__(self, launchpad: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.launchpad, self.capsys = str(launchpad), capsys

    def text(self, *words: str, code: int = 0) -> str:
        assert main(["models", *words, "-l", self.launchpad]) == code
        out, err = self.capsys.readouterr()
        assert (err == "") == (code == 0 or bool(out))
        return out or err

    def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(self.text(*words, "--json", code=code))


@pytest.fixture
def registry(mongodb_database: Any, tmp_path: Path) -> ModelRegistry:
    found = ModelRegistry(open_database(Launchpad(mongodb_database)))
    for number, mae in ((1, 0.3), (2, 0.1), (3, 0.2)):
        weights = tmp_path / f"w{number}"
        weights.write_bytes(b"weights " + bytes([number]))
        found.register(
            name="energies",
            target=TARGET,
            unit="eV/atom",
            model_type="CGCNN",
            weights=weights,
            training_key=f"key{number}",
            training_config={"epochs": number},
            metrics={"val": {"mae": mae, "r2": 1 - mae}, "test": {"mae": 2 * mae}},
            dataset_info={"dataset_hash": "d" * 40},
            environment={},
        )
    return found


@pytest.fixture
def nanoos(
    registry: ModelRegistry,
    mongodb_database: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Nanoos:
    launchpad = tmp_path / "my_launchpad.yaml"
    uri = os.environ["NANO_OS_TEST_MONGODB_URI"].rstrip("/")
    launchpad.write_text(
        f"host: {uri}/{mongodb_database.name}\nname: {mongodb_database.name}\n"
        "uri_mode: true\n"
    )
    return Nanoos(launchpad, capsys)


@pytest.mark.mongodb
def test_models_are_listed_and_sorted_by_a_metric(nanoos: Nanoos) -> None:
    found = nanoos.json("list", "--sort", "mae")
    assert [row["version"] for row in found[:3]] == [2, 3, 1]
    assert {row["name"] for row in found[3:]} == {
        "cgcnn_bandgap_v1",
        "cgcnn_formation_energy_v1",
    }
    assert [row["version"] for row in nanoos.json("list", "--name", "energies")] == [
        1,
        2,
        3,
    ]
    text = nanoos.text("list", "--sort", "mae", "--part", "test")
    assert text.splitlines()[0].split()[:1] == ["energies@2"]
    assert "test mae 0.2000 eV/atom" in text
    assert "no weights installed" in text
    assert nanoos.json("list", "--target", "bandgap")[0]["sha256"] is None


@pytest.mark.mongodb
def test_an_alias_moves_back_in_one_command(nanoos: Nanoos) -> None:
    nanoos.text("activate", "energies@1", "--reason", "first")
    moved = nanoos.json("activate", "best:mae", "--reason", "lowest error")
    assert moved == {"name": "energies", "alias": "active", "model": "energies@2"}
    assert nanoos.text("list").splitlines()[3].startswith("* energies@2")
    assert "energies@active is energies@1" in nanoos.text("rollback", "energies")
    shown = nanoos.json("show", "energies")
    assert (shown["version"], shown["predictions"]) == (1, 0)
    assert [m["version"] for m in shown["alias_history"]] == [1, 2, 1]
    assert "lowest error" in nanoos.text("show", "energies@latest")
    assert "no model any more" in nanoos.text(
        "deactivate", "energies", "--reason", "wrong"
    )
    assert "energies@active" in nanoos.text("show", "energies", code=1)


@pytest.mark.mongodb
def test_versions_are_compared(nanoos: Nanoos) -> None:
    found = nanoos.json("compare", "energies@1", "energies@2", "energies@3")
    assert [r["model"] for r in found["models"]] == [f"energies@{n}" for n in (2, 3, 1)]
    assert found["differences"] == {"epochs": [2, 3, 1]}
    text = nanoos.text("compare", "energies@1", "energies@2")
    assert text.splitlines()[0].startswith("energies@2  val mae 0.1000")
    assert "differs     epochs: 2, 1" in text


@pytest.mark.mongodb
def test_garbage_stays_without_yes(nanoos: Nanoos, registry: ModelRegistry) -> None:
    nanoos.text("activate", "energies@2", "--reason", "r")
    for words in (("gc",), ("gc", "--dry-run")):
        found = nanoos.json(*words)
        assert found["dry_run"]
        assert {m["model"] if "model" in m else m["reference"]: bool(m["kept"])
                for m in found["models"]} == {
            "energies@1": False, "energies@2": True, "energies@3": False,
        }  # fmt: skip
        assert all(r.has_weights for r in registry.list_models(name="energies"))
    assert "would remove energies@1: 9 bytes" in nanoos.text("gc")
    assert "18 bytes freed" in nanoos.text("gc", "--yes")
    assert [r.has_weights for r in registry.list_models(name="energies")] == [
        False,
        True,
        False,
    ]
    assert "weights removed" in nanoos.text("list")


@pytest.mark.mongodb
def test_weights_are_exported_and_verified(
    nanoos: Nanoos, mongodb_database: Any, tmp_path: Path
) -> None:
    found = nanoos.json("export", "energies@2", "-o", str(tmp_path / "out"))
    assert Path(found["files"][0]).read_bytes() == b"weights \x02"
    checks = nanoos.json("verify")
    assert {c["status"] for c in checks} == {"ok", "no weights"}
    mongodb_database["artifacts.chunks"].update_one(
        {"data": b"weights \x02"}, {"$set": {"data": b"weights!\x02"}}
    )
    assert "energies@2" in nanoos.text("verify", code=1)
    assert nanoos.json("verify", "energies@1")[0]["status"] == "ok"
    assert "fails its checksum" in nanoos.text(
        "export", "energies@2", "-o", str(tmp_path / "bad"), code=1
    )
    assert not (tmp_path / "bad" / "model.json").exists()


@pytest.mark.mongodb
def test_a_system_model_says_what_to_do(nanoos: Nanoos, tmp_path: Path) -> None:
    text = nanoos.text("show", "cgcnn_bandgap_v1")
    assert "no weights installed" in text
    assert "nanoos models import-cgcnn" in text
    for words in (
        ("export", "cgcnn_bandgap_v1", "-o", str(tmp_path / "out")),
        ("activate", "cgcnn_bandgap_v1", "--reason", "r"),
    ):
        message = nanoos.text(*words, code=1)
        assert "no weights are installed" in message
        assert "--target bandgap" in message


def test_the_embedded_database_keeps_what_was_done(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "database.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "nanoos_fw.cli", "models", "list", "--json", "-l", "db"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert [row["name"] for row in json.loads(done.stdout)] == [
        "cgcnn_bandgap_v1",
        "cgcnn_formation_energy_v1",
    ]
