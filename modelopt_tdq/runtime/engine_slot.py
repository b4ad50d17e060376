"""Buffers of fixed addresses for one set of shapes, and the launch that reads and writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError
from modelopt_tdq.runtime.device_queue import DeviceQueue
from modelopt_tdq.runtime.engine_loading import LoadedEngine
from modelopt_tdq.runtime.tensor_types import torch_dtype

__all__ = ["EngineSlot"]


class EngineSlot:
    """One set of shapes of an engine: a CUDA graph needs that nothing of it ever moves.

    Args:
        loaded: The engine.
        context: Its execution context, which other slots may share; then :meth:`bind` before each launch of another.
        queue: Where it runs.
        inputs: Buffer of every input, tables included.
    """

    def __init__(self, loaded: LoadedEngine, context: Any, queue: DeviceQueue, inputs: Mapping[str, Tensor]) -> None:
        self._loaded, self._context, self._queue = loaded, context, queue
        self.inputs = dict(inputs)
        self.outputs: dict[str, Tensor] = {}
        self._replay: Callable[[], None] | None = None

    def bind(self, outputs: list[str]) -> None:
        """Give the context these shapes and addresses; the first time, make the buffers of the outputs.

        Raises:
            TdqError: TensorRT refuses a shape, or leaves that of an output open.
        """
        for name, buffer in self.inputs.items():
            if not self._context.set_input_shape(name, tuple(buffer.shape)):
                raise TdqError(
                    name, tuple(buffer.shape), f"TensorRT refuses this shape: {self._loaded.said()}", "Pass another"
                )
            self._context.set_tensor_address(name, buffer.data_ptr())
        if missing := self._context.infer_shapes():
            raise TdqError("engine", list(missing), "their shapes are not known from the inputs'", "Export again")
        for name in outputs:
            if name not in self.outputs:
                self.outputs[name] = self._output(name)
            self._context.set_tensor_address(name, self.outputs[name].data_ptr())

    def _output(self, name: str) -> Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise TdqError("engine", name, f"its shape {shape} depends on values", "Use a model with shapes of its own")
        dtype = torch_dtype(name, self._loaded.engine.get_tensor_dtype(name))
        return torch.empty(shape, dtype=dtype, device=self._queue.device)

    def launch(self, *, cuda_graph: bool) -> None:
        """Enqueue one call. With ``cuda_graph``, the first call also captures what the later ones replay."""
        if self._replay is not None:
            self._replay()
            return
        self._enqueue()
        if cuda_graph:  # only now: after a change of shapes, the first call does more than enqueue kernels
            try:
                self._replay = self._queue.capture(self._enqueue)
            except RuntimeError as error:
                raise TdqError(
                    "cuda_graph", True, f"the engine cannot be captured ({error})", "Leave cuda_graph out for it"
                ) from error

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._queue.handle):
            raise TdqError(
                "engine", str(self._loaded.path), f"TensorRT failed to run it: {self._loaded.said()}", "See its message"
            )
