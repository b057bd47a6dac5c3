"""Relaxation of many small structures at once; also a rank program.

Each rank holds one LAMMPS instance of its own and works on its share of the
structures; nothing is exchanged. Cell and positions are relaxed together by a
limited-memory BFGS method whose every step is a fresh evaluation, so a result depends
on neither the number of ranks nor the order of the structures.

Each result is one line of JSON, on disk before the next structure starts: a killed
run keeps what it has, and the next one does the rest.

A rank that crashes inside LAMMPS takes the others with it. Each structure that was
being computed is then computed alone, and one that crashes its rank alone has failed. A
rank that was killed from outside (by the OOM killer, with its node) is an error of the
machine and no result of any structure.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanoos_fw.errors import (
    InputError,
    LaunchError,
    NanoOSError,
    OutOfTimeError,
    SimulationError,
)
from nanoos_fw.faults import crashed, how_it_ended, is_environment
from nanoos_fw.md.calculator import LammpsCalculator
from nanoos_fw.md.cells import site_charges, site_elements
from nanoos_fw.md.optimizer import (
    RelaxationResult,
    RelaxationSettings,
    failed_result,
    relax_one,
)
from nanoos_fw.md.potential_checks import check_charges
from nanoos_fw.md.potentials import Potential
from nanoos_fw.parallel import (
    STOP,
    Communicator,
    Resources,
    StopRequest,
    launch_ranks,
    report_progress,
    run_rank_program,
)
from nanoos_fw.provenance import content_key, read_json, write_json

if TYPE_CHECKING:
    from pymatgen.core import Structure

__all__ = [
    "RelaxationResult",
    "RelaxationSettings",
    "deal",
    "main",
    "relax_one",
    "relax_structures",
]

logger = logging.getLogger(__name__)

CONFIG, STRUCTURES = "relaxation.json", "structures.json"
_PROGRESS_EVERY = 10


# --------------------------------------------------------------------------- parent


def relax_structures(
    structures: Mapping[str, Structure],
    potential: Potential,
    work_dir: Path,
    *,
    settings: RelaxationSettings | None = None,
    resources: Resources | None = None,
    deadline: float | None = None,
) -> dict[str, RelaxationResult]:
    """Relax many structures in a child program and return what became of each.

    Results found in the work directory are taken over if structure, potential and
    settings are the same, so a second call does only the rest.

    Parameters
    ----------
    structures
        Ordered structures under names of the caller's choice.
    potential
        Potential that knows their elements.
    work_dir
        Folder of this piece of work; holds the results as they come.
    settings
        Tolerances; None takes the defaults.
    resources
        Ranks and launcher; None takes one rank.
    deadline
        Unix time by which to stop.

    Returns
    -------
    dict of str to RelaxationResult
        One for every name, failures included.

    Raises
    ------
    OutOfTimeError
        If the deadline came first; the finished ones are on disk.
    LaunchError
        If the ranks were killed from outside, or died for another reason that is none
        of a structure; the finished ones are on disk.
    NanoOSError
        If the program as a whole failed: no LAMMPS, no launcher, a bad potential, no
        memory, a full disk.
    """
    settings = settings or RelaxationSettings()
    resources = resources or Resources()
    work_dir.mkdir(parents=True, exist_ok=True)
    tasks: dict[str, dict[str, Any]] = {}
    results: dict[str, RelaxationResult] = {}
    for name, structure in structures.items():
        try:
            tasks[name] = _task(structure, potential, settings)
        except NanoOSError as error:
            results[name] = failed_result([], error)
    suspects: set[str] = set()  # by their key
    crashed_alone: dict[str, SimulationError] = {}
    while True:
        done = _read_results(work_dir)
        todo = []
        for name, task in tasks.items():
            if task["key"] in done:
                results[name] = done[task["key"]]
            elif task["key"] in crashed_alone:
                why = crashed_alone[task["key"]]
                results[name] = failed_result(task["species"], why)
            else:
                todo.append(task)
        if not todo:
            return {name: results[name] for name in structures}
        alone = [task for task in todo if task["key"] in suspects][:1]
        todo = alone or todo
        _clear_starts(work_dir)
        write_json(work_dir / STRUCTURES, todo)
        # The ranks read a copy in the work directory, with no more than they need.
        elements = sorted({symbol for task in todo for symbol in task["species"]})
        copy = potential.restricted_to(elements, work_dir)
        copy.install(work_dir)
        config = {
            "potential": copy.relocated(work_dir).model_dump(mode="json"),
            "settings": settings.model_dump(mode="json"),
            "deadline": deadline,
        }
        write_json(work_dir / CONFIG, config)
        # No more ranks than structures: an idle rank costs a start of LAMMPS.
        ranks = min(resources.ranks, len(todo))
        try:
            launch_ranks(
                "nanoos_fw.md.relaxation",
                work_dir / CONFIG,
                resources=Resources(ranks, resources.threads, resources.launcher),
                deadline=deadline,
            )
        except LaunchError as error:
            guilty = _suspects(work_dir, error, deadline)
            if not guilty:
                raise
            if alone:
                crashed_alone[alone[0]["key"]] = _crash(error)
            else:
                logger.warning("a rank crashed; it was at one of %d", len(guilty))
                suspects |= guilty


def _suspects(work_dir: Path, error: LaunchError, deadline: float | None) -> set[str]:
    """Return the structures one of which crashed its rank; none if no crash did it."""
    if is_environment(error) or not crashed(error.evidence.get("exit_code")):
        return set()
    late = deadline is not None and time.time() >= deadline
    if late or (work_dir / STOP).exists():
        return set()  # it ended badly when it was asked to stop
    return _started(work_dir) - set(_read_results(work_dir))


def _crash(error: LaunchError) -> SimulationError:
    how = how_it_ended(error.evidence["exit_code"])
    return SimulationError(
        f"LAMMPS {how} on this structure, when it was computed alone too",
        evidence={"class": "crash", "exit_code": error.evidence["exit_code"]},
    )


def _task(
    structure: Structure, potential: Potential, settings: RelaxationSettings
) -> dict[str, Any]:
    species = site_elements(structure)
    potential.check_elements(species)
    check_charges(structure, potential)
    body: dict[str, Any] = {
        "species": species,
        "lattice": structure.lattice.matrix.tolist(),
        "frac_coords": structure.frac_coords.tolist(),
    }
    if potential.charges != "none" and (found := site_charges(structure)) is not None:
        body["charges"] = found.tolist()
    if not np.isfinite(structure.cart_coords).all():
        raise InputError(
            "lattice or coordinates are not finite", evidence={"class": "not_a_number"}
        )
    body["key"] = content_key(
        "relaxation",
        {**body, "potential": potential.identity, "settings": settings.model_dump()},
    )
    return body


def _read_results(work_dir: Path) -> dict[str, RelaxationResult]:
    results = {}
    for path in sorted(work_dir.glob("results.*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                results[row["key"]] = RelaxationResult.from_dict(row["result"])
            except (ValueError, KeyError, TypeError):
                # The last line of a killed rank may be cut: it is computed again.
                logger.warning("%s: a line is cut short", path)
    return results


def _started(work_dir: Path) -> set[str]:
    return {p.read_text(encoding="utf-8") for p in work_dir.glob("started.*")}


def _clear_starts(work_dir: Path) -> None:
    for path in work_dir.glob("started.*"):
        path.unlink()


# ---------------------------------------------------------------------------- ranks


def main(
    config: dict[str, Any], work_dir: Path, comm: Communicator, stop: StopRequest
) -> dict[str, Any]:
    """Rank program: relax this rank's share of ``structures.json``."""
    potential = Potential.model_validate(config["potential"])
    settings = RelaxationSettings.model_validate(config["settings"])
    tasks = read_json(work_dir / STRUCTURES)
    share = deal([(_cost(task), task["key"]) for task in tasks], comm.size)[comm.rank]
    wanted = set(share)
    # One chemical system after the other: the pair style is kept in between.
    mine = sorted(
        (task for task in tasks if task["key"] in wanted),
        key=lambda task: (sorted(set(task["species"])), task["key"]),
    )
    finished = 0
    started = work_dir / f"started.{comm.rank}"
    path = work_dir / f"results.{comm.rank}.jsonl"
    with (
        LammpsCalculator(potential, work_dir) as calculator,
        path.open("ab") as file,
    ):
        _end_cut_line(path, file)
        for task in mine:
            started.write_text(task["key"], encoding="utf-8")
            result = relax_one(calculator, task, settings, stop)
            if result is None:
                break
            row = {"key": task["key"], "result": result.to_dict()}
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            finished += 1
            if comm.rank == 0 and finished % _PROGRESS_EVERY == 0:
                report_progress(
                    work_dir,
                    min(finished * comm.size, len(tasks)),
                    len(tasks),
                    "relaxed structures",
                )
    started.unlink(missing_ok=True)
    counts = comm.gather(finished)
    if comm.any(finished < len(mine)):
        raise OutOfTimeError(
            f"stopped by {stop.reason} before all {len(tasks)} structures were done",
            evidence={"finished": sum(counts) if counts else finished},
            advice="run again: the finished ones are kept",
        )
    return {"finished": sum(counts or [])}


def _cost(task: Mapping[str, Any]) -> int:
    return len(task["species"])


def deal(costs: Sequence[tuple[int, str]], size: int) -> list[list[str]]:
    """Share keys between ranks so that the sums of their costs are nearly equal.

    Parameters
    ----------
    costs
        Cost and key of each structure.
    size
        Number of ranks.

    Returns
    -------
    list of list of str
        Keys of each rank; the largest first, each to the rank with the least work.
    """
    shares: list[list[str]] = [[] for _ in range(size)]
    load = [0] * size
    for cost, key in sorted(costs, key=lambda pair: (-pair[0], pair[1])):
        rank = load.index(min(load))
        shares[rank].append(key)
        load[rank] += cost
    return shares


def _end_cut_line(path: Path, file: Any) -> None:
    """Start on a new line after a cut one, which would swallow the next result."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        file.write(b"\n")


if __name__ == "__main__":
    run_rank_program(main)
