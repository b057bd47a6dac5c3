"""A child that answers through a pipe: its answers, its death, its end."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from nanoos_fw.errors import LaunchError
from nanoos_fw.ml.piped_child import GONE, PipedChild

ECHO = """
import os, signal, sys, time
from nanoos_fw.ml.piped_child import pipe_to_parent
receive, answer = pipe_to_parent()
print("noise of a library")
while True:
    value = receive()
    if value == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if value == "sleep":
        time.sleep(600)
    answer((os.getpid(), value))
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipedChild:
    (tmp_path / "echoing_child.py").write_text(ECHO)
    monkeypatch.syspath_prepend(str(tmp_path))
    return PipedChild("echoing_child", "the echo")


def test_it_answers_dies_and_starts_again(child: PipedChild) -> None:
    with pytest.raises(GONE):
        child.send("too early")
    assert child.start()
    assert not child.start()
    child.send([1, 2])
    assert child.receive() == (child.pid, [1, 2])
    first = child.pid
    child.send("die")
    with pytest.raises(GONE):
        child.receive()
    assert child.let_go() == -signal.SIGSEGV
    assert child.pid is None
    assert child.start()
    child.send("again")
    assert child.receive() == (child.pid, "again")
    assert child.pid != first
    child.close()
    assert child.let_go() is None
    with pytest.raises(LaunchError, match="the echo is being stopped"):
        child.start()


def test_closing_ends_a_receive_in_another_thread(child: PipedChild) -> None:
    child.start()
    child.send("sleep")
    seen: list[BaseException] = []

    def wait() -> None:
        try:
            child.receive()
        except GONE as error:
            seen.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    child.close()
    thread.join(timeout=60)
    assert len(seen) == 1
    assert child.closed
