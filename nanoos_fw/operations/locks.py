"""Workflows that a process has locked, and nobody should wait for.

FireWorks locks a workflow for the moment in which it changes it, and waits five minutes
for such a lock before it fails. One whose holder was killed stays until ``nanoos
reconcile`` removes it; meanwhile the other workflows go on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nanoos_fw.stores.database import store_errors

# A holder that lives needs less than that.
LOCK_WAIT_S = 10.0
_LOCK_POLL_S = 0.5


@dataclass(frozen=True)
class Lock:
    """A workflow that is locked.

    ``changed`` is when it was changed last: a lock has neither a date nor a name, but
    who releases one has written the workflow before.
    """

    nodes: tuple[int, ...]
    changed: Any


def locks(launchpad: Any) -> dict[Any, Lock]:
    """Return the workflows that are locked at the moment. One query."""
    query = {"locked": {"$exists": True}}
    with store_errors("look for locked workflows"):
        return {
            document["_id"]: Lock(tuple(document["nodes"]), document.get("updated_on"))
            for document in launchpad.workflows.find(
                query, {"nodes": 1, "updated_on": 1}
            )
        }


def unlocked(launchpad: Any, fw_ids: Iterable[int], left: list[int]) -> Iterator[int]:
    """Yield fireworks whose workflow is free, the others as soon as theirs is.

    Parameters
    ----------
    left
        Filled with those whose workflow one process has locked for ``LOCK_WAIT_S``.
    """
    todo = list(fw_ids)
    first = found = locks(launchpad) if todo else {}
    until = time.monotonic() + LOCK_WAIT_S
    while todo:
        dead = {
            fw_id
            for key, lock in found.items()
            if first.get(key) == lock
            for fw_id in lock.nodes
        }
        free = [fw_id for fw_id in todo if fw_id not in dead]
        yield from free
        todo = [fw_id for fw_id in todo if fw_id in dead]
        if todo and not free:
            if time.monotonic() > until:
                break
            time.sleep(_LOCK_POLL_S)
        found = locks(launchpad) if todo else {}
    left += todo
