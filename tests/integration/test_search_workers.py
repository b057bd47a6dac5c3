"""Two workers on one search, of which one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from fireworks import Firework, Workflow
from processes import HANGING_S, RLAUNCH, wait_for
from small_training import TARGET, write_small_dataset

from nanoos_fw.firetasks import SearchTask
from nanoos_fw.ml import training
from nanoos_fw.ml.search import check_dataset, read_search
from nanoos_fw.operations import prepare_launchpad
from nanoos_fw.parallel import Communicator, StopRequest
from nanoos_fw.provenance import read_json
from nanoos_fw.stores.database import load_launchpad, open_database
from nanoos_fw.stores.models import ModelRegistry
from nanoos_fw.stores.searches import SearchStore

LEASE_S = 8.0


@pytest.mark.mongodb
@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(
    my_launchpad: Path, tmp_path: Path
) -> None:
    launchpad = load_launchpad(my_launchpad)
    write_small_dataset(tmp_path / "dataset")
    config = read_search(
        {
            "name": "widths",
            "dataset_dir": str(tmp_path / "dataset"),
            "training": {
                "target": TARGET, "epochs": 120, "batch_size": 8, "hidden_dim": 8,
                "num_layers": 1, "readout_dim": 8, "gaussian_step": 0.5,
                "ensemble_size": 1, "checkpoint_every": 5,
            },
            "space": {
                "learning_rate": {"kind": "float", "low": 1e-3, "high": 1e-2,
                                  "log": True}
            },
            "budget": {"trials": 4},
        }
    )  # fmt: skip
    database = open_database(launchpad)
    store = SearchStore(database)
    store.create(config, check_dataset(config))
    prepare_launchpad(launchpad)
    spec = {
        "_add_launchpad_and_fw_id": True,
        "nanoos": {"stage": "search", "work_root": str(tmp_path / "work")},
    }
    for _ in range(2):
        task = SearchTask(search="widths", lease_s=LEASE_S)
        launchpad.add_wf(Workflow([Firework([task], spec=dict(spec))]))

    def start(name: str) -> subprocess.Popen[str]:
        (tmp_path / name).mkdir()
        return subprocess.Popen(
            [*RLAUNCH, "-l", str(my_launchpad), "singleshot"],
            cwd=tmp_path / name,
            env={**os.environ, "NANO_OS_RANKS": "1", "NANO_OS_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    victim = start("victim")
    found: list[Path] = []

    def training_began() -> bool:  # in the middle of the first trial
        assert victim.poll() is None
        found.extend((tmp_path / "work").glob("search/*/*/member0-epoch*.safetensors"))
        return bool(found)

    wait_for(training_began, "no checkpoint", every_s=0.02)
    checkpoint = found[0]
    survivor = start("survivor")
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    before = store.table("widths")
    assert [row["state"] for row in before] == ["running"]
    output = survivor.communicate(timeout=HANGING_S)[0]
    assert survivor.returncode == 0, output

    rows = store.table("widths")
    assert [row["number"] for row in rows] == [0, 1, 2, 3]
    assert {row["state"] for row in rows} == {"done"}, output
    assert [row["attempt"] for row in rows] == [2, 1, 1, 1]
    status = store.status("widths")
    assert (status["state"], status["model"]) == ("done", "widths@1")
    registry = ModelRegistry(database)
    best = min(rows, key=lambda row: row["value"])
    record = registry.get("best:mae")
    assert record.reference == "widths@1"
    assert record.metrics["val"]["mae"] == best["value"]
    # The trial that was cut off has the weights of one that was not.
    straight = tmp_path / "straight"
    straight.mkdir()
    result = training.main(
        {
            "config": config.training_of(rows[0]["parameters"]).model_dump(mode="json"),
            "dataset_dir": config.dataset_dir,
            "threads": 1,
        },
        straight,
        Communicator(),
        StopRequest(),
    )
    assert rows[0]["checkpoint_sha256"] == result["checkpoint_sha256"]
    resumed = read_json(checkpoint.parent / "trial.json")
    assert resumed["checkpoint_sha256"] == result["checkpoint_sha256"]
