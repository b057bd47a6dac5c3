"""What every dump file gives, whatever its format: frames of atoms in a box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

# The third kind of box of a dump, beside orthogonal (0) and tilted (1).
GENERAL_TRICLINIC = 2


@dataclass(frozen=True)
class FrameBlock:
    """Frames that follow each other, with the same atoms.

    Parameters
    ----------
    step
        ``(n_frames,) int64``.
    matrix
        ``(n_frames, 3, 3) float64``, Å: rows a, b, c of each box.
    types
        ``(n_frames, n_atoms) int64``, in the order of the ids.
    positions
        ``(n_frames, n_atoms, 3) float64``, Å, relative to the box's origin.
    velocities
        ``(n_frames, n_atoms, 3) float64`` in the file's unit (Å/ps of metal units),
        or None if they were not written.
    ids
        ``(n_atoms,) int64``, rising.
    unwrapped
        Whether an atom that crosses a face goes on; otherwise it came back in at the
        other side, and displacements are not differences.
    """

    step: Integers
    matrix: Array
    types: Integers
    positions: Array
    velocities: Array | None
    ids: Integers
    unwrapped: bool


@dataclass(frozen=True)
class DumpIndex:
    """Where the whole frames of one file are.

    Parameters
    ----------
    step, n_atoms
        ``(n_frames,) int64``.
    offset, size
        ``(n_frames,) int64``, bytes: the frame with its header; of the unpacked
        text for a gzip file.
    is_cut
        Whether a frame, the last as a rule, is not whole; it is left out.
    """

    step: Integers
    n_atoms: Integers
    offset: Integers
    size: Integers
    is_cut: bool


def boxes_of_bounds(values: Array, triclinic: int) -> tuple[Array, Array]:
    """Return boxes ``(n, 3, 3)`` and origins ``(n, 3)`` of a dump's numbers.

    Parameters
    ----------
    values
        ``(n, 9) float64``, Å: bounds of x, y, z, then xy, xz, yz; or for a general
        triclinic box ``(n, 12)``: its vectors and its origin.
    triclinic
        Kind of the box.
    """
    n = len(values)
    if triclinic == GENERAL_TRICLINIC:
        return values[:, :9].reshape(n, 3, 3), values[:, 9:]
    bounds, (xy, xz, yz) = values[:, :6].reshape(n, 3, 2), values[:, 6:].T
    # The file holds the bounding box of a triclinic cell, not lx, ly, lz.
    zero = np.zeros(n)
    low = bounds[:, :, 0].copy()
    low[:, 0] -= np.min([zero, xy, xz, xy + xz], axis=0)
    low[:, 1] -= np.minimum(zero, yz)
    high = bounds[:, :, 1].copy()
    high[:, 0] -= np.max([zero, xy, xz, xy + xz], axis=0)
    high[:, 1] -= np.maximum(zero, yz)
    matrix = np.zeros((n, 3, 3))
    matrix[:, [0, 1, 2], [0, 1, 2]] = high - low
    matrix[:, 1, 0], matrix[:, 2, 0], matrix[:, 2, 1] = xy, xz, yz
    return matrix, low


def block_of_columns(
    step: Integers,
    matrix: Array,
    origin: Array,
    columns: Sequence[str],
    rows: Array,
    ids: Integers,
) -> FrameBlock:
    """Return the frames that the columns of a dump describe.

    Parameters
    ----------
    step, matrix, origin
        Of each frame.
    columns
        Names of the columns.
    rows
        ``(n_frames, n_atoms, n_columns) float64``, sorted by id; it is handed over:
        the result keeps parts of it and shifts positions in place.
    ids
        ``(n_atoms,) int64``.

    Raises
    ------
    InputError
        If there are no positions among the columns.
    """
    place = {name: i for i, name in enumerate(columns)}

    def triple(*names: str) -> Array | None:
        if any(name not in place for name in names):
            return None
        first, second, third = (place[name] for name in names)
        if (second, third) == (first + 1, first + 2):
            return rows[:, :, first : first + 3]  # a view: nothing is copied
        return rows[:, :, [first, second, third]]

    def from_origin(x: Array) -> Array:
        # By component: numpy is slow along an axis of three. The rows are ours.
        for k in range(3):
            if origin[:, k].any():
                x[:, :, k] -= origin[:, k, None]
        return x

    images = triple("ix", "iy", "iz")
    unwrapped = True
    if (x := triple("xu", "yu", "zu")) is not None:
        positions = from_origin(x)
    elif (x := triple("xsu", "ysu", "zsu")) is not None:
        positions = x @ matrix
    elif (x := triple("x", "y", "z")) is not None:
        positions = from_origin(x)
        if images is not None:
            positions += images @ matrix
        unwrapped = images is not None
    elif (x := triple("xs", "ys", "zs")) is not None:
        positions = (x if images is None else x + images) @ matrix
        unwrapped = images is not None
    else:
        raise InputError(
            "the dump was written without positions (xu yu zu, or x y z ix iy iz)",
            evidence={"columns": list(columns)},
        )
    return FrameBlock(
        step=step,
        matrix=matrix,
        types=rows[:, :, place["type"]].astype(np.int64),
        positions=positions,
        velocities=triple("vx", "vy", "vz"),
        ids=ids,
        unwrapped=unwrapped,
    )
