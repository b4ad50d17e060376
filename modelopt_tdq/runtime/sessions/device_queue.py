"""The device that an engine runs on: a stream of its own, in order with the caller's, and graphs of launches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from modelopt_tdq.errors import TdqError

__all__ = ["DEVICE_TYPES", "DeviceQueue"]

#: Types of torch devices that TensorRT runs on.
DEVICE_TYPES = ("cuda",)


class DeviceQueue:
    """A stream beside the caller's: TensorRT synchronizes the whole device when it is given the default stream.

    Args:
        device: Of torch; without an index, the current one.

    Raises:
        TdqError: Not a device that TensorRT runs on, or PyTorch does not see it.
    """

    def __init__(self, device: str | torch.device) -> None:
        wanted = torch.device(device)
        if wanted.type not in DEVICE_TYPES:
            raise TdqError("device", str(device), "TensorRT runs on NVIDIA GPUs only", "Use cuda or cuda:<index>")
        if wanted.type == "cuda" and not torch.cuda.is_available():
            raise TdqError(
                "device",
                str(device),
                "PyTorch sees no NVIDIA GPU",
                "Run on a machine that has one, with a CUDA build of torch; `modelopt-tdq doctor` shows what is there",
            )
        self._module: Any = torch.get_device_module(wanted)
        if wanted.type == "cuda" and wanted.index is None:
            wanted = torch.device("cuda", torch.cuda.current_device())
        self.device = wanted
        with self.active():
            self._stream = self._module.Stream()

    @property
    def handle(self) -> int:
        """The stream as TensorRT takes it."""
        return int(getattr(self._stream, "cuda_stream", 0))

    @property
    def capability(self) -> str | None:
        """Compute capability of the GPU, "8.9"."""
        if self.device.type != "cuda":
            return None
        return "{}.{}".format(*torch.cuda.get_device_capability(self.device))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is on this device."""
        return tensor.device.type == self.device.type and tensor.device.index in (None, self.device.index)

    def active(self) -> AbstractContextManager[Any]:
        """Make the device the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def wait_for_caller(self) -> None:
        """What is launched from here on waits for what the caller's stream holds."""
        self._stream.wait_stream(self._module.current_stream())

    def let_caller_wait(self) -> None:
        """What the caller's stream is given from here on waits for what was launched here."""
        self._module.current_stream().wait_stream(self._stream)

    def finish(self) -> None:
        """Wait until nothing runs: what it uses may be freed."""
        with self.active():
            self._module.synchronize()

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Record what ``launch`` enqueues as a CUDA graph; the result enqueues it again, with one call."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of a pipeline may allocate memory meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            launch()

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay
