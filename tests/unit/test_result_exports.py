"""Files of results: every format gives the same rows back, bit for bit."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.operations.result_exports import (
    export_predictions,
    export_simulations,
    import_results,
)
from nanoos_fw.operations.row_files import read_rows, write_rows
from nanoos_fw.stores.models import ModelRegistry
from nanoos_fw.stores.predictions import Prediction
from nanoos_fw.stores.simulations import Simulation, SimulationStore
from nanoos_fw.stores.structures import NewStructure, StructureStore
from nanoos_fw.structure_files import read_structures

HARD_TEXTS = [
    "", " ", '"', "it's 'so' ", "a=1 b=2", 'x", "y', "line\nbreak", "Å,é;\t", "null",
]  # fmt: skip
HARD_DOUBLES = [0.1, -0.0, 1 / 3, 5e-324, -1.7976931348623157e308, 1e22, 123456789.0]


@pytest.fixture(params=["csv", "jsonl", "parquet", "extxyz"])
def suffix(request: pytest.FixtureRequest) -> str:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return str(request.param)


def bits(value: Any) -> Any:
    """Return what tells -0.0 from 0.0, and an integer from a double."""
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, dict):
        return {name: bits(own) for name, own in value.items()}
    return [bits(own) for own in value] if isinstance(value, list) else value


def test_hard_values_come_back_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    doubles = [*HARD_DOUBLES, *rng.normal(size=5000 - len(HARD_DOUBLES)).tolist()]
    rows = [
        {
            "number": i - 3,
            "text": None if i % 11 == 10 else HARD_TEXTS[i % len(HARD_TEXTS)],
            "flag": None if i % 3 == 2 else i % 3 == 1,
            "double": None if i % 7 == 6 else value,
            "single": float(str(np.float32(value if abs(value) < 1e38 else 1.0))),
            "json": [None, {"a": [value, "it's", None, {}]}, [], "", 3][i % 5],
        }
        for i, value in enumerate(doubles)  # more than are written at once
    ]
    columns: dict[str, Any] = {
        "number": "int", "text": "text", "flag": "bool", "double": "double",
        "single": "single", "json": "json",
    }  # fmt: skip
    path = tmp_path / f"rows.{suffix}"
    head = {"units": {"double": "eV"}, "whose": "it's \"mine\" ' here"}
    crystal = (np.array([29], dtype=np.uint8), 3.0 * np.eye(3), np.zeros((1, 3)))
    count = write_rows(path, head, columns, iter(rows), lambda _: crystal)
    assert count == len(rows)
    told, back = read_rows(path)
    assert {name: told[name] for name in head} == head
    assert bits(list(back)) == bits(rows)
    write_rows(
        path, head, columns, [rows[0] | {"json": doubles * 3}], lambda _: crystal
    )
    assert next(read_rows(path)[1])["json"] == doubles * 3  # hundreds of kB
    write_rows(path, head, columns, [], lambda _: crystal)
    if suffix != "extxyz":  # has no frame to tell where it is from
        assert list(read_rows(path)[1]) == []


def test_a_file_that_was_cut_short_is_told(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    columns: dict[str, Any] = {"number": "int", "json": "json"}
    rows = [{"number": n, "json": {"series": [0.125] * 9}} for n in range(9)]
    crystal = (np.array([29], dtype=np.uint8), 3.0 * np.eye(3), np.zeros((1, 3)))
    write_rows(path, {}, columns, rows, lambda _: crystal)
    text = path.read_bytes()
    path.write_bytes(text[: text.rfind(b"0.125, 0.125")])
    with pytest.raises(CorruptArtifactError, match=r"damaged after 8 rows|no export"):
        list(read_rows(path)[1])


def test_a_broken_export_leaves_the_file_before(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    crystal = (np.array([29], dtype=np.uint8), 3.0 * np.eye(3), np.zeros((1, 3)))

    def broken() -> Any:
        yield {"n": 2}
        raise RuntimeError("database away")

    columns: dict[str, Any] = {"n": "int"}
    write_rows(path, {"units": {}}, columns, [{"n": 1}], lambda _: crystal)
    with pytest.raises(RuntimeError):
        write_rows(path, {"units": {}}, columns, broken(), lambda _: crystal)
    assert list(read_rows(path)[1]) == [{"n": 1}]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]

    def meanwhile() -> Any:
        write_rows(path, {"units": {}}, columns, [{"n": 3}], lambda _: crystal)
        yield {"n": 4}

    write_rows(path, {"units": {}}, columns, meanwhile(), lambda _: crystal)
    assert list(read_rows(path)[1]) == [{"n": 4}]
    path.write_text('2\nLattice="1 0 0"\n' if suffix == "extxyz" else "a,b\n1,2\n")
    with pytest.raises(CorruptArtifactError, match="no export of results"):
        read_rows(path)


@pytest.fixture
def filled(embedded_database: Any, tmp_path: Path, copper: Any, rock_salt: Any) -> Any:
    fill_models(embedded_database, tmp_path)
    StructureStore(embedded_database).add(
        [NewStructure(structure=s, label=s.formula) for s in (copper, rock_salt)],
        in_set="some",
    )
    return embedded_database


def fill_models(database: Any, folder: Path, weights: bytes = b"weights") -> None:
    (folder / "w").write_bytes(weights)
    ModelRegistry(database).register(
        name="gaps", target="bandgap", unit="eV", model_type="CGCNN",
        weights=folder / "w", training_key="k", training_config={}, metrics={},
        dataset_info={}, environment={},
    )  # fmt: skip


def another(database: Any) -> Any:
    return database.client[database.name + "_another"]


def test_predictions_move_to_another_database(
    filled: Any, tmp_path: Path, suffix: str
) -> None:
    keys = StructureStore(filled).keys()
    rows = [
        Prediction(keys[0], 0.1 + 0.2, 1 / 3, False, 2 / 3, 0.9, math.pi),
        Prediction(keys[1], -0.0, None, True),
    ]
    ModelRegistry(filled).put_predictions("gaps@1", rows)
    path = tmp_path / f"gaps.{suffix}"
    assert export_predictions(filled, "gaps@1", path, "some") == 2
    head, _ = read_rows(path)
    assert (head["model"]["reference"], head["units"]["prediction"]) == ("gaps@1", "eV")
    database = another(filled)
    with pytest.raises(InputError):
        import_results(database, path)
    fill_models(database, tmp_path)
    assert import_results(database, path).added == 2
    assert import_results(database, path).added == 0
    back = ModelRegistry(database).predictions("gaps@1", keys)
    assert [bits(vars(row)) for row in back] == [bits(vars(row)) for row in rows]
    other = database.client[database.name + "_other"]
    fill_models(other, tmp_path, b"other weights")
    with pytest.raises(InputError, match="other weights"):
        import_results(other, path)
    if suffix == "extxyz":
        frames = [entry.structure for entry in read_structures(path)]
        stored = StructureStore(filled).get_many(keys)
        for key, frame in zip(keys, frames, strict=True):
            assert frame.matches(stored[key].structure, scale=False)


def test_simulations_move_to_another_database(
    filled: Any, tmp_path: Path, suffix: str
) -> None:
    keys = StructureStore(filled).keys()
    simulations = [
        Simulation(
            keys[0], "m", "md", "done",
            result={"energy_ev": -7.1 / 3, "steps": 1000, "kind": 2.5,
                    "thermo": {"step": [0, 10], "temperature_k": [300.1, 1 / 7]}},
            files={"dump": "/data/it's here"}, environment={"host": "a"},
        ),
        Simulation(keys[1], "m", "md", "failed",
                   error={"kind": "simulation", "message": 'lost "atoms"'}),
        Simulation(keys[1], "m2", "md", "done", result={"volume_a3": 1e300}),
        Simulation(keys[0], "r", "relaxation", "done", result={"energy_ev": 1.0}),
    ]  # fmt: skip
    SimulationStore(filled).put_many(simulations)
    path = tmp_path / f"md.{suffix}"
    assert export_simulations(filled, "md", path) == 3
    database = another(filled)
    assert import_results(database, path).added == 3
    assert import_results(database, path).added == 0
    back = list(SimulationStore(database).each("md"))
    there = list(SimulationStore(filled).each("md"))
    assert bits([vars(own) for own in back]) == bits([vars(own) for own in there])
    assert sorted(own.key for own in back) == sorted(s.key for s in simulations[:3])
    assert export_simulations(filled, "relaxation", path) == 1
    write_rows(path, {"units": {}}, {"n": "int"}, [{"n": 1}], lambda _: (
        np.array([29], dtype=np.uint8), 3.0 * np.eye(3), np.zeros((1, 3))
    ))  # fmt: skip
    with pytest.raises(InputError, match="no predictions of structures"):
        import_results(database, path)
