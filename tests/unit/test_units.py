from __future__ import annotations

import pytest

from nanoos_fw import units


def test_constants_agree_with_an_independent_table() -> None:
    from scipy import constants

    assert pytest.approx(constants.e, rel=1e-12) == units.EV_IN_JOULE
    assert pytest.approx(constants.k / constants.e, rel=1e-9) == (
        units.BOLTZMANN_EV_PER_K
    )
    assert pytest.approx(constants.Avogadro, rel=1e-12) == units.AVOGADRO
    # scipy carries CODATA 2022, whose atomic mass constant moved in the tenth digit.
    assert pytest.approx(constants.atomic_mass, rel=1e-8) == units.ATOMIC_MASS_KG
    assert pytest.approx(constants.atm / 1e5, rel=1e-12) == units.ATM_IN_BAR


def test_conversions_agree_with_their_definitions() -> None:
    # 1 eV/Å³ = e J / 1e-30 m³ in pascal; 1 bar = 1e5 Pa, 1 GPa = 1e9 Pa.
    pascal = 1.602176634e-19 / (1e-10) ** 3
    assert pytest.approx(pascal / 1e5) == units.EV_PER_A3_IN_BAR
    assert pytest.approx(160.21766208) == units.EV_PER_A3_IN_GPA
    assert pytest.approx(0.0433641, abs=1e-7) == units.KCAL_PER_MOL_IN_EV


def test_constants_agree_with_those_of_pymatgen() -> None:
    from pymatgen.core.units import kb

    assert pytest.approx(float(kb), rel=1e-8) == units.BOLTZMANN_EV_PER_K


def test_every_stored_quantity_has_a_unit() -> None:
    assert units.unit_of("formation_energy_per_atom") == "eV/atom"
    assert units.unit_of("pressure") == "bar"
    assert all(units.UNITS.values())


def test_the_unit_of_a_foreign_target_is_not_guessed() -> None:
    assert units.unit_of("hardness of my sample") == ""
