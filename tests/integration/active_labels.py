"""Labelling firetasks of the tests, named by their dotted names in plans."""

from __future__ import annotations

from typing import Any

from nanoos_fw.firetasks.labelling import LabelTask


def label_of(structure: Any) -> float:
    """A smooth function of composition and volume, made up for the tests."""
    fractions = structure.composition.fractional_composition
    x = [float(e.X) * f for e, f in fractions.items()]
    mean = sum(x)
    spread = sum(f * (float(e.X) - mean) ** 2 for e, f in fractions.items())
    return float(-3.0 * spread + 0.02 * structure.volume / len(structure))


class ToyLabelTask(LabelTask):
    """Labels by ``label_of``; option ``fail``: letters of formulas to fail on."""

    _fw_name = "{{active_labels.ToyLabelTask}}"

    def label(self, key: str, stored: Any, place: Any) -> float:
        options = self.parameters.options
        if set(options.get("fail", ())) & set(stored.formula):
            raise ValueError(f"cannot label {stored.formula}")
        return label_of(stored.structure)


class Misnamed(ToyLabelTask):
    """Is stored under the name of another class."""


class NoTask:
    """No firetask."""

    @classmethod
    def from_dict(cls, _values: Any) -> NoTask:
        return cls()
