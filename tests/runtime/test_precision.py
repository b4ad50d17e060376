"""Which kernel a quantized layer is judged by; no builder needed."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import modelopt_tdq as tdq
from modelopt_tdq.runtime.build.layers import EngineLayer
from modelopt_tdq.runtime.build.precision import float_layers, layer_precisions, render_precision, require_low_precision

#: As TensorRT-RTX 1.7.1 reports them: products of three layers in one kernel, a kernel that scales for another, a
#: product in generated code, one whose kernel has no name of the graph.
LAYERS = (
    EngineLayer("to_v+to_k+to_q_myl0_1", "gemm", ("Int8",), ("Float",), ("to_v", "to_k", "to_q")),
    EngineLayer("conv_myl0_2", "correlation", ("FP8", "Half"), ("Half",), ("conv", "residual")),
    EngineLayer("__myl_SlicMulAdd_myl0_3", "kgen", ("Half", "Half"), ("Half",), ("scaled", "conv", "deconv")),
    EngineLayer("deconv_myl0_4", "deconv", ("Float", "Float"), ("Float",), ("deconv",)),
    EngineLayer("__myl_CastMulCastFc_myl0_5", "runtime_fusion", ("Float",), ("Float",), ("linear",)),
    EngineLayer("__myl_RounCastMulSum_myl0_6", "kgen", ("Int8", "Float"), ("Float",), ("tiny",)),
    EngineLayer("__myl_fused_attention_myl0_7", "runtime_fusion", ("Int8", "Float"), ("Float",), ("qk", "pv")),
    EngineLayer("ungrouped_myl0_8", "gemm", ("Int4",), ("Half",), ("packed",)),
    EngineLayer("nameless_myl0_9", "gemm", ("Int8",), ("Float",), ()),
)
QUANTIZED = {
    "to_q": "MatMul",
    "to_k": "MatMul",
    "to_v": "MatMul",
    "conv": "Conv",
    "deconv": "ConvTranspose",
    "linear": "Gemm",
    "tiny": "MatMul",
    "qk": "MatMul",
    "pv": "MatMul",
    "packed": "MatMul",
    "lost": "MatMul",
}
EXPECTED = {
    "to_q": "INT8",
    "to_k": "INT8",
    "to_v": "INT8",
    "conv": "FP8",
    "deconv": "float",
    "linear": "float",
    "tiny": "float",
    "qk": "unknown",
    "pv": "unknown",
    "packed": "INT4",
    "lost": "unknown",
}


def report(layers: tuple[EngineLayer, ...] = LAYERS) -> tdq.EngineReport:
    return tdq.EngineReport(Path("m.engine"), "tensorrt_rtx", "1.7.1", ("8.9",), "", {}, QUANTIZED, layers)


def text(rendered: object) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(rendered)
    return console.file.getvalue()


def test_types() -> None:
    found = layer_precisions(LAYERS, QUANTIZED)
    assert {layer.name: layer.type for layer in found} == EXPECTED
    kernels = {layer.name: layer.kernel for layer in found}
    assert kernels["conv"] == "conv_myl0_2"
    assert kernels["deconv"] == "deconv_myl0_4"
    assert kernels["lost"] == ""
    assert {layer.name for layer in found if layer.low_precision} == {"to_q", "to_k", "to_v", "conv", "packed"}


def test_unknown_is_neither_float_nor_low_precision() -> None:
    assert float_layers(report()) == ("deconv", "linear", "tiny")
    with pytest.raises(tdq.TdqError, match=r"\['deconv', 'linear', 'tiny'\]: 3 quantized layers") as error:
        require_low_precision(report())
    assert error.value.report == report()
    assert not report().low_precision("qk")
    assert report().low_precision("to_k")
    with pytest.raises(tdq.TdqError, match="no kernel of the engine carries this name"):
        report().low_precision("lost")
    with pytest.raises(tdq.TdqError, match="no kernel of the engine carries this name"):
        float_layers(report(), ["lost"])
    require_low_precision(report(LAYERS[:2]))  # the rest is unknown then: no reason to refuse an engine


def test_table() -> None:
    shown = text(render_precision(report()))
    for name, kind in EXPECTED.items():
        (line,) = [line for line in shown.splitlines() if line.split()[1:2] == [name]]
        assert kind in line
    lines = [line for line in shown.splitlines() if any(f" {name} " in line for name in EXPECTED)]
    assert " deconv " in lines[0]  # what fell back is on top
    counts = text(render_precision(report(), full=False))
    assert "to_q" not in counts
    assert "4 MatMul" not in counts
    assert "3 MatMul" in counts
    all_well = tdq.EngineReport(Path("m"), "tensorrt_rtx", "1", (), "", {}, {"conv": "Conv"}, LAYERS)
    assert "conv_myl0_2" not in text(render_precision(all_well))
    assert "conv_myl0_2" in text(render_precision(all_well, full=True))
