"""The firetask that works on a hyper-parameter search."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from nanoos_fw.errors import (
    CorruptArtifactError,
    InputError,
    LaunchError,
    NanoOSError,
    OutOfTimeError,
)
from nanoos_fw.faults import is_environment
from nanoos_fw.firetasks.base import NanoTask, Parameters, TaskContext
from nanoos_fw.ml.datasets import open_dataset
from nanoos_fw.ml.search import SearchConfig, Trial, best_trial, check_dataset
from nanoos_fw.ml.training import TrainingResult, train_cgcnn_model
from nanoos_fw.ml.training_config import MODEL_TYPES
from nanoos_fw.parallel import locked
from nanoos_fw.provenance import content_key, read_json, sha256_file, write_json
from nanoos_fw.stores.database import put_artifact
from nanoos_fw.stores.searches import (
    DEFAULT_LEASE_S,
    MAX_ATTEMPTS,
    RUNNING,
    Job,
    SearchStore,
)

logger = logging.getLogger(__name__)

_SIGNS_PER_LEASE = 3
_RESULT = "trial.json"
_MARGIN_S = 0.05


class SearchParameters(Parameters):
    """Parameters of SearchTask.

    Parameters
    ----------
    search
        Name of the search.
    max_jobs
        Stop after so many pieces of work; None goes on until there is none.
    lease_s
        Seconds without a sign of life after which other workers take the work.
    """

    search: str
    max_jobs: int | None = Field(default=None, ge=1)
    lease_s: float = Field(default=DEFAULT_LEASE_S, gt=0.0)


class SearchTask(NanoTask):
    """Work on a search until nothing is left; any number of these work on one."""

    _fw_name = "{{nanoos_fw.firetasks.SearchTask}}"
    parameters_model = SearchParameters
    parameters: SearchParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Claim, train, record; register the winner when all is done."""
        parameters = self.parameters
        store = SearchStore(place.database)
        config = store.config(parameters.search)
        worker = _Worker(place, store, config, parameters.lease_s)
        dataset_hash = store.dataset_hash(config.name)
        if check_dataset(config) != dataset_hash:
            raise InputError(
                f"{config.dataset_dir} holds another dataset than search "
                f"{config.name!r} began with",
                evidence={"dataset_hash_expected": dataset_hash},
                advice="bring it back, or create a search of another name",
            )
        finished: list[int] = []
        exhausted = False
        while parameters.max_jobs is None or len(finished) < parameters.max_jobs:
            # Asked before the claim: what ends after it may have left work to do.
            alone = store.others_at_work(config.name) is None
            job = store.claim(
                config.name, lease_s=parameters.lease_s, nodes=allocated_nodes()
            )
            if job is not None:
                worker.work(job)
                finished.append(job.number)
            elif alone or not worker.wait_for_others():
                exhausted = True
                break
        if exhausted and store.others_at_work(config.name) is None:
            register_winner(place, store, config)
        status = store.status(config.name)
        return {
            "search": config.name,
            "jobs": finished[-50:],
            "n_jobs": len(finished),
            "best": status["best"],
            "model": status["model"],
        }


def allocated_nodes() -> int:
    """Return the nodes of this SLURM job; 1 elsewhere."""
    text = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    return max(1, int(text)) if text.isdigit() else 1


def trial_dir(place: TaskContext, config: SearchConfig, number: int) -> Path:
    """Return the work directory of a trial."""
    key = content_key(
        "trial", {"search": config.model_dump(mode="json"), "number": number}
    )
    return place.work_dir("search", key)


def register_winner(
    place: TaskContext, store: SearchStore, config: SearchConfig
) -> str | None:
    """Register the model of the best trial, once, and close the search.

    A search that was stopped has its best so far registered; resumed, it may find
    another one, which becomes the next version.

    Returns
    -------
    str or None
        Its reference; None if no trial gave a model.

    Raises
    ------
    CorruptArtifactError
        If the files of the trial are not those that were judged.
    """
    best = best_trial(store.trials(config.name))
    if best is None:
        store.finish_search(config.name, None)
        return None
    known = store.status(config.name)["model"]
    if known is not None:
        told = place.models.get(known).dataset_info
        if (told.get("trial"), told.get("epochs")) == (best.number, best.epochs):
            store.finish_search(config.name, known)
            return str(known)
    result = _judged_result(trial_dir(place, config, best.number), best)
    dataset = open_dataset(Path(config.dataset_dir), verify=False)
    record = place.models.register(
        name=config.model_name or config.name,
        target=result.target,
        unit=result.unit,
        model_type=MODEL_TYPES[result.config.model_type],
        weights=Path(result.checkpoint),
        training_key=content_key(
            "search",
            {
                "search": config.model_dump(mode="json"),
                "dataset": result.dataset_hash,
                "trial": best.number,
                "epochs": best.epochs,
            },
        ),
        training_config=result.config.model_dump(mode="json"),
        metrics={**result.metrics, "baselines": result.baselines},
        dataset_info={
            "dataset_hash": result.dataset_hash,
            "counts": {p: dataset.parts.count(p) for p in sorted(set(dataset.parts))},
            "config": dataset.config.model_dump(mode="json"),
            "search": config.name,
            "trial": best.number,
            "epochs": best.epochs,
        },
        environment={**result.environment, "seed": result.config.seed},
        details=put_artifact(place.database, result.model_dump_json().encode()),
    )
    store.finish_search(config.name, record.reference)
    return record.reference


def _judged_result(work_dir: Path, trial: Trial) -> TrainingResult:
    """Return what the training of a trial gave when it was judged."""
    result = TrainingResult(**read_json(work_dir / _RESULT))
    weights = Path(result.checkpoint)
    if (
        result.metrics["val"]["mae"] != trial.value
        or sha256_file(weights) != result.checkpoint_sha256
    ):
        raise CorruptArtifactError(
            f"{work_dir} does not hold what trial {trial.number} was judged by",
            evidence={"val_mae_expected": trial.value, "checkpoint": str(weights)},
            advice="bring the folder back, or repeat the search under another name",
        )
    return result


class _Worker:
    """What one process does for a search."""

    def __init__(
        self,
        place: TaskContext,
        store: SearchStore,
        config: SearchConfig,
        lease_s: float,
    ) -> None:
        self.place, self.store, self.config = place, store, config
        self.lease_s = lease_s

    def work(self, job: Job) -> None:
        """Train a trial up to the epochs of a job, and record what came of it.

        Raises
        ------
        OutOfTimeError
            If the allocation ends first; the work is given back.
        """
        try:
            with self._signs_of_life(job):
                result = self._train(job)
        except OutOfTimeError:
            self.store.release(job)
            raise
        except InputError as error:  # it diverged: another try would, too
            self.store.fail(job, error.to_dict())
            return
        except NanoOSError as error:
            # Killed ranks or a full disk say nothing of the trial.
            environment = is_environment(error)
            if job.attempt >= MAX_ATTEMPTS and not environment:
                self.store.fail(job, error.to_dict())
                return
            # Ranks of a worker that is cut off may live for a while.
            self.store.release(job, after_s=self.lease_s)
            if isinstance(error, LaunchError) and job.attempt < MAX_ATTEMPTS:
                logger.warning("trial %d: %s", job.number, error)
                return
            raise
        except BaseException:  # killed by a signal: nobody should wait for the lease
            self.store.release(job)
            raise
        error_mae = result.metrics["val"]["mae"]
        assert error_mae is not None  # check_dataset has seen the validation part
        self.store.finish(
            job,
            {job.epochs: float(error_mae)},
            metrics=result.metrics,
            checkpoint_sha256=result.checkpoint_sha256,
        )

    def _train(self, job: Job) -> TrainingResult:
        try:
            training = self.config.training_of(job.parameters)
        except ValidationError as error:  # each value is good, together they are not
            raise InputError(
                f"the values of trial {job.number} do not go together: {error}",
                advice="narrow the space of the search",
            ) from error
        work_dir = trial_dir(self.place, self.config, job.number)
        with locked(work_dir):
            result = train_cgcnn_model(
                training.target,
                training,
                dataset_dir=self.config.dataset_dir,
                work_dir=work_dir,
                resources=self.place.resources,
                deadline=self.place.deadline,
                pause_after=job.epochs if job.epochs < training.epochs else None,
            )
            write_json(work_dir / _RESULT, result.model_dump(mode="json"))
        return result

    def wait_for_others(self) -> bool:
        """Wait until work of others ends or its lease does; True if either came.

        A living worker renews its lease, and takes the next work itself: after one
        lease without any change there is nothing to wait for.
        """
        end = time.time() + self.lease_s + _MARGIN_S
        while self.store.state(self.config.name) == RUNNING:
            left = self.store.others_at_work(self.config.name)
            if left is None or left < 0:
                return True
            deadline = self.place.deadline or end
            if time.time() > min(end, deadline):
                return False
            time.sleep(min(left + _MARGIN_S, self.lease_s / 10, 5.0))
        return False

    @contextmanager
    def _signs_of_life(self, job: Job) -> Iterator[None]:
        """Renew the lease from a thread, while the training runs in a child."""
        collection = self.place.database["trials"]
        if type(collection).__module__.startswith("mongomock"):
            yield  # one process: there is nobody to give signs to
            return
        over = threading.Event()

        def renew() -> None:
            while not over.wait(self.lease_s / _SIGNS_PER_LEASE):
                try:
                    self.store.renew(job, self.lease_s)
                except NanoOSError as error:  # the next sign may get through
                    logger.warning("%s", error)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
