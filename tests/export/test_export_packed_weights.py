"""Weights of 3 and 4 bits, two codes to a byte: the same numbers, a smaller file, and who takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.models import calls, quantized
from support.precisions import integer_kernels
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession
from modelopt_tdq.runtime.sessions.openvino import OpenVinoSession

#: Of TinyDenoiser's quantized layers: convolutions of 8 x 8 x 3 x 3, and a linear layer of 8 x 8.
CONVOLUTIONS, LINEAR = 2 * 8 * 8 * 9, 8 * 8


def inputs(time: float = 300.0) -> dict[str, Any]:
    return {"sample": calls()[0][0], "timestep": torch.tensor(time)}


@pytest.fixture(scope="module", params=[4, 3], ids=["w4", "w3"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return quantized(weight_bits=request.param)


def export(model: nn.Module, folder: Path, pack: Any, lowering: Any = "ratio") -> tdq.ExportReport:
    return tdq.export_onnx(model, folder / f"{pack}.onnx", inputs(), pack_weights=pack, lowering=lowering)


def types(path: Path) -> dict[str, Any]:
    """Layer to the type of its stored codes."""
    suffix = ".weight_quantizer/codes"
    return {
        tensor.name.removesuffix(suffix): onnx.TensorProto.DataType.Name(tensor.data_type)
        for tensor in onnx.load(path).graph.initializer
        if tensor.name.endswith(suffix)
    }


@pytest.mark.parametrize("lowering", ["ratio", "reference"])
def test_same_numbers(model: nn.Module, tmp_path: Path, lowering: Any) -> None:
    paths = {pack: export(model, tmp_path, pack, lowering).path for pack in ("none", "cast", "direct")}
    assert set(types(paths["none"]).values()) == {"INT8"}
    assert set(types(paths["cast"]).values()) == {"INT4"}
    assert types(paths["direct"]) == {"conv1": "INT8", "conv2": "INT8", "mix": "INT4"}
    for time in (900.0, 20.0):
        plain, *packed = (OnnxRuntimeSession(path, codes=True)(inputs(time)) for path in paths.values())
        assert len(plain) == 4
        for other in packed:
            assert plain.keys() == other.keys()
            assert all(np.array_equal(plain[name], other[name]) for name in plain)
    saved = paths["none"].stat().st_size - paths["cast"].stat().st_size
    assert 0 < (CONVOLUTIONS + LINEAR) // 2 - saved < 600  # the Cast nodes take some


def test_the_report_says_what_is_lost(model: nn.Module, tmp_path: Path) -> None:
    total = CONVOLUTIONS + LINEAR
    lost = "of them codes of at most 4 bits in INT8 tensors: the saving of half is lost"
    assert export(model, tmp_path, "none").weights_form == f"{total:,} bytes of codes, {total:,} {lost}"
    half = f"{total // 2:,}"
    assert export(model, tmp_path, "cast").weights_form == f"{half} bytes of codes, {half} of them two codes to a byte"
    assert export(model, tmp_path, "direct").weights_form == (
        f"{CONVOLUTIONS + LINEAR // 2:,} bytes of codes, {LINEAR // 2} of them two codes to a byte, "
        f"{CONVOLUTIONS:,} {lost}"
    )


def test_openvino_keeps_its_integer_kernels(model: nn.Module, tmp_path: Path) -> None:
    kernels = {}
    results = {}
    for pack in ("none", "cast"):
        session = OpenVinoSession(export(model, tmp_path, pack).path, num_threads=1)
        kernels[pack] = integer_kernels(session)
        results[pack] = session(inputs())["output"]
    assert kernels["none"] == kernels["cast"]
    assert sum("i8" in kernel for kernel in kernels["cast"]) >= 3
    np.testing.assert_array_equal(results["none"], results["cast"])


@pytest.mark.parametrize(("bits", "form"), [(8, "1,216 bytes of codes"), ((4, 3), "1,216 bytes of codes")])
def test_eight_bits_stay_as_they_are(bits: Any, form: str, tmp_path: Path) -> None:
    report = export(quantized(weight_bits=bits, activation_bits=bits), tmp_path, "cast")
    assert set(types(report.path).values()) <= {"INT8", "FLOAT8E4M3FN"}
    assert report.weights_form == form


def test_an_unknown_way_is_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(tdq.TdqError, match=r"no such way to store weights.*cast"):
        export(model, tmp_path, "int4")
    assert not list(tmp_path.iterdir())
