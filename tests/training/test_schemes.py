"""The gradient of every scheme against finite differences of its surrogate, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from modelopt_tdq.core.fake_quant import NumBits, code_range
from modelopt_tdq.training.schemes import SCHEMES

BITS: NumBits = 4
_STEP = 1e-5


def _inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 40, generator=generator) * 1.5
    return x, torch.randn(2, 40, generator=generator)  # and the gradient of the loss


def _learned(name: str, zero: float, per_sample: bool) -> tuple[Tensor, dict[str, Tensor]]:
    scheme = SCHEMES[name]
    scale = torch.tensor([[0.21], [0.33]]) if per_sample else torch.tensor([0.21])
    further = {k: v.requires_grad_() for k, v in scheme.further(0.25, zero, BITS).items()}
    if "lower" in further:
        further["lower"].data.fill_(0.1)
    return scheme.interval(scale, BITS).requires_grad_(), further


def _numeric(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Central differences of a scalar function, element by element."""
    at = at.detach().double()
    found = torch.zeros_like(at)
    for i in range(at.numel()):
        step = torch.zeros_like(at)
        step.view(-1)[i] = _STEP
        found.view(-1)[i] = (value(at + step) - value(at - step)) / (2 * _STEP)
    return found


def _straight_through(
    name: str, x: Tensor, zero: float, at: Tensor, further: Mapping[str, Tensor]
) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
    """x_hat as the straight-through rule sees it: the rounding error is a constant."""
    low, high = code_range(BITS)

    def clipped(interval: Tensor, others: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | float]:
        made = SCHEMES[name].deployed(interval, zero, BITS, others)
        v = (x.double() - (0.0 if made.offset is None else made.offset)) / made.scale
        back = made.scale if made.dequant_scale is None else made.dequant_scale
        shift = made.offset if made.dequant_scale is None else made.dequant_offset
        return v.clamp(low, high), back, 0.0 if shift is None else shift

    start = clipped(at.detach().double(), {k: p.detach().double() for k, p in further.items()})[0]
    error = start.round() - start

    def surrogate(interval: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        v, back, shift = clipped(interval, others)
        return (v + error) * back + shift

    return surrogate


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("zero", [0.0, 6.0])
@pytest.mark.parametrize("name", ["lsq", "duq", "qil"])
def test_gradients_are_those_of_the_straight_through_surrogate(name: str, zero: float, per_sample: bool) -> None:
    x, upstream = _inputs()
    interval, further = _learned(name, zero, per_sample)
    SCHEMES[name].train(x, interval, zero, BITS, further).backward(upstream)
    surrogate = _straight_through(name, x, zero, interval, further)
    doubles = {k: p.detach().double() for k, p in further.items()}

    def loss(a: Tensor) -> Tensor:
        return (surrogate(a, doubles) * upstream.double()).sum()

    factor = 1.0
    if name == "lsq":  # Esser et al. 2020, section 2.2
        factor = (x.numel() / interval.numel() * code_range(BITS)[1]) ** -0.5
    assert interval.grad is not None
    torch.testing.assert_close(interval.grad.double(), factor * _numeric(loss, interval), rtol=2e-4, atol=1e-5)
    for key, parameter in further.items():

        def of_further(value: Tensor, key: str = key) -> Tensor:
            made = surrogate(interval.detach().double(), {**doubles, key: value})
            return (made * upstream.double()).sum()

        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), _numeric(of_further, parameter), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("zero", [0.0, 6.0])
def test_pact_learns_from_clipped_values_only(zero: float) -> None:
    x, upstream = _inputs()
    interval, _ = _learned("pact", zero, per_sample=True)
    SCHEMES["pact"].train(x, interval, zero, BITS, {}).backward(upstream)
    low, high = code_range(BITS)

    def surrogate(a: Tensor) -> Tensor:
        scale = a / high
        return (torch.clamp(x.double(), scale * (low + zero), scale * (high + zero)) * upstream.double()).sum()

    assert interval.grad is not None
    torch.testing.assert_close(interval.grad.double(), _numeric(surrogate, interval), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("zero", [0.0, 6.0])
def test_nipq_learns_through_its_noise(zero: float) -> None:
    x, upstream = _inputs()
    interval, _ = _learned("nipq", zero, per_sample=True)
    y = SCHEMES["nipq"].train(x, interval, zero, BITS, {})
    y.backward(upstream)
    low, high = code_range(BITS)

    def clipped(a: Tensor) -> Tensor:
        scale = a / high
        return torch.clamp(x.double(), scale * (low + zero), scale * (high + zero))

    at = interval.detach().double()
    noise = (y.detach().double() - clipped(at)) / (at / high)
    assert float(noise.abs().max()) <= 0.5 + 1e-5
    assert float(noise.std()) > 0.1
    saturated = (clipped(at) - x.double()).abs() > 1e-6
    assert float(noise[saturated].abs().max()) < 1e-5
    # drawn from the rounding errors of the tensor, and not each element's own, which would be rounding
    own = (x.double() / (at / high)).round() - x.double() / (at / high)
    inner = ~saturated
    assert float(torch.corrcoef(torch.stack([noise[inner], own[inner]]))[0, 1]) < 0.5
    assert not torch.equal(SCHEMES["nipq"].train(x, interval, zero, BITS, {}), y)

    def surrogate(a: Tensor) -> Tensor:
        return ((clipped(a) + noise * a / high) * upstream.double()).sum()

    assert interval.grad is not None
    torch.testing.assert_close(interval.grad.double(), _numeric(surrogate, interval), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("zero", [0.0, 6.0])
@pytest.mark.parametrize("name", ["lsq", "pact", "duq", "qil"])
def test_training_and_deployment_give_the_same_values(name: str, zero: float) -> None:
    x, _ = _inputs()
    interval, further = _learned(name, zero, per_sample=True)
    scheme = SCHEMES[name]
    trained = scheme.train(x, interval, zero, BITS, further)
    torch.testing.assert_close(trained, scheme.deployed(interval, zero, BITS, further)(x, BITS), rtol=1e-6, atol=1e-6)
    assert len(trained.unique()) > 8


@pytest.mark.parametrize("zero", [0.0, 5.0])
@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_zero_stays_zero(name: str, zero: float) -> None:
    interval, further = _learned(name, zero, per_sample=False)
    made = SCHEMES[name].deployed(interval, zero, BITS, further)
    assert float(made(torch.zeros(1), BITS).detach()) == 0.0


@pytest.mark.parametrize("name", ["lsq", "pact", "nipq", "duq"])
def test_schemes_start_at_the_calibrated_quantizer(name: str) -> None:
    x, _ = _inputs()
    scale = torch.tensor([0.3])
    scheme = SCHEMES[name]
    made = scheme.deployed(scheme.interval(scale, BITS), 0.0, BITS, scheme.further(0.3, 0.0, BITS))
    expected = torch.clamp(torch.round(x / 0.3), -8, 7) * 0.3
    torch.testing.assert_close(made(x, BITS), expected, rtol=1e-6, atol=1e-6)


def test_gradient_of_x_passes_inside_the_range_only() -> None:
    x, upstream = _inputs()
    for name, scheme in SCHEMES.items():
        interval, further = _learned(name, 0.0, per_sample=False)
        moved = x.clone().requires_grad_()
        scheme.train(moved, interval.detach(), 0.0, BITS, further).backward(upstream)
        assert moved.grad is not None
        inside = (x / 0.21 >= -8) & (x / 0.21 <= 7)
        assert bool((moved.grad[~inside] == 0).all()), name
        assert bool((moved.grad[inside] != 0).all()), name
