from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Molecule, Structure
from pymatgen.entries.computed_entries import ComputedStructureEntry
from pymatgen.io.cif import CifWriter
from pymatgen.io.vasp.inputs import Poscar

from nanoos_fw.crystals import structure_key
from nanoos_fw.errors import InputError
from nanoos_fw.structure_files import (
    EntryFailure,
    Source,
    StructureEntry,
    read_structures,
)
from nanoos_fw.structure_files.extxyz import parse_comment


def salt(a: float = 5.64, anion: str = "Cl") -> Structure:
    corners = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2
    frac = np.vstack([corners, corners + 0.5])
    return Structure(Lattice.cubic(a), ["Na"] * 4 + [anion] * 4, frac)


def frame(structure: Structure, extra: str = "energy=-27.1", pbc: str = "T T T") -> str:
    matrix = " ".join(f"{x:.12g}" for x in structure.lattice.matrix.ravel())
    rows = "".join(
        f"{site.specie.symbol} {site.x:.12f} {site.y:.12f} {site.z:.12f} 0 0 0.5\n"
        for site in structure
    )
    return (
        f'{len(structure)}\nLattice="{matrix}" '
        f'Properties=species:S:1:pos:R:3:forces:R:3 {extra} pbc="{pbc}"\n{rows}'
    )


def cif(structure: Structure, **options) -> str:
    return str(CifWriter(structure, **options))


def read(path: Path, **options) -> list:
    """Read everything; nothing may warn, since pytest turns warnings into errors."""
    return list(read_structures(path, **options))


def write(path: Path, text: str | bytes) -> Path:
    if isinstance(text, str):
        path.write_text(text, encoding="utf-8")
    else:
        path.write_bytes(text)
    return path


def only(path: Path, **options) -> StructureEntry:
    entries = read(path, **options)
    assert len(entries) == 1
    assert isinstance(entries[0], StructureEntry), entries[0].error
    return entries[0]


def failure(path: Path, **options) -> InputError:
    entries = read(path, **options)
    assert len(entries) == 1
    assert isinstance(entries[0], EntryFailure), entries[0]
    assert isinstance(entries[0].error, InputError)
    return entries[0].error


def outline(entries: list) -> list[str]:
    return [
        entry.label if isinstance(entry, StructureEntry) else f"!{entry.label}"
        for entry in entries
    ]


# ------------------------------------------------------------- every format at once


def dumps(structure: Structure) -> str:
    return json.dumps(structure.as_dict())


WRITERS = {
    "a.cif": cif,
    "a.vasp": lambda s: Poscar(s).get_str(significant_figures=12),
    "POSCAR": lambda s: Poscar(s).get_str(significant_figures=12),
    "CONTCAR_relaxed": lambda s: Poscar(s).get_str(significant_figures=12),
    "a.extxyz": frame,
    "a.xyz": frame,
    "a.json": dumps,
    "a.jsonl": dumps,
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_each_format_gives_the_crystal_that_was_written(tmp_path, name):
    entry = only(write(tmp_path / name, WRITERS[name](salt())))
    assert structure_key(entry.structure) == structure_key(salt())
    assert entry.source == Source(str(tmp_path / name), 0)
    assert str(entry.source) == f"{tmp_path / name}#0"


@pytest.mark.parametrize("name", list(WRITERS))
@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_each_format_is_read_compressed(tmp_path, name, suffix):
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix]
    data = pack(WRITERS[name](salt()).encode())
    entry = only(write(tmp_path / (name + suffix), data))
    assert structure_key(entry.structure) == structure_key(salt())
    assert entry.label == (tmp_path.name if name == "POSCAR" else name.split(".")[0])


@pytest.mark.parametrize("name", list(WRITERS))
@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_truncated_compressed_files_are_failures(tmp_path, name, suffix):
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix]
    data = pack(WRITERS[name](salt()).encode())
    error = failure(write(tmp_path / (name + suffix), data[: len(data) // 2]))
    assert "damaged or cut short" in str(error)


@pytest.mark.parametrize("name", list(WRITERS))
def test_empty_files_are_failures(tmp_path, name):
    for text in ("", "\n \n"):
        error = failure(write(tmp_path / name, text))
        assert name in str(error)


@pytest.mark.parametrize("name", list(WRITERS))
def test_text_that_is_not_utf8_is_a_failure(tmp_path, name):
    text = WRITERS[name](salt()).replace("\n", " # \xc5\n", 1).encode("latin1")
    error = failure(write(tmp_path / name, b"\xc5" + text))
    assert "UTF-8" in str(error)
    assert "iconv" in str(error)


@pytest.mark.parametrize("name", list(WRITERS))
def test_garbage_is_a_failure_without_warnings(tmp_path, name):
    text = "data_x\n_cell_length_a nonsense\nloop_\n_atom_site_label\n{[}\n1 2 3\n" * 3
    entries = read(write(tmp_path / name, text))
    assert entries
    assert all(isinstance(entry, EntryFailure) for entry in entries)


@pytest.mark.parametrize("name", list(WRITERS))
def test_overlapping_atoms_are_failures_that_name_the_sites(tmp_path, name):
    structure = salt()
    structure[1] = ("Na", [0.01, 0, 0])
    text = WRITERS[name](structure)
    error = failure(write(tmp_path / name, text))
    assert error.evidence["distance_a"] == pytest.approx(0.0564, abs=1e-4)
    assert isinstance(only(tmp_path / name, min_distance=0.05), StructureEntry)


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_file_cut_at_any_line_never_gives_another_crystal(tmp_path, name):
    lines = WRITERS[name](salt()).splitlines(keepends=True)
    n_read = 0
    for stop in range(len(lines) + 1):
        for entry in read(write(tmp_path / name, "".join(lines[:stop]))):
            if isinstance(entry, StructureEntry):
                n_read += 1
                assert structure_key(entry.structure) == structure_key(salt())
    assert n_read == 1


def test_a_gz_suffix_on_plain_text_is_a_failure(tmp_path):
    assert "damaged" in str(failure(write(tmp_path / "a.cif.gz", cif(salt()))))


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    only(write(tmp_path / "a.cif", b"\xef\xbb\xbf" + cif(salt()).encode()))


def test_windows_line_ends_are_no_obstacle(tmp_path):
    for name, writer in WRITERS.items():
        only(write(tmp_path / name, writer(salt()).replace("\n", "\r\n").encode()))


# ----------------------------------------------------------------------------- paths


def test_a_path_that_does_not_exist_is_one_failure(tmp_path):
    assert "does not exist" in str(failure(tmp_path / "absent.cif"))


def test_an_unknown_suffix_is_a_failure_that_lists_the_known_ones(tmp_path):
    error = failure(write(tmp_path / "notes.txt", "hello"))
    assert ".extxyz" in str(error)


def test_a_file_without_permission_is_a_failure(tmp_path, monkeypatch):
    def refuse(self, *_args, **_options):
        raise PermissionError(13, "Permission denied", str(self))

    write(tmp_path / "a.cif", cif(salt()))
    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in str(failure(tmp_path / "a.cif"))


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.cif")
    assert "neither file nor folder" in str(failure(tmp_path / "a.cif"))


def test_a_folder_is_read_in_the_order_of_names_with_every_failure(tmp_path):
    (tmp_path / "mp-2").mkdir()
    write(tmp_path / "mp-2" / "POSCAR", Poscar(salt()).get_str())
    write(tmp_path / "b.cif", cif(salt()))
    write(tmp_path / "a.xyz", frame(salt()) + frame(salt(5.7)))
    write(tmp_path / "c.json", "{")
    write(tmp_path / "README", "")
    write(tmp_path / ".hidden.cif", "x")
    (tmp_path / "dead.cif").symlink_to(tmp_path / "nowhere")
    (tmp_path / "mp-2" / "loop").symlink_to(tmp_path)
    expected = ["!README", "a#0", "a#1", "b", "!c", "!dead", "mp-2"]
    assert outline(read(tmp_path)) == expected


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "a.xyz"
    write(path, frame(salt()) * 3)
    entries = read_structures(path)
    assert isinstance(next(entries), StructureEntry)
    entries.close()


def test_min_distance_must_be_a_length(tmp_path):
    with pytest.raises(InputError, match="min_distance"):
        read_structures(tmp_path, min_distance=math.nan)


# -------------------------------------------------------------------------- id_prop


def test_the_cgcnn_folder_convention(tmp_path):
    for name in ("1", "2", "4", "extra"):
        write(tmp_path / f"{name}.cif", cif(salt()))
    write(tmp_path / "5.cif", cif(salt()) + cif(salt(5.7)))
    write(tmp_path / "atom_init.json", "{}")
    write(tmp_path / "id_prop.csv", "1,-0.5\n2,nan\n3,1.0\n\n4,2,3\n1,-0.4\n5,1\n")
    entries = read(tmp_path, id_prop_target="bandgap")
    assert outline(entries) == [
        "1",
        "!2",
        "!3",
        "!4",
        "!1",
        "!5",
        "!extra",
    ]
    assert entries[0].properties == {"bandgap": -0.5}
    words = [
        "no finite",
        "there is no",
        "3 columns",
        "repeats",
        "several",
        "not listed",
    ]
    for word, entry in zip(words, entries[1:], strict=True):
        assert word in str(entry.error)


def test_an_unreadable_cif_of_a_listed_row_is_one_failure(tmp_path):
    write(tmp_path / "1.cif", "nothing")
    write(tmp_path / "2.cif.gz", gzip.compress(cif(salt()).encode()))
    write(tmp_path / "id_prop.csv", "1,0.1\n2,0.2\n")
    entries = read(tmp_path)
    assert outline(entries) == ["!1", "2"]
    assert entries[1].properties == {"target": 0.2}


def test_an_empty_table_reports_itself_and_the_unlisted(tmp_path):
    write(tmp_path / "1.cif", cif(salt()))
    write(tmp_path / "id_prop.csv", "")
    assert outline(read(tmp_path)) == ["!id_prop.csv", "!1"]


# ------------------------------------------------------------------------------ CIF

MINIMAL = """data_{name}
_cell_length_a 4.0
_cell_length_b 4.0
_cell_length_c 4.0
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
{extra}
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
{rows}
"""
TWO = "Cs1 0 0 0 1\nCl1 0.5 0.5 0.5 1"


def minimal(rows: str = TWO, extra: str = "", name: str = "x") -> str:
    return MINIMAL.format(name=name, rows=rows, extra=extra)


def test_blocks_of_one_cif_are_read_one_by_one(tmp_path):
    # pymatgen lets the later of two equally named blocks win.
    text = (
        "# a comment\ndata_global\n_publ_section_title\n;\ndata_ in a title\n;\n"
        + minimal(name="same")
        + minimal("Qq 0 0 0 1", name="bad")
        + minimal("Na1 0 0 0 1\nCl1 0.5 0.5 0.5 1", name="same")
        + minimal(name="powder_pattern_1").replace("data_", "DATA_")
    )
    entries = read(write(tmp_path / "many.cif", text))
    assert outline(entries) == ["many#0", "!many#1", "many#2", "many#3"]
    formulas = [e.structure.formula for e in (entries[0], entries[2], entries[3])]
    assert formulas == ["Cs1 Cl1", "Na1 Cl1", "Cs1 Cl1"]


def test_symmetry_operations_are_applied(tmp_path):
    text = cif(salt(), symprec=None)
    symmetric = minimal(
        "Na1 0 0 0 1\nCl1 0.5 0.5 0.5 1", "_symmetry_space_group_name_H-M 'F m -3 m'"
    )
    entry = only(write(tmp_path / "a.cif", symmetric))
    assert structure_key(entry.structure) == structure_key(salt(4.0))
    assert any("Spacegroup" in note for note in entry.notes)
    assert only(write(tmp_path / "b.cif", text)).notes == ()


@pytest.mark.parametrize(
    ("rows", "extra", "word"),
    [
        ("Fe1 0 0 0 0.5\nCo1 0 0 0 0.5", "", "disordered"),
        ("Fe1 0 0 0 0.5", "", "disordered"),
        (TWO + "\nCl2 0.5 0.5 0.5 1", "", "exceeded tolerance"),
        ("Cs1 0 0 0 1\nCl1 0.5 0.5", "", ""),
        ("", "", ""),
        ("Cs1 0 0 . 1\nCl1 0.5 0.5 0.5 1", "", "no value"),
        ("Cs1 0 0 ? 1\nCl1 0.5 0.5 0.5 1", "", ""),
        ("Cs1 0 0 0 .\nCl1 0.5 0.5 0.5 1", "", "no value"),
        ("Uue1 0 0 0 1\nCl1 0.5 0.5 0.5 1", "", "no known element"),
        ("Nx1 0 0 0 1\nCl1 0.5 0.5 0.5 1", "", "no known element"),
        ("OH1 0 0 0 1\nCl1 0.5 0.5 0.5 1", "", "no known element"),
        ("D1 0 0 0 1\nCl1 0.5 0.5 0.5 1", "", "holds D"),
        ("1 0 0 0 1\nCl1 0.5 0.5 0.5 1", "", "no known element"),
        (TWO, "_chemical_formula_sum 'Cs1 Cl2'", "do not agree"),
        (TWO, "_chemical_formula_sum 'Cs1 Cl1 H4'", "do not agree"),
        (TWO, "_chemical_formula_sum 'Cs2 Cl2'", "2 atoms instead of 4"),
        (TWO, "_symmetry_space_group_name_H-M 'Q z 9'", "unknown"),
        (TWO, "_space_group_name_H-M_alt 'Q z 9'", "unknown"),
        (TWO.replace("0.5 1", "\u22120.5 1"), "", "outside ASCII"),
    ],
)
def test_cifs_that_pymatgen_refuses_or_half_reads(tmp_path, rows, extra, word):
    assert word in str(failure(write(tmp_path / "a.cif", minimal(rows, extra))))


@pytest.mark.parametrize("symbol", ["Wat", "Xx", "Uue", "?", "OH"])
def test_the_type_symbol_must_be_an_element(tmp_path, symbol):
    text = minimal(f"Cs1 {symbol} 0 0 0 1").replace(
        "_atom_site_fract_x", "_atom_site_type_symbol\n_atom_site_fract_x"
    )
    assert "no known element" in str(failure(write(tmp_path / "a.cif", text)))


@pytest.mark.parametrize("symbol", ["Cs", "Cs1+", "CS", "Cs+"])
def test_usual_type_symbols_are_elements(tmp_path, symbol):
    text = minimal(f"whatever {symbol} 0 0 0 1").replace(
        "_atom_site_fract_x", "_atom_site_type_symbol\n_atom_site_fract_x"
    )
    entry = only(write(tmp_path / "a.cif", text))
    assert entry.structure.composition.element_composition.formula == "Cs1"


def test_an_atom_without_loop_is_refused(tmp_path):
    text = (
        minimal()
        .split("loop_")[0]
        .__add__("_atom_site_label Cs1\n_atom_site_fract_x 0\n_atom_site_fract_y 0\n")
        .__add__("_atom_site_fract_z 0\n")
    )
    assert "without loop_" in str(failure(write(tmp_path / "a.cif", text)))


def test_an_open_text_field_is_a_failure(tmp_path):
    text = minimal() + "_publ_section_comment\n;\nnever closed\n"
    assert "text field" in str(failure(write(tmp_path / "a.cif", text)))


def test_a_cif_without_a_crystal_is_a_failure(tmp_path):
    path = write(tmp_path / "a.cif", "data_global\n_journal_year 1999\n")
    assert "no block" in str(failure(path))
    assert "no data_ block" in str(failure(write(path, "<html>404</html>\n")))


def test_occupancies_barely_above_one_are_full(tmp_path):
    entry = only(
        write(tmp_path / "a.cif", minimal("Cs1 0 0 0 1.004(5)\nCl1 .5 .5 .5 1"))
    )
    assert entry.structure.formula == "Cs1 Cl1"
    assert any("sum to > 1" in note for note in entry.notes)


def test_accents_in_quoted_text_and_comments_are_no_obstacle(tmp_path):
    extra = "_publ_author_name 'M\u00fcller'\n# \u00c5\n_x\n;\n\u2212 in a text\n;"
    only(write(tmp_path / "a.cif", minimal(extra=extra)))


def test_implicit_hydrogens_are_refused(tmp_path):
    text = minimal("O1 0 0 0 2\nCs1 0.5 0.5 0.5 0").replace(
        "_atom_site_occupancy", "_atom_site_attached_hydrogens"
    )
    assert "hydrogen" in str(failure(write(tmp_path / "a.cif", text)))


def test_a_formula_and_z_that_do_not_fit_are_noted(tmp_path):
    extra = "_chemical_formula_sum 'Cs1 Cl1'\n_cell_formula_units_Z 4"
    p1 = extra + "\nloop_\n_symmetry_equiv_pos_as_xyz\n'x, y, z'"
    entry = only(write(tmp_path / "a.cif", minimal(extra=p1)))
    assert entry.notes == ("2 atoms, where formula and Z of the block give 8",)
    # Without any symmetry the other six atoms are simply missing.
    error = failure(write(tmp_path / "a.cif", minimal(extra=extra)))
    assert "2 atoms instead of 8" in str(error)


@pytest.mark.parametrize("formula", ["Na4 Cl4", "Na1 Cl1"])
def test_formulas_of_the_cell_and_of_a_unit_both_fit(tmp_path, formula):
    text = cif(salt()).replace("'Na4 Cl4'", f"'{formula}'")
    assert only(write(tmp_path / "a.cif", text)).notes == ()


# --------------------------------------------------------------------------- POSCAR


def test_a_poscar_without_element_names_is_refused(tmp_path):
    lines = Poscar(salt()).get_str().splitlines()
    del lines[5]
    lines = [line.rsplit(" ", 1)[0] if i > 6 else line for i, line in enumerate(lines)]
    error = failure(write(tmp_path / "POSCAR", "\n".join(lines) + "\n"))
    assert "does not name its elements" in str(error)


def test_a_truncated_poscar_is_refused(tmp_path):
    text = "".join(Poscar(salt()).get_str().splitlines(keepends=True)[:-2])
    assert "ends before its last atom" in str(failure(write(tmp_path / "POSCAR", text)))


@pytest.mark.parametrize("word", ["nan", "********", "1e400"])
def test_a_poscar_with_unusable_numbers_is_refused(tmp_path, word):
    text = Poscar(salt()).get_str().replace("0.5000000000000000", word, 1)
    assert word in text
    failure(write(tmp_path / "POSCAR", text))


# --------------------------------------------------------------------- extended XYZ


def test_frames_keep_their_numbers_and_nothing_else(tmp_path):
    extra = (
        'energy=-1.5 REF_energy=-2 energy_corrected="-2.5" step=7 flag=T '
        'stress="1 2 3 4 5 6 7 8 9" config_type=bulk nothing=nan D=1.0D-2 '
        "id=mp-1_2 version=1_000"
    )
    entry = only(write(tmp_path / "a.xyz", frame(salt(), extra)))
    assert entry.properties == {
        "energy": -1.5,
        "REF_energy": -2.0,
        "energy_corrected": -2.5,
        "step": 7.0,
        "D": 0.01,
    }
    assert entry.notes == ("property nothing is nan and was left out",)
    assert list(entry.structure.site_properties) == []


def test_comment_lines_with_every_kind_of_quoting():
    text = """A="x y" B='u "v"' C={1 2 3} D=[1, 2] e = 5 "F"=g bare H="say \\"hi\\"" """
    assert parse_comment(text) == {
        "A": "x y",
        "B": 'u "v"',
        "C": "1 2 3",
        "D": "1  2",
        "e": "5",
        "F": "g",
        "H": 'say "hi"',
    }


def test_frames_may_name_themselves(tmp_path):
    text = frame(salt(), "material_id=mp-22862") + frame(salt(), 'label="rock salt"')
    assert outline(read(write(tmp_path / "a.xyz", text))) == ["mp-22862", "rock salt"]


def test_atomic_numbers_charges_and_other_column_orders(tmp_path):
    text = (
        '2\nlattice="4 0 0 0 4 0 0 0 4" Properties=id:I:1:positions:R:3:Z:I:1:'
        "charges:R:1:tags:I:2\n1 0 0 0 55 1.0 0 0\n2 2 2 2 17 -1.0 0 0\n"
    )
    structure = only(write(tmp_path / "a.xyz", text)).structure
    assert structure.formula == "Cs1 Cl1"
    assert structure.site_properties["charge"] == [1.0, -1.0]
    assert structure.frac_coords.tolist() == [[0, 0, 0], [0.5, 0.5, 0.5]]


def test_rows_of_the_lattice_are_vectors(tmp_path):
    structure = Structure(
        Lattice([[3.1, 0.2, 0.3], [-0.4, 3.5, 0.6], [0.7, 0.8, 3.9]]),
        ["Cu", "Au"],
        [[0.1, 0.2, 0.3], [0.6, 0.7, 0.8]],
    )
    entry = only(write(tmp_path / "a.xyz", frame(structure)))
    assert entry.structure.lattice.matrix == pytest.approx(structure.lattice.matrix)
    assert structure_key(entry.structure) == structure_key(structure)


BAD_FRAMES = {
    "no lattice": ("2\nplain xyz\nNa 0 0 0\nCl 2 2 2\n", "no Lattice"),
    "short": (frame(salt()).rsplit("\n", 2)[0] + "\n", "announces 8 atoms and has 7"),
    "element": (frame(salt()).replace("Cl", "Qq", 1), "no known element: 'Qq'"),
    "dummy": (frame(salt()).replace("Cl", "X", 1), "no known element: 'X'"),
    "isotope": (frame(salt()).replace("Cl", "D", 1), "holds D"),
    "number": (frame(salt()).replace(" 2.82", " 2.8.2", 1), "pos of the frame"),
    "nan": (frame(salt()).replace(" 2.820000000000", " nan", 1), "no usable"),
    "columns": (frame(salt()).replace(" 0 0 0.5", " 0", 1), "columns"),
    "slab": (frame(salt(), pbc="T T F"), "three directions"),
    "pbc": (frame(salt(), pbc="yes"), "pbc"),
    "lattice": (frame(salt()).replace("5.64 ", "", 1), "8 numbers"),
    "words": (frame(salt()).replace("5.64", "big", 1), "Lattice of the frame"),
    "flat": (frame(salt()).replace("5.64", "0", 1), "no volume"),
    "properties": (frame(salt()).replace("pos:R:3", "pos:R", 1), "name:type:width"),
    "no positions": (frame(salt()).replace("pos:R:3", "p:R:3", 1), "no column pos"),
    "no species": (frame(salt()).replace("species:S", "s:S", 1), "no column species"),
    "unit": (frame(salt(), "energy=1 energy_unit=Hartree"), "not in eV"),
    "Unit": (frame(salt(), "energy=1 Energy_Units=meV"), "not in eV"),
    "zero": (frame(salt()).replace("8\n", "0\n", 1).split("\nNa")[0] + "\n", ""),
    "junk": ("this is no frame\n", "should be a number of atoms"),
}


@pytest.mark.parametrize("case", list(BAD_FRAMES))
def test_a_bad_frame_fails_alone(tmp_path, case):
    text, word = BAD_FRAMES[case]
    good = frame(salt())
    entries = read(write(tmp_path / "a.xyz", good + text + good + "\n"))
    assert outline(entries) == ["a#0", "!a#1", "a#2"]
    assert word in str(entries[1].error)
    assert [entry.source.index for entry in entries] == [0, 1, 2]


def test_a_frame_with_too_many_rows_costs_only_the_excess(tmp_path):
    good = frame(salt())
    text = good + "Na 0 0 0 0 0 0\nCl 0 0 0 0 0 0\n" + good
    entries = read(write(tmp_path / "a.xyz", text))
    assert outline(entries) == ["a#0", "!a#1", "a#2"]
    assert entries[1].error.evidence["lines_skipped"] == 2


def test_frames_before_the_end_of_a_truncated_archive_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    frames = "".join(
        frame(salt(float(a))) for a in 5.5 + 0.3 * rng.uniform(size=400)
    ).encode()
    data = gzip.compress(frames)
    entries = read(write(tmp_path / "a.xyz.gz", data[: len(data) // 2]))
    assert 50 < len(entries) < 350
    assert all(isinstance(entry, StructureEntry) for entry in entries[:-2])
    assert "cut short" in str(entries[-1].error)


# ----------------------------------------------------------------------------- JSON


def test_lists_are_read_record_by_record(tmp_path):
    records = [
        salt().as_dict(),
        {"material_id": "mp-1", "structure": salt().as_dict(), "band_gap": 5, "n": "x"},
        {"no": "structure"},
        7,
        Molecule(["H", "H"], [[0, 0, 0], [0, 0, 0.74]]).as_dict(),
        salt(anion="Br").as_dict(),
    ]
    for indent in (None, 2):
        path = write(tmp_path / "a.json", json.dumps(records, indent=indent))
        entries = read(path)
        assert outline(entries) == ["a#0", "mp-1", "!a#2", "!a#3", "!a#4", "a#5"]
        assert entries[1].properties == {"band_gap": 5.0}
        assert "Br" in entries[5].structure.formula


def test_lists_longer_than_the_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr("nanoos_fw.structure_files.pymatgen_json._CHUNK", 100)
    records = [salt(5 + i / 100).as_dict() for i in range(20)]
    entries = read(write(tmp_path / "a.json", json.dumps(records)))
    lengths = [entry.structure.lattice.a for entry in entries]
    assert lengths == pytest.approx([5 + i / 100 for i in range(20)])


@pytest.mark.parametrize("cut", [1, 2, 400, 1300])
def test_a_truncated_list_keeps_what_came_before(tmp_path, cut):
    text = json.dumps([salt().as_dict(), salt(5.7).as_dict()])
    entries = read(write(tmp_path / "a.json", text[:-cut]))
    assert entries[0].label == "a#0"
    assert isinstance(entries[0], StructureEntry)
    assert isinstance(entries[-1], EntryFailure)


def test_computed_entries_keep_their_energy_and_data(tmp_path):
    entry = ComputedStructureEntry(
        salt(), -27.2, correction=-1.0, entry_id="mp-1", data={"e_hull": 0.1, "x": None}
    )
    read_back = only(write(tmp_path / "a.json", json.dumps(entry.as_dict())))
    assert read_back.label == "mp-1"
    assert read_back.properties == {"energy": -27.2, "correction": -1.0, "e_hull": 0.1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson.gz"])
def test_json_lines(tmp_path, name):
    lines = [dumps(salt()), "{broken", dumps(salt(5.7))]
    data = "\n".join([*lines, "", ""]).encode()
    entries = read(
        write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    )
    assert outline(entries) == ["a#0", "!a#1", "a#2"]
    assert "record 2" in str(entries[1].error)


def test_json_lines_whose_first_line_is_broken(tmp_path):
    text = "\n".join(["{broken", dumps(salt())])
    assert outline(read(write(tmp_path / "a.json", text))) == ["!a#0", "a#1"]


def test_a_mapping_from_identifiers_to_structures(tmp_path):
    text = json.dumps({"x": salt().as_dict(), "y": {"structure": salt().as_dict()}})
    assert outline(read(write(tmp_path / "a.json", text))) == ["x", "y"]


def test_an_indented_document(tmp_path):
    only(write(tmp_path / "a.json", json.dumps(salt().as_dict(), indent=1)))


def test_json_does_not_import_the_classes_it_names(tmp_path):
    record = {"@module": "os", "@class": "system", "structure": salt().as_dict()}
    only(write(tmp_path / "a.json", json.dumps(record)))
    error = failure(write(tmp_path / "b.json", '{"@module": "os", "@class": "x"}'))
    assert error.evidence["keys"] == ["@class", "@module"]


def test_disorder_and_dummies_in_json_are_failures(tmp_path):
    mixed = Structure(Lattice.cubic(4), [{"Fe": 0.5, "Co": 0.5}], [[0, 0, 0]])
    dummy = Structure(Lattice.cubic(4), ["X"], [[0, 0, 0]])
    records = [mixed.as_dict(), dummy.as_dict()]
    entries = read(write(tmp_path / "a.json", json.dumps(records)))
    assert ["disordered" in str(entries[0].error), "X" in str(entries[1].error)] == [
        True,
        True,
    ]


# ------------------------------------------------------------------------ behaviour


def test_warnings_become_notes(tmp_path):
    path = write(tmp_path / "a.cif", minimal())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entry = only(path)
    assert caught == []
    assert any("Defaulting to P1" in note for note in entry.notes)
    assert len(set(entry.notes)) == len(entry.notes)


@pytest.mark.skipif(
    "NANO_OS_TEST_DATA" not in os.environ,
    reason="NANO_OS_TEST_DATA does not name a file of structures",
)
def test_a_real_file_reads_without_failure():
    entries = read(Path(os.environ["NANO_OS_TEST_DATA"]))
    failures = [entry for entry in entries if isinstance(entry, EntryFailure)]
    assert entries
    assert failures == []
    assert all(math.isfinite(v) for e in entries for v in e.properties.values())
