"""A simulation through a LAMMPS executable; a rank program of one rank.

It starts the executable (``NANO_OS_LAMMPS_COMMAND``), with a launcher for several
ranks, on a script made of the same commands as ``in.lammps``, watches it, and ends it
when asked to. The executable stops by its own clock with a restart file; asked sooner
it is ended, and the next launch goes on from the last restart file.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import (
    InputError,
    LaunchError,
    MissingDependencyError,
    OutOfTimeError,
    SimulationError,
)
from nanoos_fw.md.box import LammpsBox, voigt_to_tensor
from nanoos_fw.md.failures import simulation_error
from nanoos_fw.md.inputs import WRITE_FINAL, MDConfig, Origin, render_parts
from nanoos_fw.md.output import FINAL
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.restarts import STOP_RESTART, newest_origin
from nanoos_fw.md.trajectory import read_thermo, segment_files
from nanoos_fw.md.unit_systems import UnitSystem, unit_system
from nanoos_fw.parallel import (
    RESUMABLE_EXIT,
    Communicator,
    Resources,
    StopRequest,
    launch_command,
    report_progress,
    run_rank_program,
)
from nanoos_fw.provenance import write_json

Array = NDArray[np.float64]

_SCRIPT, _SCREEN, _FINAL_DATA, _FINAL_DUMP, _FORCES_DUMP = (
    "segment.in",
    "screen.log",
    "final.data",
    "final.dump",
    "forces.dump",
)
_POLL_S = 0.05
_PROGRESS_S = 1.0
_END_S = 5.0
_TAIL = 4000
_CLOCK = "Stopping criterion = walltime limit reached"
_STRESS = ("pxx_bar", "pyy_bar", "pzz_bar", "pxy_bar", "pxz_bar", "pyz_bar")


def main(
    config: dict[str, Any], work_dir: Path, comm: Communicator, stop: StopRequest
) -> dict[str, Any]:
    """Rank program: run the simulation of ``md.json`` with the executable."""
    simulation = config["simulation"]
    md = MDConfig.model_validate(simulation["config"])
    potential = Potential.model_validate(simulation["potential"])
    origin = Origin(**config["origin"])
    ranks = int(config["ranks"])
    threads = int(config["threads"])
    script = segment_script(simulation, md, potential, origin, stop.deadline, threads)
    (work_dir / _SCRIPT).write_text(script, encoding="utf-8")
    log = work_dir / f"log.{origin.step:012d}.lammps"
    command = [
        *_words(config["command"], ranks, config["launcher"]),
        *("-in", _SCRIPT, "-log", log.name, "-nocite"),
    ]
    (work_dir / FINAL).unlink(missing_ok=True)
    code = _run(command, work_dir, comm, stop, md, log)
    screen = (work_dir / _SCREEN).read_text(encoding="utf-8", errors="replace")
    step = _last_step(log, origin)
    if code == 0 and not md.is_dynamics and _ended_by_clock(log):
        code = RESUMABLE_EXIT  # a minimization ends there as if it were done
    if code is None or code == RESUMABLE_EXIT:
        raise OutOfTimeError(
            f"stopped by {stop.reason} at step {step} of {md.total_steps}",
            evidence={
                "step": newest_origin(work_dir, md).step,
                "total_steps": md.total_steps,
            },
            advice="execute it again: it continues from the last restart file",
        )
    if code != 0:
        _raise(screen, code, step, command)
    final = read_final(work_dir, unit_system(potential.units), log)
    if len(final["positions"]) != len(simulation["species"]):
        raise SimulationError(
            f"LAMMPS wrote {len(final['positions'])} of "
            f"{len(simulation['species'])} atoms",
            evidence={"class": "lost_atoms"},
        )
    write_json(work_dir / FINAL, final)
    version = re.search(r"LAMMPS \(([^)]+)\)", screen)
    return {
        "steps": final["step"],
        "n_atoms": len(simulation["species"]),
        "segments": len(segment_files(work_dir, "log.*.lammps")),
        "lammps_version": version.group(1) if version else "unknown",
        "ranks": ranks,
        "threads": threads,
        "command": config["command"],
    }


def segment_script(
    simulation: dict[str, Any],
    config: MDConfig,
    potential: Potential,
    origin: Origin,
    deadline: float | None,
    threads: int = 1,
) -> str:
    """Return the script of one segment: what is left to run, and the final state."""
    box = LammpsBox.from_lattice(np.array(simulation["lattice"]))
    # Commands of LAMMPS in quotes, for when its clock has ended a run too early.
    leave = f'"write_restart {STOP_RESTART}" "quit {RESUMABLE_EXIT}"'
    parts = render_parts(
        config,
        potential,
        simulation["elements"],
        box,
        origin=origin,
        on_stop=leave,
        threads=threads,
    )
    timer = ""
    if deadline is not None:
        # Not before the deadline: what ended early would count as done.
        left = max(1, math.ceil(deadline - time.time()))
        timer = f"timer timeout {left} every 10\n"
    # The state as rows sorted by atom, with all digits. Forces before the data file:
    # it sends atoms to the ranks where they are now, without their forces.
    end = "modify sort id format float %.17g\n"
    forces = f"write_dump all custom {_FORCES_DUMP} id fx fy fz {end}"
    final = f"write_dump all custom {_FINAL_DUMP} id x y z vx vy vz {end}"
    script = parts.script_after(origin.step, config, timer=timer)
    return script.removesuffix(WRITE_FINAL) + forces + WRITE_FINAL + final


def read_final(work_dir: Path, units: UnitSystem, log: Path) -> dict[str, Any]:
    """Return the final state that the executable wrote, in the units used here."""
    step, bounds, rows = _read_dump(work_dir / _FINAL_DUMP)
    forces = _read_dump(work_dir / _FORCES_DUMP)[2]
    xy, xz, yz = bounds[:, 2] if bounds.shape[1] == 3 else (0.0, 0.0, 0.0)
    # A dump has the bounding box of a triclinic cell.
    low = bounds[:, 0] - (min(0.0, xy, xz, xy + xz), min(0.0, yz), 0.0)
    high = bounds[:, 1] - (max(0.0, xy, xz, xy + xz), max(0.0, yz), 0.0)
    lx, ly, lz = high - low
    matrix = np.array([[lx, 0.0, 0.0], [xy, ly, 0.0], [xz, yz, lz]])
    if not (np.isfinite(rows).all() and np.isfinite(forces).all()):
        raise SimulationError(
            "the final state is not finite", evidence={"class": "not_a_number"}
        )
    table = read_thermo(log)
    pressure = np.array([table[name][-1] for name in _STRESS])
    return {
        "step": step,
        "matrix": (matrix * units.length_a).tolist(),
        "positions": ((rows[:, 1:4] - low) * units.length_a).tolist(),
        "velocities": (rows[:, 4:7] * units.velocity_a_fs).tolist(),
        "forces": (forces[:, 1:4] * units.force_ev_a).tolist(),
        "stress_bar": (-voigt_to_tensor(pressure) * units.pressure_bar).tolist(),
        "energy_ev": float(table["potential_energy_ev"][-1]) * units.energy_ev,
    }


def _read_dump(path: Path) -> tuple[int, Array, Array]:
    """Return timestep, bounds and rows of the one frame in a dump."""
    lines = path.read_text(encoding="utf-8").splitlines()
    at = {
        line.split(":", 1)[1].strip(): i
        for i, line in enumerate(lines)
        if line.startswith("ITEM:")
    }
    count = int(lines[at["NUMBER OF ATOMS"] + 1])
    head = next(i for name, i in at.items() if name.startswith("BOX BOUNDS"))
    body = next(i for name, i in at.items() if name.startswith("ATOMS"))
    bounds, rows = (
        np.array([line.split() for line in lines[k + 1 : k + 1 + n]], float)
        for k, n in ((head, 3), (body, count))
    )
    return int(lines[at["TIMESTEP"] + 1]), bounds, rows


def _words(command: str, ranks: int, launcher: str | None) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"NANO_OS_LAMMPS_COMMAND is no command: {error}") from error
    if not words:
        raise InputError("NANO_OS_LAMMPS_COMMAND is empty", advice="unset it")
    if ranks == 1:
        return words
    return [*launch_command(Resources(ranks, launcher=launcher)), *words]


def _run(
    command: list[str],
    work_dir: Path,
    comm: Communicator,
    stop: StopRequest,
    config: MDConfig,
    log: Path,
) -> int | None:
    """Return the exit code; None if it had to be ended."""
    for name in (_FINAL_DUMP, _FORCES_DUMP, _FINAL_DATA):
        (work_dir / name).unlink(missing_ok=True)
    with (work_dir / _SCREEN).open("wb") as stream:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=work_dir,
                # A session of its own, which ends as a whole.
                start_new_session=True,
            )
        except OSError as error:
            raise MissingDependencyError(
                f"{command[0]!r} cannot be started: {error.strerror}",
                advice="NANO_OS_LAMMPS_COMMAND must be a LAMMPS executable",
            ) from error
    comm.before_abort = lambda: _end(child, at_once=True)
    reported = 0.0
    try:
        while (code := child.poll()) is None:
            if stop.requested and not stop.by_clock:
                _end(child)
                return None
            if time.monotonic() - reported > _PROGRESS_S:
                reported = time.monotonic()
                step = _last_step(log, Origin())
                report_progress(work_dir, step, config.total_steps, "timesteps")
            time.sleep(_POLL_S)
        return code
    finally:
        comm.before_abort = None
        _end(child)


def _end(child: subprocess.Popen[bytes], *, at_once: bool = False) -> None:
    if child.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL)[at_once:]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_END_S)
            return


def _last_step(log: Path, origin: Origin) -> int:
    table = read_thermo(log) if log.exists() else None
    return int(table.step[-1]) if table else origin.step


def _ended_by_clock(log: Path) -> bool:
    return _CLOCK in log.read_text(encoding="utf-8", errors="replace")


def _raise(screen: str, code: int | None, step: int, command: list[str]) -> None:
    found = re.search(r"^ERROR.*", screen, re.M)
    if found:
        error = simulation_error(found.group(0))
        error.evidence["last_step"] = step
        raise error
    raise LaunchError(
        f"{command[0]} died with exit code {code}",
        evidence={"exit_code": code, "screen": screen[-_TAIL:], "last_step": step},
        advice="read the end of screen.log",
    )


if __name__ == "__main__":
    run_rank_program(main)
