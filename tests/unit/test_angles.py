from __future__ import annotations

import math

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import InputError
from nanoos_fw.ml.angles import (
    build_angles,
    build_dihedrals,
    count_angles,
    count_dihedrals,
    edge_vectors,
)
from nanoos_fw.ml.graphs import build_graph, pack_graph, unpack_graph

RNG = np.random.default_rng(7)
TRICLINIC = Structure(
    Lattice.from_parameters(4.1, 4.9, 5.6, 75, 98, 112),
    ["Cu", "Au", "Ti"],
    [[0.1, 1.2, 0.3], [0.6, 0.5, -0.2], [0.3, 0.8, 0.75]],
)
SALT = Structure(
    Lattice.cubic(5.6),
    ["Na"] * 4 + ["Cl"] * 4,
    [
        [0, 0, 0],
        [0, 0.5, 0.5],
        [0.5, 0, 0.5],
        [0.5, 0.5, 0],
        [0.5, 0.5, 0.5],
        [0.5, 0, 0],
        [0, 0.5, 0],
        [0, 0, 0.5],
    ],
)


def built(structure: Structure, **kwargs):
    graph = build_graph(structure, **kwargs)
    return graph, edge_vectors(graph, structure.frac_coords)


def points(structure: Structure, graph, edge: int) -> tuple[np.ndarray, np.ndarray]:
    """Where an edge begins and ends, from the definition."""
    i, j = graph.edge_index[:, edge]
    start = structure.lattice.get_cartesian_coords(structure[int(i)].frac_coords)
    end = structure.lattice.get_cartesian_coords(
        structure[int(j)].frac_coords + graph.offsets[edge]
    )
    return start, end


@pytest.mark.parametrize("structure", [TRICLINIC, SALT])
def test_edge_vectors_lead_from_the_centre_to_the_image(structure):
    graph, vectors = built(structure, max_neighbors=8)
    for edge in range(graph.n_edges):
        start, end = points(structure, graph, edge)
        np.testing.assert_allclose(vectors[edge], end - start, atol=1e-12)


@pytest.mark.parametrize("structure", [TRICLINIC, SALT])
def test_angles_equal_a_loop_over_pairs_of_edges(structure):
    graph, vectors = built(structure, max_neighbors=7)
    expected = {}
    for e in range(graph.n_edges):
        for f in range(e + 1, graph.n_edges):
            if graph.edge_index[0, e] == graph.edge_index[0, f]:
                start, p = points(structure, graph, e)
                _, q = points(structure, graph, f)
                u, v = p - start, q - start
                cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
                expected[e, f] = math.acos(max(-1.0, min(1.0, cosine)))
    found = build_angles(graph, vectors)
    pairs = list(map(tuple, found.edge_pairs.T.tolist()))
    assert pairs == list(expected)
    np.testing.assert_allclose(found.angles, list(expected.values()), atol=1e-7)
    assert count_angles(graph).n == len(pairs)
    size = found.edge_pairs.nbytes + found.angles.nbytes
    assert count_angles(graph).n_bytes == size


def test_angles_of_rock_salt_are_right_and_straight():
    graph, vectors = built(SALT, max_neighbors=6)
    degrees = np.degrees(build_angles(graph, vectors).angles)
    values, counts = np.unique(np.round(degrees, 6), return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {
        90.0: 8 * 12,
        180.0: 8 * 3,
    }


def torsion(j, i, k, l) -> float:  # noqa: E741
    """Signed angle between the planes j-i-k and i-k-l, by projection."""
    axis = (k - i) / np.linalg.norm(k - i)
    u = (j - i) - ((j - i) @ axis) * axis
    v = (l - k) - ((l - k) @ axis) * axis
    return math.atan2(np.cross(axis, u) @ v, u @ v)


@pytest.mark.parametrize("structure", [TRICLINIC, SALT])
def test_dihedrals_equal_a_loop_over_triples_of_edges(structure):
    graph, vectors = built(structure, max_neighbors=5)
    expected = {}
    for e in range(graph.n_edges):
        i, k = graph.edge_index[:, e]
        pi, pk = points(structure, graph, e)
        for f in np.flatnonzero(graph.edge_index[0] == i):
            _, pj = points(structure, graph, f)
            for g in np.flatnonzero(graph.edge_index[0] == k):
                start, end = points(structure, graph, g)
                pl = end + pk - start
                four = [pj, pi, pk, pl]
                apart = min(
                    np.linalg.norm(four[a] - four[b])
                    for a in range(4)
                    for b in range(a)
                )
                bends = [
                    np.linalg.norm(np.cross(pj - pi, pk - pi)),
                    np.linalg.norm(np.cross(pl - pk, pk - pi)),
                ]
                if apart > 1e-6 and min(bends) > 1e-4:
                    expected[int(f), e, int(g)] = torsion(pj, pi, pk, pl)
    found = build_dihedrals(graph, vectors)
    triples = list(map(tuple, found.edge_triples.T.tolist()))
    assert triples == list(expected)
    difference = found.dihedrals - np.array(list(expected.values()))
    turned = np.angle(np.exp(1j * difference))
    np.testing.assert_allclose(turned, 0, atol=1e-9)
    assert len(triples) <= count_dihedrals(graph).n


def test_lists_that_are_too_large_are_refused_before_they_are_made():
    graph, vectors = built(SALT, max_neighbors=None)
    with pytest.raises(InputError, match="dihedrals would take"):
        build_dihedrals(graph, vectors, max_bytes=1 << 20)
    with pytest.raises(InputError, match="angles would take"):
        build_angles(graph, vectors, max_bytes=1 << 10)


def test_vectors_need_the_geometry_and_the_sites_of_the_graph():
    graph, vectors = built(TRICLINIC)
    with pytest.raises(InputError, match="without geometry"):
        edge_vectors(unpack_graph(pack_graph(graph)), TRICLINIC.frac_coords)
    moved = TRICLINIC.frac_coords + RNG.uniform(0, 0.1, (3, 3))
    with pytest.raises(InputError, match="not those of these sites"):
        edge_vectors(graph, moved)
    with pytest.raises(InputError, match="do not fit"):
        build_angles(graph, vectors[1:])


def test_angles_of_an_atom_with_one_neighbor_are_none():
    graph, vectors = built(TRICLINIC, max_neighbors=1)
    assert build_angles(graph, vectors).angles.shape == (0,)
    assert count_angles(graph).n == 0
    assert build_dihedrals(graph, vectors).dihedrals.shape == (0,)
