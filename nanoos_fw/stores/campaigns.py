"""Campaigns: an immutable plan, and what its stages have produced so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoos_fw.errors import InputError
from nanoos_fw.provenance import content_key, utc_now
from nanoos_fw.stores.database import store_errors


class CampaignStore:
    """The collection ``campaigns``.

    A document holds the plan under ``plan`` and small references (a dataset key, a
    model name and version, structure keys) under ``outputs``. Stages hand each other
    results through it, so that a wide or a rerun workflow never carries them in its
    specs.
    """

    def __init__(self, database: Any) -> None:
        self._campaigns = database["campaigns"]

    def create(self, name: str, plan: Mapping[str, Any]) -> None:
        """Create a campaign, or accept the same plan again.

        Raises
        ------
        InputError
            If a campaign of this name has another plan: results of two plans must
            not mix under one name.
        """
        from pymongo.errors import DuplicateKeyError

        key = content_key("campaign", dict(plan))
        document = {
            "_id": name,
            "plan": dict(plan),
            "plan_key": key,
            "outputs": {},
            "created": utc_now(),
        }
        with store_errors(f"create campaign {name}"):
            try:
                self._campaigns.insert_one(document)
            except DuplicateKeyError:
                stored = self._campaigns.find_one({"_id": name}, {"plan_key": 1})
                if stored is not None and stored["plan_key"] != key:
                    raise InputError(
                        f"campaign {name!r} exists with another plan",
                        advice="choose another name, or give the plan it began with",
                    ) from None

    def get(self, name: str) -> dict[str, Any]:
        """Return the campaign's document.

        Raises
        ------
        InputError
            If there is none of this name; lists those there are.
        """
        with store_errors(f"read campaign {name}"):
            document = self._campaigns.find_one({"_id": name})
            if document is None:
                names = sorted(d["_id"] for d in self._campaigns.find({}, {"_id": 1}))
                raise InputError(
                    f"there is no campaign {name!r}",
                    evidence={"campaigns": names[:20]},
                    advice=f"known campaigns: {', '.join(names[:5]) or 'none'}",
                )
        return dict(document)

    def names(self) -> list[str]:
        """Return the names of all campaigns, sorted."""
        with store_errors("list campaigns"):
            return sorted(d["_id"] for d in self._campaigns.find({}, {"_id": 1}))

    def record(self, name: str, **outputs: Any) -> None:
        """Record small outputs of a stage; recording them again changes nothing."""
        with store_errors(f"record outputs of campaign {name}"):
            self._campaigns.update_one(
                {"_id": name},
                {"$set": {f"outputs.{key}": value for key, value in outputs.items()}},
            )

    def output(self, name: str, key: str) -> Any:
        """Return an output of an earlier stage.

        Raises
        ------
        InputError
            If that stage has not recorded it.
        """
        outputs = self.get(name)["outputs"]
        if key not in outputs:
            raise InputError(
                f"campaign {name!r} has no {key} yet",
                evidence={"outputs": sorted(outputs)},
                advice="run the stage that makes it first",
            )
        return outputs[key]
