"""Hyper-parameter search: the space, what to try next, and who goes on.

All here is a function of a configuration and of the trials so far; where those are
kept, and who runs them, is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nanoos_fw.errors import InputError, MissingDependencyError
from nanoos_fw.ml.datasets import open_dataset
from nanoos_fw.ml.training import TrainingConfig

_FIXED = ("target", "epochs", "schema_version")
_STARTUP_TRIALS = 10


class FloatRange(BaseModel):
    """Numbers from ``low`` to ``high``, evenly or evenly in their logarithm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["float"] = "float"
    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> FloatRange:
        _check_range(self.low, self.high, self.log)
        return self

    def draw(self, rng: np.random.Generator) -> float:
        """Return a random value."""
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
            return min(max(value, self.low), self.high)
        return float(rng.uniform(self.low, self.high))


class IntRange(BaseModel):
    """Whole numbers from ``low`` to ``high``, both included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["int"] = "int"
    low: int
    high: int
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> IntRange:
        _check_range(self.low, self.high, self.log)
        return self

    def draw(self, rng: np.random.Generator) -> int:
        """Return a random value."""
        if self.log:
            low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            value = round(math.exp(rng.uniform(low, high)))
            return min(max(value, self.low), self.high)
        return int(rng.integers(self.low, self.high + 1))


class Choice(BaseModel):
    """One of several values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["choice"] = "choice"
    values: tuple[str | int | float | bool | None, ...] = Field(min_length=1)

    def draw(self, rng: np.random.Generator) -> str | int | float | bool | None:
        """Return a random value."""
        return self.values[int(rng.integers(len(self.values)))]


Range = Annotated[FloatRange | IntRange | Choice, Field(discriminator="kind")]


class Budget(BaseModel):
    """When a search ends; at least one bound, and the first one met counts.

    Parameters
    ----------
    trials
        Configurations that are tried.
    epochs
        Epochs of all trials together. A trial is begun, or goes on, only if all
        epochs it is to have are left.
    node_hours
        Wall time of finished and running work, times the nodes it has. No work is
        begun after it; what runs then runs to its end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: int | None = Field(default=None, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    node_hours: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _bounded(self) -> Budget:
        if self.trials is None and self.epochs is None and self.node_hours is None:
            raise ValueError("a search needs a budget: trials, epochs or node_hours")
        return self


class SearchConfig(BaseModel):
    """A search: what is trained, what varies, how much it may cost.

    Parameters
    ----------
    name
        Key of the search.
    dataset_dir
        Directory of :func:`nanoos_fw.ml.datasets.write_dataset`, on a file system
        that all workers share. It needs a validation part, which decides.
    training
        What does not vary. ``epochs`` is what a trial gets at most.
    space
        Hyper-parameter -> range: any field of
        :class:`~nanoos_fw.ml.training.TrainingConfig` but target and epochs.
    method
        ``random``; ``tpe``: tree-structured Parzen estimator, through Optuna;
        ``halving``: random configurations, of which the best go on to more epochs.
    budget
        When to stop.
    min_epochs, reduction
        Of ``halving``: epochs of the first rung, and eta: each rung has eta times the
        epochs of the one before, and the best 1/eta of it.
    seed
        Decides what is tried.
    model_name
        Name under which the best model is registered; None takes that of the search.

    References
    ----------
    J. Bergstra et al., Adv. Neural Inf. Process. Syst. 24 (2011) (TPE); L. Li et al.,
    Proc. Mach. Learn. Syst. 2, 230 (2020), arXiv:1810.05934 (asynchronous successive
    halving).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = Field(
        min_length=1, max_length=60, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    dataset_dir: str
    training: TrainingConfig
    space: dict[str, Range] = Field(min_length=1)
    method: Literal["random", "tpe", "halving"] = "random"
    budget: Budget
    min_epochs: int = Field(default=5, ge=1)
    reduction: int = Field(default=3, ge=2)
    seed: int = Field(default=0, ge=0)
    model_name: str | None = None
    schema_version: Literal[1] = 1

    @model_validator(mode="after")
    def _can_be_trained(self) -> SearchConfig:
        for name in self.space:
            if name in _FIXED or name not in TrainingConfig.model_fields:
                known = sorted(set(TrainingConfig.model_fields) - set(_FIXED))
                raise ValueError(f"{name!r} cannot vary; what can: {', '.join(known)}")
        for corner in ({}, *self._corners()):
            # A bad range must not show in the 40th trial.
            training = self.training_of(corner)
            if (
                training.parent_sha256 is not None
                or training.freeze
                or training.normalizer == "keep"
            ):
                raise ValueError(
                    "trials begin with drawn weights: parent_sha256, freeze and "
                    "normalizer = keep need a parent"
                )
        return self

    def _corners(self) -> list[dict[str, Any]]:
        corners = []
        for name, values in self.space.items():
            ends = (
                values.values
                if isinstance(values, Choice)
                else (values.low, values.high)
            )
            corners += [{name: end} for end in ends]
        return corners

    def training_of(self, parameters: Mapping[str, Any]) -> TrainingConfig:
        """Return the training of a trial."""
        fields = {**self.training.model_dump(mode="json"), **parameters}
        return TrainingConfig.model_validate(fields)

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which trials are compared; the last is all they get."""
        if self.method != "halving":
            return (self.training.epochs,)
        return rungs(self.min_epochs, self.training.epochs, self.reduction)


@dataclass(frozen=True)
class Trial:
    """What has become of a configuration.

    Parameters
    ----------
    number
        From 0.
    parameters
        What was tried.
    values
        Epochs -> lowest validation error by then, in the unit of the target.
    state
        ``running``; ``paused`` at a rung; ``done``; ``failed``.
    """

    number: int
    parameters: Mapping[str, Any]
    values: Mapping[int, float] = field(default_factory=dict)
    state: Literal["running", "paused", "done", "failed"] = "running"

    @property
    def epochs(self) -> int:
        """Epochs trained and judged."""
        return max(self.values, default=0)

    @property
    def value(self) -> float | None:
        """The error after most epochs."""
        return self.values[self.epochs] if self.values else None


def rungs(min_epochs: int, max_epochs: int, reduction: int) -> tuple[int, ...]:
    """Return the epochs of the rungs: rising by a factor, the last is the maximum."""
    found = []
    epochs = min_epochs
    while epochs < max_epochs:
        found.append(epochs)
        epochs *= reduction
    return (*found, max_epochs)


def suggest(
    config: SearchConfig, number: int, trials: Sequence[Trial]
) -> dict[str, Any]:
    """Return the parameters of a trial.

    Parameters
    ----------
    config
        The search.
    number
        Of the trial. A random draw depends on it and the seed alone.
    trials
        Those so far; only ``tpe`` learns from them. One worker that runs trials one
        after the other gets the same suggestions every time.

    Raises
    ------
    MissingDependencyError
        If ``tpe`` is asked for and Optuna is not installed.
    """
    rng = np.random.default_rng([config.seed, number])
    if config.method == "tpe":
        return _suggest_tpe(config, number, trials)
    return {name: config.space[name].draw(rng) for name in sorted(config.space)}


def promotion(config: SearchConfig, trials: Sequence[Trial]) -> tuple[int, int] | None:
    """Return which paused trial goes on, and to how many epochs; None if none does.

    From the highest rung down: of the n trials that reached a rung, the best
    floor(n / eta) are to go on; the best of them that waits does.
    """
    steps = config.rungs
    for here, above in reversed(list(pairwise(steps))):
        reached = sorted(
            (trial for trial in trials if here in trial.values),
            key=lambda trial: (trial.values[here], trial.number),
        )
        for trial in reached[: len(reached) // config.reduction]:
            if trial.state == "paused" and trial.epochs == here:
                return trial.number, above
    return None


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the lowest error among those with most epochs.

    Errors after few epochs are lucky or not; a trial that got on is what was judged
    best on the way.
    """
    judged = [t for t in trials if t.value is not None and t.state != "failed"]
    if not judged:
        return None
    most = max(trial.epochs for trial in judged)
    return min(
        (trial for trial in judged if trial.epochs == most),
        key=lambda trial: (trial.value, trial.number),
    )


def read_search(values: Mapping[str, Any]) -> SearchConfig:
    """Return a configuration from plain values.

    Raises
    ------
    InputError
        If it is not valid; names what is wrong.
    """
    try:
        return SearchConfig.model_validate(dict(values))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'search'}: {e['msg']}"
            for e in error.errors()
        )
        raise InputError(
            f"the search is not valid: {problems}",
            advice=f"fields: {', '.join(SearchConfig.model_fields)}",
        ) from error


def check_dataset(config: SearchConfig) -> str:
    """Return the hash of the dataset of a search.

    Raises
    ------
    InputError
        If there is none, it holds another target, or it has no validation part.
    """
    dataset = open_dataset(Path(config.dataset_dir), verify=False)
    target = dataset.config.target_property
    if target != config.training.target:
        raise InputError(
            f"{config.dataset_dir} holds {target!r}, the search is for "
            f"{config.training.target!r}"
        )
    if not len(dataset.rows("val")):
        raise InputError(
            f"{config.dataset_dir} has no validation part, by which a search decides",
            advice="set val_fraction in the dataset",
        )
    return dataset.dataset_hash


# ------------------------------------------------------------------------- private


def _check_range(low: float, high: float, log: bool) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low {low} must be below high {high}")
    if log and low <= 0:
        raise ValueError(f"a logarithmic range cannot begin at {low}")


def _suggest_tpe(
    config: SearchConfig, number: int, trials: Sequence[Trial]
) -> dict[str, Any]:
    try:
        import optuna
    except ImportError as error:
        raise MissingDependencyError(
            "the method 'tpe' needs Optuna",
            advice="pip install 'nanoos_fw[search]', or take method: random",
        ) from error
    import warnings

    distributions = {
        name: _distribution(optuna.distributions, config.space[name])
        for name in sorted(config.space)
    }
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    states = optuna.trial.TrialState
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Trials that run are counted as bad ones, so that workers spread out.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=_STARTUP_TRIALS, seed=seed, constant_liar=True
            )
            study = optuna.create_study(direction="minimize", sampler=sampler)
            for trial in sorted(trials, key=lambda t: t.number):
                if trial.state == "failed" or trial.number >= number:
                    continue
                judged = trial.value is not None
                study.add_trial(
                    optuna.trial.create_trial(
                        params=dict(trial.parameters),
                        distributions=distributions,
                        value=trial.value,
                        state=states.COMPLETE if judged else states.RUNNING,
                    )
                )
            asked = study.ask(distributions)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return {name: asked.params[name] for name in sorted(config.space)}


def _distribution(kinds: Any, values: FloatRange | IntRange | Choice) -> Any:
    if isinstance(values, Choice):
        return kinds.CategoricalDistribution(values.values)
    if isinstance(values, IntRange):
        return kinds.IntDistribution(values.low, values.high, log=values.log)
    return kinds.FloatDistribution(values.low, values.high, log=values.log)
