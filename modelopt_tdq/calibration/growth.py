"""How far the range of an activation would grow with more samples, told from the samples that were seen.

The largest magnitude of twice as many samples is not known. That of half as many is: its logarithm, averaged over all
ways to choose the half, is lower by the growth of one doubling. Where tails are exponential or heavier, the next
doublings add as much each (the largest of n values grows with log n, see Coles, An Introduction to Statistical Modeling
of Extreme Values, 2001, chapter 3).

The few samples of a calibration tell the growth of one activation badly, and that of all together well. Where the
largest estimates were believed, a converged U-Net with all its layers quantized lost 3 dB to no margin at all; with the
mean of all, none.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["LargestSamples", "common_growth", "mean_growth"]

#: Largest samples that are kept. Of a random half, each of them is the largest with half the probability of the one
#: before: what is left out counts for 2^-16.
_KEPT = 16

#: An activation that grows by less than this fraction of what others do is known as it is: one that depends on the time
#: alone is the same in all samples.
_HARDLY = 0.1


class LargestSamples:
    """The largest magnitudes of an activation, sample by sample; the same in any order and grouping.

    Attributes:
        count: Samples seen.
        largest: At most 16 magnitudes, descending.
    """

    def __init__(self, count: int = 0, largest: Iterable[float] = ()) -> None:
        self.count = count
        self.largest: list[float] = heapq.nlargest(_KEPT, largest)

    def add(self, magnitudes: list[float]) -> None:
        """Add samples with these largest magnitudes."""
        self.count += len(magnitudes)
        self.largest = heapq.nlargest(_KEPT, [*self.largest, *magnitudes])

    def growth(self) -> float | None:
        """Logarithm of the factor by which the range grows when the samples double; None of fewer than two samples.

        Nothing where all samples are zero.
        """
        if self.count < 2:
            return None
        if not self.largest or self.largest[0] == 0.0:
            return 0.0
        half = self.count // 2
        expected, left = 0.0, 1.0
        for rank, magnitude in enumerate(self.largest):
            # that this one is in the half, given that no larger one is; the last that is kept stands for the rest
            chosen = half / (self.count - rank) if rank < len(self.largest) - 1 else 1.0
            expected += left * chosen * math.log(max(magnitude, 1e-30) / self.largest[0])
            left *= 1.0 - chosen
        return -expected * math.log(2.0) / math.log(self.count / half)


def mean_growth(rows: Sequence[Sequence[LargestSamples]]) -> float:
    """Mean of :meth:`LargestSamples.growth` over rows; each is given in parts, as several processes saw them.

    Zero if no row has two samples.
    """
    found = []
    for parts in rows:
        magnitudes = (magnitude for part in parts for magnitude in part.largest)
        growth = LargestSamples(sum(part.count for part in parts), magnitudes).growth()
        if growth is not None:
            found.append(growth)
    return _mean(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def common_growth(growth: Mapping[str, float]) -> dict[str, float]:
    """What each activation of a model is taken to grow by: the mean of those that grow; what hardly grows, by its own.

    Args:
        growth: Logarithm of the factor of one doubling, of each activation alone.
    """
    growing = [value for value in growth.values() if value > 0.0]
    least = _HARDLY * _mean(growing)
    mean = _mean([value for value in growing if value >= least])
    return {name: mean if value >= _HARDLY * mean else value for name, value in growth.items()}
