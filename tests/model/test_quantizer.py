"""TemporalQuantizer inside a model: exact scales whatever the dtype, one row per sample, ModelOpt's ways."""

from __future__ import annotations

import copy
from collections.abc import Callable

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import TIMES, at, noise, quantized
from torch import nn

import modelopt_tdq as tdq
from modelopt_tdq import TdqError, TemporalQuantizer


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantized(asymmetric=True)


_CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(float16, device)": lambda m: m.to("cpu", torch.float16),
    "half and back": lambda m: m.half().float(),
    "double": lambda m: m.double(),
    "to(tensor)": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
}


@pytest.mark.parametrize("cast", _CASTS)
def test_scales_stay_exact_through_casts(model: nn.Module, cast: str) -> None:
    before = tdq.scale_table(model)
    converted = _CASTS[cast](copy.deepcopy(model))
    after = tdq.scale_table(converted)
    for field in ("timesteps", "scale", "offset"):
        assert torch.equal(getattr(after, field), getattr(before, field)), field
    weight = next(converted.parameters())
    assert converted(noise(2, 3, 8, 8).to(weight), torch.tensor(300)).dtype == weight.dtype


def test_a_half_precision_model_quantizes_in_float32(model: nn.Module) -> None:
    half = copy.deepcopy(model).half()
    quantizer = tdq.temporal_quantizers(half)["conv1.input_quantizer"]
    exact = tdq.temporal_quantizers(model)["conv1.input_quantizer"]
    x = noise(2, 8, 8, 8).half()
    with at(half, 600), at(model, 600):
        assert torch.equal(quantizer(x), exact(x.float()).half())


def test_a_time_per_sample_is_each_sample_by_itself(model: nn.Module) -> None:
    samples, times = noise(4, 3, 8, 8), torch.tensor(TIMES)
    for time in (times, times.long(), times.half()):
        together = model(samples, time)
        one_by_one = torch.cat([model(samples[i : i + 1], time[i]) for i in range(4)])
        torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-5)


def test_codes_of_a_time_per_sample_are_exactly_those_of_each_sample(model: nn.Module) -> None:
    times, x = torch.tensor(TIMES), noise(4, 8, 8, 8)
    for quantizer in tdq.temporal_quantizers(model).values():
        with at(model, times):
            together = quantizer(x)
        for i, time in enumerate(TIMES):
            with at(model, time):
                assert torch.equal(quantizer(x[i : i + 1]), together[i : i + 1])


def test_samples_may_be_spread_over_a_multiple_of_the_batch(model: nn.Module) -> None:
    """Frames of a video, heads of an attention: [B * n, ...] with the sample as the slow index."""
    quantizer = tdq.temporal_quantizers(model)["conv1.input_quantizer"]
    x = noise(8, 5)
    with at(model, TIMES):
        together = quantizer(x)
    for i, time in enumerate(TIMES):
        with at(model, time):
            assert torch.equal(quantizer(x[2 * i : 2 * i + 2]), together[2 * i : 2 * i + 2])


@pytest.mark.parametrize("shape", [(3, 8), (1, 8), ()])
def test_times_that_do_not_fit_the_activation(model: nn.Module, shape: tuple[int, ...]) -> None:
    quantizer = tdq.temporal_quantizers(model)["conv1.input_quantizer"]
    with at(model, [300, 20]), pytest.raises(TdqError, match="2 times cannot be matched") as error:
        quantizer(torch.ones(shape))
    assert error.value.field == "timestep"


def test_without_scales_it_says_so() -> None:
    model = quantized()
    quantizer = tdq.temporal_quantizers(model)["mix.input_quantizer"]
    quantizer.reset_amax()
    assert not quantizer.has_table
    assert quantizer.amax is None
    with pytest.raises(TdqError, match="it has no scales yet"):
        model(noise(1, 3, 8, 8), 20)
    with pytest.raises(TdqError, match=r"mix\.input_quantizer.*not calibrated"):
        tdq.scale_table(model)


def test_reads_as_static_or_by_its_rows(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    mtq.print_quant_summary(model)
    assert "temporal 4 rows" in capsys.readouterr().out
    assert "temporal static" in repr(quantized(bins=1))


def test_amax_is_the_largest_of_all_rows(model: nn.Module) -> None:
    for quantizer in tdq.temporal_quantizers(model).values():
        assert quantizer.amax is not None
        assert torch.equal(quantizer.amax, (quantizer._scale * 127).max())


def test_setting_an_amax_makes_it_static_and_refuses_channels() -> None:
    model = quantized()
    quantizer = tdq.temporal_quantizers(model)["conv1.input_quantizer"]
    with pytest.raises(TdqError, match="smoothquant"):
        quantizer.amax = torch.ones(8)
    with pytest.raises(TdqError, match=r"would replace the quantizer's 4 scales over time by one.*reset_amax"):
        quantizer.amax = torch.tensor(12.7)
    assert quantizer._scale.shape == (4,)
    quantizer.reset_amax()
    quantizer.amax = torch.tensor(12.7)
    assert quantizer._scale.tolist() == [pytest.approx(0.1)]
    quantizer.amax = 0.0
    assert quantizer._scale.tolist() == [1.0]  # a layer that saw zeros only


def test_torch_export_is_pointed_to_ours(model: nn.Module) -> None:
    quantizer = tdq.temporal_quantizers(model)["conv1.input_quantizer"]
    with pytest.raises(TdqError, match="export_onnx"):
        quantizer._check_onnx_readiness(torch.ones(1))


def test_disabling_and_enabling_as_with_modelopts_own() -> None:
    model, plain = quantized(), quantized()
    mtq.disable_quantizer(model, "*")
    assert not tdq.temporal_quantizers(model)
    with pytest.raises(TdqError, match="no enabled temporal quantizer"):
        tdq.scale_table(model)
    for layer in ("conv1", "mix", "conv2"):
        mtq.enable_quantizer(model, f"{layer}.input_quantizer")
        mtq.enable_quantizer(model, f"{layer}.weight_quantizer")
    assert torch.equal(model(noise(1, 3, 8, 8), 20), plain(noise(1, 3, 8, 8), 20))


def test_gradients_reach_the_input(model: nn.Module) -> None:
    sample = noise(2, 3, 8, 8).requires_grad_()
    model(sample, 300).square().sum().backward()
    assert sample.grad is not None
    assert bool(sample.grad.abs().sum() > 0)


def test_moving_to_meta_and_back_keeps_the_kind_of_the_buffers(model: nn.Module) -> None:
    quantizer = copy.deepcopy(tdq.temporal_quantizers(model)["conv1.input_quantizer"]).to("meta").to_empty(device="cpu")
    assert isinstance(quantizer, TemporalQuantizer)
    assert quantizer._scale.dtype == torch.float32
    assert quantizer._scale.shape == (4,)
