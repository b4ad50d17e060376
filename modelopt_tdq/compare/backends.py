"""What can be compared, and how each backend gets to run a graph.

A new backend is one line of :data:`COMPARED`: how a session is made of a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import nn

from modelopt_tdq.compare.graph_files import graph_of
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession
from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession
from modelopt_tdq.runtime.sessions.providers import PROVIDERS

if TYPE_CHECKING:
    import onnx

__all__ = ["COMPARED", "TORCH", "WITHOUT_ENGINE", "ComparedBackend", "DeployedGraph", "Session", "deployed"]

#: The quantized torch model itself, which needs no session.
TORCH = "torch"


class Session(Protocol):
    """What runs a file."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """NumPy dtype of each input."""
        ...

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name."""
        ...


@dataclass(frozen=True)
class ComparedBackend:
    """How a backend runs a file.

    Attributes:
        open: Makes its session of a file; an engine's also of the inputs of its table (empty if that is no input).
        layers: Whether its codes can be compared, layer by layer. Not if it fuses differently once it is to return
            them, for then it would be another program that is compared.
        engine: Whether it runs an engine, which ``files`` has to name, rather than the ONNX file.
        usual: Whether it is compared where the caller names no backend.
    """

    open: Callable[..., Session]
    layers: bool
    engine: bool = False
    usual: bool = True


def _tensorrt(path: Path, table: Mapping[str, Any]) -> Session:
    from modelopt_tdq.runtime.sessions.tensorrt import TensorRTSession

    return TensorRTSession(path, table=table or None)


#: By name; ``onnxruntime:<provider>`` is ONNX Runtime with one of its providers.
COMPARED: Mapping[str, ComparedBackend] = {
    "onnxruntime": ComparedBackend(OnnxRuntimeSession, layers=True),
    "openvino": ComparedBackend(OpenVinoSession, layers=False),
    "tensorrt": ComparedBackend(_tensorrt, layers=False, engine=True, usual=False),
    "tensorrt_rtx": ComparedBackend(_tensorrt, layers=False, engine=True, usual=False),
    **{
        f"onnxruntime:{provider}": ComparedBackend(
            partial(OnnxRuntimeSession, providers=[provider]), layers=False, usual=False
        )
        for provider in PROVIDERS
    },
}

#: What is compared by default: with nothing but the model, and no GPU.
WITHOUT_ENGINE = (TORCH, *(name for name, backend in COMPARED.items() if backend.usual))


@dataclass(frozen=True)
class DeployedGraph:
    """A lowered graph as backends without the plugin run it.

    Attributes:
        path: Of the file to run.
        graph: Its content, see :func:`~modelopt_tdq.compare.graph_files.graph_of`.
        table: The inputs of its table, if that is an input: the same in every call.
        note: What is run in place of the file that was named; "" if it is that file.
    """

    path: Path
    graph: onnx.ModelProto
    table: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    note: str = ""


def deployed(path: str | os.PathLike[str], model: nn.Module, folder: Path) -> DeployedGraph:
    """Read a lowered graph: one with the plugin becomes its twin, one whose table is an input gets the model's.

    Args:
        path: Of the ONNX file.
        model: The quantized model that it was exported from.
        folder: Where the twin goes, and large tensors of the graph.

    Raises:
        TdqError: The file is missing or no ONNX file, or its table has other quantizers than the model.
        MissingExtraError: The extra ``onnx`` is not installed.
    """
    from modelopt_tdq.export.table_input import TABLE_INPUT, engine_table
    from modelopt_tdq.runtime.build.onnx_model import read_onnx
    from modelopt_tdq.runtime.twin import write_twin

    file, note = Path(path), ""
    facts = read_onnx(file)
    if facts.plugins:
        note = f"{file.name} needs the TensorRT plugin: its plugin-free twin was run, the same graph without"
        file = write_twin(file, folder / "twin.onnx")
    graph = graph_of(file, folder)
    table = engine_table(graph, model) if TABLE_INPUT in facts.inputs else {}
    return DeployedGraph(file, graph, table, note)
