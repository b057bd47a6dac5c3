"""What the out-of-domain flag finds, where a chemistry was left out of the training.

    python scripts/benchmarks/domain.py data.extxyz.xz --epochs 25 --json domain.json

For each kind of structures (oxides, halides, alkali metals, oxides of 3d metals,
loosely packed ones): all of them are left out, an ensemble is trained on 80 % of the
others, and 10 % each judge and test it. Told is the share of the left-out and of the
test part that is flagged, by an unseen element or by distance alone, and the mean
absolute error of those that the distance flags over that of those it does not.
``strained`` is the test part with all lengths times 0.9, 1.1 and 1.2, of which no
energy is known.

Distances: ``descriptors``, which the models use (mean distance to the nearest training
structures in composition and coordination), and beside it ``latent``, the Mahalanobis
distance in the pooled vectors of all members, and ``either``: the larger of both, each
over what a twentieth of the training part is beyond. All have a conformal threshold on
the validation part, so that each flags at most a twentieth of structures like those of
the training: a rule that flags more of the others is better, not only freer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray

from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.descriptors import nearest_distance
from nanoos_fw.ml.fitting import Fit, FitData
from nanoos_fw.ml.graphs import build_graphs
from nanoos_fw.ml.metrics import element_fractions, fit_element_reference
from nanoos_fw.ml.model_files import Architecture, atom_features
from nanoos_fw.ml.network import Network, TensorBatch
from nanoos_fw.ml.training import TrainingConfig
from nanoos_fw.ml.uncertainty import (
    conformal_quantile,
    fit_uncertainty,
)
from nanoos_fw.parallel import Communicator
from nanoos_fw.provenance import package_versions
from nanoos_fw.structure_files import EntryFailure, read_structures

STRAINS = (0.9, 1.1, 1.2)
SHARE = 0.95
FAMILIES: dict[str, tuple[tuple[int, ...], ...]] = {
    "oxides": ((8,),),
    "halides": ((9, 17, 35, 53),),
    "alkali metals": ((3, 11, 19, 37, 55),),
    "oxides of 3d metals": ((8,), tuple(range(21, 31))),
}
Floats = NDArray[np.float64]


def read(path: Path) -> tuple[GraphTable, dict[float, GraphTable], Floats, Floats]:
    """Return graphs, strained ones, energies per atom, volumes over radii cubed."""
    entries = [
        entry
        for entry in read_structures(path)
        if not isinstance(entry, EntryFailure) and "energy" in entry.properties
    ]
    tables = {}
    for strain in (1.0, *STRAINS):
        scaled = [entry.structure.copy() for entry in entries]
        for crystal in scaled:
            crystal.scale_lattice(crystal.volume * strain**3)
        tables[strain] = build_graphs(scaled)[0]
    good = [
        row
        for row in range(len(entries))
        if all(graphs[row] is not None for graphs in tables.values())
    ]
    packed = {
        strain: GraphTable.from_graphs([g for r in good if (g := graphs[r])])
        for strain, graphs in tables.items()
    }
    crystals = [entries[row].structure for row in good]
    energies = [entries[row].properties["energy"] for row in good]
    sizes = [
        sum(float(e.atomic_radius or 1.5) ** 3 for e in c.species) for c in crystals
    ]
    return (
        packed.pop(1.0),
        packed,
        np.array(energies) / [len(crystal) for crystal in crystals],
        np.array([c.volume for c in crystals]) / sizes,
    )


def evaluate(network: Network, table: GraphTable) -> tuple[Floats, Floats]:
    """Return outputs and pooled vectors, ``(n,)`` and ``(n, hidden_dim)``."""
    pooled: list[Floats] = []
    hook = network.dense.register_forward_pre_hook(  # type: ignore[union-attr,operator]
        lambda _module, inputs: pooled.append(inputs[0].double().numpy().copy())
    )
    outputs = []
    network.eval()
    with torch.inference_mode():
        for begin in range(0, len(table), 256):
            rows = np.arange(begin, min(begin + 256, len(table)))
            batch = TensorBatch.from_batch(table.batch(rows), torch.float32)
            outputs.append(network(batch).double().numpy())
    hook.remove()
    return np.concatenate(outputs), np.concatenate(pooled)


def mahalanobis(known: Floats) -> Callable[[Floats], Floats]:
    """Return the distance from the distribution of ``(n, d)`` vectors."""
    centre = known.mean(axis=0)
    values, axes = np.linalg.eigh(np.cov(known.T))
    values = np.maximum(values, 1e-4 * values.max())
    return lambda x: np.sqrt((((x - centre) @ axes) ** 2 / values).mean(axis=1))


def judge(
    table: GraphTable,
    strained: dict[float, GraphTable],
    truth: Floats,
    out: NDArray[np.bool_],
    config: TrainingConfig,
) -> dict[str, Any]:
    """Train without some structures, and tell what the flags find."""
    rng = np.random.default_rng(config.seed)
    known = rng.permutation(np.flatnonzero(~out))
    cuts = [int(0.8 * len(known)), int(0.9 * len(known))]
    train, val, test = np.split(known, cuts)
    fractions = element_fractions(table)
    linear = fractions @ fit_element_reference(fractions[train], truth[train])
    rest = truth - linear
    mean, std = rest[train].mean(), rest[train].std()
    data = FitData(table, (rest - mean) / std, train, val, float(std))
    sizes = Architecture(
        hidden_dim=config.hidden_dim,
        num_layers=config.num_layers,
        gaussian_max=table.cutoff_radius,
    )
    said, inner = [], []
    strained_inner: dict[float, list[Floats]] = {strain: [] for strain in strained}
    for member in range(config.ensemble_size):
        fit = Fit(config, sizes, atom_features(), data, member, Communicator())
        while not fit.done:
            fit.run_epoch(lambda: False)
        fit.use_best()
        output, pooled = evaluate(fit.network, table)
        said.append(mean + std * output + linear)
        inner.append(pooled)
        for strain, other in strained.items():
            strained_inner[strain].append(evaluate(fit.network, other.select(test))[1])
    error = np.abs(np.mean(said, axis=0) - truth)
    domain = fit_uncertainty(
        table, np.zeros(len(table)), None, train, val, source="none"
    )
    vectors = np.concatenate(inner, axis=1)
    latent = mahalanobis(vectors[train])
    within = nearest_distance(
        domain.references, domain.references, domain.card.domain_neighbors,
        skip_self=True,
    )  # fmt: skip
    usual = (np.quantile(within, SHARE), np.quantile(latent(vectors[train]), SHARE))

    def distances(graphs: GraphTable, pooled: Floats) -> dict[str, Floats]:
        both = {"descriptors": domain.distance(graphs), "latent": latent(pooled)}
        ratios = [d / one for d, one in zip(both.values(), usual, strict=True)]
        return {**both, "either": np.maximum(*ratios)}

    whole = distances(table, vectors)
    limits = {}
    for kind, found in whole.items():
        limit = conformal_quantile(np.sort(found[val]), SHARE)
        assert limit is not None, "too few validation rows"
        limits[kind] = limit
    flags = {kind: found > limits[kind] for kind, found in whole.items()}
    moved = {}
    for strain, pooled in strained_inner.items():
        there = distances(strained[strain].select(test), np.concatenate(pooled, axis=1))
        moved[strain] = {kind: found > limits[kind] for kind, found in there.items()}
    seen = (fractions[train] > 0).any(axis=0)
    unseen = (fractions[:, ~seen] > 0).any(axis=1)
    rows = {"left_out": np.flatnonzero(out), "test": test}
    both = np.concatenate(list(rows.values()))
    return {
        "rows": {"train": len(train), **{name: len(r) for name, r in rows.items()}},
        "mae": {name: float(error[r].mean()) for name, r in rows.items()},
        "unseen_element": {name: float(unseen[r].mean()) for name, r in rows.items()},
        "by_distance": {
            kind: {
                **{name: float(flag[r].mean()) for name, r in rows.items()},
                "strained": {str(s): float(moved[s][kind].mean()) for s in moved},
                "mae_ratio": ratio(error[both], flag[both]),
                "mae_ratio_of_left_out": ratio(error[out], flag[out]),
            }
            for kind, flag in flags.items()
        },
    }


def ratio(error: Floats, flag: NDArray[np.bool_]) -> float | None:
    """Return the mean error of the flagged over that of the others."""
    if flag.all() or not flag.any():
        return None
    return float(error[flag].mean() / error[~flag].mean())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="KIND", help="of the kinds above")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    table, strained, truth, volumes = read(asked.data)
    fractions = element_fractions(table)
    kinds = {
        name: np.all([(fractions[:, z] > 0).any(axis=1) for z in groups], axis=0)
        for name, groups in FAMILIES.items()
    }
    kinds["loosely packed"] = volumes > np.quantile(volumes, 0.9)
    config = TrainingConfig(
        target="energy_per_atom",
        epochs=asked.epochs,
        ensemble_size=asked.members,
        seed=asked.seed,
    )
    answer: dict[str, Any] = {
        "structures": len(table),
        "epochs": asked.epochs,
        "members": asked.members,
        "seed": asked.seed,
        "machine": platform.platform(),
        "versions": package_versions(),
        "left_out": {},
    }
    for name, out in kinds.items():
        if asked.only and name not in asked.only:
            continue
        found = judge(table, strained, truth, out, config)
        answer["left_out"][name] = found
        print(f"{name}: {found['rows']}, MAE {found['mae']}, unseen element "
              f"{found['unseen_element']}", flush=True)  # fmt: skip
        for kind, numbers in found["by_distance"].items():
            print(f"  {kind:12} {json.dumps(numbers)}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(answer, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
