"""What a check of ``nanoos preflight`` finds, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from nanoos_fw.errors import NanoOSError

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What a check found.

    Parameters
    ----------
    name
        Of the check.
    status
        ``ok``, ``warn`` (work goes on, perhaps not as meant) or ``fail``.
    evidence
        What was seen.
    next_step
        What to do about it; None if there is nothing to do.
    """

    name: str
    status: Status
    evidence: str
    next_step: str | None = None

    def __post_init__(self) -> None:
        """Let nobody be told of a problem without what to do about it."""
        if self.status != "ok" and not self.next_step:
            raise ValueError(f"check {self.name} has no next step")

    def to_dict(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        return asdict(self)


def failed(name: str, error: NanoOSError, next_step: str) -> Check:
    """Return the check that an error makes; the error's own advice goes before."""
    details = "".join(f"; {key}: {value}" for key, value in error.evidence.items())
    return Check(name, "fail", f"{error.message}{details}", error.advice or next_step)
