from __future__ import annotations

import math

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Element
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from nanoos_fw.crystals import check_structure, structure_key
from nanoos_fw.errors import InputError
from nanoos_fw.prototypes import (
    BINARY_PROTOTYPES,
    GROUND_STATES,
    PROTOTYPES,
    binary_alloys,
    build_prototype,
    ground_state,
)

# spglib says this on every call by way of pymatgen.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*OLD_ERROR_HANDLING:DeprecationWarning"
)

VOLUMES = {name: state.volume_per_atom for name, state in GROUND_STATES.items()}
EXACT = StructureMatcher(ltol=1e-4, stol=1e-4, angle_tol=0.01, scale=False)


def build(name: str, volume: float = 12.0):
    return build_prototype(name, ["Cu", "Au"][: PROTOTYPES[name].n_species], volume)


def shell(structure, site: int, radius: float) -> dict[str, int]:
    """Neighbours of a site within a radius, by element."""
    counts: dict[str, int] = {}
    for neighbour in structure.get_neighbors(structure[site], radius):
        symbol = neighbour.specie.symbol
        counts[symbol] = counts.get(symbol, 0) + 1
    return counts


@pytest.mark.parametrize("name", list(PROTOTYPES))
def test_space_group_and_pearson_symbol(name):
    structure = build(name)
    analyzer = SpacegroupAnalyzer(structure, symprec=1e-5)
    assert analyzer.get_space_group_number() == PROTOTYPES[name].space_group
    assert analyzer.get_pearson_symbol() == PROTOTYPES[name].pearson


@pytest.mark.parametrize("name", list(PROTOTYPES))
def test_the_cell_is_primitive_and_has_the_volume_asked_for(name):
    structure = build(name, 13.7)
    assert len(structure.get_primitive_structure()) == len(structure)
    assert structure.volume / len(structure) == pytest.approx(13.7, rel=1e-12)
    assert np.linalg.det(structure.lattice.matrix) > 0
    check_structure(structure)


# Nearest shells as every textbook draws them: (site, radius in units of the cubic a).
@pytest.mark.parametrize(
    ("name", "atoms_per_a3", "site", "radius", "expected"),
    [
        ("A1", 4, 0, 0.75, {"Cu": 12}),
        ("A2", 2, 0, 0.90, {"Cu": 8}),
        ("L1_2", 4, 0, 0.75, {"Au": 12}),
        ("L1_2", 4, 1, 0.75, {"Cu": 4, "Au": 8}),
        ("L1_0", 4, 0, 0.75, {"Cu": 4, "Au": 8}),
        ("B2", 2, 0, 0.90, {"Au": 8}),
        ("B32", 16, 0, 0.45, {"Cu": 4, "Au": 4}),
        ("D0_3", 16, 0, 0.45, {"Au": 8}),
        ("D0_3", 16, 1, 0.45, {"Cu": 4, "Au": 4}),
    ],
)
def test_coordination(name, atoms_per_a3, site, radius, expected):
    structure = build(name)
    a = (12.0 * atoms_per_a3) ** (1 / 3)
    assert shell(structure, site, radius * a) == expected


def test_hcp_is_close_packed_at_the_ideal_ratio():
    structure = build("A3")
    a = (12.0 * math.sqrt(2)) ** (1 / 3)
    assert structure.lattice.parameters == pytest.approx(
        (a, a, a * math.sqrt(8 / 3), 90, 90, 120)
    )
    assert shell(structure, 0, 1.01 * a) == {"Cu": 12}
    stretched = build_prototype("A3", ["Cu"], 12.0, c_over_a=1.8)
    assert stretched.lattice.c / stretched.lattice.a == pytest.approx(1.8)
    assert stretched.volume == pytest.approx(24.0)
    assert SpacegroupAnalyzer(stretched).get_space_group_number() == 194


def test_l1_0_squeezed_to_bcc_sites_is_b2():
    squeezed = build_prototype("L1_0", ["Cu", "Au"], 12.0, c_over_a=1 / math.sqrt(2))
    assert EXACT.fit(squeezed, build("B2"))
    assert not EXACT.fit(build("L1_0"), build("B2"))


@pytest.mark.parametrize("name", BINARY_PROTOTYPES)
def test_exchanging_the_elements_gives_the_same_crystal_where_stated(name):
    one = build_prototype(name, ["Cu", "Au"], 12.0)
    other = build_prototype(name, ["Au", "Cu"], 12.0)
    assert bool(EXACT.fit(one, other)) == PROTOTYPES[name].symmetric_roles


def test_sixteen_metals_give_840_different_candidates():
    candidates = list(binary_alloys(GROUND_STATES, VOLUMES))
    assert len(candidates) == 120 * (2 + 1 + 1 + 1 + 2)
    assert len({c.label for c in candidates}) == 840
    assert len({structure_key(c.structure) for c in candidates}) == 840
    for candidate in candidates[::50]:
        check_structure(candidate.structure, min_distance=1.5)


def test_labels_compositions_and_volumes():
    candidates = list(binary_alloys(["Cu", "Au"], {"Cu": 11.0, "Au": 17.0}))
    assert [c.label for c in candidates] == [
        "Cu3Au L1_2",
        "Au3Cu L1_2",
        "AuCu L1_0",
        "AuCu B2",
        "AuCu B32",
        "Cu3Au D0_3",
        "Au3Cu D0_3",
    ]
    volumes = [c.structure.volume / len(c.structure) for c in candidates]
    assert volumes == pytest.approx([12.5, 15.5, 14, 14, 14, 12.5, 15.5])
    for candidate in candidates:
        formula, prototype = candidate.label.split()
        assert candidate.prototype == prototype
        # pymatgen orders by electronegativity, so compare compositions.
        assert candidate.structure.composition.reduced_composition == (
            type(candidate.structure.composition)(formula)
        )


def test_the_order_of_the_elements_does_not_matter():
    def labels(elements):
        return [
            (c.label, structure_key(c.structure))
            for c in binary_alloys(elements, VOLUMES, ("B2", "L1_2"))
        ]

    assert labels(["W", "Cu", "Mg"]) == labels({"Mg", "W", "Cu"})
    assert [label for label, _ in labels(["W", "Cu", "Mg"])][:3] == [
        "CuMg B2",
        "Mg3Cu L1_2",
        "Cu3Mg L1_2",
    ]


@pytest.mark.parametrize("element", list(GROUND_STATES))
def test_ground_states_have_the_measured_volume_and_symmetry(element):
    structure = ground_state(element)
    state = GROUND_STATES[element]
    volume = structure.volume / len(structure)
    assert volume == pytest.approx(state.volume_per_atom, rel=1e-12)
    # Independent of lattice parameters: mass over weighed density, u to kg, m³ to Å³.
    data = Element(element)
    measured = float(data.atomic_mass) * 1.66053906660e3 / float(data.density_of_solid)
    assert volume == pytest.approx(measured, rel=0.02)
    conventional = SpacegroupAnalyzer(structure).get_conventional_standard_structure()
    assert conventional.lattice.a == pytest.approx(state.a)
    if state.c is not None:
        assert conventional.lattice.c == pytest.approx(state.c)
    number = SpacegroupAnalyzer(structure).get_space_group_number()
    assert number == PROTOTYPES[state.prototype].space_group


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("L1_3", ["Cu", "Au"], 12.0), "unknown prototype"),
        (("B2", ["Cu"], 12.0), "takes 2 species"),
        (("A1", ["Cu", "Au"], 12.0), "takes 1 species"),
        (("B2", ["Cu", "Xx"], 12.0), "unknown elements: Xx"),
        (("B2", ["Cu", "Au"], 0.0), "volume_per_atom"),
        (("B2", ["Cu", "Au"], math.nan), "volume_per_atom"),
    ],
)
def test_prototypes_that_cannot_be_built(arguments, word):
    with pytest.raises(InputError, match=word):
        build_prototype(*arguments)


def test_axial_ratios_that_make_no_sense():
    with pytest.raises(InputError, match="cubic"):
        build_prototype("B2", ["Cu", "Au"], 12.0, c_over_a=1.1)
    with pytest.raises(InputError, match="c_over_a"):
        build_prototype("A3", ["Mg"], 12.0, c_over_a=-1.0)


def test_unknown_ground_state():
    with pytest.raises(InputError, match="Na"):
        ground_state("Na")


@pytest.mark.parametrize(
    ("elements", "volumes", "prototypes", "word"),
    [
        (["Cu"], VOLUMES, ("B2",), "two different"),
        (["Cu", "Cu", "Au"], VOLUMES, ("B2",), "each given once"),
        (["Cu", "Qq"], VOLUMES, ("B2",), "Qq"),
        (["Cu", "Au"], {"Cu": 11.0}, ("B2",), "no value for Au"),
        (["Cu", "Au"], {"Cu": 11.0, "Au": -1.0}, ("B2",), "volume_per_atom of Au"),
        (["Cu", "Au"], VOLUMES, ("A1",), "not a binary"),
        (["Cu", "Au"], VOLUMES, ("B1",), "unknown prototype"),
        (["Cu", "Au"], VOLUMES, ("B2", "B2"), "repeated"),
    ],
)
def test_alloys_are_refused_before_the_first_candidate(
    elements, volumes, prototypes, word
):
    with pytest.raises(InputError, match=word):
        binary_alloys(elements, volumes, prototypes)
