"""The graph of one crystal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.crystals import HEAVIEST
from nanoos_fw.errors import InputError

MAX_DEGREE = np.iinfo(np.uint16).max
"""Neighbours of an atom that a packed graph and a table have room for."""

_CENTRES = np.arange(1024, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class CrystalGraph:
    """The neighbours of every atom of one crystal.

    Arrays that are no graph are refused.

    Parameters
    ----------
    numbers
        ``(n_atoms,) uint8``, atomic numbers.
    edge_index
        ``(2, n_edges) int32``, centre and neighbour, sorted by centre.
    distances
        ``(n_edges,) float64``, Å.
    cutoff_radius
        Å; no edge is longer.
    max_neighbors
        Neighbours kept of each atom, or None for all within the cutoff.
    offsets
        ``(n_edges, 3) int32``, cell of the neighbour. None for a graph that was
        packed without geometry.
    lattice
        ``(3, 3) float64``, rows are lattice vectors in Å. None like ``offsets``.
    vectors
        ``(n_edges, 3) float32``, from centre to neighbour in Å, of a graph that was
        packed with them; else None, see :func:`nanoos_fw.ml.angles.edge_vectors`.
    """

    numbers: NDArray[np.uint8]
    edge_index: NDArray[np.int32]
    distances: NDArray[np.float64]
    cutoff_radius: float
    max_neighbors: int | None = None
    offsets: NDArray[np.int32] | None = None
    lattice: NDArray[np.float64] | None = None
    vectors: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        check_parameters(self.cutoff_radius, self.max_neighbors)
        n_edges = len(self.distances)
        offsets = (n_edges, 3) if self.offsets is None else self.offsets.shape
        vectors = (n_edges, 3) if self.vectors is None else self.vectors.shape
        lattice = (3, 3) if self.lattice is None else self.lattice.shape
        if (
            self.numbers.ndim != 1
            or self.edge_index.shape != (2, n_edges)
            or offsets != (n_edges, 3)
            or lattice != (3, 3)
            or vectors != (n_edges, 3)
        ):
            raise InputError(
                "the arrays of a crystal graph do not fit together",
                evidence={
                    "numbers": list(self.numbers.shape),
                    "edge_index": list(self.edge_index.shape),
                    "distances": list(self.distances.shape),
                    "offsets": list(offsets),
                    "lattice": list(lattice),
                    "vectors": list(vectors),
                },
            )
        self._check_values()

    def _check_values(self) -> None:
        """Refuse what no search gives, and what would be read as something else."""
        strange = (self.numbers < 1) | (self.numbers > HEAVIEST)
        if strange.any():
            raise InputError(
                f"{self.numbers[strange][0]} is no atomic number",
                evidence={"atom": int(strange.argmax())},
            )
        ends, centre = self.edge_index, self.edge_index[0]
        if self.n_edges and (
            (centre[1:] < centre[:-1]).any()
            or ends.min() < 0
            or ends.max() >= self.n_atoms
        ):
            raise InputError(
                "the graph's edges are unsorted or point to missing atoms",
                advice="sort them by centre",
            )
        # Also false for NaN.
        if not ((self.distances >= 0) & (self.distances < np.inf)).all():
            raise InputError("the graph has distances that are not finite")
        if self.max_neighbors is not None:
            most = int(self.degrees.max(initial=0))
            if most > self.max_neighbors:
                raise InputError(
                    f"an atom of the graph has {most} neighbours, more than "
                    f"max_neighbors = {self.max_neighbors}"
                )

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return int(self.numbers.shape[0])

    @property
    def n_edges(self) -> int:
        """Number of edges; each pair of atoms counts once per direction."""
        return int(self.distances.shape[0])

    @property
    def degrees(self) -> NDArray[np.int64]:
        """Neighbours of each atom, ``(n_atoms,) int64``."""
        return np.bincount(self.edge_index[0], minlength=self.n_atoms)


def check_parameters(cutoff_radius: float, max_neighbors: int | None) -> None:
    """Refuse a radius (Å) and a number of neighbours that give no graph."""
    if not (math.isfinite(cutoff_radius) and cutoff_radius > 0):
        raise InputError(f"cutoff_radius must be positive, not {cutoff_radius}")
    if max_neighbors is None:
        return
    whole = isinstance(max_neighbors, int | np.integer)
    if not (whole and 0 < max_neighbors <= MAX_DEGREE):
        raise InputError(f"max_neighbors must be 1 to {MAX_DEGREE}: {max_neighbors}")


def centres(n_atoms: int) -> NDArray[np.int32]:
    """Return 0, 1, ... ``n_atoms - 1``, read only."""
    if n_atoms <= len(_CENTRES):
        return _CENTRES[:n_atoms]
    return np.arange(n_atoms, dtype=np.int32)
