"""What a training is told and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from nanoos_fw.errors import InputError
from nanoos_fw.provenance import content_key

_LATER_FIELDS = (
    "dense_layers",
    "momentum",
    "milestones",
    "gamma",
    "clip_norm",
    "classes",
    "dropout",
    "element_vectors",
    "checkpoint_minutes",
    "keep_checkpoints",
    "parent_sha256",
    "freeze",
    "normalizer",
    "forest_baseline",
    "model_type",
    "angle_layers",
    "angle_cutoff",
    "angle_gaussians",
)
MODEL_TYPES = {"cgcnn": "CGCNN", "line_graph": "LineGraph"}
"""What the registry calls the kinds of networks that can be trained."""

PUBLISHED: dict[str, Any] = {
    "epochs": 30,
    "batch_size": 256,
    "learning_rate": 0.01,
    "hidden_dim": 64,
    "num_layers": 3,
    "readout_dim": 128,
    "ensemble_size": 1,
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 0.0,
    "schedule": "step",
    "milestones": (100,),
    "warmup_fraction": 0.0,
    "averaging_epochs": 0.0,
    "element_reference": False,
    "element_vectors": "published",
}
"""Settings of the published program where its user gives none."""


class TrainingConfig(BaseModel):
    """How an ensemble is trained.

    Parameters
    ----------
    target
        Target property; must be that of the dataset.
    epochs
        Passes over the training part, for each member.
    batch_size
        Graphs per step over all ranks; batches of an epoch are nearly equal.
    learning_rate
        Highest rate.
    model_type
        ``cgcnn``, or ``line_graph``: a network on atoms, bonds and angles
        (:mod:`nanoos_fw.ml.line_graph_network`), which needs a dataset of all
        neighbours within a cutoff, with the vectors of edges.
    hidden_dim, num_layers, readout_dim, dense_layers
        Sizes of the network; the one on angles has no ``readout_dim`` and
        ``dense_layers``.
    angle_layers, angle_cutoff, angle_gaussians
        Of ``line_graph``: the first so many of ``num_layers`` pass messages over
        angles, too; bonds as short as the cutoff (Å) make angles; Gaussians over the
        cosine.
    gaussian_step
        Distance between Gaussians of the bond expansion, and their width (Å).
    ensemble_size
        Networks, differing in initial weights and order of rows. One gives no
        uncertainty without dropout.
    optimizer, momentum, weight_decay
        AdamW, Adam (decay as a term of the gradient) or SGD with this momentum. Only
        weight matrices decay.
    schedule, warmup_fraction, milestones, gamma
        ``cosine`` (to zero), ``constant`` or ``step`` (times ``gamma`` from each of
        the epochs ``milestones`` on), after a linear rise over this share of all
        steps; ``one-cycle``: up from a 25th and down to a 250000th, along cosines.
    clip_norm
        Longest gradient, as the norm over all weights of the network; None leaves
        them as they are.
    loss
        Of the normalized target; classes have the negative log-likelihood.
    classes
        Names of two classes for targets 0 and 1; empty for a number.
    dropout
        Share of the units of the first dense layer that drop out in training.
    averaging_epochs
        The model's weights are a running average with this memory, which smooths the
        noise of small batches; 0 takes the weights of the last step.
    patience
        Stop a member after this many epochs without a lower validation error; None
        goes on to the end. The weights of the best epoch are kept either way.
    element_reference
        Let the network learn what a linear model in composition leaves over.
    element_vectors
        What the network is told of the elements: ``own``
        (:func:`nanoos_fw.ml.cgcnn.atom_features`) or ``published``.
    checkpoint_every, checkpoint_minutes, keep_checkpoints
        Epochs and minutes between checkpoints, and how many stay.
    seed
        Decides every random number.
    precision
        Of weights and arithmetic; ``bfloat16`` is for the products of matrices, all
        else in float32.
    parent_sha256
        File whose weights the members start from, its members in turn; None draws
        weights.
    freeze
        Parts of the network that stay as the parent has them, such as ``embedding``
        or ``convolutions.0``, running moments included.
    normalizer
        ``refit``: mean, scale and element reference of this training set; ``keep``:
        those of the parent.
    forest_baseline
        Fit a random forest on scalar features beside the network.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str = Field(min_length=1)
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=32, ge=2)
    learning_rate: float = Field(default=3e-3, gt=0.0)
    hidden_dim: int = Field(default=64, ge=1)
    num_layers: int = Field(default=2, ge=1)
    readout_dim: int = Field(default=128, ge=1)
    dense_layers: int = Field(default=1, ge=1)
    gaussian_step: float = Field(default=0.2, gt=0.0)
    ensemble_size: int = Field(default=5, ge=1)
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    weight_decay: float = Field(default=1e-2, ge=0.0)
    schedule: Literal["cosine", "constant", "step", "one-cycle"] = "cosine"
    warmup_fraction: float = Field(default=0.05, ge=0.0, le=1.0)
    milestones: tuple[int, ...] = ()
    gamma: float = Field(default=0.1, gt=0.0, le=1.0)
    clip_norm: float | None = Field(default=None, gt=0.0)
    loss: Literal["mse", "mae", "huber"] = "mse"
    classes: tuple[str, ...] = ()
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    averaging_epochs: float = Field(default=5.0, ge=0.0)
    patience: int | None = Field(default=None, ge=1)
    element_reference: bool = True
    element_vectors: Literal["own", "published"] = "own"
    checkpoint_every: int = Field(default=10, ge=1)
    checkpoint_minutes: float = Field(default=10.0, ge=0.0)
    keep_checkpoints: int = Field(default=2, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)  # as scikit-learn has it
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    parent_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    freeze: tuple[str, ...] = ()
    normalizer: Literal["refit", "keep"] = "refit"
    forest_baseline: bool = True
    model_type: Literal["cgcnn", "line_graph"] = "cgcnn"
    angle_layers: int = Field(default=2, ge=1)
    angle_cutoff: float = Field(default=3.5, gt=0.0)
    angle_gaussians: int = Field(default=20, ge=2)
    schema_version: Literal[1] = 1

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.classes and (len(self.classes) != 2 or self.element_reference):
            raise ValueError(
                "classes takes two names, and needs element_reference = false"
            )
        others = {
            "cgcnn": ("angle_layers", "angle_cutoff", "angle_gaussians"),
            "line_graph": ("readout_dim", "dense_layers"),
        }[self.model_type]
        for name in others:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is no size of {self.model_type}")
        if self.model_type == "line_graph":
            if self.angle_layers > self.num_layers:
                raise ValueError("angle_layers must be at most num_layers")
            if self.precision == "bfloat16":
                raise ValueError("line_graph is computed in float32 or float64")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Keys of trainings and plans hash this: what is at its default is left out,
        # as it was before there was a choice.
        values: dict[str, Any] = handler(self)
        for name in _LATER_FIELDS:
            if name in values and (
                getattr(self, name) == type(self).model_fields[name].default
            ):
                del values[name]
        return values


class LearningCurve(BaseModel):
    """One member's way: entries per epoch, losses normalized, errors in the unit.

    Those of ``train`` are of the batches while the weights changed, those of ``val``
    of the averaged weights after the epoch. Lists of what was not known are empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    member: int
    epochs: int
    best_epoch: int
    train_loss: list[float]
    val_mae: list[float]
    learning_rate: list[float]
    train_mse: list[float] = []
    train_mae: list[float] = []
    train_r2: list[float | None] = []
    val_loss: list[float] = []
    val_mse: list[float] = []
    val_r2: list[float | None] = []


class TrainingResult(BaseModel):
    """What a training gave.

    Parameters
    ----------
    target, unit
        What the model predicts.
    checkpoint, checkpoint_sha256
        The ensemble's file, of the best epoch of each member.
    last_checkpoint, last_checkpoint_sha256
        The same of the last epoch, without calibration.
    dataset_hash, config
        What it was trained on, and how.
    curves
        Learning curve of each member.
    metrics
        Of the ensemble mean by part: ``n``, ``mse``, ``mae``, ``rmse``, ``r2`` and,
        with several members, ``within_1_std``, ``within_2_std``;
        ``within_interval`` is the share inside the 90 % interval, about 0.9 by
        construction of validation, as is ``within_1_std`` 0.683; units follow ``unit``.
    baselines
        The same by part for ``mean`` (of the training targets) and ``composition``
        (least squares in the fractions of the elements), which need no structure, and
        ``forest`` (a random forest on scalar features).
    predictions
        For validation and test: rows of ``structure_id``, ``target``, ``mean``,
        ``std`` (None with one member and no dropout) and ``half_width`` of the 90 %
        interval (None without validation rows, and of classes); ``members``: what
        each of them says.
    per_element
        For validation and test: rows and mean absolute error of the structures that
        hold an element, by its symbol.
    parent
        ``sha256``, ``frozen`` and ``normalizer`` of a fine-tuning, None without.
    device
        Where the ranks computed.
    uncertainty_scale
        See :class:`nanoos_fw.ml.cgcnn.ModelCard`.
    n_parameters
        Weights of one member.
    ranks, wall_s
        Of the launch that finished; time in seconds, earlier launches not counted.
    environment
        Versions and host.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    unit: str
    checkpoint: str
    checkpoint_sha256: str
    dataset_hash: str
    config: TrainingConfig
    curves: list[LearningCurve]
    metrics: dict[str, dict[str, float | int | None]]
    baselines: dict[str, dict[str, dict[str, float | int | None]]]
    predictions: dict[str, list[dict[str, Any]]]
    uncertainty_scale: float
    n_parameters: int
    ranks: int
    wall_s: float
    environment: dict[str, Any]
    last_checkpoint: str | None = None
    last_checkpoint_sha256: str | None = None
    per_element: dict[str, dict[str, dict[str, float | int]]] = {}
    parent: dict[str, Any] | None = None
    device: str = "cpu"


def read_training_config(values: Mapping[str, Any]) -> TrainingConfig:
    """Return a checked config.

    Raises
    ------
    InputError
        If a key is unknown or a value is not valid.
    """
    try:
        return TrainingConfig(**values)
    except ValidationError as error:
        raise InputError(f"the training config is not valid: {error}") from error


def training_key(
    config: TrainingConfig, dataset_hash: str, name: str | None = None
) -> str:
    """Return the content key of a training: of all that decides its weights.

    Ranks, threads and device change rounding alone, and are no part of it.

    Parameters
    ----------
    config
        Of a training that begins with a parent, as
        :func:`nanoos_fw.ml.parents.with_parent` returns it.
    dataset_hash
        Of structures, graphs, targets and split.
    name
        Of a model: its entry in the registry, where one training may have several.
    """
    asked: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "dataset": dataset_hash,
    }
    if name is not None:
        asked["name"] = name
    return content_key("training", asked)
