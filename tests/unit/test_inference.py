from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn import Architecture, atom_features
from nanoos_fw.ml.graphs import build_graph
from nanoos_fw.ml.inference import fold_network, is_compiled, run_networks
from nanoos_fw.ml.network import CrystalGraphNetwork, TensorBatch

SIZES = Architecture(hidden_dim=24, num_layers=3, readout_dim=16)
OTHER = Architecture(
    hidden_dim=8, num_layers=1, readout_dim=4, gaussian_step=0.25, gaussian_width=0.4
)
needs_numba = pytest.mark.skipif(not is_compiled(), reason="numba is not installed")
ENGINES = ["numpy", pytest.param("numba", marks=needs_numba)]


def random_network(architecture, seed, scale=0.4):
    generator = torch.Generator().manual_seed(seed)
    net = CrystalGraphNetwork(architecture, atom_features())
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name else scale * noise)
    return net.eval()


def folded(net, architecture, precision="float32"):
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    return fold_network(architecture, atom_features(), state, precision)


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(3)
    graphs = []
    for n in rng.integers(1, 9, 25):
        lattice = Lattice(np.eye(3) * 4.5 + rng.normal(size=(3, 3)) * 0.3)
        species = rng.choice(["Cu", "O", "Sr", "Ti", "Cs"], n)
        crystal = Structure(lattice, species, rng.uniform(size=(n, 3)))
        graphs.append(build_graph(crystal, cutoff_radius=8.0, max_neighbors=12))
    return GraphTable.from_graphs(graphs)


def by_torch(net, table, dtype=torch.float64):
    batch = TensorBatch.from_batch(table.batch(np.arange(len(table))), dtype)
    with torch.inference_mode():
        return net.to(dtype)(batch).double().numpy()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("architecture", [SIZES, OTHER])
def test_folded_networks_give_the_outputs_of_the_network(table, architecture, engine):
    nets = [random_network(architecture, seed) for seed in (1, 2)]
    found = run_networks([folded(n, architecture) for n in nets], table, engine=engine)
    assert found.shape == (2, len(table), 1)
    for net, outputs in zip(nets, found[..., 0], strict=True):
        expected = by_torch(net, table)
        assert np.ptp(expected) > 0.1
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_float64_agrees_to_float64(table):
    net = random_network(SIZES, 4).double()
    found = run_networks([folded(net, SIZES, "float64")], table)[0, :, 0]
    # The table's Gaussian centres are float32 in the network.
    np.testing.assert_allclose(found, by_torch(net, table), rtol=1e-5)
    again = run_networks([folded(net, SIZES, "float64")], table, engine="numpy")
    np.testing.assert_array_equal(again[0, :, 0], found)
    if is_compiled():
        with pytest.raises(InputError, match="float32"):
            run_networks([folded(net, SIZES, "float64")], table, engine="numba")


@pytest.mark.parametrize("engine", ENGINES)
def test_saturated_gates_and_cores_stay_right(table, engine):
    net = random_network(SIZES, 5, scale=4.0)
    found = run_networks([folded(net, SIZES)], table, engine=engine)[0, :, 0]
    expected = by_torch(net, table)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.ptp(expected))


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_and_neighbours_in_the_batch_change_no_bit(table, engine, monkeypatch):
    monkeypatch.setattr("nanoos_fw.ml.inference._ATOMS_AT_ONCE", 20)
    networks = [folded(random_network(SIZES, 6), SIZES)]
    one = run_networks(networks, table, threads=1, engine=engine)
    two = run_networks(networks, table, threads=3, engine=engine)
    np.testing.assert_array_equal(one, two)
    picked = run_networks(networks, table.select([7, 2]), engine=engine)
    np.testing.assert_allclose(picked, one[:, [7, 2]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_padding_adds_the_neighbours_of_the_published_program(engine):
    sparse = Structure(Lattice.cubic(6.0), ["Cu", "O"], [[0, 0, 0], [0.5] * 3])
    whole = build_graph(sparse, cutoff_radius=6.5, max_neighbors=20)
    assert whole.degrees.tolist() == [14, 14]
    full = Structure(Lattice.cubic(3.0), ["Ti"], [[0, 0, 0]])
    dense = build_graph(full, cutoff_radius=6.5, max_neighbors=20)
    table = GraphTable.from_graphs([dense, whole])
    network = folded(random_network(SIZES, 7), SIZES)
    padded = run_networks([network], table, pad_to=20, engine=engine)[0, :, 0]
    # By hand: six more neighbours of each atom, atom 0 at 7.5 Å.
    by_hand = GraphTable(
        numbers=table.numbers[1:],
        degrees=np.array([20, 20], dtype=np.uint16),
        neighbors=np.concatenate(
            [np.r_[part, np.zeros(6)] for part in whole.edge_index[1].reshape(2, 14)]
        ).astype(np.int32),
        distances=np.concatenate(
            [np.r_[part, np.full(6, 7.5)] for part in whole.distances.reshape(2, 14)]
        ).astype(np.float32),
        atom_start=np.array([0, 2]),
        edge_start=np.array([0, 40]),
        cutoff_radius=6.5,
        max_neighbors=20,
    )
    plain = run_networks([network], table, engine=engine)[0, :, 0]
    expected = run_networks([network], by_hand, engine=engine)[0, 0, 0]
    assert padded[1] == pytest.approx(expected, rel=1e-6)
    assert padded[1] != pytest.approx(plain[1], rel=1e-4)
    assert padded[0] == pytest.approx(plain[0], rel=1e-6)


def test_atoms_without_neighbours_keep_their_own_part():
    table = GraphTable(
        numbers=np.array([29, 8], dtype=np.uint8),
        degrees=np.array([0, 1], dtype=np.uint16),
        neighbors=np.array([0], dtype=np.int32),
        distances=np.array([2.0], dtype=np.float32),
        atom_start=np.array([0, 2]),
        edge_start=np.array([0, 1]),
        cutoff_radius=8.0,
        max_neighbors=12,
    )
    net = random_network(SIZES, 8)
    for engine in ("numpy", "auto"):
        found = run_networks([folded(net, SIZES)], table, engine=engine)[0, :, 0]
        np.testing.assert_allclose(found, by_torch(net, table), rtol=1e-5)


def test_no_torch_is_imported():
    code = (
        "import sys, numpy\n"
        "import nanoos_fw.ml.inference, nanoos_fw.ml.cgcnn, nanoos_fw.ml.graphs\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
