"""The rank program of one simulation: it holds LAMMPS.

The ranks run the same commands as the script ``in.lammps`` of the input folder, in
short pieces (``run ... pre no``), between which all of them agree whether to stop.
At the timesteps of restart files a run begins anew, with a fresh neighbour list,
whether or not the program stops there: so a simulation that was continued from such
a step is the same to the last bit as one that never stopped.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanoos_fw.errors import OutOfTimeError, SimulationError
from nanoos_fw.md.box import LammpsBox, voigt_to_tensor
from nanoos_fw.md.calculator import check_pair_style, open_lammps, run_commands
from nanoos_fw.md.inputs import (
    MDConfig,
    Origin,
    Stage,
    fix_of,
    next_restart,
    render_parts,
    restart_name,
    run_command,
)
from nanoos_fw.md.output import FINAL
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.restarts import PORTABLE, STOP_RESTART, publish
from nanoos_fw.md.trajectory import read_thermo, segment_files
from nanoos_fw.md.unit_systems import unit_system
from nanoos_fw.parallel import (
    Communicator,
    StopRequest,
    report_progress,
    run_rank_program,
)
from nanoos_fw.provenance import write_json

logger = logging.getLogger(__name__)

CONFIG = "md.json"
# Ranks ask about a stop this often; the first pieces are short and find the pace.
_PIECE_S = 1.0
_FIRST_PIECE = 10
_MAX_PACE = 5.0
# A stop waits so long for the next restart step, from which everything is exact; the
# parent gives 60 s before it kills.
_FINISH_S = 20.0
# Text of all atoms: after so many restart files, and at every stop.
_PORTABLE_EVERY = 10
# In steps of a minimization; the fix is to call, and never to add its forces.
_WATCH, _ASK_EVERY, _NEVER = "watch_stop", 10, 2_000_000_000
_STRESS = ("pxx", "pyy", "pzz", "pxy", "pxz", "pyz")


@dataclass
class _Pace:
    """How many steps make a piece of about a second; the same on all ranks."""

    steps: int = _FIRST_PIECE
    step_s: float = 0.0

    def learn(self, done: int, seconds: float) -> None:
        wanted = done * _PIECE_S / max(seconds, 1e-3)
        self.steps = max(1, int(min(wanted, _MAX_PACE * self.steps)))
        self.step_s = seconds / max(done, 1)


@dataclass
class _Run:
    """One segment of a simulation on the ranks."""

    lmp: Any
    config: MDConfig
    potential: Potential
    work_dir: Path
    comm: Communicator
    stop: StopRequest
    origin: Origin
    written: int = 0
    pace: _Pace = field(default_factory=_Pace)

    @property
    def step(self) -> int:
        return int(self.lmp.extract_global("ntimestep"))

    def command(self, text: str) -> None:
        run_commands(self.lmp, text)

    def stage(self, stage: Stage) -> None:
        """Run a stage of dynamics, or what is left of it."""
        while self.step < stage.last_step:
            goal = next_restart(self.step, stage, self.config)
            self._block(stage, goal)
            if self.step % self.config.restart_every == 0:
                self._checkpoint()
                if self.step < self.config.total_steps:
                    self._stop_if_asked()

    def _block(self, stage: Stage, goal: int) -> None:
        """Run up to the next step at which LAMMPS is set up anew."""
        options, finish = " post no", False
        while (step := self.step) < goal:
            if not finish and self.comm.any(self.stop.requested):
                finish = self.comm.broadcast(self._restart_is_near(step))
                if not finish:
                    self._stop_between_restarts(stage)
            began = time.monotonic()
            target = min(goal, step + self.pace.steps)
            self.command(run_command(stage, target, options))
            # Later pieces go on as if there had been no pause.
            options = " pre no post no"
            self.pace.learn(target - step, time.monotonic() - began)
            self.pace.steps = self.comm.broadcast(self.pace.steps)
            if self.comm.rank == 0:
                report_progress(
                    self.work_dir, self.step, self.config.total_steps, "timesteps"
                )

    def _restart_is_near(self, step: int) -> bool:
        """Whether the next restart step, or the end, comes soon enough to go there."""
        every = self.config.restart_every
        goal = min(self.config.total_steps, (step // every + 1) * every)
        known = self.pace.step_s > 0.0
        return known and (goal - step) * self.pace.step_s < _FINISH_S

    def _checkpoint(self) -> None:
        step, name = self.step, restart_name(self.step, self.config)
        self._write_restart(name)
        if (step // self.config.restart_every) % _PORTABLE_EVERY == 0:
            self.write_portable()
        self.written = step

    def _write_restart(self, name: str) -> None:
        # Written beside and renamed: a kill during the write leaves the old one.
        self.command(f"write_restart {name}.new")
        if self.comm.rank == 0:
            self._check_log()
            publish(self.work_dir, name, self.step)
        self.comm.barrier()

    def write_portable(self) -> None:
        """Write a data file that another version or machine can go on from."""
        self.command(f"write_data {PORTABLE}.new nocoeff")
        if self.comm.rank == 0:
            publish(self.work_dir, PORTABLE, self.step)
        self.comm.barrier()

    def _check_log(self) -> None:
        """Refuse to go on where rows are lost: LAMMPS does not notice a full disk."""
        logs = segment_files(self.work_dir, "log.*.lammps")
        with logs[-1].open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().splitlines()
        wanted = self.step - self.step % self.config.thermo_every
        if wanted < self.origin.step:
            return
        number = str(wanted).encode()
        if not any(line.split()[:1] == [number] for line in lines):
            raise SimulationError(
                f"{logs[-1]} lacks the row of timestep {wanted}",
                evidence={"class": "disk_full"},
                advice="free space, then execute again: it continues",
            )

    def _stop_if_asked(self) -> None:
        if self.comm.any(self.stop.requested):
            self.write_portable()
            raise self._stopped(self.step)

    def _stop_between_restarts(self, stage: Stage) -> None:
        step = self.step
        if step == self.origin.step:
            raise self._stopped(step)  # nothing was run: there is nothing to keep
        if stage.ensemble == "nve" and self.written > self.origin.step:
            # Few steps are computed again, and the run stays what it was.
            raise self._stopped(self.written)
        self._write_restart(STOP_RESTART)
        self.write_portable()
        raise self._stopped(step)

    def _stopped(self, step: int) -> OutOfTimeError:
        total = self.config.total_steps
        return OutOfTimeError(
            f"stopped by {self.stop.reason} at step {step} of {total}",
            evidence={"step": step, "total_steps": total},
            advice="execute it again: it continues from here",
        )

    def minimize(self, commands: str) -> None:
        """Run a minimization, which a stop ends where it is."""
        if self.stop.deadline is not None:
            # Not before the deadline: what ended early would count as converged.
            left = max(1, math.ceil(self.stop.deadline - time.time()))
            self.command(f"timer timeout {left} every 10")
        with self._watched():
            self.command(commands)
        # Pieces of dynamics ask by themselves. Ended by LAMMPS at any step, a piece
        # could not be gone on from: energies are there for the steps of output only.
        self.command("timer timeout off")
        if self.comm.any(self.stop.requested):
            step = self.step
            if step > self.origin.step:
                self.write_portable()
            raise self._stopped(step)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """End a long command of LAMMPS when a stop is asked for.

        Python handles signals between its own instructions only, and LAMMPS is one
        of them. Several ranks have to give LAMMPS the order to stop at once in the same
        step, or some would wait for the others: a fix, which adds no force, lets all
        ask each other every few steps.
        """
        if self.comm.size > 1 and self.lmp.has_style("fix", "external"):
            self.command(f"fix {_WATCH} all external pf/callback {_ASK_EVERY} {_NEVER}")
            # Not by LAMMPS' Python wrapper, whose arrays fail on a rank without atoms.
            ask = self.lmp.FIX_EXTERNAL_CALLBACK_FUNC(lambda *_: self._ask_in_step())
            self.lmp.lib.lammps_set_fix_external_callback(
                self.lmp.lmp, _WATCH.encode(), ask, None
            )
            yield
            self.command(f"unfix {_WATCH}")
            return
        if self.comm.size > 1:
            yield
            return
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                if self.stop.requested:
                    self.lmp.lib.lammps_force_timeout(self.lmp.lmp)
                    return

        thread = threading.Thread(target=watch, name="watch-stop", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _ask_in_step(self) -> None:
        if self.comm.any(self.stop.requested and not self.stop.by_clock):
            self.lmp.lib.lammps_force_timeout(self.lmp.lmp)

    def final(self) -> None:
        """Write the last state, in the units used here, in the frame of the box."""
        units = unit_system(self.potential.units)
        force = np.array(self.lmp.gather_atoms("f", 1, 3)).reshape(-1, 3)
        pressure = np.array([self.lmp.get_thermo(name) for name in _STRESS])
        stress = -voigt_to_tensor(pressure) * units.pressure_bar
        energy = units.from_lammps("energy", self.lmp.get_thermo("pe"))
        # After the forces: it sends atoms to the ranks where they are now, and they
        # leave their forces behind.
        self.command("write_data final.data nocoeff")
        low, high, xy, yz, xz, *_ = self.lmp.extract_box()
        lx, ly, lz = np.array(high) - np.array(low)
        matrix = np.array([[lx, 0.0, 0.0], [xy, ly, 0.0], [xz, yz, lz]])
        found: dict[str, Any] = {
            "step": self.step,
            "matrix": (matrix * units.length_a).tolist(),
            "stress_bar": stress.tolist(),
            "energy_ev": energy,
        }
        position, velocity = (
            np.array(self.lmp.gather_atoms(letter, 1, 3)).reshape(-1, 3)
            for letter in ("x", "v")
        )
        for name, quantity, values in (
            ("positions", "length", position - np.array(low)),
            ("velocities", "velocity", velocity),
            ("forces", "force", force),
        ):
            if not np.isfinite(values).all():
                raise SimulationError(
                    f"{name} are not finite", evidence={"class": "not_a_number"}
                )
            found[name] = (values * units.factor(quantity)).tolist()
        if self.comm.rank == 0:
            write_json(self.work_dir / FINAL, found)


def main(
    config: dict[str, Any], work_dir: Path, comm: Communicator, stop: StopRequest
) -> dict[str, Any]:
    """Rank program: run the simulation of ``md.json`` from where it is to go on."""
    simulation = config["simulation"]
    md = MDConfig.model_validate(simulation["config"])
    potential = Potential.model_validate(simulation["potential"])
    box = LammpsBox.from_lattice(np.array(simulation["lattice"]))
    origin = Origin(**config["origin"])
    parts = render_parts(
        md,
        potential,
        simulation["elements"],
        box,
        origin=origin,
        threads=int(config["threads"]),
    )
    log = work_dir / f"log.{origin.step:012d}.lammps"
    # The ranks work in work_dir, so files are named without folders.
    lmp = open_lammps(comm.mpi, log=Path(log.name))
    check_pair_style(lmp, potential)
    run = _Run(lmp, md, potential, work_dir, comm, stop, origin)
    try:
        run.command(parts.start)
        _check_atoms(lmp, len(simulation["species"]))
        run.command(parts.settings)
        run.command(parts.prelude + parts.output)
        for number, (stage, commands) in enumerate(
            zip(md.stages(), parts.stages, strict=True), start=1
        ):
            if stage.ensemble in ("minimize", "static"):
                run.minimize(commands)
            elif run.step < stage.last_step:
                run.command(commands)
                run.stage(stage)
                run.command(f"unfix {fix_of(number)}")
        run.final()
    except SimulationError as error:
        table = read_thermo(log) if log.exists() else None
        error.evidence["last_step"] = int(table.step[-1]) if table else origin.step
        raise
    result = {
        "steps": run.step,
        "n_atoms": len(simulation["species"]),
        "segments": len(segment_files(work_dir, "log.*.lammps")),
        "lammps_version": int(lmp.version()),
        "ranks": comm.size,
        "threads": int(config["threads"]),
    }
    lmp.close()
    return result


def _check_atoms(lmp: Any, n_atoms: int) -> None:
    if lmp.get_natoms() != n_atoms:
        raise SimulationError(
            f"LAMMPS read {lmp.get_natoms()} of {n_atoms} atoms",
            evidence={"class": "atoms_not_created"},
        )


if __name__ == "__main__":
    run_rank_program(main)
