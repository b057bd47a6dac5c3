"""Features, datasets and schema from the command line, each in its own process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanoos_fw.cli.common import print_json
from nanoos_fw.console import CountProgress
from nanoos_fw.stores.database import SCHEMA_VERSION


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line as users do; the embedded database needs its own process."""
    return subprocess.run(
        [sys.executable, "-m", "nanoos_fw.cli", *words],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def answer(*words: str, cwd: Path, code: int = 0) -> Any:
    done = run(*words, "--json", cwd=cwd)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def message(*words: str, cwd: Path) -> str:
    done = run(*words, cwd=cwd)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve structures with energies, and one atom all alone, imported."""
    path = tmp_path_factory.mktemp("cli")
    (path / "db").mkdir()
    (path / "db" / "database.json").write_text("{}")
    frames = []
    for i in range(12):
        a, other = 3.0 + 0.05 * i, ["Ni", "Ti", "Fe"][i % 3]
        frames.append(
            f'2\nLattice="{a} 0 0 0 {a} 0 0 0 {a}" Properties=species:S:1:pos:R:3 '
            f'energy={-i - 1.5} pbc="T T T"\n'
            f"Al 0 0 0\n{other} {a / 2} {a / 2} {a / 2}\n"
        )
    (path / "good.extxyz").write_text("".join(frames))
    (path / "POSCAR.alone.vasp").write_text(
        "Ar\n30\n1 0 0\n0 1 0\n0 0 1\nAr\n1\ndirect\n0 0 0\n"
    )
    for name, in_set in (("good.extxyz", "good"), ("POSCAR.alone.vasp", "alone")):
        done = run("import", name, "--set", in_set, "-l", "db", cwd=path)
        assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_features_datasets_and_exports_from_end_to_end(folder: Path) -> None:
    db = ("-l", "db")
    status = answer("features", "status", "--set", "good", *db, cwd=folder)
    assert status["counts"] == {"hit": 0, "stale": 0, "quarantined": 0, "missing": 12}

    found = answer("features", "compute", "--all", "--workers", "2", *db, cwd=folder,
                   code=1)  # fmt: skip
    assert found["counts"] == {"hit": 0, "computed": 12, "quarantined": 1}
    (alone,) = [
        k for k, s in found["structures"].items() if s["state"] == "quarantined"
    ]
    assert "isolated" in found["structures"][alone]["reason"]

    again = run("features", "compute", "--set", "good", *db, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert again.stdout == "12 structures: 12 hit, 0 computed, 0 quarantined\n"
    one = answer("features", "compute", alone[:10], "--retry", *db, cwd=folder, code=1)
    assert list(one["structures"]) == [alone]
    status = answer("features", "status", "--cutoff", "6", *db, cwd=folder)
    assert status["counts"]["stale"] == 13

    key = next(iter(found["structures"]))
    shown = answer("features", "show", key, *db, cwd=folder)
    assert shown["entries"][0]["scalars"]["n_sites"] == 2.0
    plain = run("features", "show", key[:12], *db, cwd=folder)
    assert "density" in plain.stdout
    assert "g/cm³" in plain.stdout

    built = answer(
        "dataset", "build", "--set", "good", "--target", "energy_per_atom",
        "--min-samples", "5", "-o", "data", *db, cwd=folder,
    )  # fmt: skip
    assert sum(built["counts"].values()) == 12
    assert built["unit"] == "eV/atom"
    assert built["leakage"]["same_structure"] == 0
    shown = answer("dataset", "show", "data", cwd=folder)
    assert shown["dataset_hash"] == built["dataset_hash"]
    assert run("dataset", "show", "data", cwd=folder).stdout.startswith("dataset ")
    exported = answer("dataset", "export", "data", "-o", "d.csv", cwd=folder)
    assert exported["rows"] == 12
    assert len((folder / "d.csv").read_text().splitlines()) == 13

    # A property from a table becomes the target, of the structures of a query.
    keys = [k for k in found["structures"] if k != alone]
    rows = [f"{key},{100 * number}" for number, key in enumerate(keys)]
    (folder / "gaps.csv").write_text("\n".join(["key,value", *rows, "nobody,1"]))
    table = answer(
        "import-table", "gaps.csv", "--property", "bandgap", "--unit", "meV",
        "--source", "a paper", *db, cwd=folder, code=1,
    )  # fmt: skip
    assert sorted(table["written"]) == sorted(keys)
    assert [failure["line"] for failure in table["failures"]] == [14]
    query = json.dumps({"properties.bandgap": {"$gte": 0.2}})
    built = answer(
        "dataset", "build", "--query", query, "--target", "bandgap", "--min-samples",
        "5", "-o", "gaps", *db, cwd=folder,
    )  # fmt: skip
    assert (sum(built["counts"].values()), built["unit"]) == (10, "eV")
    status = answer("features", "status", "--query", query, *db, cwd=folder)
    assert status["counts"]["hit"] == 10
    mock = run(
        "dataset", "build", "--query", query, "--target", "x", "--min-samples", "5",
        "--mock-targets", "-o", "mock", *db, cwd=folder,
    )  # fmt: skip
    assert "made up (mock)" in mock.stdout
    assert json.loads((folder / "mock" / "manifest.json").read_text())["mock_targets"]
    for rest, words in (
        (("--query", "{", "--target", "x"), "not JSON"),
        (("--query", "{}", "--set", "good", "--target", "x"), "not both"),
        (("--query", '{"label": "?"}', "--target", "x"), "finds none of"),
        (("--references", "good", "--target", "energy"), "--references needs --method"),
        (("--method", "m", "--target", "energy"), "has a simulation by method"),
        (("--campaign", "c", "--target", "energy"), "no campaign 'c'"),
    ):
        told = message("dataset", "build", "-o", "no", *rest, *db, cwd=folder)
        assert words in told


def test_the_schema_is_shown_and_moved(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "database.json").write_bytes(
        (folder / "db" / "database.json").read_bytes()
    )
    db = ("-l", "db")
    assert answer("db", "status", *db, cwd=tmp_path)["schema"] == SCHEMA_VERSION
    dry = answer("db", "migrate", "--to", "1", "--dry-run", *db, cwd=tmp_path)
    down = [(v, v - 1) for v in range(SCHEMA_VERSION, 1, -1)]
    assert [(s["from"], s["to"]) for s in dry["steps"]] == down
    assert answer("db", "status", *db, cwd=tmp_path)["schema"] == SCHEMA_VERSION
    assert run("db", "migrate", "--to", "1", *db, cwd=tmp_path).returncode == 0
    behind = run("db", "status", *db, cwd=tmp_path)
    assert behind.returncode == 1
    assert "to do: schema 1 -> 2" in behind.stdout
    assert "nanoos db migrate" in message("features", "status", *db, cwd=tmp_path)
    assert run("db", "migrate", *db, cwd=tmp_path).returncode == 0
    assert "nothing to do" in run("db", "migrate", *db, cwd=tmp_path).stdout
    assert "no schema 99" in message("db", "migrate", "--to", "99", *db, cwd=tmp_path)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["features", "compute", "-l", "db"], "say which structures"),
        (["features", "compute", "--all", "--set", "a", "-l", "db"], "say which"),
        (["features", "compute", "--set", "none", "-l", "db"], "sets: alone, good"),
        (["features", "compute", "nobody", "-l", "db"], "0 structures"),
        (["features", "compute", "--all", "--workers", "0", "-l", "db"], "--workers"),
        (["features", "compute", "--all", "--memory", "1", "-l", "db"], "memory_mb"),
        (["features", "status", "--cutoff", "-1", "-l", "db"], "greater than 0"),
        (["dataset", "show", "nowhere"], "no dataset"),
        (["dataset", "build", "--set", "good", "--target", "gap", "-o", "x", "-l",
          "db"], "imported properties: "),
        (["dataset", "build", "--set", "good", "--target", "energy", "-o", "x",
          "--train-fraction", "0.9", "--val-fraction", "0.3", "-l", "db"],
         "test_fraction"),
        (["dataset", "build", "--set", "good", "--target", "energy_per_atom", "-o",
          "x", "--unit", "meV/atom", "-l", "db"], "are in eV/atom, not in meV/atom"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_message(
    folder: Path, words: list[str], named: str
) -> None:
    assert named in message(*words, cwd=folder)


class Console:
    is_terminal = False

    def __init__(self) -> None:
        self.lines: list[str] = []

    def print(self, line: str, **_: object) -> None:
        self.lines.append(line)


def test_a_log_gets_a_line_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("nanoos_fw.console.time.monotonic", lambda: now[0])
    console: Any = Console()
    progress = CountProgress(console, "featurizing", 100)
    with progress.shown():
        progress.update(50)  # hits
        now[0] = 5.0
        progress.update(55)
        now[0] = 20.0
        progress.update(70)
    assert console.lines == ["featurizing: 70 of 100, about 30 s left"]


def test_json_has_no_numbers_that_json_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_json({"evidence": [1.5, math.inf, (math.nan,)], "n": 2})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    told = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert told == {"evidence": [1.5, "inf", ["nan"]], "n": 2}
