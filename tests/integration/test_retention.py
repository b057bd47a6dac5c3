"""Waste and what is not, on a real server, with processes that come in between."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from fireworks import Firework, FWorker, PyTask, Workflow
from fireworks.core.launchpad import LaunchPad
from fireworks.core.rocket_launcher import rapidfire

from nanoos_fw.cli import main
from nanoos_fw.errors import InputError, StoreError
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.operations import prepare_launchpad, quiet_fireworks, retention, submit
from nanoos_fw.operations.archives import archive
from nanoos_fw.operations.retention import collect_waste, journal
from nanoos_fw.stores import artifact_upkeep
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import get_artifact, open_database, put_artifact

pytestmark = pytest.mark.mongodb

OLD = timedelta(days=30)
OLD_ID = ObjectId.from_datetime(datetime.now(UTC) - OLD)


@pytest.fixture
def launchpad(mongodb_database: Any) -> Any:
    uri = os.environ["NANO_OS_TEST_MONGODB_URI"]
    found = LaunchPad(
        host=uri, name=mongodb_database.name, uri_mode=True, strm_lvl="CRITICAL"
    )
    prepare_launchpad(found)
    open_database(found)
    quiet_fireworks()
    yield found
    found.connection.close()


def aged(database: Any) -> None:
    """Let all artifacts be of last month."""
    past = datetime.now(UTC) - OLD
    database["artifacts.files"].update_many(
        {}, {"$set": {"uploadDate": past}, "$unset": {"touched": ""}}
    )


REFERRING: dict[str, Callable[[str], dict[str, Any]]] = {
    "models": lambda digest: {"sha256": digest, "removed": None},
    "simulations": lambda digest: {"result": {"analyses": {"rdf": [digest, 1.5]}}},
    "structure_features": lambda digest: {
        "structure": digest[:8], "parameters": "p", "version": FEATURE_VERSION,
        "artifact": True, "sha256": digest,
    },
    "screens": lambda digest: {"known_digest": digest},
    "fireworks": lambda digest: {"fw_id": 1, "spec": {"_tasks": [{"data": digest}]}},
    "something new": lambda digest: {"list": [{"deep": f"gridfs:{digest}"}]},
}  # fmt: skip


def test_only_old_artifacts_without_any_reference_go(launchpad: Any) -> None:
    database = launchpad.db
    kept = {name: put_artifact(database, name.encode()) for name in REFERRING}
    for name, digest in kept.items():
        database[name].insert_one({"_id": f"of {name}", **REFERRING[name](digest)})
    past = (datetime.now(UTC) - OLD).isoformat()
    orphan = put_artifact(database, b"orphan" * 100_000)
    tombstone = put_artifact(database, b"weights removed")
    database["models"].insert_one(
        {"sha256": tombstone, "removed": past, "training_key": "t", "name": "gone"}
    )
    aged(database)
    young = put_artifact(database, b"its document comes in a moment")
    database["artifacts.chunks"].insert_one({"files_id": OLD_ID, "n": 0, "data": b"x"})
    before = {name: database[name].count_documents({}) for name in REFERRING}

    found = collect_waste(database)

    assert {entry.what for entry in found.waste} == {orphan, tombstone, str(OLD_ID)}
    assert found.batch is None
    assert journal(database) == []
    assert get_artifact(database, orphan) == b"orphan" * 100_000

    removed = collect_waste(database, remove=True)

    assert [e.what for e in removed.waste] == [e.what for e in found.waste]
    assert removed.bytes == found.bytes > 600_000
    for digest in (*kept.values(), young):
        get_artifact(database, digest)
    with pytest.raises(StoreError, match="'nanoos gc' removed it"):
        get_artifact(database, orphan)
    assert database["artifacts.chunks"].count_documents({}) == len(kept) + 1
    after = {name: database[name].count_documents({}) for name in REFERRING}
    assert after == before
    (batch,) = journal(database)
    assert batch["kinds"] == {"artifacts": 2, "parts": 1}
    assert collect_waste(database, remove=True).waste == []


def test_an_artifact_that_is_stored_again_meanwhile_stays(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finds the old bytes there, and its document comes a bit later."""
    database = launchpad.db
    wanted, other = (put_artifact(database, text) for text in (b"wanted", b"other"))
    aged(database)

    def looked(*arguments: Any) -> dict[str, int]:
        found = artifact_upkeep.unreferenced(*arguments)
        assert put_artifact(database, b"wanted") == wanted
        return found

    monkeypatch.setattr(retention, "unreferenced", looked)
    found = collect_waste(database, remove=True)

    assert [entry.what for entry in found.waste] == [other]
    assert get_artifact(database, wanted) == b"wanted"
    assert database["gc_journal"].count_documents({}) == 1


def test_two_collections_at_once_remove_each_thing_once(launchpad: Any) -> None:
    database = launchpad.db
    digests = {put_artifact(database, bytes([n] * 50)) for n in range(24)}
    aged(database)
    gate = threading.Barrier(3)
    reports: list[Any] = []

    def collect() -> None:
        gate.wait()
        reports.append(collect_waste(database, remove=True))

    threads = [threading.Thread(target=collect) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    removed = [entry.what for report in reports for entry in report.waste]
    assert sorted(removed) == sorted(digests)
    assert database["artifacts.files"].count_documents({}) == 0
    assert database["artifacts.chunks"].count_documents({}) == 0
    assert sum(batch["kinds"]["artifacts"] for batch in journal(database)) == 24


def test_features_of_older_versions_go(launchpad: Any) -> None:
    past, now = ((datetime.now(UTC) - age).isoformat() for age in (OLD, timedelta(0)))
    large = put_artifact(launchpad.db, b"a large graph")
    rows = [
        ("old", FEATURE_VERSION - 1, past), ("large", FEATURE_VERSION - 1, past),
        ("young", FEATURE_VERSION - 1, now), ("current", FEATURE_VERSION, past),
        ("newer release", FEATURE_VERSION + 1, past),
    ]  # fmt: skip
    launchpad.db["structure_features"].insert_many(
        {
            "structure": name, "parameters": "p", "version": version, "computed": when,
            "size": 70, "artifact": name == "large",
            "sha256": large if name == "large" else None,
        }
        for name, version, when in rows
    )  # fmt: skip
    aged(launchpad.db)

    (found,) = collect_waste(launchpad.db, remove=True).waste

    assert (found.kind, found.items, found.bytes) == ("features", 2, 140)
    left = launchpad.db["structure_features"].distinct("structure")
    assert sorted(left) == ["current", "newer release", "young"]
    (artifact,) = collect_waste(launchpad.db, remove=True).waste
    assert artifact.what == large


# ------------------------------------------------------------------ launch directories


@pytest.fixture
def archived(
    launchpad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Path]:
    """Launch directories of a campaign that was run and archived a month ago."""
    monkeypatch.chdir(tmp_path)
    CampaignStore(launchpad.db).create("c", {})
    spec = {"nanoos": {"campaign": "c", "stage": "s", "order": 0}}
    for number in range(4):
        firework = Firework([PyTask(func="os.getcwd")], spec=spec, name=f"f{number}")
        submit(launchpad, Workflow([firework], metadata={"key": f"k{number}"}))
    rapidfire(launchpad, FWorker(), strm_lvl="CRITICAL")
    found = sorted(Path(d) for d in launchpad.launches.distinct("launch_dir"))
    assert len(found) == 4
    for path in found:
        (path / "output.txt").write_text("x" * 1000)
        for entry in (path / "output.txt", path / "FW.json", path):
            past = (datetime.now(UTC) - OLD).timestamp()
            os.utime(entry, (past, past))
    archive(launchpad, "c", tmp_path / "c.jsonl.gz")
    past = (datetime.now(UTC) - OLD).isoformat()
    launchpad.db["campaigns"].update_one({"_id": "c"}, {"$set": {"archive.time": past}})
    return found


def test_launch_directories_of_archives_go_unless_something_is_in_use(
    launchpad: Any, archived: list[Path], tmp_path: Path
) -> None:
    free, with_result, of_a_launch, young = archived
    database = launchpad.db
    database["simulations"].insert_one(
        {"_id": "s", "files": {"output_dir": str(with_result / "md" / "output")}}
    )
    launchpad.launches.insert_one({"launch_id": 99, "launch_dir": str(of_a_launch)})
    (young / "notes.txt").write_text("of today")
    (tmp_path / "launcher_1").mkdir()  # of nobody's archive

    found = collect_waste(database)

    (waste,) = found.waste
    assert (waste.what, waste.kind) == (str(free), "launches")
    assert waste.bytes > 1000
    assert "archived" in waste.why
    assert {entry.what: entry.why for entry in found.kept} == {
        str(with_result): "results that are in use are in it",
        str(of_a_launch): "a launch in the launchpad uses it",
        str(young): "a file in it is younger",
    }
    assert all(path.is_dir() for path in archived)

    removed = collect_waste(database, remove=True)

    assert removed.waste == [waste]
    assert not free.exists()
    assert all(path.is_dir() for path in (with_result, of_a_launch, young))
    assert (tmp_path / "launcher_1").is_dir()
    assert list(tmp_path.glob(".nanoos-gc-*")) == []


def test_a_removal_that_was_killed_is_finished(
    launchpad: Any, archived: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_arguments: Any, **_options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", kill)
        with pytest.raises(Killed):
            collect_waste(launchpad.db, remove=True)
    (half,) = archived[0].parent.glob(".nanoos-gc-*")

    found = collect_waste(launchpad.db, remove=True)

    assert not half.exists()
    assert len(found.waste) == 3
    states = launchpad.db["gc_journal"].distinct("state")
    assert states == ["removed"]


def test_an_archive_that_was_changed_names_nothing(
    launchpad: Any, archived: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "c.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-1])
    found = collect_waste(launchpad.db, remove=True)
    assert found.waste == []
    assert "is not what was archived" in found.kept[0].why
    assert all(path.is_dir() for path in archived)


def test_the_command_changes_nothing_without_being_told(
    launchpad: Any, archived: list[Path], my_launchpad: Path, capsys: Any
) -> None:
    words = ["gc", "-l", str(my_launchpad)]
    assert main(words) == 0
    assert "4 launches" in capsys.readouterr().out
    assert all(path.is_dir() for path in archived)
    assert main([*words, "--only", "launches", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] is False
    assert not any(path.exists() for path in archived)
    assert main([*words, "--journal"]) == 0
    assert "4 launches" in capsys.readouterr().out
    with pytest.raises(InputError, match="too low"):
        collect_waste(launchpad.db, older_than=timedelta(minutes=5))
    with pytest.raises(InputError, match="no kind of waste weights"):
        collect_waste(launchpad.db, kinds=["weights"])
