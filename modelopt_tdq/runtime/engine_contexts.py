"""Execution contexts of an engine, and how TensorRT-RTX compiles and captures in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError
from modelopt_tdq.runtime.device_queue import DeviceQueue
from modelopt_tdq.runtime.engine_loading import LoadedEngine
from modelopt_tdq.runtime.run_time_cache import RunTimeCache

__all__ = ["EngineContexts"]


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
