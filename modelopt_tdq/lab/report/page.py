"""Writes one self-contained HTML page of a template in this folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from modelopt_tdq.core.files import write_text
from modelopt_tdq.errors import require

__all__ = ["write_page"]


def write_page(template: str, output: str | os.PathLike[str], **values: Any) -> Path:
    """Render a template, and write it in one step.

    Args:
        template: Name of the file.
        output: Of the page; its folder is made.
        **values: That the template names; escaped, unless it says otherwise.

    Raises:
        MissingExtraError: The extra ``report`` is not installed.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return write_text(output, environment.get_template(template).render(**values))
