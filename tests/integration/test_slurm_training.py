"""Trainings as batch jobs that SLURM ends before they are done."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from processes import wait_for
from slurm_jobs import slurm, submit_job, wait_until_ended
from small_training import config, write_small_dataset

from nanoos_fw.parallel.files import STOPPED
from nanoos_fw.provenance import read_json, write_json

pytestmark = [pytest.mark.slurm, pytest.mark.mpi]

# A rank program that waits at a step, so that a job is ended in the midst of it, and
# tells which steps it made.
HELD = """
import time
from nanoos_fw.ml import fitting
from nanoos_fw.ml.training import main
from nanoos_fw.parallel import run_rank_program

def program(config, work_dir, comm, stop):
    step = fitting.Fit._step
    def held(self, rows, number, rate):
        if number == config["hold"]:
            (work_dir / f"reached-{comm.rank}").touch()
            while not stop.requested:
                time.sleep(0.05)
        sums = step(self, rows, number, rate)
        if comm.rank == 0:
            with (work_dir / "steps").open("a") as stream:
                stream.write(f"{number}\\n")
        return sums
    fitting.Fit._step = held
    return main(config, work_dir, comm, stop)

run_rank_program(program)
"""

JOB = """
import sys
from pathlib import Path
from nanoos_fw.errors import NanoOSError
from nanoos_fw.parallel import Resources, launch_ranks
from nanoos_fw.provenance import read_json, write_json
from nanoos_fw.slurm import allocation_deadline

path = Path(sys.argv[1])
deadline = allocation_deadline()
write_json(path, {**read_json(path), "deadline": deadline})
try:
    result = launch_ranks(
        "held", path, resources=Resources(ranks=2), deadline=deadline
    )
except NanoOSError as error:
    result = {"error": str(error)}
write_json(path.with_name("outcome.json"), result)
"""


class Jobs:
    """Trainings in work directories, each in a job of two nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "held.py").write_text(HELD)
        (folder / "job.py").write_text(JOB)
        self.values = {
            # After each step a checkpoint: the kill finds one within an epoch.
            "config": config(checkpoint_minutes=0.0).model_dump(mode="json"),
            "dataset_dir": str(write_small_dataset(folder / "dataset")),
            "threads": 1,
            "deadline": None,
        }

    def submit(self, work_dir: Path, hold: int | None = None, minutes: int = 10) -> str:
        """Submit a training and return the number of its job."""
        work_dir.mkdir(exist_ok=True)
        for path in (*work_dir.glob("reached-*"), work_dir / "outcome.json"):
            path.unlink(missing_ok=True)
        path = work_dir / "job.json"
        write_json(path, {**self.values, "hold": hold})
        script = (
            f"#!/bin/bash\nexport PYTHONPATH={self.folder}\n"
            f"exec {sys.executable} {self.folder}/job.py {path}\n"
        )
        options = ["--nodes=2", "--ntasks-per-node=1", f"--time={minutes}"]
        return submit_job(
            script, f"--output={work_dir}/job.out", f"--chdir={self.folder}", *options
        )


def ends(job: str, work_dir: Path) -> None:
    """Wait until a job has ended."""
    wait_until_ended(job, lambda: said(work_dir))


def said(work_dir: Path) -> list[str]:
    names = ("job.out", "ranks.log", "outcome.json")
    paths = [work_dir / name for name in names]
    return [path.read_text()[-2000:] for path in paths if path.exists()]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module", autouse=True)
def limited(jobs: Jobs) -> tuple[Path, str]:
    """Submit a training of one minute, the shortest limit, that takes longer.

    For all tests: the minute passes while another one works.
    """
    work_dir = jobs.folder / "limited"
    return work_dir, jobs.submit(work_dir, hold=7, minutes=1)


@pytest.fixture(scope="module")
def whole(jobs: Jobs) -> Path:
    """Return the directory of a training that nothing disturbed."""
    work_dir = jobs.folder / "whole"
    ends(jobs.submit(work_dir), work_dir)
    return work_dir


def assert_same_training(work_dir: Path, whole: Path) -> None:
    found, expected = (read_json(d / "outcome.json") for d in (work_dir, whole))
    assert "error" not in expected, said(whole)
    assert "error" not in found, said(work_dir)
    assert found["ranks"] == expected["ranks"] == 2
    assert found["curves"] == expected["curves"]
    assert found["checkpoint_sha256"] == expected["checkpoint_sha256"]
    # Each step was made once: nothing began again, which would give equal bits, too.
    for folder in (work_dir, whole):
        made = [int(line) for line in (folder / "steps").read_text().split()]
        assert made == list(range(15)), folder


def reached(work_dir: Path) -> bool:
    """Whether both ranks hold at the step at which they were told to."""
    return all((work_dir / f"reached-{rank}").exists() for rank in range(2))


def test_a_training_whose_jobs_are_ended_gives_the_bits_of_one_that_was_not(
    jobs: Jobs, whole: Path
) -> None:
    parts = jobs.folder / "parts"

    def hold(step: int) -> str:
        job = jobs.submit(parts, step)
        wait_for(lambda: reached(parts), lambda: said(parts))
        return job

    # As at the end of its time: SLURM sends TERM to all processes of a job.
    job = hold(4)
    slurm("scancel", job)
    ends(job, parts)
    assert (parts / STOPPED).exists(), said(parts)
    assert list(parts.glob("member0-epoch00001-step000002-*")), said(parts)

    # A rank's node fails: the ranks die where they are.
    job = hold(10)
    slurm("scancel", "--signal=KILL", f"{job}.0")
    ends(job, parts)
    assert "killed by SIGKILL" in read_json(parts / "outcome.json")["error"]
    assert list(parts.glob("member0-epoch00003-step000001-*")), said(parts)

    ends(jobs.submit(parts), parts)
    assert_same_training(parts, whole)


def test_a_training_longer_than_its_time_limit_stops_before_it_and_goes_on(
    jobs: Jobs, limited: tuple[Path, str], whole: Path
) -> None:
    """By the clock alone: nobody signals."""
    work_dir, job = limited
    ends(job, work_dir)
    # On a machine so busy that ranks do not come to their step in time, once more.
    for minutes in (2, 5):
        if not reached(work_dir):
            ends(jobs.submit(work_dir, hold=7, minutes=minutes), work_dir)
    # The ranks ended by themselves: SLURM's kill would have been a signal.
    stopped = read_json(work_dir / "outcome.json")["error"]
    assert "end of the allocation" in stopped, said(work_dir)
    assert read_json(work_dir / STOPPED)["evidence"]["step"] == 2
    assert read_json(work_dir / "job.json")["deadline"] < (
        (work_dir / "outcome.json").stat().st_mtime
    )
    ends(jobs.submit(work_dir), work_dir)
    assert_same_training(work_dir, whole)
