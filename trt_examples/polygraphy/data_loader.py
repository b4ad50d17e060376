"""Inputs for ``polygraphy run --data-loader-script``: a sampling trajectory of the bundled model.

The inputs of a denoiser at different times are not interchangeable, so random data will not do. Change
the four constants, or ``trajectory``, for a model of your own.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch

from modelopt_tdq.compare import PrintedComparator
from modelopt_tdq.lab.model_folder import load_model
from modelopt_tdq.lab.reference_models import bundled_model
from modelopt_tdq.lab.trajectories import load_scheduler, noise, sample, sample_shape

MODEL = bundled_model()
BATCH = 1
STEPS = 20
SEED = 7  # not the seed of the calibration

Feeds = dict[str, np.ndarray]


@cache
def trajectory() -> list[tuple[Feeds, np.ndarray]]:
    """The inputs of each step, and the prediction in full precision."""
    model, calls = load_model(MODEL), []

    def visit(time: torch.Tensor, x: torch.Tensor, prediction: torch.Tensor) -> None:
        calls.append(({"sample": x.numpy(), "timestep": time.numpy()}, prediction.numpy()))

    sample(model, load_scheduler(MODEL), noise(BATCH, sample_shape(model), SEED), STEPS, visit)
    return calls


def load_data() -> Iterator[Feeds]:
    """What Polygraphy calls: one mapping from input name to array per step."""
    for feeds, _ in trajectory():
        yield feeds


@cache
def comparator(given: bool) -> PrintedComparator:
    """For ``compare.py``: knows the full-precision prediction of every step."""
    times = [float(feeds["timestep"]) for feeds, _ in trajectory()]
    return PrintedComparator([prediction for _, prediction in trajectory()], times, given=given)
