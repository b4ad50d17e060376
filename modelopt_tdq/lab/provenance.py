"""Where a result comes from: command, date, machine, versions; written beside every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "cpu_name", "installed_versions", "provenance", "provenance_line"]

#: Whose versions are written down, where they are installed.
PACKAGES = ("modelopt-tdq", "nvidia-modelopt", "torch", "diffusers", "onnxruntime", "openvino", "tensorrt-rtx")


def cpu_name() -> str:
    """As the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def installed_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of those that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def provenance(command: str) -> dict[str, Any]:
    """Of a result of this process, as plain data for JSON.

    Args:
        command: How to get it again.
    """
    machine = f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    date = datetime.date.today().isoformat()
    return {"command": command, "date": date, "machine": machine, "versions": installed_versions()}


def provenance_line(source: Mapping[str, Any]) -> str:
    """The same as one line of Markdown."""
    versions = ", ".join(f"{package} {version}" for package, version in source["versions"].items())
    return f"`{source['command']}`, {source['date']}, {source['machine']}; {versions}"
