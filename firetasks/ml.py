"""Firetasks of the learning side: dataset, train, screen, rank."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from nanoos_fw.errors import InputError
from nanoos_fw.firetasks.base import NanoTask, Parameters, TaskContext
from nanoos_fw.firetasks.featurization import FeatureParameters
from nanoos_fw.firetasks.relaxation import RelaxationMethod
from nanoos_fw.ml.datasets import (
    OUTLIER,
    PARTS,
    DatasetConfig,
    adopt_dataset,
    open_dataset,
)
from nanoos_fw.ml.features import FEATURE_VERSION
from nanoos_fw.ml.predictors import PropertyModel
from nanoos_fw.ml.screening import predict_in_chunks, rank_candidates
from nanoos_fw.ml.training import (
    TrainingConfig,
    TrainingResult,
    train_cgcnn_model,
    with_parent,
)
from nanoos_fw.ml.training_config import MODEL_TYPES, training_key
from nanoos_fw.ml.uncertainty import DEFAULT_COVERAGE
from nanoos_fw.parallel import locked
from nanoos_fw.provenance import sha256_file
from nanoos_fw.stores.database import put_artifact
from nanoos_fw.stores.datasets import build_from_targets, collect_targets
from nanoos_fw.stores.models import ModelRecord, Prediction

_MAX_LISTED = 50


class BuildDatasetParameters(Parameters):
    """Parameters of BuildDatasetTask.

    Parameters
    ----------
    method, references
        Labels come from simulations by this method, formation energies against these
        relaxed elements. Without a method they are those that were imported.
    allow_missing
        Leave out structures without a label, which are an error otherwise where
        simulations are to give them.
    """

    campaign: str
    structures: tuple[str, ...] = Field(min_length=1)
    references: tuple[str, ...] = ()
    method: RelaxationMethod | None = None
    features: FeatureParameters = FeatureParameters()
    dataset: DatasetConfig
    allow_missing: bool = False


class BuildDatasetTask(NanoTask):
    """Join labels and features into a frozen dataset with its own hash."""

    _fw_name = "{{nanoos_fw.firetasks.BuildDatasetTask}}"
    parameters_model = BuildDatasetParameters
    parameters: BuildDatasetParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Build the dataset from labels and cached features."""
        parameters = self.parameters
        potential, method = None, None
        if parameters.method is not None:
            potential = parameters.method.potential.resolve(place)
            method = parameters.method.key(potential)
        found = collect_targets(
            place.database,
            parameters.dataset,
            keys=parameters.structures,
            method=method,
            references=parameters.references,
        )
        pending = [
            key
            for key in parameters.structures
            if key not in found.values and key not in found.failures
        ]
        if pending and method is not None and not parameters.allow_missing:
            raise InputError(
                f"{len(pending)} structures have no label yet",
                evidence={"first": pending[:5]},
                advice="rerun the fireworks that label them",
            )
        # The hash, which names the folder, is known when all graphs have been read.
        building = place.work_root / "datasets" / f".building-{secrets.token_hex(8)}"
        try:
            dataset, without, leakage = build_from_targets(
                place.database,
                found,
                parameters.dataset,
                features=parameters.features.model_dump(mode="json"),
                directory=building,
            )
            directory = place.work_dir("datasets", dataset.dataset_hash)
            adopt_dataset(building, directory)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        outputs: dict[str, Any] = {"dataset": dataset.dataset_hash}
        if potential is not None:
            outputs |= {
                "method": method,
                "potential": {
                    "name": potential.name,
                    "citation": potential.citation,
                    "sha256": potential.files[0].sha256 if potential.files else "",
                },
            }
        place.campaigns.record(parameters.campaign, **outputs)
        return {
            "dataset": dataset.dataset_hash,
            "counts": {part: dataset.parts.count(part) for part in (*PARTS, OUTLIER)},
            "failed_labels": len(found.failures),
            "without_label": len(pending),
            "without_features": len(without),
            "leaking_structures": len(leakage.structures),
            "mock_targets": dataset.mock_targets,
        }


class TrainModelParameters(Parameters):
    """Parameters of TrainModelTask.

    Parameters
    ----------
    campaign
        Whose dataset is trained on, and whose model this becomes.
    dataset_dir, dataset_hash
        Without a campaign: folder of the dataset, and what must be in it.
    parent
        Version in the registry (``name@version``) whose weights are trained further.
    activate
        Make the version the active one; those of campaigns always are.
    """

    campaign: str | None = None
    dataset_dir: str | None = None
    dataset_hash: str | None = None
    model_name: str
    training: TrainingConfig
    parent: str | None = None
    activate: bool = False

    @model_validator(mode="after")
    def _one_dataset(self) -> TrainModelParameters:
        given = self.dataset_dir is not None, self.dataset_hash is not None
        if given != ((self.campaign is None,) * 2):
            raise ValueError("give either campaign, or dataset_dir and dataset_hash")
        return self


class TrainModelTask(NanoTask):
    """Train a CGCNN ensemble on MPI ranks and register it as a new version."""

    _fw_name = "{{nanoos_fw.firetasks.TrainModelTask}}"
    parameters_model = TrainModelParameters
    parameters: TrainModelParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Train, unless the registry has the result, and register."""
        parameters = self.parameters
        dataset_dir, dataset_hash = self._dataset(place)
        training, parent = parameters.training, None
        if parameters.parent is not None:
            parent = place.models.get(parameters.parent)
            weights = self._parent_file(place, parent)
            training = with_parent(training, weights)
        # Under another name it is another entry, of the same finished training.
        name = parameters.model_name if parameters.campaign is None else None
        key = training_key(training, dataset_hash, name)
        record = place.models.find(key)
        if record is None:
            work_dir = place.work_dir("training", training_key(training, dataset_hash))
            result = self._train(place, training, dataset_dir, work_dir, parent)
            record = self._register(place, result, dataset_dir, key, parent)
        if parameters.campaign is not None:
            place.models.activate(
                record.reference, reason=f"trained by campaign {parameters.campaign}"
            )
            place.campaigns.record(parameters.campaign, model=record.reference)
        elif parameters.activate:
            place.models.activate(record.reference, reason="trained to be active")
        return {"model": record.reference, "sha256": record.sha256}

    def _dataset(self, place: TaskContext) -> tuple[Path, str]:
        """Return folder and hash of what is trained on."""
        parameters = self.parameters
        if parameters.campaign is not None:
            key: str = place.campaigns.output(parameters.campaign, "dataset")
            return place.work_dir("datasets", key), key
        directory = Path(str(parameters.dataset_dir))
        found = open_dataset(directory, verify=False).dataset_hash
        if found != parameters.dataset_hash:
            raise InputError(
                f"{directory} holds another dataset than when the training was "
                "submitted",
                evidence={
                    "dataset_hash": found,
                    "dataset_hash_expected": parameters.dataset_hash,
                },
                advice="bring it back, or submit the training again",
            )
        return directory, found

    def _parent_file(self, place: TaskContext, parent: ModelRecord) -> Path:
        """Write the weights to train further to a file, unless it is there."""
        path = place.work_root / "parents" / f"{parent.sha256}.safetensors"
        if not path.is_file() or sha256_file(path) != parent.sha256:
            path.parent.mkdir(parents=True, exist_ok=True)
            place.models.write_weights(parent, path)
        return path

    def _train(
        self,
        place: TaskContext,
        training: TrainingConfig,
        dataset_dir: Path,
        work_dir: Path,
        parent: ModelRecord | None,
    ) -> TrainingResult:
        with locked(work_dir):
            return train_cgcnn_model(
                training.target,
                training,
                dataset_dir=dataset_dir,
                work_dir=work_dir,
                resources=place.resources,
                deadline=place.deadline,
                parent=None if parent is None else self._parent_file(place, parent),
            )

    def _register(
        self,
        place: TaskContext,
        result: TrainingResult,
        dataset_dir: Path,
        key: str,
        parent: ModelRecord | None,
    ) -> ModelRecord:
        parameters, training = self.parameters, result.config
        dataset = open_dataset(dataset_dir)
        return place.models.register(
            name=parameters.model_name,
            target=result.target,
            unit=result.unit,
            model_type=MODEL_TYPES[training.model_type],
            weights=Path(result.checkpoint),
            training_key=key,
            training_config=training.model_dump(mode="json"),
            metrics={**result.metrics, "baselines": result.baselines},
            dataset_info={
                "dataset_hash": result.dataset_hash,
                "counts": {
                    part: dataset.parts.count(part)
                    for part in sorted(set(dataset.parts))
                },
                "config": dataset.config.model_dump(mode="json"),
                "mock_targets": dataset.mock_targets,
            },
            environment={
                **result.environment,
                "seed": training.seed,
                "ranks": result.ranks,
                "threads": place.resources.threads,
                "wall_s": round(result.wall_s, 3),
            },
            parent=None if parent is None else parent.reference,
            details=put_artifact(place.database, result.model_dump_json().encode()),
        )


class ScreenCandidatesParameters(Parameters):
    """Parameters of ScreenCandidatesTask."""

    campaign: str
    structures: tuple[str, ...] = Field(min_length=1)
    features: FeatureParameters = FeatureParameters()


class ScreenCandidatesTask(NanoTask):
    """Predict candidates with the campaign's model: mean, uncertainty, domain."""

    _fw_name = "{{nanoos_fw.firetasks.ScreenCandidatesTask}}"
    parameters_model = ScreenCandidatesParameters
    parameters: ScreenCandidatesParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Predict what has no row yet, in chunks."""
        parameters = self.parameters
        reference = place.campaigns.output(parameters.campaign, "model")
        return predict_missing(
            place, reference, parameters.structures, parameters.features
        )


def predict_missing(
    place: TaskContext,
    reference: str,
    keys: Sequence[str],
    features: FeatureParameters,
) -> dict[str, Any]:
    """Predict the structures that have no row of this model yet, in chunks.

    Parameters
    ----------
    reference
        ``name@version`` of the registry.
    keys
        Structures; those without features are left out.

    Returns
    -------
    dict
        ``model``, and the numbers of ``structures``, of rows that were there
        (``hit``) and are new (``predicted``), and ``without_features``.
    """
    record = place.models.get(reference)
    known = {row.structure for row in place.models.predictions(reference, keys)}
    missing = [key for key in keys if key not in known]
    described = features.model_dump(mode="json")
    graphs = place.features.graphs(missing, described, FEATURE_VERSION)
    written = 0
    if graphs:
        model = load_model(place, record)
        for rows in predict_in_chunks(model, graphs.items(), coverage=DEFAULT_COVERAGE):
            written += place.models.put_predictions(
                reference,
                [Prediction.from_row(row, DEFAULT_COVERAGE) for row in rows],
            )
            place.check_time(predicted=len(known) + written)
    return {
        "model": reference,
        "structures": len(keys),
        "hit": len(known),
        "predicted": written,
        "without_features": len(missing) - len(graphs),
    }


def load_model(place: TaskContext, record: ModelRecord) -> PropertyModel:
    """Return a registered model, ready to predict, from verified weights."""
    # Not all cores of a shared node.
    return place.models.load(record, threads=place.resources.threads)


class RankCandidatesParameters(Parameters):
    """Parameters of RankCandidatesTask."""

    campaign: str
    structures: tuple[str, ...] = Field(min_length=1)
    top_k: int = Field(ge=1)


class RankCandidatesTask(NanoTask):
    """Rank all screened candidates, lowest prediction first."""

    _fw_name = "{{nanoos_fw.firetasks.RankCandidatesTask}}"
    parameters_model = RankCandidatesParameters
    parameters: RankCandidatesParameters

    def run(self, place: TaskContext) -> dict[str, Any]:
        """Rank and record the best; equal predictions are ordered by key."""
        parameters = self.parameters
        reference = place.campaigns.output(parameters.campaign, "model")
        predictions = place.models.predictions(reference, parameters.structures)
        ranked = rank_candidates(row.to_row() for row in predictions)
        if len(ranked) < parameters.top_k:
            raise InputError(
                f"{len(ranked)} candidates are ranked, fewer than top_k = "
                f"{parameters.top_k}",
                evidence={
                    "structures": len(parameters.structures),
                    "predicted": len(predictions),
                    "out_of_domain": sum(row.out_of_domain for row in predictions),
                },
                advice="look for quarantined structures in the featurize fireworks",
            )
        best = [row["structure_id"] for row in ranked[: parameters.top_k]]
        place.campaigns.record(parameters.campaign, ranking=best, n_ranked=len(ranked))
        return {"ranked": len(ranked), "best": best[:_MAX_LISTED]}
