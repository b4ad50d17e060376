"""What one row is as an ONNX file and as a TensorRT-RTX engine."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelopt_tdq.lab.example_call import example_call

__all__ = ["deploy"]


def deploy(model: nn.Module) -> dict[str, Any]:
    """Export a quantized model for batch 1, and build its engine; plain data for JSON.

    Returns:
        ``onnx_bytes``; ``kernels`` and ``backend``, None where TensorRT-RTX is not installed. All None without the
        extra ``onnx``.
    """
    found: dict[str, Any] = dict.fromkeys(("onnx_bytes", "kernels", "backend"))
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxscript") is None:
        return found
    from modelopt_tdq.export import export_onnx
    from modelopt_tdq.runtime.build.build import build_engine

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        call = example_call(model, 1, torch.tensor([500.0]))
        export_onnx(model, path, call)
        found["onnx_bytes"] = sum(file.stat().st_size for file in path.parent.iterdir())
        if importlib.util.find_spec("tensorrt_rtx") is not None:
            engine = build_engine(path, path.with_suffix(".engine"), allow_float=True)
            found |= {"kernels": engine.kernels, "backend": f"TensorRT-RTX {engine.backend_version}"}
    return found
