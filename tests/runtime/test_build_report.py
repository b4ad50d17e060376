"""The text forms of the list of layers; no builder needed."""

import pytest

import modelopt_tdq as tdq
from modelopt_tdq.runtime.build.report import EngineLayer, parse_layers

# TensorRT-RTX 1.7.1.116, shortened
RTX = """Layers:
Name: __myl_SiluMinMaxRounCast_myl0_0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [2,64], Datatype: Float, \
Format: (Linear) Row major linear format }], Constants: [ { Name: c, Dimensions: [1], Datatype: Int32, Format: \
(Linear) Row major linear format }], Outputs: [ { Name: y[0], Dimensions: [2,64], Datatype: Int8, Format: (NHWC) \
Channel major format }, { Name: z, Dimensions: [1], Datatype: Int64, Format: (Linear) Row major linear format }], \
TacticName: __myl_x, StreamId: 0, Metadata: [ONNX Layer: Mul_2][ONNX Layer: /conv1/input_quantizer/Quantize]
Name: __mye1_myl0_1, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , \
StreamId: 0, EventId: 1, Metadata:\x20
Name: a+b_myl0_2, LayerType: gemm, Inputs: [ { Name: y, Dimensions: [2,64], Datatype: FP8, Format: (Linear) Row }], \
Constants: [], Outputs: [ { Name: o, Dimensions: [2,64], Datatype: Half, Format: (Linear) Row }], TacticName: t, \
StreamId: 0, Metadata: [ONNX Layer: a]\x1e[ONNX Layer: b[1]]\x1e[ONNX Layer: a]

I/O Tensors:
 Name: x, IOMode: Input, DataType: Float
"""

# The older spelling, of TensorRT 10, where type and format are one field
OLDER = """Layers:
Name: conv, LayerType: CaskConvolution, Inputs: [ { Name: q, Location: Device, Dimensions: [1,64,8,8], \
Format/Datatype: Thirty-two wide channel vectorized row major Int8 format }], Outputs: [ { Name: y, Location: Device, \
Dimensions: [1,64,8,8], Format/Datatype: Row major linear FP16 format }], ParameterType: Convolution, Kernel: [3,3], \
TacticName: t, StreamId: 0, Metadata: [ONNX Layer: conv]
"""


def test_kernels_events_types_and_nodes() -> None:
    assert parse_layers(RTX) == (
        EngineLayer(
            "__myl_SiluMinMaxRounCast_myl0_0",
            "kgen",
            ("Float",),
            ("Int8", "Int64"),
            ("Mul_2", "/conv1/input_quantizer/Quantize"),
        ),
        EngineLayer("__mye1_myl0_1", "signal", (), (), ()),
        EngineLayer("a+b_myl0_2", "gemm", ("FP8",), ("Half",), ("a", "b[1]")),
    )
    assert [layer.is_kernel for layer in parse_layers(RTX)] == [True, False, True]
    assert [layer.low_precision for layer in parse_layers(RTX)] == [False, False, True]


def test_type_and_format_in_one_field() -> None:
    assert parse_layers(OLDER) == (EngineLayer("conv", "CaskConvolution", ("Int8",), ("Half",), ("conv",)),)
    assert parse_layers(OLDER)[0].low_precision


def test_elementwise_code_that_reads_codes_is_no_evidence() -> None:
    cast = EngineLayer("cast", "kgen", ("Int8",), ("Float",), ("conv",))
    assert not cast.low_precision


def test_an_unknown_form_is_an_error_not_an_empty_report() -> None:
    with pytest.raises(tdq.TdqError, match="in a form not known here"):
        parse_layers("Layers:\nconv: Int8 -> Float\n")
