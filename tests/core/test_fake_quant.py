"""The arithmetic, by properties and against independent formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modelopt_tdq.core.fake_quant import (
    FP8_E4M3,
    SUPPORTED_BITS,
    NumBits,
    code_range,
    dequantize,
    fake_quantize,
    quantize,
)

INTEGERS = tuple(bits for bits in SUPPORTED_BITS if isinstance(bits, int))

_finite = st.floats(-(2.0**13), 2.0**13, width=32)
_values = st.lists(_finite, min_size=1, max_size=64).map(lambda v: torch.tensor(v, dtype=torch.float32))
_scales = st.floats(2.0**-13, 2.0**10, width=32).map(lambda v: torch.tensor([v], dtype=torch.float32))
_bits = st.sampled_from(SUPPORTED_BITS)
_integer_bits = st.sampled_from(INTEGERS)


def _numpy_codes(x: np.ndarray, scale: np.ndarray | np.float32, bits: int) -> np.ndarray:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return np.clip(np.rint(x.astype(np.float32) / scale), low, high)


@given(_values, _scales, _integer_bits)
def test_integer_codes_are_those_of_numpy(x: Tensor, scale: Tensor, bits: int) -> None:
    expected = _numpy_codes(x.numpy(), np.float32(scale.item()), bits)
    np.testing.assert_array_equal(quantize(x, scale, None, bits).numpy(), expected)


def test_codes_come_from_a_division_also_next_to_ties() -> None:
    """Where multiplying by the inverse, as ModelOpt's own fake quantizer does, gives another code."""
    scales = (torch.rand(50, 1) + 0.01).float()
    ties = (torch.arange(-128, 127) + 0.5) * scales
    x = torch.cat([ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)], 1)
    expected = _numpy_codes(x.numpy(), scales.numpy(), 8)
    np.testing.assert_array_equal(quantize(x, scales, None, 8).numpy(), expected)
    assert (np.clip(np.rint(x.numpy() * (np.float32(1) / scales.numpy())), -128, 127) != expected).any()


@given(_values, _scales, _bits)
def test_codes_stay_in_their_range(x: Tensor, scale: Tensor, bits: NumBits) -> None:
    codes = quantize(x, scale, None, bits)
    low, high = code_range(bits)
    assert codes.dtype == torch.float32
    assert float(codes.min()) >= low
    assert float(codes.max()) <= high


@given(_values, _scales, _bits)
def test_quantizing_twice_changes_nothing(x: Tensor, scale: Tensor, bits: NumBits) -> None:
    once = fake_quantize(x, scale, None, bits)
    assert torch.equal(fake_quantize(once, scale, None, bits), once)


@given(_values, _scales, _integer_bits)
def test_error_is_at_most_half_a_step_inside_the_range(x: Tensor, scale: Tensor, bits: int) -> None:
    low, high = code_range(bits)
    step, exact = scale.double(), x.double()
    inside = (exact >= low * step) & (exact <= high * step)
    error = (fake_quantize(x, scale, None, bits).double() - exact).abs()
    # the quotient and the product are rounded to float32 once each
    slack = 2 * torch.finfo(torch.float32).eps * exact.abs()
    assert bool((error <= step / 2 + slack)[inside].all())


@given(st.integers(-130, 130), _integer_bits)
def test_ties_go_to_the_even_code(half_way: int, bits: int) -> None:
    scale = torch.tensor([0.25])  # a power of two: the quotients are exact
    x = torch.tensor([(half_way + 0.5) * 0.25])
    low, high = code_range(bits)
    even = half_way if half_way % 2 == 0 else half_way + 1
    assert float(quantize(x, scale, None, bits)) == min(max(even, low), high)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(x=_values, scale=_scales, bits=_bits)
def test_half_precision_inputs_are_quantized_in_float32(
    dtype: torch.dtype, x: Tensor, scale: Tensor, bits: NumBits
) -> None:
    low = x.to(dtype)
    assert torch.equal(quantize(low, scale, None, bits), quantize(low.float(), scale, None, bits))
    result = fake_quantize(low, scale, None, bits)
    assert result.dtype == dtype
    assert torch.equal(result, fake_quantize(low.float(), scale, None, bits).to(dtype))


@given(_values, _scales)
def test_fp8_codes_are_those_of_torch(x: Tensor, scale: Tensor) -> None:
    expected = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(quantize(x, scale, None, FP8_E4M3), expected)


def test_fp8_saturates_and_represents_all_its_numbers() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[torch.isfinite(every)]
    assert torch.equal(quantize(every, torch.ones(1), None, FP8_E4M3), every)
    far = torch.tensor([449.0, 1e9, torch.inf, -torch.inf])
    assert quantize(far, torch.ones(1), None, FP8_E4M3).tolist() == [448.0, 448.0, 448.0, -448.0]


@given(_scales, _integer_bits, st.data())
def test_zero_is_exact_with_an_offset_that_is_a_multiple_of_the_scale(
    scale: Tensor, bits: int, data: st.DataObject
) -> None:
    low, high = code_range(bits)
    offset = scale * data.draw(st.integers(-int(high), -int(low)))
    assert fake_quantize(torch.zeros(3), scale, offset, bits).tolist() == [0.0, 0.0, 0.0]


@given(_values, _scales, _integer_bits)
def test_offset_is_the_value_of_code_zero(x: Tensor, scale: Tensor, bits: int) -> None:
    offset = 3 * scale
    assert torch.equal(quantize(offset.expand(2), scale, offset, bits), torch.zeros(2))
    codes = quantize(x, scale, offset, bits)
    assert torch.equal(codes, torch.round((x - offset) / scale).clamp(*code_range(bits)))
    assert torch.equal(dequantize(codes, scale, offset), codes * scale + offset)


def test_a_scale_per_sample_broadcasts() -> None:
    x, scale = torch.randn(3, 4, 5), torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1)
    together = fake_quantize(x, scale, None, 4)
    assert all(torch.equal(together[i], fake_quantize(x[i], scale[i, 0], None, 4)) for i in range(3))


@given(st.lists(st.floats(-(2.0**22), 2.0**22, width=32), min_size=1, max_size=64))
def test_straight_through_rounding_is_rounding_to_the_last_bit(values: list[float]) -> None:
    v = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    trained = v + (torch.round(v) - v).detach()
    assert torch.equal(trained.detach(), torch.round(v.detach()))


@given(_values, _scales, _bits)
def test_training_and_inference_compute_the_same(x: Tensor, scale: Tensor, bits: NumBits) -> None:
    trained = fake_quantize(x.clone().requires_grad_(), scale.clone().requires_grad_(), None, bits)
    assert torch.equal(trained.detach(), fake_quantize(x, scale, None, bits))


def test_training_saturates_infinities_as_inference_does() -> None:
    far = torch.tensor([torch.inf, -torch.inf], requires_grad=True)
    assert fake_quantize(far, torch.ones(1), None, 8).tolist() == [127.0, -128.0]


def _lsq(v: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Esser et al. 2020, eq. 3 and 5: gradient of the result by s and by x; v = x / s."""
    by_scale = torch.where(v <= low, low, torch.where(v >= high, high, torch.round(v) - v))
    return by_scale, ((v > low) & (v < high)).float()


@given(x=_values, scale=_scales, bits=_integer_bits)
def test_gradients_are_those_of_lsq(x: Tensor, scale: Tensor, bits: int) -> None:
    low, high = code_range(bits)
    x = x[((x / scale) != low) & ((x / scale) != high)]  # eq. 3 takes the other side there
    x, s = x.clone().requires_grad_(), scale.expand(len(x)).clone().requires_grad_()
    fake_quantize(x, s, None, bits).sum().backward()
    assert x.grad is not None
    assert s.grad is not None
    by_scale, by_x = _lsq((x / s).detach(), low, high)
    torch.testing.assert_close(x.grad, by_x, rtol=1e-6, atol=0)
    # torch's derivative of x / s is rounded on its way, at the size of v
    slack = 4 * torch.finfo(torch.float32).eps * max(1.0, float((x / s).detach().abs().clamp(max=256).max()))
    torch.testing.assert_close(s.grad, by_scale, rtol=0, atol=slack)


def test_gradients_stop_half_a_step_before_rounding_would_clip() -> None:
    x = torch.tensor([127.3, 126.7, -128.3, -127.7], requires_grad=True)
    s = torch.ones(4, requires_grad=True)
    fake_quantize(x, s, None, 8).sum().backward()
    assert x.grad is not None
    assert s.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 0.0, 1.0]
    torch.testing.assert_close(s.grad, torch.tensor([127.0, 0.3, -128.0, -0.3]), rtol=0, atol=1e-4)


def test_gradient_of_the_offset_is_one_where_clipped() -> None:
    x = torch.tensor([100.0, 0.3, -100.0])
    offset = torch.zeros(3, requires_grad=True)
    fake_quantize(x, torch.ones(3), offset, 4).sum().backward()
    assert offset.grad is not None
    assert offset.grad.tolist() == [1.0, 0.0, 1.0]
