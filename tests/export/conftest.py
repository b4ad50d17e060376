"""Exports that several tests look at: torch takes seconds for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.export import Lowered, lowered, trace
from torch import Tensor, nn

import modelopt_tdq as tdq

BUNDLED = Path(__file__).parents[2] / "trt_examples" / "ddim_cifar10" / "model"


@dataclass(frozen=True)
class Bundled:
    """The bundled UNet, calibrated on five steps, and its lowerings (batch 2, one time)."""

    model: nn.Module
    full_precision: nn.Module
    inputs: Callable[[float], dict[str, Tensor]]
    graphs: dict[str, Lowered]


@pytest.fixture(scope="session")
def bundled() -> Bundled:
    from copy import deepcopy

    import modelopt.torch.quantization as mtq
    from diffusers import DDIMScheduler, UNet2DModel

    model = UNet2DModel.from_pretrained(BUNDLED).eval()
    original = deepcopy(model)
    scheduler = DDIMScheduler.from_pretrained(BUNDLED / "scheduler")
    scheduler.set_timesteps(5)
    seen: dict[float, Tensor] = {}

    def forward_loop(quantized: nn.Module) -> None:
        sample = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        for time in scheduler.timesteps:
            seen[float(time)] = sample
            noise = quantized(sample, time).sample
            sample = scheduler.step(noise, time, sample).prev_sample

    config = tdq.make_config(statistic="mse", weights="max", protect_steps=False, progress=False)
    mtq.quantize(model, config, forward_loop)

    def inputs(time: float) -> dict[str, Any]:
        nearest = min(seen, key=lambda known: abs(known - time))
        return {"sample": seen[nearest], "timestep": torch.tensor(time)}

    graph = trace(model, inputs(600.0))
    return Bundled(model, original, inputs, {name: lowered(graph, name) for name in ("reference", "ratio")})
