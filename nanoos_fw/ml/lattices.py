"""Cells prepared for the neighbour search, in plain loops; its constants.

Written so that numba can compile them and Python can run them: the search works on a
reduced basis of the lattice, in a frame where its matrix is triangular, with all sites
moved into the cell. ``int64`` steps lead back to the sites as they were given.

numba's cache on disk notices edits of ``neighbor_kernels.py`` only. After an edit here
delete ``__pycache__``.
"""

from __future__ import annotations

import math
from typing import Any

TIE_TOLERANCE = 1e-4
"""Distances closer than this (Å) belong to one shell."""
ENVIRONMENT_TOLERANCE = 1e-3
"""Environment numbers closer than this belong to one class (dimensionless)."""
MIN_DISTANCE = 0.1
"""Two sites closer than this (Å) are one site written twice."""
CUTOFF_TOLERANCE = 1e-8
"""Å²; a neighbour at the cutoff is in, however its distance was rounded."""
MAX_EDGES = 2e8
"""Expected edges of one structure beyond which it is refused (5 GB)."""

# Why a structure has no neighbour list.
NOT_FINITE, FLAT, CLOSE, ISOLATED, TOO_MANY, OVERFLOW = 1, 2, 3, 4, 5, 6

_MAX_FRACTION = 1e6  # beyond, doubles place a site worse than 1e-10 of the cell
_FLAT = 1e-10
_LOVASZ = 0.75
_MAX_SWEEPS = 1000


def prepare_cell(lattice: Any, cell: Any, transform: Any) -> tuple[int, float, bool]:
    """Reduce a lattice and rotate it into a triangular frame.

    Parameters
    ----------
    lattice
        ``(3, 3) float64``, rows are vectors, Å.
    cell
        ``(6,) float64``, written: l00, l10, l11, l20, l21, l22 of the rotated rows.
    transform
        ``(3, 3) int64``, written: ``transform @ lattice`` is the reduced basis.

    Returns
    -------
    tuple
        0 or the reason why not, volume in Å³, whether ``transform`` is the identity.

    Notes
    -----
    The reduction is that of Lenstra, Lenstra and Lovász, Math. Ann. 261, 515 (1982).
    A reduced basis keeps the search short for skewed cells. A cell that is reduced
    already is left as it is.
    """
    for i in range(3):
        for k in range(3):
            transform[i, k] = 1 if i == k else 0
            if not math.isfinite(lattice[i, k]):
                return NOT_FINITE, 0.0, True
    ax, ay, az = lattice[0, 0], lattice[0, 1], lattice[0, 2]
    bx, by, bz = lattice[1, 0], lattice[1, 1], lattice[1, 2]
    cx, cy, cz = lattice[2, 0], lattice[2, 1], lattice[2, 2]
    volume = abs(
        ax * (by * cz - bz * cy) + ay * (bz * cx - bx * cz) + az * (bx * cy - by * cx)
    )
    lengths = math.sqrt(ax * ax + ay * ay + az * az)
    lengths *= math.sqrt(bx * bx + by * by + bz * bz)
    lengths *= math.sqrt(cx * cx + cy * cy + cz * cz)
    # Also true for NaN, and for what overflowed.
    if not (volume >= MIN_DISTANCE**3 and volume > _FLAT * lengths):
        return FLAT, volume, True
    plain = True
    row = 1
    for _ in range(_MAX_SWEEPS):
        l00 = math.sqrt(ax * ax + ay * ay + az * az)
        ex, ey, ez = ax / l00, ay / l00, az / l00
        l10 = bx * ex + by * ey + bz * ez
        px, py, pz = bx - l10 * ex, by - l10 * ey, bz - l10 * ez
        l11 = math.sqrt(px * px + py * py + pz * pz)
        px, py, pz = px / l11, py / l11, pz / l11
        l20 = cx * ex + cy * ey + cz * ez
        l21 = cx * px + cy * py + cz * pz
        qx = cx - l20 * ex - l21 * px
        qy = cy - l20 * ey - l21 * py
        qz = cz - l20 * ez - l21 * pz
        l22 = math.sqrt(qx * qx + qy * qy + qz * qz)
        # Half a step plus a little: a tie must not send it back and forth.
        if abs(l10) > 0.5000001 * l00:
            steps = math.floor(l10 / l00 + 0.5)
            source, target = 0, 1
        elif row == 2 and abs(l21) > 0.5000001 * l11:
            steps = math.floor(l21 / l11 + 0.5)
            source, target = 1, 2
        elif row == 2 and abs(l20) > 0.5000001 * l00:
            steps = math.floor(l20 / l00 + 0.5)
            source, target = 0, 2
        else:
            steps = 0
            if row == 1:
                swap = l11 * l11 < _LOVASZ * l00 * l00 - l10 * l10
                source, target = 0, 1
            else:
                swap = l22 * l22 < _LOVASZ * l11 * l11 - l21 * l21
                source, target = 1, 2
            if not swap:
                if row == 2:
                    break
                row = 2
                continue
            row = 1
            for k in range(3):
                keep = transform[source, k]
                transform[source, k] = transform[target, k]
                transform[target, k] = keep
        for k in range(3):
            transform[target, k] -= steps * transform[source, k]
        plain = False
        # From the lattice itself: rounding does not pile up.
        t0, t1, t2 = transform[0, 0], transform[0, 1], transform[0, 2]
        ax = t0 * lattice[0, 0] + t1 * lattice[1, 0] + t2 * lattice[2, 0]
        ay = t0 * lattice[0, 1] + t1 * lattice[1, 1] + t2 * lattice[2, 1]
        az = t0 * lattice[0, 2] + t1 * lattice[1, 2] + t2 * lattice[2, 2]
        t0, t1, t2 = transform[1, 0], transform[1, 1], transform[1, 2]
        bx = t0 * lattice[0, 0] + t1 * lattice[1, 0] + t2 * lattice[2, 0]
        by = t0 * lattice[0, 1] + t1 * lattice[1, 1] + t2 * lattice[2, 1]
        bz = t0 * lattice[0, 2] + t1 * lattice[1, 2] + t2 * lattice[2, 2]
        t0, t1, t2 = transform[2, 0], transform[2, 1], transform[2, 2]
        cx = t0 * lattice[0, 0] + t1 * lattice[1, 0] + t2 * lattice[2, 0]
        cy = t0 * lattice[0, 1] + t1 * lattice[1, 1] + t2 * lattice[2, 1]
        cz = t0 * lattice[0, 2] + t1 * lattice[1, 2] + t2 * lattice[2, 2]
    cell[0], cell[1], cell[2] = l00, l10, l11
    cell[3], cell[4], cell[5] = l20, l21, l22
    return 0, volume, plain


def wrap_sites(
    frac_coords: Any,
    cell: Any,
    transform: Any,
    plain: bool,
    frac: Any,
    pos: Any,
    shift: Any,
) -> int:
    """Move sites into the reduced cell; return 0 or the reason why not.

    Parameters
    ----------
    frac_coords
        ``(n, 3) float64``, fractions of the lattice as given.
    cell, transform, plain
        Of :func:`prepare_cell`.
    frac, pos, shift
        ``(n or more, 3)``, written: fractions of the reduced cell in [0, 1], position
        in Å in the rotated frame, and the ``int64`` steps that were taken off.
    """
    # The inverse of an integer matrix of determinant +-1, exactly.
    t = transform
    i00 = t[1, 1] * t[2, 2] - t[1, 2] * t[2, 1]
    i01 = t[0, 2] * t[2, 1] - t[0, 1] * t[2, 2]
    i02 = t[0, 1] * t[1, 2] - t[0, 2] * t[1, 1]
    i10 = t[1, 2] * t[2, 0] - t[1, 0] * t[2, 2]
    i11 = t[0, 0] * t[2, 2] - t[0, 2] * t[2, 0]
    i12 = t[0, 2] * t[1, 0] - t[0, 0] * t[1, 2]
    i20 = t[1, 0] * t[2, 1] - t[1, 1] * t[2, 0]
    i21 = t[0, 1] * t[2, 0] - t[0, 0] * t[2, 1]
    i22 = t[0, 0] * t[1, 1] - t[0, 1] * t[1, 0]
    sign = t[0, 0] * i00 + t[0, 1] * i10 + t[0, 2] * i20
    for i in range(frac_coords.shape[0]):
        f0, f1, f2 = frac_coords[i, 0], frac_coords[i, 1], frac_coords[i, 2]
        # Also false for NaN.
        if not (
            abs(f0) <= _MAX_FRACTION
            and abs(f1) <= _MAX_FRACTION
            and abs(f2) <= _MAX_FRACTION
        ):
            return NOT_FINITE
        if not plain:
            g0 = sign * (f0 * i00 + f1 * i10 + f2 * i20)
            g1 = sign * (f0 * i01 + f1 * i11 + f2 * i21)
            g2 = sign * (f0 * i02 + f1 * i12 + f2 * i22)
            f0, f1, f2 = g0, g1, g2
        s0, s1, s2 = math.floor(f0), math.floor(f1), math.floor(f2)
        shift[i, 0], shift[i, 1], shift[i, 2] = int(s0), int(s1), int(s2)
        f0, f1, f2 = f0 - s0, f1 - s1, f2 - s2
        frac[i, 0], frac[i, 1], frac[i, 2] = f0, f1, f2
        pos[i, 0] = f0 * cell[0] + f1 * cell[1] + f2 * cell[3]
        pos[i, 1] = f1 * cell[2] + f2 * cell[4]
        pos[i, 2] = f2 * cell[5]
    return 0
