"""Back from a model that learns to one that is calibrated, keeping the scales it has."""

from __future__ import annotations

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from modelopt_tdq.timestep import INTERVALS, find_timestep
from modelopt_tdq.training.attention import leave_attention
from modelopt_tdq.training.quantizer import LearnedQuantizer
from modelopt_tdq.training.weights import LearnedWeightQuantizer

__all__ = ["forget_learning"]


def forget_learning(model: nn.Module) -> None:
    """Turn every learned quantizer of ``model`` into the ordinary one it was made from; its scales stay.

    A second calibration starts with it. Nothing happens to a model that does not learn.
    """
    model._modules.pop(INTERVALS, None)
    timestep = find_timestep(model)
    if timestep is not None:
        timestep.intervals = None
    for module in model.modules():
        if isinstance(module, LearnedQuantizer):
            module.unlearn()
        elif isinstance(module, LearnedWeightQuantizer):
            _plain_weight(module)
    leave_attention(model)


def _plain_weight(quantizer: LearnedWeightQuantizer) -> None:
    amax = quantizer.amax.detach().clone()
    del quantizer._parameters["weight_scale"]
    del quantizer._learns_weight_scale
    quantizer.__class__ = TensorQuantizer
    quantizer.register_buffer("_amax", torch.as_tensor(amax))
