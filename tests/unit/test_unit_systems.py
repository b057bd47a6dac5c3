from __future__ import annotations

import numpy as np
import pytest

from nanoos_fw.errors import InputError
from nanoos_fw.md.unit_systems import UNIT_SYSTEMS, unit_system
from nanoos_fw.units import ATOMIC_MASS_KG, EV_IN_JOULE


@pytest.mark.parametrize("name", UNIT_SYSTEMS)
def test_units_of_one_system_belong_together(name):
    units = unit_system(name)
    for quantity in ("energy", "time", "pressure", "velocity", "force"):
        there = units.to_lammps(quantity, 3.7)
        assert units.from_lammps(quantity, there) == pytest.approx(3.7, rel=1e-14)
    # An energy is a force along a length.
    assert units.force_ev_a * units.length_a == pytest.approx(units.energy_ev)


def test_kinetic_energy_is_one_in_all_systems():
    # A copper atom at 5 Å/ps.
    mass_kg, velocity_m_s = 63.546 * ATOMIC_MASS_KG, 500.0
    ev = 0.5 * mass_kg * velocity_m_s**2 / EV_IN_JOULE
    # With the factor mvv2e that LAMMPS holds for each system.
    for name, mvv2e in (("metal", 1.0364269e-4), ("real", 48.88821291**2)):
        units = unit_system(name)
        v = units.to_lammps("velocity", 5e-3)
        energy = 0.5 * mvv2e * 63.546 * v**2
        assert units.from_lammps("energy", energy) == pytest.approx(ev, rel=1e-6)


def test_reduced_and_unknown_units_are_refused():
    with pytest.raises(InputError, match="no kelvin"):
        unit_system("lj")
    with pytest.raises(InputError, match="use metal, real"):
        unit_system("si")
    with pytest.raises(InputError, match="metal"):
        unit_system("imperial")
    with pytest.raises(InputError, match="no unit is known"):
        unit_system("metal").factor("colour")


# LAMMPS holds constants of 2002 to 2014, this package those of 2018.
CONSTANTS = 5e-6


def argon_run(name):
    """Energy, pressure and more of compressed argon at the start and after 200 fs."""
    from nanoos_fw.md.calculator import open_lammps

    units = unit_system(name)

    def there(quantity, value):
        return repr(units.to_lammps(quantity, value))

    side = there("length", 15.0)
    lmp = open_lammps()
    for command in (
        f"units {name}",
        f"lattice fcc {there('length', 5.0)}",
        f"region box block 0 {side} 0 {side} 0 {side} units box",
        "create_box 1 box",
        "create_atoms 1 box",
        f"mass 1 {there('mass', 39.948)}",
        f"pair_style lj/cut {there('length', 7.0)}",
        f"pair_coeff 1 1 {there('energy', 0.0104)} {there('length', 3.4)}",
        f"neighbor {there('length', 1.0)} bin",
        "thermo_modify norm no",
        "velocity all create 100.0 7 loop all",
        f"timestep {there('time', 4.0)}",
        "fix 1 all nve",
        "thermo_style custom step temp pe ke press vol time",
    ):
        lmp.command(command)
    found = {}
    for steps in (0, 50):
        lmp.command(f"run {steps} post no")
        for keyword, quantity in (
            ("temp", "temperature"),
            ("pe", "energy"),
            ("ke", "energy"),
            ("press", "pressure"),
            ("vol", "volume"),
            ("time", "time"),
        ):
            value = units.from_lammps(quantity, lmp.get_thermo(keyword))
            found[f"{keyword} {steps}"] = value
    forces = np.array(lmp.gather_atoms("f", 1, 3))
    found["force"] = units.from_lammps("force", np.abs(forces).max())
    velocities = np.array(lmp.gather_atoms("v", 1, 3))
    found["velocity"] = units.from_lammps("velocity", np.abs(velocities).max())
    lmp.close()
    return found


@pytest.mark.lammps
@pytest.mark.parametrize("name", [n for n in UNIT_SYSTEMS if n != "metal"])
def test_one_crystal_moves_alike_in_all_systems(name):
    metal, other = argon_run("metal"), argon_run(name)
    assert metal["time 50"] == pytest.approx(200.0)
    assert metal["ke 0"] == pytest.approx(107 * 1.5 * 8.617333e-5 * 100, rel=CONSTANTS)
    assert other == pytest.approx(metal, rel=CONSTANTS)
