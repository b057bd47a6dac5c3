from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.core.operations import SymmOp

from nanoos_fw.errors import (
    InputError,
    LaunchError,
    OutOfTimeError,
    SimulationError,
)
from nanoos_fw.md import relaxation
from nanoos_fw.md.calculator import Evaluation, simulation_error
from nanoos_fw.md.cells import check_distances
from nanoos_fw.md.potential_terms import PairCoefficient, PairTerm
from nanoos_fw.md.potentials import Potential, lennard_jones_potential
from nanoos_fw.md.relaxation import (
    RelaxationResult,
    RelaxationSettings,
    deal,
    relax_one,
    relax_structures,
)
from nanoos_fw.parallel import Communicator, Resources, StopRequest
from nanoos_fw.provenance import read_json
from nanoos_fw.units import EV_PER_A3_IN_BAR

TIGHT = RelaxationSettings(max_force_ev_a=1e-6, max_stress_bar=0.1)


class Morse:
    """Energy, forces and stress by plain sums over images: the calculator's twin."""

    alpha, cutoff = 1.4, 9.0

    def __init__(self):
        self.depth = {("A", "A"): 0.30, ("A", "B"): 0.45, ("B", "B"): 0.25}
        self.length = {("A", "A"): 2.6, ("A", "B"): 2.7, ("B", "B"): 2.9}
        self.evaluations = 0
        self.fail = False

    def load(self, species, lattice, charges=None):
        self.species = species

    def reset(self):
        pass

    def evaluate(self, lattice, frac):
        self.evaluations += 1
        if self.fail:
            raise SimulationError("LAMMPS failed", evidence={"class": "lost_atoms"})
        x = frac @ lattice
        n = np.ceil(self.cutoff * np.linalg.norm(np.linalg.inv(lattice), axis=0))
        shifts = np.array(
            list(itertools.product(*[range(-int(k) - 1, int(k) + 2) for k in n]))
        )
        energy, forces, virial = 0.0, np.zeros_like(x), np.zeros((3, 3))
        for i, j in itertools.product(range(len(x)), repeat=2):
            d = x[j] - x[i] + shifts @ lattice
            r = np.linalg.norm(d, axis=1)
            d, r = d[(r > 1e-9) & (r < self.cutoff)], r[(r > 1e-9) & (r < self.cutoff)]
            pair = tuple(sorted((self.species[i], self.species[j])))
            e = np.exp(-self.alpha * (r - self.length[pair]))
            energy += 0.5 * (self.depth[pair] * (e**2 - 2 * e)).sum()
            slope = self.depth[pair] * 2 * self.alpha * (e - e**2)
            forces[i] += (slope / r) @ d
            virial += 0.5 * np.einsum("n,ni,nj->ij", slope / r, d, d)
        return Evaluation(energy, forces, virial / abs(np.linalg.det(lattice)))


def task(species, lattice, frac):
    return {"species": species, "lattice": lattice, "frac_coords": frac}


def rotation(seed):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q


L10 = (["A", "B"], np.diag([2.8, 2.8, 3.95]), [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_the_twin_is_consistent():
    # Guards the tests below: forces and stress are derivatives of the energy.
    morse, h = Morse(), 1e-5
    species, lattice, _ = L10
    frac = np.array([[0, 0, 0], [0.45, 0.52, 0.5]])
    morse.load(species, lattice)
    e = morse.evaluate(lattice, frac)
    move = np.zeros((2, 3))
    move[1, 0] = h
    up = morse.evaluate(lattice, frac + move @ np.linalg.inv(lattice)).energy_ev
    down = morse.evaluate(lattice, frac - move @ np.linalg.inv(lattice)).energy_ev
    assert e.forces_ev_a[1, 0] == pytest.approx((down - up) / 2 / h, abs=1e-5)
    strain = np.zeros((3, 3))
    strain[0, 2] = strain[2, 0] = h / 2
    up = morse.evaluate(lattice @ (np.eye(3) + strain), frac).energy_ev
    down = morse.evaluate(lattice @ (np.eye(3) - strain), frac).energy_ev
    volume = np.linalg.det(lattice)
    assert e.stress_ev_a3[0, 2] == pytest.approx((up - down) / 2 / h / volume, abs=1e-5)


def test_tetragonal_cell_finds_its_own_axes():
    result = relax_one(Morse(), task(*L10), TIGHT)
    assert result.converged
    a, b, c = np.linalg.norm(result.lattice_a, axis=1)
    assert a == pytest.approx(b, abs=1e-6)
    assert abs(c / a - 3.95 / 2.8) > 0.01
    # The minimum over a and c, found without the optimizer.
    morse = Morse()
    morse.load(L10[0], None)
    frac = np.array(L10[2], float)
    for da, dc in itertools.product((-0.004, 0.0, 0.004), repeat=2):
        other = np.diag([a + da, a + da, c + dc])
        assert morse.evaluate(other, frac).energy_ev >= result.energy_ev - 1e-9
    assert result.max_force_ev_a < 1e-6
    assert np.abs(result.stress_bar).max() < 0.1
    assert result.energy_ev < result.initial_energy_per_atom_ev * 2


def test_result_keeps_orientation_sites_and_does_not_depend_on_them():
    rng = np.random.default_rng(0)
    lattice = np.array([[4.1, 0.2, 0.0], [0.1, 4.0, 0.3], [-0.2, 0.1, 4.2]])
    frac = np.array([[0, 0, 0], [0.5, 0.5, 0.05], [0.5, 0, 0.5], [0, 0.45, 0.5]])
    frac += rng.normal(scale=0.01, size=(4, 3)) + [[0, 0, 0], [1, 0, 0]] * 2
    species = ["A", "B", "B", "A"]
    plain = relax_one(Morse(), task(species, lattice, frac), TIGHT)
    q = rotation(1)
    turned = relax_one(Morse(), task(species, lattice @ q, frac), TIGHT)
    order = [2, 0, 3, 1]
    mixed = relax_one(
        Morse(), task([species[i] for i in order], lattice, frac[order]), TIGHT
    )
    assert plain.converged
    assert turned.energy_ev == pytest.approx(plain.energy_ev, abs=1e-7)
    assert mixed.energy_ev == pytest.approx(plain.energy_ev, abs=1e-7)
    np.testing.assert_allclose(turned.lattice_a, plain.lattice_a @ q, atol=1e-6)
    np.testing.assert_allclose(turned.frac_coords, plain.frac_coords, atol=1e-6)
    np.testing.assert_allclose(
        mixed.frac_coords, np.array(plain.frac_coords)[order], atol=1e-6
    )
    # No rotation is added, and sites stay in the image they were given in.
    deformation = np.linalg.inv(lattice) @ np.array(plain.lattice_a)
    np.testing.assert_allclose(deformation, deformation.T, atol=1e-12)
    assert np.abs(np.array(plain.frac_coords) - frac).max() < 0.2


def test_pressure_is_met_and_lowers_the_volume():
    free = relax_one(Morse(), task(*L10), TIGHT)
    wanted = 1e5
    pressed = relax_one(
        Morse(), task(*L10), TIGHT.model_copy(update={"pressure_bar": wanted})
    )
    assert pressed.converged
    assert pressed.volume_a3 < free.volume_a3
    assert pressed.pressure_bar == pytest.approx(wanted, abs=0.2)
    # Enthalpy, not energy, is least: dE = -p dV.
    p = 0.5 * wanted / EV_PER_A3_IN_BAR
    work = p * (free.volume_a3 - pressed.volume_a3)
    assert pressed.energy_ev - free.energy_ev == pytest.approx(work, rel=0.15)


def test_fixed_cell_moves_atoms_only():
    species, lattice, frac = L10
    moved = [frac[0], [0.45, 0.5, 0.5]]
    settings = TIGHT.model_copy(update={"relax_cell": False})
    result = relax_one(Morse(), task(species, lattice, moved), settings)
    assert result.converged
    np.testing.assert_allclose(result.lattice_a, lattice, atol=1e-12)
    np.testing.assert_allclose(
        np.subtract(result.frac_coords[1], result.frac_coords[0]), [0.5] * 3, atol=1e-5
    )


def test_single_point_moves_nothing():
    morse = Morse()
    result = relax_one(morse, task(*L10), RelaxationSettings(relax=False))
    assert morse.evaluations == result.n_evaluations == 1
    assert result.converged
    np.testing.assert_array_equal(result.lattice_a, L10[1])
    assert result.energy_per_atom_ev == result.initial_energy_per_atom_ev
    assert np.abs(result.stress_bar).max() > 100.0


def test_running_out_of_steps_is_no_convergence():
    settings = TIGHT.model_copy(update={"max_steps": 1})
    result = relax_one(Morse(), task(*L10), settings)
    assert not result.converged
    assert result.error_class == "not_converged"
    assert result.n_steps == 1
    assert result.energy_ev is not None


def test_failures_become_results_with_their_class():
    morse = Morse()
    morse.fail = True
    result = relax_one(morse, task(*L10), TIGHT)
    assert (result.converged, result.error_class) == (False, "lost_atoms")
    assert result.energy_ev is None
    with pytest.raises(SimulationError, match="LAMMPS failed"):
        result.structure()
    close = task(["A", "A"], np.eye(3) * 4.0, [[0, 0, 0], [0, 0, 0.9]])
    result = relax_one(Morse(), close, TIGHT)
    assert result.error_class == "atoms_too_close"
    assert "0.400" in result.error


@pytest.mark.parametrize(
    ("charges", "message"), [([1.0, -0.5], "add up to"), (None, "needs charges")]
)
def test_a_cell_that_is_not_neutral_is_not_relaxed(charges, message, tmp_path):
    salt = Structure(
        Lattice.cubic(3.0),
        ["Na", "Cl"],
        [[0, 0, 0], [0.5, 0.5, 0.5]],
        site_properties=None if charges is None else {"charge": charges},
    )
    pair = PairTerm(
        style="coul/dsf", arguments=(0.2, 9.0), coefficients=(PairCoefficient(),)
    )
    ionic = Potential(
        name="ionic",
        terms=(pair,),
        elements=("Na", "Cl"),
        atom_style="charge",
        charges="given",
        timestep_fs=1.0,
    )
    result = relax_structures({"salt": salt}, ionic, tmp_path)["salt"]
    assert message in result.error
    assert result.energy_ev is None


def test_a_relaxed_structure_keeps_its_charges():
    def relaxed(**more):
        result = relax_one(Morse(), {**task(*L10), **more}, TIGHT)
        return dataclasses.replace(result, species=("Cu", "Au"))

    result = relaxed(charges=[0.25, -0.25])
    stored = RelaxationResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert stored == result
    assert stored.structure().site_properties["charge"] == [0.25, -0.25]
    assert "charge" not in relaxed().structure().site_properties
    # Results of before have no such field.
    old = {k: v for k, v in result.to_dict().items() if k != "charges"}
    assert RelaxationResult.from_dict(old).charges is None


def test_stop_leaves_no_result():
    assert relax_one(Morse(), task(*L10), TIGHT, StopRequest(deadline=0.0)) is None


def test_results_survive_json():
    for settings in (TIGHT, TIGHT.model_copy(update={"max_steps": 1})):
        result = relax_one(Morse(), task(*L10), settings)
        assert RelaxationResult.from_dict(json.loads(json.dumps(result.to_dict()))) == (
            result
        )


@pytest.mark.parametrize("seed", range(20))
def test_close_atoms_are_found_across_any_boundary(seed):
    rng = np.random.default_rng(seed)
    lattice = rng.normal(scale=4.0, size=(3, 3))
    if abs(np.linalg.det(lattice)) < 20.0:
        lattice = lattice + 4.0 * np.eye(3)
    frac = rng.uniform(-2, 2, size=(3, 3))
    shift = rng.normal(size=3)
    shift *= 0.45 / np.linalg.norm(shift)
    frac[2] = frac[0] + rng.integers(-3, 4, size=3) + shift @ np.linalg.inv(lattice)
    with pytest.raises(InputError, match=r"0\.\d+ Å"):
        check_distances(["A"] * 3, lattice, frac)


def test_distant_atoms_and_short_cells():
    check_distances(["A", "B"], np.eye(3) * 3.0, np.array([[0, 0, 0], [0.5, 0.5, 0.5]]))
    with pytest.raises(InputError, match="repeats after"):
        check_distances(["A"], np.diag([0.4, 5.0, 5.0]), np.zeros((1, 3)))


def test_shares_are_even_complete_and_reproducible():
    costs = [(n, f"k{i}") for i, n in enumerate([8, 2, 2, 4, 8, 2, 6, 1, 1, 4])]
    for size in (1, 2, 3):
        shares = deal(costs, size)
        assert sorted(k for share in shares for k in share) == sorted(
            k for _, k in costs
        )
        cost = {k: n for n, k in costs}
        loads = [sum(cost[k] for k in share) for share in shares]
        assert max(loads) - min(loads) <= 2
        assert deal(list(reversed(costs)), size) == shares


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            "ERROR on proc 0: Lost atoms: original 4 current 3 (src/thermo.cpp)",
            "lost_atoms",
        ),
        ("ERROR: Non-numeric pressure - simulation unstable", "not_a_number"),
        ("ERROR on proc 1: Cannot open EAM potential file x", "file"),
        ("ERROR: something new", "lammps"),
    ],
)
def test_lammps_messages_get_a_class(text, kind):
    error = simulation_error(text, "run 10")
    assert error.evidence["class"] == kind
    assert error.evidence["command"] == "run 10"
    assert text in str(error)


# ------------------------------------------------------------------ parent and ranks


ARGON = lennard_jones_potential({"Ar": (0.0104, 3.4)}, cutoff_a=8.5)


def argon(a):
    return Structure(Lattice.cubic(a), ["Ar"], [[0, 0, 0]])


class MorseForArgon(Morse):
    def __init__(self, potential, scratch):
        super().__init__()
        self.depth = {("Ar", "Ar"): 0.3}
        self.length = {("Ar", "Ar"): 2.6}

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


@pytest.fixture
def launches(monkeypatch):
    """Run the rank program in this process; collects the keys of every launch."""
    seen = []

    def launch(module, config, *, resources, deadline):
        assert module == "nanoos_fw.md.relaxation"
        seen.append([t["key"] for t in read_json(config.parent / "structures.json")])
        stop = StopRequest(deadline)
        return relaxation.main(read_json(config), config.parent, Communicator(), stop)

    monkeypatch.setattr(relaxation, "launch_ranks", launch)
    monkeypatch.setattr(relaxation, "LammpsCalculator", MorseForArgon)
    return seen


def test_second_call_does_only_the_rest(tmp_path, launches):
    first = relax_structures({"a": argon(2.6), "b": argon(2.7)}, ARGON, tmp_path)
    again = relax_structures(
        {"x": argon(2.7), "c": argon(2.8), "a": argon(2.6)}, ARGON, tmp_path
    )
    assert [len(keys) for keys in launches] == [2, 1]
    assert list(again) == ["x", "c", "a"]
    assert again["x"] == first["b"]
    # Other settings are another piece of work.
    relax_structures({"a": argon(2.6)}, ARGON, tmp_path, settings=TIGHT)
    assert len(launches) == 3


def test_cut_last_line_is_computed_again(tmp_path, launches):
    structures = {"a": argon(2.6), "b": argon(2.7), "c": argon(2.8)}
    first = relax_structures(structures, ARGON, tmp_path)
    path = tmp_path / "results.0.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert relax_structures(structures, ARGON, tmp_path) == first
    assert [len(keys) for keys in launches] == [3, 1]


def test_bad_structures_do_not_stop_the_others(tmp_path, launches):
    mixed = Structure(Lattice.cubic(3.0), [{"Ar": 0.5, "Kr": 0.5}], [[0, 0, 0]])
    foreign = Structure(Lattice.cubic(3.0), ["Kr"], [[0, 0, 0]])
    near = Structure(Lattice.cubic(3.0), ["Ar"] * 2, [[0, 0, 0], [0, 0, 0.1]])
    nan = Structure(Lattice.cubic(3.0), ["Ar"], [[0, 0, float("nan")]])
    results = relax_structures(
        {
            "mixed": mixed,
            "ok": argon(2.6),
            "foreign": foreign,
            "near": near,
            "nan": nan,
        },
        ARGON,
        tmp_path,
    )
    assert [r.converged for r in results.values()] == [False, True, False, False, False]
    assert results["mixed"].error_class == "disordered"
    assert "Kr" in results["foreign"].error
    assert results["near"].error_class == "atoms_too_close"
    assert results["nan"].error_class == "not_a_number"


def test_out_of_time_keeps_what_is_done(tmp_path, launches):
    with pytest.raises(OutOfTimeError, match="before all 1"):
        relax_structures({"a": argon(2.6)}, ARGON, tmp_path, deadline=1.0)
    assert relax_structures({"a": argon(2.6)}, ARGON, tmp_path)["a"].converged


def test_structure_that_kills_lammps_is_given_up(tmp_path, launches, monkeypatch):
    # A crash is a process that ends: nothing of it is written after the start.
    killer, real = 2.65, relaxation.relax_one

    def relax(calculator, one, settings, stop=None):
        if abs(one["lattice"][0][0] - killer) < 1e-9:
            raise LaunchError("died with signal 11", evidence={"exit_code": -11})
        return real(calculator, one, settings, stop)

    monkeypatch.setattr(relaxation, "relax_one", relax)
    results = relax_structures(
        {"a": argon(2.6), "killer": argon(killer), "b": argon(2.7)}, ARGON, tmp_path
    )
    assert results["a"].converged
    assert results["b"].converged
    assert results["killer"].error_class == "crash"


def test_structure_beside_one_that_kills_lammps_is_innocent(
    tmp_path, launches, monkeypatch
):
    killer, real, innocent = 2.65, relaxation.relax_one, set()

    def relax(calculator, one, settings, stop=None):
        if abs(one["lattice"][0][0] - killer) < 1e-9:
            others = [key for key in launches[-1] if key > one["key"]]
            if others:  # the other rank is at this one, and ends with it
                innocent.add(max(others))
                (tmp_path / "started.1").write_text(max(others))
            raise LaunchError("died with signal 11", evidence={"exit_code": 139})
        return real(calculator, one, settings, stop)

    monkeypatch.setattr(relaxation, "relax_one", relax)
    structures = {"killer": argon(killer)}
    structures |= {f"a{i}": argon(2.6 + 0.02 * i) for i in range(8)}
    results = relax_structures(structures, ARGON, tmp_path, resources=Resources(2))
    assert innocent
    killed = results.pop("killer")
    assert killed.error_class == "crash"
    assert "SIGSEGV" in killed.error
    assert all(result.converged for result in results.values())


@pytest.mark.parametrize(
    "evidence",
    [
        {"exit_code": -9},
        {"exit_code": 137},
        {"exit_code": 143},
        {"exit_code": 1},
        {"exit_code": 134, "log_tail": "what(): std::bad_alloc"},
    ],
)
def test_ranks_killed_from_outside_are_no_result(
    tmp_path, launches, monkeypatch, evidence
):
    real, structures = relaxation.relax_one, {"a": argon(2.6), "b": argon(2.7)}

    def relax(calculator, one, settings, stop=None):
        if abs(one["lattice"][0][0] - 2.7) < 1e-9:
            raise LaunchError("died", evidence=evidence)
        return real(calculator, one, settings, stop)

    with monkeypatch.context() as ill:
        ill.setattr(relaxation, "relax_one", relax)
        for _ in range(3):  # however often
            with pytest.raises(LaunchError, match="died"):
                relax_structures(structures, ARGON, tmp_path)
    results = relax_structures(structures, ARGON, tmp_path)
    assert all(result.converged for result in results.values())


@pytest.mark.parametrize("kind", ["out_of_memory", "disk_full"])
def test_a_machine_without_room_is_no_result(kind):
    class Full(Morse):
        def evaluate(self, lattice, frac_coords):
            raise SimulationError("LAMMPS failed", evidence={"class": kind})

    with pytest.raises(SimulationError):
        relax_one(Full(), task(*L10), TIGHT)


def test_structure_of_a_result_is_the_relaxed_crystal(tmp_path, launches):
    q = rotation(5)
    turned = argon(2.6).copy()
    turned.apply_operation(SymmOp.from_rotation_and_translation(q))
    result = relax_structures({"a": turned}, ARGON, tmp_path, settings=TIGHT)["a"]
    crystal = result.structure()
    assert crystal.volume == pytest.approx(result.volume_a3)
    np.testing.assert_allclose(
        crystal.lattice.matrix / crystal.lattice.a,
        turned.lattice.matrix / 2.6,
        atol=1e-6,
    )
