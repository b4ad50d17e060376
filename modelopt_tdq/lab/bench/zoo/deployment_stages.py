"""The stages of deployment: export, ONNX Runtime, OpenVINO, TensorRT-RTX."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import modelopt_tdq as tdq
from modelopt_tdq.core.metrics import json_number, sqnr_db
from modelopt_tdq.errors import TdqError, TdqWarning
from modelopt_tdq.export.report import UNUSED
from modelopt_tdq.export.trace import OPSET
from modelopt_tdq.lab.bench.zoo.judge import MARGIN_DB, judged
from modelopt_tdq.lab.bench.zoo.stage import REFUSED, RIGHT, WRONG, Case, Cell
from modelopt_tdq.runtime.build.onnx_model import read_onnx
from modelopt_tdq.runtime.build.precision import FLOAT, UNKNOWN
from modelopt_tdq.runtime.build.report import EngineReport

__all__ = ["export", "onnxruntime", "openvino", "run_onnxruntime", "temporal_export", "tensorrt_rtx"]

#: GPU that engines are compiled for: one, to save time.
_CAPABILITY = "8.9"


def _full_precision_export(case: Case) -> str:
    """What torch's own exporter says of the model without any quantizer; "" if it exports it."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                case.entry.build(), (), kwargs=case.held_out, dynamo=True, opset_version=OPSET, verbose=False
            )
    except Exception as error:  # whatever it is: it is what the row shall say
        return f"{type(error).__name__}: {error}"
    return ""


def export(case: Case) -> Cell:
    """Both lowerings of one trace. Where that fails, torch's own export of the full-precision model beside it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TdqWarning)
            report = tdq.export_onnx(case.model, case.ratio, case.held_out, reference_path=case.reference)
    except TdqError as error:
        plain = _full_precision_export(case)
        told = "torch cannot export it in full precision either" if plain else "torch exports it in full precision"
        return {"verdict": REFUSED, "reason": error.problem, "full_precision": plain or "exports", "told": told}
    floats = {name: reason for name, reason in report.skipped if reason != UNUSED}
    cell: Cell = {
        "verdict": RIGHT,
        "low_precision": len(report.quantized),
        "unused": len(report.skipped) - len(floats),
        "skipped": floats,
        "limited": dict(report.limited),
        "constants": list(report.constants),
        "bytes": case.ratio.stat().st_size,
    }
    if floats:
        name, reason = next(iter(floats.items()))
        return cell | {"verdict": WRONG, "reason": f"{len(floats)} not in low precision, the first {name}: {reason}"}
    return cell


def _feeds(case: Case, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of the call the graph takes: inputs that the output does not depend on are gone."""
    return {name: value for name, value in case.feeds.items() if name in inputs}


def run_onnxruntime(case: Case, path: Path) -> dict[str, Any]:
    """Outputs of a graph for the held-out call, at ONNX Runtime's own optimizations, one thread."""
    session = tdq.OnnxRuntimeSession(path, num_threads=1, optimization="all")
    return session(_feeds(case, session.inputs))


def onnxruntime(case: Case) -> Cell:
    """The ratio graph, and the reference graph, at ONNX Runtime's own optimizations."""
    reference = judged(case, run_onnxruntime(case, case.reference), "onnxruntime")
    ratio = judged(case, run_onnxruntime(case, case.ratio), "onnxruntime")
    ratio["reference_db"] = reference.get("db")
    if ratio["verdict"] == RIGHT and reference["verdict"] != RIGHT:
        return ratio | {"verdict": reference["verdict"], "reason": f"the reference graph: {reference['reason']}"}
    return ratio


def openvino(case: Case) -> Cell:
    """The ratio graph on the CPU, one thread."""
    session = tdq.OpenVinoSession(case.ratio, num_threads=1)
    return judged(case, session(_feeds(case, session.inputs)), "openvino")


def _built(case: Case, path: Path) -> EngineReport:
    engine = case.folder / "model.engine"
    return tdq.build_engine(path, engine, compute_capabilities=(_CAPABILITY,), allow_float=True)


def tensorrt_rtx(case: Case) -> Cell:
    """Build, without a GPU: every quantized layer must be in low precision.

    Where that is refused and sizes depend on the numbers of inputs, such as a mask, with these as constants.
    """
    constants: tuple[str, ...] = ()
    try:
        report = _built(case, case.ratio)
    except TdqError:
        constants = read_onnx(case.ratio).sized_by
        if not constants:
            raise
        path = case.folder / "constants.onnx"
        tdq.export_onnx(case.model, path, case.held_out, constants=constants)
        report = _built(case, path)
    floats = [layer.name for layer in report.precisions if layer.type == FLOAT]
    unknown = [layer.name for layer in report.precisions if layer.type == UNKNOWN]
    cell: Cell = {
        "verdict": RIGHT,
        "layers": len(report.quantized),
        "low_precision": len(report.quantized) - len(floats) - len(unknown),
        "kernels": report.kernels,
        "constants": list(constants),
        "float": floats,
        "unknown": unknown,
    }
    if floats or unknown:
        first = (floats or unknown)[0]
        reason = f"{len(floats)} layers in float, {len(unknown)} that cannot be told, the first {first}"
        return cell | {"verdict": WRONG, "reason": reason}
    return cell


def temporal_export(case: Case) -> Cell:
    """The model with cached temporal features: exported, in ONNX Runtime, against the same in torch."""
    if case.cached is None:
        raise RuntimeError("there are no cached features")
    path = case.folder / "cached.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TdqWarning)
        report = tdq.export_onnx(case.cached, path, case.held_out)
    outputs = run_onnxruntime(case, path)
    expected = case.outputs(case.cached)
    decibels = {name: sqnr_db(value, torch.as_tensor(outputs[name])) for name, value in expected.items()}
    worst = min(decibels, key=lambda name: decibels[name] - case.noise_db[name])
    cell: Cell = {"verdict": RIGHT, "features": len(report.features), "db": json_number(decibels[worst])}
    if decibels[worst] >= case.noise_db[worst] + MARGIN_DB:
        return cell
    if case.amplified and case.onnxruntime_db is not None and decibels[worst] >= case.onnxruntime_db - 3:
        return cell | {"by": "as near as without features, where the codes are right"}
    reason = f"{decibels[worst]:.1f} dB from torch, quantization noise {case.noise_db[worst]:.1f} dB"
    return cell | {"verdict": WRONG, "reason": reason}
