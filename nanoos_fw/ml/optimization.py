"""The loss of a training, its optimizer and its learning rate. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from nanoos_fw.ml.training_config import TrainingConfig


class Loss:
    """What a training makes small: an error, or minus the likelihood of two classes.

    Parameters
    ----------
    name
        ``loss`` of the configuration; classes do without.
    classes
        Whether outputs are scores of two classes.
    """

    def __init__(self, name: str, *, classes: bool) -> None:
        self.classes = classes
        self._of_numbers = _LOSSES[name]

    def total(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over the graphs of a batch.

        Parameters
        ----------
        output
            Of a network, ``(n,)``, of classes ``(n, 2)``.
        targets
            ``(n,)``, normalized, of classes 0 or 1.
        """
        if self.classes:
            logs = functional.log_softmax(output, dim=1)
            return functional.nll_loss(logs, targets.long(), reduction="sum")
        return self._of_numbers(output, targets, reduction="sum")

    def values(self, output: Tensor) -> Tensor:
        """Return what is compared with targets: of classes, that of the second."""
        return functional.softmax(output, dim=1)[:, 1] if self.classes else output

    def mean(self, values: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
        """Return the mean over predictions ``(n,)``, of classes probabilities."""
        if self.classes:
            likely = np.where(truth > 0.5, values, 1.0 - values)
            return float(-np.log(np.maximum(likely, 1e-300)).mean())
        pair = (torch.from_numpy(values), torch.from_numpy(truth))
        return float(self._of_numbers(*pair, reduction="mean"))


def new_optimizer(
    config: TrainingConfig, decayed: nn.Parameter, rest: nn.Parameter
) -> torch.optim.Optimizer:
    """Return an optimizer of weights that decay and of those that do not."""
    groups = [
        {"params": [decayed], "weight_decay": config.weight_decay},
        {"params": [rest], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum
        )
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def learning_rate(config: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """Return the rate of a step, counted from 0: a function of its number alone."""
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_fraction * total)
    done = (step - warmup) / max(1, total - warmup)
    if config.schedule == "one-cycle":
        if step < warmup:
            return config.learning_rate * _ease(1 / 25, 1.0, step / warmup)
        return config.learning_rate * _ease(1.0, 1 / 25e4, done)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "step":
        epoch = step // steps_per_epoch
        passed = sum(epoch >= milestone for milestone in config.milestones)
        return config.learning_rate * config.gamma**passed
    return config.learning_rate * _ease(1.0, 0.0, done)


# ------------------------------------------------------------------------- private

_LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": functional.mse_loss,
    "mae": functional.l1_loss,
    "huber": functional.smooth_l1_loss,
}


def _ease(begin: float, end: float, done: float) -> float:
    """Go from one number to another along half a cosine."""
    return end + (begin - end) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
