"""Active learning on a LaunchPad over an in-memory database, with real trainings."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import mongomock
import pytest
from active_labels import label_of
from fireworks.core.fworker import FWorker
from fireworks.core.launchpad import LaunchPad
from fireworks.core.rocket_launcher import launch_rocket
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import InputError
from nanoos_fw.firetasks import ml as ml_tasks
from nanoos_fw.firetasks.active_plan import ActivePlan
from nanoos_fw.ml import training
from nanoos_fw.operations.active import (
    active_status,
    continue_active,
    extend_active,
    fail_labels,
    import_labels,
    read_plan,
    stop_active,
    submit_active,
)
from nanoos_fw.parallel import Communicator, StopRequest
from nanoos_fw.reports.collect import collect_report
from nanoos_fw.reports.data import NotAvailable, Ranking, Training
from nanoos_fw.reports.findings import ranking_finding
from nanoos_fw.reports.formatting import significant
from nanoos_fw.reports.page import render_report
from nanoos_fw.settings import Settings
from nanoos_fw.stores.active import ActiveStore
from nanoos_fw.stores.launches import failed_fireworks
from nanoos_fw.stores.models import ModelRegistry
from nanoos_fw.stores.structures import NewStructure, StructureStore

TARGET = "toy"
TASK = {"kind": "task", "task": "active_labels.ToyLabelTask"}


def plan_values(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "toys",
        "candidates": {"alloys": ["Cu", "Ni", "Al", "Zr"]},
        "labels": TASK,
        "initial": {"size": 12},
        "selection": {"size": 5},
        "stop": {"max_labels": 20, "top": 3},
        "training": {
            "target": TARGET, "epochs": 3, "batch_size": 8, "hidden_dim": 4,
            "num_layers": 1, "readout_dim": 4, "gaussian_step": 1.0,
            "ensemble_size": 2, "forest_baseline": False,
        },
        "dataset": {"unit": "eV", "min_samples": 5},
        "labels_per_firework": 4,
        "structures_per_firework": 30,
        "work_root": str(tmp_path / "work"),
        "report_every_round": False,
    }  # fmt: skip
    return {**values, **changes}


@pytest.fixture
def launchpad(monkeypatch: pytest.MonkeyPatch) -> Any:
    from mongomock.gridfs import enable_gridfs_integration

    enable_gridfs_integration()
    client = mongomock.MongoClient()
    monkeypatch.setattr(
        "fireworks.core.launchpad.MongoClient", lambda *_args, **_kwargs: client
    )
    # The heartbeat is a thread, and mongomock is not made for two.
    monkeypatch.setattr(
        "fireworks.core.rocket.start_ping_launch", lambda *_: threading.Event()
    )
    monkeypatch.setattr(ml_tasks, "train_cgcnn_model", train_here)
    return LaunchPad(strm_lvl="CRITICAL")


def train_here(target: str, config: Any, **options: Any) -> Any:
    """Run the rank program in this process."""
    job = {
        "config": config.model_dump(mode="json"),
        "dataset_dir": str(options["dataset_dir"]),
        "threads": 1,
    }
    if options["parent"] is not None:
        job["parent"] = str(options["parent"])
    options["work_dir"].mkdir(parents=True, exist_ok=True)
    result = training.main(job, options["work_dir"], Communicator(), StopRequest())
    return training.TrainingResult(**result)


def run(launchpad: Any, tmp_path: Path, *, until: str | None = None) -> list[str]:
    """Launch what is ready, one after the other; return the stages."""
    folder = tmp_path / "launches"
    folder.mkdir(exist_ok=True)
    before, stages = Path.cwd(), []
    os.chdir(folder)
    try:
        worker = FWorker("worker")
        while launchpad.run_exists(worker):
            launch_rocket(launchpad, worker, strm_lvl="CRITICAL")
            launch = launchpad.launches.find_one({}, sort=[("launch_id", -1)])
            document = launchpad.fireworks.find_one({"fw_id": launch["fw_id"]})
            stages.append(document["spec"]["nanoos"]["stage"])
            if stages[-1] == until:
                break
    finally:
        os.chdir(before)
    failed = failed_fireworks(launchpad.db, "toys")
    assert not failed, [f"{f.stage}: {f.error}" for f in failed]
    return stages


def start(launchpad: Any, tmp_path: Path, **changes: Any) -> ActivePlan:
    plan = read_plan(plan_values(tmp_path, **changes))
    return submit_active(launchpad, plan, Settings(ranks=1))[0]


def batches(launchpad: Any) -> list[list[str]]:
    return [r.batch for r in ActiveStore(launchpad.db).rounds("toys")]


def test_a_campaign_runs_to_its_budget(launchpad: Any, tmp_path: Path) -> None:
    plan = start(launchpad, tmp_path)
    assert not submit_active(launchpad, plan)[1]  # again is harmless
    stages = run(launchpad, tmp_path)
    assert stages.count("select") == 4
    store, structures = ActiveStore(launchpad.db), StructureStore(launchpad.db)
    rounds = store.rounds("toys")
    assert [len(r.picks) for r in rounds] == [12, 5, 3, 0]
    assert rounds[-1].stop == {
        "rule": "max_labels", "reason": "the budget of 20 labels is used",
    }  # fmt: skip
    labelled = [key for r in rounds for key in r.batch]
    assert len(set(labelled)) == 20
    assert set(labelled) <= set(structures.keys("toys/candidates"))
    assert structures.keys("toys/labelled") == sorted(labelled)
    # Every label is what the task computes, once.
    truth = {
        key: label_of(entry.structure)
        for key, entry in structures.get_many(labelled).items()
    }
    documents = list(launchpad.db["simulations"].find())
    assert {d["structure"]: d["result"]["value"] for d in documents} == truth
    assert len(documents) == 20
    # Every round is a version that was trained further from the one before.
    records = ModelRegistry(launchpad.db).list_models(name=plan.model_name)
    assert [r.version for r in records] == [1, 2, 3]
    assert [r.parent for r in records] == [
        None, f"{plan.model_name}@1", f"{plan.model_name}@2",
    ]  # fmt: skip
    assert [r.is_active for r in records] == [False, False, True]
    for entry, record in zip(rounds, records, strict=False):
        assert entry.model is not None
        assert entry.dataset is not None
        assert entry.model["reference"] == record.reference
        assert record.dataset_info["dataset_hash"] == entry.dataset["hash"]
        assert entry.dataset["labels"] == sum(
            len(r.picks) for r in rounds[: entry.number + 1]
        )
        best = min(truth[key] for r in rounds[: entry.number + 1] for key in r.batch)
        assert entry.dataset["best"] == best
    errors = [abs(p.mean - truth[p.id]) for p in rounds[1].picks if p.mean is not None]
    assert rounds[1].dataset is not None
    assert rounds[1].dataset["errors"]["mae"] == pytest.approx(sum(errors) / 5)
    status = active_status(launchpad.db, "toys")
    assert (status.state, status.labels, status.best) == (
        "stopped",
        20,
        min(truth.values()),
    )
    assert Path(plan.report or "").read_text().count("</html>") == 1
    # The target is no formation energy, and nothing was labelled by LAMMPS.
    report = collect_report(launchpad.db, "toys")
    assert report.funnel.labelled.finished == 20
    assert report.funnel.relaxed.planned == 0
    for part in (report.ranking, report.training):
        assert not isinstance(part, NotAvailable)
        assert (part.quantity.name, part.quantity.unit) == ("toy", "eV")
    for part in (report.labels, report.discovery):
        assert isinstance(part, NotAvailable)
    (active,) = (r for r in records if r.is_active)
    assert isinstance(report.ranking, Ranking)
    rows = report.ranking.candidates
    assert [row.lammps for row in rows] == [None] * len(rows)
    screened = set(structures.keys("toys/candidates")) - set(labelled)
    means = {
        p.structure: p.prediction
        for p in ModelRegistry(launchpad.db).predictions(
            active.reference, sorted(screened)
        )
    }
    assert rows[0].predicted == means[rows[0].candidate_id]
    page = render_report(report)
    assert "the lowest predicted toy of" in page
    assert "meV/atom" not in page
    assert isinstance(report.training, Training)
    error = max(m.best_validation_mae for m in report.training.members)
    assert f"{significant(error, 3)} eV" in page
    assert f"{min(truth.values()):.4g}".replace("-", "−") in page


def test_a_campaign_for_high_values_ranks_the_highest_first(
    launchpad: Any, tmp_path: Path
) -> None:
    start(launchpad, tmp_path, objective="max")
    for _ in range(2):
        run(launchpad, tmp_path, until="select")
    ranking = collect_report(launchpad.db, "toys").ranking
    assert isinstance(ranking, Ranking)
    means = [row.predicted for row in ranking.candidates]
    assert means == sorted(means, reverse=True)
    assert "highest predicted toy" in ranking_finding(ranking)


def test_choosing_again_makes_no_second_round(
    launchpad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between fireworks and workflow, and rerun by hand after the end."""
    start(launchpad, tmp_path)
    run(launchpad, tmp_path, until="featurize")
    run(launchpad, tmp_path, until="featurize")
    insert = LaunchPad._upsert_fws

    def killed(self: Any, fws: list[Any], **options: Any) -> Any:
        new = any(fw.fw_id < 0 for fw in fws)
        answer = insert(self, fws, **options)
        if new:
            raise KeyboardInterrupt
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(LaunchPad, "_upsert_fws", killed)
        with pytest.raises(KeyboardInterrupt):
            run(launchpad, tmp_path)
    (select,) = launchpad.fireworks.find(
        {"spec.nanoos.stage": "select", "spec.nanoos.round": None}
    )
    orphans = launchpad.fireworks.count_documents({"spec.nanoos.round": 0})
    assert orphans > 0
    launchpad.rerun_fw(select["fw_id"])
    run(launchpad, tmp_path)
    assert launchpad.fireworks.count_documents({"spec.nanoos.round": 0}) == orphans
    chosen, count = batches(launchpad), launchpad.fireworks.count_documents({})
    assert [len(batch) for batch in chosen] == [12, 5, 3, 0]
    simulations = list(launchpad.db["simulations"].find())
    versions = launchpad.db["models"].count_documents({})
    # A rerun of the choice of the first round runs all that came after it again.
    launchpad.rerun_fw(select["fw_id"])
    assert "label" in run(launchpad, tmp_path)
    assert batches(launchpad) == chosen
    assert launchpad.fireworks.count_documents({}) == count
    assert list(launchpad.db["simulations"].find()) == simulations
    assert launchpad.db["models"].count_documents({}) == versions
    nodes = [n for w in launchpad.workflows.find() for n in w["nodes"]]
    assert sorted(nodes) == sorted(launchpad.get_fw_ids())


def test_labels_that_fail_are_recorded_and_stop_nothing(
    launchpad: Any, tmp_path: Path
) -> None:
    labels = {**TASK, "options": {"fail": ["A"]}}
    start(
        launchpad, tmp_path, labels=labels, stop={"max_rounds": 2}, min_label_share=0.2
    )
    run(launchpad, tmp_path)
    first, second, _ = ActiveStore(launchpad.db).rounds("toys")
    assert first.dataset is not None
    assert 0 < first.dataset["n_failed"] < 12
    assert first.dataset["labels"] == 12 - first.dataset["n_failed"]
    reasons = set(first.dataset["failed"].values())
    assert all(r.startswith("ValueError: cannot label") for r in reasons)
    assert not set(second.batch) & set(first.batch)


def test_too_few_labels_hold_the_round(launchpad: Any, tmp_path: Path) -> None:
    labels = {**TASK, "options": {"fail": ["A"]}}
    start(launchpad, tmp_path, labels=labels, min_label_share=1.0)
    with pytest.raises(AssertionError, match=r"min_label_share = 1\.0"):
        run(launchpad, tmp_path)
    (failed,) = failed_fireworks(launchpad.db, "toys")
    assert failed.stage == "dataset"


def test_a_stopped_campaign_is_extended(launchpad: Any, tmp_path: Path) -> None:
    start(launchpad, tmp_path, stop={"max_rounds": 5})
    run(launchpad, tmp_path, until="train")
    stop_active(launchpad.db, "toys")
    run(launchpad, tmp_path)
    status = active_status(launchpad.db, "toys")
    assert (status.state, status.labels) == ("stopped", 12)
    assert status.reason == "asked: stopped by the user"
    extend_active(launchpad, "toys", {"max_rounds": 2})
    assert run(launchpad, tmp_path)[0] == "select"
    assert [len(batch) for batch in batches(launchpad)] == [12, 5, 0]
    assert (
        active_status(launchpad.db, "toys").reason
        == "max_rounds: all 2 rounds are done"
    )


def test_the_campaign_waits_for_labels_from_files(
    launchpad: Any, tmp_path: Path
) -> None:
    plan = start(launchpad, tmp_path, labels={"kind": "files"}, stop={"max_rounds": 2})
    assert run(launchpad, tmp_path)[-1] == "export"
    status = active_status(launchpad.db, "toys")
    assert status.state == "waiting for labels"
    (batch,) = batches(launchpad)
    folder = Path(plan.work_root or "") / "batches" / "toys" / "00000"
    listed = json.loads((folder / "batch.json").read_text())["candidates"]
    assert [row["structure"] for row in listed] == batch
    assert sorted(p.stem for p in folder.glob("*.extxyz")) == sorted(batch)
    with pytest.raises(
        InputError, match="12 of 12 candidates of round 0 have no label"
    ):
        continue_active(launchpad, "toys")
    # The files come back with labels, but two: one failed, of one nothing is known.
    wrong = tmp_path / "wrong.extxyz"
    text = (folder / f"{batch[0]}.extxyz").read_text()
    wrong.write_text(text.replace("structure_id", f"{TARGET}=nan structure_id"))
    refused = import_labels(launchpad.db, "toys", [wrong])
    assert refused.written == []
    assert len(refused.refused) == 1
    # The steps of a relaxation in one file: none of them is the label by its place.
    steps = tmp_path / f"{batch[0]}.extxyz"
    steps.write_text(
        "".join(
            text.replace("structure_id", f"{TARGET}={value} structure_id")
            for value in (-1.0, -2.0, -2.0)
        )
    )
    refused = import_labels(launchpad.db, "toys", [steps])
    assert refused.written == []
    assert refused.refused[batch[0]] == "its entries have different labels: give one"
    done = tmp_path / "done"
    done.mkdir()
    truth = write_labels(folder, done, batch[:10])
    report = import_labels(launchpad.db, "toys", [done])
    assert (report.written, report.refused) == (sorted(batch[:10]), {})
    assert import_labels(launchpad.db, "toys", [done]).there == sorted(batch[:10])
    assert fail_labels(launchpad.db, "toys", [batch[10]], "did not converge") == [
        batch[10]
    ]
    with pytest.raises(InputError, match="1 of 12 candidates"):
        continue_active(launchpad, "toys")
    assert continue_active(launchpad, "toys", partial=True)
    assert not continue_active(launchpad, "toys", partial=True)
    assert run(launchpad, tmp_path)[-1] == "export"
    first = ActiveStore(launchpad.db).get("toys", 0)
    assert first.dataset is not None
    assert first.dataset["labels"] == 10
    assert first.dataset["best"] == min(truth.values())
    assert first.dataset["failed"] == {
        batch[10]: "did not converge", batch[11]: "no label was imported",
    }  # fmt: skip
    strange = tmp_path / "strange.extxyz"
    strange.write_text((folder / f"{batch[0]}.extxyz").read_text())
    refused = import_labels(launchpad.db, "toys", [strange]).refused
    assert list(refused.values()) == ["it belongs to no candidate of the batch"]


def write_labels(source: Path, to: Path, keys: list[str]) -> dict[str, float]:
    """Give structures that were written out what a program would add."""
    from nanoos_fw.structure_files import read_structures

    truth = {}
    for key in keys:
        text = (source / f"{key}.extxyz").read_text()
        (entry,) = read_structures(source / f"{key}.extxyz")
        truth[key] = label_of(entry.structure)
        (to / f"{key}.extxyz").write_text(
            text.replace("structure_id", f"{TARGET}={truth[key]!r} structure_id")
        )
    return truth


@pytest.mark.parametrize("file_format", ["extxyz", "poscar", "cif"])
def test_written_structures_are_read_as_the_same(
    tmp_path: Path, triclinic: Any, file_format: str
) -> None:
    from nanoos_fw.crystals import structure_key
    from nanoos_fw.structure_files import read_structures
    from nanoos_fw.structure_files.writing import SUFFIXES, structure_text

    key = structure_key(triclinic)
    path = tmp_path / f"{key}{SUFFIXES[file_format]}"
    path.write_text(structure_text(triclinic, key, file_format))
    (entry,) = read_structures(path)
    assert entry.label.partition("#")[0] == key
    assert structure_key(entry.structure) == key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stop": {}}, "give a budget"),
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"initial": {"size": 4}}, "below dataset.min_samples"),
        ({"dataset": {"mock_targets": True}}, "mock_targets are no labels"),
        ({"training": {"target": "t", "ensemble_size": 1}}, "needs an uncertainty"),
        ({"labels": {"kind": "dft"}}, "labels"),
        (
            {
                "candidates": {"set": "x"},
                "labels": {
                    "kind": "lammps",
                    "method": {"potential": {"name": "zhou2004", "elements": ["Cu"]}},
                },
                "training": {"target": "formation_energy_per_atom"},
                "dataset": {},
            },
            "needs candidates.references",
        ),
    ],
)
def test_plans_that_cannot_work_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read_plan(plan_values(tmp_path, **changes))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("no_such_module.Task", "cannot be imported"),
        ("active_labels.NoTask", "is no firetask"),
        ("active_labels.Misnamed", "which is another class"),
    ],
)
def test_tasks_that_cannot_label_are_refused(
    launchpad: Any, tmp_path: Path, task: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        start(launchpad, tmp_path, labels={"kind": "task", "task": task})
    assert launchpad.workflows.count_documents({}) == 0


@pytest.mark.parametrize(
    ("candidates", "known", "target", "words"),
    [
        ({"alloys": ["Cu", "Ni"]}, ["Cu"], "energy_per_atom", "asked to know Ni"),
        ({"set": "mixed"}, ["Cu"], "energy_per_atom", "asked to know Ni"),
        (
            {"set": "mixed", "references": "pure"},
            ["Cu", "Ni"],
            "formation_energy_per_atom",
            "have no structure of Ni alone",
        ),
        (
            {"set": "mixed", "references": "empty"},
            ["Cu", "Ni"],
            "formation_energy_per_atom",
            "have no structure of Cu, Ni alone",
        ),
    ],
)
def test_elements_that_cannot_be_labelled_are_refused_before_anything_is_stored(
    launchpad: Any,
    tmp_path: Path,
    candidates: dict[str, Any],
    known: list[str],
    target: str,
    words: str,
) -> None:
    store = StructureStore(launchpad.db)
    mixed = Structure(Lattice.cubic(3.0), ["Cu", "Ni"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    copper = Structure(Lattice.cubic(3.0), ["Cu"], [[0, 0, 0]])
    store.add([NewStructure(mixed, "CuNi")], in_set="mixed")
    store.add([NewStructure(copper, "Cu")], in_set="pure")
    potential = {"name": "zhou2004", "elements": known}
    values = plan_values(
        tmp_path,
        candidates=candidates,
        labels={"kind": "lammps", "method": {"potential": potential}},
        dataset={"min_samples": 5},
    )
    values["training"]["target"] = target
    with pytest.raises(InputError, match=words):
        submit_active(launchpad, read_plan(values), Settings(ranks=1))
    assert store.sets() == ["mixed", "pure"]
    assert launchpad.db["campaigns"].count_documents({}) == 0


@pytest.mark.parametrize(("name", "count"), [("few", 1), ("none", 0)])
def test_too_few_structures_are_refused_before_anything_is_stored(
    launchpad: Any, tmp_path: Path, name: str, count: int
) -> None:
    store = StructureStore(launchpad.db)
    copper = Structure(Lattice.cubic(3.0), ["Cu"], [[0, 0, 0]])
    store.add([NewStructure(copper, "Cu")], in_set="few")
    values = plan_values(tmp_path, candidates={"set": name})
    with pytest.raises(InputError, match=f"{count} candidates are fewer than initial"):
        submit_active(launchpad, read_plan(values), Settings(ranks=1))
    assert store.sets() == ["few"]
    assert launchpad.db["campaigns"].count_documents({}) == 0


def test_the_shipped_campaign_is_valid() -> None:
    from ruamel.yaml import YAML

    from nanoos_fw.templates import load_template

    plan = read_plan(YAML(typ="safe").load(load_template("active/alloys.yaml")))
    assert ActivePlan.model_validate(plan.model_dump(mode="json")) == plan
    assert plan.dataset.split == "stable"
