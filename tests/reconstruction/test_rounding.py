from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modelopt.torch.quantization.nn import TensorQuantizer
from small_runs import reconstructed
from support.models import TinyDenoiser, calls, fast_config, loop
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.reconstruction.rounding import RoundingQuantizer, can_learn_rounding, rectified, regularization


def _quantizer(weight: Tensor, bits: int, per_channel: bool, narrow: bool = False, clip: float = 1.0) -> Any:
    config = {"num_bits": bits, "axis": 0 if per_channel else None, "narrow_range": narrow}
    quantizer = TensorQuantizer()
    quantizer.set_from_attribute_config(config)
    amax = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().amax()
    quantizer.amax = amax * clip
    return quantizer


@given(
    seed=st.integers(0, 99),
    bits=st.sampled_from([2, 3, 4, 8]),
    per_channel=st.booleans(),
    narrow=st.booleans(),
    clip=st.sampled_from([0.5, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_folded_weights_give_the_learned_codes_under_plain_rounding(
    seed: int, bits: int, per_channel: bool, narrow: bool, clip: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(5, 7, generator=generator).to(dtype))
    with torch.no_grad():
        weight[1] = 0
    quantizer = _quantizer(weight.detach().float(), bits, per_channel, narrow, clip)
    up = torch.rand(5, 7, generator=generator) < 0.5
    made = RoundingQuantizer.from_tensor_quantizer(quantizer)
    made.fix(up)
    expected = made(weight).detach()
    before = weight.detach().clone()
    made.fold(weight)
    assert type(quantizer) is TensorQuantizer
    assert torch.equal(quantizer(weight), expected)
    assert torch.equal(weight, expected)
    step = (quantizer.amax.float() / (2 ** (bits - 1) - 1)).expand(5, 7)
    codes = expected.float() / torch.where(step > 0, step, 1.0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.6
    assert (codes - codes.round()).abs().max() < tolerance
    inside = before.float().abs() <= (2 ** (bits - 1) - 1) * step
    down_or_up = torch.floor(before.float() / torch.where(step > 0, step, 1.0)) + up
    if dtype == torch.float32 and not narrow:
        near = (codes.round() - down_or_up).abs() < 0.5
        assert (near | ~inside | (down_or_up > 2 ** (bits - 1) - 1) | (step == 0)).all()


@given(seed=st.integers(0, 99), bits=st.sampled_from([3, 4, 8]), per_channel=st.booleans())
def test_starts_at_the_weight_itself(seed: int, bits: int, per_channel: bool) -> None:
    weight = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)))
    made = RoundingQuantizer.from_tensor_quantizer(_quantizer(weight.detach(), bits, per_channel))
    v = made.begin(weight)
    torch.testing.assert_close(made(weight), weight, rtol=0, atol=1e-5)
    made.finish()
    rounded = made(weight).detach().clone()
    made.undo()
    assert v.requires_grad
    step = made.amax / (2 ** (bits - 1) - 1)
    differs = rounded != made(weight)  # but for exact halves, that is rounding to the nearest
    fraction = (weight / step - torch.floor(weight / step))[differs]
    assert ((fraction - 0.5).abs() < 1e-4).all()


def test_gradient_of_the_variables() -> None:
    weight = nn.Parameter(torch.tensor([[0.3, -0.8, 0.55, 1.0]]))
    made = RoundingQuantizer.from_tensor_quantizer(_quantizer(weight.detach(), 3, False))
    v = made.begin(weight)
    (gradient,) = torch.autograd.grad((made(weight) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), v)
    s = torch.sigmoid(v.detach())
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0]) / 3 * 1.2 * s * (1 - s)
    torch.testing.assert_close(gradient[:, :3], expected[:, :3])


def test_regularization_is_least_at_0_and_1() -> None:
    v = torch.tensor([-20.0, 0.0, 20.0])
    assert rectified(v).tolist() == [0.0, 0.5, 1.0]
    assert float(regularization(v, 4.0)) == 1.0


def test_ends_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all variables have made up their mind before they are rounded."""
    found = []
    finish = RoundingQuantizer.finish

    def watched(self: RoundingQuantizer) -> None:
        assert self._v is not None
        found.append(rectified(self._v.detach()).flatten())
        finish(self)

    monkeypatch.setattr(RoundingQuantizer, "finish", watched)
    reconstructed(iterations=400, rounding_lr=0.05, rounding_weight=0.1)
    h = torch.cat(found)
    assert ((h < 0.02) | (h > 0.98)).float().mean() > 0.95


def test_what_has_no_rounding_to_learn_stays_as_it_is() -> None:
    weight = torch.randn(4, 8)
    assert can_learn_rounding(_quantizer(weight, 4, True), weight)
    fp8 = _quantizer(weight, 8, False)
    fp8.set_from_attribute_config({"num_bits": (4, 3), "axis": None})
    assert not can_learn_rounding(fp8, weight)
    assert not can_learn_rounding(TensorQuantizer(), weight)
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = fast_config(weight_bits=(4, 3), activation_bits=6, method="tdq_reconstruct", iterations=20, samples=8)
    model = mtq.quantize(model, config, loop(calls(4, 4)))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert any(block.kept for block in tdq.reconstruction_report(model))
