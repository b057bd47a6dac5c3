"""Test error of the network on angles beside what needs no network, on real data.

    python scripts/benchmarks/line_graph.py --data structures.extxyz.xz --epochs 25

Energies per atom, 80 % of the structures for training, 10 % each for validation and
test, by a seeded permutation. All models see the same rows; ``composition`` is a linear
fit in the fractions of the elements, and the network and the last forest learn what it
leaves over.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from nanoos_fw.ml.forest import GraphScalars, fit_forest, graph_scalars
from nanoos_fw.ml.line_graph import line_graphs_of_crystals
from nanoos_fw.ml.line_graph_model import LineGraphModel, fit_line_graph
from nanoos_fw.ml.metrics import element_fractions, fit_element_reference
from nanoos_fw.ml.model_files import LineGraphArchitecture
from nanoos_fw.ml.training import TrainingConfig
from nanoos_fw.structure_files.reading import read_structures

TARGET = "energy_per_atom"


def some(scalars: GraphScalars, rows: np.ndarray) -> GraphScalars:
    return dataclasses.replace(scalars, values=scalars.values[rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="with energies, eV")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--structures", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    crystals, energies = [], []
    for entry in read_structures(arguments.data):
        energy = getattr(entry, "properties", {}).get("energy")
        if energy is not None and len(crystals) < arguments.structures:
            crystals.append(entry.structure)
            energies.append(energy / len(entry.structure))
    sizes = LineGraphArchitecture(kind="line_graph", gaussian_max=5.0, angle_cutoff=3.2)
    table, positions, errors = line_graphs_of_crystals(
        crystals, cutoff_radius=sizes.gaussian_max, angle_cutoff=sizes.angle_cutoff
    )
    assert table is not None
    targets = np.array(energies)[positions]
    n = len(table)
    order = np.random.default_rng(arguments.seed).permutation(n)
    train, val, test = np.split(order, [int(0.8 * n), int(0.8 * n) + int(0.1 * n)])
    fractions = element_fractions(table)
    linear = fractions @ fit_element_reference(fractions[train], targets[train])
    scalars = graph_scalars(table)

    def forest(values: np.ndarray) -> np.ndarray:
        fitted = fit_forest(some(scalars, train), values[train], arguments.seed)
        return fitted.predict_features(some(scalars, test))[0]

    predictions = {
        "mean": np.full(len(test), targets[train].mean()),
        "composition": linear[test],
        "random forest": forest(targets),
        "random forest on the rest": linear[test] + forest(targets - linear),
    }
    config = TrainingConfig(
        target=TARGET,
        epochs=arguments.epochs,
        batch_size=32,
        ensemble_size=1,
        learning_rate=3e-3,
        seed=arguments.seed,
    )
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        fit_line_graph(table, targets, train, val, config, sizes, path, unit="eV/atom")
        model = LineGraphModel("line graph", TARGET).load_from_checkpoint(path)
    seconds = time.perf_counter() - begin
    predictions["line graph"] = model.predict_rows(table.select(test))[0]
    report = {
        "structures": n,
        "without_graph": len(errors),
        "rows": {"train": len(train), "val": len(val), "test": len(test)},
        "seed": arguments.seed,
        "epochs": arguments.epochs,
        "fit_seconds": seconds,
        "test_mae_ev_per_atom": {
            name: float(np.abs(found - targets[test]).mean())
            for name, found in predictions.items()
        },
    }
    print(f"{n} structures, test MAE in eV/atom of {len(test)}:")
    for name, error in report["test_mae_ev_per_atom"].items():
        print(f"  {name:<28}{error:8.4f}")
    print(f"the network: {arguments.epochs} epochs in {seconds:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
