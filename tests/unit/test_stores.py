"""The stores, on the in-memory database and, where there is one, on a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import CorruptArtifactError, InputError, StoreError
from nanoos_fw.operations import ImportReport, import_structures
from nanoos_fw.stores.campaigns import CampaignStore
from nanoos_fw.stores.database import (
    SCHEMA_VERSION,
    ensure_indexes,
    get_artifact,
    open_database,
    put_artifact,
)
from nanoos_fw.stores.labels import formation_energies
from nanoos_fw.stores.simulations import Simulation, SimulationStore
from nanoos_fw.stores.structures import NewStructure, StructureStore


@pytest.fixture(
    params=[
        "embedded_database",
        pytest.param("mongodb_database", marks=pytest.mark.mongodb),
    ]
)
def database(request: pytest.FixtureRequest) -> Any:
    found = request.getfixturevalue(request.param)
    ensure_indexes(found)
    return found


def crystal(a: float = 3.6, species: tuple[str, str] = ("Cu", "Au")) -> Structure:
    return Structure(Lattice.cubic(a), species, [[0, 0, 0], [0.5, 0.5, 0.5]])


class Launchpad:
    def __init__(self, db: Any) -> None:
        self.db = db


def test_opening_twice_keeps_the_schema_version(database: Any) -> None:
    open_database(Launchpad(database))
    open_database(Launchpad(database))
    assert list(database["nanoos_schema"].find()) == [
        {"_id": "schema", "version": SCHEMA_VERSION}
    ]


def test_a_database_of_a_newer_release_is_refused(database: Any) -> None:
    database["nanoos_schema"].insert_one({"_id": "schema", "version": 99})
    with pytest.raises(StoreError, match="schema 99"):
        open_database(Launchpad(database))


def test_artifacts_are_stored_once_and_verified(database: Any) -> None:
    data = bytes(range(256)) * 2000
    digest = put_artifact(database, data)
    assert put_artifact(database, data) == digest
    assert database["artifacts.files"].count_documents({}) == 1
    assert get_artifact(database, digest) == data
    chunk = database["artifacts.chunks"].find_one({"n": 0})
    broken = b"x" + bytes(chunk["data"])[1:]
    database["artifacts.chunks"].update_one(
        {"_id": chunk["_id"]}, {"$set": {"data": broken}}
    )
    with pytest.raises(CorruptArtifactError):
        get_artifact(database, digest)
    with pytest.raises(StoreError, match="not in the database"):
        get_artifact(database, "0" * 64)


def test_a_structure_is_stored_once(database: Any) -> None:
    store = StructureStore(database)
    moved = Structure(Lattice.cubic(3.6), ["Au", "Cu"], [[0.5, -0.5, 0.5], [1, 0, 0]])
    entries = [
        NewStructure(crystal(), "a", {"energy": -1.0}, prototype="B2"),
        NewStructure(crystal(4.0), "b"),
        NewStructure(crystal(), "a again"),
    ]
    first = store.add(entries, in_set="one")
    assert first.added == [True, True, False]
    assert first.keys[0] == first.keys[2] != first.keys[1]
    second = store.add([NewStructure(moved, "c")], in_set="two")
    assert second.added == [False]
    assert store.count() == 2
    assert store.keys("one") == sorted(first.keys[:2])
    assert store.keys("two") == [first.keys[0]]
    stored = store.get_many(first.keys[:1])[first.keys[0]]
    assert (stored.label, stored.prototype) == ("a", "B2")
    assert stored.properties == {"energy": -1.0}
    np.testing.assert_array_equal(stored.structure.frac_coords, crystal().frac_coords)
    assert stored.chemical_system == "Au-Cu"


def test_an_unknown_structure_is_named(database: Any) -> None:
    with pytest.raises(InputError, match="1 of 1 structures"):
        StructureStore(database).get_many(["nowhere"])


def test_a_simulation_is_written_once(database: Any) -> None:
    store = SimulationStore(database)
    first = Simulation("s", "m", "relaxation", "done", {"energy_ev": -1.0})
    store.put_many(
        [first, Simulation("t", "m", "relaxation", "failed", error={"a": 1})]
    )
    store.put_many([Simulation("s", "m", "relaxation", "done", {"energy_ev": -2.0})])
    found = store.find(["t", "s", "u"], "m")
    assert list(found) == ["t", "s"]
    assert found["s"].result == {"energy_ev": -1.0}
    assert store.find(["s"], "other") == {}


def test_formation_energies_are_relative_to_the_elements(database: Any) -> None:
    structures, simulations = StructureStore(database), SimulationStore(database)
    alloy = structures.add(
        [NewStructure(crystal(), "CuAu"), NewStructure(crystal(5.0), "far")],
        in_set="c",
    ).keys
    elements = structures.add(
        [
            NewStructure(crystal(3.0, ("Cu", "Cu")), "Cu"),
            NewStructure(crystal(4.0, ("Au", "Au")), "Au"),
        ],
        in_set="r",
    ).keys

    def energies() -> Any:
        return formation_energies(
            structures, simulations, keys=alloy, references=elements, method="m"
        )

    with pytest.raises(InputError, match="reference energy of Cu is missing"):
        energies()
    simulations.put_many(
        Simulation(key, "m", "relaxation", "done", {"energy_ev": energy})
        for key, energy in zip(elements, (-7.0, -8.0), strict=True)
    )
    assert energies().pending == alloy
    simulations.put_many(
        [
            Simulation(alloy[0], "m", "relaxation", "done", {"energy_ev": -7.9}),
            Simulation(alloy[1], "m", "relaxation", "failed", error={"kind": "x"}),
        ]
    )
    result = energies()
    assert result.energies == {alloy[0]: pytest.approx((-7.9 + 3.5 + 4.0) / 2)}
    assert result.failures == {alloy[1]: {"kind": "x"}}
    assert result.pending == []


def test_of_several_references_of_an_element_the_lowest_counts(database: Any) -> None:
    structures, simulations = StructureStore(database), SimulationStore(database)
    copper = [crystal(a, ("Cu", "Cu")) for a in (3.0, 3.1, 3.2)]
    gold = crystal(4.0, ("Au", "Au"))
    entries = [NewStructure(s, f"{i}") for i, s in enumerate([*copper, gold])]
    references = structures.add(entries, in_set="r").keys
    alloy = structures.add([NewStructure(crystal(), "CuAu")], in_set="c").keys
    simulations.put_many(
        Simulation(key, "m", "relaxation", "done", {"energy_ev": energy})
        for key, energy in zip(
            [*references, *alloy], (-6.8, -7.0, -6.6, -8.0, -7.9), strict=True
        )
    )
    found = formation_energies(
        structures, simulations, keys=alloy, references=references, method="m"
    )
    assert found.energies == {alloy[0]: pytest.approx((-7.9 + 3.5 + 4.0) / 2)}


def test_a_campaign_keeps_its_plan(database: Any) -> None:
    store = CampaignStore(database)
    store.create("one", {"top_k": 3})
    store.create("one", {"top_k": 3})
    with pytest.raises(InputError, match="another plan"):
        store.create("one", {"top_k": 4})
    with pytest.raises(InputError, match="no dataset yet"):
        store.output("one", "dataset")
    store.record("one", dataset="abc")
    assert store.output("one", "dataset") == "abc"
    with pytest.raises(InputError, match="no campaign 'two'"):
        store.get("two")
    assert store.names() == ["one"]


def test_numbers_of_a_duplicate_are_added_or_refused(
    database: Any, tmp_path: Path
) -> None:
    """Structures first, one target after the other: labels must not get lost."""
    store = StructureStore(database)

    def imported(name: str, numbers: str) -> ImportReport:
        (tmp_path / name).write_text(
            f'1\nLattice="4 0 0 0 4 0 0 0 4" {numbers}\nCu 0 0 0\n'
        )
        return import_structures(store, [tmp_path / name], in_set="all")

    assert imported("bare.extxyz", "energy=nan").notes == [
        ("bare", "property energy is nan and was left out")
    ]
    (key,) = store.keys("all")
    assert imported("first.extxyz", "energy=-1.5").duplicates == [("first", key)]
    assert imported("other.extxyz", "energy=-1.5 gap=2").duplicates == [("other", key)]
    expected = {"energy": -1.5, "gap": 2.0}
    assert store.get_many([key])[key].properties == expected
    for numbers, words in (
        ("energy=-1.6 hardness=3", "energy = -1.5, not -1.6"),
        ("a.b=1", "without 'a.b'"),
    ):
        (failure,) = imported("differs.extxyz", numbers).failures
        assert key in str(failure.error)
        assert words in str(failure.error)
    assert store.get_many([key])[key].properties == expected


@pytest.mark.mongodb
def test_a_query_that_the_server_refuses_is_the_users(mongodb_database: Any) -> None:
    ensure_indexes(mongodb_database)
    for query in ({"label": {"$regex": "("}}, {"n_sites": {"$lte": 10**40}}):
        with pytest.raises(InputError, match="does not understand the query"):
            StructureStore(mongodb_database).query_keys(query)
