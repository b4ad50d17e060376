"""Rounding that makes up for its errors: by hand, and against rounding to the nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modelopt_tdq.core.compensated import compensated, output_error
from modelopt_tdq.core.fake_quant import FP8_E4M3, NumBits, code_range, fake_quantize

FORMATS: tuple[NumBits, ...] = (2, 3, 4, 8, FP8_E4M3)


def problem(groups: int, outputs: int, inputs: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and the covariance of inputs that vary together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, outputs, inputs, generator=generator)
    common = torch.randn(groups, rows, 1, generator=generator)
    x = 0.5 * torch.randn(groups, rows, inputs, generator=generator) + common
    return weight, x.transpose(1, 2) @ x


def scale_of(weight: Tensor, bits: NumBits) -> Tensor:
    return weight.abs().amax(2, keepdim=True) / code_range(bits)[1]


@given(st.sampled_from(FORMATS), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(0, 10_000))
def test_inputs_that_do_not_vary_together_are_rounded_to_the_nearest(
    bits: NumBits, groups: int, outputs: int, inputs: int, seed: int
) -> None:
    weight, _ = problem(groups, outputs, inputs, 4, seed)
    power = torch.rand(groups, inputs, generator=torch.Generator().manual_seed(seed)) + 0.1
    scale = scale_of(weight, bits)
    found = compensated(weight, scale, torch.diag_embed(power), bits)
    assert torch.equal(found, fake_quantize(weight, scale, None, bits))


@given(
    st.sampled_from(FORMATS),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(0, 30),
    st.integers(0, 10_000),
)
def test_gives_codes_whatever_the_inputs(
    bits: NumBits, groups: int, outputs: int, inputs: int, rows: int, seed: int
) -> None:
    """Fewer rows than inputs leave a covariance without an inverse; none at all, zeros."""
    weight, covariance = problem(groups, outputs, inputs, rows, seed)
    scale = scale_of(weight, bits)
    found = compensated(weight, scale, covariance, bits)
    assert bool(found.isfinite().all())
    assert torch.equal(found, fake_quantize(found, scale, None, bits))


def test_the_second_weight_takes_up_the_error_of_the_first() -> None:
    """w0 has the larger inputs: q0 = rne(w0), then q1 = rne(w1 + (w0 - q0) c01 / c11), with the damped c11."""
    covariance = torch.tensor([[[4.0, 1.9], [1.9, 1.0]]])
    weight = torch.tensor([[[2.4, 1.0], [-1.4, 3.2], [0.3, 0.3]]])
    found = compensated(weight, torch.ones(1, 3, 1), covariance, 4)
    damped = 1.0 + 0.01 * 2.5
    first = weight[0, :, 0].round()
    second = (weight[0, :, 1] + (weight[0, :, 0] - first) * 1.9 / damped).round()
    assert torch.equal(found[0], torch.stack([first, second], 1))
    assert not torch.equal(found, weight.round())


def test_comes_close_to_the_best_of_all_codes() -> None:
    weight, covariance = problem(1, 6, 4, 50, 0)
    scale = scale_of(weight, 2)
    codes = torch.tensor(list(itertools.product((-2.0, -1.0, 0.0, 1.0), repeat=4)))

    def errors(values: Tensor) -> Tensor:
        """[O] of each output."""
        difference = values - weight[0]
        return ((difference @ covariance[0]) * difference).sum(1)

    best = torch.stack([errors(code * scale[0]) for code in codes]).amin(0).sum()
    found = errors(compensated(weight, scale, covariance, 2)[0]).sum()
    nearest = errors(fake_quantize(weight, scale, None, 2)[0]).sum()
    assert best <= found < best + 0.3 * (nearest - best)


@pytest.mark.parametrize("bits", FORMATS)
def test_outputs_differ_less(bits: NumBits) -> None:
    weight, covariance = problem(2, 32, 300, 2000, 1)  # more columns than are taken from the rest at once
    scale = scale_of(weight, bits)
    error = output_error(weight, compensated(weight, scale, covariance, bits), covariance)
    nearest = output_error(weight, fake_quantize(weight, scale, None, bits), covariance)
    assert error < 0.5 * nearest


def test_groups_do_not_know_each_other() -> None:
    weight, covariance = problem(3, 4, 10, 40, 2)
    covariance[1] = torch.eye(10) - 1.5 / 10  # of no inputs: its damping has to grow
    scale = scale_of(weight, 8)
    together = compensated(weight, scale, covariance, 8)
    for group in range(3):
        only = slice(group, group + 1)
        assert torch.equal(compensated(weight[only], scale[only], covariance[only], 8), together[only])


def test_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight, values = (torch.randn(2, *shape, generator=generator) for shape in ((30, 7), (5, 7), (5, 7)))
    expected = (x @ (values - weight).transpose(1, 2)).square().sum()
    assert torch.allclose(output_error(weight, values, x.transpose(1, 2) @ x).float(), expected, rtol=1e-4)


# --- inputs that are quantized as well ---


def coarse_inputs(groups: int, outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight; inputs that vary together; and what few bits leave of these."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, outputs, inputs, generator=generator)
    z = torch.randn(groups, 2000, inputs, generator=generator) + torch.randn(groups, 2000, 1, generator=generator)
    return weight, z, fake_quantize(z, torch.tensor(1.2), None, 3)


def outputs_differ_by(weight: Tensor, values: Tensor, z: Tensor, x: Tensor) -> Tensor:
    """Sum of |W z - Q x|^2."""
    return (z @ weight.transpose(1, 2) - x @ values.transpose(1, 2)).double().square().sum()


def test_error_where_inputs_are_quantized_is_less_by_what_no_weight_changes() -> None:
    weight, z, x = coarse_inputs(2, 5, 7, 4)
    values = fake_quantize(weight, scale_of(weight, 3), None, 3)
    expected = outputs_differ_by(weight, values, z, x) - outputs_differ_by(weight, weight, z, x)
    found = output_error(weight, values, x.transpose(1, 2) @ x, z.transpose(1, 2) @ x)
    assert torch.allclose(found, expected, rtol=1e-4)


def test_weights_are_those_that_make_the_best_of_quantized_inputs() -> None:
    """Of fine codes, the solution of least squares; which is not the weight."""
    weight, z, x = coarse_inputs(2, 5, 7, 5)
    scale = torch.full((1, 1, 1), 0.04)
    best = torch.linalg.lstsq(x, z @ weight.transpose(1, 2)).solution.transpose(1, 2)
    found = compensated(weight, scale, x.transpose(1, 2) @ x, 8, z.transpose(1, 2) @ x)
    assert float((found - best).abs().max()) < 0.05
    assert float((weight - best).abs().max()) > 0.15


@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_of_quantized_inputs_differ_less(bits: NumBits) -> None:
    weight, z, x = coarse_inputs(2, 32, 100, 6)
    products, crossed = x.transpose(1, 2) @ x, z.transpose(1, 2) @ x
    scale = scale_of(weight, bits)
    found, plain = (compensated(weight, scale, products, bits, c) for c in (crossed, None))
    assert outputs_differ_by(weight, found, z, x) < 0.9 * outputs_differ_by(weight, plain, z, x)


def test_exact_inputs_leave_the_weights_alone() -> None:
    weight, covariance = problem(2, 32, 60, 400, 7)
    scale = scale_of(weight, 4)
    found, plain = (compensated(weight, scale, covariance, 4, c) for c in (covariance, None))
    assert float((found != plain).float().mean()) < 0.01  # float rounding at the middle between two codes


def test_inputs_that_tell_nothing_leave_the_weights_alone() -> None:
    weight, _ = problem(1, 4, 10, 40, 8)
    scale = scale_of(weight, 8)
    unlike = torch.full((1, 10, 10), torch.nan)
    assert torch.equal(compensated(weight, scale, unlike, 8, unlike), fake_quantize(weight, scale, None, 8))
