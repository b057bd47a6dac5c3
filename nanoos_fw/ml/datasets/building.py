"""Datasets in memory: which rows, in which part, and what follows from them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.datasets.config import DatasetConfig
from nanoos_fw.ml.graphs import CrystalGraph, pack_graph, read_header, unpack_graph
from nanoos_fw.ml.shards import PART_NAMES, MappedParts
from nanoos_fw.ml.splits import Leakage, find_leakage, reduced_formulas, split_rows
from nanoos_fw.provenance import canonical_json, sha256_bytes

PARTS = ("train", "val", "test")
OUTLIER = "outlier"
"""Part of rows that the interquartile filter took out of the training part."""

GRAPHS_AT_ONCE = 500
"""Graphs that are in memory at once while a dataset is made."""
_ITEMS_AT_ONCE = 10_000


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
    ids, values = checked_targets(targets, config, graphs)
    moments = None if times is None else tuple(times.get(name, "") for name in ids)
    tables: list[GraphTable] = []
    rows = Rows()
    rows.read(((name, graphs[name]) for name in ids), tables.append)
    table = GraphTable.concatenate(tables)
    facts = facts_of(ids, values, rows, config, moments)
    return Dataset(config=config, ids=ids, targets=values, graphs=table,
                   times=moments, **facts)  # fmt: skip


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
        rows = Rows(
            reduced_formulas(dataset.graphs),
            list(map(bytes.fromhex, graph_digests(dataset.graphs))),
        )
        facts = facts_of(dataset.ids, dataset.targets, rows, config, dataset.times)
        dataset = replace(dataset, config=config, **facts)
    return TrainValSplit(*(dataset.part(part) for part in PARTS))


def check_leakage(dataset: Dataset) -> Leakage:
    """Return the structures and formulas that are in more than one part."""
    return find_leakage(
        dataset.ids,
        dataset.parts,
        graph_digests(dataset.graphs),
        reduced_formulas(dataset.graphs),
    )


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


class Rows:
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
        while some := list(itertools.islice(source, GRAPHS_AT_ONCE)):
            # From the bytes, so that packed and unpacked input give the same dataset.
            blobs = [_packed(graph) for _, graph in some]
            self.digests += [hashlib.sha256(blob).digest() for blob in blobs]
            table = GraphTable.from_packed(blobs)
            self.how = (table.cutoff_radius, table.max_neighbors)
            self.formulas += [known.setdefault(f, f) for f in reduced_formulas(table)]
            take(table)


def checked_targets(
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


def facts_of(
    ids: Sequence[str],
    targets: NDArray[np.float64],
    rows: Rows,
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


# ------------------------------------------------------------------------- private


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


def _pieces(values: Any) -> Iterator[Any]:
    for begin in range(0, len(values), _ITEMS_AT_ONCE):
        yield values[begin : begin + _ITEMS_AT_ONCE]
