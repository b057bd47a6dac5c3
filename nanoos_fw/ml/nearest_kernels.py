"""Compiled choice and order of nearest neighbours; see :mod:`.neighbor_kernels`."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import math

import numpy as np

from nanoos_fw.ml.lattices import (
    CLOSE,
    CUTOFF_TOLERANCE,
    ENVIRONMENT_TOLERANCE,
    ISOLATED,
    MAX_EDGES,
    MIN_DISTANCE,
    OVERFLOW,
    TIE_TOLERANCE,
    TOO_MANY,
)
from nanoos_fw.ml.neighbor_kernels import (
    compiled_prepare_cell,
    compiled_wrap_sites,
    expected_edges,
    fill_bins,
    fits_int32,
    gather_bins,
    gather_images,
    gather_near,
    gather_pairs,
    jit,
    list_all,
    new_images,
    new_scratch,
)

__all__ = ["expand", "list_all", "list_sorted"]

# From this many sites on, sites are sorted into bins.
_BINNED_SITES = 14
_INSERTION = 32
# Members of a bucket that are sorted by insertion: a shell of equal distances, say.
_FULL_BUCKET = 200
_ONE = np.uint64(1)


@jit
def _deal_out(m, found_d, order, keys):
    """Write indices into ``order[:m]`` by bucket; False if one would be too full.

    Evenly spread sites are so many below a distance as its cube says, so that buckets
    of equal steps of the cube hold about one each. Equal distances keep their order.
    """
    largest = 0.0
    for a in range(np.uint64(m)):
        largest = max(largest, found_d[a])
    scale = (m - 1) / (largest * math.sqrt(largest))
    if not scale < np.inf:
        return False
    ends = np.zeros(m + 1, np.int64)
    for a in range(np.uint64(m)):
        d = found_d[a]
        bucket = min(np.int64(d * math.sqrt(d) * scale), m - 1)
        keys[a] = bucket
        ends[bucket + 1] += 1
    for bucket in range(m):
        if ends[bucket + 1] > _FULL_BUCKET:
            return False
        ends[bucket + 1] += ends[bucket]
    for a in range(m):
        bucket = keys[a]
        order[ends[bucket]] = a
        ends[bucket] += 1
    return True


@jit
def _sort_by_distance(m, found_d, order, keys):
    """Write the order of increasing distance into ``order[:m]``."""
    bits = 1
    while (1 << bits) < m:
        bits += 1
    mask = (1 << bits) - 1
    # Positive doubles sort like the integers of the same bits: put the index in the
    # lowest bits, sort the integers, then mend what the lost bits decided.
    view = found_d.view(np.int64)
    if m <= _INSERTION:
        # How many are below each: without branches, and keys differ.
        for a in range(np.uint64(m)):
            keys[a] = (view[a] & ~mask) | np.int64(a)
        for a in range(np.uint64(m)):
            key = keys[a]
            below = np.int64(0)
            for b in range(np.uint64(m)):
                below += np.int64(keys[b] < key)
            order[np.uint64(below)] = np.int64(a)
    elif m <= 2 * _INSERTION:
        for a in range(np.uint64(m)):
            key = (view[a] & ~mask) | np.int64(a)
            place = np.uint64(a)
            while place > 0 and keys[place - _ONE] > key:
                keys[place] = keys[place - _ONE]
                place -= _ONE
            keys[place] = key
    elif _deal_out(m, found_d, order, keys):
        # Almost sorted now: what is left is order within a bucket.
        for a in range(1, m):
            index = order[a]
            d = found_d[index]
            b = a
            while b > 0 and found_d[order[b - 1]] > d:
                order[b] = order[b - 1]
                b -= 1
            order[b] = index
        return
    else:
        for a in range(m):
            keys[a] = (view[a] & ~mask) | a
        keys[:m] = np.sort(keys[:m])
    for a in range(m if m > _INSERTION else 0):
        index = keys[a] & mask
        d = found_d[index]
        b = a
        while b > 0 and found_d[order[b - 1]] > d:
            order[b] = order[b - 1]
            b -= 1
        order[b] = index
    for a in range(1, m if m <= _INSERTION else 0):
        index = order[a]
        d = found_d[index]
        b = a
        while b > 0 and found_d[order[b - 1]] > d:
            order[b] = order[b - 1]
            b -= 1
        order[b] = index


@jit
def _before(e, f, rank, site, offsets):
    """Compare edges by rank (element, environment), site, cell."""
    if rank[e] != rank[f]:
        return rank[e] < rank[f]
    if site[e] != site[f]:
        return site[e] < site[f]
    for k in range(3):
        if offsets[e, k] != offsets[f, k]:
            return offsets[e, k] < offsets[f, k]
    return False


@jit
def _sort_shell(order, first, last, rank, site, offsets):
    """Sort ``order[first:last]``: by insertion, or as a heap where there are many."""
    n = last - first
    if n <= _INSERTION:
        for a in range(first + 1, last):
            e = order[a]
            b = a
            while b > first and _before(e, order[b - 1], rank, site, offsets):
                order[b] = order[b - 1]
                b -= 1
            order[b] = e
        return
    for top in range(n // 2 - 1, -n, -1):
        if top >= 0:
            root, end = top, n
        else:
            end = n + top
            order[first], order[first + end] = order[first + end], order[first]
            root = 0
        while True:
            child = 2 * root + 1
            if child >= end:
                break
            if child + 1 < end and _before(
                order[first + child], order[first + child + 1], rank, site, offsets
            ):
                child += 1
            if not _before(
                order[first + root], order[first + child], rank, site, offsets
            ):
                break
            order[first + root], order[first + child] = (
                order[first + child],
                order[first + root],
            )
            root = child


@jit
def _has_ties(n, numbers, tied, edge_begin, edge_end, site, shell):
    """Tell whether two different sites of one element share a shell."""
    for i in range(n):
        if not tied[i]:
            continue
        for e in range(edge_begin[i] + 1, edge_end[i]):
            f = e - 1
            while f >= edge_begin[i] and shell[f] == shell[e]:
                if site[f] != site[e] and numbers[site[f]] == numbers[site[e]]:
                    return True
                f -= 1
    return False


@jit
def _classify(n, numbers, edge_begin, edge_end, site, far, classes):
    """Write the class of each atom's environment."""
    environment = np.empty(n, np.float64)
    for i in range(n):
        value = 0.0
        for e in range(edge_begin[i], edge_end[i]):
            value += numbers[site[e]] * math.exp(-far[e])
        environment[i] = value
    by_value = np.argsort(environment)
    number = 0
    for a in range(1, n):
        step = environment[by_value[a]] - environment[by_value[a - 1]]
        if step > ENVIRONMENT_TOLERANCE:
            number += 1
        classes[by_value[a]] = number


@jit
def list_sorted(lattices, frac_coords, numbers, atom_start, cutoff, k):
    """List the k nearest (0: all) in the order of nanoos_fw.ml.graphs."""
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
    # Of the sites of one bin: images that may be neighbours of some of them.
    space = 256
    images = new_images(space)
    home = np.empty(largest, np.uint64)
    scratch = new_scratch(1)
    degrees = np.zeros(n_atoms, np.int64)
    status = np.zeros(n_cells, np.int64)
    detail = np.zeros((n_cells, 3), np.float64)
    room = n_atoms * k if k > 0 else expected_edges(lattices, atom_start, cutoff)
    neighbor = np.empty(room, np.int32)
    offsets = np.empty((room, 3), np.int32)
    distances = np.empty(room, np.float64)
    # Of one atom: what is within the radius.
    wide = 256
    found_j = np.empty(wide, np.int64)
    found_s = np.empty((wide, 3), np.int64)
    found_d = np.empty(wide, np.float64)
    order = np.empty(wide, np.int64)
    keys = np.empty(wide, np.int64)
    # Of one structure: what is up to the end of the shell of the k-th neighbour.
    # Little: what is given back to the system at each call is slow to get again.
    kept = (max(k, 16) + 4) * max(largest, 1)
    site = np.empty(kept, np.int64)
    far = np.empty(kept, np.float64)
    cells = np.empty((kept, 3), np.int64)
    shell = np.empty(kept, np.int64)
    rank = np.empty(0, np.int64)
    sequence = np.empty(0, np.int64)
    tied = np.empty(largest, np.bool_)
    edge_begin = np.empty(largest, np.int64)
    edge_end = np.empty(largest, np.int64)
    classes = np.empty(largest, np.int64)
    total = 0
    for g in range(n_cells):
        first, last = atom_start[g], atom_start[g + 1]
        n = last - first
        code, volume, plain = compiled_prepare_cell(lattices[g], cell, transform)
        if code == 0:
            code = compiled_wrap_sites(
                frac_coords[first:last], cell, transform, plain, frac, pos, shift
            )
        if code == 0 and k == 0:
            expected = n * n * 4.18879020478639 * cutoff**3 / volume
            if expected > MAX_EDGES:
                code = TOO_MANY
                detail[g, 2] = expected
        if code == 0 and cell[0] < MIN_DISTANCE and cell[0] <= cutoff:
            code = CLOSE
            detail[g, 2] = cell[0]
        status[g] = code
        if code != 0:
            continue
        start_radius = cutoff
        if k > 0:
            # Measured: smaller spheres are widened too often, larger ones hold more
            # sites than need be sorted.
            guess = ((1.5 * k + 1) * volume / n * 0.75 / math.pi) ** (1.0 / 3.0)
            start_radius = min(cutoff, guess)
        binned = n >= _BINNED_SITES
        if binned:
            starts, sites, sorted_pos = fill_bins(
                n, frac, pos, cell, start_radius * 1.3, bins
            )
        else:
            bins[:] = 1
            starts, sites = np.empty(2, np.int64), np.empty(n, np.int64)
            sorted_pos = np.empty((3, n), np.float64)
            starts[0], starts[1] = 0, n
            for i in range(n):
                sites[i] = i
                for h in range(3):
                    sorted_pos[h, i] = pos[i, h]
        used = 0
        count = 0
        failed = n
        here = 0
        for p in range(n):
            i = sites[p]
            while starts[here + 1] <= p:
                here += 1
            if k > 0 and starts[here] == p:
                limit = start_radius * start_radius + CUTOFF_TOLERANCE
                while True:
                    count = gather_images(
                        p,
                        starts[here + 1],
                        cell,
                        limit,
                        bins,
                        starts,
                        sorted_pos,
                        images,
                        home,
                    )
                    if count >= 0:
                        break
                    space *= 2
                    images = new_images(space)
            radius = start_radius
            chosen = k > 0
            while True:
                limit = radius * radius + CUTOFF_TOLERANCE
                if chosen:
                    if wide < count:
                        wide = 2 * count
                        found_j = np.empty(wide, np.int64)
                        found_s = np.empty((wide, 3), np.int64)
                        found_d = np.empty(wide, np.float64)
                        order = np.empty(wide, np.int64)
                        keys = np.empty(wide, np.int64)
                    m = gather_near(
                        p,
                        sorted_pos,
                        cell,
                        limit,
                        binned,
                        count,
                        images,
                        home,
                        found_d,
                    )
                elif binned:
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
                        0,
                        found_j,
                        found_s,
                        found_d,
                    )
                else:
                    m = gather_pairs(
                        i, n, pos, cell, limit, 0, found_j, found_s, found_d
                    )
                if m == -2:
                    scratch = new_scratch(max(512, 2 * scratch[0].shape[0]))
                    continue
                if m < 0:
                    wide *= 2
                    found_j = np.empty(wide, np.int64)
                    found_s = np.empty((wide, 3), np.int64)
                    found_d = np.empty(wide, np.float64)
                    order = np.empty(wide, np.int64)
                    keys = np.empty(wide, np.int64)
                    continue
                if m < k and radius < cutoff:
                    radius = min(cutoff, 1.3 * radius)
                    chosen = False
                    continue
                _sort_by_distance(m, found_d, order, keys)
                stop = m
                if 0 < k <= m:
                    stop = k
                    end = math.sqrt(found_d[order[k - 1]])
                    while stop < m:
                        following = math.sqrt(found_d[order[stop]])
                        if following - end > TIE_TOLERANCE:
                            break
                        end = following
                        stop += 1
                    if radius < cutoff and end >= radius - 2 * TIE_TOLERANCE:
                        radius = min(cutoff, 1.3 * radius)
                        chosen = False
                        continue
                break
            if m == 0 or found_d[order[0]] < MIN_DISTANCE * MIN_DISTANCE:
                # The first site that has no place is named, in the order as given.
                if i < failed:
                    failed = i
                    status[g] = ISOLATED if m == 0 else CLOSE
                    detail[g, 0] = i
                    detail[g, 1] = 0.0
                    detail[g, 2] = 0.0
                    if m > 0:
                        nearest = order[0]
                        if chosen:
                            detail[g, 1] = sites[images[1][images[5][nearest]]]
                        else:
                            detail[g, 1] = found_j[nearest]
                        detail[g, 2] = math.sqrt(found_d[nearest])
                continue
            if failed < n:
                continue
            if used + stop > kept:
                grown = max(2 * kept, used + stop)
                site = _grown(site, used, grown)
                far = _grown(far, used, grown)
                shell = _grown(shell, used, grown)
                new_cells = np.empty((grown, 3), np.int64)
                new_cells[:used] = cells[:used]
                cells = new_cells
                kept = grown
            edge_begin[i] = used
            _, places, runs, cells_of, _, hits = images
            previous = 0.0
            number = 0
            for a in range(stop):
                e = order[a]
                d = math.sqrt(found_d[e])
                if a > 0 and d - previous > TIE_TOLERANCE:
                    number += 1
                previous = d
                if chosen:
                    q = hits[np.uint64(e)]
                    j = sites[places[q]]
                    run = runs[q]
                    s0, s1, s2 = cells_of[run, 0], cells_of[run, 1], cells_of[run, 2]
                else:
                    j = found_j[e]
                    s0, s1, s2 = found_s[e, 0], found_s[e, 1], found_s[e, 2]
                site[used] = j
                far[used] = d
                shell[used] = number
                s0 += shift[i, 0] - shift[j, 0]
                s1 += shift[i, 1] - shift[j, 1]
                s2 += shift[i, 2] - shift[j, 2]
                if plain:
                    cells[used, 0] = s0
                    cells[used, 1] = s1
                    cells[used, 2] = s2
                else:
                    for h in range(3):
                        cells[used, h] = (
                            s0 * transform[0, h]
                            + s1 * transform[1, h]
                            + s2 * transform[2, h]
                        )
                used += 1
            edge_end[i] = used
            tied[i] = number + 1 < stop
        if status[g] != 0:
            continue
        # Environments decide only between sites of one element in one shell.
        classes[:n] = 0
        own = numbers[first:last]
        if k > 0 and _has_ties(n, own, tied, edge_begin, edge_end, site, shell):
            _classify(n, own, edge_begin, edge_end, site, far, classes)
        if rank.shape[0] < used and tied[:n].any():
            rank = np.empty(kept, np.int64)
            sequence = np.empty(kept, np.int64)
        begin = total
        if k == 0 and total + used > room:
            grown = max(2 * room, total + used)
            neighbor = _grown(neighbor, total, grown)
            distances = _grown(distances, total, grown)
            new_offsets = np.empty((grown, 3), np.int32)
            new_offsets[:total] = offsets[:total]
            offsets = new_offsets
            room = grown
        good = True
        for i in range(n):
            begin_of_atom, end_of_atom = edge_begin[i], edge_end[i]
            count = end_of_atom - begin_of_atom
            if 0 < k < count:
                count = k
            degrees[first + i] = count
            if not tied[i]:
                for e in range(begin_of_atom, begin_of_atom + count):
                    neighbor[total] = site[e]
                    distances[total] = far[e]
                    for h in range(3):
                        good = good and fits_int32(cells[e, h])
                        offsets[total, h] = cells[e, h]
                    total += 1
                continue
            for e in range(begin_of_atom, end_of_atom):
                rank[e] = (own[site[e]] << 40) + classes[site[e]]
                sequence[e] = e
            e = begin_of_atom
            while e < end_of_atom:
                f = e + 1
                while f < end_of_atom and shell[f] == shell[e]:
                    f += 1
                if f - e > 1:
                    _sort_shell(sequence, e, f, rank, site, cells)
                e = f
            for a in range(begin_of_atom, begin_of_atom + count):
                e = sequence[a]
                neighbor[total] = site[e]
                distances[total] = far[e]
                for h in range(3):
                    good = good and fits_int32(cells[e, h])
                    offsets[total, h] = cells[e, h]
                total += 1
        if not good:
            status[g] = OVERFLOW
            degrees[first:last] = 0
            total = begin
    return degrees, neighbor[:total], offsets[:total], distances[:total], status, detail


@jit
def _grown(values, used, size):
    bigger = np.empty(size, values.dtype)
    bigger[:used] = values[:used]
    return bigger


@jit
def expand(distances, steps, bell, out):
    """Fill ``out[e, m]`` with exp(-(distances[e] / step - m)²), steps = 1 / step.

    With u the distance to the nearest centre in steps, and n counted from there,
    exp(-(u - n)²) = exp(-u²) exp(2 u)^n exp(-n²), and bell holds exp(-n²): two
    exponentials for each distance instead of one for each centre.
    """
    n_centers = out.shape[1]
    reach = bell.shape[0] - 1
    for e in range(distances.shape[0]):
        t = distances[e] * steps
        nearest = math.floor(t + 0.5)
        u = t - nearest
        peak = math.exp(-u * u)
        ratio = math.exp(2.0 * u)
        for m in range(np.uint64(n_centers)):
            out[e, m] = 0.0
        above = min(reach, n_centers - 1 - nearest)
        value = peak
        skipped = 0
        while nearest + skipped < 0 and skipped <= above:
            value *= ratio
            skipped += 1
        for n in range(skipped, above + 1):
            out[e, nearest + n] = value * bell[n]
            value *= ratio
        value = peak
        back = 1.0 / ratio
        for n in range(1, min(reach, nearest) + 1):
            value *= back
            m = nearest - n
            if m < n_centers:
                out[e, m] = value * bell[n]
