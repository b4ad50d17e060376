"""Weights part by part are what they are as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import noise
from torch import Tensor, nn

from modelopt_tdq.export.read import read_weight
from modelopt_tdq.export.spec import WeightSpec
from modelopt_tdq.model import quantized_weight
from modelopt_tdq.model.quantized_weight import quantized_parts


def _layer(cfg: dict[str, Any], layer: nn.Module) -> Any:
    rules = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*weight_quantizer", "cfg": cfg}]
    with torch.no_grad():
        layer.weight.copy_(noise(*layer.weight.shape))
        layer.weight[3] = 0  # a row without a range
        layer.weight[4] *= 1e-9  # and one below ModelOpt's smallest
    model = mtq.quantize(nn.Sequential(layer), {"quant_cfg": rules, "algorithm": "max"}, lambda m: None)
    return model[0]


def _three_rows(weight: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    own = scale.dim() == weight.dim() and len(scale) == len(weight)
    for start in range(0, len(weight), 3):
        yield weight[start : start + 3], scale[start : start + 3] if own else scale


FORMATS = {
    "int8": {"num_bits": 8, "axis": 0},
    "int4": {"num_bits": 4, "axis": 0},
    "tensor": {"num_bits": 8, "axis": None},
    "fp8": {"num_bits": (4, 3), "axis": 0},
    "inputs": {"num_bits": 8, "axis": 1},
    "blocks": {"num_bits": 4, "block_sizes": {-1: 4}},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 13), lambda: nn.Conv2d(4, 10, 3)], ids=["linear", "conv"])
def test_parts_together_are_the_whole(name: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(FORMATS[name], make())
    weight, quantizer = layer.weight, layer.weight_quantizer
    expected = quantizer(weight.detach())
    whole = read_weight("q", quantizer, weight)
    monkeypatch.setattr(quantized_weight, "weight_parts", _three_rows)
    parts = list(quantized_parts(weight, quantizer))
    assert len(parts) == (1 if name in ("inputs", "blocks") else -(-len(weight) // 3))
    assert torch.equal(torch.cat(parts), expected)
    divided = read_weight("q", quantizer, weight)
    if not isinstance(whole, WeightSpec):
        assert not isinstance(divided, WeightSpec)
        assert (divided[0]() == expected.detach().numpy()).all()
        return
    assert isinstance(divided, WeightSpec)
    assert (divided.codes == whole.codes).all()
    assert (divided.scale == whole.scale).all()
    assert divided.codes.shape == divided.shape == tuple(weight.shape)
    codes = torch.from_numpy(divided.codes)
    codes = codes.view(torch.float8_e4m3fn) if divided.is_fp8 else codes
    shape = [1] * weight.dim()
    if divided.axis is not None:
        shape[divided.axis] = -1
    values = codes.float() * torch.from_numpy(divided.scale).reshape(shape)
    torch.testing.assert_close(values, expected.detach(), rtol=1e-5, atol=0)
