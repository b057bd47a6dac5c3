from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nanoos_fw.ml import convolution
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn import Architecture, atom_features
from nanoos_fw.ml.network import CrystalGraphNetwork, TensorBatch
from nanoos_fw.parallel import Communicator

kernels = pytest.importorskip("nanoos_fw.ml.convolution_kernels")

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}


def table(n_graphs=9, seed=0, *, degrees=(0, 14)):
    """Graphs of any size, atoms of any degree, none included."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, n_graphs)
    degree = rng.integers(*degrees, sizes.sum()).astype(np.uint16)
    edges = np.add.reduceat(degree.astype(int), np.cumsum(sizes) - sizes)
    return GraphTable(
        numbers=rng.integers(1, 90, sizes.sum()).astype(np.uint8),
        degrees=degree,
        neighbors=rng.integers(0, np.repeat(sizes, edges)).astype(np.int32),
        distances=rng.uniform(0.7, 8.0, degree.sum()).astype(np.float32),
        atom_start=np.concatenate([[0], np.cumsum(sizes)]),
        edge_start=np.concatenate([[0], np.cumsum(edges)]),
        cutoff_radius=8.0,
        max_neighbors=None,
    )


def network(dtype, **changes):
    sizes = {"hidden_dim": 12, "num_layers": 2, "readout_dim": 8, **changes}
    torch.manual_seed(1)
    made = CrystalGraphNetwork(Architecture(**sizes), atom_features())
    for module in made.modules():  # away from ones and zeros
        if hasattr(module, "running_mean"):
            torch.nn.init.normal_(module.weight, 1.0, 0.3)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    return made.to(dtype)


def outcome(net, batch, *, compiled):
    """Outputs, running moments and gradients of one training step."""
    net.compiled = compiled
    net.train()
    net.zero_grad()
    out = net(batch)
    weights = torch.linspace(-1, 1, len(out), dtype=out.dtype)
    (out * weights + 0.1 * out**2).sum().backward()
    return {
        "out": out.detach(),
        **{name: p.grad.clone() for name, p in net.named_parameters()},
        **{name: b.clone() for name, b in net.named_buffers()},
    }


def reset(net):
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.zero_()
        if name.endswith("running_var"):
            buffer.fill_(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "changes", [{}, {"gaussian_step": 0.5, "gaussian_width": 0.3}, {"hidden_dim": 5}]
)
def test_compiled_passes_equal_torch(dtype, changes):
    net = network(dtype, **changes)
    batch = TensorBatch.from_batch(table().batch(np.arange(9)), dtype)
    found = outcome(net, batch, compiled=True)
    reset(net)
    expected = outcome(net, batch, compiled=False)
    for name, value in expected.items():
        scale = float(value.abs().max()) or 1.0
        error = float((found[name] - value).abs().max())
        assert error <= TOLERANCE[dtype] * scale, (name, error, scale)
    assert any("edge.weight" in name for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_evaluation_equals_torch(dtype):
    net = network(dtype)
    batch = TensorBatch.from_batch(table(seed=3).batch(np.arange(9)), dtype)
    outcome(net, batch, compiled=True)  # running moments of their own
    net.eval()
    answers = []
    for compiled in (True, False):
        net.compiled = compiled
        with torch.no_grad():
            answers.append(net(batch))
    torch.testing.assert_close(*answers, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("part", ["edge_norm", "atom_norm"])
def test_the_moments_of_a_frozen_normalization_stand_still(part):
    net = network(torch.float64)
    batch = TensorBatch.from_batch(table().batch(np.arange(9)), torch.float64)
    net.train()
    norm = getattr(net.convolutions[0], part)
    norm.eval()
    net(batch).sum().backward()
    assert float(norm.running_mean.abs().max()) == 0.0
    for layer in net.convolutions:
        for one in (layer.edge_norm, layer.atom_norm):
            assert (float(one.running_mean.abs().max()) == 0.0) == (one is norm)


def unit(channels, dtype=torch.float64):
    """Weight and bias of a normalization that does nothing more."""
    return torch.ones(channels, dtype=dtype), torch.zeros(channels, dtype=dtype)


def plan_of(graphs, dtype=torch.float64, n_centers=41):
    batch = TensorBatch.from_batch(graphs.batch(np.arange(len(graphs))), dtype)
    return convolution.plan_edges(
        starts=batch.edge_start.numpy(),
        neighbors=batch.neighbor.numpy(),
        distances=batch.distances.numpy(),
        graph_sizes=batch.graph_sizes.numpy(),
        step=0.2,
        width=0.2,
        n_centers=n_centers,
        dtype=dtype,
    )


def test_gradients_equal_differences():
    plan = plan_of(table(3, degrees=(0, 5)))
    rng = torch.Generator().manual_seed(0)
    n = len(plan.starts) - 1

    def random(*shape):
        made = torch.randn(*shape, generator=rng, dtype=torch.float64)
        return made.requires_grad_()

    inputs = (random(n, 4), random(n, 4), random(4, 41), random(4), random(4))
    inputs += (random(2), random(2))

    def ours(own, other, edge, weight, bias, *of_atoms):
        return convolution.convolve_edges(
            own, other, edge, plan, (weight, bias), of_atoms, Communicator()
        )[0]

    assert torch.autograd.gradcheck(ours, inputs)


def test_moments_are_those_of_the_edges_far_from_zero():
    graphs = table(seed=5)
    plan = plan_of(graphs, torch.float32)
    n = len(plan.starts) - 1
    rng = torch.Generator().manual_seed(0)
    own = torch.randn(n, 6, generator=rng) + 3e3
    other = torch.randn(n, 6, generator=rng) - 1e2
    zero = torch.zeros(6, 41)
    _, found, of_atoms = convolution.convolve_edges(
        own, other, zero, plan, unit(6, torch.float32), unit(3, torch.float32),
        Communicator(),
    )  # fmt: skip
    centre = np.repeat(np.arange(n), np.diff(plan.starts))
    z = (own[centre] + other[plan.neighbors]).double()
    assert int(found.count) == len(z)
    assert int(of_atoms.count) == n
    torch.testing.assert_close(found.mean, z.mean(0), rtol=1e-7, atol=0)
    variance = z.var(0, correction=0)
    torch.testing.assert_close(found.variance, variance, rtol=1e-3, atol=0)


class Share(Communicator):
    """One of several ranks whose sums are made by the test."""

    def __init__(self, sums):
        super().__init__()
        self.size, self.sums = 2, sums

    def sum_in_place(self, array):
        array += self.sums.pop(0)


class Record(Communicator):
    def __init__(self):
        super().__init__()
        self.sums = []

    def sum_in_place(self, array):
        self.sums.append(array.copy())


def test_threads_and_pieces_change_nothing_but_rounding():
    graphs = table(64, seed=2, degrees=(12, 13))
    batch = TensorBatch.from_batch(graphs.batch(np.arange(64)), torch.float32)
    net = network(torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            reset(net)
            found.append(outcome(net, batch, compiled=True))
    finally:
        torch.set_num_threads(threads)
    plan = plan_of(graphs)
    assert len(plan.pieces) > 3
    ends = np.concatenate([[0], np.cumsum(graphs.graph_sizes)])
    assert set(plan.pieces) <= set(ends)  # whole graphs
    # torch's own products may depend on its threads; the passes on edges may not.
    own = torch.randn(len(plan.starts) - 1, 8, dtype=torch.float64)
    answers = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        summed, *moments = convolution.convolve_edges(
            own, own, own[:41].T.contiguous(), plan, (own[0], own[1]), unit(4),
            Communicator(),
        )  # fmt: skip
        answers.append([summed, *(v for one in moments for v in vars(one).values())])
    torch.set_num_threads(threads)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-4)


def test_a_rank_without_edges_takes_part():
    plan = plan_of(table(4))
    none = plan_of(table(4, degrees=(0, 1)))
    assert none.n_edges == 0
    rng = torch.Generator().manual_seed(4)
    own = torch.randn(len(plan.starts) - 1, 4, generator=rng, dtype=torch.float64)
    edge = torch.randn(4, 41, generator=rng, dtype=torch.float64)
    alone = Record()
    _, *expected = convolution.convolve_edges(
        own, own, edge, plan, unit(4), unit(2), alone
    )
    own_none = torch.zeros(len(none.starts) - 1, 4, dtype=torch.float64)
    own_none.requires_grad_()
    # Its atoms have no edges, so their sums are zero.
    atoms = [2.0, 3.0, 5.0, 7.0, 11.0]
    share = Share([alone.sums[0], np.array(atoms), np.ones(28)])
    normalized, of_edges, of_atoms = convolution.convolve_edges(
        own_none, own_none, edge, none, unit(4), unit(2), share
    )
    assert vars(of_edges).keys() == vars(expected[0]).keys()
    for name, value in vars(expected[0]).items():
        assert torch.equal(getattr(of_edges, name), value)
    count = 11.0 + len(own_none)
    mean = torch.tensor([2.0, 3.0]).double() / count
    variance = torch.tensor([5.0, 7.0]).double() / count - mean**2
    torch.testing.assert_close(of_atoms.mean, mean)
    torch.testing.assert_close(of_atoms.variance, variance)
    assert float(of_atoms.count) == count
    zero = -mean / torch.sqrt(variance + convolution.EPSILON)
    torch.testing.assert_close(normalized, zero.expand(len(own_none), 2))
    normalized.sum().backward()
    assert torch.equal(own_none.grad, torch.zeros_like(own_none))
    assert not share.sums


def test_an_empty_batch_has_no_moments():
    none = plan_of(table(2, degrees=(0, 1)))
    own = torch.zeros(len(none.starts) - 1, 4, dtype=torch.float64)
    summed, of_edges, of_atoms = convolution.convolve_edges(
        own, own, torch.zeros(4, 41).double(), none, unit(4), unit(2), Communicator()
    )
    assert float(of_edges.count) == 0.0
    for tensor in (summed, *vars(of_edges).values(), *vars(of_atoms).values()):
        assert torch.isfinite(tensor).all()


def test_not_a_number_stays_visible():
    plan = plan_of(table(3), torch.float32)
    own = torch.zeros(len(plan.starts) - 1, 4)
    busiest = int(np.argmax(np.diff(plan.starts)))
    own[busiest, 1] = math.nan
    summed, *_ = convolution.convolve_edges(
        own, torch.zeros_like(own), torch.zeros(4, 41), plan, unit(4, torch.float32),
        unit(2, torch.float32), Communicator(),
    )  # fmt: skip
    assert torch.isnan(summed[busiest]).any()


@pytest.mark.parametrize("x", [0.0, 1e-6, -0.3, 1.0, -8.5, 15.0, -38.0, 60.0, -200.0])
def test_sigmoid_and_softplus_of_the_passes(x):
    # One edge, z = 0 whatever the weights, so that the biases are gate and core.
    plan = convolution.EdgePlan(
        starts=np.array([0, 1]),
        neighbors=np.array([0]),
        first=np.array([0]),
        gaussians=np.zeros((1, kernels.ROWS), np.float32),
        pieces=np.array([0, 1]),
        n_centers=1,
    )
    nothing = torch.zeros(1, 2)
    for gate, core in ((x, 0.5), (0.5, x)):
        found = convolution.convolve_edges_fixed(
            nothing, nothing, torch.zeros(2, 1), plan,
            (torch.ones(2), torch.tensor([gate, core])),
            (torch.zeros(2), torch.ones(2)),
        )  # fmt: skip
        sigmoid = 1 / (1 + math.exp(-gate))
        softplus = max(core, 0) + math.log1p(math.exp(-abs(core)))
        # Below exp(-40) the passes stop to follow.
        assert float(found) == pytest.approx(sigmoid * softplus, rel=5e-7, abs=1e-16)


def test_gaussians_equal_their_formula():
    distances = np.array([0.1, 0.7, 3.14159, 7.95, 8.0, 9.0, 30.0], dtype=np.float32)
    for step, width, dtype, error in (
        (0.2, 0.2, np.float64, 1e-14),
        (0.5, 0.3, np.float32, 1e-7),
    ):
        n_centers = int(8.0 / step + 0.5) + 1
        rows = int(2 * 6.25 * width / step) + 1
        first = np.empty(len(distances), np.int64)
        values = np.empty((len(distances), rows), dtype)
        kernels.spread_gaussians(distances, step, width, n_centers, first, values)
        mu = step * np.arange(n_centers)
        whole = np.exp(-(((distances[:, None].astype(float) - mu) / width) ** 2))
        padded = np.zeros((len(distances), n_centers + 2 * rows))
        for e, row in enumerate(first):
            padded[e, row : row + rows] = values[e]
        inside = padded[:, rows : rows + n_centers]
        np.testing.assert_allclose(inside, whole, atol=error, rtol=0)
