"""What people see: progress on a terminal, log lines in a batch job, errors."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanoos_fw.errors import NanoOSError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_LINE_EVERY_S = 10.0


class CampaignProgress(logging.Handler):
    """Show the progress of the fireworks, and of the child inside the running one.

    On a terminal two bars; elsewhere log lines, at most one in ten seconds for the
    child, so that the log of a batch job stays readable.
    """

    def __init__(self, console: Console, total: int, done: int) -> None:
        super().__init__(logging.INFO)
        self._console = console
        self._total, self._done = total, done
        self._stage = ""
        self._last_line = 0.0
        self._bars: Progress | None = None
        self._campaign_bar: TaskID | None = None
        self._child_bar: TaskID | None = None

    @contextlib.contextmanager
    def shown(self) -> Iterator[CampaignProgress]:
        """Show the progress while the block runs."""
        package = logging.getLogger("nanoos_fw")
        level = package.level
        package.addHandler(self)
        package.setLevel(logging.INFO)
        try:
            if self._console.is_terminal:
                with _bars(self._console) as bars:
                    self._bars = bars
                    self._campaign_bar = bars.add_task(
                        "campaign", total=self._total, completed=self._done
                    )
                    self._child_bar = bars.add_task("", total=None, visible=False)
                    yield self
            else:
                yield self
        finally:
            self._bars = None
            package.removeHandler(self)
            package.setLevel(level)

    def launched(self, stage: str, done: int) -> None:
        """Show that a firework of a stage ended; ``done`` are completed in all."""
        self._done = done
        if self._bars is not None and self._campaign_bar is not None:
            self._bars.update(
                self._campaign_bar, completed=done, description=f"campaign: {stage}"
            )
            if self._child_bar is not None:
                self._bars.reset(self._child_bar, visible=False)
        else:
            self._line(f"{stage}: {done} of {self._total} fireworks completed")

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record of the library: a child's progress, or a message."""
        progress = getattr(record, "progress", None)
        if progress is None:
            if self._bars is not None:
                self._bars.log(record.getMessage())
            else:
                self._line(record.getMessage())
        elif self._bars is not None and self._child_bar is not None:
            self._bars.update(
                self._child_bar,
                visible=True,
                description=progress["text"],
                total=progress["total"],
                completed=progress["done"],
            )
        elif time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._line(record.getMessage())

    def _line(self, text: str) -> None:
        # Log lines are not folded: what reads a log folds them itself.
        line = f"{time.strftime('%H:%M:%S')} {text}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class CountProgress:
    """Show how many of a known number are done, and when the rest will be.

    A bar on a terminal; elsewhere a line at most every ten seconds.
    """

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console = console
        self._title, self._total = title, total
        self._bars: Progress | None = None
        self._bar: TaskID | None = None
        self._start: tuple[float, int] | None = None
        self._last_line = time.monotonic()

    @contextlib.contextmanager
    def shown(self) -> Iterator[CountProgress]:
        """Show the progress while the block runs."""
        if not self._console.is_terminal:
            yield self
            return
        with _bars(self._console, eta=True) as bars:
            self._bars = bars
            self._bar = bars.add_task(self._title, total=self._total)
            try:
                yield self
            finally:
                self._bars = None

    def update(self, done: int) -> None:
        """Show that so many are done."""
        now = time.monotonic()
        if self._start is None:
            self._start = (now, done)  # what was there before says nothing of speed
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=done)
        elif now - self._last_line > _LINE_EVERY_S:
            self._last_line = now
            line = f"{self._title}: {done} of {self._total}{self._left(now, done)}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _left(self, now: float, done: int) -> str:
        began, before = self._start or (now, done)
        if done <= before:
            return ""
        seconds = (now - began) / (done - before) * (self._total - done)
        return f", about {seconds:.0f} s left"


def _bars(console: Console, *, eta: bool = False) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:32.32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *([TimeRemainingColumn()] if eta else []),
        console=console,
    )


def error_lines(error: NanoOSError) -> list[str]:
    """Return an error as the lines a user reads: what, then the next step."""
    lines = [f"error: {error.message}"]
    if error.advice:
        lines.append(f"  next: {error.advice}")
    return lines
