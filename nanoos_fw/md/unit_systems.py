"""LAMMPS' unit systems, and the way from and to the units used here.

Users give K, fs, bar, Å, e and eV whatever the potential was fitted in, and get them
back. A potential decides on the unit system of the script; this table is the only
place where numbers change from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from nanoos_fw.errors import InputError
from nanoos_fw.units import ATM_IN_BAR, KCAL_PER_MOL_IN_EV

Units = Literal["metal", "real"]


@dataclass(frozen=True)
class UnitSystem:
    """What one unit of a LAMMPS ``units`` style is here.

    A number of LAMMPS times the field is the number in the unit that the field's name
    ends in; see `from_lammps` and `to_lammps`.

    Parameters
    ----------
    name
        Argument of the ``units`` command.
    energy_ev, length_a, time_fs, mass_u, pressure_bar, force_ev_a, velocity_a_fs
        One unit of energy in eV, of length in Å, and so on.

    References
    ----------
    LAMMPS manual, command ``units``.
    """

    name: Units
    energy_ev: float
    length_a: float
    time_fs: float
    mass_u: float
    pressure_bar: float
    velocity_a_fs: float
    force_ev_a: float

    @property
    def volume_a3(self) -> float:
        """One unit of volume in Å³."""
        return self.length_a**3

    @property
    def temperature_k(self) -> float:
        """One unit of temperature in K: all of these systems use kelvin."""
        return 1.0

    def from_lammps(self, quantity: str, value: float) -> float:
        """Return a number of LAMMPS in the unit used here.

        Parameters
        ----------
        quantity
            ``energy``, ``length``, ``time``, ``mass``, ``pressure``, ``velocity``,
            ``force``, ``volume`` or ``temperature``.
        value
            In units of this system.
        """
        return value * self.factor(quantity)

    def to_lammps(self, quantity: str, value: float) -> float:
        """Return a number in the unit used here as LAMMPS wants it."""
        factor = self.factor(quantity)
        # 0.3 ps stays 0.3: a division by 1000 is exact where a product by 0.001
        # is not.
        return value / factor

    def factor(self, quantity: str) -> float:
        """Return one unit of a quantity in the unit used here.

        Raises
        ------
        InputError
            If there is no such quantity.
        """
        try:
            return float(getattr(self, _FIELDS[quantity]))
        except KeyError:
            raise InputError(
                f"no unit is known for {quantity!r}", advice=f"known: {list(_FIELDS)}"
            ) from None


_FIELDS = {
    "energy": "energy_ev",
    "length": "length_a",
    "time": "time_fs",
    "mass": "mass_u",
    "pressure": "pressure_bar",
    "velocity": "velocity_a_fs",
    "force": "force_ev_a",
    "volume": "volume_a3",
    "temperature": "temperature_k",
}

UNIT_SYSTEMS: dict[str, UnitSystem] = {
    "metal": UnitSystem(
        name="metal",
        energy_ev=1.0,
        length_a=1.0,
        time_fs=1000.0,
        mass_u=1.0,
        pressure_bar=1.0,
        velocity_a_fs=1e-3,
        force_ev_a=1.0,
    ),
    "real": UnitSystem(
        name="real",
        energy_ev=KCAL_PER_MOL_IN_EV,
        length_a=1.0,
        time_fs=1.0,
        mass_u=1.0,
        pressure_bar=ATM_IN_BAR,
        velocity_a_fs=1.0,
        force_ev_a=KCAL_PER_MOL_IN_EV,
    ),
}
assert set(UNIT_SYSTEMS) == set(get_args(Units))


def unit_system(name: str) -> UnitSystem:
    """Return a unit system by LAMMPS' name.

    Raises
    ------
    InputError
        If it is not one of those here. Reduced units (``lj``) have no temperature in
        K and no time in fs: scale the parameters by an element's epsilon and sigma.
    """
    try:
        return UNIT_SYSTEMS[name]
    except KeyError:
        why = ""
        if name == "lj":
            why = ": reduced units have no kelvin and no femtosecond"
        raise InputError(
            f"units {name!r} cannot be used{why}",
            evidence={"known": sorted(UNIT_SYSTEMS)},
            advice="give epsilon in eV and sigma in Å, and run in metal units"
            if name == "lj"
            else f"use {', '.join(UNIT_SYSTEMS)}",
        ) from None
