"""Messages of LAMMPS, and what may be changed to try again."""

from __future__ import annotations

import pytest

from nanoos_fw.md.failures import (
    FAILURES,
    changes,
    correction,
    failure_class,
    simulation_error,
)
from nanoos_fw.md.protocols import MAX_INT32, MDConfig

CONFIG = MDConfig(
    workflow_type="MD_NPT_LAMMPS",
    num_steps=1000,
    equilibration_steps=200,
    thermo_every=10,
    dump_every=20,
    restart_every=500,
)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("ERROR: Lost atoms: original 512 current 511 (thermo.cpp:490)", "lost_atoms"),
        ("ERROR on proc 1: Non-numeric pressure - simulation unstable", "not_a_number"),
        (
            "ERROR on proc 0: Non-numeric atom coords - simulation unstable",
            "not_a_number",
        ),
        ("ERROR: Out of range atoms - cannot compute PPPM", "out_of_range"),
        (
            "ERROR on proc 3: Neighbor list overflow, boost neigh_modify one",
            "neighbour_overflow",
        ),
        ("ERROR: Bond atoms 1 2 missing on proc 0 at step 5", "missing_bonded"),
        ("ERROR: Cannot open file no.tersoff: No such file or directory", "file"),
        ("ERROR: Unrecognized pair style 'xyz' is part of the Z package", "style"),
        ("ERROR on proc 0: Failed to allocate 4096 bytes for array x", "out_of_memory"),
    ],
)
def test_messages_have_the_class_they_mean_and_an_advice(message, kind):
    error = simulation_error(message + "\n  ", "run 10")
    assert error.evidence == {
        "class": kind,
        "lammps_message": message,
        "command": "run 10",
    }
    assert error.advice == failure_class(message).advice


def test_unknown_messages_stay_as_they_are_and_restarts_are_told_by_the_command():
    error = simulation_error("ERROR: something new")
    assert error.evidence["class"] == "lammps"
    assert "something new" in error.message
    error = simulation_error("ERROR: something new", "read_restart restart.0")
    assert error.evidence["class"] == "restart_unreadable"


def test_every_fragment_is_found_by_its_own_class():
    # One fragment inside another of an earlier class would never count.
    for failure in FAILURES:
        for fragment in failure.fragments:
            assert fragment == fragment.lower()
            assert failure_class(f"ERROR: {fragment}!") is failure, fragment


def failed(kind, last_step=1000):
    error = simulation_error("ERROR: x")
    error.evidence |= {"class": kind, "last_step": last_step}
    return error


def test_early_losses_minimize_first_then_shorten_the_step_at_the_same_time():
    first = correction(failed("lost_atoms", 10), CONFIG, 2.0)
    assert changes(CONFIG, first.config) == {"pre_minimize_steps": [0, 1000]}
    second = correction(failed("lost_atoms", 10), first.config, 2.0).config
    late = correction(failed("not_a_number"), CONFIG, 2.0).config
    for config in (second, late):
        assert config.timestep_fs == 1.0
        # The physics stays: times of simulation, output and damping.
        assert config.num_steps == 2000
        assert config.equilibration_steps == 400
        assert (config.thermo_every, config.dump_every) == (20, 40)
        assert config.restart_every == 1000
        assert (config.thermostat_fs, config.barostat_fs) == (200.0, 2000.0)
    again = correction(failed("lost_atoms"), late, 1.0).config
    assert (again.thermostat_fs, again.num_steps) == (200.0, 4000)


def test_schedules_keep_their_times():
    parts = [{"action": "heat", "steps": 100, "temperature_k": 600.0}]
    config = MDConfig(workflow_type="MD_ANNEAL_LAMMPS", schedule=parts)
    shorter = correction(failed("lost_atoms"), config, 1.0).config
    assert [part.steps for part in shorter.schedule] == [200]


def test_neighbours_are_corrected_until_the_limit_then_the_step():
    wider = correction(failed("out_of_range"), CONFIG, 2.0).config
    assert changes(CONFIG, wider) == {"neighbor_skin_a": [1.0, 2.0]}
    widest = correction(failed("out_of_range"), wider, 2.0).config
    assert widest.neighbor_skin_a == 4.0
    assert correction(failed("out_of_range"), widest, 2.0).config.timestep_fs == 1.0
    more = correction(failed("neighbour_overflow"), CONFIG, 2.0).config
    assert changes(CONFIG, more) == {"neighbor_one": [2000, 20_000]}
    most = correction(failed("neighbour_overflow"), more, 2.0).config
    assert most.neighbor_one == 100_000
    # A cell that has collapsed is not helped by more neighbours.
    assert correction(failed("neighbour_overflow"), most, 2.0) is None


@pytest.mark.parametrize(
    ("error", "config", "timestep_fs"),
    [
        (failed("disk_full"), CONFIG, 1.0),
        (failed("potential"), CONFIG, 1.0),
        (failed("lammps"), CONFIG, 1.0),
        (failed("lost_atoms"), CONFIG, 0.09),  # half of it is below any use
        (
            failed("lost_atoms"),
            CONFIG.model_copy(update={"num_steps": MAX_INT32 // 2}),
            1.0,
        ),
        (failed("lost_atoms"), MDConfig(workflow_type="MINIMIZE_LAMMPS"), 1.0),
    ],
)
def test_what_has_no_correction_is_left_alone(error, config, timestep_fs):
    assert correction(error, config, timestep_fs) is None
