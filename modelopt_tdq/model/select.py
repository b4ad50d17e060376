"""Which quantizers of a model follow time."""

from __future__ import annotations

import fnmatch
from collections import Counter

from modelopt.torch.quantization.nn import QuantModule, SequentialQuantizer, TensorQuantizer
from torch import Tensor, nn

from modelopt_tdq.core.fake_quant import SUPPORTED_BITS
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.kinds import CONVOLUTION, LINEAR, TRANSPOSED_CONVOLUTION

__all__ = [
    "LAYERS",
    "PRODUCTS",
    "activation_quantizers",
    "has_batch",
    "shared_parameters",
    "temporal_names",
    "trailing_dimensions",
    "weight_quantizers",
]

#: Layers whose outputs are products of their weights with what they read at one place.
PRODUCTS: tuple[type[nn.Module], ...] = (*LINEAR.classes, *CONVOLUTION.classes)

#: Layers whose weights the presets can quantize.
LAYERS: tuple[type[nn.Module], ...] = (*PRODUCTS, *TRANSPOSED_CONVOLUTION.classes)


def trailing_dimensions(layer: nn.Module) -> int:
    """Dimensions of its input and output behind that of the channels: of a convolution, those of its kernel."""
    return len(getattr(layer, "kernel_size", ()))


def has_batch(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer's input has a first dimension that can grow: not a single vector, nor a single image."""
    return x.dim() > 1 + trailing_dimensions(layer)


def shared_parameters(model: nn.Module) -> set[int]:
    """The ``id`` of each parameter that several modules have: what suits one of them need not suit the others."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {parameter for parameter, modules in owners.items() if modules > 1}


def weight_quantizers(model: nn.Module) -> list[nn.Module]:
    """ModelOpt's weight quantizers, plain or sequential."""
    return [
        quantizer
        for module in model.modules()
        if isinstance(module, QuantModule)
        for _, quantizer in module.iter_weights_for_calibration()
    ]


def activation_quantizers(model: nn.Module) -> tuple[dict[str, TensorQuantizer], list[TensorQuantizer]]:
    """Enabled per-tensor activation quantizers, and those of other kinds that ModelOpt calibrates itself."""
    weights = {id(quantizer) for quantizer in weight_quantizers(model)}
    per_tensor, others = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, TensorQuantizer) or not module.is_enabled or id(module) in weights:
            continue
        if getattr(module, "_is_output_correction", False):
            continue  # it quantizes nothing
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, SequentialQuantizer) and id(parent) in weights:
            continue
        plain = module.axis is None and module.block_sizes is None and not module._dynamic
        if not plain or isinstance(parent, SequentialQuantizer) or module._use_constant_amax:
            others.append(module)
            continue
        if module.num_bits not in SUPPORTED_BITS:
            raise TdqError(
                "num_bits", module.num_bits, f"not supported for activations ({name})", f"Use one of {SUPPORTED_BITS}"
            )
        if module.unsigned:
            raise TdqError(
                "unsigned", True, f"time-dependent scales have signed codes ({name})", 'Use `"asymmetric"` instead'
            )
        per_tensor[name] = module
    if not per_tensor:
        raise TdqError(
            "quant_cfg",
            type(model).__name__,
            "it enables no per-tensor activation quantizer of this model",
            "Enable some, e.g. {'quantizer_name': '*input_quantizer', 'cfg': {'num_bits': 8, 'axis': None}}",
        )
    return per_tensor, others


def temporal_names(patterns: list[str], names: list[str]) -> set[str]:
    """Those of ``names`` that some glob of ``patterns`` matches.

    Raises:
        TdqError: A pattern matches none of them.
    """
    matched: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise TdqError(
                "temporal", pattern, "matches no enabled activation quantizer", f"There are, for example, {names[:5]}"
            )
        matched.update(found)
    return matched
