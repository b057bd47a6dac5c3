"""Processes that screen chunks, and the parent that hands them out.

The parent owns the database: a worker gets a chunk's first candidate through a pipe and
answers with the packed result. A worker that dies (out of memory, a killed node
process) is replaced and its chunk tried once more; when the parent is gone the workers
see their pipe close and end.

Starting a worker, with its imports and models, takes as long as a chunk. So a program
that runs one firework after another may keep its workers for the next one.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoos_fw.errors import (
    LaunchError,
    NanoOSError,
    OutOfMemoryError,
    error_from_dict,
)
from nanoos_fw.faults import how_it_ended
from nanoos_fw.ml.piped_child import GONE, PipedChild, pipe_to_parent

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
    job: ScreenJob, starts: Sequence[int], *, workers: int = 1, keep: bool = False
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
    keep
        Take workers that were kept, and keep them after the last chunk, until
        :func:`end_kept_workers` or the end of this process.

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
    kept = _kept[:count] if keep else []
    children = kept + [_Child() for _ in range(count - len(kept))]
    del _kept[: len(kept)]
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
                done.put(child.screen(job, start))
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
        if keep:
            _kept.extend(children)
            children = []
    finally:
        closing.set()
        for child in children:
            child.close()


def end_kept_workers() -> None:
    """End the workers that were kept, and free their memory."""
    while _kept:
        _kept.pop().close()


class _Child:
    """A worker, and the job whose models it has."""

    def __init__(self) -> None:
        self._job: ScreenJob | None = None
        self._child = PipedChild(__name__, "the screening worker")

    def screen(self, job: ScreenJob, start: int) -> dict[str, Any]:
        code: int | None = None
        for _ in range(_TRIES):
            fresh = self._child.start()  # a machine without processes is told as it is
            try:
                if fresh or self._job != job:
                    self._child.send(job)
                    self._job = job
                self._child.send(start)
                answer = self._child.receive()
            except GONE:
                code = self._child.let_go()
                if self._child.closed:
                    break
                continue
            if "error" in answer:
                raise error_from_dict(answer["error"])
            return dict(answer)
        raise LaunchError(
            f"the worker that screens candidates from {start} on is gone"
            if code is None or self._child.closed
            else f"the worker that screens candidates from {start} on "
            f"{how_it_ended(code)}, {_TRIES} times",
            evidence={"start": start, "exit_code": code},
            advice="see what it printed above; a smaller chunk needs less memory",
        )

    def close(self) -> None:
        self._child.close()


_kept: list[_Child] = []
atexit.register(end_kept_workers)


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
    receive, answer_with = pipe_to_parent()
    try:
        screener: ChunkScreener | None = None
        job = receive()
        while True:
            start = receive()
            if not isinstance(start, int):  # another job
                job, screener = start, None
                continue
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
            answer_with(answer)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent is done, or gone


if __name__ == "__main__":
    _main()
