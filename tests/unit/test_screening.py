from __future__ import annotations

import random

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import InputError
from nanoos_fw.ml.graphs import build_graph, pack_graph, unpack_graph
from nanoos_fw.ml.screening import (
    discovery_curve,
    enrichment_at_k,
    precision_at_k,
    predict_in_chunks,
    rank_candidates,
    recall_at_k,
)
from nanoos_fw.ml.uncertainty import Predictions


def row(structure_id, mean, std=0.1, **more):
    return {"structure_id": structure_id, "mean": mean, "std": std, **more}


ROWS = [row("d", -1.0, 0.0), row("a", -1.0, 0.2), row("c", 0.5, 2.0), row("b", 3.0)]


def ids(ranked):
    return [r["structure_id"] for r in ranked]


def test_ties_are_broken_by_id_whatever_the_order_of_rows():
    for seed in range(10):
        rows = ROWS.copy()
        random.Random(seed).shuffle(rows)
        assert ids(rank_candidates(rows)) == ["a", "d", "c", "b"]
        assert ids(rank_candidates(rows, objective="max")) == ["b", "c", "a", "d"]


def test_confidence_bound_is_optimistic_in_both_directions():
    low = rank_candidates(ROWS, acquisition="lcb", kappa=1.0)
    assert ids(low) == ["c", "a", "d", "b"]
    assert low[0]["score"] == pytest.approx(0.5 - 2.0)
    high = rank_candidates(ROWS, objective="max", acquisition="lcb", kappa=2.0)
    assert high[0]["score"] == pytest.approx(0.5 + 2 * 2.0)


def test_ranking_keeps_k_rows_and_their_other_keys():
    best = rank_candidates([{**r, "formula": "X"} for r in ROWS], 2)
    assert [r["rank"] for r in best] == [1, 2]
    assert best[0]["formula"] == "X"
    assert "rank" not in ROWS[0]


def test_candidates_out_of_domain_are_left_out_unless_asked_for():
    rows = [*ROWS, row("z", -9.0, out_of_domain=True)]
    assert "z" not in ids(rank_candidates(rows))
    assert ids(rank_candidates(rows, 1, include_out_of_domain=True)) == ["z"]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([row("a", float("nan"))], {}, "not finite"),
        ([row("a", 1.0, None)], {"acquisition": "lcb"}, "no uncertainty"),
        ([row("a", 1.0), row("a", 2.0)], {}, "different structures"),
        (ROWS, {"objective": "best"}, "objective"),
        (ROWS, {"k": -1}, "negative"),
    ],
)
def test_unrankable_rows_are_refused(rows, options, words):
    with pytest.raises(InputError, match=words):
        rank_candidates(rows, **options)


def test_discovery_curve_equals_counting():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=50)
    scores = truth + rng.normal(size=50)
    curve = discovery_curve(scores, truth, 10)
    best = set(np.argsort(truth)[:10].tolist())
    order = np.argsort(scores).tolist()
    assert curve.tolist() == [len(best & set(order[:n])) for n in range(51)]
    assert precision_at_k(scores, truth, 20, n_best=10) == curve[20] / 20
    assert recall_at_k(scores, truth, 20, n_best=10) == curve[20] / 10
    assert enrichment_at_k(scores, truth, 50, n_best=10) == pytest.approx(1.0)
    mirrored = discovery_curve(-scores, -truth, 10, objective="max")
    np.testing.assert_array_equal(mirrored, curve)


def test_a_perfect_order_finds_all_first():
    truth = np.array([3.0, 1.0, 2.0])
    assert discovery_curve(truth, truth, 2).tolist() == [0, 1, 2, 2]
    assert precision_at_k(truth, truth, 2) == 1.0


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_of_the_candidates_is_refused(k):
    with pytest.raises(InputError):
        precision_at_k([1, 2, 3], [1, 2, 3], k, n_best=2)


class LengthModel:
    """Predicts the mean bond length; counts its calls."""

    def __init__(self):
        self.calls = []

    def predict_full(self, graphs, *, coverage):
        self.calls.append((len(graphs), coverage))
        graphs = [unpack_graph(g) if isinstance(g, bytes) else g for g in graphs]
        unseen = [["Po"] if 84 in graph.numbers else [] for graph in graphs]
        return Predictions(
            mean=np.array([graph.distances.mean() for graph in graphs]),
            std=None,
            half_width=np.full(len(graphs), 0.5),
            coverage=coverage,
            distance=np.array([float(graph.n_atoms) for graph in graphs]),
            unseen_elements=unseen,
            out_of_domain=np.array([bool(names) for names in unseen]),
        )


def test_chunks_keep_the_order_and_read_lazily():
    def graphs():
        for i in range(7):
            structure = Structure(
                Lattice.cubic(3 + 0.1 * i), ["Po" if i == 6 else "Fe"], [[0, 0, 0]]
            )
            graph = build_graph(structure, max_neighbors=6)
            yield f"s{i}", pack_graph(graph) if i % 2 else graph

    model = LengthModel()
    chunks = predict_in_chunks(model, graphs(), chunk=3, coverage=0.8)
    first = next(chunks)
    assert model.calls == [(3, 0.8)]
    rows = [*first, *(r for chunk in chunks for r in chunk)]
    assert model.calls == [(3, 0.8), (3, 0.8), (1, 0.8)]
    assert ids(rows) == [f"s{i}" for i in range(7)]
    assert [r["mean"] for r in rows] == pytest.approx(3 + 0.1 * np.arange(7))
    assert [r["out_of_domain"] for r in rows] == [False] * 6 + [True]
    assert rows[6]["unseen_elements"] == ["Po"]
    assert rows[0]["std"] is None
    assert (rows[0]["half_width"], rows[0]["distance"]) == (0.5, 1.0)
