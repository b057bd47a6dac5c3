"""Labelling firetasks of the tests, named by their dotted names in plans."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from fireworks.core.firework import FiretaskBase

from nanoos_fw.firetasks.labelling import LabelTask


def label_of(structure: Any) -> float:
    """A smooth function of composition and volume, made up for the tests."""
    fractions = structure.composition.fractional_composition
    x = [float(e.X) * f for e, f in fractions.items()]
    mean = sum(x)
    spread = sum(f * (float(e.X) - mean) ** 2 for e, f in fractions.items())
    return float(-3.0 * spread + 0.02 * structure.volume / len(structure))


class ToyLabelTask(LabelTask):
    """Labels by ``label_of``; options: elements to fail on, a file that kills once."""

    _fw_name = "{{active_labels.ToyLabelTask}}"

    def label(self, key: str, stored: Any, place: Any) -> float:
        options = self.parameters.options
        calls = options.get("calls")
        if calls:
            with Path(calls).open("a") as log:
                log.write(f"{key}\n")
        fatal = options.get("kill")
        if fatal and Path(fatal).exists():
            left = int(Path(fatal).read_text()) - 1
            Path(fatal).write_text(str(left))
            if left == 0:
                Path(fatal).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
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


class Plain(FiretaskBase):
    """A firetask that keeps the contract without the base class."""

    _fw_name = "{{active_labels.Plain}}"
