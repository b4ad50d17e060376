"""What an error of the prediction at each time does to the sample at the end of the trajectory."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modelopt_tdq.errors import TdqError

__all__ = ["image_weights"]

#: Size of the errors that are tried: small enough that no scheduler clips them, and in the model's own trajectory.
_TINY, _SMALL = 2.0**-20, 2.0**-7

#: Weight of a time whose prediction does not reach the sample: a last step of some schedules moves nothing.
_LEAST = 1e-3

#: The prediction for a noisy batch [N, ...] at a time [].
Predict = Callable[[Tensor, Tensor], Tensor]


def image_weights(
    scheduler: Any,
    num_inference_steps: int,
    predict: Predict | None = None,
    start: Tensor | None = None,
    **schedule: Any,
) -> dict[float, float]:
    """How much a unit error of the prediction at each time changes the final sample, for the field ``time_weights``.

    By the sampler's coefficients alone, or with how the model itself answers what an error has changed. A model takes
    most of an early error back, which the coefficients do not know: for DDIM they are the steps of sigma, the noise's
    deviation in units of the image's scale, of which the first are by far the largest. So give ``predict`` and
    ``start`` where the model can be run K(K + 3)/2 times, K the calls of a trajectory.

    Args:
        scheduler: From diffusers, or of its interface; deterministic. It is not changed.
        num_inference_steps: Of a trajectory.
        predict: Called as ``predict(x, time)`` with x as ``start`` and a time []; None: later predictions stay as they
            are, whatever an error changed.
        start: [N, ...] standard normal noise, of a few trajectories.
        **schedule: Further arguments of the scheduler's ``set_timesteps``.

    Returns:
        The weight of each of the scheduler's timesteps, 0.001 or more; the mean of their squares is 1. Where a pipeline
        gives the model other times, as t / 1000, the keys have to be changed likewise.

    Raises:
        TdqError: The scheduler draws random numbers or does not take ``schedule``, only one of ``predict`` and
            ``start`` is given, or what errors do to the sample is infinite, or nothing at all times but one.
    """
    if (predict is None) != (start is None):
        missing = "predict" if predict is None else "start"
        raise TdqError(missing, None, "a trajectory of the model takes both", "Pass `predict` and `start`, or neither")
    still = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    times, changes, spread = _changes(
        scheduler, num_inference_steps, lambda x, _: torch.zeros_like(x), still, _TINY, schedule
    )
    if spread != 0.0:
        cure = "Use a deterministic one: DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, ..."
        raise TdqError("scheduler", type(scheduler).__name__, "it draws random numbers", cure)
    if predict is not None and start is not None:
        times, changes, _ = _changes(scheduler, num_inference_steps, predict, start, _SMALL, schedule)
    squares: dict[float, float] = defaultdict(float)
    for time, change in zip(times, changes, strict=True):  # some schedulers call the model twice at a time
        squares[time] += change**2
    endless = [time for time, square in squares.items() if not math.isfinite(square)]
    if endless:
        problem = f"what an error at time {endless[0]:g} does to the sample is not finite"
        cure = "Use a schedule that starts at a finite ratio of noise, or other steps"
        raise TdqError("scheduler", type(scheduler).__name__, problem, cure)
    if sum(square > 0.0 for square in squares.values()) < min(2, len(squares)):
        problem = "by its coefficients alone, no more than one prediction reaches the sample"
        cure = "Pass `predict` and `start`, so that the model's later predictions pass errors on"
        raise TdqError("scheduler", type(scheduler).__name__, problem, cure)
    mean = sum(squares.values()) / len(squares)
    return {time: max(math.sqrt(square / mean), _LEAST) for time, square in sorted(squares.items())}


@torch.no_grad()
def _changes(
    scheduler: Any, steps: int, predict: Predict, start: Tensor, size: float, schedule: dict[str, Any]
) -> tuple[list[float], list[float], float]:
    """For each call of a trajectory, its time, and the change of the final sample by an error of the prediction.

    All trajectories run together, stacked along the batch, as a scheduler may remember what came before: one without an
    error, one with an error at each call, and another without, whose distance to the first is the third result.
    """
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps, **schedule)
    except (TypeError, ValueError) as error:
        cure = "Pass the further arguments of its `set_timesteps` by name"
        raise TdqError("num_inference_steps", steps, f"the scheduler does not take it: {error}", cure) from error
    calls = len(scheduler.timesteps)
    generator = torch.Generator().manual_seed(0)
    scaled = getattr(scheduler, "scale_model_input", lambda x, _: x)
    x = (start * getattr(scheduler, "init_noise_sigma", 1.0)).repeat(calls + 2, *(1,) * (start.dim() - 1))
    with torch.random.fork_rng(devices=[start.device] if start.is_cuda else []):
        for call, time in enumerate(scheduler.timesteps):
            copies = scaled(x, time).chunk(calls + 2)
            plain = predict(copies[0], time)
            unit = torch.randn(plain.shape, generator=generator).to(plain)
            wrong = plain + size * unit / unit.double().square().mean().sqrt().to(unit)
            # copies 1 to `call` have had their error; those behind are still like the first
            had = [predict(copies[number], time) for number in range(1, call + 1)]
            x = scheduler.step(torch.cat([plain, *had, wrong, *[plain] * (calls - call)]), time, x).prev_sample
    first, *others, last = x.double().chunk(calls + 2)
    changes = [float((other - first).square().mean().sqrt()) / size for other in others]
    return [float(time) for time in scheduler.timesteps], changes, float((last - first).abs().max())
