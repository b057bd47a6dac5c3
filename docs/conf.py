"""Sphinx configuration: `scripts/docs` builds the pages into build/docs.

All is in the pages themselves: no fonts, scripts or pictures from elsewhere, so that
they can be read on a cluster without a way to the outside.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent)]
# FireWorks and the settings look for files below the home directory when they are
# imported; the author's own have no part in the documentation.
os.environ["HOME"] = tempfile.mkdtemp(prefix="nanoos-docs-")
os.environ.pop("FW_CONFIG_FILE", None)

import nanoos_fw  # noqa: E402
import nanoos_fw.web  # noqa: E402  autodoc would import fastapi as type checkers see it

project = "nanoos_fw"
copyright = "the authors of nanoos_fw"
version = release = nanoos_fw.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.napoleon",
    "sphinx.ext.autodoc",
    "nanoos_reference",
]
exclude_patterns = ["extensions"]

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
# Blocks of output: nothing to highlight, nothing to lex.
highlight_language = "text"

html_theme = "furo"
html_title = f"nanoos_fw {release}"
html_static_path = ["static"]
html_css_files = ["nanoos.css"]
html_copy_source = False
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them, and the docstrings the words
autodoc_mock_imports: list[str] = []
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72
add_module_names = False
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
