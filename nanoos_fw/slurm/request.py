"""What a job asks of SLURM: checked fields, and the batch script made of them.

The names of the fields are those of FireWorks' own SLURM template, so that a
``my_qadapter.yaml`` and ``_queueadapter`` in a spec read alike, plus those that it
lacks (array, requeue, dependency, exclusive, nodelist, reservation, open_mode, ...).
A field that is not known here is refused: a misspelt memory request must not become
the partition's default.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from nanoos_fw.errors import InputError
from nanoos_fw.templates import render_template

_Memory = int | Annotated[str, StringConstraints(pattern=r"^\d+[KMGT]?$")]
_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,+-]*$")]
_Count = Annotated[int, Field(ge=1)]
_UNITS_MIB = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}
_WALLTIME = re.compile(
    r"^(?:(?P<days>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?"
    r"|(?P<h>\d+):(?P<hm>\d+):(?P<hs>\d+)|(?P<m>\d+)(?::(?P<ms>\d+))?)$"
)


def walltime_seconds(text: str | int) -> float:
    """Return a time limit as SLURM writes it (``90``, ``1:30:00``, ``2-12``) in s.

    A plain number is in minutes, as sbatch reads it. ``UNLIMITED`` is infinite.

    Raises
    ------
    ValueError
        If it is no time limit.
    """
    plain = str(text).strip()
    if plain.upper() in {"UNLIMITED", "INFINITE"}:
        return float("inf")
    found = _WALLTIME.match(plain)
    if found is None:
        raise ValueError(
            f"{plain!r} is no time limit; write minutes, H:MM:SS or D-HH:MM:SS"
        )
    part = {name: int(value or 0) for name, value in found.groupdict().items()}
    return (
        86400.0 * part["days"]
        + 3600.0 * (part["dh"] + part["h"])
        + 60.0 * (part["dm"] + part["hm"] + part["m"])
        + part["ds"]
        + part["hs"]
        + part["ms"]
    )


def memory_mib(value: str | int) -> float:
    """Return a memory request (``4000``, ``16G``) in MiB; 0 asks for all of a node."""
    text = str(value)
    if text[-1] in _UNITS_MIB:
        return int(text[:-1]) * _UNITS_MIB[text[-1]]
    return float(text)


class SlurmRequest(BaseModel):
    """A batch job. What is None is left to SLURM.

    Parameters
    ----------
    walltime
        ``H:MM:SS``, ``D-HH:MM:SS``, or minutes.
    queue
        Partition, or several with commas.
    mem, mem_per_cpu
        MiB, or with a unit (``4G``).
    exclude_nodes, nodelist
        Host lists, such as ``n[1-3,7]``.
    signal
        Such as ``B:USR1@300``; the program stops in time without it.
    requeue
        Whether SLURM may start the job anew after a failed node. The launchpad would
        not know, so leave that to ``nanoos rerun``.
    array
        Indices of a job array, such as ``0-9%4``; not in reservation mode, where one
        job belongs to one firework.
    job_name
        Also begins the names of the output files.
    pre_rocket, post_rocket
        Lines of shell before and after.
    rocket_launch
        The command that runs fireworks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job_name: _Name = "FW_job"
    queue: _Name | None = None
    account: _Name | None = None
    qos: _Name | None = None
    reservation: _Name | None = None
    nodes: _Count | None = None
    ntasks: _Count | None = None
    ntasks_per_node: _Count | None = None
    ntasks_per_core: _Count | None = None
    cpus_per_task: _Count | None = None
    core_spec: Annotated[int, Field(ge=0)] | None = None
    gpus: str | _Count | None = None
    gpus_per_node: str | _Count | None = None
    gpus_per_task: str | _Count | None = None
    gpu_bind: str | None = None
    gres: str | None = None
    mem: _Memory | None = None
    mem_per_cpu: _Memory | None = None
    walltime: str | _Count | None = None
    time_min: str | _Count | None = None
    exclusive: bool | Literal["user", "mcs"] = False
    nodelist: str | None = None
    exclude_nodes: str | None = None
    constraint: str | None = None
    license: str | None = None
    array: Annotated[str, StringConstraints(pattern=r"^[0-9,:%-]+$")] | None = None
    dependency: str | None = None
    begin: str | None = None
    requeue: bool | None = None
    signal: (
        Annotated[str, StringConstraints(pattern=r"^([BR]{1,2}:)?[A-Z0-9]+(@\d+)?$")]
        | None
    ) = None
    open_mode: Literal["append", "truncate"] | None = None
    mail_type: str | None = None
    mail_user: str | None = None
    comment: str | None = None
    image: str | None = None
    volume: str | None = None
    pre_rocket: str | None = None
    rocket_launch: str = "rlaunch singleshot"
    post_rocket: str | None = None

    @field_validator("walltime", "time_min")
    @classmethod
    def _is_a_time(cls, value: str | int | None) -> str | int | None:
        if value is not None and walltime_seconds(value) <= 0:
            raise ValueError("a time limit must be longer than nothing")
        return value

    @model_validator(mode="after")
    def _one_line_each(self) -> SlurmRequest:
        for name in _OPTIONS:
            value = getattr(self, name)
            if isinstance(value, str) and (
                not value or not value.isprintable() or '"' in value or "\\" in value
            ):
                raise ValueError(f"{name} must be one line without quotes: {value!r}")
        if self.mem is not None and self.mem_per_cpu is not None:
            raise ValueError("give mem or mem_per_cpu, not both")
        if not self.rocket_launch.strip() or "\n" in self.rocket_launch.strip():
            raise ValueError("rocket_launch must be one command on one line")
        return self

    def with_overrides(self, overrides: Mapping[str, Any]) -> SlurmRequest:
        """Return the request with some fields replaced, checked anew.

        ``mem`` and ``mem_per_cpu`` replace each other.
        """
        values = self.model_dump()
        if overrides.get("mem") is not None:
            values["mem_per_cpu"] = None
        elif overrides.get("mem_per_cpu") is not None:
            values["mem"] = None
        return slurm_request({**values, **overrides})

    @property
    def tasks(self) -> int:
        """Number of tasks, as sbatch counts them."""
        if self.ntasks is not None:
            return self.ntasks
        return (self.nodes or 1) * (self.ntasks_per_node or 1)


def slurm_request(values: Mapping[str, Any], where: str = "request") -> SlurmRequest:
    """Return a checked request.

    Raises
    ------
    InputError
        If a field is unknown or has a bad value; names all of them.
    """
    try:
        return SlurmRequest.model_validate(dict(values))
    except ValidationError as error:
        problems = "; ".join(
            f"{e['loc'][0] if e['loc'] else 'fields'}: {e['msg']}"
            for e in error.errors()
        )
        raise InputError(
            f"SLURM {where}: {problems}",
            evidence={"given": sorted(values)},
            advice=f"known fields: {', '.join(SlurmRequest.model_fields)}",
        ) from error


# Field -> option of sbatch, in the order of the script.
_OPTIONS = {
    "job_name": "job-name",
    "queue": "partition",
    "account": "account",
    "qos": "qos",
    "reservation": "reservation",
    "nodes": "nodes",
    "ntasks": "ntasks",
    "ntasks_per_node": "ntasks-per-node",
    "ntasks_per_core": "ntasks-per-core",
    "cpus_per_task": "cpus-per-task",
    "core_spec": "core-spec",
    "gpus": "gpus",
    "gpus_per_node": "gpus-per-node",
    "gpus_per_task": "gpus-per-task",
    "gpu_bind": "gpu-bind",
    "gres": "gres",
    "mem": "mem",
    "mem_per_cpu": "mem-per-cpu",
    "walltime": "time",
    "time_min": "time-min",
    "exclusive": "exclusive",
    "nodelist": "nodelist",
    "exclude_nodes": "exclude",
    "constraint": "constraint",
    "license": "licenses",
    "array": "array",
    "dependency": "dependency",
    "begin": "begin",
    "requeue": "requeue",
    "signal": "signal",
    "open_mode": "open-mode",
    "mail_type": "mail-type",
    "mail_user": "mail-user",
    "comment": "comment",
    "image": "image",
    "volume": "volume",
}


def batch_script(request: SlurmRequest, launch_dir: str) -> str:
    """Return the text of the batch script of a request.

    Parameters
    ----------
    request
        The job.
    launch_dir
        Absolute path where ``rocket_launch`` starts.
    """
    number = "%A_%a" if request.array else "%j"
    return render_template(
        "slurm/job.sh",
        options="\n".join(_option_lines(request)),
        output=f"{request.job_name}-{number}",
        pre_rocket=request.pre_rocket or "",
        launch_dir=shlex.quote(launch_dir),
        rocket_launch=request.rocket_launch.strip(),
        post_rocket=request.post_rocket or "",
    )


def _option_lines(request: SlurmRequest) -> list[str]:
    lines = []
    for name, option in _OPTIONS.items():
        value = getattr(request, name)
        if value is None or value is False:
            if name == "requeue" and value is False:
                lines.append("#SBATCH --no-requeue")
            continue
        if value is True:
            lines.append(f"#SBATCH --{option}")
            continue
        # sbatch splits these lines into words as a shell does.
        text = str(value)
        quoted = f'"{text}"' if re.search(r"[\s'#]", text) else text
        lines.append(f"#SBATCH --{option}={quoted}")
    return lines
