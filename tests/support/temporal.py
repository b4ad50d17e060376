"""A tiny UNet whose temporal features are known from hooks on the full-precision model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.temporal_features.table import Feature, FeatureTable
from support.models import TIMES

#: What is upstream of the features of a UNet2DModel.
UPSTREAM = ("time_embedding.linear_1", "time_embedding.linear_2")


def head_names(model: nn.Module) -> list[str]:
    """The layers of a UNet2DModel that make its temporal features."""
    return [name for name, module in model.named_modules() if name.endswith("time_emb_proj")]


@torch.no_grad()
def observed(
    model: nn.Module, inputs: dict[str, Any], names: Sequence[str], times: Sequence[float]
) -> dict[str, Tensor]:
    """[K, ...] what these layers give at these times."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = []
    for name in names:

        def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            found[name].append(output[0].detach().clone())

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    for time in times:
        model(**{**inputs, "timestep": torch.tensor(time)})
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(values) for name, values in found.items()}


def make_table(
    values: dict[str, Tensor], times: Sequence[float], outside: Any = "nearest", bits: int | None = 8, **metadata: Any
) -> FeatureTable:
    """A table of codes, or of the values as they are."""
    features = {n: Feature(v) if bits is None else Feature.quantized(v, bits) for n, v in values.items()}
    return FeatureTable(torch.tensor(times), features, outside, metadata)


def unet_table(
    model: nn.Module, inputs: dict[str, Any], outside: Any = "nearest", bits: int | None = 8, times: Any = TIMES
) -> tuple[FeatureTable, dict[str, tuple[int, ...]]]:
    """The table of a UNet2DModel in full precision; and what it supersedes."""
    times = sorted(times)
    values = observed(model, inputs, [*head_names(model), *UPSTREAM], times)
    superseded = {name: tuple(values.pop(name).shape[1:]) for name in UPSTREAM}
    return make_table(values, times, outside, bits), superseded
