"""What all firetasks share: checked parameters, the stores, a bounded answer."""

from __future__ import annotations

import contextlib
import json
import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fireworks.core.firework import FiretaskBase, FWAction
from pydantic import BaseModel, ConfigDict, ValidationError

from nanoos_fw.errors import (
    InputError,
    OutOfMemoryError,
    OutOfTimeError,
    validation_problems,
)
from nanoos_fw.faults import disk_full, is_environment
from nanoos_fw.firetasks.handover import (
    hand_over,
    ignore_stop_signals,
    launch_no_more,
    refuse_if_cancelled,
    stopping_on_signals,
)
from nanoos_fw.ml.screening_worker import end_kept_workers
from nanoos_fw.parallel import Resources
from nanoos_fw.settings import Settings, load_settings
from nanoos_fw.slurm import allocation_deadline
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import Patience, load_launchpad, open_database
from nanoos_fw.stores.embedded import embedded_file
from nanoos_fw.stores.features import FeatureStore
from nanoos_fw.stores.launches import SPEC_KEY
from nanoos_fw.stores.models import ModelRegistry
from nanoos_fw.stores.outages import outlast_outages
from nanoos_fw.stores.places import noted_place
from nanoos_fw.stores.simulations import SimulationStore
from nanoos_fw.stores.structures import StructureStore

# FireWorks keeps stored_data several times over in a launch document (state history,
# checkpoint, action), so it is for ids, counts and metrics only.
_MAX_STORED_BYTES = 64 * 1024
# A task is not begun with less.
_MIN_USEFUL_S = 3.0


class Parameters(BaseModel):
    """Base of the parameters of a firetask: unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True)
class TaskContext:
    """All that a firetask may use.

    Parameters
    ----------
    database
        The launchpad's database; the stores are views of it.
    work_root
        Folder of all work directories of the campaign. A work directory is named by
        the content key of the work, so that any later launch finds its checkpoints.
    deadline
        Unix time by which children are to stop, or None outside of SLURM.
    """

    database: Any
    structures: StructureStore
    features: FeatureStore
    simulations: SimulationStore
    models: ModelRegistry
    campaigns: CampaignStore
    settings: Settings
    work_root: Path
    deadline: float | None

    @classmethod
    def on(
        cls,
        database: Any,
        settings: Settings,
        work_root: Path,
        deadline: float | None = None,
    ) -> TaskContext:
        """Return the place with all stores of a database."""
        return cls(
            database=database,
            structures=StructureStore(database),
            features=FeatureStore(database),
            simulations=SimulationStore(database),
            models=ModelRegistry(database),
            campaigns=CampaignStore(database),
            settings=settings,
            work_root=work_root,
            deadline=deadline,
        )

    def check_time(self, needed_s: float = 0.0, **progress: Any) -> None:
        """Stop in time; for tasks without a child that does it.

        Parameters
        ----------
        needed_s
            Time that the next piece of work takes.
        progress
            How far the work is; the next allocation must get further.

        Raises
        ------
        OutOfTimeError
            If less time is left.
        """
        if self.deadline is not None and time.time() + needed_s > self.deadline:
            raise OutOfTimeError(
                "stopped at the end of the allocation",
                evidence=progress,
                advice="what was finished is kept; the rest continues in another job",
            )

    def work_dir(self, kind: str, key: str) -> Path:
        """Return the work directory of a piece of work."""
        return self.work_root / kind / key[:2] / key

    @property
    def resources(self) -> Resources:
        """Ranks and threads of a child of this firetask."""
        return self.resources_for(self.settings.ranks)

    def resources_for(self, useful_ranks: int) -> Resources:
        """Return the resources of a child that can use so many ranks."""
        return Resources(
            ranks=max(1, min(self.settings.ranks, useful_ranks)),
            threads=self.settings.threads,
            launcher=self.settings.mpi_launcher,
        )


class NanoTask(FiretaskBase):
    """A firetask: checked parameters in, library call, small answer out.

    A subclass writes its stored name out in ``_fw_name`` (a contract with databases
    that hold it), names the model of its parameters, and implements ``run``. If it
    screens, ``keeps_workers`` lets the processes of the firework before it live on.
    """

    parameters_model: ClassVar[type[Parameters]]
    keeps_workers: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = {k: v for k, v in self.items() if not k.startswith("_")}
        try:
            self.parameters = self.parameters_model.model_validate(given)
        except ValidationError as error:
            raise InputError(
                f"{type(self).__name__}: {validation_problems(error)}",
                advice=f"parameters: {', '.join(self.parameters_model.model_fields)}",
            ) from error

    def run_task(self, fw_spec: Mapping[str, Any]) -> FWAction:
        """Run the task and store its small answer with the launch.

        When time is up the firework hands over to its continuation, see ``handover``.
        Errors of the system get the class by which a rerun decides, see ``faults``.
        """
        if not self.keeps_workers:  # their memory is for this firework now
            end_kept_workers()
        try:
            with stopping_on_signals():
                place = self._context(fw_spec)
                place.check_time(_MIN_USEFUL_S)
                fw_id = getattr(self, "fw_id", None)
                with (
                    noted_place(
                        place.database,
                        fw_id,
                        cores=place.settings.ranks * place.settings.threads,
                    )
                    if fw_id is not None
                    else contextlib.nullcontext()
                ):
                    stored = self.run(place)
                    additions = self.additions(place)
        except OutOfTimeError as error:
            ignore_stop_signals()
            launch_no_more(getattr(self, "launchpad", None))
            refuse_if_cancelled(error)
            return hand_over(fw_spec, error, getattr(self, "fw_id", None))
        except MemoryError as error:
            raise OutOfMemoryError(
                f"{type(self).__name__} ran out of memory: {error}",
                advice="rerun it with more memory: nanoos rerun --failed",
            ) from error
        except Exception as error:
            root = fw_spec.get(SPEC_KEY, {}).get("work_root")
            full = disk_full(error, [*filter(None, [root]), Path.cwd()])
            if full is not None and full is not error:
                raise full from error
            if full is None and is_environment(error):
                refuse_if_cancelled(error)  # its ranks may be killed before it is
            raise
        size = len(json.dumps(stored))
        if size > _MAX_STORED_BYTES:
            raise InputError(
                f"{type(self).__name__} returned {size} bytes of stored_data",
                evidence={"limit": _MAX_STORED_BYTES, "keys": sorted(stored)},
                advice="put arrays into a store and return their key",
            )
        return FWAction(stored_data=stored, additions=additions)

    def additions(self, place: TaskContext) -> list[Any]:
        """Return workflows that follow this firework; asked for after ``run``.

        A firework that is run again asks again: what has been added before must not
        be returned a second time.
        """
        del place
        return []

    @abstractmethod
    def run(self, place: TaskContext) -> dict[str, Any]:
        """Do the work and return ids, counts and metrics."""

    def _context(self, fw_spec: Mapping[str, Any]) -> TaskContext:
        launchpad = getattr(self, "launchpad", None)
        settings = load_settings()
        patience = Patience(settings.database_wait_s)
        if launchpad is None:
            if embedded_file():
                raise InputError(
                    "the embedded database belongs to the launchpad of this process",
                    advice="set _add_launchpad_and_fw_id: true in the spec",
                )
            launchpad = patience.run(lambda: load_launchpad(settings.launchpad))
        outlast_outages(launchpad, settings.database_wait_s)
        # Indexes are made by commands, which the connection does not repeat.
        database = patience.run(lambda: open_database(launchpad))
        root = fw_spec.get(SPEC_KEY, {}).get("work_root") or settings.work_dir
        return TaskContext.on(
            database,
            settings=settings,
            work_root=Path(root).resolve(),
            deadline=allocation_deadline(),
        )
