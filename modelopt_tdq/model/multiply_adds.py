"""The multiply-adds of a model's call, by the module in which they happen.

They are counted where they are computed, in PyTorch's own operators, and so of any model: layers, attention, and what
a model multiplies by itself. Kernels that other libraries bring are not seen.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modelopt_tdq.core.distributed import processes
from modelopt_tdq.model.full_precision import full_precision

if TYPE_CHECKING:
    from modelopt_tdq.model.replay import Replay

__all__ = ["count_multiply_adds", "counted_multiply_adds", "multiply_adds", "remember_multiply_adds"]

_log = logging.getLogger(__name__)

#: Attribute of the root: what the last calibration counted. It is not saved.
_COUNTED = "_tdq_multiply_adds"

_aten = torch.ops.aten


def _matrix(a: Tensor, b: Tensor, *_: Any) -> int:
    """[..., n, k] times [..., k, m]."""
    return a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


def _convolution(x: Tensor, weight: Tensor, output: Tensor, transposed: bool) -> int:
    """Every place of the output, or of the input of a transposed one, meets the whole kernel."""
    places = (x if transposed else output).shape[2:]
    return x.shape[0] * math.prod(places) * weight.numel()


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """[B, H, L, D], [B, H, S, D], [B, H, S, E]: queries times keys, then times values."""
    return query.numel() * key.shape[-2] + math.prod(query.shape[:-1]) * key.shape[-2] * value.shape[-1]


@functools.cache
def _is_attention(operator: Any) -> bool:
    return "scaled_dot_product" in str(operator) and "backward" not in str(operator)


def count_multiply_adds(function: Any, args: tuple[Any, ...], output: Any) -> int:
    """Those of one operator of ATen; none of an operator that takes functions, as flex_attention does."""
    operator = getattr(function, "_overloadpacket", None)
    if operator in (_aten.mm, _aten.bmm, _aten.mv, _aten.dot):
        return _matrix(*args)
    if operator in (_aten.addmm, _aten.baddbmm, _aten.addmv):
        return _matrix(*args[1:])
    if operator is _aten.convolution:
        return _convolution(args[0], args[1], output, bool(args[6]))
    if _is_attention(operator):
        return _attention(*args[:3])
    return 0


class _Counting(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, add: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._add = add

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():  # what consists of other operators has not been taken apart there
            with self:
                taken_apart = func.decompose(*args, **(kwargs or {}))
            if taken_apart is not NotImplemented:
                return taken_apart
        output = func(*args, **(kwargs or {}))
        if found := count_multiply_adds(func, args, output):
            self._add(found)
        return output


@contextmanager
def counted_multiply_adds(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count those of the first call of ``model`` inside the context.

    Args:
        model: The root.

    Yields:
        By name of the innermost module in which they happen, quantizers excepted; filled by that call.
    """
    counts: dict[str, int] = {}
    running: list[str] = []
    handles: list[Any] = []
    mode: list[_Counting] = []

    def add(number: int) -> None:
        counts[running[-1]] = counts.get(running[-1], 0) + number

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not running and (name or mode):
                return  # a part that runs by itself
            if not running:
                mode.append(_Counting(add))
                mode[0].__enter__()  # type: ignore[no-untyped-call]
            running.append(name)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not running:
                return
            while running and running.pop() != name:  # what an error has left open
                pass
            if not running:
                mode[0].__exit__(None, None, None)  # type: ignore[no-untyped-call]

        return hook

    for name, module in model.named_modules():
        if not isinstance(module, TensorQuantizer):
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave(name), always_call=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def remember_multiply_adds(model: nn.Module, replay: Replay, times: list[float]) -> None:
    """Keep those of one sample with the model; they are not saved.

    Counted while it was found out what belongs to a sample; else in a replayed call, in full precision. Nothing is
    known where calls cannot be repeated, where several processes make them, and where the model does not run with every
    operator watched, as some compiled and foreign ones do not.
    """
    object.__setattr__(model, _COUNTED, replay.multiply_adds)
    if processes() > 1 or not replay.times or replay.multiply_adds is not None:
        return
    try:
        with full_precision(model), torch.no_grad(), counted_multiply_adds(model) as counts:
            model(**next(iter(replay.batches(times[:1], most=1))).call)
    except Exception as error:  # whatever a model raises; the calibration does not depend on it
        _log.info("multiply-adds are not known: %s", error)
        return
    object.__setattr__(model, _COUNTED, counts)


def multiply_adds(model: nn.Module) -> dict[str, int] | None:
    """What the last calibration counted, by module; None if there was none since the model was loaded."""
    found: dict[str, int] | None = vars(model).get(_COUNTED)
    return found
