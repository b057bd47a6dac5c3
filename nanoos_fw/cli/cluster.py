"""``nanoos init`` and ``nanoos preflight``: set up a cluster, and check the set-up."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nanoos_fw.cli.common import add_json, finish, open_launchpad, print_json

_FOLDER = Path("nanoos-cluster")


def add_commands(commands: Any) -> None:
    """Add ``init`` and ``preflight``."""
    init = commands.add_parser(
        "init",
        help="write the files with which qlaunch runs campaigns on this cluster",
        description=(
            "Ask SLURM for its partitions, and write my_launchpad.yaml and, for each "
            "category of work (prep, train, infer, md), a folder with my_fworker.yaml, "
            "my_qadapter.yaml and FW_config.yaml. Start qlaunch in these folders. Or "
            "submit work.sh, a job array of workers that run fireworks of all "
            "categories, several at a time (nanoos work). "
            "Files that you have edited are not replaced."
        ),
    )
    init.add_argument(
        "--slurm", action="store_true", required=True, help="the queue is SLURM"
    )
    init.add_argument(
        "--dir",
        type=Path,
        default=_FOLDER,
        help="folder of the files, which all nodes see (default: %(default)s)",
    )
    init.add_argument(
        "--mongodb",
        metavar="URI",
        help="MongoDB server: a URI, or HOST:PORT, that compute nodes reach too",
    )
    init.add_argument(
        "--database", help="its database (default: that of the URI, or nanoos)"
    )
    init.add_argument(
        "-l",
        "--launchpad",
        type=Path,
        help="take the database from this my_launchpad.yaml instead",
    )
    init.add_argument("--partition", help="default: the cluster's default partition")
    init.add_argument("--account", help="account that is charged")
    init.add_argument("--qos", help="quality of service")
    init.add_argument(
        "--gpu",
        action="append",
        default=[],
        metavar="CATEGORY",
        help="category whose jobs get a GPU; may be given several times",
    )
    init.add_argument("--gpu-partition", help="partition of these categories")
    init.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="environment module that jobs load; may be given several times",
    )
    init.add_argument(
        "--pre-rocket",
        action="append",
        default=[],
        metavar="LINE",
        help="line of shell that jobs run first; may be given several times",
    )
    init.add_argument(
        "--max-jobs",
        type=int,
        metavar="N",
        help="the most jobs of yours that qlaunch puts into a partition (default: what "
        "SLURM's accounting allows you)",
    )
    init.add_argument("--mpi-launcher", help="see NANO_OS_MPI_LAUNCHER")
    init.add_argument("--work-dir", type=Path, help="see NANO_OS_WORK_DIR")
    init.add_argument(
        "--force", action="store_true", help="replace files that were edited"
    )
    add_json(init)
    init.set_defaults(command=_init)

    check = commands.add_parser(
        "preflight",
        help="check all that campaigns need here, and explain what is wrong",
        description=(
            "Check database, configuration, packages, MPI with two ranks, LAMMPS, "
            "processors, work directory and SLURM, on this machine; on a compute node "
            "with srun. The exit code is 1 if a check fails; warnings pass."
        ),
    )
    check.add_argument(
        "folder",
        type=Path,
        nargs="?",
        help="folder of 'nanoos init': its database, and its files against the cluster",
    )
    finish(check, _preflight)


def _init(arguments: argparse.Namespace) -> int:
    from nanoos_fw.errors import InputError
    from nanoos_fw.operations.campaign import prepare_launchpad
    from nanoos_fw.operations.cluster_files import (
        CATEGORIES,
        LAUNCHPAD_FILE,
        WORK_SCRIPT,
        ClusterChoices,
        launchpad_text,
        write_cluster_files,
    )
    from nanoos_fw.slurm import read_cluster
    from nanoos_fw.stores.database import load_launchpad, open_database

    if arguments.max_jobs is not None and arguments.max_jobs < 1:
        raise InputError(f"--max-jobs must be at least 1, not {arguments.max_jobs}")
    folder = arguments.dir.resolve()
    existing = arguments.launchpad or folder / LAUNCHPAD_FILE
    if arguments.mongodb:
        text = launchpad_text(arguments.mongodb, arguments.database)
    elif existing.is_file():
        text = existing.read_text(encoding="utf-8")
    else:
        raise InputError(
            "init does not know the database",
            advice="give --mongodb URI, or -l my_launchpad.yaml",
        )
    cluster = read_cluster()
    report = write_cluster_files(
        folder,
        cluster,
        text,
        ClusterChoices(
            partition=arguments.partition,
            gpu_partition=arguments.gpu_partition,
            gpu=tuple(arguments.gpu),
            account=arguments.account,
            qos=arguments.qos,
            modules=tuple(arguments.module),
            pre_rocket=tuple(arguments.pre_rocket),
            mpi_launcher=arguments.mpi_launcher,
            work_dir=arguments.work_dir.resolve() if arguments.work_dir else None,
            max_jobs=arguments.max_jobs,
        ),
        force=arguments.force,
    )
    launchpad = load_launchpad(folder / LAUNCHPAD_FILE)
    prepare_launchpad(launchpad)
    open_database(launchpad)
    if arguments.json:
        print_json(
            {
                "folder": str(folder),
                "cluster": cluster.name,
                "written": [str(path) for path in report.written],
                "unchanged": [str(path) for path in report.unchanged],
            }
        )
        return 0
    for path in report.written:
        print(f"wrote {path}")
    if report.unchanged:
        print(f"{len(report.unchanged)} files were as they should be")
    gpus = [p.name for p in cluster.partitions if p.gpus]
    if gpus and not arguments.gpu:
        print(f"partitions with GPUs: {', '.join(gpus)}; --gpu CATEGORY uses them")
    print(
        f"next: nanoos preflight {folder}, then in each of the folders "
        f"{', '.join(CATEGORIES)}:\n  qlaunch -r rapidfire\n"
        f"or, for many short fireworks, packed into a few jobs:\n"
        f"  sbatch --array=0-3 {folder / WORK_SCRIPT}"
    )
    return 0


def _preflight(arguments: argparse.Namespace) -> int:
    from nanoos_fw.operations.cluster_files import LAUNCHPAD_FILE
    from nanoos_fw.operations.preflight import preflight
    from nanoos_fw.settings import load_settings

    settings = load_settings()
    folder = arguments.folder
    if folder is not None:
        folder = folder.resolve()
        if arguments.launchpad is None:
            arguments.launchpad = folder / LAUNCHPAD_FILE
    checks = preflight(
        settings, lambda: open_launchpad(arguments, settings), folder=folder
    )
    failed = sum(check.status == "fail" for check in checks)
    if arguments.json:
        print_json({"passed": not failed, "checks": [c.to_dict() for c in checks]})
        return 1 if failed else 0
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.status:4}  {check.name:{width}}  {check.evidence}")
        if check.next_step:
            print(f"{'':{6 + width}}  next: {check.next_step}")
    warned = sum(check.status == "warn" for check in checks)
    print(f"{len(checks)} checks: {failed} failed, {warned} warnings")
    return 1 if failed else 0
