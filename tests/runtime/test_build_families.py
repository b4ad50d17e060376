"""Denoisers of several families in TensorRT-RTX: every quantized layer in low precision, hardly a kernel more.

All families, and both formats of each: ``benchmarks/family_kernels.py``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support.denoisers import one_row, quantized_denoiser
from support.export import Lowered, lowered, set_table, trace
from support.models import calls, quantized
from support.zoo import ROWS, quantized_zoo, sample

import modelopt_tdq as tdq
from modelopt_tdq.runtime.build.report import EngineReport, float_layers, require_low_precision

pytest.importorskip("diffusers")
pytest.importorskip("tensorrt_rtx")

FP8 = (4, 3)
TARGET = {"compute_capabilities": ("8.9",)}


def build(graph: Lowered, folder: Path, **options: Any) -> EngineReport:
    onnx.save(graph.proto, folder / "m.onnx")
    return tdq.build_engine(folder / "m.onnx", folder / "m.engine", **TARGET, **options)


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        ("dit", 8),
        pytest.param("sd3", FP8, marks=pytest.mark.slow),
        ("stable_diffusion", FP8),
    ],
)
def test_low_precision_and_hardly_a_kernel_more(family: str, bits: Any, tmp_path: Path) -> None:
    denoiser = quantized_denoiser(family, bits)
    graph = trace(denoiser.model, denoiser.inputs)
    ratio = lowered(graph, "ratio", denoiser.model)
    with one_row(denoiser.model) as table:
        static = lowered(graph, "ratio", denoiser.model)
    assert ratio.context.skipped == {}
    assert (~table.is_static).sum() > 10
    reports = [build(each, tmp_path) for each in (ratio, static)]
    for report in reports:
        assert len(report.quantized) == len(table.names)
        require_low_precision(report)
        codes = {layer.inputs[0] for layer in report.layers if layer.low_precision}
        assert codes == {"Int8" if bits == 8 else "FP8"}
    assert reports[0].kernels <= math.ceil(1.02 * reports[1].kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_kind_of_layer(dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized_zoo(dtype)
    set_table(model, ROWS)
    graph = lowered(trace(model, {"sample": sample().to(dtype), "timestep": torch.tensor(300.0)}), "ratio")
    report = build(graph, tmp_path, allow_float=True)
    assert len(report.quantized) == 20
    limited = {name.rpartition(".")[0] for name in graph.context.limited}
    assert {name.removeprefix("node/").removesuffix("/product") for name in float_layers(report)} == limited


def test_packed_weights_stay_packed_in_the_engine(tmp_path: Path) -> None:
    model = quantized(weight_bits=4)
    inputs = {"sample": calls()[0][0], "timestep": torch.tensor(300.0)}
    reports = {}
    for pack in ("none", "direct"):
        path = tdq.export_onnx(model, tmp_path / "m.onnx", inputs, pack_weights=pack).path
        reports[pack] = tdq.build_engine(path, tmp_path / "m.engine", **TARGET)
        require_low_precision(reports[pack])
    # the one matrix product of the model is unpacked in front
    assert reports["direct"].kernels == reports["none"].kernels + 1


def test_the_cast_of_packed_weights_is_refused(tmp_path: Path) -> None:
    """As the documentation of pack_weights says; if this fails, TensorRT-RTX has learned it."""
    inputs = {"sample": calls()[0][0], "timestep": torch.tensor(300.0)}
    path = tdq.export_onnx(quantized(weight_bits=4), tmp_path / "m.onnx", inputs, pack_weights="cast").path
    with pytest.raises(tdq.TdqError, match="the builder failed"):
        tdq.build_engine(path, tmp_path / "m.engine", **TARGET)
