"""One calibration of 20 steps serves every number of steps, with each kind of scheduler, in torch and on an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from support.models import fast_config
from support.pipelines import FAMILIES
from support.slow import slow_but

import modelopt_tdq as tdq
from trt_examples import tiny

SD, PIXART, SD3 = (FAMILIES[name] for name in ("stable_diffusion", "pixart", "sd3"))


def _pixart(scheduler: str, **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        pipeline = PIXART.tiny()
        pipeline.scheduler = getattr(diffusers, scheduler)(**config)
        return pipeline

    return make


def _lcm() -> Any:
    """A latent consistency model takes its guidance scale as an embedding, beside the time."""
    pipeline = SD.tiny()
    pipeline.unet = tiny.seeded(
        diffusers.UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=tiny.WIDTH,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        time_cond_proj_dim=8,
    )
    pipeline.scheduler = diffusers.LCMScheduler(steps_offset=1)
    return pipeline


PIPELINES = {
    "DDIM": (_pixart("DDIMScheduler", clip_sample=False), PIXART),
    "DPM-Solver++": (_pixart("DPMSolverMultistepScheduler", algorithm_type="dpmsolver++"), PIXART),
    "Euler": (_pixart("EulerDiscreteScheduler"), PIXART),
    "LCM": (_lcm, SD),
    "flow matching": (SD3.tiny, SD3),
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """By kind of denoiser, a graph whose table is an input: it serves the calibration of every scheduler."""
    return {"folder": tmp_path_factory.mktemp("engines")}


@pytest.mark.parametrize("name", slow_but(PIPELINES, "DDIM", "Euler", "flow matching"))
def test_calibrated_over_20_steps_it_samples_with_8_and_50(name: str, engines: dict[Any, Path]) -> None:
    make, family = PIPELINES[name]
    full, call = make(), family.tiny_call(0)
    quantized = tdq.quantize_pipeline(make(), fast_config(), calls=[call], steps=20, progress=False)
    denoiser = getattr(quantized, family.denoiser)
    assert len(tdq.scale_table(denoiser)) == 20
    kind = str(denoiser.config)
    if kind not in engines:
        inputs = tdq.sample_inputs(quantized, **call)
        path = engines["folder"] / f"{len(engines)}.onnx"
        engines[kind] = tdq.export_onnx(denoiser, path, inputs, table_input=True).path
    images = {
        label: {steps: _images(pipeline, call, steps) for steps in (8, 50)}
        for label, pipeline in (("full", full), ("quantized", quantized))
    }
    engine = tdq.swap_denoiser(quantized, engines[kind], free=True)
    for steps in (8, 50):
        noise = (images["quantized"][steps] - images["full"][steps]).square().mean()
        flips = (_images(engine, call, steps) - images["quantized"][steps]).square().mean()
        assert noise > 0
        assert flips < 0.5 * noise  # 1.5e-5 here; an early flip may reach 0.2


def _images(pipeline: Any, call: dict[str, Any], steps: int) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(9)
    found = pipeline(**call, num_inference_steps=steps, generator=generator, output_type="pt")[0]
    assert torch.isfinite(found).all()
    return found.double()
