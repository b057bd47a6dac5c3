"""Needs of fireworks from the size of their work, and what the queue is asked for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fireworks import Firework, PyTask, Workflow
from pymatgen.core import Lattice, Structure

from nanoos_fw.demo import demo_plan
from nanoos_fw.errors import LaunchError
from nanoos_fw.firetasks import FeaturizeStructuresTask
from nanoos_fw.operations import estimates, submission, submit_many
from nanoos_fw.operations.estimates import KINDS, set_needs, sized_plan
from nanoos_fw.operations.memory import memory_needs
from nanoos_fw.operations.submission import ClusterLimits
from nanoos_fw.queue_adapter import SlurmAdapter, sized_request
from nanoos_fw.slurm import parse_cluster, slurm_request
from nanoos_fw.slurm.limits import SubmitLimit, parse_limits
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.structures import NewStructure, StructureStore
from nanoos_fw.workflows import screening_workflow


@pytest.fixture
def keys(launchpad: Any) -> list[str]:
    """Forty structures of two sites, and one of sixteen."""
    store = StructureStore(open_database(launchpad))
    made = [
        Structure(
            Lattice.cubic(3 + n / 100), ["Cu", "Au"], [[0, 0, 0], [0.5, 0.5, 0.5]]
        )
        for n in range(41)
    ]
    made[-1] = made[-1] * (2, 2, 2)
    entries = [NewStructure(structure=s, label=f"s{n}") for n, s in enumerate(made)]
    return store.add(entries, in_set="all").keys


def featurization(structures: list[str], **nanoos: Any) -> Workflow:
    part = {"stage": "featurize", "campaign": "c", **nanoos}
    task = FeaturizeStructuresTask(structures=structures)
    key = f"{len(structures)} {structures[0]} {nanoos}"
    return Workflow([Firework([task], spec={"nanoos": part})], metadata={"key": key})


def needs_of(launchpad: Any) -> list[dict[str, Any]]:
    return [
        document["spec"]["nanoos"]["needs"]
        for document in launchpad.fireworks.find().sort("fw_id", 1)
        if "needs" in document["spec"].get("nanoos", {})
    ]


def completed(launchpad: Any, fw_id: int, seconds: float, **stored: Any) -> None:
    launchpad.fireworks.update_one({"fw_id": fw_id}, {"$set": {"state": "COMPLETED"}})
    launchpad.launches.insert_one(
        {
            "launch_id": fw_id, "fw_id": fw_id, "state": "COMPLETED",
            "runtime_secs": seconds, "action": {"stored_data": stored},
        }
    )  # fmt: skip


def test_a_campaign_gets_needs_from_its_plan(
    launchpad: Any, keys: list[str], tmp_path: Path
) -> None:
    plan = demo_plan("c", tmp_path, tmp_path / "report.html").model_copy(
        update={"top_k": 2, "md_runs": 1}
    )
    workflow = screening_workflow(plan, keys[2:], keys[:2])
    set_needs(launchpad.db, [workflow])
    needs = {
        firework.spec["nanoos"]["stage"]: firework.spec["nanoos"]["needs"]
        for firework in workflow.fws
    }
    assert needs.keys() >= {"label", "train", "screen", "md", "report"}
    labelled = round(39 * plan.label_fraction)
    epochs = plan.training.epochs * plan.training.ensemble_size
    mean = (40 * 2 + 16) / 41
    assert needs["references"]["amount"] == 4
    assert needs["train"]["amount"] == pytest.approx(labelled * mean * epochs, rel=0.01)
    config = plan.md.config
    steps = config.equilibration_steps + config.num_steps
    atoms = 2 * config.supercell_min_atoms
    assert needs["md"]["amount"] == atoms * steps
    assert needs["md"]["ntasks"] == max(1, atoms // 250)
    for need in needs.values():
        assert 0 < need["minimum_s"] <= need["expected_s"]
        assert need["source"] == "no such work was measured yet"
    assert all(need["memory_mib"] >= 400 for need in needs.values())
    assert needs["md"]["rank_memory_mib"] > needs["rank"]["rank_memory_mib"] == 0
    assert needs["screen"]["memory_mib"] > needs["report"]["memory_mib"]
    # Training and dynamics go on where they were stopped: a minute is worth it.
    assert needs["train"]["minimum_s"] <= 60
    assert needs["rank"]["minimum_s"] == needs["rank"]["expected_s"]


def test_amounts_follow_the_sites_and_the_keys_stay(
    launchpad: Any, keys: list[str]
) -> None:
    written = {"minimum_s": 7.0}
    made = [
        featurization(keys[:40]),
        featurization(keys),
        featurization(keys, needs=written),
    ]
    assert submit_many(launchpad, made) == (3, 0)
    small, large, own = needs_of(launchpad)
    assert (small["amount"], large["amount"]) == (80, 96)
    assert small["walltime"] == "0:10:00"
    assert own == written
    again = [featurization(keys[:40]), featurization(keys)]
    assert submit_many(launchpad, again) == (0, 0)


def test_what_was_measured_goes_before_the_constants(
    launchpad: Any, keys: list[str]
) -> None:
    """The slow one in ten decides; found results and other campaigns do not count."""
    submit_many(launchpad, (featurization([key]) for key in keys[:12]))
    for fw_id in range(1, 11):
        completed(launchpad, fw_id, 10.0 * fw_id)  # two sites each
    completed(launchpad, 11, 0.001, hit=1)
    completed(launchpad, 12, 0.001, out_of_time={"kind": "out_of_time"})
    submit_many(
        launchpad, [featurization(keys[:40]), featurization(keys, campaign="other")]
    )
    own, other = needs_of(launchpad)[-2:]
    per_site = (90 + 0.1 * 10) / 2  # quantile 0.9 of 10, 20, … 100 s
    assert own["expected_s"] == pytest.approx(estimates.START_S + 80 * per_site)
    assert own["source"] == "10 fireworks of campaign c"
    assert other["source"] == "10 fireworks of all campaigns"
    minutes = (2 * own["expected_s"] + 120) / 60
    hours, rest, seconds = map(int, own["walltime"].split(":"))
    assert minutes <= 60 * hours + rest < minutes + 5
    assert seconds == 0


def test_work_of_unknown_kinds_has_no_needs(launchpad: Any, keys: list[str]) -> None:
    task = FeaturizeStructuresTask(structures=keys)
    both = Firework([task, PyTask(func="os.getcwd")], spec={"nanoos": {}})
    foreign = Firework([task], spec={})
    submit_many(
        launchpad,
        [Workflow([f], metadata={"key": n}) for n, f in (("b", both), ("f", foreign))],
    )
    assert needs_of(launchpad) == []


PARTITIONS = """\
PartitionName=cpu Default=YES State=UP MaxTime=01:00:00 MaxNodes=4 QoS=small
PartitionName=long Default=NO State=UP MaxTime=02:00:00 MaxNodes=4 QoS=N/A
"""


def test_work_that_no_partition_has_time_for_is_told(
    launchpad: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    nodes = "cpu|n1|8|16000|(null)|idle\nlong|n1|8|16000|(null)|idle"

    def cluster() -> Any:
        asked.append(1)
        return parse_cluster(PARTITIONS, nodes, "ClusterName = c")

    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/sinfo")
    monkeypatch.setattr("nanoos_fw.slurm.read_cluster", cluster)
    monkeypatch.setattr(submission, "_BATCH", 2)
    resources = {"walltime": "1:30:00"}

    def asking(number: int, minimum_s: float) -> Workflow:
        spec = {"nanoos": {"needs": {"minimum_s": minimum_s}},
                "_queueadapter": resources}  # fmt: skip
        firework = Firework([PyTask(func="os.getcwd")], spec=spec, name="rank all")
        return Workflow([firework], metadata={"key": f"{number}"})

    submit_many(launchpad, (asking(n, 60.0) for n in range(6)))
    assert asked == [1]  # once, not for each of three batches or six workflows
    assert caplog.text == ""
    submit_many(launchpad, [asking(7, 4 * 3600.0)])
    assert "'rank all' needs about 4.0 h at once" in caplog.text
    assert "no partition gives more than 2.0 h" in caplog.text
    assert ClusterLimits().cluster is not None


# ------------------------------------------------------------------------- chunk sizes


def test_chunks_follow_the_sizes_and_stay_with_the_stored_plan(
    launchpad: Any, keys: list[str], tmp_path: Path
) -> None:
    plan = demo_plan("c", tmp_path, tmp_path / "report.html")
    relax = KINDS["RelaxStructuresTask"].unit_s
    sized = sized_plan(launchpad.db, plan, {"structures_per_firework"}, keys[:40])
    assert sized.structures_per_firework == plan.structures_per_firework
    assert sized.relaxations_per_firework == int(600 / (relax * 2))
    large = sized_plan(launchpad.db, plan, set(), keys[40:])
    assert large.relaxations_per_firework == int(600 / (relax * 16))

    CampaignStore(launchpad.db).create("c", sized.model_dump(mode="json"))
    again = sized_plan(launchpad.db, plan, {"structures_per_firework"}, keys[40:])
    assert again == sized


# ------------------------------------------------------------------------ what is asked

FILE = {"queue": "cpu", "nodes": 2, "ntasks": 8, "walltime": "24:00:00",
        "mem_per_cpu": "2G"}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "needs", "own", "expected"),
    [
        (FILE, {}, {}, {}),
        (FILE, {"walltime": "0:30:00"}, {}, {"walltime": "0:30:00"}),
        (FILE, {"walltime": "48:00:00"}, {}, {}),
        (FILE, {"walltime": "0:30:00"}, {"walltime": "24:00:00"}, {}),
        ({**FILE, "time_min": "1:00:00"}, {"walltime": "0:30:00"}, {}, {}),
        ({"queue": "cpu"}, {"walltime": "0:30:00"}, {}, {"walltime": "0:30:00"}),
        (FILE, {"ntasks": 3}, {}, {"ntasks": 3, "nodes": 1}),
        (FILE, {"ntasks": 5}, {}, {"ntasks": 5, "nodes": 2}),
        (FILE, {"ntasks": 64}, {}, {}),
        (FILE, {"ntasks": 3}, {"ntasks": 8}, {}),
        (FILE, {"ntasks": 3}, {"mem": "64G"}, {}),
        (
            {"nodes": 2, "ntasks_per_node": 4}, {"ntasks": 3}, {},
            {"nodes": 1, "ntasks": 3, "ntasks_per_node": 3},
        ),
    ],
)  # fmt: skip
def test_no_more_is_asked_for_than_is_needed_and_explicit_fields_stay(
    file: dict[str, Any], needs: Any, own: Any, expected: dict[str, Any]
) -> None:
    request = slurm_request(file).with_overrides(own)
    found = sized_request(request, needs, own)
    assert found == request.with_overrides(expected)


PARTITION = parse_cluster(
    partitions="PartitionName=cpu MinNodes=2 State=UP\n",
    nodes="cpu|n1|16|6000|(null)|idle\ncpu|n2|16|6000|(null)|idle\n",
    config="ClusterName = mat\n",
).partition("cpu")


@pytest.mark.parametrize(
    ("file", "memory", "own", "expected"),
    [
        ({"mem": "1G"}, (900, 50), {}, {}),
        ({"mem": "1G"}, (1200, 50), {}, {"mem": "1250M"}),
        ({"mem": "1G"}, (9000, 0), {}, {"mem": "6000M"}),  # what a node has
        ({"mem": "1G"}, (9000, 0), {"mem": "1G"}, {}),
        ({"mem": "1G"}, (9000, 0), {"mem_per_cpu": "2G"}, {}),
        ({"mem": 0}, (9000, 0), {}, {}),
        ({}, (9000, 0), {}, {}),
        ({"nodes": 2, "ntasks": 8, "mem_per_cpu": "250M"}, (900, 25), {}, {}),
        (
            {"nodes": 2, "ntasks": 8, "mem_per_cpu": "250M"}, (900, 50), {},
            {"mem": "1100M"},
        ),
        (
            {"ntasks": 1, "cpus_per_task": 4, "mem_per_cpu": "250M"}, (900, 101), {},
            {"mem": "1001M"},
        ),
    ],
)  # fmt: skip
def test_memory_is_asked_for_where_the_file_gives_less(
    file: dict[str, Any], memory: tuple[int, int], own: Any, expected: dict[str, Any]
) -> None:
    needs = {"memory_mib": memory[0], "rank_memory_mib": memory[1]}
    request = slurm_request(file).with_overrides(own)
    found = sized_request(request, needs, own, PARTITION)
    assert found == request.with_overrides(expected)
    assert sized_request(request, needs, own) == request  # who knows what a node has


def test_nodes_are_not_lowered_below_what_the_partition_takes() -> None:
    request = slurm_request({"nodes": 3, "ntasks": 12})
    assert sized_request(request, {"ntasks": 2}, {}).nodes == 1
    assert sized_request(request, {"ntasks": 2}, {}, PARTITION).nodes == 2


@pytest.mark.parametrize(
    ("atoms", "measured_mib"),
    [(4_000, 132), (32_000, 211), (108_000, 513), (256_000, 1139)],
)
def test_memory_of_large_simulations_is_enough_and_no_multiple(
    atoms: int, measured_mib: int
) -> None:
    """Peaks of scripts/benchmarks/memory.py with embedded atoms on one rank."""
    job, rank = memory_needs("RunMDTask", {}, atoms=float(atoms), largest=4.0, mean=4.0)
    assert job + rank > 1.2 * measured_mib
    assert job + rank - 600 < 2 * measured_mib


def test_memory_follows_the_size_of_the_work() -> None:
    def needs(name: str, **size: Any) -> tuple[float, float]:
        task = size.pop("task", {})
        sizes = {"atoms": 0.0, "largest": 10.0, "mean": 10.0, **size}
        return memory_needs(name, task, **sizes)

    small, large = (needs("RunMDTask", atoms=n) for n in (1000.0, 1_000_000.0))
    assert large[0] - small[0] == pytest.approx(1.5 * 999_000 * 5 / 1024)
    assert small[1] == large[1] > 0
    task = {"training": {"batch_size": 32}}
    wide = {"training": {"batch_size": 256, "hidden_dim": 128}}
    assert needs("TrainModelTask", task=wide)[0] > needs("TrainModelTask", task=task)[0]
    few, many = (needs("FeaturizeStructuresTask", largest=n) for n in (10.0, 1e5))
    assert many[0] > few[0]


def test_the_script_of_a_reserved_firework_asks_for_what_it_needs(
    launchpad: Any, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit_many(launchpad, [featurization(keys)])
    monkeypatch.setattr(SlurmAdapter, "_launchpad", lambda _self: launchpad)
    monkeypatch.setattr("nanoos_fw.queue_adapter._known_partition", lambda _: PARTITION)
    command = "rlaunch singleshot"
    reserved = SlurmAdapter({**FILE, "rocket_launch": f"{command} --fw_id 1"})
    assert "--time=0:10:00" in reserved.get_script_str("/tmp")
    plain = SlurmAdapter({**FILE, "rocket_launch": command})
    assert "--time=24:00:00" in plain.get_script_str("/tmp")


# ------------------------------------------------------------------------------- limits

ASSOCIATIONS = """\
physics||normal|200
physics|cpu|normal|40
other||normal|1
"""
QUALITIES = "normal|100\nsmall|7\nhigh|5\nfree|\n"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"queue": "cpu", "account": "physics"},
            {("account physics", 200, None), ("account physics", 40, "cpu"),
             ("QOS normal", 100, None), ("partition cpu", 7, "cpu")},
        ),
        (
            {"queue": "long", "account": "physics", "qos": "high"},
            {("account physics", 200, None), ("QOS high", 5, None)},
        ),
        ({"queue": "long", "account": "other"},
         {("account other", 1, None), ("QOS normal", 100, None)}),
        ({"account": "none"}, {("partition cpu", 7, "cpu")}),
    ],
)  # fmt: skip
def test_limits_of_accounting_that_apply(
    fields: dict[str, Any], expected: set[Any]
) -> None:
    found = parse_limits(slurm_request(fields), ASSOCIATIONS, QUALITIES, PARTITIONS)
    assert {(n.source, n.jobs, n.partition) for n in found} == expected


@pytest.mark.parametrize("comes_free", [True, False])
def test_a_full_queue_is_waited_for_and_then_given_back(
    monkeypatch: pytest.MonkeyPatch, comes_free: bool
) -> None:
    """The user has fifty jobs, of which some end while the adapter waits."""
    from nanoos_fw import queue_adapter

    now = datetime(2026, 1, 1, tzinfo=UTC)
    clock = [now]
    jobs = {"cpu": 5, None: 50}
    submitted: list[Any] = []

    def sleep(seconds: float) -> None:
        clock[0] += timedelta(seconds=seconds)
        if comes_free and clock[0] - now > timedelta(seconds=50):
            jobs["cpu"] = 4

    def sbatch(command: list[str], **_options: Any) -> str:
        submitted.append(command)
        return "77\n"

    def seconds_of(span: timedelta) -> float:
        return span.total_seconds()

    given_back: list[LaunchError] = []
    for name, value in (
        ("jobs_of", lambda _user, partition: jobs[partition]),
        ("run_slurm", sbatch),
        ("submit_limits", lambda *_: [SubmitLimit(51, None, "QOS normal")]),
        ("_asked", {}),
    ):
        monkeypatch.setattr(queue_adapter, name, value)
    monkeypatch.setattr(queue_adapter.time, "sleep", sleep)
    monkeypatch.setattr(
        queue_adapter.time, "monotonic", lambda: seconds_of(clock[0] - now)
    )
    monkeypatch.setattr(
        SlurmAdapter,
        "_give_back",
        lambda _self, error: given_back.append(error) or "given back",
    )
    command = "rlaunch singleshot --fw_id 1"
    fields = {"queue": "cpu", "max_jobs": 5, "rocket_launch": command}
    adapter = SlurmAdapter(fields)
    answer = adapter.submit_to_queue("script")
    if comes_free:
        assert (answer, len(submitted)) == (77, 1)
        assert clock[0] - now < timedelta(seconds=90)
    else:
        assert (answer, submitted) == ("given back", [])
        assert "5 of 5 jobs (my_qadapter.yaml)" in str(given_back[0])
        # Before reconcile would take it for a submission that has died.
        assert clock[0] - now < timedelta(minutes=10)
    assert "max_jobs" not in SlurmAdapter(fields).request.model_dump()
