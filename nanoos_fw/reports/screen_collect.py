"""Fill the part of a report that shows a screening, from the stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nanoos_fw.crystals import element_symbol
from nanoos_fw.ml.candidate_filters import REASONS
from nanoos_fw.ml.candidates import CandidateSource, open_candidates
from nanoos_fw.ml.ranking import TIE_RULE, Ranking, rank_top
from nanoos_fw.ml.screen_summary import ModelSummary, summarize_screen
from nanoos_fw.ml.screening_engine import ChunkResult
from nanoos_fw.provenance import write_atomic
from nanoos_fw.reports.data import CrystalPicture, NotAvailable
from nanoos_fw.reports.learning_data import CalibrationCurve
from nanoos_fw.reports.page import render_screen
from nanoos_fw.reports.panels import evaluation_part
from nanoos_fw.reports.screen_data import (
    ScreenModelPart,
    ScreenOutcome,
    ScreenPart,
    ScreenPrediction,
    ScreenRow,
)
from nanoos_fw.stores.database import get_artifact
from nanoos_fw.stores.models import ModelRegistry, metric_of
from nanoos_fw.stores.screens import Screen, ScreenStore

_ROWS = 20
_DISCOVERED = 100
_PICTURE_SITES = 200
_DESCRIPTION = 4000
_WORDS = {
    "mean": "the prediction",
    "ucb": "the optimistic end, prediction ∓ {kappa:g} standard deviations",
    "ei": "the expected improvement on {best}",
    "thompson": "one draw for each candidate, seed {seed}",
}


def write_screen_report(
    database: Any, name: str, path: Path, ranking: Ranking | None = None
) -> Path:
    """Write the report of a screening from the stores and return its path.

    Raises
    ------
    InputError
        If there is no such screening.
    """
    path = path.resolve()
    write_atomic(path, render_screen(collect_screen(database, name, ranking)))
    return path


def collect_screen(
    database: Any, name: str, ranking: Ranking | None = None, *, best: int = _ROWS
) -> ScreenPart:
    """Return what the stores know of a screening, as far as it is done.

    Parameters
    ----------
    database
        Of the stores.
    name
        Of the screening.
    ranking
        Of the table; default: the first model, lowest prediction first.
    best
        Rows of the table.
    """
    store = ScreenStore(database)
    screen = store.get(name)
    ranking = ranking or Ranking()
    summary = summarize_screen(lambda: store.chunks(screen.key))
    top = rank_top(store.chunks(screen.key), max(best, _DISCOVERED), ranking)
    registry = ModelRegistry(database)
    models = [
        _model_part(database, registry, own, summary.models[number : number + 1])
        for number, own in enumerate(screen.models)
    ]
    estimated = screen.core_s_estimated
    return ScreenPart(
        name=screen.name,
        key=screen.key,
        created=screen.created,
        n_candidates=screen.count,
        outcomes=tuple(
            ScreenOutcome(name=status.name.lower(), reason=REASONS[status], count=n)
            for status, n in summary.outcomes.items()
        ),
        known=summary.known,
        coverage=float(screen.spec["coverage"]),
        core_hours=summary.core_s / 3600,
        core_hours_estimated=None if estimated is None else estimated / 3600,
        rates=summary.rates,
        models=tuple(models),
        best=tuple(_rows(store, screen, top.indices[:best].tolist())),
        n_ranked=top.n_ranked,
        ranked_by=_said(ranking, screen),
        tie_rule=TIE_RULE,
        found_at=tuple((np.sort(top.indices[:_DISCOVERED]) + 1).tolist()),
        description=_description(screen),
    )


def _said(ranking: Ranking, screen: Screen) -> str:
    own = screen.models[ranking.model]
    words = _WORDS[ranking.acquisition].format(**ranking.model_dump())
    highest = ranking.objective == "max" or ranking.acquisition == "ei"
    parts = [
        f"{own['target']} of {own['reference']}: {words}, "
        f"{'highest' if highest else 'lowest'} first"
    ]
    if not ranking.include_out_of_domain:
        parts.append("candidates out of the model's domain left out")
    if ranking.new_compositions:
        parts.append("known compositions left out")
    for name, limit in (
        ("at least", ranking.min_novelty),
        ("at most", ranking.max_novelty),
    ):
        if limit is not None:
            parts.append(f"novelty {name} {limit:g}")
    return "; ".join(parts)


def _description(screen: Screen) -> str:
    text = json.dumps(
        {name: screen.spec[name] for name in ("candidates", "filters", "known_set")},
        ensure_ascii=False,
    )
    return text if len(text) <= _DESCRIPTION else f"{text[:_DESCRIPTION]} …"


def _model_part(
    database: Any,
    registry: ModelRegistry,
    own: dict[str, Any],
    summary: tuple[ModelSummary, ...],
) -> ScreenModelPart:
    record = registry.get(own["reference"])
    calibration: CalibrationCurve | NotAvailable = NotAvailable(
        reason="no held-out predictions are stored"
    )
    n_test = 0
    if record.details is not None:
        details = json.loads(get_artifact(database, record.details))
        part = evaluation_part(record, details, {})
        if isinstance(part, NotAvailable):
            calibration = part
        else:
            n_test = len(part.targets)
            calibration = part.calibration or NotAvailable(
                reason="the training stated no intervals"
            )
    found = summary[0] if summary else None
    return ScreenModelPart(
        reference=own["reference"],
        target=own["target"],
        unit=own["unit"] or "",
        sha256=own["sha256"],
        edges=() if found is None else tuple(found.edges.tolist()),
        counts=() if found is None else tuple(found.counts.tolist()),
        outside=() if found is None else tuple(found.outside.tolist()),
        mean_std=None if found is None else found.mean_std,
        mean_half_width=None if found is None else found.mean_half_width,
        test_mae=metric_of(record, "mae", "test"),
        calibration=calibration,
        n_test=n_test,
    )


def _rows(store: ScreenStore, screen: Screen, indices: list[int]) -> list[ScreenRow]:
    source = open_candidates(screen.spec["candidates"]) if indices else None
    chunks: dict[int, ChunkResult] = {}
    rows = []
    for rank, index in enumerate(indices, start=1):
        assert source is not None
        start = index - index % screen.chunk
        if start not in chunks:
            chunks[start] = store.chunk_of(screen, index)
        chunk = chunks[start]
        place = int(np.searchsorted(chunk.indices, index))
        formula, picture, n_sites = _crystal(source, index)
        rows.append(
            ScreenRow(
                rank=rank,
                candidate=index,
                label=source.label(index),
                formula=formula,
                n_sites=n_sites,
                known_composition=bool(chunk.known[place]),
                predictions=tuple(
                    ScreenPrediction(
                        mean=float(model.mean[place]),
                        std=None if model.std is None else float(model.std[place]),
                        half_width=(
                            None
                            if model.half_width is None
                            else float(model.half_width[place])
                        ),
                        out_of_domain=bool(model.out_of_domain[place]),
                    )
                    for model in chunk.models
                ),
                structure=picture,
            )
        )
    return rows


def _crystal(
    source: CandidateSource, index: int
) -> tuple[str, CrystalPicture | None, int]:
    flat = source.window(index, index + 1)
    symbols = [element_symbol(int(z)) for z in flat.numbers]
    names = sorted(set(symbols))
    counts = [symbols.count(name) for name in names]
    formula = "".join(
        f"{name}{n if n > 1 else ''}" for name, n in zip(names, counts, strict=True)
    )
    if len(symbols) > _PICTURE_SITES:
        return formula, None, len(symbols)
    picture = CrystalPicture(
        lattice=flat.lattices[0], frac_coords=flat.frac_coords, symbols=tuple(symbols)
    )
    return formula, picture, len(symbols)
