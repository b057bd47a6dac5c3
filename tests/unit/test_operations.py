"""Submitting, running and counting, on a LaunchPad over an in-memory database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fireworks import Firework, Workflow

from nanoos_fw import operations
from nanoos_fw.demo import demo_plan
from nanoos_fw.errors import InputError, LaunchError
from nanoos_fw.firetasks import WriteReportTask
from nanoos_fw.operations.status import campaign_status
from nanoos_fw.slurm import parse_cluster
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.launches import (
    failed_fireworks,
    launch_error,
    stage_times,
)
from nanoos_fw.workflows import screening_workflow


@pytest.fixture
def workflow(tmp_path: Path) -> Workflow:
    plan = demo_plan("demo", tmp_path, tmp_path / "report.html")
    keys = [f"{number:040x}" for number in range(40)]
    return screening_workflow(plan, keys, keys[:2])


def report_workflow(path: Path, campaign: str) -> Workflow:
    """One firework that fails at once if the campaign does not exist."""
    firework = Firework(
        [WriteReportTask(campaign=campaign, path=str(path / "report.html"))],
        spec={
            "_add_launchpad_and_fw_id": True,
            "nanoos": {
                "campaign": campaign,
                "stage": "report",
                "order": 0,
                "work_root": str(path),
            },
        },
    )
    return Workflow([firework], metadata={"key": f"report {campaign}"})


def test_preparing_again_keeps_the_counter(launchpad: Any) -> None:
    launchpad.get_new_fw_id(quantity=7)
    operations.prepare_launchpad(launchpad)
    assert launchpad.get_new_fw_id() == 8


def test_a_workflow_is_submitted_once(launchpad: Any, workflow: Workflow) -> None:
    count = len(workflow.fws)
    assert operations.submit(launchpad, workflow)
    again = Workflow.from_dict(workflow.to_dict())
    assert not operations.submit(launchpad, again)
    assert launchpad.workflows.count_documents({}) == 1
    assert launchpad.fireworks.count_documents({}) == count


def test_a_half_inserted_workflow_is_replaced(
    launchpad: Any, workflow: Workflow, caplog: pytest.LogCaptureFixture
) -> None:
    count = len(workflow.fws)
    operations.submit(launchpad, Workflow.from_dict(workflow.to_dict()))
    # A submission killed between the workflow and the last of its fireworks.
    lost = launchpad.fireworks.find_one({"state": "WAITING"})
    launchpad.fireworks.delete_one({"_id": lost["_id"]})
    assert operations.submit(launchpad, workflow)
    assert "half-inserted" in caplog.text
    assert launchpad.workflows.count_documents({}) == 1
    assert launchpad.fireworks.count_documents({}) == count
    (document,) = launchpad.workflows.find()
    assert sorted(document["nodes"]) == sorted(launchpad.get_fw_ids())


def test_stages_are_counted_in_the_order_of_the_work(
    launchpad: Any, workflow: Workflow
) -> None:
    operations.submit(launchpad, workflow)
    counts = campaign_status(launchpad.db, "demo").stages
    assert list(counts) == [
        "references", "label", "featurize", "dataset", "train", "screen", "rank",
        "relax", "md", "report",
    ]  # fmt: skip
    assert counts["label"] == {"READY": 1}
    assert counts["md"] == {"WAITING": 3}
    assert campaign_status(launchpad.db, "other").stages == {}


def test_a_failed_firework_tells_its_cause_and_runs_again(
    launchpad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations.campaign, "save_embedded", lambda _: None)
    monkeypatch.setenv("NANO_OS_RANKS", "3")
    operations.submit(launchpad, report_workflow(tmp_path, "late"))
    stages: list[str] = []
    operations.run_embedded(launchpad, tmp_path / "launches", on_launch=stages.append)
    assert stages == ["report"]
    (failed,) = failed_fireworks(launchpad.db, "late")
    assert failed.stage == "report"
    assert failed.error.kind == "input"
    assert "no campaign 'late'" in failed.error.message
    assert "no campaign 'late'" in (tmp_path / "launches" / "failures.log").read_text()

    plan = demo_plan("late", tmp_path, tmp_path / "report.html")
    CampaignStore(launchpad.db).create("late", plan.model_dump(mode="json"))
    assert operations.rerun_failed(launchpad, "late") == 1
    operations.run_embedded(launchpad, tmp_path / "launches")
    assert failed_fireworks(launchpad.db, "late") == []
    assert campaign_status(launchpad.db, "late").stages == {"report": {"COMPLETED": 1}}
    times, hosts = stage_times(launchpad.db, "late")
    # Both tries took time.
    assert [(time.stage, time.launches) for time in times] == [("report", 2)]
    assert len(hosts) == 1
    assert times[0].core_s == pytest.approx(3 * times[0].wall_s)
    launchpad.db["launch_places"].update_one({}, {"$unset": {"cores": ""}})
    assert stage_times(launchpad.db, "late")[0][0].core_s is None  # of an older release
    page = (tmp_path / "report.html").read_text()
    assert "not available" in page  # of an empty campaign nothing is made up


def test_an_error_without_details_shows_its_last_line() -> None:
    launch = {
        "action": {
            "stored_data": {
                "_exception": {"_stacktrace": "Traceback\n  x\nKeyError: 'a'\n"}
            }
        }
    }
    assert "KeyError: 'a'" in launch_error(launch).message
    assert "left no message" in launch_error(None).message


# ------------------------------------------------------------------------ resources

CLUSTER = parse_cluster(
    partitions=(
        "PartitionName=cpu Default=YES MaxNodes=2 MaxTime=12:00:00 State=UP\n"
        "PartitionName=long Default=NO MaxNodes=2 MaxTime=48:00:00 State=UP\n"
    ),
    nodes="cpu|n1|16|64000|(null)|idle\nlong|n1|16|64000|(null)|idle\n",
    config="ClusterName = mat\n",
)


def asking(**resources: Any) -> Workflow:
    firework = Firework(
        [WriteReportTask(campaign="c", path="r.html")],
        name="big one",
        spec={"_queueadapter": resources},
    )
    return Workflow([firework], metadata={"key": "k"})


@pytest.fixture
def on_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/sinfo")
    monkeypatch.setattr("nanoos_fw.slurm.read_cluster", lambda: CLUSTER)


@pytest.mark.usefixtures("on_cluster")
@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"memory": "4G"}, "memory"),
        ({"ntasks": 0}, "ntasks"),
        ({"walltime": "72:00:00"}, "exceeds the 48 h of partition 'long'"),
        ({"walltime": "24:00:00", "queue": "cpu"}, "exceeds the 12 h"),
        ({"queue": "fast"}, "no partition 'fast'"),
        ({"mem": "100G"}, "102400 MiB on a node exceed"),
    ],
)
def test_resources_that_nobody_has_are_refused_before_insertion(
    launchpad: Any, resources: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        operations.submit(launchpad, asking(**resources))

    assert words in str(caught.value)
    assert launchpad.fireworks.count_documents({}) == 0
    assert launchpad.workflows.count_documents({}) == 0


@pytest.mark.usefixtures("on_cluster")
def test_resources_that_one_partition_has_are_accepted(launchpad: Any) -> None:
    assert operations.submit(launchpad, asking(walltime="24:00:00", ntasks=16))


def test_without_slurm_the_fields_alone_are_checked(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)

    with pytest.raises(InputError, match=r"'big one'.*walltim"):
        operations.submit(launchpad, asking(walltim=5))
    assert operations.submit(launchpad, asking(walltime="72:00:00"))


def test_a_controller_that_is_away_does_not_stop_a_submission(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away() -> Any:
        raise LaunchError("sinfo did not answer")

    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/sinfo")
    monkeypatch.setattr("nanoos_fw.slurm.read_cluster", away)

    assert operations.submit(launchpad, asking(walltime="72:00:00"))
    assert "not checked against SLURM: sinfo did not answer" in caplog.text
