"""What there is of potentials: entries of those built in, and of files in folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from nanoos_fw.errors import InputError, NanoOSError
from nanoos_fw.md import zhou2004
from nanoos_fw.md.pair_commands import commands_potential
from nanoos_fw.md.potential_files import FileHeader, read_entry_elements, read_header
from nanoos_fw.md.potentials import (
    ZHOU2004_ELEMENTS,
    Potential,
    lennard_jones_potential,
)
from nanoos_fw.md.recipes import file_potential, style_of_file
from nanoos_fw.provenance import sha256_file

RECIPE_ENDING = ".potential.yaml"
_HEADER_BYTES = 4096

# Well depth in eV and diameter in Å.
NOBLE_GASES: dict[str, tuple[float, float]] = {
    "Ne": (0.0031, 2.74),
    "Ar": (0.0104, 3.40),
    "Kr": (0.0140, 3.65),
    "Xe": (0.0200, 3.98),
}
_NOBLE_GASES_CITATION = (
    "N. Bernardes, Phys. Rev. 112, 1534 (1958), as in N. W. Ashcroft, N. D. Mermin, "
    "Solid State Physics (1976), table 20.1"
)
_NOBLE_GASES_CUTOFF_A = 14.0  # 3.5 diameters of Xe

Source = Literal["plug-in", "site", "built-in", "lammps"]
SOURCES: tuple[Source, ...] = ("plug-in", "site", "built-in", "lammps")


@dataclass(frozen=True)
class CatalogueEntry:
    """A potential that can be asked for.

    Parameters
    ----------
    name
        File name, or the name of a recipe.
    source
        Where it comes from.
    pair_style
        LAMMPS pair style; None for a file that no recipe is known for, and for
        plug-ins, which are only asked when they are used.
    elements
        Elements it knows; empty where that is not known.
    path
        Its file, if it has one.
    header
        Date, units, contributor and citation as the file gives them.
    problem
        Why it cannot be used; empty if it can.
    """

    name: str
    source: Source
    pair_style: str | None = None
    elements: tuple[str, ...] = ()
    path: Path | None = None
    header: FileHeader = field(default_factory=FileHeader)
    problem: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether a recipe can be made."""
        return not self.problem

    def sha256(self) -> str:
        """Return the SHA-256 of the file; empty without one."""
        return sha256_file(self.path) if self.path is not None else ""

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON-compatible values, with its SHA-256."""
        return {
            "name": self.name,
            "source": self.source,
            "pair_style": self.pair_style,
            "elements": list(self.elements),
            "path": str(self.path) if self.path is not None else None,
            "sha256": self.sha256(),
            "date": self.header.date,
            "units": self.header.units,
            "contributor": self.header.contributor,
            "citation": self.header.citation,
            "problem": self.problem,
        }


def noble_gas_potential() -> Potential:
    """Return the Lennard-Jones potential of Ne, Ar, Kr and Xe."""
    return lennard_jones_potential(
        NOBLE_GASES,
        cutoff_a=_NOBLE_GASES_CUTOFF_A,
        citation=_NOBLE_GASES_CITATION,
        name="noble-gases",
        timestep_fs=2.0,
    )


def built_in_entries() -> list[CatalogueEntry]:
    """Return those that come with this package."""
    return [
        CatalogueEntry(
            "zhou2004",
            "built-in",
            "eam/alloy",
            ZHOU2004_ELEMENTS,
            header=FileHeader(units="metal", citation=zhou2004.CITATION),
        ),
        CatalogueEntry(
            "noble-gases",
            "built-in",
            "lj/cut",
            tuple(NOBLE_GASES),
            header=FileHeader(units="metal", citation=_NOBLE_GASES_CITATION),
        ),
    ]


def entry_at(folder: Path, name: str, source: Source) -> CatalogueEntry | None:
    """Return the file or recipe of a name in a folder; None without one."""
    for path in (folder / name, folder / f"{name}{RECIPE_ENDING}"):
        if path.is_file():
            state = path.stat()
            return _file_entry(path, source, state.st_size, state.st_mtime_ns)
    return None


def folder_entries(folder: Path, source: Source) -> list[CatalogueEntry]:
    """Return all files of a folder, sorted by name.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        states = [path.stat() for path in paths]
    except OSError as error:
        raise InputError(
            f"the folder of potentials {folder} cannot be read: {error.strerror}"
        ) from error
    return [
        _file_entry(path, source, state.st_size, state.st_mtime_ns)
        for path, state in zip(paths, states, strict=True)
        if not path.name.startswith(".")
    ]


@lru_cache(maxsize=4096)
def _file_entry(path: Path, source: Source, size: int, mtime: int) -> CatalogueEntry:
    """Return the entry of a file; read again when size or time of change differ."""
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES).decode("utf-8", errors="replace")
    header = read_header(head)
    if path.name.endswith(RECIPE_ENDING):
        return _recipe_entry(path, source)
    style = style_of_file(path.name)
    if style is None:
        problem = "no recipe is known for this kind of file"
        return CatalogueEntry(path.name, source, None, (), path, header, problem)
    try:
        made = file_potential(style, path.name, directory=path.parent)
        return CatalogueEntry(path.name, source, style, made.elements, path, header)
    except NanoOSError as error:
        problem = error.message
    # A file may be complete for some of its elements only.
    text = path.read_bytes().decode("utf-8", errors="replace")
    try:
        elements = read_entry_elements(text, style)
    except (ValueError, KeyError, IndexError):
        elements = ()
    for element in elements:
        try:
            file_potential(style, path.name, directory=path.parent, elements=[element])
        except NanoOSError:
            elements = ()
            break
    problem = "" if elements else problem
    return CatalogueEntry(path.name, source, style, elements, path, header, problem)


def _recipe_entry(path: Path, source: Source) -> CatalogueEntry:
    try:
        recipe = read_recipe(path)
        made = commands_potential(recipe, directory=path.parent)
    except NanoOSError as error:
        return CatalogueEntry(path.name, source, path=path, problem=str(error))
    header = FileHeader(units=made.units, citation=made.citation)
    return CatalogueEntry(
        path.name, source, made.pair_style, made.elements, path, header
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the commands of a recipe file, for `commands_potential`.

    Raises
    ------
    InputError
        If it cannot be read, or is no mapping.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise InputError(f"the recipe {path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"the recipe {path} is not a mapping")
    data.setdefault("name", path.name.removesuffix(RECIPE_ENDING))
    return dict(data)
