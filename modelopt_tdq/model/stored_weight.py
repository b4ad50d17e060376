"""The parameters of a layer between two calls of its model, wherever they are kept: read whole, and replaced.

Plain ones are in the module. Of those that accelerate offloads, the module has a ``meta`` tensor and a hook knows where
the values are; of those that ``fully_shard`` spreads, each process has a part. What replaces them goes where they were,
and whoever raises later gets the former back (:func:`put_back`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from modelopt.torch.quantization.utils.core_utils import _get_enclosing_fsdp_module, _get_fsdp2_mesh
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from modelopt_tdq.errors import TdqWarning
from modelopt_tdq.model.place import offloading_hook

__all__ = ["at_rest", "kept", "like_kept", "put_back", "replace_weight", "sharded_layers", "stored", "whole"]

#: By layer, what gives its weight back; None outside :func:`put_back`.
_REPLACED: ContextVar[dict[nn.Module, Callable[[], None]] | None] = ContextVar("modelopt_tdq_replaced", default=None)

_IN_MEMORY = "weights that accelerate keeps on disk change: the new ones stay in the CPU's memory"


def at_rest(model: nn.Module) -> None:
    """Let go of the whole weights that ``fully_shard`` leaves in a root after a call: what is written there is lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sharded_layers(model: nn.Module) -> set[nn.Module]:
    """The modules whose parameters ``fully_shard`` spreads over processes, and nothing else does: whole in forward."""
    names = dict(model.named_modules())
    found = set()
    for module in names.values():
        own = [p for p in module._parameters.values() if isinstance(p, DTensor)]
        around = _get_enclosing_fsdp_module(module, model, names) if own else None
        mesh = None if around is None else _get_fsdp2_mesh(around)
        if mesh is not None and all(p.device_mesh.ndim == mesh.ndim for p in own):
            found.add(module)
    return found


def _entry(layer: nn.Module, name: str) -> tuple[Any, str] | None:
    """What accelerate keeps a parameter in, and its key there; None if it keeps none."""
    hook = offloading_hook(layer)
    if hook is None:
        return None
    owner, key = hook.weights_map, name
    while hasattr(owner, "dataset"):
        owner, key = owner.dataset, f"{owner.prefix}{key}"
    return owner, key


def kept(layer: nn.Module, name: str = "weight") -> Tensor:
    """A parameter as it is kept, no copy: a DTensor where processes have parts of it."""
    entry = _entry(layer, name)
    if entry is not None:
        found: Tensor = entry[0][entry[1]]
        return found
    parameter: Tensor = layer._parameters[name]  # type: ignore[assignment]
    return parameter.data


def whole(value: Tensor) -> Tensor:
    """What :func:`kept` gives, with all parts; where there are some, a collective of all processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def stored(layer: nn.Module, name: str) -> Tensor | None:
    """The whole value of a parameter; None if the layer has none of that name."""
    return None if layer._parameters.get(name) is None else whole(kept(layer, name))


def like_kept(layer: nn.Module, value: Tensor) -> Tensor:
    """A whole weight of ``layer`` as its weight is kept: on that device, and of each process the part that it has."""
    weight = kept(layer)
    if not isinstance(weight, DTensor):
        return value.to(weight.device)
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


@torch.no_grad()
def replace_weight(layer: nn.Module, value: Tensor) -> None:
    """Put ``value``, as :func:`like_kept` gives it or whole, in the place of the weight of ``layer``.

    What was there stays as it is, but for the parts of ``fully_shard``, which are written into.

    Of weights on disk, it stays in the CPU's memory.
    """
    entry, parameter = _entry(layer, "weight"), layer._parameters["weight"]
    if entry is not None:
        _replace_entry(layer, *entry, value)
    elif isinstance(parameter, DTensor):
        part = value if isinstance(value, DTensor) else like_kept(layer, value)
        own = parameter.to_local()
        _first(layer, lambda: _copying(own))
        own.copy_(part.to_local())
    elif parameter is not None:
        _first(layer, lambda: _pointing(parameter))
        parameter.data = value


def _copying(own: Tensor) -> Callable[[], None]:
    before = own.clone()

    def undo() -> None:
        own.copy_(before)

    return undo


def _pointing(parameter: Any) -> Callable[[], None]:
    before = parameter.data

    def undo() -> None:
        parameter.data = before

    return undo


def _replace_entry(layer: nn.Module, owner: Any, key: str, value: Tensor) -> None:
    entries = owner if isinstance(owner, dict) else owner.state_dict
    before = entries.get(key)
    if before is None:
        warnings.warn(_IN_MEMORY, TdqWarning, stacklevel=4)

    def undo() -> None:
        if before is None:
            entries.pop(key, None)
        else:
            entries[key] = before

    _first(layer, lambda: undo)
    entries[key] = value.to("cpu")


def _first(layer: nn.Module, remember: Callable[[], Callable[[], None]]) -> None:
    """Before the first replacement in :func:`put_back`, keep what undoes it."""
    replaced = _REPLACED.get()
    if replaced is not None and layer not in replaced:
        replaced[layer] = remember()


@contextmanager
def put_back(always: bool = False) -> Iterator[None]:
    """If the body raises, the weights that it has replaced come back.

    Args:
        always: They do whether it raises or not.
    """
    outer, own = _REPLACED.get(), dict[nn.Module, Callable[[], None]]()
    token = _REPLACED.set(own)
    stays = False
    try:
        yield
        stays = not always
    finally:
        _REPLACED.reset(token)
        if not stays:
            with torch.no_grad():
                for undo in own.values():
                    undo()
        elif outer is not None:
            for layer, undo in own.items():
                outer.setdefault(layer, undo)
