"""A database that goes away in the middle of a launch, at the worst moments."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from database_proxy import DatabaseProxy, Moment, Trap
from fireworks import Firework, PyTask, Workflow
from fireworks.core.fworker import FWorker
from fireworks.core.launchpad import LaunchPad
from fireworks.core.rocket_launcher import launch_rocket
from processes import HANGING_S, wait_for
from pymongo.errors import AutoReconnect, ServerSelectionTimeoutError

from nanoos_fw import operations
from nanoos_fw.firetasks import FeaturizeStructuresTask
from nanoos_fw.operations.cluster_files import launchpad_text
from nanoos_fw.stores.database import get_artifact, open_database, put_artifact
from nanoos_fw.stores.outages import outlast_outages
from nanoos_fw.stores.structures import NewStructure, StructureStore

pytestmark = pytest.mark.mongodb

AWAY_S = 0.7


@pytest.fixture
def launchpad(mongodb_database: Any, proxy: DatabaseProxy) -> Iterator[Any]:
    found = LaunchPad(
        host="127.0.0.1",
        port=proxy.port,
        name=mongodb_database.name,
        strm_lvl="CRITICAL",
        mongoclient_kwargs={"serverSelectionTimeoutMS": 500},
    )
    found.reset("", require_password=False)
    yield found
    for thread in threading.enumerate():  # FireWorks does not wait for its own
        if "ping_launch" in thread.name:
            thread.join(timeout=30)
    found.connection.close()


def cut_at(proxy: DatabaseProxy, trap: Trap, seconds: float = AWAY_S) -> None:
    """Cut the connection when the trap is hit, and restore it after some time."""
    proxy.set_trap(trap)

    def run() -> None:
        trap.hit.wait()
        proxy.cut()
        threading.Event().wait(seconds)
        proxy.restore()

    threading.Thread(target=run, daemon=True).start()


# The result of the task; the end of the launch; the workflow that hears of it; its lock
# (FireWorks takes it twice: at the start of the launch, and at its end).
WRITES = {
    "result": ("structure_features", 1),
    "launch": ("launches", 4),
    "firework": ("fireworks", 2),
    "lock": ("workflows", 4),
}


@pytest.mark.parametrize(
    ("write", "moment"),
    [
        ("result", "before"),
        ("result", "after"),
        *((write, "during") for write in WRITES),
    ],
)
def test_an_outage_costs_a_launch_nothing(
    write: str,
    moment: Moment,
    launchpad: Any,
    proxy: DatabaseProxy,
    copper: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database = open_database(launchpad)
    keys = (
        StructureStore(database)
        .add([NewStructure(structure=copper, label="Cu")], in_set="all")
        .keys
    )
    firework = Firework(
        FeaturizeStructuresTask(structures=list(keys)),
        spec={"_add_launchpad_and_fw_id": True},
    )
    (fw_id,) = launchpad.add_wf(Workflow([firework])).values()
    child = Firework(
        FeaturizeStructuresTask(structures=list(keys)),
        spec={"_add_launchpad_and_fw_id": True},
    )
    launchpad.append_wf(Workflow([child]), [fw_id])
    collection, nth = WRITES[write]
    # Only what follows the beginning of the task: until then FireWorks is on its own.
    outlast_outages(launchpad, 60)
    trap = Trap(collection, moment, nth)
    cut_at(proxy, trap)
    monkeypatch.chdir(tmp_path)

    assert launch_rocket(launchpad, FWorker(), strm_lvl="CRITICAL")

    assert trap.hit.is_set(), proxy.commands
    proxy.restore()
    assert launchpad.get_fw_by_id(fw_id).state == "COMPLETED"
    (launch,) = launchpad.launches.find()
    assert launch["state"] == "COMPLETED"
    assert launchpad.workflows.count_documents({"locked": {"$exists": True}}) == 0
    assert launchpad.workflows.find_one()["fw_states"][str(fw_id)] == "COMPLETED"
    assert launchpad.fireworks.count_documents({"state": "READY"}) == 1
    assert database["structure_features"].count_documents({}) == 1


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("part", ["artifacts.chunks", "artifacts.files"])
def test_an_artifact_is_whole_when_the_answer_to_a_part_gets_lost(
    part: str, moment: Moment, launchpad: Any, proxy: DatabaseProxy
) -> None:
    database = open_database(launchpad)
    outlast_outages(launchpad, 60)
    data = os.urandom(600_000)
    cut_at(proxy, Trap(part, moment))

    digest = put_artifact(database, data)

    assert get_artifact(database, digest) == data
    assert database["artifacts.files"].count_documents({}) == 1


def test_a_server_that_stays_away_is_an_error_in_the_end(
    launchpad: Any, proxy: DatabaseProxy
) -> None:
    pauses: list[float] = []
    outlast_outages(launchpad, 3, sleep=pauses.append)
    proxy.cut()

    with pytest.raises(ServerSelectionTimeoutError):
        launchpad.fireworks.find_one()

    assert pauses


# ------------------------------------------------- launchers, from their first question


@pytest.fixture
def file(launchpad: Any, proxy: DatabaseProxy, tmp_path: Path) -> Path:
    """my_launchpad.yaml that goes through the proxy, and one ready firework."""
    path = tmp_path / "my_launchpad.yaml"
    uri = f"mongodb://127.0.0.1:{proxy.port}/?serverSelectionTimeoutMS=200"
    path.write_text(launchpad_text(uri, launchpad.name))
    operations.prepare_launchpad(launchpad)
    launchpad.add_wf(Firework([PyTask(func="os.getcwd")], name="one"))
    return path


def start(
    command: list[str], folder: Path, **environment: str
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a launcher; return it and the file of what it says."""
    log = folder / "launcher.log"
    with log.open("wb") as stream:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    return child, log


def waits(folder: Path) -> bool:
    """Tell whether a log says that its program waits for the database."""
    logs = [folder / "launcher.log", *folder.glob("work/*/slot-*.log")]
    said = "".join(log.read_text() for log in logs)
    return "the database is away" in said or "; try 1, again" in said


RLAUNCH = [sys.executable, "-m", "nanoos_fw.rlaunch", "-l", "{}", "rapidfire"]
WORK = [sys.executable, "-m", "nanoos_fw.cli", "work", "-l", "{}", "--idle", "0.5"]


@pytest.mark.parametrize(
    ("words", "trap"),
    [
        (RLAUNCH, None),
        (RLAUNCH, Trap("fireworks", "before", 1)),  # the checkout
        (RLAUNCH, Trap("launches", "during", 1)),  # its second write
        (WORK, None),
        (WORK, Trap("launches", "during", 1)),
    ],
    # Without addresses: workers of pytest-xdist must find the same names.
    ids=["rlaunch", "rlaunch-checkout", "rlaunch-launch", "work", "work-launch"],
)
def test_a_launcher_waits_for_its_database(
    words: list[str],
    trap: Trap | None,
    file: Path,
    mongodb_database: Any,  # not through the proxy: a client has to find back to it
    proxy: DatabaseProxy,
    tmp_path: Path,
) -> None:
    """Away when it starts, or in the middle of taking a firework."""
    if trap is None:
        proxy.cut()
    else:
        cut_at(proxy, trap)
    child, log = start([word.format(file) for word in words], tmp_path)
    if trap is None:
        wait_for(lambda: waits(tmp_path), log.read_text, every_s=0.1)
        assert child.poll() is None
        proxy.restore()
    assert child.wait(timeout=HANGING_S) == 0, log.read_text()
    assert trap is None or trap.hit.is_set()
    assert waits(tmp_path), log.read_text()
    found = mongodb_database.fireworks.find_one({"name": "one"})
    assert found["state"] == "COMPLETED"
    assert mongodb_database.launches.count_documents({}) == 1


def test_qlaunch_waits_for_its_database(
    file: Path, mongodb_database: Any, proxy: DatabaseProxy, tmp_path: Path
) -> None:
    """Plain qlaunch, by the adapter that it loads; sbatch is a script that says 7."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 7\n")
    sbatch.chmod(0o755)
    adapter = tmp_path / "my_qadapter.yaml"
    adapter.write_text(
        "_fw_name: '{{nanoos_fw.queue_adapter.SlurmAdapter}}'\n"
        "rocket_launch: rlaunch singleshot\n"
    )
    run = (
        "import sys; from fireworks.scripts.qlaunch_run import qlaunch; "
        "sys.exit(qlaunch(sys.argv[1:]))"
    )
    proxy.cut()
    command = [sys.executable, "-c", run, "-r", "-l", str(file), "-q", str(adapter)]
    path = f"{sbatch.parent}:/usr/bin:/bin"
    child, log = start([*command, "singleshot"], tmp_path, PATH=path)
    wait_for(lambda: waits(tmp_path), log.read_text, every_s=0.1)
    assert child.poll() is None
    proxy.restore()
    assert child.wait(timeout=HANGING_S) == 0
    assert "the database is back" in log.read_text()
    found = mongodb_database.fireworks.find_one({"name": "one"})
    assert found["state"] == "RESERVED"
    (launch,) = mongodb_database.launches.find()
    assert launch["state_history"][-1]["reservation_id"] == "7"


def test_a_slot_that_is_asked_to_leave_does_not_wait(
    launchpad: Any, proxy: DatabaseProxy
) -> None:
    asked = threading.Event()
    outlast_outages(launchpad, 60, stop=asked.is_set)
    proxy.cut()
    threading.Timer(0.5, asked.set).start()
    began = time.monotonic()
    with pytest.raises(AutoReconnect):
        launchpad.fireworks.find_one()
    assert time.monotonic() - began < 30
