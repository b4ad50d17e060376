"""From the stored results of all stages to the one results file."""

from __future__ import annotations

import datetime
import platform
from typing import Any

from torch import Tensor

from modelopt_tdq.core.metrics import db_text, json_number
from modelopt_tdq.install import install_command
from modelopt_tdq.lab.demo.cache import StageResult, installed
from modelopt_tdq.lab.demo.deploy import DEPLOYED_VARIANTS
from modelopt_tdq.lab.demo.settings import DEPLOYED, DemoSettings, cores, recipe_label
from modelopt_tdq.lab.demo.stages import load, stages
from modelopt_tdq.lab.demo.variants import VARIANTS, variant_label
from modelopt_tdq.lab.provenance import cpu_name
from modelopt_tdq.lab.report.results import KIND, SCHEMA_VERSION

__all__ = ["gather"]

_PACKAGES = (
    "modelopt-tdq",
    "nvidia-modelopt",
    "torch",
    "diffusers",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt-rtx",
)


def gather(
    settings: DemoSettings, backends: frozenset[str], command: str
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Collect everything that the stages stored.

    Returns:
        The content of ``results.json``, and per recipe_name (and for "reference") the arrays for the figures.
    """
    names = {stage.name for stage in stages(settings, backends)}
    found = {name: load(name, settings, backends) for name in names}
    reference = found["reference"].tensors
    openvino = found["openvino"].values if "openvino" in found else None
    rows: list[dict[str, Any]] = [_full_precision(openvino)]
    for recipe_name in settings.recipes:
        values = found[f"recipe-{recipe_name}"].values
        for variant in VARIANTS:
            row = _row(recipe_name, variant, values[variant], settings.maintenance)
            if recipe_name == DEPLOYED:
                engine = found.get(f"deploy-{variant}", StageResult()).values.get("engine")
                row |= {"engine": engine, "openvino": _openvino(openvino, variant)}
            rows.append(row)
    results = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": _machine(),
        "versions": {package: installed(package) for package in _PACKAGES},
        "settings": settings.to_dict(),
        "model": {key: getattr(settings.chosen, key) for key in ("name", "title", "predicts", "remark")},
        "timesteps": [float(t) for t in reference["timesteps"]],
        "rows": rows,
        "deployment": {v: found[f"deploy-{v}"].values for v in DEPLOYED_VARIANTS if f"deploy-{v}" in found},
        "openvino": openvino,
        "notes": _notes(settings, backends, rows, openvino),
    }
    arrays = {"reference": reference, **{p: found[f"recipe-{p}"].tensors for p in settings.recipes}}
    arrays_names = {p: found[f"recipe-{p}"].values["names"] for p in settings.recipes}
    results["quantizers"] = arrays_names
    results["corrected"] = {p: found[f"recipe-{p}"].values.get("corrected", []) for p in settings.recipes}
    if settings.maintenance != "none":
        results["features"] = {p: found[f"recipe-{p}"].values["features"] for p in settings.recipes}
    return results, arrays


def _full_precision(openvino: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "recipe": "fp32",
        "label": "FP32",
        "variant": "fp32",
        "name": "reference",
        "sqnr_db": None,
        "sqnr_mean_db": None,
        "sqnr_worst_db": None,
        "psnr_db": None,
        "table": None,
        "engine": None,
        "openvino": _openvino(openvino, "fp32"),
    }


def _row(recipe_name: str, variant: str, values: dict[str, Any], maintenance: str) -> dict[str, Any]:
    decibels = [float(v) for v in values["sqnr_db"]]
    return {
        "recipe": recipe_name,
        "label": recipe_label(recipe_name),
        "variant": variant,
        "name": variant_label(recipe_name, variant, maintenance),
        "sqnr_db": values["sqnr_db"],
        "sqnr_mean_db": json_number(sum(decibels) / len(decibels)),
        "sqnr_worst_db": json_number(min(decibels)),
        "psnr_db": values["psnr_db"],
        "table": values["table"],
        "engine": None,
        "openvino": None,
    }


def _openvino(values: dict[str, Any] | None, variant: str) -> dict[str, Any] | None:
    if values is None or variant not in values["milliseconds"]:
        return None
    times = values["milliseconds"]
    return {
        "milliseconds": times[variant],
        "speedup_over_fp32": times["fp32"] / times[variant],
        "time_over_static": times[variant] / times["max"],
    }


def _machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _notes(
    settings: DemoSettings, backends: frozenset[str], rows: list[dict[str, Any]], openvino: dict[str, Any] | None
) -> list[str]:
    notes = [
        f"Calibrated on {settings.calibration_samples} trajectories of {settings.calibration_steps} steps, "
        f"judged on {settings.samples} others of {settings.steps} steps.",
        "ModelOpt max: ModelOpt's own static quantization, weights and activations by their largest magnitude. The "
        "other two rows differ in nothing but time: one scale, or one per calibrated step.",
    ]
    if any(row["recipe"] not in ("fp32", "int8", "fp8") for row in rows):
        notes.append(
            "Codes below 8 bits travel in INT8 tensors: those rows have the accuracy of their bits, and the kernels "
            "and speed of W8A8. Weights are rounded by what the layers read, and outputs of layers are corrected: by "
            "one gain and bias per channel in the static row, by those of each step in the TDQ row, where that "
            "predicts better; the latter then are most of its table."
        )
    if settings.maintenance != "none":
        notes.append(
            f"TDQ + {settings.maintenance}: the layers that depend on the time alone are quantized too (tdq_temporal, "
            f'maintenance="{settings.maintenance}"), with a row for every time of both schedules.'
        )
    engines = [row["engine"] for row in rows if row["engine"]]
    if engines:
        capabilities = ", ".join(engines[0]["compute_capabilities"])
        notes.append(
            f"{engines[0]['backend']} engines (compute capability {capabilities}) were built, not run: their kernels "
            "are counted, no GPU was timed."
        )
    if openvino is not None:
        deployed = [float(v) for v in openvino["sqnr_db"]]
        notes.append(
            f"OpenVINO on the CPU: batch {openvino['batch']}, {openvino['threads']} threads, median of "
            f"{openvino['repetitions']} interleaved repetitions. Its TDQ graph predicts with "
            f"{db_text(sum(deployed) / len(deployed))} dB mean SQNR."
        )
    if settings.engines and DEPLOYED in settings.recipes:
        missing = {"onnx": "onnx", "tensorrt_rtx": "tensorrt-rtx", "openvino": "openvino"}
        extras = ",".join(extra for backend, extra in missing.items() if backend not in backends)
        if extras:
            notes.append(f"Not deployed everywhere: {install_command(extras)}")
    elif not settings.engines:
        notes.append("Neither exported nor timed: --no-engines.")
    return notes
