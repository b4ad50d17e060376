"""The training task of a denoiser: noisy images in, their noise out (DDPM, Ho et al. 2020, equation 14)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from modelopt_tdq.model.call import first_output
from modelopt_tdq.model.place import execution_device

__all__ = ["NoisyBatch", "Prediction", "class_count", "noise_loss", "noisy_batch", "predict", "sample_labels"]

#: Noisy images [B, C, H, W], times [B], the noise in them [B, C, H, W], labels [B] or None.
NoisyBatch = tuple[Tensor, Tensor, Tensor, "Tensor | None"]


def class_count(model: nn.Module) -> int | None:
    """Number of classes that the model is conditioned on; None if on none."""
    config: Any = getattr(model, "config", {})
    count = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
    return None if count is None else int(count)


def sample_labels(model: nn.Module, samples: int, device: torch.device | str = "cpu") -> Tensor | None:
    """[samples] int64: sample i has class i modulo their number; None for a model without classes."""
    classes = class_count(model)
    return None if classes is None else torch.arange(samples, device=device) % classes


def predict(model: nn.Module, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
    """The model's prediction of the noise [B, C, H, W], without that of its variance where it makes one.

    The model is called where it computes, in its type; what it predicts comes back to where ``x`` is, in that of ``x``.

    Args:
        model: Takes the noisy images and the time as its first arguments, and ``class_labels`` where it has classes.
        x: [B, C, H, W].
        time: [] or [B].
        labels: [B] int64, or None.
    """
    device, dtype = (
        execution_device(model),
        next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype),
    )
    given = x if (x.device, x.dtype) == (device, dtype) else x.to(device, dtype)
    if device != x.device:
        time, labels = time.to(device), None if labels is None else labels.to(device)
    if labels is None:
        prediction = first_output(model(given, time))
    else:
        prediction = first_output(model(given, time.expand(len(x)), class_labels=labels))
    prediction = prediction[:, : x.shape[1]]
    return prediction if given is x else prediction.to(x)


def noisy_batch(
    images: Tensor, labels: Tensor | None, scheduler: Any, batch: int, generator: torch.Generator
) -> NoisyBatch:
    """Random images at random times, flipped at random.

    Args:
        images: uint8 [N, 3, H, W].
        labels: [N] int64 or None.
        scheduler: From diffusers; its ``add_noise`` and number of training times are used.
        batch: Size of the batch.
        generator: Source of all randomness.
    """
    rows = torch.randint(len(images), (batch,), generator=generator)
    clean = images[rows].float() / 127.5 - 1
    flip = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    clean = torch.where(flip, clean.flip(-1), clean)
    times = torch.randint(int(scheduler.config.num_train_timesteps), (batch,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = scheduler.add_noise(clean, noise, times)
    return noisy, times, noise, None if labels is None else labels[rows]


def noise_loss(model: nn.Module, batch: NoisyBatch) -> Tensor:
    """Mean squared error of the predicted noise, the plain diffusion loss: a scalar."""
    noisy, times, noise, labels = batch
    return F.mse_loss(predict(model, noisy, times, labels).float(), noise)


class Prediction(nn.Module):
    """The prediction alone, as a tensor: what lowerings return, for the export of a full-precision model.

    Args:
        model: Takes noisy samples, the time, and ``class_labels`` where it has classes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """What the model predicts for these inputs."""
        labels = {} if class_labels is None else {"class_labels": class_labels}
        return first_output(self.model(sample, timestep, **labels))
