"""The text of potential files: what is in them, and a part of them."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from nanoos_fw.errors import InputError

# Words of one entry: three elements and the numbers that follow; and where the
# cutoff stands among the numbers: R and D to be added, or sigma and a to be multiplied.
_ENTRY_WORDS = {
    "tersoff": 17,
    "tersoff/mod": 20,
    "tersoff/mod/c": 21,
    "tersoff/zbl": 21,
    "sw": 14,
    "sw/mod": 14,
    "vashishta": 17,
}
_R_AND_D = {"tersoff": 10, "tersoff/zbl": 10, "tersoff/mod": 7, "tersoff/mod/c": 7}
_LINE_OF_ELEMENTS = 3  # setfl: three comment lines, then the elements
_TAGS = ("DATE", "UNITS", "CONTRIBUTOR", "CITATION", "COMMENT")
_TAG_LINES = 4  # some files open with another comment


@dataclass(frozen=True)
class FileHeader:
    """What the metadata of a potential file of LAMMPS says; empty where it is silent.

    Parameters
    ----------
    date
        Day of the last change, ``yyyy-mm-dd``.
    units
        LAMMPS unit system. LAMMPS refuses another one if this tag is there.
    contributor, citation
        As they stand.
    """

    date: str = ""
    units: str = ""
    contributor: str = ""
    citation: str = ""


def read_header(text: str) -> FileHeader:
    """Return the metadata in the first lines of a potential file."""
    found: dict[str, str] = {}
    # One file writes COMMENT without its colon.
    pattern = re.compile(rf"\b({'|'.join(_TAGS)})(?::|(?<=COMMENT))")
    for line in text.splitlines()[:_TAG_LINES]:
        parts = pattern.split(line.lstrip("# "))
        for tag, value in zip(parts[1::2], parts[2::2], strict=True):
            # The first DATE is the last change.
            found.setdefault(tag, " ".join(value.split()))
    return FileHeader(
        date=found.get("DATE", "").split(" ")[0],
        units=(found.get("UNITS", "").split() or [""])[0],
        contributor=found.get("CONTRIBUTOR", ""),
        citation=found.get("CITATION", ""),
    )


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


def read_entries(
    text: str, pair_style: str, elements: Sequence[str] | None = None
) -> tuple[tuple[str, ...], float | None]:
    """Return the elements and the largest cutoff in Å of a three-body file.

    Parameters
    ----------
    text
        The whole file.
    pair_style
        ``tersoff`` and its variants, ``sw``, ``sw/mod`` or ``vashishta``.
    elements
        Look at these elements only; None looks at all.

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
    if elements is not None:
        entries = [entry for entry in entries if set(entry[:3]) <= set(elements)]
    cutoffs = []
    for entry in entries:
        numbers = [float(word) for word in entry[3:]]
        if pair_style in ("sw", "sw/mod"):
            cutoffs.append(numbers[1] * numbers[2])  # sigma times a
        elif pair_style == "vashishta":
            cutoffs.append(numbers[8])
        elif pair_style in _R_AND_D:
            at = _R_AND_D[pair_style]
            cutoffs.append(numbers[at] + numbers[at + 1])
    triplets = {tuple(entry[:3]) for entry in entries}
    found = sorted({word for triplet in triplets for word in triplet})
    # LAMMPS wants an entry for every triplet, so an element counts only with all.
    if missing := set(itertools.product(found, repeat=3)) - triplets:
        raise ValueError(f"no entry for {' '.join(min(missing))}")
    return tuple(found), max(cutoffs, default=None)


def read_funcfl_header(text: str) -> tuple[int, float]:
    """Return the atomic number and the cutoff in Å of an ``eam`` file (funcfl).

    Raises
    ------
    ValueError, IndexError
        If it is no such file.
    """
    lines = text.split("\n", 3)
    return int(lines[1].split()[0]), float(lines[2].split()[4])


@dataclass(frozen=True)
class ReaxHeader:
    """What a ReaxFF file says of itself.

    Parameters
    ----------
    elements
        In the order of the file, without the dummy ``X``.
    taper_a
        Lower and upper taper radius in Å: charges act up to the upper one.
    has_lg
        Whether the atoms have the five lines of low-gradient dispersion.
    """

    elements: tuple[str, ...]
    taper_a: tuple[float, float]
    has_lg: bool


def read_reax(text: str) -> ReaxHeader:
    """Return elements and taper radii of a ReaxFF file.

    Raises
    ------
    ValueError, IndexError
        If it is no such file.
    """
    lines = text.splitlines()
    n_general = int(lines[1].split()[0])
    general = [float(line.split()[0]) for line in lines[2 : 2 + n_general]]
    at = 2 + n_general
    n_atoms = int(lines[at].split()[0])
    body = lines[at + 4 :]
    starts = []
    for number, line in enumerate(body):
        words = line.split()
        if words and not re.match(r"[-+.\d]", words[0]):
            starts.append(number)
        if len(starts) == n_atoms:
            break
    if len(starts) < n_atoms or n_general < 13:
        raise ValueError(f"{len(starts)} of {n_atoms} atoms are there")
    symbols = [body[number].split()[0] for number in starts]
    height = starts[1] - starts[0] if n_atoms > 1 else 4
    if height not in (4, 5):
        raise ValueError(f"the first atom has {height} lines")
    return ReaxHeader(
        elements=tuple(s.capitalize() for s in symbols if s not in ("X", "x")),
        taper_a=(general[11], general[12]),
        has_lg=height == 5,
    )


def read_meam_library(text: str) -> dict[str, int]:
    """Return the atomic number of each entry of a MEAM library, by its name.

    Raises
    ------
    ValueError, IndexError
        If it is no such file.
    """
    entries: dict[str, int] = {}
    for line in text.splitlines():
        if not line.startswith("'"):
            continue
        words = shlex.split(line)
        entries.setdefault(words[0], int(float(words[3])))
    if not entries:
        raise ValueError("there is no entry")
    return entries


def read_meam_cutoff(text: str) -> float:
    """Return the cutoff ``rc`` in Å of a MEAM parameter file; LAMMPS' own is 4."""
    found = re.search(r"^\s*rc\s*=\s*([-+.\dEe]+)", text, flags=re.MULTILINE)
    return float(found.group(1)) if found else 4.0


def read_entry_elements(text: str, pair_style: str) -> tuple[str, ...]:
    """Return the elements of a three-body file that have an entry of their own.

    Raises
    ------
    ValueError, KeyError
        If it is no such file.
    """
    words = " ".join(line.split("#", 1)[0] for line in text.splitlines()).split()
    size = _ENTRY_WORDS[pair_style]
    if not words or len(words) % size:
        raise ValueError(f"{len(words)} words are not entries of {size}")
    triplets = {tuple(words[i : i + 3]) for i in range(0, len(words), size)}
    return tuple(sorted({t[0] for t in triplets if len(set(t)) == 1}))
