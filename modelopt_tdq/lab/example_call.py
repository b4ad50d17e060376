"""One call of a diffusers denoiser that needs nothing but noise, a time and class labels."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.lab.denoising import sample_labels
from modelopt_tdq.lab.trajectories import noise, sample_shape
from modelopt_tdq.model.place import execution_device

__all__ = ["example_call"]


def example_call(model: nn.Module, samples: int = 2, time: Tensor | None = None) -> dict[str, Any]:
    """Its arguments, by name.

    Args:
        model: One for which :func:`modelopt_tdq.lab.trajectories.is_unconditional` holds.
        samples: Of noise.
        time: [], [1] or [samples]; by default 500 for all, float32.

    Raises:
        TdqError: The model's config does not say how large its samples are.
    """
    device = execution_device(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    names = list(inspect.signature(model.forward).parameters)
    arguments: dict[str, Any] = {
        names[0]: noise(samples, sample_shape(model), 0).to(device, dtype),
        names[1]: torch.full((samples,), 500.0, device=device) if time is None else time,
    }
    labels = sample_labels(model, samples, device)
    return arguments if labels is None else {**arguments, "class_labels": labels}
