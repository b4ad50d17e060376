"""The plugin-free twin of a graph with the TensorRT plugin, as a file."""

from __future__ import annotations

import os
from pathlib import Path

from modelopt_tdq.core.files import replacing
from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.export.onnx_export import EXTERNAL_DATA_ABOVE
from modelopt_tdq.export.plugin import plugin_free
from modelopt_tdq.runtime.build.build import require_place
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
    onnx = require("onnx", "onnx")
    source, target = Path(path), Path(output)
    read_onnx(source)
    if target.exists() and target.samefile(source):
        raise TdqError("output", str(target), "it is the graph itself", "Name another file")
    require_place("output", target)
    twin = plugin_free(source)
    external = twin.ByteSize() > EXTERNAL_DATA_ABOVE
    data = target.with_name(f"{target.name}.data")
    with replacing(data, target) as (_, partial):
        onnx.save(twin, str(partial), save_as_external_data=external, location=data.name)
        onnx.checker.check_model(str(partial), full_check=True)
    return target
