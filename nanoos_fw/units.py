"""The unit of every stored quantity, and the conversions between unit systems.

One table, so that no number is written or read without a stated unit. Energies are
in eV, lengths in Å, times in fs, pressures in bar, temperatures in K, masses in u.
"""

from __future__ import annotations

# CODATA 2018 (exact where the SI defines the constant).
BOLTZMANN_EV_PER_K = 8.617333262e-5
EV_IN_JOULE = 1.602176634e-19
AVOGADRO = 6.02214076e23
ATOMIC_MASS_KG = 1.66053906660e-27
KCAL_PER_MOL_IN_EV = 4184.0 / AVOGADRO / EV_IN_JOULE
EV_PER_A3_IN_BAR = EV_IN_JOULE * 1e30 / 1e5
EV_PER_A3_IN_GPA = EV_IN_JOULE * 1e30 / 1e9
ATM_IN_BAR = 1.01325

UNITS: dict[str, str] = {
    "energy": "eV",
    "energy_per_atom": "eV/atom",
    "formation_energy_per_atom": "eV/atom",
    "bandgap": "eV",
    "length": "Å",
    "lattice": "Å",
    "volume": "Å³",
    "volume_per_atom": "Å³/atom",
    "density": "g/cm³",
    "temperature": "K",
    "pressure": "bar",
    "time": "fs",
    "velocity": "Å/fs",
    "force": "eV/Å",
    "stress": "bar",
    "mass": "u",
    "diffusion_coefficient": "Å²/fs",
}


def unit_of(quantity: str) -> str:
    """Return the unit in which a quantity is stored; empty for unknown targets.

    Targets imported by users carry names of their own; their unit is not guessed.
    """
    return UNITS.get(quantity, "")
