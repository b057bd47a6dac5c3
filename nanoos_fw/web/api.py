"""The six endpoints of the functional description, under ``/api/ml``.

What reads answers at once. What makes new work submits fireworks by the operations
that the command line uses, and answers 202 with their ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict, Field

from nanoos_fw.errors import InputError
from nanoos_fw.firetasks.featurization import FeatureParameters

if TYPE_CHECKING:
    from nanoos_fw.web.app import State

MAX_STRUCTURES = 1000

router = APIRouter(prefix="/api/ml", tags=["ml"])

_T = TypeVar("_T")
_Text = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]
_Id = Annotated[
    str,
    InPath(
        min_length=1,
        max_length=200,
        pattern=r"^[^\x00/]+$",
        description="key, its beginning, or label",
    ),
]


class NotFoundError(InputError):
    """What the address names does not exist."""


class ForbiddenError(InputError):
    """The server was started without leave to change anything."""


class Schema(BaseModel):
    """Base of requests: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class FeatureComputeRequest(Schema):
    """Which features are wanted."""

    parameters: FeatureParameters = FeatureParameters()
    force_recompute: bool = False


class BatchFeatureRequest(FeatureComputeRequest):
    """Features of several structures."""

    structure_ids: list[_Text] = Field(min_length=1, max_length=MAX_STRUCTURES)


class FeatureState(Schema):
    """What the store has of a structure."""

    structure_id: str
    state: Literal["hit", "stale", "quarantined", "missing"]
    reason: str = ""


class FeatureComputeResponse(Schema):
    """State of the features, and what was submitted to compute those not there."""

    feature_version: int
    structures: list[FeatureState]
    scalar_features: dict[str, float] | None = Field(
        default=None, description="of a single structure whose features are there"
    )
    submitted: int = Field(description="structures that new fireworks will featurize")
    workflow: str | None = Field(default=None, description="key of the workflow")


class GNNPredictionRequest(Schema):
    """Structures and the model that is to predict them."""

    structure_ids: list[_Text] = Field(min_length=1, max_length=MAX_STRUCTURES)
    model_name: _Text = Field(
        description="name (its active version), name@version, name@alias, best:mae"
    )


class GNNPrediction(Schema):
    """One prediction."""

    structure_id: str
    prediction: float
    uncertainty: float | None = Field(description="standard deviation, same unit")
    half_width: float | None = Field(
        description="the truth is within prediction ± half_width with the coverage"
    )
    distance: float | None = Field(description="to the nearest training structures")
    out_of_domain: bool
    unseen_elements: list[str] = Field(description="that training did not hold")


class GNNPredictionResponse(Schema):
    """Predictions of one model."""

    model: str
    target_property: str
    unit: str
    coverage: float = Field(description="that the interval is made for")
    predictions: list[GNNPrediction]
    cached_features: int = Field(description="graphs that came from the store")


class ModelList(Schema):
    """Registered models, as ``nanoos models list --json`` gives them."""

    models: list[dict[str, Any]]


class ModelDetails(Schema):
    """A version of a model, the moves of its aliases and its use."""

    model: dict[str, Any]
    alias_history: list[dict[str, Any]]
    predictions: int


class TrainingRequest(Schema):
    """A training on the folder of a dataset."""

    dataset: _Text = Field(
        description="folder of a dataset; this server and all workers see it"
    )
    target: _Text = Field(description="property that the dataset holds")
    model_name: _Text = Field(description="in the registry")
    settings: dict[str, Any] = Field(
        default={}, description="as in the file of 'nanoos train submit --config'"
    )
    parent: _Text | None = Field(
        default=None, description="registered model that is trained further"
    )
    activate: bool = Field(
        default=False, description="make the new version the active one"
    )


class TrainingResponse(Schema):
    """A training that fireworks will run."""

    model_name: str
    parent: str | None
    workflow: str = Field(description="key of the workflow")
    submitted: bool = Field(description="false if this training was there before")


class ErrorResponse(Schema):
    """What every error is answered with."""

    kind: str
    message: str
    evidence: dict[str, Any]
    advice: str | None
    resumable: bool = False


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "the body is no JSON"},
    401: {"model": ErrorResponse, "description": "no token"},
    422: {"model": ErrorResponse, "description": "the request cannot be used"},
    503: {"model": ErrorResponse, "description": "the database is away"},
}
_NO_WEIGHTS: dict[str, Any] = {
    "model": ErrorResponse, "description": "the model has no weights",
}  # fmt: skip
_NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorResponse, "description": "there is none of this name"}
}
_FORBIDDEN: dict[int | str, dict[str, Any]] = {
    403: {"model": ErrorResponse, "description": "started without --allow-changes"}
}
_SUBMITTED: dict[int | str, dict[str, Any]] = {
    202: {"model": FeatureComputeResponse, "description": "fireworks were submitted"}
}


def state_of(request: Request) -> State:
    """Return what the routes share."""
    state: State = request.app.state.nanoos
    return state


def existing(look_up: Callable[[], _T]) -> _T:
    """Return what is looked up by a name of the request.

    Raises
    ------
    NotFoundError
        Instead of the InputError of stores; answered 404.
    """
    try:
        return look_up()
    except InputError as error:
        raise NotFoundError(
            error.message, evidence=error.evidence, advice=error.advice
        ) from error


def require_writing(state: State) -> None:
    """Refuse a change unless the server was started for changes.

    Raises
    ------
    ForbiddenError
        Answered 403.
    """
    if not state.may_write:
        raise ForbiddenError(
            "this server only reads",
            advice="start it with 'nanoos serve --allow-changes'",
        )


# ------------------------------------------------------------------------- features


@router.post(
    "/features/structure/{structure_id}",
    responses={**_ERRORS, **_NOT_FOUND, **_FORBIDDEN, **_SUBMITTED},
)
def compute_structure_features(
    structure_id: _Id, body: FeatureComputeRequest, request: Request, response: Response
) -> FeatureComputeResponse:
    """Return the features of a structure, or submit their computation."""
    state = state_of(request)
    with state.lock:
        found = _features(state, [structure_id], body, response)
        if not found.submitted and found.structures[0].state == "hit":
            found.scalar_features = _scalars(
                state, found.structures[0].structure_id, body.parameters
            )
    return found


@router.post(
    "/features/batch", responses={**_ERRORS, **_NOT_FOUND, **_FORBIDDEN, **_SUBMITTED}
)
def compute_batch_features(
    body: BatchFeatureRequest, request: Request, response: Response
) -> FeatureComputeResponse:
    """Return the state of the features of structures; submit those not there."""
    state = state_of(request)
    with state.lock:
        return _features(state, body.structure_ids, body, response)


def _features(
    state: State, names: list[str], body: FeatureComputeRequest, response: Response
) -> FeatureComputeResponse:
    from nanoos_fw.ml.features import FEATURE_VERSION
    from nanoos_fw.stores.features import FeatureStore

    keys = _keys(state, names)
    described = body.parameters.model_dump(mode="json")
    status = FeatureStore(state.database).status(keys, described, FEATURE_VERSION)
    found = [
        FeatureState(structure_id=key, state=entry.state, reason=entry.reason)
        for key, entry in status.items()
    ]
    missing = [
        key
        for key, entry in status.items()
        if body.force_recompute or entry.state in ("missing", "stale")
    ]
    workflow = None
    if missing:
        require_writing(state)
        from nanoos_fw.operations import submit
        from nanoos_fw.workflows import featurization_workflow

        made = featurization_workflow(
            missing,
            body.parameters,
            str(state.work_root),
            force_recompute=body.force_recompute,
        )
        submit(state.launchpad, made)
        state.save()
        workflow = str(made.metadata["key"])
        response.status_code = 202
    return FeatureComputeResponse(
        feature_version=FEATURE_VERSION,
        structures=found,
        submitted=len(missing),
        workflow=workflow,
    )


def _scalars(
    state: State, key: str, parameters: FeatureParameters
) -> dict[str, float] | None:
    from nanoos_fw.ml.features import FEATURE_VERSION
    from nanoos_fw.stores.features import FeatureStore

    described = parameters.model_dump(mode="json")
    found = FeatureStore(state.database).get([key], described, FEATURE_VERSION)
    if key not in found:
        return None
    scalars = found[key].scalars
    return {name: float(v) for name, v in scalars.items() if math.isfinite(v)}


def _keys(state: State, names: list[str]) -> list[str]:
    from nanoos_fw.stores.structures import StructureStore

    return existing(lambda: StructureStore(state.database).find_keys(names))


# ---------------------------------------------------------------------- predictions


@router.post(
    "/gnn/properties",
    responses={
        **_ERRORS,
        **_NOT_FOUND,
        424: _NO_WEIGHTS,
    },
)
def predict_with_gnn(
    body: GNNPredictionRequest, request: Request
) -> GNNPredictionResponse:
    """Predict a property; features that are not in the store are computed for it."""
    state = state_of(request)
    with state.lock:
        return _predict(state, body)


def _predict(state: State, body: GNNPredictionRequest) -> GNNPredictionResponse:
    from nanoos_fw.ml.features import FEATURE_VERSION, extract_structure_features
    from nanoos_fw.ml.screening import predict_in_chunks
    from nanoos_fw.ml.uncertainty import DEFAULT_COVERAGE
    from nanoos_fw.stores.features import FeatureStore
    from nanoos_fw.stores.models import ModelRegistry
    from nanoos_fw.stores.structures import StructureStore

    keys = _keys(state, body.structure_ids)
    registry = ModelRegistry(state.database)
    record = existing(lambda: registry.get(body.model_name))
    model = state.loaded.get(record.reference)
    if model is None:
        model = state.loaded[record.reference] = registry.load(record)
    parameters = _parameters_of(model)
    described = parameters.model_dump(mode="json")
    graphs: dict[str, Any] = FeatureStore(state.database).graphs(
        keys, described, FEATURE_VERSION
    )
    cached = len(graphs)
    absent = [key for key in keys if key not in graphs]
    for key, entry in StructureStore(state.database).get_many(absent).items():
        graph, _ = extract_structure_features(
            entry.structure, parameters.cutoff_radius, parameters.max_neighbors
        )
        graphs[key] = graph
    chunks = predict_in_chunks(model, ((key, graphs[key]) for key in keys))
    return GNNPredictionResponse(
        model=record.reference,
        target_property=model.target_property,
        unit=model.unit,
        coverage=DEFAULT_COVERAGE,
        predictions=[
            GNNPrediction(
                structure_id=row["structure_id"],
                prediction=row["mean"],
                uncertainty=row["std"],
                half_width=row["half_width"],
                distance=row["distance"],
                out_of_domain=row["out_of_domain"],
                unseen_elements=row["unseen_elements"],
            )
            for chunk in chunks
            for row in chunk
        ],
        cached_features=cached,
    )


def _parameters_of(model: Any) -> FeatureParameters:
    """Return the features that a model was trained on; a forest takes any."""
    card = getattr(model, "card", None)
    if card is None:
        return FeatureParameters()
    return FeatureParameters(
        cutoff_radius=card.cutoff_radius, max_neighbors=card.max_neighbors
    )


# ------------------------------------------------------------------------- training


@router.post(
    "/train",
    status_code=202,
    responses={**_ERRORS, **_NOT_FOUND, **_FORBIDDEN, 424: _NO_WEIGHTS},
)
def train(body: TrainingRequest, request: Request) -> TrainingResponse:
    """Submit a training, as ``nanoos train submit`` does; a firework runs it."""
    from nanoos_fw.operations.trainings import submit_training
    from nanoos_fw.stores.models import ModelRegistry

    state = state_of(request)
    require_writing(state)
    from nanoos_fw.ml.datasets import open_dataset

    with state.lock:
        existing(lambda: open_dataset(Path(body.dataset), verify=False))
        if body.parent is not None:
            parent = body.parent
            existing(lambda: ModelRegistry(state.database).get(parent))
        found = submit_training(
            state.launchpad,
            Path(body.dataset),
            body.target,
            body.model_name,
            state.work_root,
            settings=body.settings,
            parent=body.parent,
            activate=body.activate,
        )
        state.save()
    return TrainingResponse(
        model_name=found.model,
        parent=found.parent,
        workflow=found.workflow,
        submitted=found.added,
    )


# --------------------------------------------------------------------------- models


@router.get("/models", responses=_ERRORS)
def list_models(
    request: Request, target: _Text | None = None, name: _Text | None = None
) -> ModelList:
    """List the registered models."""
    from nanoos_fw.stores.models import ModelRegistry

    state = state_of(request)
    with state.lock:
        records = ModelRegistry(state.database).list_models(name=name, target=target)
    return ModelList(models=[record.to_dict() for record in records])


@router.get("/models/{reference}", responses={**_ERRORS, **_NOT_FOUND})
def show_model(reference: _Id, request: Request) -> ModelDetails:
    """Return a version of a model: ``name``, ``name@version`` or ``name@alias``."""
    from nanoos_fw.stores.models import ModelRegistry

    state = state_of(request)
    with state.lock:
        registry = ModelRegistry(state.database)
        record = existing(lambda: registry.get(reference))
        return ModelDetails(
            model=record.to_dict(),
            alias_history=[move.to_dict() for move in registry.history(record.name)],
            predictions=registry.n_predictions(record.reference),
        )
