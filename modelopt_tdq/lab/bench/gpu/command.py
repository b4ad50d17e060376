"""``modelopt-tdq bench gpu``: every part in a process of its own, results written as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modelopt_tdq.core.files import write_text
from modelopt_tdq.errors import TdqError
from modelopt_tdq.lab.bench.gpu.part import PARTS
from modelopt_tdq.lab.provenance import provenance, provenance_line

__all__ = ["run_gpu"]

_SHOWN = {name: shows for name, shows, _ in PARTS}
_LIMITS = {name: seconds for name, _, seconds in PARTS}

#: Lines of what a process said that are kept when it ended badly.
_LAST_LINES = 15


def _one(name: str, folder: Path, rehearse: bool, engines: Path | None) -> dict[str, Any]:
    """Run one part; its rows, its error if it had one, and its wall time."""
    command = [sys.executable, "-m", "modelopt_tdq.lab.bench.gpu.part", name, str(folder), "1" if rehearse else "0"]
    command += [] if engines is None else [str(engines.absolute())]
    environment = dict(os.environ)
    if rehearse:
        environment["TRITON_INTERPRET"] = "1"  # Triton's own switch: kernels run in Python
    limit = _LIMITS[name] * (2 if rehearse else 1)
    start = time.monotonic()
    with (folder / f"{name}.log").open("w+") as log:
        try:
            code = subprocess.run(
                command, check=False, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=limit
            ).returncode
            ended = "" if code == 0 else f"the process ended with status {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit} s"
        log.seek(0)
        said = log.read().splitlines()[-_LAST_LINES:]
    answer = folder / f"{name}.json"
    found: dict[str, Any] = json.loads(answer.read_text()) if answer.is_file() else {"rows": []}
    if ended:
        found["error"] = ended
    if "error" in found:
        found["said"] = said
    return {"part": name, "shows": _SHOWN[name], "seconds": round(time.monotonic() - start, 1), **found}


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: rows that have the same columns stand in one table."""
    columns: tuple[str, ...] = ()
    for row in rows:
        if tuple(row) != columns:
            columns = tuple(row)
            yield from ("", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns))
        yield "| " + " | ".join(_cell(value) for value in row.values()) + " |"


def _markdown(result: Mapping[str, Any]) -> str:
    lines = [f"# On {result['gpu']}", "", provenance_line(result)]
    if result["rehearsal"]:
        lines += ["", "**A rehearsal on the CPU with stand-ins: no number here says anything about a GPU.**"]
    for part in result["parts"]:
        lines += ["", f"## {part['part']}: {part['shows']}", "", f"{part['seconds']} s"]
        if "error" in part:
            lines += ["", f"**Failed:** {_cell(part['error'])}"]
        lines += _table(part["rows"])
    return "\n".join(lines) + "\n"


def run_gpu(
    output: Path, parts: Sequence[str], command: str, rehearse: bool, engines: Path | None = None
) -> Iterator[str]:
    """Run parts one after another; yields a line after each.

    ``<output>/gpu.json`` and ``gpu.md`` (``rehearsal.*`` for a rehearsal) are written after every part.

    Args:
        output: Folder of the results.
        parts: Names from :data:`~modelopt_tdq.lab.bench.gpu.part.PARTS`; empty for all.
        command: To write beside the results.
        rehearse: Run every part on the CPU, with stand-ins and tiny sizes.
        engines: Folder with engines that were built elsewhere, to be loaded and run, each beside its ONNX file.

    Raises:
        TdqError: There is no such part, no GPU, or no engine in the folder.
    """
    for name in parts:
        if name not in _SHOWN:
            raise TdqError("only", name, "no such part", f"Use some of {list(_SHOWN)}")
    if engines is not None and not list(engines.glob("*.engine")):
        raise TdqError("engines", str(engines), "no *.engine in it", "Build them with modelopt-tdq build")
    if not rehearse and not torch.cuda.is_available():
        raise TdqError(
            "device",
            "cuda",
            "torch sees no GPU",
            "Run it on a machine with an NVIDIA GPU and a CUDA build of torch, or try it with --rehearse",
        )
    gpu = "no GPU" if rehearse else torch.cuda.get_device_name()
    result = {**provenance(command), "gpu": gpu, "rehearsal": rehearse, "parts": []}
    output.mkdir(parents=True, exist_ok=True)
    stem = output / ("rehearsal" if rehearse else "gpu")
    with tempfile.TemporaryDirectory(prefix="tdq_gpu_") as folder:
        for name in parts or list(_SHOWN):
            found = _one(name, Path(folder), rehearse, engines)
            result["parts"].append(found)
            write_text(stem.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
            write_text(stem.with_suffix(".md"), _markdown(result))
            outcome = f"failed: {found['error']}" if "error" in found else f"{len(found['rows'])} rows"
            yield f"{name}: {outcome}, {found['seconds']} s"
    yield f"Written: {stem.with_suffix('.md')}"
