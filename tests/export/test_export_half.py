"""A float16 model: codes are computed in float32, products in float32 (ratio) or float16 (reference)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.export import LOWERINGS, codes_by_definition, lowered, set_table, trace
from support.zoo import ROWS, Zoo, quantized_zoo, sample

from modelopt_tdq.export.onnx_export import MarkerGraph
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession


@pytest.fixture(scope="module")
def half() -> tuple[Zoo, MarkerGraph]:
    model = quantized_zoo(torch.float16)
    return model, trace(model, _inputs(0.0), dynamic_batch=True)


def _inputs(*times: float) -> dict[str, Any]:
    return {"sample": sample(max(len(times), 2), seed=5).half(), "timestep": torch.tensor(times)}


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_equals_torch(half: Any, lowering: str, offset: bool) -> None:
    model, graph = half
    set_table(model, ROWS, offset=offset)
    exported = lowered(graph, lowering, model)
    inputs = _inputs(300.0)
    with torch.no_grad():
        expected = model(**inputs)
    found = OnnxRuntimeSession(exported.proto)(inputs)
    for name, want, got in zip(model.names, expected, found.values(), strict=True):
        assert got.dtype == np.float16
        error = np.abs(got.astype(np.float32) - want.float().numpy()).max() / want.abs().max().item()
        assert error < 4 * 2.0**-11, name  # four roundings to float16: value, weight, sum, bias
    compared, mismatched = codes_by_definition(exported, model, inputs, [300.0])
    assert compared > 1000
    assert mismatched == 0


def test_ratio_computes_products_in_float32(half: Any) -> None:
    model, graph = half
    set_table(model, ROWS)
    proto = lowered(graph, "ratio", model).proto
    types = {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info}
    products = [n for n in proto.graph.node if n.output[0].endswith("/product")]
    assert len(products) >= 17
    assert all(types[n.output[0]] == onnx.TensorProto.FLOAT for n in products)
    weights = [t for t in proto.graph.initializer if t.name.endswith("weight_quantizer/codes")]
    assert all(t.data_type == onnx.TensorProto.INT8 for t in weights)
