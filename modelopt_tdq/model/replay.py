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
import weakref
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from modelopt_tdq.core.distributed import gather, processes, rank
from modelopt_tdq.core.together import check
from modelopt_tdq.core.turns import Turns
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.batch_axis import BatchAxis, digest, find_batch_axis
from modelopt_tdq.model.call import cloned, first_output, named_arguments, tensor_leaves, walk
from modelopt_tdq.model.multiply_adds import counted_multiply_adds
from modelopt_tdq.model.replay_ranks import Batch, at_time, largest_group
from modelopt_tdq.model.stored_weight import at_rest
from modelopt_tdq.model.timestep import CurrentTimestep

__all__ = ["Replay"]

#: (minus its priority, order of arrival, keyword arguments of a call with this sample alone)
_Sample = tuple[float, int, dict[str, Any]]

#: Elements of each tensor that the hash of a sample reads.
_HASHED = 512


class Replay:
    """Keeps and re-runs samples of a model's calls.

    What in a call belongs to a sample is found out on the first call, which is run again on one of its samples: see
    :mod:`modelopt_tdq.model.batch_axis`. Calls that cannot be taken apart are kept and run again whole.

    Args:
        model: The root whose calls are recorded.
        timestep: Its time.
        samples: Samples kept per time.
    """

    def __init__(self, model: nn.Module, timestep: CurrentTimestep, samples: int) -> None:
        self._model, self._timestep, self._limit = model, timestep, samples
        #: What processes tell each other in the calls of :meth:`batches`.
        self.turns = Turns(model.modules())
        parameters = inspect.signature(model.forward).parameters
        self._heaps: dict[float, list[_Sample]] = defaultdict(list)
        self._order = itertools.count()
        self._kept: dict[float, list[float]] = {}
        self._spare: dict[float, dict[str, Any]] = {}
        self._first = True
        self._axis: BatchAxis | None = None
        self._looked = False
        self._unfinished: tuple[dict[str, Any], list[float]] | None = None
        self._left_out = 0
        self._largest = 1
        self._multiply_adds: dict[str, int] | None = None
        # one copy of each content: text embeddings and the like are the same at all times
        self._contents: weakref.WeakValueDictionary[tuple[Any, ...], torch.Tensor] = weakref.WeakValueDictionary()
        self._places: dict[str, torch.device] = {}
        self._outputs: dict[int, torch.Tensor] = {}  # by order of arrival
        self._offered: list[tuple[int, int, int]] = []  # order, place and batch of those of the call in progress
        unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
        self._unnamed = [name for name, p in parameters.items() if p.kind in unnamed]

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record the calls of ``model`` meanwhile."""
        handles = [
            model.register_forward_pre_hook(self.record, with_kwargs=True),
            model.register_forward_hook(self._learn_from),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: look at a call, keep what belongs to the sample."""
        if self._unnamed or self._timestep.aside or self._timestep.value is None:
            return
        self._offered = []
        arguments = named_arguments(module, args, kwargs)
        if not any(leaf.dim() for name, leaf in tensor_leaves(arguments).items() if name != self._timestep.argument):
            return
        if self._timestep.value.dim() > 1:  # a sample is kept for its one time
            self._left_out += 1
            return
        times = self._timestep.value.tolist()
        if not self._looked:  # only its output will tell how it is made of samples
            self._unfinished = cloned(arguments), times
            return
        self._keep(arguments, times)

    def _learn_from(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: a call is over; if it is the first, it tells how calls are made of samples."""
        if self._timestep.aside:
            return
        if not self._looked and self._unfinished is not None:
            arguments, times = self._unfinished
            self._looked, self._unfinished = True, None
            watched = nullcontext if processes() > 1 else partial(self._counting, module)
            self._axis = find_batch_axis(module, self._timestep, arguments, output, watched)
            self._keep(arguments, times)
        self._keep_outputs(output)

    @contextmanager
    def _counting(self, module: nn.Module) -> Iterator[None]:
        with counted_multiply_adds(module) as counts:
            yield
        self._multiply_adds = counts

    def _keep_outputs(self, output: Any) -> None:
        """Of the samples of the call that is over, those that were kept."""
        kept = {order for heap in self._heaps.values() for _, order, _ in heap} if self._offered else set()
        for order, place, batch in self._offered:
            rows = first_output(output) if order in kept else None
            if rows is not None and rows.dim() and len(rows) == batch:
                self._outputs[order] = rows[place : place + 1].detach().clone()
        self._offered = []
        for order in self._outputs.keys() - kept if kept else ():
            del self._outputs[order]

    def _keep(self, arguments: dict[str, Any], times: list[float]) -> None:
        batch = None if self._axis is None else self._axis.batch(arguments)
        if self._axis is None or batch is None:  # as it is, or not at all
            if len(set(times)) == 1:
                self._offer(times[0], arguments)
            else:
                self._left_out += 1
            return
        self._largest = max(self._largest, batch)
        for i in range(batch):
            order = self._offer(times[i * len(times) // batch], self._axis.sample(arguments, i, batch))
            if order is not None:
                self._offered.append((order, i, batch))

    def _offer(self, time: float, sample: dict[str, Any]) -> int | None:
        """Keep a sample of a time, if its hash is among the smallest; its order then."""
        content = {name: value for name, value in sample.items() if name != self._timestep.argument}
        heap, priority = self._heaps[time], -_priority(content)
        if len(heap) == self._limit and priority <= heap[0][0]:
            return None
        item = (priority, next(self._order), self._stored(sample))
        (heapq.heappush if len(heap) < self._limit else heapq.heapreplace)(heap, item)
        return item[1]

    def _stored(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A copy on the CPU, which shares its tensors with equal ones of other samples."""

        def store(name: str, leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            self._places[name] = leaf.device
            kept = leaf.detach().to("cpu", copy=True)
            if not _is_plain(kept):
                return kept
            return self._contents.setdefault((kept.dtype, kept.shape, digest(kept)), kept)

        stored: dict[str, Any] = walk(sample, store)
        return stored

    def _placed(self, call: dict[str, Any]) -> dict[str, Any]:
        """Where the model takes it."""

        def place(name: str, leaf: Any) -> Any:
            return leaf.to(self._places.get(name, leaf.device)) if isinstance(leaf, torch.Tensor) else leaf

        placed: dict[str, Any] = walk(call, place)
        return placed

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
        return self._divided(lambda place: place % 2)

    def split(self, first: int) -> tuple[Replay, Replay]:
        """As many samples of every time, over all processes, and the others."""
        return self._divided(lambda place: int(place >= first))

    def _divided(self, part: Callable[[int], int]) -> tuple[Replay, Replay]:
        """By a sample's place among all of its time, whatever process it is in."""
        pair = copy.copy(self), copy.copy(self)
        for one in pair:
            one._heaps = defaultdict(list)
            if self.times:
                one._left_out = 0  # a part may well have none of its own
        for time in self.times:
            samples = self._sorted(time)[::-1]
            everyone = sorted(self._kept.get(time, [item[0] for item in samples]))
            for number, item in enumerate(samples):
                equal = sum(other[0] == item[0] for other in samples[:number])
                pair[part(bisect_left(everyone, item[0]) + equal)]._heaps[time].append(item)
        return pair

    def places(self, time: float, order: Sequence[float]) -> tuple[int, ...]:
        """Of samples of a time, given by their ``order`` (see :class:`Batch`), among all kept in any process."""
        everyone = self._kept.get(time) or sorted(order, reverse=True)
        return tuple(everyone.index(number) for number in order)

    def require_samples(self) -> None:
        """Raise a TdqError if no call can be run again, for its times or its arguments."""
        if self._left_out and not self.times:
            raise TdqError(
                "forward_loop",
                self._left_out,
                "its calls have several times each, and cannot be taken apart into samples of one time to be run again",
                "Call the model with one time per call, or for all tokens of a sample, while it is calibrated: later "
                'each may have its own; or use "protect_steps": False, "correction": "none", "rounding": "nearest" and '
                'another "statistic" than "output"',
            )
        if self._unnamed:
            raise TdqError(
                "model",
                self._unnamed,
                "its forward takes arguments that cannot be passed by name, so its calls cannot be repeated",
                'Name them, or use "protect_steps": False and another "statistic" than "output"',
            )

    def samples(self, time: float) -> list[dict[str, Any]]:
        """Keyword arguments of one call for each sample of a time, in the order of their hashes.

        Raises:
            TdqError: As :meth:`batches`.
        """
        self.require_samples()
        return [self._placed(sample) for _, _, sample in self._sorted(time)]

    @property
    def times(self) -> list[float]:
        """Those that have samples, ascending."""
        return sorted(time for time, heap in self._heaps.items() if heap)

    @property
    def timestep(self) -> CurrentTimestep:
        """Of the model."""
        return self._timestep

    @property
    def is_first(self) -> bool:
        """Whether no process of a lower rank saw the very same samples; known after :meth:`agree`."""
        return self._first

    @property
    def takes_part(self) -> bool:
        """Whether this process makes calls in :meth:`batches`: it saw one; known after :meth:`agree`."""
        return bool(self._spare)

    @property
    def has_samples(self) -> bool:
        """Whether the calls are made of samples, which can be put together in other ways."""
        return self._axis is not None

    @property
    def multiply_adds(self) -> dict[str, int] | None:
        """Those of one sample, by module, counted when it was found out what belongs to one; None if that is not known.

        See :func:`modelopt_tdq.model.multiply_adds.counted_multiply_adds`.
        """
        return self._multiply_adds if self.has_samples else None

    @property
    def largest_batch(self) -> int:
        """Samples of the largest call that was recorded in this process; 1 where calls are kept whole."""
        return self._largest

    def batches(self, times: list[float], twice: bool = False, most: int | None = None) -> Iterator[Batch]:
        """Calls of the model for each time at which any process has samples, in order.

        One per time, with all samples of it that fit into one call (other shapes, other flags, other values of what
        samples share are left out: the largest group stays), or several, with ``most`` samples each; or one for each
        call that was kept whole. Every process that saw a call in :meth:`record` makes as many calls per time; see
        :mod:`modelopt_tdq.model.replay_ranks`. One that saw none makes none: the model ran without it already.

        Args:
            times: Those that are run.
            twice: Each call has its samples, and behind them the same once more; only where :attr:`has_samples`.
            most: Samples of a call; None: all of a time.

        Raises:
            TdqError: The model's forward takes arguments that cannot be passed by name.
        """
        self.require_samples()
        groups: list[dict[str, list[_Sample]]] = []
        for time in times:
            groups.append(defaultdict(list))
            if self._axis is not None:
                for item in self._sorted(time):
                    groups[-1][self._axis.layout(item[2])].append(item)
        orders = [{name: [item[0] for item in group] for name, group in row.items()} for row in groups]
        largest = largest_group(orders if self._first else [{} for _ in times])
        calls: list[list[list[_Sample]]] = []
        for row, (time, name) in enumerate(zip(times, largest, strict=True)):
            if self._axis is None:
                calls.append([[item] for item in self._sorted(time)])
            else:
                group = [] if name is None else groups[row].get(name, [])
                size = max(1, len(group) if most is None else most)
                calls.append([group[start : start + size] for start in range(0, len(group), size)])
        for row, sizes in enumerate(zip(*gather([[len(call) for call in own] for own in calls]), strict=True)):
            for own in range(max(map(len, sizes))):
                check()
                self.turns.all_samples = sum(size[own] for size in sizes if own < len(size))
                if own < len(calls[row]):
                    samples = calls[row][own]
                    call = self._together([sample for _, _, sample in samples] * (1 + twice))
                    self.turns.samples = len(samples)
                    order = tuple(item[0] for item in samples)
                    yield Batch(row, call, order, self._first, self._output_of(samples))
                elif self._spare:
                    nearest = min(self._spare, key=lambda other: abs(other - times[row]))
                    call = self._together([self._spare[nearest]] * (1 + twice))
                    self.turns.samples = 0
                    yield Batch(row, at_time(call, self._timestep.argument, times[row]), (), self._first)
                self.turns.over()
        at_rest(self._model)

    def _output_of(self, samples: list[_Sample]) -> torch.Tensor | None:
        outputs = [self._outputs.get(order) for _, order, _ in samples]
        known = [output for output in outputs if output is not None]
        same = len(known) == len(outputs) and len({(output.shape, output.dtype) for output in known}) == 1
        return torch.cat(known) if same else None

    def _together(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        if self._axis is None or len(samples) == 1:
            return self._placed(cloned(samples[0]))  # whoever writes to it writes to no other sample
        return self._placed(self._axis.together(samples))


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized


def _priority(sample: dict[str, Any]) -> float:
    """In [0, 1), from the content; moves little when the content moves by a rounding error."""
    total = 0.0
    for number, tensor in enumerate(tensor_leaves(sample).values(), 1):
        flat = tensor.reshape(-1)
        part = flat[:: max(1, flat.numel() // _HASHED)].double()
        # weights that no two positions share, so that neither a shift nor an exchange goes unnoticed
        weights = torch.arange(part.numel(), dtype=torch.float64, device=part.device).mul_(number).cos_()
        total += float(part @ weights)
    return (total * 1024.0 * 0.6180339887498949) % 1.0
