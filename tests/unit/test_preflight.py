"""Each check of ``nanoos preflight`` on what it is to find."""

from __future__ import annotations

import json
from collections import namedtuple
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo.errors import ServerSelectionTimeoutError

from nanoos_fw.cli import main
from nanoos_fw.errors import LaunchError, SimulationError
from nanoos_fw.md.installed import InstalledLammps
from nanoos_fw.md.rank_probe import mpi_libraries
from nanoos_fw.operations import cluster_checks, preflight
from nanoos_fw.operations.checks import Check
from nanoos_fw.operations.cluster_files import (
    ClusterChoices,
    launchpad_text,
    write_cluster_files,
)
from nanoos_fw.parallel import Resources
from nanoos_fw.settings import Settings
from nanoos_fw.slurm import parse_cluster
from nanoos_fw.stores.database import open_database

Usage = namedtuple("Usage", "total used free")
TWO = Resources(ranks=2)
CLUSTER = parse_cluster(
    partitions="PartitionName=cpu Default=YES MaxNodes=2 MaxTime=12:00:00 State=UP\n",
    nodes="cpu|n1|16|64000|(null)|idle\ncpu|n2|16|64000|(null)|idle\n",
    config="ClusterName = mat\n",
)


def write(folder: Path) -> None:
    server = launchpad_text("mongodb://db.example.org:27017")
    write_cluster_files(folder, CLUSTER, server, ClusterChoices())


def rank(**changes: Any) -> dict[str, Any]:
    seen = {
        "host": "n1",
        "ranks": 2,
        "mpi": "MPICH Version: 5",
        "mpi_libraries": ["/usr/lib/libmpi.so.12"],
        "lammps_ranks": 2,
        "lammps_version": 20250722,
        "processors": [0, 1],
    }
    return {**seen, **changes}


def assert_fails(check: Check, *words: str) -> None:
    assert check.status == "fail"
    assert check.next_step
    for word in words:
        assert word in check.evidence


# ------------------------------------------------------------------------- packages


def test_packages_of_this_environment_are_as_required() -> None:
    check = preflight.check_packages()

    assert check.status == "ok", check.evidence
    assert "fireworks" in check.evidence
    assert "mongomock" not in check.evidence  # of an extra


def test_missing_and_old_packages_fail() -> None:
    check = preflight.check_packages(
        ["numpy>=999.1", "no-such-package>=1", 'mongomock>=999; extra == "embedded"']
    )

    assert_fails(check, "is older than 999.1", "no-such-package is not installed")
    assert "mongomock" not in check.evidence


def test_a_stray_configuration_that_hides_the_one_meant_fails(tmp_path: Path) -> None:
    (tmp_path / "FW_config.yaml").write_text("{}")
    other = tmp_path / "other" / "FW_config.yaml"
    other.parent.mkdir()
    other.write_text("{}")

    alone = preflight.check_fireworks_config(tmp_path, {})
    same = preflight.check_fireworks_config(
        other.parent, {"FW_CONFIG_FILE": str(other)}
    )
    hidden = preflight.check_fireworks_config(tmp_path, {"FW_CONFIG_FILE": str(other)})
    gone = preflight.check_fireworks_config(tmp_path, {"FW_CONFIG_FILE": "/no/file"})

    assert (alone.status, same.status) == ("ok", "ok")
    assert_fails(hidden, f"reads {tmp_path / 'FW_config.yaml'}", str(other))
    assert_fails(gone, "/no/file")


def test_two_configurations_of_which_none_is_named_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    for folder in (tmp_path, home / ".fireworks"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "FW_config.yaml").write_text("{}")
    monkeypatch.setenv("HOME", str(home))

    check = preflight.check_fireworks_config(tmp_path, {})

    assert check.status == "warn"
    assert f"and not {home / '.fireworks' / 'FW_config.yaml'}" in check.evidence


def test_no_problem_is_told_without_a_next_step() -> None:
    with pytest.raises(ValueError, match="no next step"):
        Check("clock", "warn", "the server does not tell its time")


# ------------------------------------------------------------------------- database


def test_a_prepared_database_passes_and_is_left_as_it_was(
    embedded_database: Any,
) -> None:
    open_database(LaunchPadLike(embedded_database))
    embedded_database["fw_id_assigner"].insert_one({"next_fw_id": 1})
    before = {
        n: list(embedded_database[n].find())
        for n in embedded_database.list_collection_names()
    }

    assert preflight.check_round_trip(embedded_database).status == "ok"
    assert preflight.check_schema(embedded_database).status == "ok"

    after = {
        n: list(embedded_database[n].find())
        for n in embedded_database.list_collection_names()
    }
    assert after == before


class LaunchPadLike:
    def __init__(self, database: Any) -> None:
        self.db = database


def test_what_a_database_lacks_fails(embedded_database: Any) -> None:
    assert_fails(preflight.check_schema(embedded_database), "never prepared")
    embedded_database["fw_id_assigner"].insert_one({"next_fw_id": 1})
    assert_fails(preflight.check_schema(embedded_database), "no schema")
    open_database(LaunchPadLike(embedded_database))
    embedded_database["predictions"].drop_indexes()
    assert_fails(
        preflight.check_schema(embedded_database), "predictions(model, structure)"
    )
    embedded_database["nanoos_schema"].update_one(
        {"_id": "schema"}, {"$set": {"version": 1}}
    )
    check = preflight.check_schema(embedded_database)
    assert_fails(check, "schema 1")
    assert check.next_step == "nanoos db migrate"


def test_a_database_that_forgets_fails(
    embedded_database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = embedded_database["nanoos_schema"]
    monkeypatch.setattr(type(collection), "find_one", lambda *_args: None)

    assert_fails(preflight.check_round_trip(embedded_database), "reads back as None")


def test_a_server_that_is_away_fails_each_check_that_asks_it() -> None:
    class Away:
        name = "nanoos"
        admin = property(lambda self: self)

        def __getitem__(self, _name: str) -> Any:
            return self

        def __getattr__(self, _name: str) -> Any:
            def refuse(*_args: Any, **_options: Any) -> Any:
                raise ServerSelectionTimeoutError("connection refused")

            return refuse

    for check in (
        preflight.check_round_trip(Away()),
        preflight.check_schema(Away()),
        preflight.check_clock(Away()),
    ):
        assert_fails(check, "connection refused")


def test_a_database_of_a_newer_release_asks_for_that(embedded_database: Any) -> None:
    embedded_database["nanoos_schema"].insert_one({"_id": "schema", "version": 999})

    check = preflight.check_schema(embedded_database)

    assert_fails(check, "schema 999")
    assert check.next_step == "upgrade nanoos_fw here"


class Server:
    """Answers ``hello`` with its own time."""

    def __init__(self, ahead_s: float | None) -> None:
        self.admin = self
        self.ahead_s = ahead_s

    def command(self, name: str) -> dict[str, Any]:
        assert name == "hello"
        if self.ahead_s is None:
            return {}
        now = datetime.now(UTC) + timedelta(seconds=self.ahead_s)
        return {"localTime": now.replace(tzinfo=None)}  # as pymongo gives it


@pytest.mark.parametrize(
    ("ahead_s", "status"),
    [(0, "ok"), (-10, "warn"), (10, "warn"), (-3600, "fail"), (3600, "fail")],
)
def test_clocks_are_compared(ahead_s: float, status: str) -> None:
    check = preflight.check_clock(Server(ahead_s))

    assert check.status == status
    assert (check.next_step is None) == (status == "ok")


def test_a_server_without_a_clock_is_a_warning() -> None:
    assert preflight.check_clock(Server(None)).status == "warn"


# --------------------------------------------------------------------- this machine


def test_a_work_directory_is_tried_and_left_clean(tmp_path: Path) -> None:
    work = tmp_path / "not" / "yet"

    check = preflight.check_work_dir(work, lambda _: Usage(0, 0, 2**40))

    assert check.status == "ok"
    assert "1024.0 GiB" in check.evidence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "status"), [(2**30, "warn"), (1000, "fail")])
def test_little_space_is_seen(tmp_path: Path, free: int, status: str) -> None:
    check = preflight.check_work_dir(tmp_path, lambda _: Usage(0, 0, free))

    assert check.status == status
    assert check.next_step


def test_a_work_directory_that_is_no_folder_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert_fails(preflight.check_work_dir(tmp_path / "file"), "cannot write")


def test_a_work_directory_that_loses_what_is_written_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "write_atomic", lambda path, _: path.write_text(""))

    assert_fails(preflight.check_work_dir(tmp_path), "loses what is written")


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_args: Any) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)

    check = preflight.check_work_dir(tmp_path, lambda _: Usage(0, 0, 2**40))

    assert check.status == "warn"
    assert "no locks" in check.evidence


def test_a_lammps_that_does_not_start_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_command: str | None) -> Any:
        raise SimulationError("libmpi.so.12: cannot open shared object file")

    monkeypatch.setattr("nanoos_fw.md.installed.installed_lammps", broken)

    assert_fails(preflight.check_lammps(None), "libmpi.so.12")


def test_a_lammps_without_the_styles_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "nanoos_fw.md.installed.installed_lammps",
        lambda _: InstalledLammps("1", frozenset({"lj/cut"}), frozenset({"nve"})),
    )

    check = preflight.check_lammps(None)

    assert_fails(check, "pair_style eam/alloy", "fix npt")
    assert "fix nve" not in check.evidence


def test_a_command_that_is_not_lammps_fails() -> None:
    assert_fails(preflight.check_lammps("/no/such/lmp"), "/no/such/lmp")


def test_processors_are_compared_with_the_settings() -> None:
    settings = Settings(ranks=4, threads=2)

    def status(cpus: int, **environ: str) -> str:
        return preflight.check_processors(settings, environ, cpus).status

    assert status(8) == "ok"
    assert status(7) == "warn"
    assert status(7, SLURM_JOB_NUM_NODES="2") == "ok"
    assert status(8, OMP_NUM_THREADS="2") == "ok"
    assert status(8, OMP_NUM_THREADS="8") == "warn"


# ------------------------------------------------------------------------------ MPI


def test_ranks_that_see_each_other_pass() -> None:
    check = preflight.judge_ranks([rank(), rank()], ["mpiexec"], TWO)

    assert check.status == "ok"


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([rank(ranks=1)], "2 ranks were started by mpiexec, 1 saw each other"),
        ([rank(lammps_ranks=1)] * 2, "mpi4py sees 2 ranks, LAMMPS 1"),
        (
            [rank(), rank(mpi_libraries=["/a/libmpi.so.12", "/b/libmpi.so.40"])],
            "/b/libmpi.so.40",
        ),
        ([rank(), rank(lammps_version=20200303)], "ranks differ"),
    ],
)
def test_ranks_that_do_not_fit_fail(ranks: list[Any], words: str) -> None:
    assert_fails(preflight.judge_ranks(ranks, ["mpiexec"], TWO), words)


def test_ranks_on_one_processor_are_a_warning() -> None:
    bound = [rank(processors=[0]), rank(processors=[0])]
    apart = [rank(processors=[0]), rank(processors=[0], host="n2")]

    assert preflight.judge_ranks(bound, ["srun"], TWO).status == "warn"
    assert preflight.judge_ranks(apart, ["srun"], TWO).status == "ok"


def test_a_launcher_that_is_missing_or_fails_is_named() -> None:
    gone = preflight.check_ranks(Settings(mpi_launcher="no-such-mpiexec"))
    broken = preflight.check_ranks(Settings(mpi_launcher="false"))

    assert_fails(gone, "no-such-mpiexec")
    assert_fails(broken)


def test_mpi_libraries_are_told_from_others(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    lines = [
        "7f00-7f01 r-xp 0 08:01 1  /opt/mpich/lib/libmpi.so.12.3.0",
        "7f02-7f03 r--p 0 08:01 1  /opt/mpich/lib/libmpi.so.12.3.0",
        "7f04-7f05 r-xp 0 08:01 2  /opt/open mpi/libmpi.so.40",
        "7f06-7f07 r-xp 0 08:01 3  /opt/lib/libmpi_mpifh.so.40",
        "7f08-7f09 r-xp 0 08:01 4  /site/mpi4py/MPI.mpich.so",
        "7f0a-7f0b rw-p 0 00:00 0 ",
    ]
    maps.write_text("\n".join(lines))

    assert mpi_libraries(maps) == [
        "/opt/mpich/lib/libmpi.so.12.3.0",
        "/opt/open mpi/libmpi.so.40",
    ]


# ---------------------------------------------------------------------------- SLURM


def test_files_of_categories_are_held_against_the_cluster(tmp_path: Path) -> None:
    write(tmp_path)
    adapter = tmp_path / "md" / "my_qadapter.yaml"
    good = adapter.read_text()

    def check() -> Check:
        return cluster_checks.check_category(tmp_path, "md", CLUSTER)

    assert check().status == "ok", check().evidence
    adapter.write_text(good.replace("nodes: 1", "nodes: 3"))
    assert_fails(check(), "3 nodes exceed")
    adapter.write_text(good.replace("nodes: 1", "node: 1"))
    assert_fails(check(), "node:")
    adapter.write_text(good.replace("nodes: 1", "nodes: [1"))
    assert_fails(check(), str(adapter))
    adapter.write_text(good)
    fworker = tmp_path / "md" / "my_fworker.yaml"
    fworker.write_text(fworker.read_text().replace('"md"', '"train"'))
    assert_fails(check(), "takes 'train', not 'md'")


def test_a_folder_without_its_files_fails(tmp_path: Path) -> None:
    (check,) = cluster_checks.check_slurm(tmp_path)

    assert_fails(check, "my_launchpad.yaml")


def test_slurm_is_not_asked_for_where_it_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (unused,) = cluster_checks.check_slurm(None)
    write(tmp_path / "cluster")
    (wanted,) = cluster_checks.check_slurm(tmp_path / "cluster")

    assert unused.status == "ok"
    assert_fails(wanted, "no sbatch")


def test_a_controller_that_does_not_answer_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_answer() -> Any:
        raise LaunchError("scontrol: did not answer", advice="wait")

    monkeypatch.setattr("nanoos_fw.slurm.read_cluster", no_answer)
    monkeypatch.setattr("shutil.which", lambda *_args, **_kwargs: "/usr/bin/sbatch")

    (check,) = cluster_checks.check_slurm(None)

    assert_fails(check, "did not answer")


@pytest.mark.parametrize(
    ("state", "accounting", "status", "words"),
    [
        ("DOWN", "slurmdbd", "fail", "no partition is up"),
        ("UP", "none", "warn", "no accounting"),
        ("UP", "slurmdbd", "ok", "partitions: cpu"),
    ],
)
def test_a_cluster_that_runs_no_jobs_or_forgets_them_is_told(
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    accounting: str,
    status: str,
    words: str,
) -> None:
    cluster = parse_cluster(
        partitions=f"PartitionName=cpu Default=YES State={state}\n",
        nodes="cpu|n1|16|64000|(null)|idle\n",
        config="ClusterName = mat\n"
        f"AccountingStorageType = accounting_storage/{accounting}\n",
    )
    monkeypatch.setattr("nanoos_fw.slurm.read_cluster", lambda: cluster)
    monkeypatch.setattr("shutil.which", lambda *_args, **_kwargs: "/usr/bin/sbatch")

    (check,) = cluster_checks.check_slurm(None)

    assert check.status == status
    assert words in check.evidence
    assert (check.next_step is None) == (status == "ok")


def test_files_for_another_adapter_or_that_are_gone_fail(tmp_path: Path) -> None:
    write(tmp_path)
    folder = tmp_path / "md"
    (folder / "my_fworker.yaml").unlink()
    assert_fails(
        cluster_checks.check_category(tmp_path, "md", CLUSTER), "FileNotFoundError"
    )
    (folder / "my_qadapter.yaml").write_text(
        "_fw_name: CommonAdapter\n_fw_q_type: SLURM\nrocket_launch: rlaunch\n"
    )
    assert_fails(
        cluster_checks.check_category(tmp_path, "md", CLUSTER),
        "is for CommonAdapter",
    )


# --------------------------------------------------------------------- command line


def test_a_failure_is_the_exit_code_and_stops_no_other_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANO_OS_MPI_LAUNCHER", "no-such-mpiexec")

    assert main(["preflight", "--json", "-l", str(tmp_path / "none.yaml")]) == 1

    answer = json.loads(capsys.readouterr().out)
    found = {check["name"]: check["status"] for check in answer["checks"]}
    assert not answer["passed"]
    assert found["database"] == found["MPI"] == "fail"
    assert found["packages"] == found["LAMMPS"] == "ok"
    assert list(tmp_path.iterdir()) == []
