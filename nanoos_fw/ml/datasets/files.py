"""Datasets as files: flat columns and a manifest, which is written last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.datasets.building import (
    GRAPHS_AT_ONCE,
    OUTLIER,
    PARTS,
    Dataset,
    Rows,
    checked_targets,
    facts_of,
)
from nanoos_fw.ml.datasets.config import DatasetConfig
from nanoos_fw.ml.graphs import CrystalGraph
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
from nanoos_fw.ml.splits import Leakage, find_leakage
from nanoos_fw.provenance import content_key, read_json, sha256_file, write_json

MANIFEST = "manifest.json"
# 1 had ids, parts and targets in the manifest; 2 has them in columns of their own.
_MANIFEST_VERSION = 2


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
    ids, values = checked_targets(targets, config)
    moments = None if times is None else tuple(times.get(name, "") for name in ids)
    rows = Rows()
    with ShardWriter(directory) as writer:
        rows.read(_in_order(graphs, ids), writer.append)
        facts = facts_of(ids, values, rows, config, moments)
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


def write_dataset(dataset: Dataset, directory: Path) -> dict[str, Any]:
    """Write a dataset as flat ``.npy`` files and a manifest, and return the manifest.

    Equal datasets give equal bytes. The manifest is written last: a directory
    without one is no dataset.
    """
    with ShardWriter(directory) as writer:
        for begin in range(0, len(dataset.graphs), GRAPHS_AT_ONCE):
            end = min(begin + GRAPHS_AT_ONCE, len(dataset.graphs))
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
