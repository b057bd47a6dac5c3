from __future__ import annotations

import dataclasses
import itertools
import pickle
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from nanoos_fw.crystals import encode_structure
from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable, collate_graphs, degree_column
from nanoos_fw.ml.graphs import (
    CrystalGraph,
    build_graph,
    build_graph_arrays,
    build_graphs,
    nearest_neighbors,
    pack_graph,
    unpack_graph,
)


def random_structure(seed: int, n_sites: int = 5) -> Structure:
    """A triclinic cell, often skewed and thin, with sites outside of it."""
    rng = np.random.default_rng(seed)
    while True:
        matrix = rng.normal(size=(3, 3)) * rng.uniform(2, 6)
        if abs(np.linalg.det(matrix)) < 15 * n_sites:
            continue
        coords = rng.uniform(-1.5, 1.5, size=(n_sites, 3))
        species = rng.choice(["Cu", "Au", "Ti"], n_sites)
        structure = Structure(Lattice(matrix), species, coords)
        if structure.distance_matrix[np.triu_indices(n_sites, 1)].min() > 0.5:
            return structure


def brute_force(structure: Structure, cutoff: float) -> dict[tuple[int, ...], float]:
    """All edges by looping over images, from the definition."""
    matrix = structure.lattice.matrix
    # Enough images: the sites span up to 3 cells, the sphere reaches cutoff / height.
    heights = 1 / np.linalg.norm(np.linalg.inv(matrix), axis=0)
    reach = [range(-n, n + 1) for n in (np.ceil(cutoff / heights) + 3).astype(int)]
    edges = {}
    coords = structure.frac_coords @ matrix
    images = np.array(list(itertools.product(*reach)))
    for i, j in itertools.product(range(len(structure)), repeat=2):
        d = np.linalg.norm(coords[j] + images @ matrix - coords[i], axis=1)
        for image, distance in zip(images, d, strict=True):
            if 1e-8 < distance <= cutoff:
                edges[(i, j, *image.tolist())] = distance
    return edges


def as_edges(graph) -> dict[tuple[int, ...], float]:
    rows = np.column_stack([graph.edge_index.T, graph.offsets])
    return dict(zip(map(tuple, rows.tolist()), graph.distances, strict=True))


def fcc_copper() -> Structure:
    corners = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    return Structure(Lattice.cubic(3.6), ["Cu"] * 4, corners)


def perovskite() -> Structure:
    faces = [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    coords = [[0, 0, 0], [0.5, 0.5, 0.5], *faces]
    return Structure(Lattice.cubic(3.9), ["Sr", "Ti", "O", "O", "O"], coords)


@pytest.mark.parametrize("seed", range(6))
def test_full_list_equals_brute_force(seed):
    structure = random_structure(seed)
    graph = build_graph(structure, cutoff_radius=5.0, max_neighbors=None)
    expected = brute_force(structure, 5.0)
    found = as_edges(graph)
    assert found.keys() == expected.keys()
    for edge, distance in expected.items():
        assert found[edge] == pytest.approx(distance, abs=1e-10)


def test_one_atom_cell_smaller_than_the_cutoff_sees_its_own_images():
    structure = Structure(Lattice.cubic(2.0), ["Fe"], [[0.3, 0.3, 0.3]])
    graph = build_graph(structure, cutoff_radius=2.0, max_neighbors=None)
    assert graph.n_edges == 6
    assert np.all(graph.edge_index == 0)
    np.testing.assert_allclose(graph.distances, 2.0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 12])
def test_nearest_neighbors_have_the_smallest_distances(seed, k):
    structure = random_structure(seed)
    graph = build_graph(structure, cutoff_radius=8.0, max_neighbors=k)
    edges = brute_force(structure, 8.0)
    for atom in range(len(structure)):
        expected = sorted(d for edge, d in edges.items() if edge[0] == atom)[:k]
        found = graph.distances[graph.edge_index[0] == atom]
        np.testing.assert_allclose(np.sort(found), expected, atol=1e-10)


def test_fewer_neighbors_than_asked_for_are_not_padded():
    structure = Structure(Lattice.cubic(2.0), ["Fe"], [[0, 0, 0]])
    graph = build_graph(structure, cutoff_radius=2.5, max_neighbors=12)
    assert graph.degrees.tolist() == [6]


def test_edges_are_sorted_by_centre_then_shell_then_element():
    graph = build_graph(perovskite(), cutoff_radius=6.0, max_neighbors=None)
    shell = np.round(graph.distances, 3)
    keys = list(
        zip(
            graph.edge_index[0].tolist(),
            shell.tolist(),
            graph.numbers[graph.edge_index[1]].tolist(),
            strict=True,
        )
    )
    assert keys == sorted(keys)


def model_view(graph) -> list[tuple]:
    """What a network sees of each atom, in no particular order of atoms."""
    view = []
    for atom in range(graph.n_atoms):
        mine = graph.edge_index[0] == atom
        neighbors = zip(
            # Shifted, since 1.9525 Å would round to either side of its boundary.
            np.round(graph.distances[mine] + 1.23e-4, 3).tolist(),
            graph.numbers[graph.edge_index[1][mine]].tolist(),
            strict=True,
        )
        view.append((int(graph.numbers[atom]), tuple(neighbors)))
    return sorted(view)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_tie_rule_ignores_orientation_origin_and_order_of_sites(seed):
    # In cubic SrTiO3 the 12th neighbour of oxygen is tied between Sr and O.
    rng = np.random.default_rng(seed)
    structure = perovskite()
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    order = rng.permutation(len(structure))
    moved = Structure(
        Lattice(structure.lattice.matrix @ rotation),
        [structure[i].species for i in order],
        structure.frac_coords[order] + rng.uniform(-1, 1, 3),
    )
    expected = model_view(build_graph(structure, max_neighbors=12))
    assert model_view(build_graph(moved, max_neighbors=12)) == expected


def test_tie_rule_ignores_the_supercell():
    small = model_view(build_graph(perovskite(), max_neighbors=12))
    large = model_view(build_graph(perovskite() * (2, 1, 1), max_neighbors=12))
    assert large == sorted(small * 2)


def test_ties_between_equal_elements_are_decided_by_their_environment():
    # Two inequivalent Cu at one distance of the Au: which one stays must not depend
    # on which is written first.
    lattice = Lattice.orthorhombic(4.0, 4.0, 9.0)
    species = ["Au", "Cu", "Cu", "Ti"]
    coords = [[0, 0, 0], [0, 0, 2.2 / 9], [0, 0, -2.2 / 9], [0, 0, 4.1 / 9]]
    views = []
    for order in itertools.permutations(range(4)):
        structure = Structure(
            lattice, [species[i] for i in order], [coords[i] for i in order]
        )
        graph = build_graph(structure, max_neighbors=1)
        gold = order.index(0)
        kept = graph.edge_index[1][graph.edge_index[0] == gold][0]
        views.append(order[kept])
    assert len(set(views)) == 1


def test_rattled_distances_within_the_tolerance_are_one_shell():
    structure = perovskite()
    noisy = structure.copy()
    noisy.perturb(1e-6)
    assert model_view(build_graph(noisy)) == model_view(build_graph(structure))


@pytest.mark.parametrize("seed", range(6))
def test_taking_the_nearest_of_a_full_graph_equals_building_them(seed):
    structure = random_structure(seed) if seed else perovskite()
    full = build_graph(structure, cutoff_radius=8.0, max_neighbors=None)
    direct = build_graph(structure, cutoff_radius=8.0, max_neighbors=12)
    taken = nearest_neighbors(full, 12)
    np.testing.assert_array_equal(taken.edge_index, direct.edge_index)
    np.testing.assert_array_equal(taken.offsets, direct.offsets)
    np.testing.assert_allclose(taken.distances, direct.distances, atol=1e-12)
    assert taken.max_neighbors == 12


def test_a_graph_whose_ties_were_cut_off_has_no_nearest():
    # By 14 of the 18 atoms that are as far as the 12th neighbour of oxygen, the rule
    # for ties would choose others than by all of them.
    with pytest.raises(InputError, match="ties may have been cut off"):
        nearest_neighbors(build_graph(perovskite(), max_neighbors=14), 12)
    # Nothing was cut off of these.
    few = build_graph(perovskite(), cutoff_radius=3.0, max_neighbors=20)
    direct = build_graph(perovskite(), cutoff_radius=3.0, max_neighbors=4)
    assert pack_graph(nearest_neighbors(few, 4)) == pack_graph(direct)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"numbers": np.array([0, 29], "u1")}, "0 is no atomic number"),
        ({"numbers": np.array([29, 119], "u1")}, "119 is no atomic number"),
        ({"edge_index": np.array([[1, 0], [0, 1]])}, "unsorted"),
        ({"edge_index": np.array([[0, 1], [1, 2]])}, "missing atoms"),
        ({"edge_index": np.array([[0, 1], [-1, 0]])}, "missing atoms"),
        ({"numbers": np.empty(0, "u1")}, "missing atoms"),
        ({"distances": np.array([2.0, np.nan])}, "not finite"),
        ({"distances": np.array([2.0, -1.0])}, "not finite"),
        ({"edge_index": np.array([[0, 0], [1, 1]])}, "2 neighbours, more than"),
        ({"cutoff_radius": np.nan}, "cutoff_radius"),
        ({"max_neighbors": 0}, "max_neighbors"),
        ({"max_neighbors": 1.5}, "max_neighbors"),
    ],
)
def test_arrays_that_are_no_graph_are_refused(change, words):
    arrays = {
        "numbers": np.array([29, 79], "u1"),
        "edge_index": np.array([[0, 1], [1, 0]]),
        "distances": np.array([2.0, 2.0]),
        "cutoff_radius": 3.0,
        "max_neighbors": 1,
    }
    assert CrystalGraph(**arrays).degrees.tolist() == [1, 1]
    with pytest.raises(InputError, match=words):
        CrystalGraph(**{**arrays, **change})


def test_atomic_numbers_are_not_rounded():
    with pytest.raises(InputError, match="must be integers"):
        build_graph_arrays(np.array([26.9]), np.eye(3) * 3, np.zeros((1, 3)))


def test_a_slab_without_periodicity_is_refused():
    # Its neighbours across the vacuum would be invented.
    lattice = Lattice.from_parameters(3, 3, 6, 90, 90, 90, pbc=(True, True, False))
    slab = Structure(lattice, ["Cu"], [[0, 0, 0]])
    for refused in (build_graph, encode_structure):
        with pytest.raises(InputError, match="three directions"):
            refused(slab)
    _, errors = build_graphs([perovskite(), slab])
    assert list(errors) == [1]


def test_equal_input_gives_equal_bytes():
    first = pack_graph(build_graph(perovskite()), geometry=True)
    assert first == pack_graph(build_graph(perovskite()), geometry=True)


@pytest.mark.parametrize(
    ("structure", "words"),
    [
        (Structure(Lattice.cubic(30.0), ["Fe"], [[0, 0, 0]]), "isolated"),
        (
            Structure(Lattice.cubic(3.0), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]]),
            "disordered",
        ),
        (Structure(Lattice.cubic(3.0), [{"Fe": 0.5}], [[0, 0, 0]]), "disordered"),
        (
            Structure(Lattice.cubic(3.0), ["Fe"], [[0, np.nan, 0]]),
            "not finite",
        ),
        (
            Structure(Lattice([[3, 0, 0], [0, 3, 0], [3, 3, 0]]), ["Fe"], [[0, 0, 0]]),
            "volume",
        ),
        (
            Structure(Lattice.cubic(3.0), ["Fe", "Fe"], [[0, 0, 0], [1, 0, 0]]),
            "apart",
        ),
        (Structure(Lattice.cubic(3.0), [], []), "no sites"),
        (Structure(Lattice.cubic(3.0), ["X"], [[0, 0, 0]]), "no element"),
    ],
)
def test_structures_without_a_graph_are_refused_with_the_reason(structure, words):
    with pytest.raises(InputError, match=words):
        build_graph(structure, cutoff_radius=6.0)


def test_oxidation_states_do_not_change_the_graph():
    plain = build_graph(perovskite())
    decorated = perovskite().add_oxidation_state_by_element({"Sr": 2, "Ti": 4, "O": -2})
    assert pack_graph(build_graph(decorated)) == pack_graph(plain)


@pytest.mark.parametrize("geometry", [True, False])
def test_packing_keeps_the_graph(geometry):
    graph = build_graph(random_structure(3), cutoff_radius=6.0)
    back = unpack_graph(pack_graph(graph, geometry=geometry))
    np.testing.assert_array_equal(back.numbers, graph.numbers)
    np.testing.assert_array_equal(back.edge_index, graph.edge_index)
    np.testing.assert_allclose(back.distances, graph.distances, rtol=1e-7)
    assert (back.cutoff_radius, back.max_neighbors) == (6.0, 12)
    if geometry:
        np.testing.assert_array_equal(back.offsets, graph.offsets)
        np.testing.assert_array_equal(back.lattice, graph.lattice)
    else:
        assert back.offsets is None
        assert back.lattice is None


def test_packing_twice_gives_the_same_bytes():
    data = pack_graph(build_graph(perovskite()))
    assert pack_graph(unpack_graph(data)) == data


def test_packed_size_is_about_75_bytes_per_site():
    graph = build_graph(fcc_copper() * (3, 3, 3))
    assert len(pack_graph(graph)) / graph.n_atoms < 76


def test_wide_offsets_survive_packing():
    thin = Structure(Lattice.orthorhombic(0.4, 5, 5), ["Fe"], [[0, 0, 0]])
    shifted = Structure(thin.lattice, ["Fe", "Fe"], [[0, 0, 0], [400.5, 0.5, 0.5]])
    graph = build_graph(shifted, cutoff_radius=5.0, max_neighbors=None)
    assert np.abs(graph.offsets).max() > 127
    back = unpack_graph(pack_graph(graph, geometry=True))
    np.testing.assert_array_equal(back.offsets, graph.offsets)


def test_what_packed_graphs_have_no_room_for_is_refused():
    lattice = Lattice.cubic(3.0)
    far = Structure(lattice, ["Fe", "Fe"], [[0, 0, 0], [33000.5, 0.5, 0.5]])
    graph = build_graph(far)
    with pytest.raises(InputError, match="33001 cells away"):
        pack_graph(graph, geometry=True)
    with pytest.raises(InputError, match="not both"):
        pack_graph(graph, geometry=True, vectors=True)
    many = np.array([3, 65536])
    with pytest.raises(InputError, match="65536 neighbours"):
        degree_column(many)
    assert degree_column(many - 1).tolist() == [2, 65535]


def test_every_flipped_byte_of_a_packed_graph_is_noticed():
    data = pack_graph(build_graph(fcc_copper()))
    for position in range(0, len(data), 7):
        broken = bytearray(data)
        broken[position] ^= 0x10
        with pytest.raises(CorruptArtifactError):
            unpack_graph(bytes(broken))


def test_an_unpacked_graph_is_that_of_its_bytes_whenever_its_arrays_are_made():
    graph = build_graph(perovskite(), max_neighbors=6)
    data = bytearray(pack_graph(graph, geometry=True))
    back = unpack_graph(data)
    data[:] = bytes(len(data))
    again = pickle.loads(pickle.dumps(back))
    fewer = dataclasses.replace(back, max_neighbors=None)
    for one in (back, again, fewer):
        np.testing.assert_array_equal(one.edge_index, graph.edge_index)
        np.testing.assert_array_equal(one.offsets, graph.offsets)
        np.testing.assert_array_equal(one.lattice, graph.lattice)
        assert one.vectors is None
        assert one.distances is one.distances
    with pytest.raises(dataclasses.FrozenInstanceError):
        back.numbers = graph.numbers


def test_degrees_that_do_not_add_up_are_noticed_behind_a_good_checksum():
    data = bytearray(pack_graph(build_graph(perovskite(), max_neighbors=6)))
    data[28 + 5] -= 1
    data[24:28] = bytes(4)
    data[24:28] = zlib.crc32(data).to_bytes(4, "little")
    with pytest.raises(CorruptArtifactError, match="29, not to its 30 edges"):
        _ = unpack_graph(bytes(data)).edge_index
    # One neighbour more elsewhere: the sum over all would not tell.
    other = bytearray(pack_graph(build_graph(perovskite(), max_neighbors=6)))
    other[28 + 5] += 1
    other[24:28] = bytes(4)
    other[24:28] = zlib.crc32(other).to_bytes(4, "little")
    good = pack_graph(build_graph(fcc_copper(), max_neighbors=6))
    for order in ([data, other, good], [good, other, data], [good, data]):
        with pytest.raises(
            CorruptArtifactError, match=r"crystal graph \d of \d add up"
        ):
            GraphTable.from_packed([bytes(blob) for blob in order])


@pytest.mark.parametrize("cut", [0, 3, 20, -1])
def test_truncated_packed_graphs_are_noticed(cut):
    with pytest.raises(CorruptArtifactError):
        unpack_graph(pack_graph(build_graph(fcc_copper()))[:cut])


def test_batch_equals_graphs_laid_end_to_end():
    graphs = [build_graph(random_structure(seed), cutoff_radius=5) for seed in (1, 2)]
    batch = collate_graphs(graphs)
    first, second = graphs
    np.testing.assert_array_equal(
        batch.edge_index,
        np.hstack([first.edge_index, second.edge_index + first.n_atoms]),
    )
    np.testing.assert_array_equal(batch.graph_index, [0] * 5 + [1] * 5)
    np.testing.assert_array_equal(
        batch.numbers, np.concatenate([first.numbers, second.numbers])
    )
    assert batch.n_graphs == 2


def test_rows_of_a_table_come_out_in_the_order_asked_for():
    structures = [perovskite(), fcc_copper(), random_structure(5)]
    table = GraphTable.from_graphs([build_graph(s) for s in structures])
    batch = table.batch([2, 0])
    direct = collate_graphs([build_graph(structures[2]), build_graph(structures[0])])
    np.testing.assert_array_equal(batch.edge_index, direct.edge_index)
    np.testing.assert_array_equal(batch.distances, direct.distances)
    selected = table.select([2, 0]).batch([0, 1])
    np.testing.assert_array_equal(selected.edge_index, direct.edge_index)


@pytest.mark.parametrize("geometry", [True, False])
def test_a_table_of_packed_graphs_is_that_of_the_graphs(geometry):
    graphs = [build_graph(s) for s in (perovskite(), fcc_copper(), random_structure(5))]
    blobs = [pack_graph(graph, geometry=geometry) for graph in graphs]
    direct, packed = GraphTable.from_graphs(graphs), GraphTable.from_packed(blobs)
    for name in vars(direct):
        np.testing.assert_array_equal(getattr(packed, name), getattr(direct, name))
    assert packed.neighbors.dtype == np.int32
    broken = bytearray(blobs[1])
    broken[-1] ^= 1
    with pytest.raises(CorruptArtifactError):
        GraphTable.from_packed([blobs[0], bytes(broken)])
    other = pack_graph(build_graph(fcc_copper(), max_neighbors=6))
    with pytest.raises(InputError, match="different ways"):
        GraphTable.from_packed([blobs[0], other])


def test_an_empty_batch_is_empty():
    batch = GraphTable.from_graphs([build_graph(fcc_copper())]).batch([])
    assert batch.n_graphs == 0
    assert batch.edge_index.shape == (2, 0)


def test_graphs_built_in_different_ways_do_not_mix():
    graphs = [build_graph(fcc_copper(), max_neighbors=k) for k in (6, 12)]
    with pytest.raises(InputError, match="different ways"):
        GraphTable.from_graphs(graphs)
