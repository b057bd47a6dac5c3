"""Operating campaigns: import, submit, run, set a cluster up, mend failures."""

from __future__ import annotations

from nanoos_fw.operations.campaign import (
    ImportReport,
    import_structures,
    prepare_launchpad,
    quiet_fireworks,
    rerun_failed,
    run_embedded,
)
from nanoos_fw.operations.submission import submit, submit_many
from nanoos_fw.operations.tables import TableReport, import_property_table

__all__ = [
    "ImportReport",
    "TableReport",
    "import_property_table",
    "import_structures",
    "prepare_launchpad",
    "quiet_fireworks",
    "rerun_failed",
    "run_embedded",
    "submit",
    "submit_many",
]
