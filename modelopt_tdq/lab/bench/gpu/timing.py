"""Times of things that are compared: in turns, in one process, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["median_times"]

_WARM_UP = 3


def _captured(call: Callable[[], object], inner: int) -> Callable[[], object]:
    """``inner`` calls as one CUDA graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    return graph.replay


def _seconds(call: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def median_times(
    calls: Mapping[str, Callable[[], object]], *, repeats: int, graphs: bool = True, inner: int = 10
) -> dict[str, float]:
    """Seconds of one call each.

    Args:
        calls: By name; each launches its work and waits for nothing.
        repeats: Of every call, in turns, so that a clock that drifts drifts for all.
        graphs: On a GPU, ``inner`` calls are captured as one CUDA graph: the time of the kernels, not of Python.
        inner: Calls per graph.
    """
    on_gpu = torch.cuda.is_available()
    ready = {name: _captured(call, inner) if graphs and on_gpu else call for name, call in calls.items()}
    for call in ready.values():
        for _ in range(_WARM_UP if on_gpu else 1):
            call()
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repeats):
        for name, call in ready.items():
            times[name].append(_seconds(call))
    per = inner if graphs and on_gpu else 1
    return {name: statistics.median(values) / per for name, values in times.items()}
