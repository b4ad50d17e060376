"""Torch's graph optimizer takes a scalar constant near 0 or 1 for 0 or 1: ``x + 1e-15`` and ``x * 1.000001`` vanish.

Its rules match constants with tolerances (1e-8 absolute, 1e-5 relative), and scalars of rank 0 only. So those constants
that it would take for others get a rank of one before it runs. The numbers of the graph stay what they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from modelopt_tdq.errors import require
from modelopt_tdq.export.graph import GraphEditor
from modelopt_tdq.export.product import constant_of

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["keep_constants"]

#: Operators of which a rule drops an operand that is "0" or "1".
_OPERATORS = ("Add", "Sub", "Mul", "Div")

#: Well beyond the tolerances of the rules.
_NEAR_ZERO, _NEAR_ONE = 1e-6, 1e-3


def _would_vanish(value: ir.Value | None) -> bool:
    array = constant_of(value)
    if array is None or array.ndim != 0 or array.dtype.kind not in "fV":
        return False
    number = float(array)
    return (0.0 < abs(number) <= _NEAR_ZERO) or (number != 1.0 and abs(number - 1.0) <= _NEAR_ONE)


def keep_constants(model: ir.Model) -> None:
    """Give constants that the optimizer would drop a rank of one, in place.

    Args:
        model: As torch exports it without optimization; its constants are folded first, so that all are seen.
    """
    require("onnxscript.optimizer", "onnx").fold_constants(model)
    editor = GraphEditor(model.graph)
    for node in list(model.graph):
        if node.op_type not in _OPERATORS or node.domain != "":
            continue
        for index, value in enumerate(node.inputs):
            if not _would_vanish(value) or value is None:
                continue
            array = np.asarray(constant_of(value)).reshape(1)
            node.replace_input_with(index, editor.constant(f"{value.name}/kept", array))
            output = node.outputs[0]
            if output.shape is None or len(output.shape) == 0:
                _back_to_a_scalar(editor, node)
            break


def _back_to_a_scalar(editor: GraphEditor, node: ir.Node) -> None:
    """A result of rank 0 has become one of rank 1."""
    output = node.outputs[0]
    if output.shape is None:  # of a rank that is not known: 1 at least stays what it is
        return
    uses = list(output.uses())
    scalar = editor.ir.Value(name=editor.unique(f"{output.name}/scalar"), type=output.type, shape=editor.ir.Shape([]))
    reshape = editor.ir.node("Reshape", [output, editor.ints([])], outputs=[scalar], name=editor.unique("node/scalar"))
    editor.graph.insert_after(node, reshape)
    output.shape = editor.ir.Shape([1])
    for user, index in uses:
        user.replace_input_with(index, scalar)
    if output.is_graph_output():
        position = editor.graph.outputs.index(output)
        editor.graph.outputs[position] = scalar
        scalar.name, output.name = output.name, editor.unique(f"{output.name}/rank1")
