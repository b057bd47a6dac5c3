"""Regression datasets: split, statistics, and checksummed memory-mapped files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
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
from nanoos_fw.ml.graphs import CrystalGraph, pack_graph, unpack_graph
from nanoos_fw.ml.splits import (
    Leakage,
    SplitStrategy,
    find_leakage,
    reduced_formulas,
    split_rows,
)
from nanoos_fw.provenance import (
    content_key,
    read_json,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
)
from nanoos_fw.units import unit_of

MANIFEST = "manifest.json"
PARTS = ("train", "val", "test")
OUTLIER = "outlier"
"""Part of rows that the interquartile filter took out of the training part."""

_SCHEMA_VERSION = 1
_LATER_FIELDS = ("split", "n_folds", "fold")
_SHARDS = (
    "numbers",
    "degrees",
    "neighbors",
    "distances",
    "atom_start",
    "edge_start",
)


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
        the oldest rows and tests on the newest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_property: str = Field(min_length=1)
    train_fraction: float = Field(default=0.8, gt=0.0, le=1.0)
    val_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    test_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    seed: int = Field(default=0, ge=0)
    min_samples: int = Field(default=10, ge=1)
    iqr_factor: float | None = Field(default=None, gt=0.0)
    unit: str | None = None
    split: SplitStrategy = "random"
    n_folds: int = Field(default=5, ge=2)
    fold: int = Field(default=0, ge=0)
    schema_version: int = Field(default=_SCHEMA_VERSION, ge=1, le=_SCHEMA_VERSION)

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
    ids: tuple[str, ...]
    targets: NDArray[np.float64]
    parts: tuple[str, ...]
    graphs: GraphTable
    target_mean: float
    target_std: float
    outlier_bounds: tuple[float, float] | None
    dataset_hash: str
    times: tuple[str, ...] | None = None

    @property
    def num_samples(self) -> int:
        """Number of rows."""
        return len(self.ids)

    @property
    def unit(self) -> str:
        """Unit of the targets."""
        if self.config.unit is not None:
            return self.config.unit
        return unit_of(self.config.target_property)

    @property
    def removed(self) -> tuple[tuple[str, float], ...]:
        """Id and target of the rows the filter took out of the training part."""
        return tuple(
            (self.ids[row], float(self.targets[row])) for row in self.rows(OUTLIER)
        )

    def rows(self, part: str) -> NDArray[np.int64]:
        """Return the row numbers of a part."""
        return np.flatnonzero(np.array(self.parts, dtype=object) == part)

    def part(self, part: str) -> Dataset:
        """Return a part as a dataset of its own, with the statistics of training."""
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
    missing = sorted(set(targets) - set(graphs))
    if missing:
        raise InputError(
            f"{len(missing)} structures with a target have no graph",
            evidence={"structure_ids": missing[:20]},
            advice="featurize them first",
        )
    ids = tuple(sorted(targets))
    if len(ids) < config.min_samples:
        raise InputError(
            f"{len(ids)} labelled structures are fewer than min_samples = "
            f"{config.min_samples}",
            advice="label more structures or lower min_samples",
        )
    values = np.array([targets[name] for name in ids], dtype=np.float64)
    strange = [
        name for name, ok in zip(ids, np.isfinite(values), strict=True) if not ok
    ]
    if strange:
        raise InputError(
            f"{len(strange)} targets are not finite",
            evidence={"structure_ids": strange[:20]},
            advice="find out why those calculations gave no number",
        )
    packed = (_packed(graphs[name]) for name in ids)
    digests, opened = [], []
    for data in packed:
        digests.append(sha256_bytes(data))
        # From the bytes, so that packed and unpacked input give the same dataset.
        opened.append(unpack_graph(data))
    moments = None if times is None else tuple(times.get(name, "") for name in ids)
    table = GraphTable.from_graphs(opened)
    return _assemble(ids, values, table, digests, config, moments)


def split_train_val(
    dataset: Dataset, config: DatasetConfig | None = None
) -> TrainValSplit:
    """Return training, validation and test part.

    Parameters
    ----------
    dataset
        Whole dataset.
    config
        Split anew by this one; None keeps the split of the dataset.
    """
    if config is not None and config != dataset.config:
        digests = graph_digests(dataset.graphs)
        dataset = _assemble(
            dataset.ids, dataset.targets, dataset.graphs, digests, config, dataset.times
        )
    return TrainValSplit(*(dataset.part(part) for part in PARTS))


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
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    files: dict[str, dict[str, Any]] = {}
    for name in _SHARDS:
        data = _npy(getattr(dataset.graphs, name))
        write_atomic(directory / f"{name}.npy", data)
        files[f"{name}.npy"] = {"sha256": sha256_bytes(data), "bytes": len(data)}
    manifest: dict[str, Any] = {
        "schema_version": _SCHEMA_VERSION,
        "dataset_hash": dataset.dataset_hash,
        "config": dataset.config.model_dump(mode="json"),
        "target_property": dataset.config.target_property,
        "unit": dataset.unit,
        "cutoff_radius": dataset.graphs.cutoff_radius,
        "max_neighbors": dataset.graphs.max_neighbors,
        "n_samples": dataset.num_samples,
        "counts": {p: dataset.parts.count(p) for p in (*PARTS, OUTLIER)},
        "target_mean": dataset.target_mean,
        "target_std": dataset.target_std,
        "outlier_bounds": (
            None if dataset.outlier_bounds is None else list(dataset.outlier_bounds)
        ),
        "ids": list(dataset.ids),
        "parts": list(dataset.parts),
        "targets": dataset.targets.tolist(),
        "files": files,
    }
    if dataset.times is not None:
        manifest["times"] = list(dataset.times)
    manifest["manifest_sha256"] = content_key("dataset manifest", manifest)
    write_json(directory / MANIFEST, manifest)
    return manifest


def open_dataset(directory: Path, *, verify: bool = True) -> Dataset:
    """Open a written dataset; its arrays stay on disk, memory-mapped.

    Parameters
    ----------
    directory
        Directory of :func:`write_dataset`.
    verify
        Compare the files with their checksums first.

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
    arrays = {}
    for name in _SHARDS:
        file = directory / f"{name}.npy"
        expected = manifest["files"][file.name]["sha256"]
        if not file.exists() or (verify and sha256_file(file) != expected):
            raise CorruptArtifactError(
                f"{file} is missing or does not match the manifest",
                evidence={"sha256_expected": expected},
                advice="build the dataset again",
            )
        arrays[name] = np.load(file, mmap_mode="r", allow_pickle=False)
    bounds = manifest["outlier_bounds"]
    times = manifest.get("times")
    return Dataset(
        config=DatasetConfig(**manifest["config"]),
        ids=tuple(manifest["ids"]),
        targets=np.array(manifest["targets"], dtype=np.float64),
        parts=tuple(manifest["parts"]),
        graphs=GraphTable(
            **arrays,
            cutoff_radius=manifest["cutoff_radius"],
            max_neighbors=manifest["max_neighbors"],
        ),
        target_mean=manifest["target_mean"],
        target_std=manifest["target_std"],
        outlier_bounds=None if bounds is None else (bounds[0], bounds[1]),
        dataset_hash=manifest["dataset_hash"],
        times=None if times is None else tuple(times),
    )


# ------------------------------------------------------------------------- private


def _packed(graph: CrystalGraph | bytes) -> bytes:
    """Return the distances-only bytes of a graph, however it comes."""
    opened = unpack_graph(graph) if isinstance(graph, bytes) else graph
    return pack_graph(opened)


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
        )
        digests.append(sha256_bytes(pack_graph(graph)))
    return digests


def _assemble(
    ids: tuple[str, ...],
    targets: NDArray[np.float64],
    graphs: GraphTable,
    digests: list[str],
    config: DatasetConfig,
    times: tuple[str, ...] | None,
) -> Dataset:
    parts = split_rows(ids, graphs, times, config)
    train = np.array([part == "train" for part in parts])
    bounds = None
    if config.iqr_factor is not None:
        low, high = np.quantile(targets[train], [0.25, 0.75])
        margin = config.iqr_factor * (high - low)
        bounds = (float(low - margin), float(high + margin))
        outside = train & ((targets < bounds[0]) | (targets > bounds[1]))
        for row in np.flatnonzero(outside):
            parts[row] = OUTLIER
        train &= ~outside
    mean, std = float(targets[train].mean()), float(targets[train].std())
    if not np.ptp(targets[train]) > 0:  # the standard deviation rounds
        raise InputError(
            f"all {int(train.sum())} training targets of {config.target_property} "
            f"are equal ({mean})",
            advice="nothing can be learned: label more structures",
        )
    key = content_key(
        "dataset",
        {
            "config": config.model_dump(mode="json"),
            "ids": ids,
            "targets": targets.tolist(),
            "graphs": digests,
            "parts": parts,
        },
    )
    return Dataset(
        config=config,
        ids=ids,
        targets=targets,
        parts=tuple(parts),
        graphs=graphs,
        target_mean=mean,
        target_std=std,
        outlier_bounds=bounds,
        dataset_hash=key,
        times=times,
    )


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
