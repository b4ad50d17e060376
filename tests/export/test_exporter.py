"""What tests leave out of torch.onnx (``support/exporter.py``) changes nothing but names."""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support.export import trace
from support.models import FAMILIES, Family, fast_config
from torch.onnx._internal.exporter import _decomp, _fx_passes


def _anonymous(proto: onnx.ModelProto) -> list[Any]:
    """The graph with its values numbered in the order of their use."""
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    numbers: dict[str, int] = {}

    def known(name: str) -> Any:
        if name in constants:
            value = np.ascontiguousarray(constants[name])
            return str(value.dtype), value.shape, value.tobytes()
        return numbers.setdefault(name, len(numbers))

    def shape(value: onnx.ValueInfoProto) -> Any:
        return known(value.name), value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim)

    found: list[Any] = [shape(value) for value in proto.graph.input]
    for node in proto.graph.node:
        # no size is zero: what a Reshape would make of one plays no part
        kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
        attributes = sorted((a.name, a.SerializeToString(deterministic=True)) for a in kept)
        found.append((node.domain, node.op_type, [known(n) for n in node.input], [known(n) for n in node.output]))
        found.append(attributes)
    return [*found, *(shape(value) for value in proto.graph.output)]


CASES = {"plain": FAMILIES["plain"], "dit": FAMILIES["dit"]}


@pytest.mark.parametrize("name", CASES)
def test_the_same_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family: Family = CASES[name]
    torch.manual_seed(0)
    model = mtq.quantize(family.make().eval(), fast_config(), family.forward_loop())
    inputs = family.inputs(2, torch.tensor(450.0), 50)
    traced = []

    def counted(program: Any, registry: Any) -> Any:
        """As torch has it."""
        traced.append(program)
        operators = set(_decomp.get_onnx_implemented_overloads(registry))
        return program.run_decompositions(_decomp.create_onnx_friendly_decomposition_table(operators))

    short = ir.to_proto(trace(model, inputs, dynamic_batch=True).model)
    monkeypatch.setattr(_fx_passes, "decompose_with_registry", counted)
    whole = ir.to_proto(trace(model, inputs, dynamic_batch=True).model)
    assert len(traced) == 1
    assert _anonymous(short) == _anonymous(whole)
