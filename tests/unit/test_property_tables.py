"""Tables of properties: schema, units, rows that cannot be used, and the store."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pymatgen.core import Lattice, Structure

from nanoos_fw.errors import InputError
from nanoos_fw.operations import import_property_table
from nanoos_fw.property_tables import (
    PropertyRow,
    RowFailure,
    TableColumns,
    conversion,
    read_property_table,
)
from nanoos_fw.provenance import sha256_file
from nanoos_fw.stores.database import ensure_indexes
from nanoos_fw.stores.structures import NewStructure, StructureStore


def crystal(a: float) -> Structure:
    return Structure(Lattice.cubic(a), ["Cu", "Au"], [[0, 0, 0], [0.5, 0.5, 0.5]])


@pytest.fixture(
    params=[
        "embedded_database",
        pytest.param("mongodb_database", marks=pytest.mark.mongodb),
    ]
)
def store(request: pytest.FixtureRequest) -> StructureStore:
    database = request.getfixturevalue(request.param)
    ensure_indexes(database)
    return StructureStore(database)


def table(tmp_path: Path, text: str, name: str = "t.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("given", "wanted", "factor"),
    [
        ("meV/atom", "eV/atom", 1e-3),
        ("kJ/mol", "eV", 1 / 96.48533212331),  # eV in kJ/mol: e N_A / 1000
        ("kcal/mol", "eV", 4.184 / 96.48533212331),
        ("Ry", "Ha", 0.5),
        ("GPa", "bar", 1e4),
        ("eV/Å³", "GPa", 160.2176634),
        ("nm", "Å", 10.0),
        ("bohr^3", "Å³", 0.529177210903**3),
        ("1", "1", 1.0),
    ],
)
def test_units_are_converted(given: str, wanted: str, factor: float) -> None:
    assert conversion(given, wanted) == pytest.approx(factor, rel=1e-9)
    assert conversion(wanted, given) == pytest.approx(1 / factor, rel=1e-9)


@pytest.mark.parametrize(
    ("given", "wanted"), [("eV", "eV/atom"), ("Å", "eV"), ("furlong", "Å"), ("", "eV")]
)
def test_units_of_something_else_are_refused(given: str, wanted: str) -> None:
    with pytest.raises(InputError, match="cannot be converted"):
        conversion(given, wanted)


def test_csv_and_json_lines_are_the_same_table(tmp_path: Path) -> None:
    rows = [("a", "1.5", "eV"), ("b", "2500", "meV"), ("c", "-1e-3", "eV")]
    text = "id,bandgap,unit\n" + "".join(",".join(row) + "\n" for row in rows)
    lines = [{"id": n, "bandgap": float(v), "unit": u} for n, v, u in rows]
    found = [
        list(read_property_table(path, "bandgap"))
        for path in (
            table(tmp_path, text),
            table(tmp_path, "\n".join(map(json.dumps, lines)), "t.jsonl"),
        )
    ]
    for entries in found:
        assert all(isinstance(entry, PropertyRow) for entry in entries)
        assert [entry.structure for entry in entries] == ["a", "b", "c"]
        assert [e.value for e in entries] == pytest.approx([1.5, 2.5, -1e-3])
    assert [e.line for e in found[0]] == [2, 3, 4]
    assert [e.line for e in found[1]] == [1, 2, 3]


def test_the_first_row_decides_the_unit_of_a_property_that_is_not_known(
    tmp_path: Path,
) -> None:
    text = "key,value,in\na,1,\nb,2,GPa\nc,300,MPa\nd,4,eV\ne,5e9,Pa\n"
    columns = TableColumns(unit="in")
    path = table(tmp_path, text)
    rows = list(read_property_table(path, "hardness", columns=columns))
    good = [row for row in rows if isinstance(row, PropertyRow)]
    assert [(row.structure, row.unit) for row in good] == [
        ("b", "GPa"), ("c", "GPa"), ("e", "GPa"),
    ]  # fmt: skip
    assert [row.value for row in good] == pytest.approx([2.0, 0.3, 5.0], rel=1e-12)
    bad = {row.line: str(row.error) for row in rows if isinstance(row, RowFailure)}
    assert sorted(bad) == [2, 5]
    assert "no unit" in bad[2]
    assert "'eV' cannot be converted to 'GPa'" in bad[5]
    # A unit for the table decides, whatever the first row has.
    asked = read_property_table(path, "hardness", unit="MPa", columns=columns)
    assert [row.value for row in asked if isinstance(row, PropertyRow)] == (
        pytest.approx([1.0, 2000.0, 300.0, 5000.0], rel=1e-12)
    )


def test_rows_that_cannot_be_used_are_told_line_by_line(tmp_path: Path) -> None:
    text = (
        "key,value,unit\n"
        "a,1,eV\n"
        "b,one,eV\n"
        "c,nan,eV\n"
        ",2,eV\n"
        "e,2,Å\n"
        "f,2,\n"
        "g,2\n"
        "h,3,eV,more\n"
    )
    good, *bad = read_property_table(table(tmp_path, text), "bandgap")
    assert good == PropertyRow(2, "a", None, 1.0, "eV")
    words = ["no number", "finite", "names no", "converted", "no unit", "3 f", "3 f"]
    assert len(bad) == len(words)
    for line, (row, word) in enumerate(zip(bad, words, strict=True), start=3):
        assert isinstance(row, RowFailure)
        assert (row.line, word in str(row.error)) == (line, True), row.error
    lines = '{"key": "a", "value": true}\nnot json\n[1]\n\n{"key": 7, "value": 2}\n'
    path = table(tmp_path, lines, "t.jsonl")
    kinds = [
        type(row).__name__ for row in read_property_table(path, "bandgap", unit="eV")
    ]
    assert kinds == ["RowFailure"] * 3 + ["PropertyRow"]


@pytest.mark.parametrize(
    ("text", "name", "arguments", "words"),
    [
        ("key,value\na,1\n", "bandgap", {}, "no column 'unit'"),
        ("key,gap\na,1\n", "bandgap", {"unit": "eV"}, "no column 'bandgap' or 'value'"),
        ("who,value\na,1\n", "bandgap", {"unit": "eV"}, "names structures"),
        ("key,value\n", "bandgap", {"unit": "eV"}, "no rows"),
        ("key,value\na,1\n", "hardness", {}, "unit of 'hardness' is not known"),
        ("key,value\na,1\n", "$set", {"unit": "eV"}, "cannot be the name"),
        ("key,value\na,1\n", "a.b", {"unit": "eV"}, "cannot be the name"),
        (
            "key,value\na,1\n",
            "bandgap",
            {"unit": "eV", "columns": TableColumns(value="gap")},
            "no column 'gap'",
        ),
    ],
)
def test_tables_without_the_columns_are_refused(
    tmp_path: Path, text: str, name: str, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        list(read_property_table(table(tmp_path, text), name, **arguments))


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no table"):
        list(read_property_table(tmp_path / "t.xlsx", "bandgap"))
    with pytest.raises(InputError, match="cannot read"):
        list(read_property_table(tmp_path / "t.csv", "bandgap"))
    (tmp_path / "t.csv").write_bytes(b"key,value,unit\n\xff\xfe,1,eV\n")
    with pytest.raises(InputError, match="cannot read"):
        list(read_property_table(tmp_path / "t.csv", "bandgap"))


def test_a_name_of_two_columns_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path, "id,value,value\na,1,2\n")
    with pytest.raises(InputError, match="several columns 'value'"):
        list(read_property_table(path, "bandgap", unit="eV"))


def test_numbers_too_large_for_the_unit_are_told(tmp_path: Path) -> None:
    path = table(tmp_path, "id,value\na,1e307\nb,1\n")
    bad, good = read_property_table(path, "pressure", unit="GPa")
    assert isinstance(bad, RowFailure)
    assert "too large to be in bar" in str(bad.error)
    assert isinstance(good, PropertyRow)
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"id": "a", "value": 1%s}\n' % ("0" * 400))
    (row,) = read_property_table(lines, "pressure", unit="GPa")
    assert isinstance(row, RowFailure)
    assert "no finite number" in str(row.error)


def test_values_go_to_their_structures_with_unit_and_source(
    store: StructureStore, tmp_path: Path
) -> None:
    entries = [NewStructure(crystal(3.0 + i), f"s{i}") for i in range(3)]
    entries += [NewStructure(crystal(9.0), "same"), NewStructure(crystal(9.5), "same")]
    keys = store.add(entries, in_set="all").keys
    text = (
        "id,value\n"
        f"{keys[0]},1000\n"  # by key
        "s1,2000\n"  # by label
        "s1,2000\n"  # twice
        "s1,2001\n"  # and another number
        "unknown,1\n"
        "same,1\n"
    )
    path = table(tmp_path, text)
    report = import_property_table(
        store, path, "bandgap", unit="meV", source="paper of 2020"
    )
    assert (report.unit, sorted(report.written)) == ("eV", sorted(keys[:2]))
    assert report.total == 6
    words = {4: "same structure", 5: "says 2.0, not 2.001", 6: "0 str", 7: "2 str"}
    assert sorted(report.failures) == sorted(words)
    for line, word in words.items():
        assert word in str(report.failures[line])
    labels = store.labels(keys)
    assert labels[keys[0]].properties == {"bandgap": 1.0}
    assert labels[keys[1]].units == {"bandgap": "eV"}
    assert labels[keys[2]].properties == {}
    (document,) = store._structures.find({"_id": keys[0]})
    source = document["property_sources"]["bandgap"]["source"]
    assert source == f"paper of 2020 (sha256 {sha256_file(path)})"

    again = import_property_table(store, path, "bandgap", unit="meV")
    assert (again.written, len(again.unchanged)) == ([], 2)
    other = table(tmp_path, f"key,value\n{keys[0]},1.25\n", "other.csv")
    refused = import_property_table(store, other, "bandgap", unit="eV")
    assert "1.0 already, not 1.25" in str(refused.failures[2])
    assert store.labels(keys)[keys[0]].properties == {"bandgap": 1.0}
    replaced = import_property_table(store, other, "bandgap", unit="eV", replace=True)
    assert replaced.written == [keys[0]]
    assert store.labels(keys)[keys[0]].properties == {"bandgap": 1.25}


def test_files_that_a_table_names_are_imported(
    store: StructureStore, tmp_path: Path
) -> None:
    from pymatgen.io.vasp import Poscar

    (tmp_path / "cells").mkdir()
    Poscar(crystal(4.0)).write_file(tmp_path / "cells" / "one.vasp")
    (tmp_path / "cells" / "bad.cif").write_text("nothing")
    text = (
        "file,hardness\ncells/one.vasp,7.5\ncells/none.vasp,1\ncells/bad.cif,1\n"
        "cells/one.vasp,7.5\n"
    )
    report = import_property_table(
        store, table(tmp_path, text), "hardness", unit="GPa", in_set="from table"
    )
    assert (report.added, len(report.written)) == (1, 1)
    assert sorted(report.failures) == [3, 4, 5]
    (key,) = store.keys("from table")
    entry = store.labels([key])[key]
    assert entry.properties["hardness"] == 7.5
    assert entry.units == {"hardness": "GPa"}
    assert math.isclose(store.get_many([key])[key].structure.lattice.a, 4.0)


def test_queries_find_structures_and_run_no_code(store: StructureStore) -> None:
    entries = [
        NewStructure(crystal(3.0 + i), f"s{i}", {"energy": float(-i)}) for i in range(4)
    ]
    keys = store.add(entries, in_set="all").keys
    assert store.query_keys({}) == sorted(keys)
    assert store.query_keys({"elements": "Au", "n_sites": {"$lte": 2}}) == sorted(keys)
    assert store.query_keys({"elements": {"$all": ["Cu", "Fe"]}}) == []
    assert store.query_keys({"properties.energy": {"$lt": -2}}) == [keys[3]]
    found = store.query_keys({"$or": [{"label": "s0"}, {"volume_a3": {"$gt": 200}}]})
    assert found == sorted([keys[0], keys[3]])
    for query, words in (
        ({"$where": "sleep(1000)"}, "no field"),
        ({"label": {"$where": "1"}}, "cannot use"),
        ({"$or": [{"structure.numbers": 1}]}, "no field"),
        ({"$or": []}, "list of queries"),
        (["label"], "JSON object"),
    ):
        with pytest.raises(InputError, match=words):
            store.query_keys(query)
