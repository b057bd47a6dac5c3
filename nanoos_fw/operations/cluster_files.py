"""The files with which ``qlaunch`` runs campaigns on a cluster, one folder a category.

A campaign has four kinds of work with needs of their own; each firework names its kind
in ``_category``:

``prep``
    structures, features, datasets, reports: one task
``train``
    MPI ranks of the training
``infer``
    screening: one task with threads
``md``
    MPI ranks of LAMMPS

``work.sh`` is a job array of packed workers for all of them, see
``operations.workers``.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from nanoos_fw.errors import InputError
from nanoos_fw.provenance import write_atomic
from nanoos_fw.slurm import (
    Cluster,
    Partition,
    batch_script,
    check_request,
    run_slurm,
    slurm_request,
)
from nanoos_fw.templates import render_template

CATEGORIES = ("prep", "train", "infer", "md")
_WALLTIME_H = {"prep": 4, "train": 24, "infer": 4, "md": 24}
_MAX_RANKS = {"train": 4, "md": 4}
_MAX_THREADS = 4
MAX_JOBS = "max_jobs"  # for the queue adapter, not for SLURM
LAUNCHPAD_FILE, FWORKER_FILE = "my_launchpad.yaml", "my_fworker.yaml"
QADAPTER_FILE, CONFIG_FILE = "my_qadapter.yaml", "FW_config.yaml"
WORK_SCRIPT, GPU_WORK_SCRIPT, WORK_DIR = "work.sh", "work-gpu.sh", "work"
_WORK_WALLTIME_H = 24


@dataclass(frozen=True)
class ClusterChoices:
    """What the user decides of the files; the rest follows from the cluster.

    Parameters
    ----------
    partition
        Of all categories; None for the default one of the cluster.
    gpu_partition
        Of the categories in ``gpu``.
    gpu
        Categories whose jobs ask for one GPU.
    modules
        Environment modules that jobs load.
    pre_rocket
        Further lines of shell before the work.
    mpi_launcher
        See the setting of this name.
    max_jobs
        The most jobs of the user in a partition, as qlaunch counts them.
    """

    partition: str | None = None
    gpu_partition: str | None = None
    gpu: tuple[str, ...] = ()
    account: str | None = None
    qos: str | None = None
    modules: tuple[str, ...] = ()
    pre_rocket: tuple[str, ...] = ()
    mpi_launcher: str | None = None
    work_dir: Path | None = None
    max_jobs: int | None = None


@dataclass
class WrittenFiles:
    """What became of each file."""

    written: list[Path] = field(default_factory=list)
    unchanged: list[Path] = field(default_factory=list)


def launchpad_text(uri: str, database: str | None = None) -> str:
    """Return a ``my_launchpad.yaml`` for a server.

    Parameters
    ----------
    uri
        ``mongodb://...`` or a host name, perhaps with ``:port``.
    database
        Name of the database; None for the one in the URI, or ``nanoos``.
    """
    uri_mode = "://" in uri
    host, port = uri, 27017
    name = database or "nanoos"
    if uri_mode:
        if not uri.startswith(("mongodb://", "mongodb+srv://")):
            raise InputError(f"{uri.partition('://')[0]!r} is no scheme of MongoDB")
        parts = urlsplit(uri)
        named = parts.path.strip("/")
        if named and database and named != database:
            raise InputError(
                f"the URI names the database {named!r}, and --database {database!r}",
                advice="if the first one is for signing in, write ?authSource=",
            )
        name = named or name
        host = urlunsplit(parts._replace(path=f"/{name}"))  # FireWorks reads it there
    elif ":" in uri:
        host, _, text = uri.rpartition(":")
        if not text.isdigit():
            raise InputError(f"{text!r} is no port", advice="write HOST:PORT")
        port = int(text)
    return render_template(
        "config/my_launchpad.yaml",
        host=json.dumps(host),
        port=port,
        name=json.dumps(name),
        username="null",
        password="null",
        uri_mode=json.dumps(uri_mode),
    )


def default_request(
    category: str, cluster: Cluster, choices: ClusterChoices
) -> dict[str, Any]:
    """Return the fields of a category's ``my_qadapter.yaml`` for a cluster."""
    on_gpu = category in choices.gpu
    name = choices.gpu_partition if on_gpu else choices.partition
    partition = _gpu_partition(cluster) if on_gpu and name is None else None
    partition = partition or cluster.partition(name)
    if not partition.nodes:
        raise InputError(
            f"partition {partition.name!r} has no nodes",
            advice="choose another one with --partition",
        )
    cpus = min(node.cpus for node in partition.usable)
    # A node without a configured memory has 1 MiB: what jobs get is not limited by it.
    share = min(node.memory_mib // node.cpus for node in partition.usable)
    most_s = _longest_s(cluster, partition, choices)
    request: dict[str, Any] = {
        "queue": partition.name,
        "account": choices.account,
        "qos": choices.qos,
        "nodes": max(1, partition.min_nodes),
        "ntasks": min(cpus, _MAX_RANKS.get(category, 1)),
        "cpus_per_task": min(cpus, _MAX_THREADS) if category == "infer" else 1,
        "mem_per_cpu": f"{share}M" if share > 1 else None,
        "gpus_per_node": 1 if on_gpu else None,
        "walltime": _walltime(min(_WALLTIME_H[category] * 3600.0, most_s)),
        "requeue": False,
    }
    return {name: value for name, value in request.items() if value is not None}


def _longest_s(
    cluster: Cluster, partition: Partition, choices: ClusterChoices
) -> float:
    chosen = {"account": choices.account, "qos": choices.qos}
    request = slurm_request({k: v for k, v in chosen.items() if v is not None})
    return cluster.longest_s(request, partition)


def write_cluster_files(
    folder: Path,
    cluster: Cluster,
    launchpad: str,
    choices: ClusterChoices,
    *,
    force: bool = False,
) -> WrittenFiles:
    """Write ``my_launchpad.yaml``, the three files of each category, and ``work.sh``.

    Files that exist with the same content are left alone; others are refused, unless
    ``force``: people edit them.

    Raises
    ------
    InputError
        If a file exists with other content, a choice names what the cluster does not
        have, or a request would not fit its partition.
    """
    unknown = set(choices.gpu) - set(CATEGORIES)
    if unknown:
        raise InputError(
            f"no category {', '.join(sorted(unknown))}",
            advice=f"categories: {', '.join(CATEGORIES)}",
        )
    folder = folder.resolve()
    texts: dict[Path, str] = {folder / LAUNCHPAD_FILE: launchpad}
    for category in CATEGORIES:
        request = default_request(category, cluster, choices)
        place = folder / category
        texts[place / FWORKER_FILE] = render_template(
            "config/my_fworker.yaml",
            name=json.dumps(f"{cluster.name}-{category}"),
            category=json.dumps(category),
        )
        texts[place / CONFIG_FILE] = render_template(
            "config/FW_config.yaml",
            launchpad=json.dumps(str(folder / LAUNCHPAD_FILE)),
            fworker=json.dumps(str(place / FWORKER_FILE)),
            qadapter=json.dumps(str(place / QADAPTER_FILE)),
        )
        pre_rocket = _pre_rocket(place, choices)
        rocket = _rocket_launch(folder, place)
        check_request(
            slurm_request(
                {**request, "pre_rocket": pre_rocket, "rocket_launch": rocket}
            ),
            cluster,
            f"category {category!r}",
        )
        if choices.max_jobs is not None:
            request = {**request, MAX_JOBS: choices.max_jobs}
        texts[place / QADAPTER_FILE] = render_template(
            "config/my_qadapter.yaml",
            fields="\n".join(f"{k}: {json.dumps(v)}" for k, v in request.items()),
            pre_rocket="\n".join(f"  {line}" for line in pre_rocket.splitlines()),
            rocket_launch=json.dumps(rocket),
        )
    cpu = tuple(c for c in CATEGORIES if c not in choices.gpu)
    for name, categories in ((WORK_SCRIPT, cpu), (GPU_WORK_SCRIPT, choices.gpu)):
        if categories:
            texts[folder / name] = _work_script(folder, cluster, choices, categories)
    return _write(folder, texts, force)


def _work_script(
    folder: Path,
    cluster: Cluster,
    choices: ClusterChoices,
    categories: Sequence[str],
) -> str:
    """Return the batch script of an array of packed workers, each with a whole node."""
    request = default_request(categories[0], cluster, choices)
    partition = cluster.partition(request["queue"])
    cpus = min(node.cpus for node in partition.usable)
    gpus = None
    if categories[0] in choices.gpu:
        gpus = min(node.gpus for node in partition.usable) or 1
    # As many slots as fit with the ranks that a job of its own would have.
    slots = gpus or max(1, cpus // max(_MAX_RANKS.values()))
    request |= {
        "job_name": "nanoos_work",
        "ntasks": cpus,
        "cpus_per_task": 1,
        "gpus_per_node": gpus,
        "walltime": _walltime(
            min(_WORK_WALLTIME_H * 3600.0, _longest_s(cluster, partition, choices))
        ),
        "array": "0-0",  # sbatch --array=0-9 goes before it
        "signal": "B:USR1@120",
        "pre_rocket": _pre_rocket(folder / categories[0], choices),
        "rocket_launch": _work_command(folder, categories, slots),
    }
    checked = slurm_request({k: v for k, v in request.items() if v is not None})
    check_request(checked, cluster, "the packed workers")
    return batch_script(checked, str(folder / WORK_DIR))


def submit_workers(folder: Path) -> str:
    """Submit ``work.sh`` of a folder of ``nanoos init``; return the job's number.

    Raises
    ------
    InputError
        If the folder has no such script.
    LaunchError
        With the words of ``sbatch``.
    """
    script = folder / WORK_SCRIPT
    if not script.is_file():
        raise InputError(
            f"{folder} has no {WORK_SCRIPT}",
            advice="run 'nanoos init --slurm --dir FOLDER' first",
        )
    command = ["sbatch", "--parsable", f"--chdir={folder / WORK_DIR}", str(script)]
    return run_slurm(command).strip().partition(";")[0]


def _work_command(folder: Path, categories: Sequence[str], slots: int) -> str:
    program = Path(sys.executable).parent / "nanoos"
    words = [
        str(program) if os.access(program, os.X_OK) else "nanoos",
        "work",
        "-l",
        str(folder / LAUNCHPAD_FILE),
        "--dir",
        str(folder / WORK_DIR),
    ]
    for category in categories:
        words += ["--category", category]
    words += ["--slots", str(slots)]
    return f'{shlex.join(words)} "$@"'  # what follows the script's name goes before


def _write(folder: Path, texts: Mapping[Path, str], force: bool) -> WrittenFiles:
    report = WrittenFiles()
    differ = []
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            report.unchanged.append(path)
        elif path.exists() and not force:
            differ.append(str(path))
        else:
            report.written.append(path)
    if differ:
        raise InputError(
            f"{differ[0]} exists and is not what would be written",
            evidence={"files": differ},
            advice="edit it by hand, or replace all files with --force",
        )
    (folder / WORK_DIR).mkdir(parents=True, exist_ok=True)
    for path in report.written:
        private = path.name == LAUNCHPAD_FILE
        before = os.umask(0o077 if private else 0o022)
        try:
            write_atomic(path, texts[path])
        finally:
            os.umask(before)
    (folder / LAUNCHPAD_FILE).chmod(0o600)  # also one that was there
    for category in CATEGORIES:
        # 'qlaunch -c FOLDER/CATEGORY' looks there for all three files.
        link = folder / category / LAUNCHPAD_FILE
        if not link.is_symlink():
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..") / LAUNCHPAD_FILE)
    return report


def _pre_rocket(place: Path, choices: ClusterChoices) -> str:
    """Return the shell that prepares a job: modules, configuration, resources."""
    lines = [f"module load {shlex.quote(name)}" for name in choices.modules]
    lines += choices.pre_rocket
    lines.append(f"export FW_CONFIG_FILE={shlex.quote(str(place / CONFIG_FILE))}")
    # Ranks and threads follow what the job got, so that a firework which asks for
    # more in its _queueadapter also uses it.
    lines.append("export NANO_OS_RANKS=${SLURM_NTASKS:-1}")
    lines.append("export NANO_OS_THREADS=${SLURM_CPUS_PER_TASK:-1}")
    lines.append("export OMP_NUM_THREADS=$NANO_OS_THREADS")
    if choices.mpi_launcher:
        lines.append(f"export NANO_OS_MPI_LAUNCHER={shlex.quote(choices.mpi_launcher)}")
    if choices.work_dir:
        lines.append(f"export NANO_OS_WORK_DIR={shlex.quote(str(choices.work_dir))}")
    return "\n".join(lines)


def _rocket_launch(folder: Path, place: Path) -> str:
    """Return the command of a job, with the programs of this environment."""
    words: Sequence[str] = (
        sys.executable,
        "-m",
        "nanoos_fw.rlaunch",
        "-l",
        str(folder / LAUNCHPAD_FILE),
        "-w",
        str(place / FWORKER_FILE),
        "singleshot",
    )
    return shlex.join(words)


def _gpu_partition(cluster: Cluster) -> Partition:
    for partition in cluster.partitions:
        if partition.gpus and partition.up:
            return partition
    raise InputError(
        f"cluster {cluster.name!r} has no partition with GPUs",
        advice="leave out --gpu",
    )


def _walltime(seconds: float) -> str:
    minutes = int(seconds // 60)
    days, minutes = divmod(minutes, 1440)
    return f"{days}-{minutes // 60:02d}:{minutes % 60:02d}:00"
