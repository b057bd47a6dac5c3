"""Trainings submitted without a campaign: dataset folder in, registered model out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fireworks import FWorker, Workflow
from fireworks.core.rocket_launcher import launch_rocket
from pymatgen.core import Lattice, Structure

from nanoos_fw.cli import main as nanoos
from nanoos_fw.errors import InputError
from nanoos_fw.firetasks import TrainModelTask
from nanoos_fw.ml.datasets import DatasetConfig, build_regression_dataset, write_dataset
from nanoos_fw.ml.graphs import build_graph
from nanoos_fw.ml.model_files import read_checkpoint
from nanoos_fw.ml.training import TrainingConfig
from nanoos_fw.stores.database import load_launchpad, open_database
from nanoos_fw.stores.models import ModelRegistry
from nanoos_fw.workflows import training_workflow

TARGET = "formation_energy_per_atom"


def write(directory: Path, seed: int, unit: str | None = None) -> Path:
    rng = np.random.default_rng(seed)
    graphs, targets = {}, {}
    for i in range(20):
        cell = Lattice.cubic(2.8 + 0.6 * rng.random())
        graph = build_graph(Structure(cell, ["Al", "Ni"], [[0] * 3, [0.5] * 3]))
        graphs[f"s{i:02d}"] = graph
        targets[f"s{i:02d}"] = float(graph.distances[:8].mean())
    config = DatasetConfig(
        target_property=TARGET,
        unit=unit,
        train_fraction=0.6,
        val_fraction=0.2,
        test_fraction=0.2,
    )
    write_dataset(build_regression_dataset(graphs, targets, config), directory)
    return directory


def test_the_workflow_survives_the_database_and_knows_its_question() -> None:
    training = TrainingConfig(target=TARGET, epochs=2)

    def made(**changes: Any) -> Workflow:
        workflow = training_workflow("/data", "a" * 40, training, "m", "/w", **changes)
        assert isinstance(workflow, Workflow)
        return workflow

    (firework,) = Workflow.from_format(made().to_format("json"), "json").fws
    (task,) = firework.tasks
    assert isinstance(task, TrainModelTask)
    assert task.parameters.training == training
    assert firework.spec["_category"] == "train"
    assert made().metadata == made().metadata
    keys = [made(), made(parent="m@1"), made(activate=True)]
    assert len({workflow.metadata["key"] for workflow in keys}) == 3
    for dataset in ({}, {"campaign": "c", "dataset_dir": "/d"}, {"dataset_dir": "/d"}):
        with pytest.raises(InputError, match="either campaign, or dataset_dir"):
            TrainModelTask(model_name="m", training={"target": TARGET}, **dataset)


@pytest.mark.mongodb
def test_submitted_trainings_end_in_the_registry_with_their_parent(
    launchpad_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launchpad = load_launchpad(launchpad_file)
    models = ModelRegistry(open_database(launchpad))
    first, second = (write(tmp_path / name, i) for i, name in enumerate("ab"))
    settings = tmp_path / "settings.yaml"
    sizes = "hidden_dim: 4\nnum_layers: 1\nreadout_dim: 4\ngaussian_step: 1.0\n"
    rest = "epochs: 2\nensemble_size: 1\nforest_baseline: false\n"

    def submit(dataset: Path, text: str, *words: str, code: int = 0) -> Any:
        settings.write_text(text)
        command = ["train", "submit", str(dataset), "--target", TARGET, "--json"]
        command += ["--config", str(settings), "--name", "m", *words]
        assert nanoos(command) == code
        out, err = capsys.readouterr()
        return json.loads(out) if code == 0 else err

    def state() -> str:
        assert launch_rocket(launchpad, FWorker())
        newest = max(launchpad.get_fw_ids())
        capsys.readouterr()
        return str(launchpad.get_fw_by_id(newest).state)

    assert submit(first, sizes + rest)["added"]
    assert not submit(first, sizes + rest)["added"]
    assert state() == "COMPLETED"
    parent = models.get("m@1")
    assert (parent.parent, parent.is_active) == (None, False)

    # Sizes are the parent's; the reference is that of the version, not of the alias.
    tuned = submit(second, rest + "freeze: [embedding]\n", "--parent", "m@latest",
                   "--activate")  # fmt: skip
    assert tuned["parent"] == "m@1"
    assert state() == "COMPLETED"
    child = models.get("m@2")
    assert (child.parent, child.is_active) == ("m@1", True)
    assert child.training_config["parent_sha256"] == parent.sha256
    assert child.training_config["hidden_dim"] == 4
    old, new = (
        read_checkpoint(models.read_weights(r), "m")[1] for r in (parent, child)
    )
    for name, kept in (("embedding.weight", True), ("dense.weight", False)):
        same = np.array_equal(old[f"members.0.{name}"], new[f"members.0.{name}"])
        assert same == kept, name

    refused = submit(second, "hidden_dim: 8\n" + rest, "--parent", "m@1", code=1)
    assert "hidden_dim is 8 in the config but 4" in refused
    assert "freeze" in submit(second, "freeze: [dense]\n" + rest, code=1)
    other = write(tmp_path / "c", 0, unit="meV/atom")
    assert "m@1 predicts 'formation_energy_per_atom' in eV/atom" in submit(
        other, sizes + rest, code=1
    )
    assert submit(second, sizes + rest)["added"]
    write(second, 5)
    assert state() == "FIZZLED"
    assert len(models.list_models(name="m")) == 2
