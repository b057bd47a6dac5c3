"""Reports of screenings: right numbers, constant size, hostile names, live view."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoos_fw.ml.candidate_filters import CandidateStatus
from nanoos_fw.ml.ranking import Ranking
from nanoos_fw.ml.screen_summary import summarize_screen
from nanoos_fw.ml.screening_engine import ChunkResult, ModelColumns, encode_chunk
from nanoos_fw.reports import collect_report, collect_screen, render_report
from nanoos_fw.reports.page import render_screen
from nanoos_fw.reports.screen_figures import screen_figures
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import open_database
from nanoos_fw.stores.models import ModelRegistry
from nanoos_fw.stores.screens import Screen, ScreenStore, register_screen

HOSTILE = "<img src=x onerror=alert(1)>"
CHUNK = 500
ALLOYS = {
    "kind": "supercells",
    "prototype": "A1",
    "repeat": [2, 2, 2],
    "elements": [["Cu", "Au", "Ni", "Al"]],
}


def stored_screen(
    database: Any, name: str, count: int, campaign: str | None = None, done: int = 0
) -> tuple[Screen, dict[str, Any]]:
    """Store a screening with invented predictions, and return these."""
    from nanoos_fw.ml.screening_engine import read_screen

    spec = read_screen(
        {
            "candidates": {**ALLOYS, "count": count},
            "models": ["energies@1", "gaps@1"],
            "chunk": CHUNK,
        }
    )
    screen = register_screen(database, name, spec, campaign=campaign)
    rng = np.random.default_rng(count)
    made: dict[str, Any] = {
        "mean": rng.normal(size=(2, count)).astype(np.float32),
        "std": rng.random(count).astype(np.float32),
        "outside": rng.random(count) < 0.2,
        "status": rng.choice([0, 0, 0, 3, 6], count).astype(np.uint8),
    }
    made["mean"][0, 7] = made["mean"][0, 3] = -9.0  # a tie at the top
    made["status"][[3, 7]], made["outside"][[3, 7]] = 0, False
    documents = []
    for start in range(0, done or count, CHUNK):
        rows = slice(start, start + CHUNK)
        good = made["status"][rows] == 0
        outside = made["outside"][rows][good]
        first, second = (values[rows][good] for values in made["mean"])
        columns = (
            ModelColumns(first, made["std"][rows][good], None, None, outside),
            ModelColumns(second, None, None, None, np.zeros_like(outside)),
        )
        known = np.zeros(int(good.sum()), dtype=bool)
        known[0] = True
        chunk = ChunkResult(start, made["status"][rows], known, columns, wall_s=0.5)
        documents.append(encode_chunk(chunk))
    ScreenStore(database).put_chunks(screen.key, documents)
    return screen, made


@pytest.fixture
def database(launchpad: Any, tmp_path: Path) -> Any:
    found = open_database(launchpad)
    for name, target in (
        ("energies", "formation_energy_per_atom"),
        ("gaps", "bandgap"),
    ):
        (tmp_path / name).write_text(name)
        ModelRegistry(found).register(
            name=name, target=target, unit="eV/atom", model_type="CGCNN",
            weights=tmp_path / name, training_key=name, training_config={},
            metrics={"test": {"mae": 0.25}}, dataset_info={}, environment={},
        )  # fmt: skip
    return found


def test_summary_is_that_of_all_rows_at_once(database: Any) -> None:
    screen, made = stored_screen(database, "s", 2000)
    store = ScreenStore(database)
    found = summarize_screen(lambda: store.chunks(screen.key))
    good = made["status"] == 0
    statuses, counts = np.unique(made["status"], return_counts=True)
    expected = dict(zip(statuses.tolist(), counts.tolist(), strict=True))
    assert {int(s): n for s, n in found.outcomes.items()} == expected
    assert (found.known, found.core_s) == (4, 2.0)
    assert found.rates == (1000.0,) * 5
    for number, model in enumerate(found.models):
        values = made["mean"][number].astype(np.float64)
        assert (model.edges[0], model.edges[-1]) == (
            values[good].min(),
            values[good].max(),
        )
        inside = np.histogram(values[good], model.edges)[0]
        np.testing.assert_array_equal(model.counts, inside)
    outside = made["mean"][0].astype(np.float64)[good & made["outside"]]
    np.testing.assert_array_equal(
        found.models[0].outside, np.histogram(outside, found.models[0].edges)[0]
    )
    assert found.models[0].mean_std == pytest.approx(made["std"][good].mean(), rel=1e-6)
    assert found.models[1].mean_std is None
    nothing = summarize_screen(list)
    assert (nothing.models, nothing.rates, nothing.outcomes) == ((), None, {})


def test_report_ranks_and_counts_as_the_store_does(database: Any) -> None:
    _, made = stored_screen(database, "s", 2000)
    ScreenStore(database).set_estimate("s", 3600.0)
    part = collect_screen(database, "s")
    keep = np.flatnonzero((made["status"] == 0) & ~made["outside"])
    order = keep[np.lexsort((keep, made["mean"][0][keep]))]
    assert [row.candidate for row in part.best] == order[:20].tolist()
    assert [row.candidate for row in part.best[:2]] == [3, 7]
    assert part.n_ranked == len(keep)
    assert list(part.found_at) == sorted((order[:100] + 1).tolist())
    assert part.core_hours_estimated == 1.0
    assert part.predicted == int((made["status"] == 0).sum())
    assert part.best[0].predictions[1].mean == made["mean"][1, 3]
    refused = {o.name: o.count for o in part.outcomes}
    assert refused["no_graph"] == int(
        (made["status"] == CandidateStatus.NO_GRAPH).sum()
    )
    page = render_screen(part)
    assert "no held-out predictions are stored" in page
    assert part.tie_rule in page
    highest = collect_screen(database, "s", Ranking(objective="max", model=1))
    values = np.where(made["status"] == 0, made["mean"][1], -np.inf)
    assert highest.best[0].candidate == int(values.argmax())
    assert "bandgap of gaps@1" in highest.ranked_by


def test_report_of_twenty_times_the_candidates_is_as_large(database: Any) -> None:
    sizes, points = [], []
    for count in (2_000, 40_000):
        stored_screen(database, f"s{count}", count)
        part = collect_screen(database, f"s{count}")
        sizes.append(len(render_screen(part)))
        figures = screen_figures(part, "s")
        points.append(len(json.dumps([figure.data for figure in figures])))
    assert abs(sizes[1] - sizes[0]) < 5_000
    assert max(points) < 40_000


def test_campaigns_and_pages_show_their_screenings(
    launchpad: Any, database: Any, tmp_path: Path
) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx2")
    from fastapi.testclient import TestClient

    from nanoos_fw.web import create_app

    plan = {
        "top_k": 3, "md_runs": 1, "seed": 0, "dataset": {"seed": 0},
        "training": {"seed": 0, "target": "formation_energy_per_atom"}, "features": {},
    }  # fmt: skip
    CampaignStore(database).create("c", plan)
    stored_screen(database, HOSTILE, 2000, campaign="c", done=1000)
    stored_screen(database, "of nobody", 1500)
    data = collect_report(database, "c")
    assert [part.name for part in data.screens] == [HOSTILE]
    text = render_report(data)
    assert data.screens[0].screened == 1000
    assert "Not screened yet" in text
    assert HOSTILE not in text
    app = create_app(launchpad, token="t" * 20, work_root=tmp_path)
    web = TestClient(app, base_url="http://127.0.0.1:8000")
    web.headers["Authorization"] = f"Bearer {'t' * 20}"
    listed = web.get("/screens").text
    assert HOSTILE not in listed
    assert "1000 of 2000" in listed
    assert 'href="/campaigns/c"' in listed
    report = web.get("/screens/of nobody/report")
    assert report.status_code == 200
    assert 'href="/screens"' in report.text
    assert web.get("/screens/none/report").status_code == 404
