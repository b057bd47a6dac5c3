"""What to try next, who goes on, and whose work it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from nanoos_fw.errors import InputError
from nanoos_fw.ml.search import (
    Choice,
    FloatRange,
    IntRange,
    SearchConfig,
    Trial,
    best_trial,
    promotion,
    read_search,
    rungs,
    suggest,
)
from nanoos_fw.stores.database import ensure_indexes
from nanoos_fw.stores.searches import Job, SearchStore

TARGET = "formation_energy_per_atom"
SPACE = {
    "learning_rate": {"kind": "float", "low": 1e-4, "high": 1e-1, "log": True},
    "hidden_dim": {"kind": "int", "low": 4, "high": 64},
    "loss": {"kind": "choice", "values": ["mse", "mae"]},
}


def config(**changes: Any) -> SearchConfig:
    values = {
        "name": "s",
        "dataset_dir": "/data",
        "training": {"target": TARGET, "epochs": 9, "ensemble_size": 1},
        "space": SPACE,
        "budget": {"trials": 9},
    }
    return read_search({**values, **changes})


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# -------------------------------------------------------------------- what is tried


def test_draws_fill_their_ranges_evenly() -> None:
    rng = np.random.default_rng(0)
    n = 4000
    wide = FloatRange(low=1e-4, high=1.0, log=True)
    logs = np.log10([wide.draw(rng) for _ in range(n)])
    counts, _ = np.histogram(logs, bins=4, range=(-4, 0))
    assert counts.sum() == n
    assert (abs(counts - n / 4) < 5 * np.sqrt(n * 3 / 16)).all()
    whole = IntRange(low=2, high=5)
    found = Counter(whole.draw(rng) for _ in range(n))
    assert sorted(found) == [2, 3, 4, 5]
    assert all(abs(c - n / 4) < 5 * np.sqrt(n * 3 / 16) for c in found.values())
    steps = IntRange(low=1, high=1000, log=True)
    drawn = np.array([steps.draw(rng) for _ in range(n)])
    assert drawn.min() >= 1
    assert drawn.max() <= 1000
    below = np.mean(drawn <= 30)  # log(30.5 / 0.5) of log(1000.5 / 0.5)
    assert below == pytest.approx(np.log(61) / np.log(2001), abs=0.04)
    values = Choice(values=("a", None, 3))
    assert {values.draw(rng) for _ in range(100)} == {"a", None, 3}


def test_a_random_suggestion_depends_on_seed_and_number_alone() -> None:
    first = [suggest(config(seed=1), number, []) for number in range(5)]
    judged = [Trial(n, p, {9: 1.0}, "done") for n, p in enumerate(first)]
    assert [suggest(config(seed=1), n, judged) for n in range(5)] == first
    assert suggest(config(seed=2), 0, []) != first[0]
    assert len({str(p) for p in first}) == 5
    config().training_of(first[0])


def serial(made: SearchConfig, loss: Any, n: int) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(n):
        parameters = suggest(made, number, trials)
        trials.append(Trial(number, parameters, {9: loss(parameters)}, "done"))
    return trials


def bowl(parameters: Any) -> float:
    rate = np.log10(parameters["learning_rate"]) + 2.5
    wrong = 0.3 * (parameters["loss"] == "mae")
    return float(rate**2 + (parameters["hidden_dim"] / 64 - 0.5) ** 2 + wrong)


def test_the_estimator_repeats_itself_and_beats_chance() -> None:
    pytest.importorskip("optuna")
    values = []
    for seed in range(3):
        made = config(method="tpe", seed=seed)
        trials = serial(made, bowl, 40)
        if seed == 0:
            assert trials == serial(made, bowl, 40)
        random = serial(config(seed=seed), bowl, 40)
        late = np.mean([t.value for t in trials[20:]])
        values.append(late / np.mean([t.value for t in random[20:]]))
    # Half the mean loss of random draws is far from what chance gives.
    assert np.mean(values) < 0.5


def test_the_estimator_spreads_out_over_running_trials() -> None:
    pytest.importorskip("optuna")
    made = config(method="tpe")
    trials = serial(made, bowl, 12)
    alone = suggest(made, 13, trials)
    running = Trial(12, dict(suggest(made, 12, trials)), {}, "running")
    assert suggest(made, 13, [*trials, running]) != alone
    failed = Trial(12, dict(running.parameters), {}, "failed")
    assert suggest(made, 13, [*trials, failed]) == alone


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {}}, "space"),
        ({"space": {"epochs": SPACE["hidden_dim"]}}, "cannot vary"),
        ({"space": {"nonsense": SPACE["hidden_dim"]}}, "cannot vary"),
        ({"space": {"loss": {"kind": "choice", "values": ["mse", "x"]}}}, "loss"),
        ({"space": {"hidden_dim": {"kind": "int", "low": 0, "high": 4}}}, "hidden_dim"),
        ({"space": {"hidden_dim": {"kind": "int", "low": 8, "high": 4}}}, "below"),
        (
            {"space": {"weight_decay": {**SPACE["learning_rate"], "low": 0.0}}},
            "logarithmic",
        ),
        ({"budget": {}}, "needs a budget"),
        ({"method": "grid"}, "method"),
        ({"name": "a b"}, "name"),
        (
            {"training": {"target": TARGET, "parent_sha256": "a" * 64}},
            "need a parent",
        ),
        ({"training": {"target": TARGET, "freeze": ["dense"]}}, "need a parent"),
        (
            {"space": {"normalizer": {"kind": "choice", "values": ["refit", "keep"]}}},
            "need a parent",
        ),
    ],
)
def test_a_search_that_cannot_work_is_refused(changes: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        config(**changes)


# ---------------------------------------------------------------------- who goes on


def test_rungs_rise_to_the_maximum() -> None:
    assert rungs(1, 9, 3) == (1, 3, 9)
    assert rungs(2, 20, 3) == (2, 6, 18, 20)
    assert rungs(5, 5, 2) == (5,)
    assert rungs(8, 5, 2) == (5,)
    assert config().rungs == (9,)


def paused(number: int, *values: float, state: str = "paused") -> Trial:
    return Trial(number, {}, dict(zip((1, 3, 9), values, strict=False)), state)  # type: ignore[arg-type]


def test_the_best_third_goes_on_from_the_highest_rung_down() -> None:
    made = config(method="halving", min_epochs=1)
    assert made.rungs == (1, 3, 9)
    two = [paused(0, 0.5), paused(1, 0.4)]
    assert promotion(made, two) is None  # floor(2 / 3) = 0
    three = [*two, paused(2, 0.6)]
    assert promotion(made, three) == (1, 3)
    # It went on: the next one only with six.
    gone = [paused(0, 0.5), paused(1, 0.4, state="running"), paused(2, 0.6)]
    assert promotion(made, gone) is None
    six = [*gone, paused(3, 0.7), paused(4, 0.8), paused(5, 0.45)]
    assert promotion(made, six) == (5, 3)
    # Three at the second rung: its best comes before those below.
    high = [paused(n, 0.1 * (n + 1), 0.5 - 0.1 * n) for n in range(3)]
    low = [paused(n, 1.0 + n) for n in range(3, 9)]
    assert promotion(made, [*high, *low]) == (2, 9)
    # A trial that failed above is still one that reached the rung below.
    failed = [paused(0, 0.1, state="failed"), paused(1, 0.2), paused(2, 0.3)]
    assert promotion(made, failed) is None


def test_a_tie_goes_to_the_first() -> None:
    made = config(method="halving", min_epochs=1)
    assert promotion(made, [paused(n, 0.5) for n in (2, 1, 0)]) == (0, 3)


def test_the_best_trial_is_one_that_got_far() -> None:
    trials = [
        paused(0, 0.01),
        paused(1, 0.4, 0.3, 0.2, state="done"),
        paused(2, 0.4, 0.3, 0.1, state="failed"),
        paused(3, 0.4, 0.3, 0.2, state="done"),
    ]
    best = best_trial(trials)
    assert best is not None
    assert best.number == 1
    assert best_trial([]) is None


# ------------------------------------------------------------------ whose work it is


@pytest.fixture(
    params=[
        "embedded_database",
        pytest.param("mongodb_database", marks=pytest.mark.mongodb),
    ]
)
def database(request: pytest.FixtureRequest) -> Any:
    found = request.getfixturevalue(request.param)
    ensure_indexes(found)
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database: Any, clock: Clock) -> SearchStore:
    return SearchStore(database, clock=clock)


def claim(store: SearchStore, **options: Any) -> Job:
    job = store.claim("s", **{"lease_s": 100, **options})
    assert job is not None
    return job


def test_a_search_is_created_once(store: SearchStore) -> None:
    store.create(config(), "d")
    store.create(config(), "d")
    for changed, dataset in ((config(seed=7), "d"), (config(), "e")):
        with pytest.raises(InputError, match="another configuration"):
            store.create(changed, dataset)
    assert store.names() == ["s"]
    assert store.config("s") == config()
    assert store.dataset_hash("s") == "d"
    with pytest.raises(InputError, match="no search 't'"):
        store.status("t")


def test_trials_are_given_out_once_and_up_to_the_budget(store: SearchStore) -> None:
    store.create(config(budget={"trials": 3}), "d")
    jobs = [claim(store) for _ in range(3)]
    assert [job.number for job in jobs] == [0, 1, 2]
    assert [job.epochs for job in jobs] == [9, 9, 9]
    assert jobs[1].parameters == suggest(config(), 1, [])
    assert store.claim("s") is None
    assert store.finish(jobs[1], {9: 0.5}, metrics={"val": {"mae": 0.5}})
    assert store.claim("s") is None
    status = store.status("s")
    assert status["trials"] == {"running": 2, "paused": 0, "done": 1, "failed": 0}
    assert status["best"]["number"] == 1
    assert store.table("s")[1]["metrics"] == {"val": {"mae": 0.5}}
    assert "token" not in store.table("s")[0]


def test_the_work_of_a_dead_worker_is_taken_over(
    store: SearchStore, clock: Clock
) -> None:
    store.create(config(budget={"trials": 1}), "d")
    first = claim(store, nodes=2)
    clock.now += 60
    assert store.renew(first, 100)  # alive until 160
    clock.now += 90
    assert store.claim("s") is None
    assert store.others_at_work("s") == pytest.approx(10)
    clock.now += 20
    second = claim(store)
    assert (second.number, second.attempt) == (0, 2)
    assert second.parameters == first.parameters
    # The first one was only asleep: it has nothing to say any more.
    assert not store.renew(first, 100)
    assert not store.finish(first, {9: 0.1})
    assert store.trials("s")[0].values == {}
    clock.now += 30
    assert store.finish(second, {9: 0.3})
    assert store.trials("s")[0].value == 0.3
    # Two nodes for 160 s until the last sign's lease ended, one for 30 s.
    spent = store.status("s")["spent"]["node_hours"] * 3600
    assert spent == pytest.approx(2 * 160 + 30)


def test_work_given_back_is_free_at_once_and_failed_work_later(
    store: SearchStore, clock: Clock
) -> None:
    store.create(config(budget={"trials": 1}), "d")
    job = claim(store)
    assert store.release(job)
    clock.now += 1
    again = claim(store)
    assert again.attempt == 1  # nothing was wrong
    assert store.release(again, after_s=50)
    assert store.claim("s") is None
    clock.now += 51
    third = claim(store)
    assert third.attempt == 2
    assert store.fail(third, {"message": "diverged"})
    assert store.claim("s") is None
    assert store.table("s")[0]["error"] == {"message": "diverged"}
    assert store.status("s")["best"] is None


def test_the_budget_of_epochs_is_never_passed(store: SearchStore) -> None:
    made = config(method="halving", min_epochs=1, budget={"epochs": 17}, reduction=2)
    assert made.rungs == (1, 2, 4, 8, 9)
    store.create(made, "d")
    spent = 0
    reached: dict[int, int] = {}
    while (job := store.claim("s")) is not None:
        spent += job.epochs - reached.get(job.number, 0)
        assert spent <= 17
        reached[job.number] = job.epochs
        store.finish(job, {job.epochs: 1.0 + job.number})
    # A new trial needs one epoch, so none is left over.
    assert spent == 17
    assert store.status("s")["spent"]["epochs"] == 17


def test_a_search_ends_when_its_node_hours_are_spent(
    store: SearchStore, clock: Clock
) -> None:
    store.create(config(budget={"node_hours": 1.0}), "d")
    job = claim(store, nodes=2, lease_s=1000)
    clock.now += 99
    other = claim(store, nodes=36, lease_s=1000)  # 99 s of two nodes are spent
    clock.now += 99
    assert store.claim("s") is None  # 396 + 3564 s
    store.finish(job, {9: 1.0})
    store.finish(other, {9: 1.0})
    assert store.status("s")["spent"]["node_hours"] == pytest.approx(1.1)
    assert store.claim("s") is None


def test_halving_promotes_the_best_of_all(store: SearchStore) -> None:
    made = config(method="halving", min_epochs=1)
    store.create(made, "d")
    order = np.random.default_rng(0).permutation(9)
    while (job := store.claim("s")) is not None:
        store.finish(job, {job.epochs: float(order[job.number]) / job.epochs})
    trials = store.trials("s")
    assert len(trials) == 9
    final = [t for t in trials if t.state == "done"]
    assert [int(order[t.number]) for t in final] == [0]
    at_three = [t for t in trials if 3 in t.values]
    # Promotion does not wait for all: some that were best early on got there, too.
    assert {int(order[t.number]) for t in at_three} >= {0}
    assert 3 <= len(at_three) <= 5


def test_work_reserved_by_a_worker_that_died_is_done(
    store: SearchStore, database: Any
) -> None:
    store.create(config(method="halving", min_epochs=1, budget={"trials": 3}), "d")
    # Died between the reservation and the trial.
    database["searches"].update_one(
        {"_id": "s"}, {"$set": {"reserved.0": 1}, "$inc": {"reserved_epochs": 1}}
    )
    jobs = [claim(store) for _ in range(3)]
    assert [job.number for job in jobs] == [0, 1, 2]
    for job in jobs:
        store.finish(job, {1: 1.0 + job.number})
    # Died between the reservation and going on.
    database["searches"].update_one(
        {"_id": "s"}, {"$set": {"reserved.0": 3}, "$inc": {"reserved_epochs": 2}}
    )
    job = claim(store)
    assert (job.number, job.epochs) == (0, 3)
    assert store.claim("s") is None


def test_a_stopped_search_begins_nothing_until_it_is_resumed(
    store: SearchStore,
) -> None:
    store.create(config(), "d")
    job = claim(store)
    store.stop("s")
    assert store.claim("s") is None
    assert store.finish(job, {9: 0.5})  # what ran has ended
    store.resume("s")
    assert claim(store).number == 1
    store.finish_search("s", "m@1")
    assert (store.state("s"), store.status("s")["model"]) == ("done", "m@1")
    store.stop("s")
    assert store.state("s") == "done"
    assert [store.next_turn("s") for _ in range(3)] == [0, 1, 2]


_WORKER = """
import sys, time
import pymongo
from nanoos_fw.stores.searches import SearchStore
uri, name, lease = sys.argv[1:]
store = SearchStore(pymongo.MongoClient(uri)[name])
print("ready", flush=True)
sys.stdin.readline()
while True:
    job = store.claim("s", lease_s=float(lease))
    if job is None:
        if store.others_at_work("s") is None:
            break
        time.sleep(0.02)
        continue
    print(job.number, job.epochs, job.attempt, flush=True)
    if job.number == 3 and job.attempt == 1 and job.epochs == 1:
        sys.stdin.readline()  # hangs, and is killed
    store.finish(job, {job.epochs: (job.number * 7 % 27) / job.epochs})
"""


@pytest.mark.mongodb
def test_workers_share_a_search_and_survive_one_of_them(mongodb_database: Any) -> None:
    """Every (trial, epochs) is given out once, but for that of the worker that died."""
    ensure_indexes(mongodb_database)
    made = config(method="halving", min_epochs=1, budget={"trials": 27, "epochs": 90})
    store = SearchStore(mongodb_database)
    store.create(made, "d")
    uri = os.environ["NANO_OS_TEST_MONGODB_URI"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, uri, mongodb_database.name, "2.0"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    killed = 0
    done: list[tuple[int, int]] = []
    for process in processes:
        for line in process.stdout:
            number, epochs, attempt = map(int, line.split())
            done.append((number, epochs))
            if (number, epochs, attempt) == (3, 1, 1):
                process.kill()
                killed += 1
        process.wait(timeout=600)
        process.stdin.close()
        process.stdout.close()
    assert killed == 1
    counts = Counter(done)
    assert counts.pop((3, 1)) == 2
    assert set(counts.values()) == {1}
    status = store.status("s")
    assert status["trials"]["running"] == 0
    assert status["spent"]["trials"] == 27
    assert status["spent"]["epochs"] <= 90
    assert status["trials"]["done"] >= 1
    judged = {(t.number, e) for t in store.trials("s") for e in t.values}
    assert judged == {*counts, (3, 1)}
