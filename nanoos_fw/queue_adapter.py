"""The queue adapter that ``qlaunch`` loads from ``my_qadapter.yaml``.

FireWorks' own adapter drops fields that it does not know with a warning nobody sees,
gives ``squeue`` five seconds, and hides what ``sbatch`` said.

``qlaunch rapidfire`` ends with the first job that is refused, and its firework would be
the first again. So a firework whose own ``_queueadapter`` is refused is parked: paused,
with the reason in ``spec.nanoos.parked``, and the loop goes on. What is wrong with
``my_qadapter.yaml`` itself still ends it, before it parks everything.
"""

from __future__ import annotations

import functools
import getpass
import logging
import math
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fireworks.queue.queue_adapter import QueueAdapterBase
from fireworks.utilities.fw_serializers import serialize_fw
from pymongo.errors import PyMongoError

from nanoos_fw.errors import (
    InputError,
    LaunchError,
    MissingDependencyError,
    NanoOSError,
)
from nanoos_fw.settings import load_settings
from nanoos_fw.slurm import (
    Cluster,
    Partition,
    SlurmRequest,
    SubmitLimit,
    batch_script,
    jobs_of,
    memory_mib,
    over_policy,
    read_cluster,
    run_slurm,
    slurm_request,
    submit_limits,
    walltime_seconds,
)
from nanoos_fw.stores.launches import PARKED as PARKED_KEY
from nanoos_fw.stores.launches import SPEC_KEY
from nanoos_fw.stores.outages import let_launchers_wait
from nanoos_fw.stores.reservations import cancel_reservation

logger = logging.getLogger(__name__)

# Of qlaunch's script: what it calls with its launchpad.
_LAUNCHERS = ("launch_rocket_to_queue", "rapidfire")
_SUBMIT_TIMEOUT_S = 120.0
_SUBMIT_WAITS_S = (2.0, 10.0, 30.0, 60.0, 120.0)
# Longer than this no firework stays reserved without a job: reconcile would release it.
_LONGEST_SUBMISSION_S = 600.0
# A user's limit: how often room is looked for, and how long a reservation waits for it.
_ROOM_POLL_S, _LONGEST_WAIT_S, _LIMITS_KEPT_S = 20.0, 300.0, 600.0
# Of my_qadapter.yaml, not of the job: the most jobs of the user in its partition.
MAX_JOBS = "max_jobs"
# What qlaunch gets in place of a job's number, so that its loop goes on.
PARKED, GIVEN_BACK = "parked", "given back"
# Refusals that pass: the controller is busy, or one of the user's limits is reached.
_PASSING = (
    "socket timed out",
    "unable to contact",
    "connection refused",
    "resource temporarily unavailable",
    "temporarily unable",
    "slurm temporarily",
    "did not answer",
    "maxsubmitjob",
    "job violates accounting/qos policy",
)


class SlurmAdapter(QueueAdapterBase):  # type: ignore[misc]
    """Submit to SLURM. The keys are the fields of ``slurm.SlurmRequest``.

    And ``max_jobs``: the most jobs that the user may have in the partition.
    """

    _fw_name = "{{nanoos_fw.queue_adapter.SlurmAdapter}}"
    template_file = "slurm/job.sh of nanoos_fw"
    submit_cmd = "sbatch"
    q_name = "slurm"

    def __init__(self, fields: Mapping[str, Any]) -> None:
        # No default factory: a missing field must not spring into being.
        super().__init__(None, fields)

    @serialize_fw  # type: ignore[untyped-decorator]
    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and the name that FireWorks loads them by."""
        return dict(self)

    @classmethod
    def from_dict(cls, m_dict: Mapping[str, Any]) -> SlurmAdapter:
        """Return an adapter of the fields of a file.

        ``qlaunch`` loads it before its first question to the database, which from now
        on waits for a server that is away.
        """
        qlaunch = sys.modules.get("fireworks.scripts.qlaunch_run")
        if qlaunch is not None:
            let_launchers_wait(qlaunch, _LAUNCHERS, load_settings().database_wait_s)
        return cls(_fields(m_dict))

    @property
    def request(self) -> SlurmRequest:
        """The checked request.

        Raises
        ------
        InputError
            If a field is unknown or has a bad value.
        """
        if self.get(MAX_JOBS) is not None:
            _max_jobs(self[MAX_JOBS])
        given = {k: v for k, v in _request_fields(self).items() if v is not None}
        memory = [name for name in given if name in {"mem", "mem_per_cpu"}]
        # The one of a firework's _queueadapter comes after, and replaces, the file's.
        for name in memory[:-1]:
            del given[name]
        return slurm_request(
            given,
            "queue adapter (my_qadapter.yaml or _queueadapter)",
        )

    def get_script_str(self, launch_dir: str) -> str:
        """Return the batch script; of a refused firework a comment that says why."""
        try:
            request = self._sized(self.request)
            _check_policy(request)
            return batch_script(request, launch_dir)
        except InputError as error:
            if self._reserved() is None:
                raise
            self._refused = error
            lines = str(error).replace("\n", " ")
            return f"#!/bin/bash\n# not submitted: {lines}\nexit 1\n"

    def _sized(self, request: SlurmRequest) -> SlurmRequest:
        """Ask for no more than a reserved firework can make use of.

        What it needs was estimated when it was submitted (``operations.estimates``);
        what somebody has written into its ``_queueadapter`` is left alone.
        """
        fw_id = self._reserved()
        if fw_id is None:
            return request
        try:
            firework = self._launchpad().fireworks.find_one(
                {"fw_id": fw_id}, {f"spec.{SPEC_KEY}.needs": 1, "spec._queueadapter": 1}
            )
        except (NanoOSError, PyMongoError) as error:
            logger.warning(
                "firework %d is asked for as the file says: %s", fw_id, error
            )
            return request
        spec = (firework or {}).get("spec") or {}
        needs = (spec.get(SPEC_KEY) or {}).get("needs") or {}
        own = spec.get("_queueadapter") or {}
        return sized_request(request, needs, own, _known_partition(request.queue))

    def submit_to_queue(self, script_file: str) -> int | str:
        """Submit the script and return the job's number.

        Refusals that pass are waited for, some minutes; then a reserved firework is
        given back, for the loop to try again. A reserved firework that SLURM will
        never take is parked.

        Raises
        ------
        LaunchError
            With the words of ``sbatch``; if the fault is not the firework's own.
        """
        refused: NanoOSError | None = getattr(self, "_refused", None)
        if refused is not None:
            return self._park(refused)
        began = time.monotonic()
        full = self._wait_for_room(began)
        if full is not None:
            return self._give_back(full)
        for wait_s in (*_SUBMIT_WAITS_S, None):
            try:
                answer = run_slurm(
                    ["sbatch", "--parsable", script_file], timeout_s=_SUBMIT_TIMEOUT_S
                )
            except LaunchError as error:
                if not any(p in str(error).lower() for p in _PASSING):
                    return self._park(error)
                late = time.monotonic() - began > _LONGEST_SUBMISSION_S
                if wait_s is None or late:
                    return self._give_back(error)
                logger.warning("%s; again in %g s", error, wait_s)
                time.sleep(wait_s)
            else:
                return int(answer.strip().partition(";")[0])
        raise AssertionError("unreachable")

    def _reserved(self) -> int | None:
        """Return the firework of a reservation, which qlaunch adds to the command."""
        found = re.search(r" --fw_id (\d+)\s*$", str(self.get("rocket_launch") or ""))
        return int(found[1]) if found else None

    def _launchpad(self) -> Any:
        """Return the launchpad that the jobs use: the one qlaunch has reserved in."""
        words = shlex.split(str(self.get("rocket_launch") or ""))
        named = "-l" in words[:-1]
        return _open_launchpad(Path(words[words.index("-l") + 1]) if named else None)

    def _park(self, error: NanoOSError) -> str:
        """Pause the firework with the reason, unless the fault is the file's."""
        fw_id = self._reserved()
        if fw_id is None:
            raise error
        launchpad = self._launchpad()
        firework = launchpad.fireworks.find_one({"fw_id": fw_id})
        asked = ((firework or {}).get("spec") or {}).get("_queueadapter")
        if not asked or _file_is_refused():
            raise error
        parked = {
            "reason": str(error)[:2000],
            "request": asked,
            "time": datetime.now(UTC).isoformat(),
        }
        launchpad.fireworks.update_one(
            {"fw_id": fw_id}, {"$set": {f"spec.{SPEC_KEY}.{PARKED_KEY}": parked}}
        )
        cancel_reservation(launchpad, firework["launches"][-1])
        launchpad.pause_fw(fw_id)
        logger.error(
            "firework %d is parked, SLURM will not take it: %s; correct its "
            "_queueadapter, then 'nanoos campaign resume --parked'",
            fw_id,
            error,
        )
        return PARKED

    def _give_back(self, error: NanoOSError) -> str:
        """Let others have a reserved firework that cannot be submitted now."""
        fw_id = self._reserved()
        if fw_id is None:
            raise error
        launchpad = self._launchpad()
        firework = launchpad.fireworks.find_one({"fw_id": fw_id}, {"launches": 1})
        cancel_reservation(launchpad, firework["launches"][-1])
        logger.error("firework %d is tried again later: %s", fw_id, error)
        return GIVEN_BACK

    def get_njobs_in_queue(self, username: str | None = None) -> int:
        """Return the number of the user's jobs in the partition; tasks count."""
        return jobs_of(username or getpass.getuser(), self.request.queue)

    def _wait_for_room(self, began: float) -> LaunchError | None:
        """Wait while the user has as many jobs as may be; with a reservation, minutes.

        The limit is ``max_jobs`` of the file, for its partition, and what SLURM
        enforces. Without a limit nothing is asked but that, once in ten minutes.
        """
        said = ""
        while full := self._full():
            late = time.monotonic() - began > _LONGEST_WAIT_S
            if late and self._reserved() is not None:
                return LaunchError(
                    f"no room in the queue: {full}",
                    advice="it is tried again later; max_jobs in my_qadapter.yaml, or "
                    "the site, sets the limit",
                )
            if full != said:  # a loop that says nothing looks as if it hung
                logger.warning("waiting for room in the queue: %s", full)
            said = full
            time.sleep(_ROOM_POLL_S)
        return None

    def _full(self) -> str:
        """Return why no job can be submitted now; empty if one can."""
        request, user = self.request, getpass.getuser()
        limits = [*_known_limits(request.queue, request.account, request.qos, user)]
        if self.get(MAX_JOBS) is not None:
            most = _max_jobs(self[MAX_JOBS])
            limits.append(SubmitLimit(most, request.queue, "my_qadapter.yaml"))
        counts: dict[str | None, int] = {}
        for limit in limits:
            if limit.partition not in counts:
                counts[limit.partition] = jobs_of(user, limit.partition)
            if counts[limit.partition] >= limit.jobs:
                return (
                    f"{counts[limit.partition]} of {limit.jobs} jobs ({limit.source})"
                )
        return ""


def _max_jobs(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"max_jobs must be a number from 1, not {value!r}")
    return value


_asked: dict[tuple[str | None, ...], tuple[float, list[SubmitLimit]]] = {}


def _known_limits(
    queue: str | None, account: str | None, qos: str | None, user: str
) -> list[SubmitLimit]:
    """Return what SLURM enforces, asked not too often; nothing if it does not say."""
    key = (queue, account, qos, user)
    if key not in _asked or time.monotonic() - _asked[key][0] > _LIMITS_KEPT_S:
        fields = {"queue": queue, "account": account, "qos": qos}
        try:
            request = slurm_request({k: v for k, v in fields.items() if v})
            limits = submit_limits(request, user)
        except (LaunchError, MissingDependencyError) as error:
            logger.warning("limits of the queue are not known: %s", error)
            limits = []
        _asked[key] = time.monotonic(), limits
    return _asked[key][1]


def _known_partition(queue: str | None) -> Partition | None:
    """Return a partition, asked not too often; None if SLURM does not say which."""
    try:
        return _cluster(int(time.monotonic() // _LIMITS_KEPT_S)).partition(queue)
    except NanoOSError as error:
        logger.warning("limits of the partition are not known: %s", error)
        return None


def _check_policy(request: SlurmRequest) -> None:
    """Refuse what limits of accounting never let run: such a job would wait for ever.

    Raises
    ------
    InputError
        Names the limits and whose they are.
    """
    if shutil.which("sinfo") is None:  # no job can be submitted either
        return
    try:
        problems = over_policy(
            request, _cluster(int(time.monotonic() // _LIMITS_KEPT_S))
        )
    except NanoOSError as error:
        logger.warning("limits of accounting are not known: %s", error)
        return
    if problems:
        raise InputError(
            f"SLURM would never run this job: {'; '.join(problems)}",
            evidence={"request": request.model_dump(mode="json", exclude_none=True)},
            advice="ask for less (_queueadapter, my_qadapter.yaml), or set another qos "
            "or account",
        )


@functools.lru_cache(maxsize=1)
def _cluster(_period: int) -> Cluster:
    return read_cluster()


@functools.lru_cache(maxsize=4)  # one connection for all jobs of a qlaunch
def _open_launchpad(path: Path | None) -> Any:
    from nanoos_fw.stores.database import load_launchpad

    return load_launchpad(path)


def sized_request(
    request: SlurmRequest,
    needs: Mapping[str, Any],
    own: Mapping[str, Any],
    partition: Partition | None = None,
) -> SlurmRequest:
    """Return a request of no more walltime, tasks and nodes than a firework needs.

    And of no less memory, as far as a node of the partition has it.

    Parameters
    ----------
    request
        Of the file and the firework's own fields.
    needs
        See ``operations.estimates``.
    own
        Fields that the firework has itself; they are not changed.
    partition
        Where it goes to; None if it is not known: then memory stays as it is.
    """
    changes: dict[str, Any] = {}
    enough = needs.get("walltime")
    if enough is not None and own.get("walltime") is None:
        least = walltime_seconds(request.time_min) if request.time_min else 0.0
        had = walltime_seconds(request.walltime) if request.walltime else math.inf
        if least <= walltime_seconds(enough) < had:
            changes["walltime"] = enough
    tasks = needs.get("ntasks")
    fixed = {"nodes", "ntasks", "ntasks_per_node", "exclusive", "mem", "nodelist"}
    if tasks is not None and tasks < request.tasks and not fixed & own.keys():
        nodes = request.nodes or 1
        on_each = request.ntasks_per_node or math.ceil(request.tasks / nodes)
        changes["ntasks"] = tasks
        if request.nodes is not None:
            least = partition.min_nodes if partition is not None else 1
            changes["nodes"] = min(nodes, max(least, math.ceil(tasks / on_each)))
        if request.ntasks_per_node is not None:
            changes["ntasks_per_node"] = min(tasks, on_each)
    sized = request.with_overrides(changes) if changes else request
    if partition is not None and not own.keys() & {"mem", "mem_per_cpu", "exclusive"}:
        more = _more_memory(sized, needs, partition)
        return sized.with_overrides({"mem": more}) if more else sized
    return sized


def _more_memory(
    request: SlurmRequest, needs: Mapping[str, Any], partition: Partition
) -> str | None:
    """Return the memory of a node that a firework needs; None if it is asked for."""
    on_node = request.ntasks_per_node or math.ceil(request.tasks / (request.nodes or 1))
    needed = needs.get("memory_mib", 0) + on_node * needs.get("rank_memory_mib", 0)
    asked = math.inf  # what a site gives by itself, nobody here knows
    if request.mem is not None:
        asked = memory_mib(request.mem) or math.inf  # 0 asks for all of the node
    elif request.mem_per_cpu is not None:
        cpus = on_node * (request.cpus_per_task or 1)
        asked = cpus * memory_mib(request.mem_per_cpu)
    given = min(needed, partition.memory_mib)
    return f"{math.ceil(given)}M" if given > asked else None


def _file_is_refused() -> bool:
    """Tell whether SLURM refuses what the file in use asks for, without a firework."""
    from fireworks import fw_config
    from fireworks.utilities.fw_serializers import load_object_from_file

    if fw_config.QUEUEADAPTER_LOC is None:
        return False
    adapter = load_object_from_file(str(fw_config.QUEUEADAPTER_LOC))
    try:
        script = adapter.get_script_str("/")
        run_slurm(["sbatch", "--test-only"], text=script, timeout_s=_SUBMIT_TIMEOUT_S)
    except InputError:
        return True
    except LaunchError as error:
        return not any(p in str(error).lower() for p in _PASSING)
    return False


def _fields(m_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in m_dict.items() if not k.startswith("_fw_") and k != "logdir"
    }


def _request_fields(m_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in _fields(m_dict).items() if k != MAX_JOBS}
