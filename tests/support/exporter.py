"""What torch.onnx does in every export though it changes nothing: left out here, since it takes a third of the time.

``pytest --torch-as-it-is`` leaves nothing out.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

_ATEN = torch.ops.aten
_CAST = _ATEN.to.dtype
_CHECK = _ATEN._assert_tensor_metadata.default


def _is_plain(node: Node, registered: set[Any], table: Any) -> bool:
    """Whether taking a graph apart leaves this node as it is, but for casts and checks."""
    if node.op in ("placeholder", "output"):
        return True
    target = node.target
    if node.op != "call_function" or target in table:
        return False
    schema = getattr(target, "_schema", None)
    if schema is not None and schema.is_mutable:
        return False
    if target is _CAST:
        return len(node.args) == 2 and not node.kwargs and isinstance(node.args[0], Node)
    return target in (_CHECK, operator.getitem) or target in registered


def _without_casts(module: GraphModule) -> None:
    """Casts to the same type are none; others are made, rather than perhaps made."""
    for node in list(module.graph.nodes):
        if node.target is _CHECK:
            module.graph.erase_node(node)
        elif node.target is _CAST:
            source, dtype = node.args
            made = source
            if source.meta["val"].dtype != dtype:
                with module.graph.inserting_before(node):
                    made = module.graph.call_function(_ATEN._to_copy.default, (source,), {"dtype": dtype})
                made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
            module.graph.erase_node(node)
    module.recompile()


def taken_apart(program: Any, registered: set[Any], table: Any) -> Any:
    """A program that holds nothing to be taken apart, without tracing it once more; None if it does.

    Args:
        program: Of ``torch.export``.
        registered: The operators that ONNX has.
        table: How others are taken apart.
    """
    signature = program.graph_signature
    changes = signature.buffers_to_mutate or getattr(signature, "user_inputs_to_mutate", None)
    modules = [module for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    if changes or len(modules) > 1 or program.graph_module is not modules[0]:
        return None
    if not all(_is_plain(node, registered, table) for node in program.graph_module.graph.nodes):
        return None
    _without_casts(program.graph_module)
    return program
