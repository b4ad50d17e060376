"""A copy of the model in which every enabled quantizer is a marker, one node of the exported graph.

The graph that torch exports then has standard operators only, except for ``tdq::FakeQuantize`` where an
activation is quantized, ``tdq::QuantizedWeight`` where a weight is, ``tdq::LayerCorrection`` where a layer's output is
corrected, and ``tdq::TemporalFeature`` where it is looked up; the lowerings replace those.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.plugins.custom import _QuantFunctionalMixin
from torch import _VF, Tensor, nn
from torch.nn import functional

from modelopt_tdq.export.read import weight_quantizers
from modelopt_tdq.model.call import layer_input
from modelopt_tdq.model.output_correction import OutputCorrection
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.timestep import without_delivery
from modelopt_tdq.model.weight_fit import require_own_weight
from modelopt_tdq.temporal_features.looked_up import LookedUp, output_dtype, own_output

__all__ = [
    "ACTIVATION_MARKER",
    "CORRECTION_MARKER",
    "DOMAIN",
    "FEATURE_MARKER",
    "WEIGHT_MARKER",
    "Marker",
    "with_markers",
    "without_markers",
]

DOMAIN = "tdq"
ACTIVATION_MARKER = "FakeQuantize"
WEIGHT_MARKER = "QuantizedWeight"
CORRECTION_MARKER = "LayerCorrection"
FEATURE_MARKER = "TemporalFeature"


#: Buffer of a quantizer with ``channel_divisor``: the same, as the floats that the exporter knows.
_DIVISOR = "_marker_divisor"

#: Buffers that markers compute with.
_COMPUTED_WITH = (_DIVISOR, "_pre_quant_scale")


class Marker:
    """Put in front of the class of a quantizer, turns what it computes into one node.

    The quantizer keeps its attributes, which some of ModelOpt's layers look at. Outside of an export it
    passes its input on and remembers the shapes.
    """

    marker_name: str
    marker_type: str
    marker_weight: Tensor  # that the codes are made from, where a weight is quantized
    shapes: list[tuple[int, ...]]

    def forward(self, x: Tensor) -> Tensor:
        """The marker node, with the shape and dtype of the input.

        ModelOpt's ``pre_quant_scale`` is in front of it. The division by ``channel_divisor`` is part of what it stands
        for.
        """
        if self.marker_type == ACTIVATION_MARKER:
            x = _scaled(self, x)
        if not torch.compiler.is_exporting():
            self.shapes.append(tuple(x.shape))
            if self.marker_type == WEIGHT_MARKER:
                require_own_weight(self.marker_name, x, self.marker_weight)
            return _divided(self, x)
        marked: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.marker_type}",
            (x,),
            {"quantizer": self.marker_name},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return marked


class _FeatureMarker(Marker):
    """Likewise for a layer that looks its output up. The node takes the layer's own output where it still matters.

    Otherwise it takes the layer's input, which says where in the graph the node is, and the layer does not run.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The marker node, with the shape and dtype of the layer's output."""
        layer: Any = self
        inputs = layer_input(args, kwargs)
        if layer._tdq_features.outside == "exact":
            source = output = own_output(layer, args, kwargs)
        else:
            row_shape = layer._tdq_features.rows(layer._tdq_what).data.shape[1:]
            source, shape = inputs, (inputs.shape[0], *row_shape)
            output = inputs.new_zeros(shape, dtype=output_dtype(layer, inputs))
        if not torch.compiler.is_exporting():
            self.shapes.append(tuple(output.shape))
            return output
        marked: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{FEATURE_MARKER}",
            (source,),
            {"feature": self.marker_name},
            dtype=output.dtype,
            shape=output.shape,
            version=1,
        )
        return marked


class _Disabled:
    """Likewise: what is left of a disabled quantizer."""

    def forward(self, x: Tensor) -> Tensor:
        return _divided(self, _scaled(self, x))


def _scaled(quantizer: Any, x: Tensor) -> Tensor:
    scale: Tensor | None = getattr(quantizer, "pre_quant_scale", None)
    return x if scale is None else x * scale


def _divided(quantizer: Any, x: Tensor) -> Tensor:
    divisor: Tensor | None = quantizer._buffers.get(_DIVISOR)
    return x if divisor is None else (x.to(torch.float32) / divisor).to(x.dtype)


def _hide_state(quantizer: TensorQuantizer) -> None:
    """Make buffers and parameters that a marker does not compute with plain attributes.

    Torch traces a model with all of its buffers as inputs, and there are more of quantizers than of weights.
    """
    for tensors in (quantizer._buffers, quantizer._parameters):
        for name in [name for name in tensors if name not in _COMPUTED_WITH]:
            object.__setattr__(quantizer, name, tensors.pop(name))


@contextmanager
def without_markers(model: nn.Module) -> Iterator[None]:
    """A model of :func:`with_markers` in full precision meanwhile: its quantizers pass their inputs on."""
    quantizers = [m for m in model.modules() if isinstance(m, Marker) and isinstance(m, TensorQuantizer)]
    kinds = [type(quantizer) for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.__class__ = type(_Disabled.__name__, (_Disabled, type(quantizer).__bases__[1]), {})
    try:
        yield
    finally:
        for quantizer, kind in zip(quantizers, kinds, strict=True):
            quantizer.__class__ = kind


def _put_in_front(quantizer: nn.Module, behaviour: type, **attributes: Any) -> None:
    kind = type(quantizer)
    quantizer.__dict__.pop("forward", None)  # of accelerate, which would hide the marker's
    quantizer.__class__ = type(behaviour.__name__, (behaviour, kind), {"__module__": kind.__module__})
    for name, value in attributes.items():
        object.__setattr__(quantizer, name, value)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` of a module that ModelOpt quantized, as two plain products.

    ModelOpt's own (FP8SDPA) is one opaque function, for another exporter.
    """
    query, key, value = module.q_bmm_quantizer(query), module.k_bmm_quantizer(key), module.v_bmm_quantizer(value)
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * factor
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    attended: Tensor = module.bmm2_output_quantizer(torch.matmul(torch.softmax(scores, -1), value))
    return attended


def _export_functionals(self: Any) -> Iterator[tuple[ModuleType, str, Callable[..., Any]]]:
    quantizers = (self.q_bmm_quantizer, self.k_bmm_quantizer, self.v_bmm_quantizer, self.bmm2_output_quantizer)
    for package, name, quantized in super(type(self), self).functionals_to_replace:
        if package is functional and name == "scaled_dot_product_attention":
            if any(quantizer.is_enabled for quantizer in quantizers):
                yield package, name, partial(_attention, self)
        else:
            yield package, name, quantized


def with_markers(model: nn.Module) -> nn.Module:
    """A copy of ``model`` for export: quantizers are markers, attention is plain, nothing delivers the time.

    The copy has the parameters of ``model``, which is what takes the memory; everything else is its own.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    # ModelOpt's recurrent layers hold a Python module, which deepcopy does not take
    prepared = copy.deepcopy(model, {**shared, id(_VF): _VF}).eval()
    without_delivery(prepared)
    weights = weight_quantizers(prepared)
    for name, module in list(prepared.named_modules()):
        if isinstance(module, TemporalQuantizer) and module.channel_divisor is not None:
            module.register_buffer(_DIVISOR, module.channel_divisor.clone())
        if id(module) in weights:
            facts = {"marker_type": WEIGHT_MARKER, "marker_weight": weights[id(module)]}
            _put_in_front(module, Marker, marker_name=name, shapes=[], **facts)
        elif isinstance(module, TensorQuantizer) and module.is_enabled:
            stands_for = CORRECTION_MARKER if isinstance(module, OutputCorrection) else ACTIVATION_MARKER
            _put_in_front(module, Marker, marker_name=name, marker_type=stands_for, shapes=[])
        elif isinstance(module, TensorQuantizer):
            _put_in_front(module, _Disabled)
        elif issubclass(type(module), LookedUp):
            _put_in_front(module, _FeatureMarker, marker_name=name, marker_type=FEATURE_MARKER, shapes=[])
    for module in prepared.modules():
        if isinstance(module, TensorQuantizer):
            _hide_state(module)
        if isinstance(module, _QuantFunctionalMixin) and hasattr(module, "q_bmm_quantizer"):
            kind = type(module)
            plain = {"functionals_to_replace": property(_export_functionals), "__module__": kind.__module__}
            module.__class__ = type(kind.__name__, (kind,), plain)
    return prepared
