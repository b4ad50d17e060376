"""What all rows of one table share: the model, its layers, the number format, the calibration data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import modelopt.torch.quantization as mtq
from modelopt.torch.quantization.nn import QuantModule
from torch import Tensor, nn

from modelopt_tdq.config import make_config
from modelopt_tdq.core.fake_quant import FP8_E4M3, NumBits
from modelopt_tdq.lab.bench.qat_run import Data
from modelopt_tdq.lab.trajectories import sample

__all__ = ["FORMATS", "Format", "Setting", "is_linear", "quantized_layers"]


@dataclass(frozen=True)
class Format:
    """A number format of weights and activations.

    Attributes:
        name: As in the tables.
        weights: Bits of integers, or ``(4, 3)`` for FP8 E4M3.
        activations: Likewise.
    """

    name: str
    weights: NumBits
    activations: NumBits

    @property
    def is_int8(self) -> bool:
        """Whether all codes are integers of 8 bits."""
        return (self.weights, self.activations) == (8, 8)

    @property
    def is_fp8(self) -> bool:
        """Whether all codes are FP8."""
        return (self.weights, self.activations) == (FP8_E4M3, FP8_E4M3)


#: In the order of the tables.
FORMATS = {
    one.name: one
    for one in (
        Format("W8A8", 8, 8),
        Format("FP8", FP8_E4M3, FP8_E4M3),
        Format("W4A8", 4, 8),
        Format("W4A4", 4, 4),
    )
}


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a linear layer, quantized or not; the others here are convolutions."""
    return isinstance(layer, nn.Linear)


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers of a quantized model whose weights and inputs are both quantized, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantModule)
        and all(getattr(getattr(layer, q, None), "is_enabled", False) for q in ("weight_quantizer", "input_quantizer"))
    }


@dataclass(frozen=True)
class Setting:
    """What a row is made from.

    Attributes:
        model: Full precision; rows quantize copies of it.
        scheduler: Deterministic, from diffusers.
        bits: The number format.
        start: [N, ...] noise that the calibration trajectories start from.
        steps: Of a trajectory.
        iterations: Of the reconstruction, per block.
        training_steps: Of QAT.
        images: To train on; None: there are none.
        progress: Whether the algorithms of this package show their progress.
    """

    model: nn.Module
    scheduler: Any
    bits: Format
    start: Tensor
    steps: int
    iterations: int
    training_steps: int
    images: Data | None = None
    progress: bool = True

    def forward_loop(self, model: nn.Module) -> None:
        """The calibration data, for ``mtq.quantize``."""
        sample(model, self.scheduler, self.start, self.steps)

    def config(self, method: str = "tdq", **fields: Any) -> dict[str, Any]:
        """The recipe: the layers that it quantizes, and an algorithm of this package.

        Args:
            method: The algorithm.
            **fields: Its fields.
        """
        fields = {"progress": self.progress, **fields}
        return make_config(self.bits.weights, self.bits.activations, method=method, **fields)

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        """The layers that the recipe quantizes: names to full-precision modules. All rows quantize these, or some."""
        converted = mtq.quantize(copy.deepcopy(self.model), {**self.config(), "algorithm": None})
        return {name: self.model.get_submodule(name) for name in quantized_layers(converted)}

    def rules(self, inputs: Callable[[nn.Module], Mapping[str, Any] | None]) -> list[dict[str, Any]]:
        """Rules for ``mtq.quantize``: layers of the recipe, weights per output channel.

        Args:
            inputs: Attributes of a layer's input quantizer; None: the layer stays in high precision.
        """
        found: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        weights = {"num_bits": self.bits.weights, "axis": 0}
        for name, layer in self.layers.items():
            attributes = inputs(layer)
            if attributes is not None:
                found.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weights})
                cfg = {"num_bits": self.bits.activations, **attributes}
                found.append({"quantizer_name": f"{name}.input_quantizer", "cfg": cfg})
        return found

    def quantize(self, rules: list[dict[str, Any]], algorithm: Any) -> nn.Module:
        """A quantized copy of the model, calibrated on the calibration data.

        Args:
            rules: For quantizers, in ModelOpt's form.
            algorithm: In ModelOpt's form.
        """
        config = {"quant_cfg": rules, "algorithm": algorithm}
        quantized: nn.Module = mtq.quantize(copy.deepcopy(self.model), config, self.forward_loop)
        return quantized
