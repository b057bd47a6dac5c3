"""Candidates of files or a store in flat arrays on disk, of which workers take windows.

Reading a million CIF files once is slow; reading the first half of them again to get
at the second would be worse. A pack is written once, is memory-mapped by every worker,
and has a content key, so that nobody can screen another file under the same name.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.crystals import encode_structure
from nanoos_fw.errors import CorruptArtifactError, InputError, MissingDependencyError
from nanoos_fw.ml.candidates import CandidateSource, PackSpec
from nanoos_fw.ml.crystal_tables import read_crystals
from nanoos_fw.ml.graphs import CrystalArrays
from nanoos_fw.provenance import content_key, read_json, write_json
from nanoos_fw.structure_files import StructureEntry, read_structures

_ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {
    "numbers": ("u1", ()),
    "lattices": ("<f8", (3, 3)),
    "frac_coords": ("<f8", (3,)),
    "sizes": ("<i4", ()),
}
_LABELS, _MANIFEST = "labels.jsonl", "manifest.json"
_AT_ONCE = 1000
_SHOWN = 20


@dataclass(frozen=True)
class PackReport:
    """What was packed.

    Parameters
    ----------
    spec
        For a screening.
    count
        Crystals in the pack.
    failures
        Entries that gave no crystal, and why; at most twenty.
    n_failures
        How many there were.
    """

    spec: PackSpec
    count: int
    failures: list[dict[str, Any]]
    n_failures: int


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
        count, failures, digests = _fill(crystals, building)
        if not count:
            raise InputError(
                "none of the entries is a crystal", evidence={"first": failures[:3]}
            )
        key = content_key("pack", {"count": count, "sha256": digests})
        write_json(
            building / _MANIFEST,
            {
                "key": key, "count": count, "sha256": digests,
                "n_failures": len(failures), "failures": failures[:_SHOWN],
            },
        )  # fmt: skip
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    spec = PackSpec(directory=str(directory.resolve()), key=key)
    return PackReport(spec, count, failures[:_SHOWN], len(failures))


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


def pack_labels(directory: Path) -> list[str]:
    """Return the labels of a pack, in its order."""
    with (directory / _LABELS).open() as lines:
        return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------- private


class _Pack(CandidateSource):
    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self._manifest = manifest
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

    def window(self, start: int, stop: int) -> CrystalArrays:
        if not 0 <= start < stop <= len(self):
            raise InputError(f"window [{start}, {stop}) is not within {len(self)}")
        atoms = slice(int(self._start[start]), int(self._start[stop]))
        return CrystalArrays(
            numbers=np.array(self._arrays["numbers"][atoms]),
            lattices=np.array(self._arrays["lattices"][start:stop], dtype=np.float64),
            frac_coords=np.array(self._arrays["frac_coords"][atoms], dtype=np.float64),
            atom_start=self._start[start : stop + 1] - self._start[start],
            positions=np.arange(stop - start),
        )


def _fill(
    crystals: Iterable[tuple[str, Mapping[str, Any] | Exception]], folder: Path
) -> tuple[int, list[dict[str, Any]], dict[str, str]]:
    failures: list[dict[str, Any]] = []
    count = 0
    hashes = {name: hashlib.sha256() for name in (*_ARRAYS, "labels")}
    files = {name: (folder / f"{name}.bin").open("wb") for name in _ARRAYS}
    files["labels"] = (folder / _LABELS).open("wb")

    def append(name: str, data: bytes) -> None:
        files[name].write(data)
        hashes[name].update(data)

    def flush(some: list[tuple[str, Mapping[str, Any]]]) -> int:
        errors: dict[int, Any] = {}
        flat = read_crystals([crystal for _, crystal in some], 0, errors)
        failures.extend(
            {"label": some[at][0], "error": str(error)} for at, error in errors.items()
        )
        values: dict[str, NDArray[Any]] = {
            "numbers": flat.numbers,
            "lattices": flat.lattices,
            "frac_coords": flat.frac_coords,
            "sizes": np.diff(flat.atom_start),
        }
        for name, (kind, _) in _ARRAYS.items():
            append(name, values[name].astype(kind).tobytes())
        for at in flat.positions.tolist():
            append("labels", json.dumps(some[at][0]).encode() + b"\n")
        return len(flat.positions)

    try:
        waiting: list[tuple[str, Mapping[str, Any]]] = []
        for label, crystal in crystals:
            if isinstance(crystal, Exception):
                failures.append({"label": label, "error": str(crystal)})
                continue
            waiting.append((label, crystal))
            if len(waiting) == _AT_ONCE:
                count += flush(waiting)
                waiting = []
        count += flush(waiting)
    finally:
        for file in files.values():
            file.close()
    return count, failures, {name: own.hexdigest() for name, own in hashes.items()}


def _read_parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | Exception]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet needs pyarrow", advice="pip install 'nanoos_fw[tables]'"
        ) from error
    file = pyarrow.parquet.ParquetFile(path)
    needed = {"numbers", "lattice", "frac_coords"}
    missing = needed - set(file.schema_arrow.names)
    if missing:
        raise InputError(f"{path} has no columns {', '.join(sorted(missing))}")
    index = 0
    for batch in file.iter_batches(batch_size=_AT_ONCE):
        for row in batch.to_pylist():
            label = str(row.get("label") or f"{path.stem}#{index}")
            index += 1
            numbers = np.array(row["numbers"] or [], dtype=np.int64)
            if (numbers < 1).any() or (numbers > 118).any():
                yield label, InputError(f"{label} holds no atomic numbers")
                continue
            yield (
                label,
                {
                    "n_sites": len(numbers),
                    "numbers": numbers.astype(np.uint8).tobytes(),
                    "lattice": np.array(row["lattice"], dtype="<f8").tobytes(),
                    "frac_coords": np.array(row["frac_coords"], "<f8").tobytes(),
                },
            )
