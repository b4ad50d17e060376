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
    error = output_error(compensated(weight, scale, covariance, bits) - weight, covariance)
    nearest = output_error(fake_quantize(weight, scale, None, bits) - weight, covariance)
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
    x, difference = torch.randn(2, 30, 7, generator=generator), torch.randn(2, 5, 7, generator=generator)
    expected = (x @ difference.transpose(1, 2)).square().sum()
    assert torch.allclose(output_error(difference, x.transpose(1, 2) @ x).float(), expected, rtol=1e-4)
