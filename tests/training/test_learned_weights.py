"""LSQ on weights: codes, gradient, per tensor and per channel, and back to an ordinary quantizer."""

from __future__ import annotations

import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from test_qat import adam, qat, train
from torch import Tensor

from modelopt_tdq import TdqError
from modelopt_tdq.model.learning import forget_learning
from modelopt_tdq.training.weights import LearnedWeightQuantizer


def learned(weight: Tensor, axis: int | None, shrink: float = 1.0) -> LearnedWeightQuantizer:
    """A 4-bit quantizer that starts at ``shrink`` times the largest magnitude."""
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=4, axis=axis))
    amax = weight.abs().amax() if axis is None else weight.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1)
    quantizer.amax = amax * shrink
    return LearnedWeightQuantizer.from_tensor_quantizer(quantizer, "layer.weight_quantizer")


@pytest.mark.parametrize("axis", [None, 0])
def test_codes_stay_symmetric_when_weights_are_clipped(axis: int | None) -> None:
    weight = torch.randn(6, 5, 3, 3)
    quantizer = learned(weight, axis, shrink=0.5)
    codes = quantizer(weight) / quantizer.scale
    torch.testing.assert_close(codes, codes.round(), atol=1e-5, rtol=0)
    assert float(codes.min()) == pytest.approx(-7)
    assert float(codes.max()) == pytest.approx(7)


@pytest.mark.parametrize("axis", [None, 0])
def test_gradient_is_lsq(axis: int | None) -> None:
    """Against the formula, in float64: q - v inside, +-L outside, times 1 / sqrt(elements L)."""
    weight = torch.randn(6, 5, 3, 3, requires_grad=True)
    quantizer = learned(weight.detach(), axis, shrink=0.6)
    upstream = torch.randn(weight.shape)
    quantizer(weight).backward(upstream)
    scale = quantizer.scale.detach().double()
    v = weight.detach().double() / scale
    inside = v.abs() <= 7
    slope = torch.where(inside, v.round() - v, 7 * v.sign()) * upstream.double()
    expected = slope.sum() if axis is None else slope.flatten(1).sum(1).reshape(-1, 1, 1, 1)
    factor = (weight.numel() / scale.numel() * 7) ** -0.5
    assert quantizer.weight_scale.grad is not None
    found = quantizer.weight_scale.grad.double().reshape(expected.shape)
    torch.testing.assert_close(found, expected * factor, rtol=1e-5, atol=1e-6)  # a sum in float32
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.where(inside, upstream, 0.0))


def test_a_scale_never_becomes_negative() -> None:
    weight = torch.randn(4, 4, 1, 1)
    quantizer = learned(weight, None)
    quantizer.weight_scale.data.fill_(-1.0)
    assert bool(torch.isfinite(quantizer(weight)).all())
    assert float(quantizer.scale) > 0


def test_unknown_formats_are_refused() -> None:
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=4, axis=0))
    with pytest.raises(TdqError, match="cannot be learned"):
        LearnedWeightQuantizer.from_tensor_quantizer(quantizer, "layer.weight_quantizer")


def test_forgetting_keeps_the_learned_scales() -> None:
    model = qat()
    train(model, adam(model), range(3))
    model.eval()
    quantizer = model.get_submodule("conv1.weight_quantizer")
    assert isinstance(quantizer, LearnedWeightQuantizer)
    weight = model.get_submodule("conv1").weight.detach()  # type: ignore[union-attr]
    amax, values = quantizer.amax.detach().clone(), quantizer(weight).detach()
    forget_learning(model)
    assert type(quantizer) is TensorQuantizer
    assert torch.equal(quantizer.amax, amax)
    torch.testing.assert_close(quantizer(weight), values)
