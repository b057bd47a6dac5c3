"""``nanoos screen`` from files to a ranking, and its fireworks in a real launch."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import HANGING_S, RLAUNCH
from pymatgen.core import Lattice, Structure

from nanoos_fw.cli import main as nanoos
from nanoos_fw.errors import InputError
from nanoos_fw.ml.candidates import open_candidates
from nanoos_fw.ml.cgcnn import Architecture, ModelCard, atom_features, save_checkpoint
from nanoos_fw.ml.network import CrystalGraphNetwork
from nanoos_fw.ml.ranking import expected_improvement, normal_of
from nanoos_fw.operations.row_files import read_rows
from nanoos_fw.stores.database import load_launchpad, open_database
from nanoos_fw.stores.models import ModelRegistry
from nanoos_fw.stores.structures import NewStructure, StructureStore

pytestmark = pytest.mark.mongodb
pyarrow = pytest.importorskip("pyarrow")

TARGETS = {"energy": "formation_energy_per_atom", "gap": "bandgap"}


def cesium_chloride(a: float, pair: tuple[str, str] = ("Ni", "Al")) -> Structure:
    return Structure(Lattice.cubic(a), pair, [[0, 0, 0], [0.5, 0.5, 0.5]])


@pytest.fixture
def database(launchpad_file: Path, tmp_path: Path) -> Any:
    found = open_database(load_launchpad(launchpad_file))
    sizes = Architecture(hidden_dim=8, num_layers=1, readout_dim=4)
    for seed, (name, target) in enumerate(TARGETS.items()):
        torch.manual_seed(seed)
        members = [CrystalGraphNetwork(sizes, atom_features()) for _ in range(2)]
        card = ModelCard(
            target_property=target,
            unit="eV/atom" if seed == 0 else "eV",
            target_mean=0.0,
            target_std=1.0,
            n_members=2,
            architecture=sizes,
            cutoff_radius=6.0,
            max_neighbors=8,
            elements=(11, 13, 17, 28, 29, 79),
            dataset_hash="0",
            n_train=4,
        )
        states = [member.state_dict() for member in members]
        save_checkpoint(tmp_path / name, card, states, atom_features(), np.zeros(119))
        ModelRegistry(found).register(
            name=name, target=target, unit=card.unit, model_type="CGCNN",
            weights=tmp_path / name, training_key=name, training_config={},
            metrics={}, dataset_info={}, environment={},
        )  # fmt: skip
    return found


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str, code: int = 0) -> Any:
        assert nanoos(["screen", *map(str, words)]) == code
        out, err = capsys.readouterr()
        return json.loads(out) if out.startswith(("{", "[")) else out or err

    return run


def write_bad_inputs(folder: Path) -> list[Path]:
    """Write 13 entries of three files and a folder; six of them are no crystals."""
    cifs = folder / "cifs"
    cifs.mkdir()
    for name, a in (("a", 2.9), ("c", 3.0)):
        cesium_chloride(a).to(filename=str(cifs / f"{name}.cif"), fmt="cif")
    (cifs / "b.cif").write_text("data_broken\n_cell_length_a 3\n")  # in the middle
    alloy = Structure(Lattice.cubic(3.6), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]])
    lines = folder / "lines.jsonl"
    crystals = [cesium_chloride(3.1), alloy, cesium_chloride(3.2, ("Cu", "Au"))]
    texts = [json.dumps(crystal.as_dict()) for crystal in crystals]
    lines.write_text("\n".join([texts[0], "{not json", *texts[1:]]) + "\n")
    good = cesium_chloride(3.3)
    row = {
        "numbers": [28, 13],
        "lattice": good.lattice.matrix.ravel().tolist(),
        "frac_coords": good.frac_coords.ravel().tolist(),
        "label": "twin",
    }
    rows = [
        row,
        {**row, "lattice": [math.nan, *row["lattice"][1:]], "label": "nan"},
        row,  # a label twice, and the same crystal: both are candidates
        {**row, "numbers": [28], "label": "short"},
        {**row, "frac_coords": [0.0] * 6, "label": "one in the other"},
        {**row, "numbers": [0, 13], "label": 'it\'s "nothing"'},
    ]
    import pyarrow.parquet

    table = folder / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    damaged = folder / "damaged.parquet"
    damaged.write_bytes(table.read_bytes()[:-9])
    return [cifs, lines, table, damaged]


def test_bad_inputs_lose_nothing_and_each_has_one_outcome(
    database: Any, tmp_path: Path, command: Any
) -> None:
    paths = write_bad_inputs(tmp_path)
    packed = command("pack", *paths, "-o", tmp_path / "pack", code=1)
    assert (packed["count"], packed["failed"], packed["repeated_labels"]) == (14, 7, 1)
    # JSON is YAML, and blanks and quotes in labels come back from every file.
    spec = tmp_path / "spec.json"
    given = {
        "candidates": packed["candidates"],
        "models": ["energy@1", "gap@1"],
        "filters": {"exclude": ["Cu"]},
        "chunk": 4,
    }
    spec.write_text(json.dumps(given))
    ran = command("run", "files", "--spec", spec, "--json")
    assert (ran["chunks"], ran["written"], ran["candidates"]) == (4, 4, 14)
    proof = command("verify", "files", "--json")
    assert (proof["outcomes"], proof["missing"], proof["repeated"]) == (14, 0, 0)
    expected = {"predicted": 5, "composition": 1, "no_graph": 1, "unreadable": 7}
    assert proof["by_status"] == expected

    source = open_candidates(packed["candidates"])
    labels = [source.label(i) for i in range(14)]
    assert (labels[0], labels[2], labels.count("twin")) == ("a", "c", 2)
    for suffix in ("csv", "jsonl", "parquet"):
        rows = {}
        for words in ((), ("--refused",)):
            path = tmp_path / f"rows.{suffix}"
            command("export", "files", "-o", path, *words)
            head, found = read_rows(path)
            assert head["units"]["bandgap.mean"] == "eV"
            found = list(found)
            assert not rows.keys() & {row["candidate"] for row in found}
            rows |= {row["candidate"]: row for row in found}
        assert sorted(rows) == list(range(14))
        assert [rows[i]["label"] for i in range(14)] == labels
        told = [row for row in rows.values() if "reason" in row]
        assert len(told) == 9
        assert all(row["reason"] for row in told)
        by_label = {row["label"]: row for row in told}
        assert "not finite" in by_label["nan"]["reason"]
        assert "sites" in by_label["short"]["reason"]
        assert by_label["one in the other"]["outcome"] == "no_graph"
        assert by_label['it\'s "nothing"']["outcome"] == "unreadable"
        assert any("disordered" in row["reason"] for row in told)
    refused = command("export", "files", "-o", "x.extxyz", "--refused", code=1)
    assert "no structures" in refused
    best = command("top", "files", "-k", "1", "--all-domains", "--json")
    path = tmp_path / "best.extxyz"
    command("export", "files", "-o", path, "-k", "5", "--all-domains")
    exported = list(read_rows(path)[1])
    assert exported[0]["label"] == best[0]["label"]
    # Twins have equal predictions: the lower number comes first.
    twins = [row for row in exported if row["label"] == "twin"]
    assert [row["candidate"] for row in twins] == sorted(
        row["candidate"] for row in twins
    )
    assert twins[0]["score"] == twins[1]["score"]


ALLOYS = {
    "kind": "supercells",
    "prototype": "B2",
    "elements": [["Ni", "Cu", "Au"], ["Al", "Ti"]],
    "repeat": [2, 1, 1],
}


def test_rankings_of_the_command_line_are_those_of_the_formulas(
    database: Any, tmp_path: Path, command: Any
) -> None:
    store = StructureStore(database)
    store.add([NewStructure(structure=cesium_chloride(2.9), label="x")], in_set="old")
    # YAML this time, the store's structures as known compositions.
    spec = tmp_path / "spec.yaml"
    text = json.dumps(
        {"candidates": ALLOYS, "models": ["energy@1", "gap@1"], "known_set": "old"}
    )
    spec.write_text(text)
    command("run", "alloys", "--spec", spec, "--workers", "2")
    path = tmp_path / "all.jsonl"
    command("export", "alloys", "-o", path)
    rows = list(read_rows(path)[1])
    assert len(rows) == 36
    numbers = np.array([row["candidate"] for row in rows])
    columns = {
        name: np.array([row[name] for row in rows], dtype=np.float64)
        for name in (
            "formation_energy_per_atom.mean", "formation_energy_per_atom.std",
            "bandgap.mean", "bandgap.std",
        )
    }  # fmt: skip
    mean, std, gap, _ = columns.values()
    # Titanium was not in the training: half of the candidates are out of its domain.
    inside = np.array([not row["bandgap.out_of_domain"] for row in rows])
    assert 0 < inside.sum() < len(rows)

    def top(*words: str) -> list[int]:
        answer = command("top", "alloys", "-k", "5", "--json", *words)
        assert [row["rank"] for row in answer] == list(range(1, len(answer) + 1))
        return [row["candidate"] for row in answer]

    def first(scores: Any, keep: Any = None) -> list[int]:
        order = np.lexsort((numbers, scores))
        kept = order[(inside if keep is None else keep)[order]]
        return [int(i) for i in numbers[kept[:5]]]

    assert top() == first(mean)
    assert top("--all-domains") == first(mean, inside | True)
    assert top("--objective", "max", "--model", "1") == first(-gap)
    assert top("--by", "ucb", "--kappa", "2") == first(mean - 2 * std)
    best = float(np.median(mean))
    gain = expected_improvement(best - mean, std)
    assert top("--by", "ei", "--best", str(best)) == first(-gain)
    drawn = [top("--by", "thompson", "--seed", seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] == first(mean + std * normal_of(numbers, 1))
    assert drawn[2] == first(mean + std * normal_of(numbers, 2))
    known = np.array([row["known_composition"] for row in rows])
    assert known.any()
    assert top("--new") == first(mean, ~known & inside)
    front = command("top", "alloys", "--pareto", "0:min,1:max", "--json")
    cost = np.stack([mean, -gap], axis=1)[inside]
    beaten = ((cost[:, None] >= cost).all(2) & (cost[:, None] > cost).any(2)).any(1)
    assert {row["candidate"] for row in front} == set(numbers[inside][~beaten].tolist())
    # These models were not calibrated, so they know no distance to their training.
    assert "no distance" in command("top", "alloys", "--min-novelty", "0.1", code=1)
    assert "best" in command("top", "alloys", "--by", "ei", code=1)
    assert "model:min" in command("top", "alloys", "--pareto", "0", code=1)
    assert "ties: the lower number first" in command("top", "alloys")


def test_fireworks_of_a_screening_run_in_a_real_launch(
    database: Any, tmp_path: Path, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    store = StructureStore(database)
    crystals = [cesium_chloride(2.8 + 0.02 * i) for i in range(10)]
    store.add(
        [NewStructure(structure=c, label=f"s{i}") for i, c in enumerate(crystals)],
        in_set="mine",
    )
    packed = command("pack", "--set", "mine", "-o", tmp_path / "pack")
    assert (packed["count"], packed["failed"]) == (10, 0)
    spec = tmp_path / "spec.json"
    candidates = {
        "kind": "strain",
        "source": packed["candidates"],
        "strains": [[0.01 * i] * 3 + [0] * 3 for i in range(-2, 3)],
    }
    given = {"candidates": candidates, "models": ["energy@1"], "chunk": 5}
    spec.write_text(json.dumps(given))
    words = ("submit", "strained", "--spec", spec, "--minutes", "1e-7", "--json")
    first = command(*words)
    assert first["submitted"]
    assert first["fireworks"] == 50 // first["window"]
    assert not command(*words)["submitted"]
    status = command("status", "strained", "--json")
    assert status["chunks"] == [2, 10]  # the probe's are kept
    assert status["core_s_estimated"] > 0
    assert "missing: 40" in command("verify", "strained", code=1)
    assert nanoos(["screen", "export", "strained", "-o", str(tmp_path / "a.csv")]) == 0
    assert "only 10 of 50 candidates" in capsys.readouterr().err
    head = read_rows(tmp_path / "a.csv")[0]
    assert (head["screened"], head["count"]) == (10, 50)

    done = subprocess.run(
        [*RLAUNCH, "-l", os.environ["NANO_OS_LAUNCHPAD"], "rapidfire", "--nlaunches",
         str(first["fireworks"])],
        capture_output=True, text=True, timeout=HANGING_S, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
    )  # fmt: skip
    states = [f["state"] for f in database["fireworks"].find({}, {"state": 1})]
    assert states == ["COMPLETED"] * first["fireworks"], done.stdout[-2000:]
    actions = [
        launch["action"]["stored_data"]
        for launch in database["launches"].find({}, {"action": 1})
    ]
    told = [data["screen"] if "hit" not in data else data for data in actions]
    assert sum(data["hit"] for data in told) == 2
    assert sum(data["written"] for data in told) == 8
    proof = command("verify", "strained", "--json")
    assert (proof["outcomes"], proof["missing"], proof["repeated"]) == (50, 0, 0)
    # What fireworks wrote equals what a process writes here, bit for bit.
    command("run", "again", "--spec", spec)
    assert command("verify", "again", "--json")["sha256"] == proof["sha256"]
    rows = command("top", "strained", "-k", "3", "--all-domains", "--json")
    keys = store.keys("mine")
    for row in rows:
        assert row["label"] == f"{keys[row['candidate'] // 5]}#{row['candidate'] % 5}"


def test_what_cannot_be_screened_is_refused_by_name(
    database: Any, tmp_path: Path, command: Any
) -> None:
    assert "no screening 'none'" in command("status", "none", code=1)
    spec = tmp_path / "spec.json"
    for change, words in (
        ({"models": ["none"]}, "none"),
        ({"candidates": {"kind": "magic"}}, "candidates"),
        ({"chunk": 0}, "chunk"),
        ({"filters": {"sites": 3}}, "filters"),
    ):
        spec.write_text(
            json.dumps({"candidates": ALLOYS, "models": ["energy@1"], **change})
        )
        assert words in command("run", "x", "--spec", spec, code=1)
    spec.write_text("{")
    assert "not JSON" in command("run", "x", "--spec", spec, code=1)
    assert "not both" in command("pack", "-o", tmp_path / "p", code=1)
    (tmp_path / "empty.cif").write_text("")
    refused = command("pack", tmp_path / "empty.cif", "-o", tmp_path / "p", code=1)
    assert "none of the entries is a crystal" in refused
    assert not list(tmp_path.glob(".p*"))
    with pytest.raises(InputError, match="there is no pack"):
        open_candidates({"kind": "pack", "directory": str(tmp_path), "key": "k"})
