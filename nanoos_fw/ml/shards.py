"""Columns of a dataset as ``.npy`` files: written as they come, mapped when read.

A dataset has as many bytes as it has graphs, and a rank of a training, or the program
that builds it, has little memory. So the writer appends to files, and what is read
stays on disk, where the processes of a node share the pages.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.provenance import sha256_file

GRAPH_COLUMNS = (
    "numbers",
    "degrees",
    "neighbors",
    "distances",
    "atom_start",
    "edge_start",
)
OPTIONAL_COLUMNS = ("vectors",)
"""Of graphs that were packed with the vectors of their edges."""
ROW_COLUMNS = ("ids", "targets", "parts", "times")
PART_NAMES = ("train", "val", "test", "outlier")

# np.save leaves room for 21 digits of the length, so that all headers are this long.
_HEADER_BYTES = 128
_PARTIAL = ".partial"
_ROWS_AT_ONCE = 10_000
_NUMBERS_AT_ONCE = 1_000_000
_NARROW, _WIDE = np.dtype(np.int16), np.dtype(np.int32)


class MappedText(Sequence[str]):
    """Text of a column of fixed width, decoded when it is asked for."""

    def __init__(self, values: NDArray[np.bytes_]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(value.decode() for value in self._values[index].tolist())
        return bytes(self._values[index]).decode()

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), _ROWS_AT_ONCE):
            yield from self[begin : begin + _ROWS_AT_ONCE]

    def __eq__(self, other: object) -> Any:
        return _equal(self, other)

    __hash__ = None  # type: ignore[assignment]


class MappedParts(Sequence[str]):
    """The part of each row, kept as one byte."""

    def __init__(self, codes: NDArray[np.uint8]) -> None:
        self.codes = codes

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(PART_NAMES[code] for code in self.codes[index].tolist())
        return PART_NAMES[int(self.codes[index])]

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), _ROWS_AT_ONCE):
            yield from self[begin : begin + _ROWS_AT_ONCE]

    def count(self, value: Any) -> int:
        """Return the number of rows of a part."""
        if value not in PART_NAMES:
            return 0
        return int((self.codes == PART_NAMES.index(value)).sum())

    def __eq__(self, other: object) -> Any:
        return _equal(self, other)

    __hash__ = None  # type: ignore[assignment]


def _equal(ours: Sequence[str], other: object) -> Any:
    if isinstance(other, str) or not isinstance(other, Sequence):
        return NotImplemented
    return len(ours) == len(other) and all(
        a == b for a, b in zip(ours, other, strict=True)
    )


def text_column(values: Sequence[str]) -> NDArray[np.bytes_]:
    """Return text as UTF-8 of fixed width.

    Raises
    ------
    InputError
        If a text ends in a NUL, which a fixed width cannot keep.
    """
    encoded = [value.encode() for value in values]
    if any(value.endswith(b"\0") for value in encoded):
        raise InputError("an id of a dataset cannot end in a NUL character")
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")


def part_codes(parts: Sequence[str]) -> NDArray[np.uint8]:
    """Return parts as one byte each, the place in ``PART_NAMES``."""
    codes = {name: code for code, name in enumerate(PART_NAMES)}
    return np.array([codes[part] for part in parts], dtype=np.uint8)


def map_column(path: Path) -> NDArray[Any]:
    """Return a column, memory-mapped."""
    return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]


class ShardWriter:
    """Append graphs to the columns of a dataset; a context manager.

    Files carry the ending ``.partial`` until :meth:`finish`. Leaving the block without
    it removes them. The bytes are those of ``np.save``.

    Parameters
    ----------
    directory
        Made if it is not there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Two may build the same dataset at once.
        self._ending = f".{secrets.token_hex(4)}{_PARTIAL}"
        self._files: dict[str, BinaryIO] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._lengths: dict[str, int] = {}
        self._inner: dict[str, tuple[int, ...]] = {}
        self._atoms = self._edges = 0
        self._how: tuple[float, int | None, bool] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name, file in self._files.items():
            file.close()
            self._partial(name).unlink(missing_ok=True)

    def append(self, table: GraphTable) -> None:
        """Append graphs.

        Raises
        ------
        InputError
            If they were built in another way than those before.
        """
        how = (table.cutoff_radius, table.max_neighbors, table.vectors is not None)
        if self._how not in (None, how):
            raise InputError(
                "graphs built in different ways cannot be mixed",
                evidence={
                    "cutoff_radius, max_neighbors, vectors": [str(self._how), str(how)]
                },
                advice="featurize all structures with the same parameters",
            )
        first = self._how is None
        self._how = how
        for name in ("numbers", "degrees", "distances"):
            self.column(name, getattr(table, name))
        self._append_neighbors(table)
        if table.vectors is not None:
            self.column("vectors", table.vectors)
        for name, before in (("atom_start", self._atoms), ("edge_start", self._edges)):
            starts = getattr(table, name)
            self.column(name, (starts if first else starts[1:]) + before)
        self._atoms += int(table.atom_start[-1])
        self._edges += int(table.edge_start[-1])

    def _append_neighbors(self, table: GraphTable) -> None:
        """Append neighbours as 2 bytes each, or 4 if one crystal needs them."""
        wide = table.graph_sizes.max(initial=0) > np.iinfo(_NARROW).max
        if self._dtypes.get("neighbors", _NARROW) != _NARROW:
            wide = True
        elif wide and "neighbors" in self._files:
            self._widen_neighbors()
        dtype = _WIDE if wide else _NARROW
        self.column("neighbors", table.neighbors.astype(dtype, copy=False))

    def _widen_neighbors(self) -> None:
        """Write what is there of the neighbours anew: a crystal is too large for it."""
        narrow, length = self._files.pop("neighbors"), self._lengths.pop("neighbors")
        with narrow:
            # What is open can be written to, and no longer has a name.
            self._partial("neighbors").unlink()
            narrow.seek(_HEADER_BYTES)
            for begin in range(0, length, _NUMBERS_AT_ONCE):
                count = min(_NUMBERS_AT_ONCE, length - begin)
                some = np.frombuffer(narrow.read(count * _NARROW.itemsize), _NARROW)
                self.column("neighbors", some.astype(_WIDE))

    def column(self, name: str, values: NDArray[Any]) -> None:
        """Append values to a column; those of a row may be several.

        Raises
        ------
        ValueError
            If they are of another type or shape than those before, whose bytes would
            be read as theirs.
        """
        if name not in self._files:
            self._directory.mkdir(parents=True, exist_ok=True)
            file = self._partial(name).open("wb+")
            file.write(bytes(_HEADER_BYTES))
            self._files[name], self._dtypes[name] = file, values.dtype
            self._lengths[name], self._inner[name] = 0, values.shape[1:]
        before = (self._dtypes[name], self._inner[name])
        if before != (values.dtype, values.shape[1:]):
            raise ValueError(
                f"column {name} is {before}, not {(values.dtype, values.shape[1:])}"
            )
        self._files[name].write(np.ascontiguousarray(values).data)
        self._lengths[name] += len(values)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Put the files in their place; return SHA-256 and bytes by file name."""
        described = {}
        for name, file in self._files.items():
            file.seek(0)
            fields = {
                "descr": npy.dtype_to_descr(self._dtypes[name]),
                "fortran_order": False,
                "shape": (self._lengths[name], *self._inner[name]),
            }
            npy.write_array_header_1_0(file, fields)
            if file.tell() != _HEADER_BYTES:
                raise RuntimeError(f"numpy wrote a header of {file.tell()} bytes")
            file.flush()
            os.fsync(file.fileno())
            file.close()
            path = self._partial(name)
            described[f"{name}.npy"] = {
                "sha256": sha256_file(path),
                "bytes": path.stat().st_size,
            }
            path.replace(self._directory / f"{name}.npy")
        self._files.clear()
        return described

    def _partial(self, name: str) -> Path:
        return self._directory / f".{name}.npy{self._ending}"
