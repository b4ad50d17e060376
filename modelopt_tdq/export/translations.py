"""Operators of torch in ONNX's, that torch's exporter has no translation of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from modelopt_tdq.errors import require

__all__ = ["translations"]


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
