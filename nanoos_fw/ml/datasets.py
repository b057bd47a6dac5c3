"""Regression datasets: split, statistics, and checksummed memory-mapped files."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.graphs import CrystalGraph, pack_graph, read_header, unpack_graph
from nanoos_fw.ml.shards import (
    GRAPH_COLUMNS,
    OPTIONAL_COLUMNS,
    PART_NAMES,
    ROW_COLUMNS,
    MappedParts,
    MappedText,
    ShardWriter,
    map_column,
    part_codes,
    text_column,
)
from nanoos_fw.ml.splits import (
    Leakage,
    SplitStrategy,
    find_leakage,
    reduced_formulas,
    split_rows,
)
from nanoos_fw.provenance import (
    canonical_json,
    content_key,
    read_json,
    sha256_bytes,
    sha256_file,
    write_json,
)
from nanoos_fw.units import unit_of

MANIFEST = "manifest.json"
PARTS = ("train", "val", "test")
OUTLIER = "outlier"
"""Part of rows that the interquartile filter took out of the training part."""

_SCHEMA_VERSION = 1  # of DatasetConfig
# 1 had ids, parts and targets in the manifest; 2 has them in columns of their own.
_MANIFEST_VERSION = 2
_LATER_FIELDS = ("split", "n_folds", "fold", "mock_targets")
# Graphs that are in memory at once while a dataset is written.
_GRAPHS_AT_ONCE = 500
_ITEMS_AT_ONCE = 10_000


class DatasetConfig(BaseModel):
    """How a dataset is made of labelled graphs.

    Parameters
    ----------
    target_property
        Name of the target, such as ``"formation_energy_per_atom"``.
    train_fraction, val_fraction, test_fraction
        Shares of the rows; they add up to one.
    seed
        Chooses the split, together with the ids.
    min_samples
        Fewer rows are refused.
    iqr_factor
        Take rows out of the training part whose target is further than this many
        interquartile ranges from the quartiles (of the training part); None takes
        out none. Validation and test keep every row: they judge the model.
    unit
        Unit of the target; None looks it up in ``nanoos_fw.units``.
    split
        ``random``; ``composition`` keeps all rows of a reduced formula in one part;
        ``kfold`` and ``composition-kfold`` make the ``fold``-th of ``n_folds`` equal
        shares the test part (``test_fraction`` is not used) and divide the rest in
        the proportion of ``train_fraction`` to ``val_fraction``; ``time`` trains on
        the oldest rows and tests on the newest; ``stable`` lets a hash decide each row
        on its own, so that no row ever changes its part when others come, and the
        shares are met on average.
    mock_targets
        The targets are made up, to try a workflow out: what is trained on them
        predicts nothing and must never be activated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_property: str = Field(min_length=1)
    train_fraction: float = Field(default=0.8, gt=0.0, le=1.0)
    val_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    test_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    seed: int = Field(default=0, ge=0)
    min_samples: int = Field(default=10, ge=1)
    iqr_factor: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    unit: str | None = None
    split: SplitStrategy = "random"
    n_folds: int = Field(default=5, ge=2)
    fold: int = Field(default=0, ge=0)
    mock_targets: bool = False
    schema_version: int = Field(default=_SCHEMA_VERSION, ge=1, le=_SCHEMA_VERSION)

    @property
    def target_unit(self) -> str:
        """Unit of the target; empty if nobody has said it."""
        return unit_of(self.target_property) if self.unit is None else self.unit

    @model_validator(mode="after")
    def _fractions_add_up(self) -> DatasetConfig:
        total = self.train_fraction + self.val_fraction + self.test_fraction
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            raise ValueError(
                f"train, val and test fractions add up to {total:.6g}, not 1"
            )
        if self.fold >= self.n_folds:
            raise ValueError(f"fold {self.fold} is not below n_folds {self.n_folds}")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Keys of datasets and plans hash this: what is at its default is left out,
        # as it was before there was a choice.
        values: dict[str, Any] = handler(self)
        for name in _LATER_FIELDS:
            if values[name] == type(self).model_fields[name].default:
                del values[name]
        return values


@dataclass(frozen=True, eq=False)
class Dataset:
    """Graphs with targets, sorted by id.

    Parameters
    ----------
    config
        How the dataset was made.
    ids
        Structure ids of the ``n`` rows.
    targets
        ``(n,) float64`` in ``unit``.
    parts
        ``train``, ``val``, ``test`` or ``outlier`` of each row.
    graphs
        The graphs, in the order of ``ids``.
    target_mean, target_std
        Of the training part alone, whichever rows this object holds.
    outlier_bounds
        Lowest and highest target kept in the training part, or None without filter.
    dataset_hash
        Key of all that a training can depend on.
    times
        When each row came to be, ISO 8601 in UTC; None if that is not known.
    """

    config: DatasetConfig
    ids: Sequence[str]
    targets: NDArray[np.float64]
    parts: Sequence[str]
    graphs: GraphTable
    target_mean: float
    target_std: float
    outlier_bounds: tuple[float, float] | None
    dataset_hash: str
    times: Sequence[str] | None = None

    @property
    def num_samples(self) -> int:
        """Number of rows."""
        return len(self.ids)

    @property
    def unit(self) -> str:
        """Unit of the targets."""
        return self.config.target_unit

    @property
    def mock_targets(self) -> bool:
        """Whether the targets are made up."""
        return self.config.mock_targets

    @property
    def removed(self) -> tuple[tuple[str, float], ...]:
        """Id and target of the rows the filter took out of the training part."""
        return tuple(
            (self.ids[row], float(self.targets[row])) for row in self.rows(OUTLIER)
        )

    def rows(self, part: str) -> NDArray[np.int64]:
        """Return the row numbers of a part."""
        if isinstance(self.parts, MappedParts):
            code = PART_NAMES.index(part) if part in PART_NAMES else -1
            return np.flatnonzero(self.parts.codes == code)
        return np.flatnonzero(np.array(self.parts, dtype=object) == part)

    def part(self, part: str) -> Dataset:
        """Return a part as a dataset of its own, with the statistics of training.

        Raises
        ------
        InputError
            If there is no such part.
        """
        if part not in PART_NAMES:
            raise InputError(
                f"there is no part {part!r}", advice=f"parts: {', '.join(PART_NAMES)}"
            )
        rows = self.rows(part)
        return replace(
            self,
            ids=tuple(self.ids[row] for row in rows),
            targets=self.targets[rows],
            parts=(part,) * len(rows),
            graphs=self.graphs.select(rows),
            times=None if self.times is None else tuple(self.times[r] for r in rows),
        )


@dataclass(frozen=True, eq=False)
class TrainValSplit:
    """The three parts of a dataset; validation and test may be empty."""

    train: Dataset
    val: Dataset
    test: Dataset


def build_regression_dataset(
    graphs: Mapping[str, CrystalGraph | bytes],
    targets: Mapping[str, float],
    config: DatasetConfig,
    *,
    times: Mapping[str, str] | None = None,
) -> Dataset:
    """Make a dataset of graphs and targets.

    Parameters
    ----------
    graphs
        Graphs by structure id, packed or not. Those without target are left out.
    targets
        Target by structure id.
    config
        Split, filter, target.
    times
        When each structure came to be, ISO 8601 in UTC, by structure id: what the
        split by time goes by.

    Returns
    -------
    Dataset
        Independent of the order in which rows come in.

    Raises
    ------
    InputError
        If there are too few rows, a target is not finite or has no graph, the graphs
        were built in different ways, or training rows are missing or all alike.
    """
    ids, values = _checked_targets(targets, config, graphs)
    moments = None if times is None else tuple(times.get(name, "") for name in ids)
    tables: list[GraphTable] = []
    rows = _Rows()
    rows.read(((name, graphs[name]) for name in ids), tables.append)
    table = GraphTable.concatenate(tables)
    facts = _facts(ids, values, rows, config, moments)
    return Dataset(config=config, ids=ids, targets=values, graphs=table,
                   times=moments, **facts)  # fmt: skip


def write_regression_dataset(
    graphs: Iterable[tuple[str, CrystalGraph | bytes]],
    targets: Mapping[str, float],
    config: DatasetConfig,
    directory: Path,
    *,
    times: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], Leakage]:
    """Write a dataset while its graphs are read: few of them are ever in memory.

    Parameters
    ----------
    graphs
        Id and graph, sorted by id, of the ids that have a target. Read once.
    targets, config, times
        As in :func:`build_regression_dataset`, whose dataset this is.
    directory
        As in :func:`write_dataset`, which writes the same bytes.

    Returns
    -------
    manifest
        As written.
    leakage
        As of :func:`check_leakage`.

    Raises
    ------
    InputError
        As :func:`build_regression_dataset`, and if ids are missing or not sorted.
    """
    ids, values = _checked_targets(targets, config)
    moments = None if times is None else tuple(times.get(name, "") for name in ids)
    rows = _Rows()
    with ShardWriter(directory) as writer:
        rows.read(_in_order(graphs, ids), writer.append)
        facts = _facts(ids, values, rows, config, moments)
        cutoff_radius, max_neighbors = rows.how
        manifest = _finish(
            writer,
            directory,
            config,
            ids,
            values,
            moments,
            facts,
            cutoff_radius,
            max_neighbors,
        )
    leakage = find_leakage(ids, facts["parts"], rows.digests, rows.formulas)
    return manifest, leakage


def split_train_val(
    dataset: Dataset, config: DatasetConfig | None = None
) -> TrainValSplit:
    """Return training, validation and test part.

    Parameters
    ----------
    dataset
        Whole dataset.
    config
        Split anew by this one; None keeps the split of the dataset. A unit that it
        leaves out is that of the dataset.

    Raises
    ------
    InputError
        If the config is about other targets than those of the dataset, or as
        :func:`build_regression_dataset`.
    """
    if config is not None and config.unit is None:
        config = config.model_copy(update={"unit": dataset.config.unit})
    if config is not None and config != dataset.config:
        _refuse_other_targets(dataset.config, config)
        _check_number(dataset.num_samples, config)
        rows = _Rows(
            reduced_formulas(dataset.graphs),
            list(map(bytes.fromhex, graph_digests(dataset.graphs))),
        )
        facts = _facts(dataset.ids, dataset.targets, rows, config, dataset.times)
        dataset = replace(dataset, config=config, **facts)
    return TrainValSplit(*(dataset.part(part) for part in PARTS))


def _refuse_other_targets(old: DatasetConfig, new: DatasetConfig) -> None:
    """Let a split not make other targets of the same numbers, or real ones of mock."""
    for name in ("target_property", "target_unit", "mock_targets"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise InputError(
                f"the targets have {name} {before!r}, and cannot be split as if it "
                f"were {after!r}",
                advice="build another dataset",
            )


def check_leakage(dataset: Dataset) -> Leakage:
    """Return the structures and formulas that are in more than one part."""
    return find_leakage(
        dataset.ids,
        dataset.parts,
        graph_digests(dataset.graphs),
        reduced_formulas(dataset.graphs),
    )


# --------------------------------------------------------------------------- files


def write_dataset(dataset: Dataset, directory: Path) -> dict[str, Any]:
    """Write a dataset as flat ``.npy`` files and a manifest, and return the manifest.

    Equal datasets give equal bytes. The manifest is written last: a directory
    without one is no dataset.
    """
    with ShardWriter(directory) as writer:
        for begin in range(0, len(dataset.graphs), _GRAPHS_AT_ONCE):
            end = min(begin + _GRAPHS_AT_ONCE, len(dataset.graphs))
            writer.append(dataset.graphs.select(np.arange(begin, end)))
        facts = {
            "parts": dataset.parts,
            "target_mean": dataset.target_mean,
            "target_std": dataset.target_std,
            "outlier_bounds": dataset.outlier_bounds,
            "dataset_hash": dataset.dataset_hash,
        }
        return _finish(
            writer,
            directory,
            dataset.config,
            dataset.ids,
            dataset.targets,
            dataset.times,
            facts,
            dataset.graphs.cutoff_radius,
            dataset.graphs.max_neighbors,
        )


def open_dataset(directory: Path, *, verify: bool = True) -> Dataset:
    """Open a written dataset; its arrays stay on disk, memory-mapped.

    Parameters
    ----------
    directory
        Directory of :func:`write_dataset`.
    verify
        Compare the files with their checksums first; their sizes always.

    Raises
    ------
    InputError
        If there is no dataset.
    CorruptArtifactError
        If a file or the manifest is not what was written.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise InputError(
            f"{directory} holds no dataset: there is no {MANIFEST}",
            advice="build the dataset first",
        )
    manifest = read_json(path)
    recorded = manifest.pop("manifest_sha256", None)
    if recorded != content_key("dataset manifest", manifest):
        raise CorruptArtifactError(
            f"{path} was changed after it was written", advice="build it again"
        )
    version = manifest.get("schema_version")
    if version not in (1, _MANIFEST_VERSION):
        raise InputError(
            f"{path} has schema {version}; this release reads 1 to {_MANIFEST_VERSION}",
            advice="use the release that wrote it, or build the dataset again",
        )
    arrays = {}
    for file_name, described in manifest["files"].items():
        file = directory / file_name
        expected = described["sha256"]
        size = file.stat().st_size if file.exists() else None
        if size != described["bytes"] or (verify and sha256_file(file) != expected):
            raise CorruptArtifactError(
                f"{file} is missing or does not match the manifest",
                evidence={
                    "bytes": size,
                    "bytes_expected": described["bytes"],
                    "sha256_expected": expected,
                },
                advice="build the dataset again",
            )
        arrays[file.stem] = map_column(file)
    bounds = manifest["outlier_bounds"]
    if version == 1:
        old_times = manifest.get("times")
        rows: dict[str, Any] = {
            "ids": tuple(manifest["ids"]),
            "targets": np.array(manifest["targets"], dtype=np.float64),
            "parts": tuple(manifest["parts"]),
            "times": None if old_times is None else tuple(old_times),
        }
    else:
        rows = {
            "ids": MappedText(arrays["ids"]),
            "targets": arrays["targets"],
            "parts": MappedParts(arrays["parts"]),
            "times": MappedText(arrays["times"]) if "times" in arrays else None,
        }
    return Dataset(
        config=DatasetConfig(**manifest["config"]),
        graphs=GraphTable(
            **{name: arrays[name] for name in GRAPH_COLUMNS},
            cutoff_radius=manifest["cutoff_radius"],
            max_neighbors=manifest["max_neighbors"],
            vectors=arrays.get("vectors"),
        ),
        target_mean=manifest["target_mean"],
        target_std=manifest["target_std"],
        outlier_bounds=None if bounds is None else (bounds[0], bounds[1]),
        dataset_hash=manifest["dataset_hash"],
        **rows,
    )


def adopt_dataset(building: Path, directory: Path) -> None:
    """Move a dataset to the folder named by its hash, on the same file system.

    One that is there already stays: it is the same, and a training may have it open.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    if (directory / MANIFEST).exists():
        return
    try:
        building.rename(directory)
    except OSError:
        # The folder is there without a manifest, left by a build that was killed, or
        # another process was first.
        for path in sorted(building.glob("*.npy")):
            path.replace(directory / path.name)
        (building / MANIFEST).replace(directory / MANIFEST)


# ------------------------------------------------------------------------- private


class _Rows:
    """What is kept of each graph while many are read: formula and SHA-256.

    Parameters
    ----------
    formulas, digests
        Of the rows so far; equal formulas are one object.
    """

    def __init__(
        self, formulas: list[str] | None = None, digests: list[bytes] | None = None
    ) -> None:
        self.formulas = formulas or []
        self.digests = digests or []
        self.how: tuple[float, int | None] = (0.0, None)

    def read(
        self,
        graphs: Iterable[tuple[str, CrystalGraph | bytes]],
        take: Callable[[GraphTable], object],
    ) -> None:
        """Hand graphs on in tables of a few hundred."""
        known: dict[str, str] = {}
        source = iter(graphs)
        while some := list(itertools.islice(source, _GRAPHS_AT_ONCE)):
            # From the bytes, so that packed and unpacked input give the same dataset.
            blobs = [_packed(graph) for _, graph in some]
            self.digests += [hashlib.sha256(blob).digest() for blob in blobs]
            table = GraphTable.from_packed(blobs)
            self.how = (table.cutoff_radius, table.max_neighbors)
            self.formulas += [known.setdefault(f, f) for f in reduced_formulas(table)]
            take(table)


def _in_order(
    graphs: Iterable[tuple[str, CrystalGraph | bytes]], ids: Sequence[str]
) -> Iterator[tuple[str, CrystalGraph | bytes]]:
    number = 0
    for name, graph in graphs:
        if number == len(ids) or name != ids[number]:
            raise InputError(
                f"graph {number} is that of {name!r}, and the next target that of "
                f"{ids[number] if number < len(ids) else 'none'!r}",
                advice="give the graphs of all targets, sorted by id",
            )
        yield name, graph
        number += 1
    if number < len(ids):
        raise InputError(
            f"{len(ids) - number} structures with a target have no graph",
            evidence={"structure_ids": list(ids[number : number + 20])},
            advice="featurize them first",
        )


def _checked_targets(
    targets: Mapping[str, float],
    config: DatasetConfig,
    graphs: Mapping[str, Any] | None = None,
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Return sorted ids and their targets."""
    missing = [] if graphs is None else sorted(set(targets) - set(graphs))
    if missing:
        raise InputError(
            f"{len(missing)} structures with a target have no graph",
            evidence={"structure_ids": missing[:20]},
            advice="featurize them first",
        )
    ids = tuple(sorted(targets))
    _check_number(len(ids), config)
    values = np.array([targets[name] for name in ids], dtype=np.float64)
    strange = np.flatnonzero(~np.isfinite(values))
    if len(strange):
        raise InputError(
            f"{len(strange)} targets are not finite",
            evidence={"structure_ids": [ids[row] for row in strange[:20]]},
            advice="find out why those calculations gave no number",
        )
    return ids, values


def _check_number(n_rows: int, config: DatasetConfig) -> None:
    if n_rows < config.min_samples:
        raise InputError(
            f"{n_rows} labelled structures are fewer than min_samples = "
            f"{config.min_samples}",
            advice="label more structures or lower min_samples",
        )


def _packed(graph: CrystalGraph | bytes) -> bytes:
    """Return the bytes of a graph without geometry, however it comes."""
    if isinstance(graph, bytes):
        if not read_header(graph).has_geometry:
            return graph
        graph = unpack_graph(graph)
    return pack_graph(graph, vectors=graph.vectors is not None)


def graph_digests(table: GraphTable) -> list[str]:
    """Return the SHA-256 of the packed graph of each row."""
    digests = []
    for row in range(len(table)):
        batch = table.batch([row])
        graph = CrystalGraph(
            numbers=batch.numbers.astype(np.uint8),
            edge_index=batch.edge_index.astype(np.int32),
            distances=batch.distances.astype(np.float64),
            cutoff_radius=table.cutoff_radius,
            max_neighbors=table.max_neighbors,
            vectors=table.select([row]).vectors,
        )
        packed = pack_graph(graph, vectors=graph.vectors is not None)
        digests.append(sha256_bytes(packed))
    return digests


def _facts(
    ids: Sequence[str],
    targets: NDArray[np.float64],
    rows: _Rows,
    config: DatasetConfig,
    times: Sequence[str] | None,
) -> dict[str, Any]:
    """Return what follows from the rows: parts, statistics, bounds, hash."""
    parts = split_rows(ids, rows.formulas, times, config)
    train = np.array([part == "train" for part in parts])
    bounds = None
    if config.iqr_factor is not None:
        low, high = np.quantile(targets[train], [0.25, 0.75])
        if not high > low:
            raise InputError(
                f"half of the training targets of {config.target_property} are equal "
                f"({low}): their interquartile range finds no outliers",
                advice="leave out iqr_factor",
            )
        margin = config.iqr_factor * (high - low)
        bounds = (float(low - margin), float(high + margin))
        outside = train & ((targets < bounds[0]) | (targets > bounds[1]))
        for row in np.flatnonzero(outside):
            parts[row] = OUTLIER
        train &= ~outside
        if not train.any():
            raise InputError(
                f"all training targets of {config.target_property} are outliers by an "
                f"iqr_factor of {config.iqr_factor}",
                advice="raise iqr_factor; 1.5 is usual",
            )
    mean, std = float(targets[train].mean()), float(targets[train].std())
    if not np.ptp(targets[train]) > 0:  # the standard deviation rounds
        raise InputError(
            f"all {int(train.sum())} training targets of {config.target_property} "
            f"are equal ({mean})",
            advice="nothing can be learned: label more structures",
        )
    return {
        "parts": tuple(parts),
        "target_mean": mean,
        "target_std": std,
        "outlier_bounds": bounds,
        "dataset_hash": dataset_key(config, ids, targets, rows.digests, parts),
    }


def dataset_key(
    config: DatasetConfig,
    ids: Sequence[str],
    targets: NDArray[np.float64],
    digests: Sequence[bytes],
    parts: Sequence[str],
) -> str:
    """Return the key of all that a training can depend on.

    It is ``content_key("dataset", {config, graphs, ids, parts, targets})``, made
    piece by piece: as one text, a million rows would take gigabytes.
    """
    columns: dict[str, Iterator[list[Any]]] = {
        "graphs": ([d.hex() for d in some] for some in _pieces(digests)),
        "ids": (list(some) for some in _pieces(ids)),
        "parts": (list(some) for some in _pieces(parts)),
        "targets": (some.tolist() for some in _pieces(targets)),
    }
    settings = canonical_json(config.model_dump(mode="json"))
    digest = hashlib.sha256(
        f'{{"kind":"dataset","value":{{"config":{settings}'.encode()
    )
    for name, pieces in columns.items():
        digest.update(f',"{name}":['.encode())
        for number, piece in enumerate(pieces):
            text = json.dumps(piece, separators=(",", ":"), allow_nan=False)[1:-1]
            digest.update(f"{',' if number else ''}{text}".encode())
        digest.update(b"]")
    digest.update(b"}}")
    return digest.hexdigest()[:40]


def _pieces(values: Any) -> Iterator[Any]:
    for begin in range(0, len(values), _ITEMS_AT_ONCE):
        yield values[begin : begin + _ITEMS_AT_ONCE]


def _finish(
    writer: ShardWriter,
    directory: Path,
    config: DatasetConfig,
    ids: Sequence[str],
    targets: NDArray[np.float64],
    times: Sequence[str] | None,
    facts: Mapping[str, Any],
    cutoff_radius: float,
    max_neighbors: int | None,
) -> dict[str, Any]:
    """Write the columns of the rows, put all files in place, then the manifest."""
    parts = facts["parts"]
    codes = part_codes(parts)
    writer.column("ids", text_column(ids))
    writer.column("targets", np.asarray(targets, dtype="<f8"))
    writer.column("parts", codes)
    if times is not None:
        writer.column("times", text_column(times))
    path = directory / MANIFEST
    path.unlink(missing_ok=True)
    files = writer.finish()
    for name in {*ROW_COLUMNS, *OPTIONAL_COLUMNS} - {Path(file).stem for file in files}:
        (directory / f"{name}.npy").unlink(missing_ok=True)  # of what was there before
    bounds = facts["outlier_bounds"]
    removed = np.flatnonzero(codes == PART_NAMES.index(OUTLIER)).tolist()
    manifest: dict[str, Any] = {
        "schema_version": _MANIFEST_VERSION,
        "dataset_hash": facts["dataset_hash"],
        "config": config.model_dump(mode="json"),
        "mock_targets": config.mock_targets,
        "target_property": config.target_property,
        "unit": config.target_unit,
        "cutoff_radius": cutoff_radius,
        "max_neighbors": max_neighbors,
        "n_samples": len(ids),
        "counts": {
            part: int((codes == PART_NAMES.index(part)).sum())
            for part in (*PARTS, OUTLIER)
        },
        "target_mean": facts["target_mean"],
        "target_std": facts["target_std"],
        "outlier_bounds": None if bounds is None else list(bounds),
        "removed": [[ids[row], float(targets[row])] for row in removed],
        "files": files,
    }
    manifest["manifest_sha256"] = content_key("dataset manifest", manifest)
    write_json(path, manifest)
    return manifest
