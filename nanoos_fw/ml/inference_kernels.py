"""Compiled convolution for inference; see :mod:`nanoos_fw.ml.inference`.

One pass over the edges of an atom: no array of edges times channels exists. numba
compiles these functions on their first call and keeps the machine code on disk.
Multiplications and additions may be fused; nothing is reordered.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_F = TypeVar("_F", bound=Callable[..., Any])

# Rows of the edge matrix that the first loop over an edge takes.
STEP = 8

_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)
# Beyond, sigmoid and softplus are at their limits. Products of two exponentials, and
# their squares, stay normal numbers: others are slow.
_LIMIT = np.float32(40.0)
_LOG2E = np.float32(1.44269504088896341)
# ln 2 in two parts: the first has few bits, so that its multiples are exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# 1.5 * 2**23: adding it rounds a float32 to an integer, kept in the lowest bits.
_ROUNDER = np.float32(12582912.0)
_E0, _E1, _E2 = (
    np.float32(1.9875691500e-4),
    np.float32(1.3981999507e-3),
    np.float32(8.3334519073e-3),
)
_E3, _E4, _E5 = (
    np.float32(4.1665795894e-2),
    np.float32(1.6666665459e-1),
    np.float32(5.0000001201e-1),
)
_L3, _L5, _L7 = np.float32(1 / 3), np.float32(1 / 5), np.float32(1 / 7)
_L9, _L11, _L13 = np.float32(1 / 9), np.float32(1 / 11), np.float32(1 / 13)


def _jit(function: _F) -> _F:
    options: dict[str, Any] = {
        "error_model": "numpy",
        "nogil": True,
        "fastmath": {"contract"},
    }
    try:
        return cast("_F", numba.njit(cache=True, **options)(function))
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written to.
        return cast("_F", numba.njit(**options)(function))


@intrinsic
def _power_of_two(typingctx, rounded):
    """Return 2**n of the float32 n + 1.5 * 2**23."""

    def codegen(context, builder, signature, arguments):
        i32 = ir.IntType(32)
        bits = builder.bitcast(arguments[0], i32)
        # The bits of 1.5 * 2**23 fall out on the left.
        bits = builder.shl(bits, ir.Constant(i32, 23))
        bits = builder.add(bits, ir.Constant(i32, 127 << 23))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.float32), codegen


@numba.njit(inline="always")
def _exp(x):
    """Return exp(x) in float32 for |x| <= 40, within 2e-7 relative.

    Coefficients: expf of S. L. Moshier's Cephes library.
    """
    rounded = x * _LOG2E + _ROUNDER
    n = rounded - _ROUNDER
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = ((((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _E5
    return (p * r * r + r + _ONE) * _power_of_two(rounded)


@numba.njit(inline="always")
def _clamped(x):
    x = x if x < _LIMIT else _LIMIT
    return x if x > -_LIMIT else -_LIMIT


@numba.njit(inline="always")
def _log1p_series(s):
    """Return log((1 + s) / (1 - s)) for 0 <= s <= 1/3, within 1e-7 relative."""
    q = s * s
    p = ((((_L13 * q + _L11) * q + _L9) * q + _L7) * q + _L5) * q + _L3
    return _TWO * s * (p * q + _ONE)


@_jit
def spread_gaussians(distances, step, width, n_centers, n_rows, first, values):
    """Write the Gaussians of each edge that are not negligible.

    ``values[e, k]`` is exp(-(d - mu)² / width²) at centre ``first[e] + k`` of the
    matrix padded with ``n_rows`` rows of zeros on both sides.
    """
    ratio = step / width
    middle = n_rows // 2
    squares = np.empty(n_rows)
    for k in range(n_rows):
        squares[k] = math.exp(-((k * ratio) ** 2))
    for e in range(len(distances)):
        place = np.float64(distances[e]) / step
        low = math.ceil(place - 0.5 * n_rows)
        low = max(min(low, n_centers), -n_rows)
        first[e] = low + n_rows
        # exp(-(x - k a)²) = exp(-x²) exp(2 x a)**k exp(-(k a)²), from the middle on.
        x = (place - (low + middle)) * ratio
        if abs(x) > 20.0:  # all of them below the smallest float32
            values[e, :] = 0.0
            continue
        centre = math.exp(-x * x)
        factor = math.exp(2.0 * x * ratio)
        inverse = 1.0 / factor
        values[e, middle] = centre
        up = down = centre
        for k in range(1, n_rows - middle):
            up *= factor
            values[e, middle + k] = up * squares[k]
        for k in range(1, middle + 1):
            down *= inverse
            values[e, middle - k] = down * squares[k]


@_jit
def convolve(projected, edge_matrix, starts, neighbors, first, g, scale, shift, atoms):
    """Do one gated convolution, in place in ``atoms``.

    Parameters
    ----------
    projected
        ``(n_atoms, 4 h)``: what each atom adds to its own edges as their centre (gate,
        core), and as a neighbour (gate, core); normalization is folded in.
    edge_matrix
        ``(rows, 2 h)``, for the Gaussians.
    starts
        ``(n_atoms + 1,)``, edges of each atom.
    neighbors, first, g
        Of the edges; ``g`` are their Gaussians, at least ``STEP``.
    scale, shift
        ``(h,)``, normalization of the sum.
    atoms
        ``(n_atoms, h)``.
    """
    n_atoms, h = atoms.shape
    two = 2 * h
    n_rows = g.shape[1]
    z = np.empty(two, dtype=np.float32)
    summed = np.empty(h, dtype=np.float32)
    for i in range(n_atoms):
        summed[:] = _ZERO
        for e in range(starts[i], starts[i + 1]):
            j, row = neighbors[e], first[e]
            g0, g1, g2, g3 = g[e, 0], g[e, 1], g[e, 2], g[e, 3]
            g4, g5, g6, g7 = g[e, 4], g[e, 5], g[e, 6], g[e, 7]
            for c in range(two):
                z[c] = (
                    (projected[i, c] + projected[j, two + c])
                    + g0 * edge_matrix[row, c]
                    + g1 * edge_matrix[row + 1, c]
                    + g2 * edge_matrix[row + 2, c]
                    + g3 * edge_matrix[row + 3, c]
                    + g4 * edge_matrix[row + 4, c]
                    + g5 * edge_matrix[row + 5, c]
                    + g6 * edge_matrix[row + 6, c]
                    + g7 * edge_matrix[row + 7, c]
                )
            for k in range(STEP, n_rows):
                more = g[e, k]
                for c in range(two):
                    z[c] += more * edge_matrix[row + k, c]
            for c in range(h):
                gate, core = _clamped(z[c]), z[h + c]
                # sigmoid(gate) * softplus(core) with one division.
                v = _ONE + _exp(-gate)
                size = core if core > _ZERO else -core
                u = _exp(-(size if size < _LIMIT else _LIMIT))
                w = _TWO + u
                inverse = _ONE / (v * w)
                positive = core if core > _ZERO else _ZERO
                soft = positive + _log1p_series(u * (inverse * v))
                summed[c] += soft * (inverse * w)
        for c in range(h):
            x = atoms[i, c] + (summed[c] * scale[c] + shift[c])
            size = x if x > _ZERO else -x
            u = _exp(-(size if size < _LIMIT else _LIMIT))
            positive = x if x > _ZERO else _ZERO
            atoms[i, c] = positive + _log1p_series(u / (_TWO + u))
