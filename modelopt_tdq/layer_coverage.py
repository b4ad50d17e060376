"""How much of a model is quantized: of its multiply-adds and of its weights; and what is not, with the reason."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.high_precision import MODULATION, ROLES
from modelopt_tdq.model.kinds import ATTENTION_PRODUCT, BACKENDS, KINDS, Kind, kind_of, number_format, title
from modelopt_tdq.model.multiply_adds import counted_multiply_adds, multiply_adds
from modelopt_tdq.model.unquantized import deciding_rules, folded_weights, unquantized_layers
from modelopt_tdq.model.wrapped import eager, unwrapped
from modelopt_tdq.temporal_features.runtime import idle_layers

__all__ = ["Coverage", "Part", "coverage"]

#: Names of a group in the text; :attr:`Coverage.parts` has all.
_SHOWN = 3

#: What holds weights and is no layer that multiplies by them.
_OTHER = "biases, norms and other parameters"

_REST = "products of a module's own"

#: Both operands of both products of attention.
_OPERANDS = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer")


@dataclass(frozen=True)
class Part:
    """A layer, the attention products of a module, or what else multiplies or has weights.

    Attributes:
        name: Of the module; empty for the root.
        kind: ``linear layer``, ``convolution``, ``attention product`` ...
        role: Why the presets treat it apart: ``modulation``, ``embedder``, ``first layer`` ...; empty otherwise.
        number_format: ``int8`` (of 8 bits and fewer) or ``fp8`` if its products have codes on both sides; else empty.
        quantized_weights: Whether its weights are rounded to a number format.
        reason: Why its products compute in floating point; empty where they do not.
        multiply_adds: Of one sample, or of the call that was given; None where no call was counted.
        weight_bytes: In full precision.
    """

    name: str
    kind: str
    role: str
    number_format: str
    quantized_weights: bool
    reason: str
    multiply_adds: int | None
    weight_bytes: int

    @property
    def quantized(self) -> bool:
        """Whether its products have codes on both sides."""
        return bool(self.number_format)


@dataclass(frozen=True)
class Coverage:
    """What :func:`coverage` gives; as text, a summary.

    Attributes:
        parts: All of the model's multiply-adds and parameters, each once.
        rules: ``quant_cfg`` rules that store what the presets leave out as modulation in few bits, without quantizing
            what these layers read: to be appended to those of the config. Empty where there is nothing.
    """

    parts: tuple[Part, ...]
    rules: tuple[Mapping[str, Any], ...] = ()

    @property
    def multiply_adds(self) -> int | None:
        """Of one sample, or of the call that was given; None where none was counted."""
        counted = [part.multiply_adds for part in self.parts if part.multiply_adds is not None]
        return sum(counted) if counted else None

    @property
    def weight_bytes(self) -> int:
        """Of all parameters, in full precision."""
        return sum(part.weight_bytes for part in self.parts)

    @property
    def quantized_multiply_adds(self) -> float | None:
        """The share of products with codes on both sides; None where no call was counted."""
        return self._share(self.parts, [part.quantized for part in self.parts])

    @property
    def quantized_weights(self) -> float:
        """The share of the bytes of weights that are rounded to a number format."""
        return sum(part.weight_bytes for part in self.parts if part.quantized_weights) / max(self.weight_bytes, 1)

    def in_low_precision(self, backend: str) -> float | None:
        """The share of the multiply-adds that a backend has low-precision kernels for; None where no call was counted.

        Args:
            backend: ``onnxruntime``, ``openvino``, ``tensorrt_rtx`` or ``tensorrt``.

        Raises:
            TdqError: There is no such backend.
        """
        if backend not in BACKENDS:
            raise TdqError("backend", backend, "not a known backend", f"Use one of {', '.join(BACKENDS)}")
        kinds = {kind.name: kind for kind in KINDS}
        able = [
            part.quantized and kinds[part.kind].runs_in_low_precision(backend, part.number_format)
            for part in self.parts
        ]
        return self._share(self.parts, able)

    def _share(self, parts: Sequence[Part], chosen: Iterable[bool]) -> float | None:
        total = self.multiply_adds
        if total is None:
            return None
        return sum(part.multiply_adds or 0 for part, this in zip(parts, chosen, strict=True) if this) / max(total, 1)

    def __str__(self) -> str:
        lines = [self.headline]
        if self.multiply_adds is not None:
            shares = ", ".join(f"{title(b)} {_percent(self.in_low_precision(b))}" for b in BACKENDS)
            lines.append(f"Multiply-adds that have a low-precision kernel: {shares}.")
            lines += _limits(self.parts)
        lines += [f"  {line}" for line in _left_out(self)]
        if self.rules:
            lines.append(
                f"The weights of the {MODULATION} layers can be stored in few bits; append to config['quant_cfg']:"
            )
            lines += [f"    {dict(rule)!r}," for rule in self.rules]
            lines.append(
                "or, where they depend on the time alone, or on it and a finite set of classes, use "
                'method="tdq_temporal".'
            )
        return "\n".join(lines)

    @property
    def headline(self) -> str:
        """The two shares, in a sentence."""
        weights = f"{_percent(self.quantized_weights)} of {_amount(self.weight_bytes, 'B')} of weights"
        if self.multiply_adds is None:
            return f"Quantized: {weights} (no call was counted: pass sample_inputs for the multiply-adds)."
        counted = _amount(self.multiply_adds, "")
        return f"Quantized: {_percent(self.quantized_multiply_adds)} of {counted} multiply-adds, {weights}."


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.1f} %"


def _amount(number: int, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number} {unit}".strip()


def _limits(parts: Sequence[Part]) -> list[str]:
    """What is quantized and runs in floating point on some backend."""
    found = {(part.kind, part.number_format) for part in parts if part.quantized}
    limits: dict[tuple[str, str], None] = {}
    for kind in KINDS:
        for name, number_format_ in found:
            if kind.name == name:
                limits.update(dict.fromkeys(kind.missing.get(number_format_, {}).items()))
    return [f"  {title(backend)} {what}." for backend, what in limits]


def _left_out(found: Coverage) -> list[str]:
    """One line per group of parts that are not, or not entirely, quantized; the largest first."""
    groups: dict[tuple[str, str, str], list[Part]] = {}
    for part in found.parts:
        if not part.quantized:
            groups.setdefault((part.role, part.kind, part.reason), []).append(part)
    total, weights = found.multiply_adds, max(found.weight_bytes, 1)
    lines = []
    for (role, kind, reason), parts in sorted(groups.items(), key=lambda item: -sum(p.weight_bytes for p in item[1])):
        shares = []
        if total and (counted := sum(part.multiply_adds or 0 for part in parts)):
            shares.append(f"{_percent(counted / total)} of the multiply-adds")
        if stored := sum(part.weight_bytes for part in parts):
            shares.append(f"{_percent(stored / weights)} of the weights")
        if not shares:
            shares.append("not counted")
        names = [part.name or "the model itself" for part in parts[:_SHOWN]]
        more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
        label = f"{role}, {kind}" if role else kind
        lines.append(f"{label}: {', '.join(shares)}: {reason} ({', '.join(names)}{more})")
    return lines


def coverage(model: nn.Module, sample_inputs: Mapping[str, Any] | None = None) -> Coverage:
    """The shares of a model's multiply-adds and weights that are quantized; and what is not, with the reason.

    Args:
        model: Quantized by ``mtq.quantize``. What its calibration of this package counted is used, the multiply-adds
            of one sample.
        sample_inputs: Arguments of one call, by name, to count the multiply-adds of that call instead: after another
            algorithm, or of a restored model. The model is called once.

    Raises:
        TdqError: The model has no quantizers.
    """
    model = unwrapped(model)
    if not any(isinstance(module, QuantModule) for module in model.modules()):
        raise TdqError("model", type(model).__name__, "it is not quantized", "Call mtq.quantize on it first")
    counts = multiply_adds(model)
    if sample_inputs is not None:
        with torch.no_grad(), eager(), counted_multiply_adds(model) as counts:
            model(**sample_inputs)
    reasons = _Reasons(model)
    parts = [*_layers(model, counts, reasons), *_other_products(model, counts, reasons), *_other_parameters(model)]
    return Coverage(tuple(parts), _weight_rules(model, parts))


class _Reasons:
    """Why layers compute in floating point."""

    def __init__(self, model: nn.Module) -> None:
        self.idle = set(idle_layers(model))
        self.folded = set(folded_weights(model))
        self._missing = unquantized_layers(model)
        self._rules = deciding_rules(model, [f"{n}.weight_quantizer" for n, m in model.named_modules() if kind_of(m)])

    def of_layer(self, name: str, kind: Kind, weights_too: bool) -> str:
        """Of a layer without a quantized input; ``weights_too``: nor weights."""
        if name in self.idle:
            return "looked up by time (tdq_temporal)"
        if name in self._missing:
            return self._missing[name]
        if not weights_too:
            return "its weights alone are quantized"
        rule = None if self._rules is None else self._rules.get(f"{name}.weight_quantizer")
        if rule is None or rule == ("*", False):
            return kind.why_not or "no rule quantizes it"
        pattern, enables = rule
        if enables:
            return "switched off after quantization"
        known = any(pattern in patterns for patterns in ROLES.values())
        return "the presets leave it out" if known else f"left out by the rule {pattern!r}"


def _role(name: str) -> str:
    quantizer = f"{name}.weight_quantizer"
    matching = (role for role, globs in ROLES.items() if any(fnmatch.fnmatchcase(quantizer, glob) for glob in globs))
    return next(matching, "")


def _on(quantizer: Any) -> bool:
    return isinstance(quantizer, nn.Module) and bool(getattr(quantizer, "is_enabled", False))


def _format(quantizer: Any) -> str:
    return number_format(quantizer.num_bits) if isinstance(quantizer, TensorQuantizer) else "several"


def _bytes(parameter: Any, seen: set[int]) -> int:
    """Of a parameter that no part has counted yet."""
    if not isinstance(parameter, torch.Tensor) or id(parameter) in seen:
        return 0
    seen.add(id(parameter))
    return parameter.numel() * parameter.element_size()


def _layers(model: nn.Module, counts: Mapping[str, int] | None, reasons: _Reasons) -> list[Part]:
    parts, seen = [], set[int]()
    for name, layer in model.named_modules():
        kind = kind_of(layer)
        if kind is None:
            continue
        weight = _bytes(layer._parameters.get("weight"), seen)
        idle = name in reasons.idle
        weights = (_on(layer._modules.get("weight_quantizer")) or name in reasons.folded) and not idle
        inputs = _on(layer._modules.get("input_quantizer")) and not idle
        quantized = weights and inputs
        parts.append(
            Part(
                name,
                kind.name,
                _role(name),
                _format(layer.input_quantizer) if quantized else "",
                weights,
                "" if quantized else reasons.of_layer(name, kind, not weights),
                None if counts is None else counts.get(name, 0),
                weight,
            )
        )
    return parts


def _other_products(model: nn.Module, counts: Mapping[str, int] | None, reasons: _Reasons) -> list[Part]:
    """Of attention, and whatever else modules multiply themselves."""
    parts = []
    for name, module in model.named_modules():
        if kind_of(module) is not None:
            continue
        operands = [module._modules.get(operand) for operand in _OPERANDS]
        number = 0 if counts is None else counts.get(name, 0)
        attention = any(operand is not None for operand in operands)
        if not number and not (attention and counts is None):
            continue
        quantized = all(_on(operand) for operand in operands)
        parts.append(
            Part(
                name,
                ATTENTION_PRODUCT.name if attention else _REST,
                "",
                _format(operands[0]) if quantized else "",
                False,
                "" if quantized else ATTENTION_PRODUCT.why_not if attention else "no quantizer takes their operands",
                None if counts is None else number,
                0,
            )
        )
    return parts


def _other_parameters(model: nn.Module) -> list[Part]:
    seen = {id(m._parameters.get("weight")) for m in model.modules() if kind_of(m) is not None}
    quantizers = {id(p) for m in model.modules() if isinstance(m, TensorQuantizer) for p in m.parameters()}
    parts = []
    for name, module in model.named_modules():
        size = sum(_bytes(p, seen) for p in module._parameters.values() if id(p) not in quantizers)
        if size:
            parts.append(Part(name, _OTHER, "", "", False, "no product's weights", None, size))
    return parts


def _weight_rules(model: nn.Module, parts: Sequence[Part]) -> tuple[Mapping[str, Any], ...]:
    """For the weights of modulation layers that are not quantized."""
    left = [p for p in parts if p.role == MODULATION and not p.quantized_weights and p.reason.startswith("the presets")]
    if not left:
        return ()
    formats = {part.number_format for part in parts if part.quantized}
    bits: Any = (4, 3) if formats == {"fp8"} else 8
    rules = []
    for glob in ROLES[MODULATION]:
        pattern = f"{glob.removesuffix('*')}*weight_quantizer"
        found = [part for part in left if fnmatch.fnmatchcase(f"{part.name}.weight_quantizer", pattern)]
        for kind in KINDS:
            for parent, axis in kind.rules.items():
                layers = {part: model.get_submodule(part.name) for part in found if part.kind == kind.name}
                own = [part for part, layer in layers.items() if isinstance(layer, _class(parent))]
                if own:
                    cfg = {"num_bits": bits, "axis": axis}
                    rules.append({"quantizer_name": pattern, "parent_class": parent, "cfg": cfg})
                    left = [part for part in left if part not in own]
    return tuple(rules)


def _class(parent: str) -> type[nn.Module]:
    found: type[nn.Module] = getattr(nn, parent.removeprefix("nn."))
    return found
