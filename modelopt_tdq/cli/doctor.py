"""``modelopt-tdq doctor``."""

from __future__ import annotations

from rich.console import Console

from modelopt_tdq.cli.output import finish

__all__ = ["doctor"]


def doctor() -> None:
    """Show what is installed, what each backend can do here, and what to install for the rest.

    With --json, what an issue report wants.
    """
    from modelopt_tdq.runtime import doctor as found

    diagnosis = found.doctor()
    console = Console()
    console.print(found.render(diagnosis, console.width), soft_wrap=True, end="")
    finish(found.as_data(diagnosis), failed=not diagnosis.ok)
