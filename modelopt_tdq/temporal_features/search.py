"""How a model is watched: without data if that is possible, for as many times at once as are wanted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from modelopt_tdq.errors import TdqError
from modelopt_tdq.temporal_features.trace import Watched, watch

__all__ = ["search"]

_log = logging.getLogger(__name__)


def _labels(arguments: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Every tensor in the arguments, by name: ``outer.inner`` inside a mapping."""
    found = []
    for path, leaf in pytree.tree_flatten_with_path(dict(arguments))[0]:
        if isinstance(leaf, Tensor):
            found.append((".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf))
    return found


def _tensors(arguments: Mapping[str, Any], timestep: str) -> dict[str, Any]:
    """The arguments with a time that is a tensor, and tensors that nobody else has."""
    leaves = [leaf for name, value in arguments.items() if name != timestep for leaf in pytree.tree_leaves(value)]
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), None)
    time = arguments[timestep]
    own = {**arguments, timestep: time if isinstance(time, Tensor) else torch.as_tensor(time, device=device)}
    cloned: dict[str, Any] = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, own)
    return cloned


def _batched(arguments: Mapping[str, Any], timestep: str, times: int) -> dict[str, Any]:
    """The arguments of one call, for as many samples as times."""
    tensors = [leaf for name, value in arguments.items() if name != timestep for leaf in pytree.tree_leaves(value)]
    batch = next((t.shape[0] for t in tensors if isinstance(t, Tensor) and t.dim() > 1), None)

    def repeated(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch:
            return leaf[:1].expand(times, *leaf.shape[1:]).clone()
        return leaf

    made = {name: pytree.tree_map(repeated, value) for name, value in arguments.items()}
    made[timestep] = arguments[timestep].reshape(-1)[:1].expand(times).clone()
    return made


def _watch_call(model: nn.Module, arguments: Mapping[str, Any], timestep: str, times: int) -> Watched:
    labels = _labels(arguments)
    time = next(tensor for name, tensor in labels if name == timestep)
    return watch(model, lambda: model(**arguments), labels, (timestep, time), times)


def _without_data(model: nn.Module, arguments: Mapping[str, Any], timestep: str, times: int) -> Watched:
    """Shapes only: costs neither time nor memory, so that all times fit into one call."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    empty = any(parameter.is_meta for parameter in model.parameters())

    def faked(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return mode.from_tensor(leaf.to("meta") if empty else leaf)

    with mode:
        fake = pytree.tree_map(faked, arguments)
        return _watch_call(model, fake, timestep, times)


def search(model: nn.Module, arguments: Mapping[str, Any], timestep: str, times: int | None) -> Watched:
    """Watch one call of the model: by shapes alone where the model allows it, else with the call's own data.

    Args:
        model: In eval mode.
        arguments: Of the call, by name.
        timestep: Name of the argument that holds the time.
        times: How many times the call shall have, if the model takes a time per sample; None: the call as it is.
    """
    own = _tensors(arguments, timestep)
    calls = [(own, 1)] if times is None else [(_batched(own, timestep, times), times), (own, 1)]
    for call, computed in calls:
        try:
            found = _without_data(model, call, timestep, computed)
        except TdqError:
            raise
        except Exception as error:  # models may look at values, or not take a time per sample
            _log.info("the model cannot be watched without data: %s", error)
            continue
        rows = all(shape[:1] == (computed,) for shape in found.features.values()) or computed == 1
        if rows and not _holds_shapes(found):
            return found
    return _watch_call(model, own, timestep, 1)


def _holds_shapes(found: Watched) -> bool:
    """Whether the tape refers to a tensor without data."""
    leaves = (leaf for e in found.tape.entries for leaf in pytree.tree_leaves((e.args, dict(e.kwargs))))
    return any(isinstance(leaf, FakeTensor) for leaf in leaves)
