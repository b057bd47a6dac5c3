"""Compiled loops of the neighbour search; see :mod:`nanoos_fw.ml.neighbors`.

numba compiles these functions on their first call and keeps the machine code on
disk. Nothing here reorders floating-point operations (no ``fastmath``).

Notation: the cell is ``[[l00, 0, 0], [l10, l11, 0], [l20, l21, l22]]`` (Å), a rotated
copy of the reduced lattice. In this frame the images of an atom within a sphere can
be enumerated without trying others: layers of the third vector that the sphere cuts,
in each layer the lines that it cuts, on each line the points in between [1]_.

References
----------
.. [1] U. Fincke, M. Pohst, Math. Comput. 44, 463 (1985).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

from nanoos_fw.ml.lattices import (
    CUTOFF_TOLERANCE,
    MAX_EDGES,
    MIN_DISTANCE,
    OVERFLOW,
    TOO_MANY,
    prepare_cell,
    wrap_sites,
)

_F = TypeVar("_F", bound=Callable[..., Any])

# Guards the borders of ranges of lattice steps against rounding. A range that is too
# wide by this costs nothing: every point in it is measured.
_STEP = 1e-9
# From this many sites on, sites are sorted into bins.
_BINNED_SITES = 14
_ONE = np.uint64(1)
# Å² per Å of radius: what a sum in another order may be off.
SLACK = 1e-6


def jit(function: _F) -> _F:
    """Compile a function on its first call; keep the machine code on disk."""
    try:
        return cast("_F", numba.njit(cache=True, error_model="numpy")(function))
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written to.
        return cast("_F", numba.njit(error_model="numpy")(function))


compiled_prepare_cell = jit(prepare_cell)
compiled_wrap_sites = jit(wrap_sites)


@jit
def gather_pairs(i, n, pos, cell, limit, m, found_j, found_s, found_d):
    """Find the images of all sites within sqrt(limit) of site i; -1: no room."""
    l00, l10, l11 = cell[0], cell[1], cell[2]
    l20, l21, l22 = cell[3], cell[4], cell[5]
    inv0, inv1, inv2 = 1.0 / l00, 1.0 / l11, 1.0 / l22
    room = found_j.shape[0]
    radius = math.sqrt(limit)
    xi, yi, zi = pos[i, 0], pos[i, 1], pos[i, 2]
    start = m
    for j in range(n):
        x0, y0, z0 = pos[j, 0] - xi, pos[j, 1] - yi, pos[j, 2] - zi
        c_first = math.ceil((-radius - z0) * inv2 - _STEP)
        c_last = math.floor((radius - z0) * inv2 + _STEP)
        for c in range(c_first, c_last + 1):
            z = z0 + c * l22
            rest = limit - z * z
            if rest <= 0.0:
                continue
            y1 = y0 + c * l21
            x1 = x0 + c * l20
            half = math.sqrt(rest)
            b_first = math.ceil((-half - y1) * inv1 - _STEP)
            b_last = math.floor((half - y1) * inv1 + _STEP)
            for b in range(b_first, b_last + 1):
                y = y1 + b * l11
                left = rest - y * y
                if left <= 0.0:
                    continue
                x2 = x1 + b * l10
                side = math.sqrt(left)
                a_first = math.ceil((-side - x2) * inv0 - _STEP)
                a_last = math.floor((side - x2) * inv0 + _STEP)
                if m + a_last - a_first + 1 > room:
                    return -1
                for a in range(a_first, a_last + 1):
                    x = x2 + a * l00
                    d = x * x + y * y + z * z
                    if d < limit and (i != j or a != 0 or b != 0 or c != 0):
                        found_j[m] = j
                        found_s[m, 0] = a
                        found_s[m, 1] = b
                        found_s[m, 2] = c
                        found_d[m] = d
                        m += 1
    return m - start


@jit
def fill_bins(n, frac, pos, cell, width, bins):
    """Sort sites into bins; return starts of the bins, sites, positions."""
    bins[0] = max(1, min(1024, int(cell[0] / width)))
    bins[1] = max(1, min(1024, int(cell[2] / width)))
    bins[2] = max(1, min(1024, int(cell[5] / width)))
    while bins[0] * bins[1] * bins[2] > 8 * n:
        largest = 0
        for k in range(1, 3):
            if bins[k] > bins[largest]:
                largest = k
        bins[largest] = (bins[largest] + 1) // 2
    total = bins[0] * bins[1] * bins[2]
    starts = np.zeros(total + 1, np.int64)
    bin_of = np.empty(n, np.int64)
    for i in range(n):
        u0 = min(bins[0] - 1, int(frac[i, 0] * bins[0]))
        u1 = min(bins[1] - 1, int(frac[i, 1] * bins[1]))
        u2 = min(bins[2] - 1, int(frac[i, 2] * bins[2]))
        bin_of[i] = (u2 * bins[1] + u1) * bins[0] + u0
        starts[bin_of[i] + 1] += 1
    for u in range(total):
        starts[u + 1] += starts[u]
    cursor = starts[:-1].copy()
    sites = np.empty(n, np.int64)
    sorted_pos = np.empty((3, n), np.float64)
    for i in range(n):
        p = cursor[bin_of[i]]
        cursor[bin_of[i]] += 1
        sites[p] = i
        for k in range(3):
            sorted_pos[k, p] = pos[i, k]
    return starts, sites, sorted_pos


@jit
def gather_bins(
    i,
    pos,
    cell,
    limit,
    bins,
    starts,
    sites,
    sorted_pos,
    scratch,
    base,
    found_j,
    found_s,
    found_d,
):
    """Do what gather_pairs does, looking only into bins that the sphere cuts.

    Distances of all candidates first, then their comparison, then the output: loops
    without branches that a processor could guess wrong.
    """
    squared, segment, segments, moves, hits = scratch
    l00, l10, l11 = cell[0], cell[1], cell[2]
    l20, l21, l22 = cell[3], cell[4], cell[5]
    n0, n1, n2 = bins[0], bins[1], bins[2]
    space = squared.shape[0]
    radius = math.sqrt(limit)
    xi, yi, zi = pos[i, 0], pos[i, 1], pos[i, 2]
    px, py, pz = sorted_pos[0], sorted_pos[1], sorted_pos[2]
    count = 0
    runs = 0
    first2 = math.floor((zi - radius) / l22 * n2 - _STEP)
    last2 = math.floor((zi + radius) / l22 * n2 + _STEP)
    for u2 in range(first2, last2 + 1):
        f2, g2 = u2 / n2, (u2 + 1) / n2
        gap = max(0.0, f2 * l22 - zi, zi - g2 * l22)
        rest = max(0.0, limit - gap * gap)
        s2 = u2 // n2
        ylow, yhigh = min(f2 * l21, g2 * l21), max(f2 * l21, g2 * l21)
        half = math.sqrt(rest)
        first1 = math.floor((yi - half - yhigh) / l11 * n1 - _STEP)
        last1 = math.floor((yi + half - ylow) / l11 * n1 + _STEP)
        for u1 in range(first1, last1 + 1):
            f1, g1 = u1 / n1, (u1 + 1) / n1
            gap = max(0.0, f1 * l11 + ylow - yi, yi - g1 * l11 - yhigh)
            left = max(0.0, rest - gap * gap)
            s1 = u1 // n1
            xlow = min(f2 * l20, g2 * l20) + min(f1 * l10, g1 * l10)
            xhigh = max(f2 * l20, g2 * l20) + max(f1 * l10, g1 * l10)
            side = math.sqrt(left)
            first0 = math.floor((xi - side - xhigh) / l00 * n0 - _STEP)
            last0 = math.floor((xi + side - xlow) / l00 * n0 + _STEP)
            row = ((u2 - s2 * n2) * n1 + (u1 - s1 * n1)) * n0
            ty, tz = s1 * l11 + s2 * l21 - yi, s2 * l22 - zi
            for s0 in range(first0 // n0, last0 // n0 + 1):
                begin = starts[row + max(first0 - s0 * n0, 0)]
                end = starts[row + min(last0 - s0 * n0, n0 - 1) + 1]
                if end == begin:
                    continue
                stop = count + end - begin
                if stop > space or runs >= segments.shape[0]:
                    return -2
                tx = s0 * l00 + s1 * l10 + s2 * l20 - xi
                # Unsigned: an index that might be negative keeps the loop scalar.
                shift = np.uint64(begin - count)
                for q in range(np.uint64(count), np.uint64(stop)):
                    x, y, z = px[q + shift] + tx, py[q + shift] + ty, pz[q + shift] + tz
                    squared[q] = x * x + y * y + z * z
                    segment[q] = runs
                if s0 == 0 and s1 == 0 and s2 == 0:
                    for p in range(begin, end):
                        if sites[p] == i:
                            squared[count + p - begin] = np.inf
                moves[runs] = shift
                segments[runs, 0] = s0
                segments[runs, 1] = s1
                segments[runs, 2] = s2
                runs += 1
                count = stop
    m = 0
    for q in range(np.uint64(count)):
        hits[m] = q
        m += squared[q] < limit
    if base + m > found_j.shape[0]:
        return -1
    start = np.uint64(base)
    for h in range(np.uint64(m)):
        q = hits[h]
        run = np.uint64(segment[q])
        e = start + h
        found_j[e] = sites[q + moves[run]]
        found_s[e, 0] = segments[run, 0]
        found_s[e, 1] = segments[run, 1]
        found_s[e, 2] = segments[run, 2]
        found_d[e] = squared[q]
    return m


@jit
def new_images(space):
    """Return room for the images near a bin: positions, places, runs, cells, work."""
    return (
        np.empty((3, space), np.float64),
        np.empty(space, np.uint64),
        np.empty(space, np.uint64),
        np.empty((space, 3), np.int64),
        np.empty(space, np.float64),
        np.empty(space + 1, np.uint64),
    )


@jit
def gather_images(begin, end, cell, limit, bins, starts, sorted_pos, images, home):
    """List images that may be within sqrt(limit) of a bin's sites; -1: no room.

    Bins are looked for once for all sites of a bin, and images far from the box that
    holds these are left out.

    Parameters
    ----------
    begin, end
        The places of the sites among those sorted into bins.
    images
        Of :func:`new_images`, written: position of each image in the frame of the
        cell; place of its site; its run; the cell of each run.
    home
        ``(n_sites,) uint64``, written for the sites of the bin: which image each is.
    """
    where, places, runs, cells, _, _ = images
    gx, gy, gz = where[0], where[1], where[2]
    px, py, pz = sorted_pos[0], sorted_pos[1], sorted_pos[2]
    l00, l10, l11 = cell[0], cell[1], cell[2]
    l20, l21, l22 = cell[3], cell[4], cell[5]
    n0, n1, n2 = bins[0], bins[1], bins[2]
    xlo = xhi = px[begin]
    ylo = yhi = py[begin]
    zlo = zhi = pz[begin]
    for p in range(begin + 1, end):
        xlo, xhi = min(xlo, px[p]), max(xhi, px[p])
        ylo, yhi = min(ylo, py[p]), max(yhi, py[p])
        zlo, zhi = min(zlo, pz[p]), max(zhi, pz[p])
    xmid, ymid, zmid = 0.5 * (xlo + xhi), 0.5 * (ylo + yhi), 0.5 * (zlo + zhi)
    xhalf, yhalf, zhalf = 0.5 * (xhi - xlo), 0.5 * (yhi - ylo), 0.5 * (zhi - zlo)
    radius = math.sqrt(limit)
    wide = limit + SLACK * (1.0 + radius)
    space = places.shape[0]
    count = np.uint64(0)
    run = np.uint64(0)
    first2 = math.floor((zlo - radius) / l22 * n2 - _STEP)
    last2 = math.floor((zhi + radius) / l22 * n2 + _STEP)
    for u2 in range(first2, last2 + 1):
        f2, g2 = u2 / n2, (u2 + 1) / n2
        gap = max(0.0, f2 * l22 - zhi, zlo - g2 * l22)
        rest = max(0.0, limit - gap * gap)
        s2 = u2 // n2
        ylow, yhigh = min(f2 * l21, g2 * l21), max(f2 * l21, g2 * l21)
        half = math.sqrt(rest)
        first1 = math.floor((ylo - half - yhigh) / l11 * n1 - _STEP)
        last1 = math.floor((yhi + half - ylow) / l11 * n1 + _STEP)
        for u1 in range(first1, last1 + 1):
            f1, g1 = u1 / n1, (u1 + 1) / n1
            gap = max(0.0, f1 * l11 + ylow - yhi, ylo - g1 * l11 - yhigh)
            left = max(0.0, rest - gap * gap)
            s1 = u1 // n1
            xlow = min(f2 * l20, g2 * l20) + min(f1 * l10, g1 * l10)
            xhigh = max(f2 * l20, g2 * l20) + max(f1 * l10, g1 * l10)
            side = math.sqrt(left)
            first0 = math.floor((xlo - side - xhigh) / l00 * n0 - _STEP)
            last0 = math.floor((xhi + side - xlow) / l00 * n0 + _STEP)
            row = ((u2 - s2 * n2) * n1 + (u1 - s1 * n1)) * n0
            ty, tz = s1 * l11 + s2 * l21, s2 * l22
            for s0 in range(first0 // n0, last0 // n0 + 1):
                low = starts[row + max(first0 - s0 * n0, 0)]
                high = starts[row + min(last0 - s0 * n0, n0 - 1) + 1]
                if low == high:
                    continue
                if np.int64(count) + high - low > space or np.int64(run) >= space:
                    return -1
                tx = s0 * l00 + s1 * l10 + s2 * l20
                if s0 == 0 and s1 == 0 and s2 == 0 and low <= begin < high:
                    inside, last = np.uint64(begin), np.uint64(end)
                else:
                    inside = last = np.uint64(0)
                for p in range(np.uint64(low), np.uint64(high)):
                    x, y, z = px[p] + tx, py[p] + ty, pz[p] + tz
                    if inside <= p < last:
                        home[p] = count
                    gx[count] = x
                    gy[count] = y
                    gz[count] = z
                    places[count] = p
                    runs[count] = run
                    dx = max(abs(x - xmid) - xhalf, 0.0)
                    dy = max(abs(y - ymid) - yhalf, 0.0)
                    dz = max(abs(z - zmid) - zhalf, 0.0)
                    count += np.uint64(dx * dx + dy * dy + dz * dz < wide)
                cells[run, 0] = s0
                cells[run, 1] = s1
                cells[run, 2] = s2
                run += _ONE
    return np.int64(count)


@jit
def gather_near(p, sorted_pos, cell, limit, binned, count, images, home, found_d):
    """Choose the images within sqrt(limit) of a site; return how many.

    The sums are in the order of :func:`gather_bins` or :func:`gather_pairs`, so that
    the same distances come out to the last bit.
    """
    where, places, runs, cells, squared, hits = images
    gx, gy, gz = where[0], where[1], where[2]
    px, py, pz = sorted_pos[0], sorted_pos[1], sorted_pos[2]
    l00, l10, l11 = cell[0], cell[1], cell[2]
    l20, l21, l22 = cell[3], cell[4], cell[5]
    xi, yi, zi = px[p], py[p], pz[p]
    wide = limit + SLACK * (1.0 + math.sqrt(limit))
    for q in range(np.uint64(count)):
        x, y, z = gx[q] - xi, gy[q] - yi, gz[q] - zi
        squared[q] = x * x + y * y + z * z
    squared[home[p]] = np.inf
    near = np.uint64(0)
    for q in range(np.uint64(count)):
        hits[near] = q
        near += np.uint64(squared[q] < wide)
    m = np.uint64(0)
    for h in range(near):
        q = hits[h]
        j, run = places[q], runs[q]
        s0, s1, s2 = cells[run, 0], cells[run, 1], cells[run, 2]
        if binned:
            x = px[j] + (s0 * l00 + s1 * l10 + s2 * l20 - xi)
            y = py[j] + (s1 * l11 + s2 * l21 - yi)
            z = pz[j] + (s2 * l22 - zi)
        else:
            x = px[j] - xi + s2 * l20 + s1 * l10 + s0 * l00
            y = py[j] - yi + s2 * l21 + s1 * l11
            z = pz[j] - zi + s2 * l22
        d = x * x + y * y + z * z
        found_d[m] = d
        hits[m] = q
        m += np.uint64(d < limit)
    return np.int64(m)


@jit
def new_scratch(space):
    """Return squared distances, their runs, the runs, places of sites, hits."""
    return (
        np.empty(space, np.float64),
        np.empty(space, np.uint32),
        np.empty((space, 3), np.int32),
        np.empty(space, np.uint64),
        np.empty(space + 1, np.uint64),
    )


@jit
def expected_edges(lattices, atom_start, cutoff):
    """Return room for the edges of all structures, so that arrays rarely grow.

    Memory that is never written to costs nothing; copying a growing array does.
    """
    room = 1024.0
    for g in range(lattices.shape[0]):
        a, b, c = lattices[g, 0], lattices[g, 1], lattices[g, 2]
        volume = abs(
            a[0] * (b[1] * c[2] - b[2] * c[1])
            + a[1] * (b[2] * c[0] - b[0] * c[2])
            + a[2] * (b[0] * c[1] - b[1] * c[0])
        )
        n = atom_start[g + 1] - atom_start[g]
        if volume >= MIN_DISTANCE**3:
            expected = n * n * 4.18879020478639 * cutoff**3 / volume
            if expected <= MAX_EDGES:
                room += 1.3 * expected + 64.0
    return int(min(room, 1.5 * MAX_EDGES))


@jit
def fits_int32(value):
    """Tell whether an integer fits into 32 bits."""
    return -2147483648 <= value <= 2147483647


@jit
def list_all(lattices, frac_coords, atom_start, cutoff):
    """List all neighbours; within one centre the order has no meaning."""
    n_cells = lattices.shape[0]
    n_atoms = frac_coords.shape[0]
    largest = 0
    for g in range(n_cells):
        largest = max(largest, atom_start[g + 1] - atom_start[g])
    frac = np.empty((largest, 3), np.float64)
    pos = np.empty((largest, 3), np.float64)
    shift = np.empty((largest, 3), np.int64)
    cell = np.empty(6, np.float64)
    transform = np.empty((3, 3), np.int64)
    bins = np.empty(3, np.int64)
    scratch = new_scratch(512)
    degrees = np.zeros(n_atoms, np.int64)
    status = np.zeros(n_cells, np.int64)
    detail = np.zeros((n_cells, 3), np.float64)
    room = expected_edges(lattices, atom_start, cutoff)
    neighbor = np.empty(room, np.int32)
    offsets = np.empty((room, 3), np.int32)
    distances = np.empty(room, np.float64)
    limit = cutoff * cutoff + CUTOFF_TOLERANCE
    total = 0
    for g in range(n_cells):
        first, last = atom_start[g], atom_start[g + 1]
        n = last - first
        code, volume, plain = compiled_prepare_cell(lattices[g], cell, transform)
        if code == 0:
            code = compiled_wrap_sites(
                frac_coords[first:last], cell, transform, plain, frac, pos, shift
            )
        expected = 0.0
        if code == 0:
            expected = n * n * 4.18879020478639 * cutoff**3 / volume
            if expected > MAX_EDGES:
                code = TOO_MANY
                detail[g, 2] = expected
        status[g] = code
        if code != 0:
            continue
        begin = total
        binned = n >= _BINNED_SITES
        if binned:
            starts, sites, sorted_pos = fill_bins(
                n, frac, pos, cell, cutoff * 1.3, bins
            )
        else:
            starts, sites = np.empty(0, np.int64), np.empty(0, np.int64)
            sorted_pos = np.empty((3, 0), np.float64)
        for i in range(n):
            while True:
                if binned:
                    m = gather_bins(
                        i,
                        pos,
                        cell,
                        limit,
                        bins,
                        starts,
                        sites,
                        sorted_pos,
                        scratch,
                        total,
                        neighbor,
                        offsets,
                        distances,
                    )
                else:
                    m = gather_pairs(
                        i,
                        n,
                        pos,
                        cell,
                        limit,
                        total,
                        neighbor,
                        offsets,
                        distances,
                    )
                if m >= 0:
                    break
                if m == -2:
                    scratch = new_scratch(2 * scratch[0].shape[0])
                    continue
                grown = max(2 * room, total + int(1.2 * expected) + 1024)
                new_neighbor = np.empty(grown, np.int32)
                new_offsets = np.empty((grown, 3), np.int32)
                new_distances = np.empty(grown, np.float64)
                new_neighbor[:total] = neighbor[:total]
                new_offsets[:total] = offsets[:total]
                new_distances[:total] = distances[:total]
                neighbor, offsets, distances = new_neighbor, new_offsets, new_distances
                room = grown
            degrees[first + i] = m
            total += m
        for e in range(np.uint64(begin), np.uint64(total)):
            distances[e] = math.sqrt(distances[e])
        if not _home_offsets(
            n,
            degrees[first:last],
            neighbor[begin:],
            offsets[begin:],
            shift,
            transform,
            plain,
        ):
            status[g] = OVERFLOW
            degrees[first:last] = 0
            total = begin
    return degrees, neighbor[:total], offsets[:total], distances[:total], status, detail


@jit
def _home_offsets(n, degrees, neighbor, offsets, shift, transform, plain):
    """Turn offsets between wrapped sites into those of the sites as given."""
    moved = False
    for i in range(n):
        for k in range(3):
            moved = moved or shift[i, k] != 0
    if plain and not moved:
        return True
    good = True
    e = 0
    for i in range(n):
        for _ in range(degrees[i]):
            j = neighbor[e]
            s0 = offsets[e, 0] - shift[j, 0] + shift[i, 0]
            s1 = offsets[e, 1] - shift[j, 1] + shift[i, 1]
            s2 = offsets[e, 2] - shift[j, 2] + shift[i, 2]
            if plain:
                # The steps of wrap_sites are below 1e6 cells.
                offsets[e, 0] = s0
                offsets[e, 1] = s1
                offsets[e, 2] = s2
                e += 1
                continue
            for k in range(3):
                value = s0 * transform[0, k] + s1 * transform[1, k]
                value += s2 * transform[2, k]
                good = good and fits_int32(value)
                offsets[e, k] = value
            e += 1
    return good
