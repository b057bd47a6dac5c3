"""Relaxations per second: one child for many structures, beside one per structure.

The candidates of the demonstration, taken evenly from all of them. Prints a table and
writes JSON with the machine and the versions:

    python scripts/benchmarks/relax.py --structures 200 --repeats 3 -o relax.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from nanoos_fw.md.potentials import ZHOU2004_ELEMENTS, zhou2004_potential
from nanoos_fw.md.relaxation import relax_structures
from nanoos_fw.operations.alloys import alloy_candidates
from nanoos_fw.parallel import Resources
from nanoos_fw.provenance import package_versions, utc_now


def relax(structures: dict[str, Any], potential: Any, ranks: int) -> float:
    """Return the wall time of relaxing in a fresh folder; all must converge."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        results = relax_structures(
            structures, potential, Path(folder), resources=Resources(ranks=ranks)
        )
        seconds = time.perf_counter() - started
    failed = [name for name, result in results.items() if not result.converged]
    if failed:
        raise SystemExit(f"not converged: {failed}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--structures", type=int, default=200)
    parser.add_argument("--alone", type=int, default=10, help="with a child for each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()

    every = list(alloy_candidates(ZHOU2004_ELEMENTS))
    step = max(1, len(every) // arguments.structures)
    chosen = {e.label: e.structure for e in every[::step][: arguments.structures]}
    alone = dict(list(chosen.items())[:: max(1, len(chosen) // arguments.alone)])
    rows: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        potential = zhou2004_potential(ZHOU2004_ELEMENTS, Path(folder))
        for ranks in (1, 2):
            seconds = [
                relax(chosen, potential, ranks) for _ in range(arguments.repeats)
            ]
            rows[f"one child, {ranks} rank(s)"] = len(chosen) / statistics.median(
                seconds
            )
        seconds = [
            sum(relax({k: v}, potential, 1) for k, v in alone.items())
            for _ in range(arguments.repeats)
        ]
        rows["a child for each structure"] = len(alone) / statistics.median(seconds)
    base = rows["a child for each structure"]
    print(f"{'':28} structures/s   ratio")
    for name, rate in rows.items():
        print(f"{name:28} {rate:12.1f} {rate / base:7.1f}")
    if arguments.output is not None:
        report = {
            "time": utc_now(),
            "machine": platform.platform(),
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg(),
            "versions": package_versions(),
            "structures": len(chosen),
            "repeats": arguments.repeats,
            "structures_per_second": rows,
        }
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
