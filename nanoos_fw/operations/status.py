"""Where a campaign stands: counts, causes, pace, time to go; from one aggregation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from nanoos_fw.errors import error_from_dict
from nanoos_fw.faults import DISK_FULL, OUT_OF_MEMORY
from nanoos_fw.operations.rules import failure_class
from nanoos_fw.stores.database import store_errors
from nanoos_fw.stores.launches import CONTINUATION, PARKED, SPEC_KEY

_CAMPAIGN = f"spec.{SPEC_KEY}.campaign"
_STAGE = f"$spec.{SPEC_KEY}.stage"
_OPEN = ("READY", "WAITING", "PAUSED", "RUNNING", "RESERVED")
_THROUGHPUT_WINDOW = timedelta(hours=1)


@dataclass
class CampaignStatus:
    """Where a campaign stands.

    Parameters
    ----------
    stages
        Number of fireworks by stage and state; one that was continued counts once.
    causes
        Number of failed fireworks by stage and failure class.
    per_hour
        Fireworks completed within the last hour, or since the first one if that is
        less long ago.
    eta_s
        Time for what remains at that rate; None if nothing was completed lately.
    """

    name: str
    stages: dict[str, dict[str, int]] = field(default_factory=dict)
    causes: dict[str, dict[str, int]] = field(default_factory=dict)
    parked: int = 0
    per_hour: float = 0.0
    eta_s: float | None = None

    @property
    def states(self) -> dict[str, int]:
        """Number of fireworks by state."""
        found: dict[str, int] = {}
        for counts in self.stages.values():
            for state, count in counts.items():
                found[state] = found.get(state, 0) + count
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return {
            "campaign": self.name,
            "states": self.states,
            "stages": self.stages,
            "causes": self.causes,
            "parked": self.parked,
            "per_hour": round(self.per_hour, 2),
            "eta_s": None if self.eta_s is None else round(self.eta_s),
        }


def campaign_status(
    database: Any, campaign: str, now: datetime | None = None
) -> CampaignStatus:
    """Return where a campaign stands, from one aggregation."""
    now = now or datetime.now(UTC)
    # FireWorks stores times of ended fireworks as ISO text, in UTC.
    since = (now - _THROUGHPUT_WINDOW).isoformat()
    details = "$launch.action.stored_data._exception._details"
    trace = "$launch.action.stored_data._exception._stacktrace"
    continued = {"$gt": [f"$spec.{SPEC_KEY}.{CONTINUATION}.number", 0]}
    memory = "|".join(map(re.escape, OUT_OF_MEMORY))
    pipeline: list[dict[str, Any]] = [
        {"$match": {_CAMPAIGN: campaign}},
        {
            "$facet": {
                "counts": [
                    {
                        "$group": {
                            "_id": {"stage": _STAGE, "state": "$state"},
                            "count": {"$sum": 1},
                            "continued": {"$sum": {"$cond": [continued, 1, 0]}},
                            "order": {"$min": f"$spec.{SPEC_KEY}.order"},
                            "parked": {
                                "$sum": {
                                    "$cond": [
                                        {"$gt": [f"$spec.{SPEC_KEY}.{PARKED}", None]},
                                        1,
                                        0,
                                    ]
                                }
                            },
                        }
                    }
                ],
                "causes": [
                    {"$match": {"state": "FIZZLED"}},
                    {
                        "$project": {
                            "stage": _STAGE,
                            "last": {"$arrayElemAt": ["$launches", -1]},
                        }
                    },
                    {
                        "$lookup": {
                            "from": "launches",
                            "localField": "last",
                            "foreignField": "launch_id",
                            "as": "launch",
                        }
                    },
                    {"$unwind": "$launch"},
                    {
                        "$group": {
                            "_id": {
                                "stage": "$stage",
                                "kind": f"{details}.kind",
                                "cause": f"{details}.evidence.cause",
                                "exit_code": f"{details}.evidence.exit_code",
                                "class": f"{details}.evidence.class",
                                "oom": {
                                    "$regexMatch": {
                                        "input": {
                                            "$ifNull": [
                                                f"{details}.evidence.log_tail",
                                                "",
                                            ]
                                        },
                                        "regex": memory,
                                    }
                                },
                                "disk": {
                                    "$regexMatch": {
                                        "input": {"$ifNull": [trace, ""]},
                                        "regex": "|".join(map(re.escape, DISK_FULL)),
                                    }
                                },
                            },
                            "count": {"$sum": 1},
                        }
                    },
                ],
                "pace": [
                    {"$match": {"state": "COMPLETED"}},
                    {
                        "$group": {
                            "_id": None,
                            "first": {"$min": "$updated_on"},
                            "recent": {
                                "$sum": {
                                    "$cond": [{"$gte": ["$updated_on", since]}, 1, 0]
                                }
                            },
                        }
                    },
                ],
            }
        },
    ]
    with store_errors("count fireworks"):
        (answer,) = database["fireworks"].aggregate(pipeline)
    status = CampaignStatus(campaign)
    if not answer["counts"]:
        return status
    for row in sorted(
        answer["counts"], key=lambda r: (r["order"] or 0, str(r["_id"]["stage"]))
    ):
        stage = status.stages.setdefault(str(row["_id"]["stage"]), {})
        stage[row["_id"]["state"]] = row["count"]
        status.parked += row["parked"]
    for row in answer["counts"]:  # one that was continued has only handed over
        stage = status.stages[str(row["_id"]["stage"])]
        if row["continued"]:
            stage["COMPLETED"] = stage.get("COMPLETED", 0) - row["continued"]
            if stage["COMPLETED"] <= 0:
                del stage["COMPLETED"]
    for row in answer["causes"]:
        key = row["_id"]
        causes = status.causes.setdefault(str(key["stage"]), {})
        name = _cause(key)
        causes[name] = causes.get(name, 0) + row["count"]
    _set_pace(status, answer["pace"], now)
    return status


def _cause(key: Mapping[str, Any]) -> str:
    """Return the failure class that ``rerun`` would find."""
    evidence = {
        name: key[name]
        for name in ("cause", "exit_code", "class")
        if key.get(name) is not None
    }
    if key.get("oom"):
        evidence["log_tail"] = OUT_OF_MEMORY[0]
    if not key.get("kind"):
        return "disk" if key.get("disk") else "code"
    stored = {"kind": key["kind"], "message": "", "evidence": evidence}
    return failure_class(error_from_dict(stored))


def _set_pace(
    status: CampaignStatus, pace: Sequence[Mapping[str, Any]], now: datetime
) -> None:
    remaining = sum(
        count for state, count in status.states.items() if state in {*_OPEN}
    )
    if not remaining:
        status.eta_s = 0.0
    if not pace or not pace[0]["recent"]:
        return
    first = pace[0]["first"]
    began = first if isinstance(first, datetime) else datetime.fromisoformat(first)
    if began.tzinfo is None:
        began = began.replace(tzinfo=UTC)
    span = min(_THROUGHPUT_WINDOW.total_seconds(), (now - began).total_seconds())
    # The first one took time too, which nobody has measured: at least a minute.
    status.per_hour = pace[0]["recent"] / max(span, 60.0) * 3600.0
    if remaining:
        status.eta_s = remaining / status.per_hour * 3600.0
