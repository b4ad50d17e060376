"""Figures of the pages and of the README: read from benchmarks/results, as text.

A page writes ``{{ demo_gain("int8", "max", "psnr_db") }}``; :mod:`render` puts in what the results say on the day the
page is built. A name that the results do not have is an error of the build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@cache
def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def number(value: float, digits: int = 1) -> str:
    """With a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def _span(values: Iterable[float], digits: int = 2) -> str:
    values = list(values)
    return f"{number(min(values), digits)} to {number(max(values), digits)}"


def made(name: str) -> str:
    """Command, date and machine of a results file."""
    found = _results(name)
    machine = found["machine"]
    if isinstance(machine, dict):
        machine = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}"
    return f"`{found['command']}`, {found.get('date') or found['created'][:10]}, {machine}"


# The demo.


@cache
def _demo() -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["recipe"], row["variant"]): row for row in _results("demo")["rows"]}


def _means(row: dict[str, Any]) -> tuple[str, str, str]:
    return tuple(number(row[key]) for key in ("sqnr_mean_db", "sqnr_worst_db", "psnr_db"))  # type: ignore[return-value]


def demo_table(*recipes: str) -> str:
    """Bits, scales, SQNR mean and worst, PSNR; under the names that the demo prints."""
    lines = ["| bits | scales | SQNR mean, dB | SQNR worst step, dB | PSNR, dB |", "|---|---|--:|--:|--:|"]
    for recipe in recipes or ("int8", "w8a4", "w4a8", "w4a4"):
        for variant in ("max", "static", "tdq"):
            row = _demo()[recipe, variant]
            cells = [row["label"] if variant == "max" else "", row["name"], *_means(row)]
            lines.append(
                "| " + " | ".join(f"**{cell}**" if variant == "tdq" and cell else cell for cell in cells) + " |"
            )
    return "\n".join(lines)


def demo_gain(recipe: str, over: str, key: str = "sqnr_mean_db") -> str:
    """dB that scales over time are ahead of ``max`` or ``static``."""
    return number(_demo()[recipe, "tdq"][key] - _demo()[recipe, over][key])


def demo_time_gains(key: str = "sqnr_mean_db") -> str:
    """What time alone gives, over all four recipes."""
    return _span((_demo()[r, "tdq"][key] - _demo()[r, "static"][key] for r in ("int8", "w8a4", "w4a8", "w4a4")), 1)


def demo_kernels() -> str:
    """Kernels over time against static, and their ratio."""
    ours, static = (_demo()["int8", variant]["engine"]["kernels"] for variant in ("tdq", "max"))
    return f"{ours} against {static} kernels, {ours / static:.2f}"


def demo_openvino() -> str:
    """Time over that of the static graph."""
    return number(_demo()["int8", "tdq"]["openvino"]["time_over_static"], 2)


def demo_speedup() -> str:
    """How many times faster than full precision."""
    return number(_demo()["int8", "tdq"]["openvino"]["speedup_over_fp32"])


# The converged model.


def converged(scales: str, quantized: int) -> str:
    """SQNR mean / worst step and PSNR."""
    (row,) = [r for r in _results("converged_model")["rows"] if (r["scales"], r["quantized"]) == (scales, quantized)]
    return f"{number(fmean(row['sqnr_db']))} / {number(min(row['sqnr_db']))} dB, PSNR {number(row['psnr_db'])} dB"


def converged_gain(quantized: int, key: str = "sqnr_db") -> str:
    """dB that scales over time are ahead of static ones, everything else alike."""
    rows = {r["scales"]: r for r in _results("converged_model")["rows"] if r["quantized"] == quantized}
    ours, static = (
        [rows[name][key]] if key == "psnr_db" else rows[name][key] for name in ("time-shift", "static-shift")
    )
    return number(fmean(ours) - fmean(static))


# Speed.


def openvino_ratio(name: str = "openvino_speed") -> str:
    """Time over the static graph's, least to most of all rounds and batches."""
    return _span(row["tdq_over_static"] for row in _results(name)["rows"])


def kernel_ratio(which: str) -> str:
    """Kernels over time against static: ``families``, or the bundled ``UNet`` or ``DiT``."""
    rows = _results("family_kernels")["rows"]
    wanted = [
        row
        for row in rows
        if (row["model"] == f"bundled {which}" or (which == "families" and "bundled" not in row["model"]))
    ]
    return _span(row["kernels"] / row["static_kernels"] for row in wanted)


def kernels_in_float() -> int:
    """Quantized layers of all engines of family_kernels that run in float."""
    return sum(len(row["floats"]) for row in _results("family_kernels")["rows"])


@cache
def _gpu(part: str) -> list[dict[str, Any]]:
    (found,) = [p for p in _results("gpu/gpu")["parts"] if p["part"] == part]
    return list(found["rows"])


def gpu_products(*columns: str) -> str:
    """Time of a layer against that with a constant scale, least to most, over the given columns."""
    return _span((row[c] for row in _gpu("products") for c in columns), 2)


def gpu_lookup() -> str:
    """Microseconds of a launch, least to most."""
    return _span((row["kernel us"] for row in _gpu("lookup") if "kernel us" in row), 1)


def gpu_name() -> str:
    """Of the GPU that was at hand."""
    return str(_results("gpu/gpu")["gpu"])


def qat_ratio() -> str:
    """Time of a training step with TDQ against static LSQ."""
    return _span(r["TDQ"] / r["static LSQ"] for r in _results("qat_step")["rounds"])


def temporal_ratio() -> str:
    """OpenVINO: looked-up features against the layers in full precision."""
    rows = _results("temporal_speed")["rows"]
    return _span(
        row["median_ms"][name] / row["median_ms"]["layers in full precision"]
        for row in rows
        for name in ("cache, nearest", "cache, linear")
    )


# Size.


def real_size(what: str) -> str:
    """Ratios and memory of SD 1.5 at random weights."""
    found = _results("real_size")["found"]
    sd = found["sd15"]
    return {
        "quantize": lambda: number(sd["scales"]["quantize_s"] / sd["static"]["quantize_s"]),
        "protected": lambda: number(sd["protected"]["quantize_s"] / sd["static"]["quantize_s"]),
        "forward": lambda: number(sd["forward"]["scales_s"] / sd["forward"]["static_s"], 2),
        "export": lambda: number(sd["export"]["export_s"] / sd["export_float"]["export_s"]),
        "export_memory": lambda: number(sd["export"]["export_process_gib"] / sd["export"]["weights_gib"]),
        "openvino": lambda: number(sd["openvino"]["ratio_32"], 2),
        "sdxl_export_gib": lambda: number(found["sdxl"]["export"]["export_process_gib"]),
    }[what]()


# Tables that the benchmarks wrote as Markdown.


def table(name: str, heading: str | None = None) -> str:
    """The first table of a Markdown file of the results, or of the section of this heading."""
    text = (RESULTS / f"{name}.md").read_text()
    if heading is not None:
        text = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    found = re.search(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{name}.md has no table")
    return found[0].strip()


def included(name: str, level: int = 2) -> str:
    """A whole Markdown file of the results, its headings from ``level`` on."""
    text = (RESULTS / f"{name}.md").read_text()
    return re.sub(r"^#+", lambda match: "#" * (len(match[0]) + level - 1), text, flags=re.MULTILINE).strip()


# The zoo.

_VERDICTS = {"right": "yes", "none": "–", "not run": "not run"}


def zoo_summary() -> str:
    """The matrix in a sentence."""
    from modelopt_tdq.lab.bench.zoo.present import summary

    return summary(_results("zoo")["runs"])


def zoo_matrix() -> str:
    """A row per class: what works, in words."""
    stages = {
        "quantize": "calibrates",
        "restore": "saved and restored",
        "temporal": "temporal features",
        "export": "exported",
        "onnxruntime": "ONNX Runtime",
        "openvino": "OpenVINO",
        "tensorrt_rtx": "TensorRT-RTX (built)",
    }
    lines = ["| class | weights quantized | " + " | ".join(stages.values()) + " |", "|---" * (len(stages) + 2) + "|"]
    for name, run in sorted(_results("zoo")["runs"].items()):
        cells = [run["stages"].get(stage, {"verdict": "none"})["verdict"] for stage in stages]
        share = run["stages"]["quantize"].get("share_of_weights")
        shown = [_VERDICTS.get(cell, f"**{cell}**") for cell in cells]
        lines.append(f"| {name} | {'–' if share is None else f'{100 * share:.0f} %'} | {' | '.join(shown)} |")
    return "\n".join(lines)


def zoo_misses() -> str:
    """Every cell that is not right, with its reason."""
    lines = ["| class | stage | | reason |", "|---|---|---|---|"]
    for name, run in sorted(_results("zoo")["runs"].items()):
        for stage, cell in run["stages"].items():
            if cell["verdict"] in ("wrong", "refused", "failed"):
                reason = " ".join(str(cell.get("reason", "")).split()).replace("|", "\\|")
                reason = reason if len(reason) <= 240 else reason[:237] + "..."
                lines.append(f"| {name} | {stage} | {cell['verdict']} | {_code(reason)} |")
    return "\n".join(lines)


def _code(text: str) -> str:
    """As code, whatever stands in it: messages hold brackets and stars."""
    fence = "``" if "`" in text else "`"
    return f"{fence} {text} {fence}"


# Against what people deploy today.

_THEIRS = ("nvidia", "nvidia-64", "nvidia-smoothquant", "max", "mse", "dynamic-tensor-all", "dynamic-token-all")
_OURS = ("time", "offsets", "smoothing", "shifts", "margin", "rounding", "corrections")


@cache
def _rivals(model: str, bits: str) -> dict[str, dict[str, Any]]:
    """Rows that quantize every layer of the recipe."""
    runs = _results("rivals")["runs"].values()
    return {r["row"]: r for r in runs if (r["model"], r["format"]) == (model, bits) and r["layers"] == r["of_layers"]}


def rivals_lead(model: str, bits: str, key: str = "mean_sqnr_db") -> str:
    """dB of our best row over the best row of what others deploy, all of which quantize the same layers."""
    rows = _rivals(model, bits)
    theirs = [row[key] for name, row in rows.items() if name in _THEIRS or name.startswith("dynamic")]
    return number(max(rows[name][key] for name in _OURS if name in rows) - max(theirs))


def rivals_table() -> str:
    """The rows that people choose between, all of which quantize the same layers: SQNR mean / worst step, PSNR."""
    shown = {
        "ModelOpt max": ("max",),
        "NVIDIA's example, percentile": ("nvidia-64",),
        "dynamic per token": ("dynamic-token-all", "dynamic-token"),
        "static, with all of ours but time": ("static-all",),
        "**over time, the recipe**": ("corrections",),
    }
    cases = [(model, bits) for model in ("unet", "dit") for bits in ("W8A8", "W4A8", "W4A4")]
    titles = {"unet": "UNet", "dit": "DiT"}
    lines = [
        f"| | {' | '.join(f'{titles[model]} {bits}' for model, bits in cases)} |",
        "|---|" + "--:|" * len(cases),
    ]
    best = {case: max(row["mean_sqnr_db"] for row in _rivals(*case).values()) for case in cases}
    for title, names in shown.items():
        cells = []
        for case in cases:
            row = next((_rivals(*case)[name] for name in names if name in _rivals(*case)), None)
            if row is None:
                cells.append("–")
                continue
            mean = number(row["mean_sqnr_db"])
            mean = f"**{mean}**" if row["mean_sqnr_db"] == best[case] else mean
            cells.append(f"{mean} / {number(row['worst_sqnr_db'])}, {number(row['psnr_db'])}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rivals_time(model: str) -> str:
    """dB that time gives over static scales, everything else alike, least to most over the bits."""
    return _span(
        (
            _rivals(model, bits)[ours]["mean_sqnr_db"] - _rivals(model, bits)[static]["mean_sqnr_db"]
            for bits in ("W8A8", "W4A8", "W4A4")
            for ours, static in (("time", "static"), ("corrections", "static-all"))
        ),
        1,
    )


# Tables of the TDQ supplementary.


@cache
def _supplement(model: str, which: int) -> dict[str, list[str]]:
    text = table(f"supplement/{model}_quick_table{which}")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def supplement_loss(model: str, which: int, row: str) -> str:
    """Test loss over that of full precision, %: of the ``UNet2DModel`` or the ``DiTTransformer2DModel``."""
    return f"+{_supplement(model, which)[row][2]} %"


def reconstruction_table(bits: str) -> str:
    """SQNR of the noise prediction by reconstruction: kinds of intervals down, samples across."""
    kinds = {
        "static": "S1",
        "S20": "S20",
        "optimal bins, at most 7": "optimal, at most 7",
        "thin": "thin",
        "TDQ (MLP)": "TDQ",
    }
    models = {"DiT": "DiTTransformer2DModel", "UNet": "UNet2DModel"}
    heads = [f"{name}, {samples} samples" for name in models for samples in (256, 64, 8)]
    lines = [f"| {bits} | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    for shown, kind in kinds.items():
        cells = [
            _supplement(m, 4)[f"{bits}, {samples} samples, {kind}"][3]
            for m in models.values()
            for samples in (256, 64, 8)
        ]
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


# Corrections of layers' outputs.


def correction_table() -> str:
    """SQNR mean / worst, PSNR; without, static, by auto."""
    models = [("unet", "w4a8"), ("unet", "w4a4"), ("dit", "w4a8"), ("dit", "w4a4")]
    rows = {
        (r["model"], r["recipe"], r["correction"]): r
        for r in _results("layer_correction")["rows"]
        if r["smoothing"] == "none"
    }
    costs = {(c["model"], c["recipe"]): c for c in _results("layer_correction")["costs"]}
    lines = ["| | " + " | ".join(f"{m} {b.upper()}" for m, b in models) + " |", "|---|" + "--:|" * len(models)]
    names = {
        "none": "scales over time",
        "static": "static corrections, not judged",
        "auto": "**corrections over time (`auto`)**",
    }
    for kind, name in names.items():
        found = [rows[(*m, kind)] for m in models]
        cells = [f"{number(fmean(r['sqnr_db']))} / {number(min(r['sqnr_db']))}, {number(r['psnr_db'])}" for r in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    kernels = [f"{costs[m]['kernels']['none']} → {costs[m]['kernels']['per_step']}" for m in models]
    times = [number(costs[m]["milliseconds"]["per_step"] / costs[m]["milliseconds"]["none"], 2) for m in models]
    lines.append(f"| kernels in TensorRT-RTX (built, not run), without → with | {' | '.join(kernels)} |")
    lines.append(f"| OpenVINO, one thread, time with / without | {' | '.join(times)} |")
    return "\n".join(lines)


# Wrong scales that a comparison catches.


def named_faults() -> str:
    """Of the faults caught by codes, those whose layer was named right."""
    pairs = re.findall(r"\| (\d+) of (\d+) \|", (RESULTS / "seeded_faults.md").read_text())
    return f"{sum(int(a) for a, _ in pairs)} of {sum(int(b) for _, b in pairs)}"


# Lines of files that readers are told to copy from.


def lines_of(path: str) -> int:
    """Of a file of the repository."""
    return len((ROOT / path).read_text().splitlines())


FIGURES = {
    name: value
    for name, value in dict(globals()).items()
    if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == __name__
}
