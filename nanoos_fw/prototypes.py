"""Candidate crystals from structure prototypes.

Ordered binary alloys on the fcc and bcc lattices, named by their Strukturbericht
designation, and the ground states of the sixteen metals of the Zhou potentials as
starting points.

References
----------
Prototypes: M. J. Mehl et al., "The AFLOW Library of Crystallographic Prototypes:
Part 1", Comput. Mater. Sci. 136, S1 (2017).
Volumes: E-an Zen, "Validity of 'Vegard's law'", Am. Mineral. 41, 523 (1956).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError

if TYPE_CHECKING:
    from pymatgen.core import Structure

_Vectors = tuple[tuple[float, float, float], ...]

_SC: _Vectors = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
_FCC: _Vectors = ((0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0))
_BCC: _Vectors = ((-0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.5, 0.5, -0.5))
_HEX: _Vectors = ((0.5, -math.sqrt(3) / 2, 0), (0.5, math.sqrt(3) / 2, 0), (0, 0, 1))
# The primitive cell of L1_0 has half the base of the face-centred tetragonal cell.
_FCT: _Vectors = ((0.5, -0.5, 0), (0.5, 0.5, 0), (0, 0, 1))
_IDEAL_HCP = math.sqrt(8 / 3)


@dataclass(frozen=True)
class Prototype:
    """A structure type with its primitive cell.

    Parameters
    ----------
    name
        Strukturbericht designation.
    pearson
        Pearson symbol; counts the atoms of the conventional cell.
    space_group
        Number in the International Tables, if all roles hold different elements.
    example
        A compound with this structure.
    vectors
        Primitive vectors, rows, in units of the conventional a and, along z, of c.
    positions
        Fractional coordinates in the primitive cell, ``(n_sites, 3)``.
    roles
        For each position the index of its species: 0 is A, 1 is B.
    ideal_c_over_a
        Axial ratio of the undistorted structure, or None where a = c by symmetry. For
        L1_0 it refers to the face-centred tetragonal cell, so 1 means fcc sites.
    """

    name: str
    pearson: str
    space_group: int
    example: str
    vectors: _Vectors
    positions: _Vectors
    roles: tuple[int, ...]
    ideal_c_over_a: float | None = None

    @property
    def n_species(self) -> int:
        """Number of roles."""
        return max(self.roles) + 1

    @property
    def counts(self) -> tuple[int, ...]:
        """Atoms of each role in the primitive cell."""
        return tuple(self.roles.count(role) for role in range(self.n_species))

    @property
    def symmetric_roles(self) -> bool:
        """Whether exchanging A and B gives the same crystal, shifted."""
        return self.name in _SYMMETRIC


_SYMMETRIC = frozenset({"L1_0", "B2", "B32"})

PROTOTYPES: dict[str, Prototype] = {
    prototype.name: prototype
    for prototype in (
        Prototype("A1", "cF4", 225, "Cu", _FCC, ((0, 0, 0),), (0,)),
        Prototype("A2", "cI2", 229, "W", _BCC, ((0, 0, 0),), (0,)),
        Prototype(
            "A3",
            "hP2",
            194,
            "Mg",
            _HEX,
            ((1 / 3, 2 / 3, 0.25), (2 / 3, 1 / 3, 0.75)),
            (0, 0),
            _IDEAL_HCP,
        ),
        Prototype(
            "L1_2",
            "cP4",
            221,
            "Cu3Au",
            _SC,
            ((0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)),
            (0, 1, 1, 1),
        ),
        Prototype(
            "L1_0", "tP2", 123, "CuAu", _FCT, ((0, 0, 0), (0.5, 0.5, 0.5)), (0, 1), 1.0
        ),
        Prototype("B2", "cP2", 221, "CsCl", _SC, ((0, 0, 0), (0.5, 0.5, 0.5)), (0, 1)),
        Prototype(
            "B32",
            "cF16",
            227,
            "NaTl",
            _FCC,
            ((0, 0, 0), (0.25, 0.25, 0.25), (0.5, 0.5, 0.5), (0.75, 0.75, 0.75)),
            (0, 0, 1, 1),
        ),
        Prototype(
            "D0_3",
            "cF16",
            225,
            "Fe3Al",
            _FCC,
            ((0, 0, 0), (0.25, 0.25, 0.25), (0.5, 0.5, 0.5), (0.75, 0.75, 0.75)),
            (0, 1, 1, 1),
        ),
    )
}
"""Prototypes by Strukturbericht designation. In L1_2 and D0_3, A is the minority."""

BINARY_PROTOTYPES = ("L1_2", "L1_0", "B2", "B32", "D0_3")


@dataclass(frozen=True)
class GroundState:
    """The stable crystal of an element at room temperature and pressure.

    Parameters
    ----------
    prototype
        A1 (fcc), A2 (bcc) or A3 (hcp).
    a
        Lattice parameter of the conventional cell, Å.
    c
        Å; A3 only.
    """

    prototype: str
    a: float
    c: float | None = None

    @property
    def volume_per_atom(self) -> float:
        """Volume per atom, Å³."""
        if self.c is not None:
            return math.sqrt(3) / 4 * self.a**2 * self.c
        return self.a**3 / (4 if self.prototype == "A1" else 2)


GROUND_STATE_SOURCE = (
    "N. W. Ashcroft and N. D. Mermin, Solid State Physics (Saunders, 1976), "
    "Tables 4.1, 4.2 and 4.4"
)
GROUND_STATES: dict[str, GroundState] = {
    "Cu": GroundState("A1", 3.61),
    "Ag": GroundState("A1", 4.09),
    "Au": GroundState("A1", 4.08),
    "Ni": GroundState("A1", 3.52),
    "Pd": GroundState("A1", 3.89),
    "Pt": GroundState("A1", 3.92),
    "Al": GroundState("A1", 4.05),
    "Pb": GroundState("A1", 4.95),
    "Fe": GroundState("A2", 2.87),
    "Mo": GroundState("A2", 3.15),
    "Ta": GroundState("A2", 3.31),
    "W": GroundState("A2", 3.16),
    "Mg": GroundState("A3", 3.21, 5.21),
    "Co": GroundState("A3", 2.51, 4.07),
    "Ti": GroundState("A3", 2.95, 4.69),
    "Zr": GroundState("A3", 3.23, 5.15),
}
"""Experimental ground states of sixteen metals, from `GROUND_STATE_SOURCE`."""


@dataclass(frozen=True)
class Candidate:
    """A generated crystal.

    Parameters
    ----------
    label
        Formula with the minority last, and prototype: ``Cu3Au L1_2``.
    prototype
        Strukturbericht designation.
    structure
        Primitive cell.
    """

    label: str
    prototype: str
    structure: Structure


def build_prototype(
    prototype: str | Prototype,
    species: Sequence[str],
    volume_per_atom: float,
    *,
    c_over_a: float | None = None,
) -> Structure:
    """Return the primitive cell of a prototype.

    Parameters
    ----------
    prototype
        Name in `PROTOTYPES`, or a prototype of one's own.
    species
        One element per role, A first. In L1_2 and D0_3, A is the minority.
    volume_per_atom
        Å³/atom.
    c_over_a
        Axial ratio for A3 and L1_0; None takes the ideal one.

    Raises
    ------
    InputError
        For an unknown prototype or element, a wrong number of species, a volume or
        ratio that is not a positive number, or a ratio for a cubic prototype.
    """
    from pymatgen.core import Element, Lattice, Structure

    chosen = _prototype(prototype)
    if len(species) != chosen.n_species:
        raise InputError(
            f"{chosen.name} takes {chosen.n_species} species, not {len(species)}: "
            f"{list(species)}"
        )
    unknown = [s for s in species if not Element.is_valid_symbol(s)]
    if unknown:
        raise InputError(f"unknown elements: {', '.join(map(str, unknown))}")
    _require_positive("volume_per_atom", volume_per_atom)
    ratio = chosen.ideal_c_over_a or 1.0
    if c_over_a is not None:
        if chosen.ideal_c_over_a is None:
            raise InputError(f"{chosen.name} is cubic and takes no c_over_a")
        _require_positive("c_over_a", c_over_a)
        ratio = c_over_a
    matrix: NDArray[np.float64] = np.array(chosen.vectors) * [1.0, 1.0, ratio]
    unit_volume = abs(float(np.linalg.det(matrix)))
    scale = (volume_per_atom * len(chosen.roles) / unit_volume) ** (1 / 3)
    return Structure(
        Lattice(matrix * scale),
        [species[role] for role in chosen.roles],
        [list(position) for position in chosen.positions],
    )


def ground_state(element: str) -> Structure:
    """Return the primitive cell of an element's experimental ground state.

    Raises
    ------
    InputError
        If the element is not in `GROUND_STATES`.
    """
    state = GROUND_STATES.get(element)
    if state is None:
        raise InputError(
            f"no ground state is tabulated for {element}",
            evidence={"tabulated": sorted(GROUND_STATES)},
        )
    return build_prototype(
        state.prototype,
        [element],
        state.volume_per_atom,
        c_over_a=None if state.c is None else state.c / state.a,
    )


def binary_alloys(
    elements: Iterable[str],
    volume_per_atom: Mapping[str, float],
    prototypes: Sequence[str] = BINARY_PROTOTYPES,
) -> Iterator[Candidate]:
    """Yield every ordered binary alloy of the elements, once each.

    L1_2 and D0_3 come both ways (A3B and AB3). Exchanging the elements of L1_0, B2 and
    B32 gives the same crystal, so these come once per pair. The volume is the mean of
    the elements' volumes per atom, weighted by composition (Zen's rule).

    Parameters
    ----------
    elements
        Any order; pairs are made in alphabetical order, so the output does not depend
        on it.
    volume_per_atom
        Å³/atom of each element, for example from relaxing its ground state with the
        potential that will be used.
    prototypes
        Names in `PROTOTYPES`, in the order in which they come for each pair.

    Raises
    ------
    InputError
        Before the first candidate: for fewer than two elements, repeated or unknown
        ones, missing volumes, or prototypes that are unknown or not binary.
    """
    names = sorted(elements)
    _check_alloys(names, volume_per_atom, prototypes)
    return _binary_alloys(names, volume_per_atom, [PROTOTYPES[p] for p in prototypes])


def _binary_alloys(
    names: Sequence[str],
    volumes: Mapping[str, float],
    prototypes: Sequence[Prototype],
) -> Iterator[Candidate]:
    for pair in itertools.combinations(names, 2):
        for prototype in prototypes:
            orders = [pair] if prototype.symmetric_roles else [pair, pair[::-1]]
            for species in orders:
                total = sum(
                    count * volumes[name]
                    for name, count in zip(species, prototype.counts, strict=True)
                )
                yield Candidate(
                    label=f"{_formula(species, prototype.counts)} {prototype.name}",
                    prototype=prototype.name,
                    structure=build_prototype(
                        prototype, species, total / len(prototype.roles)
                    ),
                )


def _check_alloys(
    names: Sequence[str],
    volumes: Mapping[str, float],
    prototypes: Sequence[str],
) -> None:
    from pymatgen.core import Element

    unknown = [name for name in names if not Element.is_valid_symbol(name)]
    if unknown:
        raise InputError(f"unknown elements: {', '.join(unknown)}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or len(names) < 2:
        raise InputError(
            "binary alloys need at least two different elements, each given once",
            evidence={"elements": list(names), "repeated": repeated},
        )
    missing = [name for name in names if name not in volumes]
    if missing:
        raise InputError(
            f"volume_per_atom has no value for {', '.join(missing)}",
            advice="relax the ground states of the elements first",
        )
    for name in names:
        _require_positive(f"volume_per_atom of {name}", volumes[name])
    for name in prototypes:
        if _prototype(name).n_species != 2:
            raise InputError(
                f"{name} is not a binary prototype",
                evidence={"binary": list(BINARY_PROTOTYPES)},
            )
    if len(set(prototypes)) != len(prototypes):
        raise InputError(f"prototypes are repeated: {list(prototypes)}")


def _prototype(prototype: str | Prototype) -> Prototype:
    if isinstance(prototype, Prototype):
        return prototype
    if prototype not in PROTOTYPES:
        raise InputError(
            f"unknown prototype {prototype!r}", evidence={"known": list(PROTOTYPES)}
        )
    return PROTOTYPES[prototype]


def _formula(species: Sequence[str], counts: Sequence[int]) -> str:
    """Return the formula, majority first, then as given."""
    parts = sorted(zip(species, counts, strict=True), key=lambda part: -part[1])
    divisor = math.gcd(*counts)
    return "".join(
        f"{name}{count // divisor if count > divisor else ''}" for name, count in parts
    )


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} must be a positive number, not {value}")
