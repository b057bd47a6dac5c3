"""The map between a crystal's lattice and the simulation box of LAMMPS.

LAMMPS wants ``a`` along x, ``b`` in the xy plane, ``c`` above it and moderate tilts.
Any lattice is brought there by a change of basis (integers) and a rotation, which
are undone for every result: a stress or a velocity left in the frame of the box is
wrong as soon as the lattice is not already restricted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Rows = list[list[float]]
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
        rows = np.asarray(lattice, dtype=np.float64).tolist()
        volume, lengths = _volume(rows), [math.hypot(*row) for row in rows]
        smallest = _MIN_VOLUME_PER_LENGTH3 * math.prod(lengths)
        if not (math.isfinite(smallest) and abs(volume) > smallest):
            volume = abs(volume) if math.isfinite(volume) else 0.0
            raise InputError(
                f"the lattice has no volume ({volume:.3g} Å³)",
                evidence={"lattice": np.nan_to_num(rows).tolist()},
                advice="check the lattice vectors of the structure",
            )
        box, _ = _restricted(rows)
        basis: Rows = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
        # Each tilt is brought to at most half the edge it is measured along. The
        # last one first: c - k b changes xz too.
        for row, column in ((1, 0), (2, 1), (2, 0)):
            if k := round(box[row][column] / box[column][column]):
                for target in (box, basis):
                    target[row] = [
                        x - k * y
                        for x, y in zip(target[row], target[column], strict=True)
                    ]
        reduced = [
            [sum(k * row[i] for k, row in zip(ks, rows, strict=True)) for i in range(3)]
            for ks in basis
        ]
        # Of the reduced cell, whose angles are wide, so that nothing cancels.
        box, frame = _restricted(reduced)
        return cls(np.array(box), np.array(basis, dtype=np.int64), np.array(frame).T)

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
        inverse = _adjugate(self.basis.tolist())  # its inverse: determinant 1
        reduced = frac_coords @ np.array(inverse, dtype=np.float64)
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


def pairs_within(
    positions: Array, matrix: Array, radius: float
) -> tuple[Integers, Integers, Array, Array]:
    """Return all pairs of periodic points within a radius, and each with itself.

    By pymatgen's cell list, in time that grows with the number of points.

    Parameters
    ----------
    positions
        Cartesian, Å, shape (n, 3).
    matrix
        Cell vectors as rows, Å.
    radius
        Å.

    Returns
    -------
    first, second, shifts, distances
        Numbers of the points, cells between them (shape (pairs, 3)), and Å.
    """
    from pymatgen.optimization.neighbors import find_points_in_spheres

    points = np.ascontiguousarray(positions)
    found: tuple[Integers, Integers, Array, Array] = find_points_in_spheres(
        points,
        points,
        radius,
        np.ones(3, dtype=np.int64),
        np.ascontiguousarray(matrix),
        1e-8,
    )
    return found


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    ]


def _adjugate(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    (a, b, c), (d, e, f), (g, h, i) = rows
    return [
        [e * i - f * h, c * h - b * i, b * f - c * e],
        [f * g - d * i, a * i - c * g, c * d - a * f],
        [d * h - e * g, b * g - a * h, a * e - b * d],
    ]


def _volume(rows: Rows) -> float:
    return _dot(_cross(rows[0], rows[1]), rows[2])


def _restricted(rows: Rows) -> tuple[Rows, Rows]:
    """Return the lower triangular box of a lattice, and the axes it is written in.

    In plain numbers: calls into numpy for nine of them cost more than a small
    structure's energy.
    """
    a, b, c = rows
    axes = []
    normal = _cross(a, b)
    for vector in (a, _cross(normal, a), normal):
        length = math.hypot(*vector)
        axes.append([x / length for x in vector])
    x, y, z = axes
    if _dot(c, z) < 0.0:  # left-handed: z is mirrored
        axes[2] = z = [-value for value in z]
    box = [
        [_dot(a, x), 0.0, 0.0],
        [_dot(b, x), _dot(b, y), 0.0],
        [_dot(c, x), _dot(c, y), _dot(c, z)],
    ]
    return box, axes
