"""What decides the numbers of a simulation decides its key, and nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanoos_fw.firetasks.md import MDMethod
from nanoos_fw.firetasks.relaxation import PotentialChoice, RelaxationMethod
from nanoos_fw.md.analysis import ANALYSES, AnalysisRequest
from nanoos_fw.md.engine import LAMMPSEngine
from nanoos_fw.md.inputs import MDConfig
from nanoos_fw.md.optimizer import RelaxationSettings
from nanoos_fw.md.potential_terms import (
    PairCoefficient,
    PairTerm,
    PotentialFile,
    PotentialFix,
)
from nanoos_fw.md.potentials import Potential
from nanoos_fw.md.protocols import ScheduleStep
from nanoos_fw.provenance import read_json

ANALYSIS: dict[str, Any] = {
    "rdf_max_a": 7.0,
    "rdf_bins": 100,
    "adf_cutoff_a": 3.0,
    "adf_bins": 90,
    "msd_first_ps": 0.5,
    "msd_last_ps": 2.0,
    "vdos_longest_ps": 1.0,
}

# A new field fails the first test below until somebody has decided about it.
CONFIG: dict[str, Any] = {
    "workflow_type": "MD_NPT_LAMMPS",
    "temperature_k": 301.0,
    "pressure_bar": 2.0,
    "timestep_fs": 0.5,
    "equilibration_steps": 2001,
    "num_steps": 10_001,
    "thermo_every": 49,
    "dump_every": 99,
    "restart_every": 1999,
    "seed": 2,
    "supercell_min_atoms": 2,
    "thermostat_fs": 99.0,
    "barostat_fs": 999.0,
    "barostat": "iso",
    "anneal_temperature_k": 901.0,
    "schedule": [{"action": "hold", "steps": 10_000}],
    "anneal_ensemble": "nvt",
    "relax_cell": True,
    "max_force_ev_a": 2e-3,
    "max_stress_bar": 51.0,
    "pre_minimize_steps": 10,
    "neighbor_skin_a": 1.1,
    "neighbor_every": 2,
    "neighbor_one": 2001,
    "max_strain": 0.004,
    "strain_points": 3,
}
# Where the default workflow does not know the field.
AROUND: dict[str, dict[str, Any]] = {
    "pressure_bar": {"workflow_type": "MD_NPT_LAMMPS"},
    "anneal_temperature_k": {
        "workflow_type": "MD_ANNEAL_LAMMPS", "anneal_temperature_k": 900.0
    },
    "schedule": {
        "workflow_type": "MD_ANNEAL_LAMMPS",
        "schedule": [{"action": "heat", "temperature_k": 400.0, "steps": 10_000}],
    },
    "anneal_ensemble": {
        "workflow_type": "MD_ANNEAL_LAMMPS", "anneal_temperature_k": 900.0
    },
    "relax_cell": {"workflow_type": "MINIMIZE_LAMMPS"},
    "max_strain": {"workflow_type": "ELASTIC_LAMMPS"},
    "strain_points": {"workflow_type": "ELASTIC_LAMMPS"},
}  # fmt: skip
STEP: dict[str, Any] = {
    "action": "cool", "steps": 11, "temperature_k": 401.0, "ensemble": "nvt"
}  # fmt: skip
# Done with the results of a simulation, or whether to make it at all.
METHOD: dict[str, Any] = {
    "rdf_max_a": 7.0,
    "rdf_bins": 100,
    "analyses": ("vdos",),
    "vdos_longest_ps": 1.0,
    "adf_cutoff_a": 3.0,
    "max_corrections": 0,
}
RELAXATION: dict[str, Any] = {
    "relax": False,
    "relax_cell": False,
    "max_force_ev_a": 2e-3,
    "max_stress_bar": 51.0,
    "pressure_bar": 1.0,
    "max_steps": 501,
}
FILE: dict[str, Any] = {
    "name": "a.file", "path": Path("/there/a.file"), "sha256": "a" * 64
}  # fmt: skip
FIX: dict[str, Any] = {"style": "qeq/shielded", "arguments": (1, 10.0, 1e-6, 100, "b")}
COEFFICIENT: dict[str, Any] = {
    "between": ("Cu", "Cu"), "words": ("a.file",), "labels": {"Cu": "Cu"}
}  # fmt: skip
TERM: dict[str, Any] = {
    "style": "eam/fs",
    "arguments": (5.0,),
    "coefficients": (PairCoefficient(words=("a.file",)),),
}


def potential(**changes: Any) -> Potential:
    values: dict[str, Any] = {
        "name": "one",
        "terms": (term(),),
        "files": (PotentialFile(**FILE),),
        "elements": ("Cu",),
        "atom_style": "charge",
        "charges": "given",
        "fixes": (PotentialFix(**FIX),),
        "timestep_fs": 1.0,
    }
    return Potential(**{**values, **changes})


def term(**changes: Any) -> PairTerm:
    values = {"style": "eam/alloy", "coefficients": (PairCoefficient(**COEFFICIENT),)}
    return PairTerm(**{**values, **changes})


POTENTIAL_MATTERS: dict[str, dict[str, Any]] = {
    "terms": {"terms": (term(style="eam/fs"),)},
    "files": {"files": (PotentialFile(**{**FILE, "sha256": "b" * 64}),)},
    "units": {"units": "real"},
    "charges": {"charges": "equilibrated"},
    "fixes": {"fixes": ()},
    "generated_from": {"generated_from": "c" * 64},
}
# Names, what a structure may hold, and how the same forces are computed. A timestep is
# that of a run: see below.
POTENTIAL_INDIFFERENT: dict[str, dict[str, Any]] = {
    "name": {"name": "two"},
    "elements": {"elements": ("Cu", "Ni")},
    "newton": {"newton": "off"},
    "citation": {"citation": "a paper"},
    "timestep_fs": {"timestep_fs": 2.0},
    "cutoff_a": {"cutoff_a": 5.0},
}


def test_all_fields_have_been_decided_about() -> None:
    version = {"schema_version"}
    assert set(MDConfig.model_fields) == set(CONFIG) | version
    assert set(ScheduleStep.model_fields) == set(STEP)
    assert set(MDMethod.model_fields) == set(METHOD) | {"config"}
    assert set(RelaxationSettings.model_fields) == set(RELAXATION) | version
    assert set(RelaxationMethod.model_fields) == {"potential", "settings"}
    assert set(Potential.model_fields) == (
        # The atom style follows from the charges.
        set(POTENTIAL_MATTERS) | set(POTENTIAL_INDIFFERENT) | version | {"atom_style"}
    )
    # The memory decides how the same numbers are computed.
    assert set(AnalysisRequest.model_fields) == {*ANALYSIS, "analyses", "memory_mb"}
    for model, values in (
        (PotentialFile, FILE),
        (PotentialFix, FIX),
        (PairCoefficient, COEFFICIENT),
        (PairTerm, TERM),
    ):
        assert set(model.model_fields) == set(values)


@pytest.mark.parametrize("name", CONFIG)
def test_each_field_of_a_simulation_changes_its_keys(
    name: str, copper: Any, tmp_path: Path
) -> None:
    before: dict[str, Any] = AROUND.get(name, {})
    after = {**before, name: CONFIG[name]}

    def stored(values: dict[str, Any], relaxation: str | None = None) -> str:
        return MDMethod(config=MDConfig(**values)).key(potential(), relaxation)

    def folder(values: dict[str, Any], where: str) -> str:
        made = LAMMPSEngine().prepare_input(copper, values, tmp_path / where)
        return str(read_json(made / "simulation.json")["key"])

    assert stored(before) != stored(after)
    assert stored(before, "relaxed") != stored(after, "relaxed")
    assert stored(before) != stored(before, "relaxed")
    assert folder(before, "before") != folder(after, "after")


@pytest.mark.parametrize("name", STEP)
def test_each_field_of_a_schedule_changes_the_key(name: str) -> None:
    def key(**changes: Any) -> str:
        part = {"action": "heat", "steps": 10, "temperature_k": 400.0, **changes}
        if part["action"] == "cool":
            part["temperature_k"] = 200.0
        config = MDConfig(workflow_type="MD_ANNEAL_LAMMPS", schedule=[part])
        return MDMethod(config=config).key(potential())

    assert key() != key(**{name: STEP[name]})


@pytest.mark.parametrize("name", ANALYSIS)
def test_each_option_of_an_analysis_is_stored_beside_the_others(name: str) -> None:
    before = AnalysisRequest(analyses=ANALYSES)
    after = AnalysisRequest(analyses=ANALYSES, **{name: ANALYSIS[name]})
    moved = {a for a in ANALYSES if before.key(a) != after.key(a)}
    # Angles between neighbours begin with g(r), which tells who they are.
    first = name.split("_", maxsplit=1)[0]
    assert moved == ({"rdf", "adf"} if first == "rdf" else {first})
    assert {a for a in ANALYSES if name in after.options(a)} == moved


@pytest.mark.parametrize("name", METHOD)
def test_analyses_and_corrections_are_of_the_same_simulation(name: str) -> None:
    method = MDMethod(config=MDConfig())
    other = method.model_copy(update={name: METHOD[name]})
    assert other != method
    assert other.key(potential()) == method.key(potential())


def test_the_timestep_of_the_potential_counts_where_it_is_taken() -> None:
    slow, fast = potential(), potential(timestep_fs=2.0)
    assert slow.identity == fast.identity
    taken = MDMethod(config=MDConfig())
    given = MDMethod(config=MDConfig(timestep_fs=1.5))
    assert taken.key(slow) != taken.key(fast)
    assert given.key(slow) == given.key(fast)


@pytest.mark.parametrize("name", RELAXATION)
def test_each_setting_of_a_relaxation_changes_its_key(name: str) -> None:
    def key(**settings: Any) -> str:
        choice = PotentialChoice(name="one", elements=("Cu",))
        method = RelaxationMethod(
            potential=choice, settings=RelaxationSettings(**settings)
        )
        return method.key(potential())

    assert key() != key(**{name: RELAXATION[name]})


@pytest.mark.parametrize("name", POTENTIAL_MATTERS)
def test_what_makes_the_forces_makes_the_identity(name: str) -> None:
    assert potential().identity != potential(**POTENTIAL_MATTERS[name]).identity


@pytest.mark.parametrize("name", POTENTIAL_INDIFFERENT)
def test_what_makes_no_forces_is_not_in_the_identity(name: str) -> None:
    assert potential().identity == potential(**POTENTIAL_INDIFFERENT[name]).identity


@pytest.mark.parametrize("name", TERM)
def test_each_part_of_a_pair_style_is_in_the_identity(name: str) -> None:
    changed = term(**{name: TERM[name]})
    assert potential().identity != potential(terms=(changed,)).identity


@pytest.mark.parametrize(
    "other", [{"between": None}, {"words": ("a.file", 2)}, {"labels": {"Cu": "Cu2"}}]
)
def test_each_part_of_a_coefficient_is_in_the_identity(other: dict[str, Any]) -> None:
    changed = term(coefficients=(PairCoefficient(**{**COEFFICIENT, **other}),))
    assert potential().identity != potential(terms=(changed,)).identity


@pytest.mark.parametrize("other", [{"style": "qeq/point"}, {"arguments": (2,)}])
def test_each_part_of_a_fix_is_in_the_identity(other: dict[str, Any]) -> None:
    changed = PotentialFix(**{**FIX, **other})
    assert potential().identity != potential(fixes=(changed,)).identity


def test_a_file_counts_by_what_is_in_it() -> None:
    named = {**FILE, "name": "b.file", "path": Path("/elsewhere/b.file")}
    words = term(
        coefficients=(PairCoefficient(**{**COEFFICIENT, "words": ("b.file",)}),)
    )
    moved = potential(terms=(words,), files=(PotentialFile(**named),))
    assert moved.identity == potential().identity
