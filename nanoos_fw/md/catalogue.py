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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanoos_fw.errors import InputError
from nanoos_fw.md.pair_commands import commands_potential
from nanoos_fw.md.potential_entries import (
    RECIPE_ENDING,
    SOURCES,
    CatalogueEntry,
    built_in_entries,
    entry_at,
    folder_entries,
    noble_gas_potential,
    read_recipe,
)
from nanoos_fw.md.potential_folders import search_folders
from nanoos_fw.md.potential_plugins import (
    plugin_potential,
    plugin_potentials,
    register_potential,
    unregister_potential,
)
from nanoos_fw.md.potential_terms import SAFE_NAME, check_element
from nanoos_fw.md.potentials import ZHOU2004_ELEMENTS, Potential, zhou2004_potential
from nanoos_fw.md.recipes import file_potential

__all__ = [
    "FAMILIES",
    "Catalogue",
    "CatalogueEntry",
    "register_potential",
    "unregister_potential",
]

logger = logging.getLogger(__name__)

_NEAR_NAMES = 5

# What a style may be asked for by, beside its own name.
FAMILIES: dict[str, tuple[str, ...]] = {
    "eam": ("eam/alloy", "eam/fs", "eam"),
    "lj": ("lj/cut",),
    "lennard-jones": ("lj/cut",),
    "reax": ("reaxff",),
    "reax/c": ("reaxff",),
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
        found += built_in_entries()
        for folder in search_folders(None):
            found += folder_entries(folder, "lammps")
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
            potential = plugin_potential(entry.name, wanted, directory)
        elif entry.name == "zhou2004" and entry.source == "built-in":
            potential = zhou2004_potential(sorted(wanted), directory)
        elif entry.source == "built-in":
            potential = noble_gas_potential()
        elif entry.name.endswith(RECIPE_ENDING) and entry.path is not None:
            potential = commands_potential(
                read_recipe(entry.path), directory=entry.path.parent
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
        if self.directory is not None and (
            found := entry_at(self.directory, name, "site")
        ):
            return found
        for entry in built_in_entries():
            if entry.name == name:
                return entry
        for folder in search_folders(None):
            if found := entry_at(folder, name, "lammps"):
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
        return folder_entries(self.directory, "site")

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


def _rank(entry: CatalogueEntry, elements: Sequence[str]) -> tuple[int, int, bool, str]:
    stem = re.match(r"(?:[A-Z][a-z]?)+", entry.name)
    rest = entry.name[stem.end() :] if stem else ""
    plain = entry.source == "built-in" or rest == "." + _ending(entry.pair_style)
    # Generated potentials know just what they are asked for.
    others = 0 if entry.source == "built-in" else len(entry.elements) - len(elements)
    return SOURCES.index(entry.source), others, not plain, entry.name


def _ending(style: str | None) -> str:
    return (style or "").replace("/", ".")
