"""A training epoch against the published model and loop: same run, equal threads.

    python scripts/benchmarks/train.py --json train.json

The published model is that of the package cgcnn2 (64 channels, 3 convolutions, 128
units, batches of 256, SGD), its items are cached in memory, its collate function and
its training loop are used. Both models start from the same weights and see the same
batches; the largest relative difference of the loss of a step is told, between the two
in float32, and of each from the published model in float64: rounding alone takes either
away from that, and two curves in float32 cannot be closer to one another than that for
a reason. Times are wall
times of whole epochs, medians over rounds in which all candidates take turns.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from featurize import structures

from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn_format import graph_to_cgcnn, published_atom_features
from nanoos_fw.ml.cgcnn_format import published_element_vectors as element_vectors
from nanoos_fw.ml.fitting import Fit, FitData
from nanoos_fw.ml.graphs import CrystalGraph, build_graph
from nanoos_fw.ml.model_files import Architecture
from nanoos_fw.ml.training import PUBLISHED, TrainingConfig
from nanoos_fw.parallel import Communicator

PACKAGES = ("numpy", "numba", "torch", "cgcnn2")
_PUBLISHED, _EXACT = "published model and loop", "published, float64"


def make_data(count: int) -> tuple[list[CrystalGraph], FitData]:
    """Graphs of strained prototypes, and targets that depend on them."""
    graphs = [build_graph(s) for s in structures(count, 2, 60, seed=1, largest=3)]
    targets = np.array([g.distances.mean() + 0.02 * g.numbers.mean() for g in graphs])
    targets = (targets - targets.mean()) / targets.std()
    rows = np.arange(len(graphs))
    data = FitData(GraphTable.from_graphs(graphs), targets, rows, rows[:0], 1.0)
    return graphs, data


def new_fit(data: FitData, comm: Communicator, **changes: Any) -> Fit:
    """Return a fit with the published sizes and settings."""
    config = TrainingConfig(
        **{**PUBLISHED, "target": "energy_per_atom", "epochs": 1000, **changes}
    )
    vectors, _ = element_vectors()
    return Fit(config, Architecture(), vectors, data, 0, comm)


# ------------------------------------------------------------------ the published one


def published_model(fit: Fit) -> nn.Module:
    """Return cgcnn2's model with the weights of a fit."""
    from cgcnn2.model import CrystalGraphConvNet

    ours = fit.weights()
    model = CrystalGraphConvNet(92, 41, 64, 3, 128, 1)
    state = {}
    for name, value in model.state_dict().items():
        _, _, rest = name.partition(".")
        if name.startswith("convs."):
            layer, part = rest.split(".", 1)
            prefix = f"convolutions.{layer}."
            if part == "fc_full.weight":
                parts = ("centre", "neighbor", "edge")
                state[name] = torch.cat([ours[f"{prefix}{p}.weight"] for p in parts], 1)
            elif part == "fc_full.bias":
                state[name] = torch.zeros_like(value)
            elif part.startswith(("bn1", "bn2")):
                norm = "edge_norm" if part.startswith("bn1") else "atom_norm"
                ending = part.split(".")[1]
                state[name] = ours.get(f"{prefix}{norm}.{ending}", value)
        else:
            same = {"conv_to_fc": "dense", "fc_out": "output"}
            first, _, rest = name.partition(".")
            state[name] = ours[f"{same.get(first, first)}.{rest}"]
    model.load_state_dict(state)
    return model


def cached_items(graphs: list[CrystalGraph], targets: np.ndarray) -> list[Any]:
    """Return the items of the published dataset."""
    items = []
    for index, (graph, target) in enumerate(zip(graphs, targets, strict=True)):
        arrays = graph_to_cgcnn(graph, layout="padded")
        atoms = published_atom_features(arrays["atom_numbers"])
        items.append(
            (
                (
                    torch.from_numpy(atoms),
                    torch.from_numpy(np.array(arrays["nbr_fea"], dtype=np.float32)),
                    torch.from_numpy(np.array(arrays["nbr_fea_idx"], dtype=np.int64)),
                ),
                torch.tensor([target], dtype=torch.float32),
                str(index),
            )
        )
    return items


class Published:
    """The published loop: collate, forward, mean of squares, backward, SGD."""

    def __init__(self, fit: Fit, items: list[Any], precision: str = "float32") -> None:
        from cgcnn2.data import collate_pool

        self.collate, self.items, self.fit = collate_pool, items, fit
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.model = published_model(fit).to(self.dtype)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0
        )
        self.criterion = nn.MSELoss()
        self.cast = precision == "bfloat16"
        self.epoch = 0

    def run_epoch(self) -> list[float]:
        """Run an epoch over the batches of our own sampler; return the losses."""
        self.model.train()
        losses = []
        for rows in self.fit.batches(self.epoch):
            inputs, target, _ = self.collate([self.items[row] for row in rows])
            inputs = [self._precise(value) for value in inputs]
            with torch.autocast("cpu", torch.bfloat16, enabled=self.cast):
                output, _ = self.model(*inputs)
            loss = self.criterion(output.to(self.dtype), target.to(self.dtype))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        self.epoch += 1
        return losses

    def _precise(self, value: Any) -> Any:
        """Return numbers in this precision; indices as they are."""
        exact = self.dtype == torch.float64 and torch.is_tensor(value)
        return value.double() if exact and value.is_floating_point() else value


# ---------------------------------------------------------------------------- our own


class Ours:
    """Our own loop, epoch after epoch."""

    def __init__(self, fit: Fit, *, compiled: bool = True) -> None:
        self.fit = fit
        fit.network.compiled = fit.network.compiled and compiled

    def run_epoch(self) -> list[float]:
        """Run an epoch; return the mean loss of each step."""
        losses: list[float] = []
        step = self.fit._step

        def recorded(rows: np.ndarray, number: int, rate: float) -> tuple[float, ...]:
            sums = step(rows, number, rate)
            losses.append(sums[0] / len(rows))
            return sums

        self.fit._step = recorded
        self.fit.run_epoch(lambda: False)
        self.fit._step = step
        return losses


def loss_curves(
    runners: Mapping[str, Callable[[], list[float]]], epochs: int
) -> dict[str, np.ndarray]:
    """Return the loss of each step of some epochs, ``(steps,)`` by name."""
    return {
        name: np.array([loss for _ in range(epochs) for loss in run()])
        for name, run in runners.items()
    }


def distance(ours: np.ndarray, reference: np.ndarray) -> float:
    """Return the largest relative difference of the loss of a step."""
    assert ours.shape == reference.shape
    return float(np.max(np.abs(ours - reference) / np.abs(reference)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crystals", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="of the loss curves")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    graphs, data = make_data(arguments.crystals)
    items = cached_items(graphs, data.targets)
    alone = Communicator()

    def ours(**changes: Any) -> Ours:
        compiled = changes.pop("compiled", True)
        return Ours(new_fit(data, alone, **changes), compiled=compiled)

    start = new_fit(data, alone)
    candidates = {
        _PUBLISHED: Published(start, items),
        "published, bfloat16 autocast": Published(start, items, "bfloat16"),
        "float32, compiled passes": ours(),
        "float32, torch only": ours(compiled=False),
        "bfloat16, compiled passes": ours(precision="bfloat16"),
    }
    curves = loss_curves(
        {
            _PUBLISHED: Published(start, items).run_epoch,
            "float32, compiled passes": ours().run_epoch,
            "float32, torch only": ours(compiled=False).run_epoch,
            "bfloat16, compiled passes": ours(precision="bfloat16").run_epoch,
            _EXACT: Published(start, items, "float64").run_epoch,
            "float64, torch only": ours(precision="float64", compiled=False).run_epoch,
        },
        arguments.epochs,
    )
    from_published = {k: distance(v, curves[_PUBLISHED]) for k, v in curves.items()}
    from_exact = {k: distance(v, curves[_EXACT]) for k, v in curves.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for one in candidates.values():
        one.run_epoch()
    for _ in range(arguments.repeats):
        for name, one in candidates.items():
            begin = time.perf_counter()
            one.run_epoch()
            times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians[_PUBLISHED]
    atoms = int(data.table.graph_sizes.sum())
    print(f"{len(graphs)} crystals, {atoms} atoms, {len(data.table.neighbors)} edges, "
          f"{arguments.threads} threads")  # fmt: skip
    print(f"{'':30} {'s/epoch':>8} {'crystals/s':>10} {'ratio':>6}")
    for name, value in medians.items():
        print(f"{name:30} {value:8.3f} {len(graphs) / value:10.0f} {base / value:6.2f}")
    print(f"largest relative difference of the loss of a step, {arguments.epochs} "
          f"epochs, {len(curves[_EXACT])} steps")  # fmt: skip
    print(f"{'':30} {'from published, float32':>24} {'from published, float64':>24}")
    for name in curves:
        print(f"{name:30} {from_published[name]:24.1e} {from_exact[name]:24.1e}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {
                    "crystals": len(graphs),
                    "atoms": atoms,
                    "edges": len(data.table.neighbors),
                    "threads": arguments.threads,
                    "seconds_per_epoch": medians,
                    "all_seconds": times,
                    "ratio_to_published": {k: base / v for k, v in medians.items()},
                    "largest_relative_loss_difference": from_published,
                    "largest_relative_loss_difference_from_float64": from_exact,
                    "loss_curves": {k: v.tolist() for k, v in curves.items()},
                    "epochs_compared": arguments.epochs,
                    "load_average": os.getloadavg(),
                    "machine": platform.processor() or platform.machine(),
                    "versions": {n: importlib.metadata.version(n) for n in PACKAGES},
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
