"""What people attach to a pipeline: right numbers from quantized layers, in torch and in a swapped engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import pytest
import torch
from diffusers import (
    StableDiffusionAdapterPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    T2IAdapter,
)
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from support.models import fast_config
from support.noise import SAME, rms
from support.pipelines import FAMILIES
from torch import Tensor

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.model.unquantized import unquantized_layers
from trt_examples import tiny
from trt_examples.stable_diffusion.stable_diffusion import tiny_denoiser

SD = FAMILIES["stable_diffusion"]
CALL = SD.tiny_call(0)
IMAGE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
MASK = torch.zeros(1, 1, 8, 8)
MASK[..., :4] = 1

#: Attention in one block is enough, and no attention where the pipeline does not care: exports take their time.
_ONE: dict[str, Any] = {"mid_block_type": "UNetMidBlock2D"}
_NONE: dict[str, Any] = {**_ONE, "down_block_types": ("DownBlock2D",)}


def _parts(**unet: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {name: part for name, part in SD.tiny().components.items() if name != "image_encoder"}
    return {**parts, "unet": tiny.seeded(tiny_denoiser, **_NONE, **unet), "requires_safety_checker": False}


def _attentive() -> Any:
    pipeline = SD.tiny()
    pipeline.unet = tiny.seeded(tiny_denoiser, **_ONE)
    return pipeline


def _t2i() -> Any:
    adapter = tiny.seeded(T2IAdapter, in_channels=3, channels=[8], num_res_blocks=1, downscale_factor=1)
    return StableDiffusionAdapterPipeline(**_parts(), adapter=adapter)


#: A pipeline, how it is called, and what else it may be called with, without another export.
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "img2img": (
        lambda: StableDiffusionImg2ImgPipeline(**_parts(), image_encoder=None),
        {**tiny.text(0), **tiny.negative_text(0), "image": IMAGE, "strength": 0.99},
        {"image": 1 - IMAGE, "strength": 0.7},
    ),
    "inpainting": (
        lambda: StableDiffusionInpaintPipeline(**_parts(in_channels=9), image_encoder=None),
        {**CALL, "image": IMAGE, "mask_image": MASK},
        {"mask_image": 1 - MASK},
    ),
    "T2I-Adapter": (_t2i, {**CALL, "image": IMAGE}, {"image": 1 - IMAGE, "adapter_conditioning_scale": 0.4}),
}


def _run(pipeline: Any, **call: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    common = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 3, "output_type": "latent"}
    latents: Tensor = pipeline(**{**common, **call})[0]
    return latents


def _quantized(pipeline: Any, call: dict[str, Any], steps: int = 3) -> Any:
    return tdq.quantize_pipeline(pipeline, fast_config(), calls=[call], steps=steps, progress=False)


def _require_small_noise(found: Tensor, expected: Tensor) -> float:
    noise = rms(found - expected)
    assert 1e-3 * rms(expected) < noise < 0.25 * rms(expected)
    return noise


@pytest.mark.parametrize("name", PIPELINES)
def test_other_pipelines(name: str, tmp_path: Path) -> None:
    make, call, other = PIPELINES[name]
    plain, quantized = make(), _quantized(make(), call)
    assert not unquantized_layers(quantized.unet)
    path = tdq.export_onnx(quantized.unet, tmp_path / "m.onnx", tdq.sample_inputs(quantized, **call)).path
    swapped = tdq.swap_denoiser(copy.copy(quantized), path)
    for changes in ({}, other):
        expected = _run(quantized, **{**call, **changes})
        noise = _require_small_noise(expected, _run(plain, **{**call, **changes}))
        assert rms(_run(swapped, **{**call, **changes}) - expected) < SAME * noise


@pytest.fixture(scope="module")
def attention() -> tuple[Any, Any]:
    """A pipeline with attention in full precision, and quantized."""
    return _attentive(), _quantized(_attentive(), CALL)


def _copies(pipelines: tuple[Any, ...]) -> list[Any]:
    copies = [copy.copy(pipeline) for pipeline in pipelines]
    for pipeline in copies:
        pipeline.unet = copy.deepcopy(pipeline.unet)
    return copies


#: What changes how a model computes, and what it does to the outputs.
SETTINGS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "FreeU": (lambda p: p.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), True),
    "attention processors": (lambda p: p.unet.set_attn_processor(AttnProcessor()), False),
    "attention slicing": (lambda p: p.enable_attention_slicing(1), False),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_after_quantization(attention: tuple[Any, Any], setting: str) -> None:
    change, changes_outputs = SETTINGS[setting]
    before = [_run(pipeline, **CALL) for pipeline in attention]
    noise = _require_small_noise(before[1], before[0])
    plain, quantized = _copies(attention)
    for pipeline in (plain, quantized):
        change(pipeline)
    found = [_run(pipeline, **CALL) for pipeline in (plain, quantized)]
    assert (rms(found[0] - before[0]) > 0.5 * noise) == changes_outputs
    assert 0.5 * noise < rms(found[1] - found[0]) < 1.5 * noise
    assert not unquantized_layers(quantized.unet)


def test_projections_are_fused_before_quantization() -> None:
    plain = _attentive()
    expected = _run(plain, **CALL)
    plain.fuse_qkv_projections()
    torch.testing.assert_close(_run(plain, **CALL), expected, rtol=1e-3, atol=1e-3)
    with pytest.warns(tdq.TdqWarning, match=r"attn1\.to_q.*never ran"):  # replaced by to_qkv, and still there
        quantized = _quantized(plain, CALL)
    names = tdq.temporal_quantizers(quantized.unet)
    assert any(name.endswith("attn1.to_qkv.input_quantizer") for name in names)
    assert any(name.endswith("attn2.to_kv.input_quantizer") for name in names)
    _require_small_noise(_run(quantized, **CALL), expected)


def test_fusing_projections_after_quantization_is_refused(attention: tuple[Any, Any]) -> None:
    """diffusers would make a layer without quantizers, of weights that are smoothed, where they are."""
    _, quantized = _copies(attention)
    expected = _run(quantized, **CALL)
    restored = mto.restore_from_modelopt_state(_attentive().unet, mto.modelopt_state(quantized.unet))
    for model in (quantized.unet, restored):
        for part in (model, model.down_blocks[0].attentions[0].transformer_blocks[0].attn1):
            fuse = getattr(part, "fuse_qkv_projections", None) or part.fuse_projections
            with pytest.raises(TdqError, match=r"call fuse_qkv_projections\(\) first and quantize then"):
                fuse()
    assert not any("to_qkv" in name for name, _ in quantized.unet.named_modules())
    assert torch.equal(_run(quantized, **CALL), expected)


def _with_ip_adapter(pipeline: Any) -> Any:
    """Random weights, in the form of IP-Adapter's files."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    state, unet = {}, pipeline.unet
    crossed = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for key, name in zip(range(1, 2 * len(crossed), 2), crossed, strict=True):
        layer = unet.get_submodule(name.rpartition(".")[0])
        state[f"{key}.to_k_ip.weight"] = random(*layer.to_k.weight.shape)
        state[f"{key}.to_v_ip.weight"] = random(*layer.to_v.weight.shape)
    width = 4 * tiny.WIDTH
    projection = {"proj.weight": random(width, 8), "proj.bias": random(width)}
    norm = {"norm.weight": torch.ones(tiny.WIDTH), "norm.bias": torch.zeros(tiny.WIDTH)}
    unet._load_ip_adapter_weights({"image_proj": {**projection, **norm}, "ip_adapter": state})
    return pipeline


IP_CALL = {**CALL, "ip_adapter_image_embeds": [tiny.noise(2, 1, 8, seed=7)]}


def test_an_ip_adapter_that_is_loaded_before_quantization(tmp_path: Path) -> None:
    plain = _with_ip_adapter(_attentive())
    quantized = _quantized(_with_ip_adapter(_attentive()), IP_CALL)
    names = [name for name in tdq.temporal_quantizers(quantized.unet) if "_ip.0." in name]
    assert len(names) == 2  # keys and values
    assert not unquantized_layers(quantized.unet)
    outputs = []
    for scale in (1.0, 0.4):
        for pipeline in (plain, quantized):
            pipeline.set_ip_adapter_scale(scale)
        outputs.append(_run(plain, **IP_CALL))
        noise = _require_small_noise(_run(quantized, **IP_CALL), outputs[-1])
    assert rms(outputs[0] - outputs[1]) > 2 * noise
    path = tdq.export_onnx(quantized.unet, tmp_path / "m.onnx", tdq.sample_inputs(quantized, **IP_CALL)).path
    other = {**IP_CALL, "ip_adapter_image_embeds": [-embedding for embedding in IP_CALL["ip_adapter_image_embeds"]]}
    expected = [_run(quantized, **call) for call in (IP_CALL, other)]
    swapped = tdq.swap_denoiser(quantized, path)
    for call, one in zip((IP_CALL, other), expected, strict=True):
        assert rms(_run(swapped, **call) - one) < SAME * noise


def test_loras_are_switched_weighed_fused_saved_and_unloaded_after_quantization(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    place = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    plain, quantized = _attentive(), _quantized(_attentive(), CALL)
    without = _run(quantized, **CALL)
    for number, name in enumerate("ab"):
        factors = {"lora_A": tiny.noise(2, 8, seed=number), "lora_B": 3 * tiny.noise(8, 2, seed=number + 9)}
        state = {f"{place}.{factor}.weight": value for factor, value in factors.items()}
        for pipeline in (plain, quantized):
            pipeline.load_lora_weights(dict(state), adapter_name=name)

    def noise_of(change: Callable[[Any], Any]) -> Tensor:
        for pipeline in (plain, quantized):
            change(pipeline)
        expected = _run(plain, **CALL)
        _require_small_noise(_run(quantized, **CALL), expected)
        return expected

    found = [
        noise_of(change)
        for change in (
            lambda p: p.set_adapters("a"),
            lambda p: p.set_adapters("b"),
            lambda p: p.set_adapters(["a", "b"], [0.5, 1.0]),
            lambda p: p.disable_lora(),
            lambda p: p.enable_lora(),
            lambda p: p.fuse_lora(components=["unet"]),
            lambda p: p.unfuse_lora(),
        )
    ]
    assert rms(found[0] - found[1]) > rms(without - found[3])
    for again in found[4:]:
        torch.testing.assert_close(again, found[2], rtol=1e-3, atol=1e-3)
    quantized.unet.save_lora_adapter(tmp_path, adapter_name="b")
    quantized.unload_lora_weights()
    assert torch.equal(_run(quantized, **CALL), without)
    fresh = _attentive()
    fresh.unet.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"), prefix=None)
    plain.set_adapters("b")
    torch.testing.assert_close(_run(fresh, **CALL), _run(plain, **CALL), rtol=1e-4, atol=1e-4)
