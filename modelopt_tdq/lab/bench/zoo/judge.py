"""Is a backend's output that of the quantized model? Judged by the quantization noise, and by codes where need be."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.core.metrics import json_number, sqnr_db
from modelopt_tdq.errors import TdqWarning
from modelopt_tdq.lab.bench.zoo.stage import RIGHT, WRONG, Case, Cell

__all__ = ["FLOAT32_DB", "MARGIN_DB", "judged", "lowest", "noise"]

#: By how much the difference of a backend whose codes are not compared must lie below the quantization noise.
MARGIN_DB = 10.0

#: Differences this far below the signal are float32's own.
FLOAT32_DB = 90.0

#: By how much another backend may amplify rounding more than ONNX Runtime, where that was proven by codes.
_BACKENDS_DB = 6.0


def noise(exact: Mapping[str, Tensor], quantized: Mapping[str, Tensor]) -> dict[str, float]:
    """Signal to quantization noise in dB, of every output."""
    return {name: sqnr_db(value, quantized[name]) for name, value in exact.items()}


def lowest(decibels: Mapping[str, float]) -> float:
    """Of all outputs; NaN if one is."""
    return min(decibels.values(), key=lambda value: (not math.isnan(value), value))


def _found(case: Case, arrays: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """Quantized torch to the difference of a backend, of every output; and what of the outputs does not fit."""
    decibels = {}
    for name, expected in case.expected.items():
        if name not in arrays:
            return {}, f"the graph has no output {name}, but {', '.join(arrays)}"
        found = torch.as_tensor(arrays[name])
        if found.shape != expected.shape:
            return {}, f"output {name} has shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        decibels[name] = sqnr_db(expected, found.to(expected.dtype))
    return decibels, ""


def _below_the_noise(case: Case, decibels: Mapping[str, float]) -> bool:
    return all(value >= min(case.noise_db[name] + MARGIN_DB, FLOAT32_DB) for name, value in decibels.items())


def judged(case: Case, arrays: Mapping[str, Any], backend: str) -> Cell:
    """Compare what a backend gave for the held-out call.

    ONNX Runtime is right if it differs from quantized torch by float32's rounding in every output. Where rounding moves
    codes and grows, right are equal codes: every layer is given the reference's codes, and answers with its own.
    Another backend is right if its difference lies :data:`MARGIN_DB` below the quantization noise, or if it is as near
    to torch as ONNX Runtime, whose codes are right.

    Args:
        case: Quantized and exported.
        arrays: Outputs by name.
        backend: "onnxruntime", or another.
    """
    decibels, problem = _found(case, arrays)
    if problem:
        return {"verdict": WRONG, "reason": problem}
    found = lowest(decibels)
    cell: Cell = {"verdict": RIGHT, "db": json_number(found)}
    if backend == "onnxruntime":
        case.onnxruntime_db = found
    if found >= FLOAT32_DB or (backend != "onnxruntime" and _below_the_noise(case, decibels)):
        return cell
    apart = f"{found:.1f} dB from quantized torch, quantization noise {lowest(case.noise_db):.1f} dB"
    if backend != "onnxruntime":
        if case.amplified and case.onnxruntime_db is not None and found >= case.onnxruntime_db - _BACKENDS_DB:
            return cell | {"by": "as near as ONNX Runtime, whose codes are right"}
        return cell | {"verdict": WRONG, "reason": apart}
    case.codes = codes = case.codes or _codes(case)
    case.amplified = codes["verdict"] == RIGHT
    if case.amplified:
        return cell | {"by": codes["by"]}
    return cell | {"verdict": WRONG, "reason": f"{apart}; {codes['reason']}"}


def _codes(case: Case) -> Cell:
    """Codes of torch and of the ratio graph in ONNX Runtime, layer by layer, against the reference graph's."""
    from modelopt_tdq.compare.model import compare_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TdqWarning)
        found = compare_model(
            case.model,
            [case.held_out],
            backends=("torch", "onnxruntime"),
            reference_path=case.reference,
            lowered_path=case.ratio,
            progress=False,
        )
    if found.failures:
        raise found.failures[0].error
    count = sum(found.compared_codes.values())
    moved = sum(difference.differing for b in ("torch", "onnxruntime") for difference in found.codes(b))
    if not count:
        return {"verdict": WRONG, "reason": "no codes were compared"}
    if found.faults:
        fault = found.faults[0]
        return {"verdict": WRONG, "reason": f"codes of {fault.backend} at {fault.name}: {fault.difference}"}
    return {"verdict": RIGHT, "by": f"codes: rounding moved {moved} of {count}"}
