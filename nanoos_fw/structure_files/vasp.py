"""POSCAR and CONTCAR."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TextIO

from nanoos_fw.errors import InputError
from nanoos_fw.structure_files.entries import Item, Parsed


def poscar_items(stream: TextIO, path: str) -> Iterator[Item]:
    """Yield the one crystal of a POSCAR."""
    text = stream.read()
    if text.strip():
        yield Item(functools.partial(_parse, text, path))


def _parse(text: str, path: str) -> Parsed:
    from pymatgen.io.vasp.inputs import Poscar

    try:
        poscar = Poscar.from_str(text, read_velocities=False)
    except IndexError as error:
        raise InputError(
            f"{path} ends before its last atom", advice="it was cut short"
        ) from error
    if not poscar.true_names:
        # pymatgen would call them H, He, Li, ...
        raise InputError(
            f"{path} does not name its elements",
            advice="put their symbols into line 6, as VASP 5 does",
        )
    return Parsed(poscar.structure)
