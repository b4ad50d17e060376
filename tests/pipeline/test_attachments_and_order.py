"""What people attach before quantization, or after it: right numbers from quantized layers, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention_processor import AttnProcessor
from support.noise import rms
from support.pipelines import FAMILIES

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.model.unquantized import unquantized_layers
from trt_examples import tiny

from test_attachments import (  # isort: skip
    CALL,
    IMAGE,
    IP_CALL,
    SAME,
    _attentive,
    _quantized,
    _require_small_noise,
    _run,
    _with_ip_adapter,
)


def _lora(pipeline: Any) -> None:
    pytest.importorskip("peft")
    place = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    factors = {"lora_A": tiny.noise(2, 8, seed=1), "lora_B": 3 * tiny.noise(8, 2, seed=2)}
    pipeline.load_lora_weights({f"{place}.{factor}.weight": value for factor, value in factors.items()})
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()


#: What is done before quantization, and whether it changes the outputs.
BEFORE: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "FreeU": (lambda p: p.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), True),
    "attention processors": (lambda p: p.unet.set_attn_processor(AttnProcessor()), False),
    "attention slicing": (lambda p: p.enable_attention_slicing(1), False),
    "LoRA, fused": (_lora, True),
}


@pytest.mark.parametrize("change", BEFORE)
def test_settings_before_quantization(change: str) -> None:
    do, changes_outputs = BEFORE[change]
    plain, other = _attentive(), _attentive()
    without = _run(plain, **CALL)
    for pipeline in (plain, other):
        do(pipeline)
    expected, quantized = _run(plain, **CALL), _quantized(other, CALL)
    noise = _require_small_noise(_run(quantized, **CALL), expected)
    assert (rms(expected - without) > 0.5 * noise) == changes_outputs
    assert not unquantized_layers(quantized.unet)
    names = {name.rpartition(".")[0] for name in tdq.temporal_quantizers(quantized.unet)}
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q" in names


def _controlnet(pipeline: Any) -> tuple[Any, dict[str, Any]]:
    net = tiny.seeded(lambda: ControlNetModel.from_unet(_attentive().unet, conditioning_channels=3))
    generator = torch.Generator().manual_seed(5)
    for parameter in net.parameters():  # its last layers begin with zeros
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return StableDiffusionControlNetPipeline(**_parts(pipeline), controlnet=net), {"image": IMAGE}


def _adapter(pipeline: Any) -> tuple[Any, dict[str, Any]]:
    made = tiny.seeded(T2IAdapter, in_channels=3, channels=[8], num_res_blocks=1, downscale_factor=1)
    return StableDiffusionAdapterPipeline(**_parts(pipeline), adapter=made), {"image": IMAGE}


def _parts(pipeline: Any) -> dict[str, Any]:
    parts = {name: part for name, part in pipeline.components.items() if name != "image_encoder"}
    return {**parts, "requires_safety_checker": False}


@pytest.fixture(scope="module")
def alone() -> Any:
    """A quantized pipeline that nothing was attached to when it was calibrated."""
    return _quantized(_attentive(), CALL)


@pytest.mark.parametrize("attach", [_controlnet, _adapter], ids=["ControlNet", "T2I-Adapter"])
def test_residuals_that_come_after_quantization(alone: Any, attach: Callable[[Any], Any]) -> None:
    """Calibration has not seen them: what they make larger than all that it saw is clipped, and no more."""
    (plain, more), (quantized, _) = attach(_attentive()), attach(alone)
    expected = _run(plain, **CALL, **more)
    noise = _require_small_noise(_run(quantized, **CALL, **more), expected)
    assert rms(expected - _run(_attentive(), **CALL)) > noise
    assert not unquantized_layers(quantized.unet)


def test_an_ip_adapter_that_is_loaded_after_quantization() -> None:
    """Its own layers stay in full precision and are named; those that were there stay quantized."""
    plain, quantized = _with_ip_adapter(_attentive()), _quantized(_attentive(), CALL)
    names = set(tdq.temporal_quantizers(quantized.unet))
    _with_ip_adapter(quantized)
    expected = _run(plain, **IP_CALL)
    noise = _require_small_noise(_run(quantized, **IP_CALL), expected)
    assert rms(expected - _run(_attentive(), **CALL)) > noise
    assert set(tdq.temporal_quantizers(quantized.unet)) == names
    left = unquantized_layers(quantized.unet)
    assert {name.split(".processor.")[-1] for name in left if ".processor." in name} == {"to_k_ip.0", "to_v_ip.0"}
    assert set(left.values()) == {"added after quantization"}


def test_the_refiner_of_sdxl(tmp_path: Path) -> None:
    """It takes an aesthetic score, and one text encoder; quantized, and by an engine."""
    family = FAMILIES["sdxl"]

    def refiner() -> Any:
        parts = {n: p for n, p in family.tiny().components.items() if n not in ("image_encoder", "feature_extractor")}
        config = {**parts["unet"].config}
        config["projection_class_embeddings_input_dim"] -= config["addition_time_embed_dim"]  # five numbers, not six
        parts["unet"] = tiny.seeded(lambda: UNet2DConditionModel.from_config(config))
        return StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)

    call = {name: value for name, value in family.tiny_call(1).items() if name not in ("height", "width")}
    call |= {"image": IMAGE, "strength": 0.99}
    plain, quantized = refiner(), _quantized(refiner(), call)
    assert not unquantized_layers(quantized.unet)
    path = tdq.export_onnx(quantized.unet, tmp_path / "m.onnx", tdq.sample_inputs(quantized, **call)).path
    swapped = tdq.swap_denoiser(copy.copy(quantized), path)
    for changes in ({}, {"strength": 0.7, "aesthetic_score": 9.0}):
        expected = _run(quantized, **{**call, **changes})
        noise = _require_small_noise(expected, _run(plain, **{**call, **changes}))
        assert rms(_run(swapped, **{**call, **changes}) - expected) < SAME * noise


class _Session:
    inputs = dict.fromkeys(("sample", "timestep", "encoder_hidden_states"), np.float32)


def test_nothing_moves_or_casts_the_weights_that_an_engine_does_not_read() -> None:
    pipeline = tdq.swap_denoiser(_attentive(), _Session())
    original = pipeline.unet.original
    before = {name: parameter.dtype for name, parameter in original.named_parameters()}
    groups: dict[str, Any] = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    changes: list[Callable[[], Any]] = [
        lambda: pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn),
        lambda: pipeline.unet.enable_group_offload(**groups),
        lambda: pipeline.enable_group_offload(**groups),
        lambda: apply_group_offloading(pipeline.unet, **groups),
    ]
    for change in changes:
        with pytest.raises(TdqError, match=r"would not change with it.*restore_denoiser"):
            change()
    apply_layerwise_casting(pipeline.unet, torch.float8_e4m3fn, torch.float32)  # which finds no layer in it
    assert {name: parameter.dtype for name, parameter in original.named_parameters()} == before
    assert not any("_diffusers_hook" in vars(module) for module in original.modules())
