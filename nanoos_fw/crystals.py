"""Crystals as the package accepts, names and stores them.

A crystal is a pymatgen ``Structure`` that passed `check_structure`: ordered, made of
known elements, periodic in three directions, without overlapping atoms. Everything
after the border may rely on that.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.provenance import content_key, sha256_bytes

if TYPE_CHECKING:
    from pymatgen.core import Structure

DEFAULT_MIN_DISTANCE = 0.5
"""Å. Below every bond known (H2: 0.74 Å), above every rounding of coordinates."""

KEY_VERSION = 1
_PER_LENGTH = 1e5  # steps per Å
_PER_ANGLE = 1e4  # steps per degree: 1e-4° moves the end of a 6 Å vector by 1e-5 Å
_PER_FRACTION = 1e5  # steps per cell vector
_PER_CHARGE = 1e5  # steps per elementary charge
# Plain rounding puts its boundaries on decimals that end in 5, where noise of 1e-16
# from a rotation would decide. An irrational offset puts them where neither short
# decimals nor simple fractions lie.
_ROUND = 0.5 + (math.sqrt(5.0) - 2.0)

_FLAT = 1e-6
_MAX_FRACTION = 1e6  # beyond, a double places an atom worse than 1e-10 of the cell
_DENSE_SITES = 128
_LATTICE_BYTES = 72
HEAVIEST = 118
"""Highest atomic number."""
_ISOTOPES = ("D", "T")


# ------------------------------------------------------------------------- checks


def check_structure(
    structure: Structure, *, min_distance: float = DEFAULT_MIN_DISTANCE
) -> None:
    """Refuse what no later step could compute with.

    Parameters
    ----------
    structure
        Oxidation states and spins of species are accepted and not looked at.
    min_distance
        Å; atoms closer than this, periodic images included, overlap.

    Raises
    ------
    InputError
        For a structure without sites, with a disordered or partly occupied site, with
        a species that is no element (a dummy such as ``X``), with deuterium or tritium
        (stored as an atomic number they would silently become protium), with
        coordinates or a lattice that are not finite, with fewer than three periodic
        directions, with cell vectors in one plane, or with atoms closer than
        `min_distance`. The evidence names the sites.
    """
    if not (math.isfinite(min_distance) and min_distance >= 0):
        raise InputError(
            f"min_distance must be a finite number of Å >= 0, not {min_distance}"
        )
    numbers = _atomic_numbers(structure)
    check_periodic(structure)
    matrix, frac = _finite_geometry(structure)
    volume = abs(float(np.linalg.det(matrix)))
    lengths = np.linalg.norm(matrix, axis=1)
    if volume <= _FLAT * float(np.prod(lengths)):
        raise InputError(
            f"the cell of {_formula(structure)} has no volume",
            evidence={"volume_a3": volume, "lattice": matrix.tolist()},
            advice="give three cell vectors that do not lie in one plane",
        )
    if min_distance == 0:
        return
    closest = _closest_pair(matrix, frac, min_distance)
    if closest is not None:
        first, second, distance = closest
        symbols = [element_symbol(int(numbers[site])) for site in (first, second)]
        raise InputError(
            f"sites {first} ({symbols[0]}) and {second} ({symbols[1]}) of "
            f"{_formula(structure)} are {distance:.3f} Å apart, closer than "
            f"{min_distance} Å",
            evidence={
                "sites": [first, second],
                "species": symbols,
                "distance_a": distance,
                "min_distance_a": min_distance,
            },
            advice="remove duplicate atoms, or check the cell and its units",
        )


def check_periodic(structure: Structure) -> None:
    """Refuse what is not periodic in three directions, since all of it is taken so.

    Raises
    ------
    InputError
        For a lattice whose ``pbc`` are not all true.
    """
    pbc = structure.lattice.pbc
    if not all(pbc):
        raise InputError(
            f"{_formula(structure)} is not periodic in three directions",
            evidence={"pbc": [bool(flag) for flag in pbc]},
            advice="if its vacuum is part of the cell, set pbc to T T T",
        )


def _atomic_numbers(structure: Structure) -> NDArray[np.uint8]:
    """Return atomic numbers, ``(n_sites,) uint8``; refuse what has none."""
    if len(structure) == 0:
        raise InputError("the structure has no sites")
    table = _number_of_name()
    numbers = np.empty(len(structure), dtype=np.uint8)
    for index, site in enumerate(structure.sites):
        if not site.is_ordered:
            raise InputError(
                f"site {index} of {_formula(structure)} is disordered: "
                f"{site.species_string}",
                evidence={"site": index, "species": site.species_string},
                advice="order it first, for example with pymatgen's "
                "OrderDisorderedStructureTransformation",
            )
        specie = site.specie
        # Species carry an element; an element's value is its own name, also for D.
        name = getattr(getattr(specie, "element", specie), "value", str(specie))
        number = table.get(name)
        if number is None:
            advice = (
                f"replace {name} by H if its mass does not matter"
                if name in _ISOTOPES
                else "give a chemical element"
            )
            raise InputError(
                f"site {index} holds {name}, which is no element with an atomic number "
                "of its own",
                evidence={"site": index, "species": str(specie)},
                advice=advice,
            )
        numbers[index] = number
    return numbers


@functools.cache
def _number_of_name() -> dict[str, int]:
    from pymatgen.core import Element

    return {
        element.value: int(element.Z)
        for element in Element
        if element.value not in _ISOTOPES
    }


@functools.cache
def element_symbol(number: int) -> str:
    """Return the symbol of an atomic number."""
    from pymatgen.core import Element

    return str(Element.from_Z(number).symbol)


def _formula(structure: Structure) -> str:
    """Return the reduced formula, without oxidation states."""
    with warnings.catch_warnings():
        # pymatgen orders by electronegativity, and warns that noble gases have none.
        warnings.simplefilter("ignore", UserWarning)
        return str(structure.composition.element_composition.reduced_formula)


def _finite_geometry(
    structure: Structure,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return lattice ``(3, 3)`` in Å, rows are vectors, and fractions ``(n, 3)``."""
    matrix = np.asarray(structure.lattice.matrix, dtype=np.float64)
    frac = np.asarray(structure.frac_coords, dtype=np.float64)
    if not np.isfinite(matrix).all():
        raise InputError(
            "the lattice is not finite", evidence={"lattice": str(matrix.tolist())}
        )
    # One comparison that is also false for NaN.
    good = (np.abs(frac) <= _MAX_FRACTION).all(axis=1)
    if not good.all():
        bad = int(np.flatnonzero(~good)[0])
        raise InputError(
            f"site {bad} of {_formula(structure)} has no usable coordinates: "
            f"{frac[bad].tolist()}",
            evidence={"site": bad, "frac_coords": str(frac[bad].tolist())},
        )
    return matrix, frac


def _closest_pair(
    matrix: NDArray[np.float64], frac: NDArray[np.float64], radius: float
) -> tuple[int, int, float] | None:
    """Return the closest pair within a radius: two sites and their distance in Å.

    With every height of the cell above twice the radius, only the image that brings
    each fractional difference into [-1/2, 1/2] can lie within it, since a vector with
    fraction d along k is at least d times height k long. Cells that are thinner are
    reduced and repeated until they are not.
    """
    n_sites = len(frac)
    search = radius
    heights = _heights(matrix)
    if (heights <= 2 * radius).any():
        from pymatgen.core import Lattice

        reduced = np.asarray(Lattice(matrix).get_lll_reduced_lattice().matrix)
        # No pair need be looked for beyond the distance of a site to its own image,
        # which also bounds the repetitions.
        search = min(search, _shortest_translation(reduced) * (1 + 1e-9))
        frac = frac @ matrix @ np.linalg.inv(reduced)
        repeats = np.floor(2 * search / _heights(reduced)).astype(int) + 1
        cells = np.array(list(itertools.product(*(range(int(m)) for m in repeats))))
        frac = ((frac[None, :, :] + cells[:, None, :]) / repeats).reshape(-1, 3)
        matrix = reduced * repeats[:, None]
        heights = _heights(matrix)
    frac = frac - np.floor(frac)
    if len(frac) <= _DENSE_SITES:
        first, second = np.triu_indices(len(frac), k=1)
    else:
        first, second = _near_in_torus(frac, heights, search)
    delta = frac[first] - frac[second]
    delta -= np.round(delta)
    squared = np.einsum("ij,ij->i", delta @ matrix, delta @ matrix)
    if len(squared) == 0 or squared.min() >= radius * radius:
        return None
    best = int(np.argmin(squared))
    pair = sorted((int(first[best]) % n_sites, int(second[best]) % n_sites))
    return pair[0], pair[1], math.sqrt(float(squared[best]))


def _near_in_torus(
    frac: NDArray[np.float64], heights: NDArray[np.float64], radius: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pairs whose fractional differences allow a distance within the radius."""
    from scipy.spatial import cKDTree  # type: ignore[import-untyped,unused-ignore]

    points = frac * heights
    points[points >= heights] = 0.0  # the tree wants [0, box)
    tree = cKDTree(points, boxsize=heights)
    # A little wider, so that rounding inside the tree loses no pair.
    pairs = tree.query_pairs(radius * (1 + 1e-9), p=np.inf, output_type="ndarray")
    return pairs[:, 0], pairs[:, 1]


def _heights(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distances between opposite faces of the cell, ``(3,)`` in Å."""
    return np.asarray(1.0 / np.linalg.norm(np.linalg.inv(matrix), axis=0))


def _shortest_translation(matrix: NDArray[np.float64]) -> float:
    signs = [s for s in itertools.product((-1, 0, 1), repeat=3) if any(s)]
    return float(np.linalg.norm(np.array(signs) @ matrix, axis=1).min())


# --------------------------------------------------------------------------- keys


def structure_key(structure: Structure) -> str:
    """Return the identity of a crystal by content: 40 hexadecimal digits.

    The same key comes out for any order of the sites, any lattice translation of
    single sites, and any orientation of the cell in space. Lengths are rounded to
    1e-5 Å, angles to 1e-4°, fractional coordinates to 1e-5 of a cell vector (then
    wrapped, so 0.9999999 equals 0), charges (site property ``charge``) to 1e-5 e.
    Oxidation states, labels and other site properties do not count.

    The choice of cell, of its axes and of the origin *is* part of the identity: a
    primitive and a conventional cell of one crystal have two keys. Mirror images
    have two keys as well.

    Raises
    ------
    InputError
        For what has no identity: no sites, disorder, unknown species, not finite.

    Notes
    -----
    Two values closer than a step share a rounded value unless a boundary lies between
    them, so the key finds copies, not merely similar crystals. Boundaries keep off
    short decimals and simple fractions.
    """
    numbers = _atomic_numbers(structure)
    matrix, frac = _finite_geometry(structure)
    columns = [
        numbers[:, None].astype(np.float64),
        np.mod(np.floor(frac * _PER_FRACTION + _ROUND), _PER_FRACTION),
    ]
    charges = _charges(structure)
    if charges is not None:
        columns.append(np.floor(charges[:, None] * _PER_CHARGE + _ROUND))
    rows = np.hstack(columns).astype("<i8")
    rows = rows[np.lexsort(rows.T[::-1])]
    return content_key(
        "structure",
        {
            "version": KEY_VERSION,
            "cell": _cell_steps(matrix),
            "n_sites": len(rows),
            "columns": rows.shape[1],
            "sites": sha256_bytes(rows.tobytes()),
        },
    )


def _cell_steps(matrix: NDArray[np.float64]) -> list[int]:
    """Return a, b, c, alpha, beta, gamma in steps, and the handedness, 1 or -1."""
    a, b, c = matrix.tolist()
    lengths = [math.sqrt(_dot(v, v)) for v in (a, b, c)]
    if min(lengths) == 0:
        raise InputError("a cell vector is zero", evidence={"lattice": matrix.tolist()})
    pairs = ((b, c, 1, 2), (a, c, 0, 2), (a, b, 0, 1))
    angles = [
        math.degrees(
            math.acos(max(-1.0, min(1.0, _dot(u, v) / lengths[i] / lengths[j])))
        )
        for u, v, i, j in pairs
    ]
    cross = (
        a[1] * b[2] - a[2] * b[1],
        a[2] * b[0] - a[0] * b[2],
        a[0] * b[1] - a[1] * b[0],
    )
    return [
        *(math.floor(length * _PER_LENGTH + _ROUND) for length in lengths),
        *(math.floor(angle * _PER_ANGLE + _ROUND) for angle in angles),
        1 if _dot(cross, c) > 0 else -1,
    ]


def _dot(u: Any, v: Any) -> float:
    return float(u[0] * v[0] + u[1] * v[1] + u[2] * v[2])


def _charges(structure: Structure) -> NDArray[np.float64] | None:
    """Return the site property ``charge``, ``(n_sites,)`` in e, or None."""
    values = structure.site_properties.get("charge")
    if values is None or all(value is None for value in values):
        return None
    try:
        charges = np.array([float(value) for value in values], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"site charges of {_formula(structure)} are not all numbers: {error}"
        ) from error
    if not np.isfinite(charges).all():
        raise InputError(f"site charges of {_formula(structure)} are not all finite")
    return charges


# ---------------------------------------------------------------------- documents


def encode_structure(structure: Structure) -> dict[str, Any]:
    """Pack a structure into a small BSON document, doubles bit for bit.

    Returns
    -------
    dict
        ``n_sites``; ``numbers`` (uint8), ``lattice`` (9 little-endian doubles, rows
        are vectors, Å), ``frac_coords`` (3 per site) and, if the site property
        ``charge`` is set, ``charges`` (1 per site, e), each as bytes. Oxidation
        states, labels and other site properties are left out.

    Raises
    ------
    InputError
        As `structure_key` and :func:`check_periodic`: the document has no place for
        ``pbc``.
    """
    numbers = _atomic_numbers(structure)
    check_periodic(structure)
    matrix, frac = _finite_geometry(structure)
    document: dict[str, Any] = {
        "n_sites": len(numbers),
        "numbers": numbers.tobytes(),
        "lattice": matrix.astype("<f8").tobytes(),
        "frac_coords": frac.astype("<f8").tobytes(),
    }
    charges = _charges(structure)
    if charges is not None:
        document["charges"] = charges.astype("<f8").tobytes()
    return document


def decode_structure(document: Mapping[str, Any]) -> Structure:
    """Unpack a document of `encode_structure`.

    Raises
    ------
    CorruptArtifactError
        If a field is missing, has the wrong length, or holds no element or no
        finite number.
    """
    from pymatgen.core import Element, Lattice, Structure

    numbers, lattice, frac = decode_arrays(document)
    properties = None
    if document.get("charges") is not None:
        charges = _doubles(document, "charges", 8 * len(numbers))
        properties = {"charge": charges.tolist()}
    elements = {int(z): Element.from_Z(int(z)) for z in np.unique(numbers)}
    return Structure(
        Lattice(lattice),
        [elements[int(z)] for z in numbers],
        frac,
        site_properties=properties,
    )


def decode_arrays(
    document: Mapping[str, Any],
) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64]]:
    """Unpack a document of `encode_structure` without making a structure.

    Returns
    -------
    tuple
        Atomic numbers ``(n_sites,)``, lattice ``(3, 3)`` in Å, rows are vectors, and
        fractional coordinates ``(n_sites, 3)``.

    Raises
    ------
    CorruptArtifactError
        As `decode_structure`.
    """
    n_sites = document.get("n_sites")
    if not isinstance(n_sites, int) or n_sites < 1:
        raise _corrupt(f"n_sites is {n_sites!r}")
    numbers = np.frombuffer(_field(document, "numbers", n_sites), dtype=np.uint8)
    # 0 wraps to 255: one comparison for both ends.
    if (numbers - np.uint8(1)).max() >= HEAVIEST:
        strange = numbers[(numbers < 1) | (numbers > HEAVIEST)]
        raise _corrupt(f"{int(strange[0])} is no atomic number")
    lattice = _doubles(document, "lattice", _LATTICE_BYTES)
    frac = _doubles(document, "frac_coords", 24 * n_sites)
    return numbers, lattice.reshape(3, 3), frac.reshape(n_sites, 3)


def _field(document: Mapping[str, Any], name: str, n_bytes: int) -> bytes:
    data = document.get(name)
    if not isinstance(data, bytes):
        raise _corrupt(f"{name} is {type(data).__name__}, not bytes")
    if len(data) != n_bytes:
        raise _corrupt(f"{name} has {len(data)} bytes instead of {n_bytes}")
    return data


def _doubles(
    document: Mapping[str, Any], name: str, n_bytes: int
) -> NDArray[np.float64]:
    values = np.frombuffer(_field(document, name, n_bytes), dtype="<f8")
    if not np.isfinite(values).all():
        raise _corrupt(f"{name} holds a value that is not finite")
    return values.astype(np.float64)


def _corrupt(what: str) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"a stored structure is damaged: {what}", advice="import the structure again"
    )


def summarize(structure: Structure) -> dict[str, Any]:
    """Return what people search structures by.

    Returns
    -------
    dict
        ``formula`` (reduced, oxidation states dropped), ``chemical_system``
        (``Au-Cu``), ``elements`` (sorted symbols), ``n_sites``, ``volume_a3``.
    """
    elements = sorted({e.symbol for e in structure.composition.element_composition})
    return {
        "formula": _formula(structure),
        "chemical_system": "-".join(elements),
        "elements": elements,
        "n_sites": len(structure),
        "volume_a3": float(structure.volume),
    }
