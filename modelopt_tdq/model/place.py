"""Where a model computes, and who keeps its tensors elsewhere between its calls.

accelerate and diffusers save memory by hooks around ``forward``: weights wait in CPU memory, on disk or in fewer bits,
and come to the device that computes for one call. In the meantime a parameter of accelerate's is on ``meta``, and one
that diffusers has written to disk is memory that nobody has filled.

What is small and ours, the scales, stays out of this: it is put where its layer computes, and taken back from
accelerate's hooks where those have got hold of it (:func:`release`). What reads, changes or copies weights between two
calls says so, and is refused with the cure while they are elsewhere (:func:`require_weights` and its like).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError

__all__ = [
    "drop_bound_forward",
    "execution_device",
    "offloading_hook",
    "place_of_new_parts",
    "put_hooks_around_quantizers",
    "readable_for_modelopt",
    "release",
    "require_tensors_on_hand",
    "require_unattended",
    "require_weights",
]

#: Names under which diffusers registers its hooks.
_GROUPS, _CASTING = "group_offloading", "layerwise_casting"


def _accelerate_hooks(module: nn.Module) -> tuple[Any, ...]:
    """The hooks of accelerate on one module."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def offloading_hook(module: nn.Module) -> Any | None:
    """The hook of accelerate that keeps tensors of ``module`` elsewhere, if one does."""
    return next((hook for hook in _accelerate_hooks(module) if getattr(hook, "offload", False)), None)


def _diffusers_hook(module: nn.Module, name: str) -> Any | None:
    registry = vars(module).get("_diffusers_hook")
    return None if registry is None else registry.hooks.get(name)


def _hooked_device(module: nn.Module) -> torch.device | None:
    """Where the hooks of one module let it compute."""
    for hook in _accelerate_hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    group = getattr(_diffusers_hook(module, _GROUPS), "group", None)
    return None if group is None else torch.device(group.onload_device)


def _own_device(module: nn.Module) -> torch.device | None:
    """Where one module computes, as far as that shows in its own hooks and tensors."""
    hooked = _hooked_device(module)
    if hooked is not None:
        return hooked
    tensors: Iterator[Tensor | None] = chain(module._parameters.values(), module._buffers.values())
    return next((tensor.device for tensor in tensors if tensor is not None and not tensor.is_meta), None)


def execution_device(module: nn.Module) -> torch.device:
    """Where ``module`` computes: the device of its first part that says so.

    A part says so by a hook of accelerate or diffusers that brings its inputs and weights to a device, else by where
    its own parameters and buffers are. The CPU, if no part does: without weights, or with all of them on ``meta``.
    """
    found = (_own_device(part) for part in module.modules())
    return next((device for device in found if device is not None), torch.device("cpu"))


def place_of_new_parts(module: nn.Module) -> torch.device:
    """Where something added to ``module`` belongs: where it computes, but ``meta`` while it is being restored there."""
    parameters = list(module.parameters())
    restoring = bool(parameters) and all(parameter.is_meta for parameter in parameters)
    if restoring and all(_hooked_device(part) is None for part in module.modules()):
        return torch.device("meta")
    return execution_device(module)


def drop_bound_forward(module: nn.Module) -> None:
    """Remove what is left of a hook: the class's own ``forward``, bound, as an attribute of the module.

    It changes nothing until the module gets another class, whose ``forward`` it would hide.
    """
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]


def put_hooks_around_quantizers(model: nn.Module) -> None:
    """Let hooks that diffusers put on a layer before ModelOpt quantized it be around the quantized layer.

    ModelOpt puts its ``forward`` around theirs. A hook that is removed puts back the ``forward`` that it found: that of
    the layer without its input quantizer. Harmless when done before.
    """
    for module in model.modules():
        hooked, registry = vars(module).get("_forward_pre_dm"), vars(module).get("_diffusers_hook")
        if hooked is None or registry is None or not registry.hooks:
            continue
        innermost = registry._fn_refs[0]
        name = "forward" if innermost.original_forward is None else "original_forward"
        setattr(innermost, name, MethodType(type(module).forward, module))
        module.forward = hooked
        del module._forward_pre_dm


def release(module: nn.Module) -> None:
    """Take a small module of ours, and all in it, back from accelerate's offloading; it stays where it computes.

    Its tensors come back with the values that they had. Harmless if nobody keeps them.
    """
    for part in module.modules():
        if offloading_hook(part) is None:
            continue
        from accelerate.hooks import remove_hook_from_module

        device = execution_device(part)
        remove_hook_from_module(part)
        drop_bound_forward(part)
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None and not tensor.is_meta:
                tensor.data = tensor.data.to(device)


@dataclass(frozen=True)
class _Keeper:
    """Something that keeps tensors of a model elsewhere.

    Attributes:
        keeps: A sentence: what it does.
        cure: How to be rid of it.
        gone: Whether what it keeps cannot be read between calls.
        copies: Whether the model can be copied with it.
        attends: Whether it looks after every tensor of the layers, and stumbles over those that it does not know.
        ours: Whether :func:`release` takes the scales back from it.
    """

    keeps: str
    cure: str
    gone: bool = False
    attends: bool = False
    ours: bool = False


_REMOVE = "Call accelerate.hooks.remove_hook_from_submodules(model) first, which brings its weights back"

_OFFLOAD = _Keeper("accelerate keeps its weights elsewhere between calls", _REMOVE, gone=True, ours=True)
_PRELOAD = _Keeper(
    "accelerate keeps whole blocks of it elsewhere between calls, scales included",
    f"{_REMOVE}; or offload it without `preload_module_classes`",
    gone=True,
    attends=True,
)
_GROUP = _Keeper(
    "diffusers moves groups of its layers to the device for each call",
    "Remove the hooks first: diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model)"
    f".remove_hook({_GROUPS!r}); and offload again afterwards",
)
_STREAM = _Keeper(
    "diffusers moves groups of its layers by a stream, which knows the tensors that were there at the start only",
    f"{_GROUP.cure}; or offload without `use_stream`",
    attends=True,
)
_DISK = _Keeper(
    "diffusers has written its layers to disk, and what is in memory between calls is not their values",
    "Load the model again, quantize, save or export it, and call enable_group_offload with `offload_to_disk_path` "
    "after that",
    gone=True,
    attends=True,
)
_CAST = _Keeper(
    "diffusers stores its layers in fewer bits between calls, and rounds scales of theirs with them",
    "Load the model again without layerwise casting; enable_group_offload and accelerate's cpu_offload save memory "
    "and change no number",
    attends=True,
)


def _keeper(module: nn.Module) -> _Keeper | None:
    hook = offloading_hook(module)
    if hook is not None:
        return _PRELOAD if getattr(hook, "place_submodules", False) else _OFFLOAD
    if _diffusers_hook(module, _CASTING) is not None:
        return _CAST
    group = getattr(_diffusers_hook(module, _GROUPS), "group", None)
    if group is None:
        return None
    if getattr(group, "offload_to_disk_path", None) is not None:
        return _DISK
    return _GROUP if getattr(group, "stream", None) is None else _STREAM


def _keepers(model: nn.Module) -> set[_Keeper]:
    return {keeper for keeper in map(_keeper, model.modules()) if keeper is not None}


def _refuse(model: nn.Module, doing: str, keepers: set[_Keeper]) -> None:
    for keeper in sorted(keepers, key=lambda keeper: keeper.keeps):
        raise TdqError("model", type(model).__name__, f"it cannot {doing} while {keeper.keeps}", keeper.cure)


def require_weights(model: nn.Module, doing: str) -> None:
    """For what reads and changes weights between calls, or copies the model with them.

    Args:
        model: The root.
        doing: What it cannot do meanwhile, as "be exported".

    Raises:
        TdqError: Hooks keep weights of the model elsewhere between calls.
    """
    _refuse(model, doing, _keepers(model))


def require_tensors_on_hand(model: nn.Module, doing: str, scales_only: bool = False) -> None:
    """For what reads tensors between calls.

    Args:
        model: See :func:`require_weights`.
        doing: Likewise.
        scales_only: What is read is ours, and was :func:`release`-d.

    Raises:
        TdqError: What is in memory between calls is not their values.
    """
    _refuse(model, doing, {keeper for keeper in _keepers(model) if keeper.gone and not (scales_only and keeper.ours)})


def require_unattended(model: nn.Module, doing: str) -> None:
    """For what gives layers new tensors.

    Args:
        model: See :func:`require_weights`.
        doing: Likewise.

    Raises:
        TdqError: Hooks look after every tensor of a layer, and would not know these, or spoil them.
    """
    _refuse(model, doing, {keeper for keeper in _keepers(model) if keeper.attends})


class _ReadOnly(Mapping[str, Tensor]):
    """The weights that accelerate keeps, for ModelOpt to read.

    Attributes:
        state_dict: What ModelOpt (0.47) would write what it has read back to; nothing of accelerate's.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self.state_dict: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@contextmanager
def readable_for_modelopt(model: nn.Module) -> Iterator[None]:
    """Let ModelOpt read the weights that accelerate keeps elsewhere; the body must not change any.

    By itself, ModelOpt (0.47) fails on weights that are kept in CPU memory, and leaves in memory all that it has read
    from disk.
    """
    replaced = []
    for hook in filter(None, map(offloading_hook, model.modules())):
        kept = hook.weights_map
        if hasattr(kept, "dataset"):
            replaced.append((kept, kept.dataset))
            kept.dataset = _ReadOnly(kept.dataset)
    try:
        yield
    finally:
        for kept, weights in replaced:
            kept.dataset = weights
