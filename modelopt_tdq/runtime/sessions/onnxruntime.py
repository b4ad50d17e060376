"""ONNX Runtime: on the CPU the numeric yardstick, with other providers a way to deploy."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.runtime.sessions.compiled_graph import require_runnable
from modelopt_tdq.runtime.sessions.feeds import as_feeds
from modelopt_tdq.runtime.sessions.providers import add_providers

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxRuntimeSession", "add_outputs", "with_codes"]

#: FP8 tensors have no NumPy dtype, so inner tensors are handed out as float32, which holds every code.
_AS_FLOAT = ":float32"

_LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


def add_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of ``model`` whose outputs include these tensors, as float32."""
    onnx = require("onnx", "onnx")
    extended = copy.deepcopy(model)
    for name in names:
        output = f"{name}{_AS_FLOAT}"
        extended.graph.node.append(onnx.helper.make_node("Cast", [name], [output], to=onnx.TensorProto.FLOAT))
        extended.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    return extended


def with_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` that also returns the codes of all activation quantizers.

    These are the outputs of its QuantizeLinear nodes; an output is called "<quantizer>/codes:float32".
    """
    return add_outputs(model, [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"])


class OnnxRuntimeSession:
    """Runs a graph: arrays by input name in, arrays by output name out.

    Args:
        model: A file, or a model in memory.
        codes: Return the codes of all activation quantizers too.
        num_threads: 1 for a single thread; None for ONNX Runtime's own choice.
        optimization: Graph optimizations. "none" runs every node as it stands in the file, which is what a
            yardstick should do. ONNX Runtime's own default is "all". An exported graph gives the same codes at every
            level, up to rounding: from "extended" on, products are multiplied as integers where both operands are
            codes. (Processors of x86 without VNNI saturate sums of two such products at 16 bits, which ONNX Runtime
            documents; use "basic" there.)
        providers: What computes, in order: names of :data:`~modelopt_tdq.runtime.sessions.providers.PROVIDERS`
            (``cpu``, ``cuda``, ``tensorrt``, ``tensorrt_rtx``) or of ONNX Runtime, or pairs of such a name and options.
            Without ``cpu`` in the list, the session is refused where a node would be left to the CPU.
        dynamic_sizes: Ranges of open sizes for providers that build engines, as of :func:`~modelopt_tdq.build_engine`.
        trust: Open a graph that holds compiled code without the manifest that
            :func:`~modelopt_tdq.compile_graph` writes with it: it is executed.

    Raises:
        TdqError: The file is missing, ONNX Runtime cannot load the graph, a provider is not there, or the graph was
            compiled for another provider, version or GPU.
        MissingExtraError: The extra ``onnx`` is not installed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | onnx.ModelProto,
        *,
        codes: bool = False,
        num_threads: int | None = None,
        optimization: Literal["none", "basic", "extended", "all"] = "none",
        providers: Sequence[str | tuple[str, Mapping[str, Any]]] = ("cpu",),
        dynamic_sizes: Mapping[str, tuple[int, int, int]] | None = None,
        trust: bool = False,
    ) -> None:
        ort = require("onnxruntime", "onnx")
        if optimization not in _LEVELS:
            raise TdqError("optimization", optimization, "no such level", f"Use one of {sorted(_LEVELS)}")
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[optimization])
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
            options.inter_op_num_threads = 1
        options.log_severity_level = 3
        source: Any = model
        if isinstance(model, (str, os.PathLike)):
            if not Path(model).is_file():
                raise TdqError("model", str(model), "no such file", "Export it first with modelopt_tdq.export_onnx")
            source = with_codes(require("onnx", "onnx").load(model)).SerializeToString() if codes else os.fspath(model)
        else:
            source = (with_codes(model) if codes else model).SerializeToString()
        file = Path(model) if isinstance(model, (str, os.PathLike)) else None
        inside = add_providers(ort, options, providers, file, dynamic_sizes)
        compiled = None if file is None else require_runnable(file, providers, trust)
        try:
            self._session = ort.InferenceSession(source, options, providers=inside or None)
        except Exception as error:
            cure = "Export it with modelopt_tdq"
            if optimization != "none":
                cure += '; if it did, use optimization="none"'
            if "float8" in str(error):
                cure = 'Use optimization="basic", or ONNX Runtime 1.32 or later, whose optimizer takes FP8'
            elif "fallback to the CPU EP has been explicitly disabled" in str(error):
                cure = 'Add "cpu" to the providers, which then computes what the others cannot'
            elif "NOT_IMPLEMENTED" in str(error):
                cure = "It has no kernel for this operator and type: use another version of it, or another backend"
            raise TdqError("model", str(model)[:80], f"ONNX Runtime cannot load it ({error})", cure) from error
        self.inputs = {v.name: _numpy_dtype(v.type) for v in self._session.get_inputs()}
        self.shapes = {v.name: tuple(v.shape) for v in self._session.get_inputs()}
        self.outputs = [v.name for v in self._session.get_outputs()]
        #: Those that compute some of the graph, as ONNX Runtime calls them.
        self.providers: list[str] = self._session.get_providers()
        self.metadata: dict[str, str] = {
            **({} if compiled is None else compiled.onnx_metadata),
            **self._session.get_modelmeta().custom_metadata_map,
        }

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name; with ``codes``, also "<quantizer>/codes" as float32."""
        results = self._session.run(self.outputs, as_feeds(inputs, self.inputs, self.metadata))
        return {name.removesuffix(_AS_FLOAT): result for name, result in zip(self.outputs, results, strict=True)}


def _numpy_dtype(type_name: str) -> Any:
    names = {"float": "float32", "double": "float64", "bfloat16": "bfloat16"}
    inner = type_name.removeprefix("tensor(").removesuffix(")")
    return np.dtype(names.get(inner, inner))
