"""Smoothing over channels: exact in full precision, shared by those who read one tensor, worth it with outliers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.models import SMALL_UNET, at, calls, fast_config, loop, noise, quantized
from support.once import Once
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.calibration.channel_smoothing import undo_channel_smoothing
from modelopt_tdq.calibration.smoothed_layer import SmoothedLayer, balanced, smoothing_vector
from modelopt_tdq.calibration.smoothing_trial import Settings, Trial
from modelopt_tdq.config import TdqCalibConfig
from modelopt_tdq.core.metrics import sqnr_db
from modelopt_tdq.core.turns import Turns
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.weight_fit import warn_of_changed_weights
from modelopt_tdq.reconstruction.learn import _learning


class Outliers(nn.Module):
    """Convolutions and linear layers on tensors with a few large channels, some of which several layers read."""

    def __init__(self, largest: float = 100.0) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.mix = nn.Linear(8, 8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)
        size = torch.ones(8)
        size[1], size[6] = largest, largest / 3
        size[4] = 0.0
        self.register_buffer("size", size)
        with torch.no_grad():  # what is large counts no more than the rest, as in trained models
            self.conv1.weight[:4] /= size[:4].clamp(min=1).reshape(-1, 1, 1)
            self.conv1.weight[4:] /= size[4:].clamp(min=1).reshape(-1, 1, 1)
            self.shortcut.weight /= size.clamp(min=1).reshape(-1, 1, 1)
            for layer in (self.q, self.k, self.v):
                layer.weight /= size.clamp(min=1)

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        t = torch.as_tensor(timestep).to(sample).reshape(-1, 1, 1, 1) / 1000
        size = self.size.reshape(-1, 1, 1)
        h = self.conv_in(sample) * (0.2 + t) * size
        h = self.conv1(h) + self.shortcut(h)
        tokens = h.flatten(2).transpose(1, 2)
        tokens = nn.functional.layer_norm(tokens, (8,)) * self.size
        tokens = torch.tanh(self.q(tokens)) * torch.tanh(self.k(tokens)) + self.v(tokens)
        tokens = self.mix(nn.functional.silu(tokens))
        h = tokens.transpose(1, 2).reshape(h.shape)
        return self.conv_out(h + self.conv2(nn.functional.silu(h)))


SHARED = [("conv1", "shortcut"), ("q", "k", "v"), ("mix",), ("conv2",)]
LAYERS = [name for group in SHARED for name in group]


def outliers(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return Outliers(**arguments).eval()


once = Once()


def smoothed(strength: Any = 0.5, model: nn.Module | None = None, data: Any = None, **fields: Any) -> Any:
    config = fast_config(**{"channel_smoothing": strength, **fields})
    if model is not None or data is not None:
        return mtq.quantize(outliers() if model is None else model, config, loop(calls() if data is None else data))
    return once(config, lambda: mtq.quantize(outliers(), config, loop(calls())))


def divisor(model: nn.Module, layer: str) -> Tensor | None:
    quantizer = model.get_submodule(f"{layer}.input_quantizer")
    assert isinstance(quantizer, tdq.TemporalQuantizer)
    return quantizer.channel_divisor


def layer_inputs(model: nn.Module) -> dict[str, Tensor]:
    """[C, ...] what goes into each layer in all calibration calls, channels first."""
    seen: dict[str, list[Tensor]] = {name: [] for name in LAYERS}

    def hook(name: str) -> Callable[..., None]:
        axis = 1 if "conv" in name or name == "shortcut" else -1
        return lambda module, args: seen[name].append(args[0].movedim(axis, 0).flatten(1))

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in LAYERS]
    with torch.no_grad():
        loop(calls())(model)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values, 1) for name, values in seen.items()}


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0, "auto"])
def test_nothing_changes_in_full_precision(strength: Any) -> None:
    model, plain = smoothed(strength), outliers()
    assert sum(divisor(model, name) is not None for name in LAYERS) >= 4
    for sample, time in calls(seed=5):
        with full_precision(model), torch.no_grad():
            torch.testing.assert_close(model(sample, time), plain(sample, time), rtol=1e-4, atol=1e-5)
    mtq.disable_quantizer(model, "*")
    sample, time = calls(seed=6)[0]
    torch.testing.assert_close(model(sample, time), plain(sample, time), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_the_vectors_are_those_of_the_definition(strength: float) -> None:
    plain, model = outliers(), smoothed(strength)
    inputs = layer_inputs(plain)
    for group in SHARED:
        x = inputs[group[0]].abs().amax(1).double()
        w = torch.zeros(8, dtype=torch.float64)
        for name in group:
            weight = plain.get_submodule(name).weight.detach()
            own = weight.abs().flatten(2).amax(2) if weight.dim() > 2 else weight.abs()
            groups = 2 if name == "conv1" else 1  # the first four channels meet the first four outputs only
            own = torch.cat([part.amax(0) for part in own.chunk(groups)])
            w = torch.maximum(w, own.double())
        expected = x**strength / w ** (1 - strength)
        alive = x > 0
        expected = torch.where(alive, expected / expected[alive].log().mean().exp(), 1.0)
        for name in group:
            found = divisor(model, name)
            assert found is not None
            torch.testing.assert_close(found.flatten().double(), expected, rtol=1e-5, atol=0.0)
            kernel = (1, 1) if found.dim() == 3 else ()
            assert found.shape == (8, *kernel)
    assert float(divisor(model, "conv1")[4]) == 1.0  # type: ignore[index]


def test_readers_of_one_tensor_share_a_vector_and_others_do_not() -> None:
    model = smoothed()
    vectors = [[divisor(model, name).flatten() for name in group] for group in SHARED]  # type: ignore[union-attr]
    for group in vectors:
        assert all(torch.equal(one, group[0]) for one in group)
    assert len({tuple(group[0].tolist()) for group in vectors}) == len(SHARED)


class InPlace(nn.Module):
    """Two layers that read the same memory, which is written in between."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = sample * (1 + timestep / 1000)
        y = self.one(h)
        h.mul_(torch.tensor([1.0, 10.0, 1.0, 0.1]))
        return y + self.two(h)


def test_memory_that_is_written_in_between_is_not_the_same_tensor() -> None:
    data = [(noise(2, 4, seed=int(t)), torch.tensor(t)) for t in (10.0, 500.0)]
    model = smoothed(model=InPlace().eval(), data=data)
    assert not torch.allclose(divisor(model, "one"), divisor(model, "two"))  # type: ignore[arg-type]


def _error(model: nn.Module, plain: nn.Module) -> float:
    with torch.no_grad():
        pairs = [(model(sample, time), plain(sample, time)) for sample, time in calls(seed=100)]
    noise = sum(float((found - exact).square().sum()) for found, exact in pairs)
    return noise / sum(float(exact.square().sum()) for _, exact in pairs)


def test_outlier_channels_cost_less() -> None:
    plain = outliers()
    errors = {strength: _error(smoothed(strength), plain) for strength in ("none", 0.5, "auto")}
    assert errors[0.5] < errors["none"] / 10
    assert errors["auto"] < errors["none"] / 10


def test_auto_leaves_alone_what_gains_nothing() -> None:
    """Channels and weights of one size: whatever divides them makes something larger."""
    torch.manual_seed(0)

    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 64, bias=False)
            signs = torch.randint(0, 2, (64, 16)) * 2.0 - 1.0
            self.layer.weight.data = signs

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.layer(torch.sin(30 * sample) * (1 + timestep))

    data = [(noise(64, 16, seed=int(t)), torch.tensor(t)) for t in (0.0, 1.0)]
    runs = []

    def forward_loop(quantized: nn.Module) -> None:
        runs.append(len(runs))
        loop(data)(quantized)

    model = mtq.quantize(Even(), fast_config(channel_smoothing="auto"), forward_loop)
    assert divisor(model, "layer") is None
    assert len(runs) == 1


def test_codes_divide_by_one_product() -> None:
    """q = rne(x / fl(s c)), not rne(fl(x / c) / s); values s q."""
    model = smoothed()
    quantizer = model.conv1.input_quantizer
    x = noise(2, 8, 16, 16, seed=3) * outliers().size.reshape(-1, 1, 1) * 0.5
    with at(model, 600.0), torch.no_grad():
        found = quantizer(x)
    scale = quantizer._scale[2].numpy()
    product = scale * quantizer.channel_divisor.numpy()
    assert product.dtype == np.float32
    codes = oracle.codes(x.numpy(), product, 0.0, 8)
    np.testing.assert_array_equal(found.numpy(), oracle.values(codes, scale, 0.0))
    twice = oracle.codes((x / quantizer.channel_divisor).numpy(), scale, 0.0, 8)
    assert (twice == codes).mean() > 0.999


@pytest.mark.parametrize("size", [1.0, 1e11])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_what_corrections_take_back_hardly_counts(kind: Any, size: float) -> None:
    """The error that is left is that of the least squares of each channel; of converged models' outputs as well."""
    spatial = kind is nn.Conv2d
    layer = mtq.quantize(kind(3, 5, 1) if spatial else kind(3, 5), {"quant_cfg": [], "algorithm": None})
    y, tried = (noise(4, 5, 6, 7, seed=seed) for seed in (0, 1))
    tried = (tried + 0.5 * y + torch.arange(5.0).reshape(-1, 1, 1)) * size
    y = y * size
    expected = 0.0
    for channel in range(5):
        known = np.stack([tried[:, channel].flatten().numpy(), np.ones(4 * 42)], 1).astype(np.float64)
        expected += float(np.linalg.lstsq(known, y[:, channel].flatten().numpy(), rcond=None)[1][0])
    if not spatial:
        y, tried = y.movedim(1, -1), tried.movedim(1, -1)
    whole = float((tried - y).double().square().sum())
    for corrected, wanted in ((True, expected + 1e-3 * whole), (False, whole)):
        told = Settings((1.0,), (1.0,), asymmetric=False, corrected=corrected)
        trial = Trial(SmoothedLayer("layer", layer), [], told, temporal=True, times=[0.0], turns=Turns([layer]))
        assert float(trial._errors([trial._moments(tried, y)])[0]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_linear_layers_of_any_rank(rank: int) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 5)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.layer(sample * torch.tensor([1.0, 50.0, 1.0, 1.0]) * (1 + timestep))

    shape = (3, 2, 6, 4)[4 - rank :]
    data = [(noise(*shape, seed=int(t)), torch.tensor(t)) for t in (0.0, 1.0)]
    torch.manual_seed(0)
    plain = Tokens()
    model = smoothed(model=copy.deepcopy(plain), data=data)
    assert divisor(model, "layer").shape == (4,)  # type: ignore[union-attr]
    exact = plain(*data[1])
    assert float((model(*data[1]) - exact).abs().max()) < 0.05 * float(exact.abs().max())
    with full_precision(model):
        torch.testing.assert_close(model(*data[1]), exact, rtol=1e-5, atol=1e-5)


_MAGNITUDES = st.lists(st.floats(0.0, 2.0**100, width=32), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(_MAGNITUDES, st.data(), st.sampled_from([smoothing_vector, balanced]), st.floats(2**-10, 1.0))
def test_vectors_are_positive_finite_and_one_where_nothing_is(
    activation: list[float], data: st.DataObject, formula: Any, a: float
) -> None:
    weight = data.draw(st.lists(st.floats(0.0, 1e6, width=32), min_size=len(activation), max_size=len(activation)))
    x, w = torch.tensor(activation), torch.tensor(weight)
    found = formula(x, w, a)
    assert found.dtype == torch.float32
    assert bool(((found > 0) & found.isfinite()).all())
    dead = (x == 0) | (w == 0)
    assert bool((found[dead] == 1).all())
    factor = formula(x * 0.25, w * 4, a)  # powers of two, unless something is lost below the least float
    if bool(((x * 0.25 > 1e-30) | (x == 0)).all()):
        torch.testing.assert_close(factor, found, rtol=1e-5, atol=0.0)


def test_a_balanced_vector_serves_the_activation_where_products_are_large_and_the_weights_where_small() -> None:
    x, w = torch.tensor([4.0, 1.0, 0.001, 0.0005]), torch.tensor([1.0, 4.0, 1.0, 2.0])
    found = balanced(x, w, 0.1)  # the products are 4, 4, 0.001, 0.001; b is 0.4
    expected = torch.tensor([math.hypot(4, 0.4), math.hypot(1, 0.1), 0.4, 0.2])
    torch.testing.assert_close(found, expected / expected.log().mean().exp(), rtol=1e-5, atol=0.0)


def test_channels_that_are_not_finite_are_left_alone() -> None:
    x = torch.tensor([1.0, float("inf"), float("nan"), 4.0])
    found = smoothing_vector(x, torch.ones(4), 0.5)
    torch.testing.assert_close(found, torch.tensor([2**-0.5, 1.0, 1.0, 2**0.5]))


_KINDS = st.sampled_from([(nn.Linear, 0), (nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])


@settings(max_examples=30, deadline=None)
@given(_KINDS, st.integers(1, 3), st.integers(1, 3), st.sampled_from(["zeros", "reflect"]), st.integers(0, 999))
def test_a_layer_computes_the_same(kind: Any, groups: int, width: int, padding_mode: str, seed: int) -> None:
    """(w c) (x / c) = w x for every kind of layer, with groups, strides, dilations and padding of any mode."""
    torch.manual_seed(seed)
    make, spatial = kind
    if make is nn.Linear:
        groups, module = 1, nn.Linear(width, 2)
    else:
        mode = {"padding_mode": padding_mode} if spatial < 3 else {}
        module = make(groups * width, groups * 2, 3, stride=2, padding=1, dilation=1, groups=groups, **mode)
    x = (
        torch.randn(2, *(5,) * spatial, groups * width)
        if not spatial
        else torch.randn(2, groups * width, *(5,) * spatial)
    )
    layer = SmoothedLayer("layer", module)
    largest = layer.by_channel(x).abs().amax(1)
    assert largest.shape == layer.weight_magnitude.shape == (layer.channels,) == (groups * width,)
    vector = smoothing_vector(largest * torch.rand(groups * width) * 10, layer.weight_magnitude, 0.5)
    found = layer.compute(x / layer.placed(vector), layer.multiplied(vector))
    torch.testing.assert_close(found, module(x), rtol=1e-4, atol=1e-5)


def test_a_failed_calibration_gives_the_weights_back() -> None:
    model = outliers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs = []

    def forward_loop(quantized: nn.Module) -> None:
        runs.append(len(runs))
        if len(runs) == 2:
            assert not torch.equal(quantized.conv1.weight, before["conv1.weight"])
            raise RuntimeError("the second run")
        loop(calls())(quantized)

    with pytest.raises(RuntimeError, match="second run"):
        mtq.quantize(model, fast_config(channel_smoothing=0.5), forward_loop)
    for name in ("conv1", "q", "mix"):
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])
    assert not any("_channel_divisor_bits" in name for name in model.state_dict())


def test_a_loop_that_runs_once_is_told_so() -> None:
    data = iter(calls())
    with pytest.raises(tdq.TdqError, match="each of the two times"):
        mtq.quantize(outliers(), fast_config(channel_smoothing=0.5), lambda m: [m(s, t) for s, t in data])


def same(model: nn.Module, other: nn.Module) -> bool:
    """Every number of the two, and what they compute."""
    one, two = model.state_dict(), other.state_dict()
    equal = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    return equal and all(torch.equal(model(*call), other(*call)) for call in calls(seed=9))


def test_auto_makes_do_with_a_loop_that_runs_once() -> None:
    data = iter(calls())
    with pytest.warns(tdq.TdqWarning, match="begin anew"):
        model = mtq.quantize(outliers(), fast_config(channel_smoothing="auto"), lambda m: [m(s, t) for s, t in data])
    assert same(model, smoothed("none"))


@pytest.mark.parametrize(("strength", "expected"), [("none", 1), (0.5, 2), ("auto", 2)])
def test_the_data_are_run_again_for_what_is_smoothed(strength: Any, expected: int) -> None:
    runs = []

    def forward_loop(quantized: nn.Module) -> None:
        runs.append(len(runs))
        loop(calls())(quantized)

    mtq.quantize(outliers(), fast_config(channel_smoothing=strength), forward_loop)
    assert len(runs) == expected


def test_scales_are_those_of_the_divided_inputs_and_others_stay() -> None:
    model, plain = smoothed(0.5), smoothed("none")
    inputs = layer_inputs(outliers())
    for name in LAYERS:
        largest = float((inputs[name].abs().amax(1) / divisor(model, name).flatten()).max())  # type: ignore[union-attr]
        assert float(model.get_submodule(f"{name}.input_quantizer").amax) == pytest.approx(largest, rel=1e-5)
    once = smoothed("none", temporal=["q.*"])  # nothing of it is smoothed, nor run again
    assert torch.equal(once.q.input_quantizer._scale, plain.q.input_quantizer._scale)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "automatic", None])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(tdq.TdqError, match="channel_smoothing"):
        tdq.make_config(channel_smoothing=value)


def test_it_is_off_by_default() -> None:
    assert TdqCalibConfig().channel_smoothing == "none"
    model = smoothed("none")
    assert all(divisor(model, name) is None for name in LAYERS)


def test_two_smoothings_are_refused() -> None:
    config = fast_config(channel_smoothing=0.5)
    config["algorithm"] = ["smoothquant", config["algorithm"]]
    with pytest.raises(tdq.TdqError, match="pre_quant_scale already"):
        mtq.quantize(outliers(), config, loop(calls()))


def test_auto_smooths_nothing_that_cannot_be() -> None:
    config = fast_config(channel_smoothing="auto")
    config["algorithm"] = ["smoothquant", config["algorithm"]]
    model = mtq.quantize(outliers(), config, loop(calls()))
    assert all(divisor(model, name) is None for name in LAYERS)
    assert model.mix.input_quantizer.pre_quant_scale is not None
    kept = smoothed("auto", weights="keep", model=smoothed("none"))
    assert same(kept, smoothed("none"))


def test_weights_whose_scales_are_kept_are_not_smoothed() -> None:
    with pytest.raises(tdq.TdqError, match="keep"):
        smoothed(weights="keep")
    model = smoothed(0.5)
    before = model.conv1.weight.clone()
    mtq.calibrate(model, fast_config(weights="keep")["algorithm"], loop(calls()))
    assert torch.equal(model.conv1.weight, before)
    assert divisor(model, "conv1") is not None


def test_a_new_calibration_starts_from_the_original_weights() -> None:
    plain, model = outliers(), smoothed(0.5)
    mtq.calibrate(model, fast_config(channel_smoothing=0.8)["algorithm"], loop(calls()))
    once = smoothed(0.8)
    for name in LAYERS:
        torch.testing.assert_close(divisor(model, name), divisor(once, name), rtol=1e-5, atol=0.0)
    mtq.calibrate(model, fast_config()["algorithm"], loop(calls()))
    for name in LAYERS:
        assert divisor(model, name) is None
        torch.testing.assert_close(model.get_submodule(name).weight, plain.get_submodule(name).weight)


def test_weights_that_others_use_too_are_left_alone() -> None:
    model = outliers()
    model.k.weight = model.q.weight
    before = model.q.weight.detach().clone()
    model = smoothed(model=model)
    assert torch.equal(model.q.weight, before)
    assert divisor(model, "q") is None
    assert divisor(model, "v") is not None


def test_saved_and_restored(tmp_path: Path) -> None:
    model = smoothed("auto")
    mto.save(model, tmp_path / "model.pt")
    restored = mto.restore(Outliers().eval(), tmp_path / "model.pt")
    for sample, time in calls(seed=9):
        assert torch.equal(restored(sample, time), model(sample, time))


def test_copies_and_folded_weights_compute_the_same() -> None:
    model = smoothed()
    copied = copy.deepcopy(model)
    mtq.fold_weight(copied)
    for sample, time in calls(seed=9):
        assert torch.equal(copied(sample, time), model(sample, time))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    plain = outliers()
    data = [(sample.to(dtype), time) for sample, time in calls()]
    model = smoothed("auto", outliers().to(dtype), data)
    cast = smoothed("auto").to(dtype)
    assert divisor(cast, "conv1").dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(divisor(cast, "conv1"), divisor(smoothed("auto"), "conv1"))  # type: ignore[arg-type]
    for sample, time in calls(seed=9):
        exact = plain(sample, time)
        for each in (model, cast):
            found = each(sample.to(dtype), time)
            assert found.dtype == dtype
            assert float((found.float() - exact).square().sum() / exact.square().sum()) < 1e-3


def test_tables_of_other_channels_are_refused() -> None:
    table, plain = tdq.scale_table(smoothed(0.5)), tdq.scale_table(smoothed("none"))
    tdq.set_scale_table(smoothed(0.5), table)
    for model, other in ((smoothed(0.7), table), (smoothed("none"), table), (smoothed(0.5), plain)):
        with pytest.raises(tdq.TdqError, match="other channels"):
            tdq.set_scale_table(model, other)


def test_weights_from_elsewhere_are_noticed() -> None:
    """As pipeline.fuse_lora() adds them, without the factors of the channels."""
    model = smoothed()
    assert tdq.recalibrate_weights(model) == ()
    with torch.no_grad():
        model.mix.weight += 0.1 * noise(8, 8, seed=1)
    with pytest.warns(tdq.TdqWarning, match="no longer the weight whose channels were smoothed"):
        warn_of_changed_weights(model)
    with pytest.raises(tdq.TdqError, match="in full precision"):
        tdq.recalibrate_weights(model)
    with pytest.raises(tdq.TdqError, match="in full precision"):
        mtq.calibrate(model, fast_config()["algorithm"], loop(calls()))


def test_asymmetric_scales_are_those_of_the_smoothed_activation() -> None:
    plain = outliers()
    model = smoothed(0.5, asymmetric=True)
    assert model.conv2.input_quantizer.offset is not None
    assert _error(model, plain) < _error(smoothed(0.5), plain) * 1.05
    zeros = torch.zeros(1, 8, 4, 4)
    for time in (20.0, 600.0):
        with at(model, time):
            assert float(model.conv2.input_quantizer(zeros).abs().max()) < 1e-6


@pytest.mark.parametrize("statistic", ["mse", "output", "percentile", "entropy"])
def test_every_statistic(statistic: str) -> None:
    plain = outliers()
    fields = {"statistic": statistic, "protect_steps": True, "percentile": 99.9}
    assert _error(smoothed(0.5, **fields), plain) < _error(smoothed("none", **fields), plain) / 3


def test_trained_scales_and_weights_are_smoothed_ones() -> None:
    plain = outliers()
    config = tdq.make_config(4, 4, method="tdq_qat", channel_smoothing=0.5, progress=False)
    model = mtq.quantize(outliers(), config, loop(calls()))
    before = _error(model, plain)
    assert before < _error(smoothed("none", weight_bits=4, activation_bits=4), plain) / 2
    sample, time = calls()[0]
    with torch.no_grad():  # the same in training, but for codes at the edge
        deployed, trained = model(sample, time), model.train()(sample, time)
    assert float((trained - deployed).square().mean() / deployed.square().mean()) < 1e-3
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    target = plain(sample, time).detach()
    losses = []
    for _ in range(5):
        loss = (model(sample, time) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    model.eval()
    tdq.stop_learning(model)
    assert tdq.recalibrate_weights(model) == ()  # what was trained is its own
    undo_channel_smoothing(model)
    with full_precision(model):
        exact = plain(sample, time)
        assert float((model(sample, time) - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_inputs_that_a_reconstruction_does_not_quantize_are_smoothed_too() -> None:
    quantizer = smoothed().conv1.input_quantizer
    x = noise(2, 8, 4, 4)
    with _learning(SimpleNamespace(quantizers={"conv1": quantizer}, columns=None), 1.0):  # type: ignore[arg-type]
        quantizer._timestep.begin(torch.tensor([600.0]))
        assert torch.equal(quantizer(x), x / quantizer.channel_divisor)
        quantizer._timestep.end()


def test_reconstruction_learns_on_smoothed_activations() -> None:
    plain = outliers()
    config = tdq.make_config(
        4, 8, method="tdq_reconstruct", channel_smoothing=0.5, iterations=20, samples=16, batch_size=8, progress=False
    )
    model = mtq.quantize(outliers(), config, loop(calls()))
    assert divisor(model, "conv1") is not None
    assert _error(model, plain) < 0.1


def test_auto_does_no_harm_where_few_samples_tell_the_ranges() -> None:
    """Each channel is divided by its largest value of a few; others exceed it, in all channels."""
    torch.manual_seed(0)
    exact = SMALL_UNET.make().eval()

    def predicted_db(smoothing: Any) -> float:
        config = fast_config(channel_smoothing=smoothing, statistic="mse")
        model = mtq.quantize(copy.deepcopy(exact), config, SMALL_UNET.forward_loop(2))
        data = SMALL_UNET.data(batch=16, seed=50)
        with torch.no_grad():
            return sum(sqnr_db(exact(**call).sample, model(**call).sample) for call in data) / len(data)

    none, chosen, fixed = (predicted_db(smoothing) for smoothing in ("none", "auto", 0.7))
    assert fixed < none - 1  # what would be lost
    assert chosen > none - 0.3


def test_auto_smooths_nothing_without_samples_to_judge_by() -> None:
    model = quantized(data=calls(samples=1), channel_smoothing="auto")
    assert all(quantizer.channel_divisor is None for quantizer in tdq.temporal_quantizers(model).values())
