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
from nanoos_fw.reports.formatting import energy, milli, significant, with_error


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


class Quantity(ReportModel):
    """What a model predicts, and how its numbers and errors are written.

    Energies in eV/atom have errors in meV/atom; other quantities have them in their
    unit, and four significant digits.

    Parameters
    ----------
    name
        "formation energy"; of other targets their name in the dataset.
    unit
        Empty for none.
    """

    name: Text = "formation energy"
    unit: str = "eV/atom"

    @classmethod
    def of(cls, target: str, unit: str | None) -> Quantity:
        """Return the quantity of a model's target."""
        if (target, unit) == ("formation_energy_per_atom", "eV/atom"):
            return cls()
        return cls(name=target, unit=unit or "")

    @property
    def is_energy(self) -> bool:
        """Whether it is an energy of an atom in eV."""
        return self.unit == "eV/atom"

    @property
    def error_unit(self) -> str:
        """Unit of its errors."""
        return "meV/atom" if self.is_energy else self.unit

    @property
    def error_scale(self) -> float:
        """Its errors in their unit are so many times its own numbers."""
        return 1000.0 if self.is_energy else 1.0

    def axis(self, word: str = "") -> str:
        """Return the title of an axis: ``Predicted formation energy (eV/atom)``."""
        title = f"{word} {self.name}".strip()
        return f"{title[:1].upper()}{title[1:]}{self.in_unit()}"

    def in_unit(self, *, error: bool = False) -> str:
        """Return its unit, or that of its errors, in brackets; nothing without one."""
        unit = self.error_unit if error else self.unit
        return f" ({unit})" if unit else ""

    def value(self, value: float, uncertainty: float | None = None) -> str:
        """Return a number, with its uncertainty if there is one, without the unit."""
        if self.is_energy:
            return energy(value, uncertainty)
        if uncertainty is None:
            return significant(value, 4)
        return with_error(value, uncertainty)

    def error(self, value: float) -> str:
        """Return an error in its unit, as a number."""
        return milli(value) if self.is_energy else significant(value, 3)

    def with_unit(self, text: str, *, error: bool = False) -> str:
        """Return a number with the unit, or that of errors."""
        return f"{text} {self.error_unit if error else self.unit}".strip()


class NotAvailable(ReportModel):
    """A part of the report that could not be filled, and why.

    Parameters
    ----------
    reason
        Shown as "not available: reason", so without a capital or a full stop.
    """

    reason: Text
