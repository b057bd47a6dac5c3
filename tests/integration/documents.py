"""`scripts/run_document.py` as a module: the scripts are not importable."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_PATH = Path(__file__).parents[2] / "scripts" / "run_document.py"
_spec = importlib.util.spec_from_file_location("run_document", _PATH)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["run_document"] = _module  # dataclasses look their module up
_spec.loader.exec_module(_module)

DocumentError = _module.DocumentError
blocks, missing_line, run_page = _module.blocks, _module.missing_line, _module.run_page
