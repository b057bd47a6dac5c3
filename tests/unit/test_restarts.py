"""Where a simulation goes on from, by files alone."""

from __future__ import annotations

import struct

import pytest

from nanoos_fw.errors import SimulationError
from nanoos_fw.md.inputs import MDConfig, Origin
from nanoos_fw.md.restarts import (
    PORTABLE,
    STOP_RESTART,
    drop_segments_after,
    is_exact,
    newest_origin,
    portable_step,
    publish,
    put_away,
    record_segment,
    restart_step,
)
from nanoos_fw.provenance import read_json

MAGIC = b"LammpS RestartT\0"
RUN = MDConfig(equilibration_steps=0, num_steps=1000)


def restart(step, version=b"22 Jul 2025\0", units=b"metal\0"):
    """The head of a restart file as LAMMPS 22Jul2025 writes it, and its end."""
    fields = struct.pack("<ii", 0, len(version)) + version
    fields += struct.pack("<iiiiii", 1, 4, 2, 4, 3, 8)  # sizes of integers
    fields += struct.pack("<ii", 4, len(units)) + units
    fields += struct.pack("<iq", 5, step)
    return MAGIC + struct.pack("<ii", 1, 3) + fields + bytes(500) + MAGIC


def test_step_is_read_from_whole_restart_files_only(tmp_path):
    path = tmp_path / "restart.0"
    assert restart_step(path) is None
    data = restart(2**40 + 7)
    path.write_bytes(data)
    assert restart_step(path) == 2**40 + 7
    # Cut at any byte, it is not whole.
    for length in (0, 5, len(MAGIC), 30, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert restart_step(path) is None, length
    swapped = data.replace(struct.pack("<i", 1), struct.pack(">i", 1), 1)
    path.write_bytes(swapped)  # of a machine of the other byte order
    assert restart_step(path) is None


def test_newest_whole_file_counts_and_the_portable_one_last(tmp_path, caplog):
    assert newest_origin(tmp_path, RUN) == Origin()
    (tmp_path / PORTABLE).write_text("LAMMPS data file, timestep = 900, units = metal")
    assert portable_step(tmp_path / PORTABLE) == 900
    assert newest_origin(tmp_path, RUN) == Origin(900, PORTABLE)
    (tmp_path / "restart.0").write_bytes(restart(400))
    assert newest_origin(tmp_path, RUN) == Origin(400, "restart.0")
    (tmp_path / "restart.1").write_bytes(restart(500))
    (tmp_path / STOP_RESTART).write_bytes(restart(470))
    assert newest_origin(tmp_path, RUN) == Origin(500, "restart.1")
    (tmp_path / "restart.1").write_bytes(restart(500)[:-3])
    assert newest_origin(tmp_path, RUN) == Origin(470, STOP_RESTART)
    assert "cut short" in caplog.text
    put_away(tmp_path, STOP_RESTART, SimulationError("damaged"))
    assert newest_origin(tmp_path, RUN) == Origin(400, "restart.0")


def test_dynamics_never_go_on_from_their_last_step(tmp_path):
    # A run of no steps computes no forces, which the result tells.
    for name, step in (("restart.0", 1000), ("restart.1", 900)):
        (tmp_path / name).write_bytes(restart(step))
    assert newest_origin(tmp_path, RUN) == Origin(900, "restart.1")
    (tmp_path / "restart.1").unlink()
    (tmp_path / PORTABLE).write_text("LAMMPS data file, timestep = 1000, units = metal")
    assert newest_origin(tmp_path, RUN) == Origin()
    still = MDConfig(workflow_type="MINIMIZE_LAMMPS", num_steps=1000)
    assert newest_origin(tmp_path, still) == Origin(1000, "restart.0")


def test_segments_of_a_past_that_is_left_are_put_away(tmp_path):
    names = [
        f"{k}.{step:012d}.{e}"
        for k, e in (("log", "lammps"), ("trajectory", "bin"))
        for step in (0, 400, 500)
    ]
    for name in names:
        (tmp_path / name).write_text("x")
    drop_segments_after(tmp_path, 400)
    left = {path.name for path in tmp_path.iterdir()}
    for name in names:
        assert (name in left) is ("0500" not in name)
        assert (f"{name}.dropped" in left) is ("0500" in name)


def test_published_files_are_whole_or_refused(tmp_path):
    old, new = tmp_path / "restart.0", tmp_path / "restart.0.new"
    old.write_bytes(restart(100))
    for data in (restart(200)[:-1], restart(300), b""):
        new.write_bytes(data)
        with pytest.raises(SimulationError, match="as a whole") as caught:
            publish(tmp_path, "restart.0", 200)
        assert caught.value.evidence["class"] == "disk_full"
        assert restart_step(old) == 100
    new.write_bytes(restart(200))
    publish(tmp_path, "restart.0", 200)
    assert restart_step(old) == 200
    assert not new.exists()


@pytest.mark.parametrize(
    ("launches", "exact"),
    [
        ([(0, None, 2, 1)], True),
        ([(0, None, 2, 1), (400, "restart.0", 2, 1)], True),
        ([(0, None, 2, 1), (400, "restart.0", 1, 1)], False),
        ([(0, None, 2, 1), (400, "restart.0", 2, 2)], False),
        ([(0, None, 2, 1), (430, STOP_RESTART, 2, 1)], False),
        ([(0, None, 2, 1), (430, PORTABLE, 2, 1)], False),
        # The stop was put away: begun again from before, it is exact.
        ([(0, None, 1, 1), (430, STOP_RESTART, 1, 1), (400, "restart.0", 1, 1)], True),
    ],
)
def test_a_run_is_exact_if_it_always_began_at_a_restart_step(tmp_path, launches, exact):
    for step, file, ranks, threads in launches:
        record_segment(tmp_path, Origin(step, file), ranks, threads)
    assert is_exact(tmp_path) is exact
    steps = [segment["step"] for segment in read_json(tmp_path / "segments.json")]
    assert steps == sorted(set(steps))
