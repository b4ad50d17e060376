"""Caches of diffusers on a quantized torch model: they may skip its layers, and not those of a calibration."""

from __future__ import annotations

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from modelopt.torch.quantization.nn import TensorQuantizer
from support.models import FAMILIES, fast_config
from support.noise import rms
from torch import Tensor, nn

import modelopt_tdq as tdq
from modelopt_tdq.model.timestep import find_timestep
from modelopt_tdq.model.unquantized import unquantized_layers

FLUX = FAMILIES["flux_guidance"]
TIMES = (900.0, 700.0, 500.0, 400.0, 300.0, 200.0, 100.0, 20.0)

#: Of the call in progress, which some caches ask for.
_now = [0.0]

_BY_TIME: dict[str, Any] = {"spatial_attention_block_skip_range": 2, "current_timestep_callback": lambda: _now[0]}

CACHES: dict[str, Any] = {
    "FirstBlockCache": lambda: FirstBlockCacheConfig(threshold=0.6),
    "TaylorSeer": lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2),
    "MagCache": lambda: MagCacheConfig(threshold=0.5, mag_ratios=[1.0] * 8, num_inference_steps=8, retention_ratio=0.1),
    "PAB": lambda: PyramidAttentionBroadcastConfig(**_BY_TIME),
    "FasterCache": lambda: FasterCacheConfig(**_BY_TIME, is_guidance_distilled=True),
}


def _sampled(model: Any) -> Tensor:
    """The predictions along one trajectory, [T, ...]."""
    model._reset_stateful_cache()
    sample, outputs = None, []
    for time in TIMES:
        _now[0] = time
        inputs = FLUX.inputs(1, torch.tensor(time), 5)
        if sample is not None:
            inputs["hidden_states"] = sample
        with torch.no_grad(), model.cache_context("cond"):
            outputs.append(model(**inputs).sample)
        sample = inputs["hidden_states"] - 0.1 * outputs[-1]
    return torch.stack(outputs)


def _plain() -> Any:
    torch.manual_seed(0)
    return FLUX.make().eval()


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    return mtq.quantize(_plain(), fast_config(), _sampled)


@pytest.mark.parametrize("cache", CACHES)
def test_a_quantized_model_with_a_cache_is_the_plain_one_with_it(quantized: nn.Module, cache: str) -> None:
    plain, model = _plain(), copy.deepcopy(quantized)
    without, noise = _sampled(plain), rms(_sampled(model) - _sampled(plain))
    for each in (plain, model):
        each.enable_cache(CACHES[cache]())
    seen: dict[float, int] = {}

    def see(module: nn.Module, args: Any, output: Any) -> None:
        timestep = find_timestep(model)
        time = 1000 * float(timestep.require()) if timestep is not None else -1.0
        assert time == pytest.approx(_now[0])
        seen[_now[0]] = seen.get(_now[0], 0) + 1

    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer) and m.is_enabled]
    for quantizer in quantizers:
        quantizer.register_forward_hook(see)
    expected, found = _sampled(plain), _sampled(model)
    assert rms(expected - without) > 2 * noise  # the cache skips something, and so does the quantized model:
    assert sum(seen.values()) < len(TIMES) * max(seen.values())
    assert 0.5 * noise < rms(found - expected) < 1.5 * noise
    assert not unquantized_layers(model)
    model.disable_cache()
    assert torch.equal(_sampled(model), _sampled(quantized))


@pytest.mark.parametrize("cache", CACHES)
def test_nothing_is_calibrated_behind_a_cache(cache: str) -> None:
    """MagCache would leave six of eight times without a row, without a word."""
    model = _plain()
    model.enable_cache(CACHES[cache]())
    with pytest.raises(tdq.TdqError, match=r"be calibrated while a cache skips layers.*disable_cache\(\)"):
        mtq.quantize(model, fast_config(), _sampled)
    model.disable_cache()
    mtq.calibrate(model, fast_config()["algorithm"], _sampled)
    assert len(tdq.scale_table(model)) == len(TIMES)
    model.enable_cache(CACHES[cache]())
    with pytest.raises(tdq.TdqError, match="be exported while a cache skips layers"):
        tdq.export_onnx(model, "never.onnx", FLUX.inputs(1, torch.tensor(20.0), 5))
