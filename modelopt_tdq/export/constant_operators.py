"""Operators that ONNX does not have, of weights and constants alone: their result is a constant of the graph.

Models that make a weight orthogonal in every call, for one, need a decomposition that ONNX has no operator for.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from modelopt_tdq.export.program import traced, without_guards

__all__ = ["without_constant_operator"]


class _NotConstantError(Exception):
    """A value that depends on inputs, or on what stands for a quantizer."""


def _value(module: GraphModule, node: Node, known: dict[Node, Any]) -> Any:
    if node in known:
        return known[node]
    target: Any = node.target
    if node.op == "get_attr":
        path, _, name = str(target).rpartition(".")
        found = getattr(module.get_submodule(path), name)
    elif node.op == "call_function" and (target is operator.getitem or getattr(target, "namespace", "") == "aten"):
        args, kwargs = map_arg((node.args, node.kwargs), lambda inner: _value(module, inner, known))
        found = target(*args, **kwargs)
    else:
        raise _NotConstantError(node.name)
    known[node] = found
    return found


def without_constant_operator(program: Any, name: str, tensors: tuple[Tensor, ...], dynamic_shapes: Any) -> Any | None:
    """A program with the results of an operator in its place, where they depend on weights and constants alone.

    Args:
        program: Of ``torch.export``.
        name: Of the operator: "aten.linalg_qr.default".
        tensors: That the program was traced with.
        dynamic_shapes: Likewise.

    Returns:
        Traced anew; None if there is no such operator, or one that depends on inputs.
    """
    if not any(node.op == "call_function" and str(node.target) == name for node in program.graph.nodes):
        return None
    module = without_guards(program)
    known: dict[Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "call_function" and str(node.target) == name:
            try:
                value = _value(module, node, known)
            except _NotConstantError:
                return None
            parts = {node: value} if isinstance(value, Tensor) else {u: value[u.args[1]] for u in node.users}
            for part, tensor in parts.items():
                buffer = f"constant_{part.name}"
                module.register_buffer(buffer, tensor.detach().clone())
                with module.graph.inserting_before(part):
                    part.replace_all_uses_with(module.graph.get_attr(buffer))
    module.graph.eliminate_dead_code()
    module.recompile()
    return traced(module, tensors, dynamic_shapes)
