"""Packing: many fireworks in one allocation, several at a time.

A worker is started once per allocation, for instance by every task of a job array. It
divides the processors and GPUs that it finds into slots, starts a process for each
(``operations.slots``), and watches them. A slot that dies is noted, so that
``reconcile`` knows of its firework at once and not at the end of the allocation, and is
started again, a few times. Work that does not fit what is left of the allocation stays
in the database for another one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from nanoos_fw.operations.shares import Share, shares, slot_environment
from nanoos_fw.operations.slots import SlotConfig
from nanoos_fw.provenance import write_atomic
from nanoos_fw.settings import load_settings
from nanoos_fw.slurm import allocation_times
from nanoos_fw.stores.database import Patience, load_launchpad
from nanoos_fw.stores.places import note_death

logger = logging.getLogger(__name__)

DRAIN_FILE = "drain"
MAX_RESTARTS = 3
_TICK_S = 0.5
# The request to stop is repeated: it could have come just before a firetask took over.
_REPEAT_SIGNAL_S = 2.0
_RESTART_PAUSE_S = 2.0
_NOTE_AGAIN_S = 10.0
_LAST_NOTES_S = 20.0


@dataclass(frozen=True)
class WorkPlan:
    """What a worker is to do.

    Parameters
    ----------
    launchpad
        ``my_launchpad.yaml``; None for the one that FireWorks finds.
    categories
        Of the fireworks it runs; empty for all.
    slots
        How many fireworks run at a time.
    threads
        Threads of each MPI rank; a slot has as many ranks as its processors allow.
    idle_s
        A slot leaves when nothing was to be run for so long.
    walltime_s
        Limit outside of SLURM; inside, the allocation's end decides.
    folder
        Of its files; a worker makes a folder of its own in it.
    """

    launchpad: Path | None
    categories: tuple[str, ...] = ()
    slots: int = 1
    threads: int = 1
    idle_s: float = 300.0
    walltime_s: float | None = None
    folder: Path = Path("work")
    max_restarts: int = MAX_RESTARTS


@dataclass
class SlotSummary:
    """What a slot has done."""

    number: int
    cpus: tuple[int, ...]
    gpus: tuple[str, ...]
    states: dict[str, int] = field(default_factory=dict)
    busy_s: float = 0.0
    died: int = 0
    lost: list[int] = field(default_factory=list)
    left: str = ""
    ready: int = 0


@dataclass
class WorkSummary:
    """What a worker has done, and why its slots left."""

    worker: str
    slots: list[SlotSummary]
    wall_s: float = 0.0

    @property
    def states(self) -> dict[str, int]:
        """Number of fireworks by how they ended."""
        found: dict[str, int] = {}
        for slot in self.slots:
            for state, count in slot.states.items():
                found[state] = found.get(state, 0) + count
        return found

    @property
    def lost(self) -> list[int]:
        """Fireworks whose slot died."""
        return [fw_id for slot in self.slots for fw_id in slot.lost]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return {
            "worker": self.worker,
            "wall_s": round(self.wall_s, 3),
            "fireworks": self.states,
            "lost": self.lost,
            "slots": [
                {
                    "slot": slot.number,
                    "cpus": list(slot.cpus),
                    "gpus": list(slot.gpus),
                    "fireworks": slot.states,
                    "busy_s": round(slot.busy_s, 3),
                    "died": slot.died,
                    "left": slot.left,
                    "ready": slot.ready,
                }
                for slot in self.slots
            ],
        }


class _Running:
    """A slot's process, and what is known of it."""

    def __init__(self, summary: SlotSummary, share: Share) -> None:
        self.summary, self.share = summary, share
        self.process: subprocess.Popen[bytes] | None = None
        self.began: dict[str, Any] | None = None
        self.start_at: float | None = 0.0
        self.pipe: int | None = None
        self.text = b""


class Worker:
    """Starts the slots, listens to them, notes those that die."""

    def __init__(self, plan: WorkPlan, say: Callable[[str], None]) -> None:
        self._plan, self._say = plan, say
        patience = Patience(load_settings().database_wait_s)
        self._launchpad = patience.run(lambda: load_launchpad(plan.launchpad))
        start, end = allocation_times()
        if end is None and plan.walltime_s is not None:
            start, end = time.time(), time.time() + plan.walltime_s
        self._times = start, end
        self.name = worker_name()
        self.folder = plan.folder.resolve() / self.name
        self._signal: str | None = None
        self._signalled = 0.0
        self._unnoted: list[dict[str, Any]] = []
        self._noted_at = 0.0
        self._selector = selectors.DefaultSelector()
        self._slots = [
            _Running(SlotSummary(number, share.cpus, share.gpus), share)
            for number, share in enumerate(shares(plan.slots), 1)
        ]

    def stop(self, number: int, _frame: FrameType | None = None) -> None:
        """Let the slots hand over what they run, and take nothing further."""
        self._signal = signal.Signals(number).name

    def run(self) -> WorkSummary:
        """Work until all slots have left."""
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._announce()
        while any(slot.process or slot.start_at is not None for slot in self._slots):
            self._start_due()
            self._hand_on_signal()
            for key, _ in self._selector.select(_TICK_S):
                self._listen(key.data)
            for slot in self._slots:
                if slot.process is not None and slot.process.poll() is not None:
                    self._has_ended(slot, slot.process.returncode)
            self._note_deaths()
        until = time.monotonic() + _LAST_NOTES_S
        while self._unnoted and time.monotonic() < until:
            self._noted_at = 0.0
            self._note_deaths()
            time.sleep(_TICK_S)
        summary = WorkSummary(self.name, [slot.summary for slot in self._slots])
        summary.wall_s = time.monotonic() - began
        return summary

    def _announce(self) -> None:
        _, end = self._times
        until = (
            time.strftime("until %Y-%m-%d %H:%M:%S", time.localtime(end))
            if end
            else "without a time limit"
        )
        what = ", ".join(self._plan.categories) or "all categories"
        self._say(
            f"{self.name}: {len(self._slots)} slots for {what}, {until}; to drain it: "
            f"touch {self.folder / DRAIN_FILE}"
        )
        for slot in self._slots:
            cpus = ",".join(map(str, slot.share.cpus))
            count = len(slot.share.cpus)
            where = f"processors {cpus}" if slot.share.bound else f"{count} processors"
            gpus = f", GPUs {','.join(slot.share.gpus)}" if slot.share.gpus else ""
            memory = slot.share.memory_mib
            room = f", {memory:.0f} MiB" if memory is not None else ""
            self._say(f"slot {slot.summary.number}: {where}{gpus}{room}")
        if int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1 and (
            os.environ.get("SLURM_STEP_ID") is None
        ):
            self._say("warning: only the first node of this allocation is used")

    def _start_due(self) -> None:
        for slot in self._slots:
            if slot.start_at is not None and time.monotonic() >= slot.start_at:
                slot.start_at = None
                self._start(slot)

    def _start(self, slot: _Running) -> None:
        number = slot.summary.number
        ranks = max(1, len(slot.share.cpus) // self._plan.threads)
        folder = self.folder / f"slot-{number}"
        folder.mkdir(exist_ok=True)
        config = SlotConfig(
            launchpad=self._plan.launchpad and self._plan.launchpad.resolve(),
            categories=self._plan.categories,
            worker=self.name,
            number=number,
            cpus=slot.share.cpus if slot.share.bound else None,
            ranks=ranks,
            gpus=len(slot.share.gpus),
            memory_mib=slot.share.memory_mib,
            idle_s=self._plan.idle_s,
            folder=folder,
            drain_files=(
                self.folder / DRAIN_FILE,
                self._plan.folder.resolve() / DRAIN_FILE,
            ),
            parent=os.getpid(),
        )
        path = self.folder / f"slot-{number}.json"
        write_atomic(path, config.model_dump_json(indent=1))
        reading, writing = os.pipe()
        with (self.folder / f"slot-{number}.log").open("ab") as log:
            slot.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "nanoos_fw.operations.slots",
                    str(path),
                    str(writing),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=slot_environment(
                    slot.share, number, self._plan.threads, self._times
                ),
                pass_fds=(writing,),
                # Ctrl-C is for the worker, which hands it on as a request.
                start_new_session=True,
            )
        os.close(writing)
        os.set_blocking(reading, False)
        slot.pipe, slot.text, slot.began, slot.summary.left = reading, b"", None, ""
        self._selector.register(reading, selectors.EVENT_READ, slot)

    def _hand_on_signal(self) -> None:
        if self._signal is None:
            return
        now = time.monotonic()
        if now - self._signalled < _REPEAT_SIGNAL_S:
            return
        if not self._signalled:
            self._say(f"{self._signal}: no further firework; those running stop")
        self._signalled = now
        for slot in self._slots:
            slot.start_at = None
            if slot.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    slot.process.send_signal(signal.SIGUSR1)

    def _listen(self, slot: _Running) -> None:
        if slot.pipe is None:
            return
        with contextlib.suppress(BlockingIOError):
            while data := os.read(slot.pipe, 65536):
                slot.text += data
            # The other end is closed: nothing more will come.
            self._selector.unregister(slot.pipe)
            os.close(slot.pipe)
            slot.pipe = None
        *lines, slot.text = slot.text.split(b"\n")
        for line in lines:
            self._heard(slot, json.loads(line))

    def _heard(self, slot: _Running, event: dict[str, Any]) -> None:
        summary = slot.summary
        if event["event"] == "began":
            slot.began = event
            self._say(
                f"slot {summary.number}: firework {event['fw_id']} ({event['name']})"
            )
        elif event["event"] == "ended":
            slot.began = None
            state = event["state"]
            summary.states[state] = summary.states.get(state, 0) + 1
            summary.busy_s += event["wall_s"]
            self._say(
                f"slot {summary.number}: firework {event['fw_id']} "
                f"{state.lower()} after {event['wall_s']:.1f} s"
            )
        else:
            summary.left, summary.ready = event["reason"], event["ready"]
            rest = f"; {event['ready']} ready ones remain" if event["ready"] else ""
            self._say(f"slot {summary.number} leaves: {event['reason']}{rest}")

    def _has_ended(self, slot: _Running, code: int) -> None:
        process = slot.process
        assert process is not None
        if slot.pipe is not None:
            self._listen(slot)  # its last words
        if slot.pipe is not None:  # a child of it holds the other end
            self._selector.unregister(slot.pipe)
            os.close(slot.pipe)
            slot.pipe = None
        slot.process = None
        summary = slot.summary
        if summary.left and code == 0:
            return
        summary.died += 1
        how = _how(code)
        where = ""
        if slot.began is not None:
            fw_id = slot.began["fw_id"]
            summary.lost.append(fw_id)
            where = f" in firework {fw_id}, which 'nanoos reconcile' will find"
            self._unnoted.append(
                {**slot.began, "pid": process.pid, "reason": f"its slot {how}"}
            )
        again = summary.died <= self._plan.max_restarts and self._signal is None
        summary.left = "" if again else f"{how}, and was not started again"
        if again:
            slot.start_at = time.monotonic() + _RESTART_PAUSE_S * summary.died
        self._say(
            f"slot {summary.number} {how}{where}; "
            + ("it is started again" if again else "it is not started again")
        )

    def _note_deaths(self) -> None:
        """Write down which launches are gone; later, if the database is away."""
        from pymongo.errors import PyMongoError

        if not self._unnoted or time.monotonic() - self._noted_at < _NOTE_AGAIN_S:
            return
        self._noted_at = time.monotonic()
        try:
            while self._unnoted:
                dead = self._unnoted[0]
                note_death(
                    self._launchpad.db,
                    launch_id=dead["launch_id"],
                    fw_id=dead["fw_id"],
                    pid=dead["pid"],
                    reason=dead["reason"],
                )
                self._unnoted.pop(0)
        except PyMongoError as error:
            logger.warning("a slot's death is noted later: %s", str(error)[:200])


def worker_name(environ: Mapping[str, str] | None = None) -> str:
    """Return the name of a worker: its SLURM job, array task and node, or process."""
    env = os.environ if environ is None else environ
    host = env.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    if "SLURM_JOB_ID" not in env:
        return f"worker-{host}-{os.getpid()}"
    job = env.get("SLURM_ARRAY_JOB_ID", env["SLURM_JOB_ID"])
    words = ["worker", job, *filter(None, [env.get("SLURM_ARRAY_TASK_ID")]), host]
    if env.get("SLURM_PROCID", "0") != "0":
        words.append(env["SLURM_PROCID"])
    # A job that SLURM began anew must not mix its files with those of before.
    if env.get("SLURM_RESTART_COUNT", "0") != "0":
        words.append(f"again{env['SLURM_RESTART_COUNT']}")
    return "-".join(words)


def work(plan: WorkPlan, say: Callable[[str], None] = lambda _: None) -> WorkSummary:
    """Run a worker in this process, which stops in order on TERM, USR1, USR2, INT.

    Parameters
    ----------
    plan
        What to do.
    say
        Takes the lines of its log.
    """
    worker = Worker(plan, say)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    previous = {number: signal.signal(number, worker.stop) for number in numbers}
    try:
        return worker.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
