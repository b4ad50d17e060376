"""flex_attention, whose masks are code, as plain products: ONNX has no operator for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.export.program import traced, without_guards

__all__ = ["in_plain_attention"]


def in_plain_attention(program: Any, tensors: tuple[Tensor, ...], dynamic_shapes: Any) -> Any:
    """A program that attends in matrix products; the same one if it has no flex_attention.

    It computes what torch does where it does not compile: the code of the mask hides what it hides, at every place.
    The tables of a BlockMask only say what a compiled kernel may leave out, and are not looked at.

    Args:
        program: Of ``torch.export``.
        tensors: That it was traced with.
        dynamic_shapes: Likewise.
    """
    attention = torch.ops.higher_order.flex_attention
    if not any(node.target is attention for node in program.graph.nodes):
        return program
    from torch._higher_order_ops.flex_attention import math_attention

    module = without_guards(program)
    for node in module.graph.nodes:
        if node.target is attention:
            node.target = math_attention
    module.recompile()
    return traced(module, tensors, dynamic_shapes)
