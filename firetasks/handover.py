"""What happens when the time of an allocation is up: the work hands itself over.

A firetask that stops in time has not failed. Its firework completes with a detour: a
firework with the same tasks and the same resources, which any later job finds READY and
which continues from the checkpoint in the work directory. So a campaign goes on through
as many allocations as it takes, and nobody reruns anything.

The end of the walltime, a preemption and ``scancel`` look alike to a process: TERM. So
a task that stops asks SLURM (``slurm.was_cancelled``). If somebody cancelled its job it
fails with that cause and is left alone until it is rerun by ``--class cancelled``.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from fireworks.core.firework import Firework, FWAction
from fireworks.utilities.fw_serializers import load_object

from nanoos_fw.errors import LostRunError, OutOfTimeError
from nanoos_fw.slurm import was_cancelled
from nanoos_fw.stores.launches import CONTINUATION, SPEC_KEY

logger = logging.getLogger(__name__)

# Allocations in a row without any progress after which a firework counts as failed:
# its work does not fit the walltime, and would go round for ever.
MAX_STALLED = 5
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# What FireWorks or the launch has put into the spec that a task sees.
_OF_THE_LAUNCH = ("_fw_env", "_recovery", "_exception_details", "_fizzled_parents")


def hand_over(
    fw_spec: Mapping[str, Any], error: OutOfTimeError, fw_id: int | None
) -> FWAction:
    """Return the action that continues the firework in another job.

    Parameters
    ----------
    fw_spec
        Spec of the firework that stops, as its task sees it.
    error
        Why it stops; its evidence is the measure of progress.
    fw_id
        Of the firework that stops.

    Raises
    ------
    OutOfTimeError
        If the last ``MAX_STALLED`` allocations brought no progress.
    """
    before = fw_spec.get(SPEC_KEY, {}).get(CONTINUATION) or {}
    progress = error.evidence or before.get("progress")
    stalled = before.get("stalled", 0) + 1 if progress == before.get("progress") else 0
    if stalled >= MAX_STALLED:
        raise OutOfTimeError(
            f"{MAX_STALLED} allocations in a row brought no progress: {error.message}",
            evidence=error.evidence,
            advice="ask for a longer walltime, then rerun this firework",
        ) from error
    number = before.get("number", 0) + 1
    spec = {
        key: copy.deepcopy(value)
        for key, value in fw_spec.items()
        if key != "_tasks" and key not in _OF_THE_LAUNCH
    }
    spec.setdefault(SPEC_KEY, {})[CONTINUATION] = {
        "first": before.get("first", fw_id),
        "previous": fw_id,
        "number": number,
        "progress": progress,
        "stalled": stalled,
    }
    nanoos = spec[SPEC_KEY]
    name = " ".join(filter(None, (nanoos.get("campaign"), nanoos.get("stage"))))
    # All tasks: those that had finished find their results.
    tasks = [load_object(dict(task)) for task in fw_spec["_tasks"]]
    logger.info("handing over to continuation %d: %s", number, error.message)
    return FWAction(
        stored_data={CONTINUATION: number, "out_of_time": error.to_dict()},
        detours=[Firework(tasks, spec=spec, name=name or "continuation")],
    )


def refuse_if_cancelled(error: Exception) -> None:
    """Let work whose job somebody has cancelled end, and not go on by itself.

    Parameters
    ----------
    error
        What the work ends with.

    Raises
    ------
    LostRunError
        With the cause ``cancelled``, if this job was cancelled.
    """
    if not was_cancelled():
        return
    job = os.environ.get("SLURM_JOB_ID", "")
    progress = error.evidence if isinstance(error, OutOfTimeError) else {}
    raise LostRunError(
        f"job {job} was cancelled while it ran",
        evidence={"cause": "cancelled", "job": job, "progress": progress},
        advice=(
            "what was finished is kept; to go on: nanoos rerun --failed --class "
            "cancelled"
        ),
    ) from error


def launch_no_more(launchpad: Any) -> None:
    """Let the ``rapidfire`` loop of this process see no further work.

    It would take the continuation at once, in an allocation that has no time left.
    Only this object is changed; other workers see the work.
    """
    if launchpad is not None:
        launchpad.run_exists = lambda *_args, **_options: False
        launchpad.future_run_exists = lambda *_args, **_options: False


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raise ``OutOfTimeError`` when TERM, USR1 or USR2 asks this process to stop.

    Once: what follows must not interrupt the handing over, so the signals are ignored
    from then on. SLURM kills what does not end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        ignore_stop_signals()
        raise OutOfTimeError(
            f"stopped by signal {signal.Signals(number).name}",
            advice="what was finished is kept; the rest continues in another job",
        )

    previous = {number: signal.signal(number, handle) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ignore_stop_signals() -> None:
    """Let nothing but SIGKILL end this process before it has ended by itself."""
    if threading.current_thread() is threading.main_thread():
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
