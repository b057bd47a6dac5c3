"""Peak memory of the work of fireworks, by size, beside what the queue is asked for.

    python scripts/benchmarks/memory.py --json memory.json

Each case runs in a process of its own. Its memory and that of all its children (ranks,
servers) is read fifty times a second from ``/proc/PID/smaps_rollup``: proportional set
sizes, so that libraries which several processes share count once, as the kernel counts
them for a job. ``operations.memory`` has its constants from here. The first case
compiles, as the first firework on a new machine does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Lattice, Structure

from nanoos_fw.faults import how_it_ended
from nanoos_fw.parallel import Resources

_EVERY_S = 0.02


def tree(pid: int) -> Iterator[int]:
    """Yield a process and all that it has started."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from tree(int(child))


def memory_mib(pid: int) -> tuple[float, int]:
    """Return the memory of a process and its children, and their number."""
    total, number = 0.0, 0
    try:
        pids = list(tree(pid))
    except OSError:
        return 0.0, 0
    for process in pids:
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:  # it has ended meanwhile
            continue
        for line in text.splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) / 1024
                number += 1
    return total, number


def peak(work: Callable[..., None], *options: Any) -> dict[str, Any]:
    process = multiprocessing.get_context("spawn").Process(target=work, args=options)
    began = time.perf_counter()
    process.start()
    assert process.pid is not None
    highest, most = 0.0, 0
    while process.is_alive():
        now, number = memory_mib(process.pid)
        highest, most = max(highest, now), max(most, number)
        time.sleep(_EVERY_S)
    process.join()
    wall = time.perf_counter() - began
    row = {"peak_mib": round(highest), "processes": most, "wall_s": round(wall, 1)}
    code = process.exitcode
    # Killed at its peak, it is the measurement that somebody looks for.
    return row if code == 0 else {**row, "failed": how_it_ended(code or 0)}


# -------------------------------------------------------------------------------- work


def copper(atoms: int) -> Structure:
    cell = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.61), ["Cu"], [[0] * 3])
    repeat = round((atoms / 4) ** (1 / 3))
    return cell * [repeat, repeat, repeat]


def simulate(atoms: int, ranks: int, potential: str | None) -> None:
    import fireworks  # noqa: F401 - what a firework has loaded
    import pymongo  # noqa: F401

    from nanoos_fw.md.engine import LAMMPSEngine

    parameters: dict[str, Any] = {
        "num_steps": 20, "equilibration_steps": 5, "thermo_every": 10,
        "supercell_min_atoms": 1,
    }  # fmt: skip
    if potential is not None:
        parameters["potential"] = potential
    engine = LAMMPSEngine()
    with tempfile.TemporaryDirectory() as folder:
        inputs = engine.prepare_input(copper(atoms), parameters, Path(folder))
        engine.execute(inputs, Path(folder) / "run", resources=Resources(ranks))


def train(sites: int, batch: int, ranks: int, hidden: int) -> None:
    import fireworks  # noqa: F401
    import pymongo  # noqa: F401

    from nanoos_fw.ml.datasets import (
        DatasetConfig,
        build_regression_dataset,
        write_dataset,
    )
    from nanoos_fw.ml.graphs import build_graph
    from nanoos_fw.ml.training import train_cgcnn_model

    rng = np.random.default_rng(0)
    number = max(2 * batch, 64)
    graphs, targets = {}, {}
    cell = Structure(Lattice.cubic(3.0), ["Fe"], [[0, 0, 0]]) * [sites, 1, 1]
    for row in range(number):
        moved = cell.copy().perturb(0.05, seed=row)
        graphs[f"s{row}"] = build_graph(moved)
        targets[f"s{row}"] = float(rng.normal())
    config = DatasetConfig(
        target_property="energy",
        train_fraction=0.6,
        val_fraction=0.2,
        test_fraction=0.2,
    )
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_dataset(build_regression_dataset(graphs, targets, config), data)
        del graphs
        train_cgcnn_model(
            "energy",
            {
                "target": "energy", "epochs": 2, "batch_size": batch,
                "ensemble_size": 1, "forest_baseline": False, "hidden_dim": hidden,
            },
            dataset_dir=data,
            work_dir=Path(folder) / "work",
            resources=Resources(ranks),
        )  # fmt: skip


def featurize(sites: int) -> None:
    import fireworks  # noqa: F401
    import pymongo  # noqa: F401

    from nanoos_fw.ml.graphs import build_graph

    build_graph(copper(sites))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = [
        *(("featurize, sites", featurize, (n,)) for n in (4, 4_000, 32_000)),
        *(("EAM, atoms, ranks", simulate, (n, r, None))
          for n, r in ((500, 1), (4_000, 1), (32_000, 1), (32_000, 2), (108_000, 1),
                       (256_000, 1))),
        *(("training, sites, batch, ranks, channels", train, case)
          for case in ((8, 64, 1, 64), (30, 256, 1, 64), (30, 256, 2, 64))),
    ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for what, work, options in cases:
        print(f"{what}: {options}", flush=True)
        row = {"what": what, "size": options, **peak(work, *options)}
        print(json.dumps(row), flush=True)
        rows.append(row)
        result = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "processor": platform.processor() or platform.machine(),
            "load": os.getloadavg(),
            "cases": rows,
        }
        if arguments.json:  # after each: a machine that dies keeps what there is
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if failed := [row for row in rows if "failed" in row]:
        raise SystemExit(f"{len(failed)} of {len(rows)} cases failed: {failed}")


if __name__ == "__main__":
    main()
