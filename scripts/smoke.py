"""Smoke run of an installed wheel, from a directory that is not the checkout.

usage: python scripts/smoke.py CHECKOUT
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import resources
from pathlib import Path


def main(checkout: Path) -> None:
    """Import the packages, load each template, start two MPI ranks and LAMMPS."""
    # The folder of this script comes first on sys.path; the checkout must not be there.
    sys.path = [p for p in sys.path if not Path(p).resolve().is_relative_to(checkout)]
    import nanoos_fw

    where = Path(nanoos_fw.__file__).resolve()
    if where.is_relative_to(checkout):
        sys.exit(f"the smoke run imports the checkout: {where}")
    for name in ("firetasks", "templates", "ml", "md", "stores", "cli"):
        importlib.import_module(f"nanoos_fw.{name}")

    from nanoos_fw.templates import load_template

    root = resources.files("nanoos_fw.templates")
    names = [
        f"{folder.name}/{file.name}"
        for folder in root.iterdir()
        if folder.is_dir() and folder.name != "__pycache__"
        for file in folder.iterdir()
        if file.is_file()
    ]
    if not names:
        sys.exit("the wheel ships no template")
    for name in names:
        if not load_template(name).strip():
            sys.exit(f"template {name} is empty")

    from nanoos_fw.parallel import Resources, launch_command

    probe = (
        "from mpi4py import MPI; import lammps; "
        "lmp = lammps.lammps(cmdargs=['-log', 'none', '-screen', 'none']); "
        "assert MPI.COMM_WORLD.size == 2; lmp.close()"
    )
    command = [*launch_command(Resources(ranks=2)), sys.executable, "-c", probe]
    subprocess.run(command, check=True, timeout=120)
    print(f"smoke run of {where.parent}: {len(names)} templates, 2 ranks, LAMMPS: ok")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
