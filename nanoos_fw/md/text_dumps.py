"""Text LAMMPS dumps, plain or packed with gzip.

Read in a stream: no more than a frame is in memory. The first pass notes step, place
and cell of every whole frame.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.md.dump_frames import (
    Array,
    DumpIndex,
    FrameBlock,
    Integers,
    block_of_columns,
    boxes_of_bounds,
)

GZIP_MAGIC = b"\x1f\x8b"
ITEM, _STEP_ITEM = b"ITEM: ", b"ITEM: TIMESTEP\n"
_CHUNK_BYTES = 1 << 20


class TextDump:
    """A ``dump custom`` or ``dump atom`` text file, plain or packed with gzip.

    Raises
    ------
    CorruptArtifactError
        If the file is no text dump.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._packed = file.read(2).startswith(GZIP_MAGIC[:1])
        self._columns: dict[int, tuple[str, ...]] = {}
        self.index, self.matrix, self.origin = self._scan()

    def _open(self) -> BinaryIO:
        if self._packed:
            return gzip.open(self.path, "rb")  # type: ignore[return-value]
        return self.path.open("rb")

    def _scan(self) -> tuple[DumpIndex, Array, Array]:
        steps, counts, offsets, sizes = [], [], [], []
        matrices, origins = [np.empty((0, 3, 3))], [np.empty((0, 3))]
        is_cut = False
        for start, text, is_last in self._pieces():
            parsed = _text_head(text, self.path)
            if parsed is None:
                is_cut = True
                continue
            head, lines_start = parsed
            end = lines_start
            for _ in range(head.n_atoms if is_last else 0):
                end = text.find(b"\n", end) + 1 or len(text) + 1
            if text.count(b"\n", lines_start) < head.n_atoms:
                is_cut = True
                continue
            # The first words of a frame that does not go on.
            is_cut |= is_last and end < len(text)
            steps.append(head.step)
            counts.append(head.n_atoms)
            offsets.append(start)
            sizes.append(len(text))
            matrices.append(head.matrix[None])
            origins.append(head.origin[None])
        is_cut = is_cut or self._ended_early
        index = DumpIndex(
            np.array(steps, np.int64),
            np.array(counts, np.int64),
            np.array(offsets, np.int64),
            np.array(sizes, np.int64),
            is_cut,
        )
        return index, np.concatenate(matrices), np.concatenate(origins)

    def _pieces(self) -> Iterator[tuple[int, bytes, bool]]:
        """Yield offset and bytes of every frame, and whether it is the last."""
        self._ended_early = False
        buffer, start, begun, searched = bytearray(), 0, False, 0
        with self._open() as file:
            while data := self._more(file):
                buffer += data
                if not begun:
                    _check_begin(buffer, self.path)
                    if (place := buffer.find(_STEP_ITEM)) < 0:
                        continue
                    del buffer[:place]
                    start, begun = place, True
                # The next frame may begin in what was searched only in part.
                searched = max(len(_STEP_ITEM), searched - len(_STEP_ITEM))
                while (after := buffer.find(_STEP_ITEM, searched)) >= 0:
                    yield start, bytes(buffer[:after]), False
                    del buffer[:after]
                    start, searched = start + after, len(_STEP_ITEM)
                searched = len(buffer)
        if begun:
            yield start, bytes(buffer), True
        elif buffer:
            self._ended_early = True

    def _more(self, file: BinaryIO) -> bytes:
        try:
            data: bytes = file.read1(_CHUNK_BYTES)  # type: ignore[attr-defined]
        except (EOFError, zlib.error):
            self._ended_early = True
            return b""
        except gzip.BadGzipFile as error:
            if str(error).endswith("(b'\\x1f')"):  # half of the magic number
                self._ended_early = True
                return b""
            raise CorruptArtifactError(
                f"{self.path} cannot be unpacked: {error}"
            ) from error
        return data

    def blocks(
        self, frames: Integers, atoms: slice = slice(None)
    ) -> Iterator[FrameBlock]:
        """Yield frames by their number in the file, one at a time."""
        with self._open() as file:
            for number in frames:
                file.seek(int(self.index.offset[number]))
                text = file.read(int(self.index.size[number]))
                parsed = _text_head(text, self.path)
                if parsed is None:
                    raise CorruptArtifactError(f"{self.path} changed while it was read")
                head, lines_start = parsed
                rows, columns = _text_rows(text, lines_start, head, self.path)
                ids = rows[:, columns.index("id")].astype(np.int64)
                if (np.diff(ids) <= 0).any():
                    order = np.argsort(ids, kind="stable")
                    rows, ids = rows[order], ids[order]
                    if (np.diff(ids) == 0).any():
                        raise CorruptArtifactError(
                            f"{self.path} holds an atom twice in a frame"
                        )
                yield block_of_columns(
                    self.index.step[[number]],
                    self.matrix[[number]],
                    self.origin[[number]],
                    columns,
                    rows[None, atoms],
                    ids[atoms],
                )


def _check_begin(data: bytearray, path: Path) -> None:
    if not ITEM.startswith(bytes(data[: len(ITEM)])):
        raise CorruptArtifactError(
            f"{path} is not a LAMMPS dump", evidence={"begins": repr(bytes(data[:40]))}
        )


@dataclass(frozen=True)
class _TextHead:
    step: int
    n_atoms: int
    matrix: Array
    origin: Array
    columns: tuple[str, ...]


def _text_head(text: bytes, path: Path) -> tuple[_TextHead, int] | None:
    """Return the header of a frame and where its atoms begin; None if it is cut."""
    found: dict[str, list[str]] = {}
    place = 0
    while True:
        end = text.find(b"\n", place)
        if end < 0:
            return None
        line = text[place:end].decode("ascii", "replace")
        place = end + 1
        if not line.startswith("ITEM: "):
            raise CorruptArtifactError(
                f"{path}: {line[:60]!r} is not the line of a LAMMPS dump"
            )
        if line.startswith("ITEM: ATOMS"):
            columns = tuple(line.split()[2:])
            break
        lines = []
        for _ in range(3 if line.startswith("ITEM: BOX BOUNDS") else 1):
            end = text.find(b"\n", place)
            if end < 0:
                return None
            lines.append(text[place:end].decode("ascii", "replace"))
            place = end + 1
        found[line[6:].strip()] = lines
    try:
        step = int(found["TIMESTEP"][0])
        n_atoms = int(found["NUMBER OF ATOMS"][0])
        key = next(key for key in found if key.startswith("BOX BOUNDS"))
        box = np.array([row.split() for row in found[key]], dtype=np.float64)
    except (KeyError, StopIteration, ValueError) as error:
        raise CorruptArtifactError(
            f"{path} has a frame without step, number of atoms or box",
            evidence={"items": sorted(found)},
        ) from error
    if missing := [name for name in ("id", "type") if name not in columns]:
        raise InputError(
            f"{path} was written without {', '.join(missing)}",
            evidence={"columns": list(columns)},
        )
    if box.shape[1] == 4:
        matrix, origin = box[:, :3], box[:, 3]
    else:
        tilts = box[:, 2] if box.shape[1] == 3 else np.zeros(3)
        values = np.concatenate([box[:, :2].ravel(), tilts])
        matrices, origins = boxes_of_bounds(values[None], int(box.shape[1] == 3))
        matrix, origin = matrices[0], origins[0]
    return _TextHead(step, n_atoms, matrix, origin, columns), place


def _text_rows(
    text: bytes, start: int, head: _TextHead, path: Path
) -> tuple[Array, tuple[str, ...]]:
    """Return the numeric columns of a frame and their names."""
    width = len(head.columns)
    end = start
    body = text[start:]
    if body.count(b"\n") > head.n_atoms:
        # What follows belongs to the next frame (ITEM: TIME).
        end = body.find(b"ITEM:")
        body = body if end < 0 else body[:end]
    keep = [
        i for i, name in enumerate(head.columns) if name not in ("element", "typelabel")
    ]
    try:
        rows = np.loadtxt(
            io.BytesIO(body),
            usecols=keep,
            max_rows=head.n_atoms,
            ndmin=2,
            comments=None,
        )
    except ValueError as error:
        raise CorruptArtifactError(
            f"{path}: step {head.step} has a row that is not {width} numbers"
        ) from error
    if rows.shape != (head.n_atoms, len(keep)):
        raise CorruptArtifactError(
            f"{path}: step {head.step} does not hold {head.n_atoms} atoms"
        )
    return rows, tuple(head.columns[i] for i in keep)
