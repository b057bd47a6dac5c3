"""The potentials at hand: by name, by style, by elements.

Potentials come from four sources, in this order:

1. plug-ins: `register_potential`, and entry points of the group
   ``nanoos_fw.potentials``;
2. the site's folder, ``NANO_OS_LAMMPS_POTENTIAL_DIR``: files that LAMMPS reads, and
   recipes ``NAME.potential.yaml``;
3. those built in: the 16-metal EAM and Lennard-Jones noble gases;
4. the files that come with the lammps package.

A potential that is asked for by its style (``"tersoff"``, ``"eam"``) is the first of
those that know all elements: sources in the order above, then those with the fewest
other elements, then the one whose file is named by its elements alone
(``SiC.tersoff`` before ``SiC_1994.tersoff``). If that leaves several, the choice is
the user's: an error lists them.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from nanoos_fw.errors import InputError, MissingDependencyError, NanoOSError
from nanoos_fw.md import zhou2004
from nanoos_fw.md.pair_commands import commands_potential
from nanoos_fw.md.potential_files import FileHeader, read_entry_elements, read_header
from nanoos_fw.md.potential_folders import search_folders
from nanoos_fw.md.potential_terms import SAFE_NAME, check_element
from nanoos_fw.md.potentials import (
    ZHOU2004_ELEMENTS,
    Potential,
    lennard_jones_potential,
    zhou2004_potential,
)
from nanoos_fw.md.recipes import file_potential, style_of_file
from nanoos_fw.provenance import sha256_file

logger = logging.getLogger(__name__)

PLUGIN_GROUP = "nanoos_fw.potentials"
RECIPE_ENDING = ".potential.yaml"
_NEAR_NAMES = 5
_HEADER_BYTES = 4096

# What a style may be asked for by, beside its own name.
FAMILIES: dict[str, tuple[str, ...]] = {
    "eam": ("eam/alloy", "eam/fs", "eam"),
    "lj": ("lj/cut",),
    "lennard-jones": ("lj/cut",),
    "reax": ("reaxff",),
    "reax/c": ("reaxff",),
}

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
PotentialFactory = Callable[[tuple[str, ...], Path], Potential]

_registered: dict[str, PotentialFactory] = {}


# ------------------------------------------------------------------------ plug-ins


def register_potential(name: str, factory: PotentialFactory) -> None:
    """Make a potential available under a name, in this process.

    Parameters
    ----------
    name
        What users write as ``potential``.
    factory
        Called with the elements of a structure and a folder for files that it
        writes; returns a `Potential` of any pair style that LAMMPS has, such as one
        of a machine-learned model, or raises an `InputError`.

    Notes
    -----
    A package offers potentials without being imported first by an entry point of the
    group ``nanoos_fw.potentials`` whose object is such a factory.

    Raises
    ------
    InputError
        If the name is taken.
    """
    if name in _registered and _registered[name] is not factory:
        raise InputError(f"potential {name!r} is registered already")
    _registered[name] = factory


def unregister_potential(name: str) -> None:
    """Take a registered potential back."""
    _registered.pop(name, None)


def plugin_potentials() -> dict[str, PotentialFactory]:
    """Return registered factories, and those of entry points by a loader each."""
    from importlib.metadata import entry_points

    found: dict[str, PotentialFactory] = {}
    for point in entry_points(group=PLUGIN_GROUP):
        found[point.name] = _loader(point)
    return {**found, **_registered}


def _loader(point: Any) -> PotentialFactory:
    def make(elements: tuple[str, ...], directory: Path) -> Potential:
        try:
            factory = point.load()
        except Exception as error:  # a plug-in may fail in any way
            raise MissingDependencyError(
                f"the potential plug-in {point.name!r} ({point.value}) cannot be "
                f"loaded: {type(error).__name__}: {error}",
                advice="repair or uninstall the package that offers it",
            ) from error
        potential: Potential = factory(elements, directory)
        return potential

    return make


# ------------------------------------------------------------------------- entries


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


class Catalogue:
    """All potentials at hand.

    Parameters
    ----------
    directory
        The site's own folder; None takes the setting ``lammps_potential_dir``.

    Raises
    ------
    InputError
        If the folder is not there.
    """

    def __init__(self, directory: Path | None = None) -> None:
        if directory is None:
            from nanoos_fw.settings import load_settings

            directory = load_settings().lammps_potential_dir
        if directory is not None:
            directory = directory.expanduser().absolute()
            if not directory.is_dir():
                raise InputError(
                    f"the folder of potentials {directory} does not exist",
                    advice="correct NANO_OS_LAMMPS_POTENTIAL_DIR",
                )
        self.directory = directory

    def entries(self) -> list[CatalogueEntry]:
        """Return all entries, in the order of their sources, then by name."""
        found = [CatalogueEntry(n, "plug-in") for n in sorted(plugin_potentials())]
        found += self._site_entries()
        found += _built_in()
        for folder in search_folders(None):
            found += _folder_entries(folder, "lammps")
        return found

    def covering(
        self, elements: Sequence[str], style: str | None = None
    ) -> list[CatalogueEntry]:
        """Return what knows all of some elements, the best first.

        Parameters
        ----------
        elements
            Elements that must be known.
        style
            Pair style or family (`FAMILIES`); None takes all.
        """
        for element in elements:
            check_element(element)
        styles = FAMILIES.get(style, (style,)) if style is not None else ()
        found = [
            entry
            for entry in self.entries()
            if entry.is_usable
            and set(elements) <= set(entry.elements)
            and (style is None or entry.pair_style in styles)
        ]
        return sorted(found, key=lambda entry: _rank(entry, elements))

    def entry(self, name: str) -> CatalogueEntry:
        """Return the entry of a name; one of the site hides one of LAMMPS.

        Raises
        ------
        InputError
            If there is none; lists near names.
        """
        found = self._find(name)
        if found is None:
            raise self._unknown(name, self.entries())
        return found

    def make(
        self, entry: CatalogueEntry, elements: Sequence[str] | None, directory: Path
    ) -> Potential:
        """Return the recipe of an entry.

        Parameters
        ----------
        entry
            One of `entries`.
        elements
            Elements that it must know; None takes all it has.
        directory
            Folder for files that are generated.

        Raises
        ------
        InputError
            If it cannot be used, or lacks an element.
        """
        if entry.problem:
            raise InputError(
                f"potential {entry.name!r} cannot be used: {entry.problem}",
                evidence={"path": str(entry.path)},
                advice="give its pair_style, pair_coeff and elements instead",
            )
        wanted = tuple(elements) if elements is not None else entry.elements
        if entry.source == "plug-in":
            potential = _from_plugin(entry.name, wanted, directory)
        elif entry.name == "zhou2004" and entry.source == "built-in":
            potential = zhou2004_potential(sorted(wanted), directory)
        elif entry.source == "built-in":
            potential = noble_gas_potential()
        elif entry.name.endswith(RECIPE_ENDING) and entry.path is not None:
            potential = commands_potential(
                _read_recipe(entry.path), directory=entry.path.parent
            )
        else:
            assert entry.path is not None
            assert entry.pair_style is not None
            partial = bool(elements) and set(wanted) < set(entry.elements)
            potential = file_potential(
                entry.pair_style,
                entry.path.name,
                directory=entry.path.parent,
                elements=wanted if partial else None,
            )
        potential.check_elements(wanted)
        return potential

    def resolve(
        self, chosen: Any, elements: Sequence[str], directory: Path
    ) -> Potential:
        """Return the recipe that a user asks for.

        Parameters
        ----------
        chosen
            A `Potential` or its dictionary; commands, as
            `pair_commands.PotentialCommands` has them; the name of an entry, a style
            or a family; or None, which takes the 16-metal EAM.
        elements
            Elements of the structure.
        directory
            Folder for files that are generated.

        Raises
        ------
        InputError
            If there is none or there are several to choose from; lists them.
        """
        elements = sorted({check_element(element) for element in elements})
        if isinstance(chosen, Potential):
            potential = chosen
        elif isinstance(chosen, Mapping):
            potential = self._from_mapping(chosen)
        elif isinstance(chosen, str):
            potential = self._named(chosen, elements, directory)
        elif chosen is None:
            potential = self._default(elements, directory)
        else:
            raise InputError(
                f"a potential cannot be given as {type(chosen).__name__}",
                advice="give a name such as 'tersoff' or 'SiC.tersoff', or a recipe",
            )
        potential.check_elements(elements)
        return potential

    def _from_mapping(self, chosen: Mapping[str, Any]) -> Potential:
        if "terms" in chosen or chosen.get("schema_version") == 1:
            try:
                return Potential.model_validate(dict(chosen))
            except ValidationError as error:
                item = error.errors()[0]
                where = ".".join(map(str, item["loc"]))
                raise InputError(
                    f"the potential cannot be used: {where}: {item['msg']}",
                    advice="make recipes with nanoos_fw.md.recipes",
                ) from error
        return commands_potential(chosen, directory=self.directory)

    def _named(self, name: str, elements: Sequence[str], directory: Path) -> Potential:
        found_entry = self._find(name)
        if found_entry is not None:
            return self.make(found_entry, elements, directory)
        entries = self.entries()
        style = name.lower()
        styles = {entry.pair_style for entry in entries}
        if style not in FAMILIES and style not in styles:
            raise self._unknown(name, entries)
        found = self.covering(elements, style)
        if not found:
            raise InputError(
                f"no {style} potential at hand knows {', '.join(elements)}",
                evidence={"elements": list(elements), "style": style},
                advice=self._others(elements),
            )
        first = _rank(found[0], elements)
        best = [entry for entry in found if _rank(entry, elements)[:3] == first[:3]]
        if len(best) > 1:
            names = [entry.name for entry in best]
            raise InputError(
                f"several {style} potentials know {', '.join(elements)} equally well",
                evidence={"alternatives": names},
                advice=f"choose one of {', '.join(names)}",
            )
        logger.info(
            "potential %r for %s is %s (%s)",
            name,
            " ".join(elements),
            best[0].name,
            best[0].header.citation or "no citation",
        )
        return self.make(best[0], elements, directory)

    def _find(self, name: str) -> CatalogueEntry | None:
        """Return the entry of a name without reading all files; None without one."""
        if name in plugin_potentials():
            return CatalogueEntry(name, "plug-in")
        if not SAFE_NAME.match(name) or name[0] in ".-":
            return None
        if self.directory is not None and (found := _at(self.directory, name, "site")):
            return found
        for entry in _built_in():
            if entry.name == name:
                return entry
        for folder in search_folders(None):
            if found := _at(folder, name, "lammps"):
                return found
        return None

    def _default(self, elements: Sequence[str], directory: Path) -> Potential:
        missing = sorted(set(elements) - set(ZHOU2004_ELEMENTS))
        if missing:
            raise InputError(
                "no potential was given, and the 16-metal EAM lacks "
                f"{', '.join(missing)}",
                evidence={"elements": list(ZHOU2004_ELEMENTS)},
                advice=self._others(elements),
            )
        return zhou2004_potential(elements, directory)

    def _others(self, elements: Sequence[str]) -> str:
        names = [entry.name for entry in self.covering(elements)]
        if not names:
            return (
                "give a file: none at hand knows "
                f"{', '.join(elements)}; see 'nanoos potentials list'"
            )
        more = ", …" if len(names) > _NEAR_NAMES else ""
        return f"these know them: {', '.join(names[:_NEAR_NAMES])}{more}"

    def _site_entries(self) -> list[CatalogueEntry]:
        if self.directory is None:
            return []
        return _folder_entries(self.directory, "site")

    def _unknown(self, name: str, entries: Sequence[CatalogueEntry]) -> InputError:
        known = {entry.name for entry in entries} | set(FAMILIES)
        known |= {entry.pair_style for entry in entries if entry.pair_style}
        lower = {word.lower(): word for word in sorted(known)}
        near = [
            lower[word]
            for word in difflib.get_close_matches(
                name.lower()[:200], sorted(lower), n=_NEAR_NAMES
            )
        ]
        folders = [str(folder) for folder in search_folders(self.directory)]
        return InputError(
            f"there is no potential {name[:200]!r}",
            evidence={"near": near, "searched": folders},
            advice=f"near names: {', '.join(near) or 'none'}; see 'nanoos potentials "
            "list', or give the folder of its file in NANO_OS_LAMMPS_POTENTIAL_DIR",
        )


def noble_gas_potential() -> Potential:
    """Return the Lennard-Jones potential of Ne, Ar, Kr and Xe."""
    return lennard_jones_potential(
        NOBLE_GASES,
        cutoff_a=_NOBLE_GASES_CUTOFF_A,
        citation=_NOBLE_GASES_CITATION,
        name="noble-gases",
        timestep_fs=2.0,
    )


# ------------------------------------------------------------------------- private


def _rank(entry: CatalogueEntry, elements: Sequence[str]) -> tuple[int, int, bool, str]:
    stem = re.match(r"(?:[A-Z][a-z]?)+", entry.name)
    rest = entry.name[stem.end() :] if stem else ""
    plain = entry.source == "built-in" or rest == "." + _ending(entry.pair_style)
    # Generated potentials know just what they are asked for.
    others = 0 if entry.source == "built-in" else len(entry.elements) - len(elements)
    return SOURCES.index(entry.source), others, not plain, entry.name


def _ending(style: str | None) -> str:
    return (style or "").replace("/", ".")


def _from_plugin(name: str, elements: tuple[str, ...], directory: Path) -> Potential:
    try:
        potential = plugin_potentials()[name](elements, directory)
    except NanoOSError:
        raise
    except Exception as error:  # a plug-in may fail in any way
        raise InputError(
            f"the potential plug-in {name!r} failed for {', '.join(elements)}: "
            f"{type(error).__name__}: {error}",
            advice="ask the package that offers it",
        ) from error
    if not isinstance(potential, Potential):
        raise InputError(
            f"the potential plug-in {name!r} returned a {type(potential).__name__}",
            advice="it must return a nanoos_fw.md.potentials.Potential",
        )
    return potential


def _built_in() -> list[CatalogueEntry]:
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


def _at(folder: Path, name: str, source: Source) -> CatalogueEntry | None:
    for path in (folder / name, folder / f"{name}{RECIPE_ENDING}"):
        if path.is_file():
            state = path.stat()
            return _file_entry(path, source, state.st_size, state.st_mtime_ns)
    return None


def _folder_entries(folder: Path, source: Source) -> list[CatalogueEntry]:
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
        recipe = _read_recipe(path)
        made = commands_potential(recipe, directory=path.parent)
    except NanoOSError as error:
        return CatalogueEntry(path.name, source, path=path, problem=str(error))
    header = FileHeader(units=made.units, citation=made.citation)
    return CatalogueEntry(
        path.name, source, made.pair_style, made.elements, path, header
    )


def _read_recipe(path: Path) -> dict[str, Any]:
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
