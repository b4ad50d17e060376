"""The arguments of a model's own calls, by name: what a pipeline passes is what an export needs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from modelopt_tdq.calibration.replay import cloned

__all__ = ["named_arguments", "recorded_call"]


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call of ``model.forward``, by name."""
    signature = inspect.signature(model.forward)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound


@contextmanager
def recorded_call(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Record the first call of ``model`` inside the context.

    Yields:
        A dict that holds its arguments by name, copied, once it was called; empty before.
    """
    call: dict[str, Any] = {}

    def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not call:
            call.update(cloned(named_arguments(module, args, kwargs)))

    handle = model.register_forward_pre_hook(first, with_kwargs=True)
    try:
        yield call
    finally:
        handle.remove()
