"""Active learning by LAMMPS: killed and continued, and on a server by two workers."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import assert_same, wait_for_ranks, wait_until_gone
from small_active import rows

PROGRAM = Path(__file__).with_name("small_active.py")
RLAUNCH = [sys.executable, "-m", "fireworks.scripts.rlaunch_run"]

pytestmark = [pytest.mark.mpi, pytest.mark.lammps, pytest.mark.slow]


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(child: subprocess.Popen[str]) -> list[str]:
    output, _ = child.communicate(timeout=600)
    assert child.returncode == 0, output
    return output.splitlines()


def kill_after(folder: Path, stages: list[str], *, at_work: bool) -> None:
    """SIGKILL a run when these stages have ended, with ranks at work or before."""
    child = start(folder)
    assert child.stdout is not None
    for stage in stages:
        assert any(line.strip() == stage for line in child.stdout), stage
    ranks = wait_for_ranks(child) if at_work else []
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=10) == -signal.SIGKILL
    child.stdout.close()
    for pid in ranks:
        wait_until_gone(pid)


def embedded_rows(folder: Path) -> dict[str, Any]:
    """Read the rows in a process of its own: the mode belongs to a process."""
    code = (
        "import pickle, sys; from pathlib import Path; "
        f"sys.path.insert(0, {str(PROGRAM.parent)!r}); "
        "from nanoos_fw.stores.database import open_embedded; "
        "from small_active import rows; "
        f"found = rows(open_embedded(Path({str(folder / 'db')!r})).db); "
        "sys.stdout.buffer.write(pickle.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return dict(pickle.loads(done.stdout))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed with a space")
    finish(start(folder))
    report = (folder / "report.html").read_text()
    assert 'id="active-title"' in report
    assert finish(start(folder)) == []  # again: there is nothing left to do
    return embedded_rows(folder)


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
    kill_after(tmp_path, ["select"], at_work=True)  # in the labels of the first round
    kill_after(tmp_path, ["train", "select"], at_work=False)
    finish(start(tmp_path))
    assert_same(embedded_rows(tmp_path), undisturbed)


@pytest.mark.mongodb
def test_a_killed_worker_on_a_server_is_followed_by_two(
    tmp_path: Path, mongodb_database: Any, undisturbed: dict[str, Any]
) -> None:
    file = tmp_path / "my_launchpad.yaml"
    uri = os.environ["NANO_OS_TEST_MONGODB_URI"]
    file.write_text(f"host: {uri}\nname: {mongodb_database.name}\nuri_mode: true\n")
    folder = tmp_path / "campaign"
    finish(start(folder, "--submit", str(file)))
    finish(start(folder, "--submit", str(file)))  # again: adds nothing
    assert mongodb_database["workflows"].count_documents({}) == 1

    def worker(name: str) -> subprocess.Popen[str]:
        (tmp_path / name).mkdir()
        return subprocess.Popen(
            [*RLAUNCH, "-l", str(file), "rapidfire", "--sleep", "1"],
            cwd=tmp_path / name,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    killed = worker("killed")
    labelling = {"state": "RUNNING", "spec.nanoos.stage": "label"}
    while mongodb_database["fireworks"].find_one(labelling) is None:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    from nanoos_fw.stores.database import load_launchpad

    lost = load_launchpad(file).detect_lostruns(expiration_secs=0, rerun=True)
    assert len(lost[1]) == 1
    workers = [worker("one"), worker("two")]
    outputs = [other.communicate(timeout=600)[0] for other in workers]
    states = [d["state"] for d in mongodb_database["fireworks"].find()]
    assert set(states) == {"COMPLETED"}, "\n".join(outputs)[-4000:]
    assert_same(rows(mongodb_database), undisturbed)
