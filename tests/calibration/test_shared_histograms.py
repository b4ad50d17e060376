"""A thousand times: neighbours share histograms, so that what is kept is bounded; ranges stay those of each time."""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt_tdq.calibration.candidates import histogram_error
from modelopt_tdq.calibration.statistics import _FEWER, _MOST, BINS, ActivationStatistics, StepStatistics
from modelopt_tdq.core.joined import Joined
from modelopt_tdq.model.timestep import CurrentTimestep
from tests.support.models import noise

TIMES = [float(time) for time in range(1000, 0, -1)]


def _data(time: float) -> Tensor:
    """Larger as time goes on; nothing at all at the first few times, where the histogram is the narrowest there is."""
    return noise(2, 16, seed=int(time)) * (1 + time / 1000) * (time > 5)


def _collected(times: list[float]) -> tuple[StepStatistics, ActivationStatistics]:
    timestep = CurrentTimestep("timestep", 1)
    collector = StepStatistics("layer.input_quantizer", timestep, 1024)
    for time in times:
        timestep.begin(torch.tensor([time]))
        collector.collect(_data(time))
    return collector, collector.statistics(sorted(collector.times))


def _held(collector: StepStatistics) -> int:
    return sum(row.counts.nbytes for row in {row.histogram for row in collector._rows.values()})


def test_what_is_kept_is_bounded() -> None:
    collector, found = _collected(TIMES)
    assert _held(collector) <= _MOST * BINS * 8
    assert _held(collector) >= _FEWER * BINS * 8
    assert found.counts.nbytes == _held(collector)
    assert found.histogram.shape == found.exponent.shape == (1000,)
    # neighbours: whoever shares a histogram lies together
    assert (found.histogram.diff() >= 0).all()
    assert found.histogram.bincount().max() <= 4 * 1000 // _FEWER
    data = torch.stack([_data(time) for time in sorted(TIMES)]).flatten(1)
    assert torch.equal(found.low, data.min(1).values)
    assert torch.equal(found.high, data.max(1).values)
    assert float(found.counts[found.histogram].sum()) == data.numel()  # each time has its part of what is shared


def test_errors_are_those_of_the_neighbours_together() -> None:
    _, found = _collected(TIMES)
    scale = torch.linspace(0.005, 0.05, 8)
    shared = histogram_error(found, scale, torch.zeros(8), 8)
    assert shared.error.shape == (1000, 8)
    rows = (found.histogram == found.histogram[500]).nonzero().squeeze(1)
    assert 2 <= len(rows) < 64
    _, alone = _collected([sorted(TIMES)[row] for row in rows])
    assert alone.shared is None
    expected = histogram_error(alone, scale, torch.zeros(8), 8).error.mean(0)
    torch.testing.assert_close(shared.error[500], expected, rtol=0.02, atol=0)
    counts, width = found.on_common_bins()
    assert counts.shape == (1000, BINS)
    assert width == float(found.width.max())
    assert torch.equal(counts[rows[0]], counts[rows[-1]])


def test_as_many_times_as_histograms_share_none() -> None:
    _, found = _collected(TIMES[:_MOST])
    assert found.shared is None
    collector, found = _collected(TIMES[: _MOST + 1])
    assert found.shared is not None
    assert len(found.counts) == _FEWER
    collector.reset()
    assert not collector.times


def test_times_without_anything_take_their_neighbours() -> None:
    collector, _ = _collected(TIMES[: _MOST + 2])
    times = sorted([*collector.times, 0.0])
    found = collector.statistics(times)
    assert found.seen.tolist() == [False] + [True] * (_MOST + 2)
    filled = found.at(torch.arange(len(times)).clamp(min=1))
    assert filled.seen.all()
    assert filled.low[0] == filled.low[1]
    assert filled.histogram[0] == filled.histogram[1]


def test_what_any_process_has_together_is_together() -> None:
    assert Joined(8, [[0, 1], [2, 3], [1, 2], [5, 6]]).groups() == [[0, 1, 2, 3], [4], [5, 6], [7]]
    assert Joined(3).groups() == [[0], [1], [2]]
