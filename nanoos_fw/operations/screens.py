"""Submit a screening as fireworks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.operations.campaign import prepare_launchpad
from nanoos_fw.operations.submission import submit
from nanoos_fw.stores.database import open_database

if TYPE_CHECKING:
    from nanoos_fw.stores.screens import Screen


@dataclass(frozen=True)
class SubmittedScreen:
    """A screening in the launchpad.

    Parameters
    ----------
    fireworks
        How many there are.
    window
        Candidates of each.
    added
        Whether they were not there before.
    """

    fireworks: int
    window: int
    added: bool


def submit_screen(
    launchpad: Any,
    screen: Screen,
    work_root: Path,
    *,
    minutes: float = 10.0,
    workers: int = 1,
) -> SubmittedScreen:
    """Submit a screening; the same one in the same windows is submitted once.

    Parameters
    ----------
    launchpad
        Where the fireworks go.
    screen
        Of :func:`nanoos_fw.stores.screens.register_screen`.
    work_root
        Folder of the work directories, which all workers share.
    minutes
        That a firework lasts, by the throughput measured now on the first two chunks.
    workers
        Processes of a firework.
    """
    from nanoos_fw.firetasks.screening import choose_window
    from nanoos_fw.workflows import window_workflow

    root = work_root.resolve()
    window = choose_window(
        open_database(launchpad),
        screen,
        screen_dir(screen, root),
        minutes=minutes,
        workers=workers,
    )
    workflow = window_workflow(screen, window, str(root))
    prepare_launchpad(launchpad)
    return SubmittedScreen(len(workflow.fws), window, submit(launchpad, workflow))


def screen_dir(screen: Screen, work_root: Path) -> Path:
    """Return the work directory of a screening, as its firetask has it."""
    return work_root / "screening" / screen.key[:2] / screen.key
