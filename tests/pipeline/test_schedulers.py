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

import modelopt_tdq as tdq
from trt_examples import tiny
from trt_examples.stable_diffusion.stable_diffusion import tiny_denoiser

SD = FAMILIES["stable_diffusion"]


def _stable_diffusion(scheduler: str, **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        pipeline = SD.tiny()
        pipeline.scheduler = getattr(diffusers, scheduler)(steps_offset=1, **config)
        return pipeline

    return make


def _lcm() -> Any:
    """A latent consistency model takes its guidance scale as an embedding, beside the time."""
    pipeline = _stable_diffusion("LCMScheduler")()
    pipeline.unet = tiny.seeded(tiny_denoiser, time_cond_proj_dim=8)
    return pipeline


PIPELINES = {
    "DDIM": (_stable_diffusion("DDIMScheduler", clip_sample=False), SD),
    "DPM-Solver++": (_stable_diffusion("DPMSolverMultistepScheduler", algorithm_type="dpmsolver++"), SD),
    "Euler": (_stable_diffusion("EulerDiscreteScheduler"), SD),
    "LCM": (_lcm, SD),
    "flow matching": (FAMILIES["sd3"].tiny, FAMILIES["sd3"]),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_calibrated_over_20_steps_it_samples_with_8_and_50(name: str, tmp_path: Path) -> None:
    make, family = PIPELINES[name]
    full, call = make(), family.tiny_call(0)
    quantized = tdq.quantize_pipeline(make(), fast_config(), calls=[call], steps=20, progress=False)
    denoiser = getattr(quantized, family.denoiser)
    assert len(tdq.scale_table(denoiser)) == 20
    path = tdq.export_onnx(denoiser, tmp_path / "m.onnx", tdq.sample_inputs(quantized, **call)).path
    images = {
        label: {steps: _images(pipeline, call, steps) for steps in (8, 50)}
        for label, pipeline in (("full", full), ("quantized", quantized))
    }
    engine = tdq.swap_denoiser(quantized, path, free=True)
    for steps in (8, 50):
        noise = (images["quantized"][steps] - images["full"][steps]).square().mean()
        flips = (_images(engine, call, steps) - images["quantized"][steps]).square().mean()
        print("MEASURED", name, steps, float(noise), float(flips / noise))
        assert 0 < noise
        assert flips < 0.1 * noise


def _images(pipeline: Any, call: dict[str, Any], steps: int) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(9)
    found = pipeline(**call, num_inference_steps=steps, generator=generator, output_type="pt")[0]
    assert torch.isfinite(found).all()
    return found.double()
