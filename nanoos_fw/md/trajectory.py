"""Readers of what a simulation leaves behind: thermo table and frames.

A simulation that was killed leaves a cut last row or frame; one that was continued
leaves several segments that overlap. Both are ordinary here: every whole row is
returned once, and nothing raises because the end is missing.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.md.binary_dumps import BinaryDump
from nanoos_fw.md.box import LammpsBox
from nanoos_fw.md.dump_frames import FrameBlock
from nanoos_fw.md.text_dumps import GZIP_MAGIC, ITEM, TextDump

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
# Not printed by LAMMPS, so that the same run prints the same rows: the time its loops
# took, from the lines "Loop time of", spread evenly over the steps of each.
WALL_TIME = "wall_time_s"
_LOOP_TIME = re.compile(r"Loop time of ([0-9.eE+-]+) on .*\n")
DUMP_COLUMNS = ("id", "type", "xu", "yu", "zu", "vx", "vy", "vz")
_SEGMENT = re.compile(r"\.(\d+)\.(?:lammps|bin|lammpstrj|dump)(?:\.gz)?\Z")
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
        are passed over; a log without rows gives an empty table. ``wall_time_s`` is
        LAMMPS' loop time so far, missing (NaN) in a run that did not end.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    rows: dict[int, dict[str, float]] = {}
    for path in files:
        segment = list(_thermo_rows(path))
        spent = 0.0
        if segment:
            start = min(int(row["step"]) for row in segment)
            before = [row for step, row in rows.items() if step <= start]
            # A segment's clock begins at zero.
            spent = max((row.get(WALL_TIME, 0.0) for row in before), default=0.0)
            rows = {step: row for step, row in rows.items() if step < start}
        last = -1
        for row in segment:
            step = int(row["step"])
            if step < last:
                # The steps were reset: these rows are of the minimization before.
                rows = {earlier: r for earlier, r in rows.items() if earlier < step}
            last = step
            if WALL_TIME in row:
                row[WALL_TIME] += spent
            elif step in rows and WALL_TIME in rows[step]:
                row[WALL_TIME] = rows[step][WALL_TIME]
            rows[step] = row
    ordered = [rows[step] for step in sorted(rows)]
    names = list(dict.fromkeys(name for row in ordered for name in row)) or ["step"]
    known = {**dict(THERMO_COLUMNS.values()), WALL_TIME: "s"}
    return ThermoTable(
        {n: np.array([row.get(n, np.nan) for row in ordered]) for n in names},
        {n: known.get(n, "") for n in names},
    )


def _thermo_rows(path: Path) -> Iterator[dict[str, float]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    names: list[str] | None = None
    run: list[dict[str, float]] = []
    elapsed = 0.0
    for line in text.splitlines(keepends=True):
        words = line.split()
        if words and words[0] == "Step":
            yield from run
            run, names = [], [_column_name(word) for word in words]
        elif match := _LOOP_TIME.match(line):
            seconds = float(match.group(1))
            _share_time(run, elapsed, seconds)
            elapsed += seconds
            yield from run
            run, names = [], None
        elif names is not None and len(words) == len(names) and line.endswith("\n"):
            # A warning in between has other words; a cut row has no line end.
            try:
                run.append(dict(zip(names, map(float, words), strict=True)))
            except ValueError:
                continue
    yield from run


def _share_time(run: list[dict[str, float]], before: float, seconds: float) -> None:
    """Give the rows of a run the time since the log began, even over its steps."""
    if len(run) < 2 or run[0].get("step") == run[-1].get("step"):
        shares = [1.0] * len(run)
    else:
        first, last = run[0]["step"], run[-1]["step"]
        shares = [(row["step"] - first) / (last - first) for row in run]
    for row, share in zip(run, shares, strict=True):
        row[WALL_TIME] = before + share * seconds


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
    unwrapped
        False if the file had neither unwrapped positions nor image flags.
    """

    step: int
    matrix: Array
    types: NDArray[np.int64]
    positions: Array
    velocities: Array | None = None
    unwrapped: bool = True

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


class Trajectory:
    """The frames of one simulation, from all its segments, each step once.

    Nothing but steps and cells is kept in memory; atoms are read when asked for, in
    blocks of about half a MB.

    Parameters
    ----------
    paths
        Dump file (``dump custom``; binary, text or gzip, told by its content), or
        those of all segments. Segments are put in order by the first step in their
        names (``trajectory.000000001000.bin``). What a later segment, or a later part
        of a file, computed again replaces the earlier frames.
    length_a, velocity_a_ps
        What a unit of length or velocity of the files is in Å or Å/ps; metal units
        need nothing.

    Attributes
    ----------
    step
        ``(n_frames,) int64``, rising strictly.
    matrix
        ``(n_frames, 3, 3) float64``, Å: rows a, b, c of each box.
    is_cut
        Whether a file ends within a frame, which is left out.

    Raises
    ------
    CorruptArtifactError
        If a file is not a dump of these formats. A cut end does not raise.
    """

    def __init__(
        self,
        paths: Path | Sequence[Path],
        *,
        length_a: float = 1.0,
        velocity_a_ps: float = 1.0,
    ) -> None:
        self._length, self._velocity = length_a, velocity_a_ps
        files = [paths] if isinstance(paths, Path) else sorted(paths, key=first_step_of)
        self._dumps = [open_dump(path) for path in files]
        self._select(*self._kept(files))
        self.is_cut = any(dump.index.is_cut for dump in self._dumps)

    def _kept(
        self, files: Sequence[Path]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, for every frame that counts, its file and its place there."""
        kept: list[tuple[int, int, int]] = []
        for source, (path, dump) in enumerate(zip(files, self._dumps, strict=True)):
            if source and (named := first_step_of(path)):
                # Nothing of an earlier segment from here on is part of this history.
                _drop_from(kept, named)
            for number, step in enumerate(dump.index.step.tolist()):
                _drop_from(kept, step)
                kept.append((step, source, number))
        table = np.array(kept, dtype=np.int64).reshape(-1, 3)
        return table[:, 1], table[:, 2]

    def _select(self, source: NDArray[np.int64], number: NDArray[np.int64]) -> None:
        self._source, self._number = source, number
        n = len(source)
        self.step = np.empty(n, np.int64)
        self.n_atoms = np.empty(n, np.int64)
        self.matrix = np.empty((n, 3, 3))
        for which, dump in enumerate(self._dumps):
            mine = source == which
            self.step[mine] = dump.index.step[number[mine]]
            self.n_atoms[mine] = dump.index.n_atoms[number[mine]]
            self.matrix[mine] = dump.matrix[number[mine]] * self._length

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, chosen: slice | NDArray[Any]) -> Trajectory:
        """Return a part of the trajectory, such as ``trajectory[100::10]``."""
        part = copy.copy(self)
        part._select(self._source[chosen], self._number[chosen])
        return part

    def after(self, step: int) -> Trajectory:
        """Return the part later than a timestep."""
        return self[int(np.searchsorted(self.step, step, side="right")) :]

    def at(self, step: int) -> Frame:
        """Return the frame of a timestep.

        Raises
        ------
        InputError
            If that step has no frame.
        """
        place = int(np.searchsorted(self.step, step))
        if place == len(self) or self.step[place] != step:
            raise InputError(
                f"the trajectory has no frame of step {step}",
                evidence={
                    "frames": len(self),
                    "near": self.step[place - 1 :][:2].tolist(),
                },
            )
        return next(iter(self[place : place + 1]))

    def interval(self) -> int:
        """Return the steps between frames.

        Raises
        ------
        InputError
            If there are fewer than two frames, or they are not equally spaced.
        """
        gaps = np.diff(self.step)
        if not len(gaps):
            raise InputError(
                f"a trajectory of {len(self)} frames has no interval",
                advice="dump more often, or run longer",
            )
        if (gaps != gaps[0]).any():
            odd = int(np.argmax(gaps != gaps[0]))
            raise InputError(
                "the frames are not equally spaced in time",
                evidence={
                    "interval": int(gaps[0]),
                    "steps": self.step[odd : odd + 2].tolist(),
                },
                advice="analyse a part that is, or dump at a fixed interval",
            )
        return int(gaps[0])

    def blocks(self, atoms: slice = slice(None)) -> Iterator[FrameBlock]:
        """Yield the frames in blocks, of all atoms or of a part of them.

        Parameters
        ----------
        atoms
            Range of atoms in the order of their ids.
        """
        borders = (np.flatnonzero(np.diff(self._source)) + 1).tolist()
        for start, stop in itertools.pairwise([0, *borders, len(self)]):
            if stop > start:
                dump = self._dumps[self._source[start]]
                for block in dump.blocks(self._number[start:stop], atoms):
                    yield self._in_our_units(block)

    def _in_our_units(self, block: FrameBlock) -> FrameBlock:
        if self._length == 1.0 and self._velocity == 1.0:
            return block
        velocities = block.velocities
        return replace(
            block,
            matrix=block.matrix * self._length,
            positions=block.positions * self._length,
            velocities=None if velocities is None else velocities * self._velocity,
        )

    def __iter__(self) -> Iterator[Frame]:
        for block in self.blocks():
            for i in range(len(block.step)):
                yield Frame(
                    step=int(block.step[i]),
                    matrix=block.matrix[i],
                    types=block.types[i],
                    positions=block.positions[i],
                    velocities=None
                    if block.velocities is None
                    else block.velocities[i],
                    unwrapped=block.unwrapped,
                )


def _drop_from(kept: list[tuple[int, int, int]], step: int) -> None:
    while kept and kept[-1][0] >= step:
        kept.pop()


def open_dump(path: Path) -> BinaryDump | TextDump:
    """Return the reader of a dump file, by its first bytes.

    Raises
    ------
    CorruptArtifactError
        If the file is neither a binary nor a text dump.
    """
    with path.open("rb") as file:
        begin = file.read(len(ITEM))
    packed = begin[:2] == GZIP_MAGIC or begin == GZIP_MAGIC[:1]
    if packed or (begin and ITEM.startswith(begin)):
        return TextDump(path)
    return BinaryDump(path)


def read_frames(paths: Path | Sequence[Path]) -> Iterator[Frame]:
    """Yield the frames of one simulation, one at a time; see `Trajectory`."""
    return iter(Trajectory(paths))


def segment_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a simulation's segments, the earliest first."""
    return sorted(folder.glob(pattern), key=first_step_of)


def first_step_of(path: Path) -> int:
    """Return the step at which a segment begins, as its file name says; else 0."""
    match = _SEGMENT.search(path.name)
    return int(match.group(1)) if match else 0
