"""Campaigns through plain ``qlaunch`` on a real SLURM cluster and a real server."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from small_campaign import rows, small_plan

from nanoos_fw.cli import main
from nanoos_fw.operations.cluster_files import CATEGORIES
from nanoos_fw.stores.database import load_launchpad
from nanoos_fw.stores.launches import SPEC_KEY

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.mongodb,
    pytest.mark.mpi,
    pytest.mark.lammps,
]

BIN = Path(sys.executable).parent
# Upper bound after which a run counts as hanging; passing runs take a minute.
HANGING_S = 300.0


@pytest.fixture
def cluster(mongodb_database: Any, tmp_path: Path) -> Path:
    """Folder of the files that ``nanoos init --slurm`` writes for a fresh database."""
    folder = tmp_path / "cluster"
    uri = os.environ["NANO_OS_TEST_MONGODB_URI"]
    words = ["init", "--slurm", "--dir", str(folder), "--mongodb", uri]
    assert main([*words, "--database", mongodb_database.name]) == 0
    return folder


@contextlib.contextmanager
def submitting(cluster: Path) -> Iterator[None]:
    """Run ``qlaunch -r rapidfire`` for all categories, as users do."""
    loops = []
    for category in CATEGORIES:
        log = (cluster / category / "qlaunch.log").open("wb")
        command = [str(BIN / "qlaunch"), "-r", "rapidfire"]
        command += ["--nlaunches", "infinite", "--sleep", "1"]
        with log:
            loops.append(
                subprocess.Popen(
                    command,
                    cwd=cluster / category,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        yield
        assert all(loop.poll() is None for loop in loops), "qlaunch ended"
    finally:
        for loop in loops:
            loop.send_signal(signal.SIGTERM)
        for loop in loops:
            loop.wait(timeout=30)


def wait_for(condition: Callable[[], bool], evidence: Callable[[], object]) -> None:
    end = time.monotonic() + HANGING_S
    while not condition():
        assert time.monotonic() < end, evidence()
        time.sleep(0.5)


def states(database: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for document in database["fireworks"].find({}, {"state": 1}):
        found[document["state"]] = found.get(document["state"], 0) + 1
    return found


def wait_until_ended(database: Any, cluster: Path) -> None:
    """Wait until no firework can run any more."""

    def evidence() -> object:
        logs = [p.read_text()[-500:] for p in cluster.glob("*/qlaunch.log")]
        return states(database), logs, slurm("squeue")

    wait_for(
        lambda: not set(states(database)) - {"COMPLETED", "FIZZLED", "DEFUSED"},
        evidence,
    )


def slurm(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60
    ).stdout


def failures(database: Any) -> list[Any]:
    return [
        launch["action"] for launch in database["launches"].find({"state": "FIZZLED"})
    ]


def submit_campaign(cluster: Path, folder: Path, **changes: Any) -> Any:
    """Submit the small campaign with one firework a stage, and return its plan."""
    from nanoos_fw import demo

    launchpad = load_launchpad(cluster / "my_launchpad.yaml")
    few = {"relaxations_per_firework": 60, "structures_per_firework": 60}
    plan = small_plan(folder).model_copy(update={**few, **changes})
    demo.submit(launchpad, plan, verify=False)
    return plan


def set_queueadapter(database: Any, stage: str, resources: Mapping[str, Any]) -> None:
    database["fireworks"].update_many(
        {f"spec.{SPEC_KEY}.stage": stage},
        {"$set": {"spec._queueadapter": dict(resources)}},
    )


def test_a_campaign_runs_through_qlaunch_and_the_queue(
    cluster: Path, mongodb_database: Any, tmp_path: Path
) -> None:
    """Featurize, train on two nodes, screen, simulate; untouched files of init."""
    plan = submit_campaign(cluster, tmp_path)
    set_queueadapter(
        mongodb_database, "train", {"nodes": 2, "ntasks": 2, "ntasks_per_node": 1}
    )

    with submitting(cluster):
        wait_until_ended(mongodb_database, cluster)

    assert states(mongodb_database).keys() == {"COMPLETED"}, failures(mongodb_database)
    found = rows(mongodb_database)  # fails on a double row
    assert len(found["ranking"]) == plan.top_k
    assert len(found["features"]) == len(found["structures"]) - 4  # the elements
    kinds = [kind for kind, _ in found["simulations"]]
    assert kinds.count("md") == plan.md_runs
    model = mongodb_database["models"].find_one({})
    assert model["environment"]["ranks"] == 2
    train = mongodb_database["fireworks"].find_one({f"spec.{SPEC_KEY}.stage": "train"})
    launch = mongodb_database["launches"].find_one({"fw_id": train["fw_id"]})
    reserved = [h["reservation_id"] for h in launch["state_history"][:1]]
    job = slurm("scontrol", "show", "job", *reserved)
    assert "NodeList=n[1-2]" in job
