"""How others quantize, each on the layers of our recipe, so that only the treatment of the activations differs.

What is reproduced was read in the sources of NVIDIA Model-Optimizer (its diffusers example), torchao, vLLM-Omni and
Pruna 0.3.5; the code is ours. Except for ModelOpt's own algorithms as shipped, weights have the scales that ours have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from modelopt.torch.quantization.calib import MaxCalibrator
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.calibration.weights import calibrate_weights
from modelopt_tdq.lab.bench.rivals.setting import Setting, is_linear
from modelopt_tdq.model.select import weight_quantizers

__all__ = [
    "NVIDIA_HIGH_PRECISION",
    "PER_TENSOR",
    "PER_TOKEN",
    "PROMPTS_32",
    "PROMPTS_64",
    "MinOverSteps",
    "dynamic",
    "modelopt",
    "nvidia",
    "pruna",
]

#: Per tensor and static: one scale for all calls.
_STATIC = {"axis": None}

#: A scale for each image of each call: what one per tensor is where a call has one image, as when serving.
PER_TENSOR = {"type": "dynamic", "axis": 0}

#: A scale for each vector of channels of each call.
PER_TOKEN = {"type": "dynamic", "block_sizes": {-1: None}}

#: NVIDIA's example leaves layers alone whose names contain one of these.
NVIDIA_HIGH_PRECISION = (
    "time_emb_proj",
    "time_embedding",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "add_embedding",
    "pos_embed",
    "time_text_embed",
    "context_embedder",
    "norm_out",
    "x_embedder",
)

#: What the example recommends for SDXL in INT8: 32 or 64 prompts, two to a batch, over 20 steps.
PROMPTS_32, PROMPTS_64 = 32, 64
_PROMPTS_PER_BATCH, _STEPS = 2, 20

_SMOOTHQUANT_ALPHA = 0.8  # of the example's command


class MinOverSteps(MaxCalibrator):  # type: ignore[misc]
    """The "percentile" calibrator of NVIDIA's diffusers example, with ``min-mean`` and percentile 1.

        amax = factor * min over steps of mean over trajectories of max|x|

    A trajectory here is what a batch is there. The range is that of the step where it is smallest: larger steps clip.
    The example divides a sum over batches by the number of steps: ``factor`` is batches over steps of its commands.

    Args:
        num_bits: Of the codes.
        axis: None: per tensor.
        unsigned: False.
        steps: Of a trajectory: call i of the layer belongs to step i modulo their number.
        factor: What the example's mean is off by.
    """

    def __init__(
        self,
        num_bits: Any = 8,
        axis: Any = None,
        unsigned: bool = False,
        *,
        steps: int,
        factor: float,
    ) -> None:
        super().__init__(num_bits, axis, unsigned)
        self._steps, self._factor = steps, factor
        self.reset()

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Add the largest magnitudes of one call to those of its step.

        Args:
            x: [N, ...], one trajectory per row.
        """
        step = self._calls % self._steps
        self._calls += 1
        self._sums[step] = self._sums[step] + x.abs().flatten(1).amax(1).sum()
        self._counts[step] += len(x)

    def reset(self) -> None:
        """Forget what was collected."""
        super().reset()
        self._calls = 0
        self._sums: list[Tensor | float] = [0.0] * self._steps
        self._counts = [0] * self._steps

    def compute_amax(self) -> Tensor | None:
        """[] of all calls so far; None before the first."""
        means = [torch.as_tensor(total) / count for total, count in zip(self._sums, self._counts, strict=True) if count]
        return self._factor * torch.stack(means).min() if means else None


def _with_our_weights(model: nn.Module) -> nn.Module:
    """The same activations; weights with the scales that our recipe gives them."""
    weights = {id(inner) for quantizer in weight_quantizers(model) for inner in quantizer.modules()}
    others = [
        module
        for module in model.modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled and id(module) not in weights
    ]
    for quantizer in others:  # or ModelOpt would load their calibrators once more
        quantizer.disable()
    calibrate_weights(model, "mse", remember=False)
    for quantizer in others:
        quantizer.enable()
    return model


def modelopt(method: str) -> Callable[[Setting], nn.Module]:
    """One of ModelOpt's own algorithms, on weights and activations as shipped."""

    def make(setting: Setting) -> nn.Module:
        return setting.quantize(setting.rules(lambda layer: _STATIC), {"method": method})

    return make


def nvidia(
    prompts: int, *, smoothquant: bool = False, keeps: Callable[[str, nn.Module], bool] | None = None
) -> Callable[[Setting], nn.Module]:
    """NVIDIA's diffusers example: convolutions by :class:`MinOverSteps`, linear layers by the largest magnitude.

    Args:
        prompts: That it calibrates with, by which the ranges differ; as many trajectories as ours all the same.
        smoothquant: Linear layers by ModelOpt's SmoothQuant, which is for INT8 alone.
        keeps: Layers that stay in high precision.
    """

    def make(setting: Setting) -> nn.Module:
        names = {id(layer): name for name, layer in setting.layers.items()}

        def inputs(layer: nn.Module) -> dict[str, Any] | None:
            if keeps is not None and keeps(names[id(layer)], layer):
                return None
            if is_linear(layer):
                return _STATIC
            factor = prompts / _PROMPTS_PER_BATCH / _STEPS
            fields = {"num_bits": setting.bits.activations, "axis": None, "steps": setting.steps, "factor": factor}
            return {**_STATIC, "calibrator": (MinOverSteps, (), fields)}

        if smoothquant:  # it calibrates the weights that it made; at 8 bits ours are calibrated in the same way
            return setting.quantize(setting.rules(inputs), {"method": "smoothquant", "alpha": _SMOOTHQUANT_ALPHA})
        return _with_our_weights(setting.quantize(setting.rules(inputs), {"method": "max"}))

    return make


def dynamic(attributes: dict[str, Any], convolutions: bool) -> Callable[[Setting], nn.Module]:
    """Linear layers with scales that each call measures.

    Args:
        attributes: :data:`PER_TENSOR` or :data:`PER_TOKEN`.
        convolutions: Whether they have static scales (the largest magnitude); if not, they stay in high precision.
    """

    def make(setting: Setting) -> nn.Module:
        def inputs(layer: nn.Module) -> dict[str, Any] | None:
            if is_linear(layer):
                return attributes
            return _STATIC if convolutions else None

        return _with_our_weights(setting.quantize(setting.rules(inputs), {"method": "max"}))

    return make


def pruna(setting: Setting) -> nn.Module:
    """Pruna's time-aware quantization: of each calibrated time the largest magnitude; the nearest time's is used."""
    rules = setting.rules(lambda layer: _STATIC if is_linear(layer) else None)
    config = setting.config(statistic="max", smoothing=0.0, protect_steps=False, correction="none")
    return setting.quantize(rules, config["algorithm"])
