"""Optimizer groups of the QAT recipe, and what schemes add to the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.timestep import find_timestep
from modelopt_tdq.model.wrapped import unwrapped
from modelopt_tdq.training.learned import learned_intervals, learned_quantizers
from modelopt_tdq.training.schemes import SCHEMES
from modelopt_tdq.training.weights import LearnedWeightQuantizer

__all__ = ["interval_penalty", "parameter_groups"]


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.01, scale_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups for ``torch.optim.AdamW``, as in the TDQ recipe.

    Scales that are parameters themselves (static and tabulated intervals, weight scales, the further parameters of a
    scheme) learn at a tenth of the rate and without weight decay, which would pull them to zero; the interval MLP
    and the model itself at the full rate with it.

    Args:
        model: Quantized with an algorithm that learns.
        lr: Learning rate.
        weight_decay: Of the model and the MLP.
        scale_lr: Learning rate of the scales; ``lr / 10`` if None.

    Returns:
        Three groups, named ``"model"``, ``"interval_mlp"`` and ``"scales"``; empty ones are left out.

    Raises:
        TdqError: The model does not learn its intervals; or weights that would be trained are kept elsewhere by
            accelerate.
    """
    learned, model = learned_intervals(model), unwrapped(model)
    scales: list[nn.Parameter] = [] if learned.source is None else list(learned.source.static_parameters())
    mlp: list[nn.Parameter] = [] if learned.source is None else list(learned.source.parameters())
    for module in model.modules():
        if isinstance(module, LearnedWeightQuantizer):
            scales.append(module.weight_scale)
    for quantizer in learned_quantizers(model).values():
        scales += [p for p in quantizer.further.values() if isinstance(p, nn.Parameter)]
        mlp += [p for child in quantizer.children() for p in child.parameters()]
    is_scale = {id(p) for p in scales}
    is_mlp = {id(p) for p in mlp} - is_scale
    trained = [p for p in model.parameters() if p.requires_grad]
    if any(p.is_meta for p in trained):
        raise TdqError(
            "model",
            [name for name, p in model.named_parameters() if p.requires_grad and p.is_meta][:3],
            "these parameters are on `meta` between calls, where nothing trains them",
            "Call accelerate.hooks.remove_hook_from_submodules(model), or requires_grad_(False) on what is to stay",
        )
    groups: list[dict[str, Any]] = [
        {
            "name": "model",
            "params": [p for p in trained if id(p) not in is_scale | is_mlp],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "name": "interval_mlp",
            "params": [p for p in trained if id(p) in is_mlp],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "name": "scales",
            "params": [p for p in trained if id(p) in is_scale],
            "lr": lr / 10 if scale_lr is None else scale_lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def interval_penalty(model: nn.Module) -> Tensor:
    """What the scheme adds to the loss for the intervals of the last call: PACT's squared clipping values, else zero.

    Add it with a weight, e.g. ``loss + 1e-4 * tdq.interval_penalty(model)``.

    Raises:
        TdqError: The model does not learn, or was not called in training mode.
    """
    learned = learned_intervals(model)
    timestep = find_timestep(unwrapped(model))
    if learned.source is None:
        return torch.zeros((), device=learned.rows.device)
    if timestep is None or timestep.last_intervals is None:
        raise TdqError("model", type(model).__name__, "it was not called in training mode", "Call it before this")
    penalty = SCHEMES[learned.description["scheme"]].penalty(timestep.last_intervals)
    return torch.zeros((), device=learned.rows.device) if penalty is None else penalty
