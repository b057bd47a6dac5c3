"""Builders: a campaign plan becomes a few small FireWorks workflows.

Every workflow is a plain function of the plan and of the keys in the store: building
it twice gives the same workflow with the same content key, so that submitting twice
is harmless. No firework has more than about fifty parents or children, since
FireWorks' work for one completion grows with their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fireworks import Firework, Workflow

from nanoos_fw.errors import InputError
from nanoos_fw.firetasks import (
    AnalyzeTrajectoryTask,
    BuildDatasetTask,
    FeaturizeStructuresTask,
    RankCandidatesTask,
    RankStreamTask,
    RelaxStructuresTask,
    RunMDTask,
    ScreenCandidatesTask,
    ScreenStreamTask,
    ScreenWindowTask,
    SearchTask,
    TrainModelTask,
    WriteReportTask,
)
from nanoos_fw.firetasks.base import NanoTask
from nanoos_fw.firetasks.campaign_plan import CampaignPlan, choose_labelled
from nanoos_fw.firetasks.fans import MAX_FAN, chunks
from nanoos_fw.firetasks.featurization import FeatureParameters
from nanoos_fw.firetasks.md import MDMethod
from nanoos_fw.firetasks.relaxation import PotentialChoice
from nanoos_fw.ml.training import TrainingConfig
from nanoos_fw.provenance import content_key, utc_now
from nanoos_fw.stores.launches import SPEC_KEY
from nanoos_fw.stores.screens import Screen

# In the order of the work; ``order`` in the spec sorts status tables.
STAGES = (
    "references", "label", "featurize", "dataset", "train", "screen", "rank", "relax",
    "md", "verify", "report",
)  # fmt: skip


def screening_workflow(
    plan: CampaignPlan, candidates: Sequence[str], references: Sequence[str]
) -> Workflow:
    """Return the campaign: label, train, screen, verify the best, simulate, report.

    Parameters
    ----------
    plan
        The campaign.
    candidates, references
        Structure keys of the candidates and of the elements in their ground states.

    Raises
    ------
    InputError
        If there is nothing left to screen, or as :meth:`CampaignPlan.check`.
    """
    plan.check()
    labelled = choose_labelled(candidates, plan.label_fraction, plan.seed)
    screened = sorted(set(candidates) - set(labelled))
    if plan.stream is None and len(screened) < plan.top_k:
        raise InputError(
            f"campaign {plan.name!r} leaves {len(screened)} candidates to screen, "
            f"fewer than top_k = {plan.top_k}",
            evidence={"candidates": len(candidates), "labelled": len(labelled)},
            advice="lower label_fraction or top_k, or give more candidates",
        )
    relax = plan.relaxation.model_dump(mode="json")
    features = plan.features.model_dump(mode="json")
    campaign = {"campaign": plan.name}

    elements = _firework(
        plan,
        "references",
        "md",
        RelaxStructuresTask(structures=sorted(references), method=relax),
    )
    labels = [
        _firework(
            plan, "label", "md", RelaxStructuresTask(structures=part, method=relax)
        )
        for part in chunks(labelled, plan.relaxations_per_firework)
    ]
    graphs = [
        _firework(
            plan,
            "featurize",
            "prep",
            FeaturizeStructuresTask(structures=part, features=features),
        )
        for part in chunks(
            labelled if plan.stream else sorted(candidates),
            plan.structures_per_firework,
        )
    ]
    dataset = _firework(
        plan,
        "dataset",
        "prep",
        BuildDatasetTask(
            **campaign,
            structures=labelled,
            references=sorted(references),
            method=relax,
            features=features,
            dataset=plan.dataset.model_dump(mode="json"),
        ),
        parents=[elements, *labels, *graphs],
    )
    train = _firework(
        plan,
        "train",
        "train",
        TrainModelTask(
            **campaign,
            model_name=plan.model_name,
            training=plan.training.model_dump(mode="json"),
        ),
        parents=[dataset],
    )
    screening, ranking = _screening(plan, screened)
    screens = [
        _firework(plan, "screen", "infer", task, parents=[train]) for task in screening
    ]
    rank = _firework(plan, "rank", "infer", ranking, parents=screens)
    top = _firework(
        plan,
        "relax",
        "md",
        RelaxStructuresTask(
            **campaign, first_rank=1, last_rank=plan.top_k, method=relax
        ),
        parents=[rank],
    )
    simulations = [
        _firework(
            plan,
            "md",
            "md",
            *_simulate(
                plan.md,
                {**campaign, "rank": number, "relaxation": relax},
            ),
            parents=[top],
        )
        for number in range(1, plan.md_runs + 1)
    ]
    report = _firework(
        plan,
        "report",
        "prep",
        WriteReportTask(**campaign, path=plan.report),
        parents=[top, *simulations],
        allow_fizzled_parents=True,
    )
    fireworks = [
        elements, *labels, *graphs, dataset, train, *screens, rank, top, *simulations,
        report,
    ]  # fmt: skip
    return _workflow(plan, "screening", fireworks)


def verification_workflow(plan: CampaignPlan, candidates: Iterable[str]) -> Workflow:
    """Return the relaxation of all candidates, so that the ranking can be judged.

    Results that are there are not computed again.
    """
    relax = plan.relaxation.model_dump(mode="json")
    parts = chunks(sorted(candidates), plan.relaxations_per_firework)
    labels = [
        _firework(
            plan, "verify", "md", RelaxStructuresTask(structures=part, method=relax)
        )
        for part in parts
    ]
    report = _firework(
        plan,
        "report",
        "prep",
        WriteReportTask(campaign=plan.name, path=plan.report),
        parents=labels,
        allow_fizzled_parents=True,
    )
    return _workflow(plan, "verification", [*labels, report])


def featurization_workflow(
    structures: Sequence[str],
    features: FeatureParameters,
    work_root: str,
    *,
    force_recompute: bool = False,
    structures_per_firework: int = 500,
) -> Workflow:
    """Return the featurization of stored structures, without a campaign.

    Parameters
    ----------
    structures
        Keys in the structure store.
    work_root
        Folder of the work directories, which all workers share.
    force_recompute
        Compute again what is there; then the workflow is a new one each time.
    """
    keys = sorted(set(structures))
    parts = chunks(keys, structures_per_firework)
    described = features.model_dump(mode="json")
    asked: dict[str, Any] = {"structures": keys, "features": described}
    if force_recompute:
        asked["asked"] = utc_now()
    key = content_key("featurization", asked)
    fireworks = [
        Firework(
            [
                FeaturizeStructuresTask(
                    structures=part,
                    features=described,
                    force_recompute=force_recompute,
                )
            ],
            spec={
                "_category": "prep",
                "_add_launchpad_and_fw_id": True,
                SPEC_KEY: {
                    "stage": "featurize",
                    "key": f"{key}-{number}",
                    "work_root": str(Path(work_root)),
                },
            },
            name=f"featurize {number + 1} of {len(parts)}",
        )
        for number, part in enumerate(parts)
    ]
    return Workflow(
        fireworks,
        name=f"featurize {len(keys)} structures",
        metadata={"kind": "featurization", "key": key},
    )


def training_workflow(
    dataset_dir: str,
    dataset_hash: str,
    training: TrainingConfig,
    model_name: str,
    work_root: str,
    *,
    parent: str | None = None,
    activate: bool = False,
) -> Workflow:
    """Return one training on the folder of a dataset, without a campaign.

    Parameters
    ----------
    dataset_dir, dataset_hash
        Folder, which all workers see, and what must be in it then.
    training
        Hyper-parameters; with a parent those of
        :func:`nanoos_fw.ml.training.with_parent`.
    model_name
        In the registry.
    work_root
        Folder of the work directories, which all workers share.
    parent
        ``name@version`` of the registry, to train further.
    activate
        Make the new version the active one.
    """
    asked: dict[str, Any] = {
        "dataset_dir": str(Path(dataset_dir)),
        "dataset_hash": dataset_hash,
        "training": training.model_dump(mode="json"),
        "model_name": model_name,
    }
    if parent is not None:
        asked["parent"] = parent
    if activate:
        asked["activate"] = True
    key = content_key("training workflow", asked)
    task = TrainModelTask(**asked)
    names = (f"{model_name} train", f"{model_name} training")
    return _lone_firework([task], "train", "training", key, work_root, names)


def simulation_workflow(
    structure: str,
    potential: PotentialChoice,
    identity: str,
    md: MDMethod,
    work_root: str,
    *,
    label: str,
) -> Workflow:
    """Return one simulation of a stored structure as it is, and its analyses.

    Parameters
    ----------
    structure
        Key in the structure store.
    potential, identity
        What it is simulated with, and a content key of that now: with another file or
        timestep under the same name the workflow is another one.
    md
        The simulation.
    work_root
        Folder of the work directories, which all workers share.
    label
        What people call the structure.
    """
    which = {"structure": structure, "potential": potential.model_dump(mode="json")}
    asked = {**which, "md": md.model_dump(mode="json"), "identity": identity}
    key = content_key("simulation workflow", asked)
    tasks = _simulate(md, which)
    kind = md.config.workflow_type
    names = (f"{label} {kind}",) * 2
    return _lone_firework(tasks, "md", "simulation", key, work_root, names)


def _simulate(md: MDMethod, which: dict[str, Any]) -> list[NanoTask]:
    """Return the tasks of one simulation: without frames nothing is analysed."""
    asked = {**which, "md": md.model_dump(mode="json")}
    tasks: list[NanoTask] = [RunMDTask(**asked)]
    if md.config.has_frames:
        tasks.append(AnalyzeTrajectoryTask(**asked))
    return tasks


def _lone_firework(
    tasks: Sequence[NanoTask],
    stage: str,
    kind: str,
    key: str,
    work_root: str,
    names: tuple[str, str],
) -> Workflow:
    """Return a workflow of one firework of no campaign; names are of both."""
    firework = Firework(
        list(tasks),
        spec={
            "_category": stage,
            "_add_launchpad_and_fw_id": True,
            SPEC_KEY: {"stage": stage, "key": key, "work_root": str(Path(work_root))},
        },
        name=names[0],
    )
    return Workflow([firework], name=names[1], metadata={"kind": kind, "key": key})


def window_workflow(screen: Screen, window: int, work_root: str) -> Workflow:
    """Return a screening as fireworks of ``window`` candidates each.

    Parameters
    ----------
    screen
        What is screened; it is in the database, the fireworks hold its name.
    window
        Whole chunks.
    work_root
        Folder of the work directories, which all workers share.
    """
    if window < 1 or window % screen.chunk:
        raise InputError(
            f"a firework takes whole chunks of {screen.chunk}, not {window} candidates"
        )
    starts = range(0, screen.count, window)
    key = content_key("screen windows", {"key": screen.key, "window": window})
    fireworks = [
        Firework(
            [
                ScreenWindowTask(
                    screen=screen.name,
                    start=start,
                    stop=min(start + window, screen.count),
                )
            ],
            spec={
                "_category": "infer",
                "_add_launchpad_and_fw_id": True,
                SPEC_KEY: {
                    "screen": screen.name,
                    **({"campaign": screen.campaign} if screen.campaign else {}),
                    "stage": "screen",
                    "key": f"{key}-{number}",
                    "work_root": str(Path(work_root)),
                },
            },
            name=f"{screen.name} screen {number + 1} of {len(starts)}",
        )
        for number, start in enumerate(starts)
    ]
    return Workflow(
        fireworks,
        name=f"{screen.name} screen",
        metadata={"screen": screen.name, "kind": "screen", "key": key},
    )


def search_workflow(search: str, work_root: str, workers: int, turn: int) -> Workflow:
    """Return fireworks that work on a hyper-parameter search, all alike.

    Parameters
    ----------
    search
        Name of the search, which is in the database.
    work_root
        Folder of the work directories, which all workers share.
    workers
        How many; each takes one trial after the other.
    turn
        Tells the workers that are submitted first from those that come later.
    """
    if not 1 <= workers <= MAX_FAN:
        raise InputError(f"workers must be 1 to {MAX_FAN}, not {workers}")
    key = content_key("search workers", {"search": search, "turn": turn})
    fireworks = [
        Firework(
            [SearchTask(search=search)],
            spec={
                "_category": "train",
                "_add_launchpad_and_fw_id": True,
                SPEC_KEY: {
                    "search": search,
                    "stage": "search",
                    "key": f"{key}-{number}",
                    "work_root": str(Path(work_root)),
                },
            },
            name=f"{search} search {number + 1}",
        )
        for number in range(workers)
    ]
    return Workflow(
        fireworks,
        name=f"{search} search",
        metadata={"search": search, "kind": "search", "key": key},
    )


def _screening(
    plan: CampaignPlan, screened: Sequence[str]
) -> tuple[list[NanoTask], NanoTask]:
    """Return the tasks that predict the candidates, and the one that ranks them."""
    name = {"campaign": plan.name}
    if plan.stream is not None:
        tasks: list[NanoTask] = [
            ScreenStreamTask(**name, start=start, stop=stop)
            for start, stop in plan.stream.windows()
        ]
        return tasks, RankStreamTask(**name, top_k=plan.top_k)
    features = plan.features.model_dump(mode="json")
    tasks = [
        ScreenCandidatesTask(**name, structures=part, features=features)
        for part in chunks(screened, plan.structures_per_firework)
    ]
    rank = RankCandidatesTask(**name, structures=screened, top_k=plan.top_k)
    return tasks, rank


def _firework(
    plan: CampaignPlan,
    stage: str,
    category: str,
    *tasks: NanoTask,
    parents: Sequence[Firework] = (),
    allow_fizzled_parents: bool = False,
) -> Firework:
    work_root = str(Path(plan.work_root))
    key = content_key("firework", {"stage": stage, "tasks": [dict(t) for t in tasks]})
    spec: dict[str, Any] = {
        "_category": category,
        "_add_launchpad_and_fw_id": True,
        SPEC_KEY: {
            "campaign": plan.name,
            "stage": stage,
            "order": STAGES.index(stage),
            "key": key,
            "work_root": work_root,
        },
    }
    if allow_fizzled_parents:
        spec["_allow_fizzled_parents"] = True
    return Firework(
        list(tasks), spec=spec, name=f"{plan.name} {stage}", parents=list(parents)
    )


def _workflow(plan: CampaignPlan, kind: str, fireworks: list[Firework]) -> Workflow:
    key = content_key(
        "workflow",
        {"kind": kind, "fireworks": [fw.spec[SPEC_KEY]["key"] for fw in fireworks]},
    )
    return Workflow(
        fireworks,
        name=f"{plan.name} {kind}",
        metadata={"campaign": plan.name, "kind": kind, "key": key},
    )
