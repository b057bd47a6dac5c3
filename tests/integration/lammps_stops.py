"""Stop a simulation on the way, as a walltime or a user would."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import wait_for

from nanoos_fw.errors import OutOfTimeError


def step_of(output: Path) -> int:
    """The step that the ranks have reported; -1 before the first report."""
    try:
        return int(json.loads((output / "progress.json").read_text())["done"])
    except (OSError, ValueError):
        return -1


@contextlib.contextmanager
def asked_to_stop_when(output: Path, reached: Callable[[], bool]) -> Iterator[None]:
    """Ask the ranks to stop, as their parent does, once something is true."""

    def ask() -> None:
        while not done.wait(0.005):
            if reached():
                (output / "stop").write_text("of the test")
                return

    done = threading.Event()
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def stop_at(engine, inputs, output: Path, step: int, **options) -> int:
    """Execute, ask for a stop once a step is reached, return where it stopped."""
    (output / "progress.json").unlink(missing_ok=True)
    with (
        asked_to_stop_when(output, lambda: step_of(output) >= step),
        pytest.raises(OutOfTimeError) as caught,
    ):
        engine.execute(inputs, output, **options)
    assert caught.value.resumable
    return int(caught.value.evidence["step"])


def wait_for_step(output: Path, step: int, child) -> None:
    """Wait until a child's simulation has reached a step."""

    def reached() -> bool:
        assert child.poll() is None, f"it ended before step {step}"
        return step_of(output) >= step

    wait_for(reached, f"no step {step}", every_s=0.002)
