"""A labelling firetask that takes as long as it is let, for tests of jobs that end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nanoos_fw.firetasks.labelling import LabelTask


class SlowLabelTask(LabelTask):
    """Labels with the number of sites, once the file of option ``gate`` exists."""

    _fw_name = "{{slow_labels.SlowLabelTask}}"

    def label(self, key: str, stored: Any, place: Any) -> float:
        gate = Path(self.parameters.options["gate"])
        gate.with_name(f"began-{key}").touch()
        while not gate.exists():
            time.sleep(0.05)
        return float(len(stored.structure))
