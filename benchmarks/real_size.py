#!/usr/bin/env python3
"""Published architectures at random weights: what quantizing, running, exporting and comparing them takes.

Each part runs in a process of its own, so that its peak of memory is its own; ratios are of CPU time with one thread.
Finished parts are kept, and the table is written after every part. SD 1.5 takes about 15 GiB and an hour of a core.
usage: python real_size.py [--models sd15,pixart,sdxl] [--parts static,scales,...] [--again] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from real_size_parts import ARCHITECTURES, PARTS
from record import RESULTS, write

#: By model and part: what the part measured, or why it ended.
Found = dict[str, dict[str, dict[str, Any]]]


def run_part(part: str, model: str, folder: Path) -> dict[str, Any]:
    """What a part measured; the end of what it said where it failed."""
    command = [sys.executable, str(Path(__file__).with_name("real_size_parts.py")), part, model, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": f"exit status {done.returncode}: " + " ".join(done.stderr.split()[-40:])}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _cells(parts: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """What, measured, against what, ratio, of what was measured."""

    def value(part: str, name: str) -> float | None:
        found: float | None = parts.get(part, {}).get(name)
        return found

    def row(what: str, mine: float | None, unit: str, against: str, other: float | None) -> tuple[str, str, str, str]:
        ratio = "-" if mine is None or not other else f"{mine / other:.2f}"
        shown = "{:.0f} {}" if unit == "kernels" else "{:.2f} {}"
        said = "-" if mine is None else shown.format(mine, unit)
        beside = against if other is None else f"{against}: {shown.format(other, unit)}"
        return what, said, beside, ratio

    static_s, weights = value("static", "quantize_s"), value("scales", "weights_gib")
    rows = []
    for part, what in {
        "scales": "quantize: scales over time",
        "protected": "quantize: scales, steps protected",
        "corrected": "quantize: scales and corrections",
        "recipe": "quantize: the recipe",
    }.items():
        rows.append(row(what, value(part, "quantize_s"), "s", "ModelOpt max", static_s))
        rows.append(row("the same, memory", value(part, "quantize_peak_gib"), "GiB", "weights", weights))
    long_s = value("static_long", "quantize_s")
    for part, what in {"scales_long": "scales over time", "protected_long": "scales, steps protected"}.items():
        rows.append(row(f"quantize, twenty steps: {what}", value(part, "quantize_s"), "s", "ModelOpt max", long_s))
    rows.append(row("restore, memory", value("restore", "restore_peak_gib"), "GiB", "weights", weights))
    for folded in ("", "_folded"):
        what = "forward" + (", weights folded" if folded else "")
        rows.append(
            row(what, value("forward", f"scales{folded}_s"), "s", "ModelOpt", value("forward", f"static{folded}_s"))
        )
    rows.append(
        row("export", value("export", "export_s"), "s", "torch, unquantized", value("export_float", "export_s"))
    )
    rows.append(row("export, process", value("export", "export_process_gib"), "GiB", "weights", weights))
    rows.append(row("torch's export, process", value("export_float", "export_process_gib"), "GiB", "weights", weights))
    rows.append(row("OpenVINO opens it, process", value("deployed", "open_process_gib"), "GiB", "weights", weights))
    single = value("session", "session_gib")
    beside = None if single is None or weights is None else single + weights
    compared = value("compare", "compare_process_gib")
    rows.append(row("compare, process", compared, "GiB", "weights and a process with the largest session", beside))
    once = value("analyze", "pass_s")
    forward_s = None if once is None else once / 4
    rows.append(row("sensitivity, three probes", value("analyze", "sensitivity_s"), "s", "a forward", forward_s))
    rows.append(row("analyze, all of it", value("analyze", "analyze_s"), "s", "a forward", forward_s))
    rows.append(row("analyze, process", value("analyze", "analyze_process_gib"), "GiB", "weights", weights))
    for size in (8, 32):
        ours, constant = (value("openvino", f"{name}_{size}_s") for name in ("scales", "constant"))
        rows.append(row(f"OpenVINO, latents {size} x {size}", ours, "s", "constant scales", constant))
    ours, constant = value("kernels", "scales_kernels"), value("kernels", "constant_kernels")
    rows.append(row("TensorRT-RTX", ours, "kernels", "constant scales", constant))
    return [row for row in rows if row[1] != "-"]


def _table(found: Found) -> str:
    lines = [
        "CPU seconds with one thread; memory above what the process had before, or of the whole process. Calibration: "
        "four steps of four samples on latents of 8 x 8. OpenVINO: median of seven calls by turns.",
    ]
    for model, parts in found.items():
        about = parts.get("scales", {})
        size = f", {about['parameters'] / 1e6:.0f} M parameters" if "parameters" in about else ""
        dtype = str(ARCHITECTURES[model].dtype).removeprefix("torch.")
        lines += ["", f"## {model}{size}, {dtype}", "", "| what | measured | against | ratio |", "|---|--:|---|--:|"]
        lines += ["| " + " | ".join(row) + " |" for row in _cells(parts)]
        failed = [f"- `{part}`: {result['failed']}" for part, result in parts.items() if "failed" in result]
        lines += ["", "Failed:", "", *failed] if failed else []
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print a table, write results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="sd15", help=f"of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--parts", default=",".join(PARTS), help="all by default, in this order")
    parser.add_argument("--again", action="store_true", help="run parts that are there, too")
    parser.add_argument("--folder", type=Path, help="for models and graphs; by default a temporary one")
    arguments = parser.parse_args()
    file = RESULTS / "real_size.json"
    found: Found = json.loads(file.read_text())["found"] if file.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for model in arguments.models.split(","):
            folder = (arguments.folder or Path(temporary)) / model
            folder.mkdir(parents=True, exist_ok=True)
            parts = found.setdefault(model, {})
            for part in arguments.parts.split(","):
                if not arguments.again and part in parts and "failed" not in parts[part]:
                    continue
                print(f"{model}: {part}", flush=True)
                parts[part] = run_part(part, model, folder)
                with contextlib.redirect_stdout(io.StringIO()):  # the table is printed at the end
                    write("real_size", {"found": found}, _table(found))
    print(_table(found))


if __name__ == "__main__":
    main()
