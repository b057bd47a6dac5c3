from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import InputError
from nanoos_fw.md.box import (
    LammpsBox,
    perpendicular_widths,
    tensor_to_voigt,
    voigt_to_tensor,
)
from nanoos_fw.md.inputs import (
    MDConfig,
    Origin,
    barostat_of,
    data_file_text,
    render_parts,
    run_command,
    supercell,
    write_input,
)
from nanoos_fw.md.potentials import lennard_jones_potential, zhou2004_potential


def random_lattice(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    while True:
        lattice = rng.normal(scale=4.0, size=(3, 3))
        if abs(np.linalg.det(lattice)) > 1.0:
            return lattice


# ------------------------------------------------------------------------------ box


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_box_is_restricted_reduced_and_the_same_crystal(seed):
    lattice = random_lattice(seed)
    box = LammpsBox.from_lattice(lattice)
    (lx, ly, _), (xy, xz, yz) = box.lengths, box.tilts
    assert np.array_equal(box.matrix, np.tril(box.matrix))
    assert min(box.lengths) > 0.0
    assert abs(xy) <= lx / 2 + 1e-9
    assert abs(xz) <= lx / 2 + 1e-9
    assert abs(yz) <= ly / 2 + 1e-9
    np.testing.assert_allclose(box.rotation @ box.rotation.T, np.eye(3), atol=1e-8)
    assert round(np.linalg.det(box.basis)) == 1
    np.testing.assert_allclose(box.lattice(), lattice, atol=1e-9)
    # A mirror is used exactly for left-handed lattices.
    assert np.sign(np.linalg.det(box.rotation)) == np.sign(np.linalg.det(lattice))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_distances_between_sites_survive_the_map(seed):
    rng = np.random.default_rng(seed)
    lattice, frac = random_lattice(seed), rng.normal(size=(5, 3))
    box = LammpsBox.from_lattice(lattice)
    positions = box.positions(frac)
    mapped = Lattice(box.matrix).get_all_distances(
        positions @ np.linalg.inv(box.matrix), positions @ np.linalg.inv(box.matrix)
    )
    given_ = Lattice(lattice).get_all_distances(frac, frac)
    np.testing.assert_allclose(mapped, given_, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_positions_are_wrapped_and_map_back_up_to_whole_cells(seed):
    rng = np.random.default_rng(seed)
    frac = rng.normal(scale=3.0, size=(6, 3))
    box = LammpsBox.from_lattice(random_lattice(seed))
    positions = box.positions(frac)
    inside = positions @ np.linalg.inv(box.matrix)
    assert inside.min() > -1e-9
    assert inside.max() < 1.0 + 1e-9
    shift = box.frac_coords(positions) - frac
    np.testing.assert_allclose(shift, np.rint(shift), atol=1e-7)


def test_vectors_and_tensors_rotate_together():
    box = LammpsBox.from_lattice(random_lattice(3))
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 7, 3))
    np.testing.assert_allclose(box.from_box(box.to_box(a)), a, atol=1e-12)
    tensor = np.einsum("ni,nj->ij", a, b)
    in_box = np.einsum("ni,nj->ij", box.to_box(a), box.to_box(b))
    np.testing.assert_allclose(box.tensor_from_box(in_box), tensor, atol=1e-12)


def test_a_strained_box_is_the_strained_lattice_up_to_a_rotation():
    lattice = random_lattice(11)
    box = LammpsBox.from_lattice(lattice)
    stretched = box.matrix.copy()
    stretched[2, 2] *= 1.1
    stretched[1, 0] += 0.2
    mapped = box.lattice(stretched)
    metric = np.linalg.inv(box.basis) @ stretched
    np.testing.assert_allclose(mapped @ mapped.T, metric @ metric.T, atol=1e-9)


def test_restricted_orthogonal_lattice_is_left_as_it_is():
    box = LammpsBox.from_lattice(np.diag([3.0, 4.0, 5.0]))
    assert box.is_orthogonal
    np.testing.assert_allclose(box.matrix, np.diag([3.0, 4.0, 5.0]), atol=1e-14)
    np.testing.assert_allclose(box.rotation, np.eye(3), atol=1e-14)
    tiny = box.positions(np.array([[-1e-18, 1.0, 0.5]]))
    np.testing.assert_array_equal(tiny, [[0.0, 0.0, 2.5]])


@pytest.mark.parametrize(
    "lattice",
    [
        np.zeros((3, 3)),
        np.array([[1.0, 0, 0], [2.0, 0, 0], [0, 0, 1.0]]),
        np.full((3, 3), np.nan),
        np.diag([1.0, np.inf, 1.0]),
    ],
)
def test_lattice_without_volume_is_refused(lattice):
    with pytest.raises(InputError, match="no volume"):
        LammpsBox.from_lattice(lattice)


def test_voigt_order_is_that_of_lammps():
    tensor = voigt_to_tensor(np.array([1.0, 2, 3, 4, 5, 6]))
    np.testing.assert_array_equal(tensor, [[1, 4, 5], [4, 2, 6], [5, 6, 3]])
    np.testing.assert_array_equal(tensor_to_voigt(tensor), [1, 2, 3, 4, 5, 6])


def test_perpendicular_widths_against_volume_over_area():
    lattice = random_lattice(8)
    a, b, c = lattice
    volume = abs(np.linalg.det(lattice))
    expected = [
        volume / np.linalg.norm(np.cross(u, v)) for u, v in ((b, c), (c, a), (a, b))
    ]
    np.testing.assert_allclose(perpendicular_widths(lattice), expected)


# --------------------------------------------------------------------------- config


def test_names_of_the_functional_description_are_accepted():
    config = MDConfig.from_parameters(
        {
            "workflow_type": "MD_NPT_LAMMPS",
            "temperature": 500.0,
            "pressure": 10.0,
            "timestep": 0.5,
        }
    )
    assert config.temperature_k == 500.0
    assert config.pressure_bar == 10.0
    assert config.timestep_fs == 0.5
    own = {"temperature_k": 500.0, "pressure_bar": 10.0, "timestep_fs": 0.5}
    assert MDConfig(workflow_type="MD_NPT_LAMMPS", **own) == config
    assert MDConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature_k", -300.0),
        ("temperature_k", 0.0),
        ("temperature_k", float("nan")),
        ("timestep_fs", 0.0),
        ("timestep_fs", 1000.0),
        ("timestep_fs", float("inf")),
        ("num_steps", 0),
        ("num_steps", -5),
        ("num_steps", 2**31),
        ("seed", 0),
        ("seed", 2**31),
        ("thermo_every", 0),
        ("workflow_type", "MD_NVT_LAMMPS\nshell touch PWNED"),
        ("barostat", "iso ${x}"),
        ("tempreature", 300.0),
    ],
)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=name):
        MDConfig.from_parameters({name: value})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("ELASTIC_LAMMPS", "pressure_bar", 1e5),
        ("EOS_LAMMPS", "temperature_k", 900.0),
        ("STATIC_LAMMPS", "relax_cell", True),
        ("MINIMIZE_LAMMPS", "pressure_bar", 500.0),
        ("MD_NVT_LAMMPS", "pressure_bar", 500.0),
        ("MD_NPT_LAMMPS", "relax_cell", True),
        ("MD_NPT_LAMMPS", "anneal_ensemble", "nvt"),
        ("MD_NVE_LAMMPS", "max_strain", 0.01),
        ("MINIMIZE_LAMMPS", "strain_points", 4),
        ("STATIC_LAMMPS", "pre_minimize_steps", 100),
    ],
)
def test_what_would_have_no_effect_is_refused(kind, name, value):
    with pytest.raises(InputError, match=f"{name}.*no effect") as caught:
        MDConfig.from_parameters({"workflow_type": kind, name: value})
    assert kind in caught.value.message
    # Its default says nothing, and what was stored before can be read.
    default = MDConfig.model_fields[name].default
    MDConfig.from_parameters({"workflow_type": kind, name: default})
    MDConfig.model_validate({"workflow_type": kind, name: value})


def test_what_has_an_effect_is_taken():
    for parameters in (
        {"workflow_type": "MD_NPT_LAMMPS", "pressure": 500.0},
        {"workflow_type": "MINIMIZE_LAMMPS", "relax_cell": True, "pressure": 500.0},
        {
            "workflow_type": "MD_MELT_QUENCH_LAMMPS",
            "anneal_temperature_k": 900.0,
            "pressure": 500.0,
        },
        {"workflow_type": "EOS_LAMMPS", "max_strain": 0.03, "strain_points": 5},
    ):
        MDConfig.from_parameters(parameters)
    with pytest.raises(InputError, match=r"pressure_bar.*no effect"):
        MDConfig.from_parameters(
            {
                "workflow_type": "MD_ANNEAL_LAMMPS",
                "anneal_temperature_k": 900.0,
                "anneal_ensemble": "nvt",
                "pressure": 500.0,
            }
        )


def test_temperature_of_what_is_averaged():
    def of(**parameters):
        config = MDConfig.from_parameters(parameters)
        return config.production_temperature_k

    assert of(temperature=500.0) == 500.0
    ramp = {"workflow_type": "MD_ANNEAL_LAMMPS"}
    assert of(**ramp, anneal_temperature_k=900.0) is None
    heat = {"action": "heat", "steps": 10, "temperature_k": 1000.0}
    hold = {"action": "hold", "steps": 10}
    assert of(**ramp, schedule=[heat, hold]) == 1000.0
    assert of(**ramp, schedule=[hold, heat]) is None
    glass = {"workflow_type": "MD_MELT_QUENCH_LAMMPS", "anneal_temperature_k": 900.0}
    assert of(**glass) == 300.0


def test_annealing_needs_a_top_temperature_and_makes_one_schedule():
    with pytest.raises(InputError, match="anneal_temperature_k"):
        MDConfig.from_parameters({"workflow_type": "MD_ANNEAL_LAMMPS"})
    with pytest.raises(InputError, match="belongs to MD_ANNEAL_LAMMPS"):
        MDConfig.from_parameters({"anneal_temperature_k": 900.0})
    config = MDConfig(
        workflow_type="MD_ANNEAL_LAMMPS",
        anneal_temperature_k=1200.0,
        equilibration_steps=10,
        num_steps=101,
    )
    stages = config.stages()
    names = [stage.name for stage in stages]
    assert names == ["equilibration", "heating", "holding", "cooling"]
    assert [s.first_step for s in stages] == [0, 10, 35, 60]
    assert stages[-1].last_step == config.total_steps == 111
    for before, after in itertools.pairwise(stages):
        assert before.last_step == after.first_step
        assert before.stop_k == after.start_k


# --------------------------------------------------------------------------- script


ARGON = lennard_jones_potential(
    {"Ar": (0.0104, 3.4), "Kr": (0.014, 3.6)}, cutoff_a=8.5, timestep_fs=4.0
)


def script_of(lattice=None, **parameters) -> str:
    config = MDConfig.from_parameters(parameters)
    box = LammpsBox.from_lattice(np.eye(3) * 20.0 if lattice is None else lattice)
    return render_parts(config, ARGON, ["Ar", "Kr"], box).script


def test_damping_is_in_physical_time_for_metal_units():
    script = script_of(workflow_type="MD_NPT_LAMMPS", temperature=150.0)
    assert "timestep 0.004\n" in script
    assert "fix stage1 all npt temp 150.0 150.0 0.4 aniso 1.0 1.0 4.0 fix" in script
    other = script_of(
        workflow_type="MD_NPT_LAMMPS",
        timestep=1.0,
        thermostat_fs=250.0,
        barostat_fs=3000.0,
    )
    assert "timestep 0.001\n" in other
    assert "temp 300.0 300.0 0.25 aniso 1.0 1.0 3.0 fix" in other


def test_barostat_follows_the_cell():
    config = MDConfig(workflow_type="MD_NPT_LAMMPS")
    fcc = np.array([[0, 2.0, 2.0], [2.0, 0, 2.0], [2.0, 2.0, 0]])
    assert barostat_of(config, LammpsBox.from_lattice(np.eye(3))) == "aniso"
    assert barostat_of(config, LammpsBox.from_lattice(fcc)) == "tri"
    script = script_of(fcc * 5, workflow_type="MD_NPT_LAMMPS")
    assert " tri 1.0 1.0 4.0 flip no fix" in script


def test_ramps_keep_their_ends_when_a_stage_is_cut_into_pieces():
    config = MDConfig(
        workflow_type="MD_ANNEAL_LAMMPS", anneal_temperature_k=900.0, num_steps=400
    )
    heating = config.stages()[1]
    assert run_command(heating, 2050) == "run 2050 upto start 2000 stop 2100"


def test_script_has_no_unfilled_field_and_equilibrates_from_given_velocities():
    script = script_of()
    assert set(re.findall(r"\$\{(\w+)\}", script)) == {"goal"}
    assert "velocity all create 300.0 1 mom yes" in script
    assert "run ${goal} upto start 0 stop 12000 post no" in script
    short = script_of(num_steps=100, equilibration_steps=0)
    assert "run 100 upto start 0 stop 100 post no" in short
    assert "${" not in short
    assert "velocity" not in script_of(workflow_type="MINIMIZE_LAMMPS")
    assert "dump frames" not in script_of(dump_every=0)


def test_resumed_script_reads_the_restart_and_creates_no_velocities():
    parts = render_parts(
        MDConfig(),
        ARGON,
        ["Ar", "Kr"],
        LammpsBox.from_lattice(np.eye(3)),
        origin=Origin(4000, "restart.0"),
    )
    assert "read_restart restart.0" in parts.start
    assert "read_data" not in parts.script
    assert parts.prelude == ""
    assert "trajectory.000000004001.bin" in parts.output
    # The time so far is counted in timesteps of their own length.
    portable = render_parts(
        MDConfig(),
        ARGON,
        ["Ar", "Kr"],
        LammpsBox.from_lattice(np.eye(3)),
        origin=Origin(4000, "portable.data"),
    ).script
    assert portable.index("timestep 0.004\n") < portable.index("reset_timestep 4000\n")
    with pytest.raises(InputError):
        render_parts(
            MDConfig(),
            ARGON,
            ["Ar"],
            LammpsBox.from_lattice(np.eye(3)),
            origin=Origin(1, "x\nshell ls"),
        )


def test_data_file_round_trips_with_all_digits(triclinic):
    box = LammpsBox.from_lattice(triclinic.lattice.matrix)
    species = [site.specie.symbol for site in triclinic]
    text = data_file_text(box, ["Mg", "O"], species, triclinic.frac_coords)
    lines = text.splitlines()
    assert "3 atoms" in lines
    assert "2 atom types" in lines
    high = [float(x.split()[1]) for x in lines if x.endswith("hi")]
    tilts = next(x for x in lines if x.endswith("xy xz yz")).split()[:3]
    matrix = np.diag(high)
    matrix[1, 0], matrix[2, 0], matrix[2, 1] = map(float, tilts)
    np.testing.assert_array_equal(matrix, box.matrix)
    rows = [x.split() for x in lines[lines.index("Atoms # atomic") + 2 :]]
    assert [r[0] for r in rows] == ["1", "2", "3"]
    assert [r[1] for r in rows] == ["1", "2", "2"]
    positions = np.array([[float(x) for x in r[2:]] for r in rows])
    np.testing.assert_array_equal(positions, box.positions(triclinic.frac_coords))
    at = lines.index("Masses") + 2
    masses = [float(line.split()[1]) for line in lines[at : at + 2]]
    assert masses == pytest.approx([24.305, 15.999], rel=1e-3)


def test_input_refuses_what_lammps_would_take_silently(tmp_path):
    potential = zhou2004_potential(["Cu"], tmp_path)
    lattice = Lattice.cubic(3.6)
    near = Structure(lattice, ["Cu", "Cu"], [[0, 0, 0], [0.99, 0.0, 0.05]])
    with pytest.raises(InputError, match=r"sites 0 \(Cu\) and 1 \(Cu\)"):
        write_input(near, MDConfig(), potential, tmp_path / "a")
    mixed = Structure(lattice, [{"Cu": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    with pytest.raises(InputError, match="partially occupied"):
        write_input(mixed, MDConfig(), potential, tmp_path / "b")
    other = Structure(lattice, ["Ni"], [[0, 0, 0]])
    with pytest.raises(InputError, match="Ni"):
        write_input(other, MDConfig(), potential, tmp_path / "c")


# ------------------------------------------------------------------------ supercell


@pytest.mark.parametrize("min_atoms", [1, 7, 60, 256])
def test_supercell_is_large_enough_compact_and_the_same_crystal(triclinic, min_atoms):
    cell = supercell(triclinic, min_atoms)
    assert len(cell) >= min_atoms
    assert cell.density == pytest.approx(triclinic.density)
    assert cell.composition.reduced_formula == triclinic.composition.reduced_formula
    if min_atoms >= 60:
        widths = perpendicular_widths(cell.lattice.matrix)
        assert widths.max() / widths.min() < 1.6
        assert len(cell) < 2.5 * min_atoms


def test_supercell_of_copper_is_a_cube(copper):
    cell = supercell(copper, 250)
    assert len(cell) == 256
    assert cell.lattice.abc == pytest.approx([4 * 3.615] * 3)
