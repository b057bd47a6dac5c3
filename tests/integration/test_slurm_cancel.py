"""Jobs that are stopped on a real SLURM: by somebody, or only by a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fireworks import Firework
from processes import wait_for
from slow_labels import SlowLabelTask

from nanoos_fw import operations
from nanoos_fw.operations.reconcile import reconcile
from nanoos_fw.operations.rerun import rerun_failed_fireworks
from nanoos_fw.operations.status import campaign_status
from nanoos_fw.slurm import batch_script, has_accounting, slurm_request
from nanoos_fw.stores.database import load_launchpad, open_database
from nanoos_fw.stores.structures import NewStructure, StructureStore

pytestmark = [pytest.mark.slurm, pytest.mark.mongodb]


class Job:
    """A firework that waits for a file, and jobs that take it."""

    def __init__(self, file: Path, folder: Path, structure: Any) -> None:
        self.file, self.folder, self.gate = file, folder, folder / "gate"
        self.launchpad = load_launchpad(file)
        operations.prepare_launchpad(self.launchpad)
        self.database = open_database(self.launchpad)
        (self.key,) = (
            StructureStore(self.database)
            .add([NewStructure(structure=structure, label="Cu")], in_set="all")
            .keys
        )
        task = SlowLabelTask(
            structures=[self.key],
            source={"target": "sites", "unit": "", "method": "m"},
            options={"gate": str(self.gate)},
        )
        nanoos = {"campaign": "c", "stage": "label", "order": 0}
        spec = {"_add_launchpad_and_fw_id": True, "nanoos": nanoos}
        self.launchpad.add_wf(Firework([task], spec=spec))

    def submit(self, *, packed: bool = False) -> str:
        """Submit a job as qlaunch would, and wait until its task is at work.

        Or a packed worker.
        """
        began = self.folder / f"began-{self.key}"
        began.unlink(missing_ok=True)
        words = ["nanoos_fw.rlaunch", "-l", str(self.file), "singleshot"]
        if packed:
            words = ["nanoos_fw.cli", "work", "-l", str(self.file), "--idle", "1"]
        command = " ".join([sys.executable, "-m", *words])
        request = slurm_request({"rocket_launch": command, "walltime": "0:10:00"})
        done = subprocess.run(
            ["sbatch", "--parsable"],
            input=batch_script(request, str(self.folder)),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            check=True,
            capture_output=True,
            text=True,
            cwd=self.folder,
        )
        number = done.stdout.split(";")[0].strip()
        wait_for(lambda: began.exists() or self.gate.exists(), self.logs)
        return number

    def logs(self) -> list[str]:
        """Return what the jobs have said."""
        return [path.read_text()[-2000:] for path in self.folder.glob("*.error")]

    def states(self) -> list[str]:
        """Return the states of all fireworks, in their order."""
        return [d["state"] for d in self.launchpad.fireworks.find().sort("fw_id", 1)]


@pytest.fixture
def job(
    my_launchpad: Path, tmp_path: Path, copper: Any, monkeypatch: pytest.MonkeyPatch
) -> Job:
    monkeypatch.setenv("NANO_OS_WORK_DIR", str(tmp_path / "work"))
    return Job(my_launchpad, tmp_path, copper)


def left_the_queue(number: str) -> bool:
    done = subprocess.run(
        ["squeue", "--noheader", "--jobs", number],
        check=False,
        capture_output=True,
        text=True,
    )
    return not done.stdout.strip()


@pytest.mark.parametrize("packed", [False, True])
def test_a_cancelled_job_goes_on_when_it_is_asked_to(job: Job, packed: bool) -> None:
    number = job.submit(packed=packed)
    subprocess.run(["scancel", number], check=True)
    wait_for(lambda: left_the_queue(number), job.logs)

    assert job.states() == ["FIZZLED"], job.logs()
    assert campaign_status(job.database, "c").causes == {"label": {"cancelled": 1}}
    accounting = has_accounting()
    for _ in range(2):
        assert reconcile(job.launchpad, accounting=accounting).clean
        assert rerun_failed_fireworks(job.launchpad).rerun == []
    assert job.database["simulations"].count_documents({}) == 0

    assert rerun_failed_fireworks(job.launchpad, classes=["cancelled"]).rerun
    job.gate.touch()
    number = job.submit()
    wait_for(lambda: left_the_queue(number), job.logs)
    assert job.states() == ["COMPLETED"], job.logs()
    assert job.database["simulations"].count_documents({"status": "done"}) == 1


def test_a_job_that_is_only_warned_hands_over(job: Job) -> None:
    number = job.submit()
    subprocess.run(["scancel", "--signal=USR1", "--batch", number], check=True)
    wait_for(lambda: left_the_queue(number), job.logs)
    assert job.states() == ["COMPLETED", "READY"], job.logs()


def test_a_requeued_job_hands_over(job: Job) -> None:
    number = job.submit()
    subprocess.run(["scontrol", "requeue", number], check=True)
    wait_for(lambda: job.states() == ["COMPLETED", "READY"], job.logs)
    subprocess.run(["scancel", number], check=True)
