from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from nanoos_fw.crystals import encode_structure
from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml import lattices as cells
from nanoos_fw.ml import neighbors
from nanoos_fw.ml.graphs import (
    build_graph,
    build_graph_arrays,
    build_graphs,
    pack_graph,
)
from nanoos_fw.ml.neighbors import list_nearest, list_neighbors

CUTOFF = 4.5
FACES = [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
PEROVSKITE = Structure(
    Lattice.cubic(3.9),
    ["Sr", "Ti", "O", "O", "O"],
    [[0, 0, 0], [0.5, 0.5, 0.5], *FACES],
)

pytestmark = pytest.mark.usefixtures("engine")


@pytest.fixture(params=["numba", "numpy"])
def engine(request, monkeypatch):
    if request.param == "numba" and importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed")
    if request.param == "numpy":
        monkeypatch.setattr(neighbors, "_kernels", lambda: None)


def sites(rng: np.random.Generator, n: int) -> np.ndarray:
    """Places that keep apart: points of a grid, shaken, some outside the cell."""
    grid = np.array(list(itertools.product(range(4), repeat=3))) / 4
    chosen = grid[rng.choice(len(grid), n, replace=False)]
    return chosen + rng.uniform(-0.06, 0.06, (n, 3)) + rng.integers(-2, 3, (n, 3))


def mixed_structures() -> Iterator[tuple[str, Structure]]:
    """Over 300: ordinary, rotated, permuted, skewed, flat, one atom, large."""
    rng = np.random.default_rng(42)
    for _ in range(60):
        n = int(rng.integers(1, 9))
        a, b, c = rng.uniform(3, 8, 3)
        angles = rng.uniform(60, 120, 3) if rng.random() < 0.8 else (90, 90, 90)
        try:
            lattice = Lattice.from_parameters(a, b, c, *angles)
        except ValueError:
            continue
        if lattice.volume < 20 * n:
            lattice = Lattice(lattice.matrix * (25 * n / lattice.volume) ** (1 / 3))
        species = rng.choice(["Cu", "Au", "Ti"], n)
        plain = Structure(lattice, species, sites(rng, n))
        yield "triclinic", plain
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        turned = Structure(
            Lattice(lattice.matrix @ rotation), species, plain.frac_coords
        )
        yield "rotated", turned
        order = rng.permutation(n)
        yield "permuted", Structure(lattice, species[order], plain.frac_coords[order])
        steps = np.eye(3, dtype=int)
        steps[1, 0], steps[2, 0], steps[2, 1] = rng.integers(-5, 6, 3)
        skewed = steps @ lattice.matrix
        yield (
            "skewed",
            Structure(
                Lattice(skewed), species, plain.frac_coords @ np.linalg.inv(steps)
            ),
        )
        if n < 4:
            yield "supercell", plain * (2, 1, 2)
    for _ in range(50):
        shape = np.eye(3) * rng.uniform(2.0, 3.0, 3) + rng.normal(size=(3, 3)) * 0.3
        yield "one atom", Structure(Lattice(shape), ["Fe"], rng.uniform(-3, 3, (1, 3)))
        matrix = np.diag([rng.uniform(1.5, 2.5), 7.0, 14.0])[rng.permutation(3)]
        flat = Structure(Lattice(matrix), ["Fe", "Al"], [[0, 0, 0], [0.4, 0.3, 0.5]])
        yield "flat", flat
    for n in (60, 90, 130):
        grid = np.array(list(itertools.product(range(6), repeat=3)))[:n] / 6
        grid += rng.uniform(-0.05, 0.05, (n, 3))
        matrix = np.eye(3) * 15 + rng.normal(size=(3, 3)) * 2
        yield "large", Structure(Lattice(matrix), ["Cu"] * n, grid)


MIXED = list(mixed_structures())


def flat(structures: list[Structure]):
    lattices = np.array([s.lattice.matrix for s in structures])
    coords = np.concatenate([s.frac_coords for s in structures])
    starts = np.cumsum([0, *(len(s) for s in structures)])
    return lattices, coords, starts


def split(found, structures) -> Iterator[dict[tuple[int, ...], float]]:
    """Edges of each structure by (centre, neighbour, cell)."""
    starts = np.cumsum([0, *(len(s) for s in structures)])
    centre = np.repeat(
        np.concatenate([np.arange(len(s)) for s in structures]), found.degrees
    )
    edge_starts = np.concatenate([[0], np.cumsum(found.degrees)])[starts]
    rows = np.column_stack([centre, found.neighbors, found.offsets]).tolist()
    keys = list(map(tuple, rows))
    for a, b in itertools.pairwise(edge_starts):
        edges = dict(zip(keys[a:b], found.distances[a:b].tolist(), strict=True))
        assert len(edges) == b - a  # nothing twice
        yield edges


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for edge, distance in expected.items():
        assert abs(found[edge] - distance) < 1e-10


def brute_force(structure: Structure, cutoff: float) -> dict[tuple[int, ...], float]:
    """All edges from the definition: every image within reach of every site."""
    matrix, frac = structure.lattice.matrix, structure.frac_coords
    heights = 1 / np.linalg.norm(np.linalg.inv(matrix), axis=0)
    edges = {}
    for i, j in itertools.product(range(len(frac)), repeat=2):
        middle = np.round(frac[i] - frac[j]).astype(int)
        reach = np.ceil(cutoff / heights + 0.5).astype(int)
        axes = [np.arange(m - n, m + n + 1) for m, n in zip(middle, reach, strict=True)]
        images = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        d = np.linalg.norm((frac[j] + images - frac[i]) @ matrix, axis=1)
        for e in np.flatnonzero(d <= cutoff):
            image = tuple(images[e].tolist())
            if i != j or any(image):
                edges[(i, j, *image)] = d[e]
    return edges


def test_there_are_over_300_structures_of_all_kinds():
    assert len(MIXED) >= 300
    kinds = {"triclinic", "rotated", "permuted", "skewed", "supercell"}
    assert {kind for kind, _ in MIXED} == kinds | {"one atom", "flat", "large"}


def test_full_lists_equal_a_sum_over_images():
    structures = [s for kind, s in MIXED if kind != "large"]
    found = list_neighbors(*flat(structures), CUTOFF)
    assert not found.status.any()
    for edges, structure in zip(split(found, structures), structures, strict=True):
        same(edges, brute_force(structure, CUTOFF))


def test_full_lists_equal_pymatgen():
    structures = [s for _, s in MIXED]
    found = list_neighbors(*flat(structures), CUTOFF)
    for edges, structure in zip(split(found, structures), structures, strict=True):
        i, j, offsets, distances = structure.get_neighbor_list(CUTOFF)
        keys = np.column_stack([i, j, offsets]).astype(int).tolist()
        same(edges, dict(zip(map(tuple, keys), distances, strict=True)))


def test_full_lists_equal_ase():
    neighborlist = pytest.importorskip("ase.neighborlist", reason="needs ase")
    structures = [s for _, s in MIXED]
    found = list_neighbors(*flat(structures), CUTOFF)
    for edges, structure in zip(split(found, structures), structures, strict=True):
        i, j, offsets, distances = neighborlist.primitive_neighbor_list(
            "ijSd",
            (True, True, True),
            structure.lattice.matrix,
            structure.cart_coords,
            CUTOFF,
        )
        keys = np.column_stack([i, j, offsets]).astype(int).tolist()
        same(edges, dict(zip(map(tuple, keys), distances, strict=True)))


def test_full_lists_equal_matscipy():
    neighbours = pytest.importorskip("matscipy.neighbours", reason="needs matscipy")
    structures = [s for _, s in MIXED]
    found = list_neighbors(*flat(structures), CUTOFF)
    for edges, structure in zip(split(found, structures), structures, strict=True):
        i, j, offsets, distances = neighbours.neighbour_list(
            "ijSd",
            cutoff=CUTOFF,
            positions=structure.cart_coords,
            cell=structure.lattice.matrix,
            pbc=np.ones(3, dtype=bool),
        )
        keys = np.column_stack([i, j, offsets]).astype(int).tolist()
        same(edges, dict(zip(map(tuple, keys), distances, strict=True)))


def test_full_lists_equal_vesin():
    vesin = pytest.importorskip("vesin", reason="needs vesin")
    structures = [s for _, s in MIXED]
    found = list_neighbors(*flat(structures), CUTOFF)
    for edges, structure in zip(split(found, structures), structures, strict=True):
        calculator = vesin.NeighborList(cutoff=CUTOFF, full_list=True, n_threads=1)
        i, j, offsets, distances = calculator.compute(
            structure.cart_coords, structure.lattice.matrix, True, "ijSd"
        )
        keys = np.column_stack([i, j, offsets]).astype(int).tolist()
        same(edges, dict(zip(map(tuple, keys), distances, strict=True)))


def test_a_batch_is_its_structures_one_by_one():
    structures = [s for _, s in MIXED[::7]]
    together, errors = build_graphs(structures, max_neighbors=12)
    assert not errors
    for graph, structure in zip(together, structures, strict=True):
        alone = build_graph(structure, max_neighbors=12)
        assert graph is not None
        assert pack_graph(graph, geometry=True) == pack_graph(alone, geometry=True)


@pytest.mark.parametrize("k", [1, 12])
def test_nearest_neighbors_are_the_nearest(k):
    structures = [s for _, s in MIXED]
    graphs, errors = build_graphs(structures, cutoff_radius=8.0, max_neighbors=k)
    assert not errors
    for graph, structure in zip(graphs, structures, strict=True):
        i, _, _, distances = structure.get_neighbor_list(8.0)
        for atom in range(len(structure)):
            every = np.sort(distances[i == atom])
            own = np.sort(graph.distances[graph.edge_index[0] == atom])
            # All are distances of this atom, and within one shell any may be chosen.
            assert np.abs(every[:, None] - own).min(axis=0).max() < 1e-10
            np.testing.assert_allclose(
                own, every[:k], rtol=0, atol=2 * cells.TIE_TOLERANCE
            )


def test_both_engines_give_the_same_bytes(monkeypatch):
    # Symmetric crystals have the ties that test the order.
    salt = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.6), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    )
    structures = [PEROVSKITE, salt, PEROVSKITE * (2, 2, 1), *(s for _, s in MIXED[::9])]
    for k in (None, 1, 12):
        mine, _ = build_graphs(structures, cutoff_radius=6.5, max_neighbors=k)
        with monkeypatch.context() as patch:
            patch.setattr(neighbors, "_kernels", lambda: None)
            by_numpy, _ = build_graphs(structures, cutoff_radius=6.5, max_neighbors=k)
        for a, b in zip(mine, by_numpy, strict=True):
            assert pack_graph(a, geometry=True) == pack_graph(b, geometry=True)


def test_many_edges_of_one_shell_are_sorted():
    # Over 32 edges at one distance, and over 64 within the cutoff.
    fcc = Structure(Lattice.cubic(3.6), ["Cu"] * 4, [[0, 0, 0], *FACES])
    graph = build_graph(fcc, cutoff_radius=9.0, max_neighbors=None)
    first = graph.edge_index[0] == 0
    shells, counts = np.unique(np.round(graph.distances[first], 3), return_counts=True)
    assert counts.max() > 32
    for shell in shells:
        rows = np.column_stack([graph.edge_index[1], graph.offsets])[
            first & (np.abs(graph.distances - shell) < 1e-3)
        ].tolist()
        assert rows == sorted(rows)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 6),
    cutoff=st.floats(2.0, 5.0),
    stretch=st.floats(1.0, 8.0),
)
@example(seed=0, n=1, cutoff=5.0, stretch=8.0)
def test_lists_are_symmetric_and_do_not_depend_on_the_cell(seed, n, cutoff, stretch):
    rng = np.random.default_rng(seed)
    matrix = np.eye(3) * (25.0 * n) ** (1 / 3) + rng.normal(size=(3, 3)) * 0.5
    matrix[0] *= stretch
    structure = Structure(Lattice(matrix), ["Cu"] * n, sites(rng, n))
    found = list_neighbors(*flat([structure]), cutoff)
    edges = next(split(found, [structure]))
    same(edges, brute_force(structure, cutoff))
    for (i, j, *cell), distance in edges.items():
        assert abs(edges[(j, i, *(-c for c in cell))] - distance) < 1e-10
    # Another basis of the same lattice, other images of the sites, another origin.
    steps = np.eye(3, dtype=int)
    steps[0, 1], steps[0, 2], steps[1, 2] = rng.integers(-4, 5, 3)
    other = Structure(
        Lattice(steps @ matrix),
        structure.species,
        (structure.frac_coords + rng.uniform(-1, 1, 3)) @ np.linalg.inv(steps)
        + rng.integers(-3, 4, (n, 3)),
    )
    again = list_neighbors(*flat([other]), cutoff)
    np.testing.assert_array_equal(again.degrees, found.degrees)
    for begin, end in itertools.pairwise(np.concatenate([[0], found.degrees.cumsum()])):
        np.testing.assert_allclose(
            np.sort(again.distances[begin:end]),
            np.sort(found.distances[begin:end]),
            rtol=0,
            atol=1e-10,
        )


def test_a_neighbor_at_the_cutoff_is_in():
    cubic = flat([Structure(Lattice.cubic(2.7), ["Fe"], [[0.1, 0.2, 0.3]])])
    assert list_neighbors(*cubic, 2.7).degrees.tolist() == [6]
    assert list_neighbors(*cubic, 2.7 - 1e-7).degrees.tolist() == [0]


def test_cells_skewed_by_thousands_are_searched_exactly():
    steps = np.array([[1, 0, 0], [3217, 1, 0], [-1234, 871, 1]])
    plain = Structure(Lattice.cubic(3.0), ["Fe"], [[0, 0, 0]])
    skewed = Structure(Lattice(steps @ plain.lattice.matrix), ["Fe"], [[0, 0, 0]])
    a = build_graph(plain, cutoff_radius=6.0, max_neighbors=None)
    b = build_graph(skewed, cutoff_radius=6.0, max_neighbors=None)
    np.testing.assert_allclose(np.sort(a.distances), np.sort(b.distances), atol=1e-9)
    # The offsets are those of the skewed cell.
    ends = b.offsets @ skewed.lattice.matrix
    np.testing.assert_allclose(np.linalg.norm(ends, axis=1), b.distances, atol=1e-9)


# ------------------------------------------------------------------ bad structures


def bad_structures() -> list[tuple[Structure, str]]:
    fe = ["Fe"]
    return [
        (Structure(Lattice.cubic(30.0), fe, [[0, 0, 0]]), "isolated"),
        (Structure(Lattice.cubic(3.0), fe, [[0, np.nan, 0]]), "not finite"),
        (Structure(Lattice.cubic(3.0), fe, [[0, np.inf, 0]]), "not finite"),
        (Structure(Lattice.cubic(3.0), fe, [[0, 1e9, 0]]), "million cells"),
        (
            Structure(Lattice([[3, 0, 0], [0, 3, 0], [3, 3, 0]]), fe, [[0, 0, 0]]),
            "volume",
        ),
        (
            Structure(Lattice([[3, 0, 0], [0, 0, 0], [0, 0, 3]]), fe, [[0] * 3]),
            "volume",
        ),
        (
            Structure(Lattice([[3e8, 0, 0], [3e8, 1e-8, 0], [0, 0, 3]]), fe, [[0] * 3]),
            "volume",
        ),
        (
            Structure(Lattice.cubic(3.0), fe * 2, [[0, 0, 0], [1, 0, 0]]),
            "sites 0 and 1 of Fe are 0 Å apart",
        ),
        (Structure(Lattice.orthorhombic(0.01, 9, 9), fe, [[0] * 3]), "0 and 0 of Fe"),
        (
            Structure(Lattice.cubic(3.0), [{"Fe": 0.5, "Ni": 0.5}], [[0] * 3]),
            "disorder",
        ),
        (Structure(Lattice.cubic(3.0), ["X"], [[0, 0, 0]]), "no element"),
        (Structure(Lattice.cubic(3.0), [], []), "no sites"),
    ]


@pytest.mark.parametrize("k", [None, 12])
def test_bad_structures_do_not_stop_a_batch(k):
    bad = bad_structures()
    mixture = [PEROVSKITE, *(s for s, _ in bad), PEROVSKITE]
    graphs, errors = build_graphs(mixture, cutoff_radius=5.0, max_neighbors=k)
    assert sorted(errors) == list(range(1, len(bad) + 1))
    for position, (structure, words) in enumerate(bad, start=1):
        assert graphs[position] is None
        assert words in str(errors[position])
        with pytest.raises(InputError, match=words):
            build_graph(structure, cutoff_radius=5.0, max_neighbors=k)
    alone = pack_graph(build_graph(PEROVSKITE, cutoff_radius=5.0, max_neighbors=k))
    assert pack_graph(graphs[0]) == pack_graph(graphs[-1]) == alone


def test_lists_that_cannot_fit_into_memory_are_refused():
    dense = Structure(Lattice.cubic(0.11), ["Fe"], [[0, 0, 0]])
    with pytest.raises(InputError, match="edges"):
        build_graph(dense, cutoff_radius=50.0, max_neighbors=None)
    assert build_graph(dense, cutoff_radius=50.0, max_neighbors=6).n_edges == 6


def test_deuterium_and_tritium_are_hydrogen():
    graphs, errors = build_graphs(
        [Structure(Lattice.cubic(2.0), [name], [[0, 0, 0]]) for name in "HDT"]
    )
    assert not errors
    assert len({pack_graph(graph) for graph in graphs}) == 1


# ------------------------------------------------------------------- other entrances


def test_documents_give_the_graphs_of_their_structures():
    structures = [s for _, s in MIXED[::11]]
    from_documents, errors = build_graphs([encode_structure(s) for s in structures])
    assert not errors
    from_structures, _ = build_graphs(structures)
    for a, b in zip(from_documents, from_structures, strict=True):
        assert pack_graph(a, geometry=True) == pack_graph(b, geometry=True)


def test_damaged_documents_are_reported_by_position():
    good = encode_structure(PEROVSKITE)
    short = {**good, "lattice": good["lattice"][:-1]}
    strange = {**good, "numbers": bytes([0, 22, 8, 8, 8])}
    graphs, errors = build_graphs([good, short, strange, good])
    assert [graph is None for graph in graphs] == [False, True, True, False]
    assert all(isinstance(error, CorruptArtifactError) for error in errors.values())


def test_arrays_give_the_graph_of_the_structure():
    graph = build_graph_arrays(
        [38, 22, 8, 8, 8], PEROVSKITE.lattice.matrix, PEROVSKITE.frac_coords
    )
    expected = pack_graph(build_graph(PEROVSKITE), geometry=True)
    assert pack_graph(graph, geometry=True) == expected


@pytest.mark.parametrize(
    ("numbers", "lattice", "coords", "words"),
    [
        ([119], np.eye(3) * 3, np.zeros((1, 3)), "no atomic number"),
        ([0], np.eye(3) * 3, np.zeros((1, 3)), "no atomic number"),
        ([], np.eye(3) * 3, np.zeros((0, 3)), "no sites"),
        ([29], np.eye(2) * 3, np.zeros((1, 3)), "lattice"),
        ([29], np.eye(3) * 3, np.zeros((2, 3)), "fit"),
    ],
)
def test_arrays_that_are_no_crystal_are_refused(numbers, lattice, coords, words):
    with pytest.raises(InputError, match=words):
        build_graph_arrays(np.array(numbers), lattice, coords)


@pytest.mark.parametrize("cutoff", [0.0, -1.0, np.nan, np.inf])
def test_cutoffs_that_are_no_length_are_refused(cutoff):
    arrays = flat([PEROVSKITE])
    with pytest.raises(InputError, match="cutoff_radius"):
        list_neighbors(*arrays, cutoff)
    with pytest.raises(InputError, match="cutoff_radius"):
        build_graphs([PEROVSKITE], cutoff_radius=cutoff)


def test_no_crystals_give_no_neighbors():
    nothing = np.empty((0, 3, 3)), np.empty((0, 3)), np.array([0])
    assert len(list_neighbors(*nothing, 5.0).distances) == 0
    lattices, coords, starts = nothing
    empty = list_nearest(lattices, coords, np.empty(0, np.uint8), starts, 5.0, 12)
    assert len(empty.distances) == 0
    assert build_graphs([]) == ([], {})


@pytest.mark.parametrize("seed", range(20))
def test_the_reduced_cell_is_the_same_lattice(seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(3, 3)) * rng.uniform(1, 20, (3, 1))
    if abs(np.linalg.det(matrix)) < 1:
        matrix += np.eye(3) * 5
    cell, transform = np.empty(6), np.empty((3, 3), dtype=np.int64)
    code, volume, _ = cells.prepare_cell(matrix, cell, transform)
    assert code == 0
    assert abs(round(np.linalg.det(transform))) == 1
    assert volume == pytest.approx(abs(np.linalg.det(matrix)))
    triangle = np.zeros((3, 3))
    triangle[np.tril_indices(3)] = cell
    reduced = transform @ matrix
    # Equal lengths and angles: one is the other, rotated.
    np.testing.assert_allclose(triangle @ triangle.T, reduced @ reduced.T, atol=1e-9)
    assert (np.abs([cell[1], cell[3]]) <= 0.50001 * cell[0]).all()
