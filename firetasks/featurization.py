"""Featurization of stored structures: one code path for queue, program and Python."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from nanoos_fw.errors import InputError, NanoOSError
from nanoos_fw.firetasks.base import NanoTask, Parameters, TaskContext
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.ml.featurizing import FeatureGuard, Featurized, FeaturizingChild
from nanoos_fw.stores.database import Patience
from nanoos_fw.stores.features import (
    COMPUTED,
    HIT,
    QUARANTINED,
    Features,
    FeatureStatus,
    FeatureStore,
)
from nanoos_fw.stores.structures import StructureStore

# A micro-batch, which is what a kill can lose of each worker, is two jobs: one is
# written while the next is computed. A job is as many structures or sites, whichever
# comes first, as take about a twentieth of a second.
_JOB_STRUCTURES = 50
_JOB_SITES = 2500
_MAX_LISTED = 50


class FeatureParameters(Parameters):
    """What decides the features of a structure, besides the code version."""

    cutoff_radius: float = Field(
        default=8.0, gt=0, allow_inf_nan=False, description="Å"
    )
    max_neighbors: int | None = Field(default=12, ge=1, le=65535)
    vectors: bool = Field(
        default=False, description="keep the vectors of edges, for networks on angles"
    )

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Features are found by these values: what is at its default is left out, as
        # it was before there was a choice.
        values: dict[str, Any] = handler(self)
        if not self.vectors:
            values.pop("vectors", None)
        return values


class FeaturizeParameters(Parameters):
    """Parameters of FeaturizeStructuresTask."""

    structures: tuple[str, ...] = Field(min_length=1)
    features: FeatureParameters = FeatureParameters()
    force_recompute: bool = False
    retry_quarantined: bool = False
    guard: FeatureGuard = FeatureGuard()
    workers: int = Field(default=1, ge=1)


@dataclass
class FeaturizeReport:
    """What became of every structure.

    Parameters
    ----------
    hit
        Structures whose features were there.
    computed
        Structures that this call featurized.
    quarantined
        Why structures have no features, of this call and of earlier ones.
    elsewhere
        How many of ``hit`` another worker stored while this call ran.
    """

    hit: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    quarantined: dict[str, dict[str, Any]] = field(default_factory=dict)
    elsewhere: int = 0

    @property
    def done(self) -> int:
        """Number of structures that are decided."""
        return len(self.hit) + len(self.computed) + len(self.quarantined)

    def counts(self) -> dict[str, int]:
        """Return the number of structures by state."""
        return {
            HIT: len(self.hit),
            COMPUTED: len(self.computed),
            QUARANTINED: len(self.quarantined),
        }

    def status(self) -> dict[str, FeatureStatus]:
        """Return the state of each structure."""
        return {
            **{key: FeatureStatus(HIT) for key in self.hit},
            **{key: FeatureStatus(COMPUTED) for key in self.computed},
            **{k: FeatureStatus(QUARANTINED, e) for k, e in self.quarantined.items()},
        }


def compute_features(
    database: Any,
    keys: Sequence[str],
    parameters: FeatureParameters | None = None,
    *,
    force_recompute: bool = False,
    retry_quarantined: bool = False,
    workers: int = 1,
    guard: FeatureGuard | None = None,
    patience: Patience | None = None,
    on_progress: Callable[[FeaturizeReport], None] = lambda _: None,
) -> FeaturizeReport:
    """Compute the features that the store does not have.

    Works in jobs, each written when it is done while the next is computed: a process
    that is killed loses a micro-batch of two per worker. Any number of processes may
    do the same structures at once; each asks again before a job and takes the jobs in
    an order of its own, and the unique index of the store decides what they do twice.

    Parameters
    ----------
    database
        Of ``open_database``.
    keys
        Structures; repeated ones count once.
    parameters
        None for the defaults.
    force_recompute
        Compute all of them, whatever is there.
    retry_quarantined
        Compute again those that were quarantined, say with a wider guard.
    workers
        Child processes.
    guard
        Time and memory of one structure; None for the defaults. A structure that
        exceeds them, or cannot be featurized, is quarantined with the reason.
    patience
        How long to wait for a database server that is away; None for ten minutes.
    on_progress
        Called after each job.

    Raises
    ------
    InputError
        If a structure is not in the store, or there are no workers.
    LaunchError
        If no child process starts, or they are killed from outside. Nothing is stored
        of the structures that they were at.
    StoreError
        If the database server stays away.
    """
    if workers < 1:
        raise InputError(f"workers must be at least 1, not {workers}")
    parameters = parameters or FeatureParameters()
    keys = list(dict.fromkeys(keys))
    described = parameters.model_dump(mode="json")
    structures, features = StructureStore(database), FeatureStore(database)
    report = FeaturizeReport()
    # A server that is restarted must not cost a chunk. All operations may be repeated.
    patiently = (patience or Patience()).run
    sizes = patiently(lambda: structures.sizes(keys))

    def undecided(wanted: Sequence[str]) -> list[str]:
        """Return what is left to compute, and note what is there."""
        if force_recompute:
            return list(wanted)
        state = patiently(lambda: features.state(wanted, described, FEATURE_VERSION))
        report.hit += [key for key in wanted if state.get(key) == "ok"]
        left = [key for key in wanted if key not in state]
        bad = [key for key in wanted if state.get(key) == QUARANTINED]
        if retry_quarantined:
            return left + bad
        if bad:
            report.quarantined.update(
                patiently(lambda: features.quarantined(bad, described, FEATURE_VERSION))
            )
        return left

    planned = list(_planned(undecided(keys), sizes))
    random.SystemRandom().shuffle(planned)
    on_progress(report)
    there = len(report.hit)

    def jobs() -> Iterator[dict[str, dict[str, Any]]]:
        for portion in planned:
            left = undecided(portion)
            if left:
                yield patiently(partial(structures.encoded, left))
            else:
                on_progress(report)

    for results in _in_children(
        jobs(), described, guard or FeatureGuard(), min(workers, len(planned))
    ):
        good = [Features(r.key, r.graph, r.scalars) for r in results if not r.error]
        bad: dict[str, NanoOSError] = {r.key: r.error for r in results if r.error}
        patiently(
            partial(
                features.put,
                good,
                bad,
                described,
                FEATURE_VERSION,
                replace=force_recompute,
            )
        )
        report.computed += [entry.structure for entry in good]
        report.quarantined.update({k: e.to_dict() for k, e in bad.items()})
        on_progress(report)
    report.elsewhere = len(report.hit) - there
    return report


def _planned(keys: Sequence[str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the structures of each job."""
    job: list[str] = []
    sites = 0
    for key in keys:
        if job and (len(job) == _JOB_STRUCTURES or sites + sizes[key] > _JOB_SITES):
            yield job
            job, sites = [], 0
        job.append(key)
        sites += sizes[key]
    if job:
        yield job


def _in_children(
    jobs: Iterator[dict[str, dict[str, Any]]],
    parameters: Mapping[str, Any],
    guard: FeatureGuard,
    workers: int,
) -> Iterator[list[Featurized]]:
    """Featurize each job in one of some children, and yield results as they end.

    Jobs are drawn in the calling thread alone: the embedded database is made for one.
    """
    if workers < 1:
        return
    idle: SimpleQueue[FeaturizingChild] = SimpleQueue()
    children = [FeaturizingChild(parameters, guard) for _ in range(workers)]
    for child in children:
        idle.put(child)

    def run(job: dict[str, dict[str, Any]]) -> list[Featurized]:
        child = idle.get()
        try:
            return list(child.featurize(job))
        finally:
            idle.put(child)

    running: set[Future[list[Featurized]]] = set()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="featurize")
    try:
        # One job more than children: the next is read while they compute.
        running.update(pool.submit(run, job) for job in islice(jobs, workers + 1))
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
            running.update(pool.submit(run, job) for job in islice(jobs, len(done)))
    finally:
        for child in children:
            child.close()
        pool.shutdown(wait=True, cancel_futures=True)


class FeaturizeStructuresTask(NanoTask):
    """Compute the features that the store does not have.

    A structure that cannot be featurized is quarantined with the reason and does not
    stop the others.
    """

    _fw_name = "{{nanoos_fw.firetasks.FeaturizeStructuresTask}}"
    parameters_model = FeaturizeParameters
    parameters: FeaturizeParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Featurize what is missing, and store it as it comes."""
        parameters = self.parameters
        report = compute_features(
            place.database,
            parameters.structures,
            parameters.features,
            force_recompute=parameters.force_recompute,
            retry_quarantined=parameters.retry_quarantined,
            workers=parameters.workers,
            guard=parameters.guard,
            on_progress=lambda now: place.check_time(done=now.done),
        )
        reasons = sorted(report.quarantined.items())[:_MAX_LISTED]
        return {
            "structures": report.done,
            **report.counts(),
            "reasons": {key: error["message"] for key, error in reasons},
        }
