"""Simulations for other programs: frames, last structure and thermo table as files.

Beside every file stands ``FILE.json``: its digest, the units of its numbers, and the
simulation they come from. Frames are written one at a time, so a trajectory may be
larger than the memory, and a file appears when it is whole.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError, SimulationError
from nanoos_fw.md.engine import FINISHED
from nanoos_fw.md.output import (
    final_structure,
    read_simulation,
    simulation_box,
    simulation_thermo,
    simulation_trajectory,
)
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.protocols import MDConfig
from nanoos_fw.md.trajectory import Frame, Trajectory
from nanoos_fw.provenance import run_environment, utc_now, write_json

ExportFormat = Literal["extxyz", "lammps", "poscar", "csv"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)

Array = NDArray[np.float64]

_DIGITS = "%.17g"  # a float64 comes back as it was
_FRAME_UNITS = {
    "positions": "Å, unwrapped",
    "velocities": "Å/ps",
    "cell": "Å",
    "time_ps": "ps",
}


def export_simulation(
    output_dir: Path,
    path: Path,
    export_format: ExportFormat,
    *,
    first_step: int = 0,
    every: int = 1,
) -> dict[str, Any]:
    """Write a simulation's frames, last structure or thermo table into a file.

    Parameters
    ----------
    output_dir
        Of `LAMMPSEngine.execute`.
    path
        The file; one that exists is replaced. ``path`` + ``.json`` describes it.
    export_format
        ``extxyz`` frames in the crystal's own orientation, sites in the order of the
        simulated structure, with velocities; ``lammps`` a text dump in metal units, in
        the orientation LAMMPS runs in; ``poscar`` the last structure, own orientation
        and order; ``csv`` the thermo table.
    first_step
        Frames and rows from this timestep on.
    every
        Every so many frames or rows.

    Returns
    -------
    dict
        What ``FILE.json`` holds: format, digest, units, number of frames or rows,
        first and last step, and the simulation's configuration, potential and seed.

    Raises
    ------
    InputError
        If there is nothing to write, or a format cannot hold it.
    SimulationError
        If the file cannot be written.
    """
    if export_format not in EXPORT_FORMATS:
        raise InputError(
            f"there is no export format {export_format!r}",
            advice=f"formats: {', '.join(EXPORT_FORMATS)}",
        )
    if every < 1 or first_step < 0:
        raise InputError(
            f"every ({every}) must be at least 1, first_step ({first_step}) at least 0"
        )
    simulation = read_simulation(output_dir)
    config = MDConfig.model_validate(simulation["config"])
    potential = Potential.model_validate(simulation["potential"])
    about: dict[str, Any]
    if export_format == "poscar":
        texts, about = _poscar(output_dir)
    elif export_format == "csv":
        texts, about = _csv(output_dir, first_step, every)
    else:
        timestep_ps = (config.timestep_fs or potential.timestep_fs) / 1000.0
        trajectory = simulation_trajectory(output_dir)
        is_cut = trajectory.is_cut
        trajectory = trajectory.after(first_step - 1)[::every]
        if not len(trajectory):
            raise InputError(
                f"the simulation in {output_dir} has no frames from step {first_step}",
                advice="lower first_step",
            )
        write = _extxyz if export_format == "extxyz" else _lammps
        texts = write(output_dir, trajectory, simulation, timestep_ps)
        about = {
            "units": _FRAME_UNITS,
            "n_frames": len(trajectory),
            "first_step": int(trajectory.step[0]),
            "last_step": int(trajectory.step[-1]),
            "is_cut": is_cut,
        }
    sha256 = _write(path, texts)
    document = {
        "format": export_format,
        "sha256": sha256,
        **about,
        "simulation": {
            "output_dir": str(output_dir.resolve()),
            "finished": (output_dir / FINISHED).exists(),
            "config": config.model_dump(mode="json"),
            "potential": potential.name,
            "potential_identity": potential.identity,
            "timestep_fs": config.timestep_fs or potential.timestep_fs,
            "n_atoms": len(simulation["species"]),
        },
        "written": utc_now(),
        "environment": run_environment(),
    }
    write_json(description_of(path), document)
    return document


def description_of(path: Path) -> Path:
    """Return the file that tells what an exported file holds."""
    return path.with_name(path.name + ".json")


def _extxyz(
    output_dir: Path,
    trajectory: Trajectory,
    simulation: dict[str, Any],
    timestep_ps: float,
) -> Iterator[str]:
    box, species = simulation_box(output_dir), simulation["species"]
    for frame in trajectory:
        _same_atoms(frame, species)
        lattice, frac = frame.in_lattice(box)
        columns, names = [frac @ lattice], "species:S:1:pos:R:3"
        if frame.velocities is not None:
            columns.append(box.from_box(frame.velocities))
            names += ":velocity_a_ps:R:3"
        vectors = " ".join(_DIGITS % value for value in lattice.ravel())
        yield (
            f'{len(species)}\nLattice="{vectors}" Properties={names} '
            f'pbc="T T T" step={frame.step} '
            f"time_ps={_DIGITS % (frame.step * timestep_ps)}\n"
        )
        yield _rows(species, np.hstack(columns))


def _lammps(
    output_dir: Path,
    trajectory: Trajectory,
    simulation: dict[str, Any],
    timestep_ps: float,
) -> Iterator[str]:
    del output_dir, timestep_ps
    species = simulation["species"]
    for frame in trajectory:
        _same_atoms(frame, species)
        xy, xz, yz = (float(frame.matrix[i, j]) for i, j in ((1, 0), (2, 0), (2, 1)))
        lx, ly, lz = (float(x) for x in np.diag(frame.matrix))
        # The format has the bounding box, not the lengths.
        bounds = [
            (min(0.0, xy, xz, xy + xz), lx + max(0.0, xy, xz, xy + xz)),
            (min(0.0, yz), ly + max(0.0, yz)),
            (0.0, lz),
        ]
        tilted = any((xy, xz, yz))
        lines = [
            f"ITEM: TIMESTEP\n{frame.step}\nITEM: NUMBER OF ATOMS\n{len(species)}",
            f"ITEM: BOX BOUNDS {'xy xz yz ' if tilted else ''}pp pp pp",
        ]
        for (low, high), tilt in zip(bounds, (xy, xz, yz), strict=True):
            numbers = (low, high, tilt) if tilted else (low, high)
            lines.append(" ".join(_DIGITS % number for number in numbers))
        values = [frame.positions]
        names = "id type element xu yu zu"
        if frame.velocities is not None:
            values.append(frame.velocities)
            names += " vx vy vz"
        lines.append(f"ITEM: ATOMS {names}")
        yield "\n".join(lines) + "\n"
        heads = [
            f"{number} {kind} {symbol}"
            for number, (kind, symbol) in enumerate(
                zip(frame.types.tolist(), species, strict=True), start=1
            )
        ]
        yield _rows(heads, np.hstack(values))


def _poscar(output_dir: Path) -> tuple[Iterator[str], dict[str, Any]]:
    structure = final_structure(output_dir)
    if np.linalg.det(structure.lattice.matrix) < 0.0:
        raise InputError(
            "the cell is left-handed, and a POSCAR cannot hold it in its orientation",
            advice="export extxyz, or simulate a right-handed setting",
        )
    species = [str(site.specie) for site in structure]
    # Sites that follow each other are one group: the order stays.
    groups = [(symbol, len(list(run))) for symbol, run in itertools.groupby(species)]
    lines = [
        "last structure of a simulation",
        "1.0",
        *(" ".join(_DIGITS % x for x in row) for row in structure.lattice.matrix),
        " ".join(symbol for symbol, _ in groups),
        " ".join(str(count) for _, count in groups),
        "Direct",
        *(" ".join(_DIGITS % x for x in row) for row in structure.frac_coords),
    ]
    text = "\n".join(lines) + "\n"
    return iter([text]), {"units": {"cell": "Å", "positions": "1"}, "n_frames": 1}


def _csv(
    output_dir: Path, first_step: int, every: int
) -> tuple[Iterator[str], dict[str, Any]]:
    table = simulation_thermo(output_dir).after(first_step - 1)
    columns = {name: values[::every] for name, values in table.columns.items()}
    steps = columns["step"]
    if not len(steps):
        raise InputError(
            f"the simulation in {output_dir} has no thermo rows from step {first_step}",
            advice="run it first, or lower first_step",
        )

    def cell(name: str, value: float) -> str:
        if name == "step":
            return str(int(value))
        return _DIGITS % value if math.isfinite(value) else ""

    def lines() -> Iterator[str]:
        yield ",".join(columns) + "\n"
        for row in zip(*columns.values(), strict=True):
            cells = (cell(n, float(v)) for n, v in zip(columns, row, strict=True))
            yield ",".join(cells) + "\n"

    return lines(), {
        "units": {name: table.units[name] for name in columns},
        "n_rows": len(steps),
        "first_step": int(steps[0]),
        "last_step": int(steps[-1]),
    }


def _same_atoms(frame: Frame, species: Sequence[str]) -> None:
    if len(frame.types) != len(species):
        raise InputError(
            f"the frame of step {frame.step} has {len(frame.types)} atoms, the "
            f"simulated structure {len(species)}"
        )


def _rows(heads: Sequence[str], values: Array) -> str:
    line = " ".join(["%s", *[_DIGITS] * values.shape[1]]) + "\n"
    return "".join(
        line % (head, *row) for head, row in zip(heads, values.tolist(), strict=True)
    )


def _write(path: Path, texts: Iterator[str]) -> str:
    """Write a file that appears whole or not at all; return its SHA-256."""
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise SimulationError(f"{path} cannot be written: {error.strerror}") from error
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            for text in texts:
                data = text.encode()
                digest.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # As the user's umask has it, which mkstemp passes over.
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        # The old description does not fit the new file.
        description_of(path).unlink(missing_ok=True)
        part.replace(path)
    except OSError as error:
        raise SimulationError(
            f"{path} cannot be written: {error.strerror}",
            advice="see whether there is room; the exported part was removed",
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return digest.hexdigest()
