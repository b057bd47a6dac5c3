"""Readers of what a simulation leaves behind: thermo table and frames.

A simulation that was killed leaves a cut last row or frame; one that was continued
leaves several segments that overlap. Both are ordinary here: every whole row is
returned once, and nothing raises because the end is missing.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.md.box import LammpsBox

Array = NDArray[np.float64]

# LAMMPS keyword: (name here, unit), in the order of the table's columns.
THERMO_COLUMNS: dict[str, tuple[str, str]] = {
    "step": ("step", "1"),
    "time": ("time_ps", "ps"),
    "temp": ("temperature_k", "K"),
    "pe": ("potential_energy_ev", "eV"),
    "ke": ("kinetic_energy_ev", "eV"),
    "etotal": ("total_energy_ev", "eV"),
    "press": ("pressure_bar", "bar"),
    "vol": ("volume_a3", "Å³"),
    "lx": ("lx_a", "Å"),
    "ly": ("ly_a", "Å"),
    "lz": ("lz_a", "Å"),
    "xy": ("xy_a", "Å"),
    "xz": ("xz_a", "Å"),
    "yz": ("yz_a", "Å"),
    "pxx": ("pxx_bar", "bar"),
    "pyy": ("pyy_bar", "bar"),
    "pzz": ("pzz_bar", "bar"),
    "pxy": ("pxy_bar", "bar"),
    "pxz": ("pxz_bar", "bar"),
    "pyz": ("pyz_bar", "bar"),
}
DUMP_COLUMNS = ("id", "type", "xu", "yu", "zu", "vx", "vy", "vz")
_SEGMENT = re.compile(r"\.(\d+)\.(?:lammps|bin)\Z")
# What LAMMPS prints at the head of a thermo block.
_HEADERS = {
    "step": "step",
    "time": "time",
    "temp": "temp",
    "poteng": "pe",
    "pe": "pe",
    "kineng": "ke",
    "ke": "ke",
    "toteng": "etotal",
    "etotal": "etotal",
    "press": "press",
    "volume": "vol",
    "vol": "vol",
}
_MAGIC = b"DUMPCUSTOM"
_REVISION_WITH_COLUMNS = 2
_MAX_TEXT = 4096


@dataclass(frozen=True)
class ThermoTable:
    """Thermodynamic output, one entry per printed step.

    Parameters
    ----------
    columns
        ``(n_rows,) float64`` arrays by name; the names end in their unit
        (``temperature_k``, ``pressure_bar``). ``step`` is always there and rises
        strictly. Energies are those of the whole cell.
    units
        Unit of each column.
    """

    columns: dict[str, Array]
    units: dict[str, str]

    def __len__(self) -> int:
        return len(self.columns["step"])

    def __getitem__(self, name: str) -> Array:
        try:
            return self.columns[name]
        except KeyError:
            raise InputError(
                f"the thermo table has no column {name!r}",
                evidence={"columns": sorted(self.columns)},
            ) from None

    @property
    def step(self) -> NDArray[np.int64]:
        """``(n_rows,) int64``: timesteps."""
        return self.columns["step"].astype(np.int64)

    def after(self, step: int) -> ThermoTable:
        """Return the rows later than a timestep."""
        keep = self.columns["step"] > step
        return ThermoTable({k: v[keep] for k, v in self.columns.items()}, self.units)

    def to_dict(self) -> dict[str, list[float]]:
        """Return the columns as lists; values that are not finite become None."""
        return {
            name: [float(v) if np.isfinite(v) else None for v in values]  # type: ignore[misc]
            for name, values in self.columns.items()
        }


def read_thermo(paths: Path | Sequence[Path]) -> ThermoTable:
    """Read the thermo tables of one simulation from its LAMMPS logs.

    Parameters
    ----------
    paths
        One log, or the logs of all segments, the earliest first. A step that occurs
        in several is taken from the last, which is the one that was continued.

    Returns
    -------
    ThermoTable
        All whole rows. Warnings between rows, repeated headers and a cut last row
        are passed over; a log without rows gives an empty table.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    rows: dict[int, dict[str, float]] = {}
    for path in files:
        segment = list(_thermo_rows(path))
        if segment:
            start = min(int(row["step"]) for row in segment)
            rows = {step: row for step, row in rows.items() if step < start}
        rows.update((int(row["step"]), row) for row in segment)
    ordered = [rows[step] for step in sorted(rows)]
    names = list(dict.fromkeys(name for row in ordered for name in row)) or ["step"]
    known = dict(THERMO_COLUMNS.values())
    return ThermoTable(
        {n: np.array([row.get(n, np.nan) for row in ordered]) for n in names},
        {n: known.get(n, "") for n in names},
    )


def _thermo_rows(path: Path) -> Iterator[dict[str, float]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    names: list[str] | None = None
    for line in text.splitlines(keepends=True):
        words = line.split()
        if words and words[0] == "Step":
            names = [_column_name(word) for word in words]
        elif line.startswith("Loop time"):
            names = None
        elif names is not None and len(words) == len(names) and line.endswith("\n"):
            # A warning in between has other words; a cut row has no line end.
            try:
                yield dict(zip(names, map(float, words), strict=True))
            except ValueError:
                continue


def _column_name(word: str) -> str:
    keyword = _HEADERS.get(word.lower(), word.lower())
    return THERMO_COLUMNS[keyword][0] if keyword in THERMO_COLUMNS else word


@dataclass(frozen=True)
class Frame:
    """The atoms at one timestep, in the frame of the simulation box.

    Parameters
    ----------
    step
        Timestep.
    matrix
        ``(3, 3) float64``, Å: rows a, b, c of the box.
    types
        ``(n_atoms,) int64``: atom types, counted from 1, in the order of the sites.
    positions
        ``(n_atoms, 3) float64``, Å, relative to the box's origin. Unwrapped: an atom
        that crosses a face goes on, so that displacements are differences.
    velocities
        ``(n_atoms, 3) float64`` in Å/ps, or None if they were not written.
    """

    step: int
    matrix: Array
    types: NDArray[np.int64]
    positions: Array
    velocities: Array | None = None

    @property
    def volume_a3(self) -> float:
        """Volume of the box in Å³."""
        return float(abs(np.linalg.det(self.matrix)))

    def in_lattice(self, box: LammpsBox) -> tuple[Array, Array]:
        """Return lattice and fractional coordinates in the crystal's own frame."""
        return (
            box.lattice(self.matrix),
            box.frac_coords(self.positions, self.matrix),
        )


def read_frames(paths: Path | Sequence[Path]) -> Iterator[Frame]:
    """Yield the frames of one simulation, one at a time.

    Parameters
    ----------
    paths
        Binary dump (``dump custom`` to a ``.bin`` file, revision 2), or those of
        all segments. Segments are put in order by the first step in their names
        (``trajectory.000000001000.bin``), and frames that a later segment computed
        again are left out.

    Raises
    ------
    CorruptArtifactError
        If a file is not a binary dump of this format. A cut end does not raise.
    """
    files = [paths] if isinstance(paths, Path) else sorted(paths, key=first_step_of)
    last = -1
    for number, path in enumerate(files):
        limit = None
        if number + 1 < len(files):
            limit = first_step_of(files[number + 1])
        for frame in _binary_frames(path):
            if limit is not None and frame.step >= limit:
                break
            if frame.step > last:
                last = frame.step
                yield frame


def segment_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a simulation's segments, the earliest first."""
    return sorted(folder.glob(pattern), key=first_step_of)


def first_step_of(path: Path) -> int:
    """Return the step at which a segment begins, as its file name says; else 0."""
    match = _SEGMENT.search(path.name)
    return int(match.group(1)) if match else 0


class _CutError(Exception):
    """The file ends within a frame."""


def _binary_frames(path: Path) -> Iterator[Frame]:
    with path.open("rb") as file:
        while True:
            try:
                yield _binary_frame(file, path)
            except _CutError:
                return


def _take(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise _CutError
    return data


def _unpack(file: BinaryIO, code: str) -> tuple[Any, ...]:
    return struct.unpack("<" + code, _take(file, struct.calcsize("<" + code)))


def _text(file: BinaryIO, size: int, path: Path) -> bytes:
    if not 0 <= size <= _MAX_TEXT:
        raise CorruptArtifactError(f"{path} is not a LAMMPS binary dump")
    return _take(file, size)


def _binary_frame(file: BinaryIO, path: Path) -> Frame:
    # Layout: DumpCustom::write_header and tools/binary2txt of LAMMPS.
    (length,) = _unpack(file, "q")
    if length >= 0 or _text(file, -length, path) != _MAGIC:
        raise CorruptArtifactError(
            f"{path} is not a LAMMPS binary dump of revision 2",
            advice="write it with 'dump custom' to a name that ends in .bin",
        )
    endian, revision = _unpack(file, "ii")
    if endian != 1 or revision < _REVISION_WITH_COLUMNS:
        raise CorruptArtifactError(
            f"{path}: byte order {endian:#x}, revision {revision} cannot be read"
        )
    step, n_atoms, triclinic = _unpack(file, "qqi")
    _unpack(file, "6i")  # boundary conditions
    bounds = np.array(_unpack(file, "6d")).reshape(3, 2)
    tilts = _unpack(file, "3d") if triclinic else (0.0, 0.0, 0.0)
    (width,) = _unpack(file, "i")
    (length,) = _unpack(file, "i")
    _text(file, length, path)  # unit style
    if _unpack(file, "b")[0]:
        _unpack(file, "d")  # time
    (length,) = _unpack(file, "i")
    names = _text(file, length, path).decode("ascii", "replace").split()
    (chunks,) = _unpack(file, "i")
    parts = []
    for _ in range(chunks):
        (count,) = _unpack(file, "i")
        parts.append(np.frombuffer(_take(file, 8 * count), dtype="<f8"))
    data = np.concatenate(parts).reshape(-1, width) if parts else np.empty((0, width))
    if len(names) != width or len(data) != n_atoms:
        raise CorruptArtifactError(f"{path}: step {step} does not hold {n_atoms} atoms")
    return _frame(step, bounds, tilts, names, data, path)


def _frame(
    step: int,
    bounds: Array,
    tilts: Sequence[float],
    names: Sequence[str],
    data: Array,
    path: Path,
) -> Frame:
    column = {name: i for i, name in enumerate(names)}
    wanted = ("id", "type", "xu", "yu", "zu")
    if missing := [name for name in wanted if name not in column]:
        raise InputError(
            f"{path} was written without {', '.join(missing)}",
            evidence={"columns": list(names)},
        )
    data = data[np.argsort(data[:, column["id"]], kind="stable")]
    # The file holds the bounding box of a triclinic cell, not lx, ly, lz.
    xy, xz, yz = tilts
    low = bounds[:, 0] - (min(0.0, xy, xz, xy + xz), min(0.0, yz), 0.0)
    high = bounds[:, 1] - (max(0.0, xy, xz, xy + xz), max(0.0, yz), 0.0)
    lx, ly, lz = high - low
    velocities = None
    if "vx" in column:
        velocities = data[:, [column[name] for name in ("vx", "vy", "vz")]]
    return Frame(
        step=int(step),
        matrix=np.array([[lx, 0.0, 0.0], [xy, ly, 0.0], [xz, yz, lz]]),
        types=data[:, column["type"]].astype(np.int64),
        positions=data[:, [column[name] for name in ("xu", "yu", "zu")]] - low,
        velocities=velocities,
    )
