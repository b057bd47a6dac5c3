"""Submission: workflows that are not there yet, in bulk, checked against the cluster.

A workflow is known by the ``key`` in its metadata, so that submitting it again is
harmless. The key is also the ``_id`` of its document: of two processes that submit the
same workflow at the same time the database lets one insert it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from nanoos_fw.errors import LaunchError, MissingDependencyError
from nanoos_fw.operations.estimates import NEEDS, set_needs
from nanoos_fw.stores.database import insert_new, store_errors
from nanoos_fw.stores.launches import SPEC_KEY

if TYPE_CHECKING:
    from fireworks import Workflow

    from nanoos_fw.slurm import Cluster

logger = logging.getLogger(__name__)

_BATCH = 500
# Work that takes so long without a stop may not fit a partition: it is looked at.
_LONG_S = 3600.0


def submit_many(
    launchpad: Any,
    workflows: Iterable[Workflow],
    *,
    on_batch: Callable[[int, int], None] = lambda _added, _total: None,
) -> tuple[int, int]:
    """Add workflows that are not there; return the number added, and of those mended.

    A workflow is known by the ``key`` in its metadata. Of each batch the keys are asked
    for at once, the numbers of its fireworks are reserved at once, and fireworks that
    can be run are inserted last. A submission that was killed goes on where it was: a
    workflow that lacks fireworks gets those, and keeps what has run meanwhile. Any
    number of processes may submit the same workflows at the same time.

    Parameters
    ----------
    workflows
        May be a generator: only a batch is held in memory.
    on_batch
        Called with the numbers added and looked at so far.

    Raises
    ------
    InputError
        If a firework asks for resources that SLURM cannot give.
    """
    limits = ClusterLimits()
    added = mended = total = 0
    remaining = iter(workflows)
    while batch := list(islice(remaining, _BATCH)):
        keyed = {workflow.metadata["key"]: workflow for workflow in batch}
        with store_errors("submit workflows"):
            there = _nodes(launchpad, list(keyed))
        fresh = [w for key, w in keyed.items() if key not in there]
        set_needs(launchpad.db, fresh)
        check_resources(fresh, limits)
        with store_errors("submit workflows"):
            taken = _insert(launchpad, fresh)
            there |= _nodes(launchpad, taken)
            mended += _mend_all(launchpad, keyed, there)
        added += len(fresh) - len(taken)
        total += len(batch)
        on_batch(added, total)
    return added, mended


def submit(launchpad: Any, workflow: Workflow) -> bool:
    """Add one workflow as `submit_many` does; return whether it was not there whole."""
    return sum(submit_many(launchpad, [workflow])) > 0


def _nodes(launchpad: Any, keys: Sequence[str]) -> dict[str, list[int]]:
    """Return the fireworks' numbers of those workflows that are there, by key."""
    if not keys:
        return {}
    return {
        document["metadata"]["key"]: sorted(document["nodes"])
        for document in launchpad.workflows.find(
            {"metadata.key": {"$in": list(keys)}}, {"metadata.key": 1, "nodes": 1}
        )
    }


def _insert(launchpad: Any, workflows: Sequence[Workflow]) -> list[str]:
    """Insert workflows; return the keys of those that another process has inserted."""
    if not workflows:
        return []
    first = launchpad.get_new_fw_id(sum(len(w.fws) for w in workflows))
    documents = []
    for workflow in workflows:
        _number(workflow, range(first, first + len(workflow.fws)))
        first += len(workflow.fws)
        documents.append({"_id": workflow.metadata["key"], **workflow.to_db_dict()})
    taken = insert_new(launchpad.workflows, documents)
    _insert_fireworks(
        launchpad,
        [fw for n, wf in enumerate(workflows) if n not in taken for fw in wf.fws],
    )
    return [documents[index]["_id"] for index in sorted(taken)]


def _number(workflow: Workflow, numbers: Sequence[int]) -> None:
    """Give a workflow its numbers, always the same firework the same of them."""
    # Numbers of new fireworks count down from -1 in the order of their making; those
    # of a workflow that was numbered before count up.
    old = sorted(workflow.id_fw, key=abs)
    old_new = dict(zip(old, numbers, strict=True))
    for firework in workflow.fws:
        firework.fw_id = old_new[firework.fw_id]
    workflow._reassign_ids(old_new)
    for fw_id in workflow.root_fw_ids:
        workflow.id_fw[fw_id].state = "READY"
        workflow.fw_states[fw_id] = "READY"


def _insert_fireworks(launchpad: Any, fireworks: Iterable[Any]) -> int:
    """Insert those last that can be run: a workflow that has begun is complete.

    Returns how many were not there.
    """
    by_readiness: dict[bool, list[Any]] = {False: [], True: []}
    for firework in fireworks:
        by_readiness[firework.state == "READY"].append(firework.to_db_dict())
    inserted = 0
    for documents in by_readiness.values():
        inserted += len(documents) - len(insert_new(launchpad.fireworks, documents))
    return inserted


def _mend_all(
    launchpad: Any, keyed: Mapping[str, Workflow], there: Mapping[str, list[int]]
) -> int:
    """Complete the workflows that a killed submission has left; return how many."""
    nodes = [node for ids in there.values() for node in ids]
    known = {
        document["fw_id"]
        for document in launchpad.fireworks.find(
            {"fw_id": {"$in": nodes}}, {"fw_id": 1}
        )
    }
    return sum(
        _mend(launchpad, keyed[key], ids, missing)
        for key, ids in there.items()
        if (missing := set(ids) - known)
    )


def _mend(
    launchpad: Any, workflow: Workflow, ids: list[int], missing: set[int]
) -> bool:
    """Insert what a killed submission left out of a workflow; keep the rest.

    If that submission lives, both insert the same, and the database keeps it once.
    """
    if len(ids) != len(workflow.fws):
        # It has grown by continuations since; nothing of it can be missing but by hand.
        logger.warning("workflow %s lacks fireworks %s", workflow.name, sorted(missing))
        return False
    _number(workflow, ids)
    lost = [firework for firework in workflow.fws if firework.fw_id in missing]
    if not _insert_fireworks(launchpad, lost):
        return False
    logger.warning("a half-inserted workflow was completed: %s", workflow.name)
    return True


class ClusterLimits:
    """What the cluster offers, asked once and only if anybody wants to know."""

    def __init__(self) -> None:
        self._asked = False
        self._cluster: Cluster | None = None

    @property
    def cluster(self) -> Cluster | None:
        """The cluster; None without SLURM on this machine, or if it does not answer."""
        from nanoos_fw.slurm import read_cluster

        if not self._asked and shutil.which("sinfo") is not None:
            try:
                self._cluster = read_cluster()
            except (LaunchError, MissingDependencyError) as error:
                logger.warning("resources are not checked against SLURM: %s", error)
        self._asked = True
        return self._cluster


def check_resources(workflows: Iterable[Workflow], limits: ClusterLimits) -> None:
    """Refuse a ``_queueadapter`` with unknown fields, or that no partition can run.

    A refused job would be found by ``qlaunch`` only, perhaps weeks later. What the
    other fields are is decided by the ``my_qadapter.yaml`` of whoever submits the job,
    so limits are held against all partitions that are up, if no ``queue`` is named.
    Without SLURM on this machine the fields alone are checked.

    Raises
    ------
    InputError
        Names the firework, its request and what is wrong with it.
    """
    from nanoos_fw.slurm import check_request, slurm_request

    asked = {}  # thousands of fireworks may ask for the same
    longest, name = _LONG_S, None
    for workflow in workflows:
        for firework in workflow.fws:
            needs = (firework.spec.get(SPEC_KEY) or {}).get(NEEDS) or {}
            if needs.get("minimum_s", 0.0) > longest:
                longest, name = needs["minimum_s"], firework.name
            fields = firework.spec.get("_queueadapter")
            if fields:
                where = f"_queueadapter of firework {firework.name!r}"
                what = repr(sorted(fields.items()))
                if what not in asked:
                    asked[what] = where, slurm_request(fields, where)
    if not (asked or name) or limits.cluster is None:
        return
    most = max((p.max_time_s for p in limits.cluster.partitions if p.up), default=0.0)
    if name and longest > most:
        logger.warning(
            "firework %r needs about %.1f h at once, and no partition gives more than "
            "%.1f h; smaller chunks would do",
            name,
            longest / 3600,
            most / 3600,
        )
    up = ",".join(part.name for part in limits.cluster.partitions if part.up)
    for where, request in asked.values():
        anywhere = {"queue": request.queue or up or None}
        check_request(request.with_overrides(anywhere), limits.cluster, where)
