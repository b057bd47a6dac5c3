from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
from pymatgen.core import Composition, Element, Lattice, Structure

from nanoos_fw.errors import InputError
from nanoos_fw.ml.features import (
    FEATURE_VERSION,
    element_table,
    extract_structure_features,
    features_to_cgcnn_format,
    graph_from_repr,
    scalar_unit,
)
from nanoos_fw.ml.graphs import build_graph, pack_graph

FACES = [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
PEROVSKITE = Structure(
    Lattice.cubic(3.9),
    ["Sr", "Ti", "O", "O", "O"],
    [[0, 0, 0], [0.5, 0.5, 0.5], *FACES],
)
ALLOY = Structure(Lattice.cubic(3.7), ["Au", "Cu", "Cu", "Cu"], [[0, 0, 0], *FACES])
NEON = Structure(Lattice.cubic(4.4), ["Ne"] * 4, [[0, 0, 0], *FACES])


@pytest.mark.parametrize("structure", [PEROVSKITE, ALLOY])
def test_scalars_equal_pymatgen(structure):
    _, scalars = extract_structure_features(structure)
    composition: Composition = structure.composition
    assert scalars["density"] == pytest.approx(float(structure.density), abs=1e-10)
    assert scalars["volume_per_atom"] == pytest.approx(
        structure.volume / len(structure)
    )
    for element in composition:
        fraction = composition.get_atomic_fraction(element)
        assert scalars[f"fraction_{element}"] == pytest.approx(fraction, abs=1e-12)
    total = composition.num_atoms
    assert scalars["atomic_mass_mean"] == pytest.approx(composition.weight / total)
    assert scalars["electronegativity_mean"] == pytest.approx(
        composition.average_electroneg
    )
    radii = [float(site.specie.atomic_radius) for site in structure]
    spheres = sum(4 / 3 * math.pi * radius**3 for radius in radii)
    assert scalars["space_filling"] == pytest.approx(spheres / structure.volume)


def test_statistics_are_those_of_the_sites():
    _, scalars = extract_structure_features(ALLOY)
    values = np.array([site.specie.X for site in ALLOY])
    assert scalars["electronegativity_mean"] == pytest.approx(values.mean())
    assert scalars["electronegativity_std"] == pytest.approx(values.std())
    assert scalars["electronegativity_min"] == values.min()
    assert scalars["electronegativity_max"] == values.max()
    assert scalars["electronegativity_range"] == pytest.approx(np.ptp(values))


def test_missing_values_leave_statistics_out_and_say_so():
    _, scalars = extract_structure_features(NEON)
    assert scalars["electronegativity_known_fraction"] == 0.0
    assert "electronegativity_mean" not in scalars
    assert "space_filling" not in scalars  # neon has no Slater radius
    assert scalars["covalent_radius_known_fraction"] == 1.0
    assert all(math.isfinite(value) for value in scalars.values())


def test_every_scalar_has_a_unit():
    for structure in (PEROVSKITE, NEON):
        for name in extract_structure_features(structure)[1]:
            scalar_unit(name)
    assert scalar_unit("density") == "g/cm³"
    assert scalar_unit("covalent_radius_std") == "Å"
    with pytest.raises(InputError):
        scalar_unit("covalent_radius_median")


def test_element_table_equals_pymatgen_and_masks_what_is_unknown():
    table = element_table()
    x, known = table.column("electronegativity")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for z in range(1, 119):
            value = Element.from_Z(z).X
            assert known[z] == math.isfinite(value)
            assert x[z] == (value if known[z] else 0.0)
    assert not table.known[0].any()
    assert np.isfinite(table.values).all()


def test_default_features_are_all_neighbors_within_5_angstrom():
    graph_repr, _ = extract_structure_features(ALLOY)
    assert graph_repr["cutoff_radius"] == 5.0
    assert graph_repr["max_neighbors"] is None
    # fcc shells within 5 Å of a = 3.7: 12 + 6 + 24.
    assert graph_repr["distances"].shape == (4 * 42,)
    mass = graph_repr["atom_feature_names"].index("atomic_mass")
    assert graph_repr["atom_features"][0, mass] == pytest.approx(196.966569)


def test_graph_repr_and_graph_are_the_same_thing():
    graph_repr, _ = extract_structure_features(PEROVSKITE, 8.0, max_neighbors=12)
    direct = build_graph(PEROVSKITE, cutoff_radius=8.0, max_neighbors=12)
    back = graph_from_repr(graph_repr)
    assert pack_graph(back, geometry=True) == pack_graph(direct, geometry=True)


def test_graph_repr_survives_json():
    graph_repr, _ = extract_structure_features(PEROVSKITE)
    text = json.dumps(graph_repr, default=lambda array: np.asarray(array).tolist())
    back = graph_from_repr(json.loads(text))
    assert pack_graph(back) == pack_graph(graph_from_repr(graph_repr))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feature_version": FEATURE_VERSION + 1}, "version"),
        ({"distances": np.zeros(3)}, "fit together"),
        ({"edge_index": "abc"}, "cannot be read"),
        ({"numbers": [300] * 4}, "cannot be read"),
        ({"numbers": np.array([300] * 4)}, "cannot be read"),
        ({"numbers": [29.7] * 4}, "cannot be read"),
        ({"numbers": [0] * 4}, "no atomic number"),
        ({"edge_index": np.zeros((2, 168))}, "cannot be read"),
        ({"offsets": np.full((168, 3), 2**40)}, "cannot be read"),
        ({"distances": np.full(168, np.nan)}, "not finite"),
        ({"cutoff_radius": "wide"}, "cannot be read"),
        ({"max_neighbors": 2.5}, "max_neighbors"),
        ({"edge_index": np.full((2, 168), 9)}, "missing atoms"),
    ],
)
def test_broken_graph_reprs_are_refused(change, words):
    graph_repr, _ = extract_structure_features(ALLOY)
    with pytest.raises(InputError, match=words):
        graph_from_repr({**graph_repr, **change})


def test_a_missing_key_is_named():
    graph_repr, _ = extract_structure_features(ALLOY)
    del graph_repr["distances"]
    with pytest.raises(InputError, match="distances"):
        graph_from_repr(graph_repr)


def test_cgcnn_format_equals_the_formula_of_the_original_program():
    graph_repr, _ = extract_structure_features(PEROVSKITE, cutoff_radius=8.0)
    arrays = features_to_cgcnn_format(graph_repr)
    assert arrays["nbr_fea"].shape == (5, 12, 41)
    for atom, site in enumerate(PEROVSKITE):
        nearest = sorted(n.nn_distance for n in PEROVSKITE.get_neighbors(site, 8.0))
        np.testing.assert_allclose(
            arrays["nbr_distances"][atom], nearest[:12], rtol=1e-6
        )
    d, mu = arrays["nbr_distances"][2, 7], 0.2 * 13
    expected = math.exp(-((d - mu) ** 2) / 0.2**2)
    assert arrays["nbr_fea"][2, 7, 13] == pytest.approx(expected, rel=1e-4)
    # Ti sees the six O first.
    assert set(arrays["nbr_fea_idx"][1, :6].tolist()) == {2, 3, 4}


@pytest.mark.parametrize("species", ["D", "T"])
def test_isotopes_do_not_get_the_mass_of_hydrogen(species):
    heavy = Structure(Lattice.cubic(3.0), [species, "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert build_graph(heavy).numbers.tolist() == [1, 8]
    with pytest.raises(InputError, match=f"holds {species}"):
        extract_structure_features(heavy)


def test_cgcnn_format_refuses_to_pad():
    graph_repr, _ = extract_structure_features(ALLOY, cutoff_radius=3.0)
    with pytest.raises(InputError, match=r"12 of 13 neighbours"):
        features_to_cgcnn_format(graph_repr, max_neighbors=13)
