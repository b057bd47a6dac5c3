"""``nanoos status --watch``: a campaign in the terminal, kept up to date."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from nanoos_fw.operations.status import CampaignStatus

_WIDTH = 30
_COLOURS = (("COMPLETED", "blue"), ("RUNNING", "green"), ("FIZZLED", "red"))
# A firework in one of these states goes on by itself.
_OPEN = frozenset({"READY", "RESERVED", "RUNNING"})


def watch_campaign(
    console: Console,
    read: Callable[[], CampaignStatus],
    *,
    every_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> CampaignStatus:
    """Show a campaign anew until nothing in it can go on; return its last status.

    On a terminal one table in place; elsewhere a line whenever the counts change.

    Parameters
    ----------
    read
        Asks the database.
    every_s
        Time between two questions, s.
    """
    from rich.live import Live

    status = read()
    if not console.is_terminal:
        shown: dict[str, int] | None = None
        while True:
            if status.states != shown:
                shown = status.states
                console.print(_line(status), markup=False, highlight=False)
            if not _goes_on(status):
                return status
            sleep(every_s)
            status = read()
    with Live(_table(status), console=console, auto_refresh=False) as live:
        while _goes_on(status):
            sleep(every_s)
            status = read()
            live.update(_table(status), refresh=True)
    return status


def _goes_on(status: CampaignStatus) -> bool:
    """Whether anything is ready or runs: waiting fireworks alone wait for ever."""
    return not _OPEN.isdisjoint(status.states)


def _line(status: CampaignStatus) -> str:
    counts = ", ".join(f"{n} {state.lower()}" for state, n in status.states.items())
    return f"{status.name}: {counts or 'nothing submitted'}"


def _table(status: CampaignStatus) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    table = Table(
        title=status.name, title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column("stage")
    table.add_column("fireworks", no_wrap=True)
    for name in ("completed", "running", "failed"):
        table.add_column(name, justify="right")
    table.add_column("why")
    for stage, counts in status.stages.items():
        causes = status.causes.get(stage, {})
        table.add_row(
            stage,
            _bar(counts),
            f"{counts.get('COMPLETED', 0)}/{sum(counts.values())}",
            str(counts.get("RUNNING", 0)),
            str(counts.get("FIZZLED", 0)),
            ", ".join(f"{number} {cause}" for cause, number in causes.items()),
        )
    return Group(table, _rate(status))


def _bar(counts: Mapping[str, int]) -> str:
    """Return a bar of ``_WIDTH`` cells as markup; a part is never rounded away."""
    total = sum(counts.values())
    cells, left = [], _WIDTH
    for state, colour in _COLOURS:
        number = counts.get(state, 0)
        width = min(left, max(1, int(_WIDTH * number / total))) if number else 0
        cells.append(f"[{colour}]{'█' * width}[/]")
        left -= width
    return "".join(cells) + f"[dim]{'░' * left}[/]"


def _rate(status: CampaignStatus) -> str:
    words = [f"{status.per_hour:.1f} fireworks an hour"]
    if status.eta_s is not None:
        words.append(f"about {status.eta_s / 3600:.1f} h to go")
    if status.parked:
        words.append(f"{status.parked} parked: SLURM refused their jobs")
    return "; ".join(words)
