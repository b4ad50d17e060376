"""Graphs whose weights stay in a file: those that are cut for a comparison share it, and memory holds no weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from modelopt_tdq.errors import require
from modelopt_tdq.export.onnx_file import STAYS_IN_GRAPH
from modelopt_tdq.runtime.build.onnx_model import external_file

if TYPE_CHECKING:
    import onnx

__all__ = ["graph_of"]


def graph_of(file: Path, folder: Path) -> onnx.ModelProto:
    """The graph in an ONNX file; its large tensors are in files in ``folder``, where cuts of it are saved and run."""
    module = require("onnx", "onnx")
    graph = module.load(str(file), load_external_data=False)
    copies: dict[str, str] = {}
    own = folder / f"{file.name}.weights"
    with own.open("wb") as weights:
        for tensor in graph.graph.initializer:
            if len(tensor.raw_data) > STAYS_IN_GRAPH:
                _move_out(tensor, weights, own.name)
                continue
            for entry in tensor.external_data:
                if entry.key == "location" and file.parent != folder:
                    if entry.value not in copies:
                        copies[entry.value] = f"{file.name}.weights{len(copies)}"
                        shutil.copyfile(external_file(file, entry.value), folder / copies[entry.value])
                    entry.value = copies[entry.value]
    # read anew: what was taken out of a message stays in memory with it
    return cast("onnx.ModelProto", module.ModelProto.FromString(graph.SerializeToString()))


def _move_out(tensor: Any, weights: IO[bytes], name: str) -> None:
    place = {"location": name, "offset": weights.tell(), "length": len(tensor.raw_data)}
    weights.write(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = require("onnx", "onnx").TensorProto.EXTERNAL
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
