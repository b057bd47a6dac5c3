"""Bad input gets one clear message and an exit code, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanoos_fw.cli import main


def nanoos(*words: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as users do; the embedded database needs its own process."""
    return subprocess.run(
        [sys.executable, "-m", "nanoos_fw.cli", *words],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **environ},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def one_message(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    return done.stderr


def launchpad(folder: Path, text: str) -> str:
    path = folder / "my_launchpad.yaml"
    path.write_text(text)
    return str(path)


def test_an_unreachable_server_is_named_without_its_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = "mongodb://user:secret@127.0.0.1:1/?serverSelectionTimeoutMS=100"
    path = launchpad(tmp_path, f"host: {uri}\nname: x\nuri_mode: true\n")
    assert main(["status", "-l", path]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: no answer from the MongoDB server at mongodb://")
    assert "127.0.0.1:1" in message
    assert "secret" not in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("host: localhost\nport: abc\nname: x\n", "port"),
        ("host: localhost\nport: 99999999\nname: x\n", "port"),
        ("host: 'mongodb://['\nname: x\nuri_mode: true\n", "no database connection"),
        ("name: x\n", "no 'host'"),
        ("host: [\n", "cannot read"),
        ("- a\n", "no 'host'"),
    ],
)
def test_a_launchpad_file_of_garbage_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: str
) -> None:
    assert main(["status", "-l", launchpad(tmp_path, text)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert named in message
    assert "my_launchpad.yaml" in message


def test_a_missing_launchpad_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "-l", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml does not exist" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from nanoos_fw.errors import InputError

    with pytest.raises(InputError):
        main(["--debug", "status", "-l", str(tmp_path / "none.yaml")])


def test_a_missing_launcher_is_named_before_anything_runs(tmp_path: Path) -> None:
    done = nanoos("demo", cwd=tmp_path, NANO_OS_MPI_LAUNCHER="no-such-mpiexec")
    message = one_message(done)
    assert "no-such-mpiexec" in message
    assert "NANO_OS_MPI_LAUNCHER" in message
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_setting_is_named(tmp_path: Path) -> None:
    done = nanoos("demo", cwd=tmp_path, NANO_OS_RANK="2")
    assert "NANO_OS_RANK:" in one_message(done)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = nanoos("demo", "--dir", "file/demo", cwd=tmp_path)
    assert "cannot write in" in one_message(done)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot write in" in one_message(nanoos("demo", cwd=tmp_path))


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    done = nanoos("demo", "--dir", ".", cwd=tmp_path)
    assert "holds something else" in one_message(done)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_broken_embedded_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "database.json").write_text('{"fireworks": ')
    message = one_message(nanoos("status", "-l", ".", cwd=tmp_path))
    assert "database.json is not an embedded database" in message
    assert (tmp_path / "database.json").read_text() == '{"fireworks": '


def test_a_server_cannot_be_named_inside_an_embedded_folder(tmp_path: Path) -> None:
    """FireWorks takes the FW_config.yaml of the current folder, whatever -l says."""
    database = tmp_path / "database.json"
    database.write_text("{}")
    config = f"MONGOMOCK_SERVERSTORE_FILE: {database}\n"
    (tmp_path / "FW_config.yaml").write_text(config)
    server = launchpad(tmp_path, "host: localhost\nport: 27017\nname: x\n")
    done = nanoos("status", "-l", server, cwd=tmp_path)
    assert "configured for the embedded database" in one_message(done)
    (tmp_path / "my_launchpad.yaml").unlink()
    inside = nanoos("status", cwd=tmp_path)
    assert inside.returncode == 0, inside.stderr
    assert inside.stdout.strip().endswith("none")


def test_entries_that_cannot_be_used_do_not_stop_the_rest(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "database.json").write_text("{}")
    files = tmp_path / "files"
    files.mkdir()
    good = "Cu\n3.6\n1 0 0\n0 1 0\n0 0 1\nCu Au\n1 1\ndirect\n0 0 0\n0.5 0.5 0.5\n"
    (files / "POSCAR").write_text(good)
    (files / "POSCAR.again.vasp").write_text(good)
    (files / "POSCAR.unknown.vasp").write_text(good.replace("Cu Au", "Cu Zz"))
    (files / "POSCAR.close.vasp").write_text(good.replace("0.5 0.5 0.5", "0 0 0.01"))
    (files / "corrupt.cif").write_text("data_x\n_cell_length_a 3.6\nloop_\n")
    done = nanoos(
        "import", "files", "nowhere.cif", "--set", "mine", "-l", "db", cwd=tmp_path
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused")]
    assert len(refused) == 4, done.stdout
    for name in ("unknown", "close", "corrupt", "nowhere"):
        assert any(name in line for line in refused), done.stdout
    assert done.stdout.splitlines()[-1] == (
        "6 entries: 1 added to set 'mine', 1 duplicates, 4 refused"
    )
    again = nanoos("import", "files/POSCAR", "-l", "db", cwd=tmp_path)
    assert again.returncode == 0
    assert "0 added" in again.stdout
    assert "1 duplicates" in again.stdout


def test_the_property_of_a_cgcnn_folder_gets_its_name(tmp_path: Path) -> None:
    from pymatgen.core import Lattice, Structure

    from nanoos_fw.stores.structures import StructureStore

    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "database.json").write_text("{}")
    folder = tmp_path / "gaps"
    folder.mkdir()
    salt = Structure(Lattice.cubic(4.1), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    (folder / "a1.cif").write_text(salt.to(fmt="cif"))
    (folder / "id_prop.csv").write_text("a1,5.25\nmissing,1.0\n")
    done = nanoos("import", "gaps", "--target", "bandgap", "-l", "db", cwd=tmp_path)
    assert done.returncode == 1  # one CIF is missing, and said to be
    assert "missing" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("2 entries: 1 added")
    import mongomock
    from bson import json_util

    stored = json_util.loads((tmp_path / "db" / "database.json").read_text())
    database = mongomock.MongoClient()["x"]
    for _, document in stored["fireworks"]["structures"]["documents"]:
        database["structures"].insert_one(document)
    (key,) = StructureStore(database).keys("imported")
    entry = StructureStore(database).get_many([key])[key]
    assert entry.properties == {"bandgap": 5.25}
    assert entry.formula == "CsCl"
