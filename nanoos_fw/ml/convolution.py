"""The gated convolution on edges with both batch normalizations, as one operation.

Importing this module imports torch. On the CPU the passes over the edges are compiled
by numba where it is installed (``pip install 'nanoos_fw[fast]'``); elsewhere
:mod:`nanoos_fw.ml.network` does the same with torch's operations.

Training needs three passes. The first gives mean and variance of the pre-activations
z. The second gives each atom's sum of ``f(z) = sigmoid(gate) softplus(core)`` and, on
the way, its sums of ``f'`` and ``f' z``: all edges of an atom share the gradient by
that sum, so that these are what the backward pass of batch normalization needs to
know about the edges. The third gives the gradients. Over several ranks only sums
travel: one message forward and one backward.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoos_fw.ml.process_groups import sum_tensor
from nanoos_fw.parallel import Communicator

EPSILON = 1e-5
"""Added to the variance by batch normalization."""

# Work is divided into pieces of whole graphs, as many as the data say: the number of
# threads then changes no bit of the result.
_MAX_PIECES = 16
_EDGES_OF_A_PIECE = 1024
# Gaussians below exp(-20) = 2e-9 (exp(-39) in float64) of the nearest are left out.
_REACH = {torch.float32: 4.5, torch.float64: 6.25}


@dataclass(frozen=True, eq=False)
class EdgePlan:
    """What the compiled passes need to know about the edges of a batch.

    Parameters
    ----------
    starts
        ``(n_atoms + 1,) int64``: edges of atom i are ``starts[i]:starts[i + 1]``.
    neighbors
        ``(n_edges,) int64``.
    first, gaussians
        ``(n_edges,) int64`` and ``(n_edges, rows)``: see
        :func:`nanoos_fw.ml.convolution_kernels.spread_gaussians`.
    pieces
        ``(n + 1,) int64``: atoms of the pieces that threads work on.
    n_centers
        Gaussians in all.
    """

    starts: NDArray[np.int64]
    neighbors: NDArray[np.int64]
    first: NDArray[np.int64]
    gaussians: NDArray[Any]
    pieces: NDArray[np.int64]
    n_centers: int

    @property
    def n_edges(self) -> int:
        """Edges of the batch."""
        return len(self.neighbors)


def compiled() -> bool:
    """Tell whether numba runs the passes on the CPU."""
    return importlib.util.find_spec("numba") is not None


def plan_edges(
    *,
    starts: NDArray[np.int64],
    neighbors: NDArray[np.int64],
    distances: NDArray[np.float32],
    graph_sizes: NDArray[np.int64],
    step: float,
    width: float,
    n_centers: int,
    dtype: torch.dtype,
) -> EdgePlan:
    """Prepare a batch for the compiled passes.

    Parameters
    ----------
    starts, neighbors
        As in :class:`EdgePlan`.
    distances
        ``(n_edges,)``, Å.
    graph_sizes
        ``(n_graphs,)``, atoms of each graph; graphs have no edges between them.
    step, width, n_centers
        Gaussians at 0, step ..., of width w in exp(-(d - mu)² / w²), Å.
    dtype
        Of the arithmetic: float32 or float64.
    """
    kernels = _kernels()
    rows = int(2 * _REACH[dtype] * width / step) + 1
    # The passes take at least so many; more than there are centres help nobody.
    rows = max(min(rows, 2 * n_centers), kernels.ROWS)
    first = np.empty(len(neighbors), dtype=np.int64)
    gaussians = np.empty((len(neighbors), rows), dtype=_NUMPY[dtype])
    kernels.spread_gaussians(distances, step, width, n_centers, first, gaussians)
    ends = np.concatenate([[0], np.cumsum(graph_sizes)])
    edges_before = starts[ends]
    n_edges = len(neighbors)
    count = min(_MAX_PIECES, len(graph_sizes), n_edges // _EDGES_OF_A_PIECE + 1)
    marks = n_edges * np.arange(1, max(count, 1)) // max(count, 1)
    cuts = ends[np.searchsorted(edges_before, marks)]
    pieces = np.unique(np.concatenate([[0], cuts, [len(starts) - 1]]))
    return EdgePlan(starts, neighbors, first, gaussians, pieces, n_centers)


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance ``(channels,) float64`` over the rows of all ranks."""

    mean: Tensor
    variance: Tensor
    count: Tensor


def convolve_edges(
    own: Tensor,
    other: Tensor,
    edge_weight: Tensor,
    plan: EdgePlan,
    edge_norm: tuple[Tensor, Tensor],
    atom_norm: tuple[Tensor, Tensor],
    comm: Communicator,
) -> tuple[Tensor, Moments, Moments]:
    """Sum gate times message over the edges of each atom, both normalized.

    Parameters
    ----------
    own, other
        ``(n_atoms, 2 h)``: what each atom adds to z as the centre of an edge, and as
        the neighbour.
    edge_weight
        ``(2 h, n_centers)``.
    plan
        The edges.
    edge_norm, atom_norm
        Weight and bias of the normalization of z, ``(2 h,)`` each, and of the sums
        over edges, ``(h,)`` each.
    comm
        Ranks over whose edges and atoms the moments run; all of them must take part,
        edges or not.

    Returns
    -------
    normalized, edge_moments, atom_moments
        ``(n_atoms, h)``; moments of z and of the sums over edges.
    """
    apply: Any = _EdgeConvolution.apply
    normalized, *moments = apply(
        own, other, edge_weight, *edge_norm, *atom_norm, plan, comm
    )
    return normalized, Moments(*moments[:3]), Moments(*moments[3:])


def convolve_edges_fixed(
    own: Tensor,
    other: Tensor,
    edge_weight: Tensor,
    plan: EdgePlan,
    norm: tuple[Tensor, Tensor],
    moments: tuple[Tensor, Tensor],
) -> Tensor:
    """Do the same with mean and variance that are given, and without gradients."""
    mean, variance = moments
    inverse = torch.rsqrt(variance.double() + EPSILON)
    passed = _forward(
        own - mean,
        other,
        _padded(edge_weight, plan),
        plan,
        (norm[0] * inverse).to(own.dtype),
        norm[1],
        derive=False,
    )
    return torch.from_numpy(passed.out)


# ------------------------------------------------------------------------- private

_NUMPY: dict[torch.dtype, type] = {torch.float32: np.float32, torch.float64: np.float64}


class _EdgeConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        own: Tensor,
        other: Tensor,
        edge_weight: Tensor,
        edge_scale: Tensor,
        edge_bias: Tensor,
        atom_scale: Tensor,
        atom_bias: Tensor,
        plan: EdgePlan,
        comm: Communicator,
    ) -> tuple[Tensor, ...]:
        table = _padded(edge_weight, plan)
        edges = _total(_moments(own, other, table, plan), plan.n_edges, comm)
        inverse = torch.rsqrt(edges.variance + EPSILON)
        centred = own.detach() - edges.mean.to(own.dtype)
        scale = (edge_scale.detach() * inverse).to(own.dtype)
        passed = _forward(centred, other, table, plan, scale, edge_bias, derive=True)
        atoms = _total(passed.node_sums, len(own), comm)
        spread = torch.rsqrt(atoms.variance + EPSILON)
        normal = torch.from_numpy(passed.out)
        normal.sub_(atoms.mean.to(own.dtype)).mul_(spread.to(own.dtype))
        ctx.save_for_backward(
            centred, other, scale, edge_bias, inverse, normal, atom_scale, spread,
            atoms.mean, edges.count, atoms.count,
        )  # fmt: skip
        ctx.table, ctx.passed, ctx.plan, ctx.comm = table, passed, plan, comm
        moments = (*vars(edges).values(), *vars(atoms).values())
        ctx.mark_non_differentiable(*moments)
        return torch.addcmul(atom_bias, normal, atom_scale), *moments

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (
            centred, other, scale, edge_bias, inverse, normal, atom_scale, spread,
            atom_mean, edge_count, atom_count,
        ) = ctx.saved_tensors  # fmt: skip
        plan: EdgePlan = ctx.plan
        gradient = gradients[0].contiguous()
        dtype = gradient.dtype
        nodes, products = _gradient_sums(gradient, normal, ctx.passed.slopes, plan)
        slopes = torch.from_numpy(ctx.passed.slope_sums)
        # Of the sums over edges times slopes to the normalized ones.
        by_normal = _twice(spread) * (slopes[2:] - _twice(atom_mean) * slopes[:2])
        mine = torch.cat([nodes, products, slopes[:2].flatten(), by_normal.flatten()])
        total = mine.clone()
        sum_tensor(total, ctx.comm)
        h = gradient.shape[1]
        means = total[: 2 * h].view(2, h) / atom_count.clamp(min=1)
        factor = atom_scale * spread

        def by_edges(sums: Tensor) -> tuple[Tensor, Tensor]:
            """Return the gradients by bias and weight of the edges' normalization."""
            upward, plain, normal = sums[2 * h :].view(3, 2, 2 * h)
            left = upward - _twice(means[0]) * plain - _twice(means[1]) * normal
            bias, weight = _twice(factor) * left
            return bias, weight * inverse

        of_all = torch.stack(by_edges(total)) / edge_count.clamp(min=1)
        shift = (scale * of_all[0]).to(dtype)
        slant = (scale * inverse * of_all[1]).to(dtype)
        upstream = gradient - torch.addcmul(
            means[0].to(dtype), normal, means[1].to(dtype)
        )
        own_gradient, other_gradient, table_gradient = _backward(
            centred, other, ctx.table, plan, scale, edge_bias,
            upstream.mul_(factor.to(dtype)), shift, slant,
        )  # fmt: skip
        rows = plan.gaussians.shape[1]
        edge_gradient = table_gradient[rows : rows + plan.n_centers].T
        bias_gradient, weight_gradient = by_edges(mine)
        return (
            torch.from_numpy(own_gradient),
            torch.from_numpy(other_gradient),
            torch.from_numpy(edge_gradient),
            weight_gradient.to(dtype),
            bias_gradient.to(dtype),
            nodes[h:].to(dtype),
            nodes[:h].to(dtype),
            None,
            None,
        )


def _total(sums: NDArray[np.float64], rows: int, comm: Communicator) -> Moments:
    """Return the moments over all ranks from this rank's sums, of x and x²."""
    message = torch.empty(sums.size + 1, dtype=torch.float64)
    message[:-1] = torch.from_numpy(sums).flatten()
    message[-1] = rows
    sum_tensor(message, comm)
    count = message[-1]
    # In double precision, where the squares of floats are exact: a mean of 1e6
    # standard deviations still leaves the variance four digits.
    mean, squares = message[:-1].view(2, -1) / count.clamp(min=1)
    return Moments(mean, (squares - mean * mean).clamp_(min=0.0), count)


def _twice(vector: Tensor) -> Tensor:
    """Return what belongs to atoms for gate and core."""
    return torch.cat([vector, vector])


def _moments(
    own: Tensor, other: Tensor, table: NDArray[Any], plan: EdgePlan
) -> NDArray[np.float64]:
    """Return sum and sum of squares of z, ``(2, 2 h)``."""
    passes = _kernels().moments
    sums = np.zeros((len(plan.pieces) - 1, 2, own.shape[1]))
    edges = _edges(own, other, table, plan)

    def run(piece: int) -> None:
        passes(*_span(plan, piece), *edges, sums[piece])

    _run_pieces(run, len(sums))
    return np.asarray(sums.sum(axis=0))


@dataclass(frozen=True, eq=False)
class _Passed:
    """What the second pass over the edges gives; see the kernel ``forward``."""

    out: NDArray[Any]
    slopes: NDArray[Any]
    node_sums: NDArray[np.float64]
    slope_sums: NDArray[np.float64]


def _forward(
    centred: Tensor,
    other: Tensor,
    table: NDArray[Any],
    plan: EdgePlan,
    scale: Tensor,
    bias: Tensor,
    *,
    derive: bool,
) -> _Passed:
    """Return each atom's sum, and the sums of derivatives if they are wanted."""
    passes = _kernels().forward
    n_atoms, two = centred.shape
    edges = _edges(centred, other, table, plan)
    out = np.empty((n_atoms, two // 2), dtype=table.dtype)
    slopes = np.empty((2, n_atoms if derive else 0, two), dtype=table.dtype)
    numbers = (_array(scale), _array(bias))
    count = len(plan.pieces) - 1
    node_sums, slope_sums = np.zeros((count, 2, two // 2)), np.zeros((count, 4, two))

    def run(piece: int) -> None:
        span, sums = _span(plan, piece), (node_sums[piece], slope_sums[piece])
        passes(*span, *edges, *numbers, out, slopes, *sums)

    _run_pieces(run, count)
    return _Passed(out, slopes, node_sums.sum(axis=0), slope_sums.sum(axis=0))


def _gradient_sums(
    gradient: Tensor, normal: Tensor, slopes: NDArray[Any], plan: EdgePlan
) -> tuple[Tensor, Tensor]:
    """Return the sums of the gradient and what it is multiplied by, flat."""
    passes = _kernels().gradient_sums
    arrays = (_array(gradient), _array(normal), slopes)
    h, count = gradient.shape[1], len(plan.pieces) - 1
    nodes, products = np.zeros((count, 2, h)), np.zeros((count, 2, 2 * h))

    def run(piece: int) -> None:
        passes(*_span(plan, piece), *arrays, nodes[piece], products[piece])

    _run_pieces(run, count)
    return (
        torch.from_numpy(nodes.sum(axis=0)).flatten(),
        torch.from_numpy(products.sum(axis=0)).flatten(),
    )


def _backward(
    centred: Tensor,
    other: Tensor,
    table: NDArray[Any],
    plan: EdgePlan,
    *numbers: Tensor,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the gradients by C, N and the padded table."""
    passes = _kernels().backward
    edges = _edges(centred, other, table, plan)
    arrays = tuple(_array(tensor) for tensor in numbers)
    own_gradient = np.empty(centred.shape, dtype=table.dtype)
    other_gradient = np.empty(centred.shape, dtype=table.dtype)
    tables = np.empty((len(plan.pieces) - 1, *table.shape), dtype=table.dtype)

    def run(piece: int) -> None:
        passes(
            *_span(plan, piece),
            *edges,
            *arrays,
            own_gradient,
            other_gradient,
            tables[piece],
        )

    _run_pieces(run, len(tables))
    return own_gradient, other_gradient, tables.sum(axis=0)


def _edges(
    own: Tensor, other: Tensor, table: NDArray[Any], plan: EdgePlan
) -> tuple[NDArray[Any], ...]:
    return (
        _array(own),
        _array(other),
        table,
        plan.starts,
        plan.neighbors,
        plan.first,
        plan.gaussians,
    )


def _padded(edge_weight: Tensor, plan: EdgePlan) -> NDArray[Any]:
    """Return W with rows of zeros on both sides, where windows may reach."""
    rows = plan.gaussians.shape[1]
    weights = _array(edge_weight)
    table = np.zeros((plan.n_centers + 2 * rows, len(weights)), dtype=weights.dtype)
    table[rows : rows + plan.n_centers] = weights.T
    return table


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().contiguous().numpy()


def _span(plan: EdgePlan, piece: int) -> tuple[int, int]:
    return int(plan.pieces[piece]), int(plan.pieces[piece + 1])


def _run_pieces(run: Callable[[int], None], count: int) -> None:
    """Run the pieces on torch's number of threads, in any order."""
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        for piece in range(count):
            run(piece)
        return
    left = deque(range(count))

    def work() -> None:
        while True:
            try:
                piece = left.popleft()
            except IndexError:
                return
            run(piece)

    others = [_pool(threads - 1).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="convolution")


@functools.cache
def _kernels() -> ModuleType:
    from nanoos_fw.ml import convolution_kernels

    return convolution_kernels
