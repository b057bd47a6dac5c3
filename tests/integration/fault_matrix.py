"""The fault matrix: what becomes of results when a job dies at the worst moment.

    eval "$(scripts/local-slurm start)"
    export NANO_OS_TEST_MONGODB_URI=mongodb://127.0.0.1:27017
    python tests/integration/fault_matrix.py --dir /tmp/matrix

As root, on the cluster of ``scripts/local-slurm``, which no one else uses meanwhile.
Each cell takes about half a minute; what has passed is kept in ``--dir`` and not run
again, so that the program may be stopped and started. The exit code is 1 if a cell that
ran has failed.

``scancel``
    of the job.
``node``, ``slurmd``
    The node dies: SLURM's daemons with all processes of the job, or the daemons alone,
    so that the job lives on unseen while its firework is run again.
``oom``
    The kernel kills the largest process of the job for the job's memory.
``rlaunch``, ``slot``, ``worker``
    SIGKILL of the process that runs the firework, under ``qlaunch`` or in a packed
    worker, or of the packed worker.
``rank``
    SIGKILL of an MPI rank, or of the child that featurizes; again if it comes back.
``database-before``, ``-during``, ``-after``
    All connections break, and no new one is taken for ``--outage`` seconds, before the
    results are committed, after they are but before that is known, and right after.
``disk``
    The file system of work and launch directories is full.

Stages with ranks are hit while these compute, the others while they commit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fault_cells import FAULTS, STAGES, Cell, applies, to_dict
from undisturbed import make_reference

from nanoos_fw.provenance import write_atomic


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the matrix: results found of those expected, double ones, launches."""
    by_cell = {(r["fault"], r["stage"]): r for r in results}
    width = 24
    lines = ["found/expected, double, launches, moment"]
    lines.append(f"{'':16}" + "".join(f"{stage:{width}}" for stage in STAGES))
    for fault in FAULTS:
        cells = [_cell(by_cell.get((fault, s)), applies(fault, s)) for s in STAGES]
        lines.append(f"{fault:16}" + "".join(f"{cell:{width}}" for cell in cells))
    ran = [r for r in results if r["passed"]]
    total = sum(applies(fault, stage) for fault in FAULTS for stage in STAGES)
    lines.append(f"{len(ran)} passed, {len(results) - len(ran)} failed, of {total}")
    for result in results:
        if not result["passed"]:
            lines.append(f"\n{result['fault']} in {result['stage']}:")
            lines += [f"  {text}" for text in result["problems"][:2]]
    return "\n".join(line.rstrip() for line in lines)


def _cell(result: dict[str, Any] | None, applies: bool) -> str:
    if result is None:
        return "not run" if applies else "-"
    found = f"{result['found']}/{result['expected']}"
    word = "ok" if result["passed"] else "FAIL"
    counts = f"{found} {result['double']} {result['launches']}"
    return f"{word} {counts} {result['moment']}"


def main() -> int:
    """Run the cells asked for, and print the matrix of all that have run."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", type=Path, required=True, help="of all its files")
    parser.add_argument("--faults", help=f"of {','.join(FAULTS)} (default: all)")
    parser.add_argument("--stages", help=f"of {','.join(STAGES)} (default: all)")
    parser.add_argument("--moment", help="start, work, before, during or after")
    parser.add_argument("--outage", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    arguments = parser.parse_args()
    faults = _chosen(parser, arguments.faults, FAULTS)
    stages = _chosen(parser, arguments.stages, STAGES)
    folder = arguments.dir.resolve()
    kept = folder / "cells"
    kept.mkdir(parents=True, exist_ok=True)
    home = tempfile.mkdtemp(prefix="home-", dir=folder)  # no settings of the user's
    os.environ["HOME"] = home
    uri = os.environ["NANO_OS_TEST_MONGODB_URI"]
    reference = make_reference(uri, folder / "reference")
    failed = 0
    for fault, stage in [(f, s) for f in faults for s in stages if applies(f, s)]:
        path = kept / f"{fault}_{stage}.json"
        passed = path.exists() and json.loads(path.read_text())["passed"]
        if passed and not arguments.again:
            continue
        cell = Cell(
            reference,
            folder / f"{fault}_{stage}",
            fault,
            stage,
            outage_s=arguments.outage,
            moment=arguments.moment,
        )
        result = cell.run()
        failed += not result.passed
        write_atomic(path, json.dumps(to_dict(result), indent=1))
        _say(f"{'passed' if result.passed else 'FAILED'} {fault} in {stage}, "
             f"{result.moment}, {result.wall_s:.0f} s")  # fmt: skip
        for text in (*result.said, *result.problems):
            _say(f"    {text}")
    results = [
        json.loads(path.read_text())
        for f in FAULTS
        for s in STAGES
        if (path := kept / f"{f}_{s}.json").exists()
    ]
    _say(table(results))
    if arguments.json is not None:
        write_atomic(arguments.json, json.dumps(results, indent=1))
    return 1 if failed else 0


def _chosen(
    parser: argparse.ArgumentParser, text: str | None, known: tuple[str, ...]
) -> list[str]:
    chosen = text.split(",") if text else list(known)
    if unknown := set(chosen) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; of {', '.join(known)}")
    return chosen


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
