"""Where a result comes from: command, machine, versions, date; written beside every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("modelopt-tdq", "nvidia-modelopt", "torch", "diffusers", "onnxruntime", "openvino", "tensorrt-rtx")


def provenance() -> dict[str, Any]:
    """Command, machine and versions of this process."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "command": " ".join(["python", str(Path(sys.argv[0]).name), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{model}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
        "versions": versions,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def write(name: str, result: dict[str, Any], table: str) -> None:
    """Write ``results/<name>.json`` and ``results/<name>.md``, and print the table."""
    RESULTS.mkdir(exist_ok=True)
    source = provenance()
    (RESULTS / f"{name}.json").write_text(json.dumps({**source, **result}, indent=1) + "\n")
    versions = ", ".join(f"{k} {v}" for k, v in source["versions"].items())
    head = f"`{source['command']}`, {source['date']}\n{source['machine']}; {versions}\n"
    (RESULTS / f"{name}.md").write_text(f"{head}\n{table}\n")
    print(table)
