"""A campaign that is over, moved out of the launchpad into a file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoos_fw.errors import InputError
from nanoos_fw.operations.campaigns import CAMPAIGN, fireworks_in, note
from nanoos_fw.operations.status import campaign_status
from nanoos_fw.provenance import sha256_bytes, utc_now, write_atomic
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import store_errors

_OPEN = ("READY", "WAITING", "RUNNING", "RESERVED")
_ENDED = ("COMPLETED", "FIZZLED", "DEFUSED", "ARCHIVED", "PAUSED")


def archive(launchpad: Any, campaign: str, file: Path) -> dict[str, Any]:
    """Move a campaign's workflows out of the launchpad into a file; keep the results.

    The file is gzipped JSON lines: workflows, fireworks and launches as they were. It
    is written and read back before anything is deleted; structures, simulations,
    models and predictions stay in their stores. A campaign that was submitted again
    can be archived again; its record keeps what was archived earlier.

    Raises
    ------
    InputError
        If something of the campaign still runs or waits, if nothing of it is in the
        launchpad, or if the file exists.
    """
    from bson import json_util

    earlier = CampaignStore(launchpad.db).get(campaign).get("archive")
    open_ones = fireworks_in(launchpad, campaign, _OPEN)
    if open_ones:
        raise InputError(
            f"campaign {campaign!r} is not at its end: {len(open_ones)} fireworks are "
            "ready, waiting or running",
            evidence={"fireworks": open_ones[:20]},
            advice=f"wait for them, or run 'nanoos campaign cancel {campaign}'",
        )
    if not fireworks_in(launchpad, campaign, _ENDED):
        where = f"it is in {earlier['file']}" if earlier else "it was not submitted"
        raise InputError(
            f"campaign {campaign!r} has nothing in the launchpad: {where}",
            advice=f"nanoos campaign status {campaign}",
        )
    if file.exists():
        raise InputError(f"{file} exists", advice="name another file with -o")
    status = campaign_status(launchpad.db, campaign).to_dict()
    with store_errors("read a campaign's workflows"):
        fireworks = list(launchpad.fireworks.find({CAMPAIGN: campaign}))
        ids = [document["fw_id"] for document in fireworks]
        workflows = list(launchpad.workflows.find({"nodes": {"$in": ids}}))
        foreign = {n for w in workflows for n in w["nodes"]} - set(ids)
        launches = list(launchpad.launches.find({"fw_id": {"$in": ids}}))
        actions = _large_actions(launchpad, launches)
    if foreign:
        raise InputError(
            f"workflows of campaign {campaign!r} hold fireworks of others",
            evidence={"fireworks": sorted(foreign)[:20]},
        )
    parts = {
        "workflows": workflows,
        "fireworks": fireworks,
        "launches": launches,
        "actions": actions,
    }
    lines = [
        json.dumps({"collection": name, "document": json.loads(json_util.dumps(row))})
        for name, rows in parts.items()
        for row in rows
    ]
    data = gzip.compress(("\n".join(lines) + "\n").encode())
    write_atomic(file, data)
    if sha256_bytes(file.read_bytes()) != sha256_bytes(data):
        raise InputError(f"{file} does not hold what was written", advice="try again")
    record = {
        "file": str(file.resolve()),
        "sha256": sha256_bytes(data),
        "time": utc_now(),
        **{name: len(rows) for name, rows in parts.items()},
    }
    before = [*earlier.pop("earlier", ()), earlier] if earlier else []
    with store_errors("archive a campaign"):
        launchpad.db["campaigns"].update_one(
            {"_id": campaign},
            {"$set": {"archive": {**record, "status": status, "earlier": before}}},
        )
        launchpad.workflows.delete_many({"nodes": {"$in": ids}})
        launchpad.fireworks.delete_many({"fw_id": {"$in": ids}})
        launchpad.launches.delete_many({"fw_id": {"$in": ids}})
        launchpad.db["launch_places"].delete_many({"fw_id": {"$in": ids}})
        for action in actions:
            launchpad.gridfs_fallback.delete(action["_id"])
    note(launchpad, campaign, "archived")
    return record


def _large_actions(
    launchpad: Any, launches: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return actions that FireWorks keeps outside of the launches, as text."""
    from bson import ObjectId

    found = []
    for launch in launches:
        number = (launch.get("action") or {}).get("gridfs_id")
        if number is not None:
            text = launchpad.gridfs_fallback.get(ObjectId(number)).read().decode()
            found.append({"_id": ObjectId(number), "action": text})
    return found
