"""The sentences of a report, each computed from the data it stands above."""

from __future__ import annotations

from collections import Counter

import numpy as np
from markupsafe import Markup

from nanoos_fw.reports.data import (
    Average,
    Discovery,
    Evaluation,
    Failure,
    Funnel,
    Labels,
    MDPanel,
    MissingRun,
    NotAvailable,
    Provenance,
    Quantity,
    RankedCandidate,
    Ranking,
    ReportData,
    Scores,
    Training,
    regression_scores,
)
from nanoos_fw.reports.formatting import (
    duration,
    energy,
    formula,
    milli,
    number,
    percent,
    plural,
    prototype,
    significant,
    with_error,
)
from nanoos_fw.reports.screen_data import ScreenPart
from nanoos_fw.reports.statistics import (
    Coverage,
    agreement,
    coverage,
    discovery_result,
    sigma_coverages,
)

_BEST_SHOWN = 3


def model_scores(part: Evaluation) -> Scores:
    """Return the scores of the model on the test part."""
    return regression_scores("network ensemble", part.targets, part.predictions)


def abstract(data: ReportData) -> Markup:
    """Return the paragraph at the head of the report."""
    sentences = [
        _abstract_funnel(data.funnel),
        _abstract_model(data),
        _abstract_best(data.ranking),
        _abstract_relaxed(data.ranking),
        _abstract_discovery(data.discovery),
        _abstract_md(data.md),
    ]
    return Markup(" ").join(sentences)


def _abstract_funnel(part: Funnel | NotAvailable) -> Markup:
    if isinstance(part, NotAvailable):
        return Markup("Candidate counts are not available: {}.").format(part.reason)
    failed = part.labelled.failed
    return Markup("Of {}, {} {} labelled{} and {} screened.").format(
        plural(part.candidates, "candidate structure"),
        number(part.labelled.finished),
        "was" if part.labelled.finished == 1 else "were",
        f" ({plural(failed, 'failure')})" if failed else "",
        number(part.screened.finished),
    )


def _abstract_model(data: ReportData) -> Markup:
    part = data.evaluation
    if isinstance(part, NotAvailable):
        return Markup("The error of the model is not available: {}.").format(
            part.reason
        )
    scores = model_scores(part)
    who = "The model"
    if isinstance(data.training, Training):
        who = f"The ensemble of {plural(len(data.training.members), 'model')}"
    error = _error(part.quantity, scores.mae)
    text = Markup("{} has a mean absolute error of {} on {}").format(
        who, error, plural(len(part.targets), "held-out structure")
    )
    if isinstance(part.mean_predictor, NotAvailable):
        return text + Markup("; the baseline is not available: {}.").format(
            part.mean_predictor.reason
        )
    return text + Markup(", against {} for always predicting the mean.").format(
        _error(part.quantity, part.mean_predictor.mae)
    )


def _error(quantity: Quantity, value: float) -> str:
    return quantity.with_unit(quantity.error(value), error=True)


def _prediction(part: Ranking, row: RankedCandidate) -> str:
    number_ = part.quantity.value(row.predicted, row.uncertainty)
    return part.quantity.with_unit(number_)


def _abstract_best(part: Ranking | NotAvailable) -> Markup:
    if isinstance(part, NotAvailable):
        return Markup("The ranking is not available: {}.").format(part.reason)
    best = Markup(", ").join(
        Markup("{}{} ({})").format(
            formula(row.formula), _in_prototype(row), _prediction(part, row)
        )
        for row in part.candidates[:_BEST_SHOWN]
    )
    if part.quantity == Quantity():
        text = Markup("The {} predicted formation energies are those of {}.")
        return text.format(part.end, best)
    return Markup("The {} predictions of {} are those of {}.").format(
        part.end, part.quantity.name, best
    )


def _in_prototype(row: RankedCandidate) -> Markup:
    if not row.prototype:
        return Markup("")
    return Markup(" in {}").format(prototype(row.prototype))


def _abstract_relaxed(part: Ranking | NotAvailable) -> Markup:
    found = None if isinstance(part, NotAvailable) else agreement(part)
    if found is None:
        return Markup("No prediction was checked by relaxation with LAMMPS.")
    return Markup(
        "The prediction of the {} checked by relaxation with LAMMPS is off by {} "
        "meV/atom on average."
    ).format(plural(found.n, "top candidate"), milli(found.mean_absolute))


def _abstract_discovery(part: Discovery | NotAvailable) -> Markup:
    if isinstance(part, NotAvailable):
        return Markup(
            "How many of the truly best candidates were found is not verified: {}."
        ).format(part.reason)
    result = discovery_result(part)
    return Markup(
        "Verified over {}, {} of the true top {} rank{} in the predicted top {}."
    ).format(
        plural(result.n, "computed candidate"),
        number(result.found),
        result.k,
        "s" if result.found == 1 else "",
        result.k,
    )


def _abstract_md(part: tuple[MDPanel | MissingRun, ...] | NotAvailable) -> Markup:
    if isinstance(part, NotAvailable):
        return Markup("Molecular dynamics is not available: {}.").format(part.reason)
    finished = sum(isinstance(run, MDPanel) for run in part)
    return Markup("{} of {} finished.").format(
        number(finished), plural(len(part), "molecular dynamics run")
    )


def funnel_finding(part: Funnel) -> Markup:
    """Return what became of the candidates, failures and open work included."""
    stages = (part.labelled, part.screened, part.relaxed, part.simulated)
    failed = sum(stage.failed for stage in stages)
    pending = sum(stage.pending for stage in stages)
    return Markup("{} led to {} and {}; {} failed on the way and {}.").format(
        plural(part.candidates, "candidate"),
        plural(part.relaxed.finished, "relaxed structure"),
        plural(part.simulated.finished, "finished simulation"),
        plural(failed, "step"),
        f"{number(pending)} {'is' if pending == 1 else 'are'} pending",
    )


def labels_finding(part: Labels) -> Markup:
    """Return range and sign of the labels and the most stable prototype."""
    groups = {k: np.asarray(v) for k, v in part.energies_by_prototype.items() if v}
    energies = np.concatenate(list(groups.values()))
    lowest = min(groups, key=lambda name: (float(np.median(groups[name])), name))
    text = Markup(
        "{} span {} to {} eV/atom (median {}); {} of them lie below zero"
    ).format(
        plural(len(energies), "formation energy", "formation energies"),
        energy(float(energies.min())),
        energy(float(energies.max())),
        energy(float(np.median(energies))),
        percent(float(np.mean(energies < 0))),
    )
    if len(groups) == 1:
        return text + Markup(". All belong to prototype {}.").format(prototype(lowest))
    return text + Markup(". Of {} prototypes, {} has the lowest median ({}).").format(
        number(len(groups)),
        prototype(lowest),
        energy(float(np.median(groups[lowest]))),
    )


def training_finding(part: Training) -> Markup:
    """Return the best validation errors, and whether training ended too early."""
    best = sorted(member.best_validation_mae for member in part.members)
    epochs = sorted(member.best_epoch for member in part.members)
    n = len(part.members)
    if n == 1:
        text = Markup(
            "The model reached its best validation MAE, {}, at epoch {}."
        ).format(_error(part.quantity, best[0]), number(epochs[0]))
    else:
        text = Markup(
            "The {} members reached best validation MAEs of {} to {}, at epochs {} to "
            "{}."
        ).format(
            number(n),
            part.quantity.error(best[0]),
            _error(part.quantity, best[-1]),
            number(epochs[0]),
            number(epochs[-1]),
        )
    unfinished = sum(m.best_epoch == m.epochs[-1] for m in part.members)
    if unfinished:
        text += Markup(
            " {} of {} still improved at the last epoch: longer training may help."
        ).format(number(unfinished), number(n))
    return text


def evaluation_finding(part: Evaluation) -> Markup:
    """Return the test error against the mean predictor and any other baseline."""
    scores = model_scores(part)
    n = plural(len(part.targets), "structure")
    text = Markup("On {} never used in training or selection, the MAE is {}")
    text = text.format(n, _error(part.quantity, scores.mae))
    if isinstance(part.mean_predictor, NotAvailable):
        return text + Markup("; the mean predictor is not available: {}.").format(
            part.mean_predictor.reason
        )
    others = [part.mean_predictor, *part.baselines]
    text += Markup("; the mean predictor has {}").format(
        _error(part.quantity, others[0].mae)
    )
    text += Markup(" ({}).").format(_compared(scores.mae, others[0].mae))
    better = [other for other in part.baselines if other.mae <= scores.mae]
    for other in better:
        text += Markup(" The baseline “{}” is as good or better ({}).").format(
            other.name, _error(part.quantity, other.mae)
        )
    return text


def _compared(model: float, baseline: float) -> str:
    if model >= baseline:
        return "the model is no better"
    if model == 0:
        return "the model has no error"
    return f"{significant(baseline / model, 2)} times the model's error"


def coverage_statement(part: Evaluation) -> Markup:
    """Return how often the stated uncertainties hold on the test part."""
    sigmas = sigma_coverages(part)
    if sigmas is None:
        text = Markup("The model states no uncertainty.")
    else:
        one, two = sigmas
        text = Markup(
            "The test error is at most σ for {} of the structures ({} expected of "
            "well-calibrated Gaussian errors) and at most 2σ for {} ({} expected): {}."
        ).format(
            percent(one.observed),
            percent(one.expected),
            percent(two.observed),
            percent(two.expected),
            _verdict(one, two, len(part.targets)),
        )
    if part.interval is not None:
        errors = np.subtract(part.predictions, part.targets)
        held = coverage(
            errors, np.asarray(part.interval.half_widths), part.interval.level
        )
        text += Markup(
            " The {} interval ({}) holds {} of the test structures; its mean half "
            "width is {}."
        ).format(
            percent(held.expected),
            part.interval.method,
            percent(held.observed),
            _error(part.quantity, float(np.mean(part.interval.half_widths))),
        )
    return text


def _verdict(one: Coverage, two: Coverage, n: int) -> str:
    verdicts = {one.verdict, two.verdict}
    if "too small" in verdicts:
        return (
            "the stated uncertainties are too small; use σ to compare candidates, not "
            "as an error bar"
        )
    if "too large" in verdicts:
        return "the stated uncertainties are too large"
    return (
        f"compatible with calibrated uncertainties, as far as {plural(n, 'structure')} "
        "can tell"
    )


def ranking_finding(part: Ranking) -> Markup:
    """Return the best candidate and how the relaxed ones compare with LAMMPS."""
    best = part.candidates[0]
    text = Markup("{}{} has the {} predicted {} of {}, {}.").format(
        formula(best.formula),
        _in_prototype(best),
        part.end,
        part.quantity.name,
        plural(part.n_ranked, "candidate"),
        _prediction(part, best),
    )
    if not part.has_lammps:
        return text
    found = agreement(part)
    if found is None:
        return text + Markup(" None of the candidates shown was relaxed with LAMMPS.")
    side = "below" if found.mean_signed < 0 else "above"
    return text + Markup(
        " On the {} relaxed with LAMMPS the prediction is off by {} meV/atom on "
        "average (mean signed difference {}: predictions lie {} LAMMPS on the whole); "
        "the largest difference is {} meV/atom for {}."
    ).format(
        number(found.n),
        milli(found.mean_absolute),
        milli(found.mean_signed),
        side,
        milli(found.largest),
        formula(found.largest_formula),
    )


def discovery_finding(part: Discovery) -> Markup:
    """Return how many of the truly best candidates the ranking found."""
    result = discovery_result(part)
    text = Markup(
        "{found} of the true top {k} among {n} computed candidates rank in the "
        "predicted top {k}: precision@{k} = {precision} (a random order: {random}). "
        "All {k} are within the first {last} candidates of the predicted order."
    ).format(
        found=number(result.found),
        k=result.k,
        n=number(result.n),
        precision=number(result.precision, 2),
        random=significant(result.random_precision, 2),
        last=number(result.ranks[-1]),
    )
    if part.n_failed:
        text += Markup(" {} could not be computed and {} left out.").format(
            plural(part.n_failed, "candidate"), "is" if part.n_failed == 1 else "are"
        )
    return text


def md_finding(part: tuple[MDPanel | MissingRun, ...]) -> Markup:
    """Return how many runs finished and how well they kept their temperature."""
    panels = [run for run in part if isinstance(run, MDPanel)]
    text = Markup("{} of {} finished").format(
        number(len(panels)), plural(len(part), "simulation")
    )
    offsets = [
        abs(panel.temperature_k.average.mean - panel.temperature_k.set_point)
        for panel in panels
        if isinstance(panel.temperature_k.average, Average)
        and panel.temperature_k.set_point is not None
    ]
    if not offsets:
        return text + Markup(".")
    return text + Markup(
        "; mean temperatures are within {} K of the thermostat's set point."
    ).format(number(max(offsets), 1))


def panel_finding(panel: MDPanel) -> Markup:
    """Return the averages of one run in a sentence."""
    parts = []
    temperature, volume = panel.temperature_k.average, panel.volume_a3.average
    if isinstance(temperature, Average):
        parts.append(
            f"a mean temperature of "
            f"{with_error(temperature.mean, temperature.standard_error)} K"
        )
    if isinstance(volume, Average):
        error = volume.standard_error
        scaled = None if error is None else error / panel.n_atoms
        parts.append(
            f"a mean volume of {with_error(volume.mean / panel.n_atoms, scaled)} "
            "Å³ per atom"
        )
    if not isinstance(panel.rdf, NotAvailable):
        peak = panel.rdf.r[int(np.argmax(panel.rdf.total))]
        parts.append(f"its highest RDF maximum at {number(peak, 2)} Å")
    if not parts:
        return Markup("The run finished; no averages were computed.")
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
    return Markup("The run shows {}.").format(text)


def failures_finding(part: tuple[Failure, ...]) -> Markup:
    """Return the number of failures and their commonest cause."""
    if not part:
        return Markup("No step of the campaign failed.")
    causes: Counter[tuple[str, str]] = Counter()
    for failure in part:
        causes[failure.stage, failure.cause] += failure.count
    total = sum(causes.values())
    (stage, cause), count = causes.most_common(1)[0]
    return Markup(
        "{} failed; the commonest cause is “{}” in stage {} ({} of {})."
    ).format(plural(total, "step"), cause, stage, number(count), number(total))


def provenance_finding(part: Provenance) -> Markup:
    """Return what the campaign cost and on how many machines it ran."""
    where = plural(len(part.hosts), "host")
    what = plural(len(part.versions), "package version")
    if isinstance(part.timings, NotAvailable) or not part.timings:
        return Markup("{} and {} are recorded.").format(where, what)
    text = Markup("The stages took {} of wall time in {}").format(
        duration(sum(row.wall_s for row in part.timings)),
        plural(sum(row.tasks for row in part.timings), "task"),
    )
    hours = [row.core_hours for row in part.timings if row.core_hours is not None]
    if len(hours) == len(part.timings):
        text += Markup(", {} core hours").format(significant(sum(hours), 3))
    return text + Markup("; {} and {} are recorded.").format(where, what)


def screen_finding(part: ScreenPart) -> Markup:
    """Return how far a screening is, what it cost and what is best."""
    if not part.screened:
        return Markup("Of {} none is screened yet.").format(
            plural(part.n_candidates, "candidate")
        )
    done = (
        Markup("All {}").format(plural(part.n_candidates, "candidate"))
        if part.screened == part.n_candidates
        else Markup("{} of {}").format(
            number(part.screened), plural(part.n_candidates, "candidate")
        )
    )
    text = Markup("{} screened, {} of them predicted, in {} core-hours.").format(
        done, number(part.predicted), significant(part.core_hours, 3)
    )
    if part.core_hours_estimated:
        share = part.screened / part.n_candidates
        text += Markup(
            " At the throughput measured before submission these would be {}."
        ).format(significant(part.core_hours_estimated * share, 3))
    if part.best:
        best = part.best[0]
        text += Markup(" Best is {}.").format(formula(best.formula))
    return text
