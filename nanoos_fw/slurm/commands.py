"""What SLURM says: the end of this allocation, jobs in the queue, ended jobs."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import datetime

from nanoos_fw.errors import LaunchError, MissingDependencyError

logger = logging.getLogger(__name__)

# FireWorks gives squeue five seconds, which a busy controller does not keep.
COMMAND_TIMEOUT_S = 60.0
# Time for the checkpoint, the result and the database after the ranks have stopped;
# less in an allocation so short that it would spend its time on stopping.
_STOP_MARGIN_S, _MIN_STOP_MARGIN_S, _STOP_MARGIN_PART = 120.0, 15.0, 0.15
_known_times: dict[str, tuple[float | None, float | None]] = {}


def run_slurm(
    command: Sequence[str], *, timeout_s: float = COMMAND_TIMEOUT_S, text: str = ""
) -> str:
    """Run a SLURM command and return its standard output.

    Raises
    ------
    MissingDependencyError
        If the command is not installed.
    LaunchError
        If it fails or does not answer; carries what it said.
    """
    if shutil.which(command[0]) is None:
        raise MissingDependencyError(
            f"{command[0]} is not on PATH",
            advice="work on a login node of the cluster, or load SLURM's module",
        )
    try:
        done = subprocess.run(
            list(command),
            check=False,
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, "SLURM_TIME_FORMAT": "standard"},
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"{command[0]} did not answer within {timeout_s:g} s",
            evidence={"command": list(command)},
            advice="the controller is busy or down; try again later",
        ) from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise LaunchError(
            f"{command[0]} failed with exit code {done.returncode}: {said[-500:]}",
            evidence={"command": list(command), "stderr": said[-2000:]},
        )
    return done.stdout


def slurm_time(text: str) -> float | None:
    """Return a time as SLURM prints it (local, ISO) in Unix seconds; None if unset."""
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:  # N/A, NONE, Unknown
        return None


# -------------------------------------------------------------------- this allocation


def allocation_times(
    environ: Mapping[str, str] | None = None,
) -> tuple[float | None, float | None]:
    """Return start and end of the allocation this process runs in, in Unix seconds.

    (None, None) outside of SLURM, or if SLURM does not tell. The controller is asked
    once per process: the end of an allocation moves only by an administrator.
    """
    env = os.environ if environ is None else environ
    start, end = env.get("SLURM_JOB_START_TIME", ""), env.get("SLURM_JOB_END_TIME", "")
    if start.isdigit() and end.isdigit():  # newer versions tell
        return float(start), float(end)
    job = env.get("SLURM_JOB_ID", "")
    return _ask_allocation_times(job) if job.isdigit() else (None, None)


def allocation_deadline() -> float | None:
    """Return the Unix time at which children must stop, from SLURM, or None."""
    start, end = allocation_times()
    if end is None:
        return None
    length = end - start if start is not None else float("inf")
    margin = min(_STOP_MARGIN_S, max(_MIN_STOP_MARGIN_S, length * _STOP_MARGIN_PART))
    return max(end - margin, time.time())


def _ask_allocation_times(job: str) -> tuple[float | None, float | None]:
    if job in _known_times:
        return _known_times[job]
    command = ["squeue", "--noheader", "--format=%S %e", f"--jobs={job}"]
    for wait_s in (1.0, 5.0, None):
        try:
            words = run_slurm(command).split()
        except (LaunchError, MissingDependencyError) as error:
            if wait_s is not None:
                time.sleep(wait_s)
                continue
            logger.warning("the end of this allocation is not known: %s", error)
            return None, None
        if len(words) == 2:
            _known_times[job] = slurm_time(words[0]), slurm_time(words[1])
            return _known_times[job]
    return None, None
