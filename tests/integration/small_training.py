"""A dataset and a configuration that a training takes a second for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Lattice, Structure

from nanoos_fw.ml.angles import edge_vectors
from nanoos_fw.ml.datasets import (
    DatasetConfig,
    build_regression_dataset,
    write_dataset,
)
from nanoos_fw.ml.graphs import build_graph
from nanoos_fw.ml.training import TrainingConfig

TARGET = "energy_per_atom"


def write_small_dataset(directory: Path, *, vectors: bool = False) -> Path:
    """Write 29 crystals of unequal sizes, 20 of them to train on.

    ``vectors``: with all neighbours within 5 Å and the vectors of the edges.
    """
    rng = np.random.default_rng(11)
    graphs, targets = {}, {}
    for i in range(29):
        a, b = rng.choice(["Al", "Ni", "Ti", "Fe"], 2, replace=False)
        cell = Lattice.tetragonal(*(2.8 + 0.6 * rng.random(2)))
        structure = Structure(cell, [a, b], [[0, 0, 0], [0.5, 0.5, 0.5]])
        structure *= (1 + i % 3, 1, 1)
        graph = build_graph(structure)
        if vectors:
            graph = build_graph(structure, cutoff_radius=5.0, max_neighbors=None)
            steps = edge_vectors(graph, structure.frac_coords)
            graph = replace(graph, vectors=steps.astype(np.float32))
        graphs[f"s{i:02d}"] = graph
        targets[f"s{i:02d}"] = float(rng.normal() + graphs[f"s{i:02d}"].distances[0])
    config = DatasetConfig(
        target_property=TARGET, train_fraction=0.7, val_fraction=0.2, test_fraction=0.1
    )
    write_dataset(build_regression_dataset(graphs, targets, config), directory)
    return directory


def config(**changes: Any) -> TrainingConfig:
    """Return a small configuration: 3 steps an epoch."""
    fields = {
        "target": TARGET,
        "epochs": 5,
        "batch_size": 6,
        "hidden_dim": 16,
        "readout_dim": 16,
        "ensemble_size": 1,
        "schedule": "constant",
        "forest_baseline": False,
    }
    return TrainingConfig(**{**fields, **changes})
