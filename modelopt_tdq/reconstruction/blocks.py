"""The blocks of a model, found from its module tree.

A block is the smallest repeated unit around quantized layers: a child of a ``ModuleList``, ``Sequential`` or
``ModuleDict`` whose children are all of one class, with two quantized layers or more, and without another such unit
inside. So: residual blocks, transformer blocks, attention blocks. Layers outside of any are gathered in the smallest
module around two or more of them whose class occurs more than once; the others are blocks of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from modelopt.torch.quantization.nn import QuantModule, SequentialQuantizer, TensorQuantizer
from torch import nn

from modelopt_tdq.training.quantizer import LearnedQuantizer

__all__ = ["Block", "find_blocks"]

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_QUANTIZERS = (TensorQuantizer, SequentialQuantizer)


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        name: As in ``model.named_modules()``.
        layers: Names of its quantized layers, and of modules whose own activations are quantized.
    """

    name: str
    layers: tuple[str, ...]

    def quantizers(self, model: nn.Module) -> dict[str, LearnedQuantizer]:
        """The activation quantizers of its layers, by name."""
        found = {}
        for layer in self.layers:
            for name, child in model.get_submodule(layer).named_children():
                if isinstance(child, LearnedQuantizer) and child.is_enabled:
                    found[f"{layer}.{name}"] = child
        return found

    def weights(self, model: nn.Module) -> dict[str, tuple[nn.Parameter, TensorQuantizer]]:
        """The weights of its layers that have a single enabled quantizer, by its name."""
        found = {}
        for layer in self.layers:
            module = model.get_submodule(layer)
            if not isinstance(module, QuantModule):
                continue
            names = {id(child): name for name, child in module.named_children()}
            for weight, quantizer in module.iter_weights_for_calibration():
                single = isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled
                if single and isinstance(weight, nn.Parameter) and id(quantizer) in names:
                    found[f"{layer}.{names[id(quantizer)]}"] = (weight, quantizer)
        return found


def _quantized(module: nn.Module) -> bool:
    """Whether the module itself has an enabled quantizer."""
    if isinstance(module, _QUANTIZERS):
        return False
    return any(
        isinstance(leaf, TensorQuantizer) and leaf.is_enabled
        for child in module.children()
        if isinstance(child, _QUANTIZERS)
        for leaf in child.modules()
    )


def _within(name: str, ancestor: str) -> bool:
    return name == ancestor or name.startswith(f"{ancestor}.") or not ancestor


def _inside(layers: Iterable[str], ancestor: str) -> list[str]:
    return [layer for layer in layers if _within(layer, ancestor)]


def _ancestors(name: str) -> list[str]:
    """Of a module, innermost first; without itself and the root."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _repeated_units(model: nn.Module, layers: list[str]) -> list[str]:
    units = []
    for name, module in model.named_modules():
        if not isinstance(module, _CONTAINERS):
            continue
        children = {f"{name}.{k}" if name else k: child for k, child in module.named_children()}
        inside = {child: _inside(layers, child) for child in children}
        if len({type(children[child]) for child, found in inside.items() if found}) == 1:
            units += [child for child, found in inside.items() if len(found) > 1]
    return [u for u in units if not any(other != u and _within(other, u) for other in units)]


def _gathered(model: nn.Module, left: list[str], taken: list[str]) -> dict[str, str]:
    """A block for each layer outside of the repeated units."""
    modules = dict(model.named_modules())
    classes = Counter(type(module) for module in modules.values())
    homes = {}
    for layer in left:
        homes[layer] = layer
        for ancestor in _ancestors(layer):
            if _inside(taken, ancestor):
                break
            module = modules[ancestor]
            repeated = classes[type(module)] > 1 and not isinstance(module, _CONTAINERS)
            if ancestor in left or (repeated and len(_inside(left, ancestor)) > 1):
                homes[layer] = ancestor
                break
    # a module that quantizes activations of its own takes in the layers inside it
    for layer, home in list(homes.items()):
        homes[layer] = homes.get(home, home)
    return homes


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks that together hold every quantized layer of ``model`` once, in the order of its modules."""
    layers = [name for name, module in model.named_modules() if name and _quantized(module)]
    homes: dict[str, str] = {}
    for unit in _repeated_units(model, layers):
        homes.update(dict.fromkeys(_inside(layers, unit), unit))
    homes.update(_gathered(model, [n for n in layers if n not in homes], list(homes)))
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        blocks.setdefault(homes[layer], []).append(layer)
    return [Block(name, tuple(inside)) for name, inside in blocks.items()]
