"""Everything that calibration may change, so that a failed or tentative one leaves the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modelopt_tdq.model.stored_weight import at_rest, put_back
from modelopt_tdq.model.timestep import find_timestep

__all__ = ["restored", "restored_on_error"]


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return copy.copy(value) if isinstance(value, (dict, list, set, np.ndarray)) else value


def _same(container: Any, content: Any) -> bool:
    """Whether a container holds the same objects as its copy did, in the same order."""
    if isinstance(container, dict):
        pairs = (list(container.items()), list(content.items()))
        return len(container) == len(content) and all(k == m and v is w for (k, v), (m, w) in zip(*pairs, strict=True))
    if isinstance(container, list):
        return len(container) == len(content) and all(v is w for v, w in zip(container, content, strict=True))
    return bool(container == content)


class _Attributes:
    """The attributes of one object: which objects they are, and what was in those that can change in place."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._class = owner, type(owner)
        self._objects = dict(vars(owner))
        self._contents = {name: copy.copy(v) for name, v in self._objects.items() if isinstance(v, (dict, list, set))}

    def restore(self) -> None:
        if type(self._owner) is not self._class:
            self._owner.__class__ = self._class
        attributes = vars(self._owner)
        attributes.clear()
        attributes.update(self._objects)
        for name, content in self._contents.items():
            # refilled rather than replaced: handles of hooks refer to these very dicts
            container = self._objects[name]
            if _same(container, content):
                continue  # what nobody changed may be frozen, as diffusers' configs are
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


class _Calibrator:
    """What a ModelOpt calibrator has collected."""

    def __init__(self, calibrator: Any) -> None:
        self._calibrator = calibrator
        self._state = {name: _cloned(value) for name, value in vars(calibrator).items()}

    def restore(self) -> None:
        vars(self._calibrator).clear()
        vars(self._calibrator).update(self._state)


class _Buffers:
    """The values of a quantizer's buffers, restored in place: ModelOpt ties some of them to each other."""

    def __init__(self, quantizer: TensorQuantizer) -> None:
        self._values = [(v, v.detach().clone()) for v in quantizer._buffers.values() if v is not None]

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, value in self._values:
            buffer.copy_(value)


class _Weights:
    """The memory that holds the weights of a quantized layer, for whoever puts others in its place; not a copy."""

    def __init__(self, layer: QuantModule) -> None:
        parameters = (p for p in layer._parameters.values() if p is not None)
        self._data = [(p, p.data) for p in parameters if not isinstance(p, DTensor)]

    def restore(self) -> None:
        for parameter, data in self._data:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data


_State = _Attributes | _Calibrator | _Buffers | _Weights


def _remembered(model: nn.Module) -> list[_State]:
    at_rest(model)
    states: list[_State] = []
    for module in model.modules():
        states.append(_Attributes(module))
        if isinstance(module, QuantModule):
            states.append(_Weights(module))
        if isinstance(module, TensorQuantizer):
            states.append(_Buffers(module))
            if module._calibrator is not None:
                states.append(_Calibrator(module._calibrator))
    timestep = find_timestep(model)
    if timestep is not None:
        states.append(_Attributes(timestep))
    return states


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """If the body raises, give every module its attributes, submodules and hooks, and every quantizer its values, back.

    Weights are not copied: calibration reads them, or puts others in their place (``weight.data = ...``, or
    :func:`modelopt_tdq.model.stored_weight.replace_weight`), which is undone.
    """
    states = _remembered(model)
    try:
        with put_back():
            yield
    except BaseException:
        for state in states:
            state.restore()
        raise


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Likewise, whether the body raises or not: for trying something out."""
    states = _remembered(model)
    try:
        with put_back(always=True):
            yield
    finally:
        for state in states:
            state.restore()
