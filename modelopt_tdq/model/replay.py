"""A bounded sample of the model's own calls, to run some of them again after the one pass over ``forward_loop``.

Per time, the samples with the smallest hash of their content are kept: the choice does not depend on the
order of the samples, on the batch size, or on how they were spread over processes. Memory is
times x samples x the model's inputs.
"""

from __future__ import annotations

import copy
import heapq
import inspect
import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_tdq.core.distributed import gather, rank
from modelopt_tdq.core.together import check
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.call import cloned, layout, stack, take
from modelopt_tdq.model.replay_ranks import Batch, at_time, largest_group
from modelopt_tdq.model.timestep import CurrentTimestep

__all__ = ["Replay"]

#: (minus its priority, order of arrival, keyword arguments of a call with this sample alone)
_Sample = tuple[float, int, dict[str, Any]]

#: Elements of each tensor that the hash of a sample reads.
_HASHED = 512


class Replay:
    """Keeps and re-runs samples of a model's calls.

    A tensor argument belongs to the samples if its first dimension is the batch size, which is that of the
    first tensor argument; other arguments are kept as they are. (A tensor without a batch dimension whose
    first dimension happens to equal the batch size would be taken apart: calibrate with another batch size.)

    Args:
        model: The root whose calls are recorded.
        timestep: Its time.
        samples: Samples kept per time.
    """

    def __init__(self, model: nn.Module, timestep: CurrentTimestep, samples: int) -> None:
        self._timestep, self._limit = timestep, samples
        self._signature = inspect.signature(model.forward)
        self._heaps: dict[float, list[_Sample]] = defaultdict(list)
        self._order = itertools.count()
        self._kept: dict[float, list[float]] = {}
        self._spare: dict[float, dict[str, Any]] = {}
        self._first = True
        unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
        self._unnamed = [name for name, p in self._signature.parameters.items() if p.kind in unnamed]

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: look at a call, keep what belongs to the sample."""
        if self._unnamed:
            return
        arguments = self._by_name(args, kwargs)
        name = self._timestep.argument
        time = arguments.pop(name, None)
        data = [v for v in arguments.values() if isinstance(v, Tensor) and v.dim() > 0]
        if self._timestep.value is None or not data:
            return
        batch = data[0].shape[0]
        times = self._timestep.value.tolist()
        for i in range(batch):
            own = i * len(times) // batch
            sample = {k: take(v, i, batch) for k, v in arguments.items()}
            heap, priority = self._heaps[times[own]], -_priority(sample)
            if len(heap) == self._limit and priority <= heap[0][0]:
                continue
            sample = {k: cloned(v) for k, v in sample.items()}
            sample[name] = cloned(take(time, own, len(times)))
            item = (priority, next(self._order), sample)
            (heapq.heappush if len(heap) < self._limit else heapq.heapreplace)(heap, item)

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for name, value in self._signature.bind(*args, **kwargs).arguments.items():
            if self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(value)
            else:
                arguments[name] = value
        return arguments

    def agree(self) -> None:
        """Keep, over all processes of torch.distributed, what one process that saw all samples would have kept.

        Of processes that saw the very same samples, as those of tensor and context parallelism do, the first counts.
        """
        self._spare = {time: self._sorted(time)[0][2] for time in self.times}
        everyone = gather({time: [priority for priority, _, _ in self._sorted(time)] for time in self.times})
        self._first = everyone.index(everyone[rank()]) == rank()
        distinct = [other for number, other in enumerate(everyone) if everyone.index(other) == number]
        for time in set().union(*distinct):
            priorities = sorted((p for other in distinct for p in other.get(time, [])), reverse=True)
            self._kept[time] = priorities[: self._limit]
        for time in self.times:
            self._heaps[time] = [item for item in self._heaps[time] if item[0] >= self._kept[time][-1]]

    def _sorted(self, time: float) -> list[_Sample]:
        return sorted(self._heaps.get(time, []), key=lambda item: item[:2], reverse=True)

    def halves(self) -> tuple[Replay, Replay]:
        """Two disjoint halves of every time's samples, over all processes: to fit on one and to judge on the other."""
        pair = copy.copy(self), copy.copy(self)
        for half in pair:
            half._heaps = defaultdict(list)
        for time in self.times:
            samples = self._sorted(time)[::-1]
            everyone = sorted(self._kept.get(time, [item[0] for item in samples]))
            for number, item in enumerate(samples):
                equal = sum(other[0] == item[0] for other in samples[:number])
                pair[(bisect_left(everyone, item[0]) + equal) % 2]._heaps[time].append(item)
        return pair

    def _require_names(self) -> None:
        if self._unnamed:
            raise TdqError(
                "model",
                self._unnamed,
                "its forward takes arguments that cannot be passed by name, so its calls cannot be repeated",
                'Name them, or use another "statistic" than "output" and "protect_steps": False',
            )

    def samples(self, time: float) -> list[dict[str, Any]]:
        """Keyword arguments of one call for each sample of a time, in the order of their hashes.

        Raises:
            TdqError: As :meth:`batches`.
        """
        self._require_names()
        return [sample for _, _, sample in self._sorted(time)]

    @property
    def times(self) -> list[float]:
        """Those that have samples, ascending."""
        return sorted(time for time, heap in self._heaps.items() if heap)

    def batches(self, times: list[float]) -> Iterator[Batch]:
        """One call of the model for each time at which any process has samples, in order.

        Samples that do not fit into one batch (other shapes, other flags) are left out: the largest group stays.
        Every process that saw a call in :meth:`record` makes one call per such time; see
        :mod:`modelopt_tdq.model.replay_ranks`. One that saw none makes none: the model ran without it already.

        Raises:
            TdqError: The model's forward takes arguments that cannot be passed by name.
        """
        self._require_names()
        groups: list[dict[str, list[_Sample]]] = []
        for time in times:
            groups.append(defaultdict(list))
            for item in self._sorted(time):
                groups[-1][repr(layout(item[2]))].append(item)
        orders = [{name: [item[0] for item in group] for name, group in row.items()} for row in groups]
        largest = largest_group(orders if self._first else [{} for _ in times])
        for row, (time, name) in enumerate(zip(times, largest, strict=True)):
            check()
            samples = [] if name is None else groups[row].get(name, [])
            if samples:
                call = {k: stack([sample[k] for _, _, sample in samples]) for k in samples[0][2]}
                yield Batch(row, call, tuple(item[0] for item in samples), self._first)
            elif name is not None and self._spare:
                nearest = min(self._spare, key=lambda other: abs(other - time))
                yield Batch(row, at_time(self._spare[nearest], self._timestep.argument, time), (), self._first)


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _leaves(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _leaves(v)


def _priority(sample: dict[str, Any]) -> float:
    """In [0, 1), from the content; moves little when the content moves by a rounding error."""
    total = 0.0
    for number, tensor in enumerate(_leaves(sample), 1):
        flat = tensor.reshape(-1)
        part = flat[:: max(1, flat.numel() // _HASHED)].double()
        # weights that no two positions share, so that neither a shift nor an exchange goes unnoticed
        weights = torch.arange(part.numel(), dtype=torch.float64, device=part.device).mul_(number).cos_()
        total += float(part @ weights)
    return (total * 1024.0 * 0.6180339887498949) % 1.0
