"""OpenVINO on the CPU: deployment without an accelerator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.runtime.sessions.feeds import as_feeds

__all__ = ["OpenVinoSession"]


class OpenVinoSession:
    """Compiles a graph for the CPU and runs it: arrays by input name in, arrays by output name out.

    What is not quantized computes in float32, and nothing is quantized that the graph does not quantize: OpenVINO
    would otherwise choose bfloat16 or float16 by itself where the processor has it, and quantize the activations of
    layers of which only the weights are quantized (or whose scale is looked up, as in the reference lowering).

    bfloat16 inputs are taken as tensors or arrays of any floating type; bfloat16 outputs are float32 arrays.

    OpenVINO 2026.4 makes one kernel of linear layers in a row where a thread has few rows, which mostly means one
    thread. Of INT8 layers this kernel is wrong, or does not compile; files that :func:`~modelopt_tdq.export_onnx` wrote
    keep their INT8 layers apart, files of earlier versions or of others do not: give those more threads.

    On processors without VNNI its INT8 products can overflow 16 bits: with ``ONEDNN_MAX_CPU_ISA=AVX512_CORE``, errors
    of 4 to 15 times the quantization noise were seen in graphs of the ratio lowering, none in the reference graphs.

    Args:
        path: Of an ONNX file.
        num_threads: 1 for a single thread; None for OpenVINO's own choice.

    Raises:
        TdqError: The file is missing, or OpenVINO cannot compile the graph.
        MissingExtraError: The extra ``openvino`` is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, num_threads: int | None = None) -> None:
        openvino = require("openvino", "openvino")
        if not Path(path).is_file():
            raise TdqError("path", str(path), "no such file", "Export it first with modelopt_tdq.export_onnx")
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        if num_threads is not None:
            config["INFERENCE_NUM_THREADS"] = num_threads
        try:
            model = openvino.Core().read_model(os.fspath(path))
            self._compiled = openvino.compile_model(model, "CPU", config)
        except Exception as error:
            raise TdqError(
                "path", str(path), f"OpenVINO cannot compile it ({error})", "Export it with modelopt_tdq.export_onnx"
            ) from error
        self._request = self._compiled.create_infer_request()
        self._types = openvino.Type
        self._tensor = openvino.Tensor
        # as in the file: once compiled, a tensor also has the names of what was found to be equal to it
        names = [port.get_any_name() for port in model.inputs]
        inputs = dict(zip(names, self._compiled.inputs, strict=True))
        self.inputs = {name: self._dtype(port) for name, port in inputs.items()}
        self.shapes = {
            name: tuple(d.get_length() if d.is_static else str(d) for d in port.get_partial_shape())
            for name, port in inputs.items()
        }
        self.outputs = [port.get_any_name() for port in model.outputs]
        info = dict(model.get_rt_info().items()).get("framework", {})  # what OpenVINO keeps of an ONNX file's metadata
        self.metadata: dict[str, str] = {str(key): str(getattr(v, "value", v)) for key, v in dict(info).items()}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name."""
        feeds: dict[str, Any] = as_feeds(inputs, self.inputs, self.metadata)
        for name, array in feeds.items():
            if array.dtype.name == "bfloat16":
                feeds[name] = self._tensor(array.view(np.uint16), list(array.shape), self._types.bf16)
        results = self._request.infer(feeds)
        ports = zip(self.outputs, self._compiled.outputs, strict=True)
        return {name: self._values(port, np.array(results[port])) for name, port in ports}

    def _dtype(self, port: Any) -> np.dtype[Any]:
        """OpenVINO's own answer for bfloat16 is float16, which has other bits."""
        kind = port.get_element_type()
        name = require("ml_dtypes", "onnx").bfloat16 if kind == self._types.bf16 else kind.to_dtype()
        dtype: np.dtype[Any] = np.dtype(name)
        return dtype

    def _values(self, port: Any, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """bfloat16 results as float32, which holds every one of them."""
        if port.get_element_type() != self._types.bf16:
            return array
        bits = array.view(np.uint16).astype(np.uint32) << 16
        values: np.ndarray[Any, Any] = bits.view(np.float32)
        return values

    def executed_precisions(self) -> dict[str, str]:
        """Run-time precision of each node after OpenVINO's own fusions, by its name: "i8", "f32", ..."""
        precisions: dict[str, str] = {}
        for node in self._compiled.get_runtime_model().get_ops():
            info = node.get_rt_info()
            precisions[node.get_friendly_name()] = (
                f"{info['layerType'].astype(str)} {info['runtimePrecision'].astype(str)}"
            )
        return precisions
