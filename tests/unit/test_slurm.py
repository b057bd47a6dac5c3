from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from nanoos_fw.errors import LaunchError, MissingDependencyError
from nanoos_fw.slurm import (
    allocation_deadline,
    allocation_times,
    commands,
    jobs,
    run_slurm,
    was_cancelled,
)

FakeCommand = Callable[[str, str], Path]


@pytest.fixture
def fake_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommand:
    """Put a shell script in front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(commands, "_known_times", {})

    def write(name: str, body: str) -> Path:
        program = folder / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        return program

    return write


def test_an_error_of_slurm_is_told_in_its_own_words(fake_command: FakeCommand) -> None:
    fake_command("sbatch", "echo 'sbatch: error: invalid partition: gpuu' >&2; exit 1")
    with pytest.raises(LaunchError, match="invalid partition: gpuu"):
        run_slurm(["sbatch"])


def test_a_silent_controller_is_an_error_and_not_a_wait_for_ever(
    fake_command: FakeCommand,
) -> None:
    fake_command("squeue", "exec sleep 60")
    with pytest.raises(LaunchError, match="did not answer"):
        run_slurm(["squeue"], timeout_s=0.2)


def test_a_missing_command_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="sacct"):
        run_slurm(["sacct"])


def test_the_allocation_ends_when_its_environment_says() -> None:
    env = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_START_TIME": "1000",
        "SLURM_JOB_END_TIME": "4600",
    }
    assert allocation_times(env) == (1000.0, 4600.0)
    assert allocation_times({}) == (None, None)


def test_an_older_slurm_is_asked_once(
    fake_command: FakeCommand, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    fake_command(
        "squeue",
        f'echo "$@" >> {calls}; echo "2026-03-01T10:00:00 2026-03-01T12:00:00"',
    )
    expected = tuple(datetime(2026, 3, 1, hour).timestamp() for hour in (10, 12))
    assert allocation_times({"SLURM_JOB_ID": "42"}) == expected
    assert allocation_times({"SLURM_JOB_ID": "42"}) == expected
    assert calls.read_text().splitlines() == ["--noheader --format=%S %e --jobs=42"]


def test_a_job_without_limit_has_no_end(fake_command: FakeCommand) -> None:
    fake_command("squeue", 'echo "2026-03-01T10:00:00 N/A"')
    start, end = allocation_times({"SLURM_JOB_ID": "43"})
    assert start is not None
    assert end is None


@pytest.mark.parametrize(("length", "margin"), [(60, 15), (400, 60), (86400, 120)])
def test_the_margin_before_the_end_suits_the_allocation(
    monkeypatch: pytest.MonkeyPatch, length: int, margin: int
) -> None:
    now = int(time.time())
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(now))
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(now + length))
    assert allocation_deadline() == now + length - margin


def test_a_deadline_in_the_past_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_START_TIME", "1000")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "4600")
    deadline = allocation_deadline()
    assert deadline is not None
    assert abs(deadline - time.time()) < 60


JOB = "JobId=42 JobName=md JobState={} Reason={} PreemptTime={} EndTime={}"
PAST, FUTURE = "2026-03-01T10:01:00", "2226-03-01T10:01:00"


@pytest.mark.parametrize(
    ("state", "reason", "preempted", "end", "accounting", "expected"),
    [
        ("CANCELLED", "None", "None", PAST, None, True),
        ("COMPLETING", "None", "None", PAST, None, True),
        ("COMPLETING", "None", "None", PAST, "CANCELLED by 1000", True),
        # Requeued: its end is that of the next time.
        ("COMPLETING", "None", "None", FUTURE, None, False),
        ("COMPLETING", "None", "None", PAST, "PREEMPTED", False),
        ("COMPLETING", "TimeLimit", "None", PAST, None, False),
        ("COMPLETING", "NodeDown", "None", PAST, None, False),
        ("COMPLETING", "None", PAST, PAST, None, False),
        # Warned before its end, or of a preemption.
        ("RUNNING", "None", "None", FUTURE, None, False),
        ("TIMEOUT", "TimeLimit", "None", PAST, None, False),
    ],
)
def test_a_job_that_somebody_cancelled_is_told_from_others_that_must_stop(
    fake_command: FakeCommand,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    reason: str,
    preempted: str,
    end: str,
    accounting: str | None,
    expected: bool,
) -> None:
    monkeypatch.setattr(jobs, "_WORD_TIMEOUT_S", 5.0)
    kind = "accounting_storage/none" if accounting is None else "slurmdbd"
    fake_command(
        "scontrol",
        f'if [ "$2" = config ]; then echo "AccountingStorageType = {kind}"; '
        f'else echo "{JOB.format(state, reason, preempted, end)}"; fi',
    )
    times = "2026-03-01T10:00:00|2026-03-01T10:01:00"
    row = f"42|{accounting}|0:15|{times}|n1|1:00|cpu=1|main"
    fake_command("sacct", f'echo "{row}"')
    assert was_cancelled({"SLURM_JOB_ID": "42"}) is expected


def test_accounting_that_is_late_is_waited_for(
    fake_command: FakeCommand, tmp_path: Path
) -> None:
    fake_command(
        "scontrol",
        'if [ "$2" = config ]; then echo "AccountingStorageType = slurmdbd"; '
        f'else echo "{JOB.format("COMPLETING", "None", "None", PAST)}"; fi',
    )
    times = "2026-03-01T10:00:00|2026-03-01T10:01:00|n1|1:00|cpu=1|main"
    fake_command(
        "sacct",
        f"echo x >> {tmp_path / 'asked'}; "
        f'if [ "$(wc -l < {tmp_path / "asked"})" -lt 3 ]; '
        f'then echo "42|RUNNING|0:0|{times}"; else echo "42|TIMEOUT|0:0|{times}"; fi',
    )
    assert was_cancelled({"SLURM_JOB_ID": "42"}) is False


def test_a_silent_slurm_has_not_cancelled_anything(fake_command: FakeCommand) -> None:
    fake_command("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert was_cancelled({"SLURM_JOB_ID": "42"}) is False
    assert was_cancelled({}) is False
