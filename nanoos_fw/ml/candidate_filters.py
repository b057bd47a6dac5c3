"""Which candidates are worth a prediction: composition, size, distance, charge."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from enum import IntEnum
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from nanoos_fw.errors import InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.graphs import CrystalArrays

_N = 119
_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=0)]
_Size = Annotated[float, Field(gt=0)]


class CandidateStatus(IntEnum):
    """What became of a candidate; the first reason that applies.

    Numbers are stored, so they never change; :data:`REASONS` tells what each means.
    """

    PREDICTED = 0
    LEFT_OUT = 1
    SIZE = 2
    COMPOSITION = 3
    CHARGE = 4
    VOLUME = 5
    NO_GRAPH = 6
    DISTANCE = 7
    UNREADABLE = 8
    NO_PREDICTION = 9


REASONS: dict[CandidateStatus, str] = {
    CandidateStatus.PREDICTED: "predicted",
    CandidateStatus.LEFT_OUT: "equals another candidate of the sequence",
    CandidateStatus.SIZE: "fails the filter n_sites",
    CandidateStatus.COMPOSITION: "fails a filter of the composition",
    CandidateStatus.CHARGE: "fails the filter charge_balance",
    CandidateStatus.VOLUME: "fails the filter volume_per_atom",
    CandidateStatus.NO_GRAPH: "has no graph: atoms coincide, or one has no neighbour "
    "within the cutoff radius",
    CandidateStatus.DISTANCE: "fails the filter min_distance",
    CandidateStatus.UNREADABLE: "could not be read",
    CandidateStatus.NO_PREDICTION: "a model gives no finite number for it",
}


# What nobody asked for; the other reasons are filters that did their work.
FAILURES = frozenset(
    {
        CandidateStatus.NO_GRAPH,
        CandidateStatus.UNREADABLE,
        CandidateStatus.NO_PREDICTION,
    }
)


class CandidateFilter(BaseModel):
    """What a candidate must fulfil to be predicted.

    Parameters
    ----------
    elements, require, exclude
        It holds nothing else than these; all of these; none of these.
    n_elements, n_sites
        Least and largest number.
    fraction
        Least and largest share of the atoms, by symbol.
    volume_per_atom
        Least and largest, Å³.
    min_distance
        Å, of any two atoms, periodic images included.
    charge_balance
        Common oxidation states, one for each element, can add up to zero.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    elements: tuple[str, ...] | None = None
    require: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    n_elements: tuple[_Count, _Count] | None = None
    n_sites: tuple[_Count, _Count] | None = None
    fraction: dict[str, tuple[_Share, _Share]] = {}
    volume_per_atom: tuple[_Size, _Size] | None = None
    min_distance: float | None = Field(default=None, gt=0)
    charge_balance: bool = False

    def kept_elements(self, elements: set[str]) -> set[str]:
        """Return those of some elements that a candidate may still hold."""
        kept = elements if self.elements is None else elements & {*self.elements}
        return kept - {*self.exclude}

    def status(self, flat: CrystalArrays) -> NDArray[np.uint8]:
        """Judge crystals by what needs no neighbours, ``(n,)``."""
        sizes = np.diff(flat.atom_start)
        status = np.zeros(len(sizes), dtype=np.uint8)
        if self.n_sites is not None:
            _fail(status, _outside(sizes, self.n_sites), CandidateStatus.SIZE)
        if self._judges_composition:
            counts = count_elements(flat)
            _fail(status, ~self._composition(counts), CandidateStatus.COMPOSITION)
            if self.charge_balance:
                rows = np.flatnonzero(status == 0)
                unique, inverse = unique_compositions(counts[rows])
                good = np.array([is_charge_balanced(c) for c in unique], dtype=bool)
                bad = np.zeros(len(sizes), dtype=bool)
                if len(rows):
                    bad[rows] = ~good[inverse]
                _fail(status, bad, CandidateStatus.CHARGE)
        if self.volume_per_atom is not None:
            volumes = np.abs(np.linalg.det(flat.lattices)) / sizes
            bad = _outside(volumes, self.volume_per_atom)
            _fail(status, bad, CandidateStatus.VOLUME)
        return status

    def too_close(self, table: GraphTable) -> NDArray[np.bool_]:
        """Tell which graphs have atoms closer than ``min_distance``, ``(n,)``."""
        if self.min_distance is None:
            return np.zeros(len(table), dtype=bool)
        # Every atom keeps its nearest neighbour, so the smallest edge is the smallest
        # distance unless that is beyond the cutoff radius.
        nearest = np.minimum.reduceat(table.distances, table.edge_start[:-1])
        return np.asarray(nearest < self.min_distance)

    @property
    def _judges_composition(self) -> bool:
        return (
            self.elements is not None
            or bool(self.require or self.exclude or self.fraction)
            or self.n_elements is not None
            or self.charge_balance
        )

    def _composition(self, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
        has = counts > 0
        good = np.ones(len(counts), dtype=bool)
        if self.elements is not None:
            others = np.setdiff1d(np.arange(_N), _numbers(self.elements))
            good &= ~has[:, others].any(axis=1)
        good &= has[:, _numbers(self.require)].all(axis=1)
        good &= ~has[:, _numbers(self.exclude)].any(axis=1)
        if self.n_elements is not None:
            good &= ~_outside(has.sum(axis=1), self.n_elements)
        total = counts.sum(axis=1)
        for name, (least, most) in self.fraction.items():
            _check_limits((least, most))
            share = counts[:, _numbers((name,))[0]] / total
            # 1/3 of the atoms must pass as 0.3333333333
            good &= (share >= least - 1e-9) & (share <= most + 1e-9)
        return good


def count_elements(flat: CrystalArrays) -> NDArray[np.int64]:
    """Return the atoms of each element, ``(n_crystals, 119)``."""
    n = len(flat.atom_start) - 1
    crystal = np.repeat(np.arange(n), np.diff(flat.atom_start))
    flat_counts = np.bincount(crystal * _N + flat.numbers, minlength=n * _N)
    return flat_counts.reshape(n, _N)


def unique_compositions(
    counts: NDArray[np.int64],
) -> tuple[list[tuple[tuple[int, int], ...]], NDArray[np.int64]]:
    """Return the different reduced compositions, and that of each row.

    A composition is pairs of atomic number and count, without common divisor.
    """
    if not len(counts):
        return [], np.zeros(0, dtype=np.int64)
    reduced = counts // np.gcd.reduce(counts, axis=1)[:, None]
    used = np.flatnonzero(reduced.any(axis=0))
    # One item per row: sorting rows as bytes takes a tenth of sorting them as numbers.
    packed = np.ascontiguousarray(reduced[:, used].astype(np.int32))
    rows = packed.view(np.dtype((np.void, 4 * len(used)))).ravel()
    _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    names = used.tolist()
    return [
        tuple((z, c) for z, c in zip(names, row, strict=True) if c)
        for row in packed[first].tolist()
    ], inverse.ravel()


@functools.lru_cache(maxsize=65536)
def is_charge_balanced(composition: tuple[tuple[int, int], ...]) -> bool:
    """Tell whether common oxidation states, one for each element, add up to zero.

    Parameters
    ----------
    composition
        Pairs of atomic number and count.

    Notes
    -----
    States as pymatgen tabulates them; an element without any counts as neutral. An
    intermetallic compound is not balanced in this sense, nor a mixed-valence one.
    """
    sums = {0}
    for number, count in composition:
        sums = {s + count * state for s in sums for state in _states(number)}
    return 0 in sums


def known_in(
    flat: CrystalArrays, known: Collection[tuple[tuple[int, int], ...]]
) -> NDArray[np.bool_]:
    """Tell which crystals have a composition that is among the known ones, ``(n,)``."""
    if not known:
        return np.zeros(len(flat.atom_start) - 1, dtype=bool)
    unique, inverse = unique_compositions(count_elements(flat))
    found = np.array([composition in known for composition in unique], dtype=bool)
    return found[inverse] if len(inverse) else np.zeros(0, dtype=bool)


# ------------------------------------------------------------------------- private


@functools.cache
def _states(number: int) -> tuple[int, ...]:
    from pymatgen.core import Element

    return tuple(Element.from_Z(number).common_oxidation_states) or (0,)


def _numbers(names: tuple[str, ...]) -> NDArray[np.int64]:
    from pymatgen.core import Element

    unknown = [name for name in names if not Element.is_valid_symbol(name)]
    if unknown:
        raise InputError(f"unknown elements in a filter: {', '.join(unknown)}")
    return np.array([Element(name).Z for name in names], dtype=np.int64)


def _outside(
    values: NDArray[np.int64] | NDArray[np.float64], limits: tuple[float, float]
) -> NDArray[np.bool_]:
    _check_limits(limits)
    least, most = limits
    return np.asarray((values < least) | (values > most))


def _check_limits(limits: tuple[float, float]) -> None:
    least, most = limits
    if not (math.isfinite(least) and least <= most):
        raise InputError(f"limits must be a least and a largest value: {limits}")


def _fail(
    status: NDArray[np.uint8], bad: NDArray[np.bool_], reason: CandidateStatus
) -> None:
    status[bad & (status == 0)] = reason
