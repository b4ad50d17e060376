"""The plugin-free twin of a graph with the TensorRT plugin, as a file."""

from __future__ import annotations

import os
from pathlib import Path

from modelopt_tdq.core.files import require_writable
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.onnx_file import write_onnx
from modelopt_tdq.export.plugin import without_plugin
from modelopt_tdq.runtime.build.onnx_model import read_onnx

__all__ = ["write_twin"]


def write_twin(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Write :func:`~modelopt_tdq.export.plugin.plugin_free` of a file to another, when it has passed ONNX's checker.

    Args:
        path: ONNX file, exported with ``lowering="plugin"``.
        output: ONNX file to write; weights of more than 1 GiB lie beside it, in ``<name>.data``.

    Returns:
        ``output``.

    Raises:
        TdqError: There is no such file, it has no node of the plugin, or it would be overwritten.
        MissingExtraError: The extra ``onnx`` is not installed.
    """
    ir = require("onnx_ir", "onnx")
    source, target = Path(path), Path(output)
    read_onnx(source)
    if target.exists() and target.samefile(source):
        raise TdqError("output", str(target), "it is the graph itself", "Name another file")
    require_writable(target)
    twin = ir.load(source)  # without the weights that lie beside it
    without_plugin(twin, str(source))
    write_onnx(twin, target)
    return target
