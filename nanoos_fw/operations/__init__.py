"""Operating campaigns: import, submit, run, set a cluster up, mend failures."""

from __future__ import annotations

from nanoos_fw.operations.campaign import (
    ImportReport,
    import_structures,
    prepare_launchpad,
    quiet_fireworks,
    rerun_failed,
    run_embedded,
    submit,
)

__all__ = [
    "ImportReport",
    "import_structures",
    "prepare_launchpad",
    "quiet_fireworks",
    "rerun_failed",
    "run_embedded",
    "submit",
]
