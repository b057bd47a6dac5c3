"""Generated sequences of candidates: supercells, substitutions, states of strain."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.ml.candidates import (
    CandidateSource,
    StrainSpec,
    SubstitutionSpec,
    SupercellSpec,
    open_candidates,
    take_rows,
)
from nanoos_fw.ml.graphs import CrystalArrays
from nanoos_fw.ml.permutations import permute
from nanoos_fw.prototypes import GROUND_STATES, PROTOTYPES, build_prototype

# Numbers of candidates and codes of decorations are exact as doubles.
MAX_CANDIDATES = 2**53
_SAME_SITE = 1e-4  # of fractional coordinates, in a cell that we built ourselves
_MAX_SITES = 10_000  # of a candidate: far beyond what is ever screened


def open_generated(
    spec: SupercellSpec | SubstitutionSpec | StrainSpec,
) -> CandidateSource:
    """Return the sequence of a specification; see ``candidates.open_candidates``."""
    if isinstance(spec, SupercellSpec):
        return _Supercells(spec)
    source = open_candidates(spec.source)
    if isinstance(spec, SubstitutionSpec):
        return _Substitutions(spec, source)
    return _Strained(spec, source)


# ------------------------------------------------------------------------- private


class _Supercells(CandidateSource):
    def __init__(self, spec: SupercellSpec) -> None:
        if spec.prototype not in PROTOTYPES:
            raise InputError(
                f"unknown prototype {spec.prototype!r}",
                evidence={"known": list(PROTOTYPES)},
            )
        if min(spec.repeat) < 1:
            raise InputError(f"repeat must be at least 1: {spec.repeat}")
        prototype = PROTOTYPES[spec.prototype]
        if len(spec.elements) != prototype.n_species:
            raise InputError(
                f"{spec.prototype} has {prototype.n_species} roles, elements are given "
                f"for {len(spec.elements)}"
            )
        choices = [_numbers_of(names) for names in spec.elements]
        for names, numbers in zip(spec.elements, choices, strict=True):
            if not len(numbers) or len(set(numbers.tolist())) != len(numbers):
                raise InputError(f"elements of a role must differ: {list(names)}")
        self._spec = spec
        self._volumes = _volume_table(
            spec.volume_per_atom, sorted({n for names in spec.elements for n in names})
        )
        # The undecorated cell: a role is written as an element.
        cell = build_prototype(
            prototype, ["H", "He", "Li", "Be"][: prototype.n_species], 1.0
        )
        n_sites = len(cell) * math.prod(spec.repeat)
        if n_sites > _MAX_SITES:  # before they fill the memory
            raise InputError(
                f"repeat {spec.repeat} makes cells of {n_sites} sites, more than "
                f"{_MAX_SITES}",
                advice="use a smaller repeat",
            )
        cell.make_supercell(spec.repeat, to_unit_cell=True)
        self._cell = cell
        self._unit = np.asarray(cell.lattice.matrix)
        self._unit = self._unit * (len(cell) / cell.volume) ** (1 / 3)
        self._frac = np.asarray(cell.frac_coords)
        roles = np.array([site.specie.Z - 1 for site in cell])
        # Each digit of a code chooses the element of some sites.
        self._digit_of = roles if spec.together else np.arange(len(cell))
        digit_roles = range(prototype.n_species) if spec.together else roles
        self._choices = [choices[role] for role in digit_roles]
        total = math.prod(len(own) for own in self._choices)
        if total > MAX_CANDIDATES:
            raise InputError(
                f"there are {total} decorations, more than {MAX_CANDIDATES}",
                advice="use fewer elements or a smaller repeat",
            )
        self._total = total
        self._count = min(total, spec.count or total)
        self._weights = np.ones(len(self._choices), dtype=np.int64)
        for place in range(len(self._choices) - 2, -1, -1):
            following = len(self._choices[place + 1])
            self._weights[place] = self._weights[place + 1] * following
        self._symmetry = self._symmetries() if spec.unique else None

    def __len__(self) -> int:
        return self._count

    def identity(self) -> Mapping[str, Any]:
        spec = self._spec.model_dump(mode="json")
        return {**spec, "volume_per_atom": self._volumes_by_name()}

    def elements(self) -> set[str]:
        return {name for names in self._spec.elements for name in names}

    def window(self, start: int, stop: int) -> CrystalArrays:
        _check_window(start, stop, self._count)
        codes = permute(np.arange(start, stop), self._total, self._spec.seed)
        radix = np.array([len(own) for own in self._choices])
        digits = codes[:, None] // self._weights % radix
        positions = np.arange(stop - start)
        if self._symmetry is not None:
            keep = self._is_first(digits, codes)
            digits, positions = digits[keep], positions[keep]
        table = np.zeros((len(radix), int(radix.max())), dtype=np.uint8)
        for place, own in enumerate(self._choices):
            table[place, : len(own)] = own
        numbers = table[np.arange(len(radix)), digits][:, self._digit_of]
        n, sites = numbers.shape
        scale = self._volumes[numbers].mean(axis=1) ** (1 / 3)
        return CrystalArrays(
            numbers=numbers.ravel(),
            lattices=self._unit * scale[:, None, None],
            frac_coords=np.tile(self._frac, (n, 1)),
            atom_start=np.arange(n + 1, dtype=np.int64) * sites,
            positions=positions,
        )

    def _volumes_by_name(self) -> dict[str, float]:
        names = sorted({n for names in self._spec.elements for n in names})
        return dict(zip(names, self._volumes[_numbers_of(names)].tolist(), strict=True))

    def _symmetries(self) -> NDArray[np.float64]:
        """Return ``(n_digits, n_operations)``: weights of digits in a moved code."""
        from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

        # All sites of a role are alike, and roles stay where they are.
        moved = set()
        with warnings.catch_warnings():
            # pymatgen calls spglib in a way that its newer releases warn of.
            warnings.simplefilter("ignore", DeprecationWarning)
            analyzer = SpacegroupAnalyzer(self._cell, symprec=1e-4)
            operations = analyzer.get_symmetry_operations()
        for operation in operations:
            new = operation.operate_multi(self._frac)
            delta = new[:, None] - self._frac
            delta -= np.round(delta)
            near = (np.abs(delta) < _SAME_SITE).all(axis=2)
            if not (near.sum(axis=1) == 1).all():
                raise InputError(
                    f"an operation of {self._spec.prototype} maps no site on a site"
                )
            target = self._digit_of[near.argmax(axis=1)]
            places = np.empty(len(self._choices), dtype=np.int64)
            places[self._digit_of] = target
            moved.add(tuple(places.tolist()))
        return np.asarray(self._weights[np.array(sorted(moved))].T, dtype=np.float64)

    def _is_first(
        self, digits: NDArray[np.int64], codes: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Tell which decorations have the smallest code among the equivalent ones."""
        keep = np.empty(len(codes), dtype=bool)
        weights = np.asarray(self._symmetry)
        for begin in range(0, len(codes), 1024):
            rows = slice(begin, begin + 1024)
            keep[rows] = (digits[rows].astype(np.float64) @ weights).min(
                axis=1
            ) >= codes[rows]
        return keep


class _Substitutions(CandidateSource):
    def __init__(self, spec: SubstitutionSpec, source: CandidateSource) -> None:
        self._spec, self._source = spec, source
        self._old = _numbers_of(list(spec.replace))
        choices = [_numbers_of(names) for names in spec.replace.values()]
        if any(not len(own) or len(set(own.tolist())) < len(own) for own in choices):
            raise InputError("replacements of an element must differ, and be given")
        grids = np.meshgrid(*choices, indexing="ij")
        self._new = np.stack([grid.ravel() for grid in grids], axis=1)
        _check_size(len(source) * len(self._new))
        self._maps = np.tile(np.arange(119, dtype=np.uint8), (len(self._new), 1))
        self._maps[:, self._old] = self._new
        self._volumes = None
        if spec.volume_per_atom is not None:
            self._volumes = _volume_table(spec.volume_per_atom, list(GROUND_STATES))

    def __len__(self) -> int:
        return len(self._source) * len(self._new)

    def identity(self) -> Mapping[str, Any]:
        own = self._spec.model_dump(mode="json", exclude={"source"})
        # The order of the choices counts, and JSON objects have none.
        own["replace"] = [[old, list(new)] for old, new in own["replace"].items()]
        return {**own, "source": self._source.identity()}

    def elements(self) -> set[str]:
        replace = self._spec.replace
        kept = self._source.elements() - replace.keys()
        return kept.union(*(new for new in replace.values()))

    def window(self, start: int, stop: int) -> CrystalArrays:
        flat, choice = _spread(self._source, len(self._new), start, stop)
        sizes = np.diff(flat.atom_start)
        crystal = np.repeat(np.arange(len(sizes)), sizes)
        numbers = self._maps[choice[crystal], flat.numbers]
        # An element that is not there takes no part: only its first choice counts.
        keep = np.ones(len(sizes), dtype=bool)
        for place, old in enumerate(self._old.tolist()):
            has = np.zeros(len(sizes), dtype=bool)
            has[crystal[flat.numbers == old]] = True
            keep &= has | (self._new[choice, place] == self._new[0, place])
        lattices = flat.lattices
        if self._volumes is not None and len(numbers):
            sums = [
                np.add.reduceat(self._known(z), flat.atom_start[:-1])
                for z in (numbers, flat.numbers)
            ]
            lattices = lattices * ((sums[0] / sums[1]) ** (1 / 3))[:, None, None]
        changed = CrystalArrays(
            numbers, lattices, flat.frac_coords, flat.atom_start, flat.positions
        )
        return changed if keep.all() else take_rows(changed, np.flatnonzero(keep))

    def unreadable(self, start: int, stop: int) -> NDArray[np.bool_]:
        return _spread_unreadable(self._source, len(self._new), start, stop)

    def label(self, index: int) -> str | None:
        return _spread_label(self._source, len(self._new), index)

    def failure(self, index: int) -> str | None:
        return self._source.failure(index // len(self._new))

    def _known(self, numbers: NDArray[np.uint8]) -> NDArray[np.float64]:
        volumes = np.asarray(self._volumes)[numbers]
        if np.isnan(volumes).any():
            from nanoos_fw.crystals import element_symbol

            missing = np.unique(numbers[np.isnan(volumes)])
            names = ", ".join(element_symbol(int(z)) for z in missing)
            raise InputError(
                f"volume_per_atom has no value for {names}",
                advice="give it, or leave volume_per_atom out to keep the cells",
            )
        return np.asarray(volumes)


class _Strained(CandidateSource):
    def __init__(self, spec: StrainSpec, source: CandidateSource) -> None:
        self._spec, self._source = spec, source
        xx, yy, zz, yz, xz, xy = np.array(spec.strains, dtype=np.float64).T
        rows = [[1 + xx, xy, xz], [xy, 1 + yy, yz], [xz, yz, 1 + zz]]
        self._deformations = np.moveaxis(np.array(rows), 2, 0)
        if not (np.linalg.det(self._deformations) > 0).all():
            raise InputError("a strain leaves no volume, or is not finite")
        _check_size(len(source) * len(spec.strains))

    def __len__(self) -> int:
        return len(self._source) * len(self._deformations)

    def identity(self) -> Mapping[str, Any]:
        own = self._spec.model_dump(mode="json", exclude={"source"})
        return {**own, "source": self._source.identity()}

    def elements(self) -> set[str]:
        return self._source.elements()

    def window(self, start: int, stop: int) -> CrystalArrays:
        flat, choice = _spread(self._source, len(self._deformations), start, stop)
        return CrystalArrays(
            flat.numbers,
            flat.lattices @ self._deformations[choice],
            flat.frac_coords,
            flat.atom_start,
            flat.positions,
        )

    def unreadable(self, start: int, stop: int) -> NDArray[np.bool_]:
        return _spread_unreadable(self._source, len(self._deformations), start, stop)

    def label(self, index: int) -> str | None:
        return _spread_label(self._source, len(self._deformations), index)

    def failure(self, index: int) -> str | None:
        return self._source.failure(index // len(self._deformations))


def _spread(
    source: CandidateSource, per: int, start: int, stop: int
) -> tuple[CrystalArrays, NDArray[np.int64]]:
    """Return crystals of which each stands for ``per``, and the choice of each."""
    _check_window(start, stop, len(source) * per)
    first = start // per
    base = source.window(first, -(-stop // per))
    indices = np.arange(start, stop)
    row_of = np.full(-(-stop // per) - first, -1, dtype=np.int64)
    row_of[base.positions] = np.arange(len(base.positions))
    rows = row_of[indices // per - first]
    there = np.flatnonzero(rows >= 0)
    flat = take_rows(base, rows[there])
    placed = CrystalArrays(
        flat.numbers, flat.lattices, flat.frac_coords, flat.atom_start, there
    )
    return placed, indices[there] % per


def _spread_unreadable(
    source: CandidateSource, per: int, start: int, stop: int
) -> NDArray[np.bool_]:
    first = start // per
    bad = source.unreadable(first, -(-stop // per))
    return np.asarray(bad[np.arange(start, stop) // per - first])


def _spread_label(source: CandidateSource, per: int, index: int) -> str | None:
    name = source.label(index // per)
    return None if name is None else f"{name}#{index % per}"


def _numbers_of(names: Sequence[str]) -> NDArray[np.int64]:
    from pymatgen.core import Element

    strange = [n for n in names if n in ("D", "T") or not Element.is_valid_symbol(n)]
    if strange:
        raise InputError(f"unknown elements: {', '.join(strange)}")
    return np.array([Element(name).Z for name in names], dtype=np.int64)


def _volume_table(
    given: Mapping[str, float], names: Sequence[str]
) -> NDArray[np.float64]:
    """Return Å³/atom by atomic number, NaN where none is known."""
    table = np.full(119, np.nan)
    for name, state in GROUND_STATES.items():
        table[_numbers_of([name])] = state.volume_per_atom
    table[_numbers_of(list(given))] = list(given.values())
    missing = [n for n in names if np.isnan(table[_numbers_of([n])][0])]
    if missing:
        raise InputError(
            f"volume_per_atom has no value for {', '.join(missing)}",
            advice="give Å³/atom of each, for example of its ground state",
        )
    return table


def _check_window(start: int, stop: int, size: int) -> None:
    if not 0 <= start < stop <= size:
        raise InputError(f"window [{start}, {stop}) is not within {size} candidates")


def _check_size(size: int) -> None:
    if not 1 <= size <= MAX_CANDIDATES:
        raise InputError(f"the specification means {size} candidates")
