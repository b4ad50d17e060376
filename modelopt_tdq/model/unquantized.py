"""Layers that the config of a model means to quantize, and that are not quantized: which, and why."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelopt.torch.opt.conversion import ModeloptStateManager
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, SequentialQuantizer, TensorQuantizer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from modelopt_tdq.errors import TdqWarning
from modelopt_tdq.model.select import LAYERS

__all__ = [
    "deciding_rules",
    "folded_weights",
    "forget_left_out",
    "leave_out",
    "unquantized_layers",
    "warn_of_unquantized_layers",
]

#: Attribute of the quantizers of a layer that calibration has left out: why; saved with ModelOpt's state.
_LEFT_OUT = "_left_out"

_SUFFIXES = ("weight_quantizer", "input_quantizer")

#: Layers in a warning.
_SHOWN = 10

_NEVER_RAN = "never ran in forward_loop"


def leave_out(model: nn.Module, names: Sequence[str]) -> None:
    """Disable the quantizers of layers that did not run in calibration: nothing is known of their inputs.

    Args:
        model: The root.
        names: Of activation quantizers that have seen nothing.
    """
    for name in names:
        layer_name = name.rpartition(".")[0]
        layer: Any = model.get_submodule(layer_name)
        reason = _wrapped(model, layer_name) or _NEVER_RAN
        _leave_out(model.get_submodule(name), reason)
        weights = getattr(layer, "weight_quantizer", None)
        activations = [m for m in layer.children() if isinstance(m, TensorQuantizer) and m is not weights]
        # neither has its weight anything to be quantized for
        others = any(quantizer.is_enabled for quantizer in activations)
        if isinstance(weights, (TensorQuantizer, SequentialQuantizer)) and weights.is_enabled and not others:
            _leave_out(weights, reason)


def _leave_out(quantizer: Any, reason: str) -> None:
    quantizer.disable()
    setattr(quantizer, _LEFT_OUT, reason)


def forget_left_out(model: nn.Module) -> None:
    """A new calibration begins."""
    for module in model.modules():
        vars(module).pop(_LEFT_OUT, None)


def _wrapper(model: nn.Module, name: str) -> tuple[str, nn.Module] | None:
    """The layer of another library, such as peft, that a layer is a part of."""
    while name:
        name = name.rpartition(".")[0]
        if isinstance(getattr(model.get_submodule(name), "base_layer", None), nn.Module):
            return name, model.get_submodule(name)
    return None


def _wrapped(model: nn.Module, name: str) -> str | None:
    found = _wrapper(model, name)
    if found is None:
        return None
    return (
        f"{_full(_own_class(found[1]))} computes with the weights of the layer without running it: quantize first, "
        "then load adapters; or fuse them into the weights and unload them before"
    )


@dataclass(frozen=True)
class _Rule:
    """One entry of a ``quant_cfg``."""

    pattern: str
    parent: str | None
    enables: bool

    def holds(self, name: str, layer: nn.Module, loosely: bool) -> bool:
        """Whether it is about a quantizer; ``loosely``: also of a class that is derived from the one it names."""
        if not fnmatch.fnmatch(name, self.pattern):
            return False
        if self.parent is None:
            return True
        if loosely and isinstance(layer, _torch_class(self.parent) or ()):
            return True
        kind = QuantModuleRegistry.get(self.parent)
        return kind is not None and isinstance(layer, kind)


def _torch_class(key: str) -> type[nn.Module] | None:
    """``nn.Linear`` -> ``torch.nn.Linear``."""
    found = getattr(nn, key.removeprefix("nn."), None) if key.startswith("nn.") else None
    return found if isinstance(found, type) else None


def _rules(model: nn.Module) -> list[_Rule]:
    """Those that the quantizers of ``model`` were made by; none if that is not known."""
    if not hasattr(model, ModeloptStateManager._state_key):
        return []
    for mode, state in ModeloptStateManager(model).state_dict():
        if mode == "quantize":
            entries: list[Mapping[str, Any]] = state["config"].get("quant_cfg", [])
            return [_Rule(e["quantizer_name"], e.get("parent_class"), bool(e["enable"])) for e in entries]
    return []


def deciding_rules(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, bool] | None] | None:
    """The last rule of the model's config that is about each quantizer: its pattern, and whether it enables.

    Args:
        model: The root.
        names: Of quantizers, of layers that are there.

    Returns:
        By name, None where no rule is; None if the rules that made the quantizers are not known.
    """
    rules = _rules(model)
    if not _are_current(rules, model):
        return None
    found: dict[str, tuple[str, bool] | None] = {}
    for name in names:
        rule = _deciding(rules, name, model.get_submodule(name.rpartition(".")[0]))
        found[name] = None if rule is None else (rule.pattern, rule.enables)
    return found


def _deciding(rules: list[_Rule], name: str, layer: nn.Module, loosely: bool = False) -> _Rule | None:
    return next((rule for rule in reversed(rules) if rule.holds(name, layer, loosely)), None)


def _is_meant(rules: list[_Rule], name: str, layer: nn.Module, loosely: bool = False) -> bool:
    rule = _deciding(rules, name, layer, loosely)
    return rule is not None and rule.enables


def _are_current(rules: list[_Rule], model: nn.Module) -> bool:
    """Whether no later call of ``mtq.quantize`` had others, which ModelOpt does not keep."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and name.rpartition(".")[2] in _SUFFIXES:
            meant = _is_meant(rules, name, model.get_submodule(name.rpartition(".")[0]))
            if module.is_enabled and not meant:
                return False
    return bool(rules)


def _by_class(model: nn.Module, rules: list[_Rule]) -> Iterator[tuple[str, str]]:
    """Layers without quantizers, or whose quantizers no rule finds because of their class."""
    for name, layer in model.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        quantizers = [f"{name}.{suffix}" for suffix in _SUFFIXES]
        if not any(_is_meant(rules, quantizer, layer, loosely=True) for quantizer in quantizers):
            continue
        kind = type(layer)
        if isinstance(layer, NonDynamicallyQuantizableLinear):
            yield name, "torch.nn.MultiheadAttention computes with its weights without running it"
            continue
        if not isinstance(layer, QuantModule):
            known = kind in QuantModuleRegistry
            yield name, "added after quantization" if known else f"ModelOpt does not quantize its class {_full(kind)}"
            continue
        found = any(_is_meant(rules, quantizer, layer) for quantizer in quantizers)
        if not found and not any(m.is_enabled for m in layer.children() if isinstance(m, TensorQuantizer)):
            own = _full(_own_class(layer))
            yield name, f"its class {own} is not what the rule's parent_class names: add a rule of its own"


def _own_class(module: nn.Module) -> type:
    """Before ModelOpt converted it."""
    return module.original_cls if isinstance(module, QuantModule) else type(module)


def _full(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def _unmatched(model: nn.Module, rules: list[_Rule]) -> Iterator[str]:
    """Patterns of names that match no quantizer."""
    names = {name: name.rpartition(".")[0] for name, m in model.named_modules() if isinstance(m, TensorQuantizer)}
    for rule in rules:
        specific = re.sub(r"\w*quantizers?|[*?.\[\]]", "", rule.pattern)
        if specific and rule.enables and not any(fnmatch.fnmatch(name, rule.pattern) for name in names):
            yield rule.pattern


def unquantized_layers(model: nn.Module) -> dict[str, str]:
    """The layers that ``model`` was meant to quantize and that compute in floating point, each with the reason."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if _LEFT_OUT in vars(module):
            layer = name.rpartition(".")[0]
            wrapper = _wrapper(model, layer)
            if wrapper is not None and vars(module)[_LEFT_OUT] != _NEVER_RAN:
                layer = wrapper[0]  # once, and not for each of its parts
            found[layer] = vars(module)[_LEFT_OUT]
    rules = _rules(model)
    if _are_current(rules, model):
        for name, reason in _by_class(model, rules):
            found.setdefault(name, reason)
    return found


def folded_weights(model: nn.Module) -> list[str]:
    """The layers whose weights are rounded for good (``mtq.fold_weight``) or stored compressed, as far as is known."""
    found, rules = [], _rules(model)
    for name, layer in model.named_modules():
        quantizer: Any = layer._modules.get("weight_quantizer")
        if not isinstance(layer, QuantModule) or quantizer is None:
            continue
        meant = _is_meant(rules, f"{name}.weight_quantizer", layer) and _LEFT_OUT not in vars(quantizer)
        gone = not quantizer.is_enabled and not _only_disabled(layer)
        if (meant and gone) or (quantizer.is_enabled and not quantizer.fake_quant):
            found.append(name)
    return found


def _only_disabled(layer: nn.Module) -> bool:
    """Whether both quantizers of a layer are off, with a scale left for the weight: so are those of temporal layers."""
    quantizers = [layer._modules.get(suffix) for suffix in _SUFFIXES]
    on = [bool(getattr(quantizer, "is_enabled", False)) for quantizer in quantizers]
    return not any(on) and getattr(quantizers[0], "_amax", None) is not None


def warn_of_unquantized_layers(model: nn.Module, stacklevel: int = 3) -> None:
    """One warning at the end of a calibration that names :func:`unquantized_layers`, and rules that match nothing."""
    found = unquantized_layers(model)
    rules = _rules(model)
    patterns = list(_unmatched(model, rules)) if _are_current(rules, model) else []
    if not found and not patterns:
        return
    by_reason: dict[str, list[str]] = {}
    for name, reason in found.items():
        by_reason.setdefault(reason, []).append(name)
    left, parts = _SHOWN, []
    for reason, names in by_reason.items():
        shown, left = names[:left], max(0, left - len(names))
        more = [f"{len(names) - len(shown)} more"] if len(shown) < len(names) else []
        parts.append(f"{', '.join(shown + more)} ({reason})")
    texts = [f"{len(found)} layers that the config quantizes stay unquantized: {'; '.join(parts)}"] if found else []
    if patterns:
        texts.append(f"rules for quantizers that the model does not have: {', '.join(patterns)}")
    warnings.warn(". ".join(texts), TdqWarning, stacklevel=stacklevel)
