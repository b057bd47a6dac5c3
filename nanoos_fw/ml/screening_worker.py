"""Processes that screen chunks, and the parent that hands them out.

The parent owns the database: a worker gets a chunk's first candidate through a pipe and
answers with the packed result. A worker that dies (out of memory, a killed node
process) is replaced and its chunk tried once more; when the parent is gone the workers
see their pipe close and end.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nanoos_fw.errors import (
    LaunchError,
    NanoOSError,
    OutOfMemoryError,
    error_from_dict,
)
from nanoos_fw.faults import how_it_ended

_TRIES = 2


@dataclass(frozen=True)
class ScreenJob:
    """All that decides the result of a chunk.

    Parameters
    ----------
    spec
        ``ScreenSpec`` as JSON.
    weights
        File and SHA-256 of each model, in the order of the screening.
    known
        Known compositions.
    """

    spec: Mapping[str, Any]
    weights: Sequence[tuple[str, str]]
    known: Collection[tuple[tuple[int, int], ...]] = ()


def screen_chunks(
    job: ScreenJob, starts: Sequence[int], *, workers: int = 1
) -> Generator[dict[str, Any], None, None]:
    """Yield the documents of chunks as they are done, in no particular order.

    Parameters
    ----------
    job
        What is screened.
    starts
        First candidate of each chunk.
    workers
        Processes, of one thread each.

    Raises
    ------
    LaunchError
        If a chunk ended a worker twice.
    NanoOSError
        What a worker says about a chunk; other chunks may be done before it is raised.
    """
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()
    for start in starts:
        waiting.put(start)
    count = max(1, min(workers, len(starts)))
    children = [_Child(job) for _ in range(count)]
    closing = threading.Event()

    def serve(child: _Child) -> None:
        while not closing.is_set():
            try:
                start = waiting.get_nowait()
            except queue.Empty:
                return
            if start is None:
                return
            try:
                done.put(child.screen(start))
            except Exception as error:  # raised again in the thread that asked
                done.put(error)
                return

    threads = [threading.Thread(target=serve, args=(c,), daemon=True) for c in children]
    try:
        for thread in threads:
            thread.start()
        for _ in starts:
            answer = done.get()
            if isinstance(answer, Exception):
                raise answer
            yield answer
    finally:
        closing.set()
        for child in children:
            child.close()


class _Child:
    def __init__(self, job: ScreenJob) -> None:
        self._job = job
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def screen(self, start: int) -> dict[str, Any]:
        code: int | None = None
        for _ in range(_TRIES):
            process = self._started()
            stdin, stdout = _pipes(process)
            try:
                pickle.dump(start, stdin)
                stdin.flush()
                answer = pickle.load(stdout)
            except (EOFError, OSError, ValueError, pickle.UnpicklingError):
                code = _let_go(process)
                self._process = None
                if self._closed:
                    break
                continue
            if "error" in answer:
                raise error_from_dict(answer["error"])
            return dict(answer)
        raise LaunchError(
            f"the worker that screens candidates from {start} on is gone"
            if code is None or self._closed
            else f"the worker that screens candidates from {start} on "
            f"{how_it_ended(code)}, {_TRIES} times",
            evidence={"start": start, "exit_code": code},
            advice="see what it printed above; a smaller chunk needs less memory",
        )

    def close(self) -> None:
        self._closed = True
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            _let_go(process)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and not self._closed:
            return self._process
        if self._closed:
            raise LaunchError("the screening is being stopped")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=Path("/"),
        )
        self._process = process
        stdin, _ = _pipes(process)
        pickle.dump(self._job, stdin)
        stdin.flush()
        return process


def _let_go(process: subprocess.Popen[bytes]) -> int:
    """Close the pipes of a process that ends, and return its exit code."""
    code = process.wait()
    for pipe in _pipes(process):
        # A thread may be at it, or there is nobody to flush to.
        with contextlib.suppress(BrokenPipeError, ValueError):
            pipe.close()
    return code


def _pipes(process: subprocess.Popen[bytes]) -> tuple[BinaryIO, BinaryIO]:
    if process.stdin is None or process.stdout is None:
        raise LaunchError("the screening worker has no pipes")
    return process.stdin, process.stdout  # type: ignore[return-value]


# ------------------------------------------------------------------ in the child


class ChunkScreener:
    """Opened candidates and models of a job."""

    def __init__(self, job: ScreenJob) -> None:
        from nanoos_fw.ml.candidates import open_candidates
        from nanoos_fw.ml.predictors import open_model
        from nanoos_fw.ml.screening_engine import ScreenSpec

        self._spec = ScreenSpec.model_validate(job.spec)
        self._known = frozenset(job.known)
        self._source = open_candidates(self._spec.candidates)
        self._models = [
            open_model(path, sha256=sha256, threads=1) for path, sha256 in job.weights
        ]

    def screen(self, start: int) -> dict[str, Any]:
        """Return the document of the chunk that begins with a candidate."""
        from dataclasses import replace

        from nanoos_fw.ml.screening_engine import encode_chunk, screen_chunk

        began = time.perf_counter()
        stop = min(start + self._spec.chunk, len(self._source))
        found = screen_chunk(
            self._source, self._models, start, stop, self._spec, self._known
        )
        return encode_chunk(replace(found, wall_s=time.perf_counter() - began))


def _main() -> None:
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent closes the pipe
    try:
        screener: ChunkScreener | None = None
        job = pickle.load(sys.stdin.buffer)
        while True:
            start = pickle.load(sys.stdin.buffer)
            try:
                screener = screener or ChunkScreener(job)
                answer = screener.screen(start)
            except NanoOSError as error:
                answer = {"error": error.to_dict()}
            except MemoryError as error:
                memory = OutOfMemoryError(
                    f"no memory for the candidates from {start} on: {error}",
                    evidence={"start": start},
                    advice="give the job more memory, or screen in smaller chunks",
                )
                answer = {"error": memory.to_dict()}
            pickle.dump(answer, answers)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent is done, or gone


if __name__ == "__main__":
    _main()
