"""Test error of the energy per atom on real structures, beside what needs no network.

    python scripts/benchmarks/accuracy.py --data data.extxyz.xz --json accuracy.json
    python scripts/benchmarks/accuracy.py --data data.extxyz.xz --networks cgcnn
    python scripts/benchmarks/accuracy.py --data data.extxyz.xz --work-dir work \
        --minutes 5  # exit status 75: not at the end; the same command goes on

The structures are divided at random into 80/10/10 %, by ``--split-seed``. A linear
reference of each element, fitted to the training part alone, takes the part of the
energy that composition explains; the network learns what is left. Errors are of the
energy per atom, and the same with or without the reference; R² is told of both: that of
the energy is flattered by composition, that of the remainder is not.

Two networks learn: the published one, and one on atoms, bonds and angles, whose epochs
take ten times as long: it has fewer members, and sizes of its own (``LINE_GRAPH``).
Their graphs differ, the rows of the parts do not. Beside them stand the mean of the
training targets, the linear reference itself, and random forests on scalar features, of
the energy and of the remainder. Only the validation part may choose (the best epoch,
the width of the 90 % intervals); the test part is looked at once, after the training.

How often intervals hold is itself uncertain: with 100 rows to calibrate on and 100 to
count, a right interval of 90 % holds 86 to 94 of them (one standard deviation). So the
held-out rows, validation and test together, are also divided anew many times, one part
calibrates and the other counts; the mean is told, and the range of nine in ten
divisions. The best epochs were chosen on some of these rows, which the single division
is free of.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

from intervals import read, with_vectors

from nanoos_fw.errors import OutOfTimeError
from nanoos_fw.ml.datasets import (
    MANIFEST,
    PARTS,
    Dataset,
    DatasetConfig,
    build_regression_dataset,
    open_dataset,
    write_dataset,
)
from nanoos_fw.ml.forest_fitting import fit_forest
from nanoos_fw.ml.graph_scalars import graph_scalars
from nanoos_fw.ml.graphs import build_graphs
from nanoos_fw.ml.metrics import (
    element_fractions,
    fit_element_reference,
    regression_metrics,
)
from nanoos_fw.ml.training import TrainingConfig, TrainingResult, train_cgcnn_model
from nanoos_fw.ml.training_config import MODEL_TYPES
from nanoos_fw.ml.uncertainty import (
    DEFAULT_COVERAGE,
    conformal_quantile,
    normalized_scores,
)
from nanoos_fw.parallel import RESUMABLE_EXIT, Resources
from nanoos_fw.provenance import package_versions, sha256_file

TARGET = "energy_per_atom"
# Of the network on angles, where no option says otherwise.
LINE_GRAPH: dict[str, Any] = {
    "num_layers": 3,
    "hidden_dim": 32,
    "epochs": 80,
    "ensemble_size": 2,
}
# Fields of the configuration that are no choice here.
FIXED = {
    "target",
    "model_type",
    "classes",
    "parent_sha256",
    "freeze",
    "normalizer",
    "forest_baseline",
    "schema_version",
}


def judge(
    truth: NDArray[np.float64], said: NDArray[np.float64], linear: NDArray[np.float64]
) -> dict[str, Any]:
    """Return the errors of predictions, and R² of what the reference leaves over.

    Parameters
    ----------
    truth, said, linear
        ``(n,)`` in eV/atom: true, predicted, and of the linear reference.
    """
    found: dict[str, Any] = regression_metrics(truth, said)
    rest = regression_metrics(truth - linear, said - linear)
    return {**found, "r2_of_remainder": rest["r2"]}


def simple_models(dataset: Dataset, seed: int) -> dict[str, NDArray[np.float64]]:
    """Return the predictions for all rows of what needs no network, ``(n,)`` each."""
    train, table = dataset.rows("train"), dataset.graphs
    fractions = element_fractions(table)
    reference = fit_element_reference(fractions[train], dataset.targets[train])
    linear = fractions @ reference
    scalars, learned = graph_scalars(table), graph_scalars(table.select(train))

    def forest(targets: NDArray[np.float64]) -> NDArray[np.float64]:
        fitted = fit_forest(learned, targets[train], seed, target_property=TARGET)
        said, _ = fitted.predict_features(scalars)
        return np.asarray(said)

    return {
        "mean": np.full(dataset.num_samples, dataset.targets[train].mean()),
        "linear in composition": linear,
        "random forest": forest(dataset.targets),
        "random forest of the remainder": linear + forest(dataset.targets - linear),
    }


def network_row(
    result: TrainingResult, dataset: Dataset, part: str, linear: NDArray[np.float64]
) -> dict[str, Any]:
    """Return the errors of the network, and how its intervals hold."""
    rows, said = dataset.rows(part), result.predictions[part]
    assert [p["structure_id"] for p in said] == [dataset.ids[row] for row in rows]
    mean = np.array([p["mean"] for p in said])
    truth = dataset.targets[rows]
    answer = judge(truth, mean, linear[rows])
    if all(p["half_width"] is not None for p in said):
        width = np.array([p["half_width"] for p in said])
        inside = np.abs(mean - truth) <= width
        answer["coverage_of_90"] = float(inside.mean())
        answer["mean_half_width"] = float(width.mean())
    return answer


def divided_anew(
    errors: NDArray[np.float64],
    spread: NDArray[np.float64] | None,
    n_calibrate: int,
    *,
    divisions: int = 1000,
    coverage: float = DEFAULT_COVERAGE,
) -> dict[str, Any]:
    """Return how often intervals hold over divisions of rows that were not learned.

    Parameters
    ----------
    errors, spread
        ``(n,)`` in the unit of the target; see
        :func:`nanoos_fw.ml.uncertainty.normalized_scores`.
    n_calibrate
        Rows that calibrate; the others count.
    divisions, coverage
        How many, and of the intervals.

    Returns
    -------
    dict
        ``mean``, ``from`` and ``to`` (5th and 95th percentile) of the share of rows
        inside, ``mean_half_width``, and ``floors`` -> in how many divisions, in units
        of the median spread.
    """
    rng = np.random.default_rng(0)
    held, widths, floors = [], [], Counter[str]()
    for _ in range(divisions):
        order = rng.permutation(len(errors))
        known, new = order[:n_calibrate], order[n_calibrate:]
        floor, scores = normalized_scores(
            errors[known], None if spread is None else spread[known], rng
        )
        factor = conformal_quantile(scores, coverage)
        assert factor is not None
        width = factor * ((0.0 if spread is None else spread[new]) + floor)
        held.append(np.mean(np.abs(errors[new]) <= width))
        widths.append(np.mean(width))
        if spread is not None:
            floors[f"{floor / np.median(spread[known]):.2g}"] += 1
    low, high = np.quantile(held, [0.05, 0.95])
    return {
        "divisions": divisions,
        "mean": float(np.mean(held)),
        "from": float(low),
        "to": float(high),
        "mean_half_width": float(np.mean(widths)),
        "floors": dict(floors),
    }


def held_out(result: TrainingResult) -> dict[str, Any]:
    """Judge the intervals of a network on validation and test rows, divided anew."""
    rows = [row for part in PARTS[1:] for row in result.predictions[part]]
    errors = np.array([row["mean"] - row["target"] for row in rows])
    spread = None
    if rows[0]["std"] is not None:
        spread = np.array([row["std"] for row in rows]) / result.uncertainty_scale
    return divided_anew(errors, spread, len(result.predictions["val"]))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each hyper-parameter, with the project's own default."""
    group = parser.add_argument_group("hyper-parameters, in JSON; defaults of nanoos")
    for name, field in TrainingConfig.model_fields.items():
        if name not in FIXED:
            told = json.dumps(field.default)
            option = f"--{name.replace('_', '-')}"
            group.add_argument(option, metavar="VALUE", help=f"default: {told}")


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the hyper-parameters that were given."""
    values = {}
    for name in TrainingConfig.model_fields:
        text = getattr(arguments, name, None)
        if name not in FIXED and text is not None:
            try:
                values[name] = json.loads(text)
            except json.JSONDecodeError:
                values[name] = text  # a word
    return values


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE")
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument(
        "--networks", nargs="+", choices=MODEL_TYPES, default=[*MODEL_TYPES]
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work-dir", type=Path, help="kept, to resume; else temporary")
    parser.add_argument("--minutes", type=float, help="stop by then, to be resumed")
    parser.add_argument("--json", type=Path)
    add_options(parser)
    arguments = parser.parse_args(words)
    if arguments.minutes is not None and arguments.work_dir is None:
        parser.error("--minutes needs --work-dir, where the training goes on")
    chosen = {
        kind: TrainingConfig(
            target=TARGET,
            forest_baseline=False,
            model_type=kind,
            **{**(LINE_GRAPH if kind == "line_graph" else {}), **given(arguments)},
        )
        for kind in arguments.networks
    }
    minutes = arguments.minutes
    deadline = None if minutes is None else time.time() + 60.0 * minutes
    with tempfile.TemporaryDirectory() as folder:
        try:
            answer = run(
                arguments, chosen, arguments.work_dir or Path(folder), deadline
            )
        except OutOfTimeError as error:
            print(error)
            return RESUMABLE_EXIT
    print_table(answer)
    if arguments.json:
        arguments.json.write_text(json.dumps(answer, indent=1) + "\n")
    return 0


def run(
    arguments: argparse.Namespace,
    chosen: dict[str, TrainingConfig],
    place: Path,
    deadline: float | None,
) -> dict[str, Any]:
    """Train the networks, and judge all on validation and test."""
    datasets = {
        kind: prepare(arguments, place / kind, angles=kind == "line_graph")
        for kind in chosen
    }
    results = {
        kind: train_cgcnn_model(
            TARGET,
            config,
            dataset_dir=place / kind / "dataset",
            work_dir=place / kind / "work",
            resources=Resources(ranks=arguments.ranks, threads=arguments.threads),
            deadline=deadline,
        )
        for kind, config in chosen.items()
    }
    first = next(iter(datasets.values()))
    for other in datasets.values():
        for part in PARTS:
            assert other.part(part).ids == first.part(part).ids
    simple = simple_models(first, next(iter(chosen.values())).seed)
    linear = simple["linear in composition"]
    parts = {}
    for part in PARTS[1:]:
        rows = first.rows(part)
        parts[part] = {
            name: judge(first.targets[rows], said[rows], linear[rows])
            for name, said in simple.items()
        }
        for kind, result in results.items():
            parts[part][MODEL_TYPES[kind]] = network_row(result, first, part, linear)
    return {
        "structures": first.num_samples,
        "rows": {part: len(first.rows(part)) for part in PARTS},
        "unit": first.unit,
        "split_seed": arguments.split_seed,
        "data_sha256": sha256_file(arguments.data),
        "parts": parts,
        "networks": {
            MODEL_TYPES[kind]: {
                "dataset_hash": datasets[kind].dataset_hash,
                "config": config.model_dump(mode="json"),
                "all_hyper_parameters": {
                    name: getattr(config, name) for name in TrainingConfig.model_fields
                },
                "best_epochs": [curve.best_epoch for curve in results[kind].curves],
                "parameters_per_member": results[kind].n_parameters,
                "ranks": results[kind].ranks,
                "last_launch_s": results[kind].wall_s,
                "intervals_divided_anew": held_out(results[kind]),
            }
            for kind, config in chosen.items()
        },
        "threads": arguments.threads,
        "load_average": os.getloadavg(),
        "machine": platform.platform(),
        "versions": package_versions(),
    }


def prepare(arguments: argparse.Namespace, place: Path, *, angles: bool) -> Dataset:
    """Build the graphs and divide them, unless that was done before."""
    directory = place / "dataset"
    if not (directory / MANIFEST).is_file():
        graphs, targets = read(arguments.data, with_vectors if angles else build_graphs)
        divided = DatasetConfig(
            target_property=TARGET, seed=arguments.split_seed, unit="eV/atom"
        )
        write_dataset(build_regression_dataset(graphs, targets, divided), directory)
    return open_dataset(directory)


def print_table(answer: dict[str, Any]) -> None:
    """Print the test part."""
    rows = answer["rows"]
    print(f"{answer['structures']} structures: {rows['train']} train, {rows['val']} "
          f"validation, {rows['test']} test")  # fmt: skip
    for name, one in answer["networks"].items():
        chosen = one["all_hyper_parameters"]
        print(f"{name}: {chosen['ensemble_size']} members of "
              f"{one['parameters_per_member']} weights, {chosen['epochs']} epochs "
              f"(best {', '.join(map(str, one['best_epochs']))}), "
              f"{one['ranks']} ranks, {one['last_launch_s']:.0f} s of the last "
              f"launch")  # fmt: skip
    print(f"{'test part':32} {'MAE':>8} {'RMSE':>8} {'R²':>8} {'R² of remainder':>16}"
          f" {'in 90 %':>8} {'half width':>11}")  # fmt: skip

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    for name, found in answer["parts"]["test"].items():
        held = found.get("coverage_of_90")
        print(f"{name:32} {number(found['mae']):>8} {number(found['rmse']):>8} "
              f"{number(found['r2']):>8} {number(found['r2_of_remainder']):>16} "
              f"{'-' if held is None else f'{100 * held:.1f} %':>8} "
              f"{number(found.get('mean_half_width')):>11}")  # fmt: skip
    for name, one in answer["networks"].items():
        anew = one["intervals_divided_anew"]
        print(f"{name}, held-out rows divided anew {anew['divisions']} times: "
              f"90 % intervals hold {100 * anew['mean']:.1f} % "
              f"({100 * anew['from']:.0f} to {100 * anew['to']:.0f} %), half width "
              f"{anew['mean_half_width']:.4f}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
