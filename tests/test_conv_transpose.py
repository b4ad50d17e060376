"""Transposed convolutions: left alone by the presets, since not every backend has low-precision kernels for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from support.models import fast_config, loop, noise
from torch import Tensor, nn

import modelopt_tdq as tdq


class _Upsampling(nn.Module):
    """As UNet1DModel upsamples."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 8, 3, padding=1)
        self.upsample = nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1)
        self.last = nn.Conv1d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = torch.nn.functional.silu(self.first(sample * (1 + timestep.reshape(-1, 1, 1) / 100)))
        return self.last(torch.nn.functional.silu(self.upsample(h)))


def _inputs(time: float) -> tuple[Tensor, Tensor]:
    return noise(2, 4, 16, seed=int(time)), torch.tensor([time])


def _quantized(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    data = [_inputs(time) for time in (20.0, 900.0)]
    return mtq.quantize(_Upsampling().eval(), fast_config(**fields), loop(data))


def _enabled(model: nn.Module) -> set[str]:
    quantizers = (n for n, m in model.named_modules() if isinstance(m, TensorQuantizer) and m.is_enabled)
    return {name.rpartition(".")[0] for name in quantizers}


def test_the_presets_leave_them_out_and_a_config_may_ask_for_them() -> None:
    assert _enabled(_quantized()) == {"first", "last"}
    asked: Any = _quantized(conv_transpose=True)
    assert _enabled(asked) == {"first", "upsample", "last"}
    assert asked.upsample.weight_quantizer._amax.shape == (1, 8, 1)  # per output channel, which is axis 1
    for name in tdq.RECIPES:
        assert not [rule for rule in tdq.recipe(name)["quant_cfg"] if "Transpose" in rule.get("parent_class", "")]


def test_a_recipe_file_may_ask_for_them(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("conv_transpose: true\n")
    rules = tdq.recipe(str(tmp_path / "mine.yaml"))["quant_cfg"]
    assert [rule["parent_class"] for rule in rules if "Transpose" in rule.get("parent_class", "")]


def _exported(path: Path, **fields: Any) -> Any:
    sample, time = _inputs(20.0)
    return tdq.export_onnx(_quantized(**fields), path, {"sample": sample, "timestep": time})


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The export of a model whose transposed convolution is quantized."""
    return _exported(tmp_path_factory.mktemp("asked") / "asked.onnx", conv_transpose=True)


def test_a_model_that_upsamples_builds_as_it_is_quantized_by_default(asked: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert _exported(tmp_path / "default.onnx").limited == ()
    report = tdq.build_engine(tmp_path / "default.onnx", tmp_path / "default.engine")
    assert len(report.quantized) == 2
    assert all(report.low_precision(name) for name in report.quantized)
    assert "no low-precision kernel for ConvTranspose" in dict(asked.limited)["upsample.input_quantizer"]
    with pytest.raises(tdq.TdqError, match="ConvTranspose"):
        tdq.build_engine(asked.path, tmp_path / "asked.engine")


def test_what_was_asked_for_is_computed_in_int8_by_openvino(asked: Any) -> None:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    compiled = core.compile_model(str(asked.path), "CPU", {"INFERENCE_NUM_THREADS": 1})
    kinds = {
        op.get_rt_info()["layerType"].astype(str): op.get_rt_info()["runtimePrecision"].astype(str)
        for op in compiled.get_runtime_model().get_ops()
        if "layerType" in op.get_rt_info()
    }
    assert kinds["Deconvolution"] in ("i8", "u8")
