"""Where the weights of a model are between its calls: every way that accelerate and diffusers know, on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_CPU = torch.device("cpu")


def _dispatched(model: nn.Module, disk: int, **further: Any) -> None:
    """Every other child on disk, from child number ``disk`` on."""
    from accelerate import dispatch_model

    where = {name: "disk" if i % 2 == disk else "cpu" for i, (name, _) in enumerate(model.named_children())}
    dispatch_model(model, where, main_device="cpu", offload_dir=tempfile.mkdtemp(), force_hooks=True, **further)


def _accelerate(kind: str, **further: Any) -> Callable[[nn.Module], None]:
    def place(model: nn.Module) -> None:
        from accelerate import cpu_offload, disk_offload

        if kind == "cpu":
            cpu_offload(model, _CPU, **further)
        else:
            disk_offload(model, tempfile.mkdtemp(), _CPU, **further)

    return place


def _group(offload_type: str, **further: Any) -> Callable[[nn.Module], None]:
    def place(model: nn.Module) -> None:
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(model, _CPU, _CPU, offload_type, **further)

    return place


#: By accelerate; with ``buffers``, it keeps the scales elsewhere, too.
OFFLOADED: dict[str, Callable[[nn.Module], None]] = {
    "cpu": _accelerate("cpu"),
    "cpu, buffers": _accelerate("cpu", offload_buffers=True),
    "disk": _accelerate("disk"),
    "disk, buffers": _accelerate("disk", offload_buffers=True),
    "first on disk": lambda model: _dispatched(model, 0),
    "second on disk, buffers": lambda model: _dispatched(model, 1, offload_buffers=True),
}

#: By diffusers, in memory.
GROUPED: dict[str, Callable[[nn.Module], None]] = {
    "leaves": _group("leaf_level"),
    "blocks": _group("block_level", num_blocks_per_group=1),
}


def cast(model: nn.Module, storage: torch.dtype = torch.float8_e4m3fn) -> None:
    """Layerwise casting by diffusers."""
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(model, storage, torch.float32)


def on_disk_by_groups(model: nn.Module) -> None:
    """Group offloading to disk."""
    _group("leaf_level", offload_to_disk_path=tempfile.mkdtemp())(model)


def back(model: nn.Module) -> None:
    """What the errors advise: take the hooks away."""
    from accelerate.hooks import remove_hook_from_submodules
    from diffusers.hooks import HookRegistry

    remove_hook_from_submodules(model)
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("group_offloading")
