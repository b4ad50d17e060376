"""ControlNets in diffusers' own pipeline: quantized, exported, and swapped for a session, alone or among several."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetOutput
from support.models import fast_config
from support.noise import SAME, rms
from support.pipelines import FAMILIES
from torch import Tensor

import modelopt_tdq as tdq
from modelopt_tdq import TdqError
from modelopt_tdq.export.outputs import flatten_outputs
from modelopt_tdq.pipeline.component import denoiser
from modelopt_tdq.pipeline.outputs import assembled
from trt_examples import tiny

SD = FAMILIES["stable_diffusion"]
IMAGE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
CALL = {**SD.tiny_call(0), "image": IMAGE}
SCALE = "controlnet_conditioning_scale"


#: Of a U-Net and of the ControlNet that fits it: residuals from conv_in, from one block and from the middle.
_SMALL: dict[str, Any] = {
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": tiny.WIDTH,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": "UNetMidBlock2D",
}


def _pipeline(controlnets: int = 1) -> Any:
    parts: dict[str, Any] = {name: part for name, part in SD.tiny().components.items() if name != "image_encoder"}
    parts["unet"] = tiny.seeded(UNet2DConditionModel, sample_size=8, up_block_types=("CrossAttnUpBlock2D",), **_SMALL)
    # the tiny autoencoder does not shrink images, so the embedding of the condition does not either
    nets = [
        tiny.seeded(ControlNetModel, conditioning_embedding_out_channels=(8,), **_SMALL) for _ in range(controlnets)
    ]
    for number, net in enumerate(nets[1:], 2):
        net.conv_in.weight.data *= -number
    return StableDiffusionControlNetPipeline(
        **parts, controlnet=nets if controlnets > 1 else nets[0], requires_safety_checker=False
    )


def _run(pipeline: Any, **changes: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    common = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 3, "output_type": "latent"}
    latents: Tensor = pipeline(**{**CALL, **common, **changes})[0]
    return latents


def _quantized(component: str, controlnets: int = 1, **call: Any) -> Any:
    calls = [{**CALL, **call}]
    return tdq.quantize_pipeline(
        _pipeline(controlnets), fast_config(), calls=calls, steps=3, component=component, progress=False
    )


def _export(pipeline: Any, component: str, path: Path, call: dict[str, Any], **fixed: Any) -> Path:
    inputs = {**tdq.sample_inputs(pipeline, component, **CALL, **call), **fixed}
    return tdq.export_onnx(denoiser(pipeline, component), path, inputs).path


def _require_same(found: Tensor, expected: Tensor, plain: Tensor) -> None:
    noise = rms(expected - plain)
    assert noise > 1e-3
    assert rms(found - expected) < SAME * noise


@pytest.fixture(scope="module")
def quantized() -> Any:
    return _quantized("controlnet")


@pytest.fixture(scope="module")
def exported(quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its conditioning scale, 1, is part of the graph."""
    return _export(quantized, "controlnet", tmp_path_factory.mktemp("controlnet") / "m.onnx", {})


def test_a_swapped_controlnet_gives_the_images_of_the_torch_one(quantized: Any, exported: Path) -> None:
    expected, plain = _run(quantized), _run(_pipeline())
    swapped = tdq.swap_denoiser(copy.copy(quantized), exported, component="controlnet")
    assert isinstance(swapped.controlnet, ControlNetModel)
    _require_same(_run(swapped), expected, plain)
    other = {"image": 1 - IMAGE}
    _require_same(_run(swapped, **other), _run(quantized, **other), _run(_pipeline(), **other))
    tdq.restore_denoiser(swapped, component="controlnet")
    assert torch.equal(_run(swapped), expected)


@torch.no_grad()
def test_its_outputs_keep_their_form(quantized: Any, exported: Path) -> None:
    inputs = tdq.sample_inputs(quantized, "controlnet", **CALL)
    engine = tdq.EngineDenoiser(tdq.open_session(exported), quantized.controlnet)
    expected = quantized.controlnet(**inputs)
    found = engine(**inputs)
    down, mid = engine(**inputs, return_dict=False)
    assert type(found) is ControlNetOutput
    assert type(down) is list
    assert [each.shape for each in down] == [each.shape for each in expected.down_block_res_samples]
    for one, other in zip([*down, mid], [*expected.down_block_res_samples, expected.mid_block_res_sample], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert all(map(torch.equal, found.down_block_res_samples, down))
    assert torch.equal(found.mid_block_res_sample, mid)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({SCALE: 0.5}, "conditioning_scale"),
        ({"control_guidance_end": 0.5}, "conditioning_scale"),  # a scale of 0 in the last steps
        ({"guess_mode": True}, "sample"),  # half the batch
        ({"guess_mode": True, "guidance_scale": 1.0}, "sample"),
        ({"guidance_scale": 1.0}, "sample"),
    ],
)
def test_what_the_graph_does_not_know_is_refused(quantized: Any, exported: Path, changes: Any, field: str) -> None:
    swapped = tdq.swap_denoiser(copy.copy(quantized), exported, component="controlnet")
    with pytest.raises(TdqError) as raised:
        _run(swapped, **changes)
    assert raised.value.field == field
    if field == "conditioning_scale":
        assert "with torch.tensor(1.0) in its place there, it is an input of the graph" in str(raised.value)


def test_guess_mode_and_a_conditioning_scale_exported_as_a_tensor(tmp_path: Path) -> None:
    mode = {"guess_mode": True}
    quantized, plain = _quantized("controlnet", **mode), _pipeline()
    every: tuple[dict[str, Any], ...] = ({}, {SCALE: 0.5}, {"control_guidance_end": 0.5})
    expected = [_run(quantized, **mode, **changes) for changes in every]
    inputs = tdq.sample_inputs(quantized, "controlnet", **CALL, **mode, num_images_per_prompt=2)
    assert inputs["conditioning_scale"] == 1.0
    inputs["conditioning_scale"] = torch.tensor(1.0)
    path = tdq.export_onnx(quantized.controlnet, tmp_path / "m.onnx", inputs, dynamic_batch=True).path
    swapped = tdq.swap_denoiser(quantized, path, component="controlnet")
    for changes, one in zip(every, expected, strict=True):
        _require_same(_run(swapped, **mode, **changes), one, _run(plain, **mode, **changes))
    with pytest.raises(TdqError) as raised:  # the batch fits, the scales of the residuals do not
        _run(swapped)
    assert raised.value.field == "guess_mode"
    given = swapped.controlnet(**inputs, return_dict=False)[1]
    del inputs["conditioning_scale"]  # left out, it is that of the signature
    assert torch.equal(swapped.controlnet(**inputs, return_dict=False)[1], given)


def test_a_swapped_unet_takes_the_residuals_of_a_controlnet(tmp_path: Path) -> None:
    quantized = _quantized("unet")
    path = _export(quantized, "unet", tmp_path / "m.onnx", {})
    every: tuple[dict[str, Any], ...] = ({}, {SCALE: 0.3}, {"guess_mode": True}, {"image": 1 - IMAGE})
    expected = [_run(quantized, **changes) for changes in every]
    swapped = tdq.swap_denoiser(quantized, path, component="unet")
    for changes, one in zip(every, expected, strict=True):
        _require_same(_run(swapped, **changes), one, _run(_pipeline(), **changes))
    swapped.controlnet.controlnet_down_blocks = swapped.controlnet.controlnet_down_blocks[:1]
    with pytest.raises(TdqError) as raised:
        _run(swapped)
    assert raised.value.value == ["down_block_additional_residuals.1"]


@pytest.mark.parametrize("component", ["controlnet.nets.0", "controlnet"])
def test_one_of_several_controlnets_or_all_of_them(component: str, tmp_path: Path) -> None:
    images = {"image": [IMAGE, 1 - IMAGE], SCALE: [1.0, 0.7]}
    quantized = _quantized(component, 2, **images)
    expected, plain = _run(quantized, **images), _run(_pipeline(2), **images)
    halves = _run(quantized, **{**images, SCALE: [1.0, 0.35]})
    original = denoiser(quantized, component)
    inputs = tdq.sample_inputs(quantized, component, **{**CALL, **images})
    if component == "controlnet":  # diffusers adds up the names of the fields otherwise
        with pytest.raises(TdqError, match="with return_dict=False only, as several ControlNets"):
            tdq.export_onnx(original, tmp_path / "m.onnx", inputs)
    path = tdq.export_onnx(original, tmp_path / "m.onnx", {**inputs, "return_dict": False}).path
    swapped = tdq.swap_denoiser(quantized, path, component=component)
    assert [net is original for net in swapped.controlnet.nets] == [False, False]
    _require_same(_run(swapped, **images), expected, plain)
    if component == "controlnet.nets.0":  # the scale is the other's
        _require_same(_run(swapped, **{**images, SCALE: [1.0, 0.35]}), halves, plain)
    else:
        with pytest.raises(TdqError, match="part of its graph"):
            _run(swapped, **{**images, SCALE: [1.0, 0.35]})
    tdq.restore_denoiser(swapped, component=component)
    assert denoiser(swapped, component) is original
    assert torch.equal(_run(swapped, **images), expected)


def test_weights_that_were_dropped_are_named_as_the_pipeline_has_them(exported: Path) -> None:
    pipeline = tdq.swap_denoiser(_pipeline(2), exported, component="controlnet.nets.1", free=True)
    with pytest.raises(TdqError, match=r"pipeline\.controlnet\.nets\[1\] = model"):
        tdq.restore_denoiser(pipeline, component="controlnet.nets.1")


def test_a_list_of_one_tensor_stays_a_list() -> None:
    """A ControlNet of one block: the tensor itself would be taken for one residual per sample."""
    block = torch.arange(6.0).reshape(2, 3)
    flat = flatten_outputs(SD3ControlNetOutput(controlnet_block_samples=(block,)))
    assert list(flat) == ["controlnet_block_samples.0"]
    made = assembled(SD3ControlNetOutput, flat, True)
    assert torch.equal(made.controlnet_block_samples[0], block)
    assert list(flatten_outputs((block,))) == list(flatten_outputs({"sample": block})) == ["output"]


def test_a_gap_in_a_list_stays_a_gap() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    flat = flatten_outputs(ControlNetOutput(down_block_res_samples=[a, None, b], mid_block_res_sample=a))  # type: ignore[arg-type]
    down, mid = assembled(ControlNetOutput, flat, False)
    assert [down[0] is a, down[1], down[2] is b, mid is a] == [True, None, True, True]
    down, mid = assembled(ControlNetOutput, flatten_outputs(([a, b], b)), False)
    assert [down[0] is a, down[1] is b, mid is b] == [True, True, True]
