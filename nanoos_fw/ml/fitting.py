"""Fitting one network on all ranks. Importing this module imports torch.

Data parallel: each rank takes its share of every batch, gradients are summed over
the ranks and divided by the global number of graphs, batch normalization runs over
all ranks. The number of ranks changes rounding, not the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from nanoos_fw.errors import InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.network import TensorBatch, build_network
from nanoos_fw.parallel import Communicator

if TYPE_CHECKING:
    from nanoos_fw.ml.model_files import AnyArchitecture
    from nanoos_fw.ml.training import TrainingConfig

_EVALUATION_BATCH = 256


@dataclass(frozen=True, eq=False)
class FitData:
    """What a fit sees.

    Parameters
    ----------
    table
        All graphs.
    targets
        ``(n,) float64``, normalized; rows outside ``train`` and ``val`` unused.
    train, val
        Row numbers.
    scale
        Unit of the target per normalized unit, for the validation error.
    """

    table: GraphTable
    targets: NDArray[np.float64]
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    scale: float


@dataclass
class History:
    """Learning curve of one network, one entry per finished epoch."""

    train_loss: list[float] = field(default_factory=list)
    val_mae: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    best_epoch: int = 0

    @property
    def epochs(self) -> int:
        """Finished epochs."""
        return len(self.train_loss)


class Fit:
    """The fit of one network: its state, one epoch at a time.

    Parameters
    ----------
    config
        Hyper-parameters.
    architecture, atom_table
        Of the network.
    data
        Graphs and targets.
    member
        Number in the ensemble; with ``config.seed`` it decides initial weights and
        the order of the rows.
    comm
        Ranks that share the work.
    """

    def __init__(
        self,
        config: TrainingConfig,
        architecture: AnyArchitecture,
        atom_table: NDArray[np.float32],
        data: FitData,
        member: int,
        comm: Communicator,
    ) -> None:
        self.config, self.data, self.member, self.comm = config, data, member, comm
        self.dtype: torch.dtype = getattr(torch, config.precision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(config.seed, member))
            network = build_network(architecture, atom_table)
        self.network = network.to(self.dtype)
        self.network.use_communicator(comm)
        self._flatten()
        self.optimizer = _optimizer(config, self._decayed, self._rest)
        self.history = History()
        self._average = (self._weights.clone(), self._moments.clone())
        self._best = self._average
        self._targets = torch.from_numpy(data.targets).to(self.dtype)
        # Batches of nearly equal size, none of a single graph: batch normalization
        # needs company.
        n_train = len(data.train)
        steps = min(round(n_train / config.batch_size), n_train // 2)
        self.steps_per_epoch = max(1, steps)

    @property
    def done(self) -> bool:
        """True after the last epoch, or when validation stopped improving."""
        history, patience = self.history, self.config.patience
        if history.epochs >= self.config.epochs:
            return True
        waited = history.epochs - history.best_epoch
        return bool(patience and len(self.data.val) and waited >= patience)

    def run_epoch(self, interrupted: Callable[[], bool]) -> bool:
        """Run one epoch; return False if it was interrupted.

        An interrupted epoch leaves no trace: the fit is as it was before it.

        Parameters
        ----------
        interrupted
            Asked on all ranks before each step; must answer alike on all.

        Raises
        ------
        InputError
            If the loss is not finite any more.
        """
        before = self.state()
        epoch = self.history.epochs
        order = np.random.default_rng([self.config.seed, self.member, epoch])
        rows = self.data.train[order.permutation(len(self.data.train))]
        self.network.train()
        total = np.zeros(1)
        rate = 0.0
        for step, batch in enumerate(np.array_split(rows, self.steps_per_epoch)):
            if interrupted():
                self.restore(before)
                return False
            number = epoch * self.steps_per_epoch + step
            rate = self._learning_rate(number)
            total += self._step(batch, rate)
            self._update_average(number)
        self.comm.sum_in_place(total)
        loss = float(total[0]) / len(rows)
        if not math.isfinite(loss):
            raise InputError(
                f"training diverged: the loss of member {self.member} is {loss} in "
                f"epoch {epoch + 1}",
                evidence={"learning_rate": rate, "losses": self.history.train_loss},
                advice="lower learning_rate",
            )
        self._record(loss, rate)
        return True

    def predict(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the normalized predictions for rows, ``(n,)``, on all ranks."""
        self.network.eval()
        answers = np.zeros(len(rows))
        starts = range(0, len(rows), _EVALUATION_BATCH)
        with torch.inference_mode():
            for index, start in enumerate(starts):
                if index % self.comm.size != self.comm.rank:
                    continue
                chunk = rows[start : start + _EVALUATION_BATCH]
                batch = TensorBatch.from_batch(self.data.table.batch(chunk), self.dtype)
                answers[start : start + len(chunk)] = self.network(batch).numpy()
        self.comm.sum_in_place(answers)
        return answers

    def use_best(self) -> None:
        """Go back to the weights with the lowest validation error."""
        self._use(self._best)

    def weights(self) -> dict[str, Tensor]:
        """Return the named tensors of the network."""
        return dict(self.network.state_dict())

    def state(self) -> dict[str, Tensor]:
        """Return all that the next epoch depends on, as copies."""
        tensors = {
            "weights": self._weights,
            "moments": self._moments,
            "average_weights": self._average[0],
            "average_moments": self._average[1],
            "best_weights": self._best[0],
            "best_moments": self._best[1],
        }
        for group, parameter in enumerate((self._decayed, self._rest)):
            for name, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{group}.{name}"] = value
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put a state back; the history is separate."""
        self._weights.copy_(state["weights"])
        self._moments.copy_(state["moments"])
        self._average = (
            state["average_weights"].clone(),
            state["average_moments"].clone(),
        )
        self._best = (state["best_weights"].clone(), state["best_moments"].clone())
        for group, parameter in enumerate((self._decayed, self._rest)):
            prefix = f"optimizer.{group}."
            values: dict[str, Any] = {
                name.removeprefix(prefix): tensor.clone()
                for name, tensor in state.items()
                if name.startswith(prefix)
            }
            if values:
                self.optimizer.state[parameter] = values
            else:
                self.optimizer.state.pop(parameter, None)

    def _flatten(self) -> None:
        """Lay weights, gradients and running moments out in one buffer each.

        One message then carries all gradients, and the optimizer makes one pass.
        Weight matrices come first: they decay, biases and normalization do not.
        """
        parameters = sorted(self.network.parameters(), key=lambda p: p.ndim < 2)
        self._weights = torch.cat([p.detach().reshape(-1) for p in parameters])
        self._gradients = torch.zeros_like(self._weights)
        position = 0
        for parameter in parameters:
            span = slice(position, position + parameter.numel())
            parameter.data = self._weights[span].view_as(parameter)
            parameter.grad = self._gradients[span].view_as(parameter)
            position = span.stop
        n_decayed = sum(p.numel() for p in parameters if p.ndim >= 2)
        self._decayed = nn.Parameter(self._weights[:n_decayed])
        self._rest = nn.Parameter(self._weights[n_decayed:])
        self._decayed.grad = self._gradients[:n_decayed]
        self._rest.grad = self._gradients[n_decayed:]
        norms = [
            (module, name)
            for module in self.network.modules()
            for name in ("running_mean", "running_var")
            if hasattr(module, name)
        ]
        self._moments = torch.cat([getattr(module, name) for module, name in norms])
        position = 0
        for module, name in norms:
            span = slice(position, position + getattr(module, name).numel())
            setattr(module, name, self._moments[span])
            position = span.stop

    def _step(self, rows: NDArray[np.int64], rate: float) -> float:
        """Make one step on a global batch; return this rank's sum of losses."""
        mine = share(rows, self.data.table.graph_sizes[rows], self.comm)
        batch = TensorBatch.from_batch(self.data.table.batch(mine), self.dtype)
        output = self.network(batch)
        targets = self._targets[torch.from_numpy(mine)]
        loss = _LOSSES[self.config.loss](output, targets, reduction="sum")
        self._gradients.zero_()
        torch.autograd.backward([loss / len(rows)])
        self.comm.sum_in_place(self._gradients.numpy())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return float(loss.detach())

    def _learning_rate(self, step: int) -> float:
        """Return the rate of a step, a function of its number alone."""
        config = self.config
        total = config.epochs * self.steps_per_epoch
        warmup = round(config.warmup_fraction * total)
        if step < warmup:
            return config.learning_rate * (step + 1) / warmup
        if config.schedule == "constant":
            return config.learning_rate
        done = (step - warmup) / max(1, total - warmup)
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))

    def _update_average(self, step: int) -> None:
        """Take a step's weights and moments into their running average."""
        memory = self.config.averaging_epochs * self.steps_per_epoch
        # Early on the memory grows with the steps: initial weights are soon forgotten.
        decay = min(memory / (memory + 1.0), (step + 1.0) / (step + 10.0))
        self._average[0].lerp_(self._weights, 1.0 - decay)
        self._average[1].lerp_(self._moments, 1.0 - decay)

    def _record(self, loss: float, rate: float) -> None:
        """Judge the averaged weights and keep them if they are the best so far."""
        history, val = self.history, self.data.val
        history.train_loss.append(loss)
        history.learning_rate.append(rate)
        averaged = (self._average[0].clone(), self._average[1].clone())
        improved = True
        if len(val):
            current = (self._weights.clone(), self._moments.clone())
            self._use(averaged)
            error = np.abs(self.predict(val) - self.data.targets[val]).mean()
            self._use(current)
            history.val_mae.append(float(error) * self.data.scale)
            improved = history.val_mae[-1] <= min(history.val_mae)
        if improved:
            history.best_epoch = history.epochs
            self._best = averaged

    def _use(self, buffers: tuple[Tensor, Tensor]) -> None:
        self._weights.copy_(buffers[0])
        self._moments.copy_(buffers[1])


def share(
    rows: NDArray[np.int64], sizes: NDArray[np.int64], comm: Communicator
) -> NDArray[np.int64]:
    """Return this rank's rows of a batch, atoms spread as evenly as greed allows.

    The largest graphs are dealt first, each to the rank with the fewest atoms so
    far; ranks may come out empty.
    """
    if comm.size == 1:
        return rows
    loads = np.zeros(comm.size, dtype=np.int64)
    mine = []
    for index in np.argsort(-sizes, kind="stable"):
        rank = int(np.argmin(loads))
        loads[rank] += sizes[index]
        if rank == comm.rank:
            mine.append(rows[index])
    return np.array(mine, dtype=np.int64)


# ------------------------------------------------------------------------- private

_LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": functional.mse_loss,
    "mae": functional.l1_loss,
    "huber": functional.smooth_l1_loss,
}


def _optimizer(
    config: TrainingConfig, decayed: nn.Parameter, rest: nn.Parameter
) -> torch.optim.Optimizer:
    groups = [
        {"params": [decayed], "weight_decay": config.weight_decay},
        {"params": [rest], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def _seed(seed: int, member: int) -> int:
    return int(np.random.SeedSequence([seed, member]).generate_state(1)[0])
