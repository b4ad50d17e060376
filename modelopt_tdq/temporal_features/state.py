"""What a model holds between its calls: parameters, buffers, and whatever else its modules keep as attributes.

A call may write all of it. It is looked at before and after calls, and put back.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

__all__ = ["CachedFunctions", "Held", "ModelState", "tensors_inside"]

#: What every module has: hooks, training mode. Its parameters and buffers are looked at.
_COMMON = vars(nn.Module()).keys() - {"_parameters", "_buffers"}

#: Objects inside objects are followed so far.
_DEPTH = 5

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CLOSED = (nn.Module, Tensor, type, FunctionType, MethodType, ModuleType, torch.Generator)


class Held(NamedTuple):
    """One value that a model, or an argument, holds.

    Attributes:
        value: Itself.
        holder: The dictionary or list it is in; None if that cannot be changed.
        key: Of the value there.
        version: Of a tensor: how often it was changed in place.
    """

    value: Any
    holder: Any = None
    key: Any = None
    version: int = 0

    def same(self, other: Held) -> bool:
        """Whether nothing has happened from one look to the next."""
        one, two = self.value, other.value
        if isinstance(one, _PLAIN):
            both_nan = isinstance(one, float) and isinstance(two, float) and math.isnan(one) and math.isnan(two)
            return type(one) is type(two) and (one == two or both_nan)
        return one is two and self.version == other.version


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class _Walk:
    """Everything inside an object, by path; remembers the containers and what was in them."""

    def __init__(self) -> None:
        self.containers: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value: Any, path: str, holder: Any = None, key: Any = None, depth: int = 0) -> Iterator[Any]:
        if isinstance(value, Tensor):
            yield path, Held(value, holder, key, _version(value))
        elif isinstance(value, (*_PLAIN, *_CLOSED)) or depth >= _DEPTH:
            yield path, Held(value, holder, key)
        elif id(value) in self.containers:
            return
        elif isinstance(value, (MutableMapping, MutableSequence, set)):
            self.containers[id(value)] = value, _copied(value)
            yield path, Held(len(value))
            pairs = value.items() if isinstance(value, MutableMapping) else enumerate(value)
            owner = None if isinstance(value, set) else value
            for name, inner in list(pairs):
                yield from self(inner, f"{path}.{name}", owner, name, depth + 1)
        elif isinstance(value, (tuple, frozenset)):
            for index, inner in enumerate(value):
                yield from self(inner, f"{path}.{index}", None, None, depth + 1)
        elif hasattr(value, "__dict__") and not type(value).__module__.startswith("torch"):
            yield path, Held(value, holder, key)
            attributes = vars(value)
            if id(attributes) not in self.containers:
                self.containers[id(attributes)] = attributes, dict(attributes)
                for name, inner in list(attributes.items()):
                    yield from self(inner, f"{path}.{name}", attributes, name, depth + 1)
        else:
            yield path, Held(value, holder, key)

    def restore(self) -> None:
        """Refill the containers that hold something else now; they stay the objects they are."""
        for container, content in self.containers.values():
            if _unchanged(container, content):
                continue  # what nobody changed may be frozen, as diffusers' configs are
            container.clear()
            container.extend(content) if isinstance(container, MutableSequence) else container.update(content)


def _copied(container: Any) -> Any:
    if isinstance(container, MutableMapping):
        return dict(container)
    return list(container) if isinstance(container, MutableSequence) else set(container)


def _unchanged(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    if isinstance(container, MutableMapping):
        return all(k == m and v is w for (k, v), (m, w) in zip(container.items(), content.items(), strict=True))
    if isinstance(container, MutableSequence):
        return all(v is w for v, w in zip(container, content, strict=True))
    return bool(container == content)


def tensors_inside(value: Any) -> list[Tensor]:
    """The tensors in an object of any kind: in containers and attributes of attributes."""
    return [held.value for _, held in _Walk()(value, "") if isinstance(held.value, Tensor)]


class ModelState:
    """What the modules of a model hold now; quantizers are left alone.

    Attributes:
        held: By where: "the state `cache.0` of module `blocks.1`".
    """

    def __init__(self, model: nn.Module) -> None:
        self.held: dict[str, Held] = {}
        self._walk = _Walk()
        self._modules: list[tuple[dict[str, Any], dict[str, Any]]] = []
        inside: set[nn.Module] = set()
        for name, module in model.named_modules():
            if isinstance(module, TensorQuantizer):
                inside.update(module.modules())
            if module in inside:
                continue
            attributes = vars(module)
            own = {key: value for key, value in attributes.items() if key not in _COMMON}
            self._modules.append((attributes, own))
            of = f"of module `{name}`" if name else "of the model"
            for key, value in own.items():
                if type(value) in _PLAIN:  # most are
                    self.held[f"the state `{key}` {of}"] = Held(value, attributes, key)
                    continue
                for path, held in self._attribute(key, value, attributes):
                    self.held[f"the state `{path}` {of}"] = held

    def _attribute(self, key: str, value: Any, attributes: dict[str, Any]) -> Iterator[tuple[str, Held]]:
        for path, held in self._walk(value, key, attributes, key):
            for table in ("_parameters.", "_buffers."):
                path = path.removeprefix(table)  # noqa: PLW2901
            yield path, held

    def tensors(self) -> dict[str, list[Tensor]]:
        """Those that are held, by where."""
        return {where: [held.value] for where, held in self.held.items() if isinstance(held.value, Tensor)}

    def changed(self, before: ModelState) -> dict[str, Held]:
        """What is not as it was before, by where."""
        return {
            where: held
            for where, held in [*self.held.items(), *before.held.items()]
            if where not in self.held or where not in before.held or not self.held[where].same(before.held[where])
        }

    def restore(self) -> None:
        """Give every module its attributes back, as objects; values of tensors are not copied."""
        for attributes, own in self._modules:
            for key in [key for key in attributes if key not in _COMMON and key not in own]:
                del attributes[key]
            attributes.update(own)
        self._walk.restore()


class CachedFunctions:
    """Functions of a model's modules whose results ``functools`` keeps: tensors without data must not stay there."""

    def __init__(self, model: nn.Module) -> None:
        classes = {base for module in model.modules() for base in type(module).__mro__ if base not in nn.Module.__mro__}
        spaces: list[Mapping[str, Any]] = [vars(base) for base in classes]
        spaces += [vars(sys.modules[name]) for name in {base.__module__ for base in classes} if name in sys.modules]
        found = {id(f): f for space in spaces for value in list(space.values()) for f in _cached(value)}
        self._before = [(function, function.cache_info().misses) for function in found.values()]

    def forget(self) -> None:
        """Empty those that were added to since."""
        for function, misses in self._before:
            if function.cache_info().misses != misses:
                function.cache_clear()


def _cached(value: Any) -> list[Any]:
    """A function that is cached, or what it wraps."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    cells = value.__closure__ or () if isinstance(value, FunctionType) else ()
    inner = [cell.cell_contents for cell in cells if _filled(cell)]
    return [each for each in (value, *inner) if isinstance(each, functools._lru_cache_wrapper)]


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
