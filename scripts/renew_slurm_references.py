"""Write the reference batch scripts of the tests anew, on purpose.

usage: .venv/bin/python scripts/renew_slurm_references.py; then read 'git diff'.
"""

from __future__ import annotations

import json
from pathlib import Path

from nanoos_fw.slurm import batch_script, slurm_request

FOLDER = Path(__file__).parents[1] / "tests" / "reference" / "slurm"
LAUNCH_DIR = "/scratch/it's here/launcher_1"

if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.json")):
        request = slurm_request(json.loads(path.read_text()))
        path.with_suffix(".sh").write_text(batch_script(request, LAUNCH_DIR))
