"""``modelopt-tdq doctor``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

__all__ = ["doctor"]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON: what an issue report wants.")] = False,
) -> None:
    """Show what is installed, what each backend can do here, and what to install for the rest."""
    from modelopt_tdq.runtime import doctor as found

    diagnosis = found.doctor()
    if as_json:
        typer.echo(found.as_json(diagnosis))
    else:
        console = Console()
        console.print(found.render(diagnosis, console.width), soft_wrap=True, end="")
    if not diagnosis.ok:
        raise typer.Exit(1)
