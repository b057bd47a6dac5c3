"""Who does what: teams of ranks fit the members of an ensemble at the same time.

The ranks of a team share the graphs of each batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import OutOfTimeError
from nanoos_fw.ml.checkpoints import Checkpoints
from nanoos_fw.parallel import Communicator, StopRequest, report_progress

if TYPE_CHECKING:
    from nanoos_fw.ml.fitting import Fit
    from nanoos_fw.ml.training import TrainingConfig


@dataclass(frozen=True)
class FitContext:
    """Where and by whom a training is done.

    Parameters
    ----------
    work_dir
        Holds checkpoints and progress.
    key
        Of configuration and dataset: whose checkpoints count.
    comm
        All ranks.
    stop
        When to stop.
    pause_after
        Epochs after which a member pauses, short of those of the configuration; None
        goes on to the end.
    group
        Makes the ranks of a team able to sum tensors on their devices.
    """

    work_dir: Path
    key: str
    comm: Communicator
    stop: StopRequest
    pause_after: int | None = None
    group: Callable[[Communicator], Communicator] = lambda team: team


def fit_members(
    training: TrainingConfig,
    new_fit: Callable[[int, Communicator], Fit],
    place: FitContext,
) -> list[Fit]:
    """Fit all members of an ensemble on all ranks.

    Parameters
    ----------
    training
        Size of the ensemble, epochs, checkpoints.
    new_fit
        Makes the fit of a member on the ranks of a team.
    place
        Directory, ranks and clock.

    Returns
    -------
    list of Fit
        With their best weights in place on rank 0, empty on the others.

    Raises
    ------
    OutOfTimeError
        On all ranks, if a team stopped; its checkpoint is on disk.
    """
    comm = place.comm
    team, first, step = _team(comm, training.ensemble_size)
    mine = range(first, training.ensemble_size, step)
    fitted: dict[int, Fit] = {}
    stopped: OutOfTimeError | None = None
    grouped = place.group(team)
    checkpoints = Checkpoints(
        place.work_dir, place.key, team, training.keep_checkpoints
    )
    for turn, member in enumerate(mine):
        fit = new_fit(member, grouped)
        checkpoints.load(fit)

        def tell(epochs: int, text: str, turn: int = turn) -> None:
            # Of this team's members; the others are about as far.
            if comm.rank == 0:
                done = turn * training.epochs + epochs
                report_progress(place.work_dir, done, len(mine) * training.epochs, text)

        try:
            _fit_one(fit, checkpoints, place, tell)
        except OutOfTimeError as error:
            stopped = error
            break
        fitted[member] = fit
    if comm.any(stopped is not None):
        raise stopped or OutOfTimeError(
            "training stopped on other ranks",
            advice="rerun to resume from the checkpoint",
        )
    mine_only = fitted if team.rank == 0 else {}
    return _collect(mine_only, lambda member: new_fit(member, Communicator()), comm)


def share(sizes: NDArray[np.int64], comm: Communicator) -> NDArray[np.int64]:
    """Return this rank's places in a batch, work spread as evenly as greed allows.

    The largest graphs are dealt first, each to the rank with the least work so far;
    ranks may come out empty.

    Parameters
    ----------
    sizes
        ``(n,)``, work of each graph of the batch.
    comm
        The ranks.
    """
    if comm.size == 1:
        return np.arange(len(sizes))
    loads = [(0, rank) for rank in range(comm.size)]
    mine = []
    for place in np.argsort(-sizes, kind="stable").tolist():
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + int(sizes[place]), rank))
        if rank == comm.rank:
            mine.append(place)
    return np.array(mine, dtype=np.int64)


# ------------------------------------------------------------------------- private


def _team(comm: Communicator, n_members: int) -> tuple[Communicator, int, int]:
    """Divide the ranks into teams that fit different members at the same time.

    Members need no messages between them, so there are as many teams as divide the
    ranks evenly and have a member to fit. The ranks of a team share each batch.

    Returns
    -------
    team, first, step
        This rank's communicator, and the members it fits: first, first + step ...
    """
    teams = max(n for n in range(1, n_members + 1) if comm.size % n == 0)
    if teams == 1:
        return comm, 0, 1
    index = comm.rank % teams
    return Communicator(comm.mpi.Split(index, comm.rank)), index, teams


def _fit_one(
    fit: Fit,
    checkpoints: Checkpoints,
    place: FitContext,
    tell: Callable[[int, str], None],
) -> None:
    """Run the epochs of one member that are left, or those up to the pause."""
    config, history, stop = fit.config, fit.history, place.stop
    limit = place.pause_after or config.epochs

    def interrupted() -> bool:
        return fit.comm.any(stop.requested)

    def after_step() -> None:
        checkpoints.save_if_due(fit, config.checkpoint_minutes)

    while not fit.done and history.epochs < limit:
        if not fit.run_epoch(interrupted, after_step):
            checkpoints.save(fit)
            raise OutOfTimeError(
                f"training stopped ({stop.reason}) in epoch {history.epochs + 1} of "
                f"member {fit.member + 1}, after step {fit.position.step}",
                evidence={
                    "member": fit.member,
                    "epochs": history.epochs,
                    "step": fit.position.step,
                },
                advice="rerun to resume from the checkpoint",
            )
        due = history.epochs % config.checkpoint_every == 0
        if fit.done or history.epochs == limit or due:
            checkpoints.save(fit)
        else:
            after_step()
        text = f"member {fit.member + 1}, epoch {history.epochs}"
        if history.val_mae:
            text += f", validation MAE {history.val_mae[-1]:.4g}"
        tell(history.epochs, text)


def _collect(
    fitted: Mapping[int, Fit], empty: Callable[[int], Fit], comm: Communicator
) -> list[Fit]:
    """Bring the members of all teams to rank 0, with their best weights in place."""
    states = comm.gather(
        [(member, fit.state(), fit.record()) for member, fit in fitted.items()]
    )
    if states is None:
        return []
    fits = []
    for member, state, record in sorted(
        (entry for team in states for entry in team), key=lambda entry: entry[0]
    ):
        fit = fitted[member] if member in fitted else empty(member)
        fit.restore(state)
        fit.restore_record(record)
        fit.use_best()
        fits.append(fit)
    return fits
