"""Weights rounded by what their layers read: what is gathered, what is gained, and that nothing else changes."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import TIMES, TinyDenoiser, at, calls, fast_config, loop, noise, quantized
from support.unchanged import unchanged_by
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.calibration import compensated_rounding, input_covariance
from modelopt_tdq.calibration.input_covariance import BlockOfInputs, InputCovariance
from modelopt_tdq.core.metrics import sqnr_db
from modelopt_tdq.model.full_precision import full_precision
from modelopt_tdq.model.weight_fit import changed_weights

QUANTIZED = ("conv1", "mix", "conv2")
DATA = calls(samples=16, batch=8)


def rounded(rounding: str = "compensated", data: Any = None, model: nn.Module | None = None, **fields: Any) -> Any:
    coarse = {"weight_bits": 3, "replay_samples": 16, "rounding": rounding}
    return quantized(model, DATA if data is None else data, **{**coarse, **fields})


def original() -> nn.Module:
    torch.manual_seed(0)
    return TinyDenoiser().eval()


def weights(model: Any) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.detach() for name in QUANTIZED}


def prediction_db(model: nn.Module, data: Any) -> list[float]:
    """SQNR against the model before it was quantized, at each call."""
    exact = original()
    with torch.no_grad():
        return [sqnr_db(exact(*call), model(*call)) for call in data]


# --- what is gathered ---


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    """Of every kind that is rounded."""
    dimensions = draw(st.integers(0, 3))
    if not dimensions:
        return nn.Linear(draw(st.integers(1, 6)), 4, bias=False)
    groups, small = draw(st.sampled_from([1, 2, 4])), st.integers(1, 3)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    kernel = tuple(draw(small) for _ in range(dimensions))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = draw(st.booleans())
    return kind(
        4,
        8,
        kernel,  # type: ignore[arg-type]
        stride=1 if same else draw(small),
        dilation=draw(st.integers(1, 2)),
        padding="same" if same else draw(st.integers(0, 2)),  # type: ignore[arg-type]
        groups=groups,
        padding_mode=mode,
        bias=False,
    )


@given(layers(), st.integers(1, 3), st.booleans(), st.integers(0, 100))
def test_rows_times_weights_are_the_output(layer: Any, samples: int, batched: bool, seed: int) -> None:
    torch.manual_seed(seed)
    if isinstance(layer, nn.Linear):
        x = torch.randn(samples, 3, 2, layer.in_features) if batched else torch.randn(layer.in_features)
    else:
        x = torch.randn(samples, 4, *[8] * len(layer.kernel_size))
        x = x if batched else x[0]
    with torch.no_grad():
        output = layer(x)
    rows = input_covariance._patches(layer, x, 10**6, 0)
    weight = layer.weight.detach().reshape(rows.shape[1], -1, rows.shape[2])
    found = torch.einsum("rgn,gon->rgo", rows, weight).flatten(1)
    expected = output if isinstance(layer, nn.Linear) else output.movedim(-1 - len(layer.kernel_size), -1)
    assert torch.allclose(found, expected.reshape(found.shape), atol=1e-5)


@given(st.integers(1, 5000), st.sampled_from([(), (3,), (3, 3), (11, 11, 11)]))
def test_blocks_are_of_whole_channels(channels: int, kernel: tuple[int, ...]) -> None:
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(torch.empty(1, device="meta").expand(2, channels, *kernel))
    blocks, size = input_covariance.input_blocks(layer), math.prod(kernel)
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    assert blocks[-1].stop == channels * size
    sizes = [block.stop - block.start for block in blocks]
    assert all(length % size == 0 and (length <= 576 or length == size) for length in sizes)
    assert max(sizes) - min(sizes) <= size


def test_some_rows_of_every_sample() -> None:
    layer, x = nn.Conv2d(4, 2, 3, padding=1), noise(3, 4, 8, 8)
    every = input_covariance._patches(layer, x, 64, 0).reshape(3, 64, -1)
    some = input_covariance._patches(layer, x, 5, 0).reshape(3, 5, -1)
    places = [(every[0] == row).all(1).nonzero().item() for row in some[0]]
    assert len(set(places)) == 5
    assert torch.equal(some, every[:, places])
    assert not torch.equal(some, input_covariance._patches(layer, x, 5, 1).reshape(3, 5, -1))


@pytest.mark.parametrize("halves", [False, True])
def test_what_is_summed(halves: bool) -> None:
    """Of the means of a time, a tenth and what may be chance: a fifth, of five samples."""
    model: Any = rounded("nearest")
    probe = InputCovariance(model.mix, 1, halves)
    expected = torch.zeros(2, 8, 8)
    with full_precision(model), torch.no_grad():
        for row, time in enumerate(TIMES):
            x = noise(5, 3, 8, seed=row) + row
            probe.row, probe.places = row, (0, 1, 2, 3, 4)
            with at(model, time):
                probe(model.mix, (x,), {}, None)
            left = x - (1 - (0.1 + 0.9 / 5) ** 0.5) * x.mean((0, 1))
            for half in (0, 1):
                part = left[half::2].reshape(-1, 8)
                expected[half] += part.T @ part
            probe.places = ()  # one that stands in
            with at(model, time):
                probe(model.mix, (x + 1,), {}, None)
    found = list(probe.sums())
    assert all(block.inputs == slice(0, 8) and block.crossed is None for [block] in found)
    sums = torch.stack([block.products[0] for [block] in found])
    assert torch.allclose(sums, expected if halves else expected.sum(0, keepdim=True), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("halves", [False, True])
def test_of_few_bits_what_is_read_and_what_it_would_be_in_full_precision(halves: bool) -> None:
    model: Any = rounded("nearest", activation_bits=4)
    quantizer = model.mix.input_quantizer
    probe = InputCovariance(model.mix, 1, halves)
    expected = torch.zeros(2, 2, 8, 8)
    for row, time in enumerate(TIMES):
        z = noise(5, 3, 8, seed=row) + row
        with at(model, time), torch.no_grad():
            x = quantizer(z)
            with full_precision(model):
                probe.row, probe.places = row, (0, 1, 2, 3, 4)
                probe(model.mix, (z,), {}, None)
        assert not torch.equal(x, z)
        exact, read = (v - (1 - (0.1 + 0.9 / 5) ** 0.5) * v.mean((0, 1)) for v in (z, x))
        for half in (0, 1):
            part = read[half::2].reshape(-1, 8)
            expected[half] += torch.stack([part.T @ part, exact[half::2].reshape(-1, 8).T @ part])
    found = [torch.stack([block.products[0], block.crossed[0]]) for [block] in probe.sums()]
    assert torch.allclose(torch.stack(found), expected if halves else expected.sum(0, True), rtol=1e-4, atol=1e-3)
    assert InputCovariance.numel(model.mix) == 2 * 64


# --- what is gained ---


def test_predictions_on_other_samples_are_better() -> None:
    others = calls(samples=16, batch=16, seed=77)
    nearest, better, auto = (prediction_db(rounded(kind), others) for kind in ("nearest", "compensated", "auto"))
    assert all(new > old + 1.0 for new, old in zip(better, nearest, strict=True)), (nearest, better)
    assert all(new > old + 1.0 for new, old in zip(auto, nearest, strict=True)), (nearest, auto)


def test_the_weights_are_the_codes() -> None:
    before, model = weights(original()), rounded()
    for name, weight in weights(model).items():
        quantizer = model.get_submodule(name).weight_quantizer
        assert type(quantizer) is mtq.nn.TensorQuantizer
        assert torch.equal(quantizer(weight), weight)
        assert not torch.equal(quantizer(before[name]), weight)
    assert torch.equal(model.conv_in.weight, original().conv_in.weight)
    assert torch.equal(model.conv_out.weight, original().conv_out.weight)


def test_corrections_know_the_weights_that_were_rounded() -> None:
    """The mean output of the model is that of the original, at each time."""
    model, exact = rounded(correction="per_step", weight_bits=2), original()
    uncorrected = copy.deepcopy(model)
    tdq.set_layer_correction(uncorrected, None)
    with torch.no_grad():
        for time in TIMES:
            data = [call for call in DATA if float(call[1]) == time]
            mean = torch.stack([exact(*call) for call in data]).mean((0, 1, 3, 4))
            found, without = (torch.stack([m(*c) for c in data]).mean((0, 1, 3, 4)) for m in (model, uncorrected))
            assert float((found - mean).abs().max()) < 0.2 * float((without - mean).abs().max())


def test_what_is_known_of_the_weights_is_of_those_that_are_there() -> None:
    model = rounded()
    assert changed_weights(model) == []
    with torch.no_grad():  # as somebody who loads the checkpoint once more
        model.mix.weight.copy_(weights(original())["mix"])
    assert [change.name for change in changed_weights(model)] == ["mix.weight_quantizer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [3, 8, (4, 3)])
def test_corrections_that_come_later_are_warned_of(bits: Any, dtype: torch.dtype) -> None:
    algorithm = {"method": "tdq_correct", "correction": "static", "progress": False}
    data = [(sample.to(dtype), time) for sample, time in DATA]
    for rounding, warned in (("nearest", False), ("compensated", True)):
        model = rounded(rounding, data, original().to(dtype), weight_bits=bits)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mtq.calibrate(model, algorithm, loop(data))
        assert any("of 3 layers (conv1, mix, conv2, ...) are values" in str(w.message) for w in caught) == warned


@pytest.mark.parametrize("attribute", ["_BLOCK", "_KEPT"])
def test_in_portions(monkeypatch: pytest.MonkeyPatch, attribute: str) -> None:
    """Blocks of inputs are rounded by themselves; portions of layers change nothing."""
    whole = rounded()
    monkeypatch.setattr(input_covariance if attribute == "_BLOCK" else compensated_rounding, attribute, 20)
    others = calls(samples=16, batch=16, seed=77)
    parts = rounded()
    same = all(torch.equal(weight, weights(parts)[name]) for name, weight in weights(whole).items())
    assert same == (attribute == "_KEPT")
    pairs = zip(prediction_db(parts, others), prediction_db(rounded("nearest"), others), strict=True)
    assert all(new > old + 0.3 for new, old in pairs)


# --- whatever the batches; for processes see test_correct ---


def disagreement(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Fraction of the codes; sums in another order may tip one that lies on the edge."""
    return max(float((one[name] != other[name]).float().mean()) for name in one)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_batch_size_changes_nothing(batch: int) -> None:
    order = [3, 1, 7, 0, 2, 6, 4, 5, *range(8, 16)]
    assert disagreement(weights(rounded()), weights(rounded(data=calls(16, batch, order=order)))) < 0.02


# --- when nothing is rounded so ---


def untouched(model: nn.Module) -> bool:
    return all(torch.equal(weight, weights(original())[name]) for name, weight in weights(model).items())


def test_without_samples_to_judge_by_auto_rounds_to_the_nearest() -> None:
    assert untouched(rounded("auto", calls(samples=1)))
    assert not untouched(rounded("compensated", calls(samples=1)))


def test_auto_leaves_layers_alone_that_gain_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensated_rounding, "compensated", lambda weight, *given: 0.5 * weight)
    assert untouched(rounded("auto"))
    assert not untouched(rounded("compensated"))


@pytest.mark.parametrize(("trial", "kept"), [(2.0, True), (4.0, False)])
def test_judged_by_the_half_that_it_was_not_rounded_by(trial: float, kept: bool) -> None:
    known, judged = ([BlockOfInputs(slice(0, 1), torch.full((1, 1, 1), value), None)] for value in (1.0, 2.0))

    class Rounding:
        def compensated(self, *inputs: Any) -> list[str]:
            assert [float(block.products) for [block] in inputs] == [1.0, 3.0]
            return ["trial", "of all"]

        def nearest(self) -> str:
            return "nearest"

        def error(self, values: str, inputs: Any) -> float:
            assert inputs is judged
            return {"trial": trial, "nearest": 3.0}[values]

    found: Any = compensated_rounding._best(Rounding(), [known, judged])  # type: ignore[arg-type]
    assert found == ("of all" if kept else None)


def test_scales_that_are_kept_keep_the_codes() -> None:
    model = rounded("nearest")
    mtq.calibrate(model, {"method": "tdq", "weights": "keep", "rounding": "auto", "progress": False}, loop(DATA))
    assert untouched(model)


def test_weights_that_two_layers_share_are_left_alone() -> None:
    model: Any = original()
    model.conv2.weight = model.conv1.weight
    found = rounded(model=model)
    assert torch.equal(found.conv1.weight, original().conv1.weight)
    assert not torch.equal(found.mix.weight, original().mix.weight)


class Positional(TinyDenoiser):
    """Its calls cannot be repeated by name."""

    def forward(self, sample: Tensor, /, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(sample, timestep)


def test_calls_that_cannot_be_repeated() -> None:
    torch.manual_seed(0)
    model = mtq.quantize(Positional().eval(), fast_config(weight_bits=3, rounding="auto"), loop(DATA))
    assert untouched(model)
    algorithm = {"method": "tdq", "rounding": "compensated", "protect_steps": False, "progress": False}

    def failing() -> None:
        with pytest.raises(TdqError, match="rounding"):
            mtq.calibrate(model, algorithm, loop(DATA))

    unchanged_by(model, failing)


@pytest.mark.parametrize("method", ["tdq_qat", "tdq_reconstruct"])
def test_algorithms_that_learn_take_recipes_and_round_in_their_own_way(method: str) -> None:
    tdq.make_config(method=method, rounding="auto")
    with pytest.raises(TdqError, match="rounding"):
        tdq.make_config(method=method, rounding="compensated")
