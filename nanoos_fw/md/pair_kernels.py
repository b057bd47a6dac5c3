"""Compiled loops over pairs of atoms within a distance; see :mod:`nanoos_fw.md.rdf`.

Atoms are sorted into bins, those of one line along a side by side in memory. For an
atom, the lines within the distance are found by the gaps in y and z, and on each line
the stretch by the gap in x: cells of any tilt, and distances beyond the cell, need
nothing else, since bins outside the cell are those inside plus a lattice vector.
Every pair and every image of it is met exactly once.

numba compiles these functions on their first call and keeps the machine code on
disk. Nothing here reorders floating-point operations (no ``fastmath``).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

_F = TypeVar("_F", bound=Callable[..., Any])

# Guards the borders of bins against rounding; what is too far is measured and left.
_GUARD = 1e-9


def jit(function: _F) -> _F:
    """Compile a function on its first call; keep the machine code on disk."""
    try:
        return cast("_F", numba.njit(cache=True, error_model="numpy")(function))
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written to.
        return cast("_F", numba.njit(error_model="numpy")(function))


@jit
def sort_into_bins(positions, cell, types, shape):
    """Wrap atoms into the cell and sort them by bin.

    Parameters
    ----------
    positions
        ``(n, 3) float64``, Å.
    cell
        ``(6,) float64``, Å: lx, xy, ly, xz, yz, lz.
    types
        ``(n,) int64``, counted from 0.
    shape
        ``(3,) int64``: bins along a, b, c.

    Returns
    -------
    starts, x, y, z, kinds, lines, order
        First atom of each bin, ``(3,)`` sorted coordinates, types, the line (b, c) of
        each atom, and its number before sorting.
    """
    n = positions.shape[0]
    lx, xy, ly, xz, yz, lz = cell
    nx, ny, nz = shape
    starts = np.zeros(nx * ny * nz + 1, np.int64)
    bin_of = np.empty(n, np.int64)
    frac = np.empty((n, 3))
    for i in range(n):
        c = positions[i, 2] / lz
        b = (positions[i, 1] - c * yz) / ly
        a = (positions[i, 0] - c * xz - b * xy) / lx
        a -= math.floor(a)
        b -= math.floor(b)
        c -= math.floor(c)
        # -1e-17 - floor(-1e-17) is 1.
        if a >= 1.0:
            a = 0.0
        if b >= 1.0:
            b = 0.0
        if c >= 1.0:
            c = 0.0
        frac[i, 0], frac[i, 1], frac[i, 2] = a, b, c
        u = min(nx - 1, int(a * nx))
        v = min(ny - 1, int(b * ny))
        w = min(nz - 1, int(c * nz))
        bin_of[i] = (w * ny + v) * nx + u
        starts[bin_of[i] + 1] += 1
    for u in range(nx * ny * nz):
        starts[u + 1] += starts[u]
    cursor = starts[:-1].copy()
    x, y, z = np.empty(n), np.empty(n), np.empty(n)
    kinds, lines = np.empty(n, np.int64), np.empty(n, np.int64)
    order = np.empty(n, np.int64)
    for i in range(n):
        p = cursor[bin_of[i]]
        cursor[bin_of[i]] += 1
        a, b, c = frac[i, 0], frac[i, 1], frac[i, 2]
        x[p] = a * lx + b * xy + c * xz
        y[p] = b * ly + c * yz
        z[p] = c * lz
        kinds[p] = types[i]
        lines[p] = bin_of[i] // nx
        order[p] = i
    return starts, x, y, z, kinds, lines, order


@jit
def find_runs(i, half, radius, cell, shape, starts, x, y, z, lines, runs, shifts):
    """Find the stretches of atoms that may lie within a distance of atom i.

    Parameters
    ----------
    half
        Whether each pair is to be met once (from one of its atoms) or twice.
    runs, shifts
        Filled with first and last atom (exclusive) and the lattice vector to add.

    Returns
    -------
    int
        Number of stretches; -1 if there is no room.
    """
    lx, xy, ly, xz, yz, lz = cell
    nx, ny, nz = shape
    dy, dz = ly / ny, lz / nz
    v_i, w_i = lines[i] % ny, lines[i] // ny
    limit = radius * radius
    m = 0
    w_first = math.floor((z[i] - radius) / dz - _GUARD)
    w_last = math.floor((z[i] + radius) / dz + _GUARD)
    if half:
        w_first = w_i
    for w in range(w_first, w_last + 1):
        gap_z = max(0.0, w * dz - z[i], z[i] - (w + 1) * dz)
        rest = limit - gap_z * gap_z
        if rest <= 0.0:
            continue
        reach = math.sqrt(rest)
        image_c = math.floor(w / nz)
        w_in = w - image_c * nz
        # y of the layer's atoms: b ly plus what the tilt adds.
        low_y, high_y = w * yz / nz, (w + 1) * yz / nz
        if low_y > high_y:
            low_y, high_y = high_y, low_y
        v_first = math.floor((y[i] - reach - high_y) / dy - _GUARD)
        v_last = math.floor((y[i] + reach - low_y) / dy + _GUARD)
        if half and w == w_i:
            v_first = v_i
        for v in range(v_first, v_last + 1):
            gap_y = max(0.0, v * dy + low_y - y[i], y[i] - (v + 1) * dy - high_y)
            left = rest - gap_y * gap_y
            if left <= 0.0:
                continue
            side = math.sqrt(left)
            image_b = math.floor(v / ny)
            v_in = v - image_b * ny
            low_x = min(v * xy / ny, (v + 1) * xy / ny) + min(
                w * xz / nz, (w + 1) * xz / nz
            )
            high_x = max(v * xy / ny, (v + 1) * xy / ny) + max(
                w * xz / nz, (w + 1) * xz / nz
            )
            u_first = math.floor((x[i] - side - high_x) * nx / lx - _GUARD)
            u_last = math.floor((x[i] + side - low_x) * nx / lx + _GUARD)
            own = half and w == w_i and v == v_i
            line = (w_in * ny + v_in) * nx
            for image_a in range(math.floor(u_first / nx), math.floor(u_last / nx) + 1):
                if own and image_a < 0:
                    continue
                u_low = max(0, u_first - image_a * nx)
                u_high = min(nx - 1, u_last - image_a * nx)
                first, last = starts[line + u_low], starts[line + u_high + 1]
                if own and image_a == 0:
                    first = max(first, i + 1)
                if first >= last:
                    continue
                if m == runs.shape[0]:
                    return -1
                runs[m, 0], runs[m, 1] = first, last
                shifts[m, 0] = image_a * lx + image_b * xy + image_c * xz
                shifts[m, 1] = image_b * ly + image_c * yz
                shifts[m, 2] = image_c * lz
                m += 1
    return m


@jit
def count_distances(
    radius, n_bins, n_types, cell, shape, starts, x, y, z, kinds, lines
):
    """Count pairs by their types and distance, each pair once.

    Returns
    -------
    numpy.ndarray
        ``(n_types, n_types, n_bins) int64``: the order of the two types is that in
        which the pair was met.
    """
    n = x.shape[0]
    counts = np.zeros((n_types, n_types, n_bins + 1), np.int64)
    room = 256
    runs, shifts = np.empty((room, 2), np.int64), np.empty((room, 3))
    places = np.empty(64, np.int64)
    limit = radius * radius
    scale = n_bins / radius
    for i in range(n):
        m = find_runs(
            i, True, radius, cell, shape, starts, x, y, z, lines, runs, shifts
        )
        while m < 0:
            room *= 2
            runs, shifts = np.empty((room, 2), np.int64), np.empty((room, 3))
            m = find_runs(
                i, True, radius, cell, shape, starts, x, y, z, lines, runs, shifts
            )
        mine = counts[kinds[i]]
        for k in range(m):
            xi = x[i] - shifts[k, 0]
            yi = y[i] - shifts[k, 1]
            zi = z[i] - shifts[k, 2]
            for begin in range(runs[k, 0], runs[k, 1], 64):
                size = min(64, runs[k, 1] - begin)
                # First all places, which the processor does several at a time.
                for q in range(size):
                    dx, dy = x[begin + q] - xi, y[begin + q] - yi
                    dz = z[begin + q] - zi
                    d = dx * dx + dy * dy + dz * dz
                    place = np.int64(math.sqrt(d) * scale)
                    places[q] = min(place, n_bins - 1) if d < limit else n_bins
                for q in range(size):
                    mine[kinds[begin + q], places[q]] += 1
    return counts[:, :, :n_bins]


@jit
def count_angles(cutoffs, n_bins, n_types, cell, shape, starts, x, y, z, kinds, lines):
    """Count the angles between the neighbours of every atom.

    Parameters
    ----------
    cutoffs
        ``(n_types, n_types) float64``, Å: how far a neighbour is, by types.

    Returns
    -------
    numpy.ndarray
        ``(n_types, n_types, n_types, n_bins) int64``: centre, both ends with the
        lower type first.
    """
    n = x.shape[0]
    counts = np.zeros((n_types, n_types, n_types, n_bins), np.int64)
    radius = cutoffs.max()
    room, most = 256, 64
    runs, shifts = np.empty((room, 2), np.int64), np.empty((room, 3))
    found, kind = np.empty((most, 3)), np.empty(most, np.int64)
    scale = n_bins / math.pi
    for i in range(n):
        m = find_runs(
            i, False, radius, cell, shape, starts, x, y, z, lines, runs, shifts
        )
        while m < 0:
            room *= 2
            runs, shifts = np.empty((room, 2), np.int64), np.empty((room, 3))
            m = find_runs(
                i, False, radius, cell, shape, starts, x, y, z, lines, runs, shifts
            )
        size = 0
        for k in range(m):
            xi = x[i] - shifts[k, 0]
            yi = y[i] - shifts[k, 1]
            zi = z[i] - shifts[k, 2]
            for j in range(runs[k, 0], runs[k, 1]):
                dx, dy, dz = x[j] - xi, y[j] - yi, z[j] - zi
                d = math.sqrt(dx * dx + dy * dy + dz * dz)
                # The atom itself, and atoms on top of it, have no direction.
                if d < 1e-6 or d >= cutoffs[kinds[i], kinds[j]]:
                    continue
                if size == most:
                    more, kinds_of_more = (
                        np.empty((2 * most, 3)),
                        np.empty(2 * most, np.int64),
                    )
                    more[:most] = found
                    kinds_of_more[:most] = kind
                    found, kind, most = more, kinds_of_more, 2 * most
                found[size, 0], found[size, 1], found[size, 2] = dx / d, dy / d, dz / d
                kind[size] = kinds[j]
                size += 1
        for p in range(size):
            for q in range(p):
                cosine = (
                    found[p, 0] * found[q, 0]
                    + found[p, 1] * found[q, 1]
                    + found[p, 2] * found[q, 2]
                )
                angle = math.acos(max(-1.0, min(1.0, cosine)))
                place = min(n_bins - 1, int(angle * scale))
                low, high = min(kind[p], kind[q]), max(kind[p], kind[q])
                counts[kinds[i], low, high, place] += 1
    return counts
