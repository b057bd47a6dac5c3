"""Batches of active learning, against naive versions, and the rules that end it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import norm

from nanoos_fw.errors import InputError
from nanoos_fw.ml.acquisition import (
    Pick,
    Pool,
    Selection,
    farthest_first,
    random_order,
    select_batch,
    shortlist,
    standardized,
)
from nanoos_fw.ml.stopping import Progress, StopRules, check_stop, labels_left

N = 60


def pool_of(seed: int = 0, n: int = N, *, spread: bool = True) -> tuple[Pool, Any]:
    rng = np.random.default_rng(seed)
    pool = Pool(
        ids=[f"s{i:03d}" for i in range(n)],
        mean=rng.normal(size=n),
        std=rng.uniform(0.1, 1.0, n) if spread else None,
        out_of_domain=rng.random(n) < 0.2,
    )
    return pool, rng.normal(size=(n, 3))


def choose(pool: Pool, vectors: Any, selection: Selection, **how: Any) -> list[Pick]:
    size = how.pop("size", None)
    labelled = how.pop("labelled", None)
    short, scores = shortlist(pool, selection, **how)
    places = [pool.ids.index(name) for name in short.ids]
    return select_batch(
        short,
        scores,
        selection,
        vectors=vectors[places],
        labelled=labelled,
        size=size,
        **how,
    )


@pytest.mark.parametrize("objective", ["min", "max"])
@pytest.mark.parametrize("acquisition", ["mean", "ucb", "ei", "uncertainty"])
def test_the_best_scores_are_those_of_the_formulas(
    acquisition: Any, objective: Any
) -> None:
    pool, vectors = pool_of()
    assert pool.std is not None
    sign = 1 if objective == "min" else -1
    best = -0.5 * sign
    gain = sign * (best - pool.mean)
    z = gain / pool.std
    expected = {
        "mean": -sign * pool.mean,
        "ucb": -sign * pool.mean + 1.7 * pool.std,
        "ei": gain * norm.cdf(z) + pool.std * norm.pdf(z),
        "uncertainty": pool.std,
    }[acquisition]
    selection = Selection(size=9, acquisition=acquisition, kappa=1.7, diversity="none")
    picks = choose(pool, vectors, selection, objective=objective, best=best)
    order = np.argsort(-expected)[:9]
    assert [p.id for p in picks] == [pool.ids[i] for i in order]
    np.testing.assert_allclose([p.score or 0 for p in picks], expected[order])
    assert [p.mean for p in picks] == pool.mean[order].tolist()
    assert [p.out_of_domain for p in picks] == pool.out_of_domain[order].tolist()


def naive_gaussian_process(
    pool: Pool, vectors: Any, kappa: float, size: int, length: float
) -> list[str]:
    """Greedy UCB with the posterior deviations of a process, solved anew each time."""
    assert pool.std is not None
    squares = ((vectors[:, None] - vectors[None]) ** 2).mean(axis=2)
    kernel = np.exp(-0.5 * squares / length**2)
    taken: list[int] = []
    for _ in range(size):
        left = np.ones(len(pool))
        if taken:
            known = kernel[np.ix_(taken, taken)] + 1e-9 * np.eye(len(taken))
            cross = kernel[:, taken]
            left -= np.einsum("ij,ij->i", cross @ np.linalg.inv(known), cross)
        score = -pool.mean + kappa * pool.std * np.sqrt(np.clip(left, 0, None))
        score[taken] = -np.inf
        taken.append(int(np.argmax(score)))
    return [pool.ids[i] for i in taken]


def test_variance_spreads_a_batch_like_a_gaussian_process() -> None:
    for seed in range(5):
        pool, vectors = pool_of(seed)
        selection = Selection(size=12, kappa=2.0, length=0.8)
        picks = choose(pool, vectors, selection)
        expected = naive_gaussian_process(pool, vectors, 2.0, 12, 0.8)
        assert [p.id for p in picks] == expected
        plain = choose(pool, vectors, Selection(size=12, kappa=2.0, diversity="none"))
        assert [p.id for p in plain] != expected


def test_of_two_like_candidates_one_is_taken() -> None:
    pool = Pool(
        ["a", "b", "c"],
        np.array([-1.0, -0.99, -0.5]),
        np.array([0.6, 0.6, 0.6]),
        np.zeros(3, dtype=bool),
    )
    vectors = np.array([[0.0, 0.0], [0.0, 1e-3], [5.0, 5.0]])
    selection = Selection(size=2, kappa=1.0, length=1.0)
    assert [p.id for p in choose(pool, vectors, selection)] == ["a", "c"]
    other = selection.model_copy(update={"diversity": "none"})
    assert [p.id for p in choose(pool, vectors, other)] == ["a", "b"]


@pytest.mark.parametrize("diversity", ["variance", "k-centre"])
def test_candidates_with_equal_descriptors_are_each_taken_once(diversity: Any) -> None:
    pool, _ = pool_of(n=6)
    (vectors,) = standardized(np.ones((6, 3)))
    picks = choose(pool, vectors, Selection(size=4, diversity=diversity))
    assert len({pick.id for pick in picks}) == 4


def test_a_selection_takes_no_number_that_is_not_finite() -> None:
    with pytest.raises(ValidationError):
        Selection(kappa=math.inf)


def test_k_centre_keeps_away_from_the_labelled_and_the_taken() -> None:
    pool, vectors = pool_of(3)
    labelled = np.random.default_rng(4).normal(size=(300, 3))
    selection = Selection(size=8, diversity="k-centre", pool_factor=4)
    picks = choose(pool, vectors, selection, labelled=labelled)
    short, _ = shortlist(pool, selection)
    assert len(short) == 32
    rows = [pool.ids.index(name) for name in short.ids]
    points, taken = vectors[rows], [0]
    while len(taken) < 8:
        near = [
            min(((p - q) ** 2).sum() for q in (*labelled, *points[taken]))
            for p in points
        ]
        taken.append(
            int(np.argmax([-1 if i in taken else d for i, d in enumerate(near)]))
        )
    assert [p.id for p in picks] == [short.ids[i] for i in taken]
    # Without a known one: the first, then the farthest from it.
    far = farthest_first(points, short.ids, 2)
    assert far == [0, int(np.argmax(((points - points[0]) ** 2).sum(axis=1)))]


@pytest.mark.parametrize("diversity", ["none", "variance", "k-centre"])
@pytest.mark.parametrize(
    "acquisition", ["mean", "ucb", "ei", "thompson", "uncertainty", "random"]
)
def test_the_order_of_the_candidates_decides_nothing(
    acquisition: Any, diversity: Any
) -> None:
    pool, vectors = pool_of(7)
    pool.mean[10:20] = pool.mean[10]  # ties
    pool.std[10:20] = pool.std[10]  # type: ignore[index]
    vectors[10:20] = vectors[10]
    selection = Selection(size=10, acquisition=acquisition, diversity=diversity)
    how = {"best": -0.3, "seed": 5}
    first = choose(pool, vectors, selection, **how)
    rows = np.random.default_rng(1).permutation(N)
    assert choose(pool.take(rows), vectors[rows], selection, **how) == first
    assert len({p.id for p in first}) == 10
    if acquisition in ("thompson", "random") and diversity == "none":
        assert choose(pool, vectors, selection, best=-0.3, seed=6) != first


def test_equal_scores_are_taken_by_id() -> None:
    pool, vectors = pool_of(0, 8)
    pool.mean[:] = 1.0
    picks = choose(pool, vectors, Selection(size=3, acquisition="mean"))
    assert [p.id for p in picks] == ["s000", "s001", "s002"]


def test_thompson_draws_have_the_stated_mean_and_deviation() -> None:
    n = 4000
    pool = Pool(
        [f"{i:05d}" for i in range(n)],
        np.full(n, 2.0),
        np.full(n, 0.5),
        np.zeros(n, dtype=bool),
    )
    selection = Selection(size=n, acquisition="thompson", diversity="none")
    _, scores = shortlist(pool, selection, seed=1)
    assert -scores.mean() == pytest.approx(2.0, abs=4 * 0.5 / math.sqrt(n))
    assert scores.std() == pytest.approx(0.5, rel=0.05)


def test_strange_candidates_compete_unless_they_are_to_be_dropped() -> None:
    pool, vectors = pool_of()
    chosen = choose(pool, vectors, Selection(size=N, diversity="none"))
    assert len(chosen) == N
    strict = Selection(size=N, diversity="none", out_of_domain="drop")
    kept = choose(pool, vectors, strict)
    expected = {
        n for n, out in zip(pool.ids, pool.out_of_domain, strict=True) if not out
    }
    assert {p.id for p in kept} == expected


def test_what_cannot_be_scored_is_refused() -> None:
    pool, _ = pool_of(spread=False)
    with pytest.raises(InputError, match="states no uncertainty, which 'ucb' needs"):
        shortlist(pool, Selection())
    assert len(shortlist(pool, Selection(acquisition="mean"))[0]) == N
    pool, _ = pool_of()
    with pytest.raises(InputError, match="best label so far"):
        shortlist(pool, Selection(acquisition="ei"))
    pool.mean[3] = np.nan
    with pytest.raises(InputError, match="score of s003 is not finite"):
        shortlist(pool, Selection())
    twice = pool.take(np.array([1, 1]))
    with pytest.raises(InputError, match="comes twice"):
        shortlist(twice, Selection())


def test_a_random_order_is_one_of_the_ids_and_the_seed() -> None:
    ids = [f"s{i}" for i in range(200)]
    first = [ids[row] for row in random_order(ids, 3)]
    assert sorted(first) == sorted(ids)
    assert [ids[::-1][row] for row in random_order(ids[::-1], 3)] == first
    # The order among some does not depend on the others.
    some = ids[50:90]
    assert [some[row] for row in random_order(some, 3)] == [
        n for n in first if n in some
    ]
    assert [ids[row] for row in random_order(ids, 4)] != first


def test_descriptors_are_scaled_by_the_first_set() -> None:
    rng = np.random.default_rng(0)
    vectors = np.column_stack([rng.normal(3, 2, 50), np.full(50, 7.0)])
    other = np.array([[3.0, 9.0]])
    scaled, beside = standardized(vectors, [other])
    assert scaled.shape == (50, 1)
    assert (scaled.mean(), scaled.std()) == pytest.approx((0, 1))
    assert beside[0, 0] == pytest.approx(
        (3 - vectors[:, 0].mean()) / vectors[:, 0].std()
    )


# ----------------------------------------------------------------------------- stops

BASE: dict[str, Any] = {"labels": 50, "rounds": 3, "candidates_left": 9}


@pytest.mark.parametrize(
    ("rules", "progress", "expected"),
    [
        ({"max_labels": 50}, {}, "max_labels"),
        ({"max_labels": 51}, {}, None),
        ({"max_rounds": 3}, {}, "max_rounds"),
        ({"max_rounds": 4}, {}, None),
        ({"max_core_hours": 2.0}, {"core_hours": 2.5}, "max_core_hours"),
        ({"max_core_hours": 3.0}, {"core_hours": 2.5}, None),
        ({"max_rounds": 9}, {"candidates_left": 0}, "exhausted"),
        ({"max_rounds": 9}, {"asked": True}, "asked"),
        ({"max_rounds": 9, "val_mae": 0.1}, {"val_mae": 0.1}, "val_mae"),
        ({"max_rounds": 9, "val_mae": 0.1}, {"val_mae": None}, None),
        ({"max_rounds": 9, "max_std": 0.1}, {"max_std": 0.05}, "max_std"),
        ({"max_rounds": 9, "max_std": 0.1}, {"max_std": 0.5}, None),
        ({"max_rounds": 9, "patience": 2}, {"best": [-1.0, -1.0, -1.0]}, "patience"),
        ({"max_rounds": 9, "patience": 2}, {"best": [-1.0, -1.0, -1.1]}, None),
        ({"max_rounds": 9, "patience": 2}, {"best": [-1.0, -1.0]}, None),
        ({"max_rounds": 9, "patience": 2}, {"best": [None, -1.0, -1.0]}, None),
        (
            {"max_rounds": 9, "patience": 1, "min_improvement": 0.2},
            {"best": [-1.0, -1.1]},
            "patience",
        ),
    ],
)
def test_the_first_rule_that_holds_ends_a_campaign(
    rules: dict[str, Any], progress: dict[str, Any], expected: str | None
) -> None:
    stop = check_stop(StopRules(**rules), Progress(**{**BASE, **progress}))
    assert (None if stop is None else stop.rule) == expected
    if "best" in progress:  # the same, upside down
        up = [None if b is None else -b for b in progress["best"]]
        again = check_stop(
            StopRules(**rules), Progress(**{**BASE, "best": up}), objective="max"
        )
        assert again == stop


def test_rules_without_a_budget_are_refused() -> None:
    with pytest.raises(ValidationError, match="give a budget"):
        StopRules(patience=3)
    assert labels_left(StopRules(max_labels=30), 20) == 10
    assert labels_left(StopRules(max_labels=30), 40) == 0
    assert labels_left(StopRules(max_rounds=3), 40) is None
