"""Sections of a report from the documents of single results."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import NanoOSError
from nanoos_fw.ml.uncertainty import DEFAULT_COVERAGE, conformal_quantile
from nanoos_fw.reports.data import (
    AliasMove,
    Average,
    CalibrationCurve,
    DiffusionResult,
    Evaluation,
    MDPanel,
    MemberCurve,
    MSDCurves,
    NamedAverage,
    NotAvailable,
    PredictionInterval,
    Quantity,
    RDFCurves,
    Scores,
    ThermoSeries,
    Training,
    VDOSCurves,
)
from nanoos_fw.stores.aliases import AliasEntry
from nanoos_fw.stores.models import ModelRecord
from nanoos_fw.stores.simulations import Simulation
from nanoos_fw.stores.structures import StoredStructure
from nanoos_fw.units import ATOMIC_MASS_KG

_LOSS_NAMES = {
    "mse": "mean squared error of the normalized target, no unit",
    "mae": "mean absolute error of the normalized target, no unit",
    "huber": "Huber loss of the normalized target, no unit",
}
_ENSEMBLES = {
    "MD_NPT_LAMMPS": "npt",
    "MD_NVT_LAMMPS": "nvt",
    "MD_NVE_LAMMPS": "nve",
}
_CONTROLS = {
    "npt": "Nosé-Hoover thermostat and barostat",
    "nvt": "Nosé-Hoover thermostat",
    "nve": "no thermostat after equilibration",
}
_LEVELS = tuple(round(0.05 * step, 2) for step in range(1, 20))
_BASELINE_NAMES = {
    "mean": "mean of the training labels",
    "composition": "linear model in the composition",
}


def training_part(
    record: ModelRecord,
    details: Mapping[str, Any],
    history: Sequence[AliasEntry] = (),
) -> Training:
    """Return how a registered ensemble was trained, and how it came into use."""
    counts = record.dataset_info["counts"]
    curves = []
    for curve in details["curves"]:
        epochs = tuple(range(1, len(curve["train_loss"]) + 1))
        curves.append(
            MemberCurve(
                member=curve["member"] + 1,
                seed=record.training_config["seed"],
                epochs=epochs,
                train_loss=curve["train_loss"],
                validation_mae=curve["val_mae"],
                best_epoch=curve["best_epoch"],
            )
        )
    return Training(
        members=tuple(curves),
        quantity=Quantity.of(record.target, record.unit),
        loss_name=_LOSS_NAMES[record.training_config["loss"]],
        n_train=counts["train"],
        n_validation=counts.get("val", 0),
        n_test=counts.get("test", 0),
        n_parameters=details["n_parameters"],
        model=record.reference,
        moves=tuple(
            AliasMove(
                alias=entry.alias,
                model=f"{entry.name}@{entry.version}" if entry.version else None,
                time=entry.time,
                by=entry.by,
                reason=entry.reason,
            )
            for entry in history
        ),
    )


def evaluation_part(
    record: ModelRecord, details: Mapping[str, Any], formulas: Mapping[str, str]
) -> Evaluation | NotAvailable:
    """Return the model on its held-out part, beside what needs no structure."""
    rows = details["predictions"].get("test") or []
    if not rows:
        return NotAvailable(reason="the dataset has no test part")
    stds = [row["std"] for row in rows]
    baselines = {
        name: _scores(_BASELINE_NAMES.get(name, name), parts["test"])
        for name, parts in details["baselines"].items()
    }
    members = len(details["curves"])
    dropout = record.training_config.get("dropout") or 0.0
    return Evaluation(
        quantity=Quantity.of(record.target, record.unit),
        targets=np.array([row["target"] for row in rows]),
        predictions=np.array([row["mean"] for row in rows]),
        uncertainties=None if None in stds else np.array(stds),
        uncertainty_name=_uncertainty_name(
            members, details["uncertainty_scale"], with_dropout=dropout > 0.0
        ),
        mean_predictor=baselines.pop(
            "mean", NotAvailable(reason="the training did not state it")
        ),
        baselines=tuple(baselines.values()),
        interval=_interval(rows),
        calibration=_calibration(details["predictions"].get("val") or [], rows),
        formulas=tuple(formulas.get(row["structure_id"], "?") for row in rows),
    )


def _uncertainty_name(
    members: int, scale: float | None, *, with_dropout: bool = False
) -> str:
    name = f"standard deviation over {members} ensemble members"
    if with_dropout:
        name = "standard deviation over passes with dropout"
        if members > 1:
            name += f" of {members} ensemble members"
    if scale is None or scale == 1.0:
        return name
    return f"{name}, times {scale:.2f} to fit the errors on the validation part"


def _half_widths(rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float64] | None:
    widths = [row.get("half_width") for row in rows]  # older trainings state none
    return np.array(widths) if widths and None not in widths else None


def _interval(rows: Sequence[Mapping[str, Any]]) -> PredictionInterval | None:
    widths = _half_widths(rows)
    if widths is None:
        return None
    return PredictionInterval(
        level=DEFAULT_COVERAGE,
        half_widths=widths,
        method="split conformal on the validation part",
    )


def _calibration(
    val: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]]
) -> CalibrationCurve | None:
    """Return the coverage of the test part at other levels than the stated one.

    All widths of a model are one factor per level times the same numbers, so errors in
    units of the stated widths are conformal scores as good as those it was made from.
    """
    known, held = _half_widths(val), _half_widths(test)
    if known is None or held is None:
        return None
    scores, judged = (
        np.array([abs(row["mean"] - row["target"]) for row in rows]) / widths
        for rows, widths in ((val, known), (test, held))
    )
    levels, observed = [], []
    for level in _LEVELS:
        factor = conformal_quantile(np.sort(scores), level)
        if factor is not None:
            levels.append(level)
            observed.append(float(np.mean(judged <= factor)))
    return CalibrationCurve(
        levels=tuple(levels), observed=tuple(observed), n_calibration=len(val)
    )


def _scores(name: str, metrics: Mapping[str, Any]) -> Scores:
    return Scores(name=name, mae=metrics["mae"], rmse=metrics["rmse"], r2=metrics["r2"])


def md_panel(
    rank: int,
    entry: StoredStructure,
    simulation: Simulation,
    artifact: Callable[[str], bytes],
    analyses: Mapping[str, str] | None = None,
) -> MDPanel:
    """Return one finished run as the panel of its candidate.

    Parameters
    ----------
    analyses
        Keys of the analyses to show, by name; None takes the last of each.
    """
    result = simulation.result
    thermo, averages = result["thermo"], result["averages"]
    timestep_ps = result["timestep_fs"] / 1000.0
    kind = result["workflow_type"]
    # Results of earlier versions do not state it.
    ensemble = result.get("ensemble") or _ENSEMBLES.get(kind, "")

    def series(column: str, set_point: float | None = None) -> ThermoSeries:
        return ThermoSeries(
            values=thermo[column],
            average=_average(averages.get(column)),
            set_point=set_point,
        )

    shown = _shown(result.get("analyses", {}), analyses)
    temperature = result["temperature_k"] if ensemble in ("nvt", "npt") else None
    pressure = result["pressure_bar"] if ensemble == "npt" else None
    return MDPanel(
        rank=rank,
        candidate_id=entry.key,
        formula=entry.formula,
        prototype=entry.prototype or "",
        ensemble=ensemble.upper() if kind in _ENSEMBLES else kind,
        control=_CONTROLS.get(ensemble, ""),
        n_atoms=result["n_atoms"],
        n_steps=result["steps"],
        timestep_fs=result["timestep_fs"],
        equilibration_ps=result["equilibration_steps"] * timestep_ps,
        time_ps=[step * timestep_ps for step in thermo["step"]],
        temperature_k=series("temperature_k", temperature),
        pressure_bar=series("pressure_bar", pressure),
        volume_a3=series("volume_a3"),
        potential_energy_ev=series("potential_energy_ev"),
        other_averages=_density(entry, result),
        rdf=_rdf(shown.get("rdf")),
        msd=_msd(shown.get("msd"), artifact),
        vdos=_vdos(shown.get("vdos"), artifact),
    )


def _shown(stored: Mapping[str, Any], keys: Mapping[str, str] | None) -> dict[str, Any]:
    """Return one of the stored analyses of each name."""
    if keys is not None:
        return {name: stored[key] for name, key in keys.items() if key in stored}
    # Those that an earlier version made have the name as the key.
    return {found.get("analysis", key): found for key, found in stored.items()}


def _average(average: Mapping[str, Any] | None) -> Average | NotAvailable:
    if average is None:
        return NotAvailable(reason="too short, or the temperature changes")
    return Average(mean=average["mean"], standard_error=average["standard_error"])


def _density(
    entry: StoredStructure, result: Mapping[str, Any]
) -> tuple[NamedAverage, ...]:
    volume = result["averages"].get("volume_a3")
    if volume is None:
        return ()
    mass = entry.structure.composition.weight * result["n_atoms"] / len(entry.structure)
    grams_per_a3 = ATOMIC_MASS_KG * 1e3 * 1e24  # u/Å³ -> g/cm³
    density = mass * grams_per_a3 / volume["mean"]
    error = volume["standard_error"]
    return (
        NamedAverage(
            name="density",
            unit="g/cm³",
            mean=density,
            # First order: the relative error of a reciprocal is that of the number.
            standard_error=None if error is None else density * error / volume["mean"],
        ),
    )


def _rdf(curves: Mapping[str, Any] | None) -> RDFCurves | NotAvailable:
    if curves is None:
        return NotAvailable(reason="the trajectory has not been analysed yet")
    if "error" in curves:
        return NotAvailable(reason=str(curves["error"]["message"]))
    return RDFCurves(
        r=curves["r_a"], total=curves["total"], partials=curves["partials"]
    )


def _msd(
    numbers: Mapping[str, Any] | None, artifact: Callable[[str], bytes]
) -> MSDCurves | NotAvailable | None:
    found = _curves(numbers, artifact, "_a2")
    if numbers is None or found is None:
        return None
    if isinstance(found, NotAvailable):
        return found
    return MSDCurves(
        time_ps=found.pop("time_ps"),
        total=found.pop("total"),
        by_element=found,
        diffusion={
            name: DiffusionResult(
                value=fit["value"],
                standard_error=fit["standard_error"],
                diffusive=fit["diffusive"],
            )
            for name, fit in numbers["diffusion"].items()
        },
    )


def _vdos(
    numbers: Mapping[str, Any] | None, artifact: Callable[[str], bytes]
) -> VDOSCurves | NotAvailable | None:
    found = _curves(numbers, artifact, "_per_thz")
    if numbers is None or found is None:
        return None
    if isinstance(found, NotAvailable):
        return found
    for name in ("time_ps", "vacf"):
        found.pop(name)
    return VDOSCurves(
        frequency_thz=found.pop("frequency_thz"),
        total=found.pop("total"),
        by_element=found,
        is_resolved=numbers["is_resolved"],
    )


def _curves(
    numbers: Mapping[str, Any] | None,
    artifact: Callable[[str], bytes],
    unit: str,
) -> dict[str, Any] | NotAvailable | None:
    """Return the curves stored with an analysis, by name without the unit."""
    if numbers is None:
        return None
    if "error" in numbers:
        return NotAvailable(reason=str(numbers["error"]["message"]))
    if "artifact" not in numbers:
        return NotAvailable(reason="the curves were not stored with the analysis")
    try:
        packed = artifact(numbers["artifact"])
    except NanoOSError as error:  # the rest of the report is as good without it
        return NotAvailable(reason=error.message)
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return {name.removesuffix(unit): arrays[name] for name in arrays.files}
