"""Packed workers as real processes on a real server: deaths, and being stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from fireworks import Firework, PyTask, Workflow
from processes import HANGING_S, wait_for

from nanoos_fw import operations
from nanoos_fw.operations.reconcile import reconcile
from nanoos_fw.operations.status import campaign_status
from nanoos_fw.operations.workers import WorkPlan, work
from nanoos_fw.stores.database import load_launchpad

pytestmark = pytest.mark.mongodb


def task(function: str = "os.getcwd", *args: Any) -> PyTask:
    return PyTask(func=function, args=list(args))


@pytest.fixture
def server(my_launchpad: Path) -> Path:
    operations.prepare_launchpad(load_launchpad(my_launchpad))
    return my_launchpad


def test_a_slot_that_dies_is_noted_and_started_again(
    server: Path, mongodb_database: Any, tmp_path: Path
) -> None:
    launchpad = load_launchpad(server)
    killer = Firework([task("signal.raise_signal", 9)], spec={"_priority": 2})
    launchpad.bulk_add_wfs(
        [Workflow([killer]), *(Workflow([Firework([task()])]) for _ in range(4))]
    )
    lines: list[str] = []

    summary = work(
        WorkPlan(launchpad=server, idle_s=0.5, folder=tmp_path / "work"), lines.append
    )

    assert summary.states == {"COMPLETED": 4}
    (lost,) = summary.lost
    assert summary.slots[0].died == 1
    assert any(f"was killed by SIGKILL in firework {lost}" in line for line in lines)
    assert mongodb_database["fireworks"].find_one({"fw_id": lost})["state"] == "RUNNING"
    place = mongodb_database["launch_places"].find_one({"fw_id": lost})
    assert place["death"] == "its slot was killed by SIGKILL"
    # Its job would go on for long: nothing but the worker's word tells that it is gone.
    mongodb_database["launch_places"].update_one(
        {"fw_id": lost}, {"$set": {"slurm.job_id": "77"}}
    )
    report = reconcile(launchpad, slurm=False)
    assert [verdict.launch.fw_id for verdict in report.lost] == [lost]
    assert mongodb_database["fireworks"].find_one({"fw_id": lost})["state"] == "FIZZLED"


def test_a_signal_to_the_worker_ends_its_slots(
    server: Path,
    mongodb_database: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task that knows nothing of signals finishes; nothing further is taken."""
    launchpad = load_launchpad(server)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    waits = task("subprocess.run", ["sh", "-c", f"read line < {gate}"])
    launchpad.add_wf(Firework([waits], spec={"_priority": 2}))
    launchpad.add_wf(Firework([task()], name="next"))

    told = threading.Event()
    send_signal = subprocess.Popen.send_signal

    def tell(process: subprocess.Popen[bytes], number: int) -> None:
        send_signal(process, number)
        told.set()

    monkeypatch.setattr(subprocess.Popen, "send_signal", tell)
    fireworks = mongodb_database["fireworks"]

    def stop_it() -> None:
        wait_for(lambda: fireworks.find_one({"state": "RUNNING"}), "no firework runs")
        os.kill(os.getpid(), signal.SIGUSR1)
        assert told.wait(HANGING_S)  # the slot has it too
        gate.write_text("go\n")

    lines: list[str] = []
    thread = threading.Thread(target=stop_it)
    thread.start()
    summary = work(WorkPlan(launchpad=server, folder=tmp_path / "work"), lines.append)
    thread.join()
    assert summary.slots[0].left == "signal SIGUSR1"
    assert summary.states == {"COMPLETED": 1}
    assert mongodb_database["fireworks"].find_one({"name": "next"})["state"] == "READY"


def test_the_status_of_a_campaign_is_one_question(
    server: Path, mongodb_database: Any, tmp_path: Path
) -> None:
    """The server that fails is not asked twice: counts, causes and pace at once."""
    import pymongo

    launchpad = load_launchpad(server)
    for name, function in (("a", "os.getcwd"), ("b", "os.no_such_thing"), ("c", "")):
        spec = {"nanoos": {"campaign": "c", "stage": "one", "order": 0}}
        if not function:
            spec["_category"] = "nobody"  # type: ignore[assignment]
        first = Firework([task(function or "os.getcwd")], spec=spec, name=name)
        launchpad.add_wf(Workflow([first], metadata={"key": name}))
    launchpad.fireworks.update_one({"name": "c"}, {"$set": {"state": "PAUSED"}})
    work(WorkPlan(launchpad=server, idle_s=0.5, folder=tmp_path / "work"), lambda _: 0)
    asked: list[str] = []

    class Listener(pymongo.monitoring.CommandListener):
        def started(self, event: Any) -> None:
            asked.append(event.command_name)

        def succeeded(self, event: Any) -> None:
            pass

        def failed(self, event: Any) -> None:
            pass

    uri = os.environ["NANO_OS_TEST_MONGODB_URI"]
    client: Any = pymongo.MongoClient(uri, event_listeners=[Listener()])
    try:
        status = campaign_status(client[mongodb_database.name], "c")
    finally:
        client.close()
    questions = [name for name in asked if name not in {"endSessions", "ping"}]
    assert questions == ["aggregate"]
    assert status.stages == {"one": {"COMPLETED": 1, "FIZZLED": 1, "PAUSED": 1}}
    assert status.causes == {"one": {"code": 1}}
    assert status.per_hour > 0
