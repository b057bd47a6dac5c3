"""Campaigns as a whole, on a LaunchPad over an in-memory database."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fireworks import Firework, FWorker, PyTask, Workflow
from fireworks.core.rocket_launcher import launch_rocket
from pymatgen.core import Lattice, Structure

from nanoos_fw.demo import demo_plan
from nanoos_fw.errors import (
    DiskFullError,
    InputError,
    LostRunError,
    OutOfMemoryError,
    SimulationError,
)
from nanoos_fw.firetasks.relaxation import PotentialChoice, RelaxationMethod
from nanoos_fw.operations import campaigns, locks, submission, submit_many
from nanoos_fw.operations.archives import archive
from nanoos_fw.operations.campaigns import cancel, pause, resume
from nanoos_fw.operations.rerun import plan_reruns
from nanoos_fw.operations.status import campaign_status
from nanoos_fw.provenance import sha256_file
from nanoos_fw.slurm import QueuedJob
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.structures import NewStructure, StructureStore


@pytest.fixture
def launchpad(new_launchpad: Callable[[], Any]) -> Any:
    found = new_launchpad()
    CampaignStore(found.db).create("c", {})
    return found


def firework(stage: str, function: str = "os.getcwd", **options: Any) -> Firework:
    order = ("first", "second").index(stage)
    spec = {"nanoos": {"campaign": "c", "stage": stage, "order": order}}
    return Firework([PyTask(func=function)], spec=spec, name=stage, **options)


def pair(key: str, function: str = "os.getcwd") -> Workflow:
    first = firework("first", function)
    second = firework("second", parents=[first])
    return Workflow([first, second], metadata={"key": key, "campaign": "c"})


def states(launchpad: Any) -> Counter[tuple[str, str]]:
    return Counter((d["name"], d["state"]) for d in launchpad.fireworks.find())


def run_all(launchpad: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    while launchpad.run_exists(FWorker()):
        launch_rocket(launchpad, FWorker(), strm_lvl="CRITICAL")


# ----------------------------------------------------------------------------- submit


def test_workflows_are_submitted_once_and_numbered_without_gaps(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "_BATCH", 50)
    seen: list[tuple[int, int]] = []
    keys = [f"k{n}" for n in range(120)]
    report = submit_many(
        launchpad, (pair(k) for k in keys), on_batch=lambda *n: seen.append(n)
    )
    assert report == (120, 0)
    assert seen == [(50, 50), (100, 100), (120, 120)]
    assert submit_many(launchpad, map(pair, [*keys, "new"])) == (1, 0)
    ids = sorted(d["fw_id"] for d in launchpad.fireworks.find({}, {"fw_id": 1}))
    assert ids == list(range(1, 243))
    assert states(launchpad) == {("first", "READY"): 121, ("second", "WAITING"): 121}
    assert launchpad.get_new_fw_id() == 243


class Killed(BaseException):
    """As by SIGKILL: no handler of the program sees it."""


@pytest.mark.parametrize("inserted", [0, 1, 2, 3])
def test_a_killed_submission_goes_on(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, inserted: int
) -> None:
    """Killed after the workflows and some of the fireworks of a batch."""
    insert_many = type(launchpad.fireworks).insert_many
    left = inserted

    def killed(self: Any, documents: Any, **options: Any) -> Any:
        nonlocal left
        rows = list(documents)
        if self.name != "fireworks":
            return insert_many(self, rows, **options)
        part, left = rows[:left], left - len(rows[:left])
        if part:
            insert_many(self, part, **options)
        if len(part) < len(rows):
            raise Killed
        return None

    with monkeypatch.context() as patch:
        patch.setattr(type(launchpad.fireworks), "insert_many", killed)
        with pytest.raises(Killed):
            submit_many(launchpad, map(pair, "ab"))
    # What is complete may run before the submission is taken up again.
    run_all(launchpad, tmp_path, monkeypatch)

    mended = 2 if inserted < 3 else 1
    assert submit_many(launchpad, map(pair, "abc")) == (1, mended)

    run_all(launchpad, tmp_path, monkeypatch)
    assert states(launchpad) == {("first", "COMPLETED"): 3, ("second", "COMPLETED"): 3}
    assert launchpad.workflows.count_documents({"state": "COMPLETED"}) == 3
    assert launchpad.launches.count_documents({}) == 6


def test_a_workflow_that_another_process_inserts_meanwhile_is_there_once(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked, and both have found nothing."""
    set_needs = submission.set_needs

    def other_is_faster(database: Any, workflows: Any) -> None:
        monkeypatch.setattr(submission, "set_needs", set_needs)
        assert submit_many(launchpad, map(pair, "bc")) == (2, 0)

    monkeypatch.setattr(submission, "set_needs", other_is_faster)
    assert submit_many(launchpad, map(pair, "abcd")) == (2, 0)

    assert launchpad.workflows.count_documents({}) == 4
    assert states(launchpad) == {("first", "READY"): 4, ("second", "WAITING"): 4}
    for document in launchpad.workflows.find():
        there = launchpad.fireworks.find({"fw_id": {"$in": document["nodes"]}})
        assert len(list(there)) == 2


def test_a_campaign_is_created_from_sets_and_submitted_once(
    launchpad: Any, tmp_path: Path
) -> None:
    store = StructureStore(open_database(launchpad))
    cells = [
        NewStructure(Structure(Lattice.cubic(3 + n / 50), ["Cu"], [[0, 0, 0]]), f"s{n}")
        for n in range(24)
    ]
    store.add(cells, in_set="mine")
    store.add(cells[:2], in_set="pure")
    made = demo_plan("new", tmp_path, tmp_path / "report.html")
    file = tmp_path / "plan.json"
    file.write_text(made.model_dump_json(exclude={"relaxations_per_firework"}))
    sets = {"candidates": "mine", "references": "pure"}
    plan = campaigns.read_plan(file)

    assert [campaigns.create(launchpad, plan, **sets) for _ in range(2)] == [24, 24]
    stored = CampaignStore(launchpad.db).get("new")["plan"]
    assert stored["relaxations_per_firework"] > made.relaxations_per_firework
    assert len(store.keys(plan.candidates)) == 24
    assert len(store.keys(plan.references)) == 2
    assert store.keys(plan.labelled)
    with pytest.raises(InputError, match="another plan"):
        campaigns.create(launchpad, plan.model_copy(update={"top_k": 3}), **sets)
    with pytest.raises(InputError, match="set 'none' has no structures"):
        campaigns.create(launchpad, plan, candidates="none", references="pure")

    assert campaigns.submit(launchpad, "new") == campaigns.Submitted(1, 0, 0)
    assert campaigns.submit(launchpad, "new") == campaigns.Submitted(0, 0, 1)
    verified = campaigns.submit(launchpad, "new", verify=True)
    assert verified == campaigns.Submitted(1, 0, 1)
    with pytest.raises(InputError, match="no campaign 'old'"):
        campaigns.submit(launchpad, "old")


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        (["Cu", "U"], ["Cu"], "is not asked to know U"),
        (["Cu"], ["Cu", "U"], "is not asked to know U"),
        (["Cu", "Ni"], ["Cu"], "have no structure of Ni alone"),
    ],
)
def test_elements_that_would_fail_later_are_refused_before_anything_is_stored(
    launchpad: Any,
    tmp_path: Path,
    candidates: list[str],
    references: list[str],
    message: str,
) -> None:
    store = StructureStore(open_database(launchpad))
    for name, elements in (("mine", candidates), ("pure", references)):
        for element in elements:
            cell = Structure(Lattice.cubic(3.0), [element], [[0, 0, 0]])
            store.add([NewStructure(cell, element)], in_set=name)
    plan = demo_plan("new", tmp_path, tmp_path / "report.html")
    with pytest.raises(InputError, match=message):
        campaigns.create(launchpad, plan, candidates="mine", references="pure")
    assert store.sets() == ["mine", "pure"]
    with pytest.raises(InputError, match="no campaign"):
        CampaignStore(launchpad.db).get("new")


def test_elements_of_a_sequence_must_be_known_but_for_those_that_are_filtered(
    launchpad: Any, tmp_path: Path
) -> None:
    store = StructureStore(open_database(launchpad))
    copper = Structure(Lattice.cubic(3.0), ["Cu"], [[0, 0, 0]])
    store.add([NewStructure(copper, "Cu")], in_set="mine")
    stream: dict[str, Any] = {
        "candidates": {
            "kind": "supercells", "prototype": "A1", "elements": [["Cu", "U"]],
            "volume_per_atom": {"U": 20.0},
        }
    }  # fmt: skip
    plan = demo_plan("new", tmp_path, tmp_path / "report.html")
    values = plan.model_dump(mode="json")
    with pytest.raises(InputError, match="is not asked to know U"):
        campaigns.create(
            launchpad, type(plan)(**values, stream=stream),
            candidates="mine", references="mine",
        )  # fmt: skip
    assert store.sets() == ["mine"]
    stream["filters"] = {"exclude": ["U"]}
    plan = type(plan)(**values, stream=stream)
    assert campaigns.create(launchpad, plan, candidates="mine", references="mine") == 1


def test_a_timestep_that_is_unsafe_is_told_before_anything_runs(
    tmp_path: Path, caplog: Any
) -> None:
    plan = demo_plan("new", tmp_path, tmp_path / "report.html")
    plan.check()
    assert not caplog.records
    config = plan.md.config.model_copy(update={"timestep_fs": 12.0})
    plan.model_copy(
        update={"md": plan.md.model_copy(update={"config": config})}
    ).check()
    assert "campaign new: a timestep of 12 fs is long" in caplog.text


def test_a_potential_that_needs_charges_refuses_structures_without(
    launchpad: Any, tmp_path: Path
) -> None:
    store = StructureStore(open_database(launchpad))
    salt = Structure(Lattice.cubic(5.6), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    charged = salt.copy(site_properties={"charge": [1.0, -1.0]})
    store.add([NewStructure(salt, "bare"), NewStructure(charged, "ions")], in_set="all")
    store.add([NewStructure(charged, "ions")], in_set="ions")
    plan = demo_plan("new", tmp_path, tmp_path / "report.html")
    potential = PotentialChoice(
        name={
            "name": "salt",
            "pair_style": "born/coul/dsf 0.25 9.0",
            "pair_coeff": [
                "Na Na 0.2637 0.3170 2.340 1.0486 -0.4993",
                "Na Cl 0.2110 0.3170 2.755 6.9906 -8.6758",
                "Cl Cl 0.1582 0.3170 3.170 72.4022 -145.4285",
            ],
            "elements": ["Na", "Cl"],
            "charges": "given",
        },
        elements=("Na", "Cl"),
    )
    plan = plan.model_copy(update={"relaxation": RelaxationMethod(potential=potential)})
    with pytest.raises(InputError, match="1 structures have none, such as 'bare'"):
        campaigns.create(launchpad, plan, candidates="all", references="ions")
    # They have charges: what is refused comes after.
    with pytest.raises(InputError, match="have no structure of Cl, Na alone"):
        campaigns.create(launchpad, plan, candidates="ions", references="ions")
    assert store.sets() == ["all", "ions"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot read the plan"),
        ("name: x y\ntop_q: 3\n", "name: .*; .*top_q: "),
        (None, "cannot read the plan"),
    ],
)
def test_what_is_no_plan_is_refused_with_all_its_faults(
    tmp_path: Path, text: str | None, words: str
) -> None:
    file = tmp_path / "plan.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=words):
        campaigns.read_plan(file)


# ----------------------------------------------------------------------------- status


def test_status_counts_by_stage_state_and_cause_in_one_query(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submit_many(launchpad, map(pair, "abcd"))
    submit_many(launchpad, [pair(name, "os.no_such_thing") for name in "uvxyz"])
    run_all(launchpad, tmp_path, monkeypatch)
    submit_many(launchpad, map(pair, "ef"))
    errors = [
        LostRunError("gone", evidence={"cause": "node"}),
        OutOfMemoryError("no memory"),
        SimulationError("LAMMPS failed", evidence={"class": "disk_full"}),
        DiskFullError("no space left"),
        None,  # of FireWorks' own files: there is only the traceback
    ]
    failed = launchpad.launches.find({"state": "FIZZLED"})
    for launch, error in zip(list(failed), errors, strict=True):
        exception = "action.stored_data._exception"
        change: dict[str, Any] = {
            f"{exception}._stacktrace": "OSError: [Errno 28] No space left on device: "
            "'/scratch/FW.json'"
        }
        if error is not None:
            change = {f"{exception}._details": error.to_dict()}
        launchpad.launches.update_one(
            {"launch_id": launch["launch_id"]}, {"$set": change}
        )
    questions: list[str] = []
    for name in ("aggregate", "find", "find_one", "count_documents"):
        function = getattr(type(launchpad.fireworks), name)
        monkeypatch.setattr(
            type(launchpad.fireworks), name, counted(function, name, questions)
        )

    status = campaign_status(launchpad.db, "c")

    # mongomock looks launches up by itself; a server answers one aggregation.
    assert questions.count("aggregate") == 1
    assert list(status.stages) == ["first", "second"]
    assert status.stages["first"] == {"COMPLETED": 4, "FIZZLED": 5, "READY": 2}
    assert status.stages["second"] == {"COMPLETED": 4, "WAITING": 7}
    assert status.causes == {"first": {"node": 1, "oom": 1, "disk": 3}}
    # Eight within the last minute, which counts as a whole one; nine remain.
    assert status.per_hour == pytest.approx(480.0)
    assert status.eta_s == pytest.approx(9 / 480 * 3600)
    # The same as by the errors themselves, which a rerun goes by.
    attempts = plan_reruns(launchpad.db, campaign="c")
    assert Counter(a.failure for a in attempts) == status.causes["first"]
    (unnamed,) = [a.error for a in attempts if "FW.json" in a.error.message]
    assert unnamed.evidence["path"] == "/scratch/FW.json"


def counted(
    function: Callable[..., Any], name: str, questions: list[str]
) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        questions.append(name)
        return function(*args, **options)

    return call


def test_an_old_completion_is_no_pace(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submit_many(launchpad, [pair("a")])
    run_all(launchpad, tmp_path, monkeypatch)
    submit_many(launchpad, [pair("b")])
    later = campaign_status(launchpad.db, "c", datetime.now(UTC) + timedelta(hours=3))
    assert (later.per_hour, later.eta_s) == (0.0, None)


# ------------------------------------------------------------- pause, resume, cancel


def test_a_paused_campaign_rests_and_goes_on(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submit_many(launchpad, map(pair, "abc"))
    other = Firework([PyTask(func="os.getcwd")], name="other")
    launchpad.add_wf(other)
    monkeypatch.chdir(tmp_path)
    launch_rocket(launchpad, FWorker(), fw_id=1, strm_lvl="CRITICAL")

    assert pause(launchpad, "c", slurm=False).changed == 5
    run_all(launchpad, tmp_path, monkeypatch)
    assert states(launchpad) == {
        ("first", "COMPLETED"): 1,
        ("first", "PAUSED"): 2,
        ("second", "PAUSED"): 3,
        ("other", "COMPLETED"): 1,
    }
    parked = launchpad.fireworks.find_one({"state": "PAUSED", "name": "first"})["fw_id"]
    launchpad.fireworks.update_one(
        {"fw_id": parked}, {"$set": {"spec.nanoos.parked": {"reason": "no account"}}}
    )
    assert campaign_status(launchpad.db, "c").parked == 1

    assert resume(launchpad, "c").changed == 4
    run_all(launchpad, tmp_path, monkeypatch)
    assert launchpad.get_fw_by_id(parked).state == "PAUSED"
    assert resume(launchpad, "c", parked=True).changed == 1
    run_all(launchpad, tmp_path, monkeypatch)
    assert {state for _, state in states(launchpad)} == {"COMPLETED"}
    history = CampaignStore(launchpad.db).get("c")["history"]
    assert [entry["what"] for entry in history] == ["paused", "resumed", "resumed"]


def test_cancel_ends_jobs_and_fireworks_but_no_shared_job(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submit_many(launchpad, map(pair, "abcd"))
    folder = str(tmp_path)
    reserved, reserved_launch = launchpad.reserve_fw(FWorker(), folder)
    launchpad.set_reservation_id(reserved_launch, 11)
    own, own_launch = launchpad.reserve_fw(FWorker(), folder)
    launchpad.set_reservation_id(own_launch, 12)
    launchpad.checkout_fw(FWorker(), folder, fw_id=own.fw_id)
    packed, _ = launchpad.checkout_fw(FWorker(), folder)  # in a job of many
    jobs = {"11": "PENDING", "12": "RUNNING", "13": "RUNNING"}
    said: list[str] = []

    def run_slurm(command: list[str], **_options: Any) -> str:
        said.append(" ".join(command))
        for job in command[1:]:
            jobs.pop(job)
        return ""

    def queued_jobs() -> dict[str, QueuedJob]:
        return {j: QueuedJob(j, j, s, "main", "", "") for j, s in jobs.items()}

    monkeypatch.setattr(campaigns, "run_slurm", run_slurm)
    monkeypatch.setattr(campaigns, "queued_jobs", queued_jobs)

    report = cancel(launchpad, "c", slurm=True)

    assert said == ["scancel 11", "scancel 12"]
    assert report.left_running == [packed.fw_id]
    found = {d["fw_id"]: d["state"] for d in launchpad.fireworks.find()}
    assert found.pop(packed.fw_id) == "RUNNING"
    assert set(found.values()) == {"DEFUSED"}
    assert not launchpad.run_exists(FWorker())
    launch = launchpad.launches.find_one({"launch_id": own_launch})
    cause = launch["action"]["stored_data"]["_exception"]["_details"]["evidence"]
    assert (launch["state"], cause["cause"]) == ("FIZZLED", "cancelled")
    assert found[reserved.fw_id] == "DEFUSED"


def test_pause_and_resume_leave_alone_what_was_defused_by_hand(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submit_many(launchpad, map(pair, "a"))
    reserved, launch = launchpad.reserve_fw(FWorker(), str(tmp_path))
    launchpad.set_reservation_id(launch, 11)
    (child,) = launchpad.get_wf_by_fw_id(reserved.fw_id).links[reserved.fw_id]
    launchpad.defuse_fw(child)
    jobs = {"11": QueuedJob("11", "11", "PENDING", "main", "", "")}
    monkeypatch.setattr(campaigns, "queued_jobs", lambda: jobs)
    monkeypatch.setattr(campaigns, "run_slurm", lambda *_args, **_options: "")
    assert pause(launchpad, "c", slurm=True).changed == 1
    assert resume(launchpad, "c").changed == 1
    assert states(launchpad) == {("first", "READY"): 1, ("second", "DEFUSED"): 1}


def test_cancel_keeps_what_completes_meanwhile(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submit_many(launchpad, map(pair, "a"))
    read = campaigns.fireworks_in

    def read_early(*args: Any) -> list[int]:
        found = read(*args)
        monkeypatch.setattr(campaigns, "fireworks_in", read)
        run_all(launchpad, tmp_path, monkeypatch)
        return found

    monkeypatch.setattr(campaigns, "fireworks_in", read_early)
    assert cancel(launchpad, "c", slurm=False).changed == 0
    assert states(launchpad) == {("first", "COMPLETED"): 1, ("second", "COMPLETED"): 1}
    assert launchpad.launches.count_documents({"state": "COMPLETED"}) == 2


def test_nothing_waits_for_a_workflow_that_a_dead_process_has_locked(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LOCK_WAIT_S", 0.2)
    submit_many(launchpad, map(pair, "ab"))
    launchpad.workflows.update_one({"nodes": 1}, {"$set": {"locked": True}})
    report = pause(launchpad, "c", slurm=False)
    assert (report.changed, len(report.locked)) == (2, 2)
    assert states(launchpad)["first", "PAUSED"] == 1
    assert resume(launchpad, "c").changed == 2
    assert cancel(launchpad, "c", slurm=False).locked == report.locked


# ---------------------------------------------------------------------------- archive


def test_an_archived_campaign_leaves_the_launchpad_for_a_file(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submit_many(launchpad, map(pair, "ab"))
    launchpad.add_wf(Firework([PyTask(func="os.getcwd")], name="other"))
    file = tmp_path / "c.jsonl.gz"
    with pytest.raises(InputError, match="4 fireworks"):
        archive(launchpad, "c", file)
    assert not file.exists()
    run_all(launchpad, tmp_path, monkeypatch)

    record = archive(launchpad, "c", file)

    assert record["sha256"] == sha256_file(file)
    text = gzip.decompress(file.read_bytes()).decode()
    lines = [json.loads(line) for line in text.splitlines()]
    kinds = Counter(line["collection"] for line in lines)
    assert kinds == {"workflows": 2, "fireworks": 4, "launches": 4}
    assert states(launchpad) == {("other", "COMPLETED"): 1}
    assert launchpad.launches.count_documents({}) == 1
    kept = CampaignStore(launchpad.db).get("c")["archive"]
    assert kept["status"]["states"] == {"COMPLETED": 4}
    with pytest.raises(InputError, match=r"nothing in the launchpad.*c\.jsonl\.gz"):
        archive(launchpad, "c", tmp_path / "second.gz")
    assert not (tmp_path / "second.gz").exists()

    submit_many(launchpad, map(pair, "a"))  # as if it was submitted again
    run_all(launchpad, tmp_path, monkeypatch)
    with pytest.raises(InputError, match="exists"):
        archive(launchpad, "c", file)
    archive(launchpad, "c", tmp_path / "second.gz")
    kept = CampaignStore(launchpad.db).get("c")["archive"]
    assert kept["file"] == str(tmp_path / "second.gz")
    assert [entry["file"] for entry in kept["earlier"]] == [str(file)]


# -------------------------------------------------------- the demonstration in a queue


@pytest.mark.parametrize("job_ends", [False, True])
def test_the_demonstration_is_watched_until_it_or_its_job_has_ended(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job_ends: bool
) -> None:
    from nanoos_fw import demo

    submit_many(launchpad, map(pair, "ab"))
    plan = demo.demo_plan("c", tmp_path, tmp_path / "report.html")
    alive = {"7": QueuedJob("7", "7", "RUNNING", "main", "", "")}
    monkeypatch.setattr(demo, "queued_jobs", lambda: alive)
    monkeypatch.chdir(tmp_path)

    def work_a_little(_seconds: float) -> None:
        launch_rocket(launchpad, FWorker(), strm_lvl="CRITICAL")
        if job_ends:
            alive.clear()

    monkeypatch.setattr(demo.time, "sleep", work_a_little)
    lines: list[str] = []
    outcome = demo.watch(launchpad, plan, "7", say=lines.append)
    assert outcome.failed == []
    assert lines[0] == "0 of 4 fireworks done; running: -"
    if job_ends:
        assert lines[1].startswith("1 of 4")
        assert "job 7 has ended before the campaign" in lines[-1]
    else:
        assert lines[-1].startswith("4 of 4")
