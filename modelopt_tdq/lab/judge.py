"""Judging a quantized model against full precision: held-out trajectories, and images of the same seeds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.metrics import psnr_db, sqnr_db
from modelopt_tdq.lab.denoising import predict, sample_labels
from modelopt_tdq.lab.trajectories import noise, sample, sample_shape

__all__ = ["Judgement", "Reference", "folded", "held_out_sqnr", "judge", "reference"]


@dataclass(frozen=True)
class Reference:
    """Full-precision trajectories.

    Attributes:
        start: [N, C, H, W] standard normal noise that the trajectories start from, before the scheduler scales it.
        timesteps: [S] in the order of sampling.
        inputs: [S, N, C, H, W] what the model saw.
        predictions: [S, N, C, H, W] what it answered.
        images: [N, C, H, W] in [-1, 1].
    """

    start: Tensor
    timesteps: Tensor
    inputs: Tensor
    predictions: Tensor
    images: Tensor


@dataclass(frozen=True)
class Judgement:
    """How far a model is from the reference.

    Attributes:
        sqnr_db: [S] of the noise prediction at each step, on the reference's inputs.
        psnr_db: Of the final images, each from its own trajectory.
        images: [N, C, H, W] in [-1, 1].
    """

    sqnr_db: list[float]
    psnr_db: float
    images: Tensor


def reference(
    model: nn.Module, scheduler: Any, samples: int, steps: int, seed: int, tick: Callable[[], None]
) -> Reference:
    """Run the full-precision model; ``tick`` is called after every step."""
    times, inputs, predictions = [], [], []

    def visit(time: Tensor, model_input: Tensor, prediction: Tensor) -> None:
        times.append(time)
        inputs.append(model_input)
        predictions.append(prediction)
        tick()

    start = noise(samples, sample_shape(model), seed)
    images = sample(model, scheduler, start, steps, visit)
    return Reference(start, torch.stack(times), torch.stack(inputs), torch.stack(predictions), images.clamp(-1.0, 1.0))


def judge(
    model: nn.Module,
    scheduler: Any,
    against: Reference,
    tick: Callable[[], None],
    place: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Judgement:
    """Judge a quantized model; ``tick`` is called twice per step, ``place`` brings a copy to where it computes."""
    model = place(folded(model))
    decibels = _sqnr(model, against, tick)
    images = sample(model, scheduler, against.start, len(against.timesteps), lambda *_: tick()).clamp(-1.0, 1.0)
    return Judgement(decibels, psnr_db(against.images, images), images)


def held_out_sqnr(model: nn.Module, against: Reference) -> list[float]:
    """[S] SQNR of a quantized model's predictions in dB, as :func:`judge` finds it, without the images."""
    return _sqnr(folded(model), against, lambda: None)


def folded(model: nn.Module) -> nn.Module:
    """A copy with the same numbers, which does not quantize its weights again at every call."""
    import modelopt.torch.quantization as mtq

    copied = copy.deepcopy(model)
    mtq.fold_weight(copied)
    return copied


@torch.no_grad()
def _sqnr(model: nn.Module, against: Reference, tick: Callable[[], None]) -> list[float]:
    decibels = []
    for time, inputs, prediction in zip(against.timesteps, against.inputs, against.predictions, strict=True):
        labels = sample_labels(model, len(inputs), inputs.device)
        decibels.append(sqnr_db(prediction, predict(model, inputs, time, labels)))
        tick()
    return decibels
