"""Buffers of fixed addresses for one set of shapes, and the launch that reads and writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.core.files import replacing
from modelopt_tdq.errors import TdqError
from modelopt_tdq.runtime.sessions.device_queue import DeviceQueue
from modelopt_tdq.runtime.sessions.engine_loading import LoadedEngine
from modelopt_tdq.runtime.sessions.tensor_types import torch_dtype

__all__ = ["EngineContexts", "EngineSlot", "RunTimeCache"]


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


class EngineContexts:
    """One context for all shapes; or, for CUDA graphs, one per set of shapes, over the same memory.

    A graph is valid only as long as nobody changes the context that it was captured from.

    Args:
        loaded: The engine.
        queue: Where it runs.
        cuda_graph: Launch calls as graphs.
        cache_file: TensorRT-RTX: the file of its run-time cache, or None.

    Attributes:
        capture: Whether the caller is to capture graphs, one per context. TensorRT-RTX does so by itself.
    """

    def __init__(self, loaded: LoadedEngine, queue: DeviceQueue, *, cuda_graph: bool, cache_file: Path | None) -> None:
        self._loaded, self._queue = loaded, queue
        self.capture = cuda_graph and loaded.backend != "tensorrt_rtx"
        self._shared: Any = None
        self._memory: Tensor | None = None
        self._config: Any = None
        self._cache: RunTimeCache | None = None
        if loaded.backend == "tensorrt_rtx":
            with queue.active():
                self._config = loaded.engine.create_runtime_config()
                if cuda_graph:
                    self._config.cuda_graph_strategy = loaded.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                if cache_file is not None:
                    self._cache = RunTimeCache(self._config, cache_file)

    def get(self) -> Any:
        """The context of a new set of shapes.

        Raises:
            TdqError: TensorRT has no memory for it.
        """
        if self._shared is not None:
            return self._shared
        engine = self._loaded.engine
        if self.capture:
            context = engine.create_execution_context(self._loaded.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        elif self._config is not None:
            context = engine.create_execution_context(self._config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise TdqError(
                "engine",
                str(self._loaded.path),
                f"TensorRT cannot prepare it: {self._loaded.said()}",
                "Free GPU memory",
            )
        if not self.capture:
            self._shared = context
        elif size := int(engine.device_memory_size_v2):
            if self._memory is None:
                self._memory = torch.empty(size, dtype=torch.uint8, device=self._queue.device)
            context.set_device_memory(self._memory.data_ptr(), size)
        return context

    def save(self) -> None:
        """Write the run-time cache, if there is one."""
        if self._cache is not None:
            self._cache.save()

    def clear(self) -> None:
        """Drop the contexts and their memory."""
        self._shared = self._memory = None


class RunTimeCache:
    """The kernels that an engine of TensorRT-RTX was compiled to.

    TensorRT-RTX itself refuses a file of another GPU, driver or release: then all is compiled again, and the file is
    replaced. Like the engine, a file of it is executable code.

    Args:
        config: IRuntimeConfig of the engine, which is to use the cache.
        file: Read now if it is there, written by :meth:`save`.
    """

    def __init__(self, config: Any, file: Path) -> None:
        self._cache = config.create_runtime_cache()
        self._file = file
        #: Whether the file was there and taken.
        self.loaded = bool(file.is_file() and self._cache.deserialize(file.read_bytes()))
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file, in one step."""
        with replacing(self._file) as (partial,):
            partial.write_bytes(self._cache.serialize())
