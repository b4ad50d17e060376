"""A bounded sample of the model's own calls, to run some of them again after the one pass over ``forward_loop``.

Per time, the samples with the smallest hash of their content are kept: the choice does not depend on
the order of the samples or on the batch size. Memory is times x samples x the model's inputs.
"""

from __future__ import annotations

import heapq
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.timestep import CurrentTimestep

__all__ = ["Replay", "first_tensor"]

_Sample = tuple[float, int, dict[str, Any]]


def first_tensor(output: Any) -> Tensor:
    """The tensor of a model output: itself, the first of a tuple, the first field of a diffusers output."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def _priority(sample: Tensor) -> float:
    """In [0, 1), from the content; moves little when the content moves by a rounding error."""
    value = float(sample.reshape(-1)[:64].double().sum())
    return (value * 1024.0 * 0.6180339887498949) % 1.0


class Replay:
    """Keeps and re-runs samples of a model's calls.

    Args:
        model: The root whose calls are recorded.
        timestep: Its time.
        samples: Samples kept per time.
    """

    def __init__(self, model: nn.Module, timestep: CurrentTimestep, samples: int) -> None:
        self._model, self._timestep, self._limit = model, timestep, samples
        self._signature = inspect.signature(model.forward)
        self._heaps: dict[float, list[_Sample]] = {}
        self._order = itertools.count()
        self._time_dtype, self._device = torch.float32, torch.device("cpu")

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: look at a call, keep what belongs to the sample."""
        bound = self._signature.bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        time = self._timestep.value
        argument = self._timestep.argument
        data = [v for k, v in arguments.items() if isinstance(v, Tensor) and v.dim() > 0 and k != argument]
        if time is None or not data:
            return
        raw = arguments.get(argument)
        self._time_dtype = raw.dtype if isinstance(raw, Tensor) else torch.float32
        self._device = time.device
        batch = data[0].shape[0]
        times = time.tolist() * (batch if time.numel() == 1 else 1)
        for i in range(batch):
            sample_time = times[i] if i < len(times) else times[0]
            heap = self._heaps.setdefault(sample_time, [])
            priority = -_priority(data[0][i])
            if len(heap) == self._limit and priority <= heap[0][0]:
                continue
            sample = {k: _take(v, i, batch) for k, v in arguments.items() if k != argument}
            item = (priority, next(self._order), sample)
            (heapq.heappush if len(heap) < self._limit else heapq.heapreplace)(heap, item)

    def batches(self, times: list[float]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row, keyword arguments of one call) for each time that has samples, in order."""
        for row, time in enumerate(times):
            heap = sorted(self._heaps.get(time, []), reverse=True)
            if not heap:
                continue
            samples = [sample for _, _, sample in heap]
            call = {k: _stack([sample[k] for sample in samples]) for k in samples[0]}
            call[self._timestep.argument] = torch.full(
                (len(samples),), time, dtype=self._time_dtype, device=self._device
            )
            yield row, call


def _take(value: Any, index: int, batch: int) -> Any:
    if isinstance(value, Tensor):
        value = value.detach()
        return value[index : index + 1].clone() if value.dim() and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {k: _take(v, index, batch) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take(v, index, batch) for v in value)
    return value


def _stack(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values) if first.dim() and first is not values[-1] and first.shape[0] == 1 else first
    if isinstance(first, dict):
        return {k: _stack([v[k] for v in values]) for k in first}
    if isinstance(first, (list, tuple)):
        return type(first)(_stack(list(items)) for items in zip(*values, strict=True))
    return first
