"""What ranks gain in a training step, and what their talking costs.

    python scripts/benchmarks/scaling.py --ranks 2 --json scaling.json

Four ways to make the same number of steps on the same global batches:

- ``one rank``: all of a batch, no MPI, while the other ranks sleep;
- ``no communication``: each rank its share of a batch, sums left out. What ranks that
  disturb each other only in caches and memory could reach: the ceiling;
- ``local moments``: gradients are summed, batch normalization stays with the rank;
- ``everything``: what a training does.

``everything`` against ``local moments`` is the cost of synchronized batch
normalization.

The time inside a sum is talking and waiting. The last rank to come waits for nobody:
the shortest time of a sum over the ranks is what talking takes, and what the others
spend beyond is waiting, for ranks whose share was more work or whose core did something
else. Both are told: talking, and the waiting of a rank in the mean.

Ways take turns, the time of a step is the median over the rounds of wall time over
steps, between barriers; talking and waiting are medians over the steps of a round, then
over the rounds. On a node whose cores do other work the numbers mean little:
the load average goes with them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

from nanoos_fw.ml.training import TrainingConfig
from nanoos_fw.parallel import (
    Communicator,
    Resources,
    StopRequest,
    launch_ranks,
    run_rank_program,
)
from nanoos_fw.provenance import package_versions

RANK_CONFIG = "scaling-ranks.json"
ALONE, SILENT, LOCAL, FULL = WAYS = (
    "one rank",
    "no communication",
    "local moments",
    "everything",
)


class Timed(Communicator):
    """A communicator that knows how long its sums took, or leaves them out."""

    def __init__(self, comm: Communicator, *, silent: bool) -> None:
        super().__init__(comm.mpi)
        self.silent = silent
        self.clear()

    def clear(self) -> None:
        """Forget the sums so far."""
        # Of each sum, or of each half where one was begun and waited for.
        self.seconds: list[float] = []
        self.calls, self.bytes = 0, 0

    def sum_in_place(self, array: NDArray[Any]) -> None:
        """Sum over the ranks, and count."""
        if self.silent:
            return
        self._count(array)
        self._timed(lambda: super(Timed, self).sum_in_place(array))

    def start_sum_in_place(self, array: NDArray[Any]) -> Callable[[], object]:
        """Begin to sum over the ranks, and count."""
        if self.silent:
            return lambda: None
        self._count(array)
        finish: Callable[[], object] = self._timed(
            lambda: super(Timed, self).start_sum_in_place(array)
        )
        return lambda: self._timed(finish)

    def _count(self, array: NDArray[Any]) -> None:
        self.calls += 1
        self.bytes += array.nbytes

    def _timed(self, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        answer = call()
        self.seconds.append(time.perf_counter() - begin)
        return answer


@dataclass
class Measured:
    """What a way of stepping took: one entry per round, seconds per step."""

    step_s: list[float] = field(default_factory=list)
    talk_s: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)
    calls: float = 0.0
    bytes: float = 0.0


def program(
    config: dict[str, Any], work_dir: Path, comm: Communicator, stop: StopRequest
) -> dict[str, Any]:
    """Measure on all ranks; the body of the rank program."""
    import torch
    from train import make_data

    from nanoos_fw.ml.fitting import Fit
    from nanoos_fw.ml.model_files import Architecture, atom_features

    torch.set_num_threads(config["threads"])
    training = TrainingConfig(**config["training"])
    _, data = make_data(config["crystals"])
    architecture = Architecture(
        hidden_dim=training.hidden_dim,
        num_layers=training.num_layers,
        readout_dim=training.readout_dim,
        dense_layers=training.dense_layers,
        gaussian_max=data.table.cutoff_radius,
        gaussian_step=training.gaussian_step,
        gaussian_width=training.gaussian_step,
    )
    fits, talks = {}, {}
    for way in WAYS:
        ranks = Communicator() if way == ALONE else comm
        talks[way] = Timed(ranks, silent=way in (ALONE, SILENT))
        fits[way] = Fit(training, architecture, atom_features(), data, 0, talks[way])
    fits[LOCAL].network.use_communicator(Communicator())
    measured = {way: Measured() for way in WAYS}
    for turn in range(config["rounds"] + 1):  # the first warms up
        for way in order(turn):
            one = step_time(fits[way], talks[way], config["steps"], comm, turn, way)
            if turn:
                measured[way].step_s += one.step_s
                measured[way].talk_s += one.talk_s
                measured[way].wait_s += one.wait_s
                measured[way].calls, measured[way].bytes = one.calls, one.bytes
    return {
        "ways": {way: vars(found) for way, found in measured.items()},
        "ranks": comm.size,
        "atoms": int(data.table.graph_sizes.sum()),
        "edges": len(data.table.neighbors),
        "parameters": sum(p.numel() for p in fits[FULL].network.parameters()),
    }


def order(turn: int) -> Iterable[str]:
    """Let no way always follow the same other."""
    return WAYS if turn % 2 else reversed(WAYS)


def step_time(
    fit: Any, talk: Timed, steps: int, comm: Communicator, turn: int, way: str
) -> Measured:
    """Make some steps and return the seconds of one, those of the slowest rank."""
    batches = [rows for epoch in range(steps) for rows in fit.batches(epoch)][:steps]
    fit.network.train()
    talk.clear()
    comm.barrier()
    begin = time.perf_counter()
    if way != ALONE or comm.rank == 0:
        for number, rows in enumerate(batches):
            fit._step(rows, turn * steps + number, 1e-3)
    step_s = time.perf_counter() - begin
    wait_asleep(comm)
    gathered = comm.broadcast(comm.gather((step_s, talk.seconds)))
    slowest = max(step_s for step_s, _ in gathered)
    talked = waited = 0.0
    if talk.seconds:
        # ranks, steps, sums of a step
        sums = np.array([seconds for _, seconds in gathered])
        sums = sums.reshape(len(gathered), steps, -1)
        # Of the steps the median: where all ranks lose their cores for a moment, the
        # sum they were in tells nothing about talking.
        shortest = sums.min(axis=0).sum(axis=1)
        talked = float(np.median(shortest))
        waited = float(np.median(sums.sum(axis=2).mean(axis=0) - shortest))
    return Measured(
        [slowest / steps], [talked], [waited], talk.calls / steps, talk.bytes / steps
    )


def wait_asleep(comm: Communicator) -> None:
    """Wait for all ranks without keeping a core busy, as MPI's own barrier does."""
    request = comm.mpi.Ibarrier()
    while not request.Test():
        time.sleep(1e-3)


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return medians and what follows from them."""
    median = {
        way: statistics.median(one["step_s"]) for way, one in found["ways"].items()
    }
    full = found["ways"][FULL]
    talked, waited = (
        statistics.median(
            part / whole for part, whole in zip(full[name], full["step_s"], strict=True)
        )
        for name in ("talk_s", "wait_s")
    )
    normalization = [
        full / local - 1.0
        for full, local in zip(
            found["ways"][FULL]["step_s"], found["ways"][LOCAL]["step_s"], strict=True
        )
    ]
    return {
        "step_s": median,
        "speedup": {way: median[ALONE] / median[way] for way in WAYS},
        "efficiency": median[ALONE] / median[FULL] / found["ranks"],
        "share_of_ceiling": median[SILENT] / median[FULL],
        "talking_share": talked,
        "waiting_share": waited,
        "synchronized_moments_cost": statistics.median(normalization),
    }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--crystals", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8, help="of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--launcher")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    if arguments.ranks < 2:
        parser.error("there is nothing to compare with fewer than 2 ranks")
    training = TrainingConfig(
        target="energy_per_atom",
        batch_size=arguments.batch_size,
        num_layers=3,
        precision=arguments.precision,
    )
    config = {
        "training": training.model_dump(mode="json"),
        "crystals": arguments.crystals,
        "threads": arguments.threads,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
    }
    here = str(Path(__file__).parent)
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([here, known] if known else [here])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / RANK_CONFIG
        path.write_text(json.dumps(config))
        found = launch_ranks(
            Path(__file__).stem,
            path,
            resources=Resources(arguments.ranks, arguments.threads, arguments.launcher),
        )
    answer = {
        **summary(found),
        **found,
        **config,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "machine": platform.platform(),
        "versions": package_versions(),
    }
    print_table(answer)
    if arguments.json:
        arguments.json.write_text(json.dumps(answer, indent=1) + "\n")
    return 0


def print_table(answer: dict[str, Any]) -> None:
    """Print medians and shares."""
    print(f"{answer['crystals']} crystals, {answer['atoms']} atoms, batches of "
          f"{answer['training']['batch_size']}, {answer['ranks']} ranks, "
          f"{answer['threads']} threads each, {answer['cores']} cores")  # fmt: skip
    print(f"{'':18} {'ms/step':>9} {'speed-up':>9} {'sums/step':>10} {'kB/step':>9}")
    for way in WAYS:
        one = answer["ways"][way]
        print(f"{way:18} {1e3 * answer['step_s'][way]:9.2f} "
              f"{answer['speedup'][way]:9.2f} {one['calls']:10.0f} "
              f"{one['bytes'] / 1e3:9.1f}")  # fmt: skip
    print(f"talking: {100 * answer['talking_share']:.2f} % of a step; waiting: "
          f"{100 * answer['waiting_share']:.1f} %; synchronized moments: "
          f"{100 * answer['synchronized_moments_cost']:+.1f} %; "
          f"{100 * answer['share_of_ceiling']:.1f} % of the ceiling")  # fmt: skip
    if answer["load_average"][0] > answer["cores"]:
        print("the machine was busy: measure again when it is not")


if __name__ == "__main__":
    if len(sys.argv) == 2 and Path(sys.argv[1]).name == RANK_CONFIG:
        run_rank_program(program)
    else:
        sys.exit(main())
