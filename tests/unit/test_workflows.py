from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanoos_fw import firetasks
from nanoos_fw.demo import demo_plan
from nanoos_fw.errors import InputError
from nanoos_fw.firetasks.md import MDMethod
from nanoos_fw.firetasks.relaxation import PotentialChoice
from nanoos_fw.md.protocols import MDConfig
from nanoos_fw.workflows import (
    MAX_FAN,
    CampaignPlan,
    choose_labelled,
    chunks,
    screening_workflow,
    verification_workflow,
)

# Stored in databases: a name may be added here, never changed or removed.
TASK_NAMES = {
    "AnalyzeTrajectoryTask",
    "BuildDatasetTask",
    "ExportBatchTask",
    "ExtendDatasetTask",
    "FeaturizeStructuresTask",
    "RankCandidatesTask",
    "RankStreamTask",
    "RelaxStructuresTask",
    "RetrainTask",
    "RunMDTask",
    "ScreenCandidatesTask",
    "ScreenPoolTask",
    "ScreenStreamTask",
    "ScreenWindowTask",
    "SearchTask",
    "SelectBatchTask",
    "TrainModelTask",
    "WriteReportTask",
}
# Of no campaign, of one with a stream, or of one that learns actively.
OTHER_TASKS = {
    "ExportBatchTask",
    "ExtendDatasetTask",
    "RankStreamTask",
    "RetrainTask",
    "ScreenPoolTask",
    "ScreenStreamTask",
    "ScreenWindowTask",
    "SearchTask",
    "SelectBatchTask",
}


@pytest.fixture(scope="module")
def plan() -> CampaignPlan:
    return demo_plan("demo", Path("/work root"), Path("/work root/report.html"))


def keys(count: int) -> list[str]:
    return [f"{number:040x}" for number in range(count)]


def links(workflow: Any) -> dict[int, list[int]]:
    return {int(k): v for k, v in workflow.links.items()}


def by_stage(workflow: Any) -> dict[str, list[Any]]:
    stages: dict[str, list[Any]] = {}
    for firework in workflow.fws:
        stages.setdefault(firework.spec["nanoos"]["stage"], []).append(firework)
    return stages


def test_task_names_are_a_frozen_contract() -> None:
    assert set(firetasks.__all__) == TASK_NAMES
    for name in TASK_NAMES:
        task = getattr(firetasks, name)
        assert task._fw_name == "{{nanoos_fw.firetasks." + name + "}}"


def test_every_task_survives_the_database(plan: CampaignPlan) -> None:
    from fireworks import Workflow

    workflow = screening_workflow(plan, keys(100), keys(16))
    seen = set()
    again = Workflow.from_format(workflow.to_format("json"), "json")
    pairs = zip(workflow.fws, again.fws, strict=True)
    for before, after in pairs:
        assert after.spec["nanoos"] == before.spec["nanoos"]
        for task, loaded in zip(before.tasks, after.tasks, strict=True):
            assert type(loaded) is type(task)
            assert loaded.parameters == task.parameters
            seen.add(type(task).__name__)
    assert seen == TASK_NAMES - OTHER_TASKS


def test_building_twice_gives_one_key(plan: CampaignPlan) -> None:
    first = screening_workflow(plan, keys(100), keys(16))
    shuffled = screening_workflow(plan, keys(100)[::-1], keys(16)[::-1])
    assert first.metadata == shuffled.metadata
    other = plan.model_copy(update={"seed": 1})
    key = screening_workflow(other, keys(100), keys(16)).metadata["key"]
    assert key != first.metadata["key"]
    assert verification_workflow(plan, keys(100)).metadata["key"] != key


def test_the_dataset_waits_for_labels_features_and_references(
    plan: CampaignPlan,
) -> None:
    workflow = screening_workflow(plan, keys(2000), keys(16))
    stages = by_stage(workflow)
    (dataset,) = stages["dataset"]
    parents = {f.fw_id for s in ("references", "label", "featurize") for f in stages[s]}
    found = {
        parent
        for parent, children in links(workflow).items()
        if dataset.fw_id in children
    }
    assert found == parents
    assert len(stages["label"]) > 1
    assert len(stages["featurize"]) > 1


def test_a_failed_run_does_not_stop_the_report(plan: CampaignPlan) -> None:
    workflow = screening_workflow(plan, keys(100), keys(16))
    (report,) = by_stage(workflow)["report"]
    assert report.spec["_allow_fizzled_parents"] is True
    others = [f for f in workflow.fws if f is not report]
    assert not any("_allow_fizzled_parents" in f.spec for f in others)


@pytest.mark.parametrize("count", [100, 840, 100_000])
def test_no_firework_has_many_children_or_parents(
    plan: CampaignPlan, count: int
) -> None:
    for workflow in (
        screening_workflow(plan, keys(count), keys(16)),
        verification_workflow(plan, keys(count)),
    ):
        children = links(workflow)
        parents: dict[int, int] = {}
        for found in children.values():
            for child in found:
                parents[child] = parents.get(child, 0) + 1
        assert max(map(len, children.values())) <= MAX_FAN
        assert max(parents.values()) <= 2 * MAX_FAN + 1


def test_labelled_and_screened_share_no_candidate(plan: CampaignPlan) -> None:
    stages = by_stage(screening_workflow(plan, keys(840), keys(16)))

    def structures(stage: str) -> list[str]:
        return [k for f in stages[stage] for k in f.tasks[0]["structures"]]

    labelled, screened = structures("label"), structures("screen")
    assert len(labelled) == 210
    assert not set(labelled) & set(screened)
    assert sorted(labelled + screened) == keys(840)
    assert sorted(structures("featurize")) == keys(840)


def test_the_choice_of_labels_depends_on_keys_and_seed_only() -> None:
    chosen = choose_labelled(keys(100), 0.25, 3)
    assert chosen == choose_labelled(keys(100)[::-1], 0.25, 3)
    assert chosen != choose_labelled(keys(100), 0.25, 4)
    assert len(set(chosen)) == 25


@pytest.mark.parametrize(("count", "size"), [(1, 50), (50, 50), (51, 50), (9999, 7)])
def test_chunks_hold_each_key_once(count: int, size: int) -> None:
    parts = chunks(keys(count), size)
    assert [key for part in parts for key in part] == keys(count)
    assert len(parts) <= MAX_FAN
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= max(size, -(-count // MAX_FAN))


@pytest.mark.parametrize(
    ("name", "elements", "says"),
    [
        ("tersof", ("Si",), "no potential 'tersof'"),
        ("tersoff", ("Si", "Xe"), "no tersoff potential at hand knows Si, Xe"),
        ("zhou2004", ("Cu", "Si"), "no element 'Si'"),
        ("x\nshell rm", ("Cu",), "no potential"),
    ],
)
def test_a_potential_that_cannot_be_used_is_refused_before_queueing(
    plan: CampaignPlan, name: str, elements: tuple[str, ...], says: str
) -> None:
    choice = PotentialChoice(name=name, elements=elements)
    method = plan.relaxation.model_copy(update={"potential": choice})
    bad = plan.model_copy(update={"relaxation": method})
    with pytest.raises(InputError, match=says):
        screening_workflow(bad, keys(100), keys(16))


def test_a_campaign_may_use_any_potential_of_the_catalogue(plan: CampaignPlan) -> None:
    choice = PotentialChoice(name="tersoff", elements=("Si", "C"))
    method = plan.relaxation.model_copy(update={"potential": choice})
    other = plan.model_copy(update={"relaxation": method})
    key = screening_workflow(other, keys(100), keys(16)).metadata["key"]
    assert key != screening_workflow(plan, keys(100), keys(16)).metadata["key"]


def test_a_campaign_with_nothing_to_screen_is_refused(plan: CampaignPlan) -> None:
    everything = plan.model_copy(update={"label_fraction": 1.0})
    with pytest.raises(InputError, match="leaves 0 candidates"):
        screening_workflow(everything, keys(20), keys(16))


@pytest.mark.parametrize(
    ("task", "given", "named"),
    [
        ("FeaturizeStructuresTask", {"structures": []}, "structures"),
        ("FeaturizeStructuresTask", {"structures": ["a"], "cutoff": 5}, "cutoff"),
        ("TrainModelTask", {"campaign": "c", "model_name": "m"}, "training"),
        (
            "TrainModelTask",
            {
                "campaign": "c",
                "model_name": "m",
                "training": {"epoch": 3, "target": "t"},
            },
            "training.epoch",
        ),
        (
            "RankCandidatesTask",
            {"campaign": "c", "structures": ["a"], "top_k": 0},
            "top_k",
        ),
        ("WriteReportTask", {}, "campaign"),
    ],
)
def test_bad_parameters_are_named_when_the_task_is_made(
    task: str, given: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=f"{task}: .*{named}"):
        getattr(firetasks, task)(**given)


def test_relaxation_needs_structures_or_ranks(plan: CampaignPlan) -> None:
    method = plan.relaxation.model_dump(mode="json")
    for given in (
        {},
        {"structures": ["a"], "campaign": "c", "first_rank": 1, "last_rank": 2},
        {"campaign": "c", "first_rank": 1},
    ):
        with pytest.raises(InputError, match="either structures, or campaign"):
            firetasks.RelaxStructuresTask(method=method, **given)


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b", "x" * 61, "-x"])
def test_a_campaign_name_fit_for_keys_and_files_is_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        demo_plan(name, Path("/w"), Path("/w/report.html"))


@pytest.mark.parametrize(
    ("config", "method", "message"),
    [
        (
            {"workflow_type": "MINIMIZE_LAMMPS", "temperature_k": 500.0},
            {},
            "temperature_k .* no effect on MINIMIZE_LAMMPS",
        ),
        ({"pressure_bar": 1000.0}, {}, "pressure_bar .* no effect on MD_NVT_LAMMPS"),
        ({"dump_every": 20_000}, {}, "no frames to analyse"),
        ({}, {"rdf_max_a": 1000.0}, "rdf_max_a: Input should be less than"),
    ],
)
def test_dynamics_that_would_fail_in_every_run_are_refused_when_planned(
    plan: CampaignPlan, config: dict[str, Any], method: dict[str, Any], message: str
) -> None:
    md = MDMethod(config=MDConfig(**config), **method)
    changed = plan.model_copy(update={"md": md})
    with pytest.raises(InputError, match=message):
        screening_workflow(changed, keys(100), keys(16))
    # Without runs there is nothing to refuse.
    none = changed.model_copy(update={"md_runs": 0})
    assert "md" not in by_stage(screening_workflow(none, keys(100), keys(16)))


def test_more_runs_than_ranked_candidates_are_refused(plan: CampaignPlan) -> None:
    more = plan.model_copy(update={"top_k": 2, "md_runs": 3})
    with pytest.raises(InputError, match="simulate 3 candidates, of which 2"):
        screening_workflow(more, keys(100), keys(16))


def test_nothing_is_analysed_where_there_are_no_frames(plan: CampaignPlan) -> None:
    md = MDMethod(config=MDConfig(dump_every=0))
    still = plan.model_copy(update={"md": md})
    for firework in by_stage(screening_workflow(still, keys(100), keys(16)))["md"]:
        assert [type(task).__name__ for task in firework.tasks] == ["RunMDTask"]


def test_the_last_frame_counts_as_one() -> None:
    config = {"equilibration_steps": 100, "num_steps": 100}
    MDMethod(config=MDConfig(**config, dump_every=200)).check()
    with pytest.raises(InputError, match="steps 101 to 200 is a multiple"):
        MDMethod(config=MDConfig(**config, dump_every=201)).check()
    # The frame of step 100 is the last one of the equilibration.
    with pytest.raises(InputError, match="no frames"):
        MDMethod(
            config=MDConfig(equilibration_steps=100, num_steps=99, dump_every=100)
        ).check()
