"""The text of potential files: what is in them, and a part of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

from nanoos_fw.errors import InputError

# Words of one entry: three elements and the numbers that follow.
_ENTRY_WORDS = {"tersoff": 17, "sw": 14}
_LINE_OF_ELEMENTS = 3  # setfl: three comment lines, then the elements


def setfl_subset(text: str, elements: Sequence[str]) -> str:
    """Return an ``eam/alloy`` file cut down to some of its elements.

    The tables are copied as text, so the numbers stay what they were.

    Raises
    ------
    InputError
        If the file lacks an element or is cut short.
    """
    lines, words = _setfl_parts(text)
    names, _ = read_setfl_header(text)
    if missing := sorted(set(elements) - set(names)):
        raise InputError(f"the setfl file has no {', '.join(missing)}, only {names}")
    grid = lines[_LINE_OF_ELEMENTS + 1].split()
    n_rho, n_r = int(grid[0]), int(grid[2])
    n, block = len(names), 4 + n_rho + n_r
    if len(words) != n * block + n * (n + 1) // 2 * n_r:
        raise InputError(f"the setfl file has {len(words)} values, not as its header")
    out = [
        *lines[:_LINE_OF_ELEMENTS],
        f"{len(elements)} {' '.join(elements)}",
        lines[_LINE_OF_ELEMENTS + 1],
    ]
    index = [names.index(element) for element in elements]
    for i in index:
        start = i * block
        out.append(" ".join(words[start : start + 4]))
        out.append("\n".join(words[start + 4 : start + block]))
    for row, i in enumerate(index):
        for j in index[: row + 1]:
            high, low = max(i, j), min(i, j)
            start = n * block + (high * (high + 1) // 2 + low) * n_r
            out.append("\n".join(words[start : start + n_r]))
    return "\n".join(out) + "\n"


@lru_cache(maxsize=2)
def _setfl_parts(text: str) -> tuple[list[str], list[str]]:
    """Return the header's lines and all words after it; a batch asks many times."""
    lines = text.split("\n", _LINE_OF_ELEMENTS + 2)
    return lines[:-1], lines[-1].split()


def read_setfl_header(text: str) -> tuple[tuple[str, ...], float]:
    """Return the elements and the cutoff in Å of an ``eam/alloy`` or ``eam/fs`` file.

    Raises
    ------
    ValueError, IndexError
        If it is no such file.
    """
    lines = text.split("\n", _LINE_OF_ELEMENTS + 3)
    words = lines[_LINE_OF_ELEMENTS].split()
    elements = tuple(words[1:])
    if not elements or int(words[0]) != len(elements):
        raise ValueError(f"line 4 counts {words[0]} elements and names {elements}")
    return elements, float(lines[_LINE_OF_ELEMENTS + 1].split()[4])


def read_entries(text: str, pair_style: str) -> tuple[tuple[str, ...], float]:
    """Return the elements and the largest cutoff in Å of a three-body file.

    Raises
    ------
    ValueError, IndexError
        If it is no such file, or the entry of a triplet is missing.
    """
    words = " ".join(line.split("#", 1)[0] for line in text.splitlines()).split()
    size = _ENTRY_WORDS[pair_style]
    if not words or len(words) % size:
        raise ValueError(f"{len(words)} words are not entries of {size}")
    entries = [words[i : i + size] for i in range(0, len(words), size)]
    cutoffs = []
    for entry in entries:
        numbers = [float(word) for word in entry[3:]]
        if pair_style == "sw":
            cutoffs.append(numbers[1] * numbers[2])  # sigma times a
        else:
            cutoffs.append(numbers[10] + numbers[11])  # R plus D
    # LAMMPS wants an entry for every triplet, so an element counts only with all.
    triplets = {tuple(entry[:3]) for entry in entries}
    elements = sorted({word for triplet in triplets for word in triplet})
    if missing := set(itertools.product(elements, repeat=3)) - triplets:
        raise ValueError(f"no entry for {' '.join(min(missing))}")
    return tuple(elements), max(cutoffs)
