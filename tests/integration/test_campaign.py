"""The whole chain: embedded, killed and continued, and on a server by two workers."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from processes import HANGING_S, RLAUNCH, CampaignProgram, assert_same
from small_campaign import NAME, rows

CAMPAIGN = CampaignProgram("small_campaign")

pytestmark = [pytest.mark.mpi, pytest.mark.lammps, pytest.mark.slow]


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
    CAMPAIGN.run(folder)
    report = (folder / "report.html").read_text()
    assert "</html>" in report
    found = CAMPAIGN.rows(folder)
    again = time.time()
    CAMPAIGN.run(folder)
    assert CAMPAIGN.rows(folder) == found
    # Nothing is computed again: no child has been started.
    logs = list((folder / "work").rglob("ranks.log"))
    assert logs
    assert all(path.stat().st_mtime < again for path in logs)
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
        found = {a["analysis"]: a for a in result["analyses"].values()}
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
    CAMPAIGN.kill_after(tmp_path, [before], at_work=True)
    CAMPAIGN.run(tmp_path)
    assert_same(without_md(CAMPAIGN.rows(tmp_path)), without_md(undisturbed))


@pytest.mark.mongodb
def test_two_workers_on_a_server_give_the_same_rows(
    tmp_path: Path,
    my_launchpad: Path,
    mongodb_database: Any,
    undisturbed: dict[str, Any],
) -> None:
    folder = tmp_path / "campaign"
    CAMPAIGN.run(folder, "--submit", str(my_launchpad))
    CAMPAIGN.run(folder, "--submit", str(my_launchpad))  # again: adds nothing
    assert mongodb_database["workflows"].count_documents({}) == 2
    workers = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        workers.append(
            subprocess.Popen(
                [*RLAUNCH, "-l", str(my_launchpad), "rapidfire", "--sleep", "1"],
                cwd=tmp_path / name,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [worker.communicate(timeout=HANGING_S)[0] for worker in workers]
    states = [d["state"] for d in mongodb_database["fireworks"].find()]
    assert set(states) == {"COMPLETED"}, "\n".join(outputs)[-4000:]
    launches = mongodb_database["launches"].distinct("launch_dir")
    for name in ("one", "two"):  # both had work to do
        assert any(str(tmp_path / name) in folder for folder in launches)
    assert len(list(mongodb_database["launches"].find())) == len(states)
    assert_same(without_md(rows(mongodb_database)), without_md(undisturbed))
    assert mongodb_database["campaigns"].find_one({"_id": NAME}) is not None
