"""Submission by several processes at the same time, on a real server."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from submitting_process import BATCH

from nanoos_fw.operations import prepare_launchpad
from nanoos_fw.stores.database import load_launchpad

pytestmark = pytest.mark.mongodb

PROGRAM = Path(__file__).with_name("submitting_process.py")
BATCHES, PROCESSES = 3, 2


def test_a_workflow_that_several_processes_submit_is_there_once(
    launchpad_file: Path, mongodb_database: Any
) -> None:
    launchpad = load_launchpad(launchpad_file)
    prepare_launchpad(launchpad)
    count = BATCH * BATCHES
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(launchpad_file), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    try:
        for _ in range(BATCHES):
            for process in processes:  # all of them are before the same batch
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
        answers = [process.communicate(timeout=60)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0] * PROCESSES

    assert sum(int(added) for added, _ in answers) == count
    keys = [w["metadata"]["key"] for w in mongodb_database["workflows"].find()]
    assert len(keys) == len(set(keys)) == count
    states = Counter((f["name"], f["state"]) for f in mongodb_database.fireworks.find())
    assert states == {("first", "READY"): count, ("second", "WAITING"): count}
    for document in mongodb_database["workflows"].find():
        first, second = sorted(document["nodes"])
        assert document["links"] == {str(first): [second], str(second): []}
        assert document["fw_states"] == {str(first): "READY", str(second): "WAITING"}
    launchpad.connection.close()
