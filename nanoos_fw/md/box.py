"""The map between a crystal's lattice and the simulation box of LAMMPS.

LAMMPS wants ``a`` along x, ``b`` in the xy plane, ``c`` above it and moderate tilts.
Any lattice is brought there by a change of basis (integers) and a rotation, which
are undone for every result: a stress or a velocity left in the frame of the box is
wrong as soon as the lattice is not already restricted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError

Array = NDArray[np.float64]
_MIN_VOLUME_PER_LENGTH3 = 1e-6
_VOIGT = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))  # xx yy zz xy xz yz


@dataclass(frozen=True)
class LammpsBox:
    """A lattice as LAMMPS sees it.

    Parameters
    ----------
    matrix
        ``(3, 3) float64``, Å: rows a, b, c of the box; lower triangular with a
        positive diagonal.
    basis
        ``(3, 3) int64``: rows of the reduced cell in terms of the lattice's rows,
        determinant 1.
    rotation
        ``(3, 3) float64``: orthogonal ``Q`` with ``box vector = vector @ Q``. It is
        improper for a left-handed lattice: energies do not change under a mirror.
    """

    matrix: Array
    basis: NDArray[np.int64]
    rotation: Array

    @classmethod
    def from_lattice(cls, lattice: Array) -> LammpsBox:
        """Return the box of a lattice.

        Parameters
        ----------
        lattice
            ``(3, 3) float64``, Å: rows a, b, c, of either handedness.

        Raises
        ------
        InputError
            If the lattice is not finite or has no volume.
        """
        lattice = np.asarray(lattice, dtype=np.float64)
        lengths = np.linalg.norm(lattice, axis=1) if np.isfinite(lattice).all() else 0
        volume = abs(np.linalg.det(lattice)) if np.all(lengths) else 0.0
        if volume <= _MIN_VOLUME_PER_LENGTH3 * np.prod(lengths):
            raise InputError(
                f"the lattice has no volume ({volume:.3g} Å³)",
                evidence={"lattice": np.nan_to_num(lattice).tolist()},
                advice="check the lattice vectors of the structure",
            )
        matrix = _lower_triangular(lattice)
        basis = np.eye(3, dtype=np.int64)
        # Each tilt is brought to at most half the edge it is measured along. The
        # last one first: c - k b changes xz too.
        for row, column in ((1, 0), (2, 1), (2, 0)):
            k = int(np.rint(matrix[row, column] / matrix[column, column]))
            matrix[row] -= k * matrix[column]
            basis[row] -= k * basis[column]
        rotation = np.asarray(
            np.linalg.solve(basis @ lattice, matrix), dtype=np.float64
        )
        return cls(matrix, basis, rotation)

    @property
    def lengths(self) -> tuple[float, float, float]:
        """``lx, ly, lz`` in Å."""
        lx, ly, lz = (float(x) for x in np.diag(self.matrix))
        return lx, ly, lz

    @property
    def tilts(self) -> tuple[float, float, float]:
        """``xy, xz, yz`` in Å."""
        m = self.matrix
        return float(m[1, 0]), float(m[2, 0]), float(m[2, 1])

    @property
    def is_orthogonal(self) -> bool:
        """Whether all tilts are zero to rounding."""
        return bool(np.abs(self.tilts).max() < 1e-10 * max(self.lengths))

    def positions(self, frac_coords: Array) -> Array:
        """Return positions in the box, in Å, wrapped into it, in the order of sites.

        Parameters
        ----------
        frac_coords
            ``(n_atoms, 3) float64``: fractional coordinates in the lattice.
        """
        reduced = frac_coords @ np.linalg.inv(self.basis)
        wrapped = reduced - np.floor(reduced)
        wrapped[wrapped >= 1.0] = 0.0  # -1e-17 - floor(-1e-17) is 1
        return np.asarray(wrapped @ self.matrix)

    def lattice(self, matrix: Array | None = None) -> Array:
        """Return the lattice, in its own orientation and basis, that a box stands for.

        Parameters
        ----------
        matrix
            Box of the same map after it has changed in size or shape; None takes
            this one.
        """
        box = self.matrix if matrix is None else matrix
        return np.asarray(np.linalg.inv(self.basis) @ box @ self.rotation.T)

    def to_box(self, vectors: Array) -> Array:
        """Rotate vectors ``(..., 3)`` (velocities, forces) into the box's frame."""
        return np.asarray(vectors @ self.rotation)

    def from_box(self, vectors: Array) -> Array:
        """Rotate vectors ``(..., 3)`` from the box's frame back to the lattice's."""
        return np.asarray(vectors @ self.rotation.T)

    def tensor_from_box(self, tensor: Array) -> Array:
        """Rotate a ``(3, 3)`` tensor such as the stress back to the lattice's frame."""
        return np.asarray(self.rotation @ tensor @ self.rotation.T)

    def frac_coords(self, positions: Array, matrix: Array | None = None) -> Array:
        """Return fractional coordinates in the lattice of positions in the box.

        Parameters
        ----------
        positions
            ``(n_atoms, 3) float64``, Å, in the box's frame, wrapped or not.
        matrix
            The box they belong to; None takes this one.
        """
        box = self.matrix if matrix is None else matrix
        return np.asarray(np.linalg.solve(box.T, positions.T).T @ self.basis)


def voigt_to_tensor(values: Array) -> Array:
    """Return the symmetric ``(3, 3)`` tensor of LAMMPS' order xx yy zz xy xz yz."""
    tensor = np.empty((3, 3))
    for value, (i, j) in zip(values, _VOIGT, strict=True):
        tensor[i, j] = tensor[j, i] = value
    return tensor


def tensor_to_voigt(tensor: Array) -> Array:
    """Return xx yy zz xy xz yz of a symmetric ``(3, 3)`` tensor."""
    return np.array([tensor[i, j] for i, j in _VOIGT])


def perpendicular_widths(lattice: Array) -> Array:
    """Return the ``(3,)`` distances between opposite faces of a cell, in Å."""
    return np.asarray(1.0 / np.linalg.norm(np.linalg.inv(lattice), axis=0))


def _lower_triangular(lattice: Array) -> Array:
    # lattice.T = Q R, so lattice @ Q = R.T, lower triangular; signs make it positive.
    _, r = np.linalg.qr(lattice.T)
    lower = (r * np.sign(np.diag(r))[:, None]).T
    return np.ascontiguousarray(np.tril(lower))
