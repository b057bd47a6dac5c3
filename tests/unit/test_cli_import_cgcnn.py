"""``nanoos models import-cgcnn`` on an embedded database, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from nanoos_fw.ml.datasets import (
    DatasetConfig,
    build_regression_dataset,
    write_dataset,
)
from nanoos_fw.ml.graphs import build_graph

VECTORS = {str(z): np.random.default_rng(z).uniform(size=92).tolist() for z in (8, 29)}
PREDICT = """
import sys, json
from pathlib import Path
from pymatgen.core import Lattice, Structure
from nanoos_fw.ml.graphs import build_graph
from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.embedded import open_embedded
from nanoos_fw.stores.models import get_model
database = open_database(open_embedded(Path("db")))
model = get_model("cgcnn_bandgap_v1", database=database)
graph = build_graph(Structure(Lattice.cubic(4.2), ["Cu", "O"], [[0] * 3, [0.5] * 3]))
print(json.dumps(model.predict(graph)))
"""


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "NANO_OS_WORK_DIR": str(cwd / "work")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def nanoos(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run("-m", "nanoos_fw.cli", *words, "-l", "db", cwd=cwd)


def checkpoint(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    state = {"embedding.weight": random(4, 92), "embedding.bias": random(4)}
    for name, shape in (("weight", (8, 49)), ("bias", (8,))):
        state[f"convs.0.fc_full.{name}"] = random(*shape)
    for norm, size in (("bn1", 8), ("bn2", 4)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"convs.0.{norm}.{name}"] = random(size)
    state |= {"conv_to_fc.weight": random(3, 4), "conv_to_fc.bias": random(3)}
    state |= {"fc_out.weight": random(1, 3), "fc_out.bias": random(1)}
    torch.save(
        {
            "state_dict": state,
            "normalizer": {"mean": 2.0, "std": 1.5},
            "best_mae_error": 0.369,
            "epoch": 9,
            "args": {
                "task": "regression",
                "data_options": ["x.json", "regression", "band_gap"],
                "train_size": 16458,
            },
        },
        path,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("import")
    (path / "db").mkdir()
    (path / "db" / "database.json").write_text("{}")
    checkpoint(path / "band-gap.pth.tar")
    (path / "atom_init.json").write_text(json.dumps(VECTORS))
    return path


def test_a_system_model_predicts_once_its_weights_are_imported(folder):
    refused = run("-c", PREDICT, cwd=folder)
    assert refused.returncode != 0
    assert "no weights" in refused.stderr
    words = ("models", "import-cgcnn", "band-gap.pth.tar", "--name", "cgcnn_bandgap_v1")
    wrong = nanoos(*words, "--target", "formation_energy_per_atom", cwd=folder)
    assert wrong.returncode == 1
    assert "was trained on 'band_gap'" in wrong.stderr
    done = nanoos(*words, "--target", "bandgap", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cgcnn_bandgap_v1@1: bandgap in eV, from band-gap")
    assert "recorded a validation MAE in eV of 0.369" in done.stdout
    again = nanoos(*words, "--target", "bandgap", "--json", cwd=folder)
    record = json.loads(again.stdout)
    assert (record["version"], record["is_system_provided"]) == (1, True)
    assert record["metrics"] == {"val": {"mae": 0.369}}
    assert record["dataset_info"]["counts"] == {"train": 16458}
    predicted = run("-c", PREDICT, cwd=folder)
    assert predicted.returncode == 0, predicted.stderr
    answer = json.loads(predicted.stdout)
    assert answer["model_version"] == "cgcnn_bandgap_v1@1"
    assert answer["unit"] == "eV"
    assert answer["out_of_domain"] is False
    assert np.isfinite(answer["prediction"])
    assert answer["uncertainty"] is answer["interval"] is None
    assert "no uncertainty and no intervals" in done.stdout
    graphs = {
        f"s{n:02d}": build_graph(
            Structure(Lattice.cubic(4 + n / 100), ["Cu", "O"], [[0] * 3, [0.5] * 3])
        )
        for n in range(40)
    }
    targets = {name: np.sin(7.0 * n) for n, name in enumerate(graphs)}
    config = DatasetConfig(target_property="bandgap", unit="eV")
    write_dataset(build_regression_dataset(graphs, targets, config), folder / "dataset")
    words = ("models", "calibrate", "cgcnn_bandgap_v1", "--dataset", "dataset")
    calibrated = nanoos(*words, "--json", cwd=folder)
    assert calibrated.returncode == 0, calibrated.stderr
    told = json.loads(calibrated.stdout)
    assert (told["model"], told["parent"]) == (
        "cgcnn_bandgap_v1@2", "cgcnn_bandgap_v1@1",
    )  # fmt: skip
    later = json.loads(run("-c", PREDICT, cwd=folder).stdout)
    assert later["prediction"] == answer["prediction"]
    assert later["model_version"] == "cgcnn_bandgap_v1@2"
    low, high = later["interval"]
    assert high - low == pytest.approx(2 * told["mean_half_width"])
    # The same again is the same version.
    again = nanoos(*words[:2], "cgcnn_bandgap_v1@1", *words[3:], "--json", cwd=folder)
    assert json.loads(again.stdout)["model"] == "cgcnn_bandgap_v1@2"


def test_a_file_that_is_none_registers_nothing(folder):
    (folder / "bad.pth.tar").write_bytes(b"\x80\x02}q\x00.")
    done = nanoos(
        "models", "import-cgcnn", "bad.pth.tar", "--name", "bad", "--target", "bandgap",
        cwd=folder,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    listed = nanoos("models", "list", "--json", cwd=folder)
    assert "bad" not in {record["name"] for record in json.loads(listed.stdout)}
