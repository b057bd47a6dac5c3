"""One slot of a packed worker: a process that runs one firework after another.

A slot is started by ``operations.workers`` with a JSON file and a pipe: the file says
what to run and with which processors, the pipe takes a line of JSON per event
(``began``, ``ended``, ``left``). It never begins what it cannot finish: the query it
gives to FireWorks leaves out fireworks that need more time than is left, and those that
ask for more processors, nodes, GPUs or memory than the slot has.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel, ConfigDict

from nanoos_fw.errors import StoreError
from nanoos_fw.faults import let_output_be_lost
from nanoos_fw.provenance import read_json
from nanoos_fw.slurm import allocation_deadline, memory_mib, walltime_seconds
from nanoos_fw.stores.launches import SPEC_KEY
from nanoos_fw.stores.outages import outlast_outages

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Exit code of a slot whose firework lost its database: somebody has to reconcile it.
LOST_DATABASE_EXIT = 4
# Less is not worth a firework: a process, imports and the first step take longer.
_MIN_LEFT_S = 10.0
_FIRST_POLL_S, _LONGEST_POLL_S = 1.0, 30.0
# What ready fireworks ask for in words is read so often.
_WORDS_KEPT_S = 10.0
# So many fireworks are chosen from at once; higher priorities may wait so long.
_CANDIDATES, _CANDIDATES_KEPT_S = 64, 10.0
_NEEDS = f"spec.{SPEC_KEY}.needs.minimum_s"
_ASKED = "spec._queueadapter"
_GPU_FIELDS = ("gpus", "gpus_per_node", "gpus_per_task")


class SlotConfig(BaseModel):
    """What a slot is told.

    Parameters
    ----------
    launchpad
        ``my_launchpad.yaml``; None for the one that FireWorks finds.
    categories
        Of the fireworks that it runs; empty for all.
    worker
        Name of the worker, which launches are recorded with.
    number
        Of the slot, from 1.
    cpus
        Processors that it and its children are bound to; None leaves them alone.
    ranks
        Tasks that a firework may ask for.
    gpus
        How many GPUs it has.
    memory_mib
        How much memory it has; None without a limit.
    idle_s
        Leave when nothing was to be run for so long.
    folder
        Where its launch directories are made.
    drain_files
        Leave before the next firework if one of these exists.
    parent
        Process of the worker; the slot does not outlive it by more than a firework.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    launchpad: Path | None
    categories: tuple[str, ...]
    worker: str
    number: int
    cpus: tuple[int, ...] | None
    ranks: int
    gpus: int
    memory_mib: float | None = None
    idle_s: float
    folder: Path
    drain_files: tuple[Path, ...]
    parent: int


def fitting_query(
    left_s: float | None,
    ranks: int,
    gpus: int,
    unknown: Sequence[Any] = (),
    too_large: Sequence[Any] = (),
) -> dict[str, Any]:
    """Return the query for fireworks that a slot can finish.

    Parameters
    ----------
    left_s
        Time that is left; None without a limit.
    ranks, gpus
        What the slot has.
    unknown
        Walltimes that ready fireworks of unknown needs ask for: as long as that they
        may take, and nobody knows whether they can be continued.
    too_large
        Amounts of memory that ready fireworks ask for and the slot does not have.
    """
    # What somebody has written into a firework is meant. What work could make use of at
    # most (``enough_ntasks``) is not: fewer ranks give the same numbers.
    conditions: list[dict[str, Any]] = [
        {f"{_ASKED}.nodes": {"$not": {"$gt": 1}}},
        {f"{_ASKED}.ntasks": {"$not": {"$gt": ranks}}},
        {f"{_ASKED}.ntasks_per_node": {"$not": {"$gt": ranks}}},
    ]
    if not gpus:
        conditions += [{f"{_ASKED}.{name}": {"$exists": False}} for name in _GPU_FIELDS]
    if too_large:
        conditions.append({f"{_ASKED}.mem": {"$nin": list(too_large)}})
    if left_s is not None:
        conditions.append({_NEEDS: {"$not": {"$gt": round(left_s, 1)}}})
        too_long = [w for w in unknown if _seconds(w) > left_s]
        if too_long:
            conditions.append(
                {
                    "$or": [
                        {_NEEDS: {"$exists": True}},
                        {f"{_ASKED}.walltime": {"$nin": too_long}},
                    ]
                }
            )
    return {"$and": conditions}


def _seconds(walltime: Any) -> float:
    try:
        return walltime_seconds(walltime)
    except ValueError:
        return math.inf


def _mebibytes(memory: Any) -> float:
    try:
        return memory_mib(memory) or math.inf  # 0 asks for all of a node
    except ValueError:
        return math.inf


class Slot:
    """The loop of a slot.

    Parameters
    ----------
    launchpad
        Of this process alone.
    tell
        Takes the events.
    deadline
        Unix time by which firetasks stop by themselves, or None.
    database_wait_s
        How long to wait for a database server that is away.
    """

    def __init__(
        self,
        config: SlotConfig,
        launchpad: Any,
        tell: Callable[[Mapping[str, Any]], None],
        deadline: float | None,
        *,
        database_wait_s: float = 0.0,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config, self._launchpad, self._tell = config, launchpad, tell
        self._deadline, self._clock, self._sleep = deadline, clock, sleep
        self._signal: str | None = None
        self._words: dict[str, tuple[float, list[Any]]] = {}
        self._known: tuple[float, list[int]] = (-math.inf, [])
        self._began: dict[str, Any] | None = None
        # Between fireworks there is nothing to lose: a request to leave comes first.
        outlast_outages(
            launchpad,
            database_wait_s,
            stop=lambda: self._began is None and self._reason() is not None,
        )
        self._checkout = launchpad.checkout_fw
        launchpad.checkout_fw = self._noted_checkout

    def stop(self, number: int, _frame: FrameType | None = None) -> None:
        """Take no further firework; a firetask has its own handler meanwhile."""
        self._signal = signal.Signals(number).name

    def run(self) -> str:
        """Run what fits until there is a reason to leave; return the reason."""
        from pymongo.errors import PyMongoError

        idle_since, pause = self._clock(), _FIRST_POLL_S
        while True:
            reason = self._reason()
            if reason is not None:
                return self._leave(reason)
            try:
                ran = self._run_one()
            except PyMongoError as error:
                if self._began is not None:
                    raise StoreError(
                        f"the database went away in firework {self._began['fw_id']}: "
                        f"{type(error).__name__}",
                        advice="its result, if there is one, is kept on disk",
                    ) from error
                reason = self._reason()
                if reason is None:
                    logger.warning("the database is away: %s", str(error)[:200])
                    reason = "the database is away"
                return self._leave(reason)
            if "run_exists" in vars(self._launchpad):  # see handover.launch_no_more
                return self._leave("handed over")
            if ran:
                idle_since, pause = self._clock(), _FIRST_POLL_S
                continue
            if self._clock() - idle_since >= self._config.idle_s:
                return self._leave("idle")
            self._sleep(min(pause, max(self._config.idle_s / 4, 0.1)))
            pause = min(1.5 * pause, _LONGEST_POLL_S)

    def _left(self) -> float | None:
        return None if self._deadline is None else self._deadline - self._clock()

    def _reason(self) -> str | None:
        if self._signal is not None:
            return f"signal {self._signal}"
        if any(path.exists() for path in self._config.drain_files):
            return "drained"
        if os.getppid() != self._config.parent:
            return "its worker is gone"
        left = self._left()
        if left is not None and left < _MIN_LEFT_S:
            return "out of time"
        return None

    def _query(self) -> dict[str, Any]:
        left, memory = self._left(), self._config.memory_mib
        walltimes = too_large = []
        if left is not None:
            walltimes = self._asked("walltime", {_NEEDS: {"$exists": False}})
        if memory is not None:
            too_large = [m for m in self._asked("mem") if _mebibytes(m) > memory]
        return fitting_query(
            left, self._config.ranks, self._config.gpus, walltimes, too_large
        )

    def _asked(self, field: str, query: Mapping[str, Any] | None = None) -> list[Any]:
        """Return what ready fireworks ask for in words, which no query can compare."""
        now, (asked, words) = self._clock(), self._words.get(field, (-math.inf, []))
        if now - asked > _WORDS_KEPT_S:
            name = f"{_ASKED}.{field}"
            ready = {"state": "READY", name: {"$exists": True}, **(query or {})}
            words = self._launchpad.fireworks.distinct(name, ready)
            self._words[field] = now, words
        return words

    def _fworker(self, query: Mapping[str, Any]) -> Any:
        from fireworks.core.fworker import FWorker

        categories = list(self._config.categories)
        name = f"{self._config.worker}-slot{self._config.number}"
        return FWorker(name, category=categories or "", query=dict(query))

    def _run_one(self) -> bool:
        query = self._query()
        while candidates := self._candidates(query):
            fworker = self._fworker({**query, "fw_id": {"$in": candidates}})
            if self._launch(fworker):
                return True
            self._known = (-math.inf, [])  # others were faster: ask again
        return False

    def _candidates(self, query: Mapping[str, Any]) -> list[int]:
        """Return fireworks to choose from, those with the highest priority.

        FireWorks sorts all that are ready for each one it takes, and a server may have
        to look at each of a hundred thousand. So they are sorted once for many.
        """
        from fireworks.fw_config import SORT_FWS

        now, (asked, known) = self._clock(), self._known
        if not known or now - asked > _CANDIDATES_KEPT_S:
            order = [("spec._priority", -1)]
            if SORT_FWS.upper() in {"FIFO", "FILO"}:
                order.append(("created_on", 1 if SORT_FWS.upper() == "FIFO" else -1))
            found = self._launchpad.fireworks.find(
                {**self._fworker(query).query, "state": "READY"}, {"fw_id": 1}
            )
            known = [d["fw_id"] for d in found.sort(order).limit(_CANDIDATES)]
            self._known = now, known
        return known

    def _launch(self, fworker: Any) -> bool:
        """Launch one firework; return False if there was none to have."""
        from fireworks.core.rocket_launcher import launch_rocket

        folder = self._config.folder / f"launcher_{time.time_ns()}"
        folder.mkdir(parents=True)
        os.chdir(folder)
        self._began = None
        began = self._clock()
        try:
            launch_rocket(self._launchpad, fworker, strm_lvl="ERROR")
            return self._ended(self._clock() - began)
        finally:
            os.chdir(self._config.folder)
            _remove_if_empty(folder)
            # FireWorks keeps copies of all that it has launched.
            self._launchpad.backup_launch_data.clear()
            self._launchpad.backup_fw_data.clear()

    def _noted_checkout(self, *args: Any, **options: Any) -> Any:
        firework, launch_id = self._checkout(*args, **options)
        if firework is not None:
            with contextlib.suppress(ValueError):
                self._known[1].remove(firework.fw_id)
            nanoos = firework.spec.get(SPEC_KEY) or {}
            self._began = {
                "fw_id": firework.fw_id,
                "launch_id": launch_id,
                "name": firework.name,
                "stage": str(nanoos.get("stage", "")),
            }
            self._tell({"event": "began", **self._began})
        return firework, launch_id

    def _ended(self, wall_s: float) -> bool:
        """Tell how the firework has ended; False if another slot was faster."""
        began = self._began
        if began is None:
            return False
        launch = self._launchpad.launches.find_one(
            {"launch_id": began["launch_id"]},
            {"state": 1, "action.stored_data.out_of_time": 1},
        )
        stored = ((launch or {}).get("action") or {}).get("stored_data") or {}
        state = "HANDED OVER" if "out_of_time" in stored else (launch or {})["state"]
        event = {"event": "ended", "state": state, "wall_s": round(wall_s, 3)}
        self._tell({**began, **event})
        self._began = None
        return True

    def _leave(self, reason: str) -> str:
        """Say why, and how many ready fireworks did not fit."""
        from pymongo.errors import PyMongoError

        ready = 0
        outlast_outages(self._launchpad, 0.1)  # it may be away: this is no work
        with contextlib.suppress(PyMongoError):
            query = {**self._fworker({}).query, "state": "READY"}
            ready = self._launchpad.fireworks.count_documents(query)
        self._tell({"event": "left", "reason": reason, "ready": ready})
        return reason


def _remove_if_empty(folder: Path) -> None:
    """Remove a launch directory with nothing in it but FireWorks' copy of the spec.

    A large campaign would leave hundreds of thousands of them.
    """
    with contextlib.suppress(OSError):
        names = {path.name for path in folder.iterdir()}
        if names <= {"FW.json"}:
            for name in names:
                (folder / name).unlink()
            folder.rmdir()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a slot: CONFIG.json PIPE."""
    path, pipe = sys.argv[1:] if arguments is None else arguments
    let_output_be_lost()
    config = SlotConfig.model_validate(read_json(Path(path)))
    if config.cpus is not None:  # before a library counts them to start its threads
        os.sched_setaffinity(0, config.cpus)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    from nanoos_fw.operations.campaign import quiet_fireworks
    from nanoos_fw.settings import load_settings
    from nanoos_fw.stores.database import Patience, load_launchpad

    def tell(event: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(int(pipe), (json.dumps(dict(event)) + "\n").encode())

    quiet_fireworks()
    wait_s = load_settings().database_wait_s
    launchpad = Patience(wait_s).run(lambda: load_launchpad(config.launchpad))
    deadline = allocation_deadline()
    slot = Slot(config, launchpad, tell, deadline, database_wait_s=wait_s)
    for number in STOP_SIGNALS:
        signal.signal(number, slot.stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker hands Ctrl-C on
    try:
        reason = slot.run()
    except StoreError:
        logger.exception("this slot ends")
        return LOST_DATABASE_EXIT
    logger.info("leaving: %s", reason)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
