"""The checks of ``nanoos preflight`` that SLURM answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nanoos_fw.errors import NanoOSError
from nanoos_fw.operations.checks import Check, Status, failed
from nanoos_fw.operations.cluster_files import (
    CATEGORIES,
    CONFIG_FILE,
    FWORKER_FILE,
    LAUNCHPAD_FILE,
    QADAPTER_FILE,
)


def check_slurm(folder: Path | None) -> list[Check]:
    """Check that SLURM answers, and that the files of ``nanoos init`` fit it."""
    from nanoos_fw.slurm import read_cluster

    if folder is not None:
        files = [
            folder / LAUNCHPAD_FILE,
            *(
                folder / category / name
                for category in CATEGORIES
                for name in (CONFIG_FILE, FWORKER_FILE, QADAPTER_FILE)
            ),
        ]
        missing = [str(path) for path in files if not path.is_file()]
        if missing:
            return [
                Check(
                    "SLURM", "fail", f"no {', '.join(missing)}", "nanoos init --slurm"
                )
            ]
    if shutil.which("sbatch") is None:
        if folder is None:
            return [Check("SLURM", "ok", "no sbatch on PATH: not used")]
        return [
            Check(
                "SLURM",
                "fail",
                f"{folder} is for SLURM, and no sbatch is on PATH",
                "run this on a login node of the cluster",
            )
        ]
    try:
        cluster = read_cluster()
    except NanoOSError as error:
        return [failed("SLURM", error, "ask the controller: scontrol ping")]
    names = ", ".join(p.name for p in cluster.partitions if p.up)
    if not names:
        return [
            Check(
                "SLURM",
                "fail",
                f"{cluster.name}: no partition is up",
                "sinfo -s shows when one is; the site knows why",
            )
        ]
    accounting: Status = "ok" if cluster.accounting else "warn"
    found = [
        Check(
            "SLURM",
            accounting,
            f"{cluster.name}, SLURM {cluster.version}, partitions: {names}"
            + ("" if cluster.accounting else "; no accounting"),
            None
            if cluster.accounting
            else "run 'nanoos reconcile' within minutes of an end: SLURM forgets jobs",
        )
    ]
    if folder is not None:
        found += [check_category(folder, category, cluster) for category in CATEGORIES]
    return found


def check_category(folder: Path, category: str, cluster: Any) -> Check:
    """Check that jobs of a category can run, with its files as they are now."""
    from fireworks.core.fworker import FWorker
    from fireworks.utilities.fw_serializers import load_object_from_file

    from nanoos_fw.queue_adapter import SlurmAdapter
    from nanoos_fw.slurm import check_request

    name = f"category {category}"
    file = folder / category / QADAPTER_FILE
    try:
        adapter = load_object_from_file(str(file))
        if not isinstance(adapter, SlurmAdapter):
            return Check(
                name,
                "fail",
                f"{file} is for {type(adapter).__name__}, whose fields are not checked",
                f"its _fw_name must be {SlurmAdapter._fw_name!r}",
            )
        request = adapter.request
        check_request(request, cluster, str(file))
        taken = FWorker.from_file(str(folder / category / FWORKER_FILE)).category
    except NanoOSError as error:
        return failed(name, error, f"correct {file}, or 'nanoos init --slurm --force'")
    except Exception as error:  # YAML, and whatever FireWorks raises
        return Check(
            name, "fail", f"{file}: {type(error).__name__}: {error}", "correct the file"
        )
    if category not in ([taken] if isinstance(taken, str) else taken):
        return Check(
            name,
            "fail",
            f"{folder / category / FWORKER_FILE} takes {taken!r}, not {category!r}",
            "correct its category",
        )
    return Check(
        name,
        "ok",
        f"partition {request.queue or cluster.partition(None).name}, "
        f"{request.tasks} tasks of {request.cpus_per_task or 1} processors, "
        f"walltime {request.walltime or 'of the partition'}",
    )
