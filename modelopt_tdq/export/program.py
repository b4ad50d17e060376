"""Programs of ``torch.export``: traced without what it prints, and as modules that can be traced again."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

__all__ = ["traced", "without_guards"]


def traced(module: nn.Module, tensors: tuple[Tensor, ...], dynamic_shapes: Any = None) -> Any:
    """A program of ``torch.export``, not strict.

    Where the code reads numbers of tensors, torch prints all of the graph so far, thousands of lines. What is written
    to stderr meanwhile is therefore dropped if it fails; its error says what went wrong.

    Args:
        module: To trace.
        tensors: Its arguments.
        dynamic_shapes: As of ``torch.export.export``.
    """
    written = io.StringIO()
    with redirect_stderr(written):
        program = torch.export.export(module, tensors, dynamic_shapes=dynamic_shapes, strict=False)
    if text := written.getvalue():
        sys.stderr.write(text)
    return program


def without_guards(program: Any) -> GraphModule:
    """The module of a program, to be traced anew, without the checks of the first trace: the second has its own."""
    module: GraphModule = program.module()
    for node in list(module.graph.nodes):
        if node.op == "call_module" and "guards" in str(node.target):
            module.graph.erase_node(node)
    module.recompile()
    return module
