"""Operators of torch in ONNX's, that torch's exporter has no translation of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from modelopt_tdq.errors import require
from modelopt_tdq.export.graph import GraphEditor

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["cast_concatenated", "translations"]


def _sort(x: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    """All of the dimension's largest or smallest elements, in order: ONNX takes equal ones in the order they have."""
    op = require("onnxscript", "onnx").opset20
    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


def _stable_sort(x: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
    return _sort(x, dim, descending, stable)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """By torch's operator: the function that makes it of ONNX's, for ``torch.onnx.export``."""
    return {torch.ops.aten.sort.default: _sort, torch.ops.aten.sort.stable: _stable_sort}


def cast_concatenated(model: ir.Model) -> None:
    """Let Concat have inputs of one type, in place.

    ``torch.concat`` takes tensors of several and gives the widest, as SDXL in half precision does with its sizes; the
    exporter of torch casts for ``torch.cat`` alone.
    """
    editor = None
    for node in list(model.graph):
        dtype = node.outputs[0].dtype
        if node.op_type != "Concat" or node.domain != "" or dtype is None:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype is not None and value.dtype != dtype:
                editor = editor or GraphEditor(model.graph)
                node.replace_input_with(index, editor.cast(node, value, dtype, f"{value.name}/widened"))
