"""A network on atoms, bonds and angles. Importing this module imports torch.

In the manner of ALIGNN [1]_: edge-gated convolutions [2]_ pass messages between bonds
over angles, then between atoms over bonds. Here the bonds of an atom are all within a
cutoff, and a smooth factor takes them out towards it, so that a prediction does not
jump when an atom crosses the border, and depends on neither cell nor orientation.

References
----------
.. [1] K. Choudhary, B. DeCost, npj Comput. Mater. 7, 185 (2021).
.. [2] X. Bresson, T. Laurent, arXiv:1711.07553 (2017).
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from nanoos_fw.errors import InputError
from nanoos_fw.ml.model_files import LineGraphArchitecture
from nanoos_fw.ml.network import (
    CountedDropout,
    GlobalBatchNorm,
    Network,
    TensorBatch,
    normalize_together,
)

_SMALLEST_SUM = 1e-3  # of the gates of a node: fewer count as no message


class EdgeGatedConvolution(nn.Module):
    """Update the nodes of a graph by gates on its edges, and the edges by both ends."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()

        def matrix(*, bias: bool) -> nn.Linear:
            return nn.Linear(hidden_dim, hidden_dim, bias=bias)

        self.centre_gate = matrix(bias=False)
        self.neighbor_gate = matrix(bias=False)
        self.edge_gate = matrix(bias=False)
        self.own = matrix(bias=False)
        self.message = matrix(bias=True)
        self.node_norm = GlobalBatchNorm(hidden_dim)
        self.edge_norm = GlobalBatchNorm(hidden_dim)

    def forward(
        self, nodes: Tensor, edges: Tensor, centre: Tensor, other: Tensor, fade: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return new nodes and edges; ``fade`` ``(n_edges, 1)`` weighs the messages."""
        z = self.edge_gate(edges)
        z = z + self.centre_gate(nodes).index_select(0, centre)
        z = z + self.neighbor_gate(nodes).index_select(0, other)
        gates = torch.sigmoid(z) * fade
        messages = gates * self.message(nodes).index_select(0, other)
        sums = torch.zeros_like(nodes).index_add(0, centre, messages)
        weights = torch.zeros_like(nodes).index_add(0, centre, gates)
        update = self.own(nodes) + sums / (weights + _SMALLEST_SUM)
        update, z = normalize_together((self.node_norm, update), (self.edge_norm, z))
        return nodes + functional.silu(update), edges + functional.silu(z)


class LineGraphNetwork(Network):
    """Embeddings, convolutions over angles and bonds, mean over atoms, output.

    Parameters
    ----------
    architecture
        Sizes.
    atom_table
        ``(119, n_features)``, row Z: the fixed description of each element.
    """

    atom_table: Tensor
    evaluation_batch = 32

    def __init__(
        self, architecture: LineGraphArchitecture, atom_table: NDArray[np.float32]
    ) -> None:
        super().__init__()
        hidden = architecture.hidden_dim
        table = torch.from_numpy(np.array(atom_table, dtype=np.float32))
        self.register_buffer("atom_table", table, persistent=False)
        # Not buffers, which would be rounded to float32 on the way to float64.
        self.distance_centers = architecture.gaussian_centers()
        self.cosine_centers = np.linspace(-1.0, 1.0, architecture.n_angle_gaussians)
        self.architecture = architecture
        self.atoms = nn.Linear(table.shape[1], hidden)
        self.bonds = _embedding(len(self.distance_centers), hidden)
        self.angles = _embedding(len(self.cosine_centers), hidden)
        layers = range(architecture.angle_layers)
        self.on_bonds = nn.ModuleList(EdgeGatedConvolution(hidden) for _ in layers)
        self.on_atoms = nn.ModuleList(
            EdgeGatedConvolution(hidden)
            for _ in range(architecture.angle_layers + architecture.atom_layers)
        )
        self.dropout = CountedDropout(architecture.dropout, hidden)
        self.output = nn.Linear(hidden, architecture.n_outputs)

    def forward(self, batch: TensorBatch) -> Tensor:
        """Return the normalized target of each graph, ``(n_graphs,)``.

        With several outputs: one column each, ``(n_graphs, n_outputs)``.
        """
        if batch.edge_pairs is None or batch.cosines is None:
            raise InputError(
                "a network on angles was given graphs without angles",
                advice="make the table by nanoos_fw.ml.line_graph",
            )
        sizes = self.architecture
        first, second = batch.edge_pairs
        fade = _fade(batch.distances, sizes.gaussian_max)
        short = _fade(batch.distances, sizes.angle_cutoff)
        pair_fade = short.index_select(0, first) * short.index_select(0, second)
        atoms = self.atoms(self.atom_table).index_select(0, batch.numbers)
        bonds = self.bonds(
            _gaussians(batch.distances, self.distance_centers, sizes.gaussian_width)
        )
        spacing = float(self.cosine_centers[1] - self.cosine_centers[0])
        angles = self.angles(_gaussians(batch.cosines, self.cosine_centers, spacing))
        for layer, convolution in enumerate(self.on_atoms):
            if layer < sizes.angle_layers:
                bonds, angles = self.on_bonds[layer](
                    bonds, angles, first, second, pair_fade
                )
            atoms, bonds = convolution(atoms, bonds, batch.centre, batch.neighbor, fade)
        n_graphs = batch.graph_sizes.shape[0]
        crystals = atoms.new_zeros((n_graphs, atoms.shape[1]))
        crystals = crystals.index_add(0, batch.graph_index, atoms)
        crystals = crystals / batch.graph_sizes.to(atoms.dtype).unsqueeze(1)
        return cast(Tensor, self.output(self.dropout(crystals))).squeeze(1)


# ------------------------------------------------------------------------- private


def _embedding(n_in: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, hidden), nn.SiLU(), nn.Linear(hidden, hidden))


def _gaussians(values: Tensor, centers: NDArray[np.float64], width: float) -> Tensor:
    places = torch.from_numpy(centers).to(values)
    return torch.exp(-(((values.unsqueeze(1) - places) / width) ** 2))


def _fade(distances: Tensor, cutoff: float) -> Tensor:
    """Return a factor that falls from 1 to 0 with no step, ``(n, 1)``."""
    inside = (distances / cutoff).clamp(max=1.0)
    return (0.5 * (torch.cos(math.pi * inside) + 1.0)).unsqueeze(1)
