"""What tests leave out of torch.onnx (``support/exporter.py``) changes nothing but names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support.export import trace
from support.models import FAMILIES, Family, fast_config
from torch import Tensor, nn
from torch.export import ExportedProgram


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


class _OperatorsOfOthers(nn.Module):
    """Operators that ONNX does not have, or has in one form only; at one size or at any."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(4, 4, 3, padding="same")
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.norm = nn.RMSNorm(4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = 1 - self.up(self.same(x)).square()
        h = self.norm(h.movedim(1, -1))
        first, second = h.flatten(-2).chunk(2, dim=-1)
        angles = torch.outer(torch.arange(4.0), torch.arange(3.0)).to(torch.float16, copy=False)
        tokens = h.reshape(x.shape[0] * 144, 4)
        whole = angles.to(x.dtype) + torch.arange(3) * x.mean()
        return first + second.unflatten(-1, (-1, 4)).flatten(-2), h.to("cpu"), tokens, whole


class _WritesInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        made = x * 2
        made[:, 0] = x[:, 1]
        return made


Ways = tuple[list[Any], Callable[[], None], int]


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch, torchs_own: list[tuple[Any, str, Any]]) -> Ways:
    """The programs that torch has traced once more; what has it do everything in its way from now on; what it did."""
    traced: list[Any] = []
    run = ExportedProgram.run_decompositions

    def counted(program: Any, *given: Any, **named: Any) -> Any:
        traced.append(program)
        return run(program, *given, **named)

    def in_torchs_way() -> None:
        traced.clear()
        for where, name, own in torchs_own:
            monkeypatch.setattr(where, name, own)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    return traced, in_torchs_way, 0 if torchs_own else 1


@pytest.mark.parametrize(
    ("name", "dynamic_batch"),
    [
        ("plain", True),
        pytest.param("dit", True, marks=pytest.mark.slow),
        pytest.param("flux", False, marks=pytest.mark.slow),
    ],
)
def test_the_same_graph(name: str, dynamic_batch: bool, ways: Ways) -> None:
    family: Family = FAMILIES[name]
    torch.manual_seed(0)
    model = mtq.quantize(family.make().eval(), fast_config(), family.forward_loop())
    inputs = family.inputs(2, torch.tensor(450.0), 50)
    traced, in_torchs_way, before = ways
    short = ir.to_proto(trace(model, inputs, dynamic_batch).model)
    assert len(traced) == before
    in_torchs_way()
    whole = ir.to_proto(trace(model, inputs, dynamic_batch).model)
    assert len(traced) == 1
    assert _anonymous(short) == _anonymous(whole)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("make", [_OperatorsOfOthers, _WritesInPlace])
def test_operators_that_are_made_of_others(make: type[nn.Module], dynamic: bool, ways: Ways) -> None:
    module, shapes = make().eval(), ({0: torch.export.Dim("batch")},) if dynamic else None
    traced, in_torchs_way, before = ways

    def graph() -> list[Any]:
        with torch.no_grad():
            program = torch.export.export(module, (torch.randn(3, 4, 6, 6),), dynamic_shapes=shapes, strict=False)
            return _anonymous(ir.to_proto(torch.onnx.export(program, dynamo=True, verbose=False).model))

    short = graph()
    assert len(traced) == (1 if make is _WritesInPlace else before)
    in_torchs_way()
    assert short == graph()
    assert len(traced) == 1
