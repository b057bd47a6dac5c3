"""Fill a report from the stores: every part is what the database holds now."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from nanoos_fw.ml.candidate_filters import FAILURES, CandidateStatus
from nanoos_fw.ml.candidates import open_candidates
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.ml.ranking import TIE_RULE
from nanoos_fw.ml.screening import rank_candidates
from nanoos_fw.provenance import package_versions, write_atomic
from nanoos_fw.reports.active import active_part
from nanoos_fw.reports.data import (
    CrystalPicture,
    Discovery,
    Evaluation,
    Failure,
    Funnel,
    Labels,
    MDPanel,
    MissingRun,
    NotAvailable,
    PotentialSource,
    Provenance,
    Quantity,
    RankedCandidate,
    Ranking,
    ReportData,
    StageCount,
    StageTiming,
    Training,
)
from nanoos_fw.reports.page import render_report
from nanoos_fw.reports.panels import evaluation_part, md_panel, training_part
from nanoos_fw.reports.screen_collect import collect_screen
from nanoos_fw.stores.active import ActiveStore, Round
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import get_artifact
from nanoos_fw.stores.features import FeatureStore
from nanoos_fw.stores.labels import (
    FormationEnergies,
    formation_energies,
)
from nanoos_fw.stores.launches import failed_fireworks, stage_times
from nanoos_fw.stores.models import ModelRecord, ModelRegistry, Prediction
from nanoos_fw.stores.screens import ScreenStore, stream_name
from nanoos_fw.stores.simulations import SimulationStore
from nanoos_fw.stores.structures import StoredStructure, StructureStore

_ROWS = 20
_TIE_RULE = "equal predictions are ordered by the content key of the structure"


def write_report(database: Any, campaign: str, path: Path) -> Path:
    """Write the report of a campaign from the stores and return its path.

    Raises
    ------
    InputError
        If there is no such campaign.
    """
    path = path.resolve()
    write_atomic(path, render_report(collect_report(database, campaign)))
    return path


def collect_report(database: Any, campaign: str) -> ReportData:
    """Return all that the stores know of a campaign."""
    return _Collector(database, campaign).collect()


@dataclass
class _Collector:
    """One look at the database; parts that several sections need are read once."""

    database: Any
    campaign: str

    def __post_init__(self) -> None:
        document = CampaignStore(self.database).get(self.campaign)
        self.plan: Mapping[str, Any] = document["plan"]
        self.outputs: Mapping[str, Any] = document["outputs"]
        self.plan_key: str = document["plan_key"]
        self.structures = StructureStore(self.database)
        self.simulations = SimulationStore(self.database)
        self.models = ModelRegistry(self.database)

    def collect(self) -> ReportData:
        return ReportData(
            campaign=self.campaign,
            created=datetime.now(UTC),
            description=self.plan.get("description", ""),
            funnel=self._funnel(),
            labels=self._labels(),
            training=self._training(),
            evaluation=self._evaluation(),
            ranking=self._ranking(),
            discovery=self._discovery(),
            md=self._md,
            failures=self._failures(),
            provenance=self._provenance(),
            active=active_part(
                self.database,
                self.campaign,
                self.plan,
                len(self.candidates),
                self._truth(),
            ),
            screens=tuple(
                collect_screen(self.database, name)
                for name in ScreenStore(self.database).names(self.campaign)
            ),
        )

    # ------------------------------------------------------------------- shared

    @cached_property
    def candidates(self) -> dict[str, StoredStructure]:
        keys = {*self.structures.keys(self._set("candidates")), *self.selected}
        return self.structures.get_many(sorted(keys))

    @cached_property
    def selected(self) -> list[str]:
        """The best of a sequence, which alone are stored of it."""
        if self.plan.get("stream") is None:
            return []
        return self.structures.keys(self._set("selected"))

    @cached_property
    def labelled(self) -> list[str]:
        return self.structures.keys(self._set("labelled"))

    @cached_property
    def screened(self) -> list[str]:
        if self.plan.get("stream") is not None:
            return self.selected
        return sorted(set(self.candidates) - set(self.labelled))

    @cached_property
    def energies(self) -> FormationEnergies | None:
        """Formation energies of all candidates that have been relaxed."""
        method = self.outputs.get("method")
        if method is None:  # recorded with the dataset, so the references are there
            return None
        return formation_energies(
            self.structures,
            self.simulations,
            keys=sorted(self.candidates),
            references=self.structures.keys(self._set("references")),
            method=method,
        )

    @cached_property
    def model(self) -> ModelRecord | None:
        reference = self.outputs.get("model")
        return None if reference is None else self.models.get(reference)

    @cached_property
    def details(self) -> Mapping[str, Any] | None:
        if self.model is None or self.model.details is None:
            return None
        details: Mapping[str, Any] = json.loads(
            get_artifact(self.database, self.model.details)
        )
        return details

    @cached_property
    def ranked(self) -> list[dict[str, Any]]:
        """All screened candidates, best first."""
        if self.model is None:
            return []
        objective = self.plan.get("objective", "min")
        rows = (row.to_row() for row in self.predicted)
        ranked = rank_candidates(rows, objective=objective)
        if self.plan.get("stream") is None:
            return ranked
        # By number, where predictions are equal: as they were selected.
        places = {key: place for place, key in enumerate(self.best, start=1)}
        return sorted(
            (
                {**row, "rank": places[row["structure_id"]]}
                for row in ranked
                if row["structure_id"] in places
            ),
            key=lambda row: row["rank"],
        )

    @cached_property
    def predicted(self) -> list[Prediction]:
        """All predictions, those out of the model's domain too."""
        if self.model is None:
            return []
        return self.models.predictions(self.model.reference, self.screened)

    @cached_property
    def rounds(self) -> list[Round]:
        """Rounds of active learning; none in another campaign."""
        if "selection" not in self.plan:
            return []
        return ActiveStore(self.database).rounds(self.campaign)

    @cached_property
    def quantity(self) -> Quantity:
        """What the model predicts."""
        target = self.plan["training"]["target"]
        return Quantity.of(target, "eV/atom" if self.model is None else self.model.unit)

    @property
    def best(self) -> list[str]:
        return list(self.outputs.get("ranking", []))

    def _set(self, name: str) -> str:
        return f"{self.campaign}/{name}"

    # ----------------------------------------------------------------- sections

    def _count(self, keys: Sequence[str]) -> StageCount:
        energies = self.energies
        if energies is None:
            return StageCount(planned=len(keys), finished=0)
        return StageCount(
            planned=len(keys),
            finished=sum(key in energies.energies for key in keys),
            failed=sum(key in energies.failures for key in keys),
        )

    def _funnel(self) -> Funnel | NotAvailable:
        if not self.candidates:
            return NotAvailable(reason="the campaign has no candidates")
        active = "selection" in self.plan
        top_k = 0 if active else int(self.plan["top_k"])  # it relaxes none
        count, screened = len(self.candidates), self._screened()
        if self.plan.get("stream") is None:
            top_k = min(top_k, len(self.screened))
        else:
            count += screened.planned - len(self.selected)
        relaxed = (
            self._count(self.best)
            if self.best
            else StageCount(planned=top_k, finished=0)
        )
        runs = self._md
        finished = [r for r in runs if isinstance(r, MDPanel)] if runs else []
        failed = len(self._failed_md)
        return Funnel(
            candidates=count,
            labelled=self._given_out() if active else self._count(self.labelled),
            screened=screened,
            relaxed=relaxed,
            simulated=StageCount(
                planned=int(self.plan.get("md_runs", 0)),
                finished=len(finished),
                failed=failed,
            ),
        )

    def _screened(self) -> StageCount:
        """Count predictions; of a sequence also those that are not stored."""
        if self.plan.get("stream") is None:
            return StageCount(
                planned=len(self.screened),
                finished=len(self.predicted),
                failed=len(self._quarantined(self.screened)),
            )
        name, store = stream_name(self.campaign), ScreenStore(self.database)
        if name not in store.names(self.campaign):
            source = open_candidates(self.plan["stream"]["candidates"])
            return StageCount(planned=len(source), finished=0)
        screen = store.get(name)
        found: Counter[int] = Counter()
        for chunk in store.chunks(screen.key):
            found.update(chunk.status.tolist())
        failed = sum(found[status] for status in FAILURES)
        finished = found[CandidateStatus.PREDICTED]
        # What a filter leaves out was not to be predicted.
        filtered = found.total() - failed - finished
        return StageCount(
            planned=screen.count - filtered, finished=finished, failed=failed
        )

    def _given_out(self) -> StageCount:
        """Count labels of active learning, which need not be by LAMMPS."""
        datasets = [(r, r.dataset) for r in self.rounds if r.dataset is not None]
        failed = sum(int(dataset["n_failed"]) for _, dataset in datasets)
        return StageCount(
            planned=sum(len(r.picks) for r in self.rounds),
            finished=sum(len(r.picks) for r, _ in datasets) - failed,
            failed=failed,
        )

    def _truth(self) -> Mapping[str, float] | None:
        """Return the energies of all candidates, if none is still to come."""
        if self.energies is None or self.energies.pending:
            return None
        return self.energies.energies

    def _labels(self) -> Labels | NotAvailable:
        if self.quantity != Quantity():
            reason = "no formation energies; see the section on active learning"
            return NotAvailable(reason=reason)
        if self.energies is None:
            return NotAvailable(reason="the labels are not complete yet")
        by_prototype: dict[str, list[float]] = {}
        for key in self.labelled:
            if key in self.energies.energies:
                prototype = self.candidates[key].prototype or "other"
                by_prototype.setdefault(prototype, []).append(
                    self.energies.energies[key]
                )
        if not by_prototype:
            return NotAvailable(reason="no label could be computed")
        potential = self.outputs.get("potential", {}).get("name", "unknown")
        return Labels(
            energies_by_prototype={
                name: tuple(by_prototype[name]) for name in sorted(by_prototype)
            },
            method=(
                "LAMMPS relaxation of cell and positions with the potential "
                f"{potential}, relative to the relaxed elements"
            ),
        )

    def _training(self) -> Training | NotAvailable:
        if self.model is None or self.details is None:
            return NotAvailable(reason="no model has been trained yet")
        history = self.models.history(self.model.name)
        return training_part(self.model, self.details, history)

    def _evaluation(self) -> Evaluation | NotAvailable:
        if self.model is None or self.details is None:
            return NotAvailable(reason="no model has been trained yet")
        formulas = {key: entry.formula for key, entry in self.candidates.items()}
        return evaluation_part(self.model, self.details, formulas)

    def _ranking(self) -> Ranking | NotAvailable:
        if not self.ranked:
            return NotAvailable(reason="the candidates have not been ranked yet")
        return Ranking(
            candidates=tuple(self._ranked_row(row) for row in self.ranked[:_ROWS]),
            n_ranked=(
                len(self.ranked)
                if self.plan.get("stream") is None
                else int(self.outputs["n_ranked"])
            ),
            tie_rule=_TIE_RULE if self.plan.get("stream") is None else TIE_RULE,
            quantity=self.quantity,
            highest=self.plan.get("objective") == "max",
        )

    def _ranked_row(self, row: Mapping[str, Any]) -> RankedCandidate:
        key = row["structure_id"]
        entry = self.candidates[key]
        lammps: float | NotAvailable | None = None
        if self.energies is not None and self.quantity == Quantity():
            if key in self.energies.energies:
                lammps = self.energies.energies[key]
            elif key in self.energies.failures:
                message = self.energies.failures[key].get(
                    "message", "relaxation failed"
                )
                lammps = NotAvailable(reason=message)
        return RankedCandidate(
            rank=row["rank"],
            candidate_id=key,
            formula=entry.formula,
            prototype=entry.prototype or "",
            predicted=row["mean"],
            uncertainty=row["std"],
            lammps=lammps,
            out_of_domain=row["out_of_domain"],
            structure=CrystalPicture(
                lattice=entry.structure.lattice.matrix,
                frac_coords=entry.structure.frac_coords,
                symbols=tuple(site.specie.symbol for site in entry.structure),
            ),
        )

    def _discovery(self) -> Discovery | NotAvailable:
        if "selection" in self.plan:
            return NotAvailable(reason="see the section on active learning")
        if self.quantity != Quantity():
            reason = f"LAMMPS computes no {self.quantity.name} of the candidates"
            return NotAvailable(reason=reason)
        if self.energies is None or not self.ranked:
            return NotAvailable(reason="the candidates have not been ranked yet")
        pending = set(self.energies.pending) & set(self.screened)
        if pending:
            return NotAvailable(
                reason=(
                    f"{len(pending)} of {len(self.screened)} screened "
                    "candidates have not been relaxed"
                )
            )
        values = [
            self.energies.energies[row["structure_id"]]
            for row in self.ranked
            if row["structure_id"] in self.energies.energies
        ]
        k = int(self.plan["top_k"])
        if len(values) <= k:
            return NotAvailable(reason=f"only {len(values)} candidates were relaxed")
        return Discovery(
            energies_in_predicted_order=tuple(values),
            population="candidates never used in training, validation or test",
            k=k,
            n_failed=len(self.ranked) - len(values),
        )

    @cached_property
    def _md(self) -> tuple[MDPanel | MissingRun, ...] | NotAvailable:
        if not int(self.plan.get("md_runs", 0)):
            return NotAvailable(reason="none was planned")
        if not self.best:
            return NotAvailable(reason="the candidates have not been ranked yet")
        runs = self.outputs.get("md", {})
        panels: list[MDPanel | MissingRun] = []
        for rank in range(1, int(self.plan.get("md_runs", 0)) + 1):
            key = self.best[rank - 1]
            entry = self.candidates[key]
            run = runs.get(str(rank))
            found = {} if run is None else self.simulations.find([key], run["method"])
            simulation = found.get(key)
            if simulation is not None and simulation.status == "done":
                panels.append(
                    md_panel(
                        rank,
                        entry,
                        simulation,
                        lambda key: get_artifact(self.database, key),
                        run.get("analyses"),  # None: made by an earlier version
                    )
                )
                continue
            reason = (
                "the run has not finished"
                if simulation is None
                else (simulation.error or {}).get("message", "the run failed")
            )
            panels.append(
                MissingRun(
                    rank=rank,
                    formula=entry.formula,
                    prototype=entry.prototype or "",
                    reason=reason,
                )
            )
        return tuple(panels) if panels else NotAvailable(reason="none was planned")

    @cached_property
    def _failed_md(self) -> list[tuple[str, dict[str, Any]]]:
        failed = []
        for rank, run in self.outputs.get("md", {}).items():
            key = self.best[int(rank) - 1]
            simulation = self.simulations.find([key], run["method"]).get(key)
            if simulation is not None and simulation.status == "failed":
                failed.append((key, simulation.error or {}))
        return failed

    def _quarantined(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        features = FeatureStore(self.database)
        return features.quarantined(keys, self.plan["features"], FEATURE_VERSION)

    def _failures(self) -> tuple[Failure, ...]:
        failures: list[Failure] = []
        relaxations = self.energies.failures if self.energies is not None else {}
        labelled = set(self.labelled)
        for key, error in sorted(relaxations.items()):
            stage = "label" if key in labelled else "relax"
            failures.append(self._failure(stage, key, error))
        for key, error in sorted(self._quarantined(sorted(self.candidates)).items()):
            failures.append(self._failure("featurize", key, error))
        failures += [self._failure("md", key, error) for key, error in self._failed_md]
        for firework in failed_fireworks(self.database, self.campaign):
            failures.append(
                Failure(
                    stage=firework.stage,
                    cause=firework.error.kind,
                    subject=f"firework {firework.fw_id}",
                    message=firework.error.message,
                    advice=firework.error.advice,
                )
            )
        return tuple(failures)

    def _failure(self, stage: str, key: str, error: Mapping[str, Any]) -> Failure:
        return Failure(
            stage=stage,
            cause=str(error.get("evidence", {}).get("class") or error.get("kind")),
            subject=self.candidates[key].label,
            message=str(error.get("message") or "no message was stored"),
            advice=error.get("advice"),
        )

    def _provenance(self) -> Provenance:
        times, hosts = stage_times(self.database, self.campaign)
        potential = self.outputs.get("potential")
        keys = {"campaign plan": self.plan_key}
        if "dataset" in self.outputs:
            keys["dataset"] = self.outputs["dataset"]
        if self.model is not None:
            keys["model weights (SHA-256)"] = self.model.sha256 or "none"
            keys["training"] = self.model.training_key
        return Provenance(
            versions=package_versions(),
            hosts=tuple(hosts),
            seeds={
                "choice of labelled candidates": int(self.plan["seed"]),
                "dataset split": int(self.plan["dataset"]["seed"]),
                "training": int(self.plan["training"]["seed"]),
            },
            keys=keys,
            model_name=(
                self.model.reference
                if self.model is not None
                else NotAvailable(reason="no model has been trained yet")
            ),
            potential=(
                PotentialSource(**potential)
                if potential
                else NotAvailable(reason="the labels are not complete yet")
            ),
            timings=(
                tuple(
                    StageTiming(
                        stage=time.stage,
                        tasks=time.launches,
                        wall_s=time.wall_s,
                        core_hours=None if time.core_s is None else time.core_s / 3600,
                        elapsed_s=time.elapsed_s,
                    )
                    for time in times
                )
                if times
                else NotAvailable(reason="no firework has finished yet")
            ),
            settings=_flat(self.plan),
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names."""
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, inner in value.items():
            flat.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    if isinstance(value, list | tuple):
        return {prefix: ", ".join(map(str, value))}
    return {prefix: value}
