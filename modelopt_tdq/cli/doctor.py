"""``modelopt-tdq doctor``."""

from __future__ import annotations

import typer
from rich.console import Console

__all__ = ["doctor"]


def doctor() -> None:
    """Show what is installed, what each backend can do here, and what to install for the rest."""
    from modelopt_tdq.runtime.doctor import doctor as examine
    from modelopt_tdq.runtime.doctor import render

    diagnosis = examine()
    Console().print(render(diagnosis))
    if not diagnosis.ok:
        raise typer.Exit(1)
