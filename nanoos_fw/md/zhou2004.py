"""The 16-metal embedded-atom method of Zhou, Johnson and Wadley (2004).

The energy of a crystal is a sum of pair energies and of embedding energies, each a
function of the electron density that the neighbours leave at an atom::

    E = 1/2 sum_ij phi_ab(r_ij) + sum_i F_a(rho_i),    rho_i = sum_j f_b(r_ij)

The parameters of the elements fix the alloys: unlike pairs follow Johnson's mixing
rule, so any subset of the 16 metals can be simulated and nothing is fitted to alloys.

References
----------
X. W. Zhou, R. A. Johnson, H. N. G. Wadley, Phys. Rev. B 69, 144113 (2004).
R. A. Johnson, Phys. Rev. B 39, 12554 (1989), for the mixing rule.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError

CITATION = (
    "X. W. Zhou, R. A. Johnson, H. N. G. Wadley, Phys. Rev. B 69, 144113 (2004), "
    "doi:10.1103/PhysRevB.69.144113"
)
# Raised when the file of the same elements would hold other numbers.
GENERATOR_VERSION = 1
N_R = 2000
N_RHO = 4000
# W, the densest of the metals, reaches 37 at rest and 200 when it is compressed to
# half its volume; a soft element between W atoms sees the same density.
RHO_MAX = 200.0
_VALUES_PER_LINE = 5
_FCC = ("Cu", "Ag", "Au", "Ni", "Pd", "Pt", "Al", "Pb")
_BCC = ("Fe", "Mo", "Ta", "W")

Array = NDArray[np.float64]


@cache
def parameter_text() -> str:
    """Return the shipped parameter table, as text."""
    file = resources.files("nanoos_fw.md").joinpath("data/zhou2004_eam_parameters.csv")
    return file.read_text(encoding="utf-8")


def recipe_text() -> str:
    """Return all that decides the numbers of a file: parameters, grids, version."""
    grids = f"{GENERATOR_VERSION} {N_R} {N_RHO} {RHO_MAX} {cutoff_a()!r}"
    return f"{grids}\n{parameter_text()}"


@cache
def parameters() -> Mapping[str, Mapping[str, float]]:
    """Return the parameters of each element, by the names of the table's columns."""
    lines = [line for line in parameter_text().splitlines() if not line.startswith("#")]
    table = {}
    for row in csv.DictReader(lines):
        element = row.pop("element")
        table[element] = MappingProxyType({k: float(v) for k, v in row.items()})
    return MappingProxyType(table)


def elements() -> tuple[str, ...]:
    """Return the 16 metals, in the order of the paper's table."""
    return tuple(parameters())


def cutoff_a() -> float:
    """Return the cutoff of all pairs, in Å: sqrt(5) times the largest ``re``.

    The authors' own tabulation cuts at sqrt(10)/2 lattice constants of the largest
    fcc cell in the file, which is sqrt(5) ``re``. Taking the largest of all 16
    metals (Pb), not of those in the file, makes the energy of a pure metal the same
    in every file, so that formation energies compare across alloys. There the
    functions have fallen below 1e-6 eV; they are cut, as published, not tapered.
    """
    return math.sqrt(5.0) * max(row["re"] for row in parameters().values())


def ground_state(element: str) -> tuple[str, float]:
    """Return the crystal of an element (``fcc``, ``bcc``, ``hcp``) and its a in Å.

    The lattice constant is the one that the nearest-neighbour distance ``re`` of the
    fit stands for; for hcp it belongs to the ideal c/a.
    """
    re = _row(element)["re"]
    if element in _FCC:
        return "fcc", math.sqrt(2.0) * re
    if element in _BCC:
        return "bcc", 2.0 / math.sqrt(3.0) * re
    return "hcp", re


def density(element: str, r_a: Array) -> Array:
    """Return the electron density f(r) that an atom leaves at distance r (Å)."""
    p = _row(element)
    x = np.asarray(r_a) / p["re"]
    tail = _tail(x, p["lambda_density"])
    return np.asarray(p["fe"] * np.exp(-p["beta_density"] * (x - 1.0)) / tail)


def pair_energy(first: str, second: str, r_a: Array) -> Array:
    """Return the pair energy phi(r) in eV at distance r (Å).

    Unlike pairs follow ``phi_ab = (f_b/f_a phi_aa + f_a/f_b phi_bb) / 2``. Far out
    both f and phi tend to zero, so the ratio phi/f is evaluated in closed form: the
    exponentials and the tails are divided before they underflow.
    """
    r = np.asarray(r_a)
    ab = density(second, r) * _pair_over_density(first, r)
    ba = density(first, r) * _pair_over_density(second, r)
    return 0.5 * (ab + ba)


def embedding_energy(element: str, rho: Array) -> Array:
    """Return the embedding energy F(rho) in eV."""
    p = _row(element)
    rho = np.asarray(rho, dtype=float)
    rho_n, rho_0 = p["rho_low"] * p["rho_e"], p["rho_high"] * p["rho_e"]
    low = _polynomial([p["Fn0"], p["Fn1"], p["Fn2"], p["Fn3"]], rho / rho_n - 1.0)
    x = rho / p["rho_e"] - 1.0
    below = _polynomial([p["F0"], p["F1"], p["F2"], p["F3_minus"]], x)
    above = _polynomial([p["F0"], p["F1"], p["F2"], p["F3_plus"]], x)
    # The logarithm is only evaluated where it is used.
    ratio = np.maximum(rho, rho_0) / p["rho_s"]
    high = p["Fe"] * (1.0 - p["eta"] * np.log(ratio)) * ratio ** p["eta"]
    return np.select(
        [rho < rho_n, rho < p["rho_e"], rho < rho_0], [low, below, above], high
    )


def setfl_text(names: Sequence[str]) -> str:
    """Return the ``eam/alloy`` file of some of the 16 metals.

    The grids and the cutoff do not depend on the choice of elements. LAMMPS puts
    cubic splines through the values and takes the forces from the same splines, so
    forces are exact derivatives of the energy.

    Raises
    ------
    InputError
        If an element is not one of the 16, occurs twice, or none is given.
    """
    if not names or len(set(names)) != len(names):
        raise InputError(f"elements must be given once each, not {list(names)}")
    r = np.linspace(0.0, cutoff_a(), N_R)
    rho = np.linspace(0.0, RHO_MAX, N_RHO)
    lines = [
        "# 16-metal EAM, analytic functions tabulated by nanoos_fw "
        f"(tabulation {GENERATOR_VERSION}) UNITS: metal",
        f"# CITATION: {CITATION}",
        "# unlike pairs: R. A. Johnson, Phys. Rev. B 39, 12554 (1989)",
        f"{len(names)} {' '.join(names)}",
        f"{N_RHO} {float(rho[1])!r} {N_R} {float(r[1])!r} {cutoff_a()!r}",
    ]
    for name in names:
        p = _row(name)
        lattice, a = ground_state(name)
        lines.append(f"{p['Z']:.0f} {p['mass']!r} {a:.6f} {lattice}")
        lines += _number_lines(embedding_energy(name, rho))
        lines += _number_lines(density(name, r))
    for i, first in enumerate(names):
        for second in names[: i + 1]:
            lines += _number_lines(r * pair_energy(first, second, r))
    return "\n".join(lines) + "\n"


def _row(element: str) -> Mapping[str, float]:
    try:
        return parameters()[element]
    except KeyError:
        raise InputError(
            f"the 16-metal EAM has no element {element!r}",
            evidence={"elements": list(parameters())},
            advice="choose another potential for this structure",
        ) from None


def _tail(x: Array, shift: float) -> Array:
    return np.asarray(1.0 + (x - shift) ** 20)


def _pair_over_density(element: str, r_a: Array) -> Array:
    p = _row(element)
    x = r_a / p["re"]
    tail = _tail(x, p["lambda_density"])
    repulsion = np.exp(-(p["alpha"] - p["beta_density"]) * (x - 1.0)) * (
        tail / _tail(x, p["kappa"])
    )
    attraction = np.exp(-(p["beta"] - p["beta_density"]) * (x - 1.0)) * (
        tail / _tail(x, p["lambda"])
    )
    return np.asarray((p["A"] * repulsion - p["B"] * attraction) / p["fe"])


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    return np.asarray(np.polynomial.polynomial.polyval(x, coefficients))


def _number_lines(values: Iterable[float]) -> list[str]:
    words = [f"{value:.15e}" for value in values]
    return [
        " ".join(words[i : i + _VALUES_PER_LINE])
        for i in range(0, len(words), _VALUES_PER_LINE)
    ]
