"""What all parts of a report share: frozen models, series, missing parts."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)

from nanoos_fw.errors import InputError


def plain(value: Any) -> Any:
    """Accept numpy arrays wherever a sequence of numbers is expected."""
    return value.tolist() if isinstance(value, np.ndarray) else value


Series = Annotated[tuple[float, ...], BeforeValidator(plain)]
Epochs = Annotated[tuple[int, ...], BeforeValidator(plain)]
Vector = tuple[float, float, float]
Text = Annotated[str, Field(min_length=1)]


class ReportModel(BaseModel):
    """Frozen, no unknown fields, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def require_lengths(owner: str, expected: int, **series: Series | None) -> None:
    """Refuse arrays that do not belong together."""
    wrong = {
        name: len(values)
        for name, values in series.items()
        if values is not None and len(values) != expected
    }
    if wrong:
        raise InputError(
            f"{owner}: {', '.join(wrong)} must have {expected} values",
            evidence={"expected": expected, **wrong},
            advice="collect all arrays of one object from the same document",
        )
    if expected == 0:
        raise InputError(
            f"{owner} holds no values",
            advice="use NotAvailable(reason=...) for a part that has no data",
        )


class NotAvailable(ReportModel):
    """A part of the report that could not be filled, and why.

    Parameters
    ----------
    reason
        Shown as "not available: reason", so without a capital or a full stop.
    """

    reason: Text
