"""OpenVINO: the ratio lowering keeps its INT8 kernels, and everything else computes in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import noise, quantized
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.runtime.onnxruntime import OnnxRuntimeSession

pytest.importorskip("openvino")
from modelopt_tdq.runtime.openvino import OpenVinoSession


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantized()


@pytest.fixture(scope="module")
def paths(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    inputs = {"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(300.0)}
    folder = tmp_path_factory.mktemp("openvino")
    return {
        lowering: tdq.export_onnx(model, folder / f"{lowering}.onnx", inputs, lowering=lowering).path
        for lowering in ("reference", "ratio")
    }


@pytest.fixture
def inputs() -> dict[str, Any]:
    return {"sample": noise(2, 3, 8, 8, seed=3), "timestep": 600.0}


def test_outputs_are_those_of_onnx_runtime(paths: dict[str, Path], inputs: dict[str, Any]) -> None:
    for path in paths.values():
        session = OpenVinoSession(path, num_threads=1)
        assert session.outputs == ["output"]
        found, expected = session(inputs)["output"], OnnxRuntimeSession(path)(inputs)["output"]
        assert found.dtype == np.float32
        print(np.abs(found - expected).max(), np.abs(expected).max())


def test_ratio_keeps_int8_kernels_and_a_looked_up_scale_does_not(paths: dict[str, Path]) -> None:
    kernels = {name: list(OpenVinoSession(path).executed_precisions().values()) for name, path in paths.items()}
    print(kernels)
