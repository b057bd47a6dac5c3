"""When an active-learning campaign ends: budgets, no more progress, certainty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nanoos_fw.ml.acquisition import Objective


class StopRules(BaseModel):
    """The campaign ends with the first of these that holds.

    Parameters
    ----------
    max_labels
        Candidates given out to be labelled, failed ones too, those of the first round
        included. The last batch is as small as the budget needs.
    max_rounds
        Batches, the first included.
    max_core_hours
        Wall time of the campaign's launches times their cores; no round begins after.
    patience
        Rounds without progress: the mean of the best ``top`` labels has not become
        better by more than ``min_improvement``.
    top, min_improvement
        Of ``patience``; in the unit of the target.
    val_mae
        Mean absolute error on the validation part, in the unit of the target, that is
        small enough.
    max_std
        Largest standard deviation of all candidates without label that is small
        enough.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_labels: int | None = Field(default=None, ge=1)
    max_rounds: int | None = Field(default=None, ge=1)
    max_core_hours: float | None = Field(default=None, gt=0)
    patience: int | None = Field(default=None, ge=1)
    top: int = Field(default=1, ge=1)
    min_improvement: float = Field(default=0.0, ge=0)
    val_mae: float | None = Field(default=None, gt=0)
    max_std: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _ends(self) -> StopRules:
        budgets = (self.max_labels, self.max_rounds, self.max_core_hours)
        if all(budget is None for budget in budgets):
            raise ValueError(
                "give a budget: max_labels, max_rounds or max_core_hours; the other "
                "rules may never hold"
            )
        return self


@dataclass(frozen=True)
class Progress:
    """Where a campaign stands before a batch is chosen.

    Parameters
    ----------
    labels
        Candidates given out so far.
    rounds
        Batches so far.
    candidates_left
        That have no label and could be chosen.
    core_hours
        Used so far.
    best
        Of each round, the mean of the best ``top`` labels so far; None where there
        were fewer.
    val_mae, max_std
        Of the last model; None if it does not state them.
    asked
        The user has asked to stop.
    """

    labels: int
    rounds: int
    candidates_left: int
    core_hours: float = 0.0
    best: Sequence[float | None] = ()
    val_mae: float | None = None
    max_std: float | None = None
    asked: bool = False


@dataclass(frozen=True)
class Stop:
    """Why a campaign ended: the rule's name, and a sentence with its numbers."""

    rule: str
    reason: str


def labels_left(rules: StopRules, labels: int) -> int | None:
    """Return how many labels the budget still allows; None if it has no limit."""
    return None if rules.max_labels is None else max(0, rules.max_labels - labels)


def check_stop(
    rules: StopRules, progress: Progress, objective: Objective = "min"
) -> Stop | None:
    """Return the rule that ends the campaign now, or None."""
    return next(_reasons(rules, progress, objective), None)


def _reasons(
    rules: StopRules, progress: Progress, objective: Objective
) -> Iterator[Stop]:
    """Yield all rules that hold, the first of which counts."""
    if progress.asked:
        yield Stop("asked", "stopped by the user")
    if progress.candidates_left == 0:
        yield Stop("exhausted", "every candidate that can be chosen has been labelled")
    if labels_left(rules, progress.labels) == 0:
        yield Stop("max_labels", f"the budget of {rules.max_labels} labels is used")
    if rules.max_rounds is not None and progress.rounds >= rules.max_rounds:
        yield Stop("max_rounds", f"all {rules.max_rounds} rounds are done")
    hours, allowed = progress.core_hours, rules.max_core_hours
    if allowed is not None and hours >= allowed:
        yield Stop("max_core_hours", f"{hours:.4g} core-hours of {allowed} are used")
    if _at_most(progress.val_mae, rules.val_mae):
        yield Stop(
            "val_mae",
            f"the validation error {progress.val_mae:.4g} is at most {rules.val_mae}",
        )
    if _at_most(progress.max_std, rules.max_std):
        yield Stop(
            "max_std",
            f"no candidate is less certain than {progress.max_std:.4g}, which is at "
            f"most {rules.max_std}",
        )
    if rules.patience is not None and not _improved(rules, progress.best, objective):
        yield Stop(
            "patience",
            f"the best {rules.top} did not become better by more than "
            f"{rules.min_improvement} in {rules.patience} rounds",
        )


def _at_most(value: float | None, bound: float | None) -> bool:
    return value is not None and bound is not None and value <= bound


def _improved(
    rules: StopRules, best: Sequence[float | None], objective: Objective
) -> bool:
    """Tell whether the last ``patience`` rounds were better than those before."""
    assert rules.patience is not None
    sign = 1.0 if objective == "min" else -1.0
    before, last = best[: -rules.patience], best[-rules.patience :]
    known = [sign * value for value in before if value is not None]
    if not known or len(last) < rules.patience:
        return True
    recent = [sign * value for value in last if value is not None]
    return bool(recent) and min(recent) < min(known) - rules.min_improvement
