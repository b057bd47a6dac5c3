"""Hyper-parameter searches: what they are, how far, and at what cost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from nanoos_fw.errors import InputError
from nanoos_fw.ml.search import SearchConfig, Trial, best_trial, read_search
from nanoos_fw.provenance import content_key, utc_now
from nanoos_fw.stores.database import store_errors

RUNNING, STOPPED, DONE = "running", "stopped", "done"
_SECONDS_PER_HOUR = 3600.0


class SearchRecords:
    """The collections ``searches`` and ``trials``, to create, read, stop and resume.

    Who works on which trial is decided by
    :class:`nanoos_fw.stores.searches.SearchStore`.
    """

    def __init__(self, database: Any, *, clock: Any = time.time) -> None:
        self._searches = database["searches"]
        self._trials = database["trials"]
        self._clock = clock

    def create(self, config: SearchConfig, dataset_hash: str) -> None:
        """Create a search, or accept the same one again.

        Parameters
        ----------
        config
            What to search.
        dataset_hash
            Of the dataset in ``config.dataset_dir``.

        Raises
        ------
        InputError
            If another search, or one on another dataset, has this name.
        """
        from pymongo.errors import DuplicateKeyError

        values = config.model_dump(mode="json")
        key = content_key("search", {"config": values, "dataset": dataset_hash})
        document = {
            "_id": config.name,
            "config": values,
            "key": key,
            "dataset_hash": dataset_hash,
            "state": RUNNING,
            "reserved": {},
            "reserved_epochs": 0,
            "model": None,
            "turns": 0,
            "created": utc_now(),
        }
        with store_errors(f"create search {config.name}"):
            try:
                self._searches.insert_one(document)
            except DuplicateKeyError:
                stored = self._searches.find_one({"_id": config.name}, {"key": 1})
                if stored is not None and stored["key"] != key:
                    raise InputError(
                        f"search {config.name!r} exists with another configuration",
                        advice="choose another name",
                    ) from None

    def names(self) -> list[str]:
        """Return the names of all searches, sorted."""
        with store_errors("list searches"):
            return sorted(d["_id"] for d in self._searches.find({}, {"_id": 1}))

    def config(self, name: str) -> SearchConfig:
        """Return the configuration of a search."""
        return read_search(self._document(name)["config"])

    def dataset_hash(self, name: str) -> str:
        """Return the hash of the dataset that all trials are to see."""
        return str(self._document(name)["dataset_hash"])

    def state(self, name: str) -> str:
        """Return ``running``, ``stopped`` or ``done``."""
        return str(self._document(name)["state"])

    def trials(self, name: str) -> list[Trial]:
        """Return all trials, by number."""
        return [read_trial(document) for document in self._documents(name)]

    def table(self, name: str) -> list[dict[str, Any]]:
        """Return all trials with all that is known of them, as JSON-compatible rows."""
        rows = []
        for document in self._documents(name):
            row = {k: v for k, v in document.items() if k not in ("_id", "token")}
            trial = read_trial(document)
            row |= {"values": dict(trial.values), "value": trial.value}
            rows.append(row)
        return rows

    def status(self, name: str) -> dict[str, Any]:
        """Return the state of a search, counts, cost so far and the best trial."""
        document = self._document(name)
        rows = self._documents(name)
        trials = [read_trial(row) for row in rows]
        best = best_trial(trials)
        states = ("running", "paused", "done", "failed")
        return {
            "name": name,
            "state": document["state"],
            "method": document["config"]["method"],
            "trials": {s: sum(t.state == s for t in trials) for s in states},
            "budget": document["config"]["budget"],
            "spent": {
                "trials": len(trials),
                "epochs": sum(trial.epochs for trial in trials),
                "node_hours": self._node_hours(rows),
            },
            "best": None
            if best is None
            else {
                "number": best.number,
                "value": best.value,
                "epochs": best.epochs,
                "parameters": dict(best.parameters),
            },
            "model": document["model"],
        }

    def stop(self, name: str) -> None:
        """Begin no more work; what runs runs to its end."""
        self._document(name)
        with store_errors(f"stop search {name}"):
            self._searches.update_one(
                {"_id": name, "state": RUNNING}, {"$set": {"state": STOPPED}}
            )

    def resume(self, name: str) -> None:
        """Let a stopped search go on."""
        self._document(name)
        with store_errors(f"resume search {name}"):
            self._searches.update_one(
                {"_id": name, "state": STOPPED}, {"$set": {"state": RUNNING}}
            )

    def next_turn(self, name: str) -> int:
        """Return how many times workers were submitted before, and count one more."""
        self._document(name)
        with store_errors(f"count the workers of search {name}"):
            document = self._searches.find_one_and_update(
                {"_id": name}, {"$inc": {"turns": 1}}, return_document=True
            )
        return int(document["turns"]) - 1

    def finish_search(self, name: str, model: str | None) -> None:
        """Record that there is no more to do, and which model came of it."""
        with store_errors(f"finish search {name}"):
            self._searches.update_one(
                {"_id": name, "state": RUNNING}, {"$set": {"state": DONE}}
            )
            self._searches.update_one({"_id": name}, {"$set": {"model": model}})

    # -------------------------------------------------------------------- private

    def _document(self, name: str) -> dict[str, Any]:
        with store_errors(f"read search {name}"):
            document = self._searches.find_one({"_id": name})
        if document is None:
            names = self.names()
            raise InputError(
                f"there is no search {name!r}",
                evidence={"searches": names[:20]},
                advice=f"known searches: {', '.join(names[:5]) or 'none'}",
            )
        return dict(document)

    def _documents(self, name: str) -> list[dict[str, Any]]:
        with store_errors(f"read the trials of search {name}"):
            return list(self._trials.find({"search": name}).sort("number", 1))

    def _node_hours(self, rows: list[dict[str, Any]]) -> float:
        """Return what finished and running work has cost by now."""
        now = self._clock()
        seconds = 0.0
        for row in rows:
            seconds += float(row["node_seconds"])
            if row["state"] == "running" and row["token"] is not None:
                until = min(now, row["lease_until"])
                seconds += max(0.0, until - row["begun"]) * row["nodes"]
        return seconds / _SECONDS_PER_HOUR


def read_trial(document: Mapping[str, Any]) -> Trial:
    """Return the trial of a document."""
    return Trial(
        number=int(document["number"]),
        parameters=document["parameters"],
        values={int(k): float(v) for k, v in document["values"].items()},
        state=document["state"],
    )
