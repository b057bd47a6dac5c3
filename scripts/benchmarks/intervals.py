"""Coverage of prediction intervals on real structures.

Trains an ensemble on the energy per atom for each seed (a random split of 80/10/10),
and counts how many test structures the stated intervals hold. For the domain flag see
``domain.py``.

    python scripts/benchmarks/intervals.py data.extxyz.xz --seeds 3 -o out.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Structure

from nanoos_fw.ml.angles import edge_vectors
from nanoos_fw.ml.cgcnn import CGCNNModel
from nanoos_fw.ml.datasets import (
    Dataset,
    DatasetConfig,
    build_regression_dataset,
    open_dataset,
    write_dataset,
)
from nanoos_fw.ml.graphs import CrystalGraph, build_graphs
from nanoos_fw.ml.training import TrainingConfig, train_cgcnn_model
from nanoos_fw.provenance import package_versions
from nanoos_fw.structure_files import EntryFailure, read_structures

TARGET = "energy_per_atom"
LEVELS = (0.5, 0.68, 0.8, 0.9, 0.95)


Builder = Callable[[Iterable[Structure]], tuple[Sequence[CrystalGraph | None], Any]]


def read(
    path: Path, build: Builder = build_graphs
) -> tuple[dict[str, CrystalGraph], dict[str, float]]:
    entries = [e for e in read_structures(path) if not isinstance(e, EntryFailure)]
    graphs, _ = build(e.structure for e in entries)
    kept, targets = {}, {}
    for index, (entry, graph) in enumerate(zip(entries, graphs, strict=True)):
        if graph is not None and "energy" in entry.properties:
            kept[f"s{index:06d}"] = graph
            energy = entry.properties["energy"]
            targets[f"s{index:06d}"] = energy / len(entry.structure)
    return kept, targets


def with_vectors(
    structures: Iterable[Structure],
) -> tuple[list[CrystalGraph | None], Any]:
    """Build the graphs that networks on angles need."""
    crystals = list(structures)
    graphs, errors = build_graphs(crystals, cutoff_radius=5.0, max_neighbors=None)
    return [
        None
        if graph is None
        else replace(
            graph,
            vectors=edge_vectors(graph, crystal.frac_coords).astype(np.float32),
        )
        for graph, crystal in zip(graphs, crystals, strict=True)
    ], errors


def coverage(dataset: Dataset, checkpoint: str) -> dict[str, Any]:
    model = CGCNNModel("m", TARGET).load_from_checkpoint(checkpoint)
    test = dataset.part("test")
    graphs = [graph_of(test, row) for row in range(test.num_samples)]
    held, widths = {}, {}
    for level in LEVELS:
        found = model.predict_full(graphs, coverage=level)
        if found.half_width is None:
            continue
        inside = np.abs(found.mean - test.targets) <= found.half_width
        held[str(level)] = float(inside.mean())
        widths[str(level)] = float(found.half_width.mean())
    errors = np.abs(found.mean - test.targets)
    assert found.distance is not None
    return {
        "held": held,
        "mean_half_width": widths,
        "flagged": float(found.out_of_domain.mean()),
        "mae": float(errors.mean()),
        "rank_correlation_of_error_with_distance": rank_correlation(
            errors, found.distance
        ),
        "rank_correlation_of_error_with_std": None
        if found.std is None
        else rank_correlation(errors, found.std),
    }


def graph_of(dataset: Dataset, row: int) -> CrystalGraph:
    table = dataset.graphs
    one = table.batch([row])
    return CrystalGraph(
        numbers=one.numbers.astype(np.uint8),
        edge_index=one.edge_index.astype(np.int32),
        distances=one.distances.astype(np.float64),
        cutoff_radius=table.cutoff_radius,
        max_neighbors=table.max_neighbors,
    )


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args(arguments)
    graphs, targets = read(asked.data)
    answer: dict[str, Any] = {
        "structures": len(graphs),
        "epochs": asked.epochs,
        "members": asked.members,
        "machine": platform.platform(),
        "versions": package_versions(),
        "runs": [],
    }
    for seed in range(asked.seeds):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            config = DatasetConfig(target_property=TARGET, seed=seed, unit="eV/atom")
            write_dataset(
                build_regression_dataset(graphs, targets, config), place / "dataset"
            )
            dataset = open_dataset(place / "dataset")
            result = train_cgcnn_model(
                TARGET,
                TrainingConfig(
                    target=TARGET,
                    epochs=asked.epochs,
                    ensemble_size=asked.members,
                    seed=seed,
                ),
                dataset_dir=place / "dataset",
                work_dir=place / "work",
            )
            answer["runs"].append(
                {"seed": seed, **coverage(dataset, result.checkpoint)}
            )
        print(json.dumps(answer["runs"][-1]), flush=True)
    held = np.array([run["held"]["0.9"] for run in answer["runs"]])
    answer["mean_coverage_of_0.9"] = float(held.mean())
    print(json.dumps({k: v for k, v in answer.items() if k != "runs"}, indent=1))
    if asked.output:
        asked.output.write_text(json.dumps(answer, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
