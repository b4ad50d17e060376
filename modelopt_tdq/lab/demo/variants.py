"""The three ways of calibrating that the demo compares, for one recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.config import recipe
from modelopt_tdq.core.fake_quant import code_range
from modelopt_tdq.lab.maintenance import with_maintenance
from modelopt_tdq.lab.placement import Placement
from modelopt_tdq.model.model_table import scale_table, temporal_quantizers
from modelopt_tdq.model.output_correction import layer_correction, output_channels

__all__ = ["VARIANTS", "quantized", "static_scales", "table_facts", "variant_config", "variant_label"]

#: ModelOpt's own static calibration; the recipe's statistic with one bin; the recipe.
VARIANTS = ("max", "static", "tdq")


def variant_config(
    recipe_name: str, variant: str, maintenance: str = "none", times: Sequence[float] | None = None
) -> dict[str, Any]:
    """The config for ``mtq.quantize``: the same layers and bits in all variants.

    Args:
        recipe_name: Name of a recipe.
        variant: One of :data:`VARIANTS`.
        maintenance: Of the temporal features, where scales follow time.
        times: For which those have rows, besides the calibrated ones.
    """
    config = recipe(recipe_name)
    if variant == "max":
        config["algorithm"] = "max"
        return config
    config["algorithm"]["progress"] = False
    if variant == "static":
        config["algorithm"]["bins"] = 1
        return config
    return with_maintenance(config, maintenance, times)


def variant_label(recipe_name: str, variant: str, maintenance: str = "none") -> str:
    """As shown in tables."""
    kept = "" if maintenance == "none" else f" + {maintenance}"
    statistic = recipe(recipe_name)["algorithm"].get("statistic", "output")
    return {"max": "ModelOpt max", "static": f"static {statistic}", "tdq": f"TDQ {statistic}{kept}"}[variant]


def quantized(
    model: nn.Module,
    config: dict[str, Any],
    forward_loop: Callable[[nn.Module], Any],
    placement: Placement | None = None,
) -> nn.Module:
    """A quantized copy of ``model``: where that is, or quantized where ``placement`` has it, and on the CPU then."""
    copied = copy.deepcopy(model)
    if placement is not None:
        placement.place(copied)
    mtq.quantize(copied, config, forward_loop)
    if placement is not None:
        placement.take_back(copied)
    return copied


def static_scales(model: nn.Module, names: tuple[str, ...]) -> Tensor:
    """[Q] float32 scales of ModelOpt's own (max) calibration: amax / qmax."""
    quantizers: list[Any] = [model.get_submodule(name) for name in names]
    return torch.tensor([float(q.amax) / code_range(q.num_bits)[1] for q in quantizers])


def table_facts(model: nn.Module) -> dict[str, int]:
    """Rows, quantizers, those that follow time, and the size in bytes of what a deployment carries, as float32.

    A quantizer that does not follow time carries one scale; the times are carried once. Corrections of layers' outputs
    and shifts of channels, with what they add behind the product, count where they follow time; the others, and what
    channels are divided by, are constants of the graph.
    """
    quantizers_over_time = temporal_quantizers(model)
    if not quantizers_over_time:  # ModelOpt's own calibration
        quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer) and m.is_enabled and m.axis is None]
        return {"rows": 1, "quantizers": len(quantizers), "temporal": 0, "bytes": 4 * len(quantizers)}
    table = scale_table(model)
    static = table.is_static
    rows = torch.where(static, 1, len(table))
    numbers = int(rows.sum())
    if table.offset is not None:
        numbers += int(rows[(table.offset != 0).any(0)].sum())
    temporal = int((~static).sum())
    if temporal:
        numbers += len(table)
    correction = layer_correction(model)
    if correction is not None:
        numbers += sum(2 * gain.numel() for gain in correction.gain.values() if len(gain) > 1)
    for name, quantizer in quantizers_over_time.items():
        shift, layer = quantizer.channel_shift, name.rpartition(".")[0]
        if shift is not None and len(shift) > 1:
            numbers += shift.numel()
            if correction is None or len(correction.gain.get(layer, ())) < 2:
                numbers += len(shift) * output_channels(model.get_submodule(layer))
    times = len(table) if temporal else 1
    return {"rows": times, "quantizers": len(table.names), "temporal": temporal, "bytes": 4 * numbers}
