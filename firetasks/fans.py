"""How work is dealt out to fireworks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

# FireWorks' work for one completion grows with the parents and children it has.
MAX_FAN = 50


def bounds(count: int, size: int) -> list[tuple[int, int]]:
    """Cut ``count`` items into at most ``MAX_FAN`` parts of about ``size``, or more."""
    number = min(max(1, math.ceil(count / size)), MAX_FAN)
    ends = np.linspace(0, count, number + 1).round().astype(int).tolist()
    return list(pairwise(ends))


def chunks(keys: Sequence[str], size: int) -> list[list[str]]:
    """Split keys into at most ``MAX_FAN`` parts of about ``size``, or more."""
    return [list(keys[start:stop]) for start, stop in bounds(len(keys), size)]
