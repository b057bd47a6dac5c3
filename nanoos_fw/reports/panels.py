"""Sections of a report from the documents of single results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nanoos_fw.reports.data import (
    Average,
    Evaluation,
    MDPanel,
    MemberCurve,
    NamedAverage,
    NotAvailable,
    RDFCurves,
    Scores,
    ThermoSeries,
    Training,
)
from nanoos_fw.stores.models import ModelRecord
from nanoos_fw.stores.simulations import Simulation
from nanoos_fw.stores.structures import StoredStructure
from nanoos_fw.units import ATOMIC_MASS_KG

_LOSS_NAMES = {
    "mse": "mean squared error of the normalized target, no unit",
    "mae": "mean absolute error of the normalized target, no unit",
    "huber": "Huber loss of the normalized target, no unit",
}
_BASELINE_NAMES = {
    "mean": "mean of the training labels",
    "composition": "linear model in the composition",
}


def training_part(record: ModelRecord, details: Mapping[str, Any]) -> Training:
    """Return how a registered ensemble was trained."""
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
        loss_name=_LOSS_NAMES[record.training_config["loss"]],
        n_train=counts["train"],
        n_validation=counts.get("val", 0),
        n_test=counts.get("test", 0),
        n_parameters=details["n_parameters"],
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
    return Evaluation(
        targets=np.array([row["target"] for row in rows]),
        predictions=np.array([row["mean"] for row in rows]),
        uncertainties=None if None in stds else np.array(stds),
        uncertainty_name=_uncertainty_name(members, details["uncertainty_scale"]),
        mean_predictor=baselines.pop(
            "mean", NotAvailable(reason="the training did not state it")
        ),
        baselines=tuple(baselines.values()),
        formulas=tuple(formulas.get(row["structure_id"], "?") for row in rows),
    )


def _uncertainty_name(members: int, scale: float | None) -> str:
    name = f"standard deviation over {members} ensemble members"
    if scale is None or scale == 1.0:
        return name
    return f"{name}, times {scale:.2f} to fit the errors on the validation part"


def _scores(name: str, metrics: Mapping[str, Any]) -> Scores:
    return Scores(name=name, mae=metrics["mae"], rmse=metrics["rmse"], r2=metrics["r2"])


def md_panel(rank: int, entry: StoredStructure, simulation: Simulation) -> MDPanel:
    """Return one finished run as the panel of its candidate."""
    result = simulation.result
    thermo, averages = result["thermo"], result["averages"]
    timestep_ps = result["timestep_fs"] / 1000.0
    npt = result["workflow_type"] == "MD_NPT_LAMMPS"

    def series(column: str, set_point: float | None = None) -> ThermoSeries:
        return ThermoSeries(
            values=thermo[column],
            average=_average(averages.get(column)),
            set_point=set_point,
        )

    ensemble = {"MD_NPT_LAMMPS": "NPT", "MD_NVT_LAMMPS": "NVT"}
    return MDPanel(
        rank=rank,
        candidate_id=entry.key,
        formula=entry.formula,
        prototype=entry.prototype or "",
        ensemble=ensemble.get(result["workflow_type"], result["workflow_type"]),
        control="Nosé-Hoover thermostat" + (" and barostat" if npt else ""),
        n_atoms=result["n_atoms"],
        n_steps=result["steps"],
        timestep_fs=result["timestep_fs"],
        equilibration_ps=result["equilibration_steps"] * timestep_ps,
        time_ps=[step * timestep_ps for step in thermo["step"]],
        temperature_k=series("temperature_k", result["temperature_k"]),
        pressure_bar=series("pressure_bar", result["pressure_bar"] if npt else None),
        volume_a3=series("volume_a3"),
        potential_energy_ev=series("potential_energy_ev"),
        other_averages=_density(entry, result),
        rdf=_rdf(result.get("analyses", {}).get("rdf")),
    )


def _average(average: Mapping[str, Any] | None) -> Average | NotAvailable:
    if average is None:
        return NotAvailable(reason="the production part is too short")
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
    return RDFCurves(
        r=curves["r_a"], total=curves["total"], partials=curves["partials"]
    )
