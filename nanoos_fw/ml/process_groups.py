"""Sums of tensors over ranks, on whatever device they are. Imports torch.

MPI knows who the ranks are; torch.distributed (NCCL between GPUs) is told by it: rank
0 binds a port that the system chooses, then broadcasts it, so that no port is chosen
before it is bound and no host has to be guessed. Without a process group tensors on
the CPU go through MPI as they are, others by way of the host.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from nanoos_fw.errors import LaunchError
from nanoos_fw.parallel import Communicator

_TIMEOUT = timedelta(seconds=120)


class GroupCommunicator(Communicator):
    """A communicator whose ranks can also sum tensors by torch.distributed.

    Parameters
    ----------
    comm
        The ranks.
    backend
        ``nccl`` for GPUs, ``gloo`` for the CPU.
    timeout
        After which ranks that do not come are an error.

    Raises
    ------
    LaunchError
        If the ranks do not find each other in time.
    """

    def __init__(
        self, comm: Communicator, backend: str, timeout: timedelta = _TIMEOUT
    ) -> None:
        super().__init__(comm.mpi)
        self.backend = backend
        self._group = _start_group(comm, backend, timeout)

    def sum_tensor(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        self._group.allreduce(tensor).wait()

    def start_sum_tensor(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to sum a tensor over the ranks; see :func:`start_sum`."""
        work = self._group.allreduce(tensor)

        def finish() -> None:
            work.wait()

        return finish

    def close(self) -> None:
        """Leave the group; a rank that ends without this is noticed by the others."""
        shutdown = getattr(self._group, "shutdown", None)
        if shutdown is not None:
            shutdown()


def sum_tensor(tensor: Tensor, comm: Communicator) -> None:
    """Sum a contiguous tensor over the ranks, in place, wherever it is."""
    if isinstance(comm, GroupCommunicator):
        comm.sum_tensor(tensor)
    elif tensor.device.type == "cpu":
        comm.sum_in_place(tensor.numpy())
    elif comm.size > 1:
        host = tensor.cpu()
        comm.sum_in_place(host.numpy())
        tensor.copy_(host)


def start_sum(tensor: Tensor, comm: Communicator) -> Callable[[], object]:
    """Begin to sum a contiguous tensor over the ranks, in place.

    Returns
    -------
    callable
        Waits for the sum; until then nobody may touch the tensor. All ranks must
        begin and wait in the same order. Without a process group a sum of what is on
        a GPU is over before it is begun.
    """
    if isinstance(comm, GroupCommunicator):
        return comm.start_sum_tensor(tensor)
    if tensor.device.type == "cpu":
        return comm.start_sum_in_place(tensor.numpy())
    sum_tensor(tensor, comm)
    return lambda: None


def choose_device(wanted: str, comm: Communicator) -> torch.device:
    """Return this rank's device: GPUs of a node go to its ranks in turn.

    Parameters
    ----------
    wanted
        ``cpu``, ``cuda``, or ``auto``: GPUs where there are any.
    comm
        All ranks.

    Raises
    ------
    LaunchError
        If GPUs are wanted and there is none.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        if wanted == "auto":
            return torch.device("cpu")
        raise LaunchError(
            f"rank {comm.rank} on {socket.gethostname()} sees no GPU",
            advice="ask SLURM for GPUs, or set device to auto or cpu",
        )
    device = torch.device("cuda", _local_rank(comm) % count)
    torch.cuda.set_device(device)
    return device


def choose_backend(device: torch.device, comm: Communicator) -> str | None:
    """Return ``nccl`` where no two ranks share a GPU, else None.

    Parameters
    ----------
    device
        Of this rank, by :func:`choose_device`.
    comm
        Ranks that are to sum; all of them must call.
    """
    if comm.size == 1 or device.type != "cuda":
        return None
    # NCCL refuses a GPU that is named twice, also where a team has few ranks of a node.
    places = comm.mpi.allgather((socket.gethostname(), device.index))
    shared = len(set(places)) < len(places)
    missing = comm.any(shared or not torch.distributed.is_nccl_available())
    return None if missing else "nccl"


# ------------------------------------------------------------------------- private


def _start_group(comm: Communicator, backend: str, timeout: timedelta) -> Any:
    from torch import distributed

    new_store: Any = distributed.TCPStore  # type: ignore[attr-defined]
    try:
        address = None
        if comm.rank == 0:
            store = new_store(
                socket.gethostname(),
                0,  # the system's choice
                world_size=comm.size,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
            )
            address = (store.host, store.port)
        host, port = comm.broadcast(address)
        if comm.rank > 0:
            store = new_store(
                host, port, world_size=comm.size, is_master=False, timeout=timeout
            )
        if backend == "gloo":
            return distributed.ProcessGroupGloo(store, comm.rank, comm.size, timeout)
        if backend == "nccl":
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return distributed.ProcessGroupNCCL(store, comm.rank, comm.size, options)
    except RuntimeError as error:
        raise LaunchError(
            f"rank {comm.rank} of {comm.size} found no {backend} group: {error}",
            advice="look whether nodes may talk to each other on any port",
        ) from error
    raise LaunchError(f"there is no backend {backend!r}")


def _local_rank(comm: Communicator) -> int:
    if comm.size == 1:
        return 0
    from mpi4py import MPI

    return int(comm.mpi.Split_type(MPI.COMM_TYPE_SHARED).Get_rank())
