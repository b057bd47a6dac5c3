"""Feature store against the naive JSON document: bytes and read speed.

Reads structures from a file or folder, or makes binary crystals with displaced atoms;
stores the features of each once as the program does and once as one document of lists
with the same content; reads the graphs of both back.

    python scripts/benchmarks/feature_store.py --uri mongodb://localhost -o out.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bson
import numpy as np
import pymongo
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import NanoOSError
from nanoos_fw.firetasks.featurization import FeatureParameters
from nanoos_fw.ml.features import (
    FEATURE_VERSION,
    extract_structure_features,
    graph_from_repr,
)
from nanoos_fw.ml.graphs import CrystalGraph, pack_graph, unpack_graph
from nanoos_fw.stores.database import ensure_indexes
from nanoos_fw.stores.features import Features, FeatureStore

READ_CHUNK = 1000
DESCRIBED = FeatureParameters().model_dump(mode="json")


def made_structures(number: int) -> list[Structure]:
    rng = np.random.default_rng(0)
    metals = ["Al", "Ni", "Ti", "Fe", "Co", "Cu", "Zr", "Mg"]
    found = []
    for _ in range(number):
        pair = list(rng.choice(metals, size=2, replace=False))
        cell = Structure(
            Lattice.cubic(rng.uniform(2.9, 3.6)), pair, [[0] * 3, [0.5] * 3]
        )
        cell = cell * tuple(int(n) for n in rng.integers(1, 5, size=3))
        cell.perturb(0.05)
        found.append(cell)
    return found


def read_structures(path: Path, number: int) -> list[Structure]:
    from nanoos_fw.structure_files import EntryFailure
    from nanoos_fw.structure_files import read_structures as read

    found: list[Structure] = []
    for entry in read(path):
        if not isinstance(entry, EntryFailure):
            found.append(entry.structure)
        if len(found) == number:
            break
    return found


def naive(graph_repr: dict[str, Any], scalars: dict[str, float]) -> dict[str, Any]:
    """The same content as the store keeps, as lists."""
    return {
        "numbers": graph_repr["numbers"].tolist(),
        "edge_index": graph_repr["edge_index"].tolist(),
        "distances": graph_repr["distances"].tolist(),
        "cutoff_radius": graph_repr["cutoff_radius"],
        "max_neighbors": graph_repr["max_neighbors"],
        "feature_version": graph_repr["feature_version"],
        "scalars": scalars,
    }


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median of the repeats, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def arrays_of(graph: CrystalGraph) -> tuple[np.ndarray, ...]:
    """Ask for all arrays, which an unpacked graph makes only then."""
    return graph.numbers, graph.edge_index, graph.distances


def chunks(keys: Sequence[str]) -> list[list[str]]:
    return [list(keys[i : i + READ_CHUNK]) for i in range(0, len(keys), READ_CHUNK)]


def measure(database: Any, structures: list[Structure], repeats: int) -> dict[str, Any]:
    packed, documents, refused = {}, {}, 0
    for number, structure in enumerate(structures):
        try:
            graph_repr, scalars = extract_structure_features(structure, **DESCRIBED)
        except NanoOSError:  # an isolated site, say
            refused += 1
            continue
        graph = pack_graph(graph_from_repr(graph_repr))
        packed[f"s{number:06d}"] = Features(f"s{number:06d}", graph, scalars)
        documents[f"s{number:06d}"] = naive(graph_repr, scalars)
    keys = list(packed)
    n_sites = sum(len(d["numbers"]) for d in documents.values())
    ensure_indexes(database)
    store, collection = FeatureStore(database), database["naive_features"]
    collection.create_index("structure", unique=True)

    start = time.perf_counter()
    for part in chunks(keys):
        store.put([packed[key] for key in part], {}, DESCRIBED, FEATURE_VERSION)
    write = time.perf_counter() - start
    start = time.perf_counter()
    for part in chunks(keys):
        collection.insert_many(
            [{"structure": key, **documents[key]} for key in part], ordered=False
        )
    write_naive = time.perf_counter() - start

    def read() -> int:
        total = 0
        for part in chunks(keys):
            for graph in store.graphs(part, DESCRIBED, FEATURE_VERSION).values():
                total += len(arrays_of(unpack_graph(graph))[-1])
        return total

    def read_naive() -> int:
        total = 0
        for part in chunks(keys):
            query = {"structure": {"$in": part}}
            for document in collection.find(query, {"scalars": 0}):
                total += len(arrays_of(graph_from_repr(document))[-1])
        return total

    if read() != read_naive():
        raise SystemExit("the two forms hold different graphs")
    texts = {key: json.dumps(document) for key, document in documents.items()}
    fast, slow = seconds(read, repeats), seconds(read_naive, repeats)
    decode = seconds(
        lambda: [arrays_of(unpack_graph(e.graph)) for e in packed.values()], repeats
    )
    parse = seconds(
        lambda: [graph_from_repr(json.loads(text)) for text in texts.values()], repeats
    )

    def forms(graph: int, bson_: int, write_s: float, read_s: float, decode_s: float
              ) -> dict[str, float]:  # fmt: skip
        number = len(keys)
        return {
            "array_bytes_per_structure": graph / number,
            "array_bytes_per_site": graph / n_sites,
            "bson_bytes_per_structure": bson_ / number,
            "write_us_per_structure": write_s / number * 1e6,
            "read_us_per_structure": read_s / number * 1e6,
            "decode_us_per_structure": decode_s / number * 1e6,
        }

    ours = forms(
        sum(len(entry.graph) for entry in packed.values()),
        sum(len(bson.encode(d)) for d in database["structure_features"].find()),
        write, fast, decode,
    )  # fmt: skip
    theirs = forms(
        sum(len(text) for text in texts.values()),
        sum(len(bson.encode(d)) for d in collection.find()),
        write_naive, slow, parse,
    )  # fmt: skip
    return {
        "structures": len(keys),
        "refused": refused,
        "sites": n_sites,
        "parameters": DESCRIBED,
        "repeats": repeats,
        "store": ours,
        "naive": theirs,
        "naive_over_store": {name: theirs[name] / ours[name] for name in ours},
        "machine": {"platform": platform.platform(), "python": sys.version.split()[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uri", required=True, help="MongoDB server")
    parser.add_argument("--structures", type=Path, help="file or folder to read")
    parser.add_argument("-n", "--number", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if arguments.structures is None:
        structures = made_structures(arguments.number)
    else:
        structures = read_structures(arguments.structures, arguments.number)
    client: Any = pymongo.MongoClient(arguments.uri)
    name = f"nanoos_benchmark_{uuid.uuid4().hex[:8]}"
    try:
        result = measure(client[name], structures, arguments.repeats)
    finally:
        client.drop_database(name)
        client.close()
    print(f"{result['structures']} structures, {result['sites']} sites")
    print(f"{'':28} {'store':>10} {'naive':>10} {'ratio':>7}")
    for key, value in result["store"].items():
        other, ratio = result["naive"][key], result["naive_over_store"][key]
        print(f"{key:28} {value:10.1f} {other:10.1f} {ratio:7.1f}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
