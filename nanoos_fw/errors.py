"""The errors of nanoos_fw: what happened, to which object, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class NanoOSError(Exception):
    """Base of all errors raised on purpose.

    Parameters
    ----------
    message
        One sentence that names the object and what is wrong with it.
    evidence
        Facts that support the message: values, bounds, the tail of a log.
        JSON values only, since FireWorks stores them with the launch.
    advice
        The next step for the user, as a sentence or a command.

    Notes
    -----
    FireWorks stores ``to_dict()`` of an exception under ``_exception._details`` and
    hands it to the rerun (``EXCEPT_DETAILS_ON_RERUN``), so ``kind`` is what a rerun
    decides on.
    """

    kind = "error"
    resumable = False

    def __init__(
        self,
        message: str,
        *,
        evidence: Mapping[str, Any] | None = None,
        advice: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.evidence = dict(evidence or {})
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.message}; {self.advice}" if self.advice else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments would be lost by the default reduction.
        return (_rebuild, (self.to_dict(),))

    def to_dict(self) -> dict[str, Any]:
        """Return the error as JSON-compatible values."""
        return {
            "kind": self.kind,
            "resumable": self.resumable,
            "message": self.message,
            "evidence": self.evidence,
            "advice": self.advice,
        }


class InputError(NanoOSError):
    """The user's input (structure, parameter, file, setting) cannot be used."""

    kind = "input"


class MissingDependencyError(NanoOSError):
    """A package, program or model weight that the request needs is not installed."""

    kind = "missing_dependency"


class StoreError(NanoOSError):
    """The database cannot be reached or refuses a document."""

    kind = "store"


class LaunchError(NanoOSError):
    """A child program (MPI ranks, LAMMPS, a SLURM command) could not run or died."""

    kind = "launch"


class OutOfTimeError(NanoOSError):
    """Stopped before the end of the allocation; a checkpoint is on disk."""

    kind = "out_of_time"
    resumable = True


class OutOfMemoryError(NanoOSError):
    """The kernel, SLURM or the allocator refused more memory."""

    kind = "out_of_memory"


class DiskFullError(NanoOSError):
    """The file system, or the quota on it, has no room for what must be written."""

    kind = "disk_full"


class LostRunError(NanoOSError):
    """A run whose process is gone: node failure, preemption, a kill from outside."""

    kind = "lost_run"


class SimulationError(NanoOSError):
    """LAMMPS ran and failed: lost atoms, a bad potential, a non-numeric pressure."""

    kind = "simulation"


class CorruptArtifactError(NanoOSError):
    """A stored file or array does not match its checksum or its own header."""

    kind = "corrupt_artifact"


_KINDS: dict[str, type[NanoOSError]] = {
    cls.kind: cls
    for cls in (
        NanoOSError,
        InputError,
        MissingDependencyError,
        StoreError,
        LaunchError,
        OutOfTimeError,
        OutOfMemoryError,
        DiskFullError,
        LostRunError,
        SimulationError,
        CorruptArtifactError,
    )
}


def error_from_dict(data: Mapping[str, Any]) -> NanoOSError:
    """Rebuild an error from ``to_dict()``, as written by a child program."""
    cls = _KINDS.get(str(data.get("kind")), NanoOSError)
    return cls(
        str(data.get("message", "unknown error")),
        evidence=data.get("evidence") or {},
        advice=data.get("advice"),
    )


def validation_problems(error: ValidationError) -> str:
    """Return what pydantic found wrong, each with the name of its field."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()
    )


def _rebuild(data: dict[str, Any]) -> NanoOSError:
    return error_from_dict(data)
