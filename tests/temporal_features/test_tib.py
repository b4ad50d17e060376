"""The temporal block as one unit: finite set calibration by hand, learned rounding, and a model left as it was."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import FAMILIES, SMALL_UNET, fast_config, noise
from support.unchanged import picture, same
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import Feature, TemporalBlock, find_temporal_block
from modelopt_tdq.core.fake_quant import FP8_E4M3, fake_quantize
from modelopt_tdq.temporal_features.errors import relative_squared_error
from modelopt_tdq.temporal_features.finite_set import row_scales
from modelopt_tdq.temporal_features.quantized_block import Formats, formats, naive_features, quantizable
from modelopt_tdq.temporal_features.select import merged, select
from modelopt_tdq.temporal_features.tib import tib_features

TIMES = torch.linspace(10.0, 990.0, 6)
BUNDLED = Path(__file__).parents[2] / "trt_examples" / "ddim_cifar10" / "model"

Found = tuple[nn.Module, TemporalBlock, dict[str, Tensor]]


class Two(nn.Module):
    """A time MLP that also sees its own output, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = nn.Linear(6, 6), nn.Linear(6, 9)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep.reshape(-1, 1) / 1000 * torch.arange(1.0, 7.0)
        return sample + self.head(torch.nn.functional.silu(self.mlp(3 * self.mlp(angles.sin()))))


def searched(model: nn.Module, arguments: dict[str, Any], **config: Any) -> Found:
    """Converted by ModelOpt, with every quantizer of the block off, and its features in full precision."""
    model = mtq.quantize(model.eval(), {**fast_config(**config), "algorithm": None})
    block = find_temporal_block(model, arguments, times=len(TIMES))
    for layer in quantizable(model, block).values():
        layer.weight_quantizer.disable()
        layer.input_quantizer.disable()
    with torch.no_grad():
        return model, block, block.compute(model, TIMES)


@pytest.fixture
def two() -> Found:
    return searched(Two(), {"sample": noise(2, 9), "timestep": torch.tensor(500.0)})


@pytest.fixture(scope="module")
def unet() -> Found:
    torch.manual_seed(0)
    return searched(SMALL_UNET.make(), SMALL_UNET.data()[0])


def learned(found: Found, bits: Formats, iterations: int, **fields: Any) -> dict[str, Tensor]:
    model, block, targets = found
    settings = {"weights": "max", "rounding_weight": 0.01, "tick": lambda: None, **fields}
    made: dict[str, Tensor] = tib_features(
        model, block, TIMES, bits, targets=targets, iterations=iterations, **settings
    )
    return made


def mean_error(found: Found, made: dict[str, Tensor]) -> float:
    return float(torch.stack(list(relative_squared_error(found[2], made).values())).mean())


def _weight(layer: nn.Linear, bits: int) -> Tensor:
    """Rounded to nearest, per channel, by the largest magnitude."""
    step = layer.weight.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.round(layer.weight.detach() / step) * step


def _by_hand(model: Two, bits: Formats, scales: Any) -> Tensor:
    """The quantized block, step by step; ``scales`` of all that goes into a layer in full precision."""
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    angles = (TIMES.reshape(-1, 1) / 1000 * torch.arange(1.0, 7.0)).sin()
    with torch.no_grad():
        first = model.mlp(angles)
        seen = torch.cat([angles, 3 * first], 1)
        head_in = silu(model.mlp(3 * first))

    def quantized(x: Tensor, values: Tensor) -> Tensor:
        scale, offset, *_ = scales(values)
        return fake_quantize(x, scale[:, None], None if offset is None else offset[:, None], bits.activation)

    weight, bias = _weight(model.mlp, bits.weight), model.mlp.bias.detach()  # type: ignore[arg-type]
    first = linear(quantized(angles, seen), weight, bias)
    hidden = silu(linear(quantized(3 * first, seen), weight, bias))
    return linear(quantized(hidden, head_in), _weight(model.head, bits.weight), model.head.bias.detach())  # type: ignore[arg-type]


def test_without_iterations_it_is_finite_set_calibration(two: Found) -> None:
    bits = Formats(5, 4)
    made = learned(two, bits, 0)["head"]
    expected = _by_hand(two[0], bits, lambda values: row_scales(values, 4))  # type: ignore[arg-type]
    torch.testing.assert_close(made, expected)
    assert not torch.allclose(made, two[2]["head"], rtol=1e-3)


@pytest.mark.parametrize("over_time", [False, True])
def test_naive_is_symmetric_with_one_scale_for_all_times_or_one_each(two: Found, over_time: bool) -> None:
    def scales(values: Tensor) -> Any:
        rows = values if over_time else values.reshape(1, -1)
        return row_scales(rows, 4, symmetric=True).map(lambda v: v.expand(len(values)))

    made = naive_features(two[0], two[1], TIMES, Formats(5, 4), "max", over_time)["head"]
    torch.testing.assert_close(made, _by_hand(two[0], Formats(5, 4), scales))  # type: ignore[arg-type]


def test_learning_lowers_the_error_of_calibration(unet: Found) -> None:
    before, after = (mean_error(unet, learned(unet, Formats(4, 8), n)) for n in (0, 200))
    assert after < 0.5 * before


@pytest.mark.parametrize(("iterations", "rounding_weight"), [(1, 0.0), (2, 1e6), (10, 1e6), (3, 0.0)])
def test_what_was_learned_is_never_worse(unet: Found, iterations: int, rounding_weight: float) -> None:
    calibrated = learned(unet, Formats(4, 4), 0)
    made = learned(unet, Formats(4, 4), iterations, rounding_weight=rounding_weight)
    assert mean_error(unet, made) <= mean_error(unet, calibrated)


def test_learned_weights_are_codes_next_to_the_weights(two: Found) -> None:
    """Solved for from the features: they are those of weights that can be deployed."""
    model = two[0]
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    ticks: list[int] = []
    made = learned(two, Formats(3, 8), 60, tick=lambda: ticks.append(1))["head"]
    assert len(ticks) == 60
    inputs = fake_quantize(seen[-1], *_column(row_scales(seen[0], 8)), 8)
    weight = torch.linalg.lstsq(inputs.double(), (made - model.head.bias.detach()).double()).solution.T
    step = model.head.weight.detach().abs().amax(1, keepdim=True) / 3
    codes, exact = weight / step, model.head.weight.detach() / step
    assert bool(((codes - codes.round()).abs() < 0.05).all())
    assert bool(((codes - exact).abs() < 1.05).all())
    assert bool(((codes - exact).abs() > 0.55).any())


def _column(scales: Any) -> tuple[Tensor, Tensor]:
    return scales.scale[:, None], scales.offset[:, None]


def test_the_model_is_left_as_it_was(unet: Found) -> None:
    model, block, targets = unet
    SMALL_UNET.forward_loop()(model)
    before = picture(model)
    learned(unet, Formats(4, 4), 12, weights="mse")
    naive_features(model, block, TIMES, Formats(8, 8), "mse")
    after = picture(model)
    for name in before:
        assert same(before[name], after[name]), name
    with torch.no_grad():
        again = block.compute(model, TIMES)
    assert all(torch.equal(again[name], value) for name, value in targets.items())


def test_a_failure_leaves_it_as_it_was_too(unet: Found) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    SMALL_UNET.forward_loop()(unet[0])
    before = picture(unet[0])
    with pytest.raises(KeyboardInterrupt):
        learned(unet, Formats(4, 4), 5, tick=fail)
    after = picture(unet[0])
    assert all(same(before[name], after[name]) for name in before)


def test_what_has_no_learnable_rounding_is_calibrated(unet: Found) -> None:
    formats = Formats(FP8_E4M3, FP8_E4M3)
    zero, some = (learned(unet, formats, n) for n in (0, 5))
    assert all(torch.equal(zero[name], some[name]) for name in zero)
    assert mean_error(unet, zero) < 0.01


def test_weights_that_are_to_be_kept_were_never_calibrated(unet: Found) -> None:
    kept, mse = (learned(unet, Formats(4, 8), 0, weights=how) for how in ("keep", "mse"))
    assert all(torch.equal(kept[name], mse[name]) for name in mse)


def test_quantizers_of_another_shape_and_kind_become_those_of_the_block(two: Found) -> None:
    model, block, targets = copy.deepcopy(two[0]), two[1], two[2]
    expected = learned(two, Formats(4, 4), 0)["head"]
    blocks = {"num_bits": 4, "block_sizes": {-1: 3, "type": "dynamic"}}
    for layer in (model.mlp, model.head):
        layer.weight_quantizer.amax = torch.tensor(1.0)
        layer.weight_quantizer.set_from_attribute_config(blocks)
        layer.input_quantizer.set_from_attribute_config({"num_bits": 8, "axis": -1})
        layer.input_quantizer.amax = torch.ones(1, 6)
    made = learned((model, block, targets), Formats(4, 4), 0)["head"]
    assert torch.equal(made, expected)


def test_formats_are_those_of_most_layers(unet: Found) -> None:
    assert formats(unet[0], None, None) == Formats(8, 8)
    assert formats(unet[0], 3, FP8_E4M3) == Formats(3, FP8_E4M3)
    model = mtq.quantize(FAMILIES["plain"].make(), {**fast_config(weight_bits=4, activation_bits=6), "algorithm": None})
    model.conv2.weight_quantizer.num_bits = 2
    assert formats(model, None, None) == Formats(4, 6)
    assert formats(nn.Linear(2, 2), None, None) == Formats(8, 8)


@pytest.mark.slow
def test_on_a_trained_model_the_error_is_far_below_naive() -> None:
    from diffusers import UNet2DModel

    model = UNet2DModel.from_pretrained(BUNDLED).eval()
    model = mtq.quantize(model, {**tdq.make_config(4, 4), "algorithm": None})
    times = torch.arange(0.0, 1000.0, 50.0)
    block = find_temporal_block(model, {"sample": noise(1, 3, 32, 32), "timestep": torch.tensor(3.0)}, times=20)
    with torch.no_grad():
        targets = block.compute(model, times)

    bits = Formats(4, 4)
    made = {
        "naive": naive_features(model, block, times, bits, "mse"),
        "cache": {name: Feature.quantized(value, 4).dense() for name, value in targets.items()},
        **{
            name: tib_features(model, block, times, bits, "mse", targets, iterations, 0.01, lambda: None)
            for name, iterations in (("calibrated", 0), ("tib", 250))
        },
    }
    errors: Any = {name: relative_squared_error(targets, features) for name, features in made.items()}
    choice = select({name: errors[name] for name in ("naive", "cache", "tib")}, "step")
    errors["chosen"] = relative_squared_error(targets, merged(choice, made))  # type: ignore[arg-type]
    decibels = {name: -10 * math.log10(torch.stack(list(error.values())).mean()) for name, error in errors.items()}
    assert decibels["calibrated"] > decibels["naive"] + 4
    assert decibels["tib"] > decibels["calibrated"] + 2
    assert decibels["chosen"] > max(decibels["naive"] + 7, decibels["tib"])
