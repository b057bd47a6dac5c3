"""The section on active learning: its rounds, and how fast it found what is good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from pydantic import NonNegativeInt, PositiveInt

from nanoos_fw.reports.base import ReportModel, Text
from nanoos_fw.reports.drawing import MUTED, PALETTE, Figure, Trace, rounded
from nanoos_fw.reports.formatting import number, plural, significant
from nanoos_fw.stores.active import ActiveStore, Round


class ActiveRound(ReportModel):
    """A round; values in the unit of the target, None where there is none yet.

    Parameters
    ----------
    batch, failed
        Candidates given out to be labelled, and those without a label.
    labelled
        Given out up to this round.
    best, best_mean
        Of all labels so far: the best, and the mean of the best few.
    prediction_mae
        Error on the batch of the model that chose it, made before it had labels.
    validation_mae
        Of the model trained on it.
    found
        Of the truly best candidates, how many have been given out; None if not all
        are known.
    """

    number: NonNegativeInt
    batch: NonNegativeInt
    failed: NonNegativeInt | None
    labelled: NonNegativeInt
    best: float | None
    best_mean: float | None
    prediction_mae: float | None
    within_1_std: float | None
    validation_mae: float | None
    model: str | None
    dataset: str | None
    found: NonNegativeInt | None = None


class ActiveLearning(ReportModel):
    """An active-learning campaign.

    Parameters
    ----------
    objective
        ``min`` or ``max``.
    top, k
        Labels in ``best_mean``; truly best candidates that ``found`` counts.
    candidates
        Of which they are chosen.
    stop
        Why it ended; None while it goes on.
    """

    target: Text
    unit: str
    objective: Text
    acquisition: Text
    diversity: Text
    top: PositiveInt
    k: PositiveInt
    candidates: NonNegativeInt
    rounds: tuple[ActiveRound, ...]
    stop: str | None


def active_part(
    database: Any,
    campaign: str,
    plan: Mapping[str, Any],
    candidates: int,
    truth: Mapping[str, float] | None,
) -> ActiveLearning | None:
    """Return the rounds of a campaign; None if it does not learn actively.

    Parameters
    ----------
    plan
        Of the campaign.
    candidates
        How many.
    truth
        True values of all candidates by structure key, if they are known.
    """
    if "selection" not in plan:
        return None
    rounds = ActiveStore(database).rounds(campaign)
    k, sign = int(plan["top_k"]), 1.0 if plan["objective"] == "min" else -1.0
    best: set[str] | None = None
    if truth is not None and len(truth) > k:
        best = set(sorted(truth, key=lambda key: (sign * truth[key], key))[:k])
    rows: list[ActiveRound] = []
    given: set[str] = set()
    for entry in rounds:
        if entry.stop is None:
            given |= set(entry.batch)
            rows.append(_row(entry, given, best))
    stop = rounds[-1].stop if rounds else None
    dataset = next((r.dataset for r in rounds if r.dataset is not None), None) or {}
    return ActiveLearning(
        target=plan["training"]["target"],
        unit=str(dataset.get("unit") or plan["dataset"].get("unit") or ""),
        objective=plan["objective"],
        acquisition=plan["selection"]["acquisition"],
        diversity=plan["selection"]["diversity"],
        top=int(plan["stop"]["top"]),
        k=k,
        candidates=candidates,
        rounds=tuple(rows),
        stop=None if stop is None else stop["reason"],
    )


def active_finding(part: ActiveLearning) -> Markup:
    """Return where the campaign stands, in a sentence or two."""
    if not part.rounds:
        return Markup("No batch has been chosen yet.")
    last = part.rounds[-1]
    text = Markup("{} of {} were given out to be labelled in {}.").format(
        number(last.labelled),
        plural(part.candidates, "candidate"),
        plural(len(part.rounds), "round"),
    )
    known = [row.best for row in part.rounds if row.best is not None]
    if known:
        text += Markup(" The best label so far is {} {}.").format(
            significant(known[-1], 5), part.unit
        )
    if last.found is not None:
        text += Markup(
            " Of the true top {} of all candidates, {} are among them."
        ).format(part.k, last.found)
    return text + Markup(" {}").format(
        f"It ended: {part.stop}." if part.stop else "It goes on."
    )


def active_figures(part: ActiveLearning) -> list[Figure]:
    """Return what was found, and how well it was predicted, against labels."""
    figures = [_best_figure(part), _error_figure(part)]
    if part.rounds and part.rounds[-1].found is not None:
        figures.append(_found_figure(part))
    return [figure for figure in figures if figure.data]


# ------------------------------------------------------------------------- private


def _row(entry: Round, given: set[str], best: set[str] | None) -> ActiveRound:
    dataset, model = entry.dataset or {}, entry.model or {}
    errors = dataset.get("errors") or {}
    validation = (model.get("metrics") or {}).get("val") or {}
    return ActiveRound(
        number=entry.number,
        batch=len(entry.picks),
        failed=dataset.get("n_failed"),
        labelled=len(given),
        best=dataset.get("best"),
        best_mean=dataset.get("best_mean"),
        prediction_mae=errors.get("mae"),
        within_1_std=errors.get("within_1_std"),
        validation_mae=validation.get("mae"),
        model=model.get("reference"),
        dataset=dataset.get("hash"),
        found=None if best is None else len(best & given),
    )


def _line(part: ActiveLearning, field: str, name: str, colour: int) -> list[Trace]:
    points = [
        (row.labelled, value)
        for row in part.rounds
        if (value := getattr(row, field)) is not None
    ]
    if not points:
        return []
    x, y = zip(*points, strict=True)
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": list(x),
            "y": rounded(y),
            "line": {"color": PALETTE[colour], "width": 2},
            "hovertemplate": "%{x} labels: %{y:.4g}",
        }
    ]


def _layout(part: ActiveLearning, title: str, *, zero: bool = False) -> dict[str, Any]:
    y: dict[str, Any] = {"title": {"text": title}}
    if zero:
        y["rangemode"] = "tozero"
    return {
        "xaxis": {"title": {"text": "Candidates given out"}, "rangemode": "tozero"},
        "yaxis": y,
    }


def _with_unit(part: ActiveLearning, words: str) -> str:
    return f"{words} ({part.unit})" if part.unit else words


def _best_figure(part: ActiveLearning) -> Figure:
    data = _line(part, "best", "Best label", 0)
    if part.top > 1:
        data += _line(part, "best_mean", f"Mean of the best {part.top}", 1)
    return Figure(
        name="active-best",
        label="Best labels found against candidates given out",
        caption=Markup("Best labels found so far, after each round."),
        data=data,
        layout=_layout(part, _with_unit(part, part.target.replace("_", " "))),
        height=340,
    )


def _error_figure(part: ActiveLearning) -> Figure:
    return Figure(
        name="active-errors",
        label="Errors of the models against candidates given out",
        caption=Markup(
            "Mean absolute error of the model of each round on its validation part, "
            "and of the model before on the batch, predicted before it had labels. "
            "Batches are chosen where the model expects much or knows little, so the "
            "latter is no estimate for candidates at random."
        ),
        data=[
            *_line(part, "validation_mae", "Validation", 0),
            *_line(part, "prediction_mae", "Batch, beforehand", 1),
        ],
        layout=_layout(part, _with_unit(part, "Mean absolute error"), zero=True),
        height=340,
    )


def _found_figure(part: ActiveLearning) -> Figure:
    data = _line(part, "found", "Active learning", 0)
    share = part.k / max(1, part.candidates)
    x = [0, part.rounds[-1].labelled]
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Expected at random",
            "x": x,
            "y": rounded(share * value for value in x),
            "line": {"color": MUTED, "width": 1.4, "dash": "dash"},
            "hovertemplate": "%{x} labels: %{y:.2f}",
        }
    )
    return Figure(
        name="active-found",
        label="Truly best candidates found against candidates given out",
        caption=Markup(
            "How many of the true top {} of all {} candidates had been given out."
        ).format(part.k, number(part.candidates)),
        data=data,
        layout=_layout(part, f"Of the true top {part.k}", zero=True),
        height=340,
    )
