from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.md.box import LammpsBox
from nanoos_fw.md.trajectory import Frame, read_frames, read_thermo, segment_files

LOG = """LAMMPS (22 Jul 2025 - Update 4)
Per MPI rank memory allocation (min/avg/max) = 4.1 | 4.1 | 4.1 Mbytes
   Step          Temp          PotEng         Press     f_mine
         0   300           -14.16        12.5      7
        10   290.5         -14.10        13.5      8
WARNING: something went on, 5 of 10 things (src/x.cpp:1)
WARNING: five words in this line
        20   280           -14.05        14.5      nan
Loop time of 0.1 on 1 procs for 20 steps with 4 atoms
Total wall time: 0:00:00
   Step          Temp          PotEng         Press     f_mine
        20   280           -14.05        14.5      9
        30   270           -14.00        15.5      10
"""


def test_every_whole_row_is_read_once(tmp_path):
    path = tmp_path / "log.lammps"
    path.write_text(LOG + "        40   260           -13")
    table = read_thermo(path)
    assert table.step.tolist() == [0, 10, 20, 30]
    assert table["temperature_k"].tolist() == [300.0, 290.5, 280.0, 270.0]
    assert table["potential_energy_ev"][1] == -14.10
    assert table["f_mine"].tolist() == [7, 8, 9, 10]
    assert table.units["pressure_bar"] == "bar"
    with pytest.raises(InputError, match="entropy"):
        table["entropy"]


@pytest.mark.parametrize("end", range(0, len(LOG), 7))
def test_a_log_cut_anywhere_gives_its_whole_rows(tmp_path, end):
    path = tmp_path / "log.lammps"
    path.write_text(LOG[:end])
    table = read_thermo(path)
    whole = [
        int(line.split()[0])
        for line in LOG[:end].splitlines(keepends=True)
        if line.endswith("\n") and line.strip()[:1].isdigit()
    ]
    assert table.step.tolist() == sorted(set(whole))


def test_garbage_gives_an_empty_table(tmp_path):
    path = tmp_path / "log.lammps"
    path.write_bytes(bytes(range(256)) * 20)
    assert len(read_thermo(path)) == 0


def test_rows_of_a_continued_segment_replace_the_older_ones(tmp_path):
    head = "Step Temp\n"
    old = "".join(f"{s} 1.0\n" for s in range(0, 60, 10))
    new = "".join(f"{s} 2.0\n" for s in range(30, 80, 20))
    (tmp_path / "log.000000000000.lammps").write_text(head + old)
    (tmp_path / "log.000000000030.lammps").write_text(head + new)
    table = read_thermo(segment_files(tmp_path, "log.*.lammps"))
    assert table.step.tolist() == [0, 10, 20, 30, 50, 70]
    assert table["temperature_k"].tolist() == [1, 1, 1, 2, 2, 2]
    assert table.after(30).step.tolist() == [50, 70]


# --------------------------------------------------------------------------- frames


def frame_bytes(step, matrix, rows, *, columns="id type xu yu zu", chunks=2):
    """A frame as LAMMPS' DumpCustom::write_header writes it."""
    lx, ly, lz = np.diag(matrix)
    xy, xz, yz = matrix[1, 0], matrix[2, 0], matrix[2, 1]
    low, high = 1.0, 1.0  # the origin is not at zero
    bounds = [
        low + min(0.0, xy, xz, xy + xz),
        high + lx + max(0.0, xy, xz, xy + xz),
        low + min(0.0, yz),
        high + ly + max(0.0, yz),
        low,
        high + lz,
    ]
    out = struct.pack("<q", -10) + b"DUMPCUSTOM" + struct.pack("<ii", 1, 2)
    out += struct.pack("<qqi", step, len(rows), 1) + struct.pack("<6i", *[0] * 6)
    out += struct.pack("<6d", *bounds) + struct.pack("<3d", xy, xz, yz)
    out += struct.pack("<i", len(columns.split())) + struct.pack("<i", 0)
    out += struct.pack("<b", 0)
    out += struct.pack("<i", len(columns)) + columns.encode()
    out += struct.pack("<i", chunks)
    for part in np.array_split(np.array(rows, dtype="<f8"), chunks):
        out += struct.pack("<i", part.size) + part.tobytes()
    return out


MATRIX = np.array([[5.0, 0, 0], [-1.2, 4.0, 0], [0.7, -0.9, 6.0]])


def rows(step):
    # Out of order, as ranks leave them; relative to an origin at (1, 1, 1).
    return [[2, 1, 2.0 + step, 2.5, 3.0], [1, 2, 1.5, 1.0, 1.0], [3, 1, 9.0, 9.0, 9.0]]


def test_frames_come_back_in_site_order_with_their_cell(tmp_path):
    path = tmp_path / "trajectory.000000000000.bin"
    path.write_bytes(frame_bytes(0, MATRIX, rows(0)) + frame_bytes(5, MATRIX, rows(5)))
    first, second = read_frames(path)
    assert (first.step, second.step) == (0, 5)
    np.testing.assert_allclose(first.matrix, MATRIX, atol=1e-12)
    assert first.types.tolist() == [2, 1, 1]
    np.testing.assert_allclose(first.positions[0], [0.5, 0, 0])
    np.testing.assert_allclose(second.positions[1], [6.0, 1.5, 2.0])
    assert first.velocities is None


def test_a_dump_cut_anywhere_gives_its_whole_frames(tmp_path):
    path = tmp_path / "trajectory.000000000000.bin"
    one = frame_bytes(0, MATRIX, rows(0))
    data = one + frame_bytes(5, MATRIX, rows(5))
    for end in range(0, len(data), 3):
        path.write_bytes(data[:end])
        assert len(list(read_frames(path))) == end // len(one)


def test_segments_that_overlap_give_each_step_once(tmp_path):
    for start, steps in ((0, (0, 5, 10, 15, 20)), (10, (10, 15)), (15, (20, 25))):
        (tmp_path / f"trajectory.{start:012d}.bin").write_bytes(
            b"".join(frame_bytes(s, MATRIX, rows(s + start)) for s in steps)
        )
    frames = list(read_frames(list(tmp_path.glob("*.bin"))))
    assert [f.step for f in frames] == [0, 5, 10, 20, 25]
    # Step 10 was computed anew in the second segment, 15 in none that counts.
    assert frames[2].positions[1, 0] == pytest.approx(1.0 + 10 + 10)


def test_velocities_are_read_when_there(tmp_path):
    path = tmp_path / "a.bin"
    data = [[*row, 0.1, 0.2, 0.3 * row[0]] for row in rows(0)]
    path.write_bytes(
        frame_bytes(0, MATRIX, data, columns="id type xu yu zu vx vy vz", chunks=1)
    )
    (frame,) = read_frames(path)
    np.testing.assert_allclose(frame.velocities[:, 2], [0.3, 0.6, 0.9])


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"no dump at all " * 20)
    with pytest.raises(CorruptArtifactError, match="not a LAMMPS binary dump"):
        list(read_frames(path))
    path.write_bytes(
        frame_bytes(0, MATRIX, [r[:3] for r in rows(0)], columns="id type x")
    )
    with pytest.raises(InputError, match="xu"):
        list(read_frames(path))


def test_a_frame_maps_back_to_the_crystal():
    lattice = np.array([[0, 2.0, 2.1], [2.2, 0, 2.0], [2.0, 2.3, 0]])
    frac = np.array([[0.1, 0.2, 0.3], [0.7, 0.9, 0.4]])
    box = LammpsBox.from_lattice(lattice)
    frame = Frame(0, box.matrix, np.array([1, 1]), box.positions(frac))
    back, coords = frame.in_lattice(box)
    np.testing.assert_allclose(back, lattice, atol=1e-12)
    np.testing.assert_allclose((coords - frac) - np.rint(coords - frac), 0, atol=1e-12)
    assert frame.volume_a3 == pytest.approx(abs(np.linalg.det(lattice)))


def test_segments_are_sorted_by_step_not_by_name(tmp_path):
    for name in ("log.5.lammps", "log.10.lammps", "log.000.lammps"):
        (tmp_path / name).touch()
    assert [p.name for p in segment_files(tmp_path, "log.*.lammps")] == [
        "log.000.lammps",
        "log.5.lammps",
        "log.10.lammps",
    ]
    assert segment_files(Path(tmp_path), "none.*") == []


def test_wall_time_adds_up_over_runs_and_segments(tmp_path):
    head = "Step Temp\n"
    run = "0 1.0\n5 1.0\n10 1.0\nLoop time of 2.0 on 1 procs for 10 steps\n"
    more = "10 1.0\n20 1.0\nLoop time of 3.0 on 1 procs for 10 steps\n"
    (tmp_path / "log.0.lammps").write_text(head + run + head + more)
    (tmp_path / "log.20.lammps").write_text(
        head
        + "20 1.0\n30 1.0\nLoop time of 1.5 on 1 procs for 10 steps\n"
        + head
        + "30 1.0\n40 1.0\n"
    )
    table = read_thermo(segment_files(tmp_path, "log.*.lammps"))
    assert table.step.tolist() == [0, 5, 10, 20, 30, 40]
    np.testing.assert_allclose(table["wall_time_s"], [0.0, 1.0, 2.0, 5.0, 6.5, np.nan])
    assert table.to_dict()["wall_time_s"][-1] is None


def test_rows_of_a_minimization_before_the_dynamics_are_no_dynamics(tmp_path):
    path = tmp_path / "log.000000000000.lammps"
    minimized = "Step Temp PotEng\n0 0 -1.0\n50 0 -2.0\n100 0 -3.0\n137 0 -3.1\n"
    end = "Loop time of 1.0 on 1 procs for 137 steps with 4 atoms\n"
    moving = "Step Temp PotEng\n0 300 -3.0\n50 290 -2.5\n"
    path.write_text(minimized + end + moving)
    table = read_thermo(path)
    # LAMMPS counted from zero again: what had later numbers came before.
    assert table.step.tolist() == [0, 50]
    assert table["temperature_k"].tolist() == [300.0, 290.0]
