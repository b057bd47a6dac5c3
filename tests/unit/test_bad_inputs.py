"""Inputs that LAMMPS would take silently, misunderstand, execute, or refuse late.

Each must be refused before anything is written, by an error that names the object and
the next step.
"""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pymatgen.core import DummySpecies, Lattice, Structure

from nanoos_fw.errors import InputError, NanoOSError
from nanoos_fw.firetasks.md import MDMethod
from nanoos_fw.md.engine import LAMMPSEngine
from nanoos_fw.md.pair_commands import commands_potential
from nanoos_fw.md.potential_folders import find_potential_file
from nanoos_fw.md.potentials import Potential, lennard_jones_potential

pytestmark = pytest.mark.lammps  # the whitelist is that of the installed LAMMPS


def cubic(a=3.6, species=("Cu",), sites=((0.0, 0.0, 0.0),)):
    return Structure(Lattice.cubic(a), list(species), [list(site) for site in sites])


def silicon():
    return Structure.from_spacegroup("Fd-3m", Lattice.cubic(5.43), ["Si"], [[0, 0, 0]])


def salt(charges=None):
    structure = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    )
    if charges is not None:
        structure.add_site_property("charge", charges)
    return structure


def with_coordinates(value):
    structure = cubic(species=("Cu", "Cu"), sites=((0, 0, 0), (0.5, 0.5, 0.5)))
    with np.errstate(invalid="ignore"):
        structure[1].frac_coords = [value, 0.25, 0.25]
    return structure


def with_lattice(rows):
    lattice = Lattice(np.eye(3))
    lattice._matrix = np.array(rows, dtype=float)
    return Structure(lattice, ["Cu"], [[0, 0, 0]])


CHARGED = {
    "pair_style": "lj/cut/coul/cut 8.5",
    "pair_coeff": ["* * 0.01 2.5"],
    "elements": ["Na", "Cl"],
}


def commands(**changes):
    return {
        "pair_style": "lj/cut 8.5",
        "pair_coeff": ["1 1 0.0104 3.4"],
        "elements": ["Cu"],
        **changes,
    }


# What, structure, parameters, what the error must say.
CASES = [
    # --- structures
    (
        "partial occupancy",
        cubic(species=({"Cu": 0.5, "Ni": 0.5},)),
        {},
        r"site 0 is partially occupied",
    ),
    ("vacancy", cubic(species=({"Cu": 0.9},)), {}, r"site 0 is partially occupied"),
    ("deuterium", cubic(species=("D",)), {}, r"site 0 holds D"),
    ("tritium", cubic(species=("T",)), {}, r"site 0 holds T"),
    ("dummy", cubic(species=(DummySpecies("X"),)), {}, r"site 0 holds X"),
    (
        "two atoms on one site",
        cubic(species=("Cu", "Cu"), sites=((0, 0, 0), (0, 0, 1e-9))),
        {},
        r"sites 0 \(Cu\) and 1 \(Cu\) are 0\.000 Å apart",
    ),
    (
        "0.3 Å apart, across the boundary",
        cubic(species=("Cu", "Cu"), sites=((0, 0, 0.01), (0, 0, 0.93))),
        {},
        r"sites 0 \(Cu\) and 1 \(Cu\) are 0\.288 Å apart",
    ),
    (
        "its own image too close",
        Structure(Lattice.orthorhombic(0.3, 4, 4), ["Cu"], [[0, 0, 0]]),
        {},
        r"repeats after 0\.300 Å",
    ),
    (
        "no volume",
        with_lattice([[3, 0, 0], [6, 0, 0], [0, 0, 3]]),
        {},
        r"lattice has no volume \(0 Å³\)",
    ),
    ("a zero vector", with_lattice([[3, 0, 0], [0, 0, 0], [0, 0, 3]]), {}, "no volume"),
    (
        "lattice not a number",
        with_lattice([[math.nan, 0, 0], [0, 3, 0], [0, 0, 3]]),
        {},
        "lattice",
    ),
    ("coordinate nan", with_coordinates(math.nan), {}, r"site 1 \(Cu\) has no finite"),
    ("coordinate inf", with_coordinates(math.inf), {}, r"site 1 \(Cu\) has no finite"),
    ("no atoms", Structure(Lattice.cubic(3), [], []), {}, "has no sites"),
    # --- potential and elements
    (
        "element not in the file",
        silicon(),
        {"potential": "Cu_mishin1.eam.alloy"},
        r"Cu_mishin1\.eam\.alloy.*has no parameters for Si.*it has Cu",
    ),
    ("no default", silicon(), {}, "16-metal EAM lacks Si"),
    (
        "style without the element",
        silicon(),
        {"potential": "eam"},
        "no eam potential at hand knows Si",
    ),
    (
        "several alternatives",
        cubic(),
        {"potential": "snap"},
        r"several snap potentials.*Cu_Zuo_JPCA2020\.snap",
    ),
    (
        "missing potential",
        silicon(),
        {"potential": "SI.tersof"},
        r"no potential 'SI\.tersof'.*Si\.tersoff",
    ),
    ("potential is a number", cubic(), {"potential": 3}, "given as int"),
    ("potential is empty", cubic(), {"potential": {}}, "cannot be used"),
    (
        "file that is none",
        cubic(),
        {"potential": "library.meam"},
        r"library\.meam.*no recipe is known",
    ),
    # --- charges
    (
        "no charges",
        salt(),
        {"potential": CHARGED},
        "needs charges, and the structure has none",
    ),
    (
        "not neutral",
        salt([1.0] * 4 + [-0.9] * 4),
        {"potential": CHARGED},
        r"add up to \+0\.400 e",
    ),
    (
        "charges of some sites",
        salt([1.0] * 4 + [None] * 4),
        {"potential": CHARGED},
        r"site 4 \(Cl\) has charge None",
    ),
    (
        "charge not a number",
        salt([1.0] * 4 + [math.nan] * 4),
        {"potential": CHARGED},
        r"site 4 \(Cl\) has charge nan",
    ),
    # --- numbers
    ("temperature below zero", cubic(), {"temperature": -300.0}, "temperature"),
    ("temperature zero", cubic(), {"temperature": 0.0}, "temperature"),
    ("temperature nan", cubic(), {"temperature": math.nan}, "temperature"),
    ("temperature inf", cubic(), {"temperature": math.inf}, "temperature"),
    ("timestep zero", cubic(), {"timestep": 0.0}, "timestep"),
    ("timestep below zero", cubic(), {"timestep": -1.0}, "timestep"),
    ("timestep nan", cubic(), {"timestep": math.nan}, "timestep"),
    ("timestep inf", cubic(), {"timestep": math.inf}, "timestep"),
    ("timestep in the wrong unit", cubic(), {"timestep": 1000.0}, "timestep"),
    ("no steps", cubic(), {"num_steps": 0}, "num_steps"),
    ("steps below zero", cubic(), {"num_steps": -10}, "num_steps"),
    ("half a step", cubic(), {"num_steps": 10.5}, "num_steps"),
    ("seed zero", cubic(), {"seed": 0}, "seed"),
    ("seed too large", cubic(), {"seed": 2**31}, "seed"),
    ("seed below zero", cubic(), {"seed": -1}, "seed"),
    ("pressure nan", cubic(), {"pressure": math.nan}, "pressure"),
    ("thermo never", cubic(), {"thermo_every": 0}, "thermo_every"),
    ("dump below zero", cubic(), {"dump_every": -1}, "dump_every"),
    ("no restarts", cubic(), {"restart_every": 0}, "restart_every"),
    ("damping zero", cubic(), {"thermostat_fs": 0.0}, "thermostat_fs"),
    ("cell of no atoms", cubic(), {"supercell_min_atoms": 0}, "supercell_min_atoms"),
    ("misspelt parameter", cubic(), {"tempreature": 300.0}, "tempreature"),
    ("unknown workflow", cubic(), {"workflow_type": "MD_NVX"}, "workflow_type"),
    ("unknown barostat", cubic(), {"barostat": "all"}, "barostat"),
    # --- commands of the user
    (
        "unknown pair style",
        cubic(),
        {"potential": commands(pair_style="lj/cot 8.5")},
        r"has no pair style 'lj/cot'.*lj/cut",
    ),
    (
        "style of hybrid without coefficients",
        cubic(),
        {"potential": commands(pair_style="hybrid/overlay lj/cut 8.5 zbl 1 2")},
        "does not name a style|has no pair_coeff",
    ),
    (
        "hybrid",
        cubic(),
        {"potential": commands(pair_style="hybrid lj/cut 8.5")},
        "'hybrid' is not taken",
    ),
    (
        "type that is not there",
        cubic(),
        {"potential": commands(pair_coeff=["1 2 0.0104 3.4"])},
        "'2' is no type",
    ),
    (
        "types in another order",
        silicon(),
        {
            "potential": {
                "pair_style": "tersoff",
                "pair_coeff": ["* * SiC.tersoff C Si"],
                "elements": ["Si", "C"],
            }
        },
        "type 1 is Si, and is named C",
    ),
    (
        "label that LAMMPS would cut",
        silicon(),
        {
            "potential": {
                "pair_style": "tersoff",
                "pair_coeff": ["* * Si.tersoff Si"],
                "elements": ["Si # Xx"],
            }
        },
        "'Si # Xx' is not an element",
    ),
    (
        "file that is not there",
        silicon(),
        {
            "potential": {
                "pair_style": "tersoff",
                "pair_coeff": ["* * Si.tersof Si"],
                "elements": ["Si"],
            }
        },
        r"no potential file 'Si\.tersof'.*Si\.tersoff",
    ),
    (
        "units of another system",
        Structure(Lattice.cubic(6), ["C"], [[0, 0, 0]]),
        {
            "potential": {
                "pair_style": "reaxff NULL",
                "pair_coeff": ["* * ffield.reax.cho C"],
                "elements": ["C"],
                "units": "metal",
            }
        },
        "reaxff is in real units, not metal",
    ),
    (
        "reduced units",
        cubic(),
        {"potential": commands(units="lj")},
        "units",
    ),
    (
        "fix that is no equilibration",
        cubic(),
        {"potential": commands(fixes=["ave/time 1 1 1 c_x file passwd"])},
        "'ave/time' is not taken",
    ),
    (
        "keyword that is not known",
        cubic(),
        {"potential": commands(pair_style="lj/cut 8.5 shell")},
        "no potential file 'shell'",
    ),
    ("empty style", cubic(), {"potential": commands(pair_style="")}, "pair_style"),
    (
        "timestep of a potential",
        cubic(),
        {"potential": commands(timestep_fs=0.0)},
        "timestep_fs",
    ),
    (
        "unknown field",
        cubic(),
        {"potential": commands(shell="rm")},
        "shell",
    ),
    ("true for a number", cubic(), {"temperature_k": True}, "temperature_k is a num"),
    (
        "true in a schedule",
        cubic(),
        {
            "workflow_type": "MD_ANNEAL_LAMMPS",
            "schedule": [{"action": "hold", "steps": True}],
        },
        "steps is a number",
    ),
    (
        "schedule that is a number",
        cubic(),
        {"workflow_type": "MD_ANNEAL_LAMMPS", "schedule": 5},
        "schedule",
    ),
    (
        "charge that is text",
        Structure(
            Lattice.cubic(4.0),
            ["Cu", "Cu"],
            [[0, 0, 0], [0.5, 0.5, 0.5]],
            site_properties={"charge": ["1\nshell touch PWNED", 0.0]},
        ),
        {"potential": "zhou2004"},
        "site 0.*charge",
    ),
    (
        "dynamics of one atom",
        Structure(Lattice.cubic(2.5), ["Cu"], [[0, 0, 0]]),
        {"workflow_type": "MD_NVT_LAMMPS"},
        "one atom.*no temperature.*",
    ),
]


def test_a_campaign_takes_no_true_for_a_number_either():
    with pytest.raises(ValidationError, match="num_steps is a number, not True"):
        MDMethod(config={"num_steps": True})


def test_there_are_enough_cases():
    names = [case[0] for case in CASES]
    assert len(set(names)) == len(names) >= 40


@pytest.mark.parametrize(
    ("structure", "parameters", "says"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_bad_input_is_refused_by_name(structure, parameters, says, tmp_path):
    values = {"num_steps": 100, **parameters}
    with pytest.raises(NanoOSError) as caught:
        LAMMPSEngine().prepare_input(structure, values, tmp_path)
    error = caught.value
    assert re.search(says, str(error)), str(error)
    assert error.kind == "input"
    assert error.advice, "no next step"
    # Nothing that could be run by mistake.
    assert not list(tmp_path.rglob("in.lammps"))


# ------------------------------------------------------------------------- injection

PLANTED = "PWNED"
PAYLOADS = [
    f"\nshell touch {PLANTED}",
    f"\r\nshell touch {PLANTED}\r\n",
    f"; shell touch {PLANTED}",
    f"${{{PLANTED}}}",
    f"$({PLANTED})",
    f"$({PLANTED}:%s)",
    f"`touch {PLANTED}`",
    f"'{PLANTED}'",
    f'"{PLANTED}"',
    f'"""{PLANTED}"""',
    f"# {PLANTED}",
    f"& {PLANTED}",
    f"../../{PLANTED}",
    f"/etc/{PLANTED}",
    f"~/{PLANTED}",
    f"v_{PLANTED} $v",
    f"\x00{PLANTED}",
    f"\u2028shell touch {PLANTED}",
    f"{PLANTED} getenv HOME",
]

# Where a user can write text, and how to put it there.
PLACES = {
    "workflow_type": lambda text: {"workflow_type": text},
    "barostat": lambda text: {"barostat": text},
    "anneal_ensemble": lambda text: {"anneal_ensemble": text},
    "temperature": lambda text: {"temperature": f"300 {text}"},
    "seed": lambda text: {"seed": f"1 {text}"},
    "parameter": lambda text: {text: 1},
    "potential": lambda text: {"potential": text},
    "potential file": lambda text: {"potential": f"Cu_mishin1.eam.alloy{text}"},
    "pair_style": lambda text: {"potential": commands(pair_style=f"lj/cut 8{text}")},
    "pair_coeff": lambda text: {
        "potential": commands(pair_coeff=[f"1 1 0.01 3.4{text}"])
    },
    "pair_coeff types": lambda text: {
        "potential": commands(pair_coeff=[f"{text} 1 0.01 3.4"])
    },
    "elements": lambda text: {"potential": commands(elements=[f"Cu{text}"])},
    "name": lambda text: {"potential": commands(name=f"mine{text}")},
    "units": lambda text: {"potential": commands(units=f"metal{text}")},
    "charges": lambda text: {"potential": commands(charges=f"none{text}")},
    "newton": lambda text: {"potential": commands(newton=f"on{text}")},
    "fixes": lambda text: {"potential": commands(fixes=[f"qeq/point 1 5 1e-6{text}"])},
    "citation": lambda text: {"potential": commands(citation=text)},
    "recipe name": lambda text: {"potential": recipe(name=f"mine{text}")},
    "recipe citation": lambda text: {"potential": recipe(citation=text)},
    "recipe style": lambda text: {"potential": recipe_term(style=f"lj/cut{text}")},
    "recipe argument": lambda text: {"potential": recipe_term(arguments=[8.5, text])},
    "recipe word": lambda text: {
        "potential": recipe_term(
            coefficients=[{"between": ["Cu", "Cu"], "words": [0.01, 3.4, text]}]
        )
    },
    "recipe label": lambda text: {
        "potential": recipe_term(
            coefficients=[{"words": [0.01], "labels": {"Cu": f"Cu{text}"}}]
        )
    },
    "recipe fix": lambda text: {
        "potential": recipe(
            fixes=[{"style": "qeq/point", "arguments": [1, text]}],
            charges="equilibrated",
            atom_style="charge",
        )
    },
}


def recipe(**changes):
    lj = lennard_jones_potential({"Cu": (0.01, 2.3)}, cutoff_a=6.0)
    return {**lj.model_dump(mode="json"), **changes}


def recipe_term(**changes):
    full = recipe()
    full["terms"] = [{**full["terms"][0], **changes}]
    return full


@pytest.mark.parametrize("place", PLACES)
def test_planted_text_never_reaches_a_script(place, tmp_path):
    for number, payload in enumerate(PAYLOADS):
        folder = tmp_path / str(number)
        parameters = {"num_steps": 100, **PLACES[place](payload)}
        try:
            LAMMPSEngine().prepare_input(cubic(), parameters, folder)
        except InputError:
            continue
        # Accepted: then it stands nowhere that LAMMPS reads, and no file is named so.
        for path in folder.rglob("*"):
            assert PLANTED not in path.name
            if path.name not in ("simulation.json",) and path.is_file():
                assert PLANTED.encode() not in path.read_bytes(), (path, payload)
    assert not list(tmp_path.rglob(PLANTED))


def test_every_place_refuses_most_payloads():
    # Only what is kept as text beside the numbers may take any text.
    free = {"citation", "recipe citation", "recipe name"}
    for place, payload in itertools.product(PLACES, PAYLOADS):
        values = PLACES[place](payload)
        potential = values.get("potential")
        if place in free or not isinstance(potential, dict):
            continue
        make = Potential.model_validate if "terms" in potential else commands_potential
        with pytest.raises((InputError, ValidationError)):
            make(potential)


ALPHABET = st.characters(codec="utf-8", exclude_categories=("Cs",))
TEXT = st.text(ALPHABET, max_size=20)


@settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(words=TEXT, style=TEXT, tail=st.sampled_from(PAYLOADS))
def test_commands_that_pass_hold_safe_characters_only(words, style, tail):
    for pair_style, pair_coeff in (
        (f"lj/cut 8.5 {words}", "1 1 0.01 3.4"),
        ("lj/cut 8.5", f"1 1 0.01 3.4 {words}"),
        (f"{style} 8.5", f"1 1 0.01{tail}"),
        ("lj/cut 8.5", f"1 1 {tail}{words}"),
    ):
        try:
            potential = commands_potential(
                commands(pair_style=pair_style, pair_coeff=[pair_coeff]),
            )
        except InputError:
            continue
        for line in potential.pair_commands(["Cu"]):
            assert re.fullmatch(r"[A-Za-z0-9._+/* -]+", line)
            assert ".." not in line
            assert not re.search(r"(^| )[/~]", line)


@pytest.mark.parametrize(
    "name", ["../README", "a/b", "..", ".", "", "-x", "x\n", "${x}", "a b", "x\x00"]
)
def test_files_are_found_by_name_only(name, tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError):
        find_potential_file(name, tmp_path)


def test_a_link_keeps_its_safe_name(tmp_path):
    # What it points to may have any name: LAMMPS sees a copy under the link's.
    odd = tmp_path / "my potential; rm.tersoff"
    odd.write_bytes(find_potential_file("Si.tersoff").read_bytes())
    (tmp_path / "mine.tersoff").symlink_to(odd)
    folder = LAMMPSEngine().prepare_input(
        silicon(),
        {
            "num_steps": 10,
            "potential": {
                "pair_style": "tersoff",
                "pair_coeff": ["* * Si.tersoff Si"],
                "elements": ["Si"],
            },
        },
        tmp_path / "work",
    )
    assert (folder / "Si.tersoff").read_bytes() == odd.read_bytes()
    path = find_potential_file("mine.tersoff", tmp_path)
    assert path.name == "mine.tersoff"
