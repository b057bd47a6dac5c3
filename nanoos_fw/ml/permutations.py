"""Pseudorandom orders and numbers that a window of a sequence gets without the rest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.provenance import content_key

_ROUNDS = 4


def permute(
    indices: NDArray[np.int64], size: int, seed: int | None
) -> NDArray[np.int64]:
    """Return where a pseudorandom permutation of ``range(size)`` puts numbers.

    Parameters
    ----------
    indices
        ``(n,)``, each below ``size``.
    size
        At most 2^53.
    seed
        None: the identity.

    Notes
    -----
    A Feistel network on the next even power of two, walked until the number is below
    ``size`` again: one to one, and any window costs the same [1]_.

    References
    ----------
    .. [1] J. Black, P. Rogaway, CT-RSA 2002, LNCS 2271, 114-130.
    """
    if seed is None or size < 2:
        return np.asarray(indices, dtype=np.int64)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = [
        np.uint64(int(content_key("permutation", [seed, size, i])[:16], 16))
        for i in range(_ROUNDS)
    ]
    values = np.array(indices, dtype=np.uint64)
    left = np.arange(len(values))
    while len(left):
        high, low = values[left] >> shift, values[left] & mask
        for key in keys:
            high, low = low, high ^ (scramble(low ^ key) & mask)
        values[left] = (high << shift) | low
        left = left[values[left] >= np.uint64(size)]
    return values.astype(np.int64)


def scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return well-mixed 64 bits of each number: the finalizer of splitmix64.

    References
    ----------
    G. L. Steele, D. Lea, C. H. Flood, OOPSLA 2014, 453-472.
    """
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))
