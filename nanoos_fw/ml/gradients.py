"""Weights and gradients of a network in one buffer each. Importing this imports torch.

The optimizer then makes one pass over the weights, and few messages carry all of the
gradients over the ranks. The backward pass gives those of the last layers first, whose
sum begins while it goes on to the layers before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nanoos_fw.ml.process_groups import start_sum
from nanoos_fw.parallel import Communicator

# Smaller messages overlap more, but beginning one costs about as much as 100 kB do.
_BYTES_OF_A_MESSAGE = 1 << 18


class FlatParameters:
    """The weights of a network that are trained, and the message of their gradients.

    Parameters
    ----------
    network
        Its parameters become views of ``weights``, their gradients of ``gradients``.
    n_sums
        Numbers that travel with the gradients.
    comm
        Ranks that sum.

    Notes
    -----
    Weight matrices come first, ``n_decayed`` numbers in all: they decay, biases and
    normalization do not. Checkpoints have this order.
    """

    def __init__(self, network: nn.Module, n_sums: int, comm: Communicator) -> None:
        parameters = sorted(
            (p for p in network.parameters() if p.requires_grad),
            key=lambda p: p.ndim < 2,
        )
        self.comm = comm
        self.weights = torch.cat([p.detach().reshape(-1) for p in parameters])
        self._message = self.weights.new_zeros(len(self.weights) + n_sums)
        self.gradients = self._message[: len(self.weights)]
        self.sums = self._message[len(self.weights) :]
        self.n_decayed = sum(p.numel() for p in parameters if p.ndim >= 2)
        ends = []
        position = 0
        for parameter in parameters:
            span = slice(position, position + parameter.numel())
            parameter.data = self.weights[span].view_as(parameter)
            parameter.grad = self.gradients[span].view_as(parameter)
            position = span.stop
            ends.append(position)
        # All that is small goes last, with the sums.
        self._tail = self._message[self.n_decayed :]
        self._parts: list[Tensor] = []
        self._sizes: list[int] = []
        self._missing: list[int] = []
        self._pending: list[Callable[[], object]] = []
        if comm.size > 1:
            matrices = [p for p in parameters if p.ndim >= 2]
            self._divide(matrices, ends[: len(matrices)])

    def clear(self) -> None:
        """Set gradients and sums to zero, before the backward pass."""
        self._message.zero_()
        self._missing, self._pending = list(self._sizes), []

    def sum(self) -> None:
        """Sum what the backward pass left, and wait for all sums, on all ranks."""
        if self.comm.size == 1:
            return
        for part in self._parts[len(self._pending) :]:
            self._pending.append(start_sum(part, self.comm))
        self._pending.append(start_sum(self._tail, self.comm))
        for finish in self._pending:
            finish()

    def _divide(self, matrices: list[nn.Parameter], ends: list[int]) -> None:
        """Divide the matrices into messages, those of the last layers first."""
        stop, size = self.n_decayed, 0
        for parameter, end in reversed(list(zip(matrices, ends, strict=True))):
            number = len(self._parts)
            listen: Any = parameter.register_post_accumulate_grad_hook
            listen(functools.partial(self._arrived, number))
            start, size = end - parameter.numel(), size + 1
            enough = (stop - start) * self.weights.element_size() >= _BYTES_OF_A_MESSAGE
            if enough or start == 0:
                self._parts.append(self._message[start:stop])
                self._sizes.append(size)
                stop, size = start, 0
        self._missing = list(self._sizes)

    def _arrived(self, number: int, _: Tensor) -> None:
        """Begin the sums of the parts that are whole, in their order on all ranks."""
        self._missing[number] -= 1
        while (place := len(self._pending)) < len(self._parts):
            if self._missing[place]:
                return
            self._pending.append(start_sum(self._parts[place], self.comm))
