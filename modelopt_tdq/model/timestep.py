"""How the current time reaches the quantizers: from the model's own call, by a forward pre-hook on its root."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.saving import NotPickled

__all__ = ["INTERVALS", "CurrentTimestep", "deliver_timestep", "find_timestep", "per_sample"]

#: Name, in the root of a model that learns, of the module that makes its intervals.
INTERVALS = "tdq_intervals"


class CurrentTimestep:
    """The time of the model call in progress, shared by all quantizers of one model.

    ``value`` is float32 of shape [1] or [B], in the model's own units (0..999 for DDPM, t/1000 for
    Flux, sigma for k-diffusion). ``intervals`` is [1, Q] or [B, Q] while the model learns, what its source makes of
    these times. Both are replaced at every call of the model and never copied or saved. A block that gradient
    checkpointing runs again during the backward pass sees the time of the last call of the model, unless the
    checkpointing function is that of :func:`modelopt_tdq.training.checkpointing.checkpoint`.
    """

    def __init__(self, argument: str, position: int | None) -> None:
        self.argument = argument
        self.position = position
        self.value: Tensor | None = None
        self.intervals: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"argument": self.argument, "position": self.position, "value": None, "intervals": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> CurrentTimestep:
        copy = CurrentTimestep(self.argument, self.position)
        memo[id(self)] = copy
        return copy

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the time out of the arguments of a model call.

        Raises:
            TdqError: The call has no such argument, or it is None.
        """
        time = kwargs.get(self.argument)
        if time is None and self.position is not None and self.position < len(args):
            time = args[self.position]
        if time is None:
            raise TdqError(
                "timestep_argument",
                self.argument,
                "the model was called without this argument, so its time is unknown",
                f"Pass `{self.argument}=...` to the model, or name the argument that holds the time with "
                '`"timestep_argument"` in the algorithm config',
            )
        if not isinstance(time, Tensor):
            time = torch.as_tensor(time, dtype=torch.float32)
        self.value = time.detach().to(torch.float32).reshape(-1)

    def require(self) -> Tensor:
        """The time of the call in progress.

        Raises:
            TdqError: The model was never called.
        """
        if self.value is None:
            raise TdqError(
                "timestep",
                None,
                "a quantizer ran before any call of the model told it the time",
                "Call the quantized model itself rather than one of its parts",
            )
        return self.value


def per_sample(value: Tensor, inputs: Tensor) -> Tensor:
    """One number per time, shaped to go with an activation.

    Args:
        value: [1] for one time, or [B] for a time per sample.
        inputs: The activation [B * n, ...]: video models fold frames, some attentions fold heads, into the batch.

    Returns:
        [1], or [B * n, 1, ...].

    Raises:
        TdqError: The batch is no multiple of the number of times.
    """
    samples = value.numel()
    if samples == 1:
        return value
    batch = inputs.shape[0] if inputs.dim() else 0
    if batch == 0 or batch % samples:
        raise TdqError(
            "timestep",
            tuple(value.shape),
            f"{samples} times cannot be matched with an activation of shape {tuple(inputs.shape)}",
            "Pass one time for the whole batch, or exclude this quantizer with a `quant_cfg` rule",
        )
    return value.repeat_interleave(batch // samples).reshape(batch, *(1,) * (inputs.dim() - 1))


class _DeliveryHook(NotPickled):
    """The pre-hook: a class rather than a closure, so that models can be copied."""

    def __init__(self, timestep: CurrentTimestep) -> None:
        self.timestep = timestep

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.timestep.read(args, kwargs)
        learned = module._modules.get(INTERVALS)
        if learned is not None:
            learned.begin(module, self.timestep)  # type: ignore[operator]


def find_timestep(model: nn.Module) -> CurrentTimestep | None:
    """The delivery installed on this root, if any."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _DeliveryHook):
            return hook.timestep
    return None


def deliver_timestep(model: nn.Module, argument: str) -> CurrentTimestep:
    """Install the delivery on the root of ``model``, or reuse the one that is there.

    Args:
        model: The module whose ``forward`` receives the time.
        argument: Name of that argument.

    Raises:
        TdqError: ``model.forward`` has no such argument.
    """
    parameters = inspect.signature(model.forward).parameters
    kinds = inspect.Parameter
    if argument not in parameters and all(p.kind is not kinds.VAR_KEYWORD for p in parameters.values()):
        raise TdqError(
            "timestep_argument",
            argument,
            f"{type(model).__name__}.forward has no such argument; it has {', '.join(parameters)}",
            'Name the one that holds the time with `"timestep_argument"` in the algorithm config',
        )
    position = None
    if argument in parameters and parameters[argument].kind is kinds.POSITIONAL_OR_KEYWORD:
        position = list(parameters).index(argument)
    timestep = find_timestep(model)
    if timestep is None:
        timestep = CurrentTimestep(argument, position)
        model.register_forward_pre_hook(_DeliveryHook(timestep), with_kwargs=True, prepend=True)
    timestep.argument, timestep.position = argument, position
    return timestep
