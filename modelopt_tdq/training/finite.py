"""Where a loss became NaN: the first quantizer, and the times at which it began."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.quantizer import TemporalQuantizer
from modelopt_tdq.model.timestep import CurrentTimestep, find_timestep
from modelopt_tdq.model.wrapped import unwrapped

__all__ = ["require_finite", "require_finite_quantizers"]


def _bad_samples(value: Any) -> Tensor | None:
    """[B] bool, the samples that hold NaN or infinity; None if none does."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    bad = ~torch.isfinite(value)
    if not bool(bad.any()):
        return None
    return bad.flatten(1).any(1) if value.dim() > 1 else bad.reshape(-1)


def _times(timestep: CurrentTimestep, bad: Tensor) -> list[float]:
    times = timestep.require_each().cpu()
    if times.dim() > 1 or len(times) == 1 or len(bad) % len(times):
        return sorted({float(t) for t in times.flatten()})
    return sorted({float(t) for t in times.repeat_interleave(len(bad) // len(times))[bad.cpu()]})


@contextmanager
def require_finite_quantizers(model: nn.Module) -> Iterator[None]:
    """While the body runs ``model``, stop at the first quantizer whose input or output is not finite.

    Raises:
        TdqError: With the quantizer and the times of the samples in question.
    """
    model = unwrapped(model)
    timestep = find_timestep(model)
    handles = []

    def watch(name: str, quantizer: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for what, value in (("its input", args[0]), ("its output", output)):
                bad = _bad_samples(value)
                if bad is not None and timestep is not None:
                    raise TdqError(
                        "loss",
                        name,
                        f"{what} is the first that is not finite, at times {_times(timestep, bad)}",
                        "Lower the learning rate, clip gradients, or leave this layer out",
                    )

        handles.append(quantizer.register_forward_hook(hook))

    for name, module in model.named_modules():
        if isinstance(module, TemporalQuantizer) and module.is_enabled:
            watch(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_finite(loss: Tensor, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Raise if a training loss is NaN or infinite, and say where it began.

    Costs one look at the loss; the model runs again, on the same inputs, only if that is not finite.

    Args:
        loss: Scalar.
        model: Quantized with an algorithm that learns.
        *args: Of the call that led to the loss.
        **kwargs: Likewise.

    Raises:
        TdqError: The loss is not finite.
    """
    if bool(torch.isfinite(loss.detach()).all()):
        return
    with torch.no_grad(), require_finite_quantizers(model):
        model(*args, **kwargs)
    raise TdqError(
        "loss",
        float(loss.detach()),
        "every quantizer's input and output is finite",
        "Look at the target, at the loss itself, and at the layers behind the last quantizer",
    )
