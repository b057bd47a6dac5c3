"""Candidates of files or a store in flat arrays on disk, of which workers take windows.

Reading a million CIF files once is slow; reading the first half of them again to get
at the second would be worse. A pack is written once, is memory-mapped by every worker,
and has a content key, so that nobody can screen another file under the same name.

An entry that cannot be read keeps its number, with no atoms and with its reason instead
of a crystal: of what went in, nothing is lost, and each has one outcome.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.crystals import element_symbol, encode_structure
from nanoos_fw.errors import CorruptArtifactError, InputError, MissingDependencyError
from nanoos_fw.ml.candidates import CandidateSource, PackSpec
from nanoos_fw.ml.graphs import CrystalArrays, read_arrays
from nanoos_fw.provenance import (
    content_key,
    read_json,
    sync_directory,
    sync_file,
    write_json,
)
from nanoos_fw.structure_files import StructureEntry, read_structures

_ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "numbers": ("u1", ()),
    "lattices": ("<f8", (3, 3)),
    "frac_coords": ("<f8", (3,)),
    "sizes": ("<i4", ()),
}
_LABELS, _MANIFEST = "labels.jsonl", "manifest.json"
_AT_ONCE, _ATOMS_AT_ONCE = 1000, 1 << 24
_SHOWN = 20


@dataclass(frozen=True)
class PackReport:
    """What was packed.

    Parameters
    ----------
    spec
        For a screening.
    count
        Entries of the pack, those that gave no crystal included.
    failures
        Entries that gave no crystal, and why; at most twenty. All are in the pack.
    n_failures
        How many there were.
    n_repeated
        Entries whose label an earlier one has; their numbers tell them apart.
    """

    spec: PackSpec
    count: int
    failures: list[dict[str, Any]]
    n_failures: int
    n_repeated: int


def write_pack(
    crystals: Iterable[tuple[str, Mapping[str, Any] | Exception]], directory: Path
) -> PackReport:
    """Write crystals into a new folder.

    Parameters
    ----------
    crystals
        Label, and document of :func:`nanoos_fw.crystals.encode_structure` or
        dictionary of pymatgen, or the error that stands in its place; read lazily.
    directory
        Must not exist.

    Raises
    ------
    InputError
        If the folder exists, or no crystal came.
    """
    if directory.exists():
        raise InputError(
            f"{directory} exists already", advice="give the pack a folder of its own"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    building = directory.parent / f".{directory.name}.{secrets.token_hex(8)}"
    building.mkdir()
    try:
        written = _Writer(building).write(crystals)
        if written.count == written.n_failures:
            raise InputError(
                "none of the entries is a crystal",
                evidence={"first": written.failures[:3]},
            )
        digests = {name: own.hexdigest() for name, own in written.hashes.items()}
        key = content_key("pack", {"count": written.count, "sha256": digests})
        write_json(
            building / _MANIFEST,
            {
                "key": key, "count": written.count, "sha256": digests,
                "n_failures": written.n_failures, "failures": written.failures,
            },
        )  # fmt: skip
        building.rename(directory)
        sync_directory(directory.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return PackReport(
        PackSpec(directory=str(directory.resolve()), key=key),
        written.count,
        written.failures,
        written.n_failures,
        written.n_repeated,
    )


def read_files(
    paths: Sequence[Path],
) -> Iterator[tuple[str, Mapping[str, Any] | Exception]]:
    """Yield the crystals of files and folders, one by one, for :func:`write_pack`.

    Whatever ``nanoos import`` reads, and Parquet with the columns ``numbers``,
    ``lattice`` (9 numbers, rows are vectors, Å), ``frac_coords`` (3 for each site) and
    maybe ``label``.
    """
    for path in paths:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
            continue
        for entry in read_structures(path):
            if isinstance(entry, StructureEntry):
                yield entry.label, encode_structure(entry.structure)
            else:
                yield entry.label, entry.error


def open_pack(directory: Path, key: str | None = None) -> CandidateSource:
    """Open a pack, memory-mapped.

    Raises
    ------
    InputError
        If there is none.
    CorruptArtifactError
        If it has another key, or its files do not have the sizes they were written
        with.
    """
    if not (directory / _MANIFEST).is_file():
        raise InputError(
            f"there is no pack of candidates in {directory}",
            advice="make it with 'nanoos screen pack'",
        )
    manifest = read_json(directory / _MANIFEST)
    if key not in (None, manifest["key"]):
        raise CorruptArtifactError(
            f"the pack in {directory} is another one than was screened",
            evidence={"key": manifest["key"], "key_expected": key},
        )
    return _Pack(directory, manifest)


# ------------------------------------------------------------------------- private


class _Pack(CandidateSource):
    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self._directory, self._manifest = directory, manifest
        arrays: dict[str, NDArray[Any]] = {}
        for name, (kind, shape) in _ARRAYS.items():
            flat = np.memmap(directory / f"{name}.bin", dtype=kind, mode="r")
            arrays[name] = flat.reshape(-1, *shape)
        self._arrays = arrays
        self._start = np.concatenate([[0], np.cumsum(arrays["sizes"], dtype=np.int64)])
        n_atoms = {len(arrays["numbers"]), len(arrays["frac_coords"])}
        n_crystals = {len(arrays["sizes"]), len(arrays["lattices"])}
        if n_atoms != {int(self._start[-1])} or n_crystals != {manifest["count"]}:
            raise CorruptArtifactError(
                f"the pack in {directory} is damaged",
                evidence={"atoms": sorted(n_atoms), "crystals": sorted(n_crystals)},
                advice="make it again with 'nanoos screen pack'",
            )

    def __len__(self) -> int:
        return int(self._manifest["count"])

    def identity(self) -> Mapping[str, Any]:
        return {"kind": "pack", "key": self._manifest["key"]}

    def elements(self) -> set[str]:
        counts = np.zeros(256, dtype=np.int64)
        numbers = self._arrays["numbers"]
        for start in range(0, len(numbers), _ATOMS_AT_ONCE):
            part = numbers[start : start + _ATOMS_AT_ONCE]
            counts += np.bincount(part, minlength=256)
        return {element_symbol(int(z)) for z in np.flatnonzero(counts)}

    def window(self, start: int, stop: int) -> CrystalArrays:
        if not 0 <= start < stop <= len(self):
            raise InputError(f"window [{start}, {stop}) is not within {len(self)}")
        atoms = slice(int(self._start[start]), int(self._start[stop]))
        sizes = self._arrays["sizes"][start:stop]
        there = np.flatnonzero(sizes)
        lattices = self._arrays["lattices"][start:stop][there]
        return CrystalArrays(
            numbers=np.array(self._arrays["numbers"][atoms]),
            lattices=np.array(lattices, dtype=np.float64),
            frac_coords=np.array(self._arrays["frac_coords"][atoms], dtype=np.float64),
            # Entries without atoms add nothing, so the others follow each other.
            atom_start=np.concatenate([[0], np.cumsum(sizes[there], dtype=np.int64)]),
            positions=there,
        )

    def unreadable(self, start: int, stop: int) -> NDArray[np.bool_]:
        return np.asarray(self._arrays["sizes"][start:stop] == 0)

    def label(self, index: int) -> str | None:
        found = self._entry(index)
        return str(found["label"] if isinstance(found, dict) else found)

    def failure(self, index: int) -> str | None:
        found = self._entry(index)
        return str(found["error"]) if isinstance(found, dict) else None

    def _entry(self, index: int) -> Any:
        """Return the line of an entry: its label, or label and error."""
        if not 0 <= index < len(self):
            raise InputError(f"entry {index} is not among the {len(self)}")
        data, ends = self._lines
        begin = 0 if index == 0 else int(ends[index - 1]) + 1
        return json.loads(data[begin : int(ends[index])].tobytes())

    @cached_property
    def _lines(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        data = np.memmap(self._directory / _LABELS, dtype=np.uint8, mode="r")
        ends = np.flatnonzero(data == ord("\n"))
        if len(ends) != len(self):
            raise CorruptArtifactError(
                f"the labels of the pack in {self._directory} are damaged",
                evidence={"lines": len(ends), "entries": len(self)},
                advice="make it again with 'nanoos screen pack'",
            )
        return data, ends


class _Writer:
    """Files of a pack that is being written, and what was counted on the way."""

    def __init__(self, folder: Path) -> None:
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in _ARRAYS}
        self._files["labels"] = (folder / _LABELS).open("wb")
        self.hashes = {name: hashlib.sha256() for name in self._files}
        self.failures: list[dict[str, Any]] = []
        self.count = self.n_failures = self.n_repeated = 0
        self._labels: set[int] = set()

    def write(
        self, crystals: Iterable[tuple[str, Mapping[str, Any] | Exception]]
    ) -> _Writer:
        waiting: list[tuple[str, Mapping[str, Any] | Exception]] = []
        try:
            for entry in crystals:
                waiting.append(entry)
                if len(waiting) == _AT_ONCE:
                    self._flush(waiting)
                    waiting = []
            self._flush(waiting)
        finally:
            for file in self._files.values():
                with file:
                    sync_file(file)
        return self

    def _flush(self, some: list[tuple[str, Mapping[str, Any] | Exception]]) -> None:
        places = [i for i, (_, c) in enumerate(some) if not isinstance(c, Exception)]
        crystals = [c for _, c in some if not isinstance(c, Exception)]
        flat, refused = read_arrays(crystals)
        errors = {i: c for i, (_, c) in enumerate(some) if isinstance(c, Exception)}
        errors |= {places[at]: error for at, error in refused.items()}
        readable = np.array(places, dtype=np.int64)[flat.positions]
        sizes = np.zeros(len(some), dtype=np.int32)
        sizes[readable] = np.diff(flat.atom_start)
        lattices = np.zeros((len(some), 3, 3))
        lattices[readable] = flat.lattices
        values: dict[str, NDArray[Any]] = {
            "numbers": flat.numbers,
            "lattices": lattices,
            "frac_coords": flat.frac_coords,
            "sizes": sizes,
        }
        for name, (kind, _) in _ARRAYS.items():
            self._append(name, values[name].astype(kind).tobytes())
        for at, (label, _) in enumerate(some):
            entry: Any = label
            if at in errors:
                entry = {"label": label, "error": str(errors[at])}
                self.n_failures += 1
                if len(self.failures) < _SHOWN:
                    self.failures.append({"number": self.count + at, **entry})
            self._append("labels", json.dumps(entry).encode() + b"\n")
            # A million labels as text would be the largest thing in memory.
            mark = hash(label)
            self.n_repeated += mark in self._labels
            self._labels.add(mark)
        self.count += len(some)

    def _append(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self.hashes[name].update(data)


def _read_parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | Exception]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet needs pyarrow", advice="pip install 'nanoos_fw[tables]'"
        ) from error
    index = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for batch in file.iter_batches(batch_size=_AT_ONCE):
            for row in batch.to_pylist():
                label = row.get("label")
                name = f"{path.stem}#{index}" if label is None else str(label)
                index += 1
                yield name, _document_of_row(row)
    except (OSError, pyarrow.ArrowException) as error:
        # Like any other damaged file: an entry, after which reading goes on.
        yield f"{path.stem}#{index}", InputError(f"cannot read {path}: {error}")


def _document_of_row(row: Mapping[str, Any]) -> Mapping[str, Any] | Exception:
    missing = {"numbers", "lattice", "frac_coords"} - row.keys()
    if missing:
        return InputError(f"there is no column {', '.join(sorted(missing))}")
    try:
        given = np.array(row["numbers"], dtype=np.float64).ravel()
        lattice = np.array(row["lattice"], dtype=np.float64).ravel()
        coords = np.array(row["frac_coords"], dtype=np.float64).ravel()
    except (TypeError, ValueError) as error:
        return InputError(f"a column of the row does not hold numbers: {error}")
    if not len(given) or not ((given >= 1) & (given <= 118)).all():
        return InputError("the row holds no atomic numbers")
    numbers = given.astype(np.uint8)
    if (numbers != given).any():
        odd = given[numbers != given][0]
        return InputError(f"{odd:g} is no atomic number")
    if len(lattice) != 9 or len(coords) != 3 * len(numbers):
        return InputError(
            f"the row has {len(lattice)} numbers of a lattice and {len(coords)} of "
            f"coordinates of {len(numbers)} sites"
        )
    return {
        "n_sites": len(numbers),
        "numbers": numbers.tobytes(),
        "lattice": lattice.astype("<f8").tobytes(),
        "frac_coords": coords.astype("<f8").tobytes(),
    }
