"""Potentials that other packages and scripts offer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanoos_fw.errors import InputError, MissingDependencyError, NanoOSError
from nanoos_fw.md.potentials import Potential

PLUGIN_GROUP = "nanoos_fw.potentials"

PotentialFactory = Callable[[tuple[str, ...], Path], Potential]

_registered: dict[str, PotentialFactory] = {}


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


def plugin_potential(
    name: str, elements: tuple[str, ...], directory: Path
) -> Potential:
    """Return what a plug-in makes for some elements.

    Raises
    ------
    InputError
        If it fails, or makes no potential.
    MissingDependencyError
        If its package cannot be loaded.
    """
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
