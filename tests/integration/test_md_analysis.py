"""Analyses of simulations that LAMMPS ran, through the command line."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.cli import main
from nanoos_fw.errors import InputError
from nanoos_fw.md.analysis import _MAKERS, AnalysisRequest, analyze_simulation
from nanoos_fw.md.engine import LAMMPSEngine
from nanoos_fw.md.output import (
    averages,
    final_structure,
    simulation_thermo,
    simulation_trajectory,
)
from nanoos_fw.md.potentials import lennard_jones_potential
from nanoos_fw.md.trajectory import Trajectory
from nanoos_fw.units import BOLTZMANN_EV_PER_K

pytestmark = pytest.mark.lammps

ARGON = Structure(
    Lattice.cubic(5.7),
    ["Ar"] * 4,
    [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]],
)


@pytest.fixture(scope="module")
def liquid(tmp_path_factory):
    """Argon at rho* = 0.85, T* = 1.1: melted, then 24 ps."""
    folder = tmp_path_factory.mktemp("liquid")
    engine = LAMMPSEngine()
    inputs = engine.prepare_input(
        ARGON,
        {
            "potential": lennard_jones_potential(
                {"Ar": (0.01032, 3.405)}, cutoff_a=8.5
            ),
            "temperature_k": 130.0,
            "supercell_min_atoms": 256,
            "timestep_fs": 4.0,
            "equilibration_steps": 3000,
            "num_steps": 6000,
            "dump_every": 10,
            "thermo_every": 10,
        },
        folder,
    )
    engine.execute(inputs, folder / "output")
    return folder


def test_a_liquid_is_analysed_and_plotted(liquid, tmp_path, capsys):
    words = ["--analyses", "rdf,adf,msd,vdos", "--rdf-max", "9", "--vdos-longest", "2"]
    code = main(
        ["md", "analyze", str(liquid), *words, "--json", "-o", str(tmp_path / "csv")]
    )
    out = capsys.readouterr().out
    assert code == 0, out
    found = json.loads(out[out.index("{") :])["analyses"]
    r, g = np.array(found["rdf"]["r_a"]), np.array(found["rdf"]["total"])
    # First peak of the liquid near 1.08 sigma (3.405 Å), about twelve neighbours.
    assert r[g.argmax()] == pytest.approx(1.08 * 3.405, abs=0.12)
    assert 2.2 < g.max() < 3.3
    assert 11.0 < found["rdf"]["coordination"]["all"] < 14.0
    assert abs(g[r > 6.0].mean() - 1.0) < 0.1
    d = found["msd"]["diffusion"]["all"]
    assert d["diffusive"]
    # D* = 0.05 to 0.09 sigma (eps/m)^(1/2) at this state: 0.27 to 0.49 Å²/ps.
    assert 0.2 < d["value"] < 0.6
    assert 0.0 < d["standard_error"] < 0.2 * d["value"]
    vdos = found["vdos"]
    assert vdos["is_resolved"]
    assert vdos["n_modes"] == pytest.approx(vdos["n_modes_expected"], rel=0.03)
    assert 50 < found["adf"]["most_frequent_deg"]["Ar-Ar-Ar"] < 66
    names = {path.name for path in (tmp_path / "csv").iterdir()}
    assert names == {"rdf.csv", "adf.csv", "msd.csv", "vdos.csv", "vdos-2.csv"}
    table = np.genfromtxt(tmp_path / "csv" / "rdf.csv", delimiter=",", names=True)
    np.testing.assert_allclose(table["total"], g, rtol=1e-6)
    for form in ("png", "svg"):
        code = main(
            ["md", "plot", str(liquid), *words, "-o", str(tmp_path), "--format", form]
        )
        assert code == 0
        for name in ("temperature", "energy", "pressure", "volume", "rdf", "msd"):
            data = (tmp_path / f"{name}.{form}").read_bytes()
            assert (
                data[:8] == b"\x89PNG\r\n\x1a\n" if form == "png" else b"<svg" in data
            )
    assert len(list(tmp_path.glob("*.svg"))) == 9
    capsys.readouterr()


def test_the_table_knows_wall_time_and_averages_know_their_error(liquid):
    table = simulation_thermo(liquid / "output")
    wall = table["wall_time_s"]
    assert table.units["wall_time_s"] == "s"
    assert np.isfinite(wall).all()
    assert (np.diff(wall) >= 0).all()
    assert 0.0 < wall[-1] < 600.0
    mean = averages(table.after(3000))["temperature_k"]
    assert mean["mean"] == pytest.approx(130.0, abs=4 * mean["standard_error"] + 0.5)
    assert mean["plateau"]
    assert mean["inefficiency"] > 1.0


def test_an_analysis_that_is_not_possible_says_why(liquid, capsys, monkeypatch):
    request = AnalysisRequest(analyses=("rdf", "npt"), rdf_max_a=5.0)
    found = analyze_simulation(liquid / "output", request)
    assert set(found.numbers) == {"rdf"}
    assert "MD_NPT_LAMMPS" in str(found.failures["npt"])

    def unreadable(*_arguments):
        raise InputError("cannot read it") from OSError(5, "Input/output error")

    with monkeypatch.context() as ill:  # the disk's fault, and no result
        ill.setitem(_MAKERS, "rdf", unreadable)
        with pytest.raises(InputError, match="cannot read it"):
            analyze_simulation(liquid / "output", request)
    assert main(["md", "analyze", str(liquid), "--analyses", "npt"]) == 1
    assert "npt: not possible" in capsys.readouterr().out
    assert main(["md", "analyze", str(liquid), "--analyses", "entropy"]) == 1
    assert "analyses: rdf, adf, msd, vdos, npt" in capsys.readouterr().err
    assert main(["md", "analyze", str(liquid / "none")]) == 1
    assert "holds no simulation" in capsys.readouterr().err


def test_frames_are_in_our_units_whatever_the_potential_uses(liquid):
    frame = next(iter(simulation_trajectory(liquid / "output")))
    # 3 k T / m of argon at 130 K: (2.85 Å/ps)².
    assert (frame.velocities**2).sum(axis=1).mean() == pytest.approx(8.1, rel=0.35)


def test_exports_have_the_orientation_order_and_numbers_of_the_simulation(
    tmp_path, capsys
):
    """A tilted and turned cell whose elements alternate: nothing is as in LAMMPS."""
    turn = np.linalg.qr(np.array([[1.0, 0.3, -0.2], [0.1, 0.9, 0.4], [0.5, -0.3, 1.2]]))
    matrix = np.array([[11.4, 0, 0], [5.7, 9.9, 0], [-1.3, 0.8, 11.0]]) @ turn[0]
    if np.linalg.det(matrix) < 0:
        matrix = -matrix
    grid = np.array(list(np.ndindex(2, 2, 2))) / 2.0 + 0.1
    crystal = Structure(matrix, ["Kr", "Ar"] * 4, grid)
    engine = LAMMPSEngine()
    inputs = engine.prepare_input(
        crystal,
        {
            "workflow_type": "MD_NVT_LAMMPS",
            "potential": lennard_jones_potential(
                {"Ar": (0.01032, 3.405), "Kr": (0.014, 3.65)}, cutoff_a=8.5
            ),
            "temperature_k": 40.0,
            "num_steps": 60,
            "equilibration_steps": 0,
            "dump_every": 20,
            "thermo_every": 10,
        },
        tmp_path,
    )
    output = tmp_path / "output"
    engine.execute(inputs, output)

    def export(form, *words):
        path = tmp_path / f"out.{form}"
        code = main(
            ["md", "export", str(tmp_path), "--format", form, "-o", str(path), *words]
        )
        assert code == 0, capsys.readouterr()
        about = json.loads(path.with_name(path.name + ".json").read_text())
        assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert about["simulation"]["config"]["num_steps"] == 60
        return path, about

    path, about = export("extxyz")
    assert (about["n_frames"], about["last_step"]) == (4, 60)
    ase_io = pytest.importorskip("ase.io")
    images = ase_io.read(path, ":", format="extxyz")
    assert [image.info["step"] for image in images] == [0, 20, 40, 60]
    assert images[0].get_chemical_symbols() == ["Kr", "Ar"] * 4
    np.testing.assert_allclose(images[0].cell, matrix, atol=1e-12)
    shift = images[0].get_scaled_positions(wrap=False) - grid
    np.testing.assert_allclose(shift - np.round(shift), 0.0, atol=1e-10)
    # The last frame is the last structure; and velocities are turned as positions:
    # over 20 steps of a few fs atoms hardly turn, so they tell where atoms go.
    last = final_structure(output)
    shift = images[-1].get_scaled_positions(wrap=False) - last.frac_coords
    np.testing.assert_allclose(shift - np.round(shift), 0.0, atol=1e-9)
    dt = about["simulation"]["timestep_fs"] / 1000.0 * 20
    moved = images[1].positions - images[0].positions
    between = 0.5 * sum(i.arrays["velocity_a_ps"] for i in images[:2]) * dt
    assert np.abs(moved - between).max() < 0.1 * np.abs(moved).max()

    path, _ = export("lammps", "--first-step", "20", "--every", "2")
    back, frames = Trajectory(path), simulation_trajectory(output)
    assert back.step.tolist() == [20, 60]
    for step in (20, 60):
        a, b = back.at(step), frames.at(step)
        np.testing.assert_allclose(a.positions, b.positions, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(a.velocities, b.velocities)
        np.testing.assert_allclose(a.matrix, b.matrix, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(a.types, b.types)

    path, _ = export("poscar")
    poscar = Structure.from_str(path.read_text(), fmt="poscar")
    assert [site.species_string for site in poscar] == ["Kr", "Ar"] * 4
    np.testing.assert_allclose(poscar.lattice.matrix, matrix, atol=1e-12)
    np.testing.assert_allclose(poscar.frac_coords, last.frac_coords, atol=1e-12)

    path, about = export("csv")
    table, thermo = (
        np.genfromtxt(path, delimiter=",", names=True),
        simulation_thermo(output),
    )
    for name in ("step", "temperature_k", "pressure_bar", "total_energy_ev"):
        np.testing.assert_array_equal(table[name], thermo[name])
    assert about["units"]["pressure_bar"] == "bar"
    assert about["n_rows"] == 7
    assert main(["md", "export", str(tmp_path), "--first-step", "61", "-o", "x"]) != 0


def test_liquid_argon_is_rahmans(tmp_path):
    """A. Rahman, Phys. Rev. 136, A405 (1964): 864 atoms at 94.4 K and 1.374 g/cm³.

    He found D = 2.43e-5 cm²/s and maxima of g(r) at 3.7, 7.0 and 10.4 Å. His
    trajectories were some 10 ps long, hence 15 % for D; ours are 60 ps.
    """
    edge = 10.229 * 3.4 / 6  # his box: 10.229 sigma, six cells each way
    crystal = Structure(Lattice.cubic(edge), ["Ar"] * 4, ARGON.frac_coords)
    engine = LAMMPSEngine()
    inputs = engine.prepare_input(
        crystal,
        {
            "potential": lennard_jones_potential(
                {"Ar": (120 * BOLTZMANN_EV_PER_K, 3.4)}, cutoff_a=2.25 * 3.4
            ),
            "temperature_k": 94.4,
            "supercell_min_atoms": 864,
            "timestep_fs": 5.0,
            "equilibration_steps": 4000,
            "num_steps": 12000,
            "dump_every": 10,
            "thermo_every": 10,
        },
        tmp_path,
    )
    engine.execute(inputs, tmp_path / "output")
    found = analyze_simulation(
        tmp_path / "output",
        AnalysisRequest(analyses=("rdf", "msd"), rdf_max_a=12.0, rdf_bins=240),
    )
    diffusion = found.numbers["msd"]["diffusion"]["all"]
    assert diffusion["diffusive"]
    assert diffusion["value_cm2_s"] == pytest.approx(2.43e-5, rel=0.15)
    r, g = found.arrays["rdf"]["r_a"], found.arrays["rdf"]["total"]
    inner = np.arange(1, len(g) - 1)
    smooth = np.convolve(g, np.ones(5) / 5, mode="same")
    peaks = [
        r[i]
        for i in inner[10:-10]
        if smooth[i] == smooth[i - 10 : i + 11].max() and smooth[i] > 1.02
    ]
    assert peaks[:2] == pytest.approx([3.7, 7.0], abs=0.1)
    assert peaks[2:] == pytest.approx([10.4], abs=0.25)  # broad


def test_vibrations_are_those_of_the_temperature_that_was_held(tmp_path):
    parameters = {
        "workflow_type": "MD_ANNEAL_LAMMPS",
        "potential": lennard_jones_potential({"Ar": (0.01032, 3.405)}, cutoff_a=8.5),
        "temperature_k": 10.0,
        "supercell_min_atoms": 32,
        "timestep_fs": 4.0,
        "equilibration_steps": 0,
        "anneal_ensemble": "nvt",
        "schedule": [
            {"action": "heat", "steps": 500, "temperature_k": 40.0},
            {"action": "hold", "steps": 4000},
        ],
        "dump_every": 5,
    }
    engine = LAMMPSEngine()
    solid = Structure(Lattice.cubic(5.4), ["Ar"] * 4, ARGON.frac_coords)
    engine.run(solid, parameters, tmp_path)
    request = AnalysisRequest(analyses=("vdos", "msd", "rdf"), rdf_max_a=9.0)
    found = analyze_simulation(tmp_path / "output", request)
    vdos = found.numbers["vdos"]
    assert vdos["temperature_k"] == pytest.approx(40.0, rel=0.1)
    assert vdos["n_modes"] == pytest.approx(3 * 32 - 3, rel=0.1)
    assert found.numbers["rdf"]["set_temperature_k"] == 40.0
    # Beyond half of the cell a liquid would repeat itself.
    assert found.numbers["rdf"]["half_cell_a"] == pytest.approx(5.4)

    ramp = {**parameters, "schedule": parameters["schedule"][:1]}
    engine.run(solid, ramp, tmp_path / "ramp")
    found = analyze_simulation(tmp_path / "ramp" / "output", request)
    assert set(found.failures) == {"vdos", "msd"}
    assert "temperature changes" in found.failures["msd"].message
    assert found.numbers["rdf"]["set_temperature_k"] is None


def test_rows_of_a_longer_minimization_do_not_follow_the_dynamics(tmp_path):
    rattled = ARGON * [2, 2, 2]
    rattled.perturb(0.3, seed=1)
    parameters = {
        "potential": lennard_jones_potential({"Ar": (0.01032, 3.405)}, cutoff_a=8.5),
        "temperature_k": 20.0,
        "pre_minimize_steps": 500,
        "max_force_ev_a": 1e-9,
        "equilibration_steps": 0,
        "num_steps": 20,
        "thermo_every": 5,
        "dump_every": 0,
    }
    engine = LAMMPSEngine()
    engine.run(rattled, parameters, tmp_path)
    found = engine.parse_output(tmp_path / "output")
    assert found["steps"] == 20
    assert found["thermo"]["step"] == [0, 5, 10, 15, 20]
    assert min(found["thermo"]["temperature_k"]) > 1.0
    assert found["final_energy"] > found["final_potential_energy"]
