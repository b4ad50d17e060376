"""What one pass over the calibration data leaves behind, per quantizer and time.

A histogram, the exact range, and how large the largest samples are.

Histograms use bins whose width is a power of two. A range that grows doubles the width by merging
pairs of bins, which is exact; so the result does not depend on the order of the samples, on the batch
size, or on how the samples were spread over processes.

A calibration may visit a thousand times. Beyond 128, neighbouring times share a histogram: what is kept of a quantizer
takes 2 MiB at most. Their ranges stay their own.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from modelopt.torch.quantization.calib.calibrator import _Calibrator
from torch import Tensor

from modelopt_tdq.calibration.growth import LargestSamples, mean_growth
from modelopt_tdq.core.distributed import all_reduce, gather
from modelopt_tdq.core.joined import Joined
from modelopt_tdq.errors import TdqError
from modelopt_tdq.model.timestep import CurrentTimestep
from modelopt_tdq.model.token_times import Reader, by_token, cannot_be_matched, find_layout

__all__ = ["BINS", "ActivationStatistics", "StepStatistics", "too_many_times"]

#: Bins of a histogram, half of them on each side of zero.
BINS = 2048

#: Exponent of the narrowest histogram; smaller activations all fall into its two middle bins.
_SMALLEST = -100

#: Histograms of one quantizer. Where there would be more, times that are next to each other share one, until there are
#: fewer.
_MOST, _FEWER = 128, 96

#: ``torch.histc`` counts in float32, which is exact up to this number.
_EXACT_COUNT = 1 << 24


def _histogram(x: Tensor, exponent: int) -> Tensor:
    """[BINS] float64 counts of float32 ``x`` in [-2^exponent, 2^exponent), each in its exact bin.

    Scaling by a power of two and rounding down are exact, so a value falls into the same bin whatever
    the histogram was widened from; ``torch.histc`` alone rounds values near the edge of a bin.
    """
    bins = (x.flatten() * math.ldexp(BINS / 2, -exponent)).floor_()
    counts = torch.zeros(BINS, dtype=torch.float64, device=x.device)
    for part in torch.split(bins, _EXACT_COUNT):
        counts += torch.histc(part, BINS, -BINS / 2, BINS / 2)
    return counts


def _widened(counts: Tensor, doublings: int) -> Tensor:
    """[BINS] counts over a range that is 2^doublings times as wide: pairs of bins merge."""
    for _ in range(doublings):
        merged = counts.reshape(-1, 2).sum(1)
        counts = torch.zeros_like(counts)
        counts[BINS // 4 : 3 * BINS // 4] = merged
    return counts


@dataclass(eq=False)
class _Histogram:
    """Over [-2^exponent, 2^exponent)."""

    exponent: int
    counts: Tensor  # [BINS] float64

    def widen(self, exponent: int) -> None:
        if exponent > self.exponent:
            self.counts = _widened(self.counts, exponent - self.exponent)
            self.exponent = exponent


@dataclass
class _Row:
    """Of one quantizer's input at one time."""

    histogram: _Histogram  # maybe that of other times, too
    low: float
    high: float
    samples: LargestSamples


@dataclass(frozen=True)
class ActivationStatistics:
    """Statistics of one quantizer's input over K times.

    Attributes:
        counts: [K, BINS] float64, row k over [-2^exponent_k, 2^exponent_k); [G, BINS] where times share them.
        exponent: [K] int64; each row has the finest bins that hold its range.
        low, high: [K] float32, exact minimum and maximum.
        growth: Logarithm of the factor by which the range grows when the samples double, the mean over the times;
            in a calibration, what :func:`~modelopt_tdq.calibration.growth.common_growth` makes of it.
        shared: [K] int64, which of ``counts`` is a row's; None: each has its own.
    """

    counts: Tensor
    exponent: Tensor
    low: Tensor
    high: Tensor
    growth: float = 0.0
    shared: Tensor | None = None

    @property
    def histogram(self) -> Tensor:
        """[K] int64, which of ``counts`` is a row's."""
        return torch.arange(len(self.exponent)) if self.shared is None else self.shared

    def at(self, rows: Tensor) -> ActivationStatistics:
        """Those of other times: ``rows`` [K'] int64 of these."""
        of = {name: getattr(self, name)[rows] for name in ("exponent", "low", "high")}
        return replace(self, **of, shared=self.histogram[rows])

    @property
    def seen(self) -> Tensor:
        """[K] bool: the times at which there was anything."""
        return (self.counts.sum(1) > 0)[self.histogram]

    @property
    def amax(self) -> Tensor:
        """[K] float32, exact maximum of the magnitude."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def width(self) -> Tensor:
        """[K] float64, width of a row's bins."""
        widths = [math.ldexp(2.0 / BINS, exponent) for exponent in self.exponent.tolist()]
        return torch.tensor(widths, dtype=torch.float64)

    def bin_edges(self, row: int) -> Tensor:
        """[BINS + 1] float64, edges of the bins of one row."""
        return (torch.arange(BINS + 1, dtype=torch.float64) - BINS / 2) * self.width[row]

    def on_common_bins(self) -> tuple[Tensor, float]:
        """Counts [K, BINS] of all rows on the widest row's bins, and the width of those."""
        widest = int(self.exponent.max())
        exponents = dict(zip(self.histogram.tolist(), self.exponent.tolist(), strict=True))
        own = [_widened(row, widest - exponents.get(number, widest)) for number, row in enumerate(self.counts)]
        return torch.stack(own)[self.histogram], float(self.width.max())


def too_many_times(max_steps: int) -> TdqError:
    """What is raised where one calibration visits more."""
    return TdqError(
        "max_steps",
        max_steps,
        "forward_loop visits more different times than this",
        "Calibrate on the times of a sampling schedule, or raise `max_steps`",
    )


class StepStatistics(_Calibrator):  # type: ignore[misc]
    """ModelOpt calibrator that keeps a histogram per time; memory is times x BINS, whatever the number of samples.

    Of more than 128 times, neighbours share histograms.

    Args:
        name: Of the quantizer.
        timestep: Of the model.
        max_steps: Times that it may see.
        reader: The layer that the quantizer belongs to, if it is one whose tokens can be told apart.
        temporal: Whether the scale is to follow time; if not, what cannot be told apart is evidence all the same.
    """

    def __init__(
        self,
        name: str,
        timestep: CurrentTimestep,
        max_steps: int,
        reader: Reader | None = None,
        temporal: bool = True,
    ) -> None:
        super().__init__()
        self._name = name
        self._reader = reader
        self._temporal = temporal
        self._timestep = timestep
        self._max_steps = max_steps
        self._rows: dict[float, _Row] = {}
        self._histograms = 0

    @property
    def times(self) -> set[float]:
        """The times seen so far."""
        return set(self._rows)

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Add an activation [B, ...] to the histograms of the current time, or of each sample's or token's own time.

        Raises:
            TdqError: The activation holds NaN or infinity; there are more times than ``max_steps``; the times of the
                samples differ, and their number does not divide B; those of tokens cannot be matched with it.
        """
        time = self._timestep.value
        if time is None:
            raise TdqError(
                "forward_loop", self._name, "a layer ran outside of any call of the model", "Call the model itself"
            )
        if time.dim() > 1:
            self._collect_tokens(x, time)
            return
        times = time.tolist()
        if len(set(times)) == 1:
            self._add(times[0], x)
            return
        if x.dim() == 0 or x.shape[0] % len(times):
            raise TdqError(
                "timestep",
                tuple(time.shape),
                f"{len(times)} times cannot be matched with the input of {self._name}, of shape {tuple(x.shape)}",
                "Pass one time for the whole batch, or exclude this quantizer with a `quant_cfg` rule",
            )
        samples = x.reshape(len(times), -1)
        for value in sorted(set(times)):
            self._add(value, samples[[i for i, t in enumerate(times) if t == value]])

    def _collect_tokens(self, x: Tensor, times: Tensor) -> None:
        """Likewise, of times [B, N]."""
        layout = find_layout(times.shape, x.shape, self._reader, self._timestep.per_frame)
        if layout is None and not self._temporal:  # one scale from all rows: it does not matter in which this is
            self._add(float(times.min()), x)
            return
        if layout is None:
            raise cannot_be_matched(self._name, times.shape, x.shape, self._reader)
        tokens = by_token(x, layout, (times.shape[0], times.shape[1]))
        flat = times.flatten().to(x.device)
        for value in sorted(set(flat.tolist())):
            self._add(value, tokens[flat == value])

    def _add(self, time: float, x: Tensor) -> None:
        x = x.detach().to(torch.float32)
        lows, highs = torch.stack(torch.aminmax(x.reshape(len(x) if x.dim() > 1 else 1, -1), dim=1)).tolist()
        if not all(map(math.isfinite, (*lows, *highs))):
            raise TdqError(
                "forward_loop",
                self._name,
                f"the input of this quantizer held NaN or infinity at time {time:g}",
                "Calibrate on inputs for which the full-precision model is finite",
            )
        low, high = min(lows), max(highs)
        magnitude = max(abs(low), abs(high))
        # frexp: magnitude < 2^exponent, strictly
        exponent = max(math.frexp(magnitude)[1], _SMALLEST) if magnitude > 0 else _SMALLEST
        row = self._rows.get(time)
        if row is None:
            if len(self._rows) == self._max_steps:
                raise too_many_times(self._max_steps)
            counts = torch.zeros(BINS, dtype=torch.float64, device=x.device)
            row = self._rows[time] = _Row(_Histogram(exponent, counts), low, high, LargestSamples())
            self._histograms += 1
        histogram = row.histogram
        histogram.widen(exponent)
        # not in place: a loop may run in torch.inference_mode at one time and outside of it at another
        added = _histogram(x, histogram.exponent).to(histogram.counts.device)
        histogram.counts = histogram.counts + added
        row.low, row.high = min(row.low, low), max(row.high, high)
        row.samples.add([max(-low, high) for low, high in zip(lows, highs, strict=True)])
        if self._histograms > _MOST:
            self._share()

    def _share(self) -> None:
        """Of histograms that are next to each other in time, those of the fewest times become one, and again."""
        groups: dict[_Histogram, list[_Row]] = {}
        for time in sorted(self._rows):
            groups.setdefault(self._rows[time].histogram, []).append(self._rows[time])
        known = list(groups.items())
        while len(known) > _FEWER:
            sizes = [len(rows) + len(others) for (_, rows), (_, others) in itertools.pairwise(known)]
            place = sizes.index(min(sizes))
            (first, rows), (second, others) = known[place : place + 2]
            first.widen(second.exponent)
            second.widen(first.exponent)
            both = _Histogram(first.exponent, first.counts + second.counts.to(first.counts.device))
            known[place : place + 2] = [(both, rows + others)]
        for histogram, rows in known:
            for row in rows:
                row.histogram = histogram
        self._histograms = len(known)

    def statistics(self, times: list[float]) -> ActivationStatistics:
        """All rows, on the CPU, in the order of ``times``; summed over processes."""
        empty = _Row(
            _Histogram(_SMALLEST, torch.zeros(BINS, dtype=torch.float64)), math.inf, -math.inf, LargestSamples()
        )
        rows = [self._rows.get(time, empty) for time in times]
        device = next((row.histogram.counts.device for row in rows if row is not empty), torch.device("cpu"))
        own: dict[_Histogram, list[int]] = {}
        for number, row in enumerate(rows):
            if row is not empty:
                own.setdefault(row.histogram, []).append(number)
        # what any process has together is together in all
        together = Joined(len(times), (group for part in gather(list(own.values())) for group in part)).groups()
        parts = [list(dict.fromkeys(rows[number].histogram for number in group)) for group in together]
        exponents = torch.tensor([max(part.exponent for part in of) for of in parts], device=device)
        exponents = all_reduce(exponents, "max")
        counts = torch.stack(
            [
                sum(
                    (_widened(part.counts.to(device), exponent - part.exponent) for part in of),
                    torch.zeros((), device=device),
                )
                / len(group)
                for of, group, exponent in zip(parts, together, exponents.tolist(), strict=True)
            ]
        )
        counts = all_reduce(counts, "sum")
        low = all_reduce(torch.tensor([row.low for row in rows], dtype=torch.float32, device=device), "min")
        high = all_reduce(torch.tensor([row.high for row in rows], dtype=torch.float32, device=device), "max")
        samples = zip(*gather([row.samples for row in rows]), strict=True)
        shared = torch.empty(len(times), dtype=torch.int64)
        for number, group in enumerate(together):
            shared[group] = number
        return ActivationStatistics(
            counts.cpu(),
            exponents.cpu()[shared],
            low.cpu(),
            high.cpu(),
            mean_growth(list(samples)),
            shared if len(together) < len(times) else None,
        )

    def compute_amax(self, *args: object, **kwargs: object) -> Tensor | None:
        """[] float32: maximum over all times, ModelOpt's contract; None if nothing was collected."""
        if not self._rows:
            return None
        return torch.tensor(max(max(abs(row.low), abs(row.high)) for row in self._rows.values()))

    def reset(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self._histograms = 0
