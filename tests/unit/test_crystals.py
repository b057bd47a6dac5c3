from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from nanoos_fw.crystals import (
    check_structure,
    decode_structure,
    encode_structure,
    structure_key,
    summarize,
)
from nanoos_fw.errors import CorruptArtifactError, InputError


def rock_salt(a: float = 5.64) -> Structure:
    corners = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2
    frac = np.vstack([corners, corners + 0.5])
    return Structure(Lattice.cubic(a), ["Na"] * 4 + ["Cl"] * 4, frac)


def triclinic(frac: np.ndarray, species: list[str]) -> Structure:
    return Structure(Lattice.from_parameters(5.1, 6.2, 7.3, 81, 95, 103), species, frac)


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q


def naive_closest(structure: Structure, images: int) -> float:
    """Shortest distance over all images in a box of the given half width."""
    matrix, frac = structure.lattice.matrix, structure.frac_coords
    shifts = np.array(list(itertools.product(range(-images, images + 1), repeat=3)))
    best = math.inf
    for i, j in itertools.combinations_with_replacement(range(len(structure)), 2):
        distances = np.linalg.norm((frac[i] - frac[j] + shifts) @ matrix, axis=1)
        best = min(best, float(distances[distances > 0].min()))
    return best


# ------------------------------------------------------------------------- checks


def test_a_plain_crystal_passes():
    check_structure(rock_salt())


def test_oxidation_states_pass_and_do_not_change_key_or_document():
    plain, decorated = rock_salt(), rock_salt()
    decorated.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    check_structure(decorated)
    assert structure_key(decorated) == structure_key(plain)
    assert encode_structure(decorated) == encode_structure(plain)
    assert summarize(decorated) == summarize(plain)


@pytest.mark.parametrize(
    ("species", "word"),
    [
        ({"Fe": 0.5, "Co": 0.5}, "disordered"),
        ({"Fe": 0.5}, "disordered"),
        ("X", "X0+"),
        ("D", "holds D"),
        ("D+", "holds D"),
        ("T", "holds T"),
    ],
)
def test_sites_without_one_known_element_are_refused(species, word):
    structure = Structure(
        Lattice.cubic(4), ["Na", species], [[0, 0, 0], [0.5, 0.5, 0.5]]
    )
    for function in (check_structure, structure_key, encode_structure):
        with pytest.raises(InputError, match="site 1") as caught:
            function(structure)
        assert word in str(caught.value)
        assert caught.value.evidence["site"] == 1


def test_no_sites_are_refused():
    with pytest.raises(InputError, match="no sites"):
        check_structure(Structure(Lattice.cubic(3), [], []))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e12])
def test_unusable_coordinates_are_refused_and_named(value):
    structure = rock_salt()
    frac = structure.frac_coords
    frac[5, 1] = value
    bad = Structure(structure.lattice, structure.species, frac)
    for function in (check_structure, structure_key, encode_structure):
        with pytest.raises(InputError, match="site 5"):
            function(bad)


def test_a_lattice_with_nan_is_refused():
    bad = Structure(Lattice([[math.nan, 0, 0], [0, 3, 0], [0, 0, 3]]), ["H"], [[0] * 3])
    for function in (check_structure, structure_key, encode_structure):
        with pytest.raises(InputError, match="lattice is not finite"):
            function(bad)


@pytest.mark.parametrize(
    "matrix",
    [
        [[3, 0, 0], [0, 3, 0], [3, 3, 0]],
        [[3, 0, 0], [0, 3, 0], [0, 0, 0]],
        [[3, 0, 0], [0, 3, 0], [3, 3, 1e-6]],
    ],
)
def test_a_cell_without_volume_is_refused(matrix):
    with pytest.raises(InputError, match="no volume"):
        check_structure(Structure(Lattice(matrix), ["H"], [[0, 0, 0]]))


def test_a_slab_with_two_periodic_directions_is_refused():
    lattice = Lattice.from_parameters(4, 4, 20, 90, 90, 90, pbc=(True, True, False))
    with pytest.raises(InputError, match="three directions"):
        check_structure(Structure(lattice, ["Al"], [[0, 0, 0.5]]))


def test_overlap_through_the_boundary_names_sites_species_and_distance():
    structure = triclinic(
        np.array([[0.1, 0.2, 0.3], [0.5, 0.5, 0.01], [0.5, 0.5, 0.99]]),
        ["Na", "Cl", "Cl"],
    )
    expected = 0.02 * structure.lattice.c
    with pytest.raises(InputError, match=r"sites 1 .Cl. and 2 .Cl.") as caught:
        check_structure(structure)
    assert caught.value.evidence["distance_a"] == pytest.approx(expected)
    assert caught.value.evidence["sites"] == [1, 2]
    check_structure(structure, min_distance=0.14)


def test_a_duplicate_atom_is_refused():
    structure = rock_salt()
    structure.append("Na", structure[0].frac_coords + np.array([1, -2, 3]))
    with pytest.raises(InputError, match=r"sites 0 .* and 8"):
        check_structure(structure)


def test_an_atom_too_close_to_its_own_image_is_refused():
    with pytest.raises(InputError, match=r"sites 0 .H. and 0"):
        check_structure(Structure(Lattice.tetragonal(0.4, 9), ["H"], [[0, 0, 0]]))


def test_a_skewed_cell_with_a_short_translation_is_refused():
    # Long vectors, yet a1 + 3 a2 is 0.3 Å long.
    a1, a2 = np.array([-9.0, 0.3, 0.0]), np.array([3.0, 0.0, 0.0])
    lattice = Lattice([a1, a2, [0, 0, 4.0]])
    with pytest.raises(InputError, match=r"0\.300 Å"):
        check_structure(Structure(lattice, ["H"], [[0, 0, 0]]))


@pytest.mark.parametrize("n_sites", [5, 200])
def test_closest_pair_agrees_with_pymatgen(n_sites):
    rng = np.random.default_rng(n_sites)
    for _ in range(5):
        matrix = rng.normal(size=(3, 3)) * n_sites ** (1 / 3) * 1.5
        if abs(np.linalg.det(matrix)) < 1:
            continue
        structure = Structure(
            Lattice(matrix), ["Cu"] * n_sites, rng.uniform(-2, 2, size=(n_sites, 3))
        )
        distances = structure.get_neighbor_list(1.2)[3]
        if len(distances) == 0:
            check_structure(structure, min_distance=1.2)
            continue
        with pytest.raises(InputError) as caught:
            check_structure(structure, min_distance=1.2)
        assert caught.value.evidence["distance_a"] == pytest.approx(distances.min())


def test_closest_pair_agrees_with_the_naive_sum_in_thin_cells():
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(60):
        matrix = np.diag(rng.uniform(0.4, 3, size=3)) + rng.normal(size=(3, 3)) * 0.4
        if abs(np.linalg.det(matrix)) < 0.2:
            continue
        structure = Structure(Lattice(matrix), ["H", "He"], rng.uniform(size=(2, 3)))
        expected = naive_closest(structure, 12)
        if expected >= 0.5:
            check_structure(structure)
            continue
        refused += 1
        with pytest.raises(InputError) as caught:
            check_structure(structure)
        assert caught.value.evidence["distance_a"] == pytest.approx(expected)
    assert refused > 5


def test_min_distance_must_be_a_length():
    with pytest.raises(InputError, match="min_distance"):
        check_structure(rock_salt(), min_distance=-1)


# --------------------------------------------------------------------------- keys

fractions = st.floats(-3, 3, allow_nan=False)


@st.composite
def structures(draw):
    n_sites = draw(st.integers(1, 6))
    frac = np.array(draw(st.lists(st.tuples(*[fractions] * 3), min_size=n_sites)))
    species = draw(
        st.lists(
            st.sampled_from(["Li", "Fe", "O"]),
            min_size=len(frac),
            max_size=len(frac),
        )
    )
    lengths = [draw(st.floats(2, 12)) for _ in range(3)]
    angles = [draw(st.floats(75, 105)) for _ in range(3)]
    return Structure(Lattice.from_parameters(*lengths, *angles), species, frac)


@settings(max_examples=60, deadline=None)
@given(structures(), st.integers(0, 2**32 - 1))
def test_key_does_not_see_site_order_lattice_translations_or_rotation(structure, seed):
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(structure))
    frac = structure.frac_coords[order]
    moved = frac + rng.integers(-3, 4, size=frac.shape)
    rotated = structure.lattice.matrix @ random_rotation(rng)
    other = Structure(
        Lattice(rotated), [structure[int(i)].specie for i in order], moved
    )
    # Adding whole numbers rounds the fraction once more; a value on a boundary of the
    # grid to the last bit may then move. Such values are left out.
    steps = (frac * 1e5 + 0.5 + math.sqrt(5) - 2) % 1
    if np.minimum(steps, 1 - steps).min() > 1e-9:
        assert structure_key(other) == structure_key(structure)


@settings(max_examples=40, deadline=None)
@given(structures(), st.integers(0, 2), st.sampled_from([-1e-3, 5e-5, 0.25]))
def test_key_sees_a_displacement(structure, axis, shift):
    frac = structure.frac_coords
    frac[0, axis] += shift
    moved = Structure(structure.lattice, structure.species, frac)
    same = sorted(
        (site.specie.Z, *np.round(np.mod(site.frac_coords, 1), 4)) for site in structure
    ) == sorted(
        (site.specie.Z, *np.round(np.mod(site.frac_coords, 1), 4)) for site in moved
    )
    if not same:
        assert structure_key(moved) != structure_key(structure)


def test_key_sees_species_cell_and_site_count():
    base = rock_salt()
    primitive = Structure(
        Lattice.rhombohedral(5.64 / math.sqrt(2), 60),
        ["Na", "Cl"],
        [[0, 0, 0], [0.5, 0.5, 0.5]],
    )
    keys = {
        structure_key(base),
        structure_key(rock_salt(5.641)),
        structure_key(base * (2, 1, 1)),
        structure_key(primitive),
        structure_key(
            Structure(base.lattice, ["K", *base.species[1:]], base.frac_coords)
        ),
    }
    assert len(keys) == 5


def test_key_wraps_after_rounding():
    def at(x: float) -> str:
        return structure_key(Structure(Lattice.cubic(4), ["Cu"], [[x, 0.0, 0.0]]))

    assert at(0.9999999) == at(0.0) == at(-0.0) == at(-1e-9) == at(1.0) == at(3.0000001)
    assert at(0.9999) != at(0.0)


def test_key_keeps_rounding_boundaries_off_short_decimals():
    # 4.123455 and 0.123455 lie half way between two steps of plain rounding.
    for noise in (-1e-12, 0.0, 1e-12):
        structure = Structure(
            Lattice.cubic(4.123455 + noise), ["Cu"], [[0.123455 + noise, 1 / 3, 1 / 6]]
        )
        exact = Structure(
            Lattice.cubic(4.123455), ["Cu"], [[0.123455, 1 / 3 - noise, 1 / 6]]
        )
        assert structure_key(structure) == structure_key(exact)


def test_mirror_images_have_two_keys():
    frac = np.array([[0.1, 0.2, 0.3], [0.45, 0.61, 0.77]])
    left = triclinic(frac, ["Na", "Cl"])
    right = Structure(Lattice(left.lattice.matrix * [1, 1, -1]), left.species, frac)
    assert left.lattice.parameters == pytest.approx(right.lattice.parameters)
    assert structure_key(left) != structure_key(right)


def test_key_sees_charges_and_sorts_them_with_their_sites():
    structure = rock_salt()
    charges = [1.0] * 4 + [-1.0] * 4
    charged = structure.copy(site_properties={"charge": charges})
    assert structure_key(charged) != structure_key(structure)
    shuffled = charged.copy()
    shuffled.sites.reverse()
    reversed_sites = Structure.from_sites(list(charged)[::-1])
    assert structure_key(reversed_sites) == structure_key(charged)
    other = structure.copy(site_properties={"charge": charges[::-1]})
    assert structure_key(other) != structure_key(charged)


@pytest.mark.parametrize("bad", [None, "x", math.nan])
def test_charges_must_be_numbers_on_all_sites(bad):
    structure = rock_salt().copy(site_properties={"charge": [bad] + [0.5] * 7})
    with pytest.raises(InputError, match="charges"):
        structure_key(structure)


def test_key_is_frozen():
    # A change here orphans every stored structure: raise KEY_VERSION knowingly.
    assert structure_key(rock_salt()) == "8f166ee83b04c9f2126d34097b39936deb351b7d"


def test_key_is_the_same_in_another_process():
    code = (
        "from pymatgen.core import *; from nanoos_fw.crystals import structure_key;"
        "print(structure_key(Structure(Lattice.hexagonal(3.2, 5.1), ['Mg', 'Mg'],"
        "[[1/3, 2/3, 0.25], [2/3, 1/3, 0.75]])))"
    )
    here = structure_key(
        Structure(
            Lattice.hexagonal(3.2, 5.1),
            ["Mg", "Mg"],
            [[2 / 3, 1 / 3, 0.75], [1 / 3, 2 / 3, 0.25]],
        )
    )
    there = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert there.stdout.strip() == here
    assert len(here) == 40


# ---------------------------------------------------------------------- documents


@settings(max_examples=40, deadline=None)
@given(structures())
def test_documents_return_every_double_exactly(structure):
    back = decode_structure(encode_structure(structure))
    assert back.lattice.matrix.tobytes() == structure.lattice.matrix.tobytes()
    assert back.frac_coords.tobytes() == structure.frac_coords.tobytes()
    assert back.species == structure.species
    assert structure_key(back) == structure_key(structure)


def test_documents_keep_charges():
    charges = [0.1 * i for i in range(8)]
    structure = rock_salt().copy(site_properties={"charge": charges})
    back = decode_structure(encode_structure(structure))
    assert back.site_properties["charge"] == charges


def test_documents_hold_plain_values_of_the_expected_size():
    document = encode_structure(rock_salt())
    assert {name: type(value) for name, value in document.items()} == {
        "n_sites": int,
        "numbers": bytes,
        "lattice": bytes,
        "frac_coords": bytes,
    }
    assert sum(len(v) for v in document.values() if isinstance(v, bytes)) == 8 * 25 + 72


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"numbers": b"\x01" * 7}, "numbers has 7 bytes"),
        ({"lattice": b"\x00" * 71}, "lattice has 71 bytes"),
        ({"frac_coords": b""}, "frac_coords has 0 bytes"),
        ({"charges": b"\x00" * 8}, "charges has 8 bytes"),
        ({"numbers": b"\x00" * 8}, "0"),
        ({"numbers": b"\xff" * 8}, "255"),
        ({"lattice": np.full(9, np.nan).tobytes()}, "not finite"),
        ({"n_sites": None}, "n_sites"),
        ({"n_sites": 0}, "n_sites"),
        ({"frac_coords": [0.0] * 24}, "list"),
    ],
)
def test_damaged_documents_are_refused(change, word):
    document = {**encode_structure(rock_salt()), **change}
    with pytest.raises(CorruptArtifactError, match=word):
        decode_structure(document)


def test_a_missing_field_is_refused():
    document = encode_structure(rock_salt())
    del document["lattice"]
    with pytest.raises(CorruptArtifactError, match="lattice"):
        decode_structure(document)


def test_summary():
    summary = summarize(rock_salt())
    assert json.loads(json.dumps(summary)) == summary
    assert summary == {
        "formula": "NaCl",
        "chemical_system": "Cl-Na",
        "elements": ["Cl", "Na"],
        "n_sites": 8,
        "volume_a3": pytest.approx(5.64**3),
    }
