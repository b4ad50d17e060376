"""The arguments of a model's own calls, by name: what a pipeline passes is what an export needs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from modelopt_tdq.calibration.replay import cloned

__all__ = ["named_arguments", "recorded_calls"]


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call of ``model.forward``, by name."""
    signature = inspect.signature(model.forward)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound


@contextmanager
def recorded_calls(model: nn.Module, most: int | None = None) -> Iterator[list[dict[str, Any]]]:
    """Record the calls of ``model`` inside the context.

    Args:
        model: Whose ``forward`` is called.
        most: Keep the first so many calls only.

    Yields:
        The arguments of each call by name, copied, in the order of the calls; grows as the model is called.
    """
    calls: list[dict[str, Any]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if most is None or len(calls) < most:
            calls.append(cloned(named_arguments(module, args, kwargs)))

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
