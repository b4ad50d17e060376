"""The arguments of a model's own calls, by name: what a pipeline passes is what an export needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from modelopt_tdq.model.call import cloned, named_arguments

__all__ = ["recorded_calls"]


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
