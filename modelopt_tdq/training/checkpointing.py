"""Gradient checkpointing in which a block that runs again sees the time of its own call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.utils.checkpoint
from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.timestep import find_timestep
from modelopt_tdq.model.wrapped import unwrapped

__all__ = ["checkpoint"]


def checkpoint(model: nn.Module) -> Callable[..., Any]:
    """A checkpointing function for a model that is called several times before its backward pass.

        model.enable_gradient_checkpointing(gradient_checkpointing_func=tdq.checkpoint(model))

    A model that is called once per backward pass needs nothing but its own ``enable_gradient_checkpointing()``.

    Raises:
        TdqError: The model is not quantized with scales that follow time.
    """
    timestep = find_timestep(unwrapped(model))
    if timestep is None:
        raise TdqError("model", type(model).__name__, "it does not receive its time", "Quantize it first")

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), timestep.at(timestep.require_each(), timestep.intervals)

    def run(function: Callable[..., Any], *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

    return run
