from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nanoos_fw.ml import gradients
from nanoos_fw.ml.gradients import FlatParameters
from nanoos_fw.ml.process_groups import choose_backend
from nanoos_fw.parallel import Communicator


class Twin(Communicator):
    """Two ranks with the same gradients, whose sums are made when they are awaited."""

    def __init__(self):
        super().__init__()
        self.size = 2
        self.begun, self.waited = [], 0

    def start_sum_in_place(self, array):
        self.begun.append(array)

        def finish():
            array.__imul__(2)
            self.waited += 1

        return finish


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 1)]
    return nn.Sequential(*layers).double()


def test_each_gradient_is_summed_once_and_the_last_layers_begin_first(monkeypatch):
    monkeypatch.setattr(gradients, "_BYTES_OF_A_MESSAGE", 8 * 28)
    x = torch.randn(3, 5, dtype=torch.float64)
    alone, shared, twin = network(), network(), Twin()
    alone(x).sum().backward()
    flat = FlatParameters(shared, 2, twin)
    assert flat.n_decayed == 5 * 7 + 7 * 4 + 4
    for _ in range(2):  # no step knows of the one before
        twin.begun.clear()
        flat.clear()
        begun = []
        shared[0].weight.register_hook(
            lambda _, begun=begun: begun.append(len(twin.begun))
        )
        shared(x).sum().backward()
        flat.sums.copy_(torch.tensor([1.0, 2.0]))
        # The last two matrices fill a message, which was on its way before the first
        # had its gradient.
        assert begun == [1]
        assert len(twin.begun) == 2
        flat.sum()
        assert [len(a) for a in twin.begun] == [28 + 4, 35, 7 + 4 + 1 + 2]
        for mine, theirs in zip(shared.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, 2 * theirs.grad)
        assert flat.sums.tolist() == [2.0, 4.0]
    assert twin.waited == 6


def test_sums_that_no_gradient_came_for_are_made_all_the_same():
    net, twin = network(), Twin()
    flat = FlatParameters(net, 1, twin)
    flat.clear()
    flat.sum()
    assert sum(len(a) for a in twin.begun) == len(flat.weights) + 1


@pytest.mark.parametrize(
    ("places", "backend"),
    [
        ([("n1", 0), ("n1", 1)], "nccl"),
        ([("n1", 0), ("n2", 0)], "nccl"),
        # Four ranks of two teams on two GPUs: the ranks of a team share one.
        ([("n1", 0), ("n1", 0)], None),
    ],
)
def test_ranks_that_share_a_gpu_sum_without_nccl(places, backend, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    team = SimpleNamespace(
        size=2, mpi=SimpleNamespace(allgather=lambda _: places), any=bool
    )
    assert choose_backend(torch.device("cuda", 0), team) == backend
    assert choose_backend(torch.device("cpu"), team) is None
