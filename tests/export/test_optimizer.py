"""Torch's optimizer, quicker: the same graph."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnxscript import rewriter
from torch import Tensor, nn

from modelopt_tdq.export.optimizer import optimize


class _Halves(nn.Module):
    """Slices of a tensor, which the rule is about, and others."""

    def forward(self, x: Tensor) -> Tensor:
        one, other = x[:, 0:4], x[:, 4:8]
        return one * torch.sigmoid(other) + x.flip(1)[:, 1:5]


@pytest.fixture(autouse=True)
def as_users_have_it(torchs_own: list[tuple[Any, str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' exporter leaves out the same."""
    for owner, name, own in torchs_own:
        monkeypatch.setattr(owner, name, own)


def _exported() -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(_Halves(), (torch.ones(2, 8),), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    return program


def test_the_graph_is_that_of_torch() -> None:
    ours, theirs = _exported(), _exported()
    rules = [rule._matcher for rule in rewriter._DEFAULT_REWRITE_RULES]
    optimize(ours)
    assert [rule._matcher for rule in rewriter._DEFAULT_REWRITE_RULES] == rules
    theirs.optimize()
    assert ir.to_proto(ours.model) == ir.to_proto(theirs.model)
    assert [node.op_type for node in ours.model.graph].count("Slice") > 2


def test_no_rule_lists_the_graph_for_every_node() -> None:
    """Nodes of the graph that are looked at grow in proportion to it."""

    class Long(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.layers):
                x = torch.sin(x)
            return x

    def looked_at(layers: int) -> int:
        program = torch.onnx.export(Long(layers), (torch.ones(2),), dynamo=True, optimize=False, verbose=False)
        assert program is not None
        seen, identifier = [0], ir.Node.op_identifier

        def counting(node: ir.Node) -> ir.OperatorIdentifier:
            seen[0] += 1
            return identifier(node)

        ir.Node.op_identifier = counting  # type: ignore[method-assign]
        try:
            optimize(program)
        finally:
            ir.Node.op_identifier = identifier  # type: ignore[method-assign]
        return seen[0]

    assert looked_at(80) < 2.5 * looked_at(40)
