"""What tests share that give jobs to a SLURM cluster."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from processes import HANGING_S, wait_for


def slurm(*command: str, script: str | None = None) -> str:
    """Return what a command of SLURM prints; ``script`` is what it reads."""
    done = subprocess.run(
        command,
        input=script,
        check=False,
        capture_output=True,
        text=True,
        timeout=HANGING_S,
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def submit_job(script: str, *options: str) -> str:
    """Submit a batch script and return the number of its job."""
    answer = slurm("sbatch", "--parsable", *options, script=script)
    return answer.strip().partition(";")[0]


def wait_until_ended(job: str, evidence: Callable[[], object] | str) -> None:
    """Wait until SLURM has done with a job, however it ended.

    ``sbatch --wait`` would ask more and more rarely.
    """

    def ended() -> bool:
        words = ["squeue", "--noheader", f"--jobs={job}", "--format=%t"]
        answer = subprocess.run(
            words, check=False, capture_output=True, text=True, timeout=HANGING_S
        )
        if answer.returncode != 0:  # one that is long over is unknown
            return "Invalid job id" in answer.stderr
        return not answer.stdout.strip()

    wait_for(ended, evidence, every_s=0.2)
