"""What fireworks need, from the size of their work: what the queue is asked for.

A firework of a known kind gets ``spec.nanoos.needs`` when it is submitted:

``expected_s``
    How long it takes from nothing, on the safe side.
``minimum_s``
    With less time left no packed worker begins it. Work that can be continued needs a
    start-up and a checkpoint; what cannot, or is known to be short, its whole time.
``walltime``, ``ntasks``
    What a job of it can make use of at most: ``qlaunch -r`` asks for the lesser of
    these and what ``my_qadapter.yaml`` says, and for no more nodes than the tasks fill.
    What stands in the firework's own ``_queueadapter`` goes before.
``memory_mib``, ``rank_memory_mib``
    Memory that it takes once, and for each rank (``operations.memory``): where the file
    gives a node less, ``qlaunch -r`` asks for so much, up to what a node has. It never
    asks for less than the file: an estimate that is too low would cost a job.
``kind``, ``amount``, ``unit``, ``source``
    What was estimated, and from what.

The time of a unit of work is that of completed fireworks of the same kind: the slowest
but one in ten of the campaign's own, else of any; where there are none it is a constant
of `KINDS`, several times slower than measured, for slower machines and potentials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanoos_fw.operations.memory import memory_needs
from nanoos_fw.stores.database import store_errors
from nanoos_fw.stores.launches import SPEC_KEY

if TYPE_CHECKING:
    from fireworks import Firework, Workflow

    from nanoos_fw.firetasks.campaign_plan import CampaignPlan

NEEDS = "needs"
START_S = 20.0  # imports, database, the first compiled call
_USEFUL_S = 60.0  # of work that can be continued: start-up, progress, a checkpoint
_SHORT_S = 600.0  # work known to be shorter is not cut, though it could be
_STOP_S = 120.0  # of an allocation's end, see slurm.allocation_deadline
_LEAST_WALLTIME_S, _SAFETY, _ROUND_S = 600.0, 2.0, 300.0
_RECENT, _ENOUGH = 2000, 3
_SLOW = 0.9
_CHUNK_S, _MOST_IN_CHUNK = 600.0, 2000
_ATOMS_PER_RANK = 250  # as firetasks.md
_UNKNOWN_SITES = 20.0
_KEYS_PER_QUERY = 5000


@dataclass(frozen=True)
class Kind:
    """A kind of work.

    Parameters
    ----------
    unit
        Of its amount.
    unit_s
        Time of a unit on one rank, where nothing was measured yet.
    resumes
        Whether it goes on where it was stopped.
    amount
        Returns the units in a firetask.
    """

    unit: str
    unit_s: float
    resumes: bool
    amount: Callable[[Mapping[str, Any], _Sizes], float]


class _Sizes:
    """Sites of stored structures, and how many a workflow's campaign has."""

    def __init__(self, sites: Mapping[str, int], labelled: int | None = None) -> None:
        self._sites, self.labelled = sites, labelled
        self.mean = float(np.mean(list(sites.values()))) if sites else _UNKNOWN_SITES
        self.largest = float(max(sites.values(), default=_UNKNOWN_SITES))

    def largest_of(self, task: Mapping[str, Any]) -> float:
        """Return the sites of the largest of a task's structures."""
        known = [
            self._sites[key]
            for key in task.get("structures") or ()
            if key in self._sites
        ]
        return float(max(known, default=self.largest))

    def of(self, task: Mapping[str, Any]) -> float:
        """Return the sites of a task's structures, or of as many as its ranks."""
        keys = task.get("structures") or ()
        known = [self._sites[key] for key in keys if key in self._sites]
        number = len(keys)
        if not number and task.get("last_rank"):
            number = int(task["last_rank"]) - int(task.get("first_rank") or 1) + 1
        return sum(known) + (number - len(known)) * self.mean


def _training(task: Mapping[str, Any], sizes: _Sizes) -> float:
    from nanoos_fw.ml.datasets import open_dataset
    from nanoos_fw.ml.training_config import TrainingConfig

    config = TrainingConfig.model_validate(task["training"])
    crystals: float | None = sizes.labelled
    if task.get("dataset_dir"):
        crystals = open_dataset(Path(task["dataset_dir"])).num_samples
    epochs = config.epochs * config.ensemble_size
    return math.nan if crystals is None else crystals * sizes.mean * epochs


def _dynamics(task: Mapping[str, Any], sizes: _Sizes) -> float:
    config = task["md"]["config"]
    steps = sum(
        int(config.get(name) or 0) for name in ("equilibration_steps", "num_steps")
    )
    return _atoms(task, sizes) * steps


def _atoms(task: Mapping[str, Any], sizes: _Sizes) -> float:
    """Return the atoms of a simulation: whole cells, up to twice the least number."""
    least = int(task["md"]["config"].get("supercell_min_atoms") or 1)
    return max(2.0 * least, sizes.mean)


# Measured by the fireworks of 'nanoos demo' on two cores that had other work (2 ranks,
# embedded atoms), with start-up: 20 sites relaxed a second, 200 featurized, 300
# screened, 4000 sites x epochs of training, 160 structures of a dataset. The constants
# are slower where it depends on the potential or the network, which may be slower by
# a factor of ten to a hundred.
KINDS: Mapping[str, Kind] = {
    "FeaturizeStructuresTask": Kind(
        "sites", 1 / 200, True, lambda task, sizes: sizes.of(task)
    ),
    "RelaxStructuresTask": Kind("sites", 0.5, True, lambda task, sizes: sizes.of(task)),
    "BuildDatasetTask": Kind(
        "structures", 1 / 50, False, lambda task, _: len(task["structures"])
    ),
    "TrainModelTask": Kind("sites x epochs", 1 / 1000, True, _training),
    "ScreenCandidatesTask": Kind(
        "sites", 1 / 200, True, lambda task, sizes: sizes.of(task)
    ),
    "RankCandidatesTask": Kind(
        "structures", 1 / 500, False, lambda task, _: len(task["structures"])
    ),
    "ScreenStreamTask": Kind(
        "candidates", 1 / 200, True, lambda task, _: task["stop"] - task["start"]
    ),
    "RankStreamTask": Kind("ranking", 60.0, False, lambda _task, _sizes: 1.0),
    "ScreenWindowTask": Kind(
        "candidates", 1 / 200, True, lambda task, _: task["stop"] - task["start"]
    ),
    "RunMDTask": Kind("atoms x steps", 1 / 20_000, True, _dynamics),
    "AnalyzeTrajectoryTask": Kind("atoms x steps", 1 / 200_000, False, _dynamics),
    "WriteReportTask": Kind("report", 60.0, False, lambda _task, _sizes: 1.0),
}


def set_needs(database: Any, workflows: Sequence[Workflow]) -> None:
    """Write needs into the fireworks whose work is of known kinds.

    Needs that are there stay: somebody has written them. A few queries, whatever the
    number of workflows.

    Parameters
    ----------
    database
        With the structures, and what was measured.
    workflows
        Not yet submitted.
    """
    fireworks = [
        (workflow, firework)
        for workflow in workflows
        for firework in workflow.fws
        if _kind(firework) and NEEDS not in firework.spec.get(SPEC_KEY, {NEEDS: None})
    ]
    if not fireworks:
        return
    sites = _sites(database, (firework for _, firework in fireworks))
    measured = Measured(database)
    for workflow, firework in fireworks:
        sizes = _Sizes(sites, _labelled(workflow))
        needs = _needs(firework, sizes, measured)
        if needs is not None:
            firework.spec[SPEC_KEY][NEEDS] = needs


def _tasks(firework: Firework) -> list[tuple[str, Mapping[str, Any]]]:
    return [(type(task).__name__, task) for task in firework.tasks]


def _kind(firework: Firework) -> str | None:
    """Return the names of the tasks; None if one is not known."""
    names = [name for name, _ in _tasks(firework)]
    return "+".join(names) if names and KINDS.keys() >= set(names) else None


def _labelled(workflow: Workflow) -> int | None:
    """Return how many structures the workflow's training has labels of."""
    for firework in workflow.fws:
        for name, task in _tasks(firework):
            if name == "BuildDatasetTask":
                return len(task["structures"])
    return None


def _sites(database: Any, fireworks: Iterable[Firework]) -> dict[str, int]:
    keys = {
        key
        for firework in fireworks
        for _, task in _tasks(firework)
        for key in task.get("structures") or ()
    }
    wanted = sorted(keys)
    found: dict[str, int] = {}
    with store_errors("read the sizes of structures"):
        for first in range(0, len(wanted), _KEYS_PER_QUERY):
            query = {"_id": {"$in": wanted[first : first + _KEYS_PER_QUERY]}}
            for document in database["structures"].find(query, {"n_sites": 1}):
                found[document["_id"]] = int(document["n_sites"])
    return found


def _needs(
    firework: Firework, sizes: _Sizes, measured: Measured
) -> dict[str, Any] | None:
    tasks = _tasks(firework)
    kind, campaign = _kind(firework), firework.spec[SPEC_KEY].get("campaign")
    amounts = [KINDS[name].amount(task, sizes) for name, task in tasks]
    if kind is None or any(math.isnan(amount) for amount in amounts):
        return None
    rate = measured.unit_s(kind, campaign)
    if rate is not None:
        unit_s, source = rate
        work_s = amounts[0] * unit_s
    else:
        source = "no such work was measured yet"
        work_s = sum(
            amount * KINDS[name].unit_s
            for amount, (name, _) in zip(amounts, tasks, strict=True)
        )
    expected_s = START_S + work_s
    needs: dict[str, Any] = {
        "kind": kind,
        "amount": round(amounts[0], 1),
        "unit": KINDS[tasks[0][0]].unit,
        "expected_s": round(expected_s, 1),
        "minimum_s": round(_minimum(tasks, expected_s, rate is not None), 1),
        "walltime": _walltime(expected_s),
        "source": source,
    }
    if tasks[0][0] == "RunMDTask":
        atoms = _atoms(tasks[0][1], sizes)
        needs["ntasks"] = max(1, int(atoms // _ATOMS_PER_RANK))
    memory = [
        memory_needs(
            name,
            task,
            atoms=_atoms(task, sizes) if "md" in task else 0.0,
            largest=sizes.largest_of(task),
            mean=sizes.mean,
        )
        for name, task in tasks
    ]
    # One after the other in one process: the most that one of them takes.
    for field, of_tasks in zip(
        ("memory_mib", "rank_memory_mib"), zip(*memory, strict=True), strict=True
    ):
        needs[field] = math.ceil(max(of_tasks))
    return needs


def _minimum(
    tasks: Sequence[tuple[str, Mapping[str, Any]]], expected_s: float, known: bool
) -> float:
    if not all(KINDS[name].resumes for name, _ in tasks):
        # Of an analysis after a simulation, which goes on by itself, its own part.
        if KINDS[tasks[0][0]].resumes:
            return min(expected_s, _SHORT_S if known else _USEFUL_S)
        return expected_s
    if known and expected_s <= _SHORT_S:
        return expected_s
    return min(expected_s, _USEFUL_S)


def _walltime(expected_s: float) -> str:
    asked = max(_LEAST_WALLTIME_S, _SAFETY * expected_s + _STOP_S)
    minutes = math.ceil(asked / _ROUND_S) * round(_ROUND_S) // 60
    return f"{minutes // 60}:{minutes % 60:02d}:00"


class Measured:
    """What completed fireworks have taken for a unit of work; three queries at most."""

    def __init__(self, database: Any) -> None:
        self._database = database
        self._times: dict[str, list[tuple[str | None, float]]] | None = None

    def unit_s(self, kind: str, campaign: str | None) -> tuple[float, str] | None:
        """Return the time of a unit, and what it was measured from; None if nothing."""
        if self._times is None:
            self._times = self._read()
        rows = self._times.get(kind, [])
        own = [time for name, time in rows if name == campaign]
        for times, whose in (
            (own, f"campaign {campaign}"),
            ([time for _, time in rows], "all campaigns"),
        ):
            if len(times) >= _ENOUGH:
                source = f"{len(times)} fireworks of {whose}"
                return float(np.quantile(times, _SLOW)), source
        return None

    def _read(self) -> dict[str, list[tuple[str | None, float]]]:
        with store_errors("read how long fireworks have taken"):
            launches = {
                launch["fw_id"]: float(launch["runtime_secs"])
                for launch in self._database["launches"]
                .find(
                    {"state": "COMPLETED"},
                    {
                        "fw_id": 1,
                        "runtime_secs": 1,
                        "action.stored_data.hit": 1,
                        "action.stored_data.out_of_time": 1,
                    },
                )
                .sort("launch_id", -1)
                .limit(_RECENT)
                if launch.get("runtime_secs") and not _cheap(launch)
            }
            documents = list(
                self._database["fireworks"].find(
                    {"fw_id": {"$in": list(launches)}},
                    {
                        "fw_id": 1,
                        f"spec.{SPEC_KEY}.{NEEDS}": 1,
                        f"spec.{SPEC_KEY}.campaign": 1,
                        f"spec.{SPEC_KEY}.continuation": 1,
                    },
                )
            )
        found: dict[str, list[tuple[str | None, float]]] = {}
        for document in documents:
            nanoos = document["spec"].get(SPEC_KEY) or {}
            needs = nanoos.get(NEEDS) or {}
            if needs.get("amount") and "continuation" not in nanoos:
                time = launches[document["fw_id"]] / needs["amount"]
                found.setdefault(needs["kind"], []).append(
                    (nanoos.get("campaign"), time)
                )
        return found


def _cheap(launch: Mapping[str, Any]) -> bool:
    """Tell whether a launch has found results, or left work to another."""
    stored = (launch.get("action") or {}).get("stored_data") or {}
    return bool(stored.get("hit")) or "out_of_time" in stored


# ------------------------------------------------------------------------- chunk sizes


def sized_plan(
    database: Any, plan: CampaignPlan, given: Iterable[str], keys: Sequence[str]
) -> CampaignPlan:
    """Return a plan whose chunk sizes follow from the size of the structures.

    So many structures as take about ten minutes go into a firework, by what was
    measured or the constants of `KINDS`. Sizes that were given stay, and so do those of
    a stored plan of this name: submitting again must make the same fireworks.

    Parameters
    ----------
    plan
        As read, with defaults.
    given
        Names of the fields that somebody has written.
    keys
        Of the structures.
    """
    fields = {
        "relaxations_per_firework": "RelaxStructuresTask",
        "structures_per_firework": "FeaturizeStructuresTask",
    }
    missing = {name: kind for name, kind in fields.items() if name not in set(given)}
    with store_errors("look for a campaign"):
        stored = database["campaigns"].find_one({"_id": plan.name}, {"plan": 1})
    if stored is not None:
        kept = {name: stored["plan"][name] for name in missing}
        return plan.model_copy(update=kept)
    sites = {}
    with store_errors("read the sizes of structures"):
        for first in range(0, len(keys), _KEYS_PER_QUERY):
            query = {"_id": {"$in": list(keys[first : first + _KEYS_PER_QUERY])}}
            for document in database["structures"].find(query, {"n_sites": 1}):
                sites[document["_id"]] = int(document["n_sites"])
    mean = _Sizes(sites).mean
    measured = Measured(database)
    update = {}
    for name, kind in missing.items():
        rate = measured.unit_s(kind, plan.name)
        unit_s = KINDS[kind].unit_s if rate is None else rate[0]
        number = int(_CHUNK_S / (unit_s * mean))
        update[name] = max(1, min(number, _MOST_IN_CHUNK))
    return plan.model_copy(update=update)
