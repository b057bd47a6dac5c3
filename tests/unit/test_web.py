"""The live view and its API: who is let in, what is answered, what is submitted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx2")

from fastapi.testclient import TestClient
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import OutOfMemoryError
from nanoos_fw.firetasks.featurization import FeatureParameters, compute_features
from nanoos_fw.ml.datasets import DatasetConfig, build_regression_dataset, write_dataset
from nanoos_fw.ml.features import extract_structure_features
from nanoos_fw.ml.graphs import build_graph
from nanoos_fw.operations.trainings import submit_training
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.models import ModelRegistry
from nanoos_fw.stores.simulations import Simulation, SimulationStore
from nanoos_fw.stores.structures import NewStructure, StructureStore
from nanoos_fw.web import create_app

TOKEN = "0123456789abcdef"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def keys(launchpad: Any) -> list[str]:
    store = StructureStore(open_database(launchpad))
    crystals = [
        Structure(Lattice.cubic(a), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
        for a in (4.1, 4.2)
    ]
    return store.add(
        [NewStructure(structure=c, label=f"s{n}") for n, c in enumerate(crystals)],
        in_set="salts",
    ).keys


def client(launchpad: Any, tmp_path: Path, *, may_write: bool = False) -> TestClient:
    app = create_app(
        launchpad, token=TOKEN, work_root=tmp_path / "work", may_write=may_write
    )
    found = TestClient(app, base_url="http://127.0.0.1:8000", follow_redirects=False)
    found.headers["Authorization"] = f"Bearer {TOKEN}"
    return found


# --------------------------------------------------------------------------- access


@pytest.mark.parametrize("path", ["/", "/api/ml/models", "/openapi.json", "/none"])
@pytest.mark.parametrize("sent", [None, "Bearer wrong", f"Basic {TOKEN}", "Bearer é"])
def test_nobody_without_the_token_is_answered(
    launchpad: Any, tmp_path: Path, path: str, sent: str | None
) -> None:
    web = client(launchpad, tmp_path)
    del web.headers["Authorization"]
    headers = {} if sent is None else {"Authorization": sent.encode()}
    answer = web.get(path, headers=headers)
    assert answer.status_code == 401
    assert TOKEN not in answer.text


def test_a_browser_gets_in_by_the_printed_address_and_keeps_a_cookie(
    launchpad: Any, tmp_path: Path
) -> None:
    web = client(launchpad, tmp_path)
    del web.headers["Authorization"]
    first = web.get(f"/models?select=a%2Cb&token={TOKEN}")
    assert (first.status_code, first.headers["location"]) == (
        303,
        "/models?select=a%2Cb",
    )
    assert "HttpOnly" in first.headers["set-cookie"]
    assert web.get("/").status_code == 200
    web.cookies.clear()
    # A location that begins with two slashes would lead the browser to another host.
    away = web.get(f"http://127.0.0.1:8000//evil.example/?token={TOKEN}")
    assert away.headers["location"] == "/evil.example/"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:8000"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "null"},
    ],
)
def test_requests_of_other_pages_and_names_are_refused(
    launchpad: Any, tmp_path: Path, headers: dict[str, str]
) -> None:
    answer = client(launchpad, tmp_path, may_write=True).post(
        "/models/activate", data={"reference": "m@1"}, headers=headers
    )
    assert answer.status_code == 403
    assert answer.json()["kind"] == "access"


# ------------------------------------------------------------------------- features


def test_features_are_submitted_once_and_then_answered(
    launchpad: Any, keys: list[str], tmp_path: Path
) -> None:
    web = client(launchpad, tmp_path, may_write=True)
    first = web.post(f"/api/ml/features/structure/{keys[0][:8]}", json={})
    assert first.status_code == 202
    assert first.json()["structures"] == [
        {"structure_id": keys[0], "state": "missing", "reason": ""}
    ]
    (workflow,) = launchpad.workflows.find()
    assert workflow["metadata"]["key"] == first.json()["workflow"]
    (task,) = launchpad.fireworks.find_one()["spec"]["_tasks"]
    assert list(task["structures"]) == [keys[0]]

    compute_features(open_database(launchpad), keys, FeatureParameters())
    there = web.post(f"/api/ml/features/structure/{keys[0]}", json={})
    assert (there.status_code, there.json()["submitted"]) == (200, 0)
    assert there.json()["scalar_features"]["volume_per_atom"] == pytest.approx(
        4.1**3 / 2
    )
    batch = web.post("/api/ml/features/batch", json={"structure_ids": ["s0", "s1"]})
    assert [row["state"] for row in batch.json()["structures"]] == ["hit", "hit"]
    again = web.post(
        "/api/ml/features/batch",
        json={"structure_ids": ["s0", "s1"], "force_recompute": True},
    )
    assert (again.status_code, again.json()["submitted"]) == (202, 2)
    assert launchpad.workflows.count_documents({}) == 2


def test_a_reading_server_submits_and_activates_nothing(
    launchpad: Any, keys: list[str], tmp_path: Path
) -> None:
    web = client(launchpad, tmp_path)
    answer = web.post("/api/ml/features/structure/s0", json={})
    assert answer.status_code == 403
    assert "--allow-changes" in answer.json()["advice"]
    activated = web.post("/models/activate", data={"reference": "m@1"})
    assert activated.status_code == 403
    assert launchpad.workflows.count_documents({}) == 0


# --------------------------------------------------------------- models, predictions


@pytest.fixture
def registry(launchpad: Any, tmp_path: Path) -> ModelRegistry:
    found = ModelRegistry(open_database(launchpad))
    for number in (1, 2):
        weights = tmp_path / f"w{number}"
        weights.write_bytes(b"weights " + bytes([number]))
        found.register(
            name="energies",
            target="formation_energy_per_atom",
            unit="eV/atom",
            model_type="CGCNN",
            weights=weights,
            training_key=f"key{number}",
            training_config={"epochs": number},
            metrics={"val": {"mae": 0.1 * number}, "test": {"mae": 0.2 * number}},
            dataset_info={"dataset_hash": "d" * 40},
            environment={},
        )
    return found


def test_models_are_listed_compared_and_activated(
    registry: ModelRegistry, launchpad: Any, tmp_path: Path
) -> None:
    web = client(launchpad, tmp_path, may_write=True)
    listed = web.get("/api/ml/models", params={"name": "energies"}).json()["models"]
    assert [model["version"] for model in listed] == [1, 2]
    moved = web.post("/models/activate", data={"reference": "energies@2"})
    assert moved.status_code == 303
    assert registry.get("energies").version == 2
    shown = web.get("/api/ml/models/energies").json()
    assert shown["model"]["version"] == 2
    assert shown["alias_history"][0]["reason"] == "activated on the web page"
    to = web.post(
        "/models/compare", data={"references": ["energies@1", "energies@2"]}
    ).headers["location"]
    page = web.get(to).text
    assert "epochs" in page
    assert web.get("/api/ml/models/none").status_code == 404
    # Names of screenings may hold a slash.
    answer = web.get("/screens/team%2Falloys/report")
    assert "there is no screening 'team/alloys'" in answer.json()["message"]


def test_a_model_without_weights_predicts_nothing(
    launchpad: Any, keys: list[str], tmp_path: Path
) -> None:
    answer = client(launchpad, tmp_path).post(
        "/api/ml/gnn/properties",
        json={"structure_ids": keys, "model_name": "cgcnn_bandgap_v1"},
    )
    assert answer.status_code == 424
    assert "import-cgcnn" in answer.json()["advice"]
    assert "prediction" not in answer.json()


def test_predictions_are_those_of_the_model(
    launchpad: Any, keys: list[str], tmp_path: Path
) -> None:
    import torch

    from nanoos_fw.ml.cgcnn import Architecture, CGCNNModel, ModelCard
    from nanoos_fw.ml.model_files import atom_features, save_checkpoint
    from nanoos_fw.ml.network import CrystalGraphNetwork

    torch.manual_seed(0)
    architecture = Architecture(hidden_dim=8, num_layers=1)
    weights = tmp_path / "model.safetensors"
    card = ModelCard(
        target_property="bandgap",
        unit="eV",
        architecture=architecture,
        n_members=1,
        target_mean=1.0,
        target_std=2.0,
        cutoff_radius=6.0,
        max_neighbors=8,
        elements=(17, 55),
        dataset_hash="0" * 40,
        n_train=7,
    )
    network = CrystalGraphNetwork(architecture, atom_features())
    save_checkpoint(
        weights, card, [network.state_dict()], atom_features(), np.zeros(119)
    )
    database = open_database(launchpad)
    ModelRegistry(database).register(
        name="gaps",
        target="bandgap",
        unit="eV",
        model_type="CGCNN",
        weights=weights,
        training_key="k",
        training_config={},
        metrics={},
        dataset_info={},
        environment={},
    )
    # Features of these parameters for one of them; the other's are computed.
    compute_features(
        database, keys[:1], FeatureParameters(cutoff_radius=6.0, max_neighbors=8)
    )
    answer = client(launchpad, tmp_path).post(
        "/api/ml/gnn/properties",
        json={"structure_ids": ["s0", "s1"], "model_name": "gaps@1"},
    )
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["model"], found["unit"], found["cached_features"]) == (
        "gaps@1",
        "eV",
        1,
    )
    model = CGCNNModel("gaps", "bandgap").load_from_checkpoint(weights)
    stored = StructureStore(database).get_many(keys)
    for row in found["predictions"]:
        structure = stored[row["structure_id"]].structure
        graph, _ = extract_structure_features(structure, 6.0, 8)
        assert row["prediction"] == pytest.approx(model.predict(graph)["prediction"])
        assert row["uncertainty"] is None


# ------------------------------------------------------------------------- training


def test_a_training_is_submitted_once_by_what_the_command_line_uses(
    launchpad: Any, tmp_path: Path
) -> None:
    graphs = {
        f"s{i}": build_graph(
            Structure(Lattice.cubic(3 + 0.1 * i), ["Cs", "Cl"], [[0] * 3, [0.5] * 3])
        )
        for i in range(12)
    }
    config = DatasetConfig(target_property="bandgap")
    targets = {name: float(i) for i, name in enumerate(graphs)}
    dataset = build_regression_dataset(graphs, targets, config)
    write_dataset(dataset, tmp_path / "dataset")
    asked = {
        "dataset": str(tmp_path / "dataset"),
        "target": "bandgap",
        "model_name": "gaps",
        "settings": {"epochs": 3},
    }
    reading = client(launchpad, tmp_path).post("/api/ml/train", json=asked)
    assert reading.status_code == 403
    web = client(launchpad, tmp_path, may_write=True)
    answers = [web.post("/api/ml/train", json=asked) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert [answer.json()["submitted"] for answer in answers] == [True, False]
    (firework,) = launchpad.fireworks.find()
    (task,) = firework["spec"]["_tasks"]
    assert task["_fw_name"] == "{{nanoos_fw.firetasks.TrainModelTask}}"
    assert (task["model_name"], task["training"]["epochs"]) == ("gaps", 3)
    assert task["dataset_hash"] == dataset.dataset_hash
    # The command line would make the same workflow, so it finds this one.
    again = submit_training(
        launchpad, tmp_path / "dataset", "bandgap", "gaps", tmp_path / "work",
        settings={"epochs": 3},
    )  # fmt: skip
    assert (again.added, again.workflow) == (False, answers[0].json()["workflow"])
    for change, status, words in (
        ({"parent": "none@1"}, 404, "no model"),
        ({"dataset": str(tmp_path)}, 404, "holds no dataset"),
        ({"dataset": "x" * 5000}, 422, ""),
        ({"target": "energy"}, 422, "bandgap"),
        ({"settings": {"epochs": -1}}, 422, "epochs"),
        ({"settings": {"target": "energy"}}, 422, "energy"),
        ({"model_name": "a@b"}, 422, ""),
    ):
        refused = web.post("/api/ml/train", json={**asked, **change})
        assert refused.status_code == status, refused.text
        assert words in refused.json()["message"]
    assert launchpad.workflows.count_documents({}) == 1


# ---------------------------------------------------------------------------- pages


def test_pages_show_what_the_stores_hold_and_escape_it(
    launchpad: Any, keys: list[str], tmp_path: Path
) -> None:
    database = open_database(launchpad)
    CampaignStore(database).create(HOSTILE, {"a": 1})
    launchpad.fireworks.insert_many(
        {
            "fw_id": number,
            "name": "x",
            "state": state,
            "launches": [number],
            "spec": {"nanoos": {"campaign": HOSTILE, "stage": HOSTILE, "order": 1}},
        }
        for number, state in enumerate(("COMPLETED", "RUNNING", "FIZZLED"))
    )
    stored = {"_exception": {"_details": OutOfMemoryError(HOSTILE).to_dict()}}
    launchpad.launches.insert_one(
        {
            "launch_id": 2,
            "fw_id": 2,
            "state": "FIZZLED",
            "action": {"stored_data": stored},
        }
    )
    SimulationStore(database).put_many(
        [
            Simulation(
                structure=keys[0],
                method="m",
                kind="md",
                status="failed",
                error={"message": HOSTILE, "advice": HOSTILE},
            )
        ]
    )
    web = client(launchpad, tmp_path)
    (run,) = SimulationStore(database).newest("md", 5)
    pages = {
        path: web.get(path)
        for path in ("/", f"/campaigns/{HOSTILE}", "/runs", f"/runs/{run.key}",
                     "/features", "/models")
    }  # fmt: skip
    for path, answer in pages.items():
        assert answer.status_code == 200, path
        assert HOSTILE not in answer.text
        assert "script-src 'sha256-" in answer.headers["content-security-policy"]
        assert answer.headers["x-frame-options"] == "DENY"
    assert "1 oom" in pages[f"/campaigns/{HOSTILE}"].text
    (label,) = re.findall('aria-label="(1 [^"]*)"', pages["/"].text)
    assert sorted(label.split(", ")) == ["1 completed", "1 fizzled", "1 running"]
    assert "CsCl" in pages["/runs"].text
    assert ">0 of 2<" in pages["/features"].text
    assert web.get("/runs/none").status_code == 404
    assert web.get("/campaigns/none").status_code == 404


def test_the_page_of_a_finished_run_draws_it(
    launchpad: Any, keys: list[str], tmp_path: Path
) -> None:
    steps = np.arange(0, 1000, 10)
    columns = {
        "temperature_k": 300 + 5 * np.sin(steps),
        "pressure_bar": 100 * np.cos(steps),
        "volume_a3": np.full(len(steps), 68.9),
        "potential_energy_ev": np.full(len(steps), -6.5),
    }
    mean = {"mean": 300.0, "standard_error": 1.0}
    SimulationStore(open_database(launchpad)).put_many(
        [
            Simulation(
                structure=keys[0],
                method="m",
                kind="md",
                status="done",
                result={
                    "workflow_type": "MD_NVT_LAMMPS",
                    "thermo": {
                        "step": steps.tolist(),
                        **{name: list(values) for name, values in columns.items()},
                    },
                    "averages": {"temperature_k": mean},
                    "timestep_fs": 1.0,
                    "steps": 1000,
                    "equilibration_steps": 100,
                    "temperature_k": 300.0,
                    "n_atoms": 2,
                },
            )
        ]
    )
    web = client(launchpad, tmp_path)
    (run,) = SimulationStore(open_database(launchpad)).newest("md", 5)
    assert "300.0 ± 1.0" in web.get("/runs").text
    page = web.get(f"/runs/{run.key}").text
    assert 'data-figure="md-1-thermo"' in page
    assert "molecular dynamics" in page


def test_the_page_of_a_run_without_steps_in_time_shows_its_numbers(
    launchpad: Any, keys: list[str], tmp_path: Path
) -> None:
    result = {
        "workflow_type": "ELASTIC_LAMMPS", "ensemble": "static", "n_atoms": 2,
        "steps": 0, "timestep_fs": 1.0, "equilibration_steps": 0,
        "temperature_k": 300.0, "seed": 1, "corrections": [], "averages": {},
        "thermo": {"step": []}, "final_energy": -6.5,
        "elastic": {"stable": True, "bulk_gpa": 81.25, "stiffness_gpa": [[7.125]]},
    }  # fmt: skip
    store = SimulationStore(open_database(launchpad))
    store.put_many(
        [
            Simulation(
                structure=keys[0], method="m", kind="md", status="done", result=result
            )
        ]
    )
    web = client(launchpad, tmp_path)
    (run,) = store.newest("md", 5)
    answer = web.get(f"/runs/{run.key}")
    assert answer.status_code == 200
    cells = re.findall('<th scope="row">([^<]*)</th><td>(.*?)</td></tr>', answer.text)
    found = {name: re.sub("<[^>]*>", "", value) for name, value in cells}
    assert found == {
        "ensemble": "static", "n_atoms": "2", "steps": "0", "final_energy (eV)": "-6.5",
        "elastic: stable": "yes", "elastic: bulk_gpa": "81.25",
        "elastic: stiffness_gpa": "7.125",
    }  # fmt: skip


# ----------------------------------------------------------------- its own description


def test_the_api_does_what_its_description_says(
    launchpad: Any, registry: ModelRegistry, keys: list[str], tmp_path: Path
) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    app = client(launchpad, tmp_path, may_write=True).app
    headers = {"Authorization": f"Bearer {TOKEN}", "Host": "127.0.0.1:8000"}
    described = schemathesis.openapi.from_asgi("/openapi.json", app, headers=headers)
    tried = []
    for result in described.get_all_operations():
        operation = result.ok()
        tried.append(f"{operation.method} {operation.path}")

        @given(case=operation.as_strategy())
        @settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def answers_as_described(case: Any) -> None:
            case.call_and_validate(headers=headers)

        answers_as_described()
    assert sorted(tried) == [
        "get /api/ml/models",
        "get /api/ml/models/{reference}",
        "post /api/ml/features/batch",
        "post /api/ml/features/structure/{structure_id}",
        "post /api/ml/gnn/properties",
        "post /api/ml/train",
    ]
