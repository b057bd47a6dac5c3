"""Predictions of crystal graph networks without torch: folded weights, fused passes.

Batch normalization at inference is a linear map, so it goes into the matrices around
it; the embedding and the first projections become one row for each element. A
convolution is then one product of matrices on atoms and one pass over edges, compiled
by numba where it is installed (``pip install 'nanoos_fw[fast]'``). Without it numpy
does the same, several times slower. Neither needs torch.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.ml.batches import GraphTable

if TYPE_CHECKING:
    from nanoos_fw.ml.model_files import Architecture

Engine = Literal["auto", "numba", "numpy"]

_EPSILON = 1e-5  # of batch normalization
_ATOMS_AT_ONCE = 2048  # their projections stay in the cache
_EDGES_AT_ONCE = 8192  # of the numpy path, whose arrays hold all channels of an edge
_KERNEL_ROWS = 9
# Gaussians below exp(-16) = 1.1e-7 of the nearest are left out, in float32 only.
_REACH = {np.dtype(np.float32): 4.0, np.dtype(np.float64): 6.5}


@dataclass(frozen=True, eq=False)
class FoldedConvolution:
    """One gated convolution with its normalizations folded in.

    Parameters
    ----------
    node
        ``(h, 4 h)``: gate and core that an atom adds to its own edges, then gate and
        core that it adds to edges it is the neighbour of.
    bias
        ``(4 h,)``, zero in the second half.
    edge
        ``(rows, 2 h)``, padded with rows of zeros on both sides.
    scale, shift
        ``(h,)``, of the sum over the neighbours.
    """

    node: NDArray[Any]
    bias: NDArray[Any]
    edge: NDArray[Any]
    scale: NDArray[Any]
    shift: NDArray[Any]


@dataclass(frozen=True, eq=False)
class FoldedNetwork:
    """A network ready for inference.

    Parameters
    ----------
    elements
        ``(119, h)``, embedded atom of each element.
    convolutions
        In order.
    dense
        Matrix ``(in, out)`` and bias of each dense layer, the output last.
    gaussian_step, gaussian_width, n_gaussians
        Å, Å, and number of centres from 0 on.
    window
        Gaussians around a distance that are not negligible.
    """

    elements: NDArray[Any]
    convolutions: tuple[FoldedConvolution, ...]
    dense: tuple[tuple[NDArray[Any], NDArray[Any]], ...]
    gaussian_step: float
    gaussian_width: float
    n_gaussians: int
    window: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of weights and arithmetic."""
        return self.elements.dtype


def fold_network(
    architecture: Architecture,
    atom_table: NDArray[np.float32],
    state: Mapping[str, NDArray[Any]],
    precision: Literal["float32", "float64"] = "float32",
) -> FoldedNetwork:
    """Fold the weights of :class:`nanoos_fw.ml.network.CrystalGraphNetwork`.

    Parameters
    ----------
    architecture
        Sizes.
    atom_table
        ``(119, n_features)``.
    state
        Arrays of the network's ``state_dict``.
    precision
        Of the result; the folding itself is done in float64.
    """
    dtype = np.dtype(precision)
    weights = {name: np.asarray(array, np.float64) for name, array in state.items()}
    centers = architecture.gaussian_centers()
    step, width = float(centers[1] - centers[0]), architecture.gaussian_width
    window = max(_KERNEL_ROWS, math.ceil(2 * _REACH[dtype] * width / step))

    def cast(array: NDArray[np.float64]) -> NDArray[Any]:
        return np.ascontiguousarray(array.astype(dtype))

    convolutions = []
    for layer in range(architecture.num_layers):
        part = functools.partial(_part, weights, f"convolutions.{layer}")
        factor, offset = _affine(part, "edge_norm")
        scale, shift = _affine(part, "atom_norm")
        centre = part("centre.weight").T * factor
        neighbor = part("neighbor.weight").T * factor
        padding = ((window, window), (0, 0))
        convolutions.append(
            FoldedConvolution(
                node=cast(np.concatenate([centre, neighbor], axis=1)),
                bias=cast(np.concatenate([offset, np.zeros_like(offset)])),
                edge=cast(np.pad(part("edge.weight").T * factor, padding)),
                scale=cast(scale),
                shift=cast(shift),
            )
        )
    embedding = weights["embedding.weight"], weights["embedding.bias"]
    names = ["dense", *_inner_layers(weights), "output"]
    return FoldedNetwork(
        elements=cast(np.asarray(atom_table, float) @ embedding[0].T + embedding[1]),
        convolutions=tuple(convolutions),
        dense=tuple(
            (cast(weights[f"{name}.weight"].T), cast(weights[f"{name}.bias"]))
            for name in names
        ),
        gaussian_step=step,
        gaussian_width=width,
        n_gaussians=len(centers),
        window=window,
    )


def run_networks(
    networks: Sequence[FoldedNetwork],
    table: GraphTable,
    *,
    pad_to: int | None = None,
    threads: int | None = None,
    engine: Engine = "auto",
) -> NDArray[np.float64]:
    """Return the outputs of networks for all graphs of a table.

    Parameters
    ----------
    networks
        Of equal type; they share the work on distances if their Gaussians are equal.
    table
        ``n`` graphs.
    pad_to
        Give atoms with fewer neighbours this many, as the published program did: the
        missing ones are the first atom of the crystal at cutoff_radius + 1 Å.
    threads
        None takes ``OMP_NUM_THREADS``, or all cores that this process may use. Their
        number does not change the answer.
    engine
        ``numba``, ``numpy``, or the first of them that is installed.

    Returns
    -------
    ``(n_networks, n, n_outputs) float64``
    """
    kernels = _kernels(engine, networks[0].dtype)
    chunks = _chunks(table)

    def work(span: tuple[int, int]) -> NDArray[np.float64]:
        return _run_chunk(networks, _flatten(table, span, pad_to), kernels)

    with _single_threaded_blas():
        workers = min(threads or available_threads(), len(chunks))
        if workers <= 1:
            answers = [work(span) for span in chunks]
        else:
            with ThreadPoolExecutor(workers) as pool:
                answers = list(pool.map(work, chunks))
    n_outputs = networks[0].dense[-1][1].shape[0]
    empty = np.zeros((len(networks), 0, n_outputs))
    return np.concatenate([empty, *answers], axis=1)


def is_compiled() -> bool:
    """Tell whether numba runs the convolutions."""
    return importlib.util.find_spec("numba") is not None


def available_threads() -> int:
    """Return ``OMP_NUM_THREADS``, or the number of cores this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ------------------------------------------------------------------------- private


@dataclass(frozen=True, eq=False)
class _Flat:
    """Some graphs of a table: atoms numbered through, edges by centre."""

    numbers: NDArray[np.uint8]
    edge_start: NDArray[np.int64]
    neighbors: NDArray[np.int32]
    distances: NDArray[np.float32]
    atom_start: NDArray[np.int64]


def _part(weights: Mapping[str, NDArray[Any]], prefix: str, name: str) -> Any:
    return weights[f"{prefix}.{name}"]


def _affine(part: Any, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return factor and offset of a batch normalization at inference."""
    factor = part(f"{name}.weight") / np.sqrt(part(f"{name}.running_var") + _EPSILON)
    return factor, part(f"{name}.bias") - factor * part(f"{name}.running_mean")


def _inner_layers(weights: Mapping[str, Any]) -> list[str]:
    """Return the names of the dense layers between the first and the output."""
    found = {name.split(".")[1] for name in weights if name.startswith("inner.")}
    return [f"inner.{index}" for index in sorted(map(int, found))]


@functools.cache
def _import_kernels() -> ModuleType | None:
    if not is_compiled():
        return None
    from nanoos_fw.ml import convolution_kernels

    return convolution_kernels


def _kernels(engine: Engine, dtype: np.dtype[Any]) -> ModuleType | None:
    if engine == "numpy":
        return None
    compiled = _import_kernels() if dtype == np.float32 else None
    if engine == "numba" and compiled is None:
        raise InputError(
            f"the compiled convolution needs numba and float32, not {dtype}",
            advice="pip install 'nanoos_fw[fast]', or use engine='numpy'",
        )
    return compiled


@functools.cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def _single_threaded_blas() -> Any:
    """Let no product of matrices start threads: the chunks have them already."""
    return _blas().limit(limits=1)


def _chunks(table: GraphTable) -> list[tuple[int, int]]:
    """Cut the rows into spans of about equal numbers of atoms."""
    starts = table.atom_start
    if len(starts) < 2:
        return []
    bounds = np.arange(0, int(starts[-1]), _ATOMS_AT_ONCE)
    firsts = np.unique(np.searchsorted(starts[:-1], bounds))
    return list(zip(firsts.tolist(), [*firsts[1:].tolist(), len(table)], strict=True))


def _flatten(table: GraphTable, span: tuple[int, int], pad_to: int | None) -> _Flat:
    begin, end = span
    atom_start = table.atom_start[begin : end + 1]
    edge_start = table.edge_start[begin : end + 1]
    atoms = slice(int(atom_start[0]), int(atom_start[-1]))
    edges = slice(int(edge_start[0]), int(edge_start[-1]))
    degrees = np.asarray(table.degrees[atoms]).astype(np.int64)
    first = atom_start[:-1] - atom_start[0]
    neighbors = np.repeat(first, np.diff(edge_start)).astype(np.int32)
    neighbors += table.neighbors[edges]
    distances = np.asarray(table.distances[edges], dtype=np.float32)
    if pad_to is not None and (degrees < pad_to).any():
        missing = np.maximum(pad_to - degrees, 0)
        ends = np.repeat(np.cumsum(degrees), missing)
        home = np.repeat(np.repeat(first, np.diff(atom_start)), missing)
        neighbors = np.insert(neighbors, ends, home.astype(np.int32))
        distances = np.insert(distances, ends, np.float32(table.cutoff_radius + 1.0))
        degrees = degrees + missing
    return _Flat(
        numbers=np.asarray(table.numbers[atoms]),
        edge_start=np.concatenate([[0], np.cumsum(degrees)]),
        neighbors=neighbors,
        distances=distances,
        atom_start=atom_start - atom_start[0],
    )


def _run_chunk(
    networks: Sequence[FoldedNetwork], flat: _Flat, kernels: ModuleType | None
) -> NDArray[np.float64]:
    """Return ``(n_networks, n_graphs, n_outputs)``."""
    answers = []
    expanded: dict[tuple[float, float, int], Any] = {}
    for network in networks:
        key = (network.gaussian_step, network.gaussian_width, network.n_gaussians)
        if key not in expanded:
            expanded[key] = _expand(network, flat.distances, kernels)
        atoms = network.elements[flat.numbers]
        for convolution in network.convolutions:
            projected = atoms @ convolution.node
            projected += convolution.bias
            if kernels is None:
                _convolve(convolution, projected, flat, expanded[key], atoms)
            else:
                kernels.convolve(
                    projected,
                    convolution.edge,
                    flat.edge_start,
                    flat.neighbors,
                    *expanded[key],
                    convolution.scale,
                    convolution.shift,
                    atoms,
                )
        sums = np.add.reduceat(atoms, flat.atom_start[:-1], axis=0)
        x = sums / np.diff(flat.atom_start)[:, None].astype(network.dtype)
        for matrix, bias in network.dense:
            x = _softplus(x) @ matrix + bias
        answers.append(x.astype(np.float64))
    return np.stack(answers)


def _expand(
    network: FoldedNetwork, distances: NDArray[np.float32], kernels: ModuleType | None
) -> Any:
    if kernels is None:
        centers = np.arange(network.n_gaussians) * network.gaussian_step
        scaled = (distances[:, None].astype(np.float64) - centers) / (
            network.gaussian_width
        )
        return np.exp(-(scaled**2)).astype(network.dtype)
    first = np.empty(len(distances), dtype=np.int32)
    values = np.empty((len(distances), network.window), dtype=np.float32)
    kernels.spread_gaussians(
        distances,
        network.gaussian_step,
        network.gaussian_width,
        network.n_gaussians,
        first,
        values,
    )
    return first, values


def _convolve(
    convolution: FoldedConvolution,
    projected: NDArray[Any],
    flat: _Flat,
    gaussians: NDArray[Any],
    atoms: NDArray[Any],
) -> None:
    """Do what the kernel does, in place in ``atoms``, with numpy."""
    h = atoms.shape[1]
    n_gaussians = gaussians.shape[1]
    padding = (len(convolution.edge) - n_gaussians) // 2
    edge = convolution.edge[padding : padding + n_gaussians]
    starts = flat.edge_start
    summed = np.zeros_like(atoms)
    begin = 0
    while begin < len(atoms):
        limit = starts[begin] + _EDGES_AT_ONCE
        end = max(begin + 1, int(np.searchsorted(starts, limit, side="right")) - 1)
        edges = slice(int(starts[begin]), int(starts[end]))
        degrees = np.diff(starts[begin : end + 1])
        z = gaussians[edges] @ edge
        z += np.repeat(projected[begin:end, : 2 * h], degrees, axis=0)
        z += projected[flat.neighbors[edges], 2 * h :]
        messages = _softplus(z[:, h:])
        messages /= 1.0 + np.exp(-np.clip(z[:, :h], -80.0, 80.0))
        filled = np.flatnonzero(degrees)
        if len(filled):
            places = (starts[begin:end] - starts[begin])[filled]
            summed[begin + filled] = np.add.reduceat(messages, places, axis=0)
        begin = end
    atoms += summed * convolution.scale + convolution.shift
    atoms[:] = _softplus(atoms)


def _softplus(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x))))
