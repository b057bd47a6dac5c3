"""The HTML page: figures, tables and sentences put into the shipped template."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from nanoos_fw.errors import InputError
from nanoos_fw.reports import active, findings, formatting
from nanoos_fw.reports.candidate_figures import (
    discovery_figure,
    md_figure,
    msd_figure,
    rdf_figure,
    top_figure,
    vdos_figure,
)
from nanoos_fw.reports.data import (
    CrystalPicture,
    MDPanel,
    MissingRun,
    NotAvailable,
    ReportData,
    Scores,
    ThermoSeries,
)
from nanoos_fw.reports.drawing import TEMPLATE, Figure
from nanoos_fw.reports.learning_figures import (
    calibration_figure,
    labels_figure,
    learning_figures,
    parity_figure,
    uncertainty_figure,
)
from nanoos_fw.reports.pictures import structure_svg
from nanoos_fw.reports.screen_data import ScreenPart
from nanoos_fw.reports.screen_figures import screen_figures
from nanoos_fw.reports.statistics import discovery_result
from nanoos_fw.templates import load_template

_PICTURE_SIZE = 64


@dataclass(frozen=True)
class KeyFigure:
    """One tile at the head: a name, a value with its unit, and a remark."""

    name: str
    value: Markup | str
    unit: str
    remark: Markup | str


@dataclass(frozen=True)
class AverageRow:
    """One row of a table of averages, as text."""

    name: str
    unit: str
    value: str
    set_point: str


def render_report(data: ReportData) -> str:
    """Return the campaign report as one self-contained HTML text.

    The file needs no network and no other file: plotly.js is inlined once, and the
    page forbids every request by its content security policy. Write it with
    :func:`nanoos_fw.provenance.write_atomic`.

    Parameters
    ----------
    data
        All that is shown. A part that is :class:`~nanoos_fw.reports.NotAvailable`
        appears as "not available" with its reason.

    Notes
    -----
    Equal data give equal text. About 5 MB, nearly all of it plotly.js.
    """
    return _whole_page(
        f"{data.campaign}: campaign report",
        "body.html",
        data=data,
        sections=_Sections(data),
        key_figures=_key_figures(data),
    )


def render_run(panel: MDPanel, back: str) -> str:
    """Return the page of one molecular dynamics run, self-contained like a report.

    Parameters
    ----------
    back
        Address that the page links back to.
    """
    title = f"{panel.formula}: molecular dynamics"
    return _whole_page(title, "run.html", run=panel, back=back)


def render_screen(part: ScreenPart, back: str = "") -> str:
    """Return the page of one screening, self-contained like a report.

    Parameters
    ----------
    part
        All that is shown; as large for a million candidates as for a hundred.
    back
        Address that the page links back to, if any.
    """
    return _whole_page(f"{part.name}: screening", "screen.html", s=part, back=back)


def _whole_page(title: str, template: str, **values: Any) -> str:
    environment = _environment()
    figures = _Figures()
    scripts = {"plotly": _plotly_script(), "page": load_template("reports/page.js")}
    body = environment.get_template(template).render(
        figures=figures,
        tables=itertools.count(1),
        figure_numbers=itertools.count(1),
        active=active,
        findings=findings,
        averages=averages,
        missing=_is_missing,
        picture=picture,
        section_numbers=itertools.count(1),
        **values,
    )
    return environment.get_template("report.html").render(
        title=title,
        body=Markup(body),
        style=Markup(load_template("reports/style.css")),
        figure_data=Markup(_script_json(figures.drawn)),
        scripts={name: Markup(text) for name, text in scripts.items()},
        script_hashes=[_script_hash(text) for text in scripts.values()],
    )


class _Figures:
    """Makes the figures asked for by the template and keeps them for the script."""

    def __init__(self) -> None:
        self.drawn: dict[str, Figure] = {}

    def _keep(self, figure: Figure) -> Figure:
        self.drawn[figure.name] = figure
        return figure

    def labels(self, data: ReportData) -> Figure:
        return self._keep(labels_figure(_present(data.labels)))

    def learning(self, data: ReportData) -> list[Figure]:
        return [self._keep(f) for f in learning_figures(_present(data.training))]

    def evaluation(self, data: ReportData) -> list[Figure]:
        part = _present(data.evaluation)
        found = [parity_figure(part), uncertainty_figure(part)]
        if part.calibration is not None:
            found.append(calibration_figure(part.calibration, len(part.targets)))
        return [self._keep(figure) for figure in found]

    def top(self, data: ReportData) -> Figure | None:
        figure = top_figure(_present(data.ranking))
        return None if figure is None else self._keep(figure)

    def discovery(self, data: ReportData) -> Figure:
        return self._keep(discovery_figure(_present(data.discovery)))

    def active(self, data: ReportData) -> list[Figure]:
        assert data.active is not None
        return [self._keep(figure) for figure in active.active_figures(data.active)]

    def screen(self, part: ScreenPart, prefix: str) -> list[Figure]:
        return [self._keep(figure) for figure in screen_figures(part, prefix)]

    def thermo(self, panel: MDPanel) -> Figure:
        return self._keep(md_figure(panel, f"md-{panel.rank}"))

    def rdf(self, panel: MDPanel) -> Figure:
        assert not isinstance(panel.rdf, NotAvailable)
        return self._keep(rdf_figure(panel.rdf, panel, f"md-{panel.rank}"))

    def msd(self, panel: MDPanel) -> Figure:
        return self._keep(msd_figure(_present(panel.msd), panel, f"md-{panel.rank}"))

    def vdos(self, panel: MDPanel) -> Figure:
        return self._keep(vdos_figure(_present(panel.vdos), panel, f"md-{panel.rank}"))


class _Sections:
    """Answers of the template's questions that are longer than an expression."""

    def __init__(self, data: ReportData) -> None:
        self._data = data

    def scores(self) -> list[Scores]:
        part = _present(self._data.evaluation)
        rows = [findings.model_scores(part)]
        if not isinstance(part.mean_predictor, NotAvailable):
            rows.append(part.mean_predictor)
        return [*rows, *part.baselines]


def picture(cell: CrystalPicture | None) -> Markup:
    """Return the drawing of a cell, or why there is none."""
    if cell is None:
        return Markup('<span class="muted">no picture</span>')
    try:
        return Markup(
            structure_svg(cell.lattice, cell.frac_coords, cell.symbols, _PICTURE_SIZE)
        )
    except InputError as error:
        return Markup('<span class="muted">not available: {}</span>').format(
            error.message
        )


def averages(panel: MDPanel) -> list[AverageRow]:
    """Return the rows of the table of averages of a run."""
    rows = [
        _average_row("Temperature", "K", panel.temperature_k, 1),
        _average_row("Pressure", "bar", panel.pressure_bar, 1),
        _average_row("Volume of the cell", "Å³", panel.volume_a3, 1),
        _average_row(
            "Potential energy",
            "eV/atom",
            panel.potential_energy_ev,
            panel.n_atoms,
        ),
    ]
    rows += [
        AverageRow(
            average.name[:1].upper() + average.name[1:],
            average.unit,
            formatting.with_error(average.mean, average.standard_error),
            "–",
        )
        for average in panel.other_averages
    ]
    return rows


def _average_row(
    name: str, unit: str, series: ThermoSeries, divisor: int
) -> AverageRow:
    average = series.average
    if isinstance(average, NotAvailable):
        value = f"not available: {average.reason}"
    else:
        error = average.standard_error
        value = formatting.with_error(
            average.mean / divisor, None if error is None else error / divisor
        )
    set_point = series.set_point
    return AverageRow(
        name,
        unit,
        value,
        "–" if set_point is None else formatting.plain(set_point / divisor),
    )


def _key_figures(data: ReportData) -> list[KeyFigure]:
    """Return the tiles at the head; an unknown value is said to be so."""
    return [
        *_funnel_tiles(data),
        _error_tile(data),
        _best_tile(data),
        _discovery_tile(data),
    ]


def _funnel_tiles(data: ReportData) -> Iterator[KeyFigure]:
    part = data.funnel
    if isinstance(part, NotAvailable):
        yield KeyFigure("Candidates", "–", "", "not available")
        return
    number = formatting.number
    yield KeyFigure(
        "Candidates",
        number(part.candidates),
        "",
        f"{number(part.screened.finished)} screened",
    )
    yield KeyFigure(
        "Labelled",
        number(part.labelled.finished),
        "",
        formatting.plural(part.labelled.failed, "failure"),
    )


def _error_tile(data: ReportData) -> KeyFigure:
    part = data.evaluation
    if isinstance(part, NotAvailable):
        return KeyFigure("Test MAE", "–", "", "not available")
    remark = "baseline not available"
    if not isinstance(part.mean_predictor, NotAvailable):
        mean = part.quantity.error(part.mean_predictor.mae)
        remark = f"mean predictor: {part.quantity.with_unit(mean, error=True)}"
    mae = part.quantity.error(findings.model_scores(part).mae)
    return KeyFigure("Test MAE", mae, part.quantity.error_unit, remark)


def _best_tile(data: ReportData) -> KeyFigure:
    if data.active is not None:
        known = [r.best for r in data.active.rounds if r.best is not None]
        value = formatting.significant(known[-1], 4) if known else "–"
        return KeyFigure("Best label", value, data.active.unit, data.active.target)
    part = data.ranking
    if isinstance(part, NotAvailable):
        return KeyFigure("Best candidate", "–", "", "not available")
    best = part.candidates[0]
    value = part.quantity.value(best.predicted, best.uncertainty)
    return KeyFigure(
        "Best candidate",
        formatting.formula(best.formula),
        "",
        f"{part.quantity.with_unit(value)}, predicted",
    )


def _discovery_tile(data: ReportData) -> KeyFigure:
    if data.active is not None and data.active.rounds:
        found = data.active.rounds[-1].found
        if found is not None:
            title = f"True top {data.active.k} found"
            return KeyFigure(title, str(found), f"of {data.active.k}", "by labels")
    part = data.discovery
    if isinstance(part, NotAvailable):
        return KeyFigure("True top found", "–", "", "not verified")
    result = discovery_result(part)
    by_chance = formatting.significant(result.k * result.random_precision, 2)
    return KeyFigure(
        f"True top {result.k} found",
        str(result.found),
        f"of {result.k}",
        f"expected at random: {by_chance}",
    )


def _present(part: Any) -> Any:
    """Refuse a missing part: the template asks ``missing`` first."""
    assert not isinstance(part, NotAvailable)
    return part


def _is_missing(part: object) -> bool:
    return isinstance(part, NotAvailable | MissingRun)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: load_template(f"reports/{name}")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in (
        "duration",
        "energy",
        "formula",
        "masked",
        "milli",
        "number",
        "percent",
        "plain",
        "plural",
        "prototype",
        "short_key",
        "significant",
    ):
        environment.filters[name] = getattr(formatting, name)
    environment.globals["next"] = next
    return environment


def _plotly_script() -> str:
    from plotly.offline import get_plotlyjs

    text: str = get_plotlyjs()
    if "</script" in text.lower() or "<!--" in text:
        raise InputError(
            "this version of plotly.js cannot be put inside an HTML page",
            advice="install another version of plotly",
        )
    # Line ends as the HTML parser sees them, or its hash of the script differs.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _script_json(figures: dict[str, Figure]) -> str:
    """Return the figures as JSON that no text in them can break out of."""
    text = json.dumps(
        {
            "template": TEMPLATE,
            "figures": {
                name: {"data": figure.data, "layout": figure.layout}
                for name, figure in figures.items()
            },
        },
        separators=(",", ":"),
        allow_nan=False,
        ensure_ascii=False,
    )
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _script_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
