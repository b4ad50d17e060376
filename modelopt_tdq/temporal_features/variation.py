"""In which ways another call of a model may differ from a recorded one, besides its tensors' values and its time."""

from __future__ import annotations

import copy
import functools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = [
    "Change",
    "Question",
    "batch_changes",
    "batch_size",
    "named_attributes",
    "named_leaves",
    "number_changes",
    "other_values",
    "size_changes",
    "with_changes",
]


@dataclass(frozen=True)
class Change:
    """One such way.

    Attributes:
        labels: What differs, as a report names it.
        replaced: What becomes of values, by name: ``outer.inner`` inside containers.
        aspects: What has been tried if the model takes this: names of arguments; ``sample.shape[1]`` for sizes.
        conclusive: Whether that tells of other values; of a text it does not.
    """

    labels: tuple[str, ...]
    replaced: Mapping[str, Callable[[Any], Any]]
    aspects: tuple[str, ...]
    conclusive: bool = True


def _name(path: Sequence[Any]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def named_leaves(arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Everything in the arguments that is no container, by name: ``outer.inner`` inside a mapping or list."""
    return [(_name(path), leaf) for path, leaf in _flat(arguments)]


def _flat(arguments: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = pytree.tree_flatten_with_path(dict(arguments))[0]
    return found


def with_changes(arguments: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """The arguments of a call that differs so."""

    def changed(path: Any, leaf: Any) -> Any:
        for change in changes:
            replace = change.replaced.get(_name(path))
            leaf = leaf if replace is None else replace(leaf)
        return leaf

    made: dict[str, Any] = pytree.tree_map_with_path(changed, dict(arguments))
    return made


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def other_values(value: Any, hint: Any = None) -> list[Any]:
    """Other values that a number, flag or text might have."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [other for other in dict.fromkeys((2 * value or 1, 0, value + 3, -1)) if other != value]
    if isinstance(value, float):
        return [
            other for other in dict.fromkeys((3 * value + 1.5, 0.0, 0.5 * value + 0.25, -value - 0.5)) if other != value
        ]
    if isinstance(value, str):
        allowed = [each for each in _literals(hint) if isinstance(each, str) and each != value]
        return allowed or [f"{value}_"]
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        return [3 * value + 1, value - 1]
    return []


def _literals(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [literal for inner in typing.get_args(hint) for literal in _literals(inner)]


def _hints(model: nn.Module) -> dict[str, Any]:
    try:
        return typing.get_type_hints(model.forward)
    except Exception:  # annotations may name what is not there at run time
        return {}


@dataclass(frozen=True)
class Question:
    """Whether a change of one thing makes a difference.

    Attributes:
        ways: To change it.
        every: Whether all of them count, or the first that the model takes.
        tied: Whether the model may take a change of it only together with sizes, as of a number of frames.
    """

    ways: list[Change]
    every: bool = False
    tied: bool = False


class _Value(NamedTuple):
    """Something in the arguments: its name, that of the leaf that it is or is in, and what replaces it there."""

    name: str
    leaf: str
    value: Any
    put: Callable[[Any], Callable[[Any], Any]]


def _values(arguments: Mapping[str, Any], timestep: str) -> dict[str, list[_Value]]:
    """All of them, by name; those inside of one list or tuple together, by the name of that."""
    found: dict[str, list[_Value]] = {}
    for path, leaf in _flat({key: value for key, value in arguments.items() if key != timestep}):
        name = _name(path)
        sequence = next((index for index, key in enumerate(path) if hasattr(key, "idx")), len(path))
        found.setdefault(_name(path[:sequence]), []).append(_Value(name, name, leaf, _constant))
        for key, inner in named_attributes(leaf).items():
            found[f"{name}.{key}"] = [_Value(f"{name}.{key}", name, inner, functools.partial(_with_attribute, key))]
    return found


def number_changes(model: nn.Module, arguments: Mapping[str, Any], timestep: str) -> list[Question]:
    """Other values of every argument that is a number, a flag or a text."""
    hints, found = _hints(model), []
    for label, values in _values(arguments, timestep).items():
        others = [(each, other_values(each.value, hints.get(each.name))) for each in values]
        others = [(each, tries) for each, tries in others if tries]
        ways = [
            Change(
                (label,),
                {each.leaf: each.put(tries[index]) for each, tries in others},
                tuple(each.name for each, _ in others),
                conclusive=not any(isinstance(each.value, str) for each, _ in others),
            )
            for index in range(min((len(tries) for _, tries in others), default=0))
        ]
        if ways:
            found.append(Question(ways, every=True, tied=any(type(each.value) is int for each, _ in others)))
    return found


def named_attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object that is made to hold values, such as a dataclass."""
    if isinstance(value, (nn.Module, Tensor, type)) or callable(value) or type(value).__module__.startswith("torch"):
        return {}
    return dict(getattr(value, "__dict__", {}))


def _with_attribute(key: str, value: Any) -> Callable[[Any], Any]:
    def change(holder: Any) -> Any:
        made = copy.copy(holder)
        object.__setattr__(made, key, value)  # it may be frozen
        return made

    return change


def _tensors(arguments: Mapping[str, Any], timestep: str) -> Iterator[tuple[str, Tensor]]:
    for name, leaf in named_leaves({key: value for key, value in arguments.items() if key != timestep}):
        if isinstance(leaf, Tensor):
            yield name, leaf


def batch_size(arguments: Mapping[str, Any], timestep: str) -> int | None:
    """The first dimension of the first tensor that has several; the time does not count."""
    return next((tensor.shape[0] for _, tensor in _tensors(arguments, timestep) if tensor.dim() > 1), None)


def _one_more(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[:1]])


def batch_changes(arguments: Mapping[str, Any], timestep: str) -> list[Change]:
    """A sample more: with a time of its own where the time has a dimension, or without."""
    batch = batch_size(arguments, timestep)
    names = [name for name, t in _tensors(arguments, timestep) if t.dim() and t.shape[0] == batch]
    if not names:
        return []
    label, time = f"the size of `{names[0]}`", arguments[timestep]
    plain: dict[str, Callable[[Any], Any]] = dict.fromkeys(names, _one_more)
    aspects = tuple(f"{name}.shape[0]" for name in names)
    found = [Change((label,), plain, aspects)]
    if isinstance(time, Tensor) and time.dim() and time.shape[0] == batch:
        own = [Change((label,), {**plain, timestep: _one_more}, aspects)]
        return [*own, *found] if time.shape[0] == 1 else own
    return found


def _doubled(axes: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        for axis in axes:
            tensor = torch.cat([tensor, tensor], axis)
        return tensor

    return change


def _halved(axes: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        for axis in axes:
            tensor = tensor.narrow(axis, 0, tensor.shape[axis] // 2).clone()
        return tensor

    return change


def _resized(tensors: Mapping[str, Tensor], axes: Mapping[str, Sequence[int]], halve: bool) -> list[Change]:
    """These axes twice as long, or half; nothing if there is none, or one is odd."""
    chosen = {name: own for name, own in axes.items() if own}
    odd = halve and any(tensors[name].shape[axis] % 2 for name, own in chosen.items() for axis in own)
    if odd or not chosen:
        return []
    make = _halved if halve else _doubled
    labels = tuple(f"the size of `{name}`" for name in chosen)
    aspects = tuple(f"{name}.shape[{axis}]" for name, own in chosen.items() for axis in own)
    return [Change(labels, {name: make(own) for name, own in chosen.items()}, aspects)]


def size_changes(
    arguments: Mapping[str, Any], timestep: str, smaller_first: bool
) -> tuple[list[Change], list[Question], list[Question]]:
    """Other sizes of images, videos and texts: twice as large, or half. Numbers of channels are left alone.

    Args:
        arguments: Of the call.
        timestep: Name of the argument that holds the time.
        smaller_first: Half before twice.

    Returns:
        Of all tensors at once, in the layouts that are common; of each axis alone; and of all axes of one length.
    """
    batch, tensors = batch_size(arguments, timestep), dict(_tensors(arguments, timestep))
    led = {name for name, tensor in tensors.items() if tensor.dim() and tensor.shape[0] == batch}
    tokens: dict[str, tuple[int, ...]] = {n: (1,) if n in led else (0,) for n, t in tensors.items() if t.dim() == 3}
    lengths = {tensors[name].shape[1] for name in tokens if name in led}
    for name, tensor in tensors.items():
        mask = name in led and not tensor.is_floating_point() and tensor.shape[1:] in {(n,) for n in lengths}
        if tensor.dim() == 2 and (mask or name not in led):
            tokens[name] = (1,) if mask else (0,)
    inner = {name: tuple(range(2, tensor.dim())) for name, tensor in tensors.items() if tensor.dim() >= 4}
    frames_first = {name: (1, *range(3, tensors[name].dim())) for name in inner}
    layouts: list[dict[str, tuple[int, ...]]] = [tokens]
    if inner:
        layouts = [{**inner, **tokens}, {**frames_first, **tokens}, inner, frames_first]
    sides = (smaller_first, not smaller_first)

    def resized(axes: Mapping[str, Sequence[int]]) -> list[Change]:
        return [change for halve in sides for change in _resized(tensors, axes, halve)]

    together = [change for halve in sides for axes in layouts for change in _resized(tensors, axes, halve)]
    every = {name: tuple(range(1 if tensors[name].dim() > 4 else 2, tensors[name].dim())) for name in inner}
    alone = [(name, axis) for name, axes in {**every, **tokens}.items() for axis in axes]
    alike: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, axis in alone:
        own = alike.setdefault(tensors[name].shape[axis], {})
        own[name] = (*own.get(name, ()), axis)
    groups = [axes for axes in alike.values() if sum(map(len, axes.values())) > 1]
    return (
        together,
        [Question(resized({name: (axis,)})) for name, axis in alone],
        [Question(resized(axes)) for axes in groups],
    )
