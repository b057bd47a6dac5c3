"""The layers of the crystal graph network. Importing this module imports torch.

Method: T. Xie, J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from nanoos_fw.ml.batches import GraphBatch
from nanoos_fw.ml.convolution import (
    EPSILON,
    EdgePlan,
    compiled,
    convolve_edges,
    convolve_edges_fixed,
    plan_edges,
)
from nanoos_fw.ml.line_graph import LineGraphBatch
from nanoos_fw.ml.model_files import (
    AnyArchitecture,
    Architecture,
    LineGraphArchitecture,
)
from nanoos_fw.ml.process_groups import sum_tensor
from nanoos_fw.parallel import Communicator

_MOMENTUM = 0.1


@dataclass(frozen=True, eq=False)
class TensorBatch:
    """A :class:`GraphBatch` as tensors; shapes are those of the arrays.

    ``edge_start``, ``(n_atoms + 1,) int64``: edges of atom i are
    ``edge_start[i]:edge_start[i + 1]``, since edges are sorted by their centre.
    ``edge_pairs`` and ``cosines`` are those of a
    :class:`nanoos_fw.ml.line_graph.LineGraphBatch`, else None.
    """

    numbers: Tensor
    centre: Tensor
    neighbor: Tensor
    distances: Tensor
    graph_index: Tensor
    graph_sizes: Tensor
    edge_start: Tensor
    edge_pairs: Tensor | None = None
    cosines: Tensor | None = None

    @classmethod
    def from_batch(
        cls,
        batch: GraphBatch,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> TensorBatch:
        """Wrap the arrays, or copy them to a device; distances change their type."""
        edge_start = np.zeros(len(batch.degrees) + 1, dtype=np.int64)
        np.cumsum(batch.degrees, out=edge_start[1:])
        tensors = cls(
            numbers=torch.from_numpy(batch.numbers),
            centre=torch.from_numpy(batch.edge_index[0]),
            neighbor=torch.from_numpy(batch.edge_index[1]),
            distances=torch.from_numpy(np.asarray(batch.distances)).to(dtype),
            graph_index=torch.from_numpy(batch.graph_index),
            graph_sizes=torch.from_numpy(batch.graph_sizes),
            edge_start=torch.from_numpy(edge_start),
            **_angles(batch, dtype),
        )
        if device is None or torch.device(device).type == "cpu":
            return tensors
        there = {
            name: t.to(device) for name, t in vars(tensors).items() if t is not None
        }
        return cls(**there)


def build_network(
    architecture: AnyArchitecture, atom_table: NDArray[np.float32]
) -> Network:
    """Return a new network of an architecture, with random weights."""
    if isinstance(architecture, LineGraphArchitecture):
        from nanoos_fw.ml.line_graph_network import LineGraphNetwork

        return LineGraphNetwork(architecture, atom_table)
    return CrystalGraphNetwork(architecture, atom_table)


def _angles(batch: GraphBatch, dtype: torch.dtype) -> dict[str, Tensor]:
    if not isinstance(batch, LineGraphBatch):
        return {}
    return {
        "edge_pairs": torch.from_numpy(batch.edge_pairs),
        "cosines": torch.from_numpy(batch.cosines).to(dtype),
    }


class _GlobalNormalization(torch.autograd.Function):
    """Batch normalizations whose moments run over the rows of all ranks.

    ``torch.nn.SyncBatchNorm`` refuses the CPU. Rows may be spread in any way, ranks
    without rows included; every rank must take part in forward and backward. What is
    normalized together needs one message each way.
    """

    @staticmethod
    def forward(ctx: Any, comm: Communicator, *tensors: Tensor) -> tuple[Tensor, ...]:
        triples = _grouped(tensors, 3)
        centered, parts = [], []
        for x, *_ in triples:
            n = x.shape[0]
            # Around this rank's mean, since E[x²] - E[x]² cancels in float32.
            origin = x.sum(0) / max(n, 1)
            rest = x - origin
            first = rest.sum(0).double()
            second = (rest * rest).sum(0).double()
            shift = origin.double()
            parts += [
                first + n * shift,
                second + shift * (2.0 * first + n * shift),
                first.new_full((1,), n),
            ]
            centered.append((rest, shift))
        sums = torch.cat(parts)
        sum_tensor(sums, comm)
        answers: list[Tensor] = []
        moments: list[Tensor] = []
        saved: list[Tensor] = []
        totals = torch.split(sums, [len(part) for part in parts])
        for place, (_, weight, bias) in enumerate(triples):
            first, second, count = totals[3 * place : 3 * place + 3]
            rest, shift = centered[place]
            mean = first / count
            variance = (second / count - mean * mean).clamp_(min=0.0)
            inverse = torch.rsqrt(variance + EPSILON).to(rest.dtype)
            normal = rest.sub_((mean - shift).to(rest.dtype)).mul_(inverse)
            answers.append(torch.addcmul(bias, normal, weight))
            moments += [mean, variance, count[0]]
            saved += [normal, weight, inverse, count]
        ctx.save_for_backward(*saved)
        ctx.comm = comm
        ctx.mark_non_differentiable(*moments)
        return *answers, *moments

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        quadruples = _grouped(ctx.saved_tensors, 4)
        mine = []
        for gradient, (normal, *_) in zip(gradients, quadruples, strict=False):
            mine += [gradient.sum(0), (gradient * normal).sum(0)]
        sums = torch.cat(mine).double()
        sum_tensor(sums, ctx.comm)
        totals = torch.split(sums, [len(part) for part in mine])
        answers: list[Tensor | None] = [None]
        for place, (normal, weight, inverse, count) in enumerate(quadruples):
            gradient = gradients[place]
            bias_gradient, weight_gradient = mine[2 * place : 2 * place + 2]
            first, second = (
                (total / count).to(gradient.dtype)
                for total in totals[2 * place : 2 * place + 2]
            )
            x_gradient = weight * inverse * (gradient - first - normal * second)
            answers += [x_gradient, weight_gradient, bias_gradient]
        return tuple(answers)


def normalize_together(*pairs: tuple[GlobalBatchNorm, Tensor]) -> list[Tensor]:
    """Normalize several inputs, by one message over the ranks each way.

    Parameters
    ----------
    pairs
        Normalizations and what they normalize, ``(rows, channels)``; of the same
        ranks.
    """
    comm = pairs[0][0].comm
    if comm.size == 1 or not all(norm.training for norm, _ in pairs):
        return [norm(x) for norm, x in pairs]
    tensors = [t for norm, x in pairs for t in (x, norm.weight, norm.bias)]
    found = cast(Any, _GlobalNormalization).apply(comm, *tensors)
    for (norm, _), moments in zip(pairs, _grouped(found[len(pairs) :], 3), strict=True):
        norm.update(*moments)
    return list(found[: len(pairs)])


def _grouped(tensors: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    return [tensors[i : i + size] for i in range(0, len(tensors), size)]


class GlobalBatchNorm(nn.Module):
    """Batch normalization over the rows of all ranks, as if there were one.

    Parameters
    ----------
    channels
        Columns of the input ``(rows, channels)``.

    Notes
    -----
    ``comm`` is set by the training loop. One rank uses torch's own kernel, which
    gives the same numbers up to rounding.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.comm = Communicator()

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(rows, channels)``."""
        if not self.training or self.comm.size == 1:
            if not x.shape[0]:
                return x  # no moments: a batch without angles, say
            return functional.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                _MOMENTUM,
                EPSILON,
            )
        return normalize_together((self, x))[0]

    @torch.no_grad()
    def update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Take the moments of a batch over all ranks into the running ones."""
        if float(count) == 0.0:
            return
        unbiased = variance * (count / (count - 1).clamp(min=1))
        # The moments of all layers may share a buffer, of which autograd has seen
        # parts; it needs none of their values, so it need not hear of this.
        self.running_mean.data.lerp_(mean.to(self.running_mean), _MOMENTUM)
        self.running_var.data.lerp_(unbiased.to(self.running_var), _MOMENTUM)


class CountedDropout(nn.Dropout):
    """Dropout whose mask the training loop draws for the global batch.

    Parameters
    ----------
    rate
        Share of the units that drop out.
    channels
        Columns of the input ``(rows, channels)``.

    Notes
    -----
    ``mask``, ``(rows, channels)``, holds 0 or 1 / (1 - rate). Without one, torch draws.
    """

    def __init__(self, rate: float, channels: int) -> None:
        super().__init__(rate)
        self.channels = channels
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Drop units out in training."""
        if not self.training or self.p == 0.0 or self.mask is None:
            return super().forward(x)
        return x * self.mask


Edges = EdgePlan | tuple[TensorBatch, Tensor]
"""Edges for the compiled passes, or the batch and the Gaussians of its edges."""


class GatedConvolution(nn.Module):
    """One gated convolution: v + sum over neighbours of gate times message.

    Notes
    -----
    The published layer applies one matrix to ``[v_i, v_j, u_ij]`` on each edge. The
    product splits into three, and the parts that belong to atoms are computed once
    per atom and gathered: the same sum with far fewer multiplications.
    """

    def __init__(self, hidden_dim: int, n_gaussians: int) -> None:
        super().__init__()
        # The published layer has a bias here. Normalization takes it out again, so
        # its gradient is rounding noise, which Adam would blow up to full steps.
        self.centre = nn.Linear(hidden_dim, 2 * hidden_dim, bias=False)
        self.neighbor = nn.Linear(hidden_dim, 2 * hidden_dim, bias=False)
        self.edge = nn.Linear(n_gaussians, 2 * hidden_dim, bias=False)
        # Round what is multiplied to bfloat16: processors without such instructions
        # get products of bfloat16 in float32 this way, at the speed of float32.
        self.rounded = False
        self.edge_norm = GlobalBatchNorm(2 * hidden_dim)
        self.atom_norm = GlobalBatchNorm(hidden_dim)

    def forward(self, atoms: Tensor, edges: Edges) -> Tensor:
        """Return new atom vectors ``(n_atoms, hidden_dim)``."""
        own = self._product(self.centre, atoms)
        other = self._product(self.neighbor, atoms)
        if isinstance(edges, EdgePlan):
            return functional.softplus(atoms + self._compiled(own, other, edges))
        batch, gaussians = edges
        z = self.edge(gaussians).to(atoms)
        z = z + own.index_select(0, batch.centre)
        z = z + other.index_select(0, batch.neighbor)
        gate, core = self.edge_norm(z).chunk(2, dim=1)
        messages = torch.sigmoid(gate) * functional.softplus(core)
        summed = torch.zeros_like(atoms).index_add(0, batch.centre, messages)
        return functional.softplus(atoms + self.atom_norm(summed))

    def _product(self, layer: nn.Linear, atoms: Tensor) -> Tensor:
        # Under autocast products come in bfloat16; all else is done in the type of
        # the weights.
        if not (self.rounded and self.training):
            return cast(Tensor, layer(atoms)).to(atoms)
        weight = layer.weight.bfloat16().to(atoms)
        return functional.linear(atoms.bfloat16().to(atoms), weight)

    def _compiled(self, own: Tensor, other: Tensor, plan: EdgePlan) -> Tensor:
        norm = self.edge_norm
        weights = (norm.weight, norm.bias)
        if not self.training:
            moments = (norm.running_mean, norm.running_var)
            summed = convolve_edges_fixed(
                own, other, self.edge.weight, plan, weights, moments
            )
            return cast(Tensor, self.atom_norm(summed))
        atom_weights = (self.atom_norm.weight, self.atom_norm.bias)
        normalized, of_edges, of_atoms = convolve_edges(
            own, other, self.edge.weight, plan, weights, atom_weights, norm.comm
        )
        norm.update(*vars(of_edges).values())
        self.atom_norm.update(*vars(of_atoms).values())
        return normalized


class Network(nn.Module):
    """What the training loop knows of a network: a batch in, normalized targets out.

    ``evaluation_batch``: graphs at once where no gradients are wanted, which decides
    memory.
    """

    evaluation_batch = 256

    def use_communicator(self, comm: Communicator) -> None:
        """Let batch normalization run over the ranks of a communicator."""
        for module in self.modules():
            if isinstance(module, GlobalBatchNorm):
                module.comm = comm


class CrystalGraphNetwork(Network):
    """Embedding, gated convolutions, mean over atoms, two dense layers.

    Parameters
    ----------
    architecture
        Sizes.
    atom_table
        ``(119, n_features)``, row Z: the fixed description of each element.
    """

    atom_table: Tensor

    def __init__(
        self, architecture: Architecture, atom_table: NDArray[np.float32]
    ) -> None:
        super().__init__()
        hidden = architecture.hidden_dim
        # Not a buffer, which would be rounded to float32 on the way to float64.
        self.gaussian_centers = architecture.gaussian_centers()
        table = torch.from_numpy(np.array(atom_table, dtype=np.float32))
        # One copy in the checkpoint serves all members.
        self.register_buffer("atom_table", table, persistent=False)
        self.gaussian_width = architecture.gaussian_width
        self.compiled = compiled() and len(self.gaussian_centers) > 1
        self.embedding = nn.Linear(atom_table.shape[1], hidden)
        self.convolutions = nn.ModuleList(
            GatedConvolution(hidden, len(self.gaussian_centers))
            for _ in range(architecture.num_layers)
        )
        width = architecture.readout_dim
        self.dense = nn.Linear(hidden, width)
        self.dropout = CountedDropout(architecture.dropout, width)
        self.inner = nn.ModuleList(
            nn.Linear(width, width) for _ in range(architecture.dense_layers - 1)
        )
        self.output = nn.Linear(width, architecture.n_outputs)

    def forward(self, batch: TensorBatch) -> Tensor:
        """Return the normalized target of each graph, ``(n_graphs,)``.

        With several outputs: one column each, ``(n_graphs, n_outputs)``.
        """
        # All elements at once: 119 rows are fewer than the atoms of most batches.
        atoms = self.embedding(self.atom_table).index_select(0, batch.numbers)
        atoms = atoms.to(self.output.weight.dtype)
        edges = self._edges(batch)
        for convolution in self.convolutions:
            atoms = convolution(atoms, edges)
        n_graphs = batch.graph_sizes.shape[0]
        crystals = atoms.new_zeros((n_graphs, atoms.shape[1]))
        crystals = crystals.index_add(0, batch.graph_index, atoms)
        crystals = crystals / batch.graph_sizes.to(atoms.dtype).unsqueeze(1)
        hidden = functional.softplus(self.dense(functional.softplus(crystals)))
        hidden = self.dropout(hidden)
        for layer in self.inner:
            hidden = functional.softplus(layer(hidden))
        return cast(Tensor, self.output(hidden)).squeeze(1)

    def _edges(self, batch: TensorBatch) -> Edges:
        """Prepare the edges, for the compiled passes where they can be used."""
        on_cpu = batch.distances.device.type == "cpu"
        if self.compiled and on_cpu and self._differentiable():
            return plan_edges(
                starts=batch.edge_start.numpy(),
                neighbors=batch.neighbor.numpy(),
                distances=batch.distances.numpy(),
                graph_sizes=batch.graph_sizes.numpy(),
                step=float(self.gaussian_centers[1]),
                width=self.gaussian_width,
                n_centers=len(self.gaussian_centers),
                dtype=self.output.weight.dtype,
            )
        centers = torch.from_numpy(self.gaussian_centers).to(batch.distances)
        shifted = (batch.distances.unsqueeze(1) - centers) / self.gaussian_width
        return batch, torch.exp(-(shifted**2))

    def _differentiable(self) -> bool:
        """Tell whether the compiled passes can give the gradients that are wanted.

        A convolution in evaluation has none, which does not matter below all that is
        trained. Neither do they know of a convolution of which a part is frozen.
        """
        for convolution in self.convolutions:
            norms = (m for m in convolution.modules() if isinstance(m, GlobalBatchNorm))
            if any(norm.training != convolution.training for norm in norms):
                return False
        if not torch.is_grad_enabled():
            return True
        frozen = not any(p.requires_grad for p in self.embedding.parameters())
        for convolution in self.convolutions:
            fixed = not any(p.requires_grad for p in convolution.parameters())
            if not convolution.training and not (frozen and fixed):
                return False
            frozen = frozen and fixed
        return True
