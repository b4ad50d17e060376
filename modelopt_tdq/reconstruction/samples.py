"""The samples of a reconstruction: calls of the model on its own trajectories, spread evenly over the times."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from modelopt_tdq.core.schedule import row_index
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.batch_axis import BatchAxis
from modelopt_tdq.model.call import cloned
from modelopt_tdq.model.replay import Replay
from modelopt_tdq.model.timestep import CurrentTimestep
from modelopt_tdq.reconstruction.config import TdqReconstructConfig

__all__ = ["Samples", "SpreadReplay", "require_enough_samples"]


class SpreadReplay(Replay):
    """Keeps so many samples in total: the more times there are, the fewer of each.

    At most ``total`` plus one per time are held.

    Args:
        model: The root whose calls are recorded.
        timestep: Its time.
        total: Samples to choose from in the end.
    """

    def __init__(self, model: nn.Module, timestep: CurrentTimestep, total: int) -> None:
        super().__init__(model, timestep, total)
        self._total = total

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        value = self._timestep.value
        if value is not None and value.dim() == 1 and not self._timestep.aside:
            times = set(self._heaps) | set(value.tolist())
            self._limit = max(1, math.ceil(self._total / len(times)))
            for heap in self._heaps.values():
                while len(heap) > self._limit:
                    heapq.heappop(heap)
        super().record(module, args, kwargs)

    def recorded(self, forward_loop: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
        """``forward_loop``, its calls recorded; where it runs again, those of the last time."""

        def recorded(model: nn.Module) -> None:
            self._heaps.clear()
            with self.recording(model):
                forward_loop(model)

        return recorded

    def chosen(self) -> Samples:
        """The samples, as even over the times as can be.

        Samples that do not fit into one batch with the others (other shapes, other flags) are left out.

        Raises:
            TdqError: As :meth:`Replay.batches`; or nothing was recorded.
        """
        self.require_samples()
        times, axis = self.times, self._axis
        if axis is None and times:
            raise TdqError(
                "forward_loop",
                times,
                "its calls cannot be taken apart into samples: the model does not give one sample alone the output "
                "that it has in a call, so blocks cannot be learned on batches of samples",
                'Learn with {"method": "tdq_qat"}, or calibrate with {"method": "tdq"}',
            )
        kept: dict[str, int] = defaultdict(int)
        by_time = {time: [(axis.layout(s), s) for s in self.samples(time)] for time in times} if axis else {}
        for fit, _ in (item for items in by_time.values() for item in items):
            kept[fit] += 1
        if not kept:
            raise TdqError("forward_loop", times, "no call of it can be repeated", "Pass tensors to the model")
        common = max(kept, key=lambda fit: kept[fit])
        rows = [[s for fit, s in by_time[time] if fit == common] for time in times]
        quotas = [0] * len(times)
        for i in range(self._total):
            quotas[(2 * i + 1) * len(times) // (2 * self._total)] += 1
        calls, own = [], []
        for time, row, quota in zip(times, rows, quotas, strict=True):
            for call in row[:quota]:
                # copies, since a loop may run in torch.inference_mode, whose tensors cannot be learned on
                calls.append(cloned(call))
                own.append(time)
        return Samples(calls, torch.tensor(own, dtype=torch.float32), cast("BatchAxis", axis))


@dataclass(frozen=True)
class Samples:
    """Calls of one sample each.

    Attributes:
        calls: Keyword arguments.
        times: [N] float32, ascending, in the model's own units.
        axis: How calls are made of samples.
    """

    calls: list[dict[str, Any]]
    times: Tensor
    axis: BatchAxis

    def __len__(self) -> int:
        return len(self.calls)

    def batches(self, chosen: Sequence[int], size: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """(numbers of the samples, keyword arguments of one call with them).

        Samples of different times share a call where the model was called with a time per sample.

        Args:
            chosen: Numbers of samples, in any order.
            size: Most samples of one call.
        """
        groups: dict[float, list[int]] = defaultdict(list)
        for i in chosen:
            groups[0.0 if self.axis.time in self.axis.own else float(self.times[i])].append(i)
        for numbers in groups.values():
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                yield part, self.call(part)

    def call(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments of one call with these samples."""
        return self.axis.together([self.calls[i] for i in numbers])


def require_enough_samples(
    samples: Samples, description: dict[str, Any], names: list[str], config: TdqReconstructConfig
) -> None:
    """Every learned interval needs a sample at one of its times; a smooth generator needs two times.

    Args:
        samples: Of the run.
        description: Of the source of the intervals.
        names: Of its quantizers.
        config: Of the run.

    Raises:
        TdqError: There are too few.
    """
    timesteps = torch.tensor(description["timesteps"], dtype=torch.float32)
    seen = torch.zeros(len(timesteps), dtype=torch.bool)
    seen[row_index(samples.times, timesteps)] = True
    bins = torch.tensor(description["bins"])
    missing = []
    for column, name in enumerate(names):
        own = bins[:, column]
        empty = sorted(set(own.tolist()) - set(own[seen].tolist()))
        if empty:
            missing.append((name, timesteps[own == empty[0]]))
    smooth = config.intervals in ("thin", "mlp") and len(timesteps) > 1
    if not missing and not (smooth and int(seen.sum()) < 2):
        return
    if missing:
        name, times = missing[0]
        problem = f"no sample for the interval of {name} at {_span(times)}, nor for those of {len(missing) - 1} others"
    else:
        problem = f"{config.intervals} intervals need samples at two times"
    raise TdqError(
        "samples",
        len(samples),
        f"a reconstruction without enough samples for its times: {problem}",
        f"Ask for {len(timesteps)} `samples` or more and record them in forward_loop, or learn fewer intervals: "
        '`bins`, or "intervals": "static"',
    )


def _span(times: torch.Tensor) -> str:
    low, high = float(times.min()), float(times.max())
    return f"time {low:g}" if low == high else f"times {low:g} to {high:g}"
