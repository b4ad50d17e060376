"""ModelOpt's other quantizers: what ONNX can hold, what is stored as floats, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import onnx
import pytest
import torch
from support.models import quantized as tiny
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.runtime.sessions.onnxruntime import OnnxRuntimeSession

INPUTS = {"num_bits": 8, "axis": None}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.layer(sample)
        return out


def quantized(
    weight: Any,
    algorithm: Any = None,
    activation: Any = INPUTS,
    model: nn.Module | None = None,
    weights: str = "*weight_quantizer",
) -> nn.Module:
    torch.manual_seed(0)
    rules = [
        {"quantizer_name": "*", "enable": False},
        *([] if weight is None else [{"quantizer_name": weights, "cfg": weight}]),
        *([] if activation is None else [{"quantizer_name": "*input_quantizer", "cfg": activation}]),
    ]
    fast = {"method": "tdq", "statistic": "max", "weights": "max", "protect_steps": False, "progress": False}
    if algorithm is not None:
        fast = algorithm

    def forward_loop(model: nn.Module) -> None:
        for scale, time in ((1.0, 0.0), (3.0, 500.0)):
            model(scale * torch.randn(8, 16), torch.tensor(time))

    model = Layer() if model is None else model
    found: nn.Module = mtq.quantize(model.eval(), {"quant_cfg": rules, "algorithm": fast}, forward_loop)
    return found


def export(model: nn.Module, tmp_path: Path, tolerance: float = 1e-5) -> tdq.ExportReport:
    inputs = {"sample": torch.randn(4, 16), "timestep": torch.tensor(500.0)}
    report = tdq.export_onnx(model, tmp_path / "m.onnx", inputs)
    with torch.no_grad():
        expected = model(**inputs)
    found = torch.from_numpy(OnnxRuntimeSession(report.path)(inputs)["output"])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return report


def test_per_tensor_weights(tmp_path: Path) -> None:
    report = export(quantized({"num_bits": 8, "axis": None}), tmp_path)
    assert report.skipped == ()


def test_weights_of_fewer_bits_travel_as_int8(tmp_path: Path) -> None:
    report = export(quantized({"num_bits": 4, "axis": 0}), tmp_path)
    assert report.skipped == ()
    tensors = {t.name: t for t in onnx.load(report.path).graph.initializer}
    codes = onnx.numpy_helper.to_array(tensors["layer.weight_quantizer/codes"])
    assert codes.dtype == "int8"
    assert codes.min() >= -8
    assert codes.max() <= 7


@pytest.mark.parametrize(
    "weight",
    [
        {"num_bits": 4, "block_sizes": {-1: 8}},
        [{"num_bits": 4, "block_sizes": {-1: 8}}, {"num_bits": 8, "axis": 0}],
    ],
)
def test_formats_that_onnx_has_no_channel_for_are_stored_as_floats(weight: Any, tmp_path: Path) -> None:
    report = export(quantized(weight), tmp_path)
    reasons = dict(report.skipped)
    assert set(reasons) == {"layer.weight_quantizer", "layer.input_quantizer"}
    assert "stored as floats" in reasons["layer.weight_quantizer"]
    assert "not quantized" in reasons["layer.input_quantizer"]


def test_weights_alone(tmp_path: Path) -> None:
    report = export(quantized({"num_bits": 8, "axis": 0}, algorithm="max", activation=None), tmp_path)
    assert dict(report.skipped).keys() == {"layer.weight_quantizer"}
    assert "computes in floating point" in report.skipped[0][1]


def test_activations_alone(tmp_path: Path) -> None:
    report = export(quantized(None), tmp_path)
    assert report.skipped == (("layer.input_quantizer", "the other operand of its product is not quantized"),)


def test_low_rank_branch_of_svdquant(tmp_path: Path) -> None:
    model = quantized({"num_bits": 8, "axis": 0}, algorithm={"method": "svdquant", "lowrank": 2})
    assert model.layer.weight_quantizer.svdquant_lora_a is not None
    # static: ModelOpt multiplies by 127 / amax where the graph divides, and a tie may fall the other way
    export(model, tmp_path, tolerance=1e-4)


def test_rotation_is_refused(tmp_path: Path) -> None:
    model = quantized({"num_bits": 8, "axis": 0})
    model.layer.input_quantizer._rotate = True
    with pytest.raises(tdq.TdqError, match="rotates its input cannot be exported"):
        tdq.export_onnx(model, tmp_path / "m.onnx", {"sample": torch.randn(4, 16), "timestep": torch.tensor(5.0)})


def test_bfloat16_convolutions(tmp_path: Path) -> None:
    """ONNX has them from opset 22 on; what is not quantized computes in bfloat16."""
    torch.manual_seed(0)
    model = tiny().to(torch.bfloat16)
    inputs = {"sample": torch.randn(2, 3, 8, 8).bfloat16(), "timestep": torch.tensor(500.0)}
    for lowering in ("reference", "ratio"):
        report = tdq.export_onnx(model, tmp_path / "m.onnx", inputs, lowering=lowering)
        assert report.skipped == ()
        proto = onnx.load(report.path)
        assert [entry.version for entry in proto.opset_import] == [22]
        assert proto.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


def test_bfloat16_model(tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 kernels on the CPU: the checker has to do."""
    model = quantized({"num_bits": 8, "axis": 0}).to(torch.bfloat16)
    inputs = {"sample": torch.randn(4, 16).bfloat16(), "timestep": torch.tensor(500.0)}
    for lowering in ("reference", "ratio"):
        report = tdq.export_onnx(model, tmp_path / "m.onnx", inputs, lowering=lowering)
        assert report.skipped == ()
        output = onnx.load(report.path).graph.output[0]
        assert output.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.layer = nn.Linear(16, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.layer(self.recurrent(sample[None])[0][0])
        return out


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 16)
        self.layer = nn.Linear(16, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.layer(self.embedding((sample > 0).long().sum(-1) % 4) * timestep)
        return out


def test_a_quantized_recurrent_layer_is_refused(tmp_path: Path) -> None:
    model = quantized({"num_bits": 8, "axis": 0}, model=Recurrent(), weights="*weight*quantizer")
    inputs = {"sample": torch.randn(4, 16), "timestep": torch.tensor(500.0)}
    with pytest.raises(tdq.TdqError, match="recurrent layer cannot be exported") as caught:
        tdq.export_onnx(model, tmp_path / "m.onnx", inputs)
    assert caught.value.field == "recurrent.*"
    assert "{'quantizer_name': 'recurrent.*', 'enable': False}" in caught.value.cure
    mtq.disable_quantizer(model, "recurrent.*")
    assert export(model, tmp_path).skipped == ()


def test_an_embedding_is_stored_in_low_precision_and_says_so(tmp_path: Path) -> None:
    report = export(quantized({"num_bits": 8, "axis": 0}, model=Embedded()), tmp_path)
    reason = "stored in low precision, but Gather computes in floating point"
    assert report.skipped == (("embedding.weight_quantizer", reason),)
