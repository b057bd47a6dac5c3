"""Many structures through store, featurization and dataset builder.

    python scripts/benchmarks/scale.py --uri mongodb://localhost -n 100000 -o scale.json

Makes strained and shaken substitutions of prototypes from a seed, imports them,
computes features, writes a dataset while its graphs are read, and maps it from one and
from two processes. Says throughput, peak memory (of this process and of its children)
and bytes on disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pymongo
from pymatgen.core import Lattice, Structure

from nanoos_fw.firetasks.featurization import FeatureParameters, compute_features
from nanoos_fw.ml.datasets import open_dataset
from nanoos_fw.stores.database import ensure_indexes
from nanoos_fw.stores.datasets import build_train_val_datasets
from nanoos_fw.stores.structures import NewStructure, StructureStore

BATCH = 1000
METALS = (
    "Al", "Ti", "V", "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Zr", "Nb", "Mo", "Ru",
    "Rh", "Pd", "Ag", "Hf", "Ta", "W", "Re", "Ir", "Pt", "Au", "Mg", "Ca", "Sr",
)  # fmt: skip
CUBIC: tuple[tuple[float, list[list[float]]], ...] = (
    (3.0, [[0, 0, 0], [0.5, 0.5, 0.5]]),
    (3.8, [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]),
    (4.0, [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]),
)


def structures(number: int, seed: int) -> Iterator[NewStructure]:
    """Make crystals of 2 to 20 sites; energies are made up."""
    rng = np.random.default_rng(seed)
    for row in range(number):
        a, coords = CUBIC[rng.integers(len(CUBIC))]
        repeat = (1, 1, 1) if rng.random() < 0.3 else (2, 2, 1)
        strain = np.eye(3) + rng.normal(size=(3, 3)) * 0.03
        n = len(coords) * int(np.prod(repeat))
        cells = np.array(
            [[i, j, 0] for i in range(repeat[0]) for j in range(repeat[1])], dtype=float
        )
        frac = (np.array(coords)[None] + cells[:, None]).reshape(-1, 3) / repeat
        frac += rng.normal(size=frac.shape) * 0.01
        lattice = Lattice((np.eye(3) * a * repeat) @ strain)
        species = list(rng.choice(rng.choice(METALS, size=3, replace=False), size=n))
        yield NewStructure(
            Structure(lattice, species, frac),
            f"s{row}",
            {"energy": -4.0 * n + rng.normal()},
        )


def memory_mb(pid: int | str = "self") -> dict[str, float]:
    """Return resident memory, and the part of it that no other process shares."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        found[name] = int(value.split()[0]) / 1024
    return {
        "resident": found["Rss"],
        "private": found["Private_Clean"] + found["Private_Dirty"],
        "proportional": found["Pss"],
    }


def peak_mb(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / 1024


def read_all(directory: str, begin: Any, end: Any, answers: Any) -> None:
    """Map a dataset, read every graph in batches, and say what it takes."""
    before = memory_mb()
    dataset = open_dataset(Path(directory), verify=False)
    order = np.random.default_rng(0).permutation(dataset.num_samples)
    begin.wait()
    start = time.perf_counter()
    atoms = 0
    for at in range(0, len(order), 128):
        atoms += len(dataset.graphs.batch(order[at : at + 128]).numbers)
    wall = time.perf_counter() - start
    end.wait()  # until all have read: what is shared is in the memory of all
    answers.put(
        {"before": before, "after": memory_mb(), "atoms": atoms, "wall_s": wall}
    )


def ranks(directory: Path, number: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    begin, end = context.Barrier(number), context.Barrier(number)
    processes = [
        context.Process(target=read_all, args=(str(directory), begin, end, answers))
        for _ in range(number)
    ]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def main() -> None:  # noqa: PLR0915
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uri", required=True, help="MongoDB server")
    parser.add_argument("-n", "--number", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    number = arguments.number
    client: Any = pymongo.MongoClient(arguments.uri)
    name = f"nanoos_scale_{uuid.uuid4().hex[:8]}"
    database = client[name]
    folder = Path(tempfile.mkdtemp(prefix="nanoos-scale-"))
    described = FeatureParameters().model_dump(mode="json")
    report: dict[str, Any] = {
        "structures": number,
        "workers": arguments.workers,
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "load_before": os.getloadavg(),
        },
        "stages": {},
    }

    def stage(title: str, begin: float) -> None:
        seconds = time.perf_counter() - begin
        report["stages"][title] = {
            "wall_s": seconds,
            "structures_per_s": number / seconds,
            "peak_mb": peak_mb(resource.RUSAGE_SELF),
            "peak_child_mb": peak_mb(resource.RUSAGE_CHILDREN),
        }
        print(title, json.dumps(report["stages"][title]), flush=True)

    try:
        ensure_indexes(database)
        store = StructureStore(database)
        begin = time.perf_counter()
        batch, keys = [], []
        for entry in structures(number, 0):
            batch.append(entry)
            if len(batch) == BATCH:
                keys += store.add(batch, in_set="scale").keys
                batch = []
        keys += store.add(batch, in_set="scale").keys
        stage("make and import", begin)
        begin = time.perf_counter()
        computed = compute_features(database, keys, workers=arguments.workers)
        report["features"] = computed.counts()
        stage("featurize", begin)
        begin = time.perf_counter()
        built = build_train_val_datasets(
            database,
            "energy_per_atom",
            keys=keys,
            features=described,
            directory=folder / "data",
        )
        stage("build dataset", begin)
        files = {p.name: p.stat().st_size for p in (folder / "data").iterdir()}
        sites = int(built.dataset.graphs.atom_start[-1])
        report["dataset"] = {
            "rows": built.dataset.num_samples,
            "sites": sites,
            "bytes": sum(files.values()),
            "bytes_per_site": sum(files.values()) / sites,
            "files": files,
        }
        report["collections"] = {}
        for collection in ("structures", "structure_features"):
            sizes = database.command("collStats", collection)
            report["collections"][collection] = {
                key: sizes.get(key) for key in ("count", "size", "storageSize")
            }
        report["ranks"] = {str(n): ranks(folder / "data", n) for n in (1, 2)}
    finally:
        shutil.rmtree(folder)
        client.drop_database(name)
        client.close()
    report["machine"]["load_after"] = os.getloadavg()
    print(json.dumps({k: v for k, v in report.items() if k != "stages"}, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
