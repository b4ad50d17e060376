"""What autograd holds between the forward and the backward of a model, and how to hold less: block by block.

The graph of a call grows with the activations of all layers. Where it takes more than the weights do, the repeated
blocks of the model keep nothing but their inputs, and run once more in each backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from modelopt_tdq.core.distributed import gather
from modelopt_tdq.model.call import first_output, walk
from modelopt_tdq.reconstruction.blocks import find_blocks

__all__ = ["is_too_large", "recomputed_blocks"]

#: Bytes that the graph of one call may take in any case.
_MOST = 2 << 30

#: What is held beside each saved tensor: errors of as many elements, with two variants of scales and of the weights.
_BESIDE = 3


def is_too_large(model: nn.Module, call: Mapping[str, Any] | None) -> bool:
    """Whether the graph of this call takes more than the weights, and more than 2 GiB; in any process.

    Args:
        model: Its parameters require no gradients.
        call: Keyword arguments; None where this process makes no call.
    """
    too_large = False
    if call is not None:
        most = max(_MOST, sum(p.nbytes for p in model.parameters()))
        try:
            too_large = (1 + _BESIDE) * _saved_bytes(model, call, most // (1 + _BESIDE)) > most
        except RuntimeError:  # it does not fit at all
            too_large = True
    return any(gather(too_large))


def _saved_bytes(model: nn.Module, call: Mapping[str, Any], most: int) -> int:
    """Of what the graph would hold beside the weights; from ``most`` on, no more is held, or counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: set[int] = set()
    total = 0

    def pack(tensor: Tensor) -> Tensor | None:
        nonlocal total
        if total > most:
            return None
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    def require(_: str, leaf: Any) -> Any:
        needs = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.detach().requires_grad_() if needs else leaf

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        first_output(model(**walk(dict(call), require)))
    return total


@contextmanager
def recomputed_blocks(model: nn.Module) -> Iterator[None]:
    """In the body, the repeated blocks of ``model`` keep their inputs alone, and run again in each backward pass.

    Gradients reach tensors anywhere in the arguments and results of a block. In the forward, what is inside a block
    runs without gradients; hooks in it see those in the backward pass.
    """
    with ExitStack() as stack:
        for block in find_blocks(model):
            if len(block.layers) > 1:
                stack.enter_context(_recomputed(model.get_submodule(block.name)))
        yield


@contextmanager
def _recomputed(module: nn.Module) -> Iterator[None]:
    before = vars(module).get("forward")
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        return _checkpointed(forward, args, kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    module.forward = run
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _Place:
    """Stands for one of the tensors that :func:`_taken_out` found."""

    def __init__(self, number: int) -> None:
        self.number = number


def _taken_out(value: Any) -> tuple[list[Tensor], Any]:
    """The tensors in nested data, and the same data with places for them."""
    tensors: list[Tensor] = []

    def take(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf)
        return _Place(len(tensors) - 1)

    return tensors, walk(value, take)


def _put_in(structure: Any, tensors: tuple[Tensor, ...]) -> Any:
    return walk(structure, lambda _, leaf: tensors[leaf.number] if isinstance(leaf, _Place) else leaf)


def _checkpointed(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The reentrant checkpoint, whose second run has a graph of its own: hooks on tensors in it are called."""
    given, structure = _taken_out([args, kwargs])
    results: list[Any] = []

    def run(_: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        own_args, own_kwargs = _put_in(structure, tensors)
        found, made = _taken_out(forward(*own_args, **own_kwargs))
        results[:] = [made]
        return tuple(found)

    # the first argument requires gradients, whatever the others do: layers inside may be the first that do
    outputs = checkpoint(run, torch.ones((), requires_grad=True), *given, use_reentrant=True)
    return _put_in(results[0], outputs)
