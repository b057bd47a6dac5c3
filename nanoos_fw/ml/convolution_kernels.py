"""Compiled passes of the gated convolution, in training and for predictions.

See :mod:`nanoos_fw.ml.convolution` and :mod:`nanoos_fw.ml.inference`. All are in one
file: numba finds its machine code on disk by the file of the function that was called,
and would not notice a change of what that calls in another file.

The pre-activation of an edge from j to i is ``z = C_i + N_j + sum_k g_k W_k``: what
atom i adds as the centre, what j adds as the neighbour, and the Gaussians of the
distance, of which only a window is not negligible. It is computed anew in each pass,
from numbers that stay in the processor's cache: no array of edges times channels
exists.

Every function works on some of the atoms, whole graphs of them, so that neighbours
are among them too and threads never meet. Sums run in the order of the edges. numba
compiles the functions on their first call and keeps the machine code on disk;
multiplication and addition may be fused, nothing is reordered.
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
from numba.extending import intrinsic, overload

_F = TypeVar("_F", bound=Callable[..., Any])

ROWS = 9
"""Rows of the window that the first loop over an edge takes; windows have as many or
more."""

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
# Beyond, sigmoid and softplus are at their limits. Their products stay normal numbers:
# others are slow.
_LIMIT = np.float32(40.0)
_LOG2E = np.float32(1.44269504088896341)
# ln 2 in two parts: the first has few bits, so that its multiples are exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# 1.5 * 2**23: adding it rounds a float32 to an integer, kept in the lowest bits.
_ROUNDER = np.float32(12582912.0)
# expf of S. L. Moshier's Cephes library.
_E0, _E1 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3)
_E2, _E3 = np.float32(8.3334519073e-3), np.float32(4.1665795894e-2)
_E4, _E5 = np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
# log(1 + t) / t on [0, 1], interpolated at Chebyshev nodes: 5e-9 relative.
_L0, _L1 = np.float32(0.9999999953848531), np.float32(-0.4999990399276279)
_L2, _L3 = np.float32(0.3333000403519208), np.float32(-0.24954558870800064)
_L4, _L5 = np.float32(0.1967811725499681), np.float32(-0.15311863098551823)
_L6, _L7 = np.float32(0.10614264681217396), np.float32(-0.05706420070662634)
_L8, _L9 = np.float32(0.019907160898020075), np.float32(-0.0032563784668817944)


_INNER: Any = {"error_model": "numpy", "fastmath": {"contract"}}


def _jit(function: _F) -> _F:
    options: Any = {**_INNER, "nogil": True}
    try:
        return cast("_F", numba.njit(cache=True, **options)(function))
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written to.
        return cast("_F", numba.njit(**options)(function))


def _inner(function: _F) -> _F:
    return cast("_F", numba.njit(**_INNER)(function))


def _inlined(function: _F) -> _F:
    # Before types are known: calls that are left to the compiler of machine code keep
    # loops from being vectorized where several numbers come back.
    return cast("_F", numba.njit(inline="always")(function))


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


def _decay(x):
    """Return exp(-|x|); NaN stays NaN."""
    return math.exp(-abs(x))


@overload(_decay, jit_options=_INNER)
def _decay_overload(x):
    if x != types.float32:
        return lambda x: math.exp(-abs(x))

    def decay(x):
        size = x if x > _ZERO else -x
        y = -(_LIMIT if size > _LIMIT else size)
        rounded = y * _LOG2E + _ROUNDER
        n = rounded - _ROUNDER
        r = (y - n * _LN2_HIGH) - n * _LN2_LOW
        p = ((((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _E5
        return (p * r * r + r + _ONE) * _power_of_two(rounded)

    return decay


def _log1p(t):
    """Return log(1 + t) for t in [0, 1]."""
    return math.log1p(t)


@overload(_log1p, jit_options=_INNER)
def _log1p_overload(t):
    if t != types.float32:
        return lambda t: math.log1p(t)  # noqa: PLW0108 - numba wants a function

    def log1p(t):
        p = ((((_L9 * t + _L8) * t + _L7) * t + _L6) * t + _L5) * t + _L4
        return t * ((((p * t + _L3) * t + _L2) * t + _L1) * t + _L0)

    return log1p


@_inlined
def _gated(x, y, zero, one):
    """Return sigmoid(x), softplus(y), and the derivatives of their product."""
    t, u = _decay(x), _decay(y)
    soft = (y if y > zero else zero) + _log1p(u)
    p, q = one + t, one + u
    inverse = one / (p * q)
    r = q * inverse
    sigmoid = (one if x > zero else t) * r
    by_gate = t * r * r * soft
    by_core = sigmoid * ((one if y > zero else u) * (p * inverse))
    return sigmoid, soft, by_gate, by_core


@_inlined
def _message(x, y, zero, one):
    """Return sigmoid(x) softplus(y)."""
    t = _decay(x)
    return (one if x > zero else t) / (one + t) * _softplus(y, zero)


@_inlined
def _softplus(y, zero):
    return (y if y > zero else zero) + _log1p(_decay(y))


@_jit
def spread_gaussians(distances, step, width, n_centers, first, values):
    """Write the Gaussians of each edge that are not negligible.

    ``values[e, k]`` is exp(-(d - mu)² / width²) at the centre mu of row
    ``first[e] + k`` of the table of centres, padded on both sides with as many rows
    as ``values`` has columns.
    """
    n_rows = values.shape[1]
    middle = n_rows // 2
    ratio = step / width
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
        if not abs(x) <= 20.0:  # far beyond the table, where all are negligible
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


@_inner
def _pre_activation(z, own, other, table, row, g):
    """Write z of one edge; ``own`` and ``other`` are rows of the projections."""
    g0, g1, g2, g3, g4 = g[0], g[1], g[2], g[3], g[4]
    g5, g6, g7, g8 = g[5], g[6], g[7], g[8]
    for c in range(z.shape[0]):
        z[c] = (
            (own[c] + other[c])
            + g0 * table[row, c]
            + g1 * table[row + 1, c]
            + g2 * table[row + 2, c]
            + g3 * table[row + 3, c]
            + g4 * table[row + 4, c]
            + g5 * table[row + 5, c]
            + g6 * table[row + 6, c]
            + g7 * table[row + 7, c]
            + g8 * table[row + 8, c]
        )
    for k in range(ROWS, g.shape[0]):
        more = g[k]
        for c in range(z.shape[0]):
            z[c] += more * table[row + k, c]


@_jit
def moments(begin, end, own, other, table, starts, neighbors, first, g, sums):
    """Write sum and sum of squares of z over the edges of some atoms.

    Parameters
    ----------
    begin, end
        The atoms.
    own, other
        ``(n_atoms, 2 h)``, C and N.
    table
        ``(rows, 2 h)``, W with padding.
    starts
        ``(n_atoms + 1,)``, edges of each atom.
    neighbors, first, g
        Of the edges; see :func:`spread_gaussians`.
    sums
        ``(2, 2 h) float64``, written.
    """
    two = own.shape[1]
    z, origin = np.empty(two, own.dtype), np.empty(two, own.dtype)
    linear, square = np.empty(two, own.dtype), np.empty(two, own.dtype)
    sums[:] = 0.0
    for i in range(begin, end):
        n = starts[i + 1] - starts[i]
        if n == 0:
            continue
        # Around the first edge of the atom: plain squares would lose digits.
        for e in range(starts[i], starts[i + 1]):
            _pre_activation(z, own[i], other[neighbors[e]], table, first[e], g[e])
            if e == starts[i]:
                for c in range(two):
                    origin[c] = z[c]
                    linear[c] = square[c] = 0.0
                continue
            for c in range(two):
                d = z[c] - origin[c]
                linear[c] += d
                square[c] += d * d
        for c in range(two):
            o, s = np.float64(origin[c]), np.float64(linear[c])
            sums[0, c] += n * o + s
            sums[1, c] += o * (n * o + 2.0 * s) + np.float64(square[c])


@_jit
def forward(
    begin,
    end,
    own,
    other,
    table,
    starts,
    neighbors,
    first,
    g,
    scale,
    bias,
    out,
    slopes,
    node_sums,
    slope_sums,
):
    """Write the sum over the edges of each atom of sigmoid(gate) * softplus(core).

    Parameters
    ----------
    begin, end, own, other, table, starts, neighbors, first, g
        As :func:`moments`, but ``own`` less the mean of z.
    scale, bias
        ``(2 h,)``: gate and core are ``scale * z + bias``.
    out
        ``(n_atoms, h)``, written.
    slopes
        ``(2, n_atoms, 2 h)``, written: sums over the edges of the derivatives by gate
        and core, and of the derivatives times z. Without rows they are not wanted,
        nor is what follows.
    node_sums
        ``(2, h) float64``, written: sums over these atoms of ``out`` and its square.
    slope_sums
        ``(4, 2 h) float64``, written: sums over these atoms of both ``slopes``, then
        of both times ``out``.
    """
    h = out.shape[1]
    zero, one = own.dtype.type(0), own.dtype.type(1)
    z, total = np.empty(2 * h, own.dtype), np.empty(h, own.dtype)
    plain, times = np.empty(2 * h, own.dtype), np.empty(2 * h, own.dtype)
    derive = slopes.shape[1] > 0
    node_sums[:] = 0.0
    slope_sums[:] = 0.0
    for i in range(begin, end):
        total[:] = zero
        plain[:] = zero
        times[:] = zero
        for e in range(starts[i], starts[i + 1]):
            _pre_activation(z, own[i], other[neighbors[e]], table, first[e], g[e])
            if not derive:
                for c in range(h):
                    x = scale[c] * z[c] + bias[c]
                    y = scale[h + c] * z[h + c] + bias[h + c]
                    total[c] += _message(x, y, zero, one)
                continue
            for c in range(h):
                x = scale[c] * z[c] + bias[c]
                y = scale[h + c] * z[h + c] + bias[h + c]
                sigmoid, soft, by_gate, by_core = _gated(x, y, zero, one)
                total[c] += sigmoid * soft
                plain[c] += by_gate
                plain[h + c] += by_core
                times[c] += by_gate * z[c]
                times[h + c] += by_core * z[h + c]
        for c in range(h):
            out[i, c] = total[c]
        if derive:
            for c in range(2 * h):
                slopes[0, i, c] = plain[c]
                slopes[1, i, c] = times[c]
                slope_sums[0, c] += np.float64(plain[c])
                slope_sums[1, c] += np.float64(times[c])
            for c in range(h):
                o = np.float64(total[c])
                node_sums[0, c] += o
                node_sums[1, c] += o * o
                slope_sums[2, c] += o * np.float64(plain[c])
                slope_sums[2, h + c] += o * np.float64(plain[h + c])
                slope_sums[3, c] += o * np.float64(times[c])
                slope_sums[3, h + c] += o * np.float64(times[h + c])


@_jit
def gradient_sums(begin, end, gradient, normal, slopes, node_sums, slope_sums):
    """Write what normalization has to know of the gradient of some atoms.

    Parameters
    ----------
    begin, end
        The atoms.
    gradient, normal
        ``(n_atoms, h)``, by the normalized sums over edges, and those themselves
        before weight and bias.
    slopes
        Of :func:`forward`.
    node_sums
        ``(2, h) float64``, written: sums of ``gradient``, and times ``normal``.
    slope_sums
        ``(2, 2 h) float64``, written: sums of ``gradient`` times both ``slopes``.
    """
    h = gradient.shape[1]
    node_sums[:] = 0.0
    slope_sums[:] = 0.0
    for i in range(begin, end):
        for c in range(h):
            u = np.float64(gradient[i, c])
            node_sums[0, c] += u
            node_sums[1, c] += u * np.float64(normal[i, c])
            slope_sums[0, c] += u * np.float64(slopes[0, i, c])
            slope_sums[0, h + c] += u * np.float64(slopes[0, i, h + c])
            slope_sums[1, c] += u * np.float64(slopes[1, i, c])
            slope_sums[1, h + c] += u * np.float64(slopes[1, i, h + c])


@_jit
def backward(
    begin,
    end,
    own,
    other,
    table,
    starts,
    neighbors,
    first,
    g,
    scale,
    bias,
    upstream,
    shift,
    slant,
    own_gradient,
    other_gradient,
    table_gradient,
):
    """Write the gradients by C, N and W of some atoms.

    Parameters
    ----------
    begin, end, own, other, table, starts, neighbors, first, g, scale, bias
        As :func:`forward`.
    upstream
        ``(n_atoms, h)``, gradient by its output.
    shift, slant
        ``(2 h,)``: normalization takes ``shift + slant * z`` off the gradient by z.
    own_gradient, other_gradient
        ``(n_atoms, 2 h)``, rows of these atoms written.
    table_gradient
        ``(rows, 2 h)``, written.
    """
    two = own.shape[1]
    h = two // 2
    n_rows = g.shape[1]
    zero, one = own.dtype.type(0), own.dtype.type(1)
    z, total = np.empty(two, own.dtype), np.empty(two, own.dtype)
    other_gradient[begin:end, :] = zero
    table_gradient[:] = zero
    for i in range(begin, end):
        total[:] = zero
        for e in range(starts[i], starts[i + 1]):
            j, row = neighbors[e], first[e]
            _pre_activation(z, own[i], other[j], table, row, g[e])
            for c in range(h):
                x = scale[c] * z[c] + bias[c]
                y = scale[h + c] * z[h + c] + bias[h + c]
                _, _, by_gate, by_core = _gated(x, y, zero, one)
                up = upstream[i, c]
                dx = scale[c] * (up * by_gate) - (shift[c] + slant[c] * z[c])
                dy = scale[h + c] * (up * by_core) - (
                    shift[h + c] + slant[h + c] * z[h + c]
                )
                z[c] = dx
                z[h + c] = dy
                total[c] += dx
                total[h + c] += dy
            for c in range(two):
                other_gradient[j, c] += z[c]
            for k in range(n_rows):
                value = g[e, k]
                for c in range(two):
                    table_gradient[row + k, c] += value * z[c]
        for c in range(two):
            own_gradient[i, c] = total[c]


@_jit
def convolve(projected, edge_matrix, starts, neighbors, first, g, scale, shift, atoms):
    """Do one gated convolution for predictions, in place in ``atoms``.

    Parameters
    ----------
    projected
        ``(n_atoms, 4 h)``: what each atom adds to its own edges as their centre (gate,
        core), and as a neighbour (gate, core); normalization is folded in.
    edge_matrix
        ``(rows, 2 h)``, W with padding.
    starts
        ``(n_atoms + 1,)``, edges of each atom.
    neighbors, first, g
        Of the edges; see :func:`spread_gaussians`.
    scale, shift
        ``(h,)``, normalization of the sum.
    atoms
        ``(n_atoms, h)``.
    """
    n_atoms, h = atoms.shape
    two = 2 * h
    zero, one = _ZERO, _ONE
    z, summed = np.empty(two, np.float32), np.empty(h, np.float32)
    for i in range(n_atoms):
        own = projected[i]
        summed[:] = zero
        for e in range(starts[i], starts[i + 1]):
            other = projected[neighbors[e], two:]
            _pre_activation(z, own, other, edge_matrix, first[e], g[e])
            for c in range(h):
                summed[c] += _message(z[c], z[h + c], zero, one)
        for c in range(h):
            x = atoms[i, c] + (summed[c] * scale[c] + shift[c])
            atoms[i, c] = _softplus(x, zero)
