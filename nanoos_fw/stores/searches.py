"""Hyper-parameter searches: who works on which trial."""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanoos_fw.errors import StoreError
from nanoos_fw.ml.search import SearchConfig, Trial, promotion, read_search, suggest
from nanoos_fw.stores.database import store_errors
from nanoos_fw.stores.search_records import (
    DONE,
    RUNNING,
    STOPPED,
    SearchRecords,
    read_trial,
)

__all__ = [
    "DEFAULT_LEASE_S",
    "DONE",
    "MAX_ATTEMPTS",
    "RUNNING",
    "STOPPED",
    "Job",
    "SearchStore",
]

logger = logging.getLogger(__name__)

DEFAULT_LEASE_S = 300.0
MAX_ATTEMPTS = 3
_CLAIM_TRIES = 200


@dataclass(frozen=True)
class Job:
    """A piece of work that one worker holds: train a trial up to some epochs.

    Parameters
    ----------
    search, number
        Whose trial.
    parameters
        Of the trial.
    epochs
        To train up to; what was trained before is on disk.
    token
        Proves that this worker holds it.
    attempt
        From 1; higher after a worker died or failed with it.
    """

    search: str
    number: int
    parameters: Mapping[str, Any]
    epochs: int
    token: str
    attempt: int


class SearchStore(SearchRecords):
    """The collections ``searches`` and ``trials``, with the work on them.

    A claim is one atomic update or one insert under the unique index on search and
    number, so no trial is ever given to two workers. What the budget allows is
    reserved in the search's document, under the condition that it is left, before a
    trial begins or goes on.
    """

    # ----------------------------------------------------------------------- jobs

    def claim(
        self, name: str, *, lease_s: float = DEFAULT_LEASE_S, nodes: int = 1
    ) -> Job | None:
        """Take a piece of work; None if there is none to take now.

        In this order: the trial of a worker that is dead (its lease has run out),
        work that was reserved and never begun, a trial that goes on to the next rung,
        a new trial.

        Parameters
        ----------
        name
            The search.
        lease_s
            Seconds after which the work is taken from a worker that gives no sign.
        nodes
            Nodes that the work will occupy.
        """
        token = f"{socket.gethostname()}-{secrets.token_hex(8)}"
        for _ in range(_CLAIM_TRIES):
            document = self._document(name)
            if document["state"] != RUNNING:
                return None
            with store_errors(f"look for work in search {name}"):
                holding = {
                    "token": token,
                    "lease_until": self._clock() + lease_s,
                    "begun": self._clock(),
                    "nodes": nodes,
                    "state": "running",
                }
                job = self._take_over(name, holding)
                if job is not None:
                    return job
                if self._is_spent(document):
                    return None
                found = self._begin(document, holding)
            if isinstance(found, Job):
                return found
            if found is None:
                return None
        raise StoreError(
            f"search {name!r} is claimed by too many workers at once",
            advice="try again",
        )

    def renew(self, job: Job, lease_s: float = DEFAULT_LEASE_S) -> bool:
        """Give a sign of life; False if the work was given to another worker."""
        with store_errors(f"renew the lease of trial {job.number}"):
            answer = self._trials.update_one(
                self._held(job), {"$set": {"lease_until": self._clock() + lease_s}}
            )
        return bool(answer.matched_count)

    def finish(self, job: Job, values: Mapping[int, float], **outputs: Any) -> bool:
        """Record what a trial has reached; False if another worker has it now.

        Parameters
        ----------
        job
            The work.
        values
            Epochs -> lowest validation error by then.
        outputs
            What else to keep: metrics, where the checkpoint is.
        """
        config = self.config(job.search)
        state = "done" if job.epochs >= config.rungs[-1] else "paused"
        return self._let_go(
            job,
            {
                "state": state,
                **{f"values.{epochs}": value for epochs, value in values.items()},
                **outputs,
            },
        )

    def fail(self, job: Job, error: Mapping[str, Any]) -> bool:
        """Record that a trial cannot be trained."""
        return self._let_go(job, {"state": "failed", "error": dict(error)})

    def release(self, job: Job, *, after_s: float | None = None) -> bool:
        """Give work back unfinished, for any worker to go on with.

        Parameters
        ----------
        job
            The work.
        after_s
            It failed: nobody shall try again before so many seconds, and the attempt
            counts. None: nothing is wrong with it.
        """
        if after_s is None:
            return self._let_go(job, {"lease_until": 0.0, "attempt": job.attempt - 1})
        return self._let_go(job, {"lease_until": self._clock() + after_s})

    def others_at_work(self, name: str) -> float | None:
        """Return seconds until the last lease of running work ends, or None."""
        leases = [
            document["lease_until"]
            for document in self._documents(name)
            if document["state"] == "running"
        ]
        return max(leases) - self._clock() if leases else None

    # -------------------------------------------------------------------- private

    def _take_over(self, name: str, holding: Mapping[str, Any]) -> Job | None:
        """Take work whose lease has run out: its worker is dead, or gave it back."""
        now = self._clock()
        expired = {"search": name, "state": "running", "lease_until": {"$lt": now}}
        dead = self._trials.find_one(expired, sort=[("number", 1)])
        if dead is None:
            return None
        # What it cost until its last sign; work that was given back is paid for.
        spent = 0.0
        if dead["token"] is not None:
            spent = max(0.0, dead["lease_until"] - dead["begun"]) * dead["nodes"]
        document = self._trials.find_one_and_update(
            {
                "_id": dead["_id"],
                "state": "running",
                "token": dead["token"],
                "lease_until": dead["lease_until"],
            },
            {"$set": dict(holding), "$inc": {"attempt": 1, "node_seconds": spent}},
            return_document=True,
        )
        if document is None:
            return None
        logger.info("trial %d of search %r goes on here", document["number"], name)
        return _job(document)

    def _is_spent(self, document: Mapping[str, Any]) -> bool:
        limit = document["config"]["budget"]["node_hours"]
        if limit is None:
            return False
        return self._node_hours(self._documents(document["_id"])) >= float(limit)

    def _begin(
        self, document: Mapping[str, Any], holding: Mapping[str, Any]
    ) -> Job | bool | None:
        """Begin a trial, or let one go on.

        None if there is nothing to do; True if another worker was first and the
        state must be looked at again.
        """
        rows = {row["number"]: row for row in self._documents(document["_id"])}
        view = _View(
            config=read_search(document["config"]),
            rows=rows,
            reserved={int(k): int(v) for k, v in document["reserved"].items()},
            trials=[read_trial(row) for row in rows.values()],
        )
        for step in (self._left_lying, self._next_rung, self._new_trial):
            found = step(view, holding)
            if found is not None:
                return found
        return None

    def _left_lying(self, view: _View, holding: Mapping[str, Any]) -> Job | bool | None:
        """Begin what was reserved by a worker that died before it began.

        Or that begins right now: the unique index, or the state, lets one of the two.
        """
        for number, epochs in view.reserved.items():
            if number not in view.rows:
                return self._insert(view, number, epochs, holding)
            row = view.rows[number]
            if row["state"] == "paused" and row["epochs"] < epochs:
                return self._go_on(view, number, row["epochs"], epochs, holding)
        return None

    def _next_rung(self, view: _View, holding: Mapping[str, Any]) -> Job | bool | None:
        step = promotion(view.config, view.trials)
        if step is None:
            return None
        number, epochs = step
        before = view.reserved[number]
        if self._reserve(view.config, number, before, epochs):
            return self._go_on(view, number, before, epochs, holding)
        now = self._document(view.config.name)["reserved"]
        # If it is not that somebody was faster, too few epochs are left for this step;
        # a new trial may need fewer.
        return True if int(now[str(number)]) != before else None

    def _new_trial(self, view: _View, holding: Mapping[str, Any]) -> Job | bool | None:
        number, epochs = len(view.reserved), view.config.rungs[0]
        limit = view.config.budget.trials
        if limit is not None and number >= limit:
            return None
        if self._reserve(view.config, number, None, epochs):
            return self._insert(view, number, epochs, holding)
        now = self._document(view.config.name)["reserved"]
        return True if str(number) in now else None

    def _reserve(
        self, config: SearchConfig, number: int, before: int | None, epochs: int
    ) -> bool:
        """Reserve the epochs of a trial up to some number, if they are left."""
        needed = epochs - (before or 0)
        query: dict[str, Any] = {
            "_id": config.name,
            "state": RUNNING,
            f"reserved.{number}": {"$exists": False} if before is None else before,
        }
        if config.budget.epochs is not None:
            query["reserved_epochs"] = {"$lte": config.budget.epochs - needed}
        answer = self._searches.update_one(
            query,
            {
                "$set": {f"reserved.{number}": epochs},
                "$inc": {"reserved_epochs": needed},
            },
        )
        return bool(answer.modified_count)

    def _insert(
        self,
        view: _View,
        number: int,
        epochs: int,
        holding: Mapping[str, Any],
    ) -> Job | bool:
        from pymongo.errors import DuplicateKeyError

        document = {
            "search": view.config.name,
            "number": number,
            "parameters": suggest(view.config, number, view.trials),
            "epochs": epochs,
            "values": {},
            "attempt": 1,
            "node_seconds": 0.0,
            "error": None,
            **holding,
        }
        try:
            self._trials.insert_one(document)
        except DuplicateKeyError:
            return True
        return _job(document)

    def _go_on(
        self,
        view: _View,
        number: int,
        before: int,
        epochs: int,
        holding: Mapping[str, Any],
    ) -> Job | bool:
        name = view.config.name
        document = self._trials.find_one_and_update(
            {"search": name, "number": number, "state": "paused", "epochs": before},
            {"$set": {**holding, "epochs": epochs, "attempt": 1}},
            return_document=True,
        )
        return True if document is None else _job(document)

    def _held(self, job: Job) -> dict[str, Any]:
        return {
            "search": job.search,
            "number": job.number,
            "token": job.token,
            "state": "running",
        }

    def _let_go(self, job: Job, changes: Mapping[str, Any]) -> bool:
        """Write down what became of a job and what it cost."""
        with store_errors(f"record trial {job.number} of search {job.search}"):
            held = self._trials.find_one(self._held(job))
            if held is None:
                logger.warning(
                    "trial %d of search %r was given to another worker",
                    job.number,
                    job.search,
                )
                return False
            spent = max(0.0, self._clock() - held["begun"]) * held["nodes"]
            answer = self._trials.update_one(
                self._held(job),
                {
                    "$set": {"token": None, **changes},
                    "$inc": {"node_seconds": spent},
                },
            )
        return bool(answer.modified_count)


@dataclass(frozen=True)
class _View:
    """A search as it was when a worker looked."""

    config: SearchConfig
    rows: Mapping[int, Mapping[str, Any]]
    reserved: Mapping[int, int]
    trials: list[Trial]


def _job(document: Mapping[str, Any]) -> Job:
    return Job(
        search=document["search"],
        number=int(document["number"]),
        parameters=document["parameters"],
        epochs=int(document["epochs"]),
        token=document["token"],
        attempt=int(document["attempt"]),
    )
