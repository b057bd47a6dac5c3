from __future__ import annotations

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import InputError, LaunchError
from nanoos_fw.md import engine as engine_module
from nanoos_fw.md.engine import (
    LAMMPSEngine,
    final_structure,
    get_engine,
    simulation_box,
    simulation_thermo,
)
from nanoos_fw.md.inputs import MDConfig
from nanoos_fw.md.potentials import zhou2004_potential
from nanoos_fw.operations.simulation_folders import simulation_status
from nanoos_fw.provenance import read_json, write_json


def test_registry_knows_both_names_and_says_what_it_has():
    assert get_engine("LAMMPS") is get_engine("LAMMPS_MD") is LAMMPSEngine
    with pytest.raises(InputError, match="LAMMPS_MD"):
        get_engine("VASP")


def test_input_generation(copper, tmp_path):
    directory = LAMMPSEngine().prepare_input(copper, {"temperature": 300}, tmp_path)
    assert (directory / "in.lammps").exists()
    assert (directory / "structure.data").exists()
    script = (directory / "in.lammps").read_text()
    file = script.split("pair_coeff * * ")[1].split()[0]
    assert (directory / file).exists()
    assert "velocity all create 300.0 " in script


def test_the_same_simulation_has_the_same_key_wherever_it_is(copper, tmp_path):
    engine = LAMMPSEngine()

    def key(name, **parameters):
        folder = engine.prepare_input(copper, parameters, tmp_path / name)
        return read_json(folder / "simulation.json")["key"]

    assert key("a") == key("b")
    assert key("a") != key("c", temperature=301.0)
    # Units of names do not matter, values do.
    assert key("d", temperature=350.0) == key("e", temperature_k=350.0)


def test_supercell_is_made_before_the_simulation(copper, tmp_path):
    folder = LAMMPSEngine().prepare_input(
        copper, {"supercell_min_atoms": 100}, tmp_path
    )
    assert len(read_json(folder / "simulation.json")["species"]) == 108
    assert "108 atoms" in (folder / "structure.data").read_text()


def test_potential_is_chosen_by_elements_or_asked_for(rock_salt, copper, tmp_path):
    with pytest.raises(InputError, match="lacks Cl, Na"):
        LAMMPSEngine().prepare_input(rock_salt, {}, tmp_path / "a")
    with pytest.raises(InputError, match="given as int"):
        LAMMPSEngine().prepare_input(copper, {"potential": 3}, tmp_path / "b")
    with pytest.raises(InputError, match="cannot be used"):
        LAMMPSEngine().prepare_input(copper, {"potential": {}}, tmp_path / "c")
    given = zhou2004_potential(["Cu", "Ag"], tmp_path)
    for form in (given, given.model_dump(mode="json"), "eam", "zhou2004"):
        folder = LAMMPSEngine().prepare_input(
            copper, {"potential": form}, tmp_path / "d"
        )
        assert "pair_style eam/alloy" in (folder / "in.lammps").read_text()


def test_execution_needs_prepared_input_and_its_own_folder(
    copper, tmp_path, monkeypatch
):
    engine = LAMMPSEngine()
    with pytest.raises(InputError, match="no prepared simulation"):
        engine.execute(tmp_path / "nothing", tmp_path / "out")

    def launch(*args, **kwargs):
        raise LaunchError("not now")

    monkeypatch.setattr(engine_module, "launch_ranks", launch)
    one = engine.prepare_input(copper, {}, tmp_path / "one")
    two = engine.prepare_input(copper, {"seed": 2}, tmp_path / "two")
    with pytest.raises(LaunchError):
        engine.execute(one, tmp_path / "out")
    with pytest.raises(InputError, match="another simulation"):
        engine.execute(two, tmp_path / "out")


def test_the_earlier_of_timeout_and_deadline_counts(copper, tmp_path, monkeypatch):
    engine, seen = LAMMPSEngine(), []

    def launch(module, config, *, resources, deadline, **_):
        assert module == "nanoos_fw.md.simulation"
        assert read_json(config)["deadline"] == deadline
        seen.append(deadline)
        return {"steps": 1}

    monkeypatch.setattr(engine_module, "launch_ranks", launch)
    monkeypatch.setattr(engine_module.time, "time", lambda: 1000.0)
    inputs = engine.prepare_input(copper, {}, tmp_path)
    engine.execute(inputs, tmp_path / "a", timeout=50.0, deadline=2000.0)
    engine.execute(inputs, tmp_path / "b", timeout=5000.0, deadline=2000.0)
    outcome = engine.execute(inputs, tmp_path / "c", timeout=None)
    assert seen == [1050.0, 2000.0, None]
    # A finished simulation is not run again.
    assert engine.execute(inputs, tmp_path / "c") == outcome
    assert outcome["success"]
    assert len(seen) == 3


def pretend_output(structure, folder, parameters, *, final=True):
    """Lay out files as the ranks leave them, with known numbers."""
    engine = LAMMPSEngine()
    inputs = engine.prepare_input(structure, parameters, folder)
    output = folder / "output"
    output.mkdir()
    simulation = read_json(inputs / "simulation.json")
    write_json(output / "simulation.json", simulation)
    config = MDConfig.model_validate(simulation["config"])
    rng = np.random.default_rng(0)
    lines = ["Step Time Temp PotEng TotEng Press Volume"]
    for step in range(0, config.total_steps + 1, config.thermo_every):
        hot = 900.0 if step <= config.equilibration_steps else 300.0
        lines.append(f"{step} {step / 500} {hot + rng.normal()} -14 -13.5 5 47.2")
        if step + 7 < config.total_steps:
            # Where the ranks paused; off the grid, so that it must not count.
            lines += ["Loop time of 1", lines[0], f"{step + 7} 0 5000 -1 -1 -1 -1"]
    if config.total_steps % config.thermo_every:  # LAMMPS prints the last step too
        lines.append(
            f"{config.total_steps} {config.total_steps / 500} 310 -15 -14 6 50"
        )
    (output / "log.000000000000.lammps").write_text("\n".join(lines) + "\n")
    if final:
        box = simulation_box(output)
        frac = np.array(simulation["frac_coords"]) + 0.01
        write_json(
            output / "final.json",
            {
                "step": config.total_steps,
                "matrix": (1.02 * box.matrix).tolist(),
                "positions": (1.02 * box.positions(frac)).tolist(),
            },
        )
    return engine, output


RUN = {"equilibration_steps": 1000, "num_steps": 4000}


def test_averages_leave_out_equilibration_and_pauses(copper, tmp_path):
    engine, output = pretend_output(copper, tmp_path, RUN)
    result = engine.parse_output(output)
    assert result["complete"]
    assert result["avg_temperature"] == pytest.approx(300.0, abs=0.5)
    average = result["averages"]["temperature_k"]
    assert average["n_samples"] == 80
    assert average["standard_error"] == pytest.approx(1 / np.sqrt(80), rel=0.5)
    assert result["final_energy"] == -13.5
    assert result["final_potential_energy"] == -14.0
    assert result["avg_volume"] == pytest.approx(47.2)
    assert result["steps"] == result["total_steps"] == 5000
    assert result["units"]["temperature_k"] == "K"


def test_final_structure_has_the_orientation_and_sites_of_the_first(
    triclinic, tmp_path
):
    from nanoos_fw.md.potentials import lennard_jones_potential

    lj = lennard_jones_potential({"Mg": (0.01, 2.0), "O": (0.01, 2.0)}, cutoff_a=6.0)
    _, output = pretend_output(triclinic, tmp_path, {**RUN, "potential": lj})
    final = final_structure(output)
    np.testing.assert_allclose(
        final.lattice.matrix, 1.02 * triclinic.lattice.matrix, atol=1e-9
    )
    assert [s.specie for s in final] == [s.specie for s in triclinic]
    shift = final.frac_coords - triclinic.frac_coords - 0.01
    np.testing.assert_allclose(shift - np.rint(shift), 0.0, atol=1e-9)


def test_final_structure_keeps_the_charges_that_the_potential_takes(
    rock_salt, tmp_path
):
    # What ends a minimization begins the dynamics with the same potential.
    given = [1.0 if site.specie.symbol == "Na" else -1.0 for site in rock_salt]
    salt = rock_salt.copy(site_properties={"charge": given})
    charged = {
        "pair_style": "born/coul/dsf 0.25 8.0",
        "pair_coeff": ["* * 1.0 0.3 0.0 0.0 0.0"],
        "elements": ["Na", "Cl"],
        "charges": "given",
    }
    _, output = pretend_output(salt, tmp_path / "a", {**RUN, "potential": charged})
    assert final_structure(output).site_properties == {"charge": given}
    neutral = {
        "pair_style": "lj/cut 6.0",
        "pair_coeff": ["* * 0.01 2.0"],
        "elements": ["Na", "Cl"],
    }
    _, output = pretend_output(salt, tmp_path / "b", {**RUN, "potential": neutral})
    assert not final_structure(output).site_properties


def test_unfinished_output_is_read_as_far_as_it_goes(copper, tmp_path):
    engine, output = pretend_output(copper, tmp_path, RUN, final=False)
    result = engine.parse_output(output)
    assert not result["complete"]
    assert "final_structure" not in result
    assert result["avg_temperature"] == pytest.approx(300.0, abs=0.5)
    with pytest.raises(InputError, match="not finished"):
        final_structure(output)
    (output / "log.000000000000.lammps").unlink()
    empty = engine.parse_output(output)
    assert empty["steps"] == 0
    assert empty["final_energy"] is None
    assert empty["averages"] == {}


def test_final_numbers_are_those_of_the_last_step_off_the_grid_too(copper, tmp_path):
    parameters = {"equilibration_steps": 0, "num_steps": 4020}
    engine, output = pretend_output(copper, tmp_path, parameters)
    result = engine.parse_output(output)
    assert result["steps"] == 4020
    assert result["final_energy"] == -14.0
    assert result["final_potential_energy"] == -15.0
    # Averages take rows at equal distances.
    assert result["thermo"]["step"][-1] == 4000
    assert result["warnings"] == []


def test_pressure_components_are_in_the_frame_of_the_crystal(copper, tmp_path):
    turned = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    lattice = copper.lattice.matrix @ turned
    crystal = Structure(Lattice(lattice), copper.species, copper.frac_coords)
    _, output = pretend_output(crystal, tmp_path, RUN)
    log = output / "log.000000000000.lammps"
    log.write_text("Step Pxx Pyy Pzz Pxy Pxz Pyz\n0 1 2 3 4 5 6\n")
    table = simulation_thermo(output)
    # The box's x, y, z are the crystal's y, z, x.
    for name, value in {"xx": 3, "yy": 1, "zz": 2, "xy": 5, "xz": 6, "yz": 4}.items():
        assert table[f"p{name}_bar"][0] == pytest.approx(value), name


def test_nothing_is_averaged_over_a_ramp(copper, tmp_path):
    ramp = {
        **RUN,
        "workflow_type": "MD_ANNEAL_LAMMPS",
        "anneal_temperature_k": 900.0,
        "num_steps": 4000,
    }
    engine, output = pretend_output(copper, tmp_path, ramp)
    result = engine.parse_output(output)
    assert result["averages"] == {}
    assert result["avg_temperature"] is None
    assert any("temperature changes" in text for text in result["warnings"])


def test_another_default_timestep_is_another_simulation(copper, tmp_path):
    engine = LAMMPSEngine()
    potential = zhou2004_potential(["Cu"], tmp_path)
    slower = potential.model_copy(update={"timestep_fs": 1.0})

    def key(name, potential, **more):
        parameters = {"potential": potential, **more}
        folder = engine.prepare_input(copper, parameters, tmp_path / name)
        return read_json(folder / "simulation.json")["key"]

    assert potential.identity == slower.identity
    assert key("a", potential) != key("b", slower)
    # Its own timestep, said or not, is the same simulation... of the same potential.
    still = {"workflow_type": "STATIC_LAMMPS"}
    assert key("c", potential, **still) == key("d", slower, **still)


def test_one_parameter_by_two_names_is_refused(copper, tmp_path):
    with pytest.raises(InputError, match="temperature_k"):
        LAMMPSEngine().run(
            copper, {"temperature": 500.0, "temperature_k": 300.0}, tmp_path
        )


def test_status_tells_the_newest_step_off_the_grid_too(copper, tmp_path):
    parameters = {"equilibration_steps": 0, "num_steps": 4020}
    _, output = pretend_output(copper, tmp_path, parameters, final=False)
    for folder in (tmp_path, output):
        found = simulation_status(folder)
        assert (found["step"], found["total_steps"]) == (4020, 4020)
        assert not found["finished"]
        assert found["restart_step"] == 0
        assert found["last"]["volume_a3"] == {"value": 50.0, "unit": "Å³"}
    with pytest.raises(InputError, match="holds no simulation"):
        simulation_status(tmp_path / "elsewhere")
