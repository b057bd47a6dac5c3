from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np

from nanoos_fw.reports import (
    Average,
    CrystalPicture,
    Discovery,
    Evaluation,
    Failure,
    Funnel,
    Labels,
    MDPanel,
    MemberCurve,
    MissingRun,
    NamedAverage,
    NotAvailable,
    PotentialSource,
    PredictionInterval,
    Provenance,
    RankedCandidate,
    Ranking,
    RDFCurves,
    ReportData,
    Scores,
    StageCount,
    StageTiming,
    ThermoSeries,
    Training,
    render_report,
)

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
    )


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
