"""The whole chain: embedded, killed and continued, and on a server by two workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import assert_same, wait_for_ranks, wait_until_gone
from small_campaign import NAME, rows

PROGRAM = Path(__file__).with_name("small_campaign.py")
RLAUNCH = [sys.executable, "-m", "fireworks.scripts.rlaunch_run"]

pytestmark = [pytest.mark.mpi, pytest.mark.lammps, pytest.mark.slow]


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(child: subprocess.Popen[str]) -> str:
    output, _ = child.communicate(timeout=600)
    assert child.returncode == 0, output
    return output


def embedded_rows(folder: Path) -> dict[str, Any]:
    """Read the rows in a process of its own: the mode belongs to a process."""
    code = (
        "import pickle, sys; from pathlib import Path; "
        f"sys.path.insert(0, {str(PROGRAM.parent)!r}); "
        "from nanoos_fw.stores.database import open_embedded; "
        "from small_campaign import rows; "
        f"found = rows(open_embedded(Path({str(folder / 'db')!r})).db); "
        "sys.stdout.buffer.write(pickle.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    import pickle

    return dict(pickle.loads(done.stdout))


def without_md(found: dict[str, Any]) -> dict[str, Any]:
    """Drop numbers of trajectories: they are chaotic, only their rows can agree."""
    simulations = {
        key: (status, None if key[0] == "md" else result)
        for key, (status, result) in found["simulations"].items()
    }
    return {**found, "simulations": simulations}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed with a space")
    finish(start(folder))
    report = (folder / "report.html").read_text()
    assert "</html>" in report
    found = embedded_rows(folder)
    again = time.monotonic()
    finish(start(folder))
    assert embedded_rows(folder) == found
    # Nothing is computed again: no child has been started.
    logs = list((folder / "work").rglob("ranks.log"))
    assert logs
    assert all(time.monotonic() - again < time.time() - p.stat().st_mtime for p in logs)
    return found


def test_every_row_is_there_once(undisturbed: dict[str, Any]) -> None:
    assert len(undisturbed["structures"]) == 42 + 4
    assert len(undisturbed["features"]) == 42
    kinds = [kind for kind, _ in undisturbed["simulations"]]
    assert kinds.count("relaxation") == 42 + 4
    assert kinds.count("md") == 2
    assert len(undisturbed["models"]) == 1
    assert len(undisturbed["predictions"]) == 42 - 25
    statuses = {status for status, _ in undisturbed["simulations"].values()}
    assert statuses == {"done"}


def test_trajectories_are_analysed_in_every_way_asked_for(
    undisturbed: dict[str, Any],
) -> None:
    results = [r for (k, _), (_, r) in undisturbed["simulations"].items() if k == "md"]
    for result in results:
        found = result["analyses"]
        assert set(found) == {"rdf", "msd", "vdos"}
        for numbers in found.values():
            assert "error" not in numbers
            assert numbers["n_frames"] == 40
            assert numbers["artifact"]
        # A hot crystal: its atoms swing about their places.
        assert found["msd"]["diffusion"]["all"]["value"] is None
        modes = 3 * result["n_atoms"] - 3
        assert found["vdos"]["n_modes_expected"] == modes
        assert found["vdos"]["n_modes"] == pytest.approx(modes, rel=0.2)
        assert max(found["rdf"]["total"]) > 1.5


@pytest.mark.parametrize("stage", ["label", "train", "md"])
def test_killed_at_any_stage_it_continues_to_the_same_rows(
    stage: str, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    """SIGKILL while the ranks of a stage are at work."""
    before = {"label": "references", "train": "dataset", "md": "relax"}[stage]
    child = start(tmp_path)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(before):
            break
    ranks = wait_for_ranks(child)
    time.sleep(0.7)
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=10) == -signal.SIGKILL
    child.stdout.close()
    for pid in ranks:
        wait_until_gone(pid)
    finish(start(tmp_path))
    assert_same(without_md(embedded_rows(tmp_path)), without_md(undisturbed))


@pytest.mark.mongodb
def test_two_workers_on_a_server_give_the_same_rows(
    tmp_path: Path, mongodb_database: Any, undisturbed: dict[str, Any]
) -> None:
    launchpad = tmp_path / "my_launchpad.yaml"
    uri = os.environ["NANO_OS_TEST_MONGODB_URI"]
    launchpad.write_text(
        f"host: {uri}\nname: {mongodb_database.name}\nuri_mode: true\n"
    )
    folder = tmp_path / "campaign"
    finish(start(folder, "--submit", str(launchpad)))
    finish(start(folder, "--submit", str(launchpad)))  # again: adds nothing
    assert mongodb_database["workflows"].count_documents({}) == 2
    workers = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        workers.append(
            subprocess.Popen(
                [*RLAUNCH, "-l", str(launchpad), "rapidfire", "--sleep", "1"],
                cwd=tmp_path / name,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    states = [d["state"] for d in mongodb_database["fireworks"].find()]
    assert set(states) == {"COMPLETED"}, "\n".join(outputs)[-4000:]
    launches = mongodb_database["launches"].distinct("launch_dir")
    for name in ("one", "two"):  # both had work to do
        assert any(str(tmp_path / name) in folder for folder in launches)
    assert len(list(mongodb_database["launches"].find())) == len(states)
    assert_same(without_md(rows(mongodb_database)), without_md(undisturbed))
    assert mongodb_database["campaigns"].find_one({"_id": NAME}) is not None
