"""What the engine adds to LAMMPS: loop times, tiny runs, many single energies.

Four parts, each chosen by name and short. What is compared runs once per round, in
an order that turns round each time, and is compared within the round: what else the
machine does meets both. Printed are the medians over the rounds, of ratios and of
times, with the quartiles of the ratios:

``md``
    Time in the time-stepping loops of LAMMPS, and of the whole run, by the engine, by
    plain ``lmp`` on the same script and ranks, and by ``lmp`` without the script's
    ``suffix``, which chooses the ``opt`` variants of styles. With several numbers of
    steps, a cost per run shows as a difference that does not grow with them.
``tiny``
    A run of few steps, in a process of its own and in a child of the warm server.
``static``
    Energies, forces and stresses of displaced copies of silicon: the calculator with
    its kept pair style, ASE's LAMMPSlib with its kept instance, and a process per
    structure. The energies must equal those of a fresh instance.
``relax``
    Relaxations of such copies, cell included, to the same forces and stresses, by the
    relaxation of this package and by ASE's BFGS over LAMMPSlib.

    python scripts/benchmarks/lammps_engine.py md --systems lj --steps 2000 20000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Lattice, Structure

from nanoos_fw.md.calculator import LammpsCalculator
from nanoos_fw.md.engine import LAMMPSEngine
from nanoos_fw.md.fork_server import ForkServer
from nanoos_fw.md.optimizer import RelaxationSettings, relax_one
from nanoos_fw.md.potentials import lennard_jones_potential
from nanoos_fw.md.recipes import file_potential
from nanoos_fw.parallel import Resources, launch_command
from nanoos_fw.provenance import package_versions, utc_now
from nanoos_fw.units import EV_PER_A3_IN_BAR

_LOOP = re.compile(r"^Loop time of ([0-9.e+-]+)", re.MULTILINE)
# Energies of a kept and a fresh instance may differ by the order of their sums.
_SAME_EV_PER_ATOM = 1e-10
_SAME_MINIMUM_EV_PER_ATOM = 1e-5
Row = dict[str, Any]


def silicon() -> Structure:
    """Return the conventional cell of diamond silicon."""
    return Structure.from_spacegroup("Fd-3m", Lattice.cubic(5.431), ["Si"], [[0, 0, 0]])


def systems() -> dict[str, tuple[Structure, Any]]:
    """Return a structure and its potential by name."""
    argon = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.3), ["Ar"], [[0, 0, 0]])
    copper = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(3.61), ["Cu"], [[0, 0, 0]]
    )
    lj = lennard_jones_potential({"Ar": (0.0104, 3.4)}, cutoff_a=8.5)
    return {
        "lj": (argon, lj),
        "eam": (copper, "zhou2004"),
        "tersoff": (silicon(), "tersoff"),
    }


def lmp() -> str:
    """Return the executable of this environment."""
    found = shutil.which("lmp", path=str(Path(sys.executable).parent))
    if found is None:
        raise SystemExit("there is no lmp beside this Python")
    return found


def loop_s(folder: Path, pattern: str) -> float:
    """Return the seconds that all runs in the logs spent in their loops."""
    texts = [path.read_text() for path in folder.glob(pattern)]
    times = [float(t) for text in texts for t in _LOOP.findall(text)]
    if not times:
        raise SystemExit(f"no loop time in {folder}/{pattern}")
    return sum(times)


def by_engine(engine: LAMMPSEngine, inputs: Path, ranks: int) -> tuple[float, float]:
    """Return loop time and wall time of the engine, in a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        engine.execute(inputs, Path(folder), resources=Resources(ranks))
        return loop_s(Path(folder), "log.*.lammps"), time.perf_counter() - began


def by_lmp(inputs: Path, ranks: int, suffix: bool = True) -> tuple[float, float]:
    """Return loop time and wall time of plain ``lmp``, in a fresh folder."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        shutil.copytree(inputs, folder)
        if not suffix:
            script = folder / "in.lammps"
            text = script.read_text()
            if "suffix opt\n" not in text:
                raise SystemExit("the script chooses no variants of styles")
            script.write_text(text.replace("suffix opt\n", ""))
        launcher = launch_command(Resources(ranks)) if ranks > 1 else []
        began = time.perf_counter()
        subprocess.run(
            [*launcher, lmp(), "-in", "in.lammps"],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return loop_s(folder, "log.lammps"), time.perf_counter() - began


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list]:
    """Return what each way gave, all of them once per repeat, in turned order."""
    found: dict[str, list] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name in list(ways)[:: -1 if repeat % 2 else 1]:
            found[name].append(ways[name]())
    return found


def ratio(values: list[float], others: list[float]) -> Row:
    """Return the median of the ratios of pairs, and its quartiles."""
    low, median, high = np.percentile(np.divide(values, others), [25, 50, 75])
    return {"ratio": float(median), "low": float(low), "high": float(high)}


def prepare(
    engine: LAMMPSEngine,
    structure: Structure,
    potential: Any,
    folder: Path,
    **more: Any,
) -> Path:
    """Return the input folder of a short run."""
    parameters = {
        "workflow_type": "MD_NVE_LAMMPS",
        "potential": potential,
        "temperature": 50.0,
        "equilibration_steps": 0,
        "thermo_every": 100,
        "dump_every": 0,
        "restart_every": 100_000,
        **more,
    }
    return engine.prepare_input(structure, parameters, folder)


def measure_md(arguments: argparse.Namespace) -> list[Row]:
    """Return loop and wall times of the engine and of plain ``lmp``."""
    return [
        row
        for name in arguments.systems
        for steps in arguments.steps
        for row in measure_run(name, steps, arguments)
    ]


def measure_run(name: str, steps: int, arguments: argparse.Namespace) -> list[Row]:
    """Return loop and wall times of one simulation, run in three ways."""
    engine, ranks = LAMMPSEngine(), arguments.ranks
    structure, potential = systems()[name]
    with tempfile.TemporaryDirectory() as folder:
        inputs = prepare(
            engine,
            structure,
            potential,
            Path(folder),
            num_steps=steps,
            supercell_min_atoms=arguments.atoms,
        )
        found = interleaved(
            {
                "engine": lambda: by_engine(engine, inputs, ranks),
                "lmp": lambda: by_lmp(inputs, ranks),
                "lmp, no suffix": lambda: by_lmp(inputs, ranks, suffix=False),
            },
            arguments.repeats,
        )
    loops = {way: [loop for loop, _ in times] for way, times in found.items()}
    rows = [
        {
            "case": f"{name} {steps}",
            "way": way,
            "loop_s": statistics.median(loops[way]),
            "shortest_loop_s": min(loops[way]),
            "wall_s": statistics.median(wall for _, wall in times),
        }
        for way, times in found.items()
    ]
    rows += [
        {
            "case": f"{name} {steps}",
            "way": f"engine / {other}",
            **ratio(loops["engine"], loops[other]),
            "longer_ms": 1e3
            * float(np.median(np.subtract(loops["engine"], loops[other]))),
        }
        for other in list(loops)[1:]
    ]
    return rows


def measure_tiny(arguments: argparse.Namespace) -> list[Row]:
    """Return wall times of a run of ten steps."""
    with ForkServer() as server, tempfile.TemporaryDirectory() as folder:
        alone, warm = LAMMPSEngine(), LAMMPSEngine(server=server)
        potential = file_potential("sw", "Si.sw")
        inputs = prepare(alone, silicon(), potential, Path(folder), num_steps=10)
        by_engine(warm, inputs, 1)  # the first child waits for the server's imports
        found = interleaved(
            {
                "warm server": lambda: by_engine(warm, inputs, 1)[1],
                "own process": lambda: by_engine(alone, inputs, 1)[1],
                "lmp": lambda: by_lmp(inputs, 1)[1],
            },
            arguments.repeats,
        )
    return [
        {
            "case": "tiny",
            "way": way,
            "wall_s": statistics.median(times),
            "shortest_s": min(times),
            "longest_s": max(times),
        }
        for way, times in found.items()
    ]


def copies(n_atoms: int, count: int, strain: float = 0.0) -> list[Structure]:
    """Return displaced copies of a cell of 8, 16, 32 or 64 atoms, also strained."""
    repeats = {8: (1, 1, 1), 16: (2, 1, 1), 32: (2, 2, 1), 64: (2, 2, 2)}[n_atoms]
    random = np.random.default_rng(5)
    found = []
    for _ in range(count):
        cell = silicon() * list(repeats)
        moved = cell.cart_coords + random.normal(scale=0.05, size=(n_atoms, 3))
        copy = Structure(cell.lattice, cell.species, moved, coords_are_cartesian=True)
        if strain:
            copy.apply_strain(random.uniform(-strain, strain, size=3))
        found.append(copy)
    return found


def energies_kept(potential: Any, structures: list[Structure]) -> list[float]:
    """Return energies by one calculator, which keeps its pair style."""
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        LammpsCalculator(potential, Path(folder)) as calculator,
    ):
        for s in structures:
            calculator.load([x.species_string for x in s], s.lattice.matrix)
            result = calculator.evaluate(s.lattice.matrix, s.frac_coords)
            found.append(result.energy_ev)
    return found


@contextlib.contextmanager
def ase_calculator(potential: Any) -> Iterator[Any]:
    """Give ASE's LAMMPSlib, which keeps its instance."""
    from ase.calculators.lammpslib import LAMMPSlib

    with tempfile.TemporaryDirectory() as folder:
        potential.install(Path(folder))
        file = next(Path(folder).glob("*.*"))
        calculator = LAMMPSlib(
            lmpcmds=[f"pair_style {potential.pair_style}", f"pair_coeff * * {file} Si"],
            atom_types={"Si": 1},
            keep_alive=True,
            log_file=None,
        )
        yield calculator
        calculator.clean()


def ase_atoms(structure: Structure, calculator: Any) -> Any:
    """Return a structure of silicon as ASE's."""
    from ase import Atoms

    return Atoms(
        "Si" * len(structure),
        structure.cart_coords,
        cell=structure.lattice.matrix,
        pbc=True,
        calculator=calculator,
    )


def energies_ase(potential: Any, structures: list[Structure]) -> list[float]:
    """Return energies by ASE; forces and stresses as well."""
    found = []
    with ase_calculator(potential) as calculator:
        for s in structures:
            atoms = ase_atoms(s, calculator)
            found.append(float(atoms.get_potential_energy()))
            atoms.get_forces()
            atoms.get_stress()
    return found


def minima_kept(potential: Any, structures: list[Structure]) -> list[float]:
    """Return energies of relaxed structures by one calculator."""
    found, settings = [], RelaxationSettings()
    with (
        tempfile.TemporaryDirectory() as folder,
        LammpsCalculator(potential, Path(folder)) as calculator,
    ):
        for s in structures:
            task = {
                "species": [x.species_string for x in s],
                "lattice": s.lattice.matrix,
                "frac_coords": s.frac_coords,
            }
            result = relax_one(calculator, task, settings)
            if result is None or not result.converged:
                raise SystemExit("a structure was not relaxed")
            found.append(float(result.energy_ev))
    return found


def minima_ase(potential: Any, structures: list[Structure]) -> list[float]:
    """Return the same by ASE: BFGS in the cell filter its manual advises."""
    from ase.filters import FrechetCellFilter
    from ase.optimize import BFGS

    found, settings = [], RelaxationSettings()
    with ase_calculator(potential) as calculator:
        for s in structures:
            atoms = ase_atoms(s, calculator)
            search = BFGS(FrechetCellFilter(atoms), logfile=None)
            for _ in search.irun(fmax=0.0, steps=settings.max_steps):
                forces = np.linalg.norm(atoms.get_forces(), axis=1).max()
                stress = np.abs(atoms.get_stress()).max() * EV_PER_A3_IN_BAR
                if forces <= settings.max_force_ev_a and (
                    stress <= settings.max_stress_bar
                ):
                    break
            else:
                raise SystemExit("ASE did not relax a structure")
            found.append(float(atoms.get_potential_energy()))
    return found


def energies_processes(potential: Any, structures: list[Structure]) -> list[float]:
    """Return energies by one process per structure."""
    engine, found = LAMMPSEngine(), []
    for s in structures:
        with tempfile.TemporaryDirectory() as folder:
            inputs = engine.prepare_input(
                s,
                {"workflow_type": "STATIC_LAMMPS", "potential": potential},
                Path(folder),
            )
            engine.execute(inputs, Path(folder) / "output")
            result = engine.parse_output(Path(folder) / "output")
            found.append(float(result["final_potential_energy"]))
    return found


def ratios_to_others(case: str, rates: dict[str, list[float]]) -> list[Row]:
    """Return how much faster the first way is than each of the others."""
    first, *others = rates
    return [
        {"case": case, "way": f"{first} / {other}", **ratio(rates[first], rates[other])}
        for other in others
    ]


def measure_static(arguments: argparse.Namespace) -> list[Row]:
    """Return structures per second, and the largest difference to fresh energies."""
    potential, rows = file_potential("sw", "Si.sw"), []
    for n_atoms in arguments.sizes:
        structures = copies(n_atoms, arguments.structures)
        fresh = [energies_kept(potential, [s])[0] for s in structures]
        few = structures[: arguments.processes]
        ways = {
            "kept pair style": (energies_kept, structures),
            "ASE LAMMPSlib": (energies_ase, structures),
            "a process each": (energies_processes, few),
        }

        def timed(way: str, ways: dict[str, Any] = ways) -> tuple[float, list[float]]:
            function, chosen = ways[way]
            began = time.perf_counter()
            energies = function(potential, chosen)
            return len(chosen) / (time.perf_counter() - began), energies

        found = interleaved(
            {way: lambda way=way, timed=timed: timed(way) for way in ways},
            arguments.repeats,
        )
        rates = {way: [rate for rate, _ in results] for way, results in found.items()}
        for way, results in found.items():
            worst = max(
                abs(energy - expected) / n_atoms
                for _, energies in results
                for energy, expected in zip(energies, fresh, strict=False)
            )
            if worst > _SAME_EV_PER_ATOM:
                raise SystemExit(f"{way}: energies differ by {worst:.2e} eV/atom")
            rows.append(
                {
                    "case": f"{n_atoms} atoms",
                    "way": way,
                    "structures_per_s": statistics.median(rates[way]),
                    "worst_ev_per_atom": worst,
                }
            )
        rows += ratios_to_others(f"{n_atoms} atoms", rates)
    return rows


def measure_relax(arguments: argparse.Namespace) -> list[Row]:
    """Return relaxations per second; both ways must find the same minima."""
    potential, rows = file_potential("sw", "Si.sw"), []
    ways = {"kept pair style": minima_kept, "ASE BFGS": minima_ase}
    for n_atoms in arguments.sizes:
        structures = copies(n_atoms, arguments.structures, strain=0.02)

        def timed(
            way: str, structures: list[Structure] = structures
        ) -> tuple[float, list[float]]:
            began = time.perf_counter()
            energies = ways[way](potential, structures)
            return len(structures) / (time.perf_counter() - began), energies

        found = interleaved(
            {way: lambda way=way, timed=timed: timed(way) for way in ways},
            arguments.repeats,
        )
        first, second = (np.array(results[0][1]) for results in found.values())
        worst = float(np.abs(first - second).max()) / n_atoms
        if worst > _SAME_MINIMUM_EV_PER_ATOM:
            raise SystemExit(f"the minima differ by {worst:.2e} eV/atom")
        rates = {way: [rate for rate, _ in results] for way, results in found.items()}
        rows += [
            {
                "case": f"{n_atoms} atoms",
                "way": way,
                "structures_per_s": statistics.median(rates[way]),
                "apart_ev_per_atom": worst,
            }
            for way in rates
        ]
        rows += ratios_to_others(f"{n_atoms} atoms", rates)
    return rows


_PARTS = {
    "md": measure_md,
    "tiny": measure_tiny,
    "static": measure_static,
    "relax": measure_relax,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=_PARTS)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--ranks", type=int, default=1, help="of md")
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[5000], help="of md, for each a run"
    )
    parser.add_argument("--atoms", type=int, default=1000, help="of md, at least")
    parser.add_argument(
        "--systems", nargs="+", choices=systems(), default=list(systems())
    )
    parser.add_argument(
        "--sizes", nargs="+", type=int, choices=(8, 16, 32, 64), default=[8, 64]
    )
    parser.add_argument(
        "--structures", type=int, default=50, help="of static and relax"
    )
    parser.add_argument("--processes", type=int, default=2, help="structures of them")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()

    load = os.getloadavg()
    rows = _PARTS[arguments.part](arguments)
    print(f"load {load[0]:.2f} before, {os.getloadavg()[0]:.2f} after")
    for row in rows:
        numbers = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float)]
        print(f"{row['case']:13} {row['way']:32} {'  '.join(numbers)}")
    if arguments.output is not None:
        options = {k: v for k, v in vars(arguments).items() if k != "output"}
        report = {
            "time": utc_now(),
            "machine": platform.platform(),
            "cores": len(os.sched_getaffinity(0)),
            "load_before": load,
            "load_after": os.getloadavg(),
            "versions": package_versions(),
            "options": options,
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
