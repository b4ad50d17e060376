"""Sampling trajectories of the bundled model, for calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn

MODEL = Path(__file__).resolve().parent.parent / "trt_examples/ddim_cifar10/model"


def load_model() -> UNet2DModel:
    """The bundled UNet in eval mode."""
    return UNet2DModel.from_pretrained(MODEL).eval()


@torch.no_grad()
def sample(
    model: nn.Module, samples: int, seed: int, steps: int, visit: Callable[[Tensor, Tensor], None] | None = None
) -> Tensor:
    """DDIM sampling, eta = 0; ``visit(timestep [], x [N, 3, 32, 32])`` sees every input of the model.

    Returns:
        Images [N, 3, 32, 32] in [-1, 1].
    """
    scheduler = DDIMScheduler.from_pretrained(MODEL / "scheduler")
    scheduler.set_timesteps(steps)
    x = torch.randn(samples, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        if visit is not None:
            visit(t, x)
        x = scheduler.step(model(x, t).sample, t, x).prev_sample
    return x.clamp(-1, 1)
