"""Sampling trajectories of diffusers models without text: for calibration, and to judge on."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError, require
from modelopt_tdq.lab.denoising import predict, sample_labels
from modelopt_tdq.model.place import execution_device

__all__ = ["calibration_loop", "is_unconditional", "load_scheduler", "noise", "sample", "sample_shape"]

#: Called at every step: the time [], the input of the model [N, ...], its prediction [N, ...].
Visit = Callable[[Tensor, Tensor, Tensor], None]


def load_scheduler(source: str | os.PathLike[str], subfolder: str | None = "scheduler") -> Any:
    """The scheduler saved beside a model: deterministic, so a DDPM scheduler becomes the DDIM one (eta = 0).

    Args:
        source: Folder of a diffusers pipeline or model, or a hub id.
        subfolder: Of the scheduler in it.

    Raises:
        TdqError: There is none, or diffusers does not know its class.
        MissingExtraError: The extra ``diffusers`` is not installed.
    """
    diffusers = require("diffusers", "diffusers")
    cure = "Pass your own forward_loop with --calibration-script file.py:function"
    if Path(source).is_dir() and not (Path(source) / (subfolder or "")).is_dir():
        raise TdqError("scheduler", str(Path(source) / (subfolder or "")), "no such folder", cure)
    try:
        config = diffusers.DDIMScheduler.load_config(str(source), subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise TdqError("scheduler", str(source), f"it holds no scheduler ({error})", cure) from error
    name = config.get("_class_name")
    kind = getattr(diffusers, "DDIMScheduler" if name == "DDPMScheduler" else str(name), None)
    if kind is None:
        raise TdqError("scheduler", name, "diffusers has no such scheduler", cure)
    return kind.from_config(config)


def is_unconditional(model: nn.Module) -> bool:
    """Whether the model needs nothing but noisy samples, the time, and class labels where it has classes."""
    parameters = inspect.signature(model.forward).parameters
    names = list(parameters)
    if len(names) < 2 or names[0] not in ("sample", "hidden_states") or names[1] != "timestep":
        return False
    if "encoder_hidden_states" in names:
        return False
    others = list(parameters.values())[2:]
    return all(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in others)


def sample_shape(model: nn.Module) -> tuple[int, ...]:
    """Shape of one sample without its batch dimension, from the model's config: [C, H, W].

    Raises:
        TdqError: The config does not say.
    """
    config: Any = getattr(model, "config", {})
    channels, size = config.get("in_channels"), config.get("sample_size")
    if not channels or not size:
        raise TdqError(
            "sample_size",
            size,
            "the config of this model does not say how large its samples are",
            "Pass your own forward_loop with --calibration-script file.py:function",
        )
    return (int(channels), *((int(size),) * 2 if isinstance(size, int) else (int(v) for v in size)))


def noise(samples: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """[samples, *shape] standard normal; sample i depends on ``seed`` and i alone, not on their number."""
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(samples)]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.no_grad()
def sample(model: nn.Module, scheduler: Any, start: Tensor, steps: int, visit: Visit | None = None) -> Tensor:
    """Run a sampling trajectory.

    Args:
        model: Called as ``model(x, t)``; sample i of a class-conditional one gets class i modulo their number.
        scheduler: From diffusers; deterministic.
        start: [N, ...] standard normal noise.
        steps: Number of sampling steps.
        visit: Sees every call.

    Returns:
        [N, ...] the final samples.
    """
    scheduler.set_timesteps(steps)
    x: Tensor = start * scheduler.init_noise_sigma
    labels = sample_labels(model, len(x), x.device)
    for time in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, time)
        prediction = predict(model, model_input, time, labels)
        if visit is not None:
            visit(time, model_input, prediction)
        x = scheduler.step(prediction, time, x).prev_sample
    return x


def calibration_loop(scheduler: Any, samples: int, steps: int, seed: int) -> Callable[[nn.Module], None]:
    """A ``forward_loop`` over as many whole trajectories as give ``samples`` samples.

    Args:
        scheduler: From diffusers; deterministic.
        samples: Pairs of an input and its time.
        steps: Of a trajectory.
        seed: Of the noise that the trajectories start from.
    """

    def forward_loop(model: nn.Module) -> None:
        start = noise(math.ceil(samples / steps), sample_shape(model), seed)
        sample(model, scheduler, start.to(execution_device(model)), steps)

    return forward_loop
