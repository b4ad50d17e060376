"""The temporal features of a model as it computes or looks them up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modelopt_tdq.lab.example_call import example_call
from modelopt_tdq.temporal_features.block import find_temporal_block
from modelopt_tdq.temporal_features.runtime import feature_table, has_features

__all__ = ["compute_features"]


@torch.no_grad()
def compute_features(model: nn.Module, times: Tensor) -> dict[str, Tensor]:
    """[K, ...] the temporal features that a model computes, or looks up, at times [K]; by name."""
    if has_features(model):
        table = feature_table(model)
        return {name: table.lookup(name, times) for name in table.features}
    block = find_temporal_block(model, example_call(model), times=len(times))
    return block.compute(model, times)
