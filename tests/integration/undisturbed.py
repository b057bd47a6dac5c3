"""The campaign that nothing happened to, with which the cells of the matrix compare."""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slurm_faults as cluster
from pymongo import MongoClient
from small_campaign import small_plan

from nanoos_fw.provenance import write_atomic
from nanoos_fw.stores.database import load_launchpad

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Reference:
    """The campaign that nothing happened to."""

    uri: str
    database: str
    folder: Path

    @property
    def work(self) -> Path:
        """Root of its work directories."""
        return self.folder / "work"


def make_reference(uri: str, folder: Path) -> Reference:
    """Run the campaign once; again it is found."""
    done = folder / "reference.json"
    if done.exists():
        return Reference(uri, json.loads(done.read_text())["database"], folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reference = Reference(uri, f"nanoos_matrix_{uuid.uuid4().hex[:10]}", folder)
    launchpad = launchpad_of(folder, uri, reference.database)
    from nanoos_fw import demo

    few = {"relaxations_per_firework": 60, "structures_per_firework": 60, "md_runs": 1}
    demo.submit(launchpad, small_plan(folder).model_copy(update=few), verify=False)
    words = ["work", "-l", folder / "my_launchpad.yaml", "--dir", folder / "launches"]
    words += ["--idle", "1"]
    cluster.run(BIN / "nanoos", *words, timeout=900, cwd=folder, env=environment())
    states = Counter(d["state"] for d in launchpad.db["fireworks"].find())
    if set(states) != {"COMPLETED"}:
        raise RuntimeError(f"the undisturbed campaign ended with {dict(states)}")
    write_atomic(done, json.dumps({"database": reference.database}))
    return reference


def drop_reference(reference: Reference) -> None:
    """Forget the campaign."""
    with MongoClient[dict[str, Any]](reference.uri) as client:
        client.drop_database(reference.database)
    shutil.rmtree(reference.folder)


def environment() -> dict[str, str]:
    """Return the environment of commands, without the user's own settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("NANO_OS_") or name == "NANO_OS_MPI_LAUNCHER"
    }
    return {**kept, "NANO_OS_RANKS": "2"}


def launchpad_of(folder: Path, uri: str, database: str) -> Any:
    """Write my_launchpad.yaml into a folder and return what it describes."""
    path = folder / "my_launchpad.yaml"
    path.write_text(
        f"host: {uri.rstrip('/')}/{database}\nname: {database}\nuri_mode: true\n"
    )
    return load_launchpad(path)
