"""Held weights: the same numbers with one quantization of each weight, and the model as it was afterwards."""

from __future__ import annotations

from collections import Counter
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from support.models import TIMES, TinyDenoiser, noise, quantized
from support.unchanged import picture, same
from torch import Tensor, nn

from modelopt_tdq.model import held_weights as module
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.held_weights import held_weights
from modelopt_tdq.model.quantized_weight import weight_parts
from modelopt_tdq.model.select import weight_quantizers


@torch.no_grad()
def outputs(model: nn.Module) -> list[Tensor]:
    return [model(noise(2, 3, 8, 8, seed=5), torch.tensor(time)) for time in TIMES]


def key(quantizer: TensorQuantizer) -> int:
    """The same of the copies that quantize parts of a weight."""
    return id(quantizer._parameters)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each quantizer of ModelOpt quantizes."""
    found: Counter[int] = Counter()
    quantize = TensorQuantizer._fake_quantize

    def counting(self: TensorQuantizer, inputs: Tensor) -> Any:
        found[key(self)] += 1
        return quantize(self, inputs)

    monkeypatch.setattr(TensorQuantizer, "_fake_quantize", counting)
    return found


def test_the_same_outputs_with_one_quantization_of_each_weight(counted: Counter[int]) -> None:
    model = quantized()
    expected = outputs(model)
    with full_precision(model):
        exact = outputs(model)
    before = picture(model)
    counted.clear()
    with held_weights(model):
        assert all(map(torch.equal, outputs(model), expected))
        with full_precision(model):
            assert all(map(torch.equal, outputs(model), exact))
    enabled = [quantizer for quantizer in weight_quantizers(model) if quantizer.is_enabled]
    assert len(enabled) == 3
    assert [counted[key(quantizer)] for quantizer in enabled] == [1] * 3
    assert same(picture(model), before)


def test_after_an_error_the_model_is_as_it_was() -> None:
    model = quantized()
    before = picture(model)
    with pytest.raises(ZeroDivisionError), held_weights(model):
        raise ZeroDivisionError
    assert same(picture(model), before)


def test_what_would_take_too_much_memory_is_quantized_in_every_call(
    counted: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized()
    expected = outputs(model)
    weights = {key(layer.weight_quantizer): layer.weight.nbytes for layer in (model.conv_in, model.conv1)}
    monkeypatch.setattr(module, "_MOST", sum(weights.values()))
    counted.clear()
    with held_weights(model):
        assert all(map(torch.equal, outputs(model), expected))
    assert {count for quantizer, count in counted.items() if quantizer in weights} == {1}
    assert counted[key(model.conv2.weight_quantizer)] == len(TIMES)


def test_a_weight_that_two_layers_share_is_quantized_by_each() -> None:
    model = TinyDenoiser().eval()
    model.conv2.weight = model.conv1.weight
    model = quantized(model)
    expected = outputs(model)
    with held_weights(model):
        assert all(map(torch.equal, outputs(model), expected))


@pytest.mark.parametrize("num_bits", [8, 4, (4, 3)])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_part_by_part_as_in_one_go(num_bits: Any, axis: int | None) -> None:
    layer = nn.Linear(1024, 600, bias=False)
    with torch.no_grad():
        layer.weight[:, 7] *= 20
        layer.weight[250] = 0
    rules = [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": num_bits, "axis": axis}}]
    mtq.quantize(layer, {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *rules], "algorithm": "max"})
    with torch.no_grad():
        expected = layer.weight_quantizer(layer.weight)
    assert not torch.equal(expected, layer.weight)
    assert len(list(weight_parts(layer.weight, layer.weight_quantizer.amax))) == 3
    amax = layer.weight_quantizer._amax
    with held_weights(layer):
        assert torch.equal(layer.weight_quantizer._values, expected)
    assert layer.weight_quantizer._amax is amax
