"""Regression datasets: split, statistics, and checksummed memory-mapped files."""

from __future__ import annotations

from nanoos_fw.ml.datasets.building import (
    OUTLIER,
    PARTS,
    Dataset,
    TrainValSplit,
    build_regression_dataset,
    check_leakage,
    dataset_key,
    graph_digests,
    split_train_val,
)
from nanoos_fw.ml.datasets.config import DatasetConfig
from nanoos_fw.ml.datasets.files import (
    MANIFEST,
    adopt_dataset,
    open_dataset,
    write_dataset,
    write_regression_dataset,
)

__all__ = [
    "MANIFEST",
    "OUTLIER",
    "PARTS",
    "Dataset",
    "DatasetConfig",
    "TrainValSplit",
    "adopt_dataset",
    "build_regression_dataset",
    "check_leakage",
    "dataset_key",
    "graph_digests",
    "open_dataset",
    "split_train_val",
    "write_dataset",
    "write_regression_dataset",
]
