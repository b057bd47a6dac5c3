"""Binary LAMMPS dumps (``dump custom`` to a name that ends in ``.bin``).

A file is indexed first: step, place and cell of every whole frame, no atoms. Atoms
are then read in blocks of frames, so that memory does not grow with the length of
the trajectory. Files are read with ``pread`` and not mapped: reading a mapped file
that a restarted simulation cuts short ends the process with SIGBUS, and the pages of
a mapped file count as its memory.

The layout is that of ``DumpCustom::header_binary`` of LAMMPS, revision 2.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.md.dump_frames import (
    GENERAL_TRICLINIC,
    Array,
    DumpIndex,
    FrameBlock,
    Integers,
    block_of_columns,
    boxes_of_bounds,
)

_MAGIC = b"DUMPCUSTOM"
_REVISION_WITH_COLUMNS = 2
_MAX_TEXT = 4096
_MAX_COLUMNS, _MAX_CHUNKS = 10_000, 10_000_000
# About so much is read at a time: it stays in the processor's cache, and the memory
# is used again for the next block.
BLOCK_BYTES = 1 << 19
_HEADER_BYTES = 1 << 14
_HEADERS_AT_ONCE = 4096
# Linux takes at most 1024 buffers (IOV_MAX) in one call.
_MAX_BUFFERS = 1023


class _CutError(Exception):
    """The file ends within a frame."""


class BinaryDump:
    """A ``dump custom`` file whose name ended in ``.bin``.

    Raises
    ------
    CorruptArtifactError
        If the file is not a binary dump of revision 2.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._heads: list[_Head] = []
        # The head whose layout each frame shares.
        self._head_of: list[NDArray[np.int64]] = []
        self.index, self.matrix, self.origin = self._scan()

    # ---------------------------------------------------------------- index

    def _scan(self) -> tuple[DumpIndex, Array, Array]:
        offsets: list[Integers] = []
        step: list[Integers] = []
        cells: list[Array] = []
        is_cut = False
        with self.path.open("rb", buffering=0) as file:
            end, place = os.fstat(file.fileno()).st_size, 0
            while place < end:
                try:
                    head = _read_head(file.fileno(), place, end, self.path)
                except _CutError:
                    is_cut = True
                    break
                steps, numbers = _same_layout(file.fileno(), head, place, end)
                offsets.append(place + head.size * np.arange(len(steps)))
                step.append(steps)
                cells.append(numbers)
                self._head_of.append(np.full(len(steps), len(self._heads), np.int64))
                self._heads.append(head)
                place += head.size * len(steps)
        matrices, origins = [np.empty((0, 3, 3))], [np.empty((0, 3))]
        for head, values in zip(self._heads, cells, strict=True):
            matrix, origin = boxes_of_bounds(values, head.triclinic)
            matrices.append(matrix)
            origins.append(origin)
        which = self._heads_of_frames()
        index = DumpIndex(
            step=_joined(step),
            n_atoms=np.array([h.n_atoms for h in self._heads], np.int64)[which],
            offset=_joined(offsets),
            size=np.array([h.size for h in self._heads], np.int64)[which],
            is_cut=is_cut,
        )
        return index, np.concatenate(matrices), np.concatenate(origins)

    def _heads_of_frames(self) -> Integers:
        return _joined(self._head_of)

    # ---------------------------------------------------------------- atoms

    def blocks(
        self, frames: Integers, atoms: slice = slice(None)
    ) -> Iterator[FrameBlock]:
        """Yield frames by their number in the file, several at a time.

        Parameters
        ----------
        frames
            ``(n,) int64``, rising.
        atoms
            Part of the atoms, in the order of the ids. Only this part is read where
            the file is sorted by id (``dump_modify sort id``).
        """
        which = self._heads_of_frames()[frames]
        with self.path.open("rb", buffering=0) as file:
            for start, stop in _runs(which):
                head = self._heads[which[start]]
                n_rows = len(range(*atoms.indices(head.n_atoms)))
                most = max(1, BLOCK_BYTES // max(1, 8 * head.width * n_rows))
                for first in range(start, stop, most):
                    numbers = frames[first : min(first + most, stop)]
                    rows, ids = self._rows(file.fileno(), head, numbers, atoms)
                    yield block_of_columns(
                        self.index.step[numbers],
                        self.matrix[numbers],
                        self.origin[numbers],
                        head.columns,
                        rows,
                        ids,
                    )

    def _rows(
        self, fd: int, head: _Head, numbers: Integers, atoms: slice
    ) -> tuple[Array, Integers]:
        """Return ``(n_frames, n_rows, width)`` in the order of ids, and the ids."""
        first, last, _ = atoms.indices(head.n_atoms)
        column = head.columns.index("id")
        if head.chunks == 1:
            rows = self._one_chunk(fd, head, numbers, first, last)
            ids = rows[0, :, column] if len(rows) else np.empty(0)
            # Sorted and without gaps, so that these rows are those asked for.
            expected = np.arange(first + 1, last + 1, dtype=np.float64)
            if (rows[:, :, column] == expected).all():
                return rows, ids.astype(np.int64)
            if (first, last) != (0, head.n_atoms):
                rows = self._one_chunk(fd, head, numbers, 0, head.n_atoms)
        else:
            rows = np.stack([self._chunks(fd, head, int(number)) for number in numbers])
        ids = rows[:, :, column]
        if (np.diff(ids, axis=1) <= 0).any():
            order = np.argsort(ids, axis=1, kind="stable")
            rows = np.take_along_axis(rows, order[:, :, None], axis=1)
        ids = rows[:, :, column]
        self._check_ids(ids, numbers)
        return rows[:, first:last], ids[0, first:last].astype(np.int64)

    def _check_ids(self, ids: Array, numbers: Integers) -> None:
        if (np.diff(ids, axis=1) <= 0).any():
            raise CorruptArtifactError(f"{self.path} holds an atom twice in a frame")
        if (ids != ids[0]).any():
            steps = self.index.step[numbers]
            raise InputError(
                f"{self.path}: the dumped atoms change between steps {steps[0]} and "
                f"{steps[-1]}",
                advice="dump a group whose atoms stay the same",
            )

    def _one_chunk(
        self, fd: int, head: _Head, numbers: Integers, first: int, last: int
    ) -> Array:
        rows = np.empty((len(numbers), last - first, head.width))
        skip = head.data_start + 4 + 8 * head.width * first
        whole = (first, last) == (0, head.n_atoms)
        if whole and np.all(np.diff(numbers) == 1):
            # Contiguous frames come in one call; their headers are passed over.
            gap = bytearray(head.size - 8 * head.width * head.n_atoms)
            parts: list[Any] = []
            for i in range(len(numbers)):
                parts += [rows[i]] if i == 0 else [gap, rows[i]]
            start = int(self.index.offset[numbers[0]]) + skip
            _read_into(fd, parts, start, self.path)
        else:
            for i, number in enumerate(numbers):
                start = int(self.index.offset[number]) + skip
                _read_into(fd, [rows[i]], start, self.path)
        return rows if head.order == "<" else rows.byteswap()

    def _chunks(self, fd: int, head: _Head, number: int) -> Array:
        start = int(self.index.offset[number]) + head.data_start
        data = os.pread(fd, int(self.index.size[number]) - head.data_start, start)
        parts, place = [], 0
        for _ in range(head.chunks):
            (count,) = struct.unpack_from(head.order + "i", data, place)
            parts.append(np.frombuffer(data, head.order + "f8", count, place + 4))
            place += 4 + 8 * count
        joined = np.concatenate(parts).astype(np.float64, copy=False)
        return joined.reshape(head.n_atoms, head.width)


@dataclass(frozen=True)
class _Head:
    """The layout of a frame: what is the same in all frames of a run of them."""

    order: str
    n_atoms: int
    triclinic: int
    width: int
    columns: tuple[str, ...]
    chunks: int
    # Bytes from the frame's start to the first chunk, and to the next frame.
    data_start: int
    size: int
    # The header's bytes, to compare with; times and cells differ.
    raw: bytes
    time_at: int | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The fields of the header that differ between frames."""
        o = self.order
        vectors = self.triclinic == GENERAL_TRICLINIC
        start = _FIXED_SIZE
        names = ["step", "bounds", "tilts"]
        formats = [o + "i8", (o + "f8", (6,)), (o + "f8", (3,))]
        places = [_STEP_AT, start, start + 48]
        if vectors:
            names, places = ["step", "vectors"], [_STEP_AT, start]
            formats = [o + "i8", (o + "f8", (12,))]
        return np.dtype(
            {
                "names": names,
                "formats": formats,
                "offsets": places,
                "itemsize": self.data_start,
            }
        )


_STEP_AT = 8 + len(_MAGIC) + 8
# Up to the cell: magic, byte order, revision, step, atoms, triclinic, boundaries.
_FIXED_SIZE = _STEP_AT + 8 + 8 + 4 + 6 * 4


class _Cursor:
    """Reads numbers from a file at a place that moves on."""

    def __init__(self, fd: int, start: int, end: int, order: str) -> None:
        self.fd, self.place, self.end, self.order = fd, start, end, order
        self._data = os.pread(fd, min(_HEADER_BYTES, end - start), start)
        self._start = start

    def take(self, size: int) -> bytes:
        begin = self.place - self._start
        if self.place + size > self.end:
            raise _CutError
        if begin + size > len(self._data):
            self._data = os.pread(
                self.fd,
                min(max(size, _HEADER_BYTES), self.end - self.place),
                self.place,
            )
            self._start, begin = self.place, 0
            if len(self._data) < size:
                raise _CutError
        self.place += size
        return self._data[begin : begin + size]

    def unpack(self, code: str) -> tuple[Any, ...]:
        code = self.order + code
        return struct.unpack(code, self.take(struct.calcsize(code)))


def _read_head(fd: int, start: int, end: int, path: Path) -> _Head:
    not_a_dump = CorruptArtifactError(
        f"{path} is not a LAMMPS binary dump of revision 2",
        evidence={"byte": start},
        advice="write it with 'dump custom' to a name that ends in .bin",
    )
    cursor = _Cursor(fd, start, end, "<")
    begin = os.pread(fd, min(8 + len(_MAGIC), end - start), start)
    order = next(
        (o for o in "<>" if (struct.pack(o + "q", -10) + _MAGIC).startswith(begin)),
        None,
    )
    if order is None:
        raise not_a_dump
    cursor.order = order
    cursor.take(8 + len(_MAGIC))
    endian, revision = cursor.unpack("ii")
    if endian != 1 or revision < _REVISION_WITH_COLUMNS:
        raise CorruptArtifactError(
            f"{path}: byte order {endian:#x}, revision {revision} cannot be read"
        )
    _, n_atoms, triclinic = cursor.unpack("qqi")
    cursor.unpack("6i")  # boundary conditions
    cursor.unpack({0: "6d", 1: "9d", GENERAL_TRICLINIC: "12d"}.get(triclinic, "6d"))
    (width,) = cursor.unpack("i")
    (length,) = cursor.unpack("i")
    if not (
        triclinic in (0, 1, GENERAL_TRICLINIC)
        and n_atoms >= 0
        and 0 <= length <= _MAX_TEXT
        and 0 < width <= _MAX_COLUMNS
    ):
        raise not_a_dump
    cursor.take(length)  # unit style
    time_at = None
    if cursor.unpack("b")[0]:
        time_at = cursor.place - start
        cursor.unpack("d")
    (length,) = cursor.unpack("i")
    if not 0 <= length <= _MAX_TEXT * 16:
        raise not_a_dump
    columns = tuple(cursor.take(length).decode("ascii", "replace").split())
    (chunks,) = cursor.unpack("i")
    if len(columns) != width or not 0 <= chunks <= _MAX_CHUNKS:
        raise not_a_dump
    if missing := [name for name in ("id", "type") if name not in columns]:
        raise InputError(
            f"{path} was written without {', '.join(missing)}",
            evidence={"columns": list(columns)},
        )
    data_start = cursor.place - start
    values = 0
    for _ in range(chunks):
        (count,) = cursor.unpack("i")
        if count < 0:
            raise not_a_dump
        values += count
        cursor.place += 8 * count
        if cursor.place > end:
            raise _CutError
    if values != n_atoms * width:
        raise CorruptArtifactError(
            f"{path}: the frame at byte {start} does not hold {n_atoms} atoms",
            evidence={"values": values, "columns": width},
        )
    return _Head(
        order=order,
        n_atoms=n_atoms,
        triclinic=triclinic,
        width=width,
        columns=columns,
        chunks=chunks,
        data_start=data_start,
        size=cursor.place - start,
        raw=os.pread(fd, data_start, start),
        time_at=time_at,
    )


def _same_layout(fd: int, head: _Head, start: int, end: int) -> tuple[Integers, Array]:
    """Return steps and cells of this frame and those after it with the same layout.

    All frames of a simulation have the same size as a rule, so the next header is
    where this frame ends; every one is read and compared.
    """
    expected = np.frombuffer(head.raw, np.uint8)
    fixed = np.ones(head.data_start, bool)
    fixed[_STEP_AT : _STEP_AT + 8] = False
    n_cell = {0: 48, 1: 72}.get(head.triclinic, 96)
    fixed[_FIXED_SIZE : _FIXED_SIZE + n_cell] = False
    if head.time_at is not None:
        fixed[head.time_at : head.time_at + 8] = False
    found, total = [], (end - start) // head.size
    for first in range(0, total, _HEADERS_AT_ONCE):
        n = min(_HEADERS_AT_ONCE, total - first)
        raw, counts = bytearray(n * head.data_start), np.zeros(n, head.order + "i4")
        view = memoryview(raw)
        for i in range(n):
            at = i * head.data_start
            parts: list[Any] = [view[at : at + head.data_start]]
            if head.chunks:
                parts.append(counts[i : i + 1])
            os.preadv(fd, parts, start + (first + i) * head.size)
        table = np.frombuffer(raw, np.uint8).reshape(n, head.data_start)
        same = (table[:, fixed] == expected[fixed]).all(axis=1)
        if head.chunks == 1:
            same &= counts == head.n_atoms * head.width
        n_same = n if same.all() else int(np.argmin(same))
        records = np.frombuffer(raw, head.dtype, n_same)
        found.append(_cell_numbers(records, head))
        if n_same < n:
            break
    return np.concatenate([s for s, _ in found]), np.concatenate([c for _, c in found])


def _cell_numbers(records: NDArray[Any], head: _Head) -> tuple[Integers, Array]:
    steps = records["step"].astype(np.int64)
    if head.triclinic == GENERAL_TRICLINIC:
        return steps, records["vectors"].astype(np.float64)
    tilts = records["tilts"].astype(np.float64)
    if head.triclinic == 0:
        tilts = np.zeros_like(tilts)  # not in the file; these are other bytes
    return steps, np.concatenate([records["bounds"].astype(np.float64), tilts], axis=1)


def _runs(values: Integers) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the runs of equal values."""
    borders = (np.flatnonzero(np.diff(values)) + 1).tolist()
    if len(values):
        yield from itertools.pairwise([0, *borders, len(values)])


def _joined(parts: Sequence[Integers]) -> Integers:
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64, copy=False)


def _read_into(fd: int, parts: list[Any], offset: int, path: Path) -> None:
    for first in range(0, len(parts), _MAX_BUFFERS):
        chosen = [memoryview(p).cast("B") for p in parts[first : first + _MAX_BUFFERS]]
        wanted = sum(part.nbytes for part in chosen)
        got = 0
        while got < wanted:
            # A call moves at most 2 GiB.
            skip, rest = got, []
            for part in chosen:
                if skip < part.nbytes:
                    rest.append(part[skip:])
                skip = max(0, skip - part.nbytes)
            n = os.preadv(fd, rest, offset + got)
            if n == 0:
                raise CorruptArtifactError(f"{path} became shorter while it was read")
            got += n
        offset += wanted
