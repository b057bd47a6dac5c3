"""How far the fit of a network is, and how its errors went."""

from __future__ import annotations

from dataclasses import dataclass, field

N_SUMS = 3
"""Sums over the graphs of a batch: loss, squared and absolute error."""


@dataclass
class History:
    """Learning curve of one network, one entry per finished epoch.

    The numbers of the training part are those of its batches while weights changed,
    with dropout; those of validation are of the averaged weights after the epoch.
    """

    train_loss: list[float] = field(default_factory=list)
    train_mse: list[float] = field(default_factory=list)
    train_mae: list[float] = field(default_factory=list)
    train_r2: list[float | None] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_mse: list[float] = field(default_factory=list)
    val_mae: list[float] = field(default_factory=list)
    val_r2: list[float | None] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    best_epoch: int = 0

    @property
    def epochs(self) -> int:
        """Finished epochs."""
        return len(self.train_loss)


@dataclass
class Position:
    """Where a fit is within its epoch.

    Parameters
    ----------
    step
        Steps done.
    sums
        Over their graphs: loss, squared and absolute error, normalized.
    """

    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * N_SUMS)
