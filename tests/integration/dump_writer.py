"""Writes frames as LAMMPS does; the tests of readers and analyses share it."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def bounding_box(matrix, origin):
    """Return low and high corner and tilts as a dump states them."""
    lx, ly, lz = np.diag(matrix)
    xy, xz, yz = matrix[1, 0], matrix[2, 0], matrix[2, 1]
    low, high = np.array(origin, float), np.array(origin) + np.array([lx, ly, lz])
    low[:2] += min(0.0, xy, xz, xy + xz), min(0.0, yz)
    high[:2] += max(0.0, xy, xz, xy + xz), max(0.0, yz)
    return low, high, (xy, xz, yz)


def binary_frame(
    step,
    rows,
    matrix,
    columns,
    *,
    origin=(0.0, 0.0, 0.0),
    chunks=1,
    order="<",
    units=b"",
    time=None,
):
    """A frame as LAMMPS' DumpCustom::header_binary writes it."""
    low, high, tilts = bounding_box(matrix, origin)
    out = (
        struct.pack(order + "q", -10) + b"DUMPCUSTOM" + struct.pack(order + "ii", 1, 2)
    )
    out += struct.pack(order + "qqi", step, len(rows), int(any(tilts)))
    out += struct.pack(order + "6i", *[0] * 6)
    out += struct.pack(order + "6d", *np.column_stack([low, high]).ravel())
    if any(tilts):
        out += struct.pack(order + "3d", *tilts)
    out += struct.pack(order + "ii", len(columns.split()), len(units)) + units
    out += struct.pack("b", time is not None)
    if time is not None:
        out += struct.pack(order + "d", time)
    out += struct.pack(order + "i", len(columns)) + columns.encode()
    out += struct.pack(order + "i", chunks)
    for part in np.array_split(rows, chunks):
        data = part.astype(order + "f8").tobytes()
        out += struct.pack(order + "i", part.size) + data
    return out


def write_binary(
    path: Path, positions, matrices, *, types=None, velocities=None, every=1, first=0
) -> Path:
    """Write a trajectory: ``(frames, atoms, 3)`` positions, one box or one a frame."""
    positions = np.asarray(positions, float)
    n_frames, n_atoms, _ = positions.shape
    matrices = np.broadcast_to(np.asarray(matrices, float), (n_frames, 3, 3))
    kinds = np.ones(n_atoms) if types is None else np.asarray(types, float)
    columns = "id type xu yu zu" + ("" if velocities is None else " vx vy vz")
    with path.open("wb") as file:
        for i in range(n_frames):
            parts = [np.arange(1.0, n_atoms + 1)[:, None], kinds[:, None], positions[i]]
            if velocities is not None:
                parts.append(np.asarray(velocities)[i])
            rows = np.concatenate(parts, axis=1)
            file.write(binary_frame(first + i * every, rows, matrices[i], columns))
    return path
