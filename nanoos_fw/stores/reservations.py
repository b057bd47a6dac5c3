"""Fireworks made ready again, without waking what rests below them.

FireWorks' own functions set all descendants WAITING, also those that somebody has
paused or defused: they would run although nobody has resumed them.
"""

from __future__ import annotations

from typing import Any

from nanoos_fw.stores.database import store_errors

_RESTING = frozenset({"PAUSED", "DEFUSED", "ARCHIVED"})


def rerun_in(workflow: Any, fw_id: int) -> set[int]:
    """Archive the launches of a firework and of those below it that do not rest.

    Returns
    -------
    set
        Fireworks that have changed, for ``LaunchPad._update_wf``.
    """
    changed = {fw_id}
    firework = workflow.id_fw[fw_id]
    firework._rerun()
    firework.spec.pop("_recovery", None)
    changed |= workflow.refresh(fw_id, changed)
    for child in workflow.links[fw_id]:
        if workflow.id_fw[child].state not in {"WAITING", *_RESTING}:
            changed |= rerun_in(workflow, child)
    return changed


def cancel_reservation(launchpad: Any, launch_id: int) -> None:
    """Give back a reservation: its launch is archived, its firework READY.

    One whose firework has begun meanwhile goes on.
    """
    from fireworks.core.launchpad import WFLock

    reserved = {"launches": launch_id, "state": "RESERVED"}
    with store_errors("give a reservation back"):
        launch = launchpad.get_launch_by_id(launch_id)
        launch.state = "READY"
        launchpad.launches.find_one_and_replace(
            {"launch_id": launch_id, "state": "RESERVED"}, launch.to_db_dict()
        )
        for found in launchpad.fireworks.find(reserved, {"fw_id": 1}):
            fw_id = found["fw_id"]
            with WFLock(launchpad, fw_id):
                still = {"fw_id": fw_id, **reserved}
                if launchpad.fireworks.find_one(still, {"_id": 1}) is not None:
                    workflow = launchpad.get_wf_by_fw_id_lzyfw(fw_id)
                    launchpad._update_wf(workflow, rerun_in(workflow, fw_id))
