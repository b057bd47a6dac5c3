"""Time series of atoms out of a trajectory that need not fit into memory.

Correlations over time need all frames of an atom, a file has all atoms of a frame.
So the atoms are taken in blocks, as many as a memory budget allows, and the file is
read once for each block; a file sorted by id (``dump_modify sort id``) is read only
where the block is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.md.trajectory import Trajectory

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

MEMORY_MB = 256.0
# Numbers of eight bytes per atom, frame and component at the peak: as read, in
# order, zero-padded and transformed, and scratch.
_NUMBERS = 10


@dataclass(frozen=True)
class AtomSeries:
    """A block of atoms through all frames.

    Parameters
    ----------
    types
        ``(n_atoms,) int64``.
    values
        ``(n_atoms, 3, n_frames) float64``.
    """

    types: Integers
    values: Array


def atoms_at_once(trajectory: Trajectory, memory_mb: float) -> int:
    """Return how many atoms' series fit a budget with their transforms; at least 1."""
    each = _NUMBERS * 3 * 8 * max(1, len(trajectory))
    return max(1, int(memory_mb * 1e6 / each))


def check_series(trajectory: Trajectory, what: str) -> int:
    """Return the number of atoms of a trajectory that time series can be made of.

    Raises
    ------
    InputError
        If there are fewer than two frames, they are not equally spaced, or the
        number of atoms changes.
    """
    trajectory.interval()
    n_atoms = int(trajectory.n_atoms[0])
    if (trajectory.n_atoms != n_atoms).any():
        raise InputError(
            f"{what} needs the same atoms in all frames",
            evidence={
                "n_atoms": [
                    int(trajectory.n_atoms.min()),
                    int(trajectory.n_atoms.max()),
                ]
            },
            advice="analyse a part of the trajectory where no atom is lost or added",
        )
    return n_atoms


@dataclass(frozen=True)
class Motion:
    """How box and centre of mass move: what displacements are measured against.

    Parameters
    ----------
    matrix
        ``(n_frames, 3, 3) float64``, Å.
    centre
        ``(n_frames, 3) float64``: centre of mass in fractions of the box.
    types
        ``(n_atoms,) int64``: types of the atoms, which stay.
    """

    matrix: Array
    centre: Array
    types: Integers


def motion(trajectory: Trajectory, masses: Array | None) -> Motion:
    """Read the whole trajectory once for its centre of mass.

    Parameters
    ----------
    masses
        ``(n_types,) float64``, u; None takes all atoms alike.

    Raises
    ------
    InputError
        If positions are neither unwrapped nor come with image flags, or a type
        changes.
    """
    centre = np.empty((len(trajectory), 3))
    types: Integers | None = None
    start = 0
    for block in trajectory.blocks():
        if not block.unwrapped:
            raise InputError(
                "displacements need unwrapped positions",
                evidence={"step": int(block.step[0])},
                advice="dump xu yu zu, or ix iy iz beside x y z",
            )
        types = block.types[0].copy() if types is None else types
        if (block.types != types).any():
            raise InputError("an atom changes its type during the trajectory")
        weights = _weights(types, masses)
        mean = np.einsum("a,fak->fk", weights, block.positions) / weights.sum()
        stop = start + len(block.step)
        centre[start:stop] = np.einsum("fk,fkl->fl", mean, np.linalg.inv(block.matrix))
        start = stop
    if types is None:
        raise InputError("the trajectory has no frames")
    return Motion(trajectory.matrix, centre, types)


def displacement_series(
    trajectory: Trajectory,
    moved: Motion,
    *,
    remove_drift: bool = True,
    memory_mb: float = MEMORY_MB,
) -> Iterator[AtomSeries]:
    """Yield the paths of the atoms, block by block, free of changes of the box.

    In a box of fixed size and shape these are the unwrapped positions. In a box that
    changes, unwrapped positions are no paths: an atom that has left through a face n
    times jumps by n times every change of the box length, and its mean squared
    displacement grows with the fluctuations of the barostat. Here the path is the sum
    of the changes of the fractional coordinates, each times the box in between
    (trapezoidal rule). That is the motion relative to the medium that breathes.

    Parameters
    ----------
    trajectory, moved
        Frames, and what `motion` found in them.
    remove_drift
        Whether positions are relative to the centre of mass.
    memory_mb
        Bound on the memory of a block.

    References
    ----------
    S. von Bülow, J. T. Bullerjahn, G. Hummer, J. Chem. Phys. 153, 021101 (2020).
    M. Kulke, J. V. Vermaas, J. Chem. Theory Comput. 18, 6161 (2022).
    """
    inverse = np.linalg.inv(moved.matrix)
    same_box = bool((moved.matrix == moved.matrix[0]).all())
    between = 0.5 * (moved.matrix[1:] + moved.matrix[:-1])
    origin = moved.centre if remove_drift else np.zeros_like(moved.centre)
    shift = np.einsum("fk,fkl->fl", origin, moved.matrix)
    for atoms, paths in _blocks(trajectory, "positions", memory_mb):
        values = paths
        if same_box:
            values -= shift.T
        else:
            # (atoms, frames, 3): products with the box are along the last axis.
            scaled = np.einsum("akf,fkl->afl", values, inverse) - origin
            steps = np.einsum("afk,fkl->alf", np.diff(scaled, axis=1), between)
            values[:, :, 0] = 0.0
            np.cumsum(steps, axis=2, out=values[:, :, 1:])
        yield AtomSeries(moved.types[atoms], values)


def velocity_series(
    trajectory: Trajectory, types: Integers, *, memory_mb: float = MEMORY_MB
) -> Iterator[AtomSeries]:
    """Yield the velocities of the atoms, block by block.

    Raises
    ------
    InputError
        If the trajectory was dumped without velocities.
    """
    for atoms, values in _blocks(trajectory, "velocities", memory_mb):
        yield AtomSeries(types[atoms], values)


def _blocks(
    trajectory: Trajectory, name: str, memory_mb: float
) -> Iterator[tuple[slice, Array]]:
    n_atoms, n_frames = int(trajectory.n_atoms[0]), len(trajectory)
    size = atoms_at_once(trajectory, memory_mb)
    size = math.ceil(n_atoms / math.ceil(n_atoms / size))
    for first in range(0, n_atoms, size):
        atoms = slice(first, min(first + size, n_atoms))
        values = np.empty((atoms.stop - first, 3, n_frames))
        start = 0
        ids: Integers | None = None
        for block in trajectory.blocks(atoms):
            found = getattr(block, name)
            if found is None:
                raise InputError(
                    f"the trajectory was dumped without {name}",
                    advice="dump vx vy vz",
                )
            ids = block.ids if ids is None else ids
            if (block.ids != ids).any():
                raise InputError("the dumped atoms change during the trajectory")
            stop = start + len(block.step)
            values[:, :, start:stop] = found.transpose(1, 2, 0)
            start = stop
        yield atoms, values


def fast_length(n: int) -> int:
    """Return the smallest length of at least n whose only factors are 2, 3 and 5."""
    best, fives = 1 << (n - 1).bit_length(), 1
    while fives < best:
        threes = fives
        while threes < best:
            rest = -(-n // threes)
            best = min(best, threes << (rest - 1).bit_length())
            threes *= 3
        fives *= 5
    return best


def _weights(types: Integers, masses: Array | None) -> Array:
    if masses is None:
        return np.ones(len(types))
    if types.max() > len(masses):
        raise InputError(
            f"no mass was given for type {int(types.max())}",
            evidence={"masses": np.asarray(masses).tolist()},
        )
    return np.asarray(np.asarray(masses, np.float64)[types - 1])
