"""``rlaunch`` that outlasts an absent database and a full disk; what our jobs start.

FireWorks' own ends with the first operation that fails. Firetasks let its connection
wait, but they are not loaded before a firework has been taken. So jobs made by ``nanoos
init --slurm`` run ``python -m nanoos_fw.rlaunch``, with the arguments of ``rlaunch``.
"""

from __future__ import annotations

from collections.abc import Sequence

from fireworks.scripts import rlaunch_run

from nanoos_fw.faults import let_output_be_lost
from nanoos_fw.settings import load_settings
from nanoos_fw.stores.outages import let_launchers_wait

# Of the script: what it calls with its launchpad.
_LAUNCHERS = ("launch_rocket", "rapidfire")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``rlaunch`` with these arguments; those of the command line without."""
    let_output_be_lost()
    let_launchers_wait(rlaunch_run, _LAUNCHERS, load_settings().database_wait_s)
    return int(rlaunch_run.rlaunch(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
