from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup
from pydantic import ValidationError

from nanoos_fw.errors import InputError, StoreError
from nanoos_fw.md.analysis import Analysis
from nanoos_fw.reports import (
    Average,
    CrystalPicture,
    DiffusionResult,
    Discovery,
    Evaluation,
    Failure,
    Funnel,
    Labels,
    MDPanel,
    MemberCurve,
    MissingRun,
    MSDCurves,
    NamedAverage,
    NotAvailable,
    PotentialSource,
    PredictionInterval,
    Provenance,
    Quantity,
    RankedCandidate,
    Ranking,
    RDFCurves,
    ReportData,
    Scores,
    StageCount,
    StageTiming,
    ThermoSeries,
    Training,
    VDOSCurves,
    findings,
    formatting,
    panels,
    pictures,
    regression_scores,
    render_report,
    structure_svg,
)
from nanoos_fw.reports import page as page_module
from nanoos_fw.reports.candidate_figures import (
    discovery_figure,
    md_figure,
    msd_figure,
    vdos_figure,
)
from nanoos_fw.reports.data import AliasMove, CalibrationCurve
from nanoos_fw.reports.drawing import Figure
from nanoos_fw.reports.learning_figures import (
    labels_figure,
    parity_figure,
    uncertainty_figure,
)
from nanoos_fw.reports.panels import evaluation_part
from nanoos_fw.reports.screen_data import (
    ScreenModelPart,
    ScreenOutcome,
    ScreenPart,
    ScreenPrediction,
    ScreenRow,
)
from nanoos_fw.reports.statistics import discovery_result

FCC = [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
CELLS: dict[str, tuple[Any, list[list[float]], list[int]]] = {
    "L1_2": (np.eye(3) * 3.8, FCC, [0, 1, 1, 1]),
    "L1_0": (np.diag([3.9, 3.9, 3.6]), FCC, [0, 0, 1, 1]),
    "B2": (np.eye(3) * 3.0, [[0, 0, 0], [0.5, 0.5, 0.5]], [0, 1]),
    "B1": (
        np.eye(3) * 4.9,
        FCC + [[(x + 0.5) % 1, y, z] for x, y, z in FCC],
        [0] * 4 + [1] * 4,
    ),
    "A15": (
        np.eye(3) * 4.9,
        [
            [0, 0, 0],
            [0.5, 0.5, 0.5],
            [0.25, 0, 0.5],
            [0.75, 0, 0.5],
            [0.5, 0.25, 0],
            [0.5, 0.75, 0],
            [0, 0.5, 0.25],
            [0, 0.5, 0.75],
        ],
        [0, 0, 1, 1, 1, 1, 1, 1],
    ),
}
METALS = ["Cu", "Ag", "Au", "Ni", "Pd", "Pt", "Al", "Ti", "Zr", "Mo", "Ta", "Co"]


def synthetic_screen(rng: np.random.Generator) -> ScreenPart:
    edges = np.linspace(-0.4, 0.3, 61)
    values = np.clip(rng.normal(-0.05, 0.08, 40_000), -0.4, 0.3)
    counts = np.histogram(values, edges)[0]
    rows = tuple(
        ScreenRow(
            rank=rank,
            candidate=int(rng.integers(1_000_000)),
            label=None,
            formula="Al4Ni12",
            n_sites=16,
            known_composition=rank == 2,
            predictions=(
                ScreenPrediction(
                    mean=-0.4 + 0.001 * rank, std=0.02, half_width=0.1,
                    out_of_domain=rank == 3,
                ),
                ScreenPrediction(
                    mean=float(rng.random()), std=None, half_width=None,
                    out_of_domain=False,
                ),
            ),
            structure=CrystalPicture(
                lattice=3.6 * np.eye(3),
                frac_coords=np.array([[0, 0, 0], [0.5, 0.5, 0.5]]),
                symbols=("Al", "Ni"),
            ),
        )
        for rank in range(1, 13)
    )  # fmt: skip
    common: dict[str, Any] = {
        "sha256": "ab" * 32, "edges": edges, "counts": counts, "test_mae": 0.031,
        "outside": counts // 3, "n_test": 100,
    }  # fmt: skip
    levels = np.linspace(0.1, 0.9, 9)
    return ScreenPart(
        name="nickel alloys",
        key="cd" * 20,
        created="2026-03-14T09:30:00+00:00",
        n_candidates=1_000_000,
        outcomes=(
            ScreenOutcome(name="predicted", reason="predicted", count=40_000),
            ScreenOutcome(name="size", reason="fails the filter n_sites", count=12_345),
            ScreenOutcome(name="unreadable", reason="could not be read", count=7),
        ),
        known=120,
        coverage=0.9,
        core_hours=0.0711,
        core_hours_estimated=0.0652,
        rates=(3100.0, 3800.0, 3940.0, 4010.0, 4100.0),
        models=(
            ScreenModelPart(
                reference="energies@3", target="formation_energy_per_atom",
                unit="eV/atom", mean_std=0.02, mean_half_width=0.1,
                calibration=CalibrationCurve(
                    levels=levels, observed=levels + 0.01, n_calibration=100
                ),
                **common,
            ),
            ScreenModelPart(
                reference="gaps@1", target="bandgap", unit="eV", mean_std=None,
                mean_half_width=None,
                calibration=NotAvailable(reason="no held-out predictions are stored"),
                **common,
            ),
        ),
        best=rows,
        n_ranked=30_000,
        ranked_by="formation_energy_per_atom of energies@3: lowest first",
        tie_rule="of equal scores the lower candidate number comes first",
        found_at=np.sort(rng.choice(50_000, 100, replace=False)) + 1,
        description='{"candidates": {"kind": "supercells"}}',
    )  # fmt: skip


def synthetic_report(**changes: Any) -> ReportData:
    """Return invented data in the shape of a real campaign."""
    rng = np.random.default_rng(7)
    order = np.sort(rng.normal(0.02, 0.16, 1180))
    predicted = np.sort(order + rng.normal(0, 0.03, order.size))
    verified = predicted + rng.normal(0.01, 0.03, order.size)
    data: dict[str, Any] = {
        "campaign": "Synthetic binary alloys (test data)",
        "created": datetime(2026, 3, 14, 9, 30, tzinfo=UTC),
        "description": "Invented numbers in the shape of a campaign over 12 metals.",
        "funnel": Funnel(
            candidates=1200,
            labelled=StageCount(planned=320, finished=306, failed=14),
            screened=StageCount(planned=1200, finished=1200),
            relaxed=StageCount(planned=10, finished=9, failed=1),
            simulated=StageCount(planned=3, finished=2, failed=1),
        ),
        "labels": Labels(
            energies_by_prototype={
                name: rng.normal(centre, 0.12, 50 + 11 * i)
                for i, (name, centre) in enumerate(
                    {"L1_2": -0.08, "L1_0": -0.02, "B2": 0.05, "B1": 0.42}.items()
                )
            },
            method="LAMMPS relaxation of cell and atoms with an EAM potential",
        ),
        "screens": (synthetic_screen(np.random.default_rng(3)),),
        "training": synthetic_training(rng),
        "evaluation": synthetic_evaluation(rng),
        "ranking": Ranking(
            candidates=tuple(
                synthetic_row(i, predicted[i - 1], verified[i - 1], rng)
                for i in range(1, 26)
            ),
            n_ranked=1200,
            tie_rule="equal predictions are ordered by content key",
        ),
        "discovery": Discovery(
            energies_in_predicted_order=verified,
            population="candidates never used in training, validation or test",
            n_failed=20,
        ),
        "md": (
            synthetic_run(1, "Ni3Al", "L1_2", rng),
            synthetic_run(2, "TiAl", "L1_0", rng),
            MissingRun(
                rank=3,
                formula="Pt3Zr",
                prototype="L1_2",
                reason="the run lost atoms at step 4 000, see Failures",
            ),
        ),
        "failures": (
            Failure(
                stage="label",
                cause="simulation",
                subject="14 structures of prototype B1",
                message="the relaxation did not reach the force tolerance of "
                "0.001 eV/Å within 5000 steps",
                advice="raise max_steps, or accept fewer labels of this prototype",
                count=14,
            ),
            Failure(
                stage="relax",
                cause="simulation",
                subject="TaMo",
                message="the cell collapsed: volume fell below half its first value",
                advice="look at the structure",
            ),
            Failure(
                stage="md",
                cause="simulation",
                subject="Pt3Zr",
                message="lost 3 of 864 atoms at step 4000",
                advice="rerun with a timestep of 1 fs",
            ),
        ),
        "provenance": synthetic_provenance(),
    }
    return ReportData(**(data | changes))


def synthetic_training(rng: np.random.Generator) -> Training:
    epochs = np.arange(1, 151)
    members = []
    for member in range(1, 5):
        decay = np.exp(-epochs / rng.uniform(22, 30))
        noise = np.exp(rng.normal(0, 0.05, epochs.size))
        mae = (0.022 + 0.13 * decay + 0.00004 * epochs) * noise
        members.append(
            MemberCurve(
                member=member,
                seed=1000 + member,
                epochs=epochs,
                train_loss=(0.004 + 0.9 * decay) * noise,
                validation_mae=mae,
                best_epoch=int(epochs[np.argmin(mae)]),
            )
        )
    return Training(
        members=tuple(members),
        loss_name="mean squared error of the standardised target, no unit",
        n_train=214,
        n_validation=46,
        n_test=46,
        n_parameters=84_353,
        model="energies@2",
        moves=(
            AliasMove(
                alias="active", model="energies@2", time="2026-01-01T00:00:00+00:00",
                by="someone@login", reason="trained",
            ),
            AliasMove(
                alias="active", model=None, time="2026-01-02T00:00:00+00:00",
                by="someone@login", reason="taken off: <b>wrong</b> data",
            ),
        ),
    )  # fmt: skip


def synthetic_evaluation(rng: np.random.Generator) -> Evaluation:
    targets = rng.normal(0.03, 0.2, 46)
    sigma = rng.uniform(0.008, 0.03, 46)
    return Evaluation(
        targets=targets,
        predictions=targets + rng.normal(0, 1.6 * sigma),
        uncertainties=sigma,
        uncertainty_name="standard deviation over 4 ensemble members",
        mean_predictor=Scores(
            name="Mean of the training labels", mae=0.161, rmse=0.204, r2=-0.01
        ),
        baselines=(
            Scores(name="Linear in composition", mae=0.094, rmse=0.121, r2=0.64),
            Scores(name="Mean per prototype", mae=0.118, rmse=0.152, r2=0.44),
        ),
        interval=PredictionInterval(
            level=0.9,
            half_widths=np.full(46, 0.055),
            method="split conformal on the validation part",
        ),
        calibration=CalibrationCurve(
            levels=(0.25, 0.5, 0.75), observed=(0.2, 0.48, 0.8), n_calibration=46
        ),
        formulas=tuple(f"{a}{b}3" for a in METALS[:7] for b in METALS[:7])[:46],
    )


def synthetic_row(
    rank: int, predicted: float, verified: float, rng: np.random.Generator
) -> RankedCandidate:
    name = list(CELLS)[rank % len(CELLS)]
    lattice, coords, kinds = CELLS[name]
    first, second = rng.choice(METALS, 2, replace=False)
    n_first, n_second = kinds.count(0), kinds.count(1)
    divisor = np.gcd(n_first, n_second)
    formula = "".join(
        f"{symbol}{n // divisor if n > divisor else ''}"
        for symbol, n in ((first, n_first), (second, n_second))
    )
    lammps: float | NotAvailable | None = None
    if rank <= 10:
        lammps = float(verified)
    if rank == 7:
        lammps = NotAvailable(reason="the cell collapsed")
    return RankedCandidate(
        rank=rank,
        candidate_id=f"{rank:040x}",
        formula=formula,
        prototype=name,
        predicted=float(predicted),
        uncertainty=float(rng.uniform(0.008, 0.03)),
        lammps=lammps,
        out_of_domain=rank == 9,
        structure=CrystalPicture(
            lattice=lattice,
            frac_coords=coords,
            symbols=tuple(str((first, second)[kind]) for kind in kinds),
        ),
    )


def synthetic_run(
    rank: int, formula: str, prototype: str, rng: np.random.Generator
) -> MDPanel:
    n_atoms, frames = 864, 4001
    time = np.linspace(0, 100, frames)
    production = time >= 20

    def series(
        mean: float, start: float, sigma: float, set_point: float | None
    ) -> ThermoSeries:
        noise = np.zeros(frames)
        kicks = rng.normal(0, sigma * np.sqrt(1 - 0.9**2), frames)
        for i in range(1, frames):
            noise[i] = 0.9 * noise[i - 1] + kicks[i]
        values = mean + (start - mean) * np.exp(-time / 4) + noise
        average = float(values[production].mean())
        return ThermoSeries(
            values=values,
            average=Average(mean=average, standard_error=sigma / np.sqrt(170)),
            set_point=set_point,
        )

    r = np.linspace(0.02, 10, 400)

    def shells(weights: list[float]) -> np.ndarray:
        g = 1 / (1 + np.exp(-(r - 5.9) / 0.2))
        for n, weight in enumerate(weights, start=1):
            g += weight * np.exp(-(((r - 2.52 * np.sqrt(n)) / (0.12 + 0.02 * n)) ** 2))
        g += 0.25 * np.sin(5 * r) * np.exp(-(((r - 7.5) / 1.2) ** 2))
        return np.where(r < 2.0, 0.0, np.maximum(g, 0.0))

    return MDPanel(
        rank=rank,
        candidate_id=f"{rank:040x}",
        formula=formula,
        prototype=prototype,
        ensemble="NPT",
        control="Nosé–Hoover, damping 0.2 ps (temperature) and 2 ps (pressure)",
        n_atoms=n_atoms,
        n_steps=50_000,
        timestep_fs=2.0,
        equilibration_ps=20.0,
        time_ps=time,
        temperature_k=series(300, 610, 8.1, 300.0),
        pressure_bar=series(0, 9000, 900, 0.0),
        volume_a3=series(9750, 9480, 14, None),
        potential_energy_ev=series(-4.51 * n_atoms, -4.58 * n_atoms, 1.1, None),
        other_averages=(
            NamedAverage(
                name="density", unit="g/cm³", mean=7.4362, standard_error=0.0008
            ),
            NamedAverage(
                name="lattice constant", unit="Å", mean=3.5612, standard_error=0.0002
            ),
        ),
        rdf=RDFCurves(
            r=r,
            total=shells([3.4, 0.9, 2.2, 0.6, 1.2]),
            partials={
                "Al-Al": shells([0.1, 1.8, 0.2, 1.1, 0.2]),
                "Al-Ni": shells([4.4, 0.2, 2.9, 0.1, 1.6]),
                "Ni-Ni": shells([3.1, 1.3, 1.9, 0.9, 1.0]),
            },
        ),
        msd=MSDCurves(
            time_ps=np.linspace(0, 20, 201),
            total=0.3 * np.linspace(0, 20, 201),
            by_element={"Al": 0.36 * np.linspace(0, 20, 201)},
            diffusion={
                "all": DiffusionResult(
                    value=0.05, standard_error=0.0012, diffusive=True
                ),
                "Al": DiffusionResult(
                    value=0.06, standard_error=0.0034, diffusive=False
                ),
                "Ni": DiffusionResult(value=None, standard_error=None, diffusive=False),
            },
        ),
        vdos=VDOSCurves(
            frequency_thz=np.linspace(0, 12, 121),
            total=np.linspace(0, 12, 121) ** 2,
            by_element={"Al": np.linspace(0, 12, 121)},
            is_resolved=False,
        ),
    )


def synthetic_provenance() -> Provenance:
    return Provenance(
        versions={
            "nanoos_fw": "0.1.0",
            "lammps": "2025.7.22",
            "torch": "2.9.0",
            "pymatgen": "2026.1.1",
            "python": "3.11.9",
        },
        hosts=("node001", "node002"),
        seeds={"campaign": 42, "split": 7},
        keys={
            "dataset": "0123456789abcdef" * 2 + "01234567",
            "model weights (SHA-256)": "fedcba9876543210" * 4,
        },
        model_name="synthetic-alloys, version 3",
        potential=PotentialSource(
            name="Synthetic EAM, 12 metals",
            citation="A. Author, B. Author, Journal of Invented Results 1, 1 (2000)",
            sha256="00ff" * 16,
        ),
        timings=(
            StageTiming(
                stage="label", tasks=12, wall_s=9120, core_hours=10.1, elapsed_s=1410
            ),
            StageTiming(
                stage="train", tasks=4, wall_s=2380, core_hours=2.6, elapsed_s=655
            ),
            StageTiming(stage="screen", tasks=2, wall_s=31, core_hours=0.034),
            StageTiming(
                stage="md", tasks=3, wall_s=5400, core_hours=24, elapsed_s=2210
            ),
        ),
        settings={
            "database.uri": "mongodb://reader:hunter2@db.example:27017/nanoos",
            "model.ensemble_size": 4,
            "model.cutoff_a": 6.0,
            "md.ensemble": "npt",
            "md.temperature_k": 300.0,
            "screening.top_k": 10,
            "slurm.partition": None,
        },
    )


class Page(HTMLParser):
    """The parts of a page that the tests ask about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.headings: list[int] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._in: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.attributes.append((tag, found))
        self.addresses += [
            value or ""
            for name, value in attrs
            if name in {"src", "href", "srcset", "action", "data", "poster"}
        ]
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag in {"script", "style"}:
            self._in.append(tag)
            if tag == "script":
                self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._in and tag == self._in[-1]:
            self._in.pop()

    def handle_data(self, data: str) -> None:
        if self._in == ["script"]:
            self.scripts[-1] += data
        elif not self._in:
            self.text.append(data)

    @property
    def visible(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.text))

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])["figures"]


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(synthetic_report())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_page_asks_for_nothing_from_outside(html: str, page: Page) -> None:
    assert all(a.startswith("#") or a == "data:," for a in page.addresses)
    styles = "".join(re.findall(r"<style>(.*?)</style>", html, re.S))
    assert "url(" not in styles
    assert "@import" not in styles
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert policy[1].startswith("default-src 'none';")
    assert "http" not in policy[1]


def test_policy_allows_exactly_the_scripts_of_the_page(html: str, page: Page) -> None:
    allowed = set(re.findall(r"'sha256-([^']+)'", html))
    made = {
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in page.scripts[1:]
    }
    assert allowed == made


def test_plotly_is_inlined_once(page: Page) -> None:
    assert [len(script) > 1_000_000 for script in page.scripts] == [False, True, False]


def test_links_inside_the_page_have_their_target(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    targets = {a[1:] for a in page.addresses if a.startswith("#")}
    assert targets
    assert targets <= set(page.ids)


def test_headings_descend_one_level_at_a_time(page: Page) -> None:
    assert page.headings.count(1) == 1
    steps = zip(page.headings, page.headings[1:], strict=False)
    assert all(later - earlier <= 1 for earlier, later in steps)


def test_every_figure_of_the_page_is_drawn_and_labelled(page: Page) -> None:
    boxes = [found for _, found in page.attributes if "data-figure" in found]
    assert [box["data-figure"] for box in boxes] == list(page.figures)
    assert all(box["role"] == "img" and box["aria-label"] for box in boxes)
    assert {"parity", "labels", "discovery", "md-1-thermo", "md-2-rdf"} <= set(
        page.figures
    )
    assert {"md-1-msd", "md-1-vdos"} <= set(page.figures)


def test_displacements_and_vibrations_are_drawn_as_they_are(html: str) -> None:
    run = synthetic_run(1, "Ni3Al", "L1_2", np.random.default_rng(0))
    assert isinstance(run.msd, MSDCurves)
    assert isinstance(run.vdos, VDOSCurves)
    msd, vdos = msd_figure(run.msd, run, "a"), vdos_figure(run.vdos, run, "a")
    assert [trace["name"] for trace in msd.data] == ["All atoms", "Al"]
    np.testing.assert_allclose(msd.data[1]["y"], run.msd.by_element["Al"], atol=2e-3)
    np.testing.assert_allclose(vdos.data[0]["y"], run.vdos.total, atol=0.05)
    np.testing.assert_allclose(vdos.data[0]["x"], run.vdos.frequency_thz, atol=5e-3)
    assert "all atoms: D = 0.0500 ± 0.0012 Å²/ps; Al: D = 0.0600 ± 0.0034" in (
        msd.caption.replace("\N{NO-BREAK SPACE}", " ")
    )
    assert (
        "though the motion is not diffusive; Ni: no diffusive motion found."
        in msd.caption
    )
    assert "too far apart" in vdos.caption


def test_stored_curves_come_back_and_lost_ones_are_said() -> None:
    analysis = Analysis()
    x = np.linspace(0, 2, 5)
    analysis.arrays["msd"] = {"time_ps": x, "total_a2": 2 * x, "Cu_a2": 3 * x}
    fit = {"value": 0.5, "standard_error": 0.1, "diffusive": True, "unit": "Å²/ps"}
    numbers = {"artifact": "digest", "diffusion": {"Cu": fit}}
    found = panels._msd(numbers, {"digest": analysis.packed("msd")}.__getitem__)
    assert isinstance(found, MSDCurves)
    assert found.time_ps == tuple(x)
    assert found.total == tuple(2 * x)
    assert found.by_element == {"Cu": tuple(3 * x)}
    assert found.diffusion["Cu"].standard_error == 0.1
    analysis.arrays["vdos"] = {
        "time_ps": x[:2],
        "vacf": x[:2],
        "frequency_thz": x,
        "total_per_thz": 2 * x,
        "Cu_per_thz": 3 * x,
    }
    numbers = {"artifact": "digest", "is_resolved": True}
    curves = panels._vdos(numbers, lambda _: analysis.packed("vdos"))
    assert isinstance(curves, VDOSCurves)
    assert (curves.total, curves.by_element) == (tuple(2 * x), {"Cu": tuple(3 * x)})

    def lost(digest: str) -> bytes:
        raise StoreError(f"artifact {digest} is gone")

    missing = panels._msd(numbers, lost)
    assert isinstance(missing, NotAvailable)
    assert "is gone" in missing.reason
    assert panels._msd(None, lost) is None
    assert isinstance(panels._vdos({"is_resolved": True}, lost), NotAvailable)


def test_report_of_equal_data_is_equal(html: str) -> None:
    assert render_report(synthetic_report()) == html


def test_data_survive_json() -> None:
    data = synthetic_report()
    assert ReportData.model_validate_json(data.model_dump_json()) == data


HOSTILE = '</script><script>alert("x")</script><img src="http://x.example/y">'


def test_text_of_users_never_becomes_markup() -> None:
    data = synthetic_report()
    assert isinstance(data.ranking, Ranking)
    assert isinstance(data.provenance, Provenance)
    assert isinstance(data.labels, Labels)
    row = data.ranking.candidates[0].model_copy(
        update={"formula": HOSTILE, "prototype": HOSTILE, "candidate_id": HOSTILE}
    )
    hostile = synthetic_report(
        campaign=HOSTILE,
        description=HOSTILE,
        labels=Labels(
            energies_by_prototype={HOSTILE: [0.1, 0.2], "B2": [0.3]}, method=HOSTILE
        ),
        ranking=data.ranking.model_copy(
            update={"candidates": (row, *data.ranking.candidates[1:])}
        ),
        md=(MissingRun(rank=1, formula=HOSTILE, prototype=HOSTILE, reason=HOSTILE),),
        failures=(
            Failure(stage=HOSTILE, cause=HOSTILE, subject=HOSTILE, message=HOSTILE),
        ),
        provenance=data.provenance.model_copy(
            update={"keys": {HOSTILE: HOSTILE}, "settings": {HOSTILE: HOSTILE}}
        ),
    )
    page = Page(render_report(hostile))
    assert len(page.scripts) == 3
    assert not any(tag == "img" for tag, _ in page.attributes)
    assert all(a.startswith("#") or a == "data:," for a in page.addresses)
    assert HOSTILE in page.visible
    name = page.figures["labels"]["data"][0]["name"]
    assert "<" not in name
    assert "&lt;/script&gt;" in name


def test_figure_data_cannot_end_their_script() -> None:
    texts = {"name": HOSTILE, "text": "<!-- & \u2028"}
    figure = Figure("x", "label", Markup("caption"), [texts], {})
    raw = page_module._script_json({"x": figure})
    assert not set("<>&\u2028") & set(raw)
    assert json.loads(raw)["figures"]["x"]["data"] == [texts]


def is_part(field: Any) -> bool:
    return NotAvailable in get_args(field.annotation)


def test_missing_parts_say_why() -> None:
    parts = [name for name, field in ReportData.model_fields.items() if is_part(field)]
    assert len(parts) == 9
    data = synthetic_report(
        **{part: NotAvailable(reason=f"no {part} was stored") for part in parts},
        screens=(),
    )
    page = Page(render_report(data))
    assert page.figures == {}
    for part in parts:
        assert re.search(f"Not (available|verified): no {part} was", page.visible)


def test_no_failures_are_shown_as_none() -> None:
    page = Page(render_report(synthetic_report(failures=())))
    assert "Failures: none." in page.visible


def test_passwords_in_addresses_are_masked(html: str) -> None:
    assert "hunter2" not in html
    assert "mongodb://reader:•••@db.example:27017/nanoos" in html


def test_long_keys_are_short_with_the_whole_at_hand(page: Page) -> None:
    whole = "fedcba9876543210" * 4
    assert any(found.get("title") == whole for _, found in page.attributes)
    assert whole not in page.visible
    assert "fedcba987654…" in page.visible


def test_abstract_states_the_key_figures() -> None:
    data = synthetic_report()
    assert isinstance(data.evaluation, Evaluation)
    assert isinstance(data.discovery, Discovery)
    text = findings.abstract(data).replace("\N{NARROW NO-BREAK SPACE}", "")
    errors = np.abs(np.subtract(data.evaluation.predictions, data.evaluation.targets))
    assert f"{1000 * errors.mean():.0f} meV/atom on 46 held-out" in text
    assert "against 161 meV/atom for always predicting the mean" in text
    energies = data.discovery.energies_in_predicted_order
    best = set(sorted(energies)[:10])
    found = len(best & set(energies[:10]))
    assert f"{found} of the true top 10 rank" in text
    assert "Of 1200 candidate structures, 306 were labelled" in text


def test_a_model_worse_than_the_mean_is_called_so() -> None:
    part = Evaluation(
        targets=[0.0, 0.1],
        predictions=[1.0, 1.1],
        uncertainties=None,
        mean_predictor=Scores(name="mean", mae=0.05, rmse=0.05, r2=0.0),
        baselines=(Scores(name="linear", mae=0.02, rmse=0.02, r2=0.9),),
    )
    text = findings.evaluation_finding(part)
    assert "the model is no better" in text
    assert "“linear” is as good or better (20 meV/atom)" in text
    assert "states no uncertainty" in findings.coverage_statement(part)


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, "compatible"), (2.5, "too small"), (0.3, "too large")],
)
def test_coverage_judges_stated_uncertainties(factor: float, verdict: str) -> None:
    # Normal quantiles: errors that are exactly Gaussian, without luck.
    n = 400
    quantiles = [NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]
    part = Evaluation(
        targets=np.zeros(n),
        predictions=0.02 * factor * np.array(quantiles),
        uncertainties=np.full(n, 0.02),
        uncertainty_name="standard deviation",
        mean_predictor=NotAvailable(reason="not in this test"),
    )
    assert verdict in findings.coverage_statement(part)


def test_the_report_shows_who_made_the_model_active(html: str) -> None:
    assert "this report is of energies@2" in html
    assert "taken off: &lt;b&gt;wrong&lt;/b&gt; data" in html


def trained_details(seed: int) -> tuple[Any, dict[str, Any]]:
    """Predictions as a training writes them, with intervals of 90 %."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[dict[str, Any]]] = {}
    for part, n in (("val", 150), ("test", 400)):
        sigma = np.exp(rng.normal(size=n))
        parts[part] = [
            {"structure_id": f"{part}{i}", "target": float(rng.normal() * s),
             "mean": 0.0, "std": float(s), "half_width": float(7.0 * s)}
            for i, s in enumerate(sigma)
        ]  # fmt: skip
    details = {
        "predictions": parts, "baselines": {}, "curves": [{}], "uncertainty_scale": 2.0
    }  # fmt: skip
    record = SimpleNamespace(
        training_config={"dropout": 0.1}, target="band_gap", unit="eV"
    )
    return record, details


def test_calibration_goes_by_validation_rows() -> None:
    record, details = trained_details(0)
    part = evaluation_part(record, details, {})
    assert isinstance(part, Evaluation)
    assert part.quantity == Quantity(name="band_gap", unit="eV")
    assert part.uncertainty_name.startswith("standard deviation over passes with")
    assert part.interval is not None
    assert (
        part.interval.half_widths[3] == details["predictions"]["test"][3]["half_width"]
    )
    curve = part.calibration
    assert curve is not None
    assert curve.levels == tuple(round(0.05 * i, 2) for i in range(1, 20))
    ratios = {
        name: sorted(abs(r["target"]) / r["half_width"] for r in rows)
        for name, rows in details["predictions"].items()
    }
    for level, observed in zip(curve.levels, curve.observed, strict=True):
        bound = ratios["val"][math.ceil(151 * level - 1e-9) - 1]
        assert observed == np.mean([ratio <= bound for ratio in ratios["test"]])
        # Honest data: within five standard errors of both parts.
        error = np.sqrt(level * (1 - level) * (1 / 400 + 1 / 152))
        assert abs(observed - level) < 5 * error
    older = {"val": [], "test": [{**r} for r in details["predictions"]["test"]]}
    for row in older["test"]:
        del row["half_width"]
    without = evaluation_part(record, {**details, "predictions": older}, {})
    assert isinstance(without, Evaluation)
    assert (without.interval, without.calibration) == (None, None)


@pytest.mark.parametrize(
    ("quantity", "mae", "value", "unit"),
    [
        (Quantity(), "12", "\N{MINUS SIGN}0.123", "meV/atom"),
        (Quantity(name="band_gap", unit="eV"), "0.0123", "\N{MINUS SIGN}0.1234", "eV"),
        (Quantity(name="ratio", unit=""), "0.0123", "\N{MINUS SIGN}0.1234", ""),
    ],
)
def test_numbers_are_in_the_unit_of_the_target(
    quantity: Quantity, mae: str, value: str, unit: str
) -> None:
    assert quantity.error(0.0123) == mae
    assert quantity.value(-0.12341) == value
    assert quantity.with_unit(mae, error=True) == f"{mae} {unit}".strip()
    part = Evaluation(
        targets=[0.0, 1.0],
        predictions=[0.1, 1.1],
        uncertainties=[0.1, 0.2],
        mean_predictor=NotAvailable(reason="none"),
        quantity=quantity,
    )
    parity, errors = parity_figure(part), uncertainty_figure(part)
    scale = 1000 if unit == "meV/atom" else 1
    assert errors.data[0]["x"] == [0.1 * scale, 0.2 * scale]
    title = errors.layout["xaxis"]["title"]["text"]
    assert title == "Stated uncertainty σ" + (f" ({unit})" if unit else "")
    assert parity.layout["xaxis"]["title"]["text"].startswith(
        f"Computed {quantity.name}"
    )


def test_training_that_ended_too_early_is_reported() -> None:
    member = MemberCurve(
        member=1,
        seed=0,
        epochs=[1, 2, 3],
        train_loss=[1.0, 0.5, 0.2],
        validation_mae=[0.3, 0.2, 0.1],
        best_epoch=3,
    )
    training = Training(
        members=(member,), loss_name="loss", n_train=9, n_validation=3, n_test=3
    )
    assert "longer training may help" in findings.training_finding(training)
    kept = member.model_copy(update={"best_epoch": 2})
    training = training.model_copy(update={"members": (kept,)})
    assert "longer training" not in findings.training_finding(training)


def test_regression_scores_are_the_textbook_ones() -> None:
    y, p = [0.0, 1.0, 2.0, 5.0], [0.5, 1.0, 1.0, 4.0]
    scores = regression_scores("model", y, p)
    assert scores.mae == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert scores.rmse == pytest.approx(((0.25 + 0 + 1 + 1) / 4) ** 0.5)
    assert scores.r2 == pytest.approx(1 - 2.25 / (4 + 1 + 0 + 9))
    assert regression_scores("constant", [1.0, 1.0], [1.0, 2.0]).r2 is None
    assert regression_scores("constant", [0.1] * 3, [0.2] * 3).r2 is None


@given(seed=st.integers(0, 10_000), k=st.integers(1, 8))
def test_discovery_agrees_with_sets(seed: int, k: int) -> None:
    energies = np.random.default_rng(seed).normal(size=30)
    result = discovery_result(
        Discovery(energies_in_predicted_order=energies, population="all", k=k)
    )
    best = set(sorted(energies)[:k])
    assert result.found == len(best & set(energies[:k]))
    for tried in range(1, 31):
        assert sum(r <= tried for r in result.ranks) == len(
            best & set(energies[:tried])
        )


def test_random_discovery_band_is_hypergeometric() -> None:
    n, k = 40, 10
    figure = discovery_figure(
        Discovery(
            energies_in_predicted_order=np.arange(float(n)), population="all", k=k
        )
    )
    band, mean = figure.data[0], figure.data[1]
    upper = dict(zip(band["x"], band["y"], strict=True))
    tried = 20
    weights = [math.comb(k, i) * math.comb(n - k, tried - i) for i in range(k + 1)]
    total = math.comb(n, tried)
    average = sum(i * w for i, w in enumerate(weights)) / total
    variance = sum((i - average) ** 2 * w for i, w in enumerate(weights)) / total
    at = mean["x"].index(tried)
    assert mean["y"][at] == pytest.approx(average, abs=2e-3)
    assert band["y"][at] == pytest.approx(average + 2 * variance**0.5, abs=2e-3)
    assert upper[tried] == pytest.approx(average - 2 * variance**0.5, abs=2e-3)


def test_histogram_keeps_every_label() -> None:
    rng = np.random.default_rng(3)
    energies = {f"prototype {i}": rng.normal(i, 1, 20 + i) for i in range(20)}
    figure = labels_figure(Labels(energies_by_prototype=energies, method="test"))
    assert sum(sum(trace["y"]) for trace in figure.data) == sum(
        len(values) for values in energies.values()
    )
    assert figure.data[-1]["name"] == "7 other prototypes"
    width, centres = figure.data[0]["width"], figure.data[0]["x"]
    assert np.diff(centres) == pytest.approx(width, rel=1e-2)


def test_histogram_of_a_single_energy_has_a_bin() -> None:
    figure = labels_figure(Labels(energies_by_prototype={"B2": [0.25]}, method="test"))
    assert sum(figure.data[0]["y"]) == 1


def test_long_runs_are_thinned_and_say_so() -> None:
    panel = synthetic_run(1, "Ni3Al", "L1_2", np.random.default_rng(0))
    figure = md_figure(panel, "md-1")
    assert all(len(trace["x"]) <= 1500 for trace in figure.data)
    assert "One frame in 3" in figure.caption
    energies = next(t for t in figure.data if t["yaxis"] == "y4")["y"]
    exact = np.array(panel.potential_energy_ev.values[::3]) / panel.n_atoms
    assert np.allclose(energies, exact, atol=1e-4 * np.ptp(exact))


def spheres(svg: str) -> list[tuple[float, float, float, str]]:
    found = re.findall(
        r'<circle cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)" fill="(#\w{6})"', svg
    )
    return [(float(x), float(y), float(r), colour) for x, y, r, colour in found]


def test_sites_on_faces_are_repeated() -> None:
    cube = np.eye(3) * 3.6
    assert len(spheres(structure_svg(cube, FCC, ["Cu"] * 4, 80))) == 8 + 6
    body = [[0, 0, 0], [0.5, 0.5, 0.5]]
    assert len(spheres(structure_svg(cube, body, ["Ni", "Al"], 80))) == 8 + 1


def test_picture_does_not_depend_on_orientation_or_lattice_shifts() -> None:
    rng = np.random.default_rng(5)
    lattice = np.array([[3.1, 0.0, 0.0], [-1.4, 2.9, 0.0], [0.3, 0.4, 4.8]])
    coords = rng.uniform(0.1, 0.9, (5, 3))
    symbols = ["Ti", "Al", "Zr", "Ni", "Mo"]
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    if np.linalg.det(rotation) < 0:
        rotation[:, 0] *= -1
    picture = structure_svg(lattice, coords, symbols, 90)
    turned = structure_svg(
        lattice @ rotation, coords + np.array([1, -2, 3]), symbols, 90
    )
    assert np.allclose(
        [s[:3] for s in spheres(picture)], [s[:3] for s in spheres(turned)], atol=0.11
    )
    assert [s[3] for s in spheres(picture)] == [s[3] for s in spheres(turned)]


def test_near_atoms_are_drawn_over_far_ones() -> None:
    # The eye looks along +y from the lower right: small y and large x are near.
    far, near = [0.3, 0.8, 0.3], [0.7, 0.2, 0.7]
    for coords, symbols in (
        ([far, near], ["Au", "Cu"]),
        ([near, far], ["Cu", "Au"]),
    ):
        drawn = spheres(structure_svg(np.eye(3) * 4, coords, symbols, 80))
        assert [s[3] for s in drawn] == ["#FFD123", "#C88033"]


def test_spheres_stay_inside_the_picture() -> None:
    for lattice, coords, kinds in CELLS.values():
        symbols = [("Zr", "Al")[kind] for kind in kinds]
        for x, y, r, _ in spheres(structure_svg(lattice, coords, symbols, 64)):
            assert r <= x <= 64 - r
            assert r <= y <= 64 - r


def test_radii_and_colours_are_those_of_pymatgen() -> None:
    import pymatgen.vis
    from pymatgen.analysis.molecule_structure_comparator import CovalentRadius
    from ruamel.yaml import YAML

    known = pictures._ELEMENTS
    assert {s: r for s, (_, r) in known.items()} == pytest.approx(CovalentRadius.radius)
    schemes = Path(pymatgen.vis.__path__[0]) / "ElementColorSchemes.yaml"
    jmol = YAML(typ="safe").load(schemes)["Jmol"]
    for symbol, (colour, _) in known.items():
        assert bytes.fromhex(colour) == bytes(jmol[symbol])


@pytest.mark.parametrize(
    ("lattice", "coords", "symbols", "message"),
    [
        (np.eye(3), [[0, 0, 0]], ["Xx"], "Xx"),
        (np.diag([1.0, 1.0, 0.0]), [[0, 0, 0]], ["Cu"], "flat"),
        (np.eye(3), [[0, 0, 0]], ["Cu", "Cu"], "one row and symbol per atom"),
        (np.eye(3), [[0, 0, np.nan]], ["Cu"], "not finite"),
    ],
)
def test_cells_that_cannot_be_drawn_are_refused(
    lattice: Any, coords: Any, symbols: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        structure_svg(lattice, coords, symbols, 64)


def test_a_cell_that_cannot_be_drawn_costs_only_its_picture() -> None:
    data = synthetic_report()
    assert isinstance(data.ranking, Ranking)
    row = data.ranking.candidates[0].model_copy(
        update={
            "structure": CrystalPicture(
                lattice=np.eye(3), frac_coords=[[0.0, 0.0, 0.0]], symbols=("Xx",)
            )
        }
    )
    ranking = data.ranking.model_copy(update={"candidates": (row,)})
    page = Page(render_report(synthetic_report(ranking=ranking)))
    assert "not available: no covalent radius is known for Xx" in page.visible


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StageCount(planned=2, finished=2, failed=1), "more ended"),
        (lambda: Labels(energies_by_prototype={}, method="x"), "no values"),
        (
            lambda: Discovery(energies_in_predicted_order=[1.0], population="x", k=1),
            "more than k",
        ),
        (
            lambda: RDFCurves(r=[1.0, 2.0], total=[0.0]),
            "must have 2 values",
        ),
        (
            lambda: MemberCurve(
                member=1,
                seed=0,
                epochs=[1],
                train_loss=[1.0],
                validation_mae=[1.0],
                best_epoch=2,
            ),
            "no epoch 2",
        ),
        (
            lambda: Evaluation(
                targets=[0.0],
                predictions=[0.0],
                uncertainties=[-0.1],
                mean_predictor=NotAvailable(reason="x"),
            ),
            "not negative",
        ),
    ],
)
def test_data_that_contradict_themselves_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValidationError):
        Labels(energies_by_prototype={"B2": [float("nan")]}, method="x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formatting.number(-1234567.891, 1), "−1\u202f234\u202f567.9"),
        (formatting.number(-0.0004, 3), "0.000"),
        (formatting.with_error(3.14159, 0.0123), "3.142\xa0±\xa00.012"),
        (formatting.with_error(12345.6, 78.0), "12\u202f346\xa0±\xa078"),
        (formatting.with_error(0.5, None), "0.5000 (no error bar)"),
        (formatting.significant(1234.5, 2), "1\u202f200"),
        (formatting.significant(0.0034567, 2), "0.0035"),
        (formatting.plain(300.0), "300"),
        (formatting.plain(0.5), "0.5"),
        (formatting.milli(0.00456), "4.6"),
        (formatting.milli(-0.0456), "−46"),
        (formatting.duration(3725), "1 h 2 min"),
        (formatting.duration(31), "31 s"),
        (formatting.formula("Ni3(Al)2"), "Ni<sub>3</sub>(Al)<sub>2</sub>"),
        (formatting.formula("<b>2"), "&lt;b&gt;2"),
        (formatting.prototype("L1_2"), "L1<sub>2</sub>"),
        (formatting.prototype("D0_{22}"), "D0<sub>22</sub>"),
        (formatting.masked("a://u:p@h/"), "a://u:•••@h/"),
        (formatting.masked("a://h:27017/"), "a://h:27017/"),
    ],
)
def test_numbers_and_names_read_well(text: str, expected: str) -> None:
    assert text == expected
