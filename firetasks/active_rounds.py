"""The fireworks of a round of active learning.

A round is: label the batch, extend the dataset, train, predict the rest, and choose.
The firework that chooses adds the next round to the workflow, so that the campaign is
as long as it needs to be; see ``SelectBatchTask``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fireworks import Firework, Workflow
from fireworks.core.firework import FiretaskBase
from fireworks.utilities.fw_serializers import load_object

from nanoos_fw.errors import InputError
from nanoos_fw.firetasks.active import (
    ExportBatchTask,
    ExtendDatasetTask,
    RetrainTask,
    ScreenPoolTask,
)
from nanoos_fw.firetasks.active_plan import ActivePlan, LammpsLabels, TaskLabels
from nanoos_fw.firetasks.active_selection import SelectBatchTask
from nanoos_fw.firetasks.campaign import WriteReportTask
from nanoos_fw.firetasks.fans import bounds, chunks
from nanoos_fw.firetasks.featurization import FeaturizeStructuresTask
from nanoos_fw.firetasks.relaxation import RelaxStructuresTask
from nanoos_fw.provenance import content_key
from nanoos_fw.stores.active import Round
from nanoos_fw.stores.launches import SPEC_KEY

# In the order of the work; ``order`` in the spec sorts status tables.
ACTIVE_STAGES = (
    "featurize", "references", "label", "export", "dataset", "train", "screen",
    "select", "report",
)  # fmt: skip


def active_workflow(plan: ActivePlan, candidates: Sequence[str]) -> Workflow:
    """Return the beginning of a campaign: features, and the choice of the first batch.

    All that follows is added by the fireworks that choose.
    """
    features = plan.features.model_dump(mode="json")
    graphs = [
        _firework(
            plan, None, "featurize", "prep",
            [FeaturizeStructuresTask(structures=part, features=features)],
        )
        for part in chunks(sorted(candidates), plan.structures_per_firework)
    ]  # fmt: skip
    return _workflow(plan, "active learning", [*graphs, _select(plan, 0, graphs)])


def round_workflow(
    plan: ActivePlan, decided: Round, candidates: int, references: Sequence[str] = ()
) -> Workflow | None:
    """Return what follows on a decision, or None if nothing does.

    Parameters
    ----------
    decided
        The round.
    candidates
        Number of all candidates.
    references
        Elements that are relaxed with this round.
    """
    number = decided.number
    fireworks: list[Firework] = []
    ended = decided.stop is not None
    if plan.report_every_round or ended:
        path = report_path(plan)
        task = WriteReportTask(campaign=plan.name, path=path)
        fireworks.append(_firework(plan, number, "report", "prep", [task]))
    if not ended:
        labels = _labelling(plan, number, decided.batch, references)
        fireworks += labels
        if labels and plan.labels.kind == "files":
            return _workflow(plan, f"round {number}", fireworks)
        fireworks += _learning(plan, number, candidates, labels)
    return _workflow(plan, f"round {number}", fireworks) if fireworks else None


def learning_workflow(plan: ActivePlan, number: int, candidates: int) -> Workflow:
    """Return the rest of a round whose labels were waited for."""
    return _workflow(
        plan, f"round {number} with labels", _learning(plan, number, candidates, [])
    )


def select_workflow(plan: ActivePlan, number: int, turn: int) -> Workflow:
    """Return the choice of a round alone, for a campaign that had ended.

    Parameters
    ----------
    turn
        How often the campaign has been taken up again.
    """
    return _workflow(plan, f"round {number} again {turn}", [_select(plan, number, [])])


def report_path(plan: ActivePlan) -> str:
    """Return the file of the report."""
    return plan.report or str(Path(plan.work_root or ".") / f"{plan.name}-report.html")


def check_labelling(plan: ActivePlan) -> None:
    """Refuse labels that could not be made, before anything is queued.

    Raises
    ------
    InputError
        If the potential cannot be used, or the task cannot be imported, is no
        firetask, or is stored under another name.
    """
    if isinstance(plan.labels, LammpsLabels):
        plan.labels.method.potential.check()
    elif isinstance(plan.labels, TaskLabels):
        source = {"target": plan.target, "unit": plan.unit, "method": plan.label_key()}
        task = _label_task(plan.labels, ["0" * 40], source)
        stored = str(task.to_dict()["_fw_name"])
        again = load_object(task.to_dict())
        if type(again) is not type(task):
            raise InputError(
                f"the labelling task {plan.labels.task} is stored as {stored}, which "
                "is another class",
                advice=f'state _fw_name = "{{{{{plan.labels.task}}}}}" in its class',
            )


# ------------------------------------------------------------------------- private


def _labelling(
    plan: ActivePlan, number: int, batch: Sequence[str], references: Sequence[str]
) -> list[Firework]:
    labels = plan.labels
    if isinstance(labels, LammpsLabels):
        method = labels.method.model_dump(mode="json")
        parts = chunks(batch, plan.labels_per_firework)
        work = [("label", part) for part in parts if part]
        if references:
            work.append(("references", sorted(references)))
        return [
            _firework(
                plan, number, stage, "md",
                [RelaxStructuresTask(structures=keys, method=method)],
            )
            for stage, keys in work
        ]  # fmt: skip
    if not batch:
        return []
    if isinstance(labels, TaskLabels):
        source = {
            "target": plan.target,
            "unit": plan.unit,
            "method": plan.label_key(),
        }
        return [
            _firework(
                plan, number, "label", labels.category,
                [_label_task(labels, keys, source)],
            )
            for keys in chunks(batch, plan.labels_per_firework)
        ]  # fmt: skip
    task = ExportBatchTask(campaign=plan.name, round=number)
    return [_firework(plan, number, "export", "prep", [task])]


def _label_task(
    labels: TaskLabels, keys: Sequence[str], source: dict[str, str]
) -> FiretaskBase:
    values = {
        "_fw_name": "{{" + labels.task + "}}",
        "structures": list(keys),
        "source": source,
        "options": labels.options,
    }
    try:
        task = load_object(values)
    except (ImportError, ValueError, AttributeError) as error:
        raise InputError(
            f"the labelling task {labels.task} cannot be imported: {error}",
            advice="its module must be installed, or on PYTHONPATH, on all machines",
        ) from error
    if not isinstance(task, FiretaskBase):
        raise InputError(f"the labelling task {labels.task} is no firetask")
    return task


def _learning(
    plan: ActivePlan, number: int, candidates: int, parents: Sequence[Firework]
) -> list[Firework]:
    campaign = {"campaign": plan.name, "round": number}
    dataset = _firework(
        plan, number, "dataset", "prep", [ExtendDatasetTask(**campaign)], parents
    )
    train = _firework(
        plan, number, "train", "train", [RetrainTask(**campaign)], [dataset]
    )
    screens = [
        _firework(
            plan, number, "screen", "infer",
            [ScreenPoolTask(**campaign, start=start, stop=stop)], [train],
        )
        for start, stop in bounds(candidates, plan.structures_per_firework)
    ]  # fmt: skip
    return [dataset, train, *screens, _select(plan, number + 1, screens)]


def _select(plan: ActivePlan, number: int, parents: Sequence[Firework]) -> Firework:
    """Return the choice of a round; it belongs to the round before."""
    task = SelectBatchTask(campaign=plan.name, round=number)
    before = number - 1 if number else None
    return _firework(plan, before, "select", "infer", [task], parents)


def _firework(
    plan: ActivePlan,
    number: int | None,
    stage: str,
    category: str,
    tasks: Sequence[FiretaskBase],
    parents: Sequence[Firework] = (),
) -> Firework:
    described = [task.to_dict() for task in tasks]
    key = content_key(
        "firework", {"campaign": plan.name, "stage": stage, "tasks": described}
    )
    about: dict[str, Any] = {
        "campaign": plan.name,
        "stage": stage,
        "order": ACTIVE_STAGES.index(stage),
        "key": key,
        "work_root": str(plan.work_root),
    }
    if number is not None:
        about["round"] = number
    return Firework(
        list(tasks),
        spec={
            "_category": category,
            "_add_launchpad_and_fw_id": True,
            SPEC_KEY: about,
        },
        name=f"{plan.name} {stage}" + ("" if number is None else f" {number}"),
        parents=list(parents),
    )


def _workflow(plan: ActivePlan, kind: str, fireworks: list[Firework]) -> Workflow:
    key = content_key(
        "workflow",
        {"kind": kind, "fireworks": [fw.spec[SPEC_KEY]["key"] for fw in fireworks]},
    )
    return Workflow(
        fireworks,
        name=f"{plan.name} {kind}",
        metadata={"campaign": plan.name, "kind": kind, "key": key},
    )
