"""The firetask that screens a window of a sequence of candidates."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import Field

from nanoos_fw.errors import InputError
from nanoos_fw.firetasks.base import NanoTask, Parameters, TaskContext
from nanoos_fw.ml.screening_engine import chunk_starts
from nanoos_fw.ml.screening_worker import screen_chunks
from nanoos_fw.stores.screens import Screen, ScreenStore, screen_job

_PROBE_CHUNKS = 2
_MAX_MINUTES = 100_000


class WindowParameters(Parameters):
    """A window of a sequence of candidates.

    Parameters
    ----------
    start, stop
        Whole chunks, the last of which may be shorter.
    """

    start: int = Field(ge=0)
    stop: int = Field(ge=1)


class ScreenWindowParameters(WindowParameters):
    """Parameters of ScreenWindowTask.

    Parameters
    ----------
    screen
        Name of the screening, which is in the database.
    """

    screen: str


class ScreenWindowTask(NanoTask):
    """Generate, filter and predict the candidates of a window, chunk by chunk."""

    _fw_name = "{{nanoos_fw.firetasks.ScreenWindowTask}}"
    parameters_model = ScreenWindowParameters
    parameters: ScreenWindowParameters
    keeps_workers = True

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Screen the chunks that are not stored yet."""
        screen = ScreenStore(place.database).get(self.parameters.screen)
        return run_window_in(place, screen, self.parameters)


def run_window_in(
    place: TaskContext, screen: Screen, window: WindowParameters
) -> dict[str, Any]:
    """Screen a window where a firetask is, as long as its time allows."""

    def stored(done: int, wall_s: float) -> None:
        place.check_time(needed_s=wall_s, chunks=done)

    return run_window(
        place.database,
        screen,
        place.work_dir("screening", screen.key),
        start=window.start,
        stop=window.stop,
        workers=place.settings.ranks,
        on_chunk=stored,
        keep_workers=True,
    )


def run_window(
    database: Any,
    screen: Screen,
    work_dir: Path,
    *,
    start: int = 0,
    stop: int | None = None,
    workers: int = 1,
    on_chunk: Callable[[int, float], None] = lambda _done, _wall_s: None,
    keep_workers: bool = False,
) -> dict[str, Any]:
    """Screen a window and store each chunk as soon as it is done.

    Parameters
    ----------
    database
        Of the stores.
    screen
        What is screened.
    work_dir
        For the weights.
    start, stop
        The window; all candidates without.
    workers
        Processes.
    on_chunk
        Called after each stored chunk with the number stored by this call, and the
        seconds that this one took.
    keep_workers
        Keep the processes for the next call.

    Returns
    -------
    dict
        ``chunks`` of the window, ``hit`` that were stored before, ``written``, and
        ``candidates`` and ``core_s`` of the latter.
    """
    store = ScreenStore(database)
    starts = chunk_starts(screen.count, screen.chunk, start, stop)
    there = store.starts(screen.key, start, starts[-1] + 1)
    missing = [first for first in starts if first not in there]
    written, candidates, core_s = 0, 0, 0.0
    if missing:
        job = screen_job(database, screen, work_dir)
        chunks = screen_chunks(job, missing, workers=workers, keep=keep_workers)
        with closing(chunks) as documents:
            for document in documents:
                written += store.put_chunks(screen.key, [document])
                candidates += document["n"]
                core_s += document["wall_s"]
                on_chunk(written, document["wall_s"])
    return {
        "screen": screen.name,
        "chunks": len(starts),
        "hit": len(starts) - len(missing),
        "written": written,
        "candidates": candidates,
        "core_s": round(core_s, 3),
    }


def choose_window(
    database: Any,
    screen: Screen,
    work_dir: Path,
    *,
    minutes: float = 10.0,
    workers: int = 1,
) -> int:
    """Return how many candidates a firework takes to last about so many minutes.

    Screens the first two chunks, whose predictions are kept, unless others are stored
    already; the throughput is that of the fastest chunk, since the first one compiles.
    What the whole screening is expected to cost by this is noted with it.
    """
    if not 0 < minutes <= _MAX_MINUTES:
        raise InputError(
            f"a firework of {minutes:g} minutes: take more than 0, and at most "
            f"{_MAX_MINUTES} (ten weeks)"
        )
    store = ScreenStore(database)
    probe = min(_PROBE_CHUNKS * screen.chunk, screen.count)
    run_window(database, screen, work_dir, stop=probe)
    rate = store.best_rate(screen, probe)
    store.set_estimate(screen.name, screen.count / rate)
    chunks = math.ceil(rate * workers * minutes * 60.0 / screen.chunk)
    return screen.chunk * max(1, min(chunks, screen.n_chunks))
