"""A child process that answers through a pipe: what both of its ends need."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from nanoos_fw.errors import LaunchError

GONE = (EOFError, OSError, ValueError, pickle.UnpicklingError)
"""What sending to a child, or receiving from it, raises when it is gone."""


class PipedChild:
    """A module that runs in a process of its own, with one thread.

    Starts when asked to, and again after a death. One thread talks to it; another may
    close it.

    Parameters
    ----------
    module
        Run as ``python -m``; its end of the pipe is :func:`pipe_to_parent`.
    name
        What it is called in errors, such as ``the featurizing process``.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Process id, or None while there is no process."""
        return None if self._process is None else self._process.pid

    @property
    def closed(self) -> bool:
        """Whether it was closed, for good."""
        return self._closed

    def start(self) -> bool:
        """Start the process, and tell whether that was needed.

        Raises
        ------
        LaunchError
            If it was closed.
        """
        if self._process is None and not self._closed:
            # One thread: workers are processes, and thread stacks count as memory.
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "NUMBA_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            }
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                cwd=Path("/"),
            )
            if not self.closed:
                return True
            self.close()  # another thread closed it before there was a process
        if self._closed:
            raise LaunchError(f"{self._name} is being stopped")
        return False

    def send(self, value: Any) -> None:
        """Send a value; raises one of ``GONE`` if nobody can receive it."""
        stdin = self._pipe("stdin")
        pickle.dump(value, stdin)
        stdin.flush()

    def receive(self) -> Any:
        """Wait for a value; raises one of ``GONE`` if there will be none."""
        return pickle.load(self._pipe("stdout"))

    def let_go(self) -> int | None:
        """Wait for the end of a process that is gone, and return its exit code.

        Without its pipes it ends in any case. None: there is none, since it was closed.
        """
        process, self._process = self._process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            # There may be nobody to flush to, or a thread that reads.
            with contextlib.suppress(BrokenPipeError, ValueError):
                if pipe is not None:
                    pipe.close()
        return process.wait()

    def close(self) -> None:
        """End the process, for good."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
            self.let_go()

    def _pipe(self, name: str) -> IO[bytes]:
        pipe: IO[bytes] | None = getattr(self._process, name, None)
        if pipe is None:
            raise EOFError(f"{self._name} is gone")
        return pipe


def pipe_to_parent() -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Return how a child receives from its parent, and how it answers.

    What a library prints goes to the standard error, so that it cannot come between
    the answers. An interrupt is left to the parent, which closes the pipe.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def receive() -> Any:
        return pickle.load(sys.stdin.buffer)

    def answer(value: Any) -> None:
        pickle.dump(value, answers)
        answers.flush()

    return receive, answer
