"""The table is a function of the data: not of the batch size, the order, or how calls were grouped."""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from support.models import SMALL_UNET_CONDITION, TIMES, TinyDenoiser, calls, fast_config, loop, quantized
from torch import Tensor, nn

import modelopt_tdq as tdq

HISTOGRAMS: dict[str, dict[str, Any]] = {
    "max": {"statistic": "max"},
    "mse": {"statistic": "mse"},
    "percentile": {"statistic": "percentile", "percentile": 99.0},
    "entropy": {"statistic": "entropy"},
    "offset": {"statistic": "max", "asymmetric": True},
    "optimal bins": {"statistic": "mse", "bins": "optimal", "max_bins": 2},
}


class OnTheGrid(nn.Module):
    """A layer whose input is the model's own, so that it is the same to the last bit in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(sample)


def _table(model: nn.Module, data: Any, **fields: Any) -> tdq.ScaleTable:
    torch.manual_seed(0)
    return tdq.scale_table(mtq.quantize(model, fast_config(**fields), loop(data)))


def _assert_same(found: tdq.ScaleTable, expected: tdq.ScaleTable) -> None:
    assert found.names == expected.names
    assert torch.equal(found.timesteps, expected.timesteps)
    assert torch.equal(found.scale, expected.scale)
    assert (found.offset is None) == (expected.offset is None)
    assert found.offset is None or torch.equal(found.offset, expected.offset)


@pytest.mark.parametrize("name", HISTOGRAMS)
@pytest.mark.parametrize(
    ("batch", "order"), [(1, None), (4, None), (16, None), (3, [*range(15, -1, -1)])], ids=["1", "4", "16", "reversed"]
)
def test_grouping_of_the_same_activations(name: str, batch: int, order: list[int] | None) -> None:
    torch.manual_seed(0)
    model = OnTheGrid().eval()
    expected = _table(copy.deepcopy(model), calls(samples=16, batch=8), **HISTOGRAMS[name])
    found = _table(copy.deepcopy(model), calls(samples=16, batch=batch, order=order), **HISTOGRAMS[name])
    _assert_same(found, expected)


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_order_of_the_times(name: str) -> None:
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    data = calls()
    _assert_same(
        _table(copy.deepcopy(model), data[::-1], **HISTOGRAMS[name]),
        _table(copy.deepcopy(model), data, **HISTOGRAMS[name]),
    )


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_a_time_per_sample(name: str) -> None:
    """One call with all times gives the table of one call per time."""
    torch.manual_seed(0)
    model = OnTheGrid().eval()
    data = calls(samples=3, batch=3)
    mixed = torch.stack([x for x, _ in data], 1).flatten(0, 1), torch.tensor(TIMES * 3)
    _assert_same(
        _table(copy.deepcopy(model), [mixed], **HISTOGRAMS[name]),
        _table(copy.deepcopy(model), data, **HISTOGRAMS[name]),
    )


@pytest.mark.parametrize("statistic", ["max", "mse", "output"])
def test_guidance_in_one_batch_or_in_two_calls(statistic: str) -> None:
    """The two halves of a batch for classifier-free guidance, together or one after the other."""
    family = SMALL_UNET_CONDITION
    torch.manual_seed(0)
    model = family.make().eval()

    def halves(call: dict[str, Any], parts: int) -> list[dict[str, Any]]:
        chunks = {k: v.chunk(parts) for k, v in call.items() if k != "timestep"}
        return [{"timestep": call["timestep"], **{k: v[i] for k, v in chunks.items()}} for i in range(parts)]

    def table(parts: int) -> tdq.ScaleTable:
        def forward_loop(m: nn.Module) -> None:
            for call in family.data(times=TIMES[1:3]):
                for part in halves(call, parts):
                    m(**part)

        config = fast_config(statistic=statistic)  # without protect_steps, whose decisions may be close ones
        return tdq.scale_table(mtq.quantize(copy.deepcopy(model), config, forward_loop))

    together, apart = table(1), table(2)
    assert together.names == apart.names
    # convolutions of another batch size may round differently: a candidate next to it, or the last bit of a maximum
    close = torch.isclose(together.scale, apart.scale, rtol=1e-5)
    assert float(close.float().mean()) > 0.99
    torch.testing.assert_close(apart.scale, together.scale, rtol=0.1, atol=0)


@pytest.mark.parametrize("statistic", ["max", "mse", "output"])
def test_the_second_calibration_forgets_the_first(statistic: str) -> None:
    fields = {"statistic": statistic, "protect_steps": True}
    expected = tdq.scale_table(quantized(**fields))
    loud = [(5 * sample, time / 2) for sample, time in calls(seed=3)]
    model = quantized(data=loud, asymmetric=True, **fields)
    mtq.calibrate(model, fast_config(**fields)["algorithm"], loop(calls()))
    _assert_same(tdq.scale_table(model), expected)


@pytest.mark.parametrize("statistic", ["max", "mse", "output"])
def test_a_loop_that_is_partly_in_inference_mode(statistic: str) -> None:
    fields = {"statistic": statistic, "protect_steps": True}
    torch.manual_seed(0)
    model = TinyDenoiser().eval()

    def forward_loop(m: nn.Module) -> None:
        with torch.inference_mode():
            loop(calls())(m)
        loop(calls(seed=5))(m)

    expected = _table(copy.deepcopy(model), calls() + calls(seed=5), **fields)
    mtq.quantize(model, fast_config(**fields), forward_loop)
    _assert_same(tdq.scale_table(model), expected)
    sample, time = calls()[0]
    model(sample.requires_grad_(), time).sum().backward()
    assert not any(buffer.is_inference() for buffer in model.buffers())


@pytest.mark.parametrize("samples", [2, 8])
def test_what_is_kept_after_calibration_is_the_table_alone(samples: int) -> None:
    model = quantized(data=calls(samples=samples))
    for quantizer in tdq.temporal_quantizers(model).values():
        assert {name for name, _ in quantizer.named_buffers()} == {"_timesteps_bits", "_scale_bits", "_rows_checksum"}
        assert quantizer._calibrator.compute_amax() is None
    assert len(model._forward_pre_hooks) == 2  # the time is delivered, training is noticed
    assert [type(hook).__name__ for hook in model._forward_hooks.values()] == ["_EndHook"]
