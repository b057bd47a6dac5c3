"""Networks of an ensemble: from checkpoints, their predictions, and their spread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.model_files import ATOM_TABLE, ModelCard

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nanoos_fw.ml.network import Network


def build_networks(
    card: ModelCard, arrays: Mapping[str, NDArray[Any]], name: str
) -> list[Network]:
    """Return the members of a checkpoint as networks of torch.

    Raises
    ------
    CorruptArtifactError
        If the weights do not fit the card.
    """
    import torch

    from nanoos_fw.ml.network import build_network

    members = []
    for index in range(card.n_members):
        network = build_network(card.architecture, arrays[ATOM_TABLE])
        network = network.to(getattr(torch, card.precision))
        state = {
            key: torch.from_numpy(np.array(value))
            for key, value in state_of(arrays, index).items()
        }
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise CorruptArtifactError(
                f"member {index} of {name} does not fit its architecture: {error}",
                advice="train the model again",
            ) from error
        network.eval()
        members.append(network)
    return members


def predict_table(
    members: Sequence[Network],
    card: ModelCard,
    reference: NDArray[np.float64],
    table: GraphTable,
    *,
    rows: NDArray[np.int64] | None = None,
    batch_size: int = 256,
) -> NDArray[np.float64]:
    """Return the prediction of each network for rows of a table, ``(members, n)``.

    By torch, as networks in training have it;
    :meth:`nanoos_fw.ml.cgcnn.CGCNNModel.predict_rows` is faster. ``batch_size`` is at
    most the network's ``evaluation_batch``.
    """
    import torch

    from nanoos_fw.ml.network import TensorBatch

    wanted = np.arange(len(table)) if rows is None else rows
    dtype = getattr(torch, card.precision)
    answers = np.empty((len(members), len(wanted)))
    batch_size = min(batch_size, members[0].evaluation_batch)
    for member in members:
        member.eval()
    with torch.inference_mode():
        for start in range(0, len(wanted), batch_size):
            chunk = wanted[start : start + batch_size]
            arrays = table.batch(chunk)
            batch = TensorBatch.from_batch(arrays, dtype)
            offset = np.bincount(
                arrays.graph_index,
                weights=reference[arrays.numbers],
                minlength=len(chunk),
            ) / np.maximum(arrays.graph_sizes, 1)
            outputs = np.stack([member(batch).double().numpy() for member in members])
            answers[:, start : start + len(chunk)] = targets_of_outputs(
                card, outputs.reshape(len(members), len(chunk), -1), offset
            )
    return answers


def ensemble(
    members: NDArray[np.float64], scale: float = 1.0
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return mean and uncertainty of an ensemble.

    Parameters
    ----------
    members
        ``(n_members, n)`` predictions.
    scale
        The card's ``uncertainty_scale``.

    Returns
    -------
    mean, std
        ``(n,)``; ``std`` is ``scale`` times the standard deviation over the members
        (n_members - 1 in the denominator), None with one member.
    """
    std = scale * members.std(axis=0, ddof=1) if len(members) > 1 else None
    return members.mean(axis=0), std


def dropout_spread(
    members: Sequence[Network],
    card: ModelCard,
    reference: NDArray[np.float64],
    table: GraphTable,
    *,
    passes: int,
    seed: int,
    batch_size: int = 256,
) -> NDArray[np.float64]:
    """Return the standard deviation over passes with dropout of all members, ``(n,)``.

    Parameters
    ----------
    members, card, reference, table, batch_size
        As :func:`predict_table`.
    passes
        Of each member that has dropout.
    seed
        Chooses the masks: equal seeds give equal answers, whatever the batches.
    """
    samples = []
    for index, member in enumerate(members):
        for number in range(passes if has_dropout([member]) else 1):
            mask = (seed, index, number)
            with thinned(member, mask) if has_dropout([member]) else nullcontext():
                samples.append(
                    predict_table(
                        [member], card, reference, table, batch_size=batch_size
                    )[0]
                )
    return np.asarray(np.std(samples, axis=0, ddof=1))


def has_dropout(members: Sequence[nn.Module]) -> bool:
    """Tell whether the networks were trained with dropout."""
    return any(_dropouts(member) for member in members)


@contextmanager
def thinned(member: nn.Module, seed: Sequence[int]) -> Iterator[None]:
    """Let a network drop out units in evaluation, the same ones for all structures.

    Each dropout layer gets one mask over its channels, drawn from the seed alone:
    the answer for a structure depends neither on the others of its batch nor on
    their order. Everything else (batch normalization) stays in evaluation.

    References
    ----------
    Y. Gal, Z. Ghahramani, Proc. 33rd Int. Conf. Mach. Learn., 1050 (2016): a mask is
    a draw of weights from the approximate posterior.
    """
    import torch

    used = [0]

    def hook(index: int, rate: float) -> Any:
        def apply(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            rng = np.random.default_rng([*seed, index])
            kept = rng.random(output.shape[-1]) >= rate
            used[0] += 1
            mask = torch.from_numpy(kept / (1.0 - rate)).to(output.dtype)
            return output * mask

        return apply

    member.eval()
    handles = [
        layer.register_forward_hook(hook(index, float(layer.p)))
        for index, layer in enumerate(_dropouts(member))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not used[0]:
        raise RuntimeError("the network was evaluated without passing a dropout layer")


def targets_of_outputs(
    card: ModelCard, outputs: NDArray[np.float64], offset: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return targets from outputs ``(n_members, n, n_outputs)``.

    ``offset`` is the mean of the element reference over the atoms, ``(n,)``.
    """
    if not card.classes:
        return card.target_mean + offset + card.target_std * outputs[..., 0]
    shifted = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
    return np.asarray(shifted[..., -1] / shifted.sum(axis=-1))


def state_of(arrays: Mapping[str, NDArray[Any]], index: int) -> dict[str, NDArray[Any]]:
    """Return the weights of one member of a checkpoint, by name."""
    prefix = f"members.{index}."
    return {
        key.removeprefix(prefix): value
        for key, value in arrays.items()
        if key.startswith(prefix)
    }


# ------------------------------------------------------------------------- private


def _dropouts(member: nn.Module) -> list[Any]:
    from torch import nn

    return [m for m in member.modules() if isinstance(m, nn.Dropout) and m.p > 0.0]
