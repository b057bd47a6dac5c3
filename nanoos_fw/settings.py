"""Settings: ``NANO_OS_*`` variables over one YAML file over defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from nanoos_fw.errors import InputError

PREFIX = "NANO_OS_"
CONFIG_FILE = Path("~/.nanoos/config.yaml")
# Read by the test suite and by child programs, not settings.
_NOT_SETTINGS = frozenset({"NANO_OS_CONFIG", "NANO_OS_PARENT", "NANO_OS_SLOT"})
_NOT_SETTINGS_PREFIX = "NANO_OS_TEST_"


class Settings(BaseModel):
    """What the machine and the site decide; what the science decides is elsewhere.

    Every field is the variable ``NANO_OS_<FIELD>`` and a key of the YAML file
    ``~/.nanoos/config.yaml`` (or ``$NANO_OS_CONFIG``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    launchpad: Path | None = Field(
        default=None,
        description="my_launchpad.yaml; without it FireWorks' own search decides",
    )
    work_dir: Path = Field(
        default=Path("nanoos-work"),
        description="root of the work directories, on a file system all nodes share",
    )
    mpi_launcher: str | None = Field(
        default=None,
        description="srun, mpiexec, or a command line that takes -n RANKS",
    )
    ranks: int = Field(default=2, ge=1, description="MPI ranks of a child program")
    threads: int = Field(default=1, ge=1, description="threads of each rank")
    lammps_command: str | None = Field(
        default=None,
        description="LAMMPS executable to use instead of the Python module",
    )
    lammps_potential_dir: Path | None = Field(
        default=None,
        description="the site's potential files, searched before LAMMPS' own",
    )
    web_token: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="of 'nanoos serve'; without it a new one each time",
    )
    database_wait_s: float = Field(
        default=3600.0,
        ge=0,
        description="how long a job waits for a database server that is away",
    )


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings in effect.

    Raises
    ------
    InputError
        If the YAML file or a variable holds an unknown key or a bad value; a
        misspelt setting must not be ignored.
    """
    env = os.environ if environ is None else environ
    path = Path(env.get("NANO_OS_CONFIG", str(CONFIG_FILE))).expanduser()
    values = _read_yaml(path) if path.exists() else {}
    for name, value in env.items():
        if name.startswith(PREFIX) and not (
            name in _NOT_SETTINGS or name.startswith(_NOT_SETTINGS_PREFIX)
        ):
            values[name.removeprefix(PREFIX).lower()] = value
    try:
        return Settings(**values)
    except ValidationError as error:
        problems = "; ".join(
            f"{PREFIX}{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors()
        )
        raise InputError(
            f"bad settings: {problems}",
            evidence={"file": str(path)},
            advice=f"known settings: {', '.join(sorted(Settings.model_fields))}",
        ) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, YAMLError) as error:
        raise InputError(f"cannot read the settings file {path}: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a mapping of settings")
    return dict(data)
