"""Campaigns through plain ``qlaunch`` on a real SLURM cluster and a real server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from processes import HANGING_S, wait_for
from slurm_jobs import slurm
from small_campaign import NAME, rows, small_plan

from nanoos_fw.cli import main
from nanoos_fw.operations.cluster_files import CATEGORIES
from nanoos_fw.parallel import RANKS_LOCK
from nanoos_fw.slurm import ended_jobs, has_accounting
from nanoos_fw.stores.database import load_launchpad
from nanoos_fw.stores.launches import SPEC_KEY

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.mongodb,
    pytest.mark.mpi,
    pytest.mark.lammps,
]

BIN = Path(sys.executable).parent


@pytest.fixture
def cluster(mongodb_database: Any, tmp_path: Path) -> Path:
    """Folder of the files that ``nanoos init --slurm`` writes for a fresh database."""
    folder = tmp_path / "cluster"
    uri = os.environ["NANO_OS_TEST_MONGODB_URI"]
    words = ["init", "--slurm", "--dir", str(folder), "--mongodb", uri]
    assert main([*words, "--database", mongodb_database.name]) == 0
    return folder


@contextlib.contextmanager
def submitting(cluster: Path, *categories: str) -> Iterator[None]:
    """Run ``qlaunch -r rapidfire`` for some or all categories, as users do."""
    loops = []
    for category in categories or CATEGORIES:
        log = (cluster / category / "qlaunch.log").open("wb")
        command = [str(BIN / "qlaunch"), "-r", "rapidfire"]
        command += ["--nlaunches", "infinite", "--sleep", "1"]
        with log:
            loops.append(
                subprocess.Popen(
                    command,
                    cwd=cluster / category,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        yield
        assert all(loop.poll() is None for loop in loops), "qlaunch ended"
    finally:
        for loop in loops:
            loop.send_signal(signal.SIGTERM)
        for loop in loops:
            loop.wait(timeout=HANGING_S)


def states(database: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for document in database["fireworks"].find({}, {"state": 1}):
        found[document["state"]] = found.get(document["state"], 0) + 1
    return found


def wait_until_ended(database: Any, cluster: Path) -> None:
    """Wait until no firework can run any more."""

    def evidence() -> object:
        logs = [p.read_text()[-500:] for p in cluster.glob("*/qlaunch.log")]
        return states(database), logs, slurm("squeue")

    wait_for(
        lambda: not set(states(database)) - {"COMPLETED", "FIZZLED", "DEFUSED"},
        evidence,
        every_s=0.2,
    )


def failures(database: Any) -> list[Any]:
    return [
        launch["action"] for launch in database["launches"].find({"state": "FIZZLED"})
    ]


def submit_campaign(cluster: Path, folder: Path, **changes: Any) -> Any:
    """Submit the small campaign with one firework a stage, and return its plan."""
    from nanoos_fw import demo

    launchpad = load_launchpad(cluster / "my_launchpad.yaml")
    few = {"relaxations_per_firework": 60, "structures_per_firework": 60}
    plan = small_plan(folder).model_copy(update={**few, **changes})
    demo.submit(launchpad, plan, verify=False)
    return plan


def set_queueadapter(database: Any, stage: str, resources: Mapping[str, Any]) -> None:
    database["fireworks"].update_many(
        {f"spec.{SPEC_KEY}.stage": stage},
        {"$set": {"spec._queueadapter": dict(resources)}},
    )


def test_a_campaign_runs_through_qlaunch_and_the_queue(
    cluster: Path, mongodb_database: Any, tmp_path: Path
) -> None:
    """Featurize, train on two nodes, screen, simulate; untouched files of init."""
    plan = submit_campaign(cluster, tmp_path)
    set_queueadapter(
        mongodb_database, "train", {"nodes": 2, "ntasks": 2, "ntasks_per_node": 1}
    )

    with submitting(cluster):
        wait_until_ended(mongodb_database, cluster)

    assert states(mongodb_database).keys() == {"COMPLETED"}, failures(mongodb_database)
    found = rows(mongodb_database)  # fails on a double row
    assert len(found["ranking"]) == plan.top_k
    assert len(found["features"]) == len(found["structures"]) - 4  # the elements
    kinds = [kind for kind, _ in found["simulations"]]
    assert kinds.count("md") == plan.md_runs
    model = mongodb_database["models"].find_one({"name": plan.model_name})
    assert model["environment"]["ranks"] == 2
    train = mongodb_database["fireworks"].find_one({f"spec.{SPEC_KEY}.stage": "train"})
    launch = mongodb_database["launches"].find_one({"fw_id": train["fw_id"]})
    job = launch["state_history"][0]["reservation_id"]
    assert ended_jobs([job], accounting=has_accounting())[job].nodes == "n[1-2]"


def test_the_same_campaign_runs_through_packed_workers(
    cluster: Path, mongodb_database: Any, tmp_path: Path
) -> None:
    """Two jobs: one of two slots with a rank each, one of a slot with two ranks.

    Only the second may take the training, which asks for two tasks.
    """
    plan = submit_campaign(
        cluster,
        tmp_path,
        md_runs=6,
        top_k=6,
        relaxations_per_firework=9,
        structures_per_firework=14,
    )
    set_queueadapter(mongodb_database, "train", {"ntasks": 2})
    script = str(cluster / "work.sh")
    jobs = [
        slurm("sbatch", "--parsable", f"--chdir={tmp_path}", script, "--slots", slots)
        .strip()
        .partition(";")[0]
        for slots in ("2", "1")
    ]

    def logs() -> str:
        return "".join(p.read_text() for p in tmp_path.glob("nanoos_work-*"))

    try:
        wait_for(
            lambda: not set(states(mongodb_database)) - {"COMPLETED", "FIZZLED"},
            lambda: (states(mongodb_database), logs(), slurm("squeue")),
            every_s=0.2,
        )
        (cluster / "work" / "drain").touch()
        wait_for(
            lambda: not slurm("squeue", "--noheader", f"-j{jobs[0]},{jobs[1]}"),
            logs,
            every_s=0.2,
        )
    finally:
        slurm("scancel", *jobs)

    assert states(mongodb_database).keys() == {"COMPLETED"}, (
        failures(mongodb_database),
        logs(),
    )
    found = rows(mongodb_database)  # fails on a double row
    assert len(found["ranking"]) == plan.top_k
    assert [kind for kind, _ in found["simulations"]].count("md") == 6
    launches = list(mongodb_database["launches"].find())
    places = {p["_id"]: p for p in mongodb_database["launch_places"].find()}
    assert {launch["launch_id"] for launch in launches} == set(places)
    for launch in launches:
        place = places[launch["launch_id"]]
        slurm_ids = place["slurm"]
        assert slurm_ids["array_job_id"] in jobs
        assert slurm_ids["array_task_id"] == "0"
        name = f"worker-{slurm_ids['array_job_id']}-0-{slurm_ids['node']}"
        assert launch["fworker"]["name"] == f"{name}-slot{place['slot']['number']}"
    two_slots = [p for p in places.values() if p["slurm"]["array_job_id"] == jobs[0]]
    assert {p["slot"]["number"] for p in two_slots} == {1, 2}
    model = mongodb_database["models"].find_one({"name": plan.model_name})
    assert model["environment"]["ranks"] == 2
    train = mongodb_database["fireworks"].find_one({f"spec.{SPEC_KEY}.stage": "train"})
    assert places[train["launches"][-1]]["slurm"]["array_job_id"] == jobs[1]
    assert logs().count("leaves: drained") == 3


def qlaunch_once(folder: Path) -> str:
    done = subprocess.run(
        [str(BIN / "qlaunch"), "-r", "rapidfire"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        check=False,
    )
    return done.stdout + done.stderr


def test_a_job_that_slurm_refuses_is_parked_and_the_others_go_on(
    cluster: Path, mongodb_database: Any, tmp_path: Path
) -> None:
    """The refused ones come first, and would end the loop of qlaunch each time."""
    from fireworks import Firework, PyTask

    launchpad = load_launchpad(cluster / "my_launchpad.yaml")
    for name, request, priority in (
        ("partition", {"queue": "nowhere"}, 3),
        ("misspelt", {"memory": "4G"}, 2),
        ("good", {"ntasks": 1}, 1),
        ("plain", None, 0),
    ):
        spec = {"_category": "prep", "_priority": priority, SPEC_KEY: {"campaign": "c"}}
        if request is not None:
            spec["_queueadapter"] = request
        launchpad.add_wf(Firework([PyTask(func="os.getcwd")], spec=spec, name=name))

    said = qlaunch_once(cluster / "prep")
    ended = {"COMPLETED", "FIZZLED", "PAUSED"}
    wait_for(
        lambda: not set(states(mongodb_database)) - ended, lambda: said, every_s=0.2
    )

    found = {d["name"]: d for d in mongodb_database["fireworks"].find()}
    assert {n: d["state"] for n, d in found.items()} == {
        "partition": "PAUSED",
        "misspelt": "PAUSED",
        "good": "COMPLETED",
        "plain": "COMPLETED",
    }, said
    reasons = {
        n: found[n]["spec"][SPEC_KEY]["parked"]["reason"]
        for n in found
        if found[n]["state"] == "PAUSED"
    }
    assert "invalid partition" in reasons["partition"]
    assert "memory" in reasons["misspelt"]

    # Corrected, it runs.
    mongodb_database["fireworks"].update_one(
        {"name": "partition"}, {"$set": {"spec._queueadapter": {"nodes": 1}}}
    )
    launchpad.resume_fw(found["partition"]["fw_id"])
    # What is wrong with the file parks nobody.
    path = cluster / "prep" / "my_qadapter.yaml"
    text = path.read_text()
    path.write_text(text.replace('queue: "main"', 'queue: "nowhere"'))
    said = qlaunch_once(cluster / "prep")
    assert "invalid partition" in said
    assert states(mongodb_database) == {"PAUSED": 1, "COMPLETED": 2, "READY": 1}
    path.write_text(text)
    said = qlaunch_once(cluster / "prep")
    wait_for(
        lambda: states(mongodb_database) == {"PAUSED": 1, "COMPLETED": 3}, lambda: said
    )


# ------------------------------------------------------------------- walltime and kills


def submit_simulations(
    cluster: Path,
    folder: Path,
    *,
    steps: int,
    runs: int = 1,
    campaign: str = NAME,
    **spec: Any,
) -> Any:
    """Submit simulations of some alloys, a workflow each, and return the plan."""
    from fireworks import Firework, Workflow

    from nanoos_fw import operations
    from nanoos_fw.firetasks import RelaxStructuresTask, RunMDTask
    from nanoos_fw.operations.alloys import alloy_candidates
    from nanoos_fw.stores.campaigns import CampaignStore
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.structures import StructureStore

    launchpad = load_launchpad(cluster / "my_launchpad.yaml")
    database = open_database(launchpad)
    plan = small_plan(folder)
    config = plan.md.config.model_copy(
        update={
            "equilibration_steps": 1000,
            "num_steps": steps,  # in thousands: the thermo table ends with the run
            "thermo_every": 1000,
            "dump_every": 5000,
            "restart_every": 20_000,
        }
    )
    method = plan.md.model_copy(update={"config": config})
    plan = plan.model_copy(update={"name": campaign, "md": method})
    elements = plan.relaxation.potential.elements
    keys = StructureStore(database).add(alloy_candidates(elements), in_set="all").keys
    campaigns = CampaignStore(database)
    campaigns.create(plan.name, plan.model_dump(mode="json"))
    campaigns.record(plan.name, ranking=list(keys[:runs]))
    relax = plan.relaxation.model_dump(mode="json")
    for rank in range(1, runs + 1):
        firework = Firework(
            [
                RelaxStructuresTask(structures=[keys[rank - 1]], method=relax),
                RunMDTask(
                    campaign=plan.name,
                    rank=rank,
                    relaxation=relax,
                    md=plan.md.model_dump(mode="json"),
                ),
            ],
            name=f"simulation {rank}",
            spec={
                "_category": "md",
                "_add_launchpad_and_fw_id": True,
                SPEC_KEY: {
                    "campaign": plan.name,
                    "stage": "md",
                    "order": 8,
                    "work_root": str(folder / "work"),
                },
                **spec,
            },
        )
        workflow = Workflow([firework], metadata={"key": f"{campaign} {rank}"})
        assert operations.submit(launchpad, workflow)
    return plan


def assert_complete(database: Any, plan: Any, runs: int = 1) -> None:
    """Every simulation is there once, with all its steps, each step once."""
    found = list(database["simulations"].find({"kind": "md"}))
    assert len(found) == runs
    total = plan.md.config.equilibration_steps + plan.md.config.num_steps
    for row in found:
        assert row["status"] == "done"
        assert row["result"]["steps"] == total
        steps = row["result"]["thermo"]["step"]
        assert steps[0] == 0
        assert steps[-1] == total
        assert steps == sorted(set(steps))


def ranks_of(output: Path) -> list[int]:
    """Return the processes that work in a folder: each holds its lock file open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.readlink() == output / RANKS_LOCK:
                found.append(int(link.parts[2]))
    return sorted(set(found))


def test_a_simulation_longer_than_its_walltime_goes_on_by_itself(
    cluster: Path, mongodb_database: Any, tmp_path: Path
) -> None:
    """One minute is the shortest limit that SLURM has.

    However fast the machine is, the simulation is longer: it is frozen until the time
    by which it has to stop.
    """
    plan = submit_simulations(
        cluster,
        tmp_path,
        steps=60_000,
        _queueadapter={"walltime": 1, "ntasks": 1},
    )

    with submitting(cluster, "md"):
        progress = wait_for_progress(tmp_path)
        deadline = json.loads((progress.parent / "md.json").read_text())["deadline"]
        ranks = ranks_of(progress.parent)
        assert ranks
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        try:
            wait_for(lambda: time.time() > deadline, "the deadline")
        finally:
            for rank in ranks:
                os.kill(rank, signal.SIGCONT)
        wait_until_ended(mongodb_database, cluster)

    assert states(mongodb_database).keys() == {"COMPLETED"}, failures(mongodb_database)
    assert_complete(mongodb_database, plan)
    row = mongodb_database["simulations"].find_one({"kind": "md"})
    jobs = list(mongodb_database["fireworks"].find().sort("fw_id", 1))
    assert row["environment"]["segments"] == len(jobs)
    assert len(jobs) > 1
    numbers = [j["spec"][SPEC_KEY].get("continuation", {}).get("number") for j in jobs]
    assert numbers == [None, *range(1, len(jobs))]
    # Each handed over or finished by itself; a killed one would be RUNNING or FIZZLED.
    launches = list(mongodb_database["launches"].find())
    assert {launch["state"] for launch in launches} == {"COMPLETED"}
    assert len(launches) == len(jobs)
    job_ids = [launch["state_history"][0]["reservation_id"] for launch in launches]
    accounting = has_accounting()

    def all_known() -> bool:  # the last one ends a moment after its firework
        return len(ended_jobs(job_ids, accounting=accounting)) == len(launches)

    wait_for(all_known, lambda: job_ids, every_s=0.5)


def wait_for_progress(folder: Path) -> Path:
    """Wait until the only simulation is under way; return its file of progress."""
    found: list[Path] = []

    def there() -> bool:
        found.extend(folder.rglob("md/*/*/output/progress.json"))
        return bool(found)

    wait_for(there, lambda: slurm("squeue"), every_s=0.2)
    (progress,) = found
    return progress


def running_jobs(name: str) -> list[str]:
    return slurm("squeue", "--noheader", f"--name={name}", "--states=R", "-o%A").split()


def test_a_warned_job_hands_its_work_over(
    cluster: Path, mongodb_database: Any, tmp_path: Path
) -> None:
    """SLURM's warning before an end or a preemption is a signal to the batch shell."""
    plan = submit_simulations(
        cluster, tmp_path, steps=60_000, _queueadapter={"ntasks": 1}
    )

    with submitting(cluster, "md"):
        wait_for_progress(tmp_path)
        (job,) = running_jobs("simulation_1")
        slurm("scancel", "--batch", "--signal=USR1", job)
        wait_until_ended(mongodb_database, cluster)

    assert states(mongodb_database) == {"COMPLETED": 2}, failures(mongodb_database)
    assert_complete(mongodb_database, plan)
    row = mongodb_database["simulations"].find_one({"kind": "md"})
    assert row["environment"]["segments"] == 2
