"""One measurement of a quantization config on a model: quality on trajectories that it was not calibrated on."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modelopt_tdq.judge import Reference, judge
from modelopt_tdq.trajectories import noise, sample, sample_shape

__all__ = ["Measurement", "calibration_loop", "measure"]


@dataclass(frozen=True)
class Measurement:
    """Quality of one quantized model.

    Attributes:
        sqnr_db: [S] of the noise prediction at each step, on the inputs of full-precision trajectories.
        psnr_db: Of the final images, each model on its own trajectory.
        seconds: Of ``mtq.quantize``.
        model: The quantized model.
    """

    sqnr_db: list[float]
    psnr_db: float
    seconds: float
    model: nn.Module

    @property
    def mean_db(self) -> float:
        """Mean of the steps."""
        return math.fsum(self.sqnr_db) / len(self.sqnr_db)

    @property
    def worst_db(self) -> float:
        """The worst step."""
        return min(self.sqnr_db)


def calibration_loop(scheduler: Any, samples: int, steps: int, seed: int) -> Callable[[nn.Module], None]:
    """A ``forward_loop`` over as many whole trajectories as give ``samples`` samples.

    Args:
        scheduler: From diffusers; deterministic.
        samples: Pairs of an input and its time.
        steps: Of a trajectory.
        seed: Of the noise that the trajectories start from.
    """

    def forward_loop(model: nn.Module) -> None:
        sample(model, scheduler, noise(math.ceil(samples / steps), sample_shape(model), seed), steps)

    return forward_loop


def measure(
    model: nn.Module,
    config: dict[str, Any],
    forward_loop: Callable[[nn.Module], Any],
    scheduler: Any,
    against: Reference,
) -> Measurement:
    """Quantize a copy of ``model`` and judge it.

    Args:
        model: Full precision, in eval mode.
        config: For ``mtq.quantize``.
        forward_loop: As there; see :func:`calibration_loop`.
        scheduler: For the final images.
        against: Full-precision trajectories from :func:`modelopt_tdq.judge.reference`, of another seed.
    """
    import modelopt.torch.quantization as mtq

    start = time.perf_counter()
    quantized = mtq.quantize(copy.deepcopy(model), copy.deepcopy(config), forward_loop)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        judged = judge(quantized, scheduler, against, lambda: None)
    return Measurement(judged.sqnr_db, judged.psnr_db, seconds, quantized)
