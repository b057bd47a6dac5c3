from __future__ import annotations

import json

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.crystals import encode_structure
from nanoos_fw.errors import CorruptArtifactError, InputError
from nanoos_fw.ml.batches import GraphTable
from nanoos_fw.ml.crystal_tables import build_table
from nanoos_fw.ml.graphs import arrays_of_dict, build_graph

FIELDS = ("numbers", "degrees", "neighbors", "distances", "atom_start", "edge_start")


def crystals(n=70, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    while len(made) < n:
        count = int(rng.integers(1, 9))
        cell = Lattice(np.eye(3) * 4.5 + rng.normal(size=(3, 3)) * 0.3)
        species = rng.choice(["Cu2+", "O2-", "Sr", "H"], count)
        crystal = Structure(cell, species, rng.uniform(-1, 2, (count, 3)))
        if crystal.is_valid(0.6):
            made.append(crystal)
    return made


@pytest.mark.parametrize("form", ["structure", "document", "dictionary", "json"])
def test_the_table_is_that_of_the_graphs(form):
    structures = crystals()
    forms = {
        "structure": lambda s: s,
        "document": encode_structure,
        "dictionary": lambda s: s.as_dict(),
        "json": lambda s: json.loads(json.dumps(s.as_dict())),
    }
    table, positions, errors = build_table([forms[form](s) for s in structures])
    expected = GraphTable.from_graphs([build_graph(s) for s in structures])
    assert errors == {}
    assert positions.tolist() == list(range(len(structures)))
    assert (table.cutoff_radius, table.max_neighbors) == (8.0, 12)
    for name in FIELDS:
        found, wanted = getattr(table, name), getattr(expected, name)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


def test_what_has_no_graph_is_told_and_left_out():
    good = crystals(3)
    isolated = Structure(Lattice.cubic(30), ["Cu"], [[0] * 3])
    mixed = Structure(Lattice.cubic(3), [{"Cu": 0.5, "Au": 0.5}], [[0] * 3])
    partly = Structure(Lattice.cubic(3), [{"Cu": 0.5}], [[0] * 3])
    dummy = good[0].as_dict()
    dummy["sites"][0]["species"][0]["element"] = "X"
    lost = encode_structure(good[0]) | {"numbers": b""}
    ragged = good[0].as_dict() | {"lattice": {"matrix": [[1, 2], [3]]}}
    mixture = [
        good[0], isolated.as_dict(), good[1], mixed.as_dict(), partly.as_dict(),
        dummy, {"sites": 3}, lost, mixed, ragged, {"sites": [], "lattice": {}},
        good[2].as_dict(),
    ]  # fmt: skip
    table, positions, errors = build_table(mixture)
    assert positions.tolist() == [0, 2, 11]
    assert sorted(errors) == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert "isolated" in str(errors[1])
    assert "disordered" in str(errors[3])
    assert "disordered" in str(errors[4])
    assert "no element" in str(errors[5])
    assert isinstance(errors[7], CorruptArtifactError)
    expected = GraphTable.from_graphs([build_graph(s) for s in good])
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(table, name), getattr(expected, name))


@pytest.mark.parametrize("form", ["structure", "dictionary"])
def test_what_is_not_periodic_has_no_graph(form):
    lattice = Lattice.from_parameters(3, 3, 6, 90, 90, 90, pbc=(True, True, False))
    slab = Structure(lattice, ["Cu"], [[0, 0, 0]])
    _, positions, errors = build_table(
        [slab if form == "structure" else slab.as_dict()]
    )
    assert len(positions) == 0
    assert "three directions" in str(errors[0])


def test_nothing_gives_no_table():
    table, positions, errors = build_table([])
    assert (table, len(positions), errors) == (None, 0, {})
    table, positions, errors = build_table([{"sites": 1}])
    assert table is None
    assert list(errors) == [0]


def test_isotopes_are_hydrogen_and_empty_cells_are_refused():
    heavy = Structure(Lattice.cubic(2), ["D"], [[0] * 3]).as_dict()
    assert arrays_of_dict(heavy)[0].tolist() == [1]
    with pytest.raises(InputError, match="needs a lattice"):
        arrays_of_dict({"lattice": {"matrix": np.eye(3).tolist()}, "sites": []})
