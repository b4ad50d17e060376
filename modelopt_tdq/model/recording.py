"""A model's own calls: counted, with a progress bar; and their arguments by name, which an export needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from tqdm import tqdm

from modelopt_tdq.core.together import check
from modelopt_tdq.model.call import cloned, named_arguments
from modelopt_tdq.model.timestep import CurrentTimestep

__all__ = ["counted_calls", "recorded_calls"]


@contextmanager
def counted_calls(
    model: nn.Module, timestep: CurrentTimestep, description: str, expected: int | None, progress: bool
) -> Iterator[Callable[[], int]]:
    """Show the progress of a ``forward_loop`` inside the context, and see after each call that the others still run.

    Args:
        model: Whose calls count, but for those that are tried out.
        timestep: Of the model.
        description: Of the progress bar.
        expected: Number of calls, if it is known.
        progress: Show the bar.

    Yields:
        How many there have been.
    """
    calls = 0
    with tqdm(total=expected, desc=description, unit="call", disable=not progress) as bar:

        def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal calls
            check()
            if not timestep.aside:
                calls += 1
                bar.update()

        handle = model.register_forward_hook(count)
        try:
            yield lambda: calls
        finally:
            handle.remove()


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
