"""The search as firework and command, with trainings that are real and small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fireworks import Firework, Workflow
from pymatgen.core import Lattice, Structure

from nanoos_fw.cli import main as nanoos
from nanoos_fw.errors import (
    CorruptArtifactError,
    InputError,
    LaunchError,
    OutOfTimeError,
)
from nanoos_fw.firetasks import SearchTask
from nanoos_fw.firetasks import search as task_module
from nanoos_fw.firetasks.base import TaskContext
from nanoos_fw.ml import training
from nanoos_fw.ml.datasets import DatasetConfig, build_regression_dataset, write_dataset
from nanoos_fw.ml.graphs import build_graph
from nanoos_fw.ml.search import SearchConfig, check_dataset, read_search, suggest
from nanoos_fw.parallel import Communicator, StopRequest
from nanoos_fw.provenance import read_json
from nanoos_fw.settings import Settings
from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.models import ModelRegistry
from nanoos_fw.stores.searches import SearchStore
from nanoos_fw.workflows import search_workflow

TARGET = "formation_energy_per_atom"
SMALL = {
    "target": TARGET, "epochs": 4, "batch_size": 8, "hidden_dim": 4, "num_layers": 1,
    "readout_dim": 4, "gaussian_step": 1.0, "ensemble_size": 1,
    "forest_baseline": False,
}  # fmt: skip


class Launchpad:
    def __init__(self, db: Any) -> None:
        self.db = db


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(1)
    graphs, targets = {}, {}
    for i in range(24):
        a, b = rng.choice(["Al", "Ni", "Ti"], 2, replace=False)
        cell = Lattice.cubic(2.8 + 0.6 * rng.random())
        graph = build_graph(Structure(cell, [a, b], [[0] * 3, [0.5] * 3]))
        graphs[f"s{i:02d}"] = graph
        targets[f"s{i:02d}"] = float(graph.distances[:8].mean())
    directory = tmp_path_factory.mktemp("dataset")
    config = DatasetConfig(
        target_property=TARGET, train_fraction=0.6, val_fraction=0.2, test_fraction=0.2
    )
    write_dataset(build_regression_dataset(graphs, targets, config), directory)
    return directory


def search(dataset_dir: Path, **changes: Any) -> SearchConfig:
    values = {
        "name": "widths",
        "dataset_dir": str(dataset_dir),
        "training": SMALL,
        "space": {
            "learning_rate": {"kind": "float", "low": 1e-3, "high": 0.1, "log": True}
        },
        "method": "halving",
        "min_epochs": 1,
        "reduction": 2,
        "budget": {"trials": 4},
    }  # fmt: skip
    return read_search({**values, **changes})


@pytest.fixture
def place(embedded_database: Any, tmp_path: Path) -> TaskContext:
    database = open_database(Launchpad(embedded_database))
    return TaskContext.on(
        database,
        settings=Settings(ranks=1),
        work_root=tmp_path / "work",
    )


class Trainings:
    """Runs the rank program in this process, and remembers what was asked for."""

    def __init__(self) -> None:
        self.epochs: list[int | None] = []
        self.fail: dict[int, Exception] = {}

    def __call__(self, target: str, config: Any, **options: Any) -> Any:
        self.epochs.append(options["pause_after"])
        error = self.fail.pop(len(self.epochs), None)
        if error is not None:
            raise error
        result = training.main(
            {
                "config": config.model_dump(mode="json"),
                "dataset_dir": str(options["dataset_dir"]),
                "threads": 1,
                "pause_after": options["pause_after"],
            },
            options["work_dir"],
            Communicator(),
            StopRequest(),
        )
        return training.TrainingResult(**result)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    made = Trainings()
    monkeypatch.setattr(task_module, "train_cgcnn_model", made)
    return made


def create(place: TaskContext, config: SearchConfig) -> SearchStore:
    store = SearchStore(place.database)
    store.create(config, check_dataset(config))
    return store


def test_halving_goes_on_from_checkpoints_and_registers_the_best(
    place: TaskContext, trainings: Trainings, dataset_dir: Path, tmp_path: Path
) -> None:
    config = search(dataset_dir)
    store = create(place, config)
    answer = SearchTask(search="widths").run(place)
    json.dumps(answer, allow_nan=False)
    # Four begin; the best of two goes on to 2 epochs, the best of two of those to all.
    assert sorted(e or 4 for e in trainings.epochs) == [1, 1, 1, 1, 2, 2, 4]
    trials = store.trials("widths")
    (winner,) = [t for t in trials if t.state == "done"]
    assert answer["best"]["number"] == winner.number
    assert (store.state("widths"), answer["model"]) == ("done", "widths@1")
    record = place.models.get("widths@1")
    assert record.dataset_info["search"] == "widths"
    assert record.dataset_info["trial"] == winner.number
    assert record.metrics["val"]["mae"] == winner.value
    assert record.training_config["learning_rate"] == winner.parameters["learning_rate"]
    assert store.status("widths")["spent"]["epochs"] == 4 + 2 + 1 + 1
    # What was paused twice has the weights of a training that never was.
    work_dir = tmp_path / "straight"
    work_dir.mkdir()
    straight = training.main(
        {
            "config": config.training_of(winner.parameters).model_dump(mode="json"),
            "dataset_dir": str(dataset_dir),
            "threads": 1,
        },
        work_dir,
        Communicator(),
        StopRequest(),
    )
    assert straight["checkpoint_sha256"] == record.sha256
    # A worker that comes late finds nothing to do and changes nothing.
    again = SearchTask(search="widths").run(place)
    assert (again["n_jobs"], again["model"]) == (0, "widths@1")
    assert len(place.models.list_models(name="widths")) == 1


def test_what_goes_wrong_is_tried_again_or_written_down(
    place: TaskContext, trainings: Trainings, dataset_dir: Path
) -> None:
    store = create(place, search(dataset_dir, method="random", budget={"trials": 2}))
    trainings.fail = {
        1: InputError("training diverged", advice="lower learning_rate"),
        2: LaunchError("the ranks died"),
    }
    answer = SearchTask(search="widths", lease_s=0.2).run(place)
    failed, done = store.table("widths")
    assert (failed["state"], failed["error"]["message"]) == (
        "failed",
        "training diverged",
    )
    assert (done["state"], done["attempt"]) == ("done", 2)
    assert answer["best"]["number"] == 1


def test_at_the_end_of_the_allocation_work_is_given_back(
    place: TaskContext, trainings: Trainings, dataset_dir: Path
) -> None:
    store = create(place, search(dataset_dir, method="random", budget={"trials": 1}))
    trainings.fail = {1: OutOfTimeError("training stopped")}
    with pytest.raises(OutOfTimeError):
        SearchTask(search="widths").run(place)
    assert store.status("widths")["model"] is None
    answer = SearchTask(search="widths").run(place)  # at once, without any lease
    assert (answer["n_jobs"], answer["model"]) == (1, "widths@1")


def test_a_worker_can_do_part_of_the_work(
    place: TaskContext, trainings: Trainings, dataset_dir: Path
) -> None:
    config = search(dataset_dir, method="random", budget={"trials": 3})
    store = create(place, config)
    first = SearchTask(search="widths", max_jobs=2).run(place)
    assert (first["jobs"], first["model"]) == ([0, 1], None)
    assert store.state("widths") == "running"
    second = SearchTask(search="widths").run(place)
    assert (second["jobs"], second["model"]) == ([2], "widths@1")
    drawn = [trial.parameters for trial in store.trials("widths")]
    assert drawn == [suggest(config, number, []) for number in range(3)]


class Judged:
    """Trainings whose validation error is said by the test, by their turn."""

    def __init__(self, trainings: Trainings, values: list[float]) -> None:
        self.trainings, self.values = trainings, values

    def __call__(self, target: str, config: Any, **options: Any) -> Any:
        result = self.trainings(target, config, **options)
        said = self.values[len(self.trainings.epochs) - 1]
        val = {**result.metrics["val"], "mae": said}
        return result.model_copy(update={"metrics": {**result.metrics, "val": val}})


def test_a_resumed_search_registers_what_it_finds_after_the_stop(
    place: TaskContext,
    trainings: Trainings,
    dataset_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = create(place, search(dataset_dir, method="random", budget={"trials": 3}))
    judged = Judged(trainings, [0.3, 0.4, 0.1])

    def stopped_meanwhile(*words: Any, **options: Any) -> Any:
        if len(trainings.epochs) == 1:
            store.stop("widths")
        return judged(*words, **options)

    monkeypatch.setattr(task_module, "train_cgcnn_model", stopped_meanwhile)
    first = SearchTask(search="widths").run(place)
    assert (first["jobs"], first["model"]) == ([0, 1], "widths@1")
    assert place.models.get("widths@1").dataset_info["trial"] == 0
    store.resume("widths")
    second = SearchTask(search="widths").run(place)
    assert (second["jobs"], second["best"]["number"]) == ([2], 2)
    record = place.models.get(second["model"])
    assert (record.reference, record.dataset_info["trial"]) == ("widths@2", 2)
    assert record.metrics["val"]["mae"] == 0.1
    assert SearchTask(search="widths").run(place)["model"] == "widths@2"
    assert len(place.models.list_models(name="widths")) == 2


def test_a_search_is_not_closed_on_work_that_ended_meanwhile(
    place: TaskContext,
    trainings: Trainings,
    dataset_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = search(dataset_dir, budget={"trials": 2}, training={**SMALL, "epochs": 2})
    store = create(place, config)
    monkeypatch.setattr(task_module, "train_cgcnn_model", Judged(trainings, [0.3, 0.2]))
    SearchTask(search="widths", max_jobs=1).run(place)
    other = store.claim("widths")
    assert other is not None
    claim = SearchStore.claim

    def ends_behind_our_back(self: SearchStore, name: str, **options: Any) -> Any:
        job = claim(self, name, **options)
        if job is None and self.others_at_work(name) is not None:
            self.finish(other, {1: 0.4})
        return job

    monkeypatch.setattr(SearchStore, "claim", ends_behind_our_back)
    answer = SearchTask(search="widths").run(place)
    # The other trial ended after our claim, and let the better one go on.
    assert answer["jobs"] == [0]
    assert store.trials("widths")[0].epochs == 2
    assert store.state("widths") == "done"


def test_values_that_do_not_go_together_fail_their_trial_alone(
    place: TaskContext, trainings: Trainings, dataset_dir: Path
) -> None:
    space = {
        "model_type": {"kind": "choice", "values": ["cgcnn", "line_graph"]},
        "precision": {"kind": "choice", "values": ["float32", "bfloat16"]},
    }
    training = {k: v for k, v in SMALL.items() if k != "readout_dim"}
    training = {**training, "epochs": 1, "num_layers": 2, "hidden_dim": 4}
    config = search(
        dataset_dir, method="random", space=space, budget={"trials": 4},
        training=training, seed=14,
    )  # fmt: skip
    drawn = [suggest(config, number, []) for number in range(4)]
    assert {"model_type": "line_graph", "precision": "bfloat16"} in drawn
    assert any(own["model_type"] == "cgcnn" for own in drawn)
    store = create(place, config)
    SearchTask(search="widths").run(place)
    for own, row in zip(drawn, store.table("widths"), strict=True):
        assert (row["state"] == "done") == (own["model_type"] == "cgcnn")
        if own == {"model_type": "line_graph", "precision": "bfloat16"}:
            assert "do not go together" in row["error"]["message"]
    assert store.state("widths") == "done"


def test_files_that_were_not_judged_are_not_registered(
    place: TaskContext, trainings: Trainings, dataset_dir: Path
) -> None:
    config = search(dataset_dir, method="random", budget={"trials": 1})
    store = create(place, config)
    SearchTask(search="widths", max_jobs=1).run(place)
    (trained,) = (place.work_root / "search").glob("*/*/trial.json")
    weights = Path(read_json(trained)["checkpoint"])
    weights.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(CorruptArtifactError, match="was judged by"):
        SearchTask(search="widths").run(place)
    assert store.status("widths")["model"] is None


def test_another_dataset_in_the_same_place_is_noticed(
    place: TaskContext, dataset_dir: Path
) -> None:
    store = SearchStore(place.database)
    store.create(search(dataset_dir), "0" * 40)
    with pytest.raises(InputError, match="another dataset"):
        SearchTask(search="widths").run(place)
    assert store.trials("widths") == []


def test_a_dataset_that_cannot_decide_is_refused(
    dataset_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="the search is for 'bandgap'"):
        check_dataset(search(dataset_dir, training={"target": "bandgap"}))
    rng = np.random.default_rng(0)
    graphs = {
        f"s{i}": build_graph(
            Structure(Lattice.cubic(3 + rng.random()), ["Al"], [[0, 0, 0]])
        )
        for i in range(12)
    }
    config = DatasetConfig(
        target_property=TARGET, train_fraction=0.8, val_fraction=0.0, test_fraction=0.2
    )
    targets = {name: float(g.distances.mean()) for name, g in graphs.items()}
    write_dataset(build_regression_dataset(graphs, targets, config), tmp_path / "d")
    with pytest.raises(InputError, match="no validation part"):
        check_dataset(search(tmp_path / "d"))


def test_the_task_survives_the_database() -> None:
    made = search_workflow("widths", "/work", 3, 0)
    assert isinstance(made, Workflow)
    again = Workflow.from_format(made.to_format("json"), "json")
    assert len(again.fws) == 3
    for firework in again.fws:
        assert isinstance(firework, Firework)
        (task,) = firework.tasks
        assert isinstance(task, SearchTask)
        assert task.parameters.search == "widths"
        assert firework.spec["_category"] == "train"
    assert len({firework.spec["nanoos"]["key"] for firework in again.fws}) == 3
    assert made.metadata == search_workflow("widths", "/work", 3, 0).metadata
    assert made.metadata != search_workflow("widths", "/work", 3, 1).metadata
    with pytest.raises(InputError, match="workers"):
        search_workflow("widths", "/work", 0, 0)


@pytest.mark.mongodb
def test_a_search_from_the_command_line(
    mongodb_database: Any,
    dataset_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: TaskContext,
    trainings: Trainings,
) -> None:
    import os

    from ruamel.yaml import YAML

    monkeypatch.setenv("NANO_OS_WORK_DIR", str(tmp_path / "work"))
    uri = os.environ["NANO_OS_TEST_MONGODB_URI"].rstrip("/")
    launchpad = tmp_path / "my_launchpad.yaml"
    launchpad.write_text(
        f"host: {uri}/{mongodb_database.name}\nname: {mongodb_database.name}\n"
        "uri_mode: true\n"
    )
    values = search(dataset_dir, method="random", budget={"trials": 2})
    with (tmp_path / "search.yaml").open("w") as file:
        YAML().dump(values.model_dump(mode="json"), file)

    def run(*words: str, code: int = 0) -> Any:
        assert nanoos(["search", *words, "-l", str(launchpad), "--json"]) == code
        out, err = capsys.readouterr()
        return json.loads(out) if code == 0 else err

    created = run("create", str(tmp_path / "search.yaml"), "--workers", "2")
    assert created["workers"] == 2
    assert run("create", str(tmp_path / "search.yaml"))["workers"] == 0
    assert mongodb_database["fireworks"].count_documents({}) == 2
    assert run("status") == ["widths"]
    assert "no trial" in run("best", "widths", code=1)
    run("stop", "widths")
    assert run("status", "widths")["state"] == "stopped"
    assert run("resume", "widths")["workers"] == 1
    assert mongodb_database["fireworks"].count_documents({}) == 3
    # The worker's part, in this process.
    there = replace(
        place, database=mongodb_database, models=ModelRegistry(mongodb_database)
    )
    SearchTask(search="widths").run(there)
    status = run("status", "widths", "--table")
    assert (status["state"], status["model"]) == ("done", "widths@1")
    assert [row["state"] for row in status["table"]] == ["done", "done"]
    best = run("best", "widths")
    assert best["training"]["learning_rate"] == best["parameters"]["learning_rate"]
    assert best["value"] == min(row["value"] for row in status["table"])
    assert nanoos(["search", "status", "widths", "--table", "-l", str(launchpad)]) == 0
    text = capsys.readouterr().out
    assert "spent   2 of 2 trials" in text
    assert text.count("trial   ") == 2
    trained = read_json(next((tmp_path / "work").glob("search/*/*/trial.json")))
    assert trained["target"] == TARGET
    (tmp_path / "search.yaml").write_text("- a\n")
    assert "describes no search" in run("create", str(tmp_path / "search.yaml"), code=1)
