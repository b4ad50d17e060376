"""The command that installs an extra, as messages and doctor print it: from the address in ``[project.urls]``."""

from __future__ import annotations

from functools import cache
from importlib import metadata

__all__ = ["DISTRIBUTION", "install_command"]

DISTRIBUTION = "modelopt-tdq"


@cache
def _repository() -> str:
    """Of the installed package; empty in a source tree that was never installed."""
    try:
        addresses = metadata.metadata(DISTRIBUTION).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return ""
    found = dict(address.split(", ", 1) for address in addresses)
    return str(found.get("Repository", ""))


def install_command(extra: str) -> str:
    """A line for a shell.

    Args:
        extra: One, or several separated by commas.
    """
    address = _repository()
    return f"pip install '{DISTRIBUTION}[{extra}]{f' @ git+{address}' if address else ''}'"
