"""Rank program: what MPI and LAMMPS see of each other on every rank.

It computes nothing. Wrong pairs of launcher, mpi4py and LAMMPS do not fail: with the
launcher of another MPI each rank believes to be alone, and does all of the work again.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

from nanoos_fw.md.calculator import open_lammps
from nanoos_fw.parallel import Communicator, StopRequest, run_rank_program

# libmpi.so.12, libmpi_cray.so.12, libmpi.so.40: not libmpi_mpifh and the like.
_LIBRARY = re.compile(r"/libmpi(ch|_cray|_gnu[^/]*)?\.so[.\d]*$")


def main(
    config: dict[str, Any], work_dir: Path, comm: Communicator, stop: StopRequest
) -> dict[str, Any]:
    """Return ``ranks``: for each of them, in order, what it sees."""
    lmp = open_lammps(comm.mpi)
    seen = {
        "host": socket.gethostname(),
        "ranks": comm.size,
        "mpi": "none" if comm.mpi is None else mpi_version(),
        "mpi_libraries": mpi_libraries(Path("/proc/self/maps")),
        "lammps_ranks": int(lmp.extract_setting("world_size")),
        "lammps_version": int(lmp.version()),
        "processors": sorted(os.sched_getaffinity(0)),
    }
    lmp.close()
    return {"ranks": comm.gather(seen)}


def mpi_version() -> str:
    """Return the first line of what mpi4py's MPI library says it is."""
    from mpi4py import MPI

    return " ".join(MPI.Get_library_version().splitlines()[0].strip("\0").split())


def mpi_libraries(maps: Path) -> list[str]:
    """Return the MPI libraries that a process has loaded; more than one is a mistake.

    Parameters
    ----------
    maps
        Its ``/proc/PID/maps``.
    """
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
    return sorted(path for path in paths if _LIBRARY.search(path))


if __name__ == "__main__":
    run_rank_program(main)
