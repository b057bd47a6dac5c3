"""``nanoos preflight`` with two real ranks, LAMMPS, and a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoos_fw.cli import main
from nanoos_fw.operations import prepare_launchpad
from nanoos_fw.operations.preflight import check_ranks
from nanoos_fw.settings import Settings
from nanoos_fw.stores.database import load_launchpad, open_database

pytestmark = [pytest.mark.mongodb, pytest.mark.mpi, pytest.mark.lammps]


def test_this_installation_passes(
    mongodb_database: Any,
    my_launchpad: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launchpad = load_launchpad(my_launchpad)
    words = ["preflight", "--json", "-l", str(my_launchpad)]

    assert main(words) == 1
    unprepared = json.loads(capsys.readouterr().out)
    prepare_launchpad(launchpad)
    open_database(launchpad)
    before = {
        name: mongodb_database[name].count_documents({})
        for name in mongodb_database.list_collection_names()
    }
    code = main(words)
    prepared = json.loads(capsys.readouterr().out)

    failed = [c["name"] for c in unprepared["checks"] if c["status"] == "fail"]
    assert failed == ["schema"], unprepared
    assert code == 0, prepared
    assert prepared["passed"]
    found = {check["name"]: check["evidence"] for check in prepared["checks"]}
    assert "2 ranks by" in found["MPI"]
    assert "sees 2" in found["MPI"]
    assert mongodb_database.name in found["database"]
    after = {
        name: mongodb_database[name].count_documents({})
        for name in mongodb_database.list_collection_names()
    }
    assert after == before
    assert list(tmp_path.iterdir()) == [my_launchpad]


def test_a_launcher_of_another_mpi_is_found_out(tmp_path: Path) -> None:
    """It starts two processes, each of which believes to be alone."""
    launcher = tmp_path / "mpirun"
    launcher.write_text('#!/bin/sh\nshift 2\n"$@" & "$@"\nwait\n')
    launcher.chmod(0o755)

    check = check_ranks(Settings(mpi_launcher=str(launcher)))

    assert check.status == "fail"
    assert "2 ranks were started by" in check.evidence
    assert "1 saw each other" in check.evidence
