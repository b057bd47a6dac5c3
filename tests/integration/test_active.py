"""Active learning by LAMMPS: killed and continued, and on a server by two workers."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from processes import HANGING_S, RLAUNCH, CampaignProgram, assert_same, wait_for
from small_active import rows

ACTIVE = CampaignProgram("small_active")

pytestmark = [pytest.mark.mpi, pytest.mark.lammps, pytest.mark.slow]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed with a space")
    ACTIVE.run(folder)
    report = (folder / "report.html").read_text()
    assert 'id="active-title"' in report
    assert ACTIVE.run(folder) == []  # again: there is nothing left to do
    return ACTIVE.rows(folder)


def test_two_rounds_label_what_they_choose(undisturbed: dict[str, Any]) -> None:
    assert [len(batch) for batch in undisturbed["chosen"]] == [14, 6, 0]
    chosen = {key for batch in undisturbed["chosen"] for key in batch}
    assert len(chosen) == 20
    assert len(undisturbed["labels"]) == 20 + 4  # and the elements
    assert chosen < set(undisturbed["labels"])
    assert {status for status, _ in undisturbed["labels"].values()} == {"done"}
    first, second = (
        "small-active-formation_energy_per_atom@1",
        ("small-active-formation_energy_per_atom@2"),
    )
    assert undisturbed["models"] == [first, second, None]
    assert [parent for parent, _ in undisturbed["versions"].values()] == [None, first]
    of_models = [model for model, _ in undisturbed["predictions"]]
    assert (of_models.count(first), of_models.count(second)) == (28, 22)


def test_killed_while_labelling_and_between_rounds_it_ends_in_the_same_rows(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    ACTIVE.kill_after(tmp_path, ["select"], at_work=True)  # labels of the first round
    ACTIVE.kill_after(tmp_path, ["train", "select"], at_work=False)
    ACTIVE.run(tmp_path)
    assert_same(ACTIVE.rows(tmp_path), undisturbed)


@pytest.mark.mongodb
def test_a_killed_worker_on_a_server_is_followed_by_two(
    tmp_path: Path,
    my_launchpad: Path,
    mongodb_database: Any,
    undisturbed: dict[str, Any],
) -> None:
    folder = tmp_path / "campaign"
    ACTIVE.run(folder, "--submit", str(my_launchpad))
    ACTIVE.run(folder, "--submit", str(my_launchpad))  # again: adds nothing
    assert mongodb_database["workflows"].count_documents({}) == 1

    def worker(name: str) -> subprocess.Popen[str]:
        (tmp_path / name).mkdir()
        return subprocess.Popen(
            [*RLAUNCH, "-l", str(my_launchpad), "rapidfire", "--sleep", "1"],
            cwd=tmp_path / name,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    killed = worker("killed")

    def labelling() -> bool:
        assert killed.poll() is None, killed.communicate()[0]
        # Not while it holds the workflow, which FireWorks alone would not free.
        if mongodb_database["workflows"].find_one({"locked": {"$exists": True}}):
            return False
        at_work = {"state": "RUNNING", "spec.nanoos.stage": "label"}
        return mongodb_database["fireworks"].find_one(at_work) is not None

    wait_for(labelling, "no labelling")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    from nanoos_fw.stores.database import load_launchpad

    lost = load_launchpad(my_launchpad).detect_lostruns(expiration_secs=0, rerun=True)
    assert len(lost[1]) == 1
    workers = [worker("one"), worker("two")]
    outputs = [other.communicate(timeout=HANGING_S)[0] for other in workers]
    states = [d["state"] for d in mongodb_database["fireworks"].find()]
    assert set(states) == {"COMPLETED"}, "\n".join(outputs)[-4000:]
    assert_same(rows(mongodb_database), undisturbed)
