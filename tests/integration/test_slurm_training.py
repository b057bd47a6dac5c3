"""Trainings as batch jobs that SLURM ends before they are done."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_training import config, write_small_dataset

from nanoos_fw.parallel.files import STOPPED
from nanoos_fw.provenance import read_json, write_json

pytestmark = [pytest.mark.slurm, pytest.mark.mpi]

# Upper bound after which a run counts as hanging; passing runs take seconds.
HANGING_S = 180.0

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
        done = subprocess.run(
            ["sbatch", "--parsable", f"--output={work_dir}/job.out", *options],
            input=script, check=True, capture_output=True, text=True, cwd=self.folder,
        )  # fmt: skip
        return done.stdout.split(";")[0].strip()


def wait_for(condition: Callable[[], bool], work_dir: Path) -> None:
    end = time.monotonic() + HANGING_S
    while not condition():
        assert time.monotonic() < end, said(work_dir)
        time.sleep(0.1)


def wait_until_ended(job: str, work_dir: Path) -> None:
    def ended() -> bool:
        words = ["squeue", "--noheader", f"--jobs={job}", "--format=%t"]
        # A job that is long over is unknown, which is an error of squeue.
        answer = subprocess.run(words, check=False, capture_output=True, text=True)
        return not answer.stdout.strip()

    wait_for(ended, work_dir)


def said(work_dir: Path) -> list[str]:
    names = ("job.out", "ranks.log", "outcome.json")
    paths = [work_dir / name for name in names]
    return [path.read_text()[-2000:] for path in paths if path.exists()]


def cancel(*words: str) -> None:
    subprocess.run(["scancel", *words], check=True, capture_output=True, timeout=60)


def test_a_training_whose_jobs_are_ended_gives_the_bits_of_one_that_was_not(
    tmp_path: Path,
) -> None:
    jobs = Jobs(tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def hold(step: int) -> str:
        job = jobs.submit(parts, step)
        reached = [parts / f"reached-{rank}" for rank in range(2)]
        wait_for(lambda: all(path.exists() for path in reached), parts)
        return job

    # As at the end of its time: SLURM sends TERM to all processes of a job.
    job = hold(4)
    cancel(job)
    wait_until_ended(job, parts)
    assert (parts / STOPPED).exists(), said(parts)
    assert list(parts.glob("member0-epoch00001-step000002-*")), said(parts)

    # A rank's node fails: the ranks die where they are.
    job = hold(10)
    cancel("--signal=KILL", f"{job}.0")
    wait_until_ended(job, parts)
    assert "killed by SIGKILL" in read_json(parts / "outcome.json")["error"]
    assert list(parts.glob("member0-epoch00003-step000001-*")), said(parts)

    wait_until_ended(jobs.submit(parts), parts)
    wait_until_ended(jobs.submit(whole), whole)
    resumed, expected = (read_json(d / "outcome.json") for d in (parts, whole))
    assert "error" not in expected, said(whole)
    assert "error" not in resumed, said(parts)
    assert resumed["ranks"] == expected["ranks"] == 2
    assert resumed["curves"] == expected["curves"]
    assert resumed["checkpoint_sha256"] == expected["checkpoint_sha256"]
    # Each step was made once: nothing began again, which would give equal bits, too.
    for work_dir in (parts, whole):
        made = [int(line) for line in (work_dir / "steps").read_text().split()]
        assert made == list(range(15)), work_dir


def test_a_training_longer_than_its_time_limit_stops_before_it_and_goes_on(
    tmp_path: Path,
) -> None:
    """One minute is the shortest limit; by the clock alone, nobody signals."""
    jobs = Jobs(tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    job = jobs.submit(parts, hold=7, minutes=1)
    other = jobs.submit(whole)
    wait_until_ended(job, parts)
    # On a machine so busy that ranks do not start within the minute, once more.
    if not (parts / STOPPED).exists() and not (parts / "reached-0").exists():
        wait_until_ended(jobs.submit(parts, hold=7, minutes=1), parts)
    wait_until_ended(other, whole)
    # The ranks ended by themselves: SLURM's kill would have been a signal.
    stopped = read_json(parts / "outcome.json")["error"]
    assert "end of the allocation" in stopped, said(parts)
    assert read_json(parts / STOPPED)["evidence"]["step"] == 2
    assert read_json(parts / "job.json")["deadline"] < (
        (parts / "outcome.json").stat().st_mtime
    )
    wait_until_ended(jobs.submit(parts), parts)
    resumed, expected = (read_json(d / "outcome.json") for d in (parts, whole))
    assert "error" not in expected, said(whole)
    assert "error" not in resumed, said(parts)
    assert resumed["checkpoint_sha256"] == expected["checkpoint_sha256"]
    assert resumed["curves"] == expected["curves"]
    made = [int(line) for line in (parts / "steps").read_text().split()]
    assert made == list(range(15))
