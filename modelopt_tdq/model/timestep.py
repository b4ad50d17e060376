"""How the current time reaches the quantizers: from the model's own call, by two hooks on its root.

The time belongs to one call. It is gone when the call ends, and calls in flight in other threads, or a call inside a
call, have times of their own. A part that is called by itself, or ``forward`` called past the hooks, has no time and is
refused: the time of an earlier call would be wrong without a word.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modelopt_tdq.errors import TdqError
from modelopt_tdq.model import threads
from modelopt_tdq.model.saving import NotPickled
from modelopt_tdq.model.token_times import Reader, find_layout, one_of_tokens, spread, tokens_of_a_frame

__all__ = [
    "INTERVALS",
    "CurrentTimestep",
    "deliver_timestep",
    "find_timestep",
    "matched",
    "one_of_all",
    "per_sample",
    "times_of_samples",
    "without_delivery",
]

#: Name, in the root of a model that learns, of the module that makes its intervals.
INTERVALS = "tdq_intervals"


class _Finished:
    """Time and intervals of a call that is over; lives as long as the graph of its backward pass."""

    def __init__(self, value: Tensor, intervals: Tensor | None) -> None:
        self.value, self.intervals = value, intervals


class CurrentTimestep:
    """The time of the model call in progress, shared by all quantizers of one model.

    ``value`` is float32 of shape [1] or [B], in the model's own units (0..999 for DDPM, t/1000 for
    Flux, sigma for k-diffusion), or [B, N] where the N tokens or frames of a sample have times of their own; None
    outside of a call. ``intervals`` is [1, Q] or [B, Q] while the model learns, what its source makes of these times.
    Neither is copied or saved.

    A block that gradient checkpointing runs again during the backward pass has the time of the one call whose backward
    pass is still to come. Where there are several, its checkpointing function has to be that of
    :func:`modelopt_tdq.training.checkpointing.checkpoint`.
    """

    def __init__(self, argument: str, position: int | None) -> None:
        self.argument = argument
        self.position = position
        #: Intervals of the last call in training mode, for penalties on them.
        self.last_intervals: Tensor | None = None
        #: Whether the calls in progress are tried out, and are nobody's data.
        self.aside = False
        # of the innermost call in flight in each thread: value, intervals, rows, how many tokens a frame may have, and
        # outer, these of the call around it
        self._in_flight = threading.local()
        self._finished: list[weakref.ref[_Finished]] = []
        self._ran_again = False

    def __getstate__(self) -> dict[str, Any]:
        return {"argument": self.argument, "position": self.position}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["argument"], state["position"])  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> CurrentTimestep:
        copy = CurrentTimestep(self.argument, self.position)
        memo[id(self)] = copy
        return copy

    @property
    def value(self) -> Tensor | None:
        """The time of the call in progress; None if there is none."""
        value: Tensor | None = getattr(self._in_flight, "value", None)
        if value is None and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return self._of_backward().value
        return value

    @property
    def intervals(self) -> Tensor | None:
        """What the source of the intervals makes of it, in a model that learns."""
        value = getattr(self._in_flight, "value", None)
        if value is None and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return self._of_backward().intervals
        intervals: Tensor | None = getattr(self._in_flight, "intervals", None)
        return intervals

    @property
    def found_rows(self) -> dict[Any, Any] | None:
        """What :mod:`modelopt_tdq.model.rows` found for the call in progress; None if there is none in this thread."""
        call = self._in_flight
        return None if getattr(call, "value", None) is None else call.rows

    @property
    def asked_before(self) -> dict[Any, Any]:
        """Of each of :attr:`found_rows` of the call of this thread that ended last, what was asked for."""
        found: dict[Any, Any] = getattr(self._in_flight, "asked_before", {})
        return found

    @property
    def per_frame(self) -> frozenset[int]:
        """How many tokens a frame of the call in progress may have, where frames have times of their own."""
        found: frozenset[int] = getattr(self._in_flight, "per_frame", frozenset())
        return found

    def learned(self, intervals: Tensor | None) -> None:
        """Set the intervals of the call in progress."""
        self._in_flight.intervals = self.last_intervals = intervals

    def _of_backward(self) -> _Finished:
        """The call whose backward pass runs a part of the model again."""
        self._ran_again = True
        calls = [call for reference in self._finished if (call := reference()) is not None]
        if not calls or any(not torch.equal(call.value, calls[0].value) for call in calls):
            raise TdqError(
                "gradient_checkpointing",
                f"{len(calls)} calls before the backward pass",
                "a block runs again in the backward pass, and the call that it belongs to is not known",
                "Use model.enable_gradient_checkpointing(gradient_checkpointing_func=modelopt_tdq.checkpoint(model))",
            )
        return calls[-1]

    @contextmanager
    def at(self, times: Tensor, intervals: Tensor | None = None) -> Iterator[None]:
        """Let parts of the model run by themselves, at these times [1], [B] or [B, N]."""
        self.begin(times)
        self._in_flight.intervals = intervals
        try:
            yield
        finally:
            self.end()

    def begin(self, times: Tensor | None) -> None:
        """A call with these times [1], [B] or [B, N] begins; None: they are not known yet."""
        call = self._in_flight
        call.outer = tuple(getattr(call, name, None) for name in ("value", "intervals", "rows", "per_frame", "outer"))
        call.value, call.intervals, call.rows, call.per_frame = times, None, {}, frozenset()

    def end(self) -> None:
        """The innermost call ends."""
        call = self._in_flight
        if getattr(call, "outer", None) is not None:
            if not torch.compiler.is_compiling() and call.rows:
                call.asked_before = {where: rows.asked for where, rows in call.rows.items()}
            call.value, call.intervals, call.rows, call.per_frame, call.outer = call.outer

    def remember(self, output: Any) -> None:
        """Keep time and intervals of the call in progress for the backward pass of its ``output``, if it has one."""
        value = getattr(self._in_flight, "value", None)
        if value is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        nodes: Iterator[Any] = (leaf.grad_fn for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
        node = next((node for node in nodes if node is not None), None)
        if node is None or torch._C._current_graph_task_id() != -1:
            return
        if self._ran_again:  # the backward pass of what came before has begun
            self._finished, self._ran_again = [], False
        finished = _Finished(value, self._in_flight.intervals)
        node.metadata["modelopt_tdq"] = finished
        self._finished = [reference for reference in self._finished if reference() is not None]
        self._finished.append(weakref.ref(finished))

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the time of the call in progress out of its arguments.

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
        self._in_flight.value = value = times_of_samples(time)
        if value.dim() > 1:
            tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._in_flight.per_frame = tokens_of_a_frame(tensors, value.shape[1])

    def require(self) -> Tensor:
        """[1] or [B] the time of the call in progress, for what knows of one time per sample only.

        Raises:
            TdqError: No call of the model is in progress, or a sample of it has several times. (Compiled graphs raise
                an error of torch.)
        """
        value = self.require_each()
        if value.dim() == 1:
            return value
        if torch.compiler.is_compiling():
            torch._assert_async((value == value[:, :1]).all(), "a sample has several times")
            return value[:, 0]
        raise TdqError(
            "timestep",
            tuple(value.shape),
            f"a sample has several times, {value.min():g} to {value.max():g}; calibrated scales and corrections of a "
            "model that does not learn can follow them, but nothing else can",
            "Pass the same time for all tokens and frames of a sample: samples may have different ones",
        )

    def require_each(self) -> Tensor:
        """[1], [B] or [B, N] the times of the call in progress.

        Raises:
            TdqError: No call of the model is in progress.
        """
        value = self.value
        if value is None:
            raise TdqError(
                "timestep",
                None,
                "a quantizer ran outside of any call of the model that was quantized, so its time is unknown",
                "Call that model itself, as model(...), rather than one of its parts or its forward",
            )
        return value


def times_of_samples(time: Tensor) -> Tensor:
    """The time of each sample, or of each of its tokens or frames where they differ.

    Args:
        time: [], [B], or [B, N, ...].

    Returns:
        [1] or [B] float32, or [B, N] where a sample has several times. Compiled graphs, which cannot look, have [B, N]
        of all [B, N, ...].
    """
    time = time.detach().to(torch.float32)
    if time.dim() < 2 or time.numel() == 0:
        return time.reshape(-1)
    each = time.reshape(len(time), -1).contiguous()
    if each.shape[1] == 1:
        return each[:, 0]
    same = (each == each[:, :1]).all()
    return each if torch.compiler.is_compiling() or not bool(same) else each[:, 0]


def one_of_all(values: Tensor) -> Tensor | None:
    """The first of values [B, ...], [1, ...], if all are the same; else None, and an error of torch where it compiles.

    For what cannot be matched with the samples: tokens that come first, tokens that were sent to an expert.
    """
    same = (values == values[:1]).all()
    if torch.compiler.is_compiling():
        torch._assert_async(same, "times that differ cannot be matched with an activation")
        return values[:1]
    return values[:1] if bool(same) else None


def per_sample(value: Tensor, inputs: Tensor) -> Tensor:
    """One number per time, shaped to go with an activation.

    Args:
        value: [1] for one time, or [B] for a time per sample.
        inputs: The activation [B * n, ...]: video models fold frames, some attentions fold heads, into the batch.

    Returns:
        [1], or [B * n, 1, ...]; [1] as well for another activation, if all samples have the same.

    Raises:
        TdqError: They differ, and the batch is no multiple of their number.
    """
    samples = value.numel()
    if samples == 1:
        return value
    batch = inputs.shape[0] if inputs.dim() else 0
    if batch == 0 or batch % samples:
        one = one_of_all(value)
        if one is not None:
            return one
        raise TdqError(
            "timestep",
            tuple(value.shape),
            f"{samples} times cannot be matched with an activation of shape {tuple(inputs.shape)}",
            "Pass one time for the whole batch, or exclude this quantizer with a `quant_cfg` rule",
        )
    if torch.compiler.is_compiling() or batch != samples:
        value = value.repeat_interleave(batch // samples)
    return value.reshape(batch, *(1,) * (inputs.dim() - 1))


def matched(value: Tensor, inputs: Tensor, timestep: CurrentTimestep, reader: Reader | None, name: str) -> Tensor:
    """One number per time, shaped to go with an activation.

    Args:
        value: [1] for one time, [B] for a time per sample, or [B, N] for one per token or frame.
        inputs: The activation.
        timestep: Of the call in progress.
        reader: The layer that it goes into or comes out of, if that is known.
        name: Of the quantizer, for errors.

    Returns:
        As :func:`per_sample`, or with a dimension of the tokens beside the batch.

    Raises:
        TdqError: They differ, and cannot be matched with the activation.
    """
    if value.dim() < 2:
        return per_sample(value, inputs)
    layout = find_layout(value.shape, inputs.shape, reader, timestep.per_frame)
    if layout is not None:
        return spread(value, layout, inputs.dim())
    return per_sample(one_of_tokens(value, value, inputs.shape, reader, name), inputs)


class _DeliveryHook(NotPickled):
    """The pre-hook: a class rather than a closure, so that models can be copied."""

    def __init__(self, timestep: CurrentTimestep) -> None:
        self.timestep = timestep

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.timestep.begin(None)
        if not torch.compiler.is_compiling():
            threads.enter(module)
        self.timestep.read(args, kwargs)
        learned = module._modules.get(INTERVALS)
        if learned is not None:
            learned.begin(module, self.timestep)  # type: ignore[operator]


class _EndHook:
    """The hook behind the call, which also runs when the call fails."""

    def __init__(self, timestep: CurrentTimestep) -> None:
        self.timestep = timestep

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.timestep.remember(output)
        self.timestep.end()
        if not torch.compiler.is_compiling():
            threads.leave(module)


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
        model.register_forward_hook(_EndHook(timestep), always_call=True)
    timestep.argument, timestep.position = argument, position
    return timestep


def without_delivery(model: nn.Module) -> None:
    """Take both hooks off the root of ``model``."""
    for hooks, options, kind in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs, _DeliveryHook),
        (model._forward_hooks, model._forward_hooks_always_called, _EndHook),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key]
            options.pop(key, None)
