"""TensorRT and TensorRT-RTX: runs an engine where the tensors are, and leaves the results there."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.table import ScaleTable
from modelopt_tdq.errors import TdqError
from modelopt_tdq.runtime.sessions.device_queue import DeviceQueue
from modelopt_tdq.runtime.sessions.engine_loading import load_engine
from modelopt_tdq.runtime.sessions.engine_slot import EngineContexts, EngineSlot
from modelopt_tdq.runtime.sessions.feeds import as_feeds, graph_inputs
from modelopt_tdq.runtime.sessions.table_inputs import TABLE_INPUTS, table_tensors
from modelopt_tdq.runtime.sessions.tensor_types import host_array, host_tensor, numpy_dtype, torch_dtype

__all__ = ["TensorRTSession"]


class TensorRTSession:
    """Runs an engine: arrays or tensors by input name in, results by output name out.

    Given torch tensors on the GPU, it never waits for the GPU, and returns tensors there, ready for the caller's
    current stream. Given NumPy arrays or CPU tensors only, it returns arrays. Results are copies: the next call does
    not change them. Not for use by several threads at once.

    Args:
        engine: File, from :func:`~modelopt_tdq.build_engine`, with its manifest beside it.
        backend: ``"tensorrt"`` or ``"tensorrt_rtx"``; by default what the manifest says.
        table: For an engine with a table input: what :func:`~modelopt_tdq.engine_table` returned; or a
            ScaleTable, or the quantized torch model. It stays on the device; :meth:`set_table` replaces it.
        trust: Run an engine without a manifest, or with another's. An engine is executable code.
        cuda_graph: Launch a call as one CUDA graph, captured at the first call of each set of shapes (TensorRT-RTX
            captures and replays by itself).
        max_shapes: Sets of shapes whose buffers (and graphs) are kept; the one not used for longest goes first.
        runtime_cache: TensorRT-RTX: file with the kernels compiled for this GPU; True for
            ``<engine>.runtime_cache``, False for none. Written after the first call of each set of shapes, and
            by :meth:`close`.
        plugins: Libraries with the plugins that the engine needs, where it was built with C++ ones.
        lean_runtime: TensorRT: lean runtime library of the version that built a version-compatible engine; needed
            where another version runs it. It is loaded as code: trust it as you do TensorRT.
        device: Of torch.

    Attributes:
        inputs: NumPy dtype of each input, the table's left out.
        shapes: Shape of each; an open size is its range as text, ``"1..16"``.
        outputs: Names, in order.
        metadata: Of the ONNX file that the engine was built from, by key.
        report: The manifest; None for a trusted engine without one.

    Raises:
        TdqError: The file or its manifest is missing or changed; it was built by another release, for another GPU; a
            plugin or the table is missing, or the table is another engine's; there is no GPU.
        MissingExtraError: The backend is not installed.
    """

    def __init__(
        self,
        engine: str | os.PathLike[str],
        *,
        backend: str | None = None,
        table: ScaleTable | nn.Module | Mapping[str, Any] | None = None,
        trust: bool = False,
        cuda_graph: bool = False,
        max_shapes: int = 4,
        runtime_cache: bool | str | os.PathLike[str] = True,
        plugins: Sequence[str | os.PathLike[str]] = (),
        lean_runtime: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cuda",
    ) -> None:
        if max_shapes < 1:
            raise TdqError("max_shapes", max_shapes, "at least one set is in use", "Pass 1 or more")
        self._queue = DeviceQueue(device)
        self._loaded = load_engine(
            engine, self._queue, backend=backend, trust=trust, plugins=plugins, lean_runtime=lean_runtime
        )
        self.report = self._loaded.report
        self.metadata: Mapping[str, str] = {} if self.report is None else self.report.onnx_metadata
        self._describe()
        self._contexts = EngineContexts(
            self._loaded, self._queue, cuda_graph=cuda_graph, cache_file=_cache_file(Path(engine), runtime_cache)
        )
        self._max_shapes = max_shapes
        self._slots: OrderedDict[tuple[Any, ...], EngineSlot] = OrderedDict()
        self._bound: EngineSlot | None = None
        self._table: dict[str, Tensor] = {}
        if table is not None:
            self.set_table(table)
        elif self._table_names:
            raise TdqError(
                "table",
                None,
                "the engine takes its table as an input",
                "Pass TensorRTSession(engine, table=...) a ScaleTable or the quantized model",
            )

    def _describe(self) -> None:
        trt, engine = self._loaded.trt, self._loaded.engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        for name in names:
            if engine.get_tensor_location(name) == trt.TensorLocation.HOST:
                raise TdqError("engine", name, "it is read on the host, as sizes are", "Export the model again")
        given = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in given]
        self._table_names = [name for name in given if name in TABLE_INPUTS]
        self._dtypes = {name: torch_dtype(name, engine.get_tensor_dtype(name)) for name in given}
        self._ranges = {name: _ranges(engine, name) for name in given}
        own = [name for name in given if name not in self._table_names]
        self.inputs = {name: numpy_dtype(self._dtypes[name]) for name in own}
        self.shapes = {name: tuple(_shown(least, most) for least, most in self._ranges[name]) for name in own}

    def set_table(self, table: ScaleTable | nn.Module | Mapping[str, Any]) -> None:
        """Use another table from the next call on; arguments as ``table`` of the class.

        A table with as many rows as the last one replaces it in place, and captured graphs stay.

        Raises:
            TdqError: The engine takes no table, or this is none of its.
        """
        if not self._table_names:
            raise TdqError(
                "table", type(table).__name__, "the engine takes none", "Export with table_input=True, and build again"
            )
        new = table_tensors(table, self.report)
        for name, value in new.items():
            self._check_shape(name, tuple(value.shape))
        with self._queue.active():
            self._queue.let_caller_wait()
            if all(name in self._table and self._table[name].shape == value.shape for name, value in new.items()):
                for name, value in new.items():
                    self._table[name].copy_(value)
            else:
                self._drop_slots()
                self._table = {name: value.to(self._queue.device, copy=True) for name, value in new.items()}
            self._queue.wait_for_caller()

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name.

        bfloat16 results are bfloat16 tensors on the GPU, and float32 arrays, which hold the same numbers, elsewhere.

        Args:
            inputs: By name: NumPy arrays, torch tensors or numbers. On the GPU, dtypes are converted there, without
                a look at the values; so a tensor of fractions is refused where the engine takes integers.

        Raises:
            TdqError: A name, shape or dtype is not the engine's, or TensorRT fails.
        """
        values, resident = self._values(inputs)
        with self._queue.active():
            slot, new = self._slot({name: tuple(value.shape) for name, value in values.items()})
            self._queue.let_caller_wait()  # for the last call, whose inputs are overwritten now
            for name, value in values.items():
                slot.inputs[name].copy_(value)
            self._queue.wait_for_caller()
            slot.launch(cuda_graph=self._contexts.capture)
            self._queue.let_caller_wait()
            results: dict[str, Any] = {}
            for name in self.outputs:
                output = slot.outputs[name]
                results[name] = output.clone() if resident else host_array(output)
        if new:
            self._contexts.save()
        return results

    def _values(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], bool]:
        """Tensors, and whether some were on the device."""
        inputs = graph_inputs(inputs, self.inputs, self.metadata)
        there = {n: v.detach() for n, v in inputs.items() if isinstance(v, Tensor) and self._queue.holds(v)}
        for name, value in there.items():
            if value.dtype.is_floating_point and not self._dtypes[name].is_floating_point:
                raise TdqError(
                    name,
                    str(value.dtype),
                    f"the engine takes {self.inputs[name]}, and looking for fractions would wait for the GPU",
                    "Convert it, or export with sample inputs of the dtype that will be passed",
                )
        host = {name: value for name, value in inputs.items() if name not in there}
        arrays = as_feeds(host, {name: self.inputs[name] for name in host})
        values = there | {name: host_tensor(array) for name, array in arrays.items()}
        return {name: values[name] for name in self.inputs}, bool(there)

    def _slot(self, shapes: dict[str, tuple[int, ...]]) -> tuple[EngineSlot, bool]:
        key = tuple(shapes.items())
        slot = self._slots.get(key)
        new = slot is None
        if slot is None:
            for name, shape in shapes.items():
                self._check_shape(name, shape)
            buffers = {n: torch.empty(s, dtype=self._dtypes[n], device=self._queue.device) for n, s in shapes.items()}
            if len(self._slots) >= self._max_shapes:
                self._queue.finish()  # the oldest may still run
                self._slots.popitem(last=False)
            slot = EngineSlot(self._loaded, self._contexts.get(), self._queue, buffers | self._table)
        if new or (self._bound is not slot and not self._contexts.capture):
            self._bound = None
            slot.bind(self.outputs)
            self._bound = slot
        self._slots[key] = slot
        self._slots.move_to_end(key)
        return slot, new

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        ranges = self._ranges[name]
        if len(shape) != len(ranges) or any(not lo <= size <= hi for size, (lo, hi) in zip(shape, ranges, strict=True)):
            wanted = tuple(_shown(least, most) for least, most in ranges)
            raise TdqError(
                name, shape, f"the engine was built for {wanted}", "Build it with other dynamic_sizes, or export again"
            )

    def close(self) -> None:
        """Write the run-time cache and free what is on the device."""
        self._drop_slots()
        self._contexts.save()
        self._contexts.clear()

    def _drop_slots(self) -> None:
        self._queue.finish()
        self._slots.clear()
        self._bound = None

    def __enter__(self) -> TensorRTSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cache_file(engine: Path, wanted: bool | str | os.PathLike[str]) -> Path | None:
    if isinstance(wanted, bool):
        return engine.with_name(engine.name + ".runtime_cache") if wanted else None
    return Path(wanted)


def _ranges(engine: Any, name: str) -> list[tuple[int, int]]:
    """Smallest and largest size of each dimension."""
    shape = tuple(engine.get_tensor_shape(name))
    if all(size >= 0 for size in shape):
        return [(size, size) for size in shape]
    least, _, most = engine.get_tensor_profile_shape(name, 0)
    return list(zip(tuple(least), tuple(most), strict=True))


def _shown(least: int, most: int) -> int | str:
    return least if least == most else f"{least}..{most}"
