"""Active learning against chance: who finds the true best alloys with equal labels?

    python scripts/benchmarks/active_learning.py --work bench --json active.json

The candidates are the demonstration's 840 ordered binary alloys, the labels formation
energies by LAMMPS relaxations, and the prize are the ten lowest of them all. LAMMPS
relaxes the whole space once; campaigns then find their labels in the store and see
only those that they ask for. For each seed, with the same number of labels:

* ``active``: the campaign of ``nanoos active``, as fireworks, first batch at random;
* ``one-shot``: as many labels at random as leave one batch, one model, and the best
  predictions of that model as the batch;
* ``random``: all labels at random.

All three begin with the same random order. What counts is how many of the true ten got
a label. Seeds that are in the work folder already are not run again, so that the whole
can be done in pieces with ``--seeds``. Killed, the same command continues.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")

TARGET = "formation_energy_per_atom"
BEST = 10
FIRST, BATCH, BUDGET = 40, 20, 140
METHODS = ("active", "one-shot", "random")


def plan_of(
    name: str, seed: int, folder: Path, elements: list[str], **changes: Any
) -> Any:
    from nanoos_fw.operations.active import read_plan

    values: dict[str, Any] = {
        "name": name,
        "candidates": {"alloys": elements},
        "labels": {
            "kind": "lammps",
            "method": {"potential": {"name": "zhou2004", "elements": elements}},
        },
        "initial": {"size": FIRST, "method": "random"},
        "selection": {"size": BATCH},
        "stop": {"max_labels": BUDGET, "top": BEST},
        "training": {
            "target": TARGET,
            "epochs": 60,
            "hidden_dim": 32,
            "readout_dim": 64,
            "ensemble_size": 4,
            "forest_baseline": False,
            "seed": seed,
        },
        "dataset": {"train_fraction": 0.85, "val_fraction": 0.15, "test_fraction": 0.0,
                    "seed": seed},
        "seed": seed,
        "work_root": str(folder / "work"),
        "report_every_round": False,
    }  # fmt: skip
    return read_plan({**values, **changes})


def label_all(launchpad: Any, plan: Any, folder: Path) -> dict[str, float]:
    """Relax the whole space in one child, unless it is there, and return it."""
    from nanoos_fw import operations
    from nanoos_fw.firetasks.active_state import label_source
    from nanoos_fw.firetasks.relaxation import RelaxStructuresTask
    from nanoos_fw.operations.active import context
    from nanoos_fw.operations.alloys import alloy_candidates, alloy_references
    from nanoos_fw.stores.active import label_values
    from nanoos_fw.stores.database import open_database
    from nanoos_fw.stores.embedded import save_embedded

    database = open_database(launchpad)
    operations.prepare_launchpad(launchpad)
    place = context(database, plan)
    elements = plan.candidates.alloys
    keys = place.structures.add(alloy_candidates(elements), in_set="all").keys
    references = place.structures.add(
        alloy_references(elements), in_set=plan.reference_set
    ).keys
    method = plan.labels.method.model_dump(mode="json")
    RelaxStructuresTask(structures=[*keys, *references], method=method).run(place)
    save_embedded(launchpad)
    found = label_values(database, label_source(place, plan), sorted(set(keys)))
    if found.failures or found.pending:
        print(f"{len(found.failures)} relaxations failed", flush=True)
    return found.values


def run_campaign(launchpad: Any, plan: Any, folder: Path) -> dict[str, Any]:
    """Run a campaign to its end and return what it gave out, round by round."""
    from nanoos_fw import operations
    from nanoos_fw.operations.active import active_status, submit_active
    from nanoos_fw.stores.active import ActiveStore

    began = time.perf_counter()
    submit_active(launchpad, plan)
    operations.rerun_failed(launchpad, plan.name)
    operations.run_embedded(launchpad, folder / "launches")
    rounds = ActiveStore(launchpad.db).rounds(plan.name)
    if not rounds or rounds[-1].stop is None:
        raise SystemExit(f"{plan.name} did not end; see {folder / 'launches'}")
    status = active_status(launchpad.db, plan.name)
    return {
        "batches": [r.batch for r in rounds if r.stop is None],
        "stop": dict(rounds[-1].stop),
        "wall_s": round(time.perf_counter() - began, 1),
        "prediction_mae": [row.prediction_mae for row in status.rounds],
        "val_mae": [row.val_mae for row in status.rounds],
    }


def curve(batches: list[list[str]], prize: set[str]) -> list[list[int]]:
    """Return labels and true best found after each batch."""
    points, given = [], 0
    found: set[str] = set()
    for batch in batches:
        given += len(batch)
        found |= prize & set(batch)
        points.append([given, len(found)])
    return points


def run_seed(
    launchpad: Any,
    seed: int,
    folder: Path,
    elements: list[str],
    truth: dict[str, float],
    selection: dict[str, Any],
) -> dict[str, Any]:
    from nanoos_fw.ml.acquisition import random_order

    ids = sorted(truth)
    prize = set(sorted(ids, key=lambda key: (truth[key], key))[:BEST])
    found: dict[str, Any] = {"seed": seed}
    plans = {
        "active": plan_of(
            f"active-{seed}", seed, folder, elements,
            selection={"size": BATCH, **selection},
        ),
        "one-shot": plan_of(
            f"one-shot-{seed}", seed, folder, elements,
            initial={"size": BUDGET - BATCH, "method": "random"},
            selection={"size": BATCH, "acquisition": "mean", "diversity": "none"},
        ),
    }  # fmt: skip
    for name, plan in plans.items():
        result = run_campaign(launchpad, plan, folder)
        result["curve"] = curve(result.pop("batches"), prize)
        found[name] = result
    order = [ids[row] for row in random_order(ids, seed)]
    sizes = [FIRST, *[BATCH] * ((BUDGET - FIRST) // BATCH)]
    starts = np.cumsum([0, *sizes]).tolist()
    parts = [order[a:b] for a, b in itertools.pairwise(starts)]
    found["random"] = {"curve": curve(parts, prize)}
    assert all(found[name]["curve"][-1][0] == BUDGET for name in METHODS)
    return found


def draw(results: list[dict[str, Any]], n: int, path: Path) -> None:
    """Draw found against labels: each seed thin, the mean thick."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    colors = {"active": "#0072B2", "one-shot": "#009E73", "random": "#D55E00"}
    for name in METHODS:
        curves = [np.array(result[name]["curve"]) for result in results]
        for one in curves:
            axes.plot(one[:, 0], one[:, 1], color=colors[name], lw=0.7, alpha=0.4)
        mean = np.mean([one[:, 1] for one in curves], axis=0)
        x = curves[0][:, 0]
        axes.plot(x, mean, color=colors[name], lw=2.4, marker="o", ms=4, label=name)
    x = np.array([0, BUDGET])
    axes.plot(x, BEST * x / n, color="0.5", ls=":", lw=1.4, label="expected at random")
    axes.set_xlabel("labels")
    axes.set_ylabel(f"of the true best {BEST} of {n}")
    axes.set_ylim(0, BEST + 0.3)
    axes.set_xlim(0, BUDGET + 2)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder that is kept")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--acquisition", default="ucb")
    parser.add_argument("--kappa", type=float, default=1.0)
    parser.add_argument("--diversity", default="variance")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help=".png or .svg")
    arguments = parser.parse_args()

    from nanoos_fw.stores.embedded import open_embedded

    folder = arguments.work.resolve()
    launchpad = open_embedded(folder / "db", create=True)
    from nanoos_fw.md import zhou2004
    from nanoos_fw.provenance import package_versions, read_json, write_json

    elements = list(zhou2004.elements())
    selection = {
        "acquisition": arguments.acquisition,
        "kappa": arguments.kappa,
        "diversity": arguments.diversity,
    }
    began = time.perf_counter()
    plan = plan_of("whole-space", 0, folder, elements)
    truth = label_all(launchpad, plan, folder)
    labels_s = time.perf_counter() - began
    print(f"{len(truth)} alloys are labelled ({labels_s:.0f} s)", flush=True)
    results = []
    for seed in arguments.seeds:
        path = folder / f"seed-{seed}.json"
        result = read_json(path) if path.exists() else None
        if result is None or result["selection"] != selection:
            result = run_seed(launchpad, seed, folder, elements, truth, selection)
            result["selection"] = selection
            write_json(path, result)
        results.append(result)
        words = ", ".join(f"{name} {result[name]['curve'][-1][1]}" for name in METHODS)
        print(f"seed {seed}: {words} ({result['active']['wall_s']:.0f} s)", flush=True)

    means = {
        name: float(np.mean([r[name]["curve"][-1][1] for r in results]))
        for name in METHODS
    }
    print(f"\nof the true best {BEST} of {len(truth)} alloys, with {BUDGET} labels")
    print("method    " + "".join(f"  seed {r['seed']}" for r in results) + "    mean")
    for name in METHODS:
        cells = "".join(f"{r[name]['curve'][-1][1]:8d}" for r in results)
        print(f"{name:10}{cells}{means[name]:8.1f}")
    print(f"expected at random: {BEST * BUDGET / len(truth):.2f}")
    answer = {
        "candidates": len(truth),
        "best": BEST,
        "labels": BUDGET,
        "first_batch": FIRST,
        "batch": BATCH,
        "selection": selection,
        "found_mean": means,
        "expected_at_random": BEST * BUDGET / len(truth),
        "seeds": results,
        "labels_s": round(labels_s, 1),
        "wall_s": round(time.perf_counter() - began, 1),
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            "load": os.getloadavg(),
        },
        "versions": package_versions(),
    }
    if arguments.json:
        write_json(arguments.json, answer)
    if arguments.plot:
        draw(results, len(truth), arguments.plot)
        print(arguments.plot)
    sys.exit(0 if means["active"] > means["random"] else 1)


if __name__ == "__main__":
    main()
