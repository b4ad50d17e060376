"""Sensitivity: what quantizing each layer alone does to the model's output.

Estimated for all layers at once by backward passes (:mod:`modelopt_tdq.analysis.backward`). A layer that they do not
reach, and every layer of a model without them, is measured by itself, which takes two calls of the model per time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from modelopt_tdq.analysis.backward import Effects, effects, noise_of
from modelopt_tdq.analysis.probe import Probe, layer_quantizers

__all__ = ["LayerSensitivity", "Sensitivity", "sensitivities"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer alone does to the model's output.

    Attributes:
        name: Of the layer (the parent of its quantizers).
        activation_db: [T] SQNR of the model's output in dB with only this layer's input quantized.
        weight_db: [T] likewise with only its weights quantized; infinite where they are not quantized.
        estimated: Whether both come from backward passes. Else each was measured, with nothing else quantized.
    """

    name: str
    activation_db: tuple[float, ...]
    weight_db: tuple[float, ...]
    estimated: bool = False

    @property
    def worst_db(self) -> float:
        """Smallest of all."""
        return min((*self.activation_db, *self.weight_db), default=math.inf)


@dataclass(frozen=True)
class Sensitivity:
    """Of all layers.

    Attributes:
        noise: By layer, [T] float64, the squared error of the model's output that the layer makes alone.
        shared: Layers that read one tensor: their errors are alike, and add up in another way than those of others. By
            layer, what :func:`modelopt_tdq.analysis.backward.noise_of` takes.
        layers: The same as decibels, most harmful layer first.
    """

    noise: dict[str, Tensor]
    shared: list[Effects]
    layers: list[LayerSensitivity]

    def together(self, layers: set[str]) -> Tensor:
        """[T] float64, the squared error that these layers make together, to first order."""
        total = torch.stack([self.noise[name] for name in layers]).sum(0)
        for group in self.shared:
            numbers = [group[name] for name in group if name in layers]
            if len(numbers) > 1:
                total = total + noise_of(*numbers) - torch.stack([noise_of(one) for one in numbers]).sum(0)
        return total.clamp(min=0.0)


def sensitivities(
    probe: Probe, variants: Mapping[str, Callable[[str], None]], backward: bool, progress: bool
) -> dict[str, Sensitivity]:
    """Sensitivity of each layer with each variant of the scales.

    Args:
        probe: Times to look at.
        variants: What each variant does to the quantizer of a name.
        backward: Estimate by backward passes where there are any.
        progress: Show progress bars.
    """
    layers = layer_quantizers(probe.model)
    found: dict[str, Effects] = {variant: {} for variant in variants}
    groups: list[list[str]] = []
    if backward:
        try:
            found, groups = effects(probe, layers, variants, progress)
        except RuntimeError as error:
            _log.warning("layers are measured one by one, which takes longer: backward passes fail: %s", error)
    weights: dict[str, Tensor] = {}
    result = {}
    for variant, use in variants.items():
        estimates = found[variant]

        def noise(names: list[str], estimates: Effects = estimates, use: Callable[[str], None] = use) -> Tensor:
            if all(name in estimates for name in names):
                return noise_of(*(estimates[name] for name in names))
            for name in names:
                use(name)
            with probe.only(set(names).__contains__):
                return probe.noise()

        alone: dict[str, Tensor] = {}
        rows = []
        hidden = not progress or all(name in estimates for both in layers.values() for name in (*both[0], *both[1]))
        for layer, (inputs, own) in tqdm(layers.items(), f"sensitivity, {variant}", disable=hidden, unit="layer"):
            of_inputs = noise(inputs) if inputs else torch.zeros_like(probe.energy)
            if layer not in weights:
                weights[layer] = noise(own) if own else torch.zeros_like(probe.energy)
            alone[layer] = of_inputs + weights[layer]
            estimated = all(name in estimates for name in (*inputs, *own))
            rows.append(LayerSensitivity(layer, probe.sqnr_db(of_inputs), probe.sqnr_db(weights[layer]), estimated))
        shared = [{name.rpartition(".")[0]: estimates[name] for name in group if name in estimates} for group in groups]
        result[variant] = Sensitivity(alone, shared, sorted(rows, key=lambda row: row.worst_db))
    return result
