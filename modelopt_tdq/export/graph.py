"""Editing an ONNX graph. Uses onnx-ir, the graph library that torch.onnx itself is built on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from modelopt_tdq.errors import require

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["GraphEditor"]

#: Elements of constants that are compared, and stored once where they are equal.
_SMALL = 64


class GraphEditor:
    """Inserts nodes and constants into a graph, with unique, findable names.

    Args:
        graph: Edited in place.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.ir = require("onnx_ir", "onnx")
        self.graph = graph
        self._names: set[str] = {v.name for v in graph.inputs if v.name} | set(graph.initializers)
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = {}
        for node in graph:
            self._names.update(v.name for v in node.outputs if v.name)
            if node.name:
                self._names.add(node.name)

    def unique(self, name: str) -> str:
        """``name``, numbered if it is taken."""
        candidate, count = name, 0
        while candidate in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
        return candidate

    def constant(self, name: str, array: Any) -> ir.Value:
        """An initializer that holds ``array``; equal small arrays are stored once."""
        array = np.asarray(array)
        key = (str(array.dtype), array.tobytes(), array.shape) if array.size <= _SMALL else None
        if key is not None and key in self._constants:
            return self._constants[key]
        value = self.ir.Value(name=self.unique(name))
        tensor = self.ir.tensor(array, name=value.name)
        value.const_value, value.dtype, value.shape = tensor, tensor.dtype, tensor.shape
        self.graph.register_initializer(value)
        if key is not None:
            self._constants[key] = value
        return cast("ir.Value", value)

    def lazy(self, name: str, shape: Sequence[int], dtype: Any, compute: Callable[[], Any]) -> ir.Value:
        """An initializer that holds what ``compute`` returns, called whenever it is asked for: when it is written.

        Small ones are constants, as of :meth:`constant`.
        """
        if math.prod(shape) <= _SMALL:
            return self.constant(name, compute())
        value = self.ir.Value(name=self.unique(name))
        value.dtype, value.shape = self.ir.DataType(dtype), self.ir.Shape(shape)
        value.const_value = self.ir.LazyTensor(
            lambda: self.ir.tensor(compute(), name=value.name), value.dtype, value.shape, name=value.name
        )
        self.graph.register_initializer(value)
        return cast("ir.Value", value)

    def ints(self, values: Sequence[int]) -> ir.Value:
        """A [n] int64 constant."""
        return self.constant("ints_" + "_".join(str(v) for v in values), np.array(values, dtype=np.int64))

    def before(
        self,
        anchor: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        dtype: Any = None,
        shape: Any = None,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Insert a node before ``anchor``.

        Returns:
            Its output, or the list of its outputs where ``outputs`` is not 1.
        """
        unique = self.unique(f"node/{name}")
        node = self.ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=unique)
        for value in node.outputs:
            value.name = self.unique(name)
            value.dtype = self.ir.DataType.FLOAT if dtype is None else dtype
            if shape is not None:
                value.shape = self.ir.Shape(shape)
        self.graph.insert_before(anchor, node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def cast(self, anchor: ir.Node, value: ir.Value, dtype: Any, name: str) -> ir.Value:
        """``value`` in ``dtype``; itself if it is already."""
        if value.dtype == dtype:
            return value
        result: ir.Value = self.before(anchor, "Cast", [value], name, dtype=dtype, shape=value.shape, to=int(dtype))
        return result

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every use of ``old`` take ``new``; an output of the graph keeps its name."""
        name = old.name if old.is_graph_output() else None
        self.ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        if name is not None:
            old.name, new.name = self.unique(f"{name}/replaced"), name
