"""Small pictures of unit cells as inline SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nanoos_fw.errors import InputError

# Element, Jmol colour (jmol.sourceforge.net/jscolors), covalent radius in Å
# (Cordero et al., Dalton Trans. 2008, 2832; C sp3; Mn, Fe, Co low spin).
_TABLE = """
H FFFFFF 0.31; He D9FFFF 0.28; Li CC80FF 1.28; Be C2FF00 0.96; B FFB5B5 0.84;
C 909090 0.73; N 3050F8 0.71; O FF0D0D 0.66; F 90E050 0.57; Ne B3E3F5 0.58;
Na AB5CF2 1.66; Mg 8AFF00 1.41; Al BFA6A6 1.21; Si F0C8A0 1.11; P FF8000 1.07;
S FFFF30 1.05; Cl 1FF01F 1.02; Ar 80D1E3 1.06; K 8F40D4 2.03; Ca 3DFF00 1.76;
Sc E6E6E6 1.70; Ti BFC2C7 1.60; V A6A6AB 1.53; Cr 8A99C7 1.39; Mn 9C7AC7 1.50;
Fe E06633 1.42; Co F090A0 1.38; Ni 50D050 1.24; Cu C88033 1.32; Zn 7D80B0 1.22;
Ga C28F8F 1.22; Ge 668F8F 1.20; As BD80E3 1.19; Se FFA100 1.20; Br A62929 1.20;
Kr 5CB8D1 1.16; Rb 702EB0 2.20; Sr 00FF00 1.95; Y 94FFFF 1.90; Zr 94E0E0 1.75;
Nb 73C2C9 1.64; Mo 54B5B5 1.54; Tc 3B9E9E 1.47; Ru 248F8F 1.46; Rh 0A7D8C 1.42;
Pd 006985 1.39; Ag C0C0C0 1.45; Cd FFD98F 1.44; In A67573 1.42; Sn 668080 1.39;
Sb 9E63B5 1.39; Te D47A00 1.38; I 940094 1.39; Xe 429EB0 1.40; Cs 57178F 2.44;
Ba 00C900 2.15; La 70D4FF 2.07; Ce FFFFC7 2.04; Pr D9FFC7 2.03; Nd C7FFC7 2.01;
Pm A3FFC7 1.99; Sm 8FFFC7 1.98; Eu 61FFC7 1.98; Gd 45FFC7 1.96; Tb 30FFC7 1.94;
Dy 1FFFC7 1.92; Ho 00FF9C 1.92; Er 00E675 1.89; Tm 00D452 1.90; Yb 00BF38 1.87;
Lu 00AB24 1.87; Hf 4DC2FF 1.75; Ta 4DA6FF 1.70; W 2194D6 1.62; Re 267DAB 1.51;
Os 266696 1.44; Ir 175487 1.41; Pt D0D0E0 1.36; Au FFD123 1.36; Hg B8B8D0 1.32;
Tl A6544D 1.45; Pb 575961 1.46; Bi 9E4FB5 1.48; Po AB5C00 1.40; At 754F45 1.50;
Rn 428296 1.50; Fr 420066 2.60; Ra 007D00 2.21; Ac 70ABFA 2.15; Th 00BAFF 2.06;
Pa 00A1FF 2.00; U 008FFF 1.96; Np 0080FF 1.90; Pu 006BFF 1.87; Am 545CF2 1.80;
Cm 785CE3 1.69;
"""
_ELEMENTS: dict[str, tuple[str, float]] = {
    symbol: (colour, float(radius))
    for symbol, colour, radius in (
        entry.split() for entry in _TABLE.split(";") if entry.strip()
    )
}

# Spheres at this fraction of the covalent radius leave the cell visible.
_RADIUS_SCALE = 0.42
# Sites this close (fractional) to a face are drawn on the opposite face as well.
_FACE_TOLERANCE = 1e-3
_TURN_DEG, _TILT_DEG = 24.0, 14.0
_SEGMENTS_PER_EDGE = 48

FloatArray = NDArray[np.float64]


def structure_svg(
    lattice: ArrayLike, frac_coords: ArrayLike, symbols: Sequence[str], size: int
) -> str:
    """Return a parallel projection of a unit cell as an ``<svg>`` element.

    Atoms on a face, edge or corner are repeated on the opposite ones, as in a
    textbook drawing. The cell is first put into the standard orientation, ``a`` along
    x and ``b`` in the xy plane, so that the picture does not depend on how the
    lattice is turned in space.

    Parameters
    ----------
    lattice
        ``(3, 3)`` Å, one vector per row.
    frac_coords
        ``(n_atoms, 3)`` fractional coordinates.
    symbols
        ``(n_atoms,)`` element symbols.
    size
        Width and height in pixels.

    Raises
    ------
    InputError
        If shapes do not match, the cell is flat, a number is not finite, or an
        element has no covalent radius in the table (H to Cm).
    """
    cell, frac = _checked(lattice, frac_coords, symbols)
    view = _view_matrix()
    # Standard orientation by QR: rows of `cell` become lower triangular.
    _, r = np.linalg.qr(cell.T)
    signs = np.sign(np.diag(r))
    standard = (r * signs[:, None]).T
    if np.linalg.det(cell) < 0:
        standard[2, 2] *= -1.0
    images, owners = _with_face_images(frac)
    atoms = images @ standard @ view.T
    radii = np.array([_ELEMENTS[symbols[i]][1] for i in owners]) * _RADIUS_SCALE
    corners = np.array(list(product((0.0, 1.0), repeat=3))) @ standard @ view.T

    low = np.minimum((atoms - radii[:, None]).min(0), corners.min(0))[:2]
    high = np.maximum((atoms + radii[:, None]).max(0), corners.max(0))[:2]
    margin = 2.0
    scale = (size - 2 * margin) / float((high - low).max())
    offset = size / 2 - scale * (low + high) / 2

    def place(points: FloatArray) -> FloatArray:
        flat: FloatArray = points[:, :2] * scale + offset
        flat[:, 1] = size - flat[:, 1]
        return flat

    # Painter's algorithm over atoms from back to front; each piece of a cell edge is
    # drawn after the last atom that lies behind it.
    order = np.argsort(atoms[:, 2], kind="stable")
    edges = _edge_paths(standard, view, atoms, radii, order, place)
    centres = place(atoms)
    parts = [edges.get(0, "")]
    for slot, i in enumerate(order, start=1):
        colour = _ELEMENTS[symbols[owners[i]]][0]
        parts.append(_sphere(centres[i], radii[i] * scale, colour))
        parts.append(edges.get(slot, ""))
    label = _label(symbols)
    return (
        f'<svg class="cell" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'aria-label="{label}" width="{size}" height="{size}" '
        f'viewBox="0 0 {size} {size}"><title>{label}</title>{"".join(parts)}</svg>'
    )


def element_colour(symbol: str) -> str:
    """Return the Jmol colour of an element as ``#RRGGBB``."""
    return f"#{_ELEMENTS[symbol][0]}"


def _checked(
    lattice: ArrayLike, frac_coords: ArrayLike, symbols: Sequence[str]
) -> tuple[FloatArray, FloatArray]:
    cell = np.asarray(lattice, dtype=np.float64)
    frac = np.asarray(frac_coords, dtype=np.float64)
    shapes = {"lattice": list(cell.shape), "frac_coords": list(frac.shape)}
    if cell.shape != (3, 3) or frac.shape != (len(symbols), 3) or not symbols:
        raise InputError(
            "a cell picture needs a (3, 3) lattice and one row and symbol per atom",
            evidence={**shapes, "symbols": len(symbols)},
        )
    lengths = np.linalg.norm(cell, axis=1)
    finite = bool(np.isfinite(cell).all() and np.isfinite(frac).all())
    if not finite or abs(np.linalg.det(cell)) < 1e-6 * float(lengths.prod()) + 1e-12:
        raise InputError(
            "the cell to draw is flat or holds a number that is not finite",
            evidence={"lengths": [float(x) for x in lengths] if finite else "nan"},
            advice="check the stored structure",
        )
    unknown = sorted(set(symbols) - _ELEMENTS.keys())
    if unknown:
        raise InputError(
            f"no covalent radius is known for {', '.join(unknown)}",
            advice="leave the picture out, or extend the table in reports.pictures",
        )
    return cell, frac


def _view_matrix() -> FloatArray:
    """Return rows (right, up, towards the eye) in the standard Cartesian frame.

    The eye sits at -y with c upward, turned to see the b edge and tilted to see the
    top face.
    """
    turn, tilt = np.radians(_TURN_DEG), np.radians(_TILT_DEG)
    eye = np.array(
        [np.sin(turn) * np.cos(tilt), -np.cos(turn) * np.cos(tilt), np.sin(tilt)]
    )
    right = np.array([np.cos(turn), np.sin(turn), 0.0])
    view: FloatArray = np.array([right, np.cross(eye, right), eye])
    return view


def _with_face_images(frac: FloatArray) -> tuple[FloatArray, list[int]]:
    """Return wrapped sites with their images on opposite faces, and their atoms."""
    wrapped = frac - np.floor(frac)
    wrapped[wrapped > 1 - _FACE_TOLERANCE] -= 1.0
    images, owners = [], []
    for i, site in enumerate(wrapped):
        on_face = np.abs(site) < _FACE_TOLERANCE
        for shift in product(*((0.0, 1.0) if face else (0.0,) for face in on_face)):
            images.append(site + shift)
            owners.append(i)
    return np.array(images), owners


def _edge_paths(
    standard: FloatArray,
    view: FloatArray,
    atoms: FloatArray,
    radii: FloatArray,
    order: NDArray[np.intp],
    place: Callable[[FloatArray], FloatArray],
) -> dict[int, str]:
    """Return SVG paths of the cell edges by the atom after which they are drawn."""
    pieces: dict[int, list[str]] = {}
    steps = np.linspace(0.0, 1.0, _SEGMENTS_PER_EDGE + 1)
    depths = atoms[order, 2]
    for axis in range(3):
        others = [k for k in range(3) if k != axis]
        for ends in product((0.0, 1.0), repeat=2):
            points = np.zeros((len(steps), 3))
            points[:, axis] = steps
            points[:, others] = ends
            line = points @ standard @ view.T
            middle = (line[:-1] + line[1:]) / 2
            distance = np.linalg.norm(middle[:, None] - atoms[None], axis=2)
            hidden = (distance < radii).any(axis=1)
            slots = np.searchsorted(depths, middle[:, 2])
            flat = place(line)
            previous = None
            for k in range(len(middle)):
                if hidden[k]:
                    previous = None
                    continue
                slot = int(slots[k])
                end = f"{flat[k + 1, 0]:.1f} {flat[k + 1, 1]:.1f}"
                if slot == previous:
                    # Extend the straight line instead of adding a piece to it.
                    head = pieces[slot][-1].rsplit("L", 1)[0]
                    pieces[slot][-1] = f"{head}L{end}"
                else:
                    start = f"{flat[k, 0]:.1f} {flat[k, 1]:.1f}"
                    pieces.setdefault(slot, []).append(f"M{start}L{end}")
                previous = slot
    return {
        slot: f'<path d="{"".join(paths)}" fill="none" stroke="#8a929c" '
        f'stroke-width="1"/>'
        for slot, paths in pieces.items()
    }


def _sphere(centre: FloatArray, radius: float, colour: str) -> str:
    x, y = centre
    rgb = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)])
    rim = "".join(f"{int(c):02X}" for c in rgb * 0.55)
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="#{colour}" '
        f'stroke="#{rim}" stroke-width=".8"/>'
        f'<circle cx="{x - radius * 0.3:.1f}" cy="{y - radius * 0.32:.1f}" '
        f'r="{radius * 0.32:.1f}" fill="#fff" fill-opacity=".45"/>'
    )


def _label(symbols: Sequence[str]) -> str:
    counts = Counter(symbols)
    content = ", ".join(f"{n} {symbol}" for symbol, n in counts.items())
    return escape(f"Unit cell with {content}")
