"""Deployment in the demo: ONNX files, TensorRT-RTX engines that are built but not run, OpenVINO that is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.metrics import json_number, sqnr_db
from modelopt_tdq.errors import require
from modelopt_tdq.export.trace import OPSET
from modelopt_tdq.lab.demo.cache import StageResult
from modelopt_tdq.lab.demo.settings import DEPLOYED, DemoSettings, cores
from modelopt_tdq.lab.denoising import Prediction, sample_labels
from modelopt_tdq.lab.example_call import example_call
from modelopt_tdq.lab.judge import Reference
from modelopt_tdq.lab.model_folder import load_quantized

if TYPE_CHECKING:
    from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

__all__ = ["DEPLOYED_VARIANTS", "export_and_build", "measure_openvino"]

#: What is deployed: full precision, ModelOpt's static quantization, scales over time.
DEPLOYED_VARIANTS = ("fp32", "max", "tdq")

#: Interleaved repetitions of the OpenVINO measurement, and those before it that do not count.
REPETITIONS, WARM_UP = 25, 3


def _onnx_path(settings: DemoSettings, variant: str) -> Path:
    return settings.output / "deploy" / (f"{variant}.onnx" if variant == "fp32" else f"{DEPLOYED}-{variant}.onnx")


def _inputs(settings: DemoSettings, model: nn.Module) -> dict[str, Tensor]:
    """Of one call: a batch at one time, of the type that the scheduler has."""
    scheduler = settings.chosen.load_scheduler()
    scheduler.set_timesteps(settings.steps)
    return example_call(model, settings.batch, scheduler.timesteps[settings.steps // 2].reshape(1))


def export_and_build(
    settings: DemoSettings, variant: str, engine: bool, report: Callable[[float], None]
) -> StageResult:
    """Export one variant to ONNX; build its TensorRT-RTX engine."""
    from modelopt_tdq.export import export_onnx
    from modelopt_tdq.runtime.build.build import build_engine
    from modelopt_tdq.runtime.build.report import float_layers

    path = _onnx_path(settings, variant)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [str(path.relative_to(settings.output))]
    if variant == "fp32":
        require("onnxscript", "onnx")
        model, _ = settings.load()
        inputs = tuple(_inputs(settings, model).values())
        # from opset 21 on there is GroupNormalization, with which OpenVINO 2026.4 crashes on the terrain model
        program = torch.onnx.export(Prediction(model), inputs, dynamo=True, opset_version=OPSET, verbose=False)
        program.save(str(path))  # type: ignore[union-attr]
        return StageResult({}, files=files)
    model = load_quantized(settings.output / "models" / f"{DEPLOYED}-{variant}").model
    exported = export_onnx(model, path, _inputs(settings, model))
    values: dict[str, Any] = {
        "quantized": len(exported.quantized),
        "skipped": [list(pair) for pair in exported.skipped],
    }
    report(0.6)
    if engine:
        target = path.with_suffix(".engine")
        built = build_engine(path, target, allow_float=True)  # the page names the layers
        values["engine"] = {
            "kernels": built.kernels,
            "quantized": len(built.quantized),
            "in_float": list(float_layers(built)),
            "backend": f"TensorRT-RTX {built.backend_version}",
            "compute_capabilities": list(built.compute_capabilities),
            "megabytes": round(target.stat().st_size / 1e6, 1),
        }
        files.append(str(target.relative_to(settings.output)))
    return StageResult(values, files=files)


def measure_openvino(settings: DemoSettings, against: Reference, report: Callable[[float], None]) -> StageResult:
    """Time the three graphs in OpenVINO, interleaved; judge what the deployed TDQ graph predicts."""
    from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

    threads = cores()
    sessions = {v: OpenVinoSession(_onnx_path(settings, v), num_threads=threads) for v in DEPLOYED_VARIANTS}
    model, _ = settings.load()
    arrays = [value.numpy() for value in _inputs(settings, model).values()]
    seconds: dict[str, list[float]] = {variant: [] for variant in sessions}
    for repetition in range(WARM_UP + REPETITIONS):
        for variant, session in sessions.items():
            feeds = dict(zip(session.inputs, arrays, strict=True))
            start = time.perf_counter()
            session(feeds)
            elapsed = time.perf_counter() - start
            if repetition >= WARM_UP:
                seconds[variant].append(elapsed)
        report(0.5 * repetition / (WARM_UP + REPETITIONS))
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
    values: dict[str, Any] = {
        "threads": threads,
        "batch": settings.batch,
        "repetitions": REPETITIONS,
        "milliseconds": {variant: 1000.0 * value for variant, value in medians.items()},
        "spread": {v: [1000.0 * min(s), 1000.0 * max(s)] for v, s in seconds.items()},
    }
    values["sqnr_db"] = [json_number(v) for v in _predictions(sessions["tdq"], model, against, settings.batch)]
    return StageResult(values)


def _predictions(session: OpenVinoSession, model: nn.Module, against: Reference, batch: int) -> list[float]:
    """[S] SQNR of a deployed graph on the reference's inputs, in dB; its batch is fixed, the last one is padded."""
    decibels = []
    labels = sample_labels(model, len(against.start))
    for moment, inputs, expected in zip(against.timesteps, against.inputs, against.predictions, strict=True):
        found = []
        for first in range(0, len(inputs), batch):
            rows = torch.arange(first, min(first + batch, len(inputs)))
            padded = torch.cat([rows, rows[:1].expand(batch - len(rows))])
            arrays = [inputs[padded], moment.reshape(1), *(() if labels is None else (labels[padded],))]
            output = session({name: array.numpy() for name, array in zip(session.inputs, arrays, strict=True)})
            found.append(torch.from_numpy(next(iter(output.values()))[: len(rows), : inputs.shape[2]]))
        decibels.append(sqnr_db(expected, torch.cat(found)))
    return decibels
