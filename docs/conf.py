"""Settings of Sphinx for the documentation site."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import render

from modelopt_tdq.version import __version__

project = "modelopt-tdq"
author = "the authors of modelopt-tdq"
copyright = author
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_ext", "_build", "readme.md.jinja"]
html_theme = "furo"
html_title = f"modelopt-tdq {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"source_repository": render.repository(), "source_branch": "main", "source_directory": "docs/"}
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
nb_execution_mode = "off"  # the tests execute the notebook; its outputs are those of that run
nb_merge_streams = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# docstrings refer to modules of the package that have no page of their own
suppress_warnings = ["ref.python"]


def _fill(app: Any, name: str, source: list[str]) -> None:
    if (HERE / f"{name}.md").is_file():
        source[0] = render.page(name, source[0])


def setup(app: Any) -> None:
    """Figures and addresses are put in before a page is parsed."""
    app.connect("source-read", _fill)
